//! A service that is small to write and huge to program: every port of every external address.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

use crate::common::netns::{Namespace, PATIENCE};
use crate::fake_api::{SERVICES, SLICES};
use crate::neighbour::{Neighbour, slice};

const PORTS: u16 = 300;
const ADDRESSES: u16 = 300;
/// The steps that come into force while the neighbour changes: once round them all.
const STEPS: usize = 3;

/// The last of the external addresses.
const LAST: &str = "172.20.1.43";

fn service() -> Value {
    let addresses = (0..ADDRESSES).map(|n| format!("172.20.{}.{}", n / 256, n % 256));
    let ports = (0..PORTS).map(|n| json!({"name": format!("p{n}"), "port": 1000 + n}));
    json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "attacker", "name": "huge"},
        "spec": {"clusterIP": "10.96.0.66", "clusterIPs": ["10.96.0.66"],
            "externalIPs": addresses.collect::<Vec<_>>(), "ports": ports.collect::<Vec<_>>()}})
}

/// The EndpointSlice with all the ports and so many endpoints.
fn endpoints(count: u8) -> Value {
    let endpoints: Vec<_> = (1..=count)
        .map(|n| json!({"addresses": [format!("10.244.9.{n}")], "nodeName": "node-2"}))
        .collect();
    let mut slice = slice("attacker", "huge", &json!(endpoints));
    let ports =
        (0..PORTS).map(|n| json!({"name": format!("p{n}"), "port": 8000, "protocol": "TCP"}));
    slice["ports"] = ports.collect();
    slice
}

/// How many endpoints a port of an address has. All elements of the table would take too long to
/// list.
fn leads_to(ns: &Namespace, address: &str, port: u16) -> Option<usize> {
    let at = format!("{{ {address} . tcp . {port} }}");
    let get = ["get", "element", "ip", "nftlet", "frontends", &at];
    let found = ns.command("nft").args(get).output().expect("nft runs");
    let text = String::from_utf8_lossy(&found.stdout).into_owned();
    let (_, count) = text.split_once("goto lb-")?;
    let digits = count.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

/// Waits until the first and the last of the frontends have so many endpoints.
#[track_caller]
fn becomes(neighbour: &Neighbour, count: Option<usize>) {
    let deadline = Instant::now() + PATIENCE;
    for (address, port) in [("172.20.0.0", 1000), (LAST, 999 + PORTS)] {
        while leads_to(&neighbour.node.ns, address, port) != count {
            assert!(
                Instant::now() < deadline,
                "{address} . tcp . {port} should have {count:?} endpoints"
            );
        }
    }
}

#[test]
fn a_service_with_very_many_frontends_holds_up_no_other() {
    let Some(neighbour) = Neighbour::new() else {
        return;
    };
    let _agent = neighbour.node.run();
    let api = &neighbour.node.api;
    let in_force = AtomicUsize::new(0);
    // The neighbour may be done before a step is in force.
    while in_force.load(Ordering::Relaxed) < STEPS {
        neighbour.changes_in_time_while(|_| {
            let started = Instant::now();
            let step = in_force.load(Ordering::Relaxed) % 3;
            match step {
                0 => {
                    api.put(SLICES, endpoints(1));
                    api.put(SERVICES, service());
                    becomes(&neighbour, Some(1));
                }
                1 => {
                    api.put(SLICES, endpoints(2));
                    becomes(&neighbour, Some(2));
                }
                _ => {
                    api.delete(SERVICES, "attacker/huge");
                    becomes(&neighbour, None);
                }
            }
            eprintln!("step {step} is in force after {:?}", started.elapsed());
            in_force.fetch_add(1, Ordering::Relaxed);
        });
    }
}
