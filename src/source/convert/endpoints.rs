//! Conversion of EndpointSlices.

use std::sync::Arc;

use super::address::parse_routable;
use super::report::FieldReport;
use super::{Converter, PORT_HINT, PROTOCOL_HINT, non_empty, port, protocol, timestamp};
use crate::model::{Endpoint, EndpointSlice, Family, Hints, ObjectName, SlicePort};
use crate::source::wire;

impl Converter {
    /// Converts an EndpointSlice. Returns `None` for one that has no rules: it belongs to no service
    /// (label `kubernetes.io/service-name`), to a headless one (label
    /// `service.kubernetes.io/headless`), or holds host names (`addressType: FQDN`).
    pub(super) fn endpoint_slice(
        &mut self,
        name: &ObjectName,
        from: &wire::EndpointSlice,
        report: &mut FieldReport,
    ) -> Option<EndpointSlice> {
        let meta = from.metadata.as_ref();
        let labels = meta.and_then(|meta| meta.labels.as_ref())?;
        let service = non_empty(labels.service_name.as_deref())?;
        if labels.headless.is_some() {
            return None;
        }
        let family = match from.address_type.as_deref().unwrap_or_default() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            "FQDN" => return None,
            other => {
                let hint = "is not an address type; write IPv4 or IPv6";
                report.left_out("addressType", other, hint);
                return None;
            }
        };
        let found = from.endpoints.as_deref().unwrap_or_default();
        // Exact, since a cluster can have a million endpoints and a list that grows reserves up to
        // twice its length.
        let mut endpoints = Vec::with_capacity(found.len());
        for (index, endpoint) in found.iter().enumerate() {
            endpoints.extend(self.endpoint(index, endpoint, family, report));
        }
        Some(EndpointSlice {
            name: name.clone(),
            service: ObjectName::new(name.namespace(), service),
            created: meta
                .and_then(|meta| timestamp(meta.creation_timestamp.as_deref()))
                .map(|time| time.as_second()),
            family,
            ports: self.slice_ports(from.ports.as_deref().unwrap_or_default(), report),
            endpoints,
            triggered_at_ms: meta
                .and_then(|meta| meta.annotations.as_ref())
                .and_then(|annotations| timestamp(annotations.trigger_time.as_deref()))
                .map(|time| time.as_millisecond()),
        })
    }

    fn slice_ports(
        &mut self,
        entries: &[wire::SlicePort],
        report: &mut FieldReport,
    ) -> Vec<SlicePort> {
        let mut ports = Vec::with_capacity(entries.len());
        for (index, entry) in entries.iter().enumerate() {
            // Absent means every port, which a service proxy cannot use.
            let Some(number) = entry.port.filter(|number| *number != 0) else {
                continue;
            };
            let Some(protocol) = protocol(entry.protocol.as_deref()) else {
                let value = entry.protocol.as_deref().unwrap_or_default();
                report.left_out(format!("ports[{index}].protocol"), value, PROTOCOL_HINT);
                continue;
            };
            let Some(port) = port(number) else {
                report.left_out(format!("ports[{index}].port"), number, PORT_HINT);
                continue;
            };
            ports.push(SlicePort {
                name: self
                    .interner
                    .string(entry.name.as_deref().unwrap_or_default()),
                protocol,
                port,
            });
        }
        ports
    }

    fn endpoint(
        &mut self,
        index: usize,
        from: &wire::Endpoint,
        family: Family,
        report: &mut FieldReport,
    ) -> Option<Endpoint> {
        // The API defines all addresses of an endpoint as equivalent; proxies use the first.
        let text = from.addresses.as_deref()?.first()?;
        let field = || format!("endpoints[{index}].addresses[0]");
        let address = match parse_routable(text) {
            Ok(address) => address,
            Err(fault) => {
                report.left_out(field(), text, fault);
                return None;
            }
        };
        if Family::of(address) != family {
            let hint =
                format!("is not of the slice's addressType {family}; move it to another slice");
            report.left_out(field(), text, hint);
            return None;
        }
        let conditions = from.conditions.as_ref();
        Some(Endpoint {
            address,
            ready: conditions.and_then(|c| c.ready).unwrap_or(true),
            serving: conditions.and_then(|c| c.serving).unwrap_or(true),
            terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
            node: non_empty(from.node_name.as_deref()).map(|node| self.interner.string(node)),
            hints: from.hints.as_ref().and_then(|hints| self.hints(hints)),
        })
    }

    fn hints(&mut self, from: &wire::Hints) -> Option<Arc<Hints>> {
        let mut names = |entries: Option<&[wire::Named]>| {
            let entries = entries.filter(|entries| !entries.is_empty())?;
            let names = entries
                .iter()
                .filter_map(|entry| non_empty(entry.name.as_deref()));
            Some(names.map(|name| self.interner.string(name)).collect())
        };
        let hints = Hints {
            zones: names(from.for_zones.as_deref()),
            nodes: names(from.for_nodes.as_deref()),
        };
        (hints != Hints::default()).then(|| self.interner.hints(hints))
    }
}
