//! Who can connect to whom in a large cluster: `nftlet reach` of a dump, as whole processes.
//!
//! Pods are those of the other scenes, fewer in each namespace; a host-network pod is on each node. Of the
//! policies one in each namespace isolates all pods in both directions, and the others some of them.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::Context;
use crate::report::Value::{Bytes, Seconds};
use crate::report::{Report, Table};
use crate::samples::Samples;
use nftlet_lab::cluster::grouped;
use nftlet_lab::pods::{Pods, policy};
use nix::sys::resource::{UsageWho, getrusage};
use serde_json::{Value, json};

const NAMESPACES: usize = 200;
const PODS: usize = 10_000;
const POLICIES: usize = 500;
const NODES: usize = 200;
/// Each form of the answer, in the order in which they need more memory.
const FORMS: [(&str, &[&str]); 5] = [
    ("matrix", &[]),
    ("lines", &["-o=lines"]),
    ("JSON, by pod", &["-o=json", "--by=pod"]),
    ("exposed", &["--exposed"]),
    ("page", &["-o=html"]),
];

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// How often each command runs.
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

impl Arguments {
    pub fn run(&self, context: &Context) -> Report {
        let parameters: [(_, &dyn ToString); 3] = [
            ("namespaces", &NAMESPACES),
            ("policies", &POLICIES),
            ("rounds", &self.rounds),
        ];
        let mut report = Report::new("reach", parameters);
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        let of = format!("{} pods", grouped(PODS as f64));
        let mut table = Table::new("Who can connect to whom", "cluster");
        let size = write_dump(&at("dump.json"));
        table.row("size of the dump", &of, "nftlet", Bytes(size as f64));
        for (form, words) in FORMS {
            context.progress(form);
            let times = (0..self.rounds).map(|_| {
                let started = Instant::now();
                run(&context.nftlet, words, &at("dump.json"), &at("answer"));
                started.elapsed().as_secs_f64()
            });
            let times: Samples = times.collect();
            table.row(form, &of, "nftlet", Seconds(times.median()));
            let what = format!("memory, peak, {form}");
            table.row(what, &of, "nftlet", Bytes(peak()));
        }
        report.tables.push(table);
        report
    }
}

/// Writes the dump, and returns its size. Object by object: the memory of this process counts as that of
/// the processes that it starts.
fn write_dump(path: &Path) -> u64 {
    let mut file = BufWriter::new(File::create(path).expect("a file"));
    let mut before = r#"{"apiVersion":"v1","kind":"List","items":["#;
    for object in objects(&Pods::new(2 * PODS, 0)) {
        write!(file, "{before}{object}").expect("it is written");
        before = ",";
    }
    write!(file, "]}}").expect("it is written");
    file.flush().expect("it is written");
    fs::metadata(path).expect("the dump").len()
}

/// Returns the most memory of one of the processes so far, of which all are nftlet.
fn peak() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("the use of resources");
    usage.max_rss() as f64 * 1024.0
}

fn run(nftlet: &Path, words: &[&str], dump: &Path, answer: &Path) {
    let mut command = Command::new(nftlet);
    command
        .arg("reach")
        .args(words)
        .arg("--manifests")
        .arg(dump);
    command.stdout(File::create(answer).expect("a file"));
    let status = command.status().expect("nftlet runs");
    assert!(status.success(), "{words:?}: {status}");
}

/// Returns the objects; the pods are the first of twice as many, whose namespaces come before them.
fn objects(pods: &Pods) -> impl Iterator<Item = Value> + '_ {
    let pods = pods.objects().take(NAMESPACES + PODS);
    let pods = pods.map(|(_, object)| object);
    let of_nodes = (0..NODES).flat_map(|number| {
        let (name, address) = (
            format!("node-{number}"),
            format!("192.168.20.{}", number + 1),
        );
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]},
        });
        let owner = json!({"kind": "DaemonSet", "name": "exporter", "controller": true});
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("exporter-{number}"), "namespace": "ns-0",
                "labels": {"app": "exporter"}, "ownerReferences": [owner]},
            "spec": {"nodeName": name, "hostNetwork": true, "containers": [{"name": "main"}]},
            "status": {"phase": "Running", "podIPs": [{"ip": address}]},
        });
        [node, pod]
    });
    let policies = (0..POLICIES).map(|number| {
        let namespace = number % NAMESPACES;
        let (name, spec) = match number / NAMESPACES {
            0 => ("all", all(namespace)),
            1 => ("one", one(namespace)),
            _ => ("some", some(namespace)),
        };
        policy(&format!("ns-{namespace}"), name, spec).1
    });
    pods.chain(of_nodes).chain(policies)
}

fn app(number: usize) -> Value {
    json!({"matchLabels": {"app": format!("app-{}", number % 10)}})
}

fn team(number: usize) -> Value {
    json!({"matchLabels": {"team": format!("team-{}", number % 20)}})
}

fn all(namespace: usize) -> Value {
    json!({
        "podSelector": {}, "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {"from": [{"podSelector": {}}]},
            {"from": [{"namespaceSelector": team(namespace + 1)}], "ports": [{"port": "http"}]},
        ],
        "egress": [
            {"to": [{"namespaceSelector": {}}],
                "ports": [{"port": 53, "protocol": "UDP"}, {"port": 8080}]},
            {"to": [{"ipBlock": {"cidr": "0.0.0.0/0",
                "except": [format!("10.{namespace}.0.0/16")]}}], "ports": [{"port": 443}]},
        ],
    })
}

fn one(namespace: usize) -> Value {
    let peer = json!({"namespaceSelector": team(namespace + 7), "podSelector": app(namespace + 1)});
    json!({
        "podSelector": app(namespace),
        "ingress": [{"from": [peer], "ports": [{"port": 8000, "endPort": 9000}]}],
    })
}

fn some(namespace: usize) -> Value {
    let block = json!({"ipBlock": {"cidr": format!("203.0.{namespace}.0/24")}});
    json!({
        "podSelector": {"matchExpressions": [
            {"key": "app", "operator": "In", "values": ["app-1", "app-3", "app-5"]}]},
        "ingress": [{"from": [{"podSelector": app(2)}, block], "ports": [{"port": 5432}]}],
    })
}
