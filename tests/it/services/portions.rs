//! Changes that are too large for one transaction, under connections.
//!
//! A service of 20 ports at 50 external addresses and its ClusterIP has a thousand frontends; with
//! ten endpoints each they are more than ten thousand elements, which are written in portions.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::manifests::{CLUSTER_CIDR, Manifests};
use crate::support::objects::{service, slice_of, with};
use nftlet_lab::netns::{
    Ask, Lab, LabOptions, Machine, Namespace, PATIENCE, Protocol, Server, loses_nothing,
    require_net_admin, wait_for,
};
use serde_json::{Value, json};

const CIDR: [&str; 2] = ["--cluster-cidr", CLUSTER_CIDR];
const PORTS: u16 = 20;
const ADDRESSES: u8 = 50;
const CLUSTER_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10));
/// Between two requests of a client, so that it does not use all of its ports.
const PACE: Duration = Duration::from_millis(1);

fn external(number: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, number))
}

fn put_service(manifests: &Manifests) {
    let ports = (0..PORTS).map(|n| json!({"name": format!("p{n}"), "port": 1000 + n}));
    let addresses = (0..ADDRESSES).map(external);
    manifests.put(&with(
        service("wide", CLUSTER_IP),
        json!({"spec": {"externalIPs": addresses.collect::<Vec<_>>(),
            "ports": ports.collect::<Vec<_>>()}}),
    ));
}

fn put_slice(manifests: &Manifests, pods: &[&Machine]) {
    let ports = (0..PORTS).map(|n| json!({"name": format!("p{n}"), "port": 8080}));
    let endpoints = pods.iter().map(
        |pod| json!({"addresses": [pod.v4], "nodeName": "node-1", "conditions": {"ready": true}}),
    );
    manifests.put(&with(
        slice_of("wide-1", "wide", endpoints.collect()),
        json!({"ports": ports.collect::<Value>()}),
    ));
}

/// A client at each of some frontends: the first ones, ones in the middle, and the last ones.
fn asks() -> Vec<Ask> {
    let addresses = [
        CLUSTER_IP,
        external(0),
        external(ADDRESSES / 2),
        external(ADDRESSES - 1),
    ];
    let ports = [1000, 999 + PORTS];
    let all = addresses
        .iter()
        .flat_map(|at| ports.map(|port| Ask::http(*at, port)));
    all.collect()
}

/// Waits until just these of all pods are in the rules, each behind every frontend.
#[track_caller]
fn leads_to(node: &Namespace, all: &[&Machine], pods: &[&Machine]) {
    let frontends = usize::from(PORTS) * (usize::from(ADDRESSES) + 1);
    wait_for(&format!("{} endpoints", pods.len()), PATIENCE, || {
        let rules = node.nft(&["list", "map", "ip", "nftlet", "endpoints"]);
        let mut all = all.iter();
        all.all(|pod| {
            let wanted = pods.iter().any(|other| other.v4 == pod.v4);
            let found = rules.matches(&format!(": {} . 8080", pod.v4)).count();
            found == if wanted { frontends } else { 0 }
        })
        .then_some(())
    });
}

/// Asks each frontend on new connections until the end, while something else happens. Returns how
/// many requests were lost and repeated.
#[track_caller]
fn asked_while(from: &Namespace, change: impl FnOnce(&AtomicU64)) -> u64 {
    let (stop, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let repeated = from.repeated_requests();
    let failed = thread::scope(|scope| {
        let threads: Vec<_> = asks()
            .into_iter()
            .map(|ask| {
                let (stop, answered) = (&stop, &answered);
                scope.spawn(move || {
                    from.enter();
                    let mut failed = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        match ask.send() {
                            Ok(_) => drop(answered.fetch_add(1, Ordering::Relaxed)),
                            Err(error) => failed.push(format!("{ask:?}: {error}")),
                        }
                        thread::sleep(PACE);
                    }
                    failed
                })
            })
            .collect();
        let end = Stop(&stop);
        change(&answered);
        drop(end);
        let failed = threads.into_iter().map(|thread| thread.join());
        failed
            .flat_map(|it| it.expect("a client ends"))
            .collect::<Vec<_>>()
    });
    assert!(failed.is_empty(), "{} failed: {}", failed.len(), failed[0]);
    from.repeated_requests() - repeated
}

/// Ends the clients also where a wait is in vain.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn more(answered: &AtomicU64, requests: u64) {
    let until = answered.load(Ordering::Relaxed) + requests;
    wait_for("requests to be answered", PATIENCE, || {
        (answered.load(Ordering::Relaxed) >= until).then_some(())
    });
}

#[test]
fn no_request_fails_while_a_service_of_many_elements_changes() {
    if require_net_admin() {
        loses_nothing(changes);
    }
}

/// Scales the service, replaces all its pods, and deletes it. Returns how many requests were lost.
fn changes() -> u64 {
    let lab = Lab::new(LabOptions {
        nodes: 1,
        pods_per_node: 20,
        clients: 1,
    });
    let (pods, node, client) = (lab.pods(), lab.node().ns(), &lab.client().ns);
    let at = |pod: &Machine| SocketAddr::new(pod.v4.into(), 8080);
    let serve = |pod: &&Machine| Server::start(&pod.ns, Protocol::Http, at(pod), &pod.name);
    let _servers: Vec<_> = pods.iter().map(serve).collect();
    let manifests = Manifests::new();
    put_service(&manifests);
    put_slice(&manifests, &pods[..2]);
    let _daemon = manifests.run(node, &CIDR);
    leads_to(node, &pods, &pods[..2]);
    // A connection that lasts stays with its pod, whatever comes of the service.
    let mut kept = client
        .run(|| Ask::http(CLUSTER_IP, 1000).open())
        .expect("a connection");
    kept.ask().expect("an answer");
    let lost = asked_while(client, |answered| {
        for now in [
            &pods[..10],
            &pods[..3],
            &pods[..10],
            &pods[10..],
            &pods[..10],
        ] {
            put_slice(&manifests, now);
            leads_to(node, &pods, now);
            more(answered, 100);
        }
    });
    kept.ask().expect("an answer");
    manifests.remove("Service", "wide");
    leads_to(node, &pods, &[]);
    kept.ask().expect("an answer after the service");
    for ask in asks() {
        let ask = ask.timeout(Duration::from_millis(100));
        client.run(|| ask.send()).expect_err("no service");
    }
    lost
}
