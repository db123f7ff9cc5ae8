//! Each `--detect-local-mode` distinguishes the traffic of pods from other traffic.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::process::Stdio;
use std::time::Duration;

use crate::support::manifests::{Backend, CLUSTER_CIDR, Manifests, Service};
use nftlet_lab::netns::{
    Ask, Client, Lab, LabOptions, Machine, Namespace, PATIENCE, Protocol, Server,
    require_net_admin, wait_for,
};
use serde_json::json;

const CLUSTER_IPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::a"];
const BALANCER_IPS: [&str; 2] = ["203.0.113.10", "2001:db8:1::10"];

const BY_CLUSTER: [&str; 4] = [
    "--detect-local-mode",
    "ClusterCIDR",
    "--cluster-cidr",
    CLUSTER_CIDR,
];
const BY_NODE: [&str; 2] = ["--detect-local-mode", "NodeCIDR"];
const BY_PREFIX: [&str; 4] = [
    "--detect-local-mode",
    "InterfaceNamePrefix",
    "--pod-interface-name-prefix",
    "veth",
];
const BY_BRIDGE: [&str; 4] = [
    "--detect-local-mode",
    "BridgeInterface",
    "--pod-bridge-interface",
    "cni0",
];

/// A service that keeps external traffic on its node.
fn web() -> Service {
    let mut web = Service::new("web", 10)
        .port("http", "TCP", 80, None)
        .port("dns", "UDP", 53, None)
        .patch(json!({"spec": {"externalTrafficPolicy": "Local"}}));
    web.kind = "LoadBalancer".into();
    web.load_balancer_ips = BALANCER_IPS.map(String::from).into();
    web
}

fn asks(addresses: [&str; 2]) -> Vec<Ask> {
    let both = |address: &str| {
        let address: IpAddr = address.parse().unwrap();
        [Ask::tcp(address, 80), Ask::udp(address, 53)]
    };
    addresses.into_iter().flat_map(both).collect()
}

fn serve(pods: &[Machine]) -> Vec<Server> {
    let both =
        |pod: &Machine| [Protocol::Tcp, Protocol::Udp].map(|protocol| pod.serve(protocol, 8080));
    pods.iter().flat_map(both).flatten().collect()
}

fn backends(pods: &[&Machine], node: &str) -> Vec<Backend> {
    let addresses = pods.iter().flat_map(|pod| pod.addresses());
    addresses
        .map(|address| Backend::new(address, node))
        .collect()
}

/// Whether the server saw the client's own address.
#[track_caller]
fn keeps_address(from: &Machine, ask: Ask) -> bool {
    let answer = Client::new(&from.ns).ask(ask);
    let answer = answer.unwrap_or_else(|error| panic!("{} {ask:?}: {error}", from.name));
    let seen = answer.seen_client.ip();
    seen == from.address_like(seen)
}

/// Pods keep their address on the way to another pod, everyone else is masqueraded.
#[track_caller]
fn assert_recognises_pods(pod: &Machine, others: &[&Machine]) {
    for ask in asks(CLUSTER_IPS) {
        assert!(keeps_address(pod, ask), "{ask:?}");
        for other in others {
            assert!(!keeps_address(other, ask), "{} {ask:?}", other.name);
        }
    }
}

/// How long a request waits for which nothing may come back.
const DROPPED: Duration = Duration::from_millis(300);

/// Under external policy Local, pods of the node reach endpoints elsewhere and others do not.
#[track_caller]
fn assert_short_circuits(pod: &Machine, client: &Machine) {
    for ask in asks(BALANCER_IPS) {
        assert!(keeps_address(pod, ask), "{ask:?}");
        let answer = Client::new(&client.ns).ask(ask.timeout(DROPPED));
        let error = answer.expect_err("it is dropped");
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{ask:?}");
    }
}

fn lab() -> Lab {
    Lab::new(LabOptions {
        nodes: 2,
        pods_per_node: 2,
        clients: 1,
    })
}

/// Programs endpoints on this node, then endpoints on the other one, and looks what pods of this
/// node and others meet.
#[track_caller]
fn assert_mode(lab: &Lab, pods: &[Machine], mode: &[&str]) {
    let _servers = [serve(pods), serve(&lab.nodes[1].pods)];
    let manifests = Manifests::new();
    manifests.service(&web());
    manifests.backends(&web(), 8080, &backends(&[&pods[1]], "node-1"));
    manifests.program(lab.node().ns(), mode);
    assert_recognises_pods(&pods[0], &[lab.client()]);
    let remote: Vec<&Machine> = lab.nodes[1].pods.iter().collect();
    manifests.backends(&web(), 8080, &backends(&remote, "node-2"));
    manifests.program(lab.node().ns(), mode);
    assert_recognises_pods(&pods[0], &[lab.client()]);
    assert_short_circuits(&pods[0], lab.client());
}

#[test]
fn by_the_range_of_the_cluster() {
    if !require_net_admin() {
        return;
    }
    let lab = lab();
    assert_mode(&lab, &lab.node().pods, &BY_CLUSTER);
}

#[test]
fn by_the_ranges_of_the_node() {
    if !require_net_admin() {
        return;
    }
    let lab = lab();
    assert_mode(&lab, &lab.node().pods, &BY_NODE);
}

#[test]
fn by_the_names_of_interfaces() {
    if !require_net_admin() {
        return;
    }
    let lab = lab();
    assert_mode(&lab, &lab.node().pods, &BY_PREFIX);
    // The prefix is one: veth2 is not of this node's pods here, veth1 is.
    let manifests = Manifests::new();
    manifests.service(&web());
    manifests.backends(&web(), 8080, &backends(&[&lab.nodes[1].pods[0]], "node-2"));
    let mut mode = BY_PREFIX;
    mode[3] = "veth1";
    manifests.program(lab.node().ns(), &mode);
    let _servers = serve(&lab.nodes[1].pods);
    assert_recognises_pods(&lab.node().pods[0], &[&lab.node().pods[1], lab.client()]);
}

/// Pods behind a bridge of the node. They have no route to each other but through the node, so
/// that answers pass the node as well, whether or not bridges call netfilter.
fn bridged_pods(node: &Namespace) -> Vec<Machine> {
    let gateways = ["10.244.1.1", "fd00:10:244:1::1"];
    node.sysctls(&[
        ("net.ipv4.conf.all.send_redirects", "0"),
        ("net.ipv4.conf.default.send_redirects", "0"),
    ]);
    node.ip_batch([
        "link add cni0 type bridge stp_state 0 mcast_snooping 0 forward_delay 0",
        "link set cni0 up",
        "addr add 10.244.1.1/24 dev cni0",
        "addr add fd00:10:244:1::1/64 dev cni0 nodad",
    ]);
    let pod = |host: u8| {
        let machine = Machine {
            name: format!("pod-{host}"),
            ns: Namespace::new(&format!("pod-{host}")),
            v4: [10, 244, 1, host].into(),
            v6: format!("fd00:10:244:1::{host}").parse().unwrap(),
        };
        let link = format!("tap{host}");
        node.veth(&link, &machine.ns, "eth0");
        node.ip(&format!("link set {link} master cni0"));
        machine
            .ns
            .sysctl("net.ipv6.conf.eth0.accept_redirects", "0");
        for (address, gateway) in machine.addresses().into_iter().zip(gateways) {
            let bits = if address.is_ipv4() { 32 } else { 128 };
            machine.ns.addr_add("eth0", &format!("{address}/{bits}"));
            machine
                .ns
                .route_add(&format!("{gateway}/{bits}"), "dev eth0");
            machine
                .ns
                .route_add("default", &format!("via {gateway} dev eth0"));
        }
        machine
    };
    [11, 12].map(pod).into()
}

#[test]
fn by_the_bridge() {
    if !require_net_admin() {
        return;
    }
    let lab = Lab::new(LabOptions {
        nodes: 2,
        pods_per_node: 0,
        clients: 1,
    });
    let pods = bridged_pods(lab.node().ns());
    let mut lab = lab;
    lab.add_pod(1);
    lab.add_pod(1);
    assert_mode(&lab, &pods, &BY_BRIDGE);
}

#[test]
fn without_a_range_of_a_family_its_pods_are_not_recognised() {
    if !require_net_admin() {
        return;
    }
    let lab = lab();
    let _servers = serve(&lab.node().pods);
    let manifests = Manifests::new();
    manifests.service(&web());
    manifests.backends(&web(), 8080, &backends(&[&lab.node().pods[1]], "node-1"));
    manifests.program(lab.node().ns(), &["--cluster-cidr", "10.244.0.0/16"]);
    for ask in asks(CLUSTER_IPS) {
        let v6 = ask.to().is_ipv6();
        assert_eq!(keeps_address(lab.client(), ask), v6, "{ask:?}");
    }
}

/// The rules are followed by the ranges of the node wherever they come from or go to.
#[test]
fn the_ranges_of_the_node_may_come_later_and_change() {
    if !require_net_admin() {
        return;
    }
    let lab = lab();
    let _servers = serve(&lab.node().pods);
    let manifests = Manifests::new();
    let [pod, server] = [&lab.node().pods[0], &lab.node().pods[1]];
    let stranger = &lab.nodes[1].pods[0];
    // Pods elsewhere find this node on the way to services.
    for (range, gateway) in [
        ("10.96.0.0/16", "192.168.10.1"),
        ("fd00:10:96::/112", "fd00:192:168:10::1"),
    ] {
        lab.nodes[1]
            .ns()
            .route_add(range, &format!("via {gateway}"));
    }
    manifests.node(&json!({"spec": {"podCIDRs": null}}));
    manifests.service(&web());
    manifests.backends(&web(), 8080, &backends(&[server], "node-1"));
    let daemon = manifests.run(lab.node().ns(), &BY_NODE);
    let kept = |from: &Machine| -> Vec<bool> {
        let asks = asks(CLUSTER_IPS).into_iter();
        asks.map(|ask| keeps_address(from, ask)).collect()
    };
    for from in [pod, stranger, lab.client()] {
        assert!(kept(from).iter().all(|kept| *kept), "{}", from.name);
    }
    let ranges = |ranges: &[&str]| json!({"spec": {"podCIDRs": ranges}});
    let reaches = |what: &str, wanted: [bool; 3]| {
        let from = [pod, stranger, lab.client()];
        wait_for(what, PATIENCE, || {
            let seen = from.iter().zip(wanted);
            let mut all = seen.map(|(from, wanted)| kept(from).iter().all(|kept| *kept == wanted));
            all.all(|fits| fits).then_some(())
        });
    };
    manifests.node(&ranges(&["10.244.1.0/24", "fd00:10:244:1::/64"]));
    reaches("the ranges of the node", [true, false, false]);
    manifests.node(&ranges(&["10.244.2.0/24", "fd00:10:244:2::/64"]));
    reaches("other ranges", [false, true, false]);
    manifests.node(&json!({"spec": {"podCIDRs": null}}));
    reaches("no ranges", [true, true, true]);
    drop(daemon);
}

#[test]
fn what_a_mode_needs_is_asked_for_in_one_line() {
    if !require_net_admin() {
        return;
    }
    let manifests = Manifests::new();
    for (mode, wanted) in [
        (&BY_BRIDGE[..2], "--pod-bridge-interface"),
        (&BY_PREFIX[..2], "--pod-interface-name-prefix"),
        (
            &["--detect-local-mode", "Guess"],
            "ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix",
        ),
    ] {
        let output = Namespace::new("bare")
            .command(env!("CARGO_BIN_EXE_nftlet"))
            .args(manifests.arguments(mode))
            .stdout(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success());
        let first = said.lines().next().unwrap_or_default();
        assert!(first.contains(wanted), "{said}");
    }
}
