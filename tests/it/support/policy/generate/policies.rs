//! Random network policies, some with a fault.

use k8s_openapi::api::networking::v1::NetworkPolicySpec;
use serde_json::{Map, Value, json};

use super::{NAMESPACE_LABELS, NAMESPACES, POD_LABELS, PORTS, Random, Shape, typed};

const BLOCKS: [(&str, &[&str]); 15] = [
    (
        "0.0.0.0/0",
        &["10.244.0.0/16", "10.244.1.11/32", "192.168.10.0/24"],
    ),
    ("10.244.0.0/16", &["10.244.1.0/24", "10.244.2.12/32"]),
    ("10.244.1.0/24", &["10.244.1.12/31", "10.244.1.11/32"]),
    ("10.244.2.0/24", &["10.244.2.8/29"]),
    ("10.244.1.11/32", &[]),
    // Bits below the prefix mean nothing.
    ("10.244.1.77/24", &["10.244.1.13/30"]),
    ("192.168.10.0/24", &["192.168.10.1/32", "192.168.10.2/32"]),
    ("203.0.113.0/24", &["203.0.113.9/32"]),
    ("::/0", &["fd00:10:244::/48", "fd00:10:244:1::11/128"]),
    (
        "fd00:10:244::/48",
        &["fd00:10:244:1::/64", "fd00:10:244:2::12/128"],
    ),
    (
        "fd00:10:244:1::/64",
        &["fd00:10:244:1::12/127", "fd00:10:244:1::11/128"],
    ),
    ("fd00:10:244:2::/64", &["fd00:10:244:2::10/125"]),
    ("fd00:10:244:2::11/128", &[]),
    ("fd00:192:168:10::/64", &["fd00:192:168:10::1/128"]),
    ("2001:db8::/32", &["2001:db8:1::/48"]),
];

pub fn spec(random: &mut Random, shape: &Shape) -> NetworkPolicySpec {
    let mut spec = Map::new();
    match random.below(10) {
        0 => {}
        1..=4 => {
            spec.insert("podSelector".into(), json!({}));
        }
        _ => {
            let fault = random.percent(shape.faults);
            let selector = selector(random, &POD_LABELS, fault);
            spec.insert("podSelector".into(), selector);
        }
    }
    let types: &[&[&str]] = &[&["Ingress"], &["Egress"], &["Ingress", "Egress"], &[]];
    if random.percent(70) {
        spec.insert("policyTypes".into(), json!(random.pick(types)));
    }
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        match random.below(10) {
            0 => {}
            1 => {
                spec.insert(direction.into(), json!([]));
            }
            _ => {
                let rules: Vec<Value> = (0..1 + random.below(3))
                    .map(|_| rule(random, shape, peers))
                    .collect();
                spec.insert(direction.into(), json!(rules));
            }
        }
    }
    typed(spec)
}

fn rule(random: &mut Random, shape: &Shape, peers: &str) -> Value {
    let fault = random.percent(shape.faults);
    let fault_in_peers = fault && random.percent(50);
    let mut rule = Map::new();
    if fault_in_peers || random.percent(80) {
        let mut list: Vec<Value> = Vec::new();
        if !random.percent(5) {
            list.extend((0..1 + random.below(2)).map(|_| peer(random)));
        }
        if fault_in_peers {
            list.push(faulty_peer(random));
        }
        rule.insert(peers.into(), json!(list));
    }
    if (fault && !fault_in_peers) || random.percent(50) {
        let mut list: Vec<Value> = Vec::new();
        if !random.percent(5) {
            list.extend((0..1 + random.below(2)).map(|_| port(random)));
        }
        if fault && !fault_in_peers {
            list.push(faulty_port(random));
        }
        rule.insert("ports".into(), json!(list));
    }
    Value::Object(rule)
}

pub fn peer(random: &mut Random) -> Value {
    match random.below(10) {
        0..=2 => json!({"podSelector": any_selector(random, &POD_LABELS)}),
        3..=4 => json!({"namespaceSelector": namespace_selector(random)}),
        5..=6 => json!({
            "namespaceSelector": namespace_selector(random),
            "podSelector": any_selector(random, &POD_LABELS),
        }),
        _ => {
            let (cidr, excepts) = random.pick(&BLOCKS);
            let mut block = json!({"cidr": cidr});
            if random.percent(60) {
                let but: Vec<&&str> = excepts.iter().filter(|_| random.percent(60)).collect();
                block["except"] = json!(but);
            }
            json!({"ipBlock": block})
        }
    }
}

pub fn namespace_selector(random: &mut Random) -> Value {
    if random.percent(30) {
        let name = random.pick(&NAMESPACES);
        return json!({"matchLabels": {"kubernetes.io/metadata.name": name}});
    }
    any_selector(random, &NAMESPACE_LABELS)
}

pub fn any_selector(random: &mut Random, known: &[(&str, &[&str])]) -> Value {
    if random.percent(25) {
        return json!({});
    }
    selector(random, known, false)
}

/// A selector with at least one requirement, one of them faulty where that is asked for.
fn selector(random: &mut Random, known: &[(&str, &[&str])], fault: bool) -> Value {
    let mut selector = Map::new();
    let by_labels = random.percent(55);
    if by_labels {
        let (key, values) = random.pick(known);
        let value = random.pick(values);
        selector.insert("matchLabels".into(), json!({*key: value}));
    }
    let mut expressions = Vec::new();
    if !by_labels || random.percent(25) {
        let (key, values) = random.pick(known);
        let wanted: Vec<&&str> = values.iter().filter(|_| random.percent(60)).collect();
        let wanted = if wanted.is_empty() {
            vec![&values[0]]
        } else {
            wanted
        };
        expressions.push(match random.below(4) {
            0 => json!({"key": key, "operator": "In", "values": wanted}),
            1 => json!({"key": key, "operator": "NotIn", "values": wanted}),
            2 => json!({"key": key, "operator": "Exists"}),
            _ => json!({"key": key, "operator": "DoesNotExist", "values": []}),
        });
    }
    if fault {
        expressions.push(faulty_requirement(random));
    }
    if !expressions.is_empty() {
        selector.insert("matchExpressions".into(), json!(expressions));
    }
    Value::Object(selector)
}

pub fn port(random: &mut Random) -> Value {
    let mut port = Map::new();
    if random.percent(65) {
        let protocol = random.pick(&["TCP", "TCP", "UDP", "UDP", "SCTP"]);
        port.insert("protocol".into(), json!(protocol));
    }
    match random.below(10) {
        0 => {}
        1..=4 => {
            port.insert("port".into(), json!(random.pick(&PORTS)));
        }
        5..=6 => {
            let (a, b) = (*random.pick(&PORTS), *random.pick(&PORTS));
            port.insert("port".into(), json!(a.min(b)));
            port.insert("endPort".into(), json!(a.max(b)));
        }
        _ => {
            port.insert("port".into(), json!(random.pick(&["web", "dns", "peer"])));
        }
    }
    Value::Object(port)
}

pub fn faulty_requirement(random: &mut Random) -> Value {
    match random.below(3) {
        0 => json!({"key": "app", "operator": "Like", "values": ["web"]}),
        1 => json!({"key": "app", "operator": "In", "values": []}),
        _ => json!({"key": "app", "operator": "Exists", "values": ["web"]}),
    }
}

fn faulty_peer(random: &mut Random) -> Value {
    match random.below(7) {
        0 => json!({}),
        1 => json!({"ipBlock": {"cidr": "10.244.0.0"}}),
        2 => json!({"ipBlock": {"cidr": "10.244.0.0/33"}}),
        3 => json!({"ipBlock": {"cidr": "10.244.0.0/16", "except": ["192.168.10.0/24"]}}),
        4 => json!({"ipBlock": {"cidr": "0.0.0.0/0", "except": ["everything"]}}),
        5 => json!({"ipBlock": {"cidr": "0.0.0.0/0"}, "podSelector": {}}),
        _ => json!({"podSelector": {"matchExpressions": [faulty_requirement(random)]}}),
    }
}

fn faulty_port(random: &mut Random) -> Value {
    match random.below(7) {
        0 => json!({"port": 0}),
        1 => json!({"port": 70_000}),
        2 => json!({"port": 443, "endPort": 80}),
        3 => json!({"endPort": 9090}),
        4 => json!({"port": "web", "endPort": 9090}),
        5 => json!({"protocol": "ICMP"}),
        _ => json!({"protocol": "tcp", "port": 80}),
    }
}
