//! A service that is small to write and huge to program: every port of every external address.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use crate::support::objects::{self, with};
use serde_json::{Value, json};

use super::neighbour::{NODE_IP, Neighbour, POD, slice};
use nftlet_lab::fake_api::{SERVICES, SLICES};
use nftlet_lab::netns::{Ask, Namespace, PATIENCE, Protocol, Server};

/// The ports, and the addresses as well.
const PORTS: u16 = 300;
/// The service is created, gets another endpoint and goes, all while the neighbour changes.
const STEPS: usize = 3;

/// How long an answer may take; without one the frontend has been removed.
const ANSWERED: Duration = Duration::from_millis(200);

/// The first and the last of the external addresses.
const FIRST: IpAddr = address(0);
const LAST: IpAddr = address(PORTS - 1);
/// Where the endpoint is that comes later.
const LATER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 10, 2));

/// One of the external addresses.
const fn address(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    IpAddr::V4(Ipv4Addr::new(172, 20, high, low))
}

fn service() -> Value {
    let addresses = (0..PORTS).map(address);
    let ports = (0..PORTS).map(|n| json!({"name": format!("p{n}"), "port": 1000 + n}));
    with(
        objects::service("attacker/huge", "10.96.0.66"),
        json!({"spec": {"externalIPs": addresses.collect::<Vec<_>>(),
            "ports": ports.collect::<Vec<_>>()}}),
    )
}

/// The EndpointSlice with all the ports and these endpoints.
fn endpoints(addresses: &[IpAddr]) -> Value {
    let endpoints = addresses
        .iter()
        .map(|ip| json!({"addresses": [ip], "nodeName": "node-1"}));
    let mut slice = slice("attacker", "huge", &endpoints.collect());
    let ports =
        (0..PORTS).map(|n| json!({"name": format!("p{n}"), "port": 8080, "protocol": "TCP"}));
    slice["ports"] = ports.collect();
    slice
}

/// Asks the first and the last of the frontends until each has this answer. All elements of the
/// table would take too long to list.
#[track_caller]
fn answers(ns: &Namespace, wanted: Option<&str>) {
    let deadline = Instant::now() + PATIENCE;
    for (address, port) in [(FIRST, 1000), (LAST, 999 + PORTS)] {
        let ask = Ask::tcp(address, port).timeout(ANSWERED);
        while ns
            .run(|| ask.send())
            .ok()
            .map(|answer| answer.name)
            .as_deref()
            != wanted
        {
            assert!(
                Instant::now() < deadline,
                "{address} . tcp . {port} should be answered by {wanted:?}"
            );
        }
    }
}

#[test]
fn a_service_with_very_many_frontends_holds_up_no_other() {
    let Some(neighbour) = Neighbour::new() else {
        return;
    };
    let (ns, api) = (&neighbour.node.ns, &neighbour.node.api);
    ns.addr_add("lo", &format!("{LATER}/32"));
    ns.route_add("172.20.0.0/16", &format!("dev lo src {NODE_IP}"));
    let _later = Server::start(ns, Protocol::Tcp, SocketAddr::new(LATER, 8080), "later");
    let _agent = neighbour.node.run();
    neighbour.changes_in_time_while(STEPS, |call| {
        let started = Instant::now();
        let step = call % STEPS;
        match step {
            0 => {
                api.put(SLICES, endpoints(&[NODE_IP]));
                api.put(SERVICES, service());
                answers(ns, Some(POD));
            }
            1 => {
                api.put(SLICES, endpoints(&[NODE_IP, LATER]));
                answers(ns, Some("later"));
            }
            _ => {
                api.delete(SERVICES, "attacker/huge");
                answers(ns, None);
            }
        }
        eprintln!("step {step} is in force after {:?}", started.elapsed());
    });
}
