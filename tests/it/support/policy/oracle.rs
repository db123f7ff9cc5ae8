//! A naive reading of NetworkPolicy (networking.k8s.io/v1), straight from the API's text.
//!
//! It works on the API's own types, loops over everything for every question and keeps nothing:
//! slow, and simple enough to be checked by reading. Each function is one sentence of the API.
//!
//! What the API leaves open is decided here as nftlet documents it: an address belongs to one
//! pod ([`owner`]), and where it is not certain to which, all that may have it ([`holders`]) must
//! allow; the node reaches its own pods, pods reach themselves, pods in the host's network count as
//! the node, and a rule with a fault in it allows nothing. ClusterNetworkPolicies are read by
//! [`tiers`](super::tiers).

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{ContainerState, Namespace, Node, Pod, PodCondition};
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::Value;

use super::tiers;

/// The objects that decide.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    pub nodes: Vec<Node>,
    pub namespaces: Vec<Namespace>,
    pub pods: Vec<Pod>,
    pub policies: Vec<NetworkPolicy>,
    /// ClusterNetworkPolicies, as JSON.
    pub cluster_policies: Vec<Value>,
    /// Pods whose objects were deleted while a container ran, by their addresses.
    pub departed: Vec<(IpAddr, Pod)>,
}

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
    /// ICMP or ICMPv6 echo, which has no ports.
    Icmp,
}

impl Protocol {
    pub(super) fn api_name(self) -> Option<&'static str> {
        match self {
            Protocol::Tcp => Some("TCP"),
            Protocol::Udp => Some("UDP"),
            Protocol::Sctp => Some("SCTP"),
            Protocol::Icmp => None,
        }
    }
}

/// A rule of either direction: its peers and its ports.
type Rule<'a> = (
    Option<&'a Vec<NetworkPolicyPeer>>,
    Option<&'a Vec<NetworkPolicyPort>>,
);

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Ingress,
    Egress,
}

/// A new connection as one of its ends sees it.
#[derive(Clone, Copy)]
pub(super) struct Seen {
    pub direction: Direction,
    /// The address of the other end.
    pub other: IpAddr,
    pub destination: IpAddr,
    pub protocol: Protocol,
    pub port: u16,
    /// Whether a pod reaches itself. Only a connection through a Service is seen by the host.
    pub to_itself: bool,
}

/// Whether a new connection passes everywhere on its way. The destination is the one after DNAT,
/// the source the one before SNAT.
pub fn allowed(
    cluster: &Cluster,
    source: IpAddr,
    destination: IpAddr,
    protocol: Protocol,
    port: u16,
) -> bool {
    egress_allowed(cluster, source, destination, protocol, port)
        && ingress_allowed(cluster, source, destination, protocol, port)
}

/// Whether the pod at the source may send this.
pub fn egress_allowed(
    cluster: &Cluster,
    source: IpAddr,
    destination: IpAddr,
    protocol: Protocol,
    port: u16,
) -> bool {
    let seen = Seen {
        direction: Direction::Egress,
        other: destination,
        destination,
        protocol,
        port,
        to_itself: source == destination,
    };
    let mut holders = holders(cluster, source).into_iter();
    holders.all(|pod| direction_allowed(cluster, pod, &seen))
}

/// Whether the pod at the destination may be sent this.
pub fn ingress_allowed(
    cluster: &Cluster,
    source: IpAddr,
    destination: IpAddr,
    protocol: Protocol,
    port: u16,
) -> bool {
    let seen = Seen {
        direction: Direction::Ingress,
        other: source,
        destination,
        protocol,
        port,
        to_itself: source == destination,
    };
    // "The traffic source is the pod's local node".
    let mut holders = holders(cluster, destination).into_iter();
    holders.all(|pod| is_own_node(cluster, pod, source) || direction_allowed(cluster, pod, &seen))
}

/// The tiers, one after the other: the first that decides has decided.
fn direction_allowed(cluster: &Cluster, pod: &Pod, seen: &Seen) -> bool {
    tiers::decision(cluster, "Admin", pod, seen)
        .or_else(|| network_policies_allow(cluster, pod, seen))
        .or_else(|| tiers::decision(cluster, "Baseline", pod, seen))
        .unwrap_or(true)
}

/// "Traffic is allowed if there are no NetworkPolicies selecting the pod, or if the traffic
/// matches at least one rule across all of the NetworkPolicy objects whose podSelector matches".
/// `None` if none selects it.
fn network_policies_allow(cluster: &Cluster, pod: &Pod, seen: &Seen) -> Option<bool> {
    let mut isolated = false;
    for policy in &cluster.policies {
        let Some(spec) = &policy.spec else { continue };
        if !applies_to(spec, seen.direction) || !selects(policy, spec, pod) {
            continue;
        }
        isolated = true;
        // A pod always reaches itself.
        if seen.to_itself {
            return Some(true);
        }
        if selector_fault(spec.pod_selector.as_ref()) {
            continue;
        }
        for rule in rules(spec, seen.direction) {
            if !rule_fault(rule)
                && peers_match(cluster, policy, rule.0, seen.other)
                && ports_match(cluster, rule.1, seen.destination, seen.protocol, seen.port)
            {
                return Some(true);
            }
        }
    }
    isolated.then_some(false)
}

/// `policyTypes`; without it every policy is about ingress, and about egress if it has egress
/// rules.
fn applies_to(spec: &NetworkPolicySpec, direction: Direction) -> bool {
    let types = spec.policy_types.as_deref().unwrap_or_default();
    if types.is_empty() {
        return match direction {
            Direction::Ingress => true,
            Direction::Egress => spec.egress.as_ref().is_some_and(|rules| !rules.is_empty()),
        };
    }
    let name = match direction {
        Direction::Ingress => "Ingress",
        Direction::Egress => "Egress",
    };
    types.iter().any(|kind| kind == name)
}

fn rules(spec: &NetworkPolicySpec, direction: Direction) -> Vec<Rule<'_>> {
    match direction {
        Direction::Ingress => {
            let rules = spec.ingress.iter().flatten();
            rules
                .map(|rule| (rule.from.as_ref(), rule.ports.as_ref()))
                .collect()
        }
        Direction::Egress => {
            let rules = spec.egress.iter().flatten();
            rules
                .map(|rule| (rule.to.as_ref(), rule.ports.as_ref()))
                .collect()
        }
    }
}

/// The pods of the policy's namespace that its podSelector matches; absent it matches all. A
/// requirement with a fault is left aside, so that the policy isolates rather more than less.
fn selects(policy: &NetworkPolicy, spec: &NetworkPolicySpec, pod: &Pod) -> bool {
    let mut selector = spec.pod_selector.clone().unwrap_or_default();
    if let Some(expressions) = &mut selector.match_expressions {
        expressions.retain(|expression| !requirement_fault(expression));
    }
    pod.metadata.namespace == policy.metadata.namespace
        && selector_matches(&selector, pod.metadata.labels.as_ref())
}

/// "If this field is empty or missing, this rule matches all sources. If it contains at least
/// one item, the traffic must match at least one item."
fn peers_match(
    cluster: &Cluster,
    policy: &NetworkPolicy,
    peers: Option<&Vec<NetworkPolicyPeer>>,
    address: IpAddr,
) -> bool {
    match peers {
        None => true,
        Some(peers) if peers.is_empty() => true,
        Some(peers) => peers
            .iter()
            .any(|peer| peer_matches(cluster, policy, peer, address)),
    }
}

fn peer_matches(
    cluster: &Cluster,
    policy: &NetworkPolicy,
    peer: &NetworkPolicyPeer,
    address: IpAddr,
) -> bool {
    if let Some(block) = &peer.ip_block {
        return block_matches(block, address);
    }
    let Some(pod) = owner(cluster, address) else {
        return false;
    };
    let namespace_matches = match &peer.namespace_selector {
        None => pod.metadata.namespace == policy.metadata.namespace,
        Some(selector) => cluster.namespaces.iter().any(|namespace| {
            namespace.metadata.name == pod.metadata.namespace
                && selector_matches(selector, Some(&labels_of(namespace)))
        }),
    };
    let pod_matches = match &peer.pod_selector {
        None => true,
        Some(selector) => selector_matches(selector, pod.metadata.labels.as_ref()),
    };
    namespace_matches && pod_matches
}

/// The labels of a namespace, with the one that the API server gives every namespace.
pub(super) fn labels_of(namespace: &Namespace) -> std::collections::BTreeMap<String, String> {
    let mut labels = namespace.metadata.labels.clone().unwrap_or_default();
    let name = namespace.metadata.name.clone().unwrap_or_default();
    labels.insert("kubernetes.io/metadata.name".into(), name);
    labels
}

fn block_matches(block: &IPBlock, address: IpAddr) -> bool {
    let contains = |cidr: &String| -> bool {
        cidr.parse::<IpNet>()
            .is_ok_and(|net| net.contains(&address))
    };
    contains(&block.cidr) && !block.except.iter().flatten().any(contains)
}

/// As for peers: none at all is every port and every protocol.
fn ports_match(
    cluster: &Cluster,
    ports: Option<&Vec<NetworkPolicyPort>>,
    destination: IpAddr,
    protocol: Protocol,
    port: u16,
) -> bool {
    match ports {
        None => true,
        Some(ports) if ports.is_empty() => true,
        Some(ports) => ports
            .iter()
            .any(|entry| port_matches(cluster, entry, destination, protocol, port)),
    }
}

fn port_matches(
    cluster: &Cluster,
    entry: &NetworkPolicyPort,
    destination: IpAddr,
    protocol: Protocol,
    port: u16,
) -> bool {
    // "If not specified, this field defaults to TCP."
    let wanted = entry.protocol.as_deref().unwrap_or("TCP");
    if protocol.api_name() != Some(wanted) {
        return false;
    }
    match &entry.port {
        None => true,
        Some(IntOrString::Int(first)) => {
            let last = entry.end_port.unwrap_or(*first);
            (*first..=last).contains(&i32::from(port))
        }
        // "A named port on a pod": on the one the packet goes to.
        Some(IntOrString::String(name)) => owner(cluster, destination)
            .is_some_and(|pod| pod_names_port(pod, name, wanted, i32::from(port))),
    }
}

/// The first container with a port of this name and protocol counts.
pub(super) fn pod_names_port(pod: &Pod, name: &str, protocol: &str, port: i32) -> bool {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
    let named = ports.find(|known| {
        known.name.as_deref() == Some(name)
            && known.protocol.as_deref().unwrap_or("TCP") == protocol
    });
    named.is_some_and(|known| known.container_port == port)
}

/// A label selector: the requirements are ANDed, and none at all matches everything.
pub fn selector_matches(
    selector: &LabelSelector,
    labels: Option<&std::collections::BTreeMap<String, String>>,
) -> bool {
    let value_of = |key: &String| labels.and_then(|labels| labels.get(key));
    for (key, value) in selector.match_labels.iter().flatten() {
        if value_of(key) != Some(value) {
            return false;
        }
    }
    for expression in selector.match_expressions.iter().flatten() {
        let value = value_of(&expression.key);
        let listed = value.is_some_and(|value| {
            let mut values = expression.values.iter().flatten();
            values.any(|known| known == value)
        });
        let met = match expression.operator.as_str() {
            "In" => listed,
            "NotIn" => !listed,
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            other => unreachable!("a faulty operator is sorted out before: {other}"),
        };
        if !met {
            return false;
        }
    }
    true
}

/// The pod that an address certainly belongs to: the only one that may have it, and not one
/// without a sandbox.
pub fn owner(cluster: &Cluster, address: IpAddr) -> Option<&Pod> {
    let departed = cluster.departed.iter().any(|(ip, _)| *ip == address);
    match holders(cluster, address).as_slice() {
        [pod] if !departed && !has_no_sandbox(pod) => Some(pod),
        _ => None,
    }
}

/// The pods that may have an address: never one in the host's network, never one that has ended,
/// and none that another one is known to have followed.
pub fn holders(cluster: &Cluster, address: IpAddr) -> Vec<&Pod> {
    let claimants = || cluster.pods.iter().filter(|pod| claims(pod, address));
    let departed = cluster.departed.iter().filter(|(ip, _)| *ip == address);
    let departed = departed.map(|(_, pod)| pod);
    let all = || claimants().chain(departed.clone());
    let followed = |pod: &Pod| all().any(|other| follows(other, pod));
    let holders = claimants().filter(|pod| !followed(pod));
    holders.chain(departed.clone()).collect()
}

/// Whether an address is in the status of a pod that may still have it.
pub fn claims(pod: &Pod, address: IpAddr) -> bool {
    !host_network(pod) && !ended(pod) && addresses(pod).contains(&address)
}

/// Whether a container runs, by the status.
pub fn runs(pod: &Pod) -> bool {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    last_start(pod).is_some() || (phase == Some("Running") && container_states(pod).is_empty())
}

/// Whether a pod got its address after another one: its sandbox was there later, and no container
/// of the other one started after all of its own.
pub fn follows(pod: &Pod, other: &Pod) -> bool {
    let later = match (last_seen(pod), last_seen(other)) {
        (None, None) => !has_no_sandbox(pod) && has_no_sandbox(other),
        (seen, before) => seen > before,
    };
    let contradicted = match (last_start(pod), last_start(other)) {
        (_, None) => false,
        (start, before) => start < before,
    };
    later && !contradicted
}

/// The last time at which there was certainly a sandbox, in seconds.
fn last_seen(pod: &Pod) -> Option<i64> {
    let ready = sandbox_condition(pod).filter(|condition| condition.status == "True");
    let since = ready.map(|condition| {
        let time = condition.last_transition_time.as_ref();
        time.expect("a time").0.as_second()
    });
    since.max(last_start(pod))
}

/// When the last of the running containers started, in seconds.
fn last_start(pod: &Pod) -> Option<i64> {
    let states = container_states(pod).into_iter();
    let running = states.filter_map(|state| state.running);
    running
        .map(|running| running.started_at.expect("a time").0.as_second())
        .max()
}

/// Whether the condition says so, and no container runs.
pub fn has_no_sandbox(pod: &Pod) -> bool {
    let condition = sandbox_condition(pod);
    condition.is_some_and(|condition| condition.status == "False") && last_start(pod).is_none()
}

fn sandbox_condition(pod: &Pod) -> Option<&PodCondition> {
    let conditions = pod
        .status
        .iter()
        .flat_map(|it| it.conditions.iter().flatten());
    let mut conditions = conditions;
    conditions.find(|condition| condition.type_ == "PodReadyToStartContainers")
}

/// Of containers of all sorts.
fn container_states(pod: &Pod) -> Vec<ContainerState> {
    let status = pod.status.clone().unwrap_or_default();
    let all = [
        status.container_statuses,
        status.init_container_statuses,
        status.ephemeral_container_statuses,
    ];
    let all = all.into_iter().flatten().flatten();
    all.filter_map(|container| container.state).collect()
}

/// `spec.hostNetwork`.
pub fn host_network(pod: &Pod) -> bool {
    let spec = pod.spec.as_ref();
    spec.and_then(|spec| spec.host_network).unwrap_or(false)
}

/// Whether all containers have come to their end: the phase says so, or none of a deleted pod is
/// left; and none runs.
pub fn ended(pod: &Pod) -> bool {
    let status = pod.status.clone().unwrap_or_default();
    let finished = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    let containers = status.container_statuses.unwrap_or_default();
    let all_terminated = !containers.is_empty()
        && containers.iter().all(|container| {
            let state = container.state.as_ref();
            state.is_some_and(|state| state.terminated.is_some())
        });
    let deleted = pod.metadata.deletion_timestamp.is_some();
    (finished || (deleted && all_terminated)) && last_start(pod).is_none()
}

/// All addresses of a pod.
pub fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let status = pod.status.clone().unwrap_or_default();
    let listed = status.pod_ips.unwrap_or_default();
    let texts = listed
        .into_iter()
        .map(|entry| entry.ip)
        .chain(status.pod_ip);
    let mut found: Vec<IpAddr> = texts.filter_map(|text| text.parse().ok()).collect();
    found.dedup();
    found
}

fn is_own_node(cluster: &Cluster, pod: &Pod, address: IpAddr) -> bool {
    let name = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref());
    let own = cluster
        .nodes
        .iter()
        .filter(|node| name.is_some() && node.metadata.name.as_ref() == name);
    own.flat_map(|node| node.status.iter())
        .flat_map(|status| status.addresses.iter().flatten())
        .any(|known| known.address.parse() == Ok(address))
}

// What the API server's validation refuses. Files are not validated by anyone before.

fn rule_fault((peers, ports): Rule<'_>) -> bool {
    peers.into_iter().flatten().any(peer_fault) || ports.into_iter().flatten().any(port_fault)
}

fn peer_fault(peer: &NetworkPolicyPeer) -> bool {
    let selectors = [&peer.pod_selector, &peer.namespace_selector];
    let any_selector = selectors.iter().any(|selector| selector.is_some());
    match &peer.ip_block {
        Some(block) => any_selector || block_fault(block),
        None => {
            !any_selector
                || selectors
                    .iter()
                    .any(|selector| selector_fault(selector.as_ref()))
        }
    }
}

fn block_fault(block: &IPBlock) -> bool {
    let Ok(cidr) = block.cidr.parse::<IpNet>() else {
        return true;
    };
    block.except.iter().flatten().any(|text| {
        !text
            .parse::<IpNet>()
            .is_ok_and(|except| except != cidr.trunc() && cidr.contains(&except.trunc()))
    })
}

fn port_fault(port: &NetworkPolicyPort) -> bool {
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    if !matches!(protocol, "TCP" | "UDP" | "SCTP") {
        return true;
    }
    match (&port.port, port.end_port) {
        (None, None) => false,
        (None | Some(IntOrString::String(_)), Some(_)) => true,
        (Some(IntOrString::String(name)), None) => !name.contains(|c: char| c.is_ascii_lowercase()),
        (Some(IntOrString::Int(first)), last) => {
            let last = last.unwrap_or(*first);
            !(1..=65535).contains(first) || !(1..=65535).contains(&last) || last < *first
        }
    }
}

pub(super) fn selector_fault(selector: Option<&LabelSelector>) -> bool {
    let expressions = selector.and_then(|selector| selector.match_expressions.as_ref());
    expressions.into_iter().flatten().any(requirement_fault)
}

fn requirement_fault(requirement: &LabelSelectorRequirement) -> bool {
    let empty = requirement.values.as_ref().is_none_or(Vec::is_empty);
    match requirement.operator.as_str() {
        "In" | "NotIn" => empty,
        "Exists" | "DoesNotExist" => !empty,
        _ => true,
    }
}
