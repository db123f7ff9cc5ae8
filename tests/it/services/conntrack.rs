//! UDP clients that keep their socket follow their service; all other flows stay unchanged.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use crate::support::manifests::{CLUSTER_CIDR, Manifests, Service};
use crate::support::objects::{slice_of, with};
use nftlet::netlink::{Conntrack, Flow, FlowFilter};
use nftlet::nft::TableFamily;
use nftlet_lab::netns::{
    Answer, Ask, Daemon, Lab, LabOptions, Machine, Namespace, Protocol, Server, drain,
    require_net_admin, wait_for,
};
use serde_json::json;

/// Reached by a test that fails, and by no other.
const LONG: Duration = nftlet_lab::netns::PATIENCE;
/// After that long without an answer a datagram is taken for lost, and another one sent.
const LOST: Duration = Duration::from_secs(1);
/// The kernel forgets flows without packets after 30 s, which a test may take.
const KEEP_FLOWS: [(&str, &str); 2] = [
    ("net.netfilter.nf_conntrack_udp_timeout", "3600"),
    ("net.netfilter.nf_conntrack_udp_timeout_stream", "3600"),
];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A UDP client that asks from one socket, and so one source port, for all of its life.
struct Client(UdpSocket);

impl Client {
    fn new(machine: &Machine, port: u16, to: SocketAddr) -> Self {
        let socket = machine.ns.run(|| {
            let from = SocketAddr::new(machine.address_like(to.ip()), port);
            let socket = UdpSocket::bind(from)?;
            socket.connect(to)?;
            io::Result::Ok(socket)
        });
        Self(socket.unwrap())
    }

    /// The name of the server that answers, which one is sure to.
    fn ask(&self) -> io::Result<String> {
        self.ask_within(LONG)
    }

    /// The name of the server that answers this request and no earlier one.
    fn ask_within(&self, within: Duration) -> io::Result<String> {
        drain(&self.0);
        self.0.set_read_timeout(Some(within))?;
        self.0.send(b"?\n")?;
        let mut buffer = [0; 512];
        let length = self.0.recv(&mut buffer)?;
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        Ok(text.split(' ').next().unwrap().to_owned())
    }

    /// Asks until one of these servers answers.
    #[track_caller]
    fn reaches(&self, names: &[&str]) -> String {
        wait_for(&format!("an answer of {names:?}"), LONG, || {
            let name = self.ask_within(LOST).ok();
            name.filter(|name| names.contains(&&**name))
        })
    }
}

/// All UDP flows that a namespace tracks.
fn flows(ns: &Namespace) -> Vec<Flow> {
    ns.run(|| {
        let mut flows = Vec::new();
        let mut conntrack = Conntrack::open().unwrap();
        for family in [TableFamily::Ip, TableFamily::Ip6] {
            conntrack
                .flows(&FlowFilter::all(family), |flow| flows.push(*flow))
                .unwrap();
        }
        flows
    })
}

/// The flow of a client.
fn flow_of(ns: &Namespace, client: &Client) -> Option<Flow> {
    let (source, destination) = (
        client.0.local_addr().unwrap(),
        client.0.peer_addr().unwrap(),
    );
    let mut flows = flows(ns).into_iter();
    flows.find(|flow| flow.source == source && flow.destination == destination)
}

struct Shop {
    lab: Lab,
    manifests: Manifests,
    daemon: Daemon,
    _servers: Vec<Server>,
}

/// A service for UDP and TCP, with a NodePort.
fn dns(name: &str, last: u8) -> Service {
    let node_port = 30000 + u16::from(last);
    let mut service = Service::new(name, last)
        .port("dns", "UDP", 53, Some(node_port))
        .port("web", "TCP", 80, None);
    service.kind = "NodePort".into();
    service
}

impl Shop {
    /// A node that runs nftlet, with three pods that serve port 8080, and no service yet.
    fn open() -> Self {
        let lab = Lab::new(LabOptions::default());
        lab.node().ns().sysctls(&KEEP_FLOWS);
        let manifests = Manifests::new();
        let daemon = manifests.run(lab.node().ns(), &["--cluster-cidr", CLUSTER_CIDR]);
        let serve = |pod: &Machine| {
            [Protocol::Udp, Protocol::Http].map(|protocol| pod.serve(protocol, 8080))
        };
        let servers = lab.pods().into_iter().flat_map(serve).flatten().collect();
        Self {
            lab,
            manifests,
            daemon,
            _servers: servers,
        }
    }

    /// Makes these pods the endpoints of a service; 1 is pod-1.
    fn endpoints(&self, service: &Service, pods: &[usize]) {
        let addresses: Vec<_> = pods
            .iter()
            .flat_map(|number| self.lab.pods()[number - 1].addresses())
            .map(|address| (address.to_string(), true))
            .collect();
        self.manifests.endpoints(service, 8080, &addresses);
    }

    fn node(&self) -> &Namespace {
        self.lab.node().ns()
    }

    /// Clients of port 53 of the ClusterIPs that end in a number, one a family.
    fn clients(&self, last: u8, port: u16) -> [Client; 2] {
        [format!("10.96.0.{last}"), format!("fd00:10:96::{last:x}")]
            .map(|vip| Client::new(self.lab.client(), port, SocketAddr::new(ip(&vip), 53)))
    }

    /// Waits until new flows do not lead to a pod any more.
    fn wait_until_unchosen(&self, pod: &Machine) {
        let (v4, v6) = (pod.v4.to_string(), pod.v6.to_string());
        for (family, address) in [("ip", v4), ("ip6", v6)] {
            wait_for("the endpoint to leave the rules", LONG, || {
                let list = ["list", "map", family, "nftlet", "endpoints"];
                (!self.node().nft(&list).contains(&address)).then_some(())
            });
        }
    }
}

fn others(name: &str) -> Vec<&'static str> {
    let pods = ["pod-1", "pod-2", "pod-3"];
    pods.into_iter().filter(|pod| *pod != name).collect()
}

fn number(name: &str) -> usize {
    name.strip_prefix("pod-").unwrap().parse().unwrap()
}

#[test]
fn a_client_moves_on_when_its_endpoint_is_removed() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let service = dns("dns", 10);
    shop.manifests.service(&service);
    shop.endpoints(&service, &[1, 2, 3]);
    let mut clients: Vec<Client> = shop.clients(10, 4000).into();
    // The NodePort of the same service.
    for address in ["192.168.10.1", "fd00:192:168:10::1"].map(ip) {
        let to = SocketAddr::new(address, 30010);
        clients.push(Client::new(shop.lab.client(), 4001, to));
    }
    for client in clients {
        shop.endpoints(&service, &[1, 2, 3]);
        let first = client.reaches(&["pod-1", "pod-2", "pod-3"]);
        assert_eq!(client.ask().unwrap(), first, "the flow is remembered");
        let rest: Vec<usize> = (1..=3).filter(|n| *n != number(&first)).collect();
        shop.endpoints(&service, &rest);
        client.reaches(&others(&first));
    }
}

#[test]
fn a_service_scaled_to_zero_and_up_again_is_no_black_hole() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let service = dns("dns", 10);
    shop.manifests.service(&service);
    shop.endpoints(&service, &[1]);
    let clients = shop.clients(10, 4000);
    for client in &clients {
        client.reaches(&["pod-1"]);
    }
    shop.endpoints(&service, &[]);
    for client in &clients {
        wait_for("the refusal", LONG, || {
            let error = client.ask_within(LOST).err()?;
            (error.kind() == io::ErrorKind::ConnectionRefused).then_some(())
        });
        assert_eq!(flow_of(shop.node(), client), None);
    }
    shop.endpoints(&service, &[2]);
    for client in &clients {
        client.reaches(&["pod-2"]);
    }
}

#[test]
fn flows_that_began_before_the_service_had_the_address_are_caught() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    // A service that exists already and gains an external address, and one that is new.
    let mut live = dns("live", 10);
    shop.manifests.service(&live);
    shop.endpoints(&live, &[1, 2, 3]);
    let of = |addresses: [&str; 2], port| {
        addresses.map(|a| Client::new(shop.lab.client(), port, SocketAddr::new(ip(a), 53)))
    };
    let live_addresses = ["198.51.100.7", "2001:db8:2::7"];
    let new_addresses = ["203.0.113.10", "2001:db8:1::10"];
    let clients = [of(live_addresses, 4000), of(new_addresses, 4001)];
    let clients: Vec<Client> = clients.into_iter().flatten().collect();
    for client in &clients {
        let flow = wait_for("the flow past the service", LONG, || {
            let _ = client.0.send(b"?\n");
            flow_of(shop.node(), client)
        });
        assert!(!flow.is_translated(), "{flow}");
    }
    live.external_ips = live_addresses.map(String::from).into();
    shop.manifests.service(&live);
    let mut new = dns("new", 11);
    new.external_ips = new_addresses.map(String::from).into();
    shop.manifests.service(&new);
    shop.endpoints(&new, &[1, 2, 3]);
    for client in &clients {
        client.reaches(&["pod-1", "pod-2", "pod-3"]);
    }
    // And an address that the service gives up.
    live.external_ips.clear();
    shop.manifests.service(&live);
    for client in &clients[..2] {
        wait_for("the flow past the service again", LONG, || {
            let _ = client.0.send(b"?\n");
            let flow = flow_of(shop.node(), client)?;
            (!flow.is_translated()).then_some(())
        });
    }
}

#[test]
fn other_flows_are_left_alone() {
    if !require_net_admin() {
        return;
    }
    let mut shop = Shop::open();
    let (service, other) = (dns("dns", 10), dns("other", 11));
    for service in [&service, &other] {
        shop.manifests.service(service);
        shop.endpoints(service, &[1]);
    }
    let client = shop.lab.client();
    let pod = shop.lab.pods()[2];
    // Of another service; of a port on another host that is a NodePort here; to a pod itself.
    let _server = client.serve(Protocol::Udp, 30010);
    let mut untouched: Vec<Client> = shop.clients(11, 4000).into();
    for address in client.addresses() {
        untouched.push(Client::new(pod, 4001, SocketAddr::new(address, 30010)));
    }
    for address in shop.lab.pods()[0].addresses() {
        untouched.push(Client::new(client, 4002, SocketAddr::new(address, 8080)));
    }
    let before: Vec<_> = untouched
        .iter()
        .map(|client| {
            client.reaches(&["pod-1", "client-1"]);
            flow_of(shop.node(), client)
        })
        .collect();
    assert!(before.iter().all(Option::is_some), "{before:?}");
    let mut connection = client.ns.run(|| Ask::http(ip("10.96.0.10"), 80).open());
    let connection = connection.as_mut().unwrap();
    let answered = |answer: io::Result<Answer>| answer.unwrap().name;
    assert_eq!(answered(connection.ask()), "pod-1");

    let mut moving: Vec<Client> = shop.clients(10, 4003).into();
    for address in shop.lab.node().machine.addresses() {
        moving.push(Client::new(client, 4004, SocketAddr::new(address, 30010)));
    }
    for client in &moving {
        client.reaches(&["pod-1"]);
    }
    shop.endpoints(&service, &[2]);
    for client in &moving {
        client.reaches(&["pod-2"]);
    }
    // When nftlet has ended, whatever it began is done.
    assert!(
        shop.daemon
            .stop(LONG)
            .is_some_and(|status| status.success())
    );
    let after: Vec<_> = untouched
        .iter()
        .map(|client| flow_of(shop.node(), client))
        .collect();
    assert_eq!(after, before);
    assert_eq!(answered(connection.ask()), "pod-1", "TCP goes on");
}

#[test]
fn a_draining_endpoint_keeps_its_flows_until_it_is_removed() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let service = dns("dns", 10);
    shop.manifests.service(&service);
    shop.endpoints(&service, &[1]);
    let clients = shop.clients(10, 4000);
    for client in &clients {
        client.reaches(&["pod-1"]);
    }
    let pods = shop.lab.pods();
    let before = clients.each_ref().map(|c| flow_of(shop.node(), c));
    for (index, family) in [(0, "IPv4"), (1, "IPv6")] {
        let endpoint = |pod: &Machine, ready: bool| {
            json!({
                "addresses": [pod.addresses()[index].to_string()], "nodeName": "node-1",
                "conditions": {"ready": ready, "serving": true, "terminating": !ready},
            })
        };
        let name = format!("dns-{}", family.to_lowercase().replace("ip", ""));
        let endpoints = json!([endpoint(pods[0], false), endpoint(pods[1], true)]);
        shop.manifests.put(&with(
            slice_of(&name, "dns", endpoints),
            json!({"addressType": family,
                "ports": [{"name": "dns", "protocol": "UDP", "port": 8080}]}),
        ));
    }
    shop.wait_until_unchosen(pods[0]);
    for client in &clients {
        assert_eq!(client.ask().unwrap(), "pod-1");
    }
    let after = clients.each_ref().map(|c| flow_of(shop.node(), c));
    assert_eq!(after, before);
    shop.endpoints(&service, &[2]);
    for client in &clients {
        client.reaches(&["pod-2"]);
    }
}

#[test]
fn the_kernel_lists_what_is_asked_for_and_deletes_what_was_listed() {
    if !require_net_admin() {
        return;
    }
    let lab = Lab::new(LabOptions::default());
    let node = lab.node().ns();
    node.sysctls(&KEEP_FLOWS);
    // Connections are tracked where a rule asks about them.
    node.nft_load(
        "table inet t {\n chain c {\n type filter hook forward priority 0\n ct state new\n }\n}\n",
    );
    let pods = lab.pods();
    let mut clients = Vec::new();
    for pod in &pods {
        for (address, port) in pod.addresses().into_iter().flat_map(|a| [(a, 53), (a, 54)]) {
            // A socket of its own, and a source port of the kernel's choice, for each.
            let to = SocketAddr::new(address, port);
            clients.push(Client::new(lab.client(), 0, to));
        }
    }
    let all = wait_for("the flows", LONG, || {
        for client in &clients {
            let _ = client.0.send(b"?");
        }
        let all = flows(node);
        (all.len() >= clients.len()).then_some(all)
    });
    node.run(|| {
        let listed = |filter| {
            let mut flows = Vec::new();
            let mut conntrack = Conntrack::open().unwrap();
            conntrack.flows(&filter, |flow| flows.push(*flow)).unwrap();
            flows.sort_by_key(|flow| flow.destination);
            flows
        };
        for address in pods[0].addresses() {
            let family = if address.is_ipv4() {
                TableFamily::Ip
            } else {
                TableFamily::Ip6
            };
            let at = SocketAddr::new(address, 53);
            let every = listed(FlowFilter::all(family));
            assert_eq!(every.len(), 6);
            let with_port: Vec<Flow> = every
                .iter()
                .filter(|flow| flow.destination.port() == 53)
                .copied()
                .collect();
            assert_eq!(listed(FlowFilter::to_port(family, 53)), with_port);
            assert_eq!(with_port.len(), 3);
            let with_address: Vec<Flow> = every
                .iter()
                .filter(|flow| flow.destination == at)
                .copied()
                .collect();
            assert_eq!(listed(FlowFilter::to(at)), with_address);
            assert_eq!(with_address.len(), 1);
        }
        let mut conntrack = Conntrack::open().unwrap();
        for flow in &all {
            let later = Flow {
                id: flow.id.wrapping_add(1),
                ..*flow
            };
            assert!(!conntrack.delete(&later).unwrap(), "{flow}");
            assert!(conntrack.delete(flow).unwrap(), "{flow}");
            assert!(!conntrack.delete(flow).unwrap(), "{flow}");
        }
    });
    assert_eq!(flows(node), []);
}

#[test]
fn flows_of_a_service_that_went_while_nftlet_was_stopped_end_at_the_start() {
    if !require_net_admin() {
        return;
    }
    let mut shop = Shop::open();
    let mut gone = dns("gone", 10);
    gone.kind = "LoadBalancer".into();
    gone.load_balancer_ips = vec!["203.0.113.10".into(), "2001:db8:1::10".into()];
    // One is the node's own.
    gone.external_ips = vec!["192.168.10.1".into(), "2001:db8:2::7".into()];
    let mut narrower = dns("narrower", 11);
    narrower.external_ips = vec!["198.51.100.7".into()];
    for service in [&gone, &narrower] {
        shop.manifests.service(service);
        shop.endpoints(service, &[1]);
    }
    let at = |address: &str, port: u16| SocketAddr::new(ip(address), port);
    let ended = [
        at("10.96.0.10", 53),
        at("fd00:10:96::a", 53),
        at("203.0.113.10", 53),
        at("2001:db8:1::10", 53),
        at("192.168.10.1", 53),
        at("2001:db8:2::7", 53),
        at("192.168.10.1", 30010),
        at("fd00:192:168:10::1", 30010),
        at("198.51.100.7", 53),
    ];
    let client = |to| Client::new(shop.lab.client(), 0, to);
    let clients: Vec<Client> = ended.into_iter().map(client).collect();
    let stays = client(at("10.96.0.11", 53));
    for client in clients.iter().chain([&stays]) {
        client.reaches(&["pod-1"]);
    }
    assert!(shop.daemon.stop(LONG).is_some());
    shop.manifests.remove("Service", "gone");
    shop.manifests.remove("EndpointSlice", "gone-v4");
    shop.manifests.remove("EndpointSlice", "gone-v6");
    narrower.external_ips.clear();
    shop.manifests.service(&narrower);
    let arguments = ["--cluster-cidr", CLUSTER_CIDR];
    shop.daemon = shop.manifests.run(shop.node(), &arguments);
    for client in &clients {
        let to = client.0.peer_addr().unwrap();
        wait_for(&format!("the end of the flow to {to}"), LONG, || {
            // It goes on asking all the time.
            let _ = client.0.send(b"?");
            let flow = flow_of(shop.node(), client);
            (!flow.is_some_and(|flow| flow.is_translated())).then_some(())
        });
    }
    assert_eq!(stays.ask().unwrap(), "pod-1");
    assert!(flow_of(shop.node(), &stays).unwrap().is_translated());
}
