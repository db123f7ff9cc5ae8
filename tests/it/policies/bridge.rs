//! Network policies where the pods hang on a bridge of the node. What passes between two of them
//! meets the rules because br_netfilter shows bridged packets to them.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use crate::support::agent::wait_for_rules;
use crate::support::manifests::{Backend, Manifests, Service};
use crate::support::objects::{namespace, policy};
use crate::support::reach::{Case, Probe, check, check_counted};
use crate::support::shop;
use crate::support::shop::pod;
use crate::support::skip::skip;
use nftlet_lab::netns::{Ask, Machine, Namespace, Protocol, Server, require_net_admin, wait_for};
use serde_json::json;

use Probe::{Ping, Tcp, Udp};

/// Three pods on the bridge of a node.
struct Bridge {
    node: Machine,
    pods: [Machine; 3],
    manifests: Manifests,
    _servers: Vec<Server>,
}

impl Bridge {
    fn new() -> Self {
        let machine = |name: &str, host: u8| Machine {
            name: name.into(),
            ns: Namespace::new(name),
            v4: [10, 244, 1, host].into(),
            v6: format!("fd00:10:244:1::{host}")
                .parse()
                .expect("an address"),
        };
        let node = machine("node-1", 1);
        node.ns.ip_batch([
            "link add br0 type bridge stp_state 0 mcast_snooping 0 forward_delay 0",
            "link set br0 up",
        ]);
        node.ns.addr_add("br0", "10.244.1.1/24");
        node.ns.addr_add("br0", "fd00:10:244:1::1/64");
        // Where services seem to be, until they are translated.
        node.ns.route_add("10.96.0.0/16", "dev br0");
        node.ns.route_add("fd00:10:96::/112", "dev br0");
        node.ns.sysctls(&[
            ("net.ipv4.ip_forward", "1"),
            ("net.ipv6.conf.all.forwarding", "1"),
        ]);
        let pods = [("web", 11), ("db", 12), ("api", 13)].map(|(name, host)| {
            let pod = machine(name, host);
            node.ns.veth(&format!("veth-{name}"), &pod.ns, "eth0");
            node.ns.ip_batch([
                format!("link set veth-{name} master br0"),
                // A pod that reaches itself through its service comes back by its own port.
                format!("link set veth-{name} type bridge_slave hairpin on"),
            ]);
            pod.ns.addr_add("eth0", &format!("{}/24", pod.v4));
            pod.ns.addr_add("eth0", &format!("{}/64", pod.v6));
            pod.ns.route_add("default", "via 10.244.1.1");
            pod.ns.route_add("default", "via fd00:10:244:1::1");
            pod
        });
        let manifests = Manifests::new();
        manifests.put(&namespace("shop", &[]));
        for machine in &pods {
            let name = machine.name.as_str();
            manifests.put(&pod("shop", name, &[("app", name)], machine));
        }
        let machines: Vec<&Machine> = pods.iter().chain([&node]).collect();
        Self {
            _servers: shop::serve(&machines),
            node,
            pods,
            manifests,
        }
    }

    #[track_caller]
    fn put_and_apply(&self, object: &serde_json::Value) {
        self.manifests.put(object);
        self.manifests.program(&self.node.ns, &[]);
    }
}

/// Whether bridged packets can meet rules here; says loudly if not.
fn bridged_packets_meet_rules(node: &Namespace) -> bool {
    let known = node.run(|| std::fs::exists("/proc/sys/net/bridge/bridge-nf-call-iptables"));
    if known.is_ok_and(|known| known) {
        node.sysctls(&[
            ("net.bridge.bridge-nf-call-iptables", "1"),
            ("net.bridge.bridge-nf-call-ip6tables", "1"),
        ]);
        return true;
    }
    let why = "the kernel lacks it; load the module. Pods and their node are tested.";
    skip("br_netfilter", why);
    false
}

#[test]
fn policies_hold_between_pods_of_one_bridge() {
    if !require_net_admin() {
        return;
    }
    let bridge = Bridge::new();
    let [web, db, api] = &bridge.pods;
    let between = bridged_packets_meet_rules(&bridge.node.ns);
    let nodes = [&bridge.node.ns];
    let cases = |from_db: bool, from_api: bool, to_node: bool| {
        let mut cases = Vec::new();
        for probe in [Tcp(80), Udp(80), Ping] {
            cases.extend(Case::both(&bridge.node, web, probe, true));
            cases.extend(Case::both(web, &bridge.node, probe, to_node));
            cases.extend(Case::both(web, web, probe, true));
            if between {
                cases.extend(Case::both(db, web, probe, from_db));
                cases.extend(Case::both(api, web, probe, from_api));
                cases.extend(Case::both(web, api, probe, to_node));
            }
        }
        cases
    };
    bridge.manifests.program(&bridge.node.ns, &[]);
    check(&cases(true, true, true));
    let mut spec = json!({
        "podSelector": {"matchLabels": {"app": "web"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "db"}}}]}],
    });
    bridge.put_and_apply(&policy("web", spec.clone()));
    check_counted(&nodes, &cases(true, false, true));
    spec["policyTypes"] = json!(["Ingress", "Egress"]);
    bridge.put_and_apply(&policy("web", spec.clone()));
    // Neighbours must be found anew, past all that is denied.
    for machine in bridge.pods.iter().chain([&bridge.node]) {
        machine.ns.ip("neigh flush all");
    }
    check_counted(&nodes, &cases(true, false, false));
    bridge
        .manifests
        .put(&pod("shop", "db", &[("app", "x")], db));
    bridge.put_and_apply(&pod("shop", "api", &[("app", "db")], api));
    check_counted(&nodes, &cases(false, true, false));
}

#[test]
fn services_of_bridged_pods_are_judged_by_the_pod() {
    if !require_net_admin() {
        return;
    }
    let bridge = Bridge::new();
    let [web, db, api] = &bridge.pods;
    let between = bridged_packets_meet_rules(&bridge.node.ns);
    let service = Service::new("web", 10).port("http", "TCP", 80, None);
    bridge.manifests.service(&service);
    let backends = web.addresses().map(|ip| Backend::new(ip, "node-1"));
    bridge.manifests.backends(&service, 8080, &backends);
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress", "Egress"],
        "ingress": [{
            "from": [{"podSelector": {"matchLabels": {"app": "db"}}}],
            "ports": [{"port": "http"}],
        }],
    });
    bridge.put_and_apply(&policy("web", spec));
    let to_service = |from: &Machine, passes| {
        ["10.96.0.10", "fd00:10:96::a"].map(|to| Case {
            from: from.clone(),
            to: to.parse::<IpAddr>().expect("an address"),
            probe: Tcp(80),
            passes,
        })
    };
    let mut cases = to_service(&bridge.node, true).to_vec();
    if between {
        cases.extend(to_service(db, true));
        cases.extend(to_service(api, false));
        cases.extend(to_service(web, true));
    }
    check_counted(&[&bridge.node.ns], &cases);
}

#[test]
fn the_bridge_is_closed_to_pods_that_are_not_known() {
    if !require_net_admin() {
        return;
    }
    let bridge = Bridge::new();
    let [web, db, api] = &bridge.pods;
    let node = &bridge.node;
    let between = bridged_packets_meet_rules(&node.ns);
    bridge.manifests.remove("Pod", "web");
    let closed = [
        "--pod-startup=closed",
        "--detect-local-mode=BridgeInterface",
        "--pod-bridge-interface=br0",
    ];
    let _daemon = bridge.manifests.run(&node.ns, &closed);
    for machine in bridge.pods.iter().chain([node]) {
        machine.ns.ip("neigh flush all");
    }
    let cases = |known: bool| {
        let mut cases = Vec::new();
        for probe in [Tcp(80), Udp(80), Ping] {
            cases.extend(Case::both(node, web, probe, true));
            cases.extend(Case::both(web, node, probe, known));
            cases.extend(Case::both(db, node, probe, true));
            if between {
                cases.extend(Case::both(web, db, probe, known));
                cases.extend(Case::both(db, web, probe, known));
                cases.extend(Case::both(db, api, probe, true));
            }
        }
        cases
    };
    check(&cases(false));
    bridge
        .manifests
        .put(&pod("shop", "web", &[("app", "web")], web));
    super::live::become_true(&cases(true));
}

/// The link-local address of a device, and the number by which its own namespace knows the device.
fn link_local(ns: &Namespace, device: &str) -> (Ipv6Addr, u32) {
    wait_for("a link-local address", Duration::from_secs(60), || {
        let list = ["-6", "-o", "addr", "show", "dev", device, "scope", "link"];
        let output = ns.command("ip").args(list).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let mut words = text.split_whitespace();
        let index = words.next()?.trim_end_matches(':').parse().ok()?;
        let address = words.find_map(|word| word.strip_suffix("/64"))?;
        (!text.contains("tentative")).then_some((address.parse().ok()?, index))
    })
}

/// An end of a link, known by its link-local address there.
struct Linked<'a> {
    ns: &'a Namespace,
    address: Ipv6Addr,
    index: u32,
    _servers: [Server; 2],
}

impl<'a> Linked<'a> {
    fn new(ns: &'a Namespace, device: &str) -> Self {
        let (address, index) = link_local(ns, device);
        let at = SocketAddr::V6(SocketAddrV6::new(address, 80, 0, index));
        let serve = |protocol| Server::start(ns, protocol, at, device);
        Self {
            ns,
            address,
            index,
            _servers: [Protocol::Tcp, Protocol::Udp].map(serve),
        }
    }

    /// Whether both protocols reach another one, or neither does.
    #[track_caller]
    fn reaches(&self, other: &Self, passes: bool) {
        let to = SocketAddr::V6(SocketAddrV6::new(other.address, 80, 0, self.index));
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let timeout = Duration::from_millis(if passes { 20_000 } else { 300 });
            let ask = Ask::new(protocol, to).timeout(timeout);
            let answer = self.ns.run(|| ask.send());
            assert_eq!(answer.is_ok(), passes, "{protocol:?} to {to}: {answer:?}");
        }
    }
}

#[test]
fn link_local_addresses_are_no_way_past_the_policies() {
    if !require_net_admin() {
        return;
    }
    let bridge = Bridge::new();
    let node = &bridge.node.ns;
    let between = bridged_packets_meet_rules(node);
    // Others than pods have a bridge of their own.
    node.ip_batch([
        "link add br1 type bridge stp_state 0 mcast_snooping 0 forward_delay 0",
        "link set br1 up",
    ]);
    let others = ["guest-1", "guest-2"].map(|name| {
        let guest = Namespace::new(name);
        node.veth(&format!("veth-{name}"), &guest, "eth0");
        node.ip(&format!("link set veth-{name} master br1"));
        guest
    });
    let [web, db, api] = bridge
        .pods
        .each_ref()
        .map(|pod| Linked::new(&pod.ns, "eth0"));
    let host = Linked::new(node, "br0");
    let [one, other] = others.each_ref().map(|guest| Linked::new(guest, "eth0"));
    let check = |into_web: bool, out_of_web: bool| {
        web.reaches(&host, out_of_web);
        host.reaches(&web, true);
        if between {
            db.reaches(&web, into_web);
            web.reaches(&db, out_of_web && into_web);
        }
        one.reaches(&other, true);
    };
    bridge.manifests.program(node, &[]);
    check(true, true);
    let mut spec = json!({"podSelector": {"matchLabels": {"app": "web"}}});
    bridge.put_and_apply(&policy("web", spec.clone()));
    check(false, true);
    spec["policyTypes"] = json!(["Egress"]);
    bridge.put_and_apply(&policy("web", spec));
    for machine in bridge.pods.iter().chain([&bridge.node]) {
        machine.ns.ip("neigh flush all");
    }
    web.reaches(&host, false);
    host.reaches(&web, true);
    one.reaches(&other, true);
    if between {
        web.reaches(&db, false);
        // The pod of such packets is unknown, so this holds for all pods of the bridge.
        api.reaches(&db, false);
    }
    bridge.manifests.remove("NetworkPolicy", "web");
    bridge.manifests.program(node, &[]);
    check(true, true);
}

/// Waits until the sets of interfaces of isolated pods name an interface, or none does.
#[track_caller]
fn wait_for_link(node: &Namespace, interface: &str, there: bool) {
    let quoted = format!("elements = {{ \"{interface}\" }}");
    wait_for_rules(node, &format!("{interface}: {there}"), |rules| {
        rules.contains("set egress-links") && rules.contains(&quoted) == there
    });
}

#[test]
fn link_local_rules_follow_the_routes_of_the_host() {
    if !require_net_admin() {
        return;
    }
    let bridge = Bridge::new();
    let node = &bridge.node.ns;
    // The pods have interfaces before the host has routes to them.
    for address in ["10.244.1.1/24", "fd00:10:244:1::1/64"] {
        node.ip(&format!("addr del {address} dev br0"));
    }
    let web = Linked::new(&bridge.pods[0].ns, "eth0");
    let host = Linked::new(node, "br0");
    bridge.manifests.put(&policy(
        "web",
        json!({"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Egress"]}),
    ));
    let daemon = bridge.manifests.run(node, &[]);
    wait_for_link(node, "br0", false);
    web.reaches(&host, true);
    let v4 = "10.244.1.11/32";
    node.route_add(v4, "dev br0");
    wait_for_link(node, "br0", true);
    web.reaches(&host, false);
    node.ip(&format!("route del {v4}"));
    wait_for_link(node, "br0", false);
    web.reaches(&host, true);
    node.route_add("fd00:10:244:1::/64", "dev br0");
    wait_for_link(node, "br0", true);
    web.reaches(&host, false);
    // An interface takes its routes along.
    node.ip("link set br0 down");
    wait_for_link(node, "br0", false);
    assert!(!daemon.log().contains("WARN"), "{}", daemon.log());
}
