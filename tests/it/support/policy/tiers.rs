//! A naive reading of ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2), as
//! [`oracle`](super::oracle) reads NetworkPolicy, from JSON.
//!
//! Where it is not certain which pod has an address, the address belongs to no pod in a rule that
//! accepts or passes, and to each of them in a rule that denies. A pod that was deleted while it ran
//! is known on its own node only.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde_json::Value;

use super::oracle::{
    Cluster, Direction, Protocol, Seen, holders, labels_of, owner, pod_names_port, selector_fault,
    selector_matches,
};

const MOST: usize = 25;
const PROTOCOLS: [(&str, Protocol); 3] = [
    ("tcp", Protocol::Tcp),
    ("udp", Protocol::Udp),
    ("sctp", Protocol::Sctp),
];

/// Whether the policies of a tier that select a pod allow a connection; `None` if they leave it to
/// the next tier.
pub(super) fn decision(cluster: &Cluster, tier: &str, pod: &Pod, seen: &Seen) -> Option<bool> {
    let mut policies: Vec<&Value> = cluster
        .cluster_policies
        .iter()
        .filter(|policy| policy["spec"]["tier"] == tier)
        .filter(|policy| is_subject(cluster, &policy["spec"]["subject"], pod))
        .collect();
    // "Lower priority values have higher precedence"; equal ones in the order of their names.
    policies.sort_by_key(|policy| {
        let name = policy["metadata"]["name"].as_str();
        (policy["spec"]["priority"].as_u64(), name)
    });
    for policy in policies {
        for rule in entries(&policy["spec"][rules_of(seen.direction)]) {
            let action = rule["action"].as_str().unwrap_or_default();
            if rule_fault(rule, seen.direction) {
                // "Fail closed": an Accept rule matches nothing, others are "Deny all".
                match action {
                    "Accept" => continue,
                    _ => return Some(false),
                }
            }
            let asked = Asked {
                pod,
                denies: action == "Deny",
            };
            let peers = entries(&rule[peers_of(seen.direction)]);
            if peers
                .iter()
                .any(|peer| peer_matches(cluster, &asked, peer, seen.other))
                && protocols_match(cluster, &asked, &rule["protocols"], seen)
            {
                return match action {
                    "Accept" => Some(true),
                    "Deny" => Some(false),
                    _ => None,
                };
            }
        }
    }
    None
}

fn rules_of(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

fn peers_of(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "from",
        Direction::Egress => "to",
    }
}

fn entries(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}

/// `namespaces`, or `pods` with a selector of both.
fn is_subject(cluster: &Cluster, subject: &Value, pod: &Pod) -> bool {
    pods_match(cluster, subject, pod)
}

/// Whether the field `namespaces` or `pods` selects a pod.
fn pods_match(cluster: &Cluster, selection: &Value, pod: &Pod) -> bool {
    let everything = Value::Object(serde_json::Map::new());
    let (namespaces, pods) = match selection.get("namespaces") {
        Some(namespaces) => (namespaces, &everything),
        None => {
            let both = &selection["pods"];
            let namespaces = both.get("namespaceSelector").unwrap_or(&everything);
            (namespaces, &both["podSelector"])
        }
    };
    let namespace = cluster
        .namespaces
        .iter()
        .find(|namespace| namespace.metadata.name == pod.metadata.namespace);
    namespace.is_some_and(|namespace| matches(namespaces, Some(&labels_of(namespace))))
        && matches(pods, pod.metadata.labels.as_ref())
}

fn matches(selector: &Value, labels: Option<&BTreeMap<String, String>>) -> bool {
    if *selector == Value::Object(serde_json::Map::new()) {
        return true;
    }
    selector_matches(&typed(selector).expect("a selector"), labels)
}

fn typed(selector: &Value) -> Option<LabelSelector> {
    serde_json::from_value(selector.clone()).ok()
}

fn peer_matches(cluster: &Cluster, asked: &Asked<'_>, peer: &Value, address: IpAddr) -> bool {
    if let Some(networks) = peer.get("networks") {
        let contains = |network: IpNet| network.contains(&address);
        return entries(networks)
            .iter()
            .any(|network| parsed(network).is_some_and(contains));
    }
    if let Some(selector) = peer.get("nodes") {
        return cluster.nodes.iter().any(|node| {
            let status = node.status.iter();
            let mut addresses = status.flat_map(|status| status.addresses.iter().flatten());
            matches(selector, node.metadata.labels.as_ref())
                && addresses.any(|known| known.address.parse() == Ok(address))
        });
    }
    let pods = pods_at(cluster, asked, address);
    pods.into_iter().any(|pod| pods_match(cluster, peer, pod))
}

/// The pods that count as those at an address, on the node of the pod that is asked for.
fn pods_at<'c>(cluster: &'c Cluster, asked: &Asked<'_>, address: IpAddr) -> Vec<&'c Pod> {
    if !asked.denies {
        return owner(cluster, address).into_iter().collect();
    }
    let node = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let is_departed = |pod: &&Pod| {
        cluster
            .departed
            .iter()
            .any(|(_, it)| std::ptr::eq(it, *pod))
    };
    let holders = holders(cluster, address).into_iter();
    holders
        .filter(|pod| !is_departed(pod) || node(pod) == node(asked.pod))
        .collect()
}

/// The pod whose policies are asked, by a rule that denies or another one.
struct Asked<'a> {
    pod: &'a Pod,
    denies: bool,
}

fn parsed(network: &Value) -> Option<IpNet> {
    network.as_str()?.parse().ok()
}

/// Absent, all traffic.
fn protocols_match(cluster: &Cluster, asked: &Asked<'_>, protocols: &Value, seen: &Seen) -> bool {
    if protocols.is_null() {
        return true;
    }
    entries(protocols).iter().any(|entry| {
        if let Some(name) = entry["destinationNamedPort"].as_str() {
            let Some(protocol) = seen.protocol.api_name() else {
                return false;
            };
            let pods = pods_at(cluster, asked, seen.destination);
            let mut pods = pods.into_iter();
            return pods.any(|pod| pod_names_port(pod, name, protocol, seen.port.into()));
        }
        PROTOCOLS.iter().any(|(field, protocol)| {
            let port = entry.get(*field).map(|it| &it["destinationPort"]);
            *protocol == seen.protocol && port.is_some_and(|it| port_matches(it, seen.port))
        })
    })
}

fn port_matches(wanted: &Value, port: u16) -> bool {
    let number = |value: &Value| value.as_u64().expect("a port");
    let (first, last) = match wanted.get("number") {
        Some(only) => (number(only), number(only)),
        None => (
            number(&wanted["range"]["start"]),
            number(&wanted["range"]["end"]),
        ),
    };
    (first..=last).contains(&port.into())
}

// What the API server's validation refuses, and fields of later versions.

fn rule_fault(rule: &Value, direction: Direction) -> bool {
    let peers_field = peers_of(direction);
    let known = ["name", "action", peers_field, "protocols"];
    let actions = ["Accept", "Deny", "Pass"];
    let (peers, protocols) = (&rule[peers_field], &rule["protocols"]);
    let without_ports = ["networks", "nodes", "domainNames"];
    let named = entries(protocols)
        .iter()
        .any(|entry| entry.get("destinationNamedPort").is_some());
    let portless = entries(peers)
        .iter()
        .any(|peer| without_ports.iter().any(|field| peer.get(field).is_some()));
    !actions.iter().any(|action| rule["action"] == *action)
        || !fields(rule)
            .iter()
            .all(|field| known.contains(&field.as_str()))
        || length_fault(peers)
        || entries(peers)
            .iter()
            .any(|peer| peer_fault(peer, direction))
        || (!protocols.is_null() && length_fault(protocols))
        || entries(protocols).iter().any(protocol_fault)
        || (named && portless)
}

fn fields(value: &Value) -> Vec<String> {
    let fields = value.as_object().map(|fields| fields.keys().cloned());
    fields.into_iter().flatten().collect()
}

/// Lists have 1 to 25 entries.
fn length_fault(list: &Value) -> bool {
    !(1..=MOST).contains(&entries(list).len())
}

fn peer_fault(peer: &Value, direction: Direction) -> bool {
    let fields = fields(peer);
    let [field] = fields.as_slice() else {
        return true;
    };
    let value = &peer[field.as_str()];
    match (field.as_str(), direction) {
        ("namespaces", _) => faulty_selector(value),
        ("pods", _) => {
            value.get("podSelector").is_none_or(faulty_selector)
                || value.get("namespaceSelector").is_some_and(faulty_selector)
        }
        ("nodes", Direction::Egress) => faulty_selector(value),
        ("networks", Direction::Egress) => {
            length_fault(value) || entries(value).iter().any(|it| parsed(it).is_none())
        }
        // Domain names are not supported, and no other field is known.
        _ => true,
    }
}

fn faulty_selector(value: &Value) -> bool {
    typed(value).is_none_or(|selector| selector_fault(Some(&selector)))
}

fn protocol_fault(entry: &Value) -> bool {
    let fields = fields(entry);
    let [field] = fields.as_slice() else {
        return true;
    };
    let value = &entry[field.as_str()];
    match field.as_str() {
        "destinationNamedPort" => value.as_str().is_none_or(str::is_empty),
        "tcp" | "udp" | "sctp" => {
            let port = &value["destinationPort"];
            let bound = |value: &Value| value.as_u64().filter(|it| (1..=65535).contains(it));
            match (port.get("number"), port.get("range")) {
                (Some(number), None) => bound(number).is_none(),
                (None, Some(range)) => match (bound(&range["start"]), bound(&range["end"])) {
                    (Some(start), Some(end)) => start >= end,
                    _ => true,
                },
                _ => true,
            }
        }
        _ => true,
    }
}
