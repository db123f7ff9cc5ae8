//! Lines without end, where nothing takes them.

use std::process::Stdio;

use serde_json::json;

use crate::agent::NFTLET;
use crate::common::netns::Daemon;
use crate::fake_api::SERVICES;
use crate::neighbour::Neighbour;
use crate::stuck::{full_disk, full_pipe};

#[test]
fn lines_that_nothing_takes_stop_nobody() {
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
        // Each change is another fault to tell.
        neighbour.changes_in_time_while(1, |call| {
            let wrong = format!("no address {call} {}", "x".repeat(2_000));
            neighbour.node.api.put(
                SERVICES,
                json!({"apiVersion": "v1", "kind": "Service",
                    "metadata": {"namespace": "loud", "name": "web"},
                    "spec": {"clusterIP": "10.96.100.1", "clusterIPs": ["10.96.100.1"],
                        "externalIPs": [wrong], "ports": [{"port": 80}]}}),
            );
            std::thread::sleep(std::time::Duration::from_millis(1));
        });
        assert!(agent.ended().is_none());
    }
}
