//! `nftlet reach` for random clusters: it says of each pair of pods what the independent judge says of
//! each port, and what `nftlet explain` says.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;

use crate::support::policy::generate::{self, PORTS, Random, Shape};
use crate::support::policy::oracle::{self, Cluster, Protocol, addresses, ended};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use Protocol::{Icmp, Sctp, Tcp, Udp};

const SHAPE: Shape = Shape::SMALL;
const CLUSTERS: u64 = 20;
/// Questions to `nftlet explain` about each cluster.
const ASKED: usize = 100;

/// What all pods, and at least one of them, can connect to, as it is printed.
type Said = (String, String);

fn nftlet(words: &[&str], objects: &Path) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_nftlet"))
        .args(words)
        .arg("--manifests")
        .arg(objects)
        .env_remove("NODE_NAME")
        .output()
        .expect("nftlet runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Returns what is said of each pair in lines.
fn lines(text: &str) -> BTreeMap<(String, String), Said> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let pairs = lines.map(|line| {
        let (ends, connections) = line.split_once(" : ").expect("two parts");
        let (from, to) = ends.split_once(" => ").expect("two ends");
        let said = match connections.split_once(" (some: ") {
            Some((all, some)) => (all.to_owned(), some.trim_end_matches(')').to_owned()),
            None => (connections.to_owned(), connections.to_owned()),
        };
        ((from.to_owned(), to.to_owned()), said)
    });
    pairs.collect()
}

/// Returns whether a text such as `TCP 80,8000-8080,ICMP` has a port.
fn has(text: &str, protocol: Protocol, port: u16) -> bool {
    let name = format!("{protocol:?}").to_uppercase();
    let mut of = "";
    match text {
        "All Connections" => true,
        "No Connections" => false,
        some => some.split(',').any(|part| {
            let range = match part.split_once(' ') {
                Some((protocol, range)) => {
                    of = protocol;
                    range
                }
                None if part == "ICMP" => return name == "ICMP",
                None => part,
            };
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let [first, last] = [first, last].map(|it| it.parse::<u16>().expect("a port"));
            of == name && (first..=last).contains(&port)
        }),
    }
}

fn name(pod: &Pod) -> String {
    let part = |text: &Option<String>| text.clone().unwrap_or_default();
    format!(
        "{}/{}",
        part(&pod.metadata.namespace),
        part(&pod.metadata.name)
    )
}

/// Returns the ports whose answers may differ.
fn asked() -> Vec<(Protocol, u16)> {
    let beside = PORTS.iter().flat_map(|port| [port - 1, *port, port + 1]);
    let tcp = beside.chain([1, u16::MAX]).map(|port| (Tcp, port));
    let others = PORTS.iter().flat_map(|port| [(Udp, *port), (Sctp, *port)]);
    tcp.chain(others).chain([(Icmp, 0)]).collect()
}

/// Returns the pairs of addresses of one family.
fn pairs(from: &Pod, to: &Pod) -> Vec<(IpAddr, IpAddr)> {
    let (sources, destinations) = (addresses(from), addresses(to));
    let pairs = sources
        .iter()
        .flat_map(|from| destinations.iter().map(move |to| (*from, *to)));
    pairs
        .filter(|(from, to)| from.is_ipv4() == to.is_ipv4())
        .collect()
}

/// Compares what is said of each pair of pods with the oracle. Returns how much is allowed, and how
/// much was asked.
fn compare(
    cluster: &Cluster,
    pods: &[&Pod],
    said: &BTreeMap<(String, String), Said>,
    seed: u64,
) -> [usize; 2] {
    let (mut allowed, mut all) = (0, 0);
    let none = ("No Connections".to_owned(), "No Connections".to_owned());
    for from in pods {
        for to in pods.iter().filter(|to| name(to) != name(from)) {
            let key = (name(from), name(to));
            let (every, some) = said.get(&key).unwrap_or(&none);
            let pairs = pairs(from, to);
            if pairs.is_empty() {
                assert!(!said.contains_key(&key), "{key:?}, seed {seed}");
                continue;
            }
            for (protocol, port) in asked() {
                let answers = pairs.iter().map(|(source, destination)| {
                    oracle::allowed(cluster, *source, *destination, protocol, port)
                });
                let answers: Vec<bool> = answers.collect();
                let wanted = [answers.iter().all(|it| *it), answers.contains(&true)];
                let found = [every, some].map(|text| has(text, protocol, port));
                assert_eq!(
                    found, wanted,
                    "{key:?} {protocol:?}/{port} of {every} ({some}), seed {seed}"
                );
                all += 1;
                allowed += usize::from(found[0]);
            }
        }
    }
    [allowed, all]
}

/// Checks that JSON says of classes what lines say of their members.
fn compare_classes(json: &Value, pods: &[&Pod], said: &BTreeMap<(String, String), Said>) {
    let list = |of: &Value| of.as_array().expect("a list").clone();
    let text = |of: &Value| of.as_str().expect("a text").to_owned();
    let mut members: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for class in list(&json["classes"]) {
        let of_class = list(&class["members"]).iter().map(text).collect();
        assert!(members.insert(text(&class["name"]), of_class).is_none());
    }
    let known: usize = members.values().map(Vec::len).sum();
    assert_eq!(known, pods.len() + 1, "each pod and internet once");
    let none = ("No Connections".to_owned(), "No Connections".to_owned());
    let pods: BTreeMap<String, &Pod> = pods.iter().map(|pod| (name(pod), *pod)).collect();
    for pair in list(&json["pairs"]) {
        let ends = ["from", "to"].map(|end| &members[&text(&pair[end])]);
        let [from, to] = ends;
        let of_members = from.iter().flat_map(|from| {
            let others = to.iter().filter(move |to| *to != from);
            others.map(move |to| (from.clone(), to.clone()))
        });
        let of_members = of_members.filter(|(from, to)| match (pods.get(from), pods.get(to)) {
            (Some(from), Some(to)) => !pairs(from, to).is_empty(),
            _ => true,
        });
        let of_members: Vec<&Said> = of_members
            .map(|it| said.get(&it).unwrap_or(&none))
            .collect();
        let every = text(&pair["connections"]);
        let some = pair.get("some").map_or(every.clone(), text);
        for (protocol, port) in asked() {
            let of_every = of_members.iter().all(|(all, _)| has(all, protocol, port));
            let of_some = of_members.iter().any(|(_, some)| has(some, protocol, port));
            let found = [&every, &some].map(|text| has(text, protocol, port));
            assert_eq!(found, [of_every, of_some], "{pair} {protocol:?}/{port}");
        }
    }
}

/// Checks that `nftlet explain` gives the same verdicts about random pairs.
fn compare_explained(
    random: &mut Random,
    pods: &[&Pod],
    said: &BTreeMap<(String, String), Said>,
    file: &Path,
) {
    let asked = asked();
    let none = ("No Connections".to_owned(), "No Connections".to_owned());
    let mut questions = Vec::new();
    let mut batch = String::new();
    while questions.len() < ASKED {
        let (protocol, port) = *random.pick(&asked);
        let [from, to] = [(); 2].map(|()| random.pick(pods));
        if name(from) == name(to) || pairs(from, to).is_empty() {
            continue;
        }
        let (mut from, mut to) = (name(from), name(to));
        match random.below(10) {
            0 => from = "internet".into(),
            1 => to = "internet".into(),
            _ => {}
        }
        let port = match protocol {
            Icmp => String::new(),
            _ => format!(":{port}"),
        };
        let _ = writeln!(batch, "{from} {to}{port}/{protocol:?}");
        questions.push((from, to, protocol, port));
    }
    let path = file.with_extension("batch");
    std::fs::write(&path, batch).expect("a file");
    let path = path.to_str().expect("UTF-8");
    let words = ["explain", "--hostname-override=node-1", "--batch", path];
    let answers = nftlet(&words, file);
    for (answer, (from, to, protocol, port)) in answers.lines().zip(&questions) {
        let answer: Value = serde_json::from_str(answer).expect("JSON");
        let (every, some) = said.get(&(from.clone(), to.clone())).unwrap_or(&none);
        let port = port.trim_start_matches(':').parse().unwrap_or_default();
        let wanted = match [every, some].map(|text| has(text, *protocol, port)) {
            [true, _] => "allowed",
            [false, true] => "partly",
            [false, false] => "denied",
        };
        assert_eq!(answer["verdict"], wanted, "{every} ({some}): {answer:#}");
    }
}

#[test]
fn reach_agrees_with_the_api_and_with_explanations() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("all.json");
    let (mut allowed, mut all, mut partial) = (0, 0, 0);
    for seed in 0..CLUSTERS {
        let mut random = Random::new(7_000 + seed);
        let cluster = generate::cluster(&mut random, &SHAPE);
        let pods = cluster.pods.iter().filter(|pod| !ended(pod));
        let pods: Vec<&Pod> = pods.filter(|pod| !addresses(pod).is_empty()).collect();
        let objects = generate::manifests(&cluster);
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        std::fs::write(&file, list.to_string()).expect("a file");
        if pods.len() < 2 {
            continue;
        }
        let said = lines(&nftlet(&["reach", "--by=pod", "-o=lines"], &file));
        partial += said.values().filter(|(every, some)| every != some).count();
        let [more, asked] = compare(&cluster, &pods, &said, seed);
        allowed += more;
        all += asked;
        let json = nftlet(&["reach", "--by=pod", "-o=json"], &file);
        let json = serde_json::from_str(&json).expect("JSON");
        compare_classes(&json, &pods, &said);
        let mut others = pods
            .iter()
            .flat_map(|one| pods.iter().map(move |it| (one, it)));
        if others.any(|(one, it)| name(one) != name(it) && !pairs(one, it).is_empty()) {
            compare_explained(&mut random, &pods, &said, &file);
        }
    }
    assert!(
        allowed > all / 10 && allowed < all - all / 10,
        "{allowed} of {all}"
    );
    assert!(partial > 0, "families differ somewhere");
}
