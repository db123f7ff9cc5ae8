//! Random policies of the cluster, some with a fault.

use serde_json::{Value, json};

use super::policies::{any_selector, faulty_requirement, namespace_selector};
use super::{NODE_LABELS, POD_LABELS, PORTS, Random, Shape};

/// Few, so that some policies have the same one.
const PRIORITIES: [u16; 4] = [0, 5, 100, 1000];

const ACTIONS: [&str; 6] = ["Accept", "Accept", "Accept", "Deny", "Deny", "Pass"];

const NETWORKS: [&str; 12] = [
    "0.0.0.0/0",
    "10.244.0.0/16",
    "10.244.1.0/24",
    "10.244.1.77/24",
    "10.244.1.11/32",
    "10.244.2.8/29",
    "192.168.10.0/24",
    "203.0.113.0/24",
    "::/0",
    "fd00:10:244:1::/64",
    "fd00:10:244:2::11/128",
    "2001:db8::/32",
];

pub fn spec(random: &mut Random, shape: &Shape) -> Value {
    let mut spec = json!({
        "tier": random.pick(&["Admin", "Admin", "Baseline"]),
        "priority": random.pick(&PRIORITIES),
        "subject": pods(random),
    });
    for (rules, peers) in [("ingress", "from"), ("egress", "to")] {
        if random.percent(80) {
            let rules_of = (0..random.below(4)).map(|_| rule(random, shape, peers));
            let rules_of: Vec<Value> = rules_of.collect();
            spec[rules] = json!(rules_of);
        }
    }
    spec
}

/// Changes the priority, the tier or the action of a rule.
pub fn change(random: &mut Random, policy: &mut Value) -> String {
    let name = policy["metadata"]["name"].clone();
    let spec = &mut policy["spec"];
    let side = *random.pick(&["ingress", "egress"]);
    let count = spec[side].as_array().map_or(0, Vec::len);
    match random.below(4) {
        0 => {
            spec["priority"] = json!(random.pick(&PRIORITIES));
            format!("moved cluster policy {name}")
        }
        1 => {
            spec["tier"] = json!(random.pick(&["Admin", "Baseline"]));
            format!("moved cluster policy {name}")
        }
        2 => {
            spec["subject"] = pods(random);
            format!("changed the subject of {name}")
        }
        _ if count > 0 => {
            let rule = random.below(count);
            spec[side][rule]["action"] = json!(random.pick(&ACTIONS));
            format!("changed an action of {name}")
        }
        _ => change(random, policy),
    }
}

/// The field `namespaces` or `pods`.
fn pods(random: &mut Random) -> Value {
    match random.below(5) {
        3 | 4 => json!({"namespaces": {}}),
        0 => json!({"namespaces": namespace_selector(random)}),
        1 => json!({"pods": {"podSelector": any_selector(random, &POD_LABELS)}}),
        _ => json!({"pods": {
            "namespaceSelector": namespace_selector(random),
            "podSelector": any_selector(random, &POD_LABELS),
        }}),
    }
}

fn rule(random: &mut Random, shape: &Shape, peers_field: &str) -> Value {
    let egress = peers_field == "to";
    let fault = random.percent(shape.faults);
    let fault_in_peers = fault && random.percent(50);
    let mut peers: Vec<Value> = (0..1 + random.below(2))
        .map(|_| peer(random, egress))
        .collect();
    let of_pods = |peer: &Value| peer.get("namespaces").is_some() || peer.get("pods").is_some();
    let named = peers.iter().all(of_pods);
    if fault_in_peers {
        peers.push(faulty_peer(random, egress));
    }
    let mut rule = json!({"action": random.pick(&ACTIONS), peers_field: peers});
    if random.percent(30) {
        rule["name"] = json!("a rule");
    }
    if (fault && !fault_in_peers) || random.percent(35) {
        let mut list: Vec<Value> = (0..1 + random.below(2))
            .map(|_| protocol(random, named))
            .collect();
        if fault && !fault_in_peers {
            list.push(faulty_protocol(random, named));
        }
        rule["protocols"] = json!(list);
    }
    if fault && random.percent(10) {
        rule["action"] = json!("Allow");
    }
    rule
}

fn peer(random: &mut Random, egress: bool) -> Value {
    match random.below(if egress { 9 } else { 5 }) {
        0..=4 => pods(random),
        5 | 6 => json!({"nodes": any_selector(random, &NODE_LABELS)}),
        _ => {
            let networks = (0..1 + random.below(2)).map(|_| *random.pick(&NETWORKS));
            json!({"networks": networks.collect::<Vec<_>>()})
        }
    }
}

fn protocol(random: &mut Random, named: bool) -> Value {
    if named && random.percent(30) {
        return json!({"destinationNamedPort": random.pick(&["web", "dns", "peer"])});
    }
    let protocol = *random.pick(&["tcp", "tcp", "tcp", "udp", "udp", "sctp"]);
    let (a, b) = (*random.pick(&PORTS), *random.pick(&PORTS));
    let port = if a == b || random.percent(50) {
        json!({"number": a})
    } else {
        json!({"range": {"start": a.min(b), "end": a.max(b)}})
    };
    json!({protocol: {"destinationPort": port}})
}

fn faulty_peer(random: &mut Random, egress: bool) -> Value {
    match random.below(if egress { 9 } else { 6 }) {
        0 => json!({}),
        1 => json!({"services": {}}),
        2 => json!({"namespaces": {}, "pods": {"podSelector": {}}}),
        3 => json!({"pods": {"namespaceSelector": {}}}),
        4 => json!({"namespaces": {"matchExpressions": [faulty_requirement(random)]}}),
        5 => json!({"domainNames": ["*.example.org"]}),
        6 => json!({"networks": []}),
        7 => json!({"networks": ["10.244.0.0/16", "10.244.0.0"]}),
        _ => json!({"nodes": {}, "networks": ["0.0.0.0/0"]}),
    }
}

fn faulty_protocol(random: &mut Random, named: bool) -> Value {
    match random.below(7) {
        0 => json!({}),
        1 => json!({"icmp": {}}),
        2 => json!({"tcp": {}}),
        3 => json!({"tcp": {"destinationPort": {"range": {"start": 443, "end": 80}}}}),
        4 => json!({"udp": {"destinationPort": {"number": 0}}}),
        5 => json!({"tcp": {"destinationPort": {"number": 80}}, "destinationNamedPort": "web"}),
        _ if !named => json!({"destinationNamedPort": "web"}),
        _ => json!({"destinationNamedPort": ""}),
    }
}
