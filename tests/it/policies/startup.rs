//! Pods that can neither send nor receive before they are known (`--pod-startup=closed`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::live::{FORBIDDEN, Load, become_true};
use crate::support::agent::{NFTLET, get, metric, one_line, wait_for_log};
use crate::support::manifests::CLUSTER_CIDR;
use crate::support::objects::{namespace, policy};
use crate::support::reach::{Case, Probe, check};
use crate::support::shop::{Shop, pod};
use nftlet_lab::fake_api::{FakeApi, NAMESPACES, NODES, PODS, POLICIES};
use nftlet_lab::netns::{
    Ask, Daemon, Machine, Namespace, PATIENCE, Protocol, Server, require_net_admin, wait_for,
};
use nix::net::if_::if_nametoindex;
use rustix::net::sockopt;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use Probe::{Ping, Tcp, Udp};

/// The pod network by the ranges of the Node, and by the interfaces of the laboratory.
const ADDRESSES: &[&str] = &["--pod-startup=closed"];
const INTERFACES: &[&str] = &[
    "--pod-startup=closed",
    "--detect-local-mode=InterfaceNamePrefix",
    "--pod-interface-name-prefix=veth",
];
/// Beside another proxy.
const WITHOUT_SERVICES: &[&str] = &["--pod-startup=closed", "--services=off"];
const METRICS: &str = "127.0.0.1:10249";

/// What the chain of unknown pods has dropped in both families.
#[track_caller]
fn dropped(node: &Namespace) -> u64 {
    let of_family = |family| {
        let chain = node.nft(&["list", "chain", family, "nftlet-policy", "unknown-pod"]);
        let mut words = chain.split_whitespace();
        let packets = words.by_ref().skip_while(|word| *word != "packets").nth(1);
        let packets = packets.and_then(|packets| packets.parse::<u64>().ok());
        packets.expect("a counter of packets")
    };
    of_family("ip") + of_family("ip6")
}

/// Requests in both directions between a pod, another pod, the world outside and its node.
fn around(shop: &Shop, pod: &Machine, other: &Machine, passes: bool) -> Vec<Case> {
    let (client, node) = (shop.lab.client(), &shop.lab.node().machine);
    let mut cases = Vec::new();
    for probe in [Tcp(80), Udp(80), Ping] {
        for (from, to) in [
            (pod, other),
            (other, pod),
            (pod, client),
            (client, pod),
            (pod, node),
        ] {
            cases.extend(Case::both(from, to, probe, passes));
        }
    }
    cases
}

/// Probes of the kubelet.
fn probes(shop: &Shop, pod: &Machine) -> Vec<Case> {
    let node = &shop.lab.node().machine;
    let probes = [Tcp(80), Udp(80), Ping].into_iter();
    probes
        .flat_map(|probe| Case::both(node, pod, probe, true))
        .collect()
}

#[test]
fn a_pod_opens_with_its_status_and_never_before_its_policies() {
    if !require_net_admin() {
        return;
    }
    for form in [ADDRESSES, INTERFACES] {
        let shop = Shop::open();
        let [web, db, _] = shop.pods();
        shop.manifests.remove("Pod", "web");
        // It may send to one port only.
        let port = json!({"ports": [{"port": 80}, {"port": 80, "protocol": "UDP"}]});
        let spec = json!({"podSelector": {"matchLabels": {"app": "web"}},
            "policyTypes": ["Egress"], "egress": [port]});
        shop.manifests.put(&policy("web", spec));
        let _daemon = shop.manifests.run(shop.node(), form);
        let before = dropped(shop.node());
        check(&around(&shop, &web, &db, false));
        assert!(dropped(shop.node()) >= before + 30);
        check(&probes(&shop, &web));
        check(&around(&shop, &db, shop.lab.client(), true)[..6]);

        let forbidden = db.serve(Protocol::Udp, FORBIDDEN);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            // A datagram a moment, before and after it is known.
            scope.spawn(|| {
                web.ns.enter();
                let sockets = db.addresses().map(|to| {
                    let any = match to {
                        IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
                        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
                    };
                    (UdpSocket::bind((any, 0)).expect("a socket"), to)
                });
                while !stop.load(Ordering::Relaxed) {
                    for (socket, to) in &sockets {
                        socket.send_to(b"?", (*to, FORBIDDEN)).expect("it is sent");
                    }
                    thread::yield_now();
                }
            });
            let sending = dropped(shop.node());
            wait_for("datagrams", PATIENCE, || {
                (dropped(shop.node()) > sending + 100).then_some(())
            });
            shop.manifests
                .put(&pod("shop", "web", &[("app", "web")], &web));
            let allowed: Vec<Case> = [Case::both(&web, &db, Tcp(80), true)].concat();
            become_true(&allowed);
            become_true(&Case::both(&db, &web, Tcp(80), true));
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(forbidden.each_ref().map(Server::served), [0, 0]);
        // And closes with its end.
        shop.manifests.remove("Pod", "web");
        become_true(&around(&shop, &web, &db, false));
    }
}

/// A port of a node at which datagrams to a group or to all arrive.
fn listen(node: &Namespace, group: Option<Ipv4Addr>) -> UdpSocket {
    node.run(|| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
        if let Some(group) = group {
            // The link of the first pod; all have the address of the gateway.
            let link = if_nametoindex("veth1").expect("a link");
            let any = Ipv4Addr::UNSPECIFIED;
            sockopt::set_ip_add_membership_with_ifindex(&socket, &group, &any, link)
                .expect("a group");
        }
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        socket
    })
}

#[test]
fn what_a_link_needs_passes_before_a_pod_is_known() {
    if !require_net_admin() {
        return;
    }
    for form in [ADDRESSES, INTERFACES] {
        let shop = Shop::open();
        let [web, db, _] = shop.pods();
        shop.manifests.remove("Pod", "web");
        let node = &shop.lab.node().machine;
        let _daemon = shop.manifests.run(shop.node(), form);
        check(&Case::both(&web, node, Udp(80), false));

        // Neighbours find each other anew.
        for ns in [&web.ns, shop.node()] {
            ns.ip("neigh flush all");
        }
        check(&probes(&shop, &web));

        let dhcp = [(node.v4.into(), 67), (IpAddr::from(node.v6), 547)];
        for (address, port) in dhcp {
            let at = SocketAddr::new(address, port);
            let _server = Server::start(shop.node(), Protocol::Udp, at, "dhcp");
            let ask = Ask::new(Protocol::Udp, at);
            web.ns.run(|| ask.send()).expect("an answer of the server");
        }

        // The node's own address in the pod network.
        for gateway in ["10.244.1.1", "fd00:10:244:1::1"] {
            let at = SocketAddr::new(gateway.parse().expect("an address"), 9200);
            let server = Server::start(shop.node(), Protocol::Tcp, at, "gateway");
            let ask = Ask::new(Protocol::Tcp, at);
            for from in [shop.node(), &shop.lab.client().ns, &db.ns] {
                from.run(|| ask.send()).expect("an answer of the gateway");
            }
            let before = dropped(shop.node());
            let asked = web.ns.run(|| ask.timeout(PATIENCE / 1000).send());
            asked.expect_err("it is not known");
            assert!(dropped(shop.node()) > before);
            assert_eq!(server.served(), 3);
        }

        for (to, group) in [
            (Ipv4Addr::BROADCAST, None),
            (
                Ipv4Addr::new(239, 1, 1, 1),
                Some(Ipv4Addr::new(239, 1, 1, 1)),
            ),
        ] {
            let socket = listen(shop.node(), group);
            let port = socket.local_addr().expect("an address").port();
            web.ns.run(|| {
                let sender = UdpSocket::bind((web.v4, 0)).expect("a socket");
                sender.set_broadcast(true).expect("it may");
                sender.send_to(b"?", (to, port)).expect("it is sent");
            });
            let (length, from) = socket.recv_from(&mut [0; 8]).expect("it arrives");
            assert_eq!((length, from.ip()), (1, web.v4.into()));
        }
    }
}

/// An API server at the node of a shop.
struct Api {
    api: FakeApi,
    directory: TempDir,
    /// Last, so that the server's tasks have something to end in.
    runtime: Runtime,
}

impl Api {
    /// It has the node, the namespaces and these pods.
    fn new(shop: &Shop, pods: &[&Value]) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let api = shop.node().run(|| runtime.block_on(FakeApi::start()));
        let ranges = shop.lab.node().pod_ranges();
        api.put(
            NODES,
            json!({"metadata": {"name": "node-1"}, "spec": {"podCIDRs": ranges}}),
        );
        for name in ["shop", "store"] {
            api.put(NAMESPACES, namespace(name, &[]));
        }
        for pod in pods {
            api.put(PODS, (*pod).clone());
        }
        let directory = tempfile::tempdir().expect("a directory");
        Self {
            api,
            directory,
            runtime,
        }
    }

    fn start(&self, shop: &Shop, more: &[&str]) -> Daemon {
        let kubeconfig = self.api.write_kubeconfig(self.directory.path());
        let kubeconfig = kubeconfig.to_str().expect("a path in UTF-8");
        let fixed = [
            "--kubeconfig",
            kubeconfig,
            "--hostname-override=node-1",
            "--cluster-cidr",
            CLUSTER_CIDR,
            "--metrics-bind-address",
            METRICS,
            "--healthz-bind-address=",
        ];
        Daemon::start(shop.node(), NFTLET, fixed.iter().chain(more))
    }

    fn set_down(&self, down: bool) {
        self.runtime.block_on(self.api.set_down(down));
    }

    fn wait_until_watched(&self, path: &str) {
        self.runtime.block_on(self.api.until_watched(path, 1));
    }
}

fn in_force(shop: &Shop) -> bool {
    let (_, page) = get(shop.node(), METRICS, "/metrics");
    metric(&page, "nftlet_network_policies_in_force") == 1.0
}

#[test]
fn after_a_boot_nothing_passes_before_the_lists() {
    if !require_net_admin() {
        return;
    }
    for form in [ADDRESSES, INTERFACES, WITHOUT_SERVICES] {
        let shop = Shop::open();
        let [web, db, api] = shop.pods();
        let objects = [("web", &web), ("db", &db)];
        let objects = objects.map(|(name, at)| pod("shop", name, &[("app", name)], at));
        let cluster = Api::new(&shop, &[&objects[0], &objects[1]]);
        assert!(!shop.rules().contains("nftlet"));
        check(&around(&shop, &web, &db, true));
        // The server comes later, and does not answer for the pods.
        cluster.api.set_busy(PODS, Some(1));
        let by_interface = form == INTERFACES;
        cluster.set_down(by_interface);
        let _daemon = cluster.start(&shop, form);
        become_true(&around(&shop, &web, &db, false));
        cluster.set_down(false);
        cluster.wait_until_watched(POLICIES);
        check(&around(&shop, &web, &db, false));
        check(&probes(&shop, &web));
        assert!(!in_force(&shop));
        cluster.api.set_busy(PODS, None);
        become_true(&around(&shop, &web, &db, true));
        check(&around(&shop, &api, &db, false));
        wait_for("the policies", PATIENCE, || in_force(&shop).then_some(()));
    }
}

#[test]
fn without_the_right_to_read_policies_only_known_pods_pass() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let objects = [("web", &web), ("db", &db)];
    let objects = objects.map(|(name, at)| pod("shop", name, &[("app", name)], at));
    let cluster = Api::new(&shop, &[&objects[0], &objects[1]]);
    cluster.api.forbid(POLICIES, true);
    let mut daemon = cluster.start(&shop, ADDRESSES);
    // The pods are read, but not what holds for them.
    cluster.wait_until_watched(PODS);
    wait_for_log(&daemon, "rules are in place");
    check(&around(&shop, &web, &db, false));
    check(&probes(&shop, &web));
    assert!(!in_force(&shop));
    cluster.api.forbid(POLICIES, false);
    become_true(&around(&shop, &web, &db, true));

    // After a restart those go on, and others do not begin.
    daemon.kill();
    cluster.api.forbid(POLICIES, true);
    let new = pod("store", "api", &[("app", "api")], &api);
    cluster.api.put(PODS, new);
    let daemon = cluster.start(&shop, ADDRESSES);
    cluster.wait_until_watched(PODS);
    wait_for_log(&daemon, "rules are in place");
    check(&around(&shop, &web, &db, true));
    check(&around(&shop, &api, &db, false));
    // What another process removes is closed again.
    shop.node().nft(&["flush", "ruleset"]);
    become_true(&around(&shop, &api, &db, false));
    cluster.api.forbid(POLICIES, false);
    become_true(&around(&shop, &api, &web, true));
}

#[test]
fn a_restart_interrupts_no_known_pod_and_opens_no_other() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    shop.manifests.remove("Pod", "api");
    let run = || shop.manifests.run(shop.node(), ADDRESSES);
    let mut daemon = run();
    let load = Load::start(&web, &db, &[&api]);
    for _ in 0..2 {
        load.more(200);
        let status = daemon.stop(PATIENCE);
        assert!(status.is_some_and(|it| it.success()), "{}", daemon.log());
        load.more(200);
        let mut crashed = run();
        load.more(200);
        crashed.kill();
        load.more(200);
        daemon = run();
    }
    load.finish();
}

#[test]
fn a_pod_outside_of_the_network_is_reported() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    shop.manifests
        .node(&json!({"spec": {"podCIDRs": ["10.244.9.0/24"]}}));
    let metrics = ["--metrics-bind-address", METRICS];
    let arguments = [ADDRESSES, &metrics].concat();
    let daemon = shop.manifests.run(shop.node(), &arguments);
    wait_for_log(
        &daemon,
        "Pod shop/web: its address 10.244.1.11 is outside of spec.podCIDRs of the Node \
         (10.244.9.0/24)",
    );
    assert!(!in_force(&shop));
    shop.manifests.node(&Value::Null);
    wait_for("the policies", PATIENCE, || in_force(&shop).then_some(()));
}

#[test]
fn without_a_pod_network_it_does_not_start() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    shop.manifests.node(&json!({"spec": {"podCIDRs": []}}));
    let run = |more: &[&str]| {
        let arguments = shop.manifests.arguments(more);
        crate::support::agent::nftlet(shop.node(), &arguments, "")
    };
    let line = one_line(&run(&["--pod-startup=closed", "--dry-run"]));
    assert!(
        line.contains("Node node-1 has no spec.podCIDRs, which --pod-startup=closed needs"),
        "{line}"
    );
    for (other, fault) in [
        ("--network-policy=off", "needs --network-policy=on"),
        ("--once", "cannot be combined with --once"),
    ] {
        let output = run(&["--pod-startup=closed", other]);
        assert_eq!(output.status.code(), Some(2));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(fault), "{said}");
    }
    assert!(!shop.rules().contains("nftlet"));
}
