//! From kube-proxy to nftlet and back, under traffic.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::support::kube_proxy::{self, Frontend, Iptables, legacy_iptables};
use crate::support::manifests::{CLUSTER_CIDR, Manifests, Service};
use crate::support::skip::skip;
use nftlet_lab::netns::{
    Answer, Ask, Client, HttpConnection, Lab, LabOptions, Machine, Namespace, Protocol, Server,
    loses_nothing, require_net_admin, wait_for,
};

const CIDR: [&str; 2] = ["--cluster-cidr", CLUSTER_CIDR];
const PODS: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];
const RANGES: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/112"];
const LONG: Duration = nftlet_lab::netns::PATIENCE;
/// Between two requests of a client that goes on asking. Without it all ports of an address are
/// used within seconds, while the server keeps each for a minute after it closed the connection:
/// one that is used again too soon costs a second, with any proxy.
const PACE: Duration = Duration::from_millis(1);

/// How kube-proxy programs the node.
#[derive(Clone, Copy, Debug)]
enum Mode {
    Nftables,
    Iptables(Iptables),
}

impl Mode {
    /// Loads kube-proxy's rules for the frontends, those of IPv4 first.
    fn load(self, node: &Machine, frontends: &[Vec<Frontend>; 2]) {
        for (index, address) in node.addresses().into_iter().enumerate() {
            let (pods, own) = (PODS[index], &frontends[index]);
            match self {
                Mode::Nftables => {
                    let table = kube_proxy::nftables(address, pods, RANGES[index], own);
                    node.ns.nft_load(&table);
                }
                Mode::Iptables(kind) => {
                    let text = kube_proxy::iptables(address, pods, own);
                    kind.load(&node.ns, address.is_ipv6(), &text);
                }
            }
        }
    }

    /// Whether any of kube-proxy's rules are there.
    fn is_loaded(self, node: &Namespace) -> bool {
        match self {
            Mode::Nftables => node.nft(&["list", "tables"]).contains("kube-proxy"),
            Mode::Iptables(kind) => {
                let saved = [false, true].map(|v6| kind.save(node, v6));
                saved.iter().any(|saved| saved.contains("KUBE-"))
            }
        }
    }
}

/// The shop's service: TCP 80 at a ClusterIP of each family and at a NodePort, HTTP at 81.
fn shop() -> Service {
    let mut shop = Service::new("web", 10)
        .port("tcp", "TCP", 80, Some(30080))
        .port("http", "TCP", 81, Some(30081));
    shop.kind = "NodePort".into();
    shop
}

/// What the shop's pods serve, behind the ports 80 and 81.
const TARGETS: [(u16, u16, Protocol); 2] = [(80, 8080, Protocol::Tcp), (81, 8081, Protocol::Http)];

/// A node with the shop behind it: nftlet's manifests and kube-proxy's frontends say the same.
struct Shop {
    lab: Lab,
    manifests: Manifests,
    frontends: [Vec<Frontend>; 2],
    _servers: Vec<Server>,
}

impl Shop {
    fn open() -> Self {
        let lab = Lab::new(LabOptions::default());
        let manifests = Manifests::new();
        let pods = lab.pods();
        let mut frontends = [Vec::new(), Vec::new()];
        let mut servers = Vec::new();
        for (port, target, protocol) in TARGETS {
            for (index, cluster) in ["10.96.0.10", "fd00:10:96::a"].into_iter().enumerate() {
                let endpoints = pods
                    .iter()
                    .map(|pod| SocketAddr::new(pod.addresses()[index], target));
                frontends[index].push(Frontend {
                    name: format!("shop/web:{port}"),
                    cluster: SocketAddr::new(ip(cluster), port),
                    node_port: Some(30000 + port),
                    endpoints: endpoints.collect(),
                });
            }
            servers.extend(pods.iter().flat_map(|pod| pod.serve(protocol, target)));
        }
        let addresses = pods.iter().flat_map(|pod| pod.addresses());
        let addresses: Vec<_> = addresses.map(|ip| (ip.to_string(), true)).collect();
        manifests.service(&shop());
        slices(&manifests, &addresses);
        drop(pods);
        Self {
            lab,
            manifests,
            frontends,
            _servers: servers,
        }
    }

    fn node(&self) -> &Machine {
        &self.lab.node().machine
    }

    /// All clients, with what they ask: from outside, from a pod and from the node, at
    /// ClusterIPs and NodePorts of both families.
    fn asks(&self) -> Vec<(&Machine, Ask)> {
        let mut asks = Vec::new();
        let pods = self.lab.pods();
        let [v4, v6] = ["10.96.0.10", "fd00:10:96::a"].map(ip);
        for from in [self.lab.client(), pods[0], self.node()] {
            asks.push((from, Ask::tcp(v4, 80)));
            asks.push((from, Ask::tcp(v6, 80)));
        }
        for address in self.node().addresses() {
            asks.push((self.lab.client(), Ask::tcp(address, 30080)));
        }
        asks
    }

    /// Opens a connection over HTTP from each of them.
    fn connections(&self) -> Vec<(Client, HttpConnection, Answer)> {
        let opened = self.asks().into_iter().map(|(from, ask)| {
            let client = Client::new(&from.ns);
            let to = ask.to();
            let ask = Ask::http(to.ip(), to.port() + 1);
            let (connection, answer) = client.run(move || {
                let mut connection = ask.open().expect("a connection");
                let answer = connection.ask().expect("an answer");
                (connection, answer)
            });
            (client, connection, answer)
        });
        opened.collect()
    }

    /// Asks each of them often: one of the pods answers at its own address, which is to say that
    /// the request was translated, and only once, and sees who it should.
    fn all_clients_are_answered(&self) {
        for (from, ask) in self.asks() {
            let client = Client::new(&from.ns);
            for _ in 0..12 {
                let answer = client.ask(ask);
                let answer =
                    answer.unwrap_or_else(|error| panic!("{} {ask:?}: {error}", from.name));
                let pods = self.lab.pods();
                let pod = pods
                    .iter()
                    .find(|pod| pod.name == answer.name)
                    .expect("a pod");
                let to = ask.to().ip();
                assert_eq!(answer.local, SocketAddr::new(pod.address_like(to), 8080));
                let seen = answer.seen_client.ip();
                if from.name.starts_with("pod-") && from.name != pod.name {
                    assert_eq!(seen, from.address_like(to), "pods keep their address");
                } else {
                    assert_ne!(seen, self.lab.client().address_like(to), "others do not");
                }
            }
        }
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// The slices of the shop: each port has a target of its own.
fn slices(manifests: &Manifests, addresses: &[(String, bool)]) {
    for (name, target) in [("tcp", 8080), ("http", 8081)] {
        let mut part = shop();
        part.ports.retain(|port, _| port == name);
        let (plain, named) = ("web", format!("web-{name}"));
        let backends: Vec<_> = addresses
            .iter()
            .map(|(address, _)| crate::support::manifests::Backend::new(address, "node-1"))
            .collect();
        part.name = plain.into();
        manifests.backends_named(&part, &named, target, &backends);
    }
}

/// Asks again and again until stopped, and counts.
struct Load {
    /// Who asks, and how many of their connection requests had been repeated before.
    repeated: Vec<(Namespace, u64)>,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(asks: &[(&Machine, Ask)]) -> Self {
        let (stop, answered) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let mut repeated: Vec<(Namespace, u64)> = Vec::new();
        for (from, _) in asks {
            if !repeated.iter().any(|(ns, _)| ns.name() == from.ns.name()) {
                repeated.push((from.ns.clone(), from.ns.repeated_requests()));
            }
        }
        let threads = asks.iter().map(|(from, ask)| {
            let (stop, answered) = (stop.clone(), answered.clone());
            let (ns, name, ask) = (from.ns.clone(), from.name.clone(), *ask);
            thread::spawn(move || {
                ns.enter();
                let mut failed = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    match ask.send() {
                        Ok(_) => {
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(error) => failed.push(format!("{name} to {}: {error}", ask.to())),
                    }
                    thread::sleep(PACE);
                }
                failed
            })
        });
        Self {
            repeated,
            threads: threads.collect(),
            stop,
            answered,
        }
    }

    /// Waits for so many more answers.
    fn more(&self, answers: u64) {
        let until = self.answered.load(Ordering::Relaxed) + answers;
        wait_for("more answers", LONG, || {
            (self.answered.load(Ordering::Relaxed) >= until).then_some(())
        });
    }

    /// Ends, and returns which requests failed, and how many were lost and repeated.
    fn end(self) -> (Vec<String>, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let threads = self.threads.into_iter();
        let failed = threads.flat_map(|thread| thread.join().expect("a client ends"));
        let failed = failed.collect();
        let repeated = self.repeated.iter();
        let lost = repeated.map(|(ns, before)| ns.repeated_requests() - before);
        (failed, lost.sum())
    }
}

#[track_caller]
fn cleanup(node: &Namespace, flag: &str) -> String {
    let output = node
        .command(env!("CARGO_BIN_EXE_nftlet"))
        .arg(flag)
        .output()
        .expect("nftlet runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// There and back again; how many requests were lost.
fn migrate(mode: Mode) -> u64 {
    let shop = Shop::open();
    let node = shop.node().ns.clone();
    mode.load(shop.node(), &shop.frontends);
    shop.all_clients_are_answered();
    let mut connections = shop.connections();
    let load = Load::start(&shop.asks());
    load.more(200);

    let mut daemon = shop.manifests.run(&node, &CIDR);
    wait_for("kube-proxy's rules to go", LONG, || {
        (!mode.is_loaded(&node)).then_some(())
    });
    load.more(500);
    ask_again(&mut connections);
    shop.all_clients_are_answered();

    assert!(daemon.stop(LONG).is_some_and(|status| status.success()));
    mode.load(shop.node(), &shop.frontends);
    load.more(200);
    let list = cleanup(&node, "--cleanup=nftlet");
    assert!(mode.is_loaded(&node), "{list}");
    assert!(!node.nft(&["list", "tables"]).contains("nftlet"), "{list}");
    load.more(500);
    ask_again(&mut connections);
    shop.all_clients_are_answered();
    let (failed, lost) = load.end();
    assert!(
        failed.is_empty(),
        "{} failed: {:#?}",
        failed.len(),
        &failed[..failed.len().min(9)]
    );
    lost
}

/// Connections that exist lead where they always led.
fn ask_again(connections: &mut Vec<(Client, HttpConnection, Answer)>) {
    for (client, mut connection, first) in std::mem::take(connections) {
        let (connection, answer) = client.run(move || {
            let answer = connection.ask();
            (connection, answer)
        });
        assert_eq!(answer.expect("an answer on an old connection"), first);
        connections.push((client, connection, first));
    }
}

#[test]
fn from_nftables_and_back_no_request_fails() {
    if require_net_admin() {
        loses_nothing(|| migrate(Mode::Nftables));
    }
}

#[test]
fn from_iptables_nft_and_back_no_request_fails() {
    if require_net_admin() {
        loses_nothing(|| migrate(Mode::Iptables(Iptables::Nft)));
    }
}

#[test]
fn from_iptables_legacy_and_back_no_request_fails() {
    if !require_net_admin() {
        return;
    }
    if let Err(why) = legacy_iptables(&Namespace::new("probe")) {
        skip("legacy-iptables", &why);
        return;
    }
    loses_nothing(|| migrate(Mode::Iptables(Iptables::Legacy)));
}

/// The chains of both proxies are at the same hooks with the same priorities: the first one to
/// translate a connection decides, and the other one leaves it alone, whichever came first.
#[test]
fn with_the_rules_of_both_in_place_packets_are_translated_once() {
    if !require_net_admin() {
        return;
    }
    let mut modes = vec![Mode::Nftables, Mode::Iptables(Iptables::Nft)];
    match legacy_iptables(&Namespace::new("probe")) {
        Ok(()) => modes.push(Mode::Iptables(Iptables::Legacy)),
        Err(why) => skip("legacy-iptables", &why),
    }
    for mode in modes {
        for kube_proxy_first in [true, false] {
            let shop = Shop::open();
            let node = shop.node().ns.clone();
            if kube_proxy_first {
                mode.load(shop.node(), &shop.frontends);
            }
            shop.manifests.program(&node, &CIDR);
            if !kube_proxy_first {
                mode.load(shop.node(), &shop.frontends);
            }
            shop.all_clients_are_answered();
            let mut connections = shop.connections();
            cleanup(
                &node,
                if kube_proxy_first {
                    "--cleanup=kube-proxy"
                } else {
                    "--cleanup=nftlet"
                },
            );
            ask_again(&mut connections);
            shop.all_clients_are_answered();
        }
    }
}
