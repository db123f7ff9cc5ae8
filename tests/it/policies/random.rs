//! Random clusters, read from files by the real source and compiled by the real engine: what the
//! rules of all nodes let through is what the API's text allows, at the start and after each of a
//! history of changes.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::support::policy::generate::{self, Random, Shape, is_node, node_of};
use crate::support::policy::kernel::commit;
use crate::support::policy::oracle::{self, Cluster, Protocol};
use crate::support::policy::walk::{Packet, Walked, walk};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use nftlet::engine::{BUDGET, Engine as _};
use nftlet::model::{Event, Kind};
use nftlet::nft::{Hook, Ruleset};
use nftlet::policies::{Connection, Engine, PolicySettings};
use nftlet::source::Manifests;

const SHAPE: Shape = Shape::SMALL;
/// Connections asked for after each change.
const ASKED: usize = 24;
const CHANGES: usize = 4;

/// A connection: source, destination, protocol and port.
type Asked = (IpAddr, IpAddr, Protocol, u16);

/// nftlet on one node, with a model of the kernel.
struct Node {
    engine: Engine,
    kernel: Ruleset,
}

impl Node {
    fn new(number: u8, strict: bool) -> Self {
        let settings = PolicySettings {
            node: Arc::from(format!("node-{number}")),
            strict,
            ..PolicySettings::default()
        };
        Self {
            engine: Engine::new(settings),
            kernel: Ruleset::default(),
        }
    }

    /// Hands over events and commits what follows, step by step.
    fn feed(&mut self, events: &[Event], mut between: impl FnMut(&Ruleset)) {
        for event in events {
            self.engine.apply(event);
        }
        assert!(self.engine.is_ready());
        let applied = |kind| {
            let of_kind = events.iter().filter(|event| event.kind() == Some(kind));
            of_kind.count()
        };
        for kind in Kind::POLICY {
            assert_eq!(self.engine.count(kind), applied(kind), "{kind}");
        }
        let steps: Vec<_> = self
            .engine
            .update(BUDGET)
            .transaction
            .into_steps()
            .collect();
        let last = steps.len();
        for (index, step) in steps.iter().enumerate() {
            commit(&mut self.kernel, step);
            if index + 1 < last {
                between(&self.kernel);
            }
        }
    }
}

/// All nodes of a cluster.
struct Nodes {
    nodes: Vec<Node>,
    strict: bool,
}

impl Nodes {
    fn new(strict: bool) -> Self {
        let nodes = (1..=SHAPE.nodes).map(|number| Node::new(number, strict));
        Self {
            nodes: nodes.collect(),
            strict,
        }
    }

    fn started(events: &[Event], strict: bool) -> Self {
        let mut fresh = Self::new(strict);
        for node in &mut fresh.nodes {
            node.feed(events, |_| ());
        }
        fresh
    }

    fn kernels(&self) -> Vec<&Ruleset> {
        self.nodes.iter().map(|node| &node.kernel).collect()
    }
}

/// The hooks that a connection's first packet passes, with the nodes they are on.
fn way(source: IpAddr, destination: IpAddr) -> Vec<(u8, Hook)> {
    let (from, to) = (node_of(source), node_of(destination));
    let mut way = Vec::new();
    if let Some(from) = from {
        if is_node(source) {
            way.push((from, Hook::Output));
        } else if to != Some(from) || !is_node(destination) {
            way.push((from, Hook::Forward));
        }
    }
    if let Some(to) = to {
        if is_node(destination) {
            way.push((to, Hook::Input));
        } else if from != Some(to) {
            way.push((to, Hook::Forward));
        }
    }
    way
}

fn number(protocol: Protocol, v6: bool) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
        Protocol::Icmp if v6 => 58,
        Protocol::Icmp => 1,
    }
}

/// Walks the rules of all nodes on the way. The walks that were made, of which only the last one
/// can have ended badly.
fn walked(kernels: &[&Ruleset], (source, destination, protocol, port): Asked) -> Vec<Walked> {
    let number = number(protocol, source.is_ipv6());
    let mut walks = Vec::new();
    for (node, hook) in way(source, destination) {
        let mut packet = Packet::first(source, destination, number, port);
        packet.local = generate::node_addresses(node).into();
        let walked = walk(kernels[usize::from(node) - 1], hook, &packet);
        let goes_on = walked.accepted();
        walks.push(walked);
        if !goes_on {
            break;
        }
    }
    walks
}

fn passes(kernels: &[&Ruleset], asked: Asked) -> bool {
    walked(kernels, asked).iter().all(Walked::accepted)
}

fn allowed(cluster: &Cluster, (source, destination, protocol, port): Asked) -> bool {
    oracle::allowed(cluster, source, destination, protocol, port)
}

/// The events of the cluster's objects, read from a file: JSON, or YAML, of which JSON is a part.
fn read(directory: &Path, cluster: &Cluster, yaml: bool) -> Vec<Event> {
    let file = directory.join(if yaml { "all.yaml" } else { "all.json" });
    let list = serde_json::json!({
        "apiVersion": "v1", "kind": "List", "items": generate::manifests(cluster),
    });
    std::fs::write(&file, list.to_string()).expect("a file");
    let mut manifests = Manifests::new(vec![file], "node-1".into());
    let events = manifests.load().expect("the file exists");
    let all = cluster.pods.len()
        + cluster.namespaces.len()
        + cluster.policies.len()
        + cluster.cluster_policies.len();
    let kinds = Kind::POLICY;
    let read = events.iter().filter_map(Event::kind);
    let count = read.filter(|kind| kinds.contains(kind)).count();
    assert_eq!(count, all, "every object is read");
    events
}

/// What the engines that begin with these objects get wrong, of all that can be asked.
fn mistake(directory: &Path, cluster: &Cluster, asked: Asked) -> bool {
    let fresh = Nodes::started(&read(directory, cluster, false), false);
    passes(&fresh.kernels(), asked) != allowed(cluster, asked)
}

/// The smallest part of a cluster that shows a mistake.
fn smallest(directory: &Path, cluster: &Cluster, asked: Asked) -> Cluster {
    fn without<T: Clone>(list: &[T], index: usize) -> Vec<T> {
        let mut list = list.to_vec();
        list.remove(index);
        list
    }
    let mut best = cluster.clone();
    loop {
        let mut smaller: Vec<Cluster> = Vec::new();
        let mut offer = |change: &dyn Fn(&mut Cluster)| {
            let mut next = best.clone();
            change(&mut next);
            smaller.push(next);
        };
        for index in 0..best.policies.len() {
            offer(&|next| next.policies = without(&next.policies, index));
            let rules = |policy: &NetworkPolicy| {
                let spec = policy.spec.clone().unwrap_or_default();
                let count = |rules: Option<usize>| rules.unwrap_or_default();
                (
                    count(spec.ingress.map(|rules| rules.len())),
                    count(spec.egress.map(|rules| rules.len())),
                )
            };
            let (ingress, egress) = rules(&best.policies[index]);
            for rule in 0..ingress {
                offer(&|next| {
                    let spec = next.policies[index].spec.get_or_insert_default();
                    let rules = spec.ingress.get_or_insert_default();
                    rules.remove(rule);
                });
            }
            for rule in 0..egress {
                offer(&|next| {
                    let spec = next.policies[index].spec.get_or_insert_default();
                    let rules = spec.egress.get_or_insert_default();
                    rules.remove(rule);
                });
            }
        }
        for index in 0..best.pods.len() {
            offer(&|next| next.pods = without(&next.pods, index));
        }
        match smaller
            .into_iter()
            .find(|next| mistake(directory, next, asked))
        {
            Some(next) => best = next,
            None => return best,
        }
    }
}

/// Everything there is to know of a wrong verdict.
fn report(directory: &Path, cluster: &Cluster, asked: Asked, kernels: &[&Ruleset]) -> String {
    let mut text = format!("{asked:?}: allowed is {}\n", allowed(cluster, asked));
    for (walk, (node, hook)) in walked(kernels, asked).iter().zip(way(asked.0, asked.1)) {
        let _ = write!(text, "node-{node} {hook:?}: {walk}");
    }
    let small = if mistake(directory, cluster, asked) {
        smallest(directory, cluster, asked)
    } else {
        text.push_str("a fresh engine gets it right; it comes from the history\n");
        cluster.clone()
    };
    for object in generate::manifests(&small) {
        let _ = writeln!(text, "---\n{object}");
    }
    text
}

/// One history: a cluster and some changes of it.
fn history(directory: &Path, seed: u64) {
    let mut random = Random::new(seed);
    let strict = random.percent(30);
    let mut cluster = generate::cluster(&mut random, &SHAPE);
    let mut nodes = Nodes::new(strict);
    let mut told = vec![format!("seed {seed}, strict {strict}")];
    let mut before: Option<Cluster> = None;
    for _ in 0..=CHANGES {
        let events = read(directory, &cluster, random.percent(50));
        let asked: Vec<(Asked, Option<bool>, bool)> = (0..ASKED)
            .map(|_| {
                let asked = generate::connection(&mut random, &SHAPE, &cluster);
                let earlier = before.as_ref().map(|before| allowed(before, asked));
                (asked, earlier, allowed(&cluster, asked))
            })
            .collect();
        for index in 0..nodes.nodes.len() {
            nodes.nodes[index].feed(&events, |between| {
                // What is between two states is one or the other.
                let kernels = vec![between; usize::from(SHAPE.nodes)];
                for (asked, earlier, now) in &asked {
                    if *earlier == Some(*now) && meets_only(*asked, index) {
                        let pass = passes(&kernels, *asked);
                        assert_eq!(pass, *now, "between: {told:#?} {asked:?}");
                    }
                }
            });
        }
        let fresh = Nodes::started(&events, nodes.strict);
        for (lived, fresh) in nodes.nodes.iter().zip(&fresh.nodes) {
            assert_eq!(lived.kernel, lived.engine.ruleset(), "{told:#?}");
            if !cluster.departed.is_empty() {
                // A fresh start knows nothing of them.
                continue;
            }
            assert!(
                fresh.kernel == lived.kernel,
                "a fresh start has other rules: {told:#?}\n{:#?}",
                nftlet::nft::diff(&lived.kernel, fresh.kernel.clone())
            );
        }
        let kernels = nodes.kernels();
        for (asked, _, now) in asked {
            if passes(&kernels, asked) != now {
                let report = report(directory, &cluster, asked, &kernels);
                panic!("{told:#?}\n{report}");
            }
            for (index, node) in nodes.nodes.iter().enumerate() {
                judged(&node.engine, index, &cluster, asked, &told);
            }
        }
        before = Some(cluster.clone());
        told.push(generate::mutate(&mut random, &SHAPE, &mut cluster));
    }
}

/// Whether a connection meets the rules of this node and of no other.
fn meets_only((source, destination, ..): Asked, index: usize) -> bool {
    let way = way(source, destination);
    way.iter().all(|(node, _)| usize::from(*node) == index + 1)
}

/// What the engine says without rules is what its node's part of the oracle says.
fn judged(engine: &Engine, index: usize, cluster: &Cluster, asked: Asked, told: &[String]) {
    let (source, destination, protocol, port) = asked;
    if is_node(source) {
        return;
    }
    let here = |address| {
        let holders = oracle::holders(cluster, address);
        !holders.is_empty() && node_of(address).is_some_and(|node| usize::from(node) == index + 1)
    };
    let wanted = (!here(source)
        || oracle::egress_allowed(cluster, source, destination, protocol, port))
        && (!here(destination)
            || oracle::ingress_allowed(cluster, source, destination, protocol, port));
    let connection = Connection {
        source,
        destination,
        protocol: number(protocol, source.is_ipv6()),
        port: (protocol != Protocol::Icmp).then_some(port),
    };
    let allows = engine.allows(&connection);
    assert_eq!(
        allows, wanted,
        "the engine's own judge: {told:#?} {asked:?}"
    );
}

fn histories(seeds: Range<u64>) {
    let directory = tempfile::tempdir().expect("a directory");
    for seed in seeds {
        history(directory.path(), seed);
    }
}

// Four tests, for as many threads.

#[test]
fn histories_agree_with_the_api_1() {
    histories(0..200);
}

#[test]
fn histories_agree_with_the_api_2() {
    histories(200..400);
}

#[test]
fn histories_agree_with_the_api_3() {
    histories(400..600);
}

#[test]
fn histories_agree_with_the_api_4() {
    histories(600..800);
}
