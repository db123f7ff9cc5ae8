//! Packets to service addresses that nftlet has no frontend for: those of other proxies arrive,
//! all others are refused or dropped on the node, whatever translated them before.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::support::manifests::{Backend, CLUSTER_CIDR, Manifests, Service};
use nftlet_lab::netns::{
    Ask, Client, Lab, LabOptions, Machine, Namespace, Protocol, Server, require_net_admin,
};
use serde_json::json;

const CIDR: [&str; 2] = ["--cluster-cidr", CLUSTER_CIDR];
/// How long a request waits for which nothing may come back.
const DROPPED: Duration = Duration::from_millis(500);
/// The ClusterIPs of another proxy's service.
const THEIRS: [&str; 2] = ["10.96.9.2", "fd00:10:96::92"];

fn lab() -> Lab {
    Lab::new(LabOptions {
        nodes: 2,
        ..LabOptions::default()
    })
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Everyone who may ask: a pod, the node, and a client outside.
fn askers(lab: &Lab) -> [&Machine; 3] {
    [&lab.node().pods[0], &lab.node().machine, lab.client()]
}

#[track_caller]
fn outcome(from: &Machine, ask: Ask) -> Result<String, ErrorKind> {
    let answer = Client::new(&from.ns).ask(ask);
    answer
        .map(|answer| answer.name)
        .map_err(|error| error.kind())
}

/// Checks that a request is refused at once. A process on the node itself learns of a rejected
/// datagram from `send`, as "operation not permitted".
#[track_caller]
fn assert_refused(from: &Machine, ask: Ask) {
    let kind = outcome(from, ask).expect_err("no answer is allowed");
    let on_node = from.name.starts_with("node-") && kind == ErrorKind::PermissionDenied;
    assert!(
        kind == ErrorKind::ConnectionRefused || on_node,
        "{} {ask:?}: {kind}",
        from.name
    );
}

/// The rules of another proxy, at a priority of its nat chains.
fn other_proxy(lab: &Lab, priority: i32) -> String {
    let pod = &lab.nodes[1].pods[0];
    let table = |family: &str, at: &str, to: String| {
        let dnat = format!("{family} daddr {at} tcp dport 80 dnat to {to};");
        format!(
            "table {family} other {{
                chain pre {{ type nat hook prerouting priority {priority}; {dnat} }}
                chain out {{ type nat hook output priority {priority}; {dnat} }}
                chain post {{
                    type nat hook postrouting priority 100;
                    ct status dnat masquerade;
                }}
            }}\n"
        )
    };
    table("ip", THEIRS[0], format!("{}:8080", pod.v4))
        + &table("ip6", THEIRS[1], format!("[{}]:8080", pod.v6))
}

#[test]
fn services_of_another_proxy_work_whatever_its_priority() {
    if !require_net_admin() {
        return;
    }
    let lab = lab();
    let node = lab.node().ns();
    let _servers = lab.nodes[1].pods[0].serve(Protocol::Tcp, 8080);
    let mut theirs = Service::new("theirs", 2).port("http", "TCP", 80, None);
    theirs.cluster_ips = THEIRS.map(str::to_owned).into();
    let label =
        json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "other"}}});
    let manifests = Manifests::new();
    manifests.service(&theirs.patch(label));
    let name = lab.nodes[1].pods[0].name.clone();
    // A chain of the same priority comes before those that were there: both orders are tried.
    for (priority, first) in [
        (-101, true),
        (-100, true),
        (-100, false),
        (-99, false),
        (-2, false),
    ] {
        node.nft(&["flush", "ruleset"]);
        if first {
            node.nft_load(&other_proxy(&lab, priority));
        }
        manifests.program(node, &CIDR);
        if !first {
            node.nft_load(&other_proxy(&lab, priority));
        }
        for from in askers(&lab) {
            for address in THEIRS {
                let answered = outcome(from, Ask::tcp(ip(address), 80));
                let what = format!("{} {address} at {priority}, first: {first}", from.name);
                assert_eq!(answered, Ok(name.clone()), "{what}");
            }
        }
    }
    // What neither of the two has is dropped.
    for from in askers(&lab) {
        for address in THEIRS {
            let asked = outcome(from, Ask::tcp(ip(address), 81).timeout(DROPPED));
            assert_eq!(asked, Err(ErrorKind::TimedOut), "{} {address}", from.name);
        }
    }
}

#[test]
fn an_endpoint_that_is_a_service_address_is_refused_on_the_node() {
    if !require_net_admin() {
        return;
    }
    let lab = lab();
    let node = lab.node().ns();
    // The default route of the node leads there: nothing may arrive.
    let stray: Vec<Server> = [
        "10.96.0.35",
        "fd00:10:96::23",
        "10.96.0.99",
        "fd00:10:96::63",
    ]
    .into_iter()
    .flat_map(|address| {
        let length = if address.contains(':') { 128 } else { 32 };
        lab.client()
            .ns
            .addr_add("lo", &format!("{address}/{length}"));
        [Protocol::Tcp, Protocol::Udp].map(|protocol| {
            let at = SocketAddr::new(ip(address), 80);
            Server::start(&lab.client().ns, protocol, at, "stray")
        })
    })
    .collect();
    let manifests = Manifests::new();
    let service = |name: &str, last| {
        let service = Service::new(name, last).port("http", "TCP", 80, None);
        service.port("dns", "UDP", 80, None)
    };
    let target = service("target", 35);
    manifests.service(&target);
    let pods = lab.nodes[1].pods[0]
        .addresses()
        .map(|pod| Backend::new(pod, "node-2"));
    manifests.backends(&target, 8080, &pods);
    let endpoints = |last: u8| {
        [format!("10.96.0.{last}"), format!("fd00:10:96::{last:x}")]
            .map(|address| Backend::new(address, "node-1"))
    };
    // Another service's ClusterIP, its own, and one that no service has.
    for (name, last, endpoint) in [("alias", 34, 35), ("circle", 36, 36), ("free", 37, 99)] {
        let alias = service(name, last);
        manifests.service(&alias);
        manifests.backends(&alias, 80, &endpoints(endpoint));
    }
    manifests.program(node, &CIDR);
    let pod = &lab.node().pods[0];
    for from in [pod, &lab.node().machine] {
        for last in [34, 36] {
            for address in [format!("10.96.0.{last}"), format!("fd00:10:96::{last:x}")] {
                assert_refused(from, Ask::tcp(ip(&address), 80));
                assert_refused(from, Ask::udp(ip(&address), 80));
            }
        }
        for address in ["10.96.0.37", "fd00:10:96::25"] {
            for ask in [Ask::tcp(ip(address), 80), Ask::udp(ip(address), 80)] {
                let kind = outcome(from, ask.timeout(DROPPED)).expect_err("no answer is allowed");
                let expected = [ErrorKind::TimedOut, ErrorKind::PermissionDenied];
                assert!(expected.contains(&kind), "{} {address}: {kind}", from.name);
            }
        }
    }
    let served: u64 = stray.iter().map(Server::served).sum();
    assert_eq!(served, 0, "packets left the node");
}

#[test]
fn a_cache_on_the_node_answers_untracked_at_a_cluster_ip() {
    if !require_net_admin() {
        return;
    }
    let lab = lab();
    let node = lab.node().ns();
    let manifests = Manifests::new();
    let dns = Service::new("dns", 10)
        .port("dns", "UDP", 53, None)
        .port("tcp", "TCP", 53, None);
    manifests.service(&dns);
    let pods = lab.nodes[1].pods[0]
        .addresses()
        .map(|pod| Backend::new(pod, "node-2"));
    manifests.backends(&dns, 8053, &pods);
    manifests.program(node, &CIDR);
    // As NodeLocal DNSCache sets itself up: the address on an interface, and no tracking.
    let mut caches = Vec::new();
    for (family, address) in [("ip", "10.96.0.10"), ("ip6", "fd00:10:96::a")] {
        let length = if family == "ip" { 32 } else { 128 };
        node.addr_add("lo", &format!("{address}/{length}"));
        node.nft_load(&format!(
            "table {family} cache {{
                chain pre {{
                    type filter hook prerouting priority -300;
                    {family} daddr {address} th dport 53 notrack;
                }}
                chain out {{
                    type filter hook output priority -300;
                    {family} daddr {address} th dport 53 notrack;
                    {family} saddr {address} th sport 53 notrack;
                }}
            }}"
        ));
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let at = SocketAddr::new(ip(address), 53);
            caches.push(Server::start(node, protocol, at, "cache"));
        }
    }
    for from in [&lab.node().pods[0], &lab.node().machine] {
        for address in ["10.96.0.10", "fd00:10:96::a"].map(ip) {
            for ask in [Ask::tcp(address, 53), Ask::udp(address, 53)] {
                assert_eq!(
                    outcome(from, ask),
                    Ok("cache".into()),
                    "{} {ask:?}",
                    from.name
                );
            }
        }
    }
}

#[test]
fn what_has_no_route_is_unreachable() {
    if !require_net_admin() {
        return;
    }
    let lab = lab();
    let node: &Namespace = lab.node().ns();
    let manifests = Manifests::new();
    manifests.service(&Service::new("web", 10).port("http", "TCP", 80, None));
    manifests.program(node, &CIDR);
    for family in ["0.0.0.0/0", "::/0"] {
        node.ip(&format!("route del {family}"));
    }
    for from in [&lab.node().pods[0], &lab.node().machine] {
        // Neither a free address nor an unknown port is looked at: there is no way to send it.
        for (address, port) in [
            ("10.96.0.99", 80),
            ("10.96.0.10", 81),
            ("fd00:10:96::a", 81),
        ] {
            let kind = outcome(from, Ask::tcp(ip(address), port)).expect_err("no route");
            let unreachable = [ErrorKind::NetworkUnreachable, ErrorKind::HostUnreachable];
            assert!(
                unreachable.contains(&kind),
                "{} {address}: {kind}",
                from.name
            );
        }
    }
}

#[test]
fn a_cluster_ip_on_an_interface_of_the_node_has_the_ports_of_its_service() {
    if !require_net_admin() {
        return;
    }
    let lab = lab();
    let node = lab.node().ns();
    let manifests = Manifests::new();
    let web = Service::new("web", 10).port("http", "TCP", 80, None);
    manifests.service(&web);
    let pods = lab.nodes[1].pods[0].addresses();
    let pods = pods.map(|pod| Backend::new(pod, "node-2"));
    manifests.backends(&web, 8080, &pods);
    let _server = lab.nodes[1].pods[0].serve(Protocol::Tcp, 8080);
    manifests.program(node, &CIDR);
    // As kube-proxy leaves them in IPVS mode, with a process that listens on all addresses.
    for address in ["10.96.0.10/32", "fd00:10:96::a/128"] {
        node.addr_add("lo", address);
    }
    let everywhere: Vec<Server> = ["0.0.0.0", "::"]
        .into_iter()
        .flat_map(|address| {
            [Protocol::Tcp, Protocol::Udp].map(|protocol| {
                Server::start(node, protocol, SocketAddr::new(ip(address), 22), "node")
            })
        })
        .collect();
    let name = &lab.nodes[1].pods[0].name;
    for from in [&lab.node().pods[0], &lab.node().machine] {
        for address in ["10.96.0.10", "fd00:10:96::a"].map(ip) {
            assert_eq!(
                outcome(from, Ask::tcp(address, 80)).as_ref(),
                Ok(name),
                "{}",
                from.name
            );
            assert_refused(from, Ask::tcp(address, 22));
            assert_refused(from, Ask::udp(address, 22));
        }
    }
    let served: u64 = everywhere.iter().map(Server::served).sum();
    assert_eq!(served, 0, "the node's own process was reached");
}

#[test]
fn what_others_translate_is_untouched() {
    if !require_net_admin() {
        return;
    }
    let lab = lab();
    let node = lab.node().ns();
    let manifests = Manifests::new();
    manifests.service(&Service::new("web", 10).port("http", "TCP", 80, None));
    manifests.program(node, &CIDR);
    let pod = &lab.node().pods[0];
    let _server = pod.serve(Protocol::Tcp, 8080);
    // A published port, as container runtimes and the CNI plugin `portmap` have them.
    for (family, to) in [
        ("ip", format!("{}:8080", pod.v4)),
        ("ip6", format!("[{}]:8080", pod.v6)),
    ] {
        node.nft_load(&format!(
            "table {family} ports {{
                chain pre {{
                    type nat hook prerouting priority -100;
                    fib daddr type local tcp dport 8888 dnat to {to};
                }}
            }}"
        ));
    }
    let machine = &lab.node().machine;
    for address in [IpAddr::from(machine.v4), IpAddr::from(machine.v6)] {
        let answered = outcome(lab.client(), Ask::tcp(address, 8888));
        assert_eq!(answered.as_ref(), Ok(&pod.name), "{address}");
    }
}
