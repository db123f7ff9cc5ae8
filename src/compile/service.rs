//! Compiles one service: which frontends it has, and which endpoints each of them leads to.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};
use ipnet::IpNet;

use super::chains::Role;
use super::layout::{Clients, Scope};
use super::plan::{Affinity, Frontend, Pool, Route, ServicePlan, Target};
use super::settings::{LocalDetector, Settings};
use super::size::{self, TooLarge};
use super::sources::SourceList;
use super::topology;
use crate::model::{
    Claim, EndpointOf, Family, Node, ObjectName, Protocol, Service, ServicePort, SlicesOf, Store,
    TrafficPolicy,
};

/// Compiles one service.
///
/// `previous` is the plan in force: endpoints that stay keep their index, so that a change
/// touches no more elements than endpoints. `None` is returned for a service without any rule.
///
/// # Errors
///
/// If the service asks for more elements than one may have. Nothing of it is compiled then.
pub fn plan(
    store: &Store,
    name: &ObjectName,
    settings: &Settings,
    previous: Option<&ServicePlan>,
) -> Result<Option<ServicePlan>, TooLarge> {
    let Some(service) = store.service(name).filter(|s| s.has_frontends()) else {
        return Ok(None);
    };
    let slices = store.slices_of(name);
    let node = store.node().map(|node| &**node);
    size::check(service, &slices, node)?;
    let mut compiler = Compiler {
        store,
        service,
        settings,
        node,
        slices,
        previous: previous.map_or_else(HashMap::new, by_port),
        frontends: Vec::new(),
        known: HashSet::new(),
        pools: Vec::new(),
        hairpin: Vec::new(),
    };
    for family in Family::ALL {
        compiler.family(family);
    }
    let cluster_ips: BTreeSet<IpAddr> = service.cluster_ips.iter().copied().collect();
    compiler.hairpin.sort_unstable();
    compiler.hairpin.dedup();
    let plan = ServicePlan {
        frontends: compiler.frontends.into(),
        pools: compiler.pools.into(),
        cluster_ips: cluster_ips.into_iter().collect(),
        hairpin: compiler.hairpin.into(),
        affinity: service.affinity_seconds.map(|seconds| Affinity {
            clients: Clients::of(name.namespace()),
            seconds,
        }),
        sources: Family::ALL
            .map(|family| sources(service, family, store.node().map(|node| &**node), previous)),
    };
    let empty = plan.frontends.is_empty() && plan.cluster_ips.is_empty();
    Ok((!empty).then_some(plan))
}

/// What identifies a pool: label, protocol, family and scope.
type PoolKey<'a> = (&'a str, Protocol, Family, Scope);

fn by_port(plan: &ServicePlan) -> HashMap<PoolKey<'_>, &[Target]> {
    let pools = plan.pools.iter();
    let keyed = pools.map(|pool| {
        let key = (&*pool.label, pool.protocol, pool.family, pool.scope);
        (key, &*pool.targets)
    });
    keyed.collect()
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

/// The source ranges of a family in which they keep anyone out of the load balancer's addresses. If
/// the node itself is let in, so are these addresses: that is what the node's traffic to them may
/// come from.
fn sources(
    service: &Service,
    family: Family,
    node: Option<&Node>,
    previous: Option<&ServicePlan>,
) -> Option<SourceList> {
    let is_own = |address: IpAddr| Family::of(address) == family;
    let mut addresses = service.load_balancer_ips.iter().copied();
    if !restricts(service, family) || !addresses.any(is_own) {
        return None;
    }
    let own = service.source_ranges.iter().copied();
    let mut ranges: Vec<IpNet> = own.filter(|net| is_own(net.addr())).collect();
    let node_ip = node.and_then(|node| node.primary_ip(family));
    if node_ip.is_some_and(|ip| ranges.iter().any(|net| net.contains(&ip))) {
        let addresses = service.load_balancer_ips.iter().copied();
        ranges.extend(addresses.filter(|it| is_own(*it)).map(IpNet::from));
    }
    let previous = previous.and_then(|plan| plan.sources(family));
    Some(SourceList::new(&ranges, previous))
}

struct Compiler<'a> {
    store: &'a Store,
    service: &'a Service,
    settings: &'a Settings,
    node: Option<&'a Node>,
    slices: SlicesOf<'a>,
    /// The endpoints of the plan in force.
    previous: HashMap<PoolKey<'a>, &'a [Target]>,
    frontends: Vec<Frontend>,
    /// What there is a frontend for already.
    known: HashSet<(Claim, Family)>,
    pools: Vec<Pool>,
    hairpin: Vec<IpAddr>,
}

/// The pools of one service port in one family, as they are needed.
struct PortPools<'a> {
    port: &'a ServicePort,
    label: Arc<str>,
    family: Family,
    endpoints: Vec<EndpointOf<'a>>,
    cluster: Option<usize>,
    local: Option<usize>,
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
                endpoints: self.slices.endpoints(port, family),
                cluster: None,
                local: None,
            };
            let at = |address: &IpAddr| Claim::Address(*address, port.protocol, port.port);
            // An address that comes up in several roles is handled in the first of them.
            for address in &cluster_ips {
                let route = self.internal_route(&mut pools);
                self.add(at(address), family, route, false);
            }
            for address in &load_balancer_ips {
                let route = self.external_route(&mut pools);
                self.add(at(address), family, route, firewalled);
            }
            for address in &external_ips {
                let route = self.external_route(&mut pools);
                self.add(at(address), family, route, false);
            }
            if let Some(number) = port.node_port.filter(|_| !cluster_ips.is_empty()) {
                let route = self.external_route(&mut pools);
                self.add(Claim::NodePort(port.protocol, number), family, route, false);
            }
        }
    }

    /// Adds a frontend unless an older service has it, or this one in another role.
    fn add(&mut self, at: Claim, family: Family, route: Route, firewalled: bool) {
        let ours = self.store.owner(&at) == Some(&self.service.name);
        if ours && self.known.insert((at, family)) {
            self.frontends.push(Frontend {
                at,
                family,
                route,
                firewalled,
            });
        }
    }

    /// The route of a ClusterIP (`internalTrafficPolicy`).
    fn internal_route(&mut self, pools: &mut PortPools<'a>) -> Route {
        let masquerade_all = self.settings.masquerade_all;
        let role = match self.settings.detector(pools.family) {
            _ if masquerade_all => Role::External,
            LocalDetector::None => Role::Balance(Scope::Cluster),
            LocalDetector::PodNetworks | LocalDetector::Interface(_) => Role::Cluster,
        };
        match self.service.internal_policy {
            TrafficPolicy::Cluster => Route::Balance(role, self.cluster_pool(pools)),
            TrafficPolicy::Local => {
                let elsewhere = !topology::cluster(&pools.endpoints, self.node).is_empty();
                let local = self.local_pool(pools);
                if elsewhere {
                    Route::BalanceOrDrop(role, local)
                } else {
                    Route::Balance(role, local)
                }
            }
        }
    }

    /// The route of any other frontend (`externalTrafficPolicy`).
    fn external_route(&mut self, pools: &mut PortPools<'a>) -> Route {
        let cluster = self.cluster_pool(pools);
        match self.service.external_policy {
            TrafficPolicy::Cluster => Route::Balance(Role::External, cluster),
            TrafficPolicy::Local => Route::LocalPolicy {
                cluster,
                local: self.local_pool(pools),
            },
        }
    }

    fn cluster_pool(&mut self, pools: &mut PortPools<'a>) -> usize {
        if let Some(pool) = pools.cluster {
            return pool;
        }
        let chosen = topology::cluster(&pools.endpoints, self.node);
        *pools
            .cluster
            .insert(self.pool(pools, Scope::Cluster, &chosen))
    }

    fn local_pool(&mut self, pools: &mut PortPools<'a>) -> usize {
        if let Some(pool) = pools.local {
            return pool;
        }
        let chosen = topology::local(&pools.endpoints, self.node);
        *pools.local.insert(self.pool(pools, Scope::Local, &chosen))
    }

    /// Makes a pool and returns its index.
    fn pool(&mut self, pools: &PortPools<'a>, scope: Scope, chosen: &[EndpointOf]) -> usize {
        let index = self.pools.len();
        let node = self.node.map(|node| &*node.name);
        self.hairpin.extend(
            chosen
                .iter()
                .filter(|e| topology::may_be_on(e, node))
                .map(|e| e.endpoint.address),
        );
        let key = (&*pools.label, pools.port.protocol, pools.family, scope);
        let previous = self.previous.get(&key).copied().unwrap_or_default();
        let targets = assign(previous, chosen.iter().map(EndpointOf::target).collect());
        self.pools.push(Pool {
            label: pools.label.clone(),
            protocol: pools.port.protocol,
            family: pools.family,
            scope,
            targets,
            unchosen: match pools.port.protocol {
                Protocol::Udp => topology::unchosen(&pools.endpoints, chosen),
                Protocol::Tcp | Protocol::Sctp => Box::default(),
            },
        });
        index
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
    let kept: HashSet<Target> = previous.iter().copied().collect();
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
