//! A flood of UDP packets from forged addresses at a service with session affinity.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Instant;

use crate::support::objects::{service, slice_of, with};
use nftlet::model::Family;
use nftlet::netlink::Nftables;
use nftlet::nft::{Data, Element, Key, Op, Transaction};
use nftlet::services::{Clients, MOST_CLIENTS, affinity_declaration, table_id};
use serde_json::{Value, json};

use super::neighbour::{NODE_IP, Neighbour};
use crate::support::agent::{get, wait_for_log};
use nftlet_lab::fake_api::{SERVICES, SLICES};
use nftlet_lab::netns::{Ask, Daemon, PATIENCE, Protocol, Server, wait_for};

/// The service that is flooded, in the namespace `flood`.
const FLOODED: Ipv4Addr = Ipv4Addr::new(10, 96, 201, 1);
/// The neighbour's service with session affinity.
const STICKY: Ipv4Addr = Ipv4Addr::new(10, 96, 200, 2);
/// From where packets are forged, and from where the neighbour's clients come. All of it is the
/// node's own, so that it can be sent from.
const FORGED: &str = "172.16.0.0/12";
/// Where the agent serves its metrics.
const METRICS: &str = "127.0.0.1:10249";
/// Packets of one wave of the flood.
const WAVE: u32 = 200;
/// The clients of the neighbour's service.
const CLIENTS: u8 = 16;

fn sticky(name: &str, ip: Ipv4Addr, protocol: &str, port: u16) -> Value {
    with(
        service(name, ip),
        json!({"spec": {
            "ports": [{"name": "p", "port": port, "protocol": protocol}],
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86_400}},
        }}),
    )
}

/// A slice of a service with one endpoint, on the node.
fn slice(namespace: &str, service: &str, protocol: &str, port: u16) -> Value {
    let name = format!("{namespace}/{service}-{port}");
    let endpoints = json!([{"addresses": [NODE_IP], "nodeName": "node-1"}]);
    with(
        slice_of(&name, service, endpoints),
        json!({"ports": [{"name": "p", "port": port, "protocol": protocol}]}),
    )
}

fn forged(number: u32) -> IpAddr {
    let base = u32::from(Ipv4Addr::new(172, 16, 0, 0));
    Ipv4Addr::from(base + number).into()
}

/// Sends packets from so many forged addresses, beginning with one.
fn flood(neighbour: &Neighbour, first: u32, packets: u32) {
    neighbour.node.ns.run(|| {
        for number in first..first + packets {
            let socket = UdpSocket::bind(SocketAddr::new(forged(number), 0)).expect("a socket");
            // What comes of it is nothing to the attacker.
            let _ = socket.send_to(b"?", SocketAddr::from((FLOODED, 53)));
        }
    });
}

/// Fills the map of the flooded namespace as so many packets would.
fn fill(neighbour: &Neighbour) {
    let clients = Clients::of("flood");
    let target = Data::build().address(NODE_IP).port(9053).finish();
    let client = |number| {
        let key = Key::build()
            .address(forged(number))
            .address(FLOODED.into())
            .protocol(17)
            .port(53)
            .finish();
        Element::with_data(key, target.clone())
    };
    let numbers: Vec<u32> = (0..MOST_CLIENTS).collect();
    neighbour.node.ns.run(|| {
        let mut nftables = Nftables::open().expect("a socket");
        for numbers in numbers.chunks(20_000) {
            let elements = numbers.iter().map(|number| client(*number)).collect();
            let add = Op::AddElements(
                table_id(Family::V4),
                clients.map(),
                affinity_declaration(),
                elements,
            );
            let transaction = Transaction { ops: vec![add] };
            nftables.apply(&transaction).expect("room for all of them");
        }
    });
}

/// The endpoints that answer the neighbour's clients.
#[track_caller]
fn answers(neighbour: &Neighbour) -> Vec<String> {
    let ask = |number: u8| {
        let source = Ipv4Addr::new(172, 31, 255, number);
        let ask = Ask::tcp(STICKY, 80).source(source).timeout(PATIENCE);
        let answer = neighbour.node.ns.run(|| ask.send());
        answer.expect("the neighbour's service answers").name
    };
    (1..=CLIENTS).map(ask).collect()
}

/// How many clients the flooded namespace remembers.
fn remembered(neighbour: &Neighbour) -> usize {
    neighbour.node.ns.run(|| {
        let mut nftables = Nftables::open().expect("a socket");
        let map = Clients::of("flood").map();
        let elements = nftables.elements(&table_id(Family::V4), map.as_str());
        elements.expect("the map").len()
    })
}

/// How many packets the metrics say were not remembered in a namespace; `None` without any.
fn not_remembered(neighbour: &Neighbour, namespace: &str) -> Option<u64> {
    let page = get(&neighbour.node.ns, METRICS, "/metrics").1;
    let name =
        format!("nftlet_affinity_clients_not_remembered_total{{namespace=\"{namespace}\"}} ");
    let line = page.lines().find_map(|line| line.strip_prefix(&name))?;
    line.parse().ok()
}

#[test]
fn a_flood_at_one_service_leaves_the_clients_of_others_with_their_endpoints() {
    let Some(neighbour) = Neighbour::new() else {
        return;
    };
    let node = &neighbour.node;
    node.ns.route_add(&format!("local {FORGED}"), "dev lo");
    let servers = [("a", 8081), ("b", 8082)].map(|(name, port)| {
        let at = SocketAddr::new(NODE_IP, port);
        Server::start(&node.ns, Protocol::Tcp, at, name)
    });
    for port in [8081, 8082] {
        node.api
            .put(SLICES, slice("neighbour", "sticky", "TCP", port));
    }
    node.api
        .put(SERVICES, sticky("neighbour/sticky", STICKY, "TCP", 80));
    node.api.put(SLICES, slice("flood", "victim", "UDP", 9053));
    node.api
        .put(SERVICES, sticky("flood/victim", FLOODED, "UDP", 53));
    let metrics = [
        "--healthz-bind-address=",
        &format!("--metrics-bind-address={METRICS}"),
    ];
    let agent = Daemon::start(
        &node.ns,
        crate::support::agent::NFTLET,
        node.arguments(&metrics),
    );
    wait_for_log(&agent, "the rules are in place");
    let before = answers(&neighbour);
    assert!(
        ["a", "b"]
            .iter()
            .all(|name| before.iter().any(|it| it == name))
    );
    assert_eq!(answers(&neighbour), before, "they are remembered");

    fill(&neighbour);
    flood(&neighbour, MOST_CLIENTS, WAVE);
    assert!(not_remembered(&neighbour, "flood") >= Some(WAVE.into()));
    assert_eq!(not_remembered(&neighbour, "neighbour"), None);
    wait_for_log(
        &agent,
        "Namespace flood: its services with session affinity remember",
    );
    assert_eq!(answers(&neighbour), before);

    // The endpoint of all remembered clients is removed. Reading them takes long and delays nothing.
    neighbour.is_served();
    let started = Instant::now();
    assert!(remembered(&neighbour) >= MOST_CLIENTS as usize);
    let reading = started.elapsed();
    let move_victim = |port: u16| {
        let mut moved = slice("flood", "victim", "UDP", port);
        moved["metadata"]["name"] = "victim-9053".into();
        node.api.put(SLICES, moved);
    };
    move_victim(9054);
    let change = neighbour.change();
    assert!(change < reading / 2, "{change:?} of {reading:?}");

    neighbour.changes_in_time_while(1, |wave| {
        let wave = u32::try_from(wave).expect("not so many waves");
        move_victim([9053, 9054][wave as usize % 2]);
        flood(&neighbour, MOST_CLIENTS + wave % 100 * WAVE, WAVE);
    });
    assert_eq!(answers(&neighbour), before);
    assert_eq!(not_remembered(&neighbour, "neighbour"), None);
    let told = agent.log().matches("Namespace flood: ").count();
    assert_eq!(told, 1, "once while it goes on: {}", agent.log());
    drop(servers);
    // Clients of removed endpoints are forgotten, which may take long.
    node.api.delete(SLICES, "flood/victim-9053");
    wait_for("all to be forgotten", PATIENCE, || {
        (remembered(&neighbour) == 0).then_some(())
    });
}
