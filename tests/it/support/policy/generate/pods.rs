//! Random pods.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Namespace, Pod, PodStatus};
use serde_json::{Value, json};

use super::{POD_LABELS, Random, Shape, labels, node_addresses, slot, typed};

/// A pod without a name. Its address may be another pod's, too.
pub fn new_pod(random: &mut Random, shape: &Shape, namespaces: &[Namespace]) -> Pod {
    let namespace = &random.pick(namespaces).metadata.name;
    let number = 1 + random.below(shape.nodes.into()) as u8;
    let mut metadata = json!({
        "namespace": namespace,
        "labels": labels(random, &POD_LABELS),
    });
    if random.percent(12) {
        metadata["deletionTimestamp"] = json!("2026-01-01T01:00:00Z");
    }
    let spec = json!({
        "nodeName": format!("node-{number}"),
        "containers": containers(random),
    });
    let mut pod: Pod = typed(json!({"metadata": metadata, "spec": spec}));
    let addresses = slot(number, 1 + random.below(shape.slots.into()) as u8);
    match random.below(12) {
        0 => {
            pod.spec.get_or_insert_default().host_network = Some(true);
            pod.status = Some(status("Running", &node_addresses(number)));
        }
        1 => pod.status = Some(status("Succeeded", &addresses)),
        2 => {
            pod.status = typed(json!({"phase": "Pending"}));
            pod.spec.get_or_insert_default().node_name = None;
        }
        3 => pod.status = Some(status("Running", &addresses[..1])),
        4 => pod.status = Some(status("Running", &addresses[1..])),
        // Init containers run while the pod is pending.
        5 => pod.status = Some(status("Pending", &addresses)),
        _ => pod.status = Some(status("Running", &addresses)),
    }
    if let Some(status) = &mut pod.status
        && !random.percent(20)
    {
        show(random, status);
    }
    pod
}

/// What the kubelet says of the sandbox and the containers. There are few moments, so that some
/// pods with one address are equal.
pub fn show(random: &mut Random, status: &mut PodStatus) {
    let moment = |random: &mut Random| format!("2026-01-01T00:00:0{}Z", random.below(6));
    let waiting = json!({"waiting": {"reason": "ContainerCreating"}});
    let terminated = json!({"terminated": {"exitCode": 0}});
    let running = json!({"running": {"startedAt": moment(random)}});
    let (states, init, ready) = match random.below(12) {
        0 => (vec![waiting], None, Some("False")),
        1 => (vec![waiting], None, Some("True")),
        2 => (vec![waiting], Some(running), None),
        3 => (vec![terminated.clone(), terminated], None, Some("False")),
        4 => (vec![terminated, running], None, Some("True")),
        5 => (vec![running], None, Some("False")),
        6 | 7 => (vec![running], None, Some("True")),
        _ => (vec![running], None, None),
    };
    let container = |state| {
        typed(json!({
            "name": "one", "image": "x", "imageID": "", "ready": false, "restartCount": 0, "state": state,
        }))
    };
    status.container_statuses = Some(states.into_iter().map(container).collect());
    status.init_container_statuses = init.map(|state| vec![container(state)]);
    status.conditions = ready.map(|ready| {
        vec![typed(json!({
            "type": "PodReadyToStartContainers", "status": ready, "lastTransitionTime": moment(random),
        }))]
    });
}

/// Ends a pod with all its containers.
pub fn end(pod: &mut Pod, phase: &str) {
    let status = pod.status.get_or_insert_default();
    status.phase = Some(phase.into());
    status.container_statuses = None;
    status.init_container_statuses = None;
}

pub fn status(phase: &str, addresses: &[IpAddr]) -> PodStatus {
    let all: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    typed(json!({"phase": phase, "podIP": addresses.first(), "podIPs": all}))
}

/// The ports of a pod, some with names: the same names at different ports of different pods.
fn containers(random: &mut Random) -> Value {
    let mut first = vec![json!({"containerPort": 9090})];
    if random.percent(70) {
        let port = *random.pick(&[80, 8080]);
        first.push(json!({"name": "web", "containerPort": port, "protocol": "TCP"}));
    }
    if random.percent(40) {
        first.push(json!({"name": "peer", "containerPort": *random.pick(&[443, 9090])}));
    }
    let mut second = Vec::new();
    if random.percent(50) {
        let port = *random.pick(&[53, 8080]);
        second.push(json!({"name": "dns", "containerPort": port, "protocol": "UDP"}));
    }
    if random.percent(30) {
        second.push(json!({"name": "peer", "containerPort": 443, "protocol": "UDP"}));
    }
    if random.percent(15) {
        second.push(json!({"name": "web", "containerPort": *random.pick(&[80, 443])}));
    }
    json!([{"name": "one", "ports": first}, {"name": "two", "ports": second}])
}
