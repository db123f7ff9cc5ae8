//! What hangs around the network policies: connections that are cut, what is logged and counted,
//! and bridges that pass them by.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::manifests::{CLUSTER_CIDR, Manifests};
use nftlet::netlink::{Conntrack, LogReader, Tracked};
use nftlet::policy::LOG_GROUP;
use nftlet::ruleset::Family;
use nftlet_lab::netns::{
    Ask, Daemon, HttpConnection, Lab, LabOptions, Machine, Namespace, Protocol, Server, drain,
    require_net_admin, wait_for,
};
use serde_json::{Value, json};

/// Reached by a test that fails, and by no other.
const LONG: Duration = nftlet_lab::netns::PATIENCE;
/// How long a request waits for which nothing may come back.
const SILENCE: Duration = Duration::from_millis(400);
/// After that long without an answer a datagram is taken for lost, and another one sent.
const LOST: Duration = Duration::from_secs(5);
const PORT: u16 = 8080;
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);

/// A node with three pods in the namespace `shop`, all of which serve TCP and UDP.
struct Shop {
    lab: Lab,
    manifests: Manifests,
    _servers: Vec<Server>,
}

impl Shop {
    fn open() -> Self {
        let lab = Lab::new(LabOptions::default());
        // The kernel forgets flows without packets after 30 s, which a test may take.
        lab.node().ns().sysctls(&[
            ("net.netfilter.nf_conntrack_udp_timeout", "3600"),
            ("net.netfilter.nf_conntrack_udp_timeout_stream", "3600"),
        ]);
        let manifests = Manifests::new();
        manifests.put(&json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"},
        }));
        for pod in lab.pods() {
            put_pod(&manifests, &pod.name, &pod.addresses());
        }
        let served = lab.pods().into_iter().chain([lab.client()]);
        let serve = |machine: &Machine| {
            [Protocol::Udp, Protocol::Http].map(|protocol| machine.serve(protocol, PORT))
        };
        let servers = served.flat_map(serve).flatten().collect();
        Self {
            lab,
            manifests,
            _servers: servers,
        }
    }

    fn run(&self, more: &[&str]) -> Daemon {
        let arguments = [&["--cluster-cidr", CLUSTER_CIDR], more].concat();
        self.manifests.run(self.node(), &arguments)
    }

    fn node(&self) -> &Namespace {
        self.lab.node().ns()
    }

    fn pod(&self, number: usize) -> &Machine {
        self.lab.pods()[number - 1]
    }

    /// Isolates pod-1; the outside reaches it still, and nobody else does.
    fn isolate(&self) {
        self.policy("web", &json!({}));
        self.wait_until_in_force("policy-ingress-shop/web");
    }

    fn policy(&self, name: &str, patch: &Value) {
        let client = self.lab.client();
        let mut spec = json!({
            "podSelector": {"matchLabels": {"pod": "pod-1"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [
                {"ipBlock": {"cidr": format!("{}/32", client.v4)}},
                {"ipBlock": {"cidr": format!("{}/128", client.v6)}},
            ]}],
        });
        for (field, value) in patch.as_object().unwrap() {
            spec[field] = value.clone();
        }
        self.manifests.put(&json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": "shop"}, "spec": spec,
        }));
    }

    /// Waits until the rules of both families have a word in them.
    fn wait_until_in_force(&self, word: &str) {
        for family in ["ip", "ip6"] {
            wait_for(&format!("{word} in the rules"), LONG, || {
                let rules = self.node().nft(&["list", "tables", family]);
                if !rules.contains("nftlet-policy") {
                    return None;
                }
                let rules = self.node().nft(&["list", "table", family, "nftlet-policy"]);
                rules.contains(word).then_some(())
            });
        }
    }

    /// The connections that the node tracks between two machines, whoever opened them.
    fn tracked(&self, one: &Machine, other: &Machine) -> Vec<Tracked> {
        let has = |machine: &Machine, tracked: &Tracked| {
            let ends = [tracked.source, tracked.replier];
            machine.addresses().iter().any(|ip| ends.contains(ip))
        };
        self.node().run(|| {
            let mut found = Vec::new();
            let mut conntrack = Conntrack::open().unwrap();
            for family in [Family::Ip, Family::Ip6] {
                let each = |tracked: Tracked| {
                    if has(one, &tracked) && has(other, &tracked) {
                        found.push(tracked);
                    }
                };
                conntrack.connections(family, each).unwrap();
            }
            found
        })
    }
}

fn put_pod(manifests: &Manifests, name: &str, addresses: &[IpAddr]) {
    let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    manifests.put(&json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "labels": {"pod": name}},
        "spec": {"nodeName": "node-1"},
        "status": {"phase": "Running", "podIPs": ips},
    }));
}

/// A UDP client that asks from one socket for all of its life.
struct Datagrams(UdpSocket);

impl Datagrams {
    fn new(from: &Machine, to: SocketAddr) -> Self {
        let socket = from.ns.run(|| {
            let socket = UdpSocket::bind((from.address_like(to.ip()), 0))?;
            socket.connect(to)?;
            io::Result::Ok(socket)
        });
        Self(socket.unwrap())
    }

    /// Sends a datagram, before which nothing waits any more.
    fn send(&self) {
        drain(&self.0);
        // A refusal that came since is reported here; what counts is the answer.
        let _ = self.0.send(b"?\n");
    }

    fn is_answered(&self, within: Duration) -> bool {
        // None at all would mean to wait for ever.
        let within = within.max(Duration::from_millis(1));
        self.0.set_read_timeout(Some(within)).unwrap();
        self.0.recv(&mut [0; 512]).is_ok()
    }

    fn ask(&self, within: Duration) -> bool {
        self.send();
        self.is_answered(within)
    }
}

/// TCP and UDP from one machine to another, in both families.
struct Talk {
    tcp: Vec<HttpConnection>,
    udp: Vec<Datagrams>,
}

impl Talk {
    #[track_caller]
    fn begin(from: &Machine, to: &Machine) -> Self {
        let (mut tcp, mut udp) = (Vec::new(), Vec::new());
        for address in to.addresses() {
            let ask = Ask::http(address, PORT).timeout(LONG);
            tcp.push(from.ns.run(|| ask.open()).expect("a connection"));
            udp.push(Datagrams::new(from, SocketAddr::new(address, PORT)));
        }
        let mut talk = Self { tcp, udp };
        talk.goes_on();
        talk
    }

    /// The same where a policy may still have to go.
    #[track_caller]
    fn begin_at_last(from: &Machine, to: &Machine) -> Self {
        for address in to.addresses() {
            let ask = Ask::http(address, PORT).timeout(LOST);
            wait_for("an answer", LONG, || from.ns.run(|| ask.send()).ok());
        }
        Self::begin(from, to)
    }

    /// Everything is answered.
    #[track_caller]
    fn goes_on(&mut self) {
        for connection in &mut self.tcp {
            connection.set_timeout(LONG);
            connection.ask().expect("the connection lives");
        }
        for udp in &self.udp {
            wait_for("an answer over UDP", LONG, || udp.ask(LOST).then_some(()));
        }
    }
}

/// Nothing of all this is answered.
#[track_caller]
fn are_cut(talks: &mut [Talk]) {
    for talk in &mut *talks {
        for connection in &mut talk.tcp {
            connection.send().expect("the kernel takes it");
        }
        talk.udp.iter().for_each(Datagrams::send);
    }
    // All wait at the same time.
    let until = Instant::now() + SILENCE;
    let left = || until.saturating_duration_since(Instant::now());
    for talk in talks {
        for connection in &mut talk.tcp {
            connection.set_timeout(left().max(Duration::from_millis(1)));
            let error = connection.answer().expect_err("the connection is cut");
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        }
        for udp in &talk.udp {
            assert!(!udp.is_answered(left()), "an answer over UDP");
        }
    }
}

#[test]
fn strict_policies_cut_what_they_deny_within_a_second() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let daemon = shop.run(&["--network-policy-strict", "--metrics-bind-address=:10249"]);
    let (web, other, third) = (shop.pod(1), shop.pod(2), shop.pod(3));
    let node = &shop.lab.node().machine;
    let mut denied = [
        Talk::begin(other, web),
        Talk::begin(web, third),
        Talk::begin(web, shop.lab.client()),
    ];
    let mut allowed = [
        Talk::begin(shop.lab.client(), web),
        Talk::begin(node, web),
        Talk::begin(other, third),
    ];
    let cut = |machines: &[&Machine]| -> Duration {
        shop.isolate();
        let in_force = Instant::now();
        for machine in machines {
            wait_for("the cut", LONG, || {
                shop.tracked(web, machine).is_empty().then_some(())
            });
        }
        in_force.elapsed()
    };
    let mut took = vec![cut(&[other, third])];
    are_cut(&mut denied);
    allowed.iter_mut().for_each(Talk::goes_on);
    // Of each of the three, TCP and UDP of two families.
    wait_for("the count", LONG, || {
        let count = scrape(shop.node()).value("nftlet_policy_connections_cut_total");
        (count? >= 12.0).then_some(())
    });
    assert!(!daemon.log().contains("WARN"), "{}", daemon.log());

    // A later policy that allows less than the one before.
    shop.policy("web", &json!({"ingress": []}));
    wait_for("the cut", LONG, || {
        let tracked = shop.tracked(shop.lab.client(), web);
        tracked.is_empty().then_some(())
    });
    let [mut from_outside, mut from_node, mut others] = allowed;
    are_cut(std::slice::from_mut(&mut from_outside));
    from_node.goes_on();
    others.goes_on();

    // A machine that stalls makes it longer, and never shorter.
    while took.iter().all(|took| *took >= Duration::from_secs(1)) {
        assert!(took.len() < 5, "{took:?}");
        shop.manifests.remove("NetworkPolicy", "web");
        let _talk = Talk::begin_at_last(other, web);
        took.push(cut(&[other]));
    }
}

/// Ends clients also where a wait is in vain.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Eight clients go on asking while a policy comes that denies them; whether the server's answers
/// opened their flows again.
fn udp_comes_back() -> bool {
    let shop = Shop::open();
    let _daemon = shop.run(&["--network-policy-strict"]);
    let (web, other) = (shop.pod(1), shop.pod(2));
    let clients: Vec<Datagrams> = (0..8)
        .map(|number| {
            let address = web.addresses()[number % 2];
            Datagrams::new(other, SocketAddr::new(address, PORT))
        })
        .collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        for client in &clients {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    client.ask(SILENCE);
                }
            });
        }
        wait_for("flows", LONG, || {
            (shop.tracked(web, other).len() >= 8).then_some(())
        });
        // Only ingress is isolated: an answer may open a connection.
        shop.policy("web", &json!({"policyTypes": ["Ingress"], "ingress": []}));
        wait_for("the cut", LONG, || {
            shop.tracked(web, other).is_empty().then_some(())
        });
    });
    let answered = clients.iter().any(|client| client.ask(SILENCE));
    answered || !shop.tracked(web, other).is_empty()
}

/// A server that the machine stalls for longer than answers are waited for may still answer what
/// came before the policy, so a flow that comes back counts if it does each time.
#[test]
fn udp_under_load_does_not_come_back_the_other_way_round() {
    if !require_net_admin() {
        return;
    }
    assert!(
        (0..4).any(|_| !udp_comes_back()),
        "answers open the flows again"
    );
}

#[test]
fn without_strict_connections_end_by_themselves() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let daemon = shop.run(&["--metrics-bind-address=:10249"]);
    let (web, other) = (shop.pod(1), shop.pod(2));
    let mut before = [Talk::begin(other, web), Talk::begin(web, other)];
    shop.isolate();
    for address in web.addresses() {
        let ask = Ask::http(address, PORT).timeout(SILENCE);
        let refused = other
            .ns
            .run(|| ask.send())
            .expect_err("new ones are denied");
        assert_eq!(refused.kind(), io::ErrorKind::TimedOut, "{refused}");
    }
    before.iter_mut().for_each(Talk::goes_on);
    let cut = scrape(shop.node()).value("nftlet_policy_connections_cut_total");
    assert_eq!(cut, Some(0.0), "{}", daemon.log());
}

/// One datagram or opening segment from a port.
fn send(protocol: Protocol, from: &Machine, port: u16, to: IpAddr) {
    let ask = Ask::new(protocol, SocketAddr::new(to, PORT)).timeout(SILENCE);
    let ask = ask.source_port(from.address_like(to), port);
    let refused = from.ns.run(|| ask.send()).expect_err("a policy denies it");
    assert_eq!(refused.kind(), io::ErrorKind::TimedOut, "{refused}");
}

#[test]
fn denied_packets_are_logged_with_the_names_of_the_pods() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let daemon = shop.run(&["--log-denied"]);
    shop.isolate();
    let (web, other) = (shop.pod(1), shop.pod(2));
    send(Protocol::Tcp, other, 40001, web.v4.into());
    send(Protocol::Udp, other, 40002, web.v6.into());
    send(Protocol::Udp, web, 40003, shop.lab.client().v4.into());
    for line in [
        "denied ingress TCP shop/pod-2 (10.244.1.12:40001) -> shop/pod-1 (10.244.1.11:8080)",
        "denied ingress UDP shop/pod-2 ([fd00:10:244:1::12]:40002) -> \
         shop/pod-1 ([fd00:10:244:1::11]:8080)",
        "denied egress UDP shop/pod-1 (10.244.1.11:40003) -> 192.168.10.100:8080",
    ] {
        wait_for(line, LONG, || daemon.log().contains(line).then_some(()));
    }
    // What is allowed is not told of.
    let ask = Ask::http(web.v4, PORT).source_port(shop.lab.client().v4, 40004);
    shop.lab.client().ns.run(|| ask.send()).unwrap();
    send(Protocol::Udp, other, 40005, web.v4.into());
    wait_for("the line after it", LONG, || {
        daemon.log().contains(":40005)").then_some(())
    });
    assert!(!daemon.log().contains(":40004"), "{}", daemon.log());
}

#[test]
fn a_log_for_machines_has_the_parts_as_fields() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let daemon = shop.run(&["--log-denied", "--log-format=json"]);
    shop.isolate();
    send(
        Protocol::Tcp,
        shop.lab.pods()[1],
        40001,
        shop.pod(1).v4.into(),
    );
    let fields = wait_for("the line", LONG, || {
        let log = daemon.log();
        let mut lines = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.find_map(|line| {
            let fields = line.get("fields")?.clone();
            let message = fields.get("message")?.as_str()?;
            message.starts_with("denied").then_some(fields)
        })
    });
    let field = |name: &str| fields.get(name).unwrap_or(&Value::Null).clone();
    assert_eq!(field("direction"), json!("ingress"));
    assert_eq!(field("protocol"), json!("TCP"));
    assert_eq!(field("source"), json!("10.244.1.12"));
    assert_eq!(field("source_pod"), json!("shop/pod-2"));
    assert_eq!(field("source_port"), json!(40001));
    assert_eq!(field("destination"), json!("10.244.1.11"));
    assert_eq!(field("destination_pod"), json!("shop/pod-1"));
    assert_eq!(field("destination_port"), json!(8080));
}

#[test]
fn a_log_group_of_somebody_else_is_a_warning_and_policies_are_enforced() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let _taken = shop.node().run(|| LogReader::open(LOG_GROUP)).unwrap();
    let daemon = shop.run(&["--log-denied"]);
    shop.isolate();
    send(Protocol::Tcp, shop.pod(2), 40001, shop.pod(1).v4.into());
    let log = daemon.log();
    let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN")).collect();
    let warned = |text: &str| warnings.iter().filter(|line| line.contains(text)).count();
    assert_eq!(warned(&format!("NFLOG group {LOG_GROUP}")), 1, "{log}");
    assert!(!log.contains("denied ingress"), "{log}");
}

/// What a scrape gave.
struct Scrape(String);

impl Scrape {
    fn value(&self, series: &str) -> Option<f64> {
        let mut lines = self.0.lines();
        let value = lines.find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))?;
        Some(value.parse().unwrap())
    }

    fn drops(&self, pod: &str, direction: &str) -> Option<f64> {
        self.value(&format!(
            "nftlet_policy_drops_total{{direction=\"{direction}\",namespace=\"shop\",pod=\"{pod}\"}}"
        ))
    }
}

fn scrape(node: &Namespace) -> Scrape {
    let answer = node.run(|| {
        let mut stream = TcpStream::connect(METRICS)?;
        stream.set_read_timeout(Some(LONG))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        io::Result::Ok(answer)
    });
    Scrape(answer.unwrap())
}

#[test]
fn drops_are_counted_by_pod_over_edits_and_restarts() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let metrics = ["--metrics-bind-address=127.0.0.1:10249"];
    let mut daemon = shop.run(&metrics);
    let drops = |direction: &str| scrape(shop.node()).drops("pod-1", direction);
    // A packet may still be on its way when its sender has given up.
    let reach = |direction: &str, count: f64| {
        wait_for(&format!("{count} drops of {direction}"), LONG, || {
            (drops(direction) == Some(count)).then_some(())
        });
    };
    assert_eq!(drops("ingress"), None, "nobody is isolated");
    shop.isolate();
    wait_for("the series", LONG, || drops("ingress"));
    assert_eq!(drops("ingress"), Some(0.0));
    let (web, other) = (shop.pod(1), shop.pod(2));
    for port in [40001, 40002] {
        send(Protocol::Udp, other, port, web.v4.into());
    }
    send(Protocol::Udp, other, 40003, web.v6.into());
    send(Protocol::Udp, web, 40004, other.v6.into());
    // Both families together.
    reach("ingress", 3.0);
    reach("egress", 1.0);

    // Other rules of the same policy, and one policy more.
    let allowed = json!({"ingress": [{"ports": [{"protocol": "UDP", "port": 9999}]}]});
    shop.policy("web", &allowed);
    shop.wait_until_in_force("9999");
    shop.policy("more", &json!({"egress": [{"ports": [{"port": 7777}]}]}));
    shop.wait_until_in_force("policy-egress-shop/more");
    assert_eq!(drops("ingress"), Some(3.0));
    assert_eq!(drops("egress"), Some(1.0));
    send(Protocol::Udp, web, 40005, other.v4.into());
    reach("egress", 2.0);

    daemon.kill();
    drop(daemon);
    let _daemon = shop.run(&metrics);
    assert_eq!(drops("ingress"), Some(3.0), "a restart keeps the counters");
    assert_eq!(drops("egress"), Some(2.0));

    shop.manifests.remove("Pod", "pod-1");
    wait_for("the series to go", LONG, || {
        drops("ingress").is_none().then_some(())
    });
    assert_eq!(drops("egress"), None);
}

#[test]
fn a_bridge_that_passes_the_policies_by_is_told_of() {
    if !require_net_admin() {
        return;
    }
    let node = Namespace::new("node-1");
    node.ip_batch([
        "link add cni0 type bridge",
        "link set cni0 up",
        "addr add 10.244.1.1/24 dev cni0",
    ]);
    let manifests = Manifests::new();
    let ip = |last: u8| IpAddr::V4(Ipv4Addr::new(10, 244, 1, last));
    put_pod(&manifests, "web", &[ip(11)]);
    // /sys shows the interfaces of the namespace that it was mounted in.
    let script = "mount -t sysfs none /sys && exec \"$0\" \"$@\"";
    let daemon = {
        let start = ["--mount", "sh", "-c", script, env!("CARGO_BIN_EXE_nftlet")];
        let more = ["--metrics-bind-address=127.0.0.1:10249"];
        let arguments = [&start[..], &manifests.arguments(&more)].concat();
        Daemon::start(&node, "unshare", arguments)
    };
    wait_for("the first rules", LONG, || {
        daemon.log().contains("rules are in place").then_some(())
    });
    let filtered = "/proc/sys/net/bridge/bridge-nf-call-iptables";
    if node.run(|| std::path::Path::new(filtered).exists()) {
        node.sysctl("net.bridge.bridge-nf-call-iptables", "0");
    }
    let gauge = || scrape(&node).value("nftlet_policy_bridge_unfiltered{ip_family=\"IPv4\"}");
    assert_eq!(gauge(), Some(0.0), "nobody is isolated");
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "closed", "namespace": "shop"},
        "spec": {"podSelector": {}},
    });
    manifests.put(&policy);
    let warning = "bridge cni0: IPv4 between pods of this node passes the network policies by";
    wait_for(warning, LONG, || {
        daemon.log().contains(warning).then_some(())
    });
    wait_for("the gauge", LONG, || (gauge() == Some(1.0)).then_some(()));

    // Another isolated pod is a reason to look again, but none to say it again.
    put_pod(&manifests, "db", &[ip(12)]);
    let isolated = || scrape(&node).value("nftlet_policy_isolated_pods");
    wait_for("the pod", LONG, || (isolated() == Some(2.0)).then_some(()));
    manifests.remove("NetworkPolicy", "closed");
    let over = "bridge cni0: IPv4 between isolated pods passes the network policies by no more";
    wait_for(over, LONG, || daemon.log().contains(over).then_some(()));
    wait_for("the gauge", LONG, || (gauge() == Some(0.0)).then_some(()));
    assert_eq!(daemon.log().matches(warning).count(), 1, "{}", daemon.log());
}

#[test]
fn connections_of_a_pod_that_is_gone_do_not_reach_its_successor() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let daemon = shop.run(&[]);
    let (web, other) = (shop.pod(1), shop.pod(2));
    let new = json!({"podSelector": {"matchLabels": {"pod": "new"}}});
    shop.policy("web", &new);
    // The successor takes over the place as it is: what serves there never ends.
    let mut denied = Talk::begin(other, web);
    let mut allowed = Talk::begin(shop.lab.client(), web);
    shop.manifests.remove("Pod", "pod-1");
    put_pod(&shop.manifests, "new", &web.addresses());
    shop.wait_until_in_force("pod-ingress-shop/new");
    wait_for("the cut", LONG * 3, || {
        shop.tracked(web, other).is_empty().then_some(())
    });
    for udp in &denied.udp {
        assert!(!udp.ask(SILENCE), "an answer over UDP");
    }
    denied.tcp.clear();
    allowed.goes_on();

    // What the pod itself outlives stays, whatever the policies say later.
    let mut before = Talk::begin(shop.pod(3), other);
    shop.policy(
        "other",
        &json!({"podSelector": {"matchLabels": {"pod": "pod-2"}}}),
    );
    shop.wait_until_in_force("pod-ingress-shop/pod-2");
    before.goes_on();
    assert!(!daemon.log().contains("WARN"), "{}", daemon.log());
}

#[test]
fn rules_do_not_log_where_nobody_can_read() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    // As on a kernel without such groups, which would refuse every rule that logs.
    let taken = shop.node().run(|| LogReader::open(LOG_GROUP)).unwrap();
    let daemon = shop.run(&["--log-denied"]);
    shop.isolate();
    let rules = shop.node().nft(&["list", "table", "ip", "nftlet-policy"]);
    assert!(!rules.contains("log "), "{rules}");
    let log = daemon.log();
    assert!(log.contains("cannot listen to NFLOG group 1729"), "{log}");
    drop((taken, daemon));
    let _daemon = shop.run(&["--log-denied"]);
    shop.wait_until_in_force("log prefix");
}
