//! Policies without services (`--services=off`): beside kube-proxy's rules, beside IPVS, and by the
//! rules alone.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use super::reject::{answers, checksum, count_answers};
use crate::support::kube_proxy::{self, Frontend, Iptables};
use crate::support::manifests::Manifests;
use crate::support::objects::{namespace, pod, policy};
use crate::support::policy::walk::{Packet, walk};
use crate::support::reach::{Case, Probe, check_counted, denied};
use crate::support::shop::Shop;
use crate::support::skip::skip;
use nftlet::engine::{BUDGET, Engine as _};
use nftlet::nft::{CtState, Hook, Ruleset};
use nftlet::policies::{Engine, PolicySettings};
use nftlet::source;
use nftlet_lab::netns::{
    LabOptions, Machine, Namespace, PATIENCE, Protocol, require_net_admin, wait_for,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto, socket};
use serde_json::{Value, json};

use Probe::{Tcp, Udp};

const OFF: &str = "--services=off";
/// The ClusterIPs of the service web.
const CLUSTER_IPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::a"];
const NODE_PORT: u16 = 30080;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// The endpoint of the service web in each family.
fn endpoints(web: &Machine) -> [SocketAddr; 2] {
    web.addresses()
        .map(|address| SocketAddr::new(address, 8080))
}

/// The modes of kube-proxy that translate in the prerouting hook.
#[derive(Clone, Copy)]
enum Mode {
    Nftables,
    Iptables,
}

/// Loads kube-proxy's rules for the service web.
fn load_kube_proxy(mode: Mode, node: &Machine, web: &Machine) {
    let pods = ["10.244.0.0/16", "fd00:10:244::/48"];
    let ranges = ["10.96.0.0/16", "fd00:10:96::/112"];
    for (index, endpoint) in endpoints(web).into_iter().enumerate() {
        let frontend = Frontend {
            name: "shop/web:http".to_owned(),
            cluster: SocketAddr::new(ip(CLUSTER_IPS[index]), 80),
            node_port: Some(NODE_PORT),
            endpoints: vec![endpoint],
        };
        let address = node.addresses()[index];
        let (pods, range) = (pods[index], ranges[index]);
        match mode {
            Mode::Nftables => {
                let table = kube_proxy::nftables(address, pods, range, &[frontend]);
                node.ns.nft_load(&table);
            }
            Mode::Iptables => {
                let text = kube_proxy::iptables(address, pods, &[frontend]);
                Iptables::Nft.load(&node.ns, address.is_ipv6(), &text);
            }
        }
    }
}

/// Cases to the service web.
fn to_service(from: &Machine, passes: bool) -> [Case; 2] {
    CLUSTER_IPS.map(|to| Case {
        from: from.clone(),
        to: ip(to),
        probe: Tcp(80),
        passes,
    })
}

/// Cases to the service web through a node's port.
fn to_node_port(from: &Machine, node: &Machine, passes: bool) -> [Case; 2] {
    Case::both(from, node, Tcp(NODE_PORT), passes)
}

/// Lets pods of an application, and addresses of machines, reach web.
fn into_web(app: &str, machines: &[&Machine]) -> Value {
    let pods = json!({"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": app}}});
    let mut from = vec![pods];
    for address in machines.iter().flat_map(|machine| machine.addresses()) {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        from.push(json!({"ipBlock": {"cidr": format!("{address}/{bits}")}}));
    }
    let rule = json!({"from": from, "ports": [{"port": 8080}]});
    let spec = json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [rule]});
    policy("web", spec)
}

/// Lets db reach the pods of an application on the endpoints' port.
fn out_of_db(app: &str) -> Value {
    let to = json!({"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": app}}});
    let rule = json!({"to": [to], "ports": [{"port": 8080}]});
    let spec = json!({"podSelector": {"matchLabels": {"app": "db"}},
        "policyTypes": ["Egress"], "egress": [rule]});
    policy("db", spec)
}

/// The tables of a node: family and name.
fn tables(node: &Namespace) -> Vec<String> {
    let listed = node.nft(&["list", "tables"]);
    listed.lines().map(str::to_owned).collect()
}

#[test]
fn services_of_kube_proxy_are_judged_by_endpoint_and_client() {
    if require_net_admin() {
        judge_services_of_kube_proxy(Mode::Nftables);
    }
}

#[test]
fn services_of_kube_proxy_in_iptables_are_judged_by_endpoint_and_client() {
    if require_net_admin() {
        judge_services_of_kube_proxy(Mode::Iptables);
    }
}

fn judge_services_of_kube_proxy(mode: Mode) {
    let shop = Shop::with(LabOptions {
        nodes: 2,
        ..LabOptions::default()
    });
    let [web, db, api] = shop.pods();
    let [own, other] = [0, 1].map(|index| shop.lab.nodes[index].machine.clone());
    let client = shop.lab.client();
    for node in [&own, &other] {
        load_kube_proxy(mode, node, &web);
    }
    let check = |objects: &[Value], cases: &[[Case; 2]]| {
        for object in objects {
            shop.manifests.put(object);
        }
        shop.manifests.program(&own.ns, &[OFF]);
        check_counted(&[&own.ns], &cases.concat());
    };
    // Pods have their own addresses, on both sides.
    check(
        &[into_web("db", &[]), out_of_db("web")],
        &[
            to_service(&db, true),
            to_service(&api, false),
            to_service(&own, true),
            to_node_port(client, &own, false),
        ],
    );
    check(
        &[out_of_db("api")],
        &[
            to_service(&db, false),
            Case::both(&db, &api, Tcp(8080), true),
        ],
    );
    // The node of the endpoint sees a client before the masquerading; another node's client has the
    // address of that node.
    check(
        &[into_web("api", &[client])],
        &[
            to_service(&api, true),
            to_node_port(client, &own, true),
            to_node_port(client, &other, false),
        ],
    );
    check(
        &[into_web("api", &[&other])],
        &[
            to_node_port(client, &own, false),
            to_node_port(client, &other, true),
        ],
    );
}

#[test]
fn the_tables_of_services_go_and_come_with_the_flag() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    let own = [
        "table ip nftlet",
        "table ip nftlet-policy",
        "table ip6 nftlet",
        "table ip6 nftlet-policy",
    ];
    let policies = [own[1], own[3]];
    let proxy = ["table ip kube-proxy", "table ip6 kube-proxy"];
    shop.manifests.put(&into_web("api", &[]));
    shop.apply();
    let mut cases = Case::both(&db, &web, Tcp(8080), false).to_vec();
    cases.extend(Case::both(&db, &web, Probe::Ping, false));
    check_counted(&[shop.node()], &cases);
    let sorted = || {
        let mut tables = tables(shop.node());
        tables.sort();
        tables
    };
    assert_eq!(sorted(), own);

    load_kube_proxy(Mode::Nftables, &shop.lab.node().machine, &web);
    let daemon = shop.manifests.run(shop.node(), &[OFF]);
    assert_eq!(sorted(), [proxy[0], policies[0], proxy[1], policies[1]]);
    check_counted(&[shop.node()], &cases);
    drop(daemon);

    shop.apply();
    assert_eq!(
        sorted(),
        [proxy[0], own[0], own[1], proxy[1], own[2], own[3]]
    );
    check_counted(&[shop.node()], &cases);
}

/// Leads a service of both families to an endpoint with IPVS, as kube-proxy does. Returns false if
/// the kernel or the program is missing.
fn ipvs(node: &Namespace, at: [SocketAddr; 2], web: &Machine) -> bool {
    for (service, endpoint) in at.into_iter().zip(endpoints(web)) {
        let (service, endpoint) = (service.to_string(), endpoint.to_string());
        for arguments in [
            vec!["-A", "-t", &service, "-s", "rr"],
            vec!["-a", "-t", &service, "-r", &endpoint, "-m"],
        ] {
            let output = node.command("ipvsadm").args(arguments).output();
            let fault = match output {
                Ok(output) if output.status.success() => continue,
                Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
                Err(error) => format!("ipvsadm: {error}"),
            };
            skip("ipvs", fault.lines().next().unwrap_or_default());
            return false;
        }
    }
    true
}

#[test]
fn services_of_ipvs_are_judged_by_endpoint_and_client() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let (node, client) = (&shop.lab.node().machine, shop.lab.client());
    let services = CLUSTER_IPS.map(|address| SocketAddr::new(ip(address), 80));
    let node_ports = node
        .addresses()
        .map(|address| SocketAddr::new(address, NODE_PORT));
    for at in [services, node_ports] {
        if !ipvs(&node.ns, at, &web) {
            return;
        }
    }
    // The kernel hides it in user namespaces other than the first.
    let conntrack = "/proc/sys/net/ipv4/vs/conntrack";
    if !node.ns.run(|| Path::new(conntrack).exists()) {
        skip("ipvs", "its connections cannot be tracked here");
        return;
    }
    // As kube-proxy does, which has them on a dummy.
    node.ns.addr_add("lo", "10.96.0.10/32");
    node.ns.addr_add("lo", "fd00:10:96::a/128");
    node.ns.sysctl("net.ipv4.vs.conntrack", "1");
    let check = |objects: &[Value], cases: &[[Case; 2]]| {
        for object in objects {
            shop.manifests.put(object);
        }
        shop.manifests.program(&node.ns, &[OFF]);
        check_counted(&[&node.ns], &cases.concat());
    };
    check(
        &[into_web("db", &[]), out_of_db("web")],
        &[
            to_service(&db, true),
            to_service(&api, false),
            to_node_port(client, node, false),
            // The node's own ports are behind IPVS, too.
            Case::both(&db, node, Tcp(8080), false),
        ],
    );
    check(
        &[into_web("db", &[client]), out_of_db("api")],
        &[to_service(&db, false), to_node_port(client, node, true)],
    );
}

/// Sends a datagram to the port 9000 from an address that the node does not have, as IPVS does: it
/// passes the output hook, and the sender learns whether it is dropped there.
fn send_as(node: &Namespace, source: IpAddr, destination: IpAddr) -> Result<usize, Errno> {
    let datagram = |sum: [u8; 2]| [&[0x9c, 0x40, 0x23, 0x28, 0, 10], &sum[..], b"?\n"].concat();
    let (family, packet) = match (source, destination) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            // The kernel fills in the checksum of the header. That of UDP is optional.
            let mut packet = vec![0x45, 0, 0, 30, 0, 0, 0, 0, 64, 17, 0, 0];
            packet.extend([from.octets(), to.octets()].concat());
            packet.extend(datagram([0, 0]));
            (AddressFamily::INET, packet)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let addresses = [from.octets(), to.octets()].concat();
            let pseudo = [
                &addresses[..],
                &[0, 0, 0, 10, 0, 0, 0, 17],
                &datagram([0, 0]),
            ]
            .concat();
            let mut packet = vec![0x60, 0, 0, 0, 0, 10, 17, 64];
            packet.extend(addresses);
            packet.extend(datagram(checksum(&pseudo)));
            (AddressFamily::INET6, packet)
        }
        _ => panic!("two families"),
    };
    node.run(|| {
        // Such a socket sends whole packets.
        let socket = socket(family, SocketType::RAW, Some(ipproto::RAW)).expect("a raw socket");
        let to = SocketAddr::new(destination, 0);
        sendto(&socket, &packet, SendFlags::empty(), &to)
    })
}

#[test]
fn what_the_node_sends_for_others_is_judged_in_the_output_hook() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = &shop.lab.node().machine;
    let udp = |mut object: Value, direction: &str| {
        object["spec"][direction][0]["ports"] = json!([{"protocol": "UDP", "port": 9000}]);
        object
    };
    shop.manifests.put(&udp(into_web("db", &[]), "ingress"));
    shop.manifests.put(&udp(out_of_db("web"), "egress"));
    shop.manifests.program(&node.ns, &[OFF]);
    let [at_web, at_api] = [&web, &api].map(|pod| pod.serve(Protocol::Udp, 9000));
    let counted = || denied(&[&node.ns]).values().sum::<u64>();
    for family in [0, 1] {
        let [web_at, db_at, api_at] = [&web, &db, &api].map(|pod| pod.addresses()[family]);
        // Into web, and out of db.
        for (source, to) in [(api_at, web_at), (db_at, api_at)] {
            let before = counted();
            assert_eq!(send_as(&node.ns, source, to), Err(Errno::PERM));
            assert_eq!(counted(), before + 1);
        }
        send_as(&node.ns, db_at, web_at).expect("it is sent");
        wait_for("it to arrive", PATIENCE, || {
            (at_web[family].served() == 1).then_some(())
        });
        assert_eq!(at_api[family].served(), 0);
    }
    check_counted(&[&node.ns], &Case::both(node, &web, Udp(9000), true));

    let flags = [OFF, "--deny-with=reject"];
    shop.manifests.program(&node.ns, &flags);
    count_answers(&api.ns);
    for (source, to) in api.addresses().into_iter().zip(web.addresses()) {
        let before = answers(&api.ns, "errors");
        assert_eq!(send_as(&node.ns, source, to), Err(Errno::PERM));
        wait_for("an error", PATIENCE, || {
            (answers(&api.ns, "errors") == before + 1).then_some(())
        });
    }
}

/// The rules of node-1 for the manifests.
fn rules(manifests: &Manifests, beside_proxy: bool) -> Ruleset {
    let paths = vec![manifests.path().to_owned()];
    let mut source = source::Manifests::new(paths, "node-1".into()).with_services(false);
    let mut engine = Engine::new(PolicySettings {
        node: "node-1".into(),
        beside_proxy,
        ..PolicySettings::default()
    });
    for event in source.load().expect("the folder exists") {
        engine.apply(&event);
    }
    engine.update(BUDGET);
    engine.ruleset()
}

/// IPVS translates in the input hook at this priority.
const IPVS: i32 = 99;

#[test]
fn what_ipvs_forwards_is_judged_as_what_the_node_forwards() {
    let manifests = Manifests::new();
    manifests.put(&namespace("shop", &[]));
    let far: [IpAddr; 2] = [ip("10.244.2.11"), ip("fd00:10:244:2::11")];
    let node: [IpAddr; 2] = [ip("192.168.10.1"), ip("fd00:192:168:10::1")];
    let web: [IpAddr; 2] = [ip("10.244.1.11"), ip("fd00:10:244:1::11")];
    let db: [IpAddr; 2] = [ip("10.244.1.12"), ip("fd00:10:244:1::12")];
    for (name, addresses) in [("web", &web), ("db", &db)] {
        let labels = [("app", name)];
        let object = pod(name, "node-1", &labels, addresses);
        manifests.put(&object);
    }
    manifests.put(&into_web("db", &[]));
    manifests.put(&out_of_db("web"));
    let (beside, alone) = (rules(&manifests, true), rules(&manifests, false));
    let mut accepted = 0;
    let mut asked = 0;
    for family in [0, 1] {
        let addresses = [web, db, far, node].map(|addresses| addresses[family]);
        for (source, destination, port) in addresses
            .into_iter()
            .flat_map(|source| addresses.map(|to| (source, to)))
            .flat_map(|(source, to)| [8080, 80].map(|port| (source, to, port)))
        {
            let packet = Packet {
                local: node.into(),
                ..Packet::first(source, destination, 6, port)
            };
            let what = format!("{source} to {destination} port {port}");
            let forwarded = walk(&beside, Hook::Forward, &packet).accepted();
            let by_ipvs = walk(&beside, Hook::Output, &packet);
            let from_node = source == node[family];
            assert_eq!(
                by_ipvs.accepted(),
                forwarded || from_node,
                "{what} {by_ipvs}"
            );
            let input = walk(&beside, Hook::Input, &packet).accepted();
            assert_eq!(
                input,
                walk(&alone, Hook::Input, &packet).accepted(),
                "{what}"
            );
            // Replies pass.
            let reply = Packet {
                state: CtState::Established,
                ..packet.clone()
            };
            assert!(walk(&beside, Hook::Output, &reply).accepted(), "{what}");
            assert!(walk(&alone, Hook::Output, &packet).accepted(), "{what}");
            asked += 1;
            accepted += u32::from(by_ipvs.accepted());
        }
    }
    assert!(
        accepted > 10 && asked - accepted > 10,
        "{accepted} of {asked}"
    );
    for table in beside.tables.values() {
        let base = table.chains.get("egress-to-node");
        let base = base.and_then(|chain| chain.base.as_ref());
        assert!(base.is_some_and(|base| base.priority > IPVS + 1));
    }
}
