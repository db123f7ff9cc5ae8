//! Session affinity: a client stays with its endpoint, in the kernel.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::support::manifests::{Backend, CLUSTER_CIDR, Manifests, Service};
use crate::support::objects::{slice_of, with};
use nftlet_lab::netns::{
    Ask, Client, Lab, LabOptions, Machine, Namespace, PATIENCE, Protocol, Server,
    require_net_admin, wait_for,
};
use serde_json::json;

const CIDR: [&str; 2] = ["--cluster-cidr", CLUSTER_CIDR];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Writes the service; no affinity without a timeout.
fn put_service(manifests: &Manifests, timeout: Option<u32>) {
    let mut web = Service::new("web", 10)
        .port("http", "TCP", 80, Some(30080))
        .port("dns", "UDP", 53, Some(30053))
        .patch(json!({"spec": {
            "sessionAffinity": timeout.map_or("None", |_| "ClientIP"),
            "sessionAffinityConfig": timeout.map(|t| json!({"clientIP": {"timeoutSeconds": t}})),
        }}));
    web.kind = "LoadBalancer".into();
    web.load_balancer_ips = vec!["203.0.113.10".into(), "2001:db8:1::10".into()];
    manifests.service(&web);
}

fn put_endpoints(manifests: &Manifests, pods: &[&Machine]) {
    for (family, v6) in [("IPv4", false), ("IPv6", true)] {
        let endpoints = pods.iter().map(
            |pod| json!({"addresses": [pod.addresses()[usize::from(v6)]], "nodeName": "node-1"}),
        );
        let name = format!("web-{}", family.to_lowercase());
        manifests.put(&with(
            slice_of(&name, "web", endpoints.collect()),
            json!({"addressType": family, "ports": [
                {"name": "http", "port": 8080, "protocol": "TCP"},
                {"name": "dns", "port": 8080, "protocol": "UDP"},
            ]}),
        ));
    }
}

struct Sticky {
    lab: Lab,
    manifests: Manifests,
    _servers: Vec<Server>,
}

impl Sticky {
    fn new(timeout: u32) -> Self {
        let lab = Lab::new(LabOptions {
            nodes: 1,
            pods_per_node: 4,
            clients: 6,
        });
        let manifests = Manifests::new();
        put_service(&manifests, Some(timeout));
        put_endpoints(&manifests, &lab.pods());
        let servers = lab.pods().into_iter().flat_map(|pod| {
            [Protocol::Tcp, Protocol::Udp].map(|protocol| pod.serve(protocol, 8080))
        });
        let servers = servers.flatten().collect();
        let sticky = Self {
            lab,
            manifests,
            _servers: servers,
        };
        sticky.program();
        sticky
    }

    fn node(&self) -> &Namespace {
        self.lab.node().ns()
    }

    fn program(&self) {
        self.manifests.program(self.node(), &CIDR);
    }

    /// A map of the kernel, as `nft` lists it.
    fn map(&self, family: &str, name: &str) -> String {
        self.node().nft(&["list", "map", family, "nftlet", name])
    }

    /// When the kernel forgets the only client that it remembers: not before the first time and
    /// not after the second one, which are as far apart as the listing took.
    fn forgotten_at(&self, family: &str) -> Option<(Instant, Instant)> {
        let before = Instant::now();
        let listing = self.map(family, "affinity/shop");
        let after = Instant::now();
        let mut rest = listing.split(" expires ").skip(1);
        let expires = duration(rest.next()?.split_whitespace().next()?);
        assert_eq!(rest.count(), 0, "more than one client: {listing}");
        Some((before + expires, after + expires))
    }

    /// Waits until clients of a family are remembered for so many seconds.
    #[track_caller]
    fn wait_until_learnt_for(&self, family: &str, seconds: u32) {
        let chain = format!("learn-{seconds}/shop");
        wait_for(&format!("the {family} chain {chain}"), PATIENCE, || {
            let listing = self.map(family, "affinity-frontends");
            let mut words = listing.split([' ', ',', '\n']);
            words.any(|word| word == chain).then_some(())
        });
    }
}

/// A time as `nft` writes it: `9m59s996ms`.
fn duration(text: &str) -> Duration {
    let (mut total, mut rest) = (Duration::ZERO, text);
    while let Some(end) = rest.find(|c: char| !c.is_ascii_digit()) {
        let number: u64 = rest[..end].parse().expect("a number before its unit");
        let tail = &rest[end..];
        let length = tail.find(|c: char| c.is_ascii_digit());
        let unit = &tail[..length.unwrap_or(tail.len())];
        total += match unit {
            "d" => Duration::from_secs(number * 86_400),
            "h" => Duration::from_secs(number * 3_600),
            "m" => Duration::from_secs(number * 60),
            "s" => Duration::from_secs(number),
            "ms" => Duration::from_millis(number),
            other => panic!("not a unit of time: {other} in {text}"),
        };
        rest = &tail[unit.len()..];
    }
    total
}

/// Every kind of frontend in both families, over TCP and UDP.
fn frontends() -> Vec<Ask> {
    let addresses = [
        "10.96.0.10",
        "fd00:10:96::a",
        "203.0.113.10",
        "2001:db8:1::10",
    ];
    let nodes = ["192.168.10.1", "fd00:192:168:10::1"];
    let by_address = addresses.map(|a| [Ask::tcp(ip(a), 80), Ask::udp(ip(a), 53)]);
    let by_port = nodes.map(|a| [Ask::tcp(ip(a), 30080), Ask::udp(ip(a), 30053)]);
    by_address.into_iter().chain(by_port).flatten().collect()
}

/// The endpoint that answers a client; panics if it is not always the same.
#[track_caller]
fn only_endpoint(client: &Client, ask: Ask) -> String {
    let answers: BTreeSet<String> = (0..12).map(|_| client.ask(ask).unwrap().name).collect();
    assert_eq!(answers.len(), 1, "{ask:?} was answered by {answers:?}");
    answers.into_iter().next().unwrap()
}

#[test]
fn a_client_stays_with_its_endpoint_at_every_frontend() {
    if !require_net_admin() {
        return;
    }
    let sticky = Sticky::new(10_800);
    for ask in frontends() {
        for machine in &sticky.lab.clients {
            only_endpoint(&Client::new(&machine.ns), ask);
        }
    }
    let all: BTreeSet<String> = sticky
        .lab
        .clients
        .iter()
        .flat_map(|machine| {
            let client = Client::new(&machine.ns);
            frontends()
                .into_iter()
                .map(move |ask| client.ask(ask).unwrap().name)
        })
        .collect();
    assert_eq!(
        all.len(),
        4,
        "different clients go to different endpoints: {all:?}"
    );
    // The node and pods are clients like others.
    let pods = sticky.lab.pods();
    for machine in [&sticky.lab.node().machine, pods[0]] {
        only_endpoint(&Client::new(&machine.ns), Ask::tcp(ip("10.96.0.10"), 80));
        only_endpoint(&Client::new(&machine.ns), Ask::udp(ip("fd00:10:96::a"), 53));
    }
}

#[test]
fn added_endpoints_move_no_client_and_removed_ones_move_only_theirs() {
    if !require_net_admin() {
        return;
    }
    let sticky = Sticky::new(10_800);
    let pods = sticky.lab.pods();
    put_endpoints(&sticky.manifests, &pods[..3]);
    let _daemon = sticky.manifests.run(sticky.node(), &CIDR);
    let clients: Vec<Client> = sticky
        .lab
        .clients
        .iter()
        .map(|m| Client::new(&m.ns))
        .collect();
    let asks = [
        Ask::tcp(ip("10.96.0.10"), 80),
        Ask::udp(ip("fd00:10:96::a"), 53),
        Ask::tcp(ip("2001:db8:1::10"), 80),
        Ask::tcp(ip("192.168.10.1"), 30080),
    ];
    let where_all_are = || -> Vec<String> {
        let pairs = asks
            .iter()
            .flat_map(|ask| clients.iter().map(move |c| (c, *ask)));
        pairs
            .map(|(client, ask)| only_endpoint(client, ask))
            .collect()
    };
    let before = where_all_are();
    let mentions = |pod: &Machine| {
        let rules = sticky.node().nft(&["list", "ruleset"]);
        rules.contains(&format!(": {} .", pod.v4)) || rules.contains(&format!(": {} .", pod.v6))
    };
    put_endpoints(&sticky.manifests, &pods);
    wait_for("the fourth endpoint", PATIENCE, || {
        mentions(pods[3]).then_some(())
    });
    assert_eq!(where_all_are(), before, "a new endpoint moves no client");
    let gone = pods[1];
    put_endpoints(&sticky.manifests, &[pods[0], pods[2], pods[3]]);
    wait_for("the second endpoint to go", PATIENCE, || {
        (!mentions(gone)).then_some(())
    });
    let after = where_all_are();
    for (before, after) in before.iter().zip(&after) {
        assert_ne!(*after, gone.name);
        assert!(
            before == after || *before == gone.name,
            "{before} moved to {after}"
        );
    }
    assert_eq!(where_all_are(), after, "they stay where they went");
}

#[test]
fn clients_are_remembered_over_restarts() {
    if !require_net_admin() {
        return;
    }
    let sticky = Sticky::new(10_800);
    let clients: Vec<Client> = sticky
        .lab
        .clients
        .iter()
        .map(|m| Client::new(&m.ns))
        .collect();
    let ask = Ask::tcp(ip("10.96.0.10"), 80);
    let all = || -> Vec<String> { clients.iter().map(|c| only_endpoint(c, ask)).collect() };
    let before = all();
    let mut daemon = sticky.manifests.run(sticky.node(), &CIDR);
    assert_eq!(all(), before);
    daemon.kill();
    assert_eq!(all(), before);
    sticky.program();
    assert_eq!(all(), before);
    // An endpoint that goes while nftlet is away has no clients when it is back.
    let pods = sticky.lab.pods();
    let gone = pods.iter().find(|pod| pod.name == before[0]).unwrap();
    let rest: Vec<&Machine> = pods
        .iter()
        .filter(|p| p.name != gone.name)
        .copied()
        .collect();
    put_endpoints(&sticky.manifests, &rest);
    sticky.program();
    for (before, after) in before.iter().zip(all()) {
        assert!(
            *before == after || *before == gone.name,
            "{before} moved to {after}"
        );
        assert_ne!(after, gone.name);
    }
}

/// The kernel's own deadline is what counts, between two readings of the clock: a machine that
/// stalls puts them further apart, and nothing else.
#[test]
fn clients_are_forgotten_after_the_timeout_which_can_change() {
    if !require_net_admin() {
        return;
    }
    const TIMEOUT: Duration = Duration::from_secs(600);
    /// The kernel counts in ticks, and `nft` in milliseconds.
    const SLACK: Duration = Duration::from_millis(100);
    let sticky = Sticky::new(600);
    let _daemon = sticky.manifests.run(sticky.node(), &CIDR);
    let client = Client::new(&sticky.lab.client().ns);
    let asks = [
        ("ip", Ask::tcp(ip("10.96.0.10"), 80)),
        ("ip6", Ask::tcp(ip("fd00:10:96::a"), 80)),
    ];
    let forgotten_at = |family: &str| {
        let found = sticky.forgotten_at(family);
        found.unwrap_or_else(|| panic!("no client is remembered in {family}"))
    };
    for (family, ask) in asks {
        let before = Instant::now();
        let first = client.ask(ask).unwrap().name;
        let after = Instant::now();
        let (earliest, latest) = forgotten_at(family);
        assert!(earliest <= after + TIMEOUT + SLACK, "remembered too long");
        assert!(latest + SLACK >= before + TIMEOUT, "not long enough");
        // Every new connection puts the end off.
        wait_for("the time to begin again", PATIENCE, || {
            assert_eq!(client.ask(ask).unwrap().name, first, "the client stays");
            let after = Instant::now();
            let (now_earliest, _) = forgotten_at(family);
            assert!(now_earliest <= after + TIMEOUT + SLACK, "too long again");
            (now_earliest > latest + SLACK).then_some(())
        });
    }
    // Another timeout for the living service: kube-proxy's own sync fails on that.
    put_service(&sticky.manifests, Some(1));
    for (family, ask) in asks {
        sticky.wait_until_learnt_for(family, 1);
        client.ask(ask).unwrap();
        wait_for("the client to be forgotten", PATIENCE, || {
            sticky.forgotten_at(family).is_none().then_some(())
        });
    }
    put_service(&sticky.manifests, Some(10_800));
    for (family, ask) in asks {
        sticky.wait_until_learnt_for(family, 10_800);
        client.ask(ask).unwrap();
        let (earliest, _) = forgotten_at(family);
        assert!(earliest > Instant::now() + Duration::from_secs(2 * 3600));
    }
    put_service(&sticky.manifests, None);
    wait_for("the end of affinity", PATIENCE, || {
        let answers: BTreeSet<String> = (0..40)
            .map(|_| client.ask(asks[0].1).unwrap().name)
            .collect();
        (answers.len() > 1 && sticky.forgotten_at("ip").is_none()).then_some(())
    });
}

/// Under external policy Local clients inside of the node are sent to endpoints elsewhere. They stay
/// there however pods are told, and whatever address of the node they use.
#[test]
fn clients_that_policy_local_does_not_bind_stay_with_their_endpoint() {
    if !require_net_admin() {
        return;
    }
    let lab = Lab::new(LabOptions {
        nodes: 2,
        pods_per_node: 3,
        clients: 1,
    });
    let (node, remote) = (lab.node(), &lab.nodes[1].pods);
    let own = ip("192.168.30.1");
    node.ns().addr_add("lo", &format!("{own}/32"));
    node.ns().route_add("203.0.113.0/24", "dev lo");
    let serve = |pod: &Machine| {
        let both = [Protocol::Tcp, Protocol::Udp];
        both.map(|protocol| pod.serve(protocol, 8080))
    };
    let _servers: Vec<_> = remote.iter().map(serve).collect();
    let addresses: Vec<String> = (10..18).map(|n| format!("203.0.113.{n}")).collect();
    let mut web = Service::new("web", 10)
        .port("http", "TCP", 80, None)
        .port("dns", "UDP", 53, None)
        .patch(json!({"spec": {"externalTrafficPolicy": "Local", "sessionAffinity": "ClientIP"}}));
    web.kind = "LoadBalancer".into();
    web.load_balancer_ips = addresses.clone();
    let manifests = Manifests::new();
    manifests.service(&web);
    let put = |pods: &[&Machine]| {
        let backends: Vec<Backend> = pods
            .iter()
            .map(|pod| Backend::new(pod.v4, "node-2"))
            .collect();
        manifests.backends(&web, 8080, &backends);
    };
    let remote: Vec<&Machine> = remote.iter().collect();
    let [gone, stays @ ..] = &remote[..] else {
        panic!("three pods");
    };
    put(&[*gone, stays[0], stays[1]]);
    let prefix = [
        "--detect-local-mode",
        "InterfaceNamePrefix",
        "--pod-interface-name-prefix",
        "veth",
    ];
    let _daemon = manifests.run(node.ns(), &prefix);
    let clients = [
        (Client::new(&node.pods[0].ns), None),
        (Client::new(node.ns()), Some(own)),
    ];
    let all = || -> Vec<String> {
        let asks = addresses
            .iter()
            .flat_map(|at| [Ask::tcp(ip(at), 80), Ask::udp(ip(at), 53)]);
        let of = |(client, source): &(Client, Option<IpAddr>)| {
            let ask = |ask: Ask| only_endpoint(client, source.map_or(ask, |it| ask.source(it)));
            asks.clone().map(ask).collect::<Vec<_>>()
        };
        clients.iter().flat_map(of).collect()
    };
    let before = all();
    put(stays);
    wait_for(
        "the clients of an endpoint to be forgotten",
        PATIENCE,
        || {
            let rules = node.ns().nft(&["list", "table", "ip", "nftlet"]);
            (!rules.contains(&format!(": {} .", gone.v4))).then_some(())
        },
    );
    for (before, after) in before.iter().zip(all()) {
        assert!(
            *before == after || *before == gone.name,
            "{before} moved to {after}"
        );
        assert_ne!(after, gone.name);
    }
}
