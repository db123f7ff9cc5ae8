//! A service with thousands of source ranges, all of which change again and again.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::support::objects::{service, with};
use serde_json::json;

use super::neighbour::Neighbour;
use nftlet_lab::fake_api::SERVICES;
use nftlet_lab::netns::PATIENCE;

const RANGES: u32 = 10_000;
/// The lists that come into force while the neighbour changes.
const LISTS: usize = 5;

/// Ranges that are apart; none of one list is in another.
fn ranges(list: usize) -> Vec<String> {
    let first = u32::try_from(list).expect("not so many lists") * RANGES;
    (first..first + RANGES)
        .map(|number| {
            let [a, b, c, d] = (number * 8).to_be_bytes();
            format!("{}.{b}.{c}.{d}/30", a + 20)
        })
        .collect()
}

/// Writes the service to the API server.
fn put(neighbour: &Neighbour, ranges: &[String]) {
    neighbour.node.api.put(
        SERVICES,
        with(
            service("attacker/huge", "10.96.0.66"),
            json!({
                "spec": {
                    "type": "LoadBalancer", "loadBalancerSourceRanges": ranges,
                    "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30066}],
                },
                "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.66"}]}},
            }),
        ),
    );
}

/// The chains of lists of ranges. A list gets one in the transaction that puts it in force.
fn chains(neighbour: &Neighbour) -> BTreeSet<String> {
    let listed = neighbour.node.ns.nft(&["list", "chains", "ip"]);
    let words = listed.split_whitespace();
    let lists = words.filter(|word| word.starts_with("sources-"));
    lists.map(str::to_owned).collect()
}

#[test]
fn a_service_with_thousands_of_source_ranges_holds_up_no_other() {
    let Some(neighbour) = Neighbour::new() else {
        return;
    };
    let _agent = neighbour.node.run();
    neighbour.changes_in_time_while(LISTS, |call| {
        let before = chains(&neighbour);
        put(&neighbour, &ranges(call));
        let deadline = Instant::now() + PATIENCE;
        while chains(&neighbour).is_subset(&before) {
            assert!(Instant::now() < deadline, "the list is not in force");
        }
    });
}
