//! Conversion of Services.

use std::collections::HashSet;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::address::{parse_range, parse_routable, parse_unicast};
use super::report::FieldReport;
use super::{Converter, PORT_HINT, PROTOCOL_HINT, non_empty, port, protocol, timestamp};
use crate::model::{
    Family, ObjectName, Protocol, Service, ServiceKind, ServicePort, TrafficPolicy,
};
use crate::source::wire;

/// How many more values a notice lists after the first.
const MOST_SHOWN: usize = 3;
/// The default of `sessionAffinityConfig.clientIP.timeoutSeconds`: three hours.
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;
/// The longest affinity that the API accepts: one day.
const LONGEST_AFFINITY_SECONDS: i64 = 86_400;

impl Converter {
    pub(super) fn service(
        &mut self,
        name: &ObjectName,
        from: &wire::Service,
        report: &mut FieldReport,
    ) -> Service {
        let meta = from.metadata.as_ref();
        let labels = meta.and_then(|meta| meta.labels.as_ref());
        let others = labels.is_some_and(|labels| labels.service_proxy_name.is_some());
        let empty = wire::ServiceSpec::default();
        let spec = from.spec.as_ref().unwrap_or(&empty);
        let kind = service_kind(spec, report);
        let external_policy = policy(
            "spec.externalTrafficPolicy",
            spec.external_traffic_policy.as_deref(),
            report,
        );
        let has_addresses = !matches!(kind, ServiceKind::ExternalName | ServiceKind::Headless);
        let service = Service {
            name: name.clone(),
            created: meta
                .and_then(|meta| timestamp(meta.creation_timestamp.as_deref()))
                .map(|time| time.as_second()),
            kind: if others {
                ServiceKind::OtherProxy
            } else {
                kind
            },
            cluster_ips: if has_addresses {
                cluster_ips(spec, report)
            } else {
                Vec::new()
            },
            ports: self.service_ports(spec, report),
            external_ips: addresses("spec.externalIPs", spec.external_ips.as_deref(), report),
            load_balancer_ips: load_balancer_ips(from.status.as_ref(), report),
            source_ranges: source_ranges(spec, report),
            external_policy,
            internal_policy: policy(
                "spec.internalTrafficPolicy",
                spec.internal_traffic_policy.as_deref(),
                report,
            ),
            affinity_seconds: affinity(spec, report),
            health_check_node_port: health_check_node_port(spec, kind, external_policy, report),
        };
        if !service.has_frontends() {
            return service;
        }
        let service = without_other_families(service, report);
        report_ranges_of_one_family(&service, report);
        report_repeated_ports(&service, report);
        service
    }

    fn service_ports(
        &mut self,
        spec: &wire::ServiceSpec,
        report: &mut FieldReport,
    ) -> Vec<ServicePort> {
        let entries = spec.ports.as_deref().unwrap_or_default();
        let mut ports = Vec::with_capacity(entries.len());
        for (index, entry) in entries.iter().enumerate() {
            let field = |name: &str| format!("spec.ports[{index}].{name}");
            let Some(protocol) = protocol(entry.protocol.as_deref()) else {
                let value = entry.protocol.as_deref().unwrap_or_default();
                report.left_out(field("protocol"), value, PROTOCOL_HINT);
                continue;
            };
            let number = entry.port.unwrap_or_default();
            let Some(number) = port(number) else {
                report.left_out(field("port"), number, PORT_HINT);
                continue;
            };
            // The API writes an absent nodePort as 0.
            let node_port = entry.node_port.filter(|number| *number != 0);
            let usable = node_port.and_then(port);
            if let (Some(number), None) = (node_port, usable) {
                report.left_out(field("nodePort"), number, PORT_HINT);
            }
            ports.push(ServicePort {
                name: self
                    .interner
                    .string(entry.name.as_deref().unwrap_or_default()),
                protocol,
                port: number,
                node_port: usable,
            });
        }
        ports
    }
}

/// Removes addresses of families in which the service has no ClusterIP.
fn without_other_families(mut service: Service, report: &mut FieldReport) -> Service {
    let families: Vec<Family> = service
        .cluster_ips
        .iter()
        .copied()
        .map(Family::of)
        .collect();
    let mut others = Vec::new();
    for list in [&mut service.load_balancer_ips, &mut service.external_ips] {
        list.retain(|address| {
            let own = families.contains(&Family::of(*address));
            if !own && !others.contains(address) {
                others.push(*address);
            }
            own
        });
    }
    if let Some((first, more)) = others.split_first() {
        let family = Family::of(*first);
        let hint = format!(
            "{}is not served, since the service has no {family} ClusterIP; make the service \
             dual-stack (spec.ipFamilyPolicy) or remove the address",
            and_more(more)
        );
        report.left_out("the address", first, hint);
    }
    service
}

/// Reports load balancer addresses of a family without source ranges.
fn report_ranges_of_one_family(service: &Service, report: &mut FieldReport) {
    let (v4, v6): (Vec<IpNet>, Vec<IpNet>) = service
        .source_ranges
        .iter()
        .copied()
        .partition(|range| Family::of(range.addr()) == Family::V4);
    let (present, absent) = match (v4.is_empty(), v6.is_empty()) {
        (false, true) => (v4, Family::V6),
        (true, false) => (v6, Family::V4),
        (true, true) | (false, false) => return,
    };
    // A range of all addresses is meant for both families.
    if present.iter().any(|range| range.prefix_len() == 0) {
        return;
    }
    let mut addresses = service.load_balancer_ips.iter().copied();
    if let Some(address) = addresses.find(|address| Family::of(*address) == absent) {
        let all = match absent {
            Family::V4 => "0.0.0.0/0",
            Family::V6 => "::/0",
        };
        let hint = format!(
            "has no {absent} range, so all clients of the load balancer's address {address} are \
             denied; add ranges, or {all} for all"
        );
        let shown = present.iter().take(MOST_SHOWN).map(ToString::to_string);
        let shown = shown.collect::<Vec<_>>().join(",");
        report.left_out("spec.loadBalancerSourceRanges", shown, hint);
    }
}

/// Reports port numbers that a service uses twice. The first port has the frontends.
fn report_repeated_ports(service: &Service, report: &mut FieldReport) {
    let mut ports = HashSet::new();
    let mut node_ports = HashSet::new();
    let mut twice = Vec::new();
    for port in &service.ports {
        let (protocol, name) = (port.protocol, &port.name);
        if !ports.insert((protocol, port.port)) {
            twice.push(format!("{} {protocol} of port {name}", port.port));
        }
        let node_port = port.node_port.into_iter();
        for number in node_port.filter(|number| !node_ports.insert((protocol, *number))) {
            twice.push(format!("nodePort {number} {protocol} of port {name}"));
        }
    }
    let health_check = service.health_check_node_port.into_iter();
    for number in health_check.filter(|number| node_ports.contains(&(Protocol::Tcp, *number))) {
        twice.push(format!("healthCheckNodePort {number} TCP"));
    }
    if let Some((first, more)) = twice.split_first() {
        let hint = format!(
            "{}is used twice, and the first port keeps it; use each number once per protocol",
            and_more(more)
        );
        report.left_out("spec.ports", first, hint);
    }
}

/// Lists the first few values, as a part of a sentence.
fn and_more<T: ToString>(more: &[T]) -> String {
    if more.is_empty() {
        return String::new();
    }
    let shown = more.iter().take(MOST_SHOWN).map(ToString::to_string);
    let shown = shown.collect::<Vec<_>>().join(", ");
    let dots = if more.len() > MOST_SHOWN { ", ..." } else { "" };
    format!("({} more: {shown}{dots}) ", more.len())
}

fn service_kind(spec: &wire::ServiceSpec, report: &mut FieldReport) -> ServiceKind {
    let kind = match non_empty(spec.type_.as_deref()) {
        Some("ExternalName") => return ServiceKind::ExternalName,
        None | Some("ClusterIP") => ServiceKind::ClusterIp,
        Some("NodePort") => ServiceKind::NodePort,
        Some("LoadBalancer") => ServiceKind::LoadBalancer,
        Some(other) => {
            report.left_out(
                "spec.type",
                other,
                "is not a type of service; write ClusterIP, NodePort, LoadBalancer or ExternalName",
            );
            ServiceKind::ClusterIp
        }
    };
    // `clusterIP` is the first of `clusterIPs`; hand-written objects may have only one of them.
    let first = non_empty(spec.cluster_ip.as_deref())
        .or_else(|| spec.cluster_ips.as_deref()?.first().map(|text| &**text));
    match non_empty(first) {
        None | Some("None") => ServiceKind::Headless,
        Some(_) => kind,
    }
}

fn cluster_ips(spec: &wire::ServiceSpec, report: &mut FieldReport) -> Vec<IpAddr> {
    let listed = spec.cluster_ips.as_deref().unwrap_or_default();
    let single = spec.cluster_ip.iter();
    let entries: Vec<(String, &wire::Text<'_>)> = if listed.is_empty() {
        single
            .map(|text| ("spec.clusterIP".to_owned(), text))
            .collect()
    } else {
        let field = |index| format!("spec.clusterIPs[{index}]");
        listed
            .iter()
            .enumerate()
            .map(|(index, text)| (field(index), text))
            .collect()
    };
    let families = spec.ip_families.as_deref().unwrap_or_default();
    let mut addresses: Vec<IpAddr> = Vec::with_capacity(entries.len());
    for (index, (field, text)) in entries.into_iter().enumerate() {
        let ip = match parse_unicast(text) {
            Ok(ip) => ip,
            Err(fault) => {
                report.left_out(field, text, fault);
                continue;
            }
        };
        let family = Family::of(ip);
        if addresses.iter().any(|known| Family::of(*known) == family) {
            let hint = format!("is a second {family} address; keep one of each family");
            report.left_out(field, text, hint);
            continue;
        }
        if let Some(declared) = families.get(index)
            && **declared != *family.to_string()
        {
            // The address has precedence, since packets have it.
            let hint = format!("does not match \"{text}\"; the address is served as {family}");
            report.left_out(format!("spec.ipFamilies[{index}]"), declared, hint);
        }
        addresses.push(ip);
    }
    addresses
}

fn addresses(
    field: &str,
    texts: Option<&[wire::Text<'_>]>,
    report: &mut FieldReport,
) -> Vec<IpAddr> {
    let texts = texts.unwrap_or_default();
    let mut addresses = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        match parse_routable(text) {
            Ok(ip) if addresses.contains(&ip) => {}
            Ok(ip) => addresses.push(ip),
            Err(fault) => report.left_out(format!("{field}[{index}]"), text, fault),
        }
    }
    addresses
}

fn load_balancer_ips(
    status: Option<&wire::ServiceStatus>,
    report: &mut FieldReport,
) -> Vec<IpAddr> {
    let ingress = status
        .and_then(|status| status.load_balancer.as_ref())
        .and_then(|balancer| balancer.ingress.as_deref())
        .unwrap_or_default();
    let mut addresses = Vec::with_capacity(ingress.len());
    for (index, entry) in ingress.iter().enumerate() {
        // An entry may have only a host name. Mode Proxy means that traffic must go through the load
        // balancer instead of being handled on the node.
        let Some(text) = non_empty(entry.ip.as_deref()) else {
            continue;
        };
        let field = |name: &str| format!("status.loadBalancer.ingress[{index}].{name}");
        match non_empty(entry.ip_mode.as_deref()) {
            None | Some("VIP") => {}
            Some("Proxy") => continue,
            Some(mode) => {
                report.left_out(field("ipMode"), mode, "is not a mode; write VIP or Proxy");
                continue;
            }
        }
        match parse_routable(text) {
            Ok(ip) if addresses.contains(&ip) => {}
            Ok(ip) => addresses.push(ip),
            Err(fault) => report.left_out(field("ip"), text, fault),
        }
    }
    addresses
}

/// Converts `loadBalancerSourceRanges`. A list without a valid range denies all clients: its author
/// wanted a restriction.
fn source_ranges(spec: &wire::ServiceSpec, report: &mut FieldReport) -> Vec<IpNet> {
    let texts = spec
        .load_balancer_source_ranges
        .as_deref()
        .unwrap_or_default();
    let mut ranges = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        match parse_range(text.trim()) {
            Ok(range) => ranges.push(range),
            Err(fault) => {
                report.left_out(
                    format!("spec.loadBalancerSourceRanges[{index}]"),
                    text,
                    fault,
                );
            }
        }
    }
    if ranges.is_empty() && !texts.is_empty() {
        report.left_out(
            "spec.loadBalancerSourceRanges",
            texts.iter().map(|text| &**text).collect::<Vec<_>>().join(","),
            "has no valid range, so all clients of the load balancer's addresses are denied; correct the list or remove it",
        );
        // No client has the unspecified address.
        ranges.extend(Ipv4Net::from_str("0.0.0.0/32").map(IpNet::V4));
        ranges.extend(Ipv6Net::from_str("::/128").map(IpNet::V6));
    }
    ranges
}

fn policy(field: &str, text: Option<&str>, report: &mut FieldReport) -> TrafficPolicy {
    match non_empty(text) {
        None | Some("Cluster") => TrafficPolicy::Cluster,
        Some("Local") => TrafficPolicy::Local,
        Some(other) => {
            report.left_out(field, other, "is not a policy; write Cluster or Local");
            TrafficPolicy::Cluster
        }
    }
}

fn affinity(spec: &wire::ServiceSpec, report: &mut FieldReport) -> Option<u32> {
    match non_empty(spec.session_affinity.as_deref()) {
        None | Some("None") => return None,
        Some("ClientIP") => {}
        Some(other) => {
            report.left_out(
                "spec.sessionAffinity",
                other,
                "is not a kind of affinity; write ClientIP or None",
            );
            return None;
        }
    }
    let seconds = spec
        .session_affinity_config
        .as_ref()
        .and_then(|config| config.client_ip.as_ref())
        .and_then(|client_ip| client_ip.timeout_seconds)
        .unwrap_or_else(|| DEFAULT_AFFINITY_SECONDS.into());
    Some(seconds)
        .filter(|seconds| (1..=LONGEST_AFFINITY_SECONDS).contains(seconds))
        .and_then(|seconds| u32::try_from(seconds).ok())
        .or_else(|| {
            report.left_out(
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                seconds,
                "is out of range, so 10800 is used; write a number from 1 to 86400",
            );
            Some(DEFAULT_AFFINITY_SECONDS)
        })
}

fn health_check_node_port(
    spec: &wire::ServiceSpec,
    kind: ServiceKind,
    external_policy: TrafficPolicy,
    report: &mut FieldReport,
) -> Option<u16> {
    if kind != ServiceKind::LoadBalancer || external_policy != TrafficPolicy::Local {
        return None;
    }
    let number = spec.health_check_node_port.filter(|number| *number != 0)?;
    let usable = port(number);
    if usable.is_none() {
        report.left_out("spec.healthCheckNodePort", number, PORT_HINT);
    }
    usable
}
