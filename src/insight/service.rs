//! What the rules of services do with a connection.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use super::Facts;
use super::answer::{Action, Code, Exclusion, LeftOut, ServiceStep};
use crate::model::{Family, Node, ObjectName, Protocol, Service, ServicePort, TrafficPolicy};
use crate::policies::KnownProfiles;
use crate::services::{
    self, Claim, EndpointOf, Frontend, LocalDetector, Role, Route, ServicePlan, Target,
};

/// One end of a connection that opens it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source {
    pub address: IpAddr,
    /// Whether it is the own node itself.
    pub is_node: bool,
    /// Whether it is a pod of the own node.
    pub is_local_pod: bool,
}

impl Source {
    /// Returns the source as the rules of another node than its own see it.
    pub(super) fn elsewhere(&self) -> Self {
        Self {
            address: self.address,
            is_node: false,
            is_local_pod: false,
        }
    }
}

/// The destination that a connection is opened to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Destination {
    pub address: IpAddr,
    /// None for ICMP.
    pub protocol: Option<Protocol>,
    pub port: Option<u16>,
}

/// What the rules of services do with a connection.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Judgement {
    pub step: ServiceStep,
    /// Why it goes no further.
    pub code: Option<Code>,
    /// The endpoints of which one gets the connection; the destination itself if it is no service.
    pub targets: Vec<(IpAddr, Option<u16>)>,
}

/// The most plans that are kept. A batch may ask about all services from all nodes.
const MOST_PLANS: usize = 100_000;

/// What is compiled for a question, and kept for others about the same facts.
#[derive(Debug, Default)]
pub(crate) struct Compiled {
    /// The plans of services by node.
    services: HashMap<String, HashMap<ObjectName, Plan>>,
    /// The policies of pods.
    pub(super) profiles: KnownProfiles,
}

/// The plan of a service; `None` if it has no rules, because of the error if there is one.
type Plan = Result<Option<ServicePlan>, String>;

impl Compiled {
    /// Returns the plan of a service; `None` if it has no rules.
    pub(super) fn of(&mut self, facts: &Facts, name: &ObjectName) -> Option<&ServicePlan> {
        self.plan(facts, name)?.as_ref().ok()?.as_ref()
    }

    fn plan(&mut self, facts: &Facts, name: &ObjectName) -> Option<&Plan> {
        let of_node = self.services.get(facts.node);
        if !of_node.is_some_and(|plans| plans.contains_key(name)) {
            let plan = services::plan(facts.store, name, facts.settings, None);
            let plan = plan.map(|plan| plan.filter(|_| !(facts.is_refused)(name)));
            let plan = plan.map_err(|error| error.to_string());
            if self.services.values().map(HashMap::len).sum::<usize>() >= MOST_PLANS {
                self.services.clear();
            }
            let of_node = self.services.entry(facts.node.to_owned()).or_default();
            of_node.insert(name.clone(), plan);
        }
        self.services.get(facts.node)?.get(name)
    }

    /// Returns why a service has no rules, if it is at fault.
    pub(super) fn fault(&mut self, facts: &Facts, name: &ObjectName) -> Option<String> {
        if (facts.is_refused)(name) {
            return Some(format!(
                "the kernel refused the rules of service {name}, which has none until it changes or \
                 is tried again; the log of the agent says why"
            ));
        }
        let error = self.plan(facts, name)?.as_ref().err()?;
        Some(format!("the service {name} {error}"))
    }
}

/// Judges a connection.
pub(super) fn judge(
    facts: &Facts,
    source: &Source,
    to: &Destination,
    compiled: &mut Compiled,
) -> Judgement {
    let Some((claim, name)) = owner(facts, to) else {
        return no_frontend(facts, to, compiled);
    };
    let family = Family::of(to.address);
    let (Some(service), Some(plan)) = (facts.store.service(name), compiled.of(facts, name)) else {
        return no_frontend(facts, to, compiled);
    };
    let mut frontends = plan.frontends.iter();
    let Some(frontend) = frontends.find(|it| it.at == claim && it.family == family) else {
        return no_frontend(facts, to, compiled);
    };
    let port = port_of(service, &claim);
    let (mut judgement, chosen) = route(facts, source, plan, frontend);
    let step = &mut judgement.step;
    step.frontend = to.port.map(|port| shown(to.address, port, to.protocol));
    step.name = Some(name.clone());
    step.port = port.map(|port| port.name.clone());
    if let Some(port) = port {
        let scope_is_local = is_local(frontend, service);
        step.left_out = left_out(facts, service, port, family, &chosen, scope_is_local);
    }
    judgement
}

/// What the rules of services know of a destination.
pub(super) enum Asked<'p> {
    /// It is a frontend.
    Frontend {
        plan: &'p ServicePlan,
        frontend: &'p Frontend,
    },
    /// It is a ClusterIP, but no port of it.
    OtherPort,
    /// It is in a range of service addresses, but of no service.
    Unassigned,
    NoService,
}

/// Looks up what the rules of services know of a destination.
pub(super) fn asked<'p>(facts: &Facts, to: &Destination, compiled: &'p mut Compiled) -> Asked<'p> {
    let address = to.address;
    let with_address = facts.store.with_cluster_ip(address);
    let has_address = with_address
        .and_then(|name| compiled.of(facts, name))
        .is_some_and(|plan| plan.cluster_ips.contains(&address));
    if let Some((claim, name)) = owner(facts, to)
        && let Some(plan) = compiled.of(facts, name)
    {
        let family = Family::of(address);
        let mut frontends = plan.frontends.iter();
        if let Some(frontend) = frontends.find(|it| it.at == claim && it.family == family) {
            return Asked::Frontend { plan, frontend };
        }
    }
    if has_address {
        Asked::OtherPort
    } else if is_unassigned(facts, address) {
        Asked::Unassigned
    } else {
        Asked::NoService
    }
}

/// Returns whether only endpoints of this node get the packets of a client, by the external traffic
/// policy.
pub(super) fn takes_local(
    facts: &Facts,
    source: &Source,
    plan: &ServicePlan,
    frontend: &Frontend,
) -> bool {
    let Route::LocalPolicy { cluster, .. } = frontend.route else {
        return false;
    };
    let any = plan
        .pools
        .get(cluster)
        .is_some_and(|it| !it.targets.is_empty());
    any && !source.is_node && !comes_from_pods(facts, source, frontend.family)
}

/// Returns the number of endpoints of the service with a destination; 0 if it is no address of one.
pub(super) fn endpoints(facts: &Facts, to: &Destination) -> usize {
    let frontend = owner(facts, to).map(|(_, name)| name);
    let Some(name) = frontend.or_else(|| facts.store.with_cluster_ip(to.address)) else {
        return 0;
    };
    let slices = facts.store.slices_of(name);
    slices.all().map(|slice| slice.endpoints.len()).sum()
}

/// Returns the claim that packets to a destination match, and the service that has it.
fn owner<'f>(facts: &'f Facts, to: &Destination) -> Option<(Claim, &'f ObjectName)> {
    let claim = claim(facts, to)?;
    Some((claim, facts.store.owner(&claim)?))
}

/// Returns address, port and protocol as people write them.
pub(super) fn shown(address: IpAddr, port: u16, protocol: Option<Protocol>) -> String {
    let at = SocketAddr::new(address, port);
    match protocol {
        Some(protocol) => format!("{at}/{protocol}"),
        None => at.to_string(),
    }
}

/// Returns the claim that packets to a destination match: an address, or a port of the node.
fn claim(facts: &Facts, to: &Destination) -> Option<Claim> {
    let (protocol, port) = (to.protocol?, to.port?);
    let address = Claim::Address(to.address, protocol, port);
    if facts.store.owner(&address).is_some() {
        return Some(address);
    }
    let node = facts.store.node().map(|node| &**node);
    let family = Family::of(to.address);
    let ranges = facts.settings.nodeport_ranges(family, node);
    let answers = ranges.iter().any(|range| range.contains(&to.address));
    (answers && is_of_node(node, to.address)).then_some(Claim::NodePort(protocol, port))
}

/// Returns what the rules of a node see of an address that opens a connection.
pub(super) fn source_of(facts: &Facts, address: IpAddr) -> Source {
    let node = facts.store.node().map(|node| &**node);
    let owner = facts.policies.inventory().owner(address);
    let is_local_pod = owner.is_some_and(|pod| pod.node.as_deref() == Some(facts.node));
    Source {
        address,
        is_node: is_of_node(node, address),
        is_local_pod,
    }
}

/// Returns whether an address is one of the node's.
pub(super) fn is_of_node(node: Option<&Node>, address: IpAddr) -> bool {
    node.is_some_and(|node| {
        let all = node.internal_ips.iter().chain(&node.external_ips);
        all.chain(&*node.addresses).any(|own| *own == address)
    })
}

fn port_of<'s>(service: &'s Service, claim: &Claim) -> Option<&'s ServicePort> {
    service.ports.iter().find(|port| match claim {
        Claim::Address(_, protocol, number) => port.protocol == *protocol && port.port == *number,
        Claim::NodePort(protocol, number) => {
            port.protocol == *protocol && port.node_port == Some(*number)
        }
    })
}

/// Judges a destination that is no frontend.
fn no_frontend(facts: &Facts, to: &Destination, compiled: &mut Compiled) -> Judgement {
    let service = facts.store.with_cluster_ip(to.address);
    let name = service.cloned();
    // The address of a service without rules is like one that no service has.
    let (action, code, name) = if service.is_some_and(|it| compiled.of(facts, it).is_some()) {
        // Chains that reject look at TCP, UDP and SCTP alike, and at ICMP too.
        (Action::Reject, Some(Code::ServicePortUnknown), name)
    } else if is_unassigned(facts, to.address) {
        (Action::Drop, Some(Code::ServiceAddressUnknown), name)
    } else {
        (Action::None, None, name)
    };
    Judgement {
        step: ServiceStep {
            action,
            name,
            ..ServiceStep::default()
        },
        targets: match code {
            Some(_) => Vec::new(),
            None => vec![(to.address, to.port)],
        },
        code,
    }
}

/// Returns whether an address is in a range of service addresses.
fn is_unassigned(facts: &Facts, address: IpAddr) -> bool {
    let mut ranges = facts.store.service_cidrs();
    ranges.any(|range| range.contains(&address))
}

/// Follows the route of a frontend. Returns also the endpoints that its traffic policy chooses, sorted,
/// whether or not the client may reach them.
fn route(
    facts: &Facts,
    source: &Source,
    plan: &ServicePlan,
    frontend: &Frontend,
) -> (Judgement, Vec<Target>) {
    let family = frontend.family;
    let mut masquerade = false;
    let (pool, without) = match frontend.route {
        Route::Balance(role, pool) => {
            masquerade = masquerades(facts, source, role, family);
            (pool, (Action::Reject, Code::ServiceNoEndpoints))
        }
        Route::BalanceOrDrop(role, pool) => {
            masquerade = masquerades(facts, source, role, family);
            (pool, (Action::Drop, Code::ServiceNoLocalEndpoints))
        }
        Route::LocalPolicy { cluster, local } => {
            let any = plan
                .pools
                .get(cluster)
                .is_some_and(|pool| !pool.targets.is_empty());
            let none = if any {
                (Action::Drop, Code::ServiceNoLocalEndpoints)
            } else {
                (Action::Reject, Code::ServiceNoEndpoints)
            };
            if comes_from_pods(facts, source, family) {
                (cluster, none)
            } else if source.is_node {
                masquerade = true;
                (cluster, none)
            } else {
                (if any { local } else { cluster }, none)
            }
        }
    };
    let targets = plan.pools.get(pool).map_or(&[][..], |pool| &pool.targets);
    let allowed = !frontend.firewalled || {
        let sources = plan.sources(family).map_or(&[][..], |list| list.ranges());
        sources
            .iter()
            .any(|range: &IpNet| range.contains(&source.address))
    };
    let (action, code) = if !allowed {
        (Action::Drop, Some(Code::SourceRange))
    } else if targets.is_empty() {
        (without.0, Some(without.1))
    } else {
        (Action::Dnat, None)
    };
    let mut chosen = targets.to_vec();
    chosen.sort_unstable();
    let reached: &[Target] = if code.is_some() { &[] } else { &chosen };
    let judgement = Judgement {
        step: ServiceStep {
            action,
            masquerade,
            ..ServiceStep::default()
        },
        code,
        targets: reached
            .iter()
            .map(|(address, port)| (*address, Some(*port)))
            .collect(),
    };
    (judgement, chosen)
}

/// Returns whether the rules of a role mark a connection for masquerading.
fn masquerades(facts: &Facts, source: &Source, role: Role, family: Family) -> bool {
    match role {
        Role::Balance | Role::LocalPolicy => false,
        Role::External => true,
        Role::Cluster => !comes_from_pods(facts, source, family),
    }
}

/// Returns whether the rules recognise the source as a pod.
fn comes_from_pods(facts: &Facts, source: &Source, family: Family) -> bool {
    let node = facts.store.node().map(|node| &**node);
    match facts.settings.detector(family) {
        LocalDetector::None => false,
        LocalDetector::PodNetworks => {
            let networks = facts.settings.pod_networks(family, node);
            networks
                .iter()
                .any(|network| network.contains(&source.address))
        }
        LocalDetector::Interface(_) => source.is_local_pod,
    }
}

/// Returns whether a frontend uses only endpoints of this node.
fn is_local(frontend: &Frontend, service: &Service) -> bool {
    match frontend.route {
        Route::LocalPolicy { .. } => true,
        Route::BalanceOrDrop(..) => true,
        Route::Balance(..) => service.internal_policy == TrafficPolicy::Local,
    }
}

/// Returns the endpoints of a port that get no traffic, each with the reason.
pub(super) fn left_out(
    facts: &Facts,
    service: &Service,
    port: &ServicePort,
    family: Family,
    chosen: &[Target],
    only_local: bool,
) -> Vec<LeftOut> {
    let slices = facts.store.slices_of(&service.name);
    let endpoints = slices.endpoints(port, family);
    let mut left_out: Vec<LeftOut> = endpoints
        .iter()
        .filter(|endpoint| chosen.binary_search(&endpoint.target()).is_err())
        .map(|endpoint| LeftOut {
            address: endpoint.endpoint.address,
            pod: pod_at(facts, endpoint.endpoint.address),
            reason: reason(facts, endpoint, only_local),
        })
        .collect();
    left_out.dedup_by(|a, b| a.address == b.address && a.reason == b.reason);
    left_out
}

fn reason(facts: &Facts, endpoint: &EndpointOf, only_local: bool) -> Exclusion {
    let endpoint = endpoint.endpoint;
    if endpoint.terminating {
        Exclusion::Terminating
    } else if !endpoint.ready {
        Exclusion::NotReady
    } else if only_local && endpoint.node.as_deref() != Some(facts.node) {
        Exclusion::OtherNode
    } else {
        Exclusion::OtherZone
    }
}

/// Returns the pod with an address, if that is certain.
pub(super) fn pod_at(facts: &Facts, address: IpAddr) -> Option<ObjectName> {
    let pod = facts.policies.inventory().owner(address)?;
    Some(pod.name.clone())
}

/// Returns the node of the pod with an address, if that is certain.
pub(super) fn node_of<'f>(facts: &Facts<'f>, address: IpAddr) -> Option<&'f Arc<str>> {
    facts.policies.inventory().owner(address)?.node.as_ref()
}
