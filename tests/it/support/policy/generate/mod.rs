//! Random clusters with random policies, random changes of them, and connections to ask for.
//!
//! Everything follows from a seed. The worlds are small on purpose: few labels, ports and
//! addresses, so that selectors, blocks and ports meet often. `tests/it/policies/oracle.rs` measures
//! that both answers are frequent and that every form of every field comes up.

mod pods;
mod policies;
mod tiers;

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, PodStatus};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::support::policy::oracle::{
    Cluster, Protocol, addresses, claims, ended, follows, has_no_sandbox, host_network, runs,
};
use pods::{end, new_pod, show};
use policies::spec;

/// A sequence of numbers that looks random (SplitMix64), the same for every run of a seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below a bound.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    /// True so many times of a hundred.
    pub fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of several.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// How large the worlds are and what is in them.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Nodes, `node-1` and on.
    pub nodes: u8,
    /// Pod addresses on each node.
    pub slots: u8,
    /// Most pods, but for three.
    pub pods: usize,
    /// Most policies.
    pub policies: usize,
    /// Most policies of the cluster.
    pub cluster_policies: usize,
    /// Of a hundred rules, how many get a fault.
    pub faults: usize,
}

impl Shape {
    /// A cluster so small that all pairs of its pods can be asked about.
    pub const SMALL: Self = Self {
        nodes: 2,
        slots: 4,
        pods: 9,
        policies: 5,
        cluster_policies: 4,
        faults: 5,
    };
}

/// The ports that the worlds use.
pub const PORTS: [u16; 5] = [53, 80, 443, 8080, 9090];

/// An address that is no pod's and no node's.
pub const OUTSIDE: [&str; 4] = [
    "192.168.10.100",
    "203.0.113.9",
    "fd00:192:168:10::100",
    "2001:db8:1::9",
];

const NAMESPACES: [&str; 3] = ["shop", "store", "lab"];

const POD_LABELS: [(&str, &[&str]); 3] = [
    ("app", &["web", "db", "cache"]),
    ("tier", &["front", "back"]),
    ("canary", &[""]),
];

const NAMESPACE_LABELS: [(&str, &[&str]); 2] = [("team", &["a", "b"]), ("env", &["prod", "dev"])];

const NODE_LABELS: [(&str, &[&str]); 2] = [("role", &["control", "worker"]), ("edge", &[""])];

/// A cluster of this shape.
pub fn cluster(random: &mut Random, shape: &Shape) -> Cluster {
    let mut cluster = Cluster {
        nodes: (1..=shape.nodes)
            .map(|number| node(random, number))
            .collect(),
        ..Cluster::default()
    };
    cluster.nodes.push(outside_node(random));
    for name in NAMESPACES.iter().take(1 + random.below(NAMESPACES.len())) {
        cluster.namespaces.push(namespace(random, name));
    }
    for _ in 0..3 + random.below(shape.pods) {
        add_pod(random, shape, &mut cluster);
    }
    for _ in 0..1 + random.below(shape.policies) {
        add_policy(random, shape, &mut cluster);
    }
    for _ in 0..random.below(1 + shape.cluster_policies) {
        add_cluster_policy(random, shape, &mut cluster);
    }
    cluster
}

/// Changes a cluster, and returns a description of the change.
pub fn mutate(random: &mut Random, shape: &Shape, cluster: &mut Cluster) -> String {
    let before = cluster.pods.clone();
    let said = change(random, shape, cluster);
    // A pod that gets the address of one deleted while it ran takes its place.
    let earlier = |pod: &Pod| {
        before
            .iter()
            .find(|old| name_of(&old.metadata) == name_of(&pod.metadata))
    };
    let pods = &cluster.pods;
    cluster.departed.retain(|(address, departed)| {
        !pods.iter().any(|pod| {
            let is_new = earlier(pod).is_none_or(|old| !claims(old, *address));
            claims(pod, *address) && !has_no_sandbox(pod) && (is_new || follows(pod, departed))
        })
    });
    for old in &before {
        let is_gone = !pods
            .iter()
            .any(|pod| name_of(&pod.metadata) == name_of(&old.metadata));
        if is_gone && runs(old) {
            let had = addresses(old)
                .into_iter()
                .filter(|address| claims(old, *address));
            let had: Vec<IpAddr> = had.collect();
            cluster
                .departed
                .retain(|(address, _)| !had.contains(address));
            cluster
                .departed
                .extend(had.into_iter().map(|address| (address, old.clone())));
        }
    }
    said
}

fn change(random: &mut Random, shape: &Shape, cluster: &mut Cluster) -> String {
    let pod = random.below(cluster.pods.len());
    let policy = random.below(cluster.policies.len());
    let has_pod = !cluster.pods.is_empty();
    let has_policy = !cluster.policies.is_empty();
    let tiered = random.below(cluster.cluster_policies.len());
    let has_tiered = !cluster.cluster_policies.is_empty();
    match random.below(if shape.cluster_policies > 0 { 25 } else { 16 }) {
        0 | 1 if has_pod => {
            let pod = &mut cluster.pods[pod];
            pod.metadata.labels = typed(labels(random, &POD_LABELS));
            format!("relabelled {}", name_of(&pod.metadata))
        }
        2 if has_pod => {
            let others = || {
                let others = cluster.pods.iter().enumerate();
                others
                    .filter(|(index, _)| *index != pod)
                    .map(|(_, other)| other)
            };
            let shared = addresses(&cluster.pods[pod]).into_iter();
            let mut shared = shared.filter(|address| others().any(|it| claims(it, *address)));
            // What only this pod's node knows must not matter to others.
            if runs(&cluster.pods[pod]) && shared.next().is_some() {
                let pod = &mut cluster.pods[pod];
                end(pod, "Failed");
                return format!("Failed {}", name_of(&pod.metadata));
            }
            let gone = cluster.pods.remove(pod);
            format!("deleted {}", name_of(&gone.metadata))
        }
        3 if has_pod => {
            // As a StatefulSet does: the same name, another pod.
            let metadata = cluster.pods[pod].metadata.clone();
            let mut new = new_pod(random, shape, &cluster.namespaces);
            new.metadata.name = metadata.name;
            new.metadata.namespace = metadata.namespace;
            let said = format!("replaced {}", name_of(&new.metadata));
            cluster.pods[pod] = new;
            said
        }
        4 if has_pod => {
            // An address changes hands.
            let other = random.below(cluster.pods.len());
            let (a, b) = (&cluster.pods[pod], &cluster.pods[other]);
            if host_network(a) || host_network(b) {
                return change(random, shape, cluster);
            }
            let said = format!("{} <-> {}", name_of(&a.metadata), name_of(&b.metadata));
            let (a, b) = (place(a), place(b));
            set_place(&mut cluster.pods[pod], b);
            set_place(&mut cluster.pods[other], a);
            said
        }
        5 if has_pod => {
            let pod = &mut cluster.pods[pod];
            pod.metadata.deletion_timestamp = typed(json!("2026-01-01T01:00:00Z"));
            format!("terminating {}", name_of(&pod.metadata))
        }
        6 if has_pod => {
            let pod = &mut cluster.pods[pod];
            let phase = if ended(pod) { "Running" } else { "Failed" };
            if phase == "Running" || random.percent(30) {
                pod.status.get_or_insert_default().phase = Some(phase.into());
            } else {
                end(pod, phase);
            }
            format!("{phase} {}", name_of(&pod.metadata))
        }
        14 | 15 if has_pod => {
            let pod = &mut cluster.pods[pod];
            if let Some(status) = &mut pod.status {
                show(random, status);
            }
            format!("news of {}", name_of(&pod.metadata))
        }
        7 | 8 => {
            let index = random.below(cluster.namespaces.len());
            let namespace = &mut cluster.namespaces[index];
            let labels: Map<String, Value> = labels(random, &NAMESPACE_LABELS);
            namespace.metadata.labels = typed(Value::Object(labels));
            format!("relabelled namespace {:?}", namespace.metadata.name)
        }
        9 | 10 if has_policy => {
            let policy = &mut cluster.policies[policy];
            policy.spec = Some(spec(random, shape));
            format!("edited policy {}", name_of(&policy.metadata))
        }
        11 if has_policy => {
            let gone = cluster.policies.remove(policy);
            format!("deleted policy {}", name_of(&gone.metadata))
        }
        12 if cluster.policies.len() < shape.policies + 2 => {
            let name = add_policy(random, shape, cluster);
            format!("added policy {name}")
        }
        16 | 17 if has_tiered => {
            let policy = &mut cluster.cluster_policies[tiered];
            tiers::change(random, policy)
        }
        18 | 19 if has_tiered => {
            let policy = &mut cluster.cluster_policies[tiered];
            policy["spec"] = tiers::spec(random, shape);
            format!("edited cluster policy {}", policy["metadata"]["name"])
        }
        20 if has_tiered => {
            let gone = cluster.cluster_policies.remove(tiered);
            format!("deleted cluster policy {}", gone["metadata"]["name"])
        }
        21 | 22 if cluster.cluster_policies.len() < shape.cluster_policies + 1 => {
            let name = add_cluster_policy(random, shape, cluster);
            format!("added cluster policy {name}")
        }
        23 => {
            let index = random.below(cluster.nodes.len());
            let labels: Map<String, Value> = labels(random, &NODE_LABELS);
            let node = &mut cluster.nodes[index];
            node.metadata.labels = typed(Value::Object(labels));
            format!("relabelled node {:?}", node.metadata.name)
        }
        24 => {
            let outside = cluster.nodes.last_mut().expect("a node");
            *outside = outside_node(random);
            "moved node".to_owned()
        }
        _ if cluster.pods.len() < shape.pods + 3 => {
            let name = add_pod(random, shape, cluster);
            format!("added {name}")
        }
        _ => change(random, shape, cluster),
    }
}

/// A connection to ask for, mostly between addresses of pods.
pub fn connection(
    random: &mut Random,
    shape: &Shape,
    cluster: &Cluster,
) -> (IpAddr, IpAddr, Protocol, u16) {
    let v6 = random.percent(45);
    let owned: Vec<IpAddr> = cluster
        .pods
        .iter()
        .flat_map(addresses)
        .filter(|address| address.is_ipv6() == v6 && !is_node(*address))
        .collect();
    let mut end = || -> IpAddr {
        let number = 1 + random.below(shape.nodes.into()) as u8;
        match random.below(30) {
            0 => slot(number, 1 + random.below(shape.slots.into()) as u8)[usize::from(v6)],
            1 => node_addresses(number)[usize::from(v6)],
            2 | 3 => {
                let index = 2 * usize::from(v6) + random.below(2);
                OUTSIDE[index].parse().expect("an address")
            }
            _ if owned.is_empty() => slot(number, 1)[usize::from(v6)],
            _ => *random.pick(&owned),
        }
    };
    let (source, destination) = (end(), end());
    let protocols = [
        Protocol::Tcp,
        Protocol::Tcp,
        Protocol::Tcp,
        Protocol::Tcp,
        Protocol::Udp,
        Protocol::Udp,
        Protocol::Sctp,
        Protocol::Icmp,
    ];
    (
        source,
        destination,
        *random.pick(&protocols),
        *random.pick(&PORTS),
    )
}

/// The node on which an address is, by the plan of addresses; pods never move away from it.
pub fn node_of(address: IpAddr) -> Option<u8> {
    match address {
        IpAddr::V4(v4) => match v4.octets() {
            [10, 244, node, _] => Some(node),
            [192, 168, 10, node] if node < 100 => Some(node),
            _ => None,
        },
        IpAddr::V6(v6) => match v6.segments() {
            [0xfd00, 0x10, 0x244, node, ..] => u8::try_from(node).ok(),
            [0xfd00, 0x192, 0x168, 0x10, .., node] if node < 0x100 => u8::try_from(node).ok(),
            _ => None,
        },
    }
}

/// Whether an address is a node's own.
pub fn is_node(address: IpAddr) -> bool {
    node_of(address).is_some_and(|number| node_addresses(number).contains(&address))
}

/// The addresses of a node, as in the laboratory of network namespaces.
pub fn node_addresses(number: u8) -> [IpAddr; 2] {
    [
        IpAddr::from([192, 168, 10, number]),
        parse(&format!("fd00:192:168:10::{number}")),
    ]
}

/// A pair of addresses of pods on a node, as in the laboratory of network namespaces.
pub fn slot(node: u8, slot: u8) -> [IpAddr; 2] {
    let host = 10 + slot;
    [
        IpAddr::from([10, 244, node, host]),
        parse(&format!("fd00:10:244:{node}::{host}")),
    ]
}

/// All objects as manifests.
pub fn manifests(cluster: &Cluster) -> Vec<Value> {
    fn values<T: Serialize>(objects: &[T]) -> impl Iterator<Item = Value> {
        objects
            .iter()
            .map(|object| serde_json::to_value(object).expect("JSON"))
    }
    values(&cluster.nodes)
        .chain(values(&cluster.namespaces))
        .chain(values(&cluster.pods))
        .chain(values(&cluster.policies))
        .chain(cluster.cluster_policies.iter().cloned())
        .collect()
}

fn parse(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn typed<T: DeserializeOwned>(value: impl Into<Value>) -> T {
    serde_json::from_value(value.into()).expect("an object of the API")
}

fn name_of(metadata: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> String {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    format!("{}/{}", text(&metadata.namespace), text(&metadata.name))
}

fn node(random: &mut Random, number: u8) -> Node {
    let addresses = node_addresses(number);
    let addresses: Vec<Value> = addresses
        .iter()
        .map(|address| json!({"type": "InternalIP", "address": address}))
        .collect();
    typed(json!({
        "metadata": {"name": format!("node-{number}"), "labels": labels(random, &NODE_LABELS)},
        "status": {"addresses": addresses},
    }))
}

/// A node without pods, with addresses of every type.
fn outside_node(random: &mut Random) -> Node {
    let chosen = OUTSIDE.into_iter().filter(|_| random.percent(50));
    let addresses: Vec<&str> = chosen.collect();
    let types = ["InternalIP", "ExternalIP", "Hostname", "InternalDNS"];
    let addresses = addresses
        .into_iter()
        .chain(["node-9"])
        .map(|address| json!({"type": random.pick(&types), "address": address}));
    let addresses: Vec<Value> = addresses.collect();
    typed(json!({
        "metadata": {"name": "node-9", "labels": labels(random, &NODE_LABELS)},
        "status": {"addresses": addresses},
    }))
}

fn namespace(random: &mut Random, name: &str) -> Namespace {
    let mut labels = labels(random, &NAMESPACE_LABELS);
    if random.percent(50) {
        // As the API server has it; a file need not.
        labels.insert("kubernetes.io/metadata.name".into(), json!(name));
    }
    typed(json!({"metadata": {"name": name, "labels": labels}}))
}

fn labels(random: &mut Random, known: &[(&str, &[&str])]) -> Map<String, Value> {
    let mut labels = Map::new();
    for (key, values) in known {
        let share = if values.len() > 1 { 75 } else { 20 };
        if random.percent(share) {
            labels.insert((*key).into(), json!(random.pick(values)));
        }
    }
    labels
}

/// A name with a number that no other has.
fn free_name<'a>(letter: char, used: impl Iterator<Item = &'a Option<String>>) -> String {
    let number = |name: &Option<String>| name.as_deref()?.get(1..)?.parse::<u32>().ok();
    let next = used.filter_map(number).max().map_or(0, |last| last + 1);
    format!("{letter}{next}")
}

fn add_pod(random: &mut Random, shape: &Shape, cluster: &mut Cluster) -> String {
    let mut pod = new_pod(random, shape, &cluster.namespaces);
    let names = cluster.pods.iter().map(|pod| &pod.metadata.name);
    pod.metadata.name = Some(free_name('p', names));
    let name = name_of(&pod.metadata);
    cluster.pods.push(pod);
    name
}

/// Where a pod is: node, addresses and phase.
type Place = (Option<String>, Option<PodStatus>);

fn place(pod: &Pod) -> Place {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    (node, pod.status.clone())
}

fn set_place(pod: &mut Pod, (node, status): Place) {
    pod.spec.get_or_insert_default().node_name = node;
    pod.status = status;
}

fn add_policy(random: &mut Random, shape: &Shape, cluster: &mut Cluster) -> String {
    let names = cluster.policies.iter().map(|policy| &policy.metadata.name);
    let name = free_name('n', names);
    let namespace = random.pick(&cluster.namespaces).metadata.name.clone();
    let mut policy: NetworkPolicy = typed(json!({
        "metadata": {"namespace": namespace, "name": name},
    }));
    policy.spec = Some(spec(random, shape));
    let said = name_of(&policy.metadata);
    cluster.policies.push(policy);
    said
}

fn add_cluster_policy(random: &mut Random, shape: &Shape, cluster: &mut Cluster) -> String {
    let names = cluster.cluster_policies.iter();
    let names: Vec<Option<String>> = names
        .map(|policy| policy["metadata"]["name"].as_str().map(str::to_owned))
        .collect();
    // Sometimes a name that comes before those of older policies.
    let letter = *random.pick(&['b', 'c']);
    let name = free_name(letter, names.iter());
    cluster.cluster_policies.push(json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name}, "spec": tiers::spec(random, shape),
    }));
    name
}
