//! What hangs around the network policies: what is logged and counted, and bridges that pass them
//! by.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use crate::support::manifests::{CLUSTER_CIDR, Manifests};
use crate::support::objects::{namespace, pod, policy};
use nftlet::netlink::{Conntrack, LogReader, Tracked};
use nftlet::nft::TableFamily;
use nftlet::policies::LOG_GROUP;
use nftlet_lab::netns::{
    Ask, Daemon, Lab, LabOptions, Machine, Namespace, Protocol, Server, require_net_admin, wait_for,
};
use serde_json::{Value, json};

/// Reached by a test that fails, and by no other.
pub const LONG: Duration = nftlet_lab::netns::PATIENCE;

/// How long a request waits for which nothing may come back.
pub const SILENCE: Duration = Duration::from_millis(400);
/// After that long without an answer a datagram is taken for lost, and another one sent.
pub const LOST: Duration = Duration::from_secs(5);

pub const PORT: u16 = 8080;
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);

/// A node with three pods in the namespace `shop`, all of which serve TCP and UDP.
pub struct Shop {
    pub lab: Lab,
    pub manifests: Manifests,
    _servers: Vec<Server>,
}

impl Shop {
    pub fn open() -> Self {
        let lab = Lab::new(LabOptions::default());
        // The kernel forgets flows without packets after 30 s, which a test may take.
        lab.node().ns().sysctls(&[
            ("net.netfilter.nf_conntrack_udp_timeout", "3600"),
            ("net.netfilter.nf_conntrack_udp_timeout_stream", "3600"),
        ]);
        let manifests = Manifests::new();
        manifests.put(&namespace("shop", &[]));
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

    pub fn run(&self, more: &[&str]) -> Daemon {
        let arguments = [&["--cluster-cidr", CLUSTER_CIDR], more].concat();
        self.manifests.run(self.node(), &arguments)
    }

    pub fn node(&self) -> &Namespace {
        self.lab.node().ns()
    }

    pub fn pod(&self, number: usize) -> &Machine {
        self.lab.pods()[number - 1]
    }

    /// Isolates pod-1; only the outside still reaches it.
    pub fn isolate(&self) {
        self.policy("web", &json!({}));
        self.wait_until_in_force("policy-ingress-shop/web");
    }

    pub fn policy(&self, name: &str, patch: &Value) {
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
        self.manifests.put(&policy(name, spec));
    }

    /// Waits until the rules of both families have a word in them.
    pub fn wait_until_in_force(&self, word: &str) {
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

    /// The connections that the node tracks between two machines, in both directions.
    pub fn tracked(&self, one: &Machine, other: &Machine) -> Vec<Tracked> {
        let has = |machine: &Machine, tracked: &Tracked| {
            let ends = [tracked.source, tracked.replier];
            machine.addresses().iter().any(|ip| ends.contains(ip))
        };
        self.node().run(|| {
            let mut found = Vec::new();
            let mut conntrack = Conntrack::open().unwrap();
            for family in [TableFamily::Ip, TableFamily::Ip6] {
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

pub fn put_pod(manifests: &Manifests, name: &str, addresses: &[IpAddr]) {
    manifests.put(&pod(name, "node-1", &[("pod", name)], addresses));
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
        "denied ingress TCP shop/pod-2 (10.244.1.12:40001) -> shop/pod-1 (10.244.1.11:8080), \
         by shop/web",
        "denied ingress UDP shop/pod-2 ([fd00:10:244:1::12]:40002) -> \
         shop/pod-1 ([fd00:10:244:1::11]:8080), by shop/web",
        "denied egress UDP shop/pod-1 (10.244.1.11:40003) -> 192.168.10.100:8080, by shop/web",
    ] {
        wait_for(line, LONG, || daemon.log().contains(line).then_some(()));
    }
    // Allowed packets are not logged.
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
    assert_eq!(field("policies"), json!("shop/web"));
}

#[test]
fn a_log_group_in_use_is_a_warning_and_policies_are_enforced() {
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
pub struct Scrape(String);

impl Scrape {
    pub fn value(&self, series: &str) -> Option<f64> {
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

pub fn scrape(node: &Namespace) -> Scrape {
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
    assert_eq!(drops("ingress"), None, "no pod is isolated");
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
fn a_bridge_that_bypasses_policies_is_reported() {
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
    assert_eq!(gauge(), Some(0.0), "no pod is isolated");
    manifests.put(&policy("closed", json!({"podSelector": {}})));
    let warning = "bridge cni0: pod-to-pod IPv4 traffic bypasses NetworkPolicy";
    wait_for(warning, LONG, || {
        daemon.log().contains(warning).then_some(())
    });
    wait_for("the gauge", LONG, || (gauge() == Some(1.0)).then_some(()));

    // Another isolated pod is a reason to look again, but none to say it again.
    put_pod(&manifests, "db", &[ip(12)]);
    let isolated = || scrape(&node).value("nftlet_policy_isolated_pods");
    wait_for("the pod", LONG, || (isolated() == Some(2.0)).then_some(()));
    manifests.remove("NetworkPolicy", "closed");
    let over = "bridge cni0: pod-to-pod IPv4 traffic no longer bypasses NetworkPolicy";
    wait_for(over, LONG, || daemon.log().contains(over).then_some(()));
    wait_for("the gauge", LONG, || (gauge() == Some(0.0)).then_some(()));
    assert_eq!(daemon.log().matches(warning).count(), 1, "{}", daemon.log());
}

#[test]
fn rules_do_not_log_without_a_reader() {
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
