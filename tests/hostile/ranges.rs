//! A service with thousands of source ranges, all of which change again and again.

use std::time::Instant;

use serde_json::json;

use crate::common::netns::PATIENCE;
use crate::fake_api::SERVICES;
use crate::neighbour::Neighbour;

const RANGES: u32 = 10_000;
/// The lists that come into force while the neighbour changes.
const LISTS: usize = 5;

/// Ranges that are apart; none of one list is in the other.
fn ranges(list: usize) -> Vec<String> {
    let shift = u32::try_from(list % 2).unwrap_or_default() * 4;
    (0..RANGES)
        .map(|number| {
            let [a, b, c, d] = (number * 8 + shift).to_be_bytes();
            format!("{}.{b}.{c}.{d}/30", a + 20)
        })
        .collect()
}

/// Writes the service to the API server.
fn put(neighbour: &Neighbour, ranges: &[String]) {
    neighbour.node.api.put(
        SERVICES,
        json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"namespace": "attacker", "name": "huge"},
            "spec": {"type": "LoadBalancer", "clusterIP": "10.96.0.66",
                "clusterIPs": ["10.96.0.66"], "loadBalancerSourceRanges": ranges,
                "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30066}]},
            "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.66"}]}}}),
    );
}

/// Where the load balancer's address leads.
fn leads_to(neighbour: &Neighbour) -> String {
    let at = "{ 203.0.113.66 . tcp . 80 }";
    let get = ["get", "element", "ip", "nftlet", "frontends", at];
    let element = neighbour.node.ns.nft(&get);
    let (_, chain) = element.split_once("goto sources-").expect("a chain");
    chain.lines().next().unwrap_or_default().to_owned()
}

#[test]
fn a_service_with_thousands_of_source_ranges_holds_up_no_other() {
    let Some(neighbour) = Neighbour::new() else {
        return;
    };
    let lists = [ranges(0), ranges(1)];
    put(&neighbour, &lists[1]);
    let _agent = neighbour.node.run();
    neighbour.changes_in_time_while(LISTS, |call| {
        let before = leads_to(&neighbour);
        put(&neighbour, &lists[call % lists.len()]);
        let deadline = Instant::now() + PATIENCE;
        while leads_to(&neighbour) == before {
            assert!(Instant::now() < deadline, "the list is not in force");
        }
    });
}
