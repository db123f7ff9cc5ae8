//! The own node, and the services whose plans depend on its zone or its addresses.
//!
//! The name of the node is in every plan: it decides which endpoints are local. It changes only while
//! there is no Node to use. Anything else concerns few services, which are found without a walk over
//! all of them.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::{Marks, Store};
use crate::model::{EndpointSlice, Family, Node, ObjectName, Service};

/// The objects that a change of the own node can concern.
#[derive(Debug, Default)]
pub(super) struct NodeDependents {
    /// Slices with hints for zones.
    zoned: HashSet<ObjectName>,
    /// Services with source ranges. A range that contains the node admits the addresses of the
    /// load balancer, too.
    restricted: HashSet<ObjectName>,
}

impl NodeDependents {
    /// Records a slice; `None` if it was deleted.
    pub fn set_slice(&mut self, name: &ObjectName, slice: Option<&EndpointSlice>) {
        let mut endpoints = slice.into_iter().flat_map(|slice| &slice.endpoints);
        let is_zoned = endpoints.any(|endpoint| endpoint.zone_hints().is_some());
        set(&mut self.zoned, name, is_zoned);
    }

    /// Records a service; `None` if it was deleted.
    pub fn set_service(&mut self, name: &ObjectName, service: Option<&Service>) {
        let is_restricted = service.is_some_and(|service| !service.source_ranges.is_empty());
        set(&mut self.restricted, name, is_restricted);
    }
}

fn set(names: &mut HashSet<ObjectName>, name: &ObjectName, member: bool) {
    if member {
        names.insert(name.clone());
    } else {
        names.remove(name);
    }
}

impl Store {
    /// Returns whether this is the name of the own node; without a fallback every name is.
    pub(super) fn is_own(&self, name: &str) -> bool {
        let fallback = self.fallback_node.as_ref();
        fallback.is_none_or(|fallback| *fallback.name == *name)
    }

    /// Replaces the own node.
    pub(super) fn set_node(&mut self, node: Node, marks: &mut Marks) {
        if self.node.as_deref() == Some(&node) {
            return;
        }
        match self.node().filter(|old| old.name == node.name) {
            Some(old) => {
                marks.node |= old.internal_ips != node.internal_ips
                    || old.external_ips != node.external_ips
                    || old.pod_cidrs != node.pod_cidrs;
                if old.zone != node.zone {
                    let zones = [&old.zone, &node.zone].map(Option::as_deref);
                    marks.services.extend(self.with_hints_for(zones));
                }
                for family in Family::ALL {
                    let [before, after] = [&**old, &node].map(|node| node.primary_ip(family));
                    if before != after {
                        let concerned = self.admitting_one_of([before, after]);
                        marks.services.extend(concerned);
                    }
                }
            }
            None => {
                marks.node = true;
                marks.services.extend(self.services.keys().cloned());
            }
        }
        self.node = Some(Arc::new(node));
        self.reserve(marks);
    }

    /// Returns the services with an endpoint that has a hint for one of these zones.
    fn with_hints_for(&self, zones: [Option<&str>; 2]) -> impl Iterator<Item = ObjectName> {
        let is_one = move |name: &str| zones.contains(&Some(name));
        let slices = self.dependents.zoned.iter();
        let slices = slices.filter_map(|name| self.slices.get(name));
        let concerned = slices.filter(move |slice| {
            let hints = slice.endpoints.iter().filter_map(|it| it.zone_hints());
            hints.flatten().any(|zone| is_one(zone))
        });
        concerned.map(|slice| slice.service.clone())
    }

    /// Returns the services whose source ranges contain just one of two addresses.
    fn admitting_one_of(&self, addresses: [Option<IpAddr>; 2]) -> impl Iterator<Item = ObjectName> {
        let services = self.dependents.restricted.iter();
        let services = services.filter_map(|name| self.services.get(name));
        let concerned = services.filter(move |service| {
            let [old, new] = addresses.map(|address| {
                let mut ranges = service.source_ranges.iter();
                address.is_some_and(|address| ranges.any(|range| range.contains(&address)))
            });
            old != new
        });
        concerned.map(|service| service.name.clone())
    }
}
