//! Packets arrive where services send them, and nowhere else.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::time::Duration;

use crate::support::manifests::{CLUSTER_CIDR, Manifests, Service};
use crate::support::skip::skip;
use nftlet_lab::netns::{
    Ask, Client, Lab, LabOptions, Machine, Namespace, Protocol, Server, require_net_admin,
};

pub const CIDR: [&str; 2] = ["--cluster-cidr", CLUSTER_CIDR];
/// How long a request waits for which nothing may come back.
pub const DROPPED: Duration = Duration::from_millis(300);

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The shop: one service of every kind of frontend, all with the three pods as endpoints.
pub fn shop() -> Service {
    let mut shop = Service::new("web", 10)
        .port("http", "TCP", 80, Some(30080))
        .port("dns", "UDP", 53, Some(30053));
    shop.kind = "LoadBalancer".into();
    shop.external_ips = vec!["198.51.100.7".into(), "2001:db8:2::7".into()];
    shop.load_balancer_ips = vec!["203.0.113.10".into(), "2001:db8:1::10".into()];
    shop
}

pub fn pod_addresses(pods: &[&Machine]) -> Vec<(String, bool)> {
    let addresses = pods.iter().flat_map(|pod| pod.addresses());
    addresses
        .map(|address| (address.to_string(), true))
        .collect()
}

pub fn serve(pods: &[&Machine]) -> Vec<Server> {
    pods.iter()
        .flat_map(|pod| [Protocol::Tcp, Protocol::Udp].map(|protocol| pod.serve(protocol, 8080)))
        .flatten()
        .collect()
}

/// TCP and UDP requests to a pair of ports.
pub fn asks(address: IpAddr, tcp: u16, udp: u16) -> [Ask; 2] {
    [Ask::tcp(address, tcp), Ask::udp(address, udp)]
}

pub struct Shop {
    pub lab: Lab,
    pub manifests: Manifests,
    _servers: Vec<Server>,
}

impl Shop {
    /// The shop, programmed into the node.
    pub fn open(more: &[&str]) -> Self {
        let lab = Lab::new(LabOptions::default());
        let manifests = Manifests::new();
        manifests.service(&shop());
        manifests.endpoints(&shop(), 8080, &pod_addresses(&lab.pods()));
        manifests.program(lab.node().ns(), more);
        let servers = serve(&lab.pods());
        Self {
            lab,
            manifests,
            _servers: servers,
        }
    }

    pub fn node(&self) -> &Namespace {
        self.lab.node().ns()
    }

    /// Asks from a machine and returns which client address the server saw.
    #[track_caller]
    pub fn seen_by_server(&self, from: &Machine, ask: Ask) -> IpAddr {
        let answer = Client::new(&from.ns).ask(ask);
        let answer = answer.unwrap_or_else(|error| panic!("{} {ask:?}: {error}", from.name));
        assert!(answer.name.starts_with("pod-"), "{answer:?}");
        assert_eq!(answer.local.port(), 8080);
        answer.seen_client.ip()
    }
}

#[test]
fn cluster_ips_keep_the_address_of_pods() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open(&CIDR);
    let mut lab_pods = shop.lab.pods();
    let pod = lab_pods.remove(0);
    for address in ["10.96.0.10", "fd00:10:96::a"].map(ip) {
        for ask in asks(address, 80, 53) {
            // Whichever pod answers: another one sees the pod, the pod itself sees its node.
            for _ in 0..12 {
                let answer = Client::new(&pod.ns).ask(ask).unwrap();
                let itself = answer.name == pod.name;
                let seen = answer.seen_client.ip();
                assert_eq!(seen == pod.address_like(address), !itself, "{answer:?}");
            }
        }
    }
}

#[test]
fn the_node_and_clients_outside_reach_cluster_ips_masqueraded() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open(&CIDR);
    let client = shop.lab.client();
    for address in ["10.96.0.10", "fd00:10:96::a"].map(ip) {
        for ask in asks(address, 80, 53) {
            assert_ne!(
                shop.seen_by_server(client, ask),
                client.address_like(address)
            );
            shop.seen_by_server(&shop.lab.node().machine, ask);
        }
    }
}

#[test]
fn without_a_cluster_cidr_cluster_ip_traffic_keeps_its_address() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open(&[]);
    let client = shop.lab.client();
    for address in ["10.96.0.10", "fd00:10:96::a"].map(ip) {
        for ask in asks(address, 80, 53) {
            assert_eq!(
                shop.seen_by_server(client, ask),
                client.address_like(address)
            );
        }
    }
}

#[test]
fn masquerade_all_hides_pods_too() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open(&["--masquerade-all", CIDR[0], CIDR[1]]);
    let pods = shop.lab.pods();
    for address in ["10.96.0.10", "fd00:10:96::a"].map(ip) {
        for ask in asks(address, 80, 53) {
            let seen = shop.seen_by_server(pods[0], ask);
            assert!(
                pods.iter().all(|pod| pod.address_like(seen) != seen),
                "{seen}"
            );
        }
    }
}

#[test]
fn external_addresses_and_node_ports_are_masqueraded() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open(&CIDR);
    let (client, pod) = (shop.lab.client(), shop.lab.pods()[0]);
    for address in [
        "203.0.113.10",
        "2001:db8:1::10",
        "198.51.100.7",
        "2001:db8:2::7",
    ]
    .map(ip)
    {
        for from in [client, pod, &shop.lab.node().machine] {
            for ask in asks(address, 80, 53) {
                assert_ne!(shop.seen_by_server(from, ask), client.address_like(address));
            }
        }
    }
    for address in ["192.168.10.1", "fd00:192:168:10::1"].map(ip) {
        for from in [client, pod, &shop.lab.node().machine] {
            for ask in asks(address, 30080, 30053) {
                assert_ne!(shop.seen_by_server(from, ask), client.address_like(address));
            }
        }
    }
}

#[test]
fn node_ports_answer_on_the_chosen_addresses_only() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open(&CIDR);
    let node = shop.node();
    node.addr_add("eth0", "192.168.10.201/32");
    let client = Client::new(&shop.lab.client().ns);
    let ask = |address: &str| client.ask(Ask::tcp(ip(address), 30080));
    assert!(ask("192.168.10.1").is_ok());
    // The node's own port, on which nothing listens.
    let refused = ask("192.168.10.201").expect_err("not the primary address");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    let all = ["--nodeport-addresses", "192.168.0.0/16", CIDR[0], CIDR[1]];
    shop.manifests.program(node, &all);
    assert!(ask("192.168.10.201").is_ok());
    // An address that comes later is inside the range as well.
    node.addr_add("eth0", "192.168.10.202/32");
    assert!(ask("192.168.10.202").is_ok());
    // All addresses of IPv6, for which no range is given; never loopback.
    assert!(ask("fd00:192:168:10::1").is_ok());
    let local = Client::new(node);
    for loopback in ["127.0.0.1", "::1"] {
        let error = local.ask(Ask::tcp(ip(loopback), 30080)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{loopback}");
    }
}

/// The request is refused at once. A process on the node itself learns of a rejected datagram
/// from `send`, as "operation not permitted".
#[track_caller]
fn assert_refused(from: &Machine, client: &Client, ask: Ask) {
    let kind = client.ask(ask).unwrap_err().kind();
    let on_node = from.name.starts_with("node-") && kind == ErrorKind::PermissionDenied;
    assert!(
        kind == ErrorKind::ConnectionRefused || on_node,
        "{} {ask:?}: {kind}",
        from.name
    );
}

#[test]
fn a_service_without_endpoints_refuses_at_every_frontend() {
    if !require_net_admin() {
        return;
    }
    let shop_service = shop();
    let shop = Shop::open(&CIDR);
    let unready: Vec<_> = pod_addresses(&shop.lab.pods())
        .into_iter()
        .map(|(address, _)| (address, false))
        .collect();
    shop.manifests.endpoints(&shop_service, 8080, &unready);
    shop.manifests.program(shop.node(), &CIDR);
    let node = &shop.lab.node().machine;
    for from in [shop.lab.client(), shop.lab.pods()[0], node] {
        let client = Client::new(&from.ns);
        let refused = |ask: Ask| assert_refused(from, &client, ask);
        for address in [
            "10.96.0.10",
            "fd00:10:96::a",
            "203.0.113.10",
            "2001:db8:2::7",
        ] {
            asks(ip(address), 80, 53).into_iter().for_each(refused);
        }
        for address in ["192.168.10.1", "fd00:192:168:10::1"] {
            asks(ip(address), 30080, 30053)
                .into_iter()
                .for_each(refused);
        }
    }
}

#[test]
fn what_no_service_has_is_refused_or_dropped() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open(&CIDR);
    for from in [
        shop.lab.client(),
        shop.lab.pods()[0],
        &shop.lab.node().machine,
    ] {
        let client = Client::new(&from.ns);
        // A port that the ClusterIP does not have.
        for address in ["10.96.0.10", "fd00:10:96::a"] {
            for ask in asks(ip(address), 81, 54) {
                assert_refused(from, &client, ask);
            }
        }
        // An address without a service.
        for address in ["10.96.0.99", "fd00:10:96::99"] {
            for ask in asks(ip(address), 80, 53) {
                let kind = client.ask(ask.timeout(DROPPED)).unwrap_err().kind();
                // On the node itself, `send` returns the error.
                let told = from.name.starts_with("node-") && kind == ErrorKind::PermissionDenied;
                assert!(
                    kind == ErrorKind::TimedOut || told,
                    "{} {ask:?}: {kind}",
                    from.name
                );
            }
        }
    }
}

#[test]
fn sctp_is_translated_where_the_kernel_has_it() {
    if !require_net_admin() {
        return;
    }
    if !Protocol::Sctp.supported() {
        skip(
            "sctp",
            "the kernel has no SCTP; its rules are compared in tests/golden only",
        );
        return;
    }
    let lab = Lab::new(LabOptions::default());
    let manifests = Manifests::new();
    let service = Service::new("sig", 20).port("sctp", "SCTP", 9, None);
    manifests.service(&service);
    manifests.endpoints(&service, 8080, &pod_addresses(&lab.pods()));
    manifests.program(lab.node().ns(), &CIDR);
    let _servers: Vec<_> = lab
        .pods()
        .iter()
        .map(|p| p.serve(Protocol::Sctp, 8080))
        .collect();
    let client = Client::new(&lab.client().ns);
    for address in ["10.96.0.20", "fd00:10:96::14"] {
        client.ask(Ask::sctp(ip(address), 9)).unwrap();
    }
}

#[test]
fn endpoints_share_evenly() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open(&CIDR);
    let client = Client::new(&shop.lab.client().ns);
    for address in ["10.96.0.10", "2001:db8:1::10"] {
        let mut counts: BTreeMap<String, u32> = BTreeMap::new();
        for _ in 0..600 {
            let answer = client.ask(Ask::tcp(ip(address), 80)).unwrap();
            *counts.entry(answer.name).or_default() += 1;
        }
        // 200 each; five standard deviations are 58.
        assert_eq!(counts.len(), 3, "{counts:?}");
        assert!(
            counts.values().all(|n| (140..260).contains(n)),
            "{counts:?}"
        );
    }
}
