//! Pods with very many named ports, and pods that are deleted by force one after the other.

use crate::support::objects::{self, namespace, policy, with};
use serde_json::{Value, json};

use super::neighbour::Neighbour;
use crate::support::agent::{NFTLET, get, wait_for_log};
use nftlet_lab::fake_api::{NAMESPACES, PODS, POLICIES};
use nftlet_lab::netns::{Daemon, PATIENCE, wait_for};

/// The named ports of the pod, and of the policy that names them all.
const PORTS: u16 = 4000;
/// The pods that are deleted while they run.
const DELETED: usize = 300;
/// Where the agent serves its metrics.
const METRICS: &str = "127.0.0.1:10249";

/// A pod of this node with a container that runs.
fn pod(name: &str, address: &str, labels: &Value, ports: &[Value]) -> Value {
    let running = json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}});
    with(
        objects::pod(&format!("crowd/{name}"), "node-1", &[], &[address]),
        json!({"metadata": {"labels": labels},
            "spec": {"containers": [{"name": "main", "ports": ports}]},
            "status": {"containerStatuses": [{"name": "main", "state": running}]}}),
    )
}

#[test]
fn a_pod_with_thousands_of_named_ports_delays_no_other() {
    let Some(neighbour) = Neighbour::new() else {
        return;
    };
    let api = &neighbour.node.api;
    api.put(NAMESPACES, namespace("crowd", &[]));
    let ports = |prefix: &str| -> Vec<Value> {
        let names = (1..=PORTS)
            .map(|port| json!({"name": format!("{prefix}{port}"), "containerPort": port}));
        names.collect()
    };
    let named: Vec<Value> = (1..=PORTS)
        .map(|port| json!({"port": format!("p{port}")}))
        .collect();
    api.put(
        POLICIES,
        policy(
            "crowd/crowd",
            json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"ports": named}], "egress": [{"ports": named}]}),
        ),
    );
    let put = |prefix: &str| api.put(PODS, pod("wide", "10.244.1.7", &json!({}), &ports(prefix)));
    put("p");
    let agent = neighbour.node.run();
    wait_for_log(&agent, "the rules are in place");
    neighbour.changes_in_time_while(1, |call| {
        put(if call % 2 == 0 { "q" } else { "p" });
        std::thread::sleep(std::time::Duration::from_millis(20));
    });
}

#[test]
fn pods_deleted_by_force_delay_no_other() {
    let Some(neighbour) = Neighbour::new() else {
        return;
    };
    let api = &neighbour.node.api;
    api.put(NAMESPACES, namespace("crowd", &[]));
    api.put(
        POLICIES,
        policy(
            "crowd/crowd",
            json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
        ),
    );
    let arguments = neighbour
        .node
        .arguments(&[&format!("--metrics-bind-address={METRICS}")]);
    let agent = Daemon::start(&neighbour.node.ns, NFTLET, arguments);
    wait_for_log(&agent, "the rules are in place");
    neighbour.changes_in_time_while(1, |call| {
        if call < DELETED {
            let address = format!("10.244.{}.{}", 1 + call / 250, 1 + call % 250);
            let name = format!("pod-{call}");
            api.put(
                PODS,
                pod(&name, &address, &json!({"call": call.to_string()}), &[]),
            );
            api.delete(PODS, &format!("crowd/{name}"));
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    });
    // They are no pods any more, and the policies are in force.
    wait_for("no isolated pod", PATIENCE, || {
        let (_, page) = get(&neighbour.node.ns, METRICS, "/metrics");
        let has = |line: &str| page.lines().any(|known| known == line);
        (has("nftlet_policy_isolated_pods 0") && has("nftlet_network_policies_in_force 1"))
            .then_some(())
    });
}
