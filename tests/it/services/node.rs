//! What nftlet takes from its node, and what it sets there.

use std::time::Duration;

use crate::support::manifests::{CLUSTER_CIDR, Manifests};
use crate::support::objects::{self, cidr, slice_of, with};
use nftlet_lab::netns::{
    Ask, Client, Lab, LabOptions, Namespace, Protocol, require_net_admin, wait_for,
};
use serde_json::{Value, json};

const CIDR: [&str; 2] = ["--cluster-cidr", CLUSTER_CIDR];
const LONG: Duration = nftlet_lab::netns::PATIENCE;

fn listed(node: &Namespace, kind: &str, name: &str) -> String {
    node.nft(&["list", kind, "ip", "nftlet", name])
}

/// Waits until a set or map mentions all of `has` and none of `lacks`.
#[track_caller]
fn wait_for_elements(node: &Namespace, (kind, name): (&str, &str), has: &[&str], lacks: &[&str]) {
    wait_for(&format!("{name} with {has:?}"), LONG, || {
        let text = listed(node, kind, name);
        let right = has.iter().all(|part| text.contains(part))
            && !lacks.iter().any(|part| text.contains(part));
        right.then_some(())
    });
}

fn service(policy: &str) -> Value {
    with(
        objects::service("web", "10.96.0.10"),
        json!({"spec": {
            "type": "NodePort", "externalTrafficPolicy": policy,
            "ports": [{"port": 80, "nodePort": 30080}],
        }}),
    )
}

fn slice(endpoints: &Value) -> Value {
    with(
        slice_of("web-1", "web", endpoints.clone()),
        json!({"ports": [{"port": 8080}]}),
    )
}

#[test]
fn service_ranges_are_followed_at_once() {
    if !require_net_admin() {
        return;
    }
    let (manifests, node) = (Manifests::new(), Namespace::new("node"));
    let _daemon = manifests.run(&node, &CIDR);
    let ranges = ("set", "service-cidrs");
    wait_for_elements(&node, ranges, &["10.96.0.0/16"], &["10.97"]);
    manifests.put(&cidr("more", "10.97.0.0/24"));
    wait_for_elements(&node, ranges, &["10.96.0.0-10.97.0.255"], &[]);
    manifests.remove("ServiceCIDR", "more");
    wait_for_elements(&node, ranges, &["10.96.0.0/16"], &["10.97"]);
}

#[test]
fn the_zone_of_the_node_is_followed_at_once() {
    if !require_net_admin() {
        return;
    }
    let (manifests, node) = (Manifests::new(), Namespace::new("node"));
    let hinted = |address: &str, zone: &str| {
        json!({
            "addresses": [address], "nodeName": "node-2",
            "hints": {"forZones": [{"name": zone}]},
        })
    };
    manifests.put(&service("Cluster"));
    manifests.put(&slice(&json!([
        hinted("10.244.2.1", "a"),
        hinted("10.244.2.2", "b")
    ])));
    let in_zone = |zone: &str| {
        let addresses = json!([{"type": "InternalIP", "address": "192.168.10.1"}]);
        manifests.put(&with(
            objects::node("node-1", zone),
            json!({"status": {"addresses": addresses}}),
        ));
    };
    in_zone("a");
    let _daemon = manifests.run(&node, &CIDR);
    let endpoints = ("map", "endpoints");
    wait_for_elements(&node, endpoints, &["10.244.2.1"], &["10.244.2.2"]);
    in_zone("b");
    wait_for_elements(&node, endpoints, &["10.244.2.2"], &["10.244.2.1"]);
    in_zone("unheard-of");
    wait_for_elements(&node, endpoints, &["10.244.2.1", "10.244.2.2"], &[]);
}

#[test]
fn without_its_object_the_node_is_known_by_name_and_by_the_addresses_of_the_host() {
    if !require_net_admin() {
        return;
    }
    let lab = Lab::new(LabOptions::default());
    let (node, pod) = (lab.node().ns(), lab.pods()[0]);
    let manifests = Manifests::new();
    manifests.remove("Node", "node-1");
    manifests.put(&service("Local"));
    let here = json!([
        {"addresses": [pod.v4], "nodeName": "node-1"},
        {"addresses": ["10.244.2.1"], "nodeName": "node-2"},
    ]);
    manifests.put(&slice(&here));
    let said = manifests.program(node, &CIDR);
    assert!(said.contains("the manifests hold no such Node"), "{said}");
    let _server = pod.serve(Protocol::Tcp, 8080);
    let client = Client::new(&lab.client().ns);
    // The first address of the host is that of a pod's link or of the fabric, as the kernel
    // lists them; ranges reach them all.
    let all = ["--nodeport-addresses", "192.168.10.0/24", CIDR[0], CIDR[1]];
    manifests.program(node, &all);
    for _ in 0..20 {
        let answer = client.ask(Ask::tcp(lab.node().machine.v4, 30080)).unwrap();
        assert_eq!(answer.name, pod.name);
        assert_eq!(answer.seen_client.ip(), lab.client().v4);
    }
    let primary = listed(node, "set", "nodeport-addresses");
    assert!(primary.contains("192.168.10.0/24"), "{primary}");
}

#[test]
fn the_bind_address_comes_before_the_object() {
    if !require_net_admin() {
        return;
    }
    let (manifests, node) = (Manifests::new(), Namespace::new("node"));
    manifests.program(&node, &["--bind-address", "192.0.2.9"]);
    let addresses = ("set", "nodeport-addresses");
    wait_for_elements(&node, addresses, &["192.0.2.9"], &["192.168.10.1"]);
    let six = node.nft(&["list", "set", "ip6", "nftlet", "nodeport-addresses"]);
    assert!(six.contains("fd00:192:168:10::1"), "{six}");
    manifests.program(&node, &["--bind-address", "0.0.0.0"]);
    wait_for_elements(&node, addresses, &["192.168.10.1"], &["192.0.2.9"]);
}

#[test]
fn kernel_settings_are_those_of_kube_proxy_or_what_is_asked_for() {
    if !require_net_admin() {
        return;
    }
    let (manifests, node) = (Manifests::new(), Namespace::new("node"));
    let read = |name: &str| {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
        let output = node.command("cat").arg(&path).output().expect("cat runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let zeros = [
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=0",
    ];
    manifests.program(&node, &zeros);
    assert_eq!(read("tcp_timeout_established"), "432000", "the kernel's");
    assert_eq!(read("tcp_timeout_close_wait"), "60", "the kernel's");
    let untouched = ["udp_timeout", "udp_timeout_stream", "tcp_be_liberal"].map(read);
    let said = manifests.program(&node, &[]);
    assert!(
        !said.contains("WARN"),
        "a default that cannot be set: {said}"
    );
    assert_eq!(read("tcp_timeout_established"), "86400");
    assert_eq!(read("tcp_timeout_close_wait"), "3600");
    let now = ["udp_timeout", "udp_timeout_stream", "tcp_be_liberal"].map(read);
    assert_eq!(now, untouched, "without a default");
    let asked = [
        "--conntrack-udp-timeout",
        "77s",
        "--conntrack-udp-timeout-stream",
        "2m1s",
        "--conntrack-tcp-timeout-established",
        "2h0m0s",
    ];
    manifests.program(&node, &asked);
    assert_eq!(read("udp_timeout"), "77");
    assert_eq!(read("udp_timeout_stream"), "121");
    assert_eq!(read("tcp_timeout_established"), "7200");
    manifests.program(&node, &["--conntrack-tcp-be-liberal"]);
    assert_eq!(read("tcp_be_liberal"), "1");
    // Only the host may change the size of the table; the rules stand all the same.
    let said = manifests.program(&node, &["--conntrack-max-per-core", "1"]);
    assert!(
        said.contains("WARN kernel settings: cannot set /proc/sys/net/netfilter/nf_conntrack_max"),
        "{said}"
    );
    assert!(listed(&node, "set", "service-cidrs").contains("10.96.0.0/16"));
}
