//! Packets beside the allowed and the denied ones: errors about packets, neighbour discovery, counters,
//! and policies with a fault.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::support::objects::policy;
use crate::support::reach::{Case, Probe, check, check_counted, denied};
use crate::support::shop::{Shop, pod};
use nftlet_lab::netns::{Ask, Client, LabOptions, Machine, Protocol, require_net_admin, wait_for};
use serde_json::json;

use Probe::{Ping, Tcp, Udp};

const PATIENCE: Duration = nftlet_lab::netns::PATIENCE;

#[test]
fn errors_about_allowed_packets_come_back() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::with(LabOptions {
        nodes: 2,
        ..LabOptions::default()
    });
    let [web, _, _] = shop.pods();
    let far = shop.lab.nodes[1].pods[0].clone();
    // Nothing gets in, and out nothing but to the far pod.
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress", "Egress"],
        "egress": [{"to": [
            {"ipBlock": {"cidr": format!("{}/32", far.v4)}},
            {"ipBlock": {"cidr": format!("{}/128", far.v6)}},
        ]}],
    });
    shop.put_and_apply(&policy("web", spec));
    // Port unreachable, from the pod that was asked.
    let client = Client::new(&web.ns);
    for address in far.addresses() {
        let error = client.ask(Ask::udp(address, 9)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
    }
    // Packet too big, from a router on the way.
    shop.lab.nodes[1].ns().ip("link set veth1 mtu 1300");
    far.ns.ip("link set eth0 mtu 1300");
    let _servers = far.serve(Protocol::Udp, 80);
    for address in far.addresses() {
        let to = SocketAddr::new(address, 80);
        let route = || {
            web.ns.run(|| {
                let any: SocketAddr = if to.is_ipv4() {
                    "0.0.0.0:0".parse().expect("an address")
                } else {
                    "[::]:0".parse().expect("an address")
                };
                let socket = std::net::UdpSocket::bind(any).expect("a socket");
                // The next call returns the error of an earlier datagram.
                let _ = socket.send_to(&[0; 1400], to);
            });
            let address = address.to_string();
            let output = web
                .ns
                .command("ip")
                .args(["route", "get", &address])
                .output();
            let text = String::from_utf8(output.expect("ip runs").stdout).expect("UTF-8");
            text.contains("mtu 1300").then_some(())
        };
        wait_for("the path's MTU to be learnt", PATIENCE, route);
    }
}

#[test]
fn neighbours_are_found_whatever_is_denied() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = &shop.lab.node().machine;
    let closed = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
    shop.manifests.put(&policy("closed", closed));
    shop.put_and_apply(&policy(
        "store/open",
        json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"],
               "egress": [{}], "ingress": [{}]}),
    ));
    for machine in [&web, &db, &api, node, shop.lab.client()] {
        machine.ns.ip_batch(["neigh flush all"]);
    }
    let cases = [
        Case::both(node, &web, Tcp(80), true),
        Case::both(&api, shop.lab.client(), Tcp(80), true),
        Case::both(shop.lab.client(), &api, Ping, true),
        Case::both(&db, &web, Ping, false),
        // Echo requests are no part of neighbour discovery.
        Case::both(&db, node, Ping, false),
    ];
    check_counted(&[&node.ns], &cases.concat());
}

#[test]
fn what_was_denied_is_counted_for_the_pod_and_its_direction() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    let into = json!({"podSelector": {"matchLabels": {"app": "web"}}});
    let out = json!({
        "podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Egress"],
    });
    shop.manifests.put(&policy("in", into));
    shop.put_and_apply(&policy("out", out));
    let count = |direction: &str, address: IpAddr| {
        let counted = denied(&[node]);
        counted.get(&(direction.to_owned(), address)).copied()
    };
    // A packet may still be on its way when its sender has given up.
    let reach = |direction: &str, address: IpAddr, wanted: u64| {
        let what = format!("{wanted} packets of {direction} at {address}");
        wait_for(&what, PATIENCE, || {
            (count(direction, address) == Some(wanted)).then_some(())
        });
    };
    for (index, address) in web.addresses().into_iter().enumerate() {
        assert_eq!(count("ingress", address), Some(0));
        assert_eq!(count("egress", address), None);
        // A datagram is one packet, a lost SYN is repeated after a second.
        let case = |from: &Machine, to| Case {
            from: from.clone(),
            to,
            probe: Udp(80),
            passes: false,
        };
        check(&[case(&api, address), case(&api, address)]);
        reach("ingress", address, 2);
        // The source denies first; the destination never sees it.
        check(&[case(&db, address)]);
        reach("egress", db.addresses()[index], 1);
        assert_eq!(count("ingress", address), Some(2));
    }
    // Counters outlive another program run and changes that do not concern the pod.
    shop.put_and_apply(&pod("store", "api", &[("app", "else")], &api));
    assert_eq!(count("ingress", web.v4.into()), Some(2));
}

#[test]
fn a_policy_with_a_fault_closes_and_is_named() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    let spec = json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [
        {"from": [{"ipBlock": {"cidr": "10.244.0.0/40"}}, {"podSelector": {}}]},
        {"from": [{"namespaceSelector": {"matchLabels": {"team": "b"}}}]},
    ]});
    shop.manifests.put(&policy("faulty", spec));
    let said = shop.apply();
    let lines: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("shop/faulty"))
        .collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(
        lines[0].contains("ingress[0].from[0].ipBlock.cidr"),
        "{said}"
    );
    assert!(lines[0].contains("10.244.0.0/40"), "{said}");
    let cases = [
        Case::both(&db, &web, Tcp(80), false),
        Case::both(&api, &web, Tcp(80), true),
    ];
    check_counted(&[node], &cases.concat());
}

#[test]
fn switched_off_nothing_is_enforced() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    shop.put_and_apply(&policy("closed", json!({"podSelector": {}})));
    check_counted(
        &[shop.lab.node().ns()],
        &Case::both(&db, &web, Tcp(80), false),
    );
    shop.manifests
        .program(shop.lab.node().ns(), &["--network-policy", "off"]);
    check(&Case::both(&db, &web, Tcp(80), true));
    assert!(!shop.rules().contains("nftlet-policy"));
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Sends an ICMPv6 message of a type with the hop limit that stands for "from this link".
fn send_icmp6(from: &Machine, to: IpAddr, kind: u8) {
    use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto, socket, sockopt};
    from.ns.run(|| {
        let socket = socket(AddressFamily::INET6, SocketType::RAW, Some(ipproto::ICMPV6));
        let socket = socket.expect("a raw socket");
        sockopt::set_ipv6_unicast_hops(&socket, Some(255)).expect("a hop limit");
        let mut message = [0; 24];
        message[0] = kind;
        let to = SocketAddr::new(to, 0);
        sendto(&socket, &message, SendFlags::empty(), &to).expect("a message is sent");
    });
}

#[test]
fn neighbour_discovery_carries_nothing_through_a_router() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    let node = shop.lab.node().ns();
    let out = json!({"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Egress"]});
    shop.put_and_apply(&policy("out", out));
    let key = ("egress".to_owned(), web.v6.into());
    let count = || denied(&[node]).get(&key).copied().unwrap_or_default();
    for kind in [130, 131, 132, 133, 134, 135, 136, 143] {
        let before = count();
        send_icmp6(&web, db.v6.into(), kind);
        wait_for(&format!("type {kind} to be denied"), PATIENCE * 3, || {
            (count() > before).then_some(())
        });
    }
    // On the link itself it works still.
    web.ns.ip("neigh flush all");
    node.ip("neigh flush all");
    check(&Case::both(&shop.lab.node().machine, &web, Tcp(80), true));
}

#[test]
fn strict_mode_lets_untracked_connections_live() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    for family in ["ip", "ip6"] {
        node.nft_load(&format!(
            "table {family} untracked {{ chain early {{
                type filter hook prerouting priority -300; policy accept;
                meta l4proto tcp th dport 80 notrack
                meta l4proto tcp th sport 80 notrack
            }}; }}"
        ));
    }
    let into = json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [
        {"from": [{"podSelector": {"matchLabels": {"app": "db"}}}]},
    ]});
    shop.manifests.put(&policy("in", into));
    shop.manifests.program(node, &["--network-policy-strict"]);
    let cases = [
        Case::both(&db, &web, Tcp(80), true),
        Case::both(&db, &web, Tcp(8080), true),
        Case::both(&api, &web, Tcp(80), false),
    ];
    check_counted(&[node], &cases.concat());
}
