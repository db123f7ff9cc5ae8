//! What one service asks of the tables.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::chains::{Handle, Role, SharedChain};
use super::layout::{By, Scope, ServiceSet};
use super::settings::{LocalDetector, Settings};
use super::skeleton::{FIREWALL, REJECT};
use super::topology;
use crate::model::{
    Claim, EndpointOf, Family, Node, ObjectName, Protocol, Service, ServicePort, Store,
    TrafficPolicy,
};
use crate::ruleset::{Data, Element, Key, KeyBuilder, Verdict, merge_intervals};

/// Address and port of an endpoint.
pub type Target = (IpAddr, u16);

/// Everything a service contributes to the tables, in a compact form.
///
/// It is kept for as long as its rules stand: the elements to delete later are those of the plan
/// that was in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// What packets can be addressed to.
    pub frontends: Box<[Frontend]>,
    /// The endpoints of each service port and family.
    pub pools: Box<[Pool]>,
    /// The ClusterIPs: other ports on them are refused.
    pub cluster_ips: Box<[IpAddr]>,
    /// Addresses of endpoints that may be on this node.
    pub hairpin: Box<[IpAddr]>,
    /// `sessionAffinity` ClientIP with its timeout.
    pub affinity_seconds: Option<u32>,
    /// `loadBalancerSourceRanges` that restrict the load balancer's addresses.
    pub source_ranges: Box<[IpNet]>,
}

/// The endpoints that a service port leads to in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// `namespace/name` or `namespace/name:port`, for the person who reads the ruleset.
    pub label: Arc<str>,
    /// The protocol of the port; with label, family and scope it identifies the pool.
    pub protocol: Protocol,
    /// The family of the endpoints.
    pub family: Family,
    /// Whether these are the endpoints of the cluster or those on this node.
    pub scope: Scope,
    /// The endpoints by index.
    pub targets: Box<[Target]>,
    /// Endpoints that serve although they were not chosen, by policy or topology or because they
    /// terminate: no new flow leads to them, but those that do go on. Known for UDP only, where
    /// flows to all others have to be ended.
    pub unchosen: Box<[Target]>,
}

/// Something packets can be addressed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Address, protocol and port.
    pub at: Claim,
    /// What happens to its packets.
    pub route: Route,
    /// Whether the source ranges of the service apply.
    pub firewalled: bool,
}

/// What happens to the packets of a frontend. Pools are given by their index in the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// They go to the endpoints of a pool, through a chain of this role; without an endpoint
    /// they are refused.
    Balance(Role, u16),
    /// They go to the endpoints of a pool; without one they are dropped, because there are
    /// endpoints elsewhere.
    BalanceOrDrop(Role, u16),
    /// External policy Local: the pool for traffic of this node, and the one for all others.
    LocalPolicy {
        /// The endpoints of the cluster.
        cluster: u16,
        /// The endpoints on this node.
        local: u16,
    },
}

/// An element and the set it belongs to.
pub type ElementOf = (ServiceSet, Element);

/// Compiles one service.
///
/// `previous` is the plan in force: endpoints that stay keep their index, so that a change
/// touches no more elements than endpoints. `None` is returned for a service without any rule.
pub fn plan(
    store: &Store,
    name: &ObjectName,
    settings: &Settings,
    previous: Option<&ServicePlan>,
) -> Option<ServicePlan> {
    let service = store.service(name).filter(|s| s.has_frontends())?;
    let mut compiler = Compiler {
        store,
        service,
        settings,
        node: store.node().map(|node| &**node),
        previous,
        frontends: Vec::new(),
        pools: Vec::new(),
        hairpin: BTreeSet::new(),
    };
    for family in Family::ALL {
        compiler.family(family);
    }
    let cluster_ips: BTreeSet<IpAddr> = service.cluster_ips.iter().copied().collect();
    let plan = ServicePlan {
        frontends: compiler.frontends.into(),
        pools: compiler.pools.into(),
        cluster_ips: cluster_ips.into_iter().collect(),
        hairpin: compiler.hairpin.into_iter().collect(),
        affinity_seconds: service.affinity_seconds,
        source_ranges: restricting(service, store.node().map(|node| &**node)),
    };
    let empty = plan.frontends.is_empty() && plan.cluster_ips.is_empty();
    (!empty).then_some(plan)
}

/// Whether the source ranges keep anyone of a family out.
///
/// A range of prefix length 0 means everyone of its family (kube-proxy's `serviceport.go`), and of
/// the other one too if that has no range of its own. Ranges of one family alone, none of them
/// for everyone, do not mention the clients of the other one, which are kept out.
fn restricts(service: &Service, family: Family) -> bool {
    let is_own = |net: &&IpNet| Family::of(net.addr()) == family;
    let (own, others): (Vec<&IpNet>, Vec<&IpNet>) = service.source_ranges.iter().partition(is_own);
    let deciding = if own.is_empty() { others } else { own };
    !deciding.is_empty() && deciding.iter().all(|net| net.prefix_len() > 0)
}

/// The source ranges of the families in which they keep anyone out. If the node itself is let in,
/// so are the load balancer's own addresses: that is what the node's traffic to them may come
/// from.
fn restricting(service: &Service, node: Option<&Node>) -> Box<[IpNet]> {
    let mut ranges = Vec::new();
    for family in Family::ALL {
        if !restricts(service, family) {
            continue;
        }
        let is_own = |address: IpAddr| Family::of(address) == family;
        let own = service.source_ranges.iter().copied();
        ranges.extend(own.filter(|net| is_own(net.addr())));
        let node_ip = node.and_then(|node| node.primary_ip(family));
        if node_ip.is_some_and(|ip| ranges.iter().any(|net: &IpNet| net.contains(&ip))) {
            let addresses = service.load_balancer_ips.iter().copied();
            ranges.extend(
                addresses
                    .filter(|address| is_own(*address))
                    .map(IpNet::from),
            );
        }
    }
    ranges.sort_unstable();
    ranges.dedup();
    ranges.into()
}

struct Compiler<'a> {
    store: &'a Store,
    service: &'a Service,
    settings: &'a Settings,
    node: Option<&'a Node>,
    previous: Option<&'a ServicePlan>,
    frontends: Vec<Frontend>,
    pools: Vec<Pool>,
    hairpin: BTreeSet<IpAddr>,
}

/// The pools of one service port in one family, as they are needed.
struct PortPools<'a> {
    port: &'a ServicePort,
    label: Arc<str>,
    family: Family,
    endpoints: Vec<EndpointOf<'a>>,
    cluster: Option<u16>,
    local: Option<u16>,
}

impl<'a> Compiler<'a> {
    /// A service has frontends in a family if it has an address of it; NodePorts follow the
    /// ClusterIPs (`ipFamilies`).
    fn family(&mut self, family: Family) {
        let service = self.service;
        let own = |addresses: &[IpAddr]| -> BTreeSet<IpAddr> {
            let own = addresses.iter().copied();
            own.filter(|address| Family::of(*address) == family)
                .collect()
        };
        let cluster_ips = own(&service.cluster_ips);
        let load_balancer_ips = own(&service.load_balancer_ips);
        let external_ips = own(&service.external_ips);
        let firewalled = restricts(service, family);
        for port in &service.ports {
            let mut pools = PortPools {
                port,
                label: label(&service.name, &port.name),
                family,
                endpoints: self.store.endpoints(&service.name, port, family),
                cluster: None,
                local: None,
            };
            let at = |address: &IpAddr| Claim::Address(*address, port.protocol, port.port);
            // An address that comes up in several roles is handled in the first of them.
            for address in &cluster_ips {
                let route = self.internal_route(&mut pools);
                self.add(at(address), route, false);
            }
            for address in &load_balancer_ips {
                let route = self.external_route(&mut pools);
                self.add(at(address), route, firewalled);
            }
            for address in &external_ips {
                let route = self.external_route(&mut pools);
                self.add(at(address), route, false);
            }
            if let Some(number) = port.node_port.filter(|_| !cluster_ips.is_empty()) {
                let route = self.external_route(&mut pools);
                self.add(Claim::NodePort(port.protocol, number), route, false);
            }
        }
    }

    /// Adds a frontend unless an older service has it, or this one in another role.
    fn add(&mut self, at: Claim, route: Option<Route>, firewalled: bool) {
        let ours = self.store.owner(&at) == Some(&self.service.name);
        // The NodePort of a dual-stack service comes up once a family.
        let again = self.frontends.iter().any(|frontend| {
            frontend.at == at
                && self.family_of(frontend) == route.as_ref().map(|r| self.family_at(r))
        });
        if let (true, false, Some(route)) = (ours, again, route) {
            self.frontends.push(Frontend {
                at,
                route,
                firewalled,
            });
        }
    }

    fn family_of(&self, frontend: &Frontend) -> Option<Family> {
        Some(self.family_at(&frontend.route))
    }

    fn family_at(&self, route: &Route) -> Family {
        let pool = self.pools.get(usize::from(route.first_pool()));
        pool.map_or(Family::V4, |pool| pool.family)
    }

    /// The route of a ClusterIP (`internalTrafficPolicy`).
    fn internal_route(&mut self, pools: &mut PortPools<'a>) -> Option<Route> {
        let masquerade_all = self.settings.masquerade_all;
        let role = match self.settings.detector(pools.family) {
            _ if masquerade_all => Role::External,
            LocalDetector::None => Role::Balance(Scope::Cluster),
            LocalDetector::PodNetworks | LocalDetector::Interface(_) => Role::Cluster,
        };
        match self.service.internal_policy {
            TrafficPolicy::Cluster => Some(Route::Balance(role, self.cluster_pool(pools)?)),
            TrafficPolicy::Local => {
                let elsewhere = !topology::cluster(&pools.endpoints, self.node).is_empty();
                let local = self.local_pool(pools)?;
                Some(if elsewhere {
                    Route::BalanceOrDrop(role, local)
                } else {
                    Route::Balance(role, local)
                })
            }
        }
    }

    /// The route of any other frontend (`externalTrafficPolicy`).
    fn external_route(&mut self, pools: &mut PortPools<'a>) -> Option<Route> {
        let cluster = self.cluster_pool(pools)?;
        match self.service.external_policy {
            TrafficPolicy::Cluster => Some(Route::Balance(Role::External, cluster)),
            TrafficPolicy::Local => Some(Route::LocalPolicy {
                cluster,
                local: self.local_pool(pools)?,
            }),
        }
    }

    fn cluster_pool(&mut self, pools: &mut PortPools<'a>) -> Option<u16> {
        if pools.cluster.is_none() {
            let chosen = topology::cluster(&pools.endpoints, self.node);
            pools.cluster = self.pool(pools, Scope::Cluster, &chosen);
        }
        pools.cluster
    }

    fn local_pool(&mut self, pools: &mut PortPools<'a>) -> Option<u16> {
        if pools.local.is_none() {
            let chosen = topology::local(&pools.endpoints, self.node);
            pools.local = self.pool(pools, Scope::Local, &chosen);
        }
        pools.local
    }

    /// Makes a pool and returns its index; `None` when a service has more than the index holds.
    fn pool(&mut self, pools: &PortPools<'a>, scope: Scope, chosen: &[EndpointOf]) -> Option<u16> {
        let index = u16::try_from(self.pools.len()).ok()?;
        let node = self.node.map(|node| &*node.name);
        self.hairpin.extend(
            chosen
                .iter()
                .filter(|e| topology::may_be_on(e, node))
                .map(|e| e.endpoint.address),
        );
        let previous = self.previous.and_then(|plan| {
            plan.pools.iter().find(|pool| {
                pool.label == pools.label
                    && pool.protocol == pools.port.protocol
                    && pool.family == pools.family
                    && pool.scope == scope
            })
        });
        let previous = previous.map_or(&[][..], |pool| &*pool.targets);
        self.pools.push(Pool {
            label: pools.label.clone(),
            protocol: pools.port.protocol,
            family: pools.family,
            scope,
            targets: assign(previous, chosen.iter().map(EndpointOf::target).collect()),
            unchosen: match pools.port.protocol {
                Protocol::Udp => topology::unchosen(&pools.endpoints, chosen),
                Protocol::Tcp | Protocol::Sctp => Box::default(),
            },
        });
        Some(index)
    }
}

fn label(service: &ObjectName, port: &str) -> Arc<str> {
    if port.is_empty() {
        Arc::from(service.as_str())
    } else {
        Arc::from(format!("{service}:{port}"))
    }
}

/// Gives every endpoint an index: those that stay keep theirs where they can, holes are filled
/// from the end and with the new ones.
fn assign(previous: &[Target], wanted: Vec<Target>) -> Box<[Target]> {
    let kept: BTreeSet<Target> = previous.iter().copied().collect();
    // `wanted` is sorted and unique.
    let is_wanted = |target: &Target| wanted.binary_search(target).is_ok();
    let mut slots: Vec<Option<Target>> = previous
        .iter()
        .map(|target| Some(*target).filter(is_wanted))
        .collect();
    let moved: Vec<Target> = slots
        .get(wanted.len()..)
        .unwrap_or_default()
        .iter()
        .copied()
        .flatten()
        .collect();
    slots.resize(wanted.len(), None);
    let new = wanted
        .iter()
        .copied()
        .filter(|target| !kept.contains(target));
    let mut rest = moved.into_iter().chain(new);
    slots
        .into_iter()
        .filter_map(|slot| slot.or_else(|| rest.next()))
        .collect()
}

impl Route {
    /// The pool of the family's endpoints as the policy of the frontend sees them first.
    pub fn first_pool(&self) -> u16 {
        match self {
            Route::Balance(_, pool) | Route::BalanceOrDrop(_, pool) => *pool,
            Route::LocalPolicy { cluster, .. } => *cluster,
        }
    }
}

impl Frontend {
    /// How packets to it are recognised.
    pub fn by(&self) -> By {
        match self.at {
            Claim::Address(..) => By::Address,
            Claim::NodePort(..) => By::NodePort,
        }
    }

    fn key(&self) -> KeyBuilder {
        match &self.at {
            Claim::Address(address, protocol, port) => Key::build()
                .address(*address)
                .protocol(protocol.number())
                .port(*port),
            Claim::NodePort(protocol, port) => Key::build().protocol(protocol.number()).port(*port),
        }
    }
}

/// Where a verdict element leads.
enum Goal {
    Chain(SharedChain),
    Refuse,
    Drop,
}

impl Goal {
    fn verdict(&self) -> Verdict {
        match self {
            Goal::Chain(chain) => Verdict::Goto(chain.name()),
            Goal::Refuse => Verdict::Goto(REJECT.into()),
            Goal::Drop => Verdict::Drop,
        }
    }
}

impl ServicePlan {
    fn pool(&self, index: u16) -> Option<&Pool> {
        self.pools.get(usize::from(index))
    }

    fn of_family(&self, family: Family) -> impl Iterator<Item = (&Frontend, &Pool)> + '_ {
        self.frontends.iter().filter_map(move |frontend| {
            let pool = self.pool(frontend.route.first_pool())?;
            (pool.family == family).then_some((frontend, pool))
        })
    }

    fn handle(&self, by: By, role: Role, pool: &Pool) -> Option<SharedChain> {
        let endpoints = u32::try_from(pool.targets.len()).ok()?;
        (endpoints > 0).then_some(SharedChain::Handle(Handle {
            by,
            role,
            sticky: self.affinity_seconds.is_some(),
            endpoints,
        }))
    }

    /// Where a frontend's packets go at first.
    fn goal(&self, frontend: &Frontend) -> Goal {
        let chain = |role, pool| {
            self.pool(pool)
                .and_then(|pool| self.handle(frontend.by(), role, pool))
        };
        match frontend.route {
            Route::Balance(role, pool) => chain(role, pool).map_or(Goal::Refuse, Goal::Chain),
            Route::BalanceOrDrop(role, pool) => chain(role, pool).map_or(Goal::Drop, Goal::Chain),
            Route::LocalPolicy { cluster, .. } => {
                chain(Role::LocalPolicy, cluster).map_or(Goal::Refuse, Goal::Chain)
            }
        }
    }

    /// Where packets of a frontend with external policy Local go that do not come from this node.
    fn local_chain(&self, frontend: &Frontend) -> Option<(&Pool, SharedChain)> {
        let Route::LocalPolicy { local, .. } = frontend.route else {
            return None;
        };
        let pool = self.pool(local)?;
        let chain = self.handle(frontend.by(), Role::Balance(Scope::Local), pool)?;
        Some((pool, chain))
    }

    /// Every frontend with each pool that its packets may go to.
    pub fn reach(&self) -> impl Iterator<Item = (&Frontend, &Pool)> + '_ {
        self.frontends.iter().flat_map(move |frontend| {
            let pools = match frontend.route {
                Route::Balance(_, pool) | Route::BalanceOrDrop(_, pool) => [Some(pool), None],
                Route::LocalPolicy { cluster, local } => [Some(cluster), Some(local)],
            };
            let pools = pools.into_iter().flatten();
            pools.filter_map(move |pool| Some((frontend, self.pool(pool)?)))
        })
    }

    /// The elements that belong to this service alone, for the table of a family.
    pub fn own_elements(&self, family: Family) -> Vec<ElementOf> {
        let mut elements = Vec::new();
        for (frontend, pool) in self.of_family(family) {
            self.frontend_elements(frontend, pool, &mut elements);
        }
        elements
    }

    fn frontend_elements(&self, frontend: &Frontend, pool: &Pool, elements: &mut Vec<ElementOf>) {
        let (by, at) = (frontend.by(), frontend.key());
        let mut lead = |set: ServiceSet, verdict: Verdict| {
            let element = Element::with_verdict(at.clone().finish(), verdict);
            elements.push((set, element.comment(&pool.label)));
        };
        let goal = self.goal(frontend);
        if frontend.firewalled {
            lead(by.frontends(Scope::Cluster), Verdict::Goto(FIREWALL.into()));
            lead(ServiceSet::FirewalledFrontends, goal.verdict());
        } else {
            lead(by.frontends(Scope::Cluster), goal.verdict());
        }
        let local = self.local_chain(frontend);
        if let Some((_, chain)) = local {
            lead(by.frontends(Scope::Local), Verdict::Goto(chain.name()));
        }
        let leads_on = matches!(goal, Goal::Chain(_));
        if let Some(seconds) = self.affinity_seconds.filter(|_| leads_on) {
            let learn = SharedChain::Learn { seconds };
            lead(by.affinity(), Verdict::Goto(learn.name()));
        }
        if frontend.firewalled {
            elements.extend(self.allowed_sources(frontend, pool.family));
        }
        // ClusterIPs with internal policy Local find their endpoints where all ClusterIPs do.
        let pools = [(pool, Scope::Cluster)]
            .into_iter()
            .chain(local.map(|(pool, _)| (pool, Scope::Local)));
        for (pool, scope) in pools {
            let map = by.endpoints(scope);
            elements.reserve(pool.targets.len());
            for (index, (address, port)) in (0u32..).zip(&pool.targets) {
                let key = at.clone().number(index).finish();
                let data = Data::build().address(*address).port(*port).finish();
                elements.push((map, Element::with_data(key, data)));
            }
        }
    }

    fn allowed_sources(&self, frontend: &Frontend, family: Family) -> Vec<ElementOf> {
        let own = self.source_ranges.iter().copied();
        let own = own.filter(|net| Family::of(net.addr()) == family);
        let of_client = |client: &Key| frontend.key().bytes(client.as_bytes()).finish();
        merge_intervals(own)
            .into_iter()
            .map(|range| {
                let element = Element {
                    key_end: range.key_end.as_ref().map(of_client),
                    ..Element::new(of_client(&range.key))
                };
                (ServiceSet::AllowedSources, element)
            })
            .collect()
    }

    /// The elements that other services may ask for too, for the table of a family.
    pub fn shared_elements(&self, family: Family) -> Vec<ElementOf> {
        let of_family = |addresses: &'_ [IpAddr]| {
            let own = addresses.iter().copied();
            own.filter(|address| Family::of(*address) == family)
                .collect::<Vec<_>>()
        };
        let cluster_ips = of_family(&self.cluster_ips)
            .into_iter()
            .map(|address| (ServiceSet::ClusterIps, Element::new(Key::address(address))));
        let pairs = of_family(&self.hairpin).into_iter().map(|address| {
            let pair = Key::build().address(address).address(address).finish();
            (ServiceSet::Hairpin, Element::new(pair))
        });
        cluster_ips.chain(pairs).collect()
    }

    /// The shared chains that the verdicts lead to, with all that those go on to. A chain that
    /// several frontends use comes up as often.
    pub fn chains(&self, family: Family) -> impl Iterator<Item = SharedChain> + '_ {
        self.of_family(family).flat_map(|(frontend, _)| {
            let goal = match self.goal(frontend) {
                Goal::Chain(chain) => Some(chain),
                Goal::Refuse | Goal::Drop => None,
            };
            let local = self.local_chain(frontend).map(|(_, chain)| chain);
            let seconds = self.affinity_seconds.filter(|_| goal.is_some());
            let learn = seconds.map(|seconds| SharedChain::Learn { seconds });
            [goal, local, learn]
                .into_iter()
                .flatten()
                .flat_map(SharedChain::closure)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(n: u8) -> Target {
        (IpAddr::from([10, 0, 0, n]), 80)
    }

    fn assigned(previous: &[u8], wanted: &[u8]) -> Vec<u8> {
        let previous: Vec<_> = previous.iter().copied().map(target).collect();
        let mut wanted: Vec<_> = wanted.iter().copied().map(target).collect();
        wanted.sort_unstable();
        let slots = assign(&previous, wanted);
        let last = |address: &IpAddr| match address {
            IpAddr::V4(v4) => v4.octets()[3],
            IpAddr::V6(_) => unreachable!("the test uses IPv4"),
        };
        slots.iter().map(|(address, _)| last(address)).collect()
    }

    #[test]
    fn endpoints_that_stay_keep_their_index() {
        assert_eq!(assigned(&[], &[3, 1, 2]), [1, 2, 3]);
        assert_eq!(
            assigned(&[1, 2, 3], &[1, 3]),
            [1, 3],
            "the last fills the hole"
        );
        assert_eq!(assigned(&[1, 2, 3], &[1, 2, 3, 0]), [1, 2, 3, 0]);
        assert_eq!(
            assigned(&[5, 2, 9], &[5, 7, 9]),
            [5, 7, 9],
            "replaced in place"
        );
        assert_eq!(assigned(&[1, 2, 3, 4], &[4]), [4]);
        assert!(assigned(&[1, 2], &[]).is_empty());
    }
}
