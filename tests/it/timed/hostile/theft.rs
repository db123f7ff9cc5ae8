//! A namespace whose services claim what is the neighbour's and the cluster's.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use crate::support::objects::{service, with};
use serde_json::{Value, json};

use super::neighbour::{CLUSTER_IP, NODE_IP, NODE_PORT, Neighbour, POD, slice};
use crate::support::agent::{NFTLET, wait_for_log};
use nftlet_lab::fake_api::{SERVICES, SLICES};
use nftlet_lab::netns::{Ask, Daemon, Namespace, PATIENCE, Protocol, Server};

/// How many services the namespace has.
const THIEVES: usize = 100;
/// The pause between two writes of the attack: 200 a second are many for an API server, while the
/// one of the tests, which is memory only, would take more than any client could read.
const BETWEEN_WRITES: Duration = Duration::from_millis(5);
/// A ClusterIP outside of all ServiceCIDRs, of a service that is yet to come.
const FUTURE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 1));
/// An address of the ServiceCIDR without a service.
const FREE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 200, 77));
/// An address that belongs to no service.
const OWN: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 66));

/// A service that is older than all others and names addresses that are not its own. Another
/// number of the state is another service to nftlet.
fn thief(number: usize, state: usize, ports: &[u16], targets: &[IpAddr]) -> Value {
    let ports = ports.iter().map(|port| {
        json!({"name": format!("p{port}"), "port": port, "protocol": "TCP", "targetPort": 6666})
    });
    let ingress = targets.iter().map(|ip| json!({"ip": ip}));
    with(
        service(
            &format!("thieves/thief-{number}"),
            format!("10.96.100.{number}"),
        ),
        json!({
            "metadata": {"creationTimestamp": "2020-01-01T00:00:00Z"},
            "spec": {
                "type": "LoadBalancer",
                "externalIPs": targets,
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 1000 + state % 1000}},
                "ports": ports.collect::<Vec<_>>(),
            },
            "status": {"loadBalancer": {"ingress": ingress.collect::<Vec<_>>()}},
        }),
    )
}

/// Puts a thief and its endpoint on the server.
fn put(neighbour: &Neighbour, service: Value) {
    let name = service["metadata"]["name"].as_str().expect("a name");
    let mut slice = slice("thieves", name, &json!([{"addresses": [NODE_IP]}]));
    let ports = service["spec"]["ports"].as_array().expect("ports").iter();
    let ports = ports.map(|port| json!({"name": port["name"], "port": 6666, "protocol": "TCP"}));
    slice["ports"] = ports.collect();
    let api = &neighbour.node.api;
    api.put(SLICES, slice);
    api.put(SERVICES, service);
}

#[track_caller]
fn answers(ns: &Namespace, at: IpAddr, port: u16) -> String {
    let ask = Ask::tcp(at, port).timeout(PATIENCE);
    ns.run(|| ask.send()).expect("an answer").name
}

#[test]
fn a_namespace_full_of_thieves_gets_nothing_of_the_neighbour() {
    let Some(neighbour) = Neighbour::new() else {
        return;
    };
    let node = &neighbour.node;
    node.ns
        .route_add("10.99.0.0/16", &format!("dev lo src {NODE_IP}"));
    node.ns
        .route_add(&format!("{OWN}/32"), &format!("dev lo src {NODE_IP}"));
    let at = SocketAddr::new(NODE_IP, 6666);
    let _pod = Server::start(&node.ns, Protocol::Tcp, at, "thief");
    let targets = [CLUSTER_IP, NODE_IP, FUTURE, FREE, OWN];
    let ports = [80, 443, NODE_PORT];
    for number in 0..THIEVES {
        put(&neighbour, thief(number, 0, &ports, &targets));
    }
    let _agent = node.run();
    // An address without another claim is the oldest thief's, so that the other cases prove something.
    assert_eq!(answers(&node.ns, OWN, 80), "thief");
    assert_eq!(answers(&node.ns, FUTURE, 80), "thief");
    assert_eq!(answers(&node.ns, CLUSTER_IP, 80), POD);
    assert_eq!(answers(&node.ns, NODE_IP, NODE_PORT), POD);
    node.lacks(&format!("{FREE} . tcp"));

    neighbour.changes_in_time_while(1, |call| {
        let changed = thief(call % THIEVES, call, &ports, &targets);
        node.api.put(SERVICES, changed);
        thread::sleep(BETWEEN_WRITES);
    });

    // A ClusterIP is its service's from the moment on that there is one.
    node.api.put(
        SLICES,
        slice("neighbour", "late", &json!([{"addresses": [NODE_IP]}])),
    );
    node.api.put(SERVICES, service("neighbour/late", FUTURE));
    node.has(&format!("{FUTURE} . tcp . 80 comment \"neighbour/late"));
    assert_eq!(answers(&node.ns, FUTURE, 80), POD);
    node.lacks(&format!("{FUTURE} . tcp . 443"));
    assert_eq!(answers(&node.ns, CLUSTER_IP, 80), POD);
    assert_eq!(answers(&node.ns, NODE_IP, NODE_PORT), POD);
}

/// Passes connections to an address inside the namespace on, until the test ends.
fn forward(ns: &Namespace, at: SocketAddr, to: SocketAddr) {
    ns.run(|| {
        let listener = TcpListener::bind(at).expect("a port");
        thread::spawn(move || {
            for client in listener.incoming() {
                let Ok((client, server)) = client.and_then(|it| Ok((it, TcpStream::connect(to)?)))
                else {
                    continue;
                };
                pass(&client, &server);
                pass(&server, &client);
            }
        });
    });
}

/// Copies one direction on a thread of its own.
fn pass(from: &TcpStream, to: &TcpStream) {
    let (mut from, mut to) = (
        from.try_clone().expect("a socket"),
        to.try_clone().expect("one"),
    );
    thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
}

/// Runs nftlet with an API server at this address, of which `thief` has the port and more.
#[track_caller]
fn keeps_its_server_at(address: IpAddr, thief: impl FnOnce(u16) -> Value) {
    const PORT: u16 = 6443;
    let Some(neighbour) = Neighbour::new() else {
        return;
    };
    let node = &neighbour.node;
    if address != NODE_IP {
        node.ns.addr_add("lo", &format!("{address}/32"));
    }
    let server = node.api.url().trim_start_matches("http://").to_owned();
    let server = server.parse().expect("an address");
    forward(&node.ns, SocketAddr::new(address, PORT), server);
    let at = SocketAddr::new(NODE_IP, 6666);
    let _pod = Server::start(&node.ns, Protocol::Tcp, at, "thief");
    put(&neighbour, thief(PORT));
    let master = format!("http://{address}:{PORT}");
    let arguments = [
        "--master",
        &master,
        "--metrics-bind-address=",
        "--healthz-bind-address=",
    ];
    let daemon = Daemon::start(&node.ns, NFTLET, node.arguments(&arguments));
    wait_for_log(&daemon, "the rules are in place");
    wait_for_log(&daemon, "nftlet itself reaches the API server there");
    neighbour.is_served();
    // New connections still lead to the server, and its news arrive.
    node.break_connections();
    neighbour.changes_in_time_while(1, |_| thread::yield_now());
    let rules = node.ns.nft(&["list", "table", "ip", "nftlet"]);
    assert!(rules.contains(&format!("{OWN} . tcp . {PORT}")), "{rules}");
    assert!(
        !rules.contains(&format!("{address} . tcp . {PORT}")),
        "{rules}"
    );
    assert!(!rules.contains(&format!("{{ tcp . {PORT}")), "{rules}");
}

#[test]
fn the_api_server_cannot_be_taken_by_an_external_address() {
    let server = IpAddr::V4(Ipv4Addr::new(192, 168, 77, 1));
    keeps_its_server_at(server, |port| thief(1, 0, &[port], &[server, OWN]));
}

#[test]
fn the_api_server_cannot_be_taken_by_a_node_port() {
    keeps_its_server_at(NODE_IP, |port| {
        let mut service = thief(1, 0, &[port], &[NODE_IP, OWN]);
        service["spec"]["ports"][0]["nodePort"] = json!(port);
        service
    });
}
