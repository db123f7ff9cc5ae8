//! Lines without end, where nothing takes them.

use std::process::Stdio;

use crate::support::objects::{self, service, with};
use serde_json::json;

use super::neighbour::Neighbour;
use crate::support::agent::{NFTLET, lines_with};
use crate::support::stuck::{full_disk, full_pipe};
use nftlet_lab::fake_api::SERVICES;
use nftlet_lab::netns::Daemon;

#[test]
fn log_lines_that_are_not_read_block_nothing() {
    let (_reader, pipe) = full_pipe();
    for stderr in [Stdio::from(pipe), Stdio::from(full_disk())] {
        let Some(neighbour) = Neighbour::new() else {
            return;
        };
        let arguments =
            neighbour
                .node
                .arguments(&["--metrics-bind-address=", "--healthz-bind-address=", "-v"]);
        let mut agent = Daemon::start_with_stderr(&neighbour.node.ns, NFTLET, arguments, stderr);
        neighbour.node.has("10.96.200.1");
        // Each change is another fault to log.
        neighbour.changes_in_time_while(1, |call| {
            let wrong = format!("no address {call} {}", "x".repeat(2_000));
            neighbour.node.api.put(
                SERVICES,
                with(
                    service("loud/web", "10.96.100.1"),
                    json!({"spec": {"externalIPs": [wrong]}}),
                ),
            );
            std::thread::sleep(std::time::Duration::from_millis(1));
        });
        assert!(agent.ended().is_none());
    }
}

/// A service that asks for what others have, at many ports and with each write at others.
#[test]
fn a_conflict_that_is_another_one_at_each_write_has_a_few_lines() {
    const WRITES: usize = 45;
    const PORTS: usize = 100;
    let Some(neighbour) = Neighbour::new() else {
        return;
    };
    let agent = neighbour.node.run();
    let service = |name: &str, created: &str, first: usize| {
        let ports = (first..first + PORTS)
            .map(|port| json!({"name": format!("p{port}"), "port": port}))
            .collect::<Vec<_>>();
        with(
            objects::service(&format!("loud/{name}"), "None"),
            json!({"metadata": {"creationTimestamp": created},
                "spec": {"externalIPs": ["203.0.113.9"], "ports": ports}}),
        )
    };
    let with_address = |mut service: serde_json::Value, address: &str| {
        service["spec"]["clusterIP"] = json!(address);
        service["spec"]["clusterIPs"] = json!([address]);
        service
    };
    let owner = service("owner", "2026-01-01T00:00:00Z", 1);
    let owner = with_address(owner, "10.96.100.1");
    neighbour.node.api.put(SERVICES, owner);
    for write in 0..WRITES {
        let claimant = service("claimant", "2026-02-01T00:00:00Z", 1 + write % 2 * 50);
        let claimant = with_address(claimant, "10.96.100.2");
        neighbour.node.api.put(SERVICES, claimant);
        // What is written shows that the write was seen.
        neighbour.node.has(&format!(
            "10.96.100.2 . tcp . {} ",
            if write % 2 == 0 { 1 } else { 101 }
        ));
    }
    let told = lines_with(&agent.log(), "Service loud/claimant");
    assert!((1..=9).contains(&told.len()), "{} lines", told.len());
}
