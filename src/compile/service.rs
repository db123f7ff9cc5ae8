//! What one service asks of the tables.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::chains::{SharedChain, SharedKind};
use super::layout::ServiceSet;
use super::settings::Settings;
use super::skeleton::REJECT;
use crate::model::{Claim, EndpointOf, Family, Node, ObjectName, Protocol, Service, Store};
use crate::ruleset::{Data, Element, Key, Verdict};

/// Address and port of an endpoint.
type Target = (IpAddr, u16);

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
}

/// The endpoints that a service port leads to in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// `namespace/name` or `namespace/name:port`, for the person who reads the ruleset.
    pub label: Arc<str>,
    /// The protocol of the port; with the label it identifies the service port.
    pub protocol: Protocol,
    /// The family of the endpoints.
    pub family: Family,
    /// The endpoints by index.
    pub targets: Box<[Target]>,
}

/// Something packets can be addressed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Address, protocol and port.
    pub at: Claim,
    /// The chain for its packets, as long as there is an endpoint.
    pub kind: SharedKind,
    /// The index of its pool.
    pub pool: u16,
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
    };
    let empty = plan.frontends.is_empty() && plan.cluster_ips.is_empty();
    (!empty).then_some(plan)
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

impl Compiler<'_> {
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
        let external: BTreeSet<IpAddr> = own(&service.external_ips)
            .union(&own(&service.load_balancer_ips))
            .copied()
            .collect();
        let node_ports = !cluster_ips.is_empty();
        if cluster_ips.is_empty() && external.is_empty() {
            return;
        }
        let cluster_kind = match (
            self.settings.masquerade_all,
            self.settings.cluster_cidr(family),
        ) {
            (true, _) => SharedKind::External,
            (false, Some(_)) => SharedKind::Cluster,
            (false, None) => SharedKind::LoadBalance,
        };
        for port in &service.ports {
            let Ok(pool) = u16::try_from(self.pools.len()) else {
                return;
            };
            let at = |address: &IpAddr| Claim::Address(*address, port.protocol, port.port);
            let node_port = port
                .node_port
                .filter(|_| node_ports)
                .map(|number| Claim::NodePort(port.protocol, number));
            let before = self.frontends.len();
            for (at, kind) in cluster_ips
                .iter()
                .map(|address| (at(address), cluster_kind))
                .chain(external.iter().map(|ip| (at(ip), SharedKind::External)))
                .chain(node_port.map(|at| (at, SharedKind::NodePort)))
            {
                // What an older service claims is not ours; an external IP that is also the
                // ClusterIP is handled as the ClusterIP.
                let ours = self.store.owner(&at) == Some(&service.name);
                let new = self.frontends.get(before..).unwrap_or_default();
                if ours && new.iter().all(|frontend| frontend.at != at) {
                    self.frontends.push(Frontend { at, kind, pool });
                }
            }
            let label = label(&service.name, &port.name);
            let targets = self.targets(family, port, &label);
            self.pools.push(Pool {
                label,
                protocol: port.protocol,
                family,
                targets,
            });
        }
    }

    fn targets(
        &mut self,
        family: Family,
        port: &crate::model::ServicePort,
        label: &Arc<str>,
    ) -> Box<[Target]> {
        let known = self.store.endpoints(&self.service.name, port, family);
        let chosen = choose(&known);
        let node = self.node.map(|node| &*node.name);
        self.hairpin.extend(
            chosen
                .iter()
                .filter(|e| is_local(e, node))
                .map(|e| e.endpoint.address),
        );
        let previous = self.previous.and_then(|plan| {
            plan.pools.iter().find(|pool| {
                pool.label == *label && pool.protocol == port.protocol && pool.family == family
            })
        });
        let previous = previous.map_or(&[][..], |pool| &*pool.targets);
        assign(previous, chosen.iter().map(EndpointOf::target).collect())
    }
}

/// The endpoints that take traffic under the policy Cluster: those that are ready.
fn choose<'a>(endpoints: &[EndpointOf<'a>]) -> Vec<EndpointOf<'a>> {
    let ready = endpoints.iter().filter(|e| e.endpoint.ready);
    ready.copied().collect()
}

/// Whether an endpoint may be on this node. Slices made by hand often name no node.
fn is_local(endpoint: &EndpointOf, node: Option<&str>) -> bool {
    match (endpoint.endpoint.node.as_deref(), node) {
        (Some(theirs), Some(ours)) => theirs == ours,
        _ => true,
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

impl ServicePlan {
    /// The elements that belong to this service alone, for the table of a family.
    pub fn own_elements(&self, family: Family) -> Vec<ElementOf> {
        let mut elements = Vec::new();
        for (frontend, pool) in self.routes(family) {
            let (verdicts, endpoints) = match frontend.at {
                Claim::Address(..) => (ServiceSet::Frontends, ServiceSet::Endpoints),
                Claim::NodePort(..) => (ServiceSet::NodePorts, ServiceSet::NodePortEndpoints),
            };
            let chain = frontend
                .chain(pool)
                .map_or_else(|| REJECT.into(), SharedChain::name);
            let at = frontend_key(&frontend.at);
            elements.push((
                verdicts,
                Element::with_verdict(at.clone().finish(), Verdict::Goto(chain))
                    .comment(&pool.label),
            ));
            elements.reserve(pool.targets.len());
            for (index, (address, port)) in (0u32..).zip(&pool.targets) {
                let key = at.clone().number(index).finish();
                let data = Data::build().address(*address).port(*port).finish();
                elements.push((endpoints, Element::with_data(key, data)));
            }
        }
        elements
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

    /// The shared chains that the verdicts lead to, with those they go on to. A chain that
    /// several frontends use comes up as often.
    pub fn chains(&self, family: Family) -> impl Iterator<Item = SharedChain> + '_ {
        self.routes(family)
            .filter_map(|(frontend, pool)| frontend.chain(pool))
            .flat_map(|chain| std::iter::once(chain).chain(chain.next()))
    }

    fn routes(&self, family: Family) -> impl Iterator<Item = (&Frontend, &Pool)> + '_ {
        self.frontends.iter().filter_map(move |frontend| {
            let pool = self.pools.get(usize::from(frontend.pool))?;
            (pool.family == family).then_some((frontend, pool))
        })
    }
}

impl Frontend {
    /// The chain for its packets; `None` without an endpoint.
    fn chain(&self, pool: &Pool) -> Option<SharedChain> {
        let endpoints = u32::try_from(pool.targets.len()).ok()?;
        (endpoints > 0).then_some(SharedChain {
            kind: self.kind,
            endpoints,
        })
    }
}

fn frontend_key(at: &Claim) -> crate::ruleset::KeyBuilder {
    match at {
        Claim::Address(address, protocol, port) => Key::build()
            .address(*address)
            .protocol(protocol.number())
            .port(*port),
        Claim::NodePort(protocol, port) => Key::build().protocol(protocol.number()).port(*port),
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
