//! Network policies where the pods hang on a bridge of the node. What passes between two of them
//! meets the rules because br_netfilter shows bridged packets to them.

mod common;
#[path = "common/reach.rs"]
mod reach;
#[path = "common/shop.rs"]
mod shop;

use std::net::IpAddr;

use common::manifests::{Backend, Manifests, Service};
use common::netns::{Machine, Namespace, Server, require_net_admin};
use common::skip::skip;
use reach::{Case, Probe, check, check_counted};
use serde_json::json;
use shop::{pod, policy};

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
        manifests.put(&shop::namespace("shop", &[]));
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
    bridge.put_and_apply(&policy("shop", "web", spec.clone()));
    check_counted(&nodes, &cases(true, false, true));
    spec["policyTypes"] = json!(["Ingress", "Egress"]);
    bridge.put_and_apply(&policy("shop", "web", spec.clone()));
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
    bridge.put_and_apply(&policy("shop", "web", spec));
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
