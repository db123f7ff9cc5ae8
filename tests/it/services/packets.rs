//! Packets arrive where services send them, and nowhere else.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::manifests::{CLUSTER_CIDR, Manifests, Service};
use crate::support::skip::skip;
use nftlet_lab::netns::{
    Ask, Client, Lab, LabOptions, Machine, Namespace, PATIENCE, Protocol, Server, loses_nothing,
    require_net_admin, wait_for,
};

const CIDR: [&str; 2] = ["--cluster-cidr", CLUSTER_CIDR];
/// Between two requests of a client that goes on asking. Without it all ports of an address are
/// used within seconds, while the server keeps each for a minute after it closed the connection.
const PACE: Duration = Duration::from_millis(1);
/// How long a request waits for which nothing may come back.
const DROPPED: Duration = Duration::from_millis(300);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The shop: one service of every kind of frontend, all with the three pods as endpoints.
fn shop() -> Service {
    let mut shop = Service::new("web", 10)
        .port("http", "TCP", 80, Some(30080))
        .port("dns", "UDP", 53, Some(30053));
    shop.kind = "LoadBalancer".into();
    shop.external_ips = vec!["198.51.100.7".into(), "2001:db8:2::7".into()];
    shop.load_balancer_ips = vec!["203.0.113.10".into(), "2001:db8:1::10".into()];
    shop
}

fn pod_addresses(pods: &[&Machine]) -> Vec<(String, bool)> {
    let addresses = pods.iter().flat_map(|pod| pod.addresses());
    addresses
        .map(|address| (address.to_string(), true))
        .collect()
}

fn serve(pods: &[&Machine]) -> Vec<Server> {
    pods.iter()
        .flat_map(|pod| [Protocol::Tcp, Protocol::Udp].map(|protocol| pod.serve(protocol, 8080)))
        .flatten()
        .collect()
}

/// TCP and UDP requests to a pair of ports.
fn asks(address: IpAddr, tcp: u16, udp: u16) -> [Ask; 2] {
    [Ask::tcp(address, tcp), Ask::udp(address, udp)]
}

struct Shop {
    lab: Lab,
    manifests: Manifests,
    _servers: Vec<Server>,
}

impl Shop {
    /// The shop, programmed into the node.
    fn open(more: &[&str]) -> Self {
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

    fn node(&self) -> &Namespace {
        self.lab.node().ns()
    }

    /// Asks from a machine and tells which client address the server saw.
    #[track_caller]
    fn seen_by_server(&self, from: &Machine, ask: Ask) -> IpAddr {
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
        // An address that nobody has.
        for address in ["10.96.0.99", "fd00:10:96::99"] {
            for ask in asks(ip(address), 80, 53) {
                let kind = client.ask(ask.timeout(DROPPED)).unwrap_err().kind();
                // `send` tells a process on the node itself.
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

/// Clients that ask over and over again until they are stopped.
struct Load {
    from: Namespace,
    /// How many connection requests had been repeated before.
    repeated: u64,
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<(u64, Vec<String>)>>,
    done: Arc<AtomicU64>,
}

impl Load {
    fn start(from: &Namespace, asks: Vec<Ask>, pace: Duration) -> Self {
        let (stop, done) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let threads = asks.into_iter().map(|ask| {
            let (ns, stop, done) = (from.clone(), stop.clone(), done.clone());
            thread::spawn(move || {
                let client = Client::new(&ns);
                let (mut answered, mut failed) = (0, Vec::new());
                while !stop.load(Ordering::Relaxed) {
                    match client.ask(ask) {
                        Ok(_) => answered += 1,
                        Err(error) => failed.push(format!("{ask:?}: {error}")),
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(pace);
                }
                (answered, failed)
            })
        });
        let repeated = from.repeated_requests();
        let threads = threads.collect();
        Self {
            from: from.clone(),
            repeated,
            stop,
            threads,
            done,
        }
    }

    /// Waits until this many more requests are done.
    fn more(&self, requests: u64) {
        let until = self.done.load(Ordering::Relaxed) + requests;
        wait_for("requests", PATIENCE, || {
            (self.done.load(Ordering::Relaxed) >= until).then_some(())
        });
    }

    /// The number of answers, and of requests that were lost and repeated; panics if one failed.
    #[track_caller]
    fn finish(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let mut total = 0;
        for thread in self.threads {
            let (answered, failed) = thread.join().expect("a client thread ends");
            assert!(
                failed.is_empty(),
                "{} of {} requests failed, first {}",
                failed.len(),
                answered + failed.len() as u64,
                failed[0]
            );
            total += answered;
        }
        (total, self.from.repeated_requests() - self.repeated)
    }
}

#[test]
fn a_restart_interrupts_nothing() {
    if require_net_admin() {
        loses_nothing(restart);
    }
}

/// Restarts and crashes under load; how many requests were lost.
fn restart() -> u64 {
    let shop = Shop::open(&CIDR);
    let asks = ["10.96.0.10", "2001:db8:1::10"]
        .into_iter()
        .flat_map(|address| asks(ip(address), 80, 53));
    let load = Load::start(&shop.lab.client().ns, asks.collect(), PACE);
    for _ in 0..3 {
        let mut daemon = shop.manifests.run(shop.node(), &CIDR);
        load.more(200);
        let status = daemon.stop(PATIENCE);
        assert!(
            status.is_some_and(|s| s.success()),
            "{status:?} {}",
            daemon.log()
        );
        load.more(200);
        let mut crashed = shop.manifests.run(shop.node(), &CIDR);
        load.more(200);
        crashed.kill();
        load.more(200);
    }
    load.finish().1
}

#[test]
fn changes_of_the_files_arrive_at_once() {
    if !require_net_admin() {
        return;
    }
    let service = shop();
    let shop = Shop::open(&CIDR);
    let daemon = shop.manifests.run(shop.node(), &CIDR);
    let client = Client::new(&shop.lab.client().ns);
    let ask = Ask::tcp(ip("10.96.0.10"), 80);
    let pods = shop.lab.pods();
    for pod in &pods {
        let only = pod_addresses(&[pod]);
        shop.manifests.endpoints(&service, 8080, &only);
        wait_for("only one pod answers", PATIENCE, || {
            let answers: Vec<_> = (0..20).map(|_| client.ask(ask).unwrap().name).collect();
            answers.iter().all(|name| *name == pod.name).then_some(())
        });
    }
    shop.manifests.remove("Service", "web");
    wait_for("the service is gone", PATIENCE, || {
        let rules = shop
            .node()
            .nft(&["list", "map", "ip", "nftlet", "frontends"]);
        (!rules.contains("10.96.0.10")).then_some(())
    });
    let error = client.ask(ask.timeout(DROPPED)).expect_err("it is gone");
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    // Broken input changes nothing and is named.
    shop.manifests.service(&service);
    wait_for("the service is back", PATIENCE, || {
        client.ask(ask.timeout(DROPPED)).ok()
    });
    let broken = shop.manifests.path().join("service-web.json");
    std::fs::write(&broken, "{\"apiVersion\": \"v1\",\n \"kind\": }").unwrap();
    wait_for("the broken file is named", PATIENCE, || {
        daemon.log().contains("service-web.json:2:").then_some(())
    });
    assert!(client.ask(ask).is_ok());
}

mod churn {
    //! Endpoints come and go as fast as the kernel takes it, while clients connect.

    use super::*;
    use nftlet::compile::Settings;
    use nftlet::metrics::Metrics;
    use nftlet::model::{
        Delivery, Endpoint, EndpointSlice, Event, Family, Kind, Object, ObjectName, ServiceKind,
        ServicePort, SlicePort, TrafficPolicy,
    };
    use nftlet::netlink::Nftables;
    use nftlet::reconcile::{Log, Outcome, Reconciler};

    fn slice(pods: &[IpAddr]) -> Event {
        let endpoints = pods.iter().map(|address| Endpoint {
            address: *address,
            ready: true,
            serving: true,
            terminating: false,
            node: None,
            hints: None,
        });
        Event::Apply(Object::EndpointSlice(EndpointSlice {
            name: ObjectName::new("shop", "web-1"),
            service: ObjectName::new("shop", "web"),
            created: None,
            family: Family::V4,
            ports: vec![SlicePort {
                name: "http".into(),
                protocol: nftlet::model::Protocol::Tcp,
                port: 8080,
            }],
            endpoints: endpoints.collect(),
            triggered_at_ms: None,
        }))
    }

    fn service() -> Event {
        Event::Apply(Object::Service(nftlet::model::Service {
            name: ObjectName::new("shop", "web"),
            created: None,
            kind: ServiceKind::ClusterIp,
            cluster_ips: vec![ip("10.96.0.10")],
            ports: vec![ServicePort {
                name: "http".into(),
                protocol: nftlet::model::Protocol::Tcp,
                port: 80,
                node_port: None,
            }],
            external_ips: vec![],
            load_balancer_ips: vec![],
            source_ranges: vec![],
            external_policy: TrafficPolicy::Cluster,
            internal_policy: TrafficPolicy::Cluster,
            affinity_seconds: None,
            health_check_node_port: None,
        }))
    }

    /// A packet may meet the rules of one transaction and the elements of the next. Every number
    /// of endpoints from one to three follows every other; all pods stay alive, so that a failed
    /// request can only be a packet that fell between two transactions. Removing unused chains
    /// makes each change bring its chain anew.
    #[test]
    fn no_request_fails_while_endpoints_come_and_go() {
        if require_net_admin() {
            loses_nothing(come_and_go);
        }
    }

    /// How many requests were lost.
    fn come_and_go() -> u64 {
        let lab = Lab::new(LabOptions::default());
        let _servers = serve(&lab.pods());
        let pods: Vec<IpAddr> = lab.pods().iter().map(|pod| pod.v4.into()).collect();
        let metrics = Metrics::new().unwrap();
        let nftables = lab.node().ns().run(|| Nftables::open().unwrap());
        let mut reconciler = Reconciler::new(nftables, Settings::default(), &metrics, &Log);
        let mut first: Vec<_> = Kind::ALL.map(Event::ListStarted).into();
        first.extend([service(), slice(&pods)]);
        first.extend(Kind::ALL.map(Event::ListComplete));
        let mut handle = |events: Vec<Event>| {
            let outcome = reconciler.handle(events.into_iter().map(Delivery::now));
            assert_eq!(outcome, Outcome::Synced);
            reconciler.remove_chains_unused_since(Instant::now());
        };
        handle(first);
        let ask = Ask::tcp(ip("10.96.0.10"), 80);
        // As many as there can be, and in all not so many that a port is used twice.
        let load = Load::start(&lab.client().ns, vec![ask; 4], Duration::ZERO);
        let orders: [&[usize]; 6] = [&[0], &[0, 1, 2], &[1, 2], &[2], &[2, 0], &[0, 1, 2]];
        let mut changes = 0u32;
        while load.done.load(Ordering::Relaxed) < 12_000 || changes <= 500 {
            for order in orders {
                let chosen: Vec<_> = order.iter().map(|index| pods[*index]).collect();
                handle(vec![slice(&chosen)]);
                changes += 1;
            }
        }
        let (answered, lost) = load.finish();
        assert!(answered >= 12_000, "{answered} answers, {changes} changes");
        lost
    }
}
