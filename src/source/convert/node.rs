//! Conversion of the own Node and of ServiceCIDRs.

use ipnet::IpNet;

use super::address::{parse_ip, parse_range};
use super::report::FieldReport;
use super::{Converter, non_empty};
use crate::model::{Node, ObjectName, ServiceCidr};
use crate::source::wire;

/// The taint of the cluster autoscaler on a node that it will remove.
const GOING_AWAY_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// The label with the zone of a node.
const ZONE: &str = "topology.kubernetes.io/zone";

impl Converter {
    pub(super) fn node(
        &mut self,
        name: &ObjectName,
        from: &wire::Node,
        report: &mut FieldReport,
    ) -> Node {
        let mut internal_ips = Vec::new();
        let mut external_ips = Vec::new();
        let mut all = Vec::new();
        let status = from.status.as_ref();
        let addresses = status.and_then(|status| status.addresses.as_deref());
        for (index, entry) in addresses.unwrap_or_default().iter().enumerate() {
            let text = entry.address.as_deref().unwrap_or_default();
            let parsed = parse_ip(text);
            all.extend(parsed.as_ref().ok());
            let list = match entry.type_.as_deref() {
                Some("InternalIP") => &mut internal_ips,
                Some("ExternalIP") => &mut external_ips,
                // Host names and DNS names, which may be addresses.
                _ => continue,
            };
            match parsed {
                Ok(ip) => list.push(ip),
                Err(fault) => {
                    report.left_out(format!("status.addresses[{index}].address"), text, fault);
                }
            }
        }
        all.sort_unstable();
        all.dedup();
        let meta = from.metadata.as_ref();
        let spec = from.spec.as_ref();
        let taints = spec
            .and_then(|spec| spec.taints.as_deref())
            .unwrap_or_default();
        let labels = self.labels(meta.and_then(|meta| meta.labels.as_ref()), None);
        Node {
            name: self.interner.string(name.name()),
            internal_ips,
            external_ips,
            pod_cidrs: spec.map_or_else(Vec::new, |spec| pod_cidrs(spec, report)),
            zone: labels.get(ZONE).filter(|zone| !zone.is_empty()).cloned(),
            going_away: meta.is_some_and(|meta| meta.deletion_timestamp.is_some())
                || taints
                    .iter()
                    .any(|taint| taint.key.as_deref() == Some(GOING_AWAY_TAINT)),
            labels,
            addresses: all.into(),
        }
    }

    pub(super) fn service_cidr(
        &mut self,
        name: &ObjectName,
        from: &wire::ServiceCidr,
        report: &mut FieldReport,
    ) -> ServiceCidr {
        let cidrs = from.spec.as_ref().and_then(|spec| spec.cidrs.as_deref());
        ServiceCidr {
            name: name.clone(),
            cidrs: ranges("spec.cidrs", cidrs.unwrap_or_default(), report),
        }
    }
}

fn pod_cidrs(spec: &wire::NodeSpec, report: &mut FieldReport) -> Vec<IpNet> {
    let listed = spec.pod_cidrs.as_deref().unwrap_or_default();
    if listed.is_empty() {
        let single = spec.pod_cidr.as_slice();
        let single = if non_empty(spec.pod_cidr.as_deref()).is_some() {
            single
        } else {
            &[]
        };
        ranges("spec.podCIDR", single, report)
    } else {
        ranges("spec.podCIDRs", listed, report)
    }
}

fn ranges(field: &str, texts: &[wire::Text<'_>], report: &mut FieldReport) -> Vec<IpNet> {
    let mut ranges = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        match parse_range(text) {
            Ok(range) => ranges.push(range),
            Err(fault) => report.left_out(format!("{field}[{index}]"), text, fault),
        }
    }
    ranges
}
