//! Compiles one service into its plan.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};
use ipnet::IpNet;

use super::dispatch::Role;
use super::layout::{Clients, EndpointScope};
use super::plan::{Affinity, Frontend, Pool, Route, ServicePlan, Target};
use super::settings::{LocalDetector, ServiceSettings};
use super::size::{self, TooLarge};
use super::sources::SourceList;
use super::topology;
use crate::model::{Family, Node, ObjectName, Protocol, Service, ServicePort, TrafficPolicy};
use crate::services::{Claim, EndpointOf, SlicesOf, Store};

/// Compiles one service.
///
/// `previous` is the plan in force: remaining endpoints keep their index, so that a change touches
/// about as many elements as endpoints. Returns `None` for a service without rules.
///
/// # Errors
///
/// If the service needs more elements than the limit.
pub fn plan(
    store: &Store,
    name: &ObjectName,
    settings: &ServiceSettings,
    previous: Option<&ServicePlan>,
) -> Result<Option<ServicePlan>, TooLarge> {
    let Some(mut compilation) = Compilation::begin(store, name)? else {
        return Ok(None);
    };
    compilation.advance(store, settings, previous, usize::MAX, |_| true);
    Ok(compilation.finish(store, previous))
}

/// A partially compiled service.
///
/// If objects change meanwhile, only the frontends compiled later see the change, and the service
/// has to be compiled again. The plan can be in force nevertheless: each frontend belonged to the
/// service when it was compiled, and each pool held endpoints of the service.
#[derive(Debug)]
pub(crate) struct Compilation {
    service: Arc<Service>,
    /// The number of compiled ports, first all of one family, then all of the other.
    place: usize,
    /// The port that is partially compiled.
    port: Option<PortFrontends>,
    frontends: Vec<Frontend>,
    /// The claims that have a frontend already.
    known: HashSet<(Claim, Family)>,
    pools: Vec<Pool>,
    hairpin: Vec<IpAddr>,
}

/// An iterator over the frontends of one service port in one family.
#[derive(Debug)]
struct PortFrontends {
    /// The route of ClusterIPs, if any.
    internal: Option<Route>,
    /// The route of all other frontends, if any.
    external: Option<Route>,
    /// The number of addresses that were visited.
    place: usize,
}

/// An address of a service.
struct Address {
    ip: IpAddr,
    /// Whether it is a ClusterIP.
    internal: bool,
    /// Whether the source ranges of the service apply.
    firewalled: bool,
}

/// Returns the addresses of a service in a family: ClusterIPs, load balancer IPs and external IPs,
/// each sorted. An address in several of them counts in the first.
fn addresses(service: &Service, family: Family) -> Vec<Address> {
    let mut found = Vec::new();
    for (addresses, internal, firewalled) in [
        (&service.cluster_ips, true, false),
        (
            &service.load_balancer_ips,
            false,
            restricts(service, family),
        ),
        (&service.external_ips, false, false),
    ] {
        let own = addresses.iter().copied();
        let own: BTreeSet<IpAddr> = own.filter(|ip| Family::of(*ip) == family).collect();
        found.extend(own.into_iter().map(|ip| Address {
            ip,
            internal,
            firewalled,
        }));
    }
    found
}

impl Compilation {
    /// Starts to compile a service. Returns `None` for one without frontends.
    ///
    /// # Errors
    ///
    /// If the service needs more elements than the limit.
    pub fn begin(store: &Store, name: &ObjectName) -> Result<Option<Self>, TooLarge> {
        let Some(service) = store.service(name).filter(|s| s.has_frontends()) else {
            return Ok(None);
        };
        let node = store.node().map(|node| &**node);
        size::check(service, &store.slices_of(name), node)?;
        let frontends = service.frontends();
        Ok(Some(Self {
            service: service.clone(),
            place: 0,
            port: None,
            frontends: Vec::with_capacity(frontends),
            known: HashSet::with_capacity(frontends),
            pools: Vec::new(),
            hairpin: Vec::new(),
        }))
    }

    /// Compiles about `most` further frontends and endpoints, without frontends for which `is_free`
    /// returns false. Returns whether the compilation is complete.
    pub(crate) fn advance(
        &mut self,
        store: &Store,
        settings: &ServiceSettings,
        previous: Option<&ServicePlan>,
        most: usize,
        mut is_free: impl FnMut(&Frontend) -> bool,
    ) -> bool {
        let service = self.service.clone();
        let mut compiler = Compiler {
            service: &service,
            settings,
            node: store.node().map(|node| &**node),
            slices: store.slices_of(&service.name),
            previous: previous.map_or_else(HashMap::new, by_port),
            pools: &mut self.pools,
            hairpin: &mut self.hairpin,
        };
        let addresses = Family::ALL.map(|family| addresses(&service, family));
        let families = Family::ALL.into_iter().zip(&addresses);
        let families = families.filter(|(_, addresses)| !addresses.is_empty());
        let ports = families.flat_map(|(family, addresses)| {
            let ports = service.ports.iter();
            ports.map(move |port| (family, addresses, port))
        });
        let done = self.place;
        let mut left = most;
        for (family, addresses, port) in ports.skip(done) {
            let frontends = match &mut self.port {
                Some(port) => port,
                none => {
                    let (frontends, endpoints) = compiler.port(port, family, addresses);
                    left = left.saturating_sub(endpoints);
                    none.insert(frontends)
                }
            };
            while let Some((at, route, firewalled)) = frontends.next(port, addresses) {
                // Skips claims of other services, and repeated ones.
                if store.owner(&at) == Some(&service.name) && self.known.insert((at, family)) {
                    let frontend = Frontend {
                        at,
                        family,
                        route,
                        firewalled,
                    };
                    if is_free(&frontend) {
                        self.frontends.push(frontend);
                    }
                }
                left = left.saturating_sub(1);
                if left == 0 {
                    return false;
                }
            }
            self.port = None;
            self.place += 1;
        }
        true
    }

    /// Returns the frontends compiled so far.
    pub fn frontends(&self) -> &[Frontend] {
        &self.frontends
    }

    /// Returns the plan after the last frontend is compiled; `None` for a service without rules.
    pub fn finish(mut self, store: &Store, previous: Option<&ServicePlan>) -> Option<ServicePlan> {
        let service = &*self.service;
        let cluster_ips: BTreeSet<IpAddr> = service.cluster_ips.iter().copied().collect();
        self.hairpin.sort_unstable();
        self.hairpin.dedup();
        let node = store.node().map(|node| &**node);
        let plan = ServicePlan {
            frontends: self.frontends.into(),
            pools: self.pools.into(),
            cluster_ips: cluster_ips.into_iter().collect(),
            hairpin: self.hairpin.into(),
            affinity: service.affinity_seconds.map(|seconds| Affinity {
                clients: Clients::of(service.name.namespace()),
                seconds,
            }),
            sources: Family::ALL.map(|family| sources(service, family, node, previous)),
        };
        let empty = plan.frontends.is_empty() && plan.cluster_ips.is_empty();
        (!empty).then_some(plan)
    }
}

impl PortFrontends {
    /// Returns the next frontend: its claim, its route, and whether the source ranges apply.
    fn next(&mut self, port: &ServicePort, addresses: &[Address]) -> Option<(Claim, Route, bool)> {
        while self.place <= addresses.len() {
            let address = addresses.get(self.place);
            self.place += 1;
            let (at, route, firewalled) = match address {
                Some(address) => {
                    let at = Claim::Address(address.ip, port.protocol, port.port);
                    let route = if address.internal {
                        self.internal
                    } else {
                        self.external
                    };
                    (at, route, address.firewalled)
                }
                None => {
                    let number = node_port(port, addresses)?;
                    (Claim::NodePort(port.protocol, number), self.external, false)
                }
            };
            if let Some(route) = route {
                return Some((at, route, firewalled));
            }
        }
        None
    }
}

/// Returns the NodePort of a port in the family of these addresses. A family without a ClusterIP
/// has no NodePorts (`ipFamilies`).
fn node_port(port: &ServicePort, addresses: &[Address]) -> Option<u16> {
    let has_cluster_ip = addresses.first().is_some_and(|first| first.internal);
    port.node_port.filter(|_| has_cluster_ip)
}

/// The identity of a pool: label, protocol, family and scope.
type PoolKey<'a> = (&'a str, Protocol, Family, EndpointScope);

fn by_port(plan: &ServicePlan) -> HashMap<PoolKey<'_>, &[Target]> {
    let pools = plan.pools.iter();
    let keyed = pools.map(|pool| {
        let key = (&*pool.label, pool.protocol, pool.family, pool.scope);
        (key, &*pool.targets)
    });
    keyed.collect()
}

/// Returns whether the source ranges exclude any client of a family.
///
/// A range of prefix length 0 allows all clients of its family (kube-proxy's `serviceport.go`), and
/// of the other family if that has no range of its own. Otherwise a family without a range has no
/// allowed clients.
fn restricts(service: &Service, family: Family) -> bool {
    let is_own = |net: &&IpNet| Family::of(net.addr()) == family;
    let (own, others): (Vec<&IpNet>, Vec<&IpNet>) = service.source_ranges.iter().partition(is_own);
    let deciding = if own.is_empty() { others } else { own };
    !deciding.is_empty() && deciding.iter().all(|net| net.prefix_len() > 0)
}

/// Returns the source ranges of a family if they exclude any client from the load balancer's
/// addresses. If they contain the node, these addresses are added: the node's traffic to them may
/// have them as its source.
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
    service: &'a Service,
    settings: &'a ServiceSettings,
    node: Option<&'a Node>,
    slices: SlicesOf<'a>,
    /// The endpoints of the plan in force, by pool.
    previous: HashMap<PoolKey<'a>, &'a [Target]>,
    pools: &'a mut Vec<Pool>,
    hairpin: &'a mut Vec<IpAddr>,
}

/// The pools of one service port in one family, created on demand.
struct PortPools<'a> {
    port: &'a ServicePort,
    label: Arc<str>,
    family: Family,
    endpoints: Vec<EndpointOf<'a>>,
    cluster: Option<usize>,
    local: Option<usize>,
}

impl<'a> Compiler<'a> {
    /// Compiles the routes of a port. Returns its frontends, and the number of its endpoints.
    fn port(
        &mut self,
        port: &'a ServicePort,
        family: Family,
        addresses: &[Address],
    ) -> (PortFrontends, usize) {
        let mut pools = PortPools {
            port,
            label: label(&self.service.name, &port.name),
            family,
            endpoints: self.slices.endpoints(port, family),
            cluster: None,
            local: None,
        };
        let internal = addresses.first().is_some_and(|first| first.internal);
        let external = addresses.last().is_some_and(|last| !last.internal)
            || node_port(port, addresses).is_some();
        let frontends = PortFrontends {
            internal: internal.then(|| self.internal_route(&mut pools)),
            external: external.then(|| self.external_route(&mut pools)),
            place: 0,
        };
        (frontends, pools.endpoints.len())
    }

    /// Returns the route of a ClusterIP (`internalTrafficPolicy`).
    fn internal_route(&mut self, pools: &mut PortPools<'a>) -> Route {
        let masquerade_all = self.settings.masquerade_all;
        let role = match self.settings.detector(pools.family) {
            _ if masquerade_all => Role::External,
            LocalDetector::None => Role::Balance,
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

    /// Returns the route of any other frontend (`externalTrafficPolicy`).
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
            .insert(self.pool(pools, EndpointScope::Cluster, &chosen))
    }

    fn local_pool(&mut self, pools: &mut PortPools<'a>) -> usize {
        if let Some(pool) = pools.local {
            return pool;
        }
        let chosen = topology::local(&pools.endpoints, self.node);
        let pool = self.pool(pools, EndpointScope::Local, &chosen);
        *pools.local.insert(pool)
    }

    /// Adds a pool and returns its index.
    fn pool(
        &mut self,
        pools: &PortPools<'a>,
        scope: EndpointScope,
        chosen: &[EndpointOf],
    ) -> usize {
        let index = self.pools.len();
        let node = self.node.map(|node| &*node.name);
        let here = chosen.iter().filter(|e| topology::may_be_on(e, node));
        self.hairpin.extend(here.map(|e| e.endpoint.address));
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

/// Assigns an index to each endpoint. Remaining endpoints keep theirs if it is below the new
/// number; the free indexes go to those from the end and to new ones.
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
    use crate::model::{Endpoint, EndpointSlice, Event, Object, ServiceKind, SlicePort};
    use crate::services::Marks;

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

    /// A store with a service of 20 ports at 30 addresses of each family, with NodePorts and two
    /// endpoints.
    fn store() -> (Store, ObjectName) {
        let name = ObjectName::new("shop", "large");
        let port = |number: u16| ServicePort {
            name: format!("p{number}").into(),
            protocol: Protocol::Udp,
            port: number,
            node_port: Some(30_000 + number),
        };
        let v4 = (1..=30).map(|last| IpAddr::from([198, 18, 0, last]));
        let v6 = (1..=30).map(|last| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last]));
        let service = Service {
            name: name.clone(),
            created: None,
            kind: ServiceKind::LoadBalancer,
            cluster_ips: vec!["10.96.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            ports: (1..=20).map(port).collect(),
            external_ips: v4.chain(v6).collect(),
            // One address in two roles.
            load_balancer_ips: vec!["198.18.0.7".parse().unwrap()],
            source_ranges: vec!["192.0.2.0/24".parse().unwrap()],
            external_policy: TrafficPolicy::Local,
            internal_policy: TrafficPolicy::Local,
            affinity_seconds: Some(60),
            health_check_node_port: None,
        };
        let endpoint = |last: u8| Endpoint {
            address: IpAddr::from([10, 244, 0, last]),
            ready: true,
            serving: true,
            terminating: false,
            node: None,
            hints: None,
        };
        let slice = EndpointSlice {
            name: ObjectName::new("shop", "large-1"),
            service: name.clone(),
            created: None,
            family: Family::V4,
            ports: (1..=20)
                .map(|number| SlicePort {
                    name: format!("p{number}").into(),
                    protocol: Protocol::Udp,
                    port: 8080,
                })
                .collect(),
            endpoints: vec![endpoint(1), endpoint(2)],
            triggered_at_ms: None,
        };
        let (mut store, mut marks) = (Store::default(), Marks::default());
        for object in [Object::Service(service), Object::EndpointSlice(slice)] {
            store.apply(Event::Apply(object), &mut marks);
        }
        (store, name)
    }

    #[test]
    fn no_turn_compiles_more_frontends_than_it_may() {
        let (store, name) = store();
        let settings = ServiceSettings::default();
        let at_once = plan(&store, &name, &settings, None).unwrap().unwrap();
        assert_eq!(at_once.frontends.len(), 2 * 20 * 32);
        for most in [1, 7, 100] {
            let mut compilation = Compilation::begin(&store, &name).unwrap().unwrap();
            let (mut before, mut complete) = (0, false);
            while !complete {
                complete = compilation.advance(&store, &settings, None, most, |_| true);
                let now = compilation.frontends().len();
                assert!(now - before <= most, "{before} to {now}");
                before = now;
            }
            assert_eq!(compilation.finish(&store, None), Some(at_once.clone()));
        }
    }

    #[test]
    fn frontends_that_are_not_free_are_left_out() {
        let (store, name) = store();
        let settings = ServiceSettings::default();
        let mut compilation = Compilation::begin(&store, &name).unwrap().unwrap();
        let of_v6 = |frontend: &Frontend| frontend.family == Family::V6;
        compilation.advance(&store, &settings, None, usize::MAX, of_v6);
        let plan = compilation.finish(&store, None).unwrap();
        assert_eq!(plan.frontends.len(), 20 * 32);
        assert!(plan.frontends.iter().all(of_v6));
    }
}
