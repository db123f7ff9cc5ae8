//! What others do to nftlet's tables is undone at once.

mod common;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::manifests::{CLUSTER_CIDR, Manifests};
use common::netns::{
    Ask, Lab, LabOptions, Machine, Namespace, Protocol, Server, require_net_admin, wait_for,
};
use serde_json::json;

const CIDR: [&str; 2] = ["--cluster-cidr", CLUSTER_CIDR];
const LONG: Duration = Duration::from_secs(20);

fn put_service(manifests: &Manifests, index: u16, endpoints: &[IpAddr]) {
    let [high, low] = index.to_be_bytes();
    let name = format!("web-{index}");
    let endpoints: Vec<_> = endpoints
        .iter()
        .map(|address| json!({"addresses": [address], "nodeName": "node-1"}))
        .collect();
    manifests.put(&json!({
        "apiVersion": "v1", "kind": "List", "metadata": {"name": name}, "items": [
            {
                "apiVersion": "v1", "kind": "Service",
                "metadata": {"name": name, "namespace": "shop"},
                "spec": {"clusterIP": format!("10.96.{high}.{low}"), "ports": [{"port": 80}]},
            },
            {
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "name": name, "namespace": "shop",
                    "labels": {"kubernetes.io/service-name": name},
                },
                "addressType": "IPv4", "ports": [{"port": 8080}], "endpoints": endpoints,
            },
        ],
    }));
}

/// The ruleset as others list it, sorted because the kernel lists tables by age.
fn listing(node: &Namespace) -> Vec<String> {
    let mut lines: Vec<_> = node
        .nft(&["list", "ruleset"])
        .lines()
        .map(str::to_owned)
        .collect();
    lines.sort();
    lines
}

fn lab() -> (Lab, Manifests) {
    let lab = Lab::new(LabOptions::default());
    let manifests = Manifests::new();
    let pods: Vec<IpAddr> = lab.pods().iter().map(|pod| pod.v4.into()).collect();
    put_service(&manifests, 10, &pods);
    (lab, manifests)
}

#[test]
fn every_foreign_change_is_undone() {
    if !require_net_admin() {
        return;
    }
    let (lab, manifests) = lab();
    let node = lab.node().ns();
    let daemon = manifests.run(node, &CIDR);
    let wanted = listing(node);
    let changes = [
        "flush ruleset",
        "delete table ip nftlet",
        "flush table ip nftlet",
        "flush chain ip nftlet services",
        "insert rule ip nftlet services tcp dport 80 drop",
        "add chain ip nftlet intruder",
        "add element ip nftlet frontends { 10.96.0.99 . tcp . 80 : drop }",
        "delete element ip nftlet endpoints { 10.96.0.10 . tcp . 80 . 1 }",
        "flush set ip nftlet hairpin",
        "add set ip6 nftlet intruder { type ipv6_addr; }",
    ];
    for change in changes {
        node.nft_load(change);
        wait_for(change, LONG, || (listing(node) == wanted).then_some(()));
    }
    let log = daemon.log();
    assert!(log.contains("somebody else changed it"), "{log}");
    // Somebody who minds their own tables is left alone.
    let notices = log.matches("somebody else").count();
    node.nft_load("table ip other { chain c { type filter hook input priority 0; }; }");
    put_service(&manifests, 11, &[]);
    wait_for("the next service", LONG, || {
        let rules = node.nft(&["list", "map", "ip", "nftlet", "frontends"]);
        rules.contains("web-11").then_some(())
    });
    assert_eq!(daemon.log().matches("somebody else").count(), notices);
    assert!(node.nft(&["list", "tables"]).contains("table ip other"));
}

#[test]
fn somebody_who_does_not_stop_is_answered_more_and_more_slowly() {
    if !require_net_admin() {
        return;
    }
    let (lab, manifests) = lab();
    let node = lab.node().ns();
    let daemon = manifests.run(node, &CIDR);
    let wanted = listing(node);
    // As long as it takes for the warning, and bounded.
    let started = Instant::now();
    let mut changes = 0;
    while !daemon.log().contains("something keeps changing") {
        assert!(started.elapsed() < LONG * 2, "{}", daemon.log());
        node.nft_load("flush chain ip nftlet services");
        changes += 1;
    }
    let answers = daemon.log().matches("somebody else").count();
    assert!(answers < changes, "{answers} answers to {changes} changes");
    wait_for("the last change to be undone", LONG, || {
        (listing(node) == wanted).then_some(())
    });
}

fn serve(pods: &[&Machine]) -> Vec<Server> {
    let serve = |pod: &&Machine| pod.serve(Protocol::Tcp, 8080);
    pods.iter().flat_map(serve).collect()
}

/// Clients are answered again after each flush, with five hundred services to put back.
#[test]
fn traffic_survives_a_flush_of_the_ruleset() {
    if !require_net_admin() {
        return;
    }
    let (lab, manifests) = lab();
    let node = lab.node().ns();
    for index in 256..756 {
        put_service(&manifests, index, &["10.244.9.1".parse().unwrap()]);
    }
    let _servers = serve(&lab.pods());
    let _daemon = manifests.run(node, &CIDR);
    let (stop, answers) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let client = lab.client().ns.clone();
    let asking = {
        let (stop, answers) = (stop.clone(), answers.clone());
        thread::spawn(move || {
            client.enter();
            let ask =
                Ask::tcp(IpAddr::from([10, 96, 0, 10]), 80).timeout(Duration::from_millis(20));
            while !stop.load(Ordering::Relaxed) {
                if ask.send().is_ok() {
                    answers.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
    };
    let wait_for_more = |what: &str| {
        let until = answers.load(Ordering::Relaxed) + 50;
        wait_for(what, LONG, || {
            (answers.load(Ordering::Relaxed) >= until).then_some(())
        });
    };
    for _ in 0..5 {
        wait_for_more("answers before the flush");
        node.nft_load("flush ruleset");
        wait_for_more("answers after the flush");
    }
    stop.store(true, Ordering::Relaxed);
    asking.join().expect("the client ends");
}
