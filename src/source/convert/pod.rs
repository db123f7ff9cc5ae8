//! Conversion of Pods and Namespaces.

use std::net::IpAddr;
use std::sync::Arc;

use smallvec::SmallVec;

use super::address::parse_unicast;
use super::policy;
use super::report::FieldReport;
use super::{Converter, PORT_HINT, PROTOCOL_HINT, non_empty, port, protocol, timestamp};
use crate::model::{
    Evidence, Family, Labels, NAMESPACE_NAME, NamedPort, Namespace, ObjectName, Pod, Sandbox,
};
use crate::source::wire;

/// The label by which a Deployment names its ReplicaSets.
const TEMPLATE_HASH: &str = "pod-template-hash";

/// Returns the name of the workload that manages a pod: the controller among its owners, or the
/// Deployment of a ReplicaSet, whose name is that of the ReplicaSet without the hash.
fn workload<'a>(owners: &'a [wire::OwnerReference], labels: &Labels) -> Option<&'a str> {
    let mut owners = owners.iter();
    let owner = owners.find(|owner| owner.controller == Some(true))?;
    let name = non_empty(owner.name.as_deref())?;
    let hash = labels.get(TEMPLATE_HASH);
    let is_replica_set = owner.kind.as_deref() == Some("ReplicaSet");
    let deployment = hash
        .filter(|_| is_replica_set)
        .and_then(|hash| name.strip_suffix(&**hash)?.strip_suffix('-'));
    Some(deployment.unwrap_or(name))
}

impl Converter {
    pub(super) fn pod(
        &mut self,
        name: &ObjectName,
        from: &wire::Pod,
        report: &mut FieldReport,
    ) -> Pod {
        let meta = from.metadata.as_ref();
        let spec = from.spec.as_ref();
        let status = from.status.as_ref();
        let deleted = meta.is_some_and(|meta| meta.deletion_timestamp.is_some());
        let lifecycle = status.map(|status| Lifecycle::new(status, deleted));
        let lifecycle = lifecycle.unwrap_or_default();
        let labels = self.labels(meta.and_then(|meta| meta.labels.as_ref()), None);
        Pod {
            name: name.clone(),
            node: spec
                .and_then(|spec| non_empty(spec.node_name.as_deref()))
                .map(|node| self.interner.string(node)),
            host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
            ended: lifecycle.ended,
            running: lifecycle.running,
            evidence: lifecycle.evidence,
            addresses: status.map_or_else(SmallVec::new, |status| pod_ips(status, report)),
            owner: meta
                .and_then(|meta| workload(meta.owner_references.as_deref()?, &labels))
                .map(|owner| self.interner.string(owner)),
            labels,
            ports: self.named_ports(spec, report),
        }
    }

    pub(super) fn namespace(
        &mut self,
        name: &ObjectName,
        from: &wire::Namespace,
        report: &mut FieldReport,
    ) -> Namespace {
        let meta = from.metadata.as_ref();
        let labels = meta.and_then(|meta| meta.labels.as_ref());
        let annotations = meta.and_then(|meta| meta.annotations.as_ref());
        Namespace {
            name: name.clone(),
            labels: self.labels(labels, Some((NAMESPACE_NAME, name.name()))),
            mode: policy::mode(annotations.and_then(|it| it.mode.as_ref()), report),
        }
    }

    /// Converts labels. `always` replaces a label with the same key.
    pub(super) fn labels(
        &mut self,
        from: Option<&wire::AllLabels>,
        always: Option<(&str, &str)>,
    ) -> Labels {
        let written = from.into_iter().flatten();
        let written = written.map(|(key, value)| (&**key, value.as_deref().unwrap_or_default()));
        self.interner.labels(written.chain(always))
    }

    /// Converts the named ports, first of containers, then of init containers that run beside them
    /// (`restartPolicy: Always`).
    fn named_ports(
        &mut self,
        spec: Option<&wire::PodSpec>,
        report: &mut FieldReport,
    ) -> Arc<[NamedPort]> {
        let mut found = Vec::new();
        let containers = spec.and_then(|spec| spec.containers.as_deref());
        for (index, container) in containers.unwrap_or_default().iter().enumerate() {
            let field = format_args!("spec.containers[{index}]");
            self.container_ports(field, container, &mut found, report);
        }
        let init_containers = spec.and_then(|spec| spec.init_containers.as_deref());
        for (index, container) in init_containers.unwrap_or_default().iter().enumerate() {
            if container.restart_policy.as_deref() == Some("Always") {
                let field = format_args!("spec.initContainers[{index}]");
                self.container_ports(field, container, &mut found, report);
            }
        }
        // The first of two ports with one name is used, as for a named `targetPort` of a service.
        // The sort is stable.
        found.sort_by(|a, b| (&a.name, a.protocol).cmp(&(&b.name, b.protocol)));
        found.dedup_by(|a, b| (&a.name, a.protocol) == (&b.name, b.protocol));
        self.interner.ports(found)
    }

    fn container_ports(
        &mut self,
        container_field: std::fmt::Arguments<'_>,
        container: &wire::Container,
        found: &mut Vec<NamedPort>,
        report: &mut FieldReport,
    ) {
        let entries = container.ports.as_deref().unwrap_or_default();
        for (index, entry) in entries.iter().enumerate() {
            let Some(name) = non_empty(entry.name.as_deref()) else {
                continue;
            };
            let field = |name: &str| format!("{container_field}.ports[{index}].{name}");
            let Some(protocol) = protocol(entry.protocol.as_deref()) else {
                let value = entry.protocol.as_deref().unwrap_or_default();
                report.left_out(field("protocol"), value, PROTOCOL_HINT);
                continue;
            };
            let number = entry.container_port.unwrap_or_default();
            let Some(port) = port(number) else {
                report.left_out(field("containerPort"), number, PORT_HINT);
                continue;
            };
            found.push(NamedPort {
                name: self.interner.string(name),
                protocol,
                port,
            });
        }
    }
}

/// The lifecycle of a pod according to its status.
#[derive(Debug, Default)]
struct Lifecycle {
    ended: bool,
    running: bool,
    evidence: Evidence,
}

/// The condition of a pod whose sandbox has a network, and its name before Kubernetes 1.28.
const SANDBOX_CONDITIONS: [&str; 2] = ["PodReadyToStartContainers", "PodHasNetwork"];

impl Lifecycle {
    /// Evaluates a status. The containers of a `deleted` pod are not started again.
    fn new(status: &wire::PodStatus, deleted: bool) -> Self {
        let containers = status.container_statuses.as_deref().unwrap_or_default();
        let others = [
            &status.init_container_statuses,
            &status.ephemeral_container_statuses,
        ];
        let others = others.into_iter().flatten().flatten();
        let states = || {
            let all = containers.iter().chain(others.clone());
            all.filter_map(|container| container.state.as_ref())
        };
        let started = states()
            .filter_map(|state| state.running.as_ref())
            .map(|running| seconds(running.started_at.as_ref()).unwrap_or_default())
            .max();
        let phase = status.phase.as_deref();
        // The kubelet writes this phase together with the containers; a manifest may omit them.
        let running = started.is_some() || (phase == Some("Running") && states().next().is_none());
        let terminated = !containers.is_empty()
            && containers.iter().all(|container| {
                let state = container.state.as_ref();
                state.is_some_and(|state| state.terminated.is_some())
            });
        // Kubelets from 1.22 to 1.26 write the phase Failed before they stop the containers.
        let finished = matches!(phase, Some("Succeeded" | "Failed")) || (deleted && terminated);
        let conditions = status.conditions.as_deref().unwrap_or_default();
        let condition = SANDBOX_CONDITIONS.iter().find_map(|name| {
            let mut conditions = conditions.iter();
            conditions.find(|condition| condition.type_.as_deref() == Some(*name))
        });
        let ready = condition.and_then(|condition| match condition.status.as_deref() {
            Some("True") => {
                let since = seconds(condition.last_transition_time.as_ref());
                Some(Sandbox::RanAt(since.unwrap_or_default()))
            }
            Some("False") => Some(Sandbox::Gone),
            _ => None,
        });
        // A running container has a sandbox.
        let sandbox = match (ready, started.map(Sandbox::RanAt)) {
            (Some(ready), Some(started)) => ready.max(started),
            (ready, started) => ready.or(started).unwrap_or_default(),
        };
        Self {
            ended: finished && started.is_none(),
            running,
            evidence: Evidence { sandbox, started },
        }
    }
}

/// Returns a time in seconds since 1970, limited to the range of `u32`.
fn seconds(time: Option<&wire::Text<'_>>) -> Option<u32> {
    let time = timestamp(time.map(|time| &**time))?.as_second();
    Some(u32::try_from(time.max(0)).unwrap_or(u32::MAX))
}

/// Converts `podIPs`, or `podIP` if the list is empty. Returns the first address of each family.
fn pod_ips(status: &wire::PodStatus, report: &mut FieldReport) -> SmallVec<[IpAddr; 2]> {
    let mut addresses = SmallVec::<[IpAddr; 2]>::new();
    let mut take = |field: std::fmt::Arguments<'_>, text: &str| match parse_unicast(text) {
        Ok(ip) if addresses.contains(&ip) => {}
        Ok(ip) => {
            let family = Family::of(ip);
            if addresses.iter().any(|known| Family::of(*known) == family) {
                let hint = format!("is a second {family} address; keep one of each family");
                report.left_out(field, text, hint);
            } else {
                addresses.push(ip);
            }
        }
        Err(fault) => report.left_out(field, text, fault),
    };
    let listed = status.pod_ips.as_deref().unwrap_or_default();
    if listed.is_empty() {
        if let Some(text) = non_empty(status.pod_ip.as_deref()) {
            take(format_args!("status.podIP"), text);
        }
    } else {
        for (index, entry) in listed.iter().enumerate() {
            let text = entry.ip.as_deref().unwrap_or_default();
            take(format_args!("status.podIPs[{index}].ip"), text);
        }
    }
    addresses
}

#[cfg(test)]
mod tests;
