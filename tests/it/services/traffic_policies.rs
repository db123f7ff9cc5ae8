//! Traffic policies, topology and source ranges, as packets meet them.
//!
//! pod-1 and pod-2 are on node-1, where nftlet runs; pod-3 and pod-4 are on node-2.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use crate::support::manifests::{Backend, CLUSTER_CIDR, Manifests, Service};
use nftlet_lab::netns::{
    Ask, Client, Lab, LabOptions, Machine, Protocol, Server, require_net_admin,
};
use serde_json::{Value, json};

const CIDR: [&str; 2] = ["--cluster-cidr", CLUSTER_CIDR];
/// How long a request waits for which nothing may come back.
const DROPPED: Duration = Duration::from_millis(300);
const CLUSTER_IPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::a"];
const BALANCER_IPS: [&str; 2] = ["203.0.113.10", "2001:db8:1::10"];
const EXTERNAL_IPS: [&str; 2] = ["198.51.100.7", "2001:db8:2::7"];
const NODE_IPS: [&str; 2] = ["192.168.10.1", "fd00:192:168:10::1"];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A service with every kind of frontend.
fn web() -> Service {
    let mut web = Service::new("web", 10)
        .port("http", "TCP", 80, Some(30080))
        .port("dns", "UDP", 53, Some(30053));
    web.kind = "LoadBalancer".into();
    web.external_ips = EXTERNAL_IPS.map(String::from).into();
    web.load_balancer_ips = BALANCER_IPS.map(String::from).into();
    web
}

fn spec(fields: Value) -> Service {
    web().patch(json!({"spec": fields}))
}

/// TCP and UDP requests to all frontends that outsiders use.
fn external_asks() -> Vec<Ask> {
    let addresses = BALANCER_IPS.into_iter().chain(EXTERNAL_IPS).map(ip);
    addresses
        .flat_map(|address| [Ask::tcp(address, 80), Ask::udp(address, 53)])
        .chain(node_port_asks())
        .collect()
}

fn node_port_asks() -> Vec<Ask> {
    let both = |address| [Ask::tcp(address, 30080), Ask::udp(address, 30053)];
    NODE_IPS.map(ip).into_iter().flat_map(both).collect()
}

fn asks_to(addresses: [&str; 2]) -> Vec<Ask> {
    let both = |address| [Ask::tcp(address, 80), Ask::udp(address, 53)];
    addresses.map(ip).into_iter().flat_map(both).collect()
}

struct Stage {
    lab: Lab,
    manifests: Manifests,
    _servers: Vec<Server>,
}

impl Stage {
    /// Two nodes with two pods each, and two clients; all pods serve.
    fn new() -> Self {
        let lab = Lab::new(LabOptions {
            nodes: 2,
            pods_per_node: 2,
            clients: 2,
        });
        let servers = lab
            .pods()
            .into_iter()
            .flat_map(|pod| {
                [Protocol::Tcp, Protocol::Udp].map(|protocol| pod.serve(protocol, 8080))
            })
            .flatten()
            .collect();
        Self {
            lab,
            manifests: Manifests::new(),
            _servers: servers,
        }
    }

    /// The endpoints of pods, given by their numbers, each changed by a function.
    fn backends(&self, pods: &[usize], change: impl Fn(usize, Backend) -> Backend) -> Vec<Backend> {
        let all = self.lab.pods();
        pods.iter()
            .flat_map(|number| {
                let node = if *number <= 2 { "node-1" } else { "node-2" };
                let addresses = all[*number - 1].addresses();
                addresses.map(|address| change(*number, Backend::new(address, node)))
            })
            .collect()
    }

    fn program(&self, service: &Service, backends: &[Backend]) -> String {
        self.manifests.service(service);
        self.manifests.backends(service, 8080, backends);
        self.manifests.program(self.lab.node().ns(), &CIDR)
    }

    fn program_pods(&self, service: &Service, pods: &[usize]) {
        self.program(service, &self.backends(pods, |_, backend| backend));
    }

    fn pod(&self, number: usize) -> &Machine {
        self.lab.pods()[number - 1]
    }

    fn node(&self) -> &Machine {
        &self.lab.node().machine
    }
}

/// The request from a port that no request had before. The kernel remembers where it sent the
/// datagrams from a port, and would go on sending them there after the rules changed.
fn from_new_port(address: IpAddr, ask: Ask) -> Ask {
    static NEXT: AtomicU16 = AtomicU16::new(10_000);
    ask.source_port(address, NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Asks often enough to meet each of four endpoints; who answered, and which client they saw.
#[track_caller]
fn answers(from: &Machine, ask: Ask) -> Vec<(String, IpAddr)> {
    answers_to(from, from.address_like(ask.to().ip()), ask)
}

#[track_caller]
fn answers_to(from: &Machine, address: IpAddr, ask: Ask) -> Vec<(String, IpAddr)> {
    let client = Client::new(&from.ns);
    let one = |_| {
        let answer = client.ask(from_new_port(address, ask));
        let answer = answer.unwrap_or_else(|error| panic!("{} {ask:?}: {error}", from.name));
        (answer.name, answer.seen_client.ip())
    };
    // Of four endpoints one is missed once in 10^9 times, and this is called often.
    (0..80).map(one).collect()
}

#[track_caller]
fn names(from: &Machine, ask: Ask) -> BTreeSet<String> {
    answers(from, ask)
        .into_iter()
        .map(|(name, _)| name)
        .collect()
}

fn pods(numbers: &[usize]) -> BTreeSet<String> {
    numbers
        .iter()
        .map(|number| format!("pod-{number}"))
        .collect()
}

#[track_caller]
fn error(from: &Machine, ask: Ask) -> ErrorKind {
    let own = from.address_like(ask.to().ip());
    match Client::new(&from.ns).ask(from_new_port(own, ask)) {
        Ok(answer) => panic!("{} {ask:?} is answered: {answer:?}", from.name),
        Err(error) => error.kind(),
    }
}

/// Nothing comes back; on the node itself, `send` returns an error.
#[track_caller]
fn assert_dropped(from: &Machine, ask: Ask) {
    let kind = error(from, ask.timeout(DROPPED));
    let told = from.name.starts_with("node-") && kind == ErrorKind::PermissionDenied;
    assert!(
        kind == ErrorKind::TimedOut || told,
        "{} {ask:?}: {kind}",
        from.name
    );
}

#[track_caller]
fn assert_refused(from: &Machine, ask: Ask) {
    let kind = error(from, ask);
    let told = from.name.starts_with("node-") && kind == ErrorKind::PermissionDenied;
    assert!(
        kind == ErrorKind::ConnectionRefused || told,
        "{} {ask:?}: {kind}",
        from.name
    );
}

fn external_local() -> Service {
    spec(json!({"externalTrafficPolicy": "Local"}))
}

#[test]
fn external_policy_local_keeps_the_client_and_stays_on_the_node() {
    if !require_net_admin() {
        return;
    }
    let stage = Stage::new();
    stage.program_pods(&external_local(), &[1, 2, 3, 4]);
    let client = stage.lab.client();
    for ask in external_asks() {
        let answers = answers(client, ask);
        let who: BTreeSet<String> = answers.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(who, pods(&[1, 2]), "{ask:?}");
        for (name, seen) in answers {
            assert_eq!(seen, client.address_like(seen), "{ask:?} {name}");
        }
    }
    // ClusterIPs have a policy of their own.
    for ask in asks_to(CLUSTER_IPS) {
        assert_eq!(names(client, ask), pods(&[1, 2, 3, 4]));
    }
}

#[test]
fn external_policy_local_lets_pods_and_the_node_use_all_endpoints() {
    if !require_net_admin() {
        return;
    }
    let stage = Stage::new();
    stage.program_pods(&external_local(), &[1, 2, 3, 4]);
    let pod = stage.pod(1);
    for ask in external_asks() {
        let answers = answers(pod, ask);
        let who: BTreeSet<String> = answers.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(who, pods(&[1, 2, 3, 4]), "{ask:?}");
        for (name, seen) in answers {
            // The pod meets itself through the node.
            let itself = name == pod.name;
            assert_eq!(
                seen == pod.address_like(seen),
                !itself,
                "{ask:?} {name} {seen}"
            );
        }
    }
    // Another address of the node distinguishes masqueraded requests. It is not on the link
    // that requests leave by, since masquerading might choose it there.
    let own = ["192.168.10.201", "fd00:192:168:10::201"];
    stage.node().ns.addr_add("lo", &format!("{}/32", own[0]));
    stage.node().ns.addr_add("lo", &format!("{}/128", own[1]));
    for address in BALANCER_IPS.into_iter().chain(EXTERNAL_IPS).map(ip) {
        let from = ip(own[usize::from(address.is_ipv6())]);
        for ask in [Ask::tcp(address, 80), Ask::udp(address, 53)] {
            let answers = answers_to(stage.node(), from, ask);
            let who: BTreeSet<String> = answers.iter().map(|(name, _)| name.clone()).collect();
            assert_eq!(who, pods(&[1, 2, 3, 4]), "{ask:?}");
            assert!(answers.iter().all(|(_, seen)| *seen != from), "{answers:?}");
        }
    }
    for ask in node_port_asks() {
        assert_eq!(names(stage.node(), ask), pods(&[1, 2, 3, 4]), "{ask:?}");
    }
}

#[test]
fn external_policy_local_without_local_endpoints_drops_all_but_the_short_circuits() {
    if !require_net_admin() {
        return;
    }
    let stage = Stage::new();
    stage.program_pods(&external_local(), &[3, 4]);
    for ask in external_asks() {
        assert_dropped(stage.lab.client(), ask);
        for from in [stage.pod(1), stage.node()] {
            let answers = answers(from, ask);
            let who: BTreeSet<String> = answers.iter().map(|(name, _)| name.clone()).collect();
            assert_eq!(who, pods(&[3, 4]), "{} {ask:?}", from.name);
            let kept = answers
                .iter()
                .all(|(_, seen)| *seen == from.address_like(*seen));
            assert!(kept, "{} {ask:?} {answers:?}", from.name);
        }
    }
    for ask in asks_to(CLUSTER_IPS) {
        assert_eq!(names(stage.lab.client(), ask), pods(&[3, 4]));
    }
    // Without any endpoint everyone is refused.
    stage.program_pods(&external_local(), &[]);
    for from in [stage.lab.client(), stage.pod(1), stage.node()] {
        for ask in external_asks() {
            assert_refused(from, ask);
        }
    }
}

#[test]
fn internal_policy_local_stays_on_the_node() {
    if !require_net_admin() {
        return;
    }
    let stage = Stage::new();
    let service = spec(json!({"internalTrafficPolicy": "Local"}));
    stage.program_pods(&service, &[1, 2, 3, 4]);
    for from in [stage.pod(1), stage.node()] {
        for ask in asks_to(CLUSTER_IPS) {
            assert_eq!(names(from, ask), pods(&[1, 2]), "{} {ask:?}", from.name);
        }
    }
    // External addresses have a policy of their own.
    for ask in external_asks() {
        assert_eq!(names(stage.lab.client(), ask), pods(&[1, 2, 3, 4]));
    }
    stage.program_pods(&service, &[3]);
    for from in [stage.pod(1), stage.node()] {
        for ask in asks_to(CLUSTER_IPS) {
            assert_dropped(from, ask);
        }
    }
    stage.program_pods(&service, &[]);
    for from in [stage.pod(1), stage.node()] {
        for ask in asks_to(CLUSTER_IPS) {
            assert_refused(from, ask);
        }
    }
}

#[test]
fn terminating_endpoints_are_the_last_resort_of_each_policy() {
    if !require_net_admin() {
        return;
    }
    let stage = Stage::new();
    let (client, pod) = (stage.lab.client(), stage.pod(1));
    let service = spec(json!({
        "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Cluster",
    }));
    // Locally one terminates; elsewhere one is ready, and one terminates as well.
    let leaving = |number: usize, backend: Backend| {
        if number == 4 {
            backend
        } else {
            backend.terminating()
        }
    };
    stage.program(&service, &stage.backends(&[2, 3, 4], leaving));
    for ask in external_asks() {
        assert_eq!(names(client, ask), pods(&[2]), "{ask:?}");
        assert_eq!(names(pod, ask), pods(&[4]), "{ask:?}");
    }
    for ask in asks_to(CLUSTER_IPS) {
        assert_eq!(names(client, ask), pods(&[4]), "{ask:?}");
    }
    let all_leave = |_, backend: Backend| backend.terminating();
    stage.program(&service, &stage.backends(&[2, 3], all_leave));
    for ask in asks_to(CLUSTER_IPS) {
        assert_eq!(names(client, ask), pods(&[2, 3]), "{ask:?}");
    }
    // What neither is ready nor serves gets nothing.
    let dead = |_, backend: Backend| {
        let conditions = json!({"ready": false, "serving": false, "terminating": true});
        backend.patch(json!({"conditions": conditions}))
    };
    stage.program(&service, &stage.backends(&[2, 3], dead));
    for ask in asks_to(CLUSTER_IPS).into_iter().chain(external_asks()) {
        assert_refused(client, ask);
    }
}

#[test]
fn hints_lead_to_the_zone_and_before_that_to_the_node() {
    if !require_net_admin() {
        return;
    }
    let stage = Stage::new();
    let from = stage.pod(1);
    let zone = |name: &str| json!({"metadata": {"labels": {"topology.kubernetes.io/zone": name}}});
    stage.manifests.node(&zone("a"));
    let zones = |number: usize, backend: Backend| match number {
        2 | 3 => backend.for_zones(&["a"]),
        _ => backend.for_zones(&["b"]),
    };
    stage.program(&web(), &stage.backends(&[1, 2, 3, 4], zones));
    for ask in asks_to(CLUSTER_IPS) {
        assert_eq!(names(from, ask), pods(&[2, 3]), "{ask:?}");
    }
    for ask in external_asks() {
        assert_eq!(names(stage.lab.client(), ask), pods(&[2, 3]), "{ask:?}");
    }
    stage.manifests.node(&zone("b"));
    stage.manifests.program(stage.lab.node().ns(), &CIDR);
    assert_eq!(names(from, Ask::tcp(ip(CLUSTER_IPS[0]), 80)), pods(&[1, 4]));
    // Hints that know nothing of this zone are no reason to have no endpoint.
    stage.manifests.node(&zone("c"));
    stage.manifests.program(stage.lab.node().ns(), &CIDR);
    assert_eq!(
        names(from, Ask::tcp(ip(CLUSTER_IPS[0]), 80)),
        pods(&[1, 2, 3, 4])
    );
    // One endpoint without hints switches them off.
    stage.manifests.node(&zone("a"));
    let partly = |number: usize, backend: Backend| match number {
        4 => backend,
        _ => zones(number, backend),
    };
    stage.program(&web(), &stage.backends(&[1, 2, 3, 4], partly));
    assert_eq!(
        names(from, Ask::tcp(ip(CLUSTER_IPS[0]), 80)),
        pods(&[1, 2, 3, 4])
    );

    let nodes = |number: usize, backend: Backend| {
        let node = if number == 3 { "node-1" } else { "node-2" };
        zones(number, backend).for_nodes(&[node])
    };
    stage.program(&web(), &stage.backends(&[1, 2, 3, 4], nodes));
    for ask in asks_to(CLUSTER_IPS) {
        assert_eq!(names(from, ask), pods(&[3]), "{ask:?}");
    }
    // No endpoint for this node: its zone counts.
    stage.program(&web(), &stage.backends(&[1, 2, 4], nodes));
    assert_eq!(names(from, Ask::tcp(ip(CLUSTER_IPS[0]), 80)), pods(&[2]));
}

#[test]
fn source_ranges_keep_others_off_the_load_balancer_alone() {
    if !require_net_admin() {
        return;
    }
    let stage = Stage::new();
    let [inside, outside] = [&stage.lab.clients[0], &stage.lab.clients[1]];
    let ranges = |ranges: &[&str]| spec(json!({"loadBalancerSourceRanges": ranges}));
    let own = ["192.168.10.100/32", "fd00:192:168:10::100/128"];
    for (given, malformed) in [
        (&[own[0], own[1]][..], false),
        (&[" 192.168.10.100/32 ", "not-a-range", own[1]], true),
    ] {
        stage.manifests.service(&ranges(given));
        let said = stage.program(
            &ranges(given),
            &stage.backends(&[1, 3], |_, backend| backend),
        );
        assert_eq!(
            said.contains("spec.loadBalancerSourceRanges[1]"),
            malformed,
            "{said}"
        );
        for ask in asks_to(BALANCER_IPS) {
            assert_eq!(names(inside, ask), pods(&[1, 3]));
            assert_dropped(outside, ask);
            // Neither pods nor the node are in the ranges.
            assert_dropped(stage.pod(2), ask);
        }
        let others = asks_to(CLUSTER_IPS)
            .into_iter()
            .chain(asks_to(EXTERNAL_IPS));
        for ask in others.chain(node_port_asks()) {
            assert_eq!(names(outside, ask), pods(&[1, 3]), "{ask:?}");
        }
    }
    // Whether an outsider gets in over IPv4 and IPv6.
    for (given, gets_in) in [
        (&["0.0.0.0/0", "10.0.0.0/8"][..], [true, true]),
        (&["::/0"], [true, true]),
        (&["10.0.0.0/8", "::/0"], [false, true]),
        (&["0.0.0.0/0", "fd99::/16"], [true, false]),
        (&["10.0.0.0/8"], [false, false]),
    ] {
        stage.program_pods(&ranges(given), &[1]);
        for ask in asks_to(BALANCER_IPS) {
            if gets_in[usize::from(ask.to().is_ipv6())] {
                assert_eq!(names(outside, ask), pods(&[1]), "{given:?} {ask:?}");
            } else {
                assert_dropped(outside, ask);
            }
        }
    }
}

#[test]
fn source_ranges_and_policy_local_go_together() {
    if !require_net_admin() {
        return;
    }
    let stage = Stage::new();
    let [inside, outside] = [&stage.lab.clients[0], &stage.lab.clients[1]];
    let service = spec(json!({
        "externalTrafficPolicy": "Local",
        "loadBalancerSourceRanges": ["192.168.10.100/32", "fd00:192:168:10::100/128"],
    }));
    stage.program_pods(&service, &[1, 3]);
    for ask in asks_to(BALANCER_IPS) {
        for (name, seen) in answers(inside, ask) {
            assert_eq!((name.as_str(), seen), ("pod-1", inside.address_like(seen)));
        }
        assert_dropped(outside, ask);
    }
    stage.program_pods(&service, &[3]);
    for ask in asks_to(BALANCER_IPS) {
        assert_dropped(inside, ask);
        assert_dropped(outside, ask);
    }
}

#[test]
fn every_ingress_address_leads_here_except_those_of_mode_proxy() {
    if !require_net_admin() {
        return;
    }
    let stage = Stage::new();
    let client = stage.lab.client();
    let ingress = |entries: Value| json!({"status": {"loadBalancer": {"ingress": entries}}});
    let service = web().patch(ingress(json!([
        {"ip": "203.0.113.10"},
        {"ip": "203.0.113.11", "ipMode": "VIP"},
        {"ip": "2001:db8:1::11", "ipMode": "VIP"},
        {"ip": "203.0.113.12", "ipMode": "Proxy"},
        {"ip": "2001:db8:1::12", "ipMode": "Proxy"},
        {"hostname": "lb.example.com"},
    ])));
    stage.program_pods(&service, &[1, 3]);
    for address in ["203.0.113.10", "203.0.113.11", "2001:db8:1::11"].map(ip) {
        for ask in [Ask::tcp(address, 80), Ask::udp(address, 53)] {
            assert_eq!(names(client, ask), pods(&[1, 3]), "{ask:?}");
        }
    }
    for address in ["203.0.113.12", "2001:db8:1::12"].map(ip) {
        for from in [client, stage.pod(1), stage.node()] {
            error(from, Ask::tcp(address, 80).timeout(DROPPED));
        }
    }
}
