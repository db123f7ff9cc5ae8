//! Pods and Namespaces.

use std::net::IpAddr;
use std::sync::Arc;

use smallvec::SmallVec;

use super::address::parse_unicast;
use super::report::Report;
use super::{Converter, PORT_HINT, PROTOCOL_HINT, non_empty, port, protocol, timestamp};
use crate::model::{Family, Labels, NAMESPACE_NAME, NamedPort, Namespace, ObjectName, Pod};
use crate::source::wire;

impl Converter {
    /// The facts of a Pod.
    pub(super) fn pod(&mut self, name: &ObjectName, from: &wire::Pod, report: &mut Report) -> Pod {
        let meta = from.metadata.as_ref();
        let spec = from.spec.as_ref();
        let status = from.status.as_ref();
        let phase = status.and_then(|status| status.phase.as_deref());
        Pod {
            name: name.clone(),
            created: meta
                .and_then(|meta| timestamp(meta.creation_timestamp.as_deref()))
                .map(|time| time.as_second()),
            node: spec
                .and_then(|spec| non_empty(spec.node_name.as_deref()))
                .map(|node| self.interner.string(node)),
            host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
            ended: matches!(phase, Some("Succeeded" | "Failed")),
            terminating: meta.is_some_and(|meta| meta.deletion_timestamp.is_some()),
            addresses: status.map_or_else(SmallVec::new, |status| pod_ips(status, report)),
            labels: self.labels(meta.and_then(|meta| meta.labels.as_ref()), None),
            ports: self.named_ports(spec, report),
        }
    }

    /// The facts of a Namespace.
    pub(super) fn namespace(&mut self, name: &ObjectName, from: &wire::Namespace) -> Namespace {
        let labels = from.metadata.as_ref().and_then(|meta| meta.labels.as_ref());
        Namespace {
            name: name.clone(),
            labels: self.labels(labels, Some((NAMESPACE_NAME, name.name()))),
        }
    }

    /// Labels as they were written, and one that counts whatever was written.
    fn labels(&mut self, from: Option<&wire::AllLabels>, always: Option<(&str, &str)>) -> Labels {
        let written = from.into_iter().flatten();
        let written = written.map(|(key, value)| (&**key, value.as_deref().unwrap_or_default()));
        self.interner.labels(written.chain(always))
    }

    /// The ports that have a name, of containers and of init containers that keep running beside
    /// them.
    fn named_ports(
        &mut self,
        spec: Option<&wire::PodSpec>,
        report: &mut Report,
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
        found.sort_unstable();
        found.dedup();
        self.interner.ports(found)
    }

    fn container_ports(
        &mut self,
        container_field: std::fmt::Arguments<'_>,
        container: &wire::Container,
        found: &mut Vec<NamedPort>,
        report: &mut Report,
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

/// `podIPs`, or `podIP` where the list is empty; of each family the first one.
fn pod_ips(status: &wire::PodStatus, report: &mut Report) -> SmallVec<[IpAddr; 2]> {
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
