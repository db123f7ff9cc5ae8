//! The objects from which services are compiled.
//!
//! Events of other kinds ([`Kind::POLICY`]) are ignored.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use smallvec::SmallVec;

use super::claims::{Claim, ClaimChange, ClaimChanges, Claims, ConflictCause, Reserved};
use super::conflicts::Conflicts;
use crate::model::{
    Endpoint, EndpointSlice, Event, Family, Kind, Node, NodePortAddresses, Notice, Object,
    ObjectName, ObjectRef, Reason, RelistTracker, Service, ServiceCidr, ServiceKind, Subject,
};

mod node;
mod slices;

use node::NodeDependents;
pub(crate) use slices::SlicesOf;

/// The changes of a batch of events.
#[derive(Debug, Default)]
pub struct Marks {
    /// Services to compile: they, their endpoints or their claims changed.
    pub services: BTreeSet<ObjectName>,
    /// Whether the addresses or the pod networks of the own node changed.
    pub node: bool,
    /// Whether the ranges of service addresses changed.
    pub service_cidrs: bool,
    /// Notices about objects.
    pub notices: Vec<Notice>,
    /// Services whose endpoints changed, with the time of each change in milliseconds since 1970.
    pub triggered_at_ms: Vec<(ObjectName, i64)>,
}

impl Marks {
    /// Returns whether no change concerns the rules.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && !self.node && !self.service_cidrs
    }
}

/// An endpoint of one service port, with its target port.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EndpointOf<'a> {
    pub endpoint: &'a Endpoint,
    /// The target port.
    pub port: u16,
}

impl EndpointOf<'_> {
    /// Returns address and port.
    pub fn target(&self) -> (IpAddr, u16) {
        (self.endpoint.address, self.port)
    }
}

/// All objects of [`Kind::SERVICES`], joined.
#[derive(Debug, Default)]
pub struct Store {
    services: HashMap<ObjectName, Arc<Service>>,
    slices: HashMap<ObjectName, EndpointSlice>,
    /// The slices of each service, sorted.
    slices_of: HashMap<ObjectName, SmallVec<[ObjectName; 1]>>,
    node: Option<Arc<Node>>,
    /// The Node to use while the own Node object is missing: a given one, or the deleted one. Other
    /// Nodes, which only policies use, have other names.
    fallback_node: Option<Arc<Node>>,
    dependents: NodeDependents,
    service_cidrs: BTreeMap<ObjectName, ServiceCidr>,
    claims: Claims,
    /// Changes of services whose claims are applied in portions, with their conflicts so far.
    claim_changes: HashMap<ObjectName, (ClaimChange, Conflicts)>,
    lists: RelistTracker,
    /// The addresses of NodePorts, and the address that overrides the Node's primary one.
    node_ports: (NodePortAddresses, Option<IpAddr>),
    /// The addresses and ports of the API server that nftlet connects to.
    servers: BTreeSet<SocketAddr>,
    /// Services that do not exist, for which a notice about an orphaned slice was given.
    orphaned: HashSet<ObjectName>,
    /// Services with a queued event, and whether they exist after it.
    queued_events: HashMap<ObjectName, bool>,
}

impl Store {
    /// Creates an empty store with the Node to use while the own Node object is missing.
    pub(crate) fn with_fallback_node(node: Node) -> Self {
        Self {
            fallback_node: Some(Arc::new(node)),
            ..Self::default()
        }
    }

    /// Sets the addresses of NodePorts. `bound` overrides the Node's primary address of its family.
    #[must_use]
    pub(crate) fn with_node_ports(self, on: NodePortAddresses, bound: Option<IpAddr>) -> Self {
        let mut store = Self {
            node_ports: (on, bound),
            ..self
        };
        store.claims.reserve(store.reserved());
        store
    }

    /// Counts every list as complete.
    #[must_use]
    pub(crate) fn without_lists(mut self) -> Self {
        for kind in Kind::SERVICES {
            self.lists.complete(kind);
        }
        self
    }

    /// Returns whether every kind of [`Kind::SERVICES`] was listed completely.
    pub(crate) fn is_complete(&self) -> bool {
        Kind::SERVICES
            .iter()
            .all(|kind| self.lists.is_complete(*kind))
    }

    /// Returns the kinds that were not listed completely.
    pub fn missing(&self) -> Vec<Kind> {
        let missing = Kind::SERVICES
            .iter()
            .filter(|kind| !self.lists.is_complete(**kind));
        missing.copied().collect()
    }

    /// Returns whether a list of a kind is being read.
    pub(crate) fn is_listing(&self, kind: Kind) -> bool {
        self.lists.is_open(kind)
    }

    /// Returns the number of objects of a kind; 0 for kinds of other engines.
    pub fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Service => self.services.len(),
            Kind::EndpointSlice => self.slices.len(),
            Kind::Node => usize::from(self.node.is_some()),
            Kind::ServiceCidr => self.service_cidrs.len(),
            Kind::Pod | Kind::Namespace | Kind::NetworkPolicy | Kind::ClusterNetworkPolicy => 0,
        }
    }

    pub fn service(&self, name: &ObjectName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// Returns all services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// Returns whether the object of the own node is known.
    pub(crate) fn has_node(&self) -> bool {
        self.node.is_some()
    }

    /// Returns the own node, or the fallback. A deleted Node remains in use, marked as going away,
    /// until it is created again.
    pub fn node(&self) -> Option<&Arc<Node>> {
        self.node.as_ref().or(self.fallback_node.as_ref())
    }

    /// Returns the ranges of service addresses.
    pub(crate) fn service_cidrs(&self) -> impl Iterator<Item = ipnet::IpNet> + '_ {
        self.service_cidrs
            .values()
            .flat_map(|o| o.cidrs.iter().copied())
    }

    /// Returns the ServiceCIDR objects.
    pub(crate) fn service_cidr_objects(&self) -> impl Iterator<Item = &ServiceCidr> {
        self.service_cidrs.values()
    }

    /// Returns the service that owns a claim.
    pub fn owner(&self, claim: &Claim) -> Option<&ObjectName> {
        self.claims.owner(claim)
    }

    /// Returns a service with this ClusterIP.
    pub(crate) fn with_cluster_ip(&self, address: IpAddr) -> Option<&ObjectName> {
        self.claims.with_cluster_ip(address)
    }

    /// Returns whether a service owns a port of the node as its health check.
    pub(crate) fn owns_health_check(&self, service: &ObjectName, port: u16) -> bool {
        self.claims.owns_health_check(service, port)
    }

    pub(crate) fn slices_of(&self, service: &ObjectName) -> SlicesOf<'_> {
        let names = self.slices_of.get(service).into_iter().flatten();
        SlicesOf::new(names.filter_map(|name| self.slices.get(name)))
    }

    /// Announces an event of a service that waits in the queue, and whether the service exists
    /// after it. If so, its slices are not orphaned; if not, its claims do not conflict.
    pub fn announce_queued(&mut self, service: &ObjectName, exists: bool) {
        self.queued_events.insert(service.clone(), exists);
    }

    /// Starts to apply an event. One of a service is applied in portions by
    /// [`Store::continue_apply`]; the old version of the service stays until all its claims are
    /// changed.
    pub fn begin_apply(&mut self, event: Event, marks: &mut Marks) {
        let (name, new) = match event {
            Event::Apply(Object::Service(service)) => {
                (service.name.clone(), Some(Arc::new(service)))
            }
            Event::Delete(object) if object.kind == Kind::Service => (object.name, None),
            _ => return self.apply(event, marks),
        };
        self.continue_apply(&name, usize::MAX, marks);
        self.lists
            .observe(&ObjectRef::new(Kind::Service, name.clone()));
        let old = self.services.get(&name).cloned();
        if old == new {
            self.queued_events.remove(&name);
        } else {
            if let Some(exists) = self.queued_events.get_mut(&name) {
                *exists = new.is_some();
            }
            let claim_change = ClaimChange::new(old, new);
            self.claim_changes
                .insert(name, (claim_change, Conflicts::default()));
        }
    }

    /// Returns whether an event of a service is being applied.
    pub(crate) fn is_applying(&self, service: &ObjectName) -> bool {
        self.claim_changes.contains_key(service)
    }

    /// Applies up to `most` claims of a service's event, and the event with the last of them.
    pub fn continue_apply(&mut self, name: &ObjectName, most: usize, marks: &mut Marks) {
        let Some((mut claim_change, mut conflicts)) = self.claim_changes.remove(name) else {
            return;
        };
        let (claims, complete) = self.claims.advance(&mut claim_change, most);
        self.note_claims(claims, &mut conflicts, marks);
        if !complete {
            self.claim_changes
                .insert(name.clone(), (claim_change, conflicts));
            return;
        }
        self.queued_events.remove(name);
        let target = claim_change.target();
        self.dependents
            .set_service(name, target.map(|service| &**service));
        match target {
            Some(service) => {
                let old = self.services.insert(name.clone(), service.clone());
                if service.kind == ServiceKind::OtherProxy
                    && old.is_none_or(|old| old.kind != ServiceKind::OtherProxy)
                {
                    marks.notices.push(other_proxy(name));
                }
                self.orphaned.remove(name);
            }
            None => {
                self.services.remove(name);
            }
        }
        marks.notices.extend(conflicts.notices());
        marks.services.insert(name.clone());
    }

    /// Applies all started events completely.
    pub fn finish(&mut self, marks: &mut Marks) {
        let mut names: Vec<ObjectName> = self.claim_changes.keys().cloned().collect();
        names.sort_unstable();
        for name in names {
            self.continue_apply(&name, usize::MAX, marks);
        }
    }

    /// Applies one event and records the changes.
    pub fn apply(&mut self, event: Event, marks: &mut Marks) {
        match event {
            Event::ListStarted(kind) | Event::ListComplete(kind)
                if !Kind::SERVICES.contains(&kind) => {}
            Event::Apply(Object::Node(node)) if !self.is_own(&node.name) => {}
            Event::ListStarted(kind) => {
                if kind == Kind::Service {
                    self.finish(marks);
                    self.queued_events.clear();
                }
                self.lists.start(kind, self.names(kind));
            }
            Event::ListComplete(kind) => {
                let first = !self.lists.is_complete(kind);
                for name in self.lists.complete(kind) {
                    self.delete(&ObjectRef::new(kind, name), marks);
                }
                if first && self.is_complete() {
                    self.first_notices(marks);
                    for slice in self.slices.values() {
                        self.note_service_address(slice, None, marks);
                    }
                }
            }
            Event::Apply(object) => {
                self.lists.observe(&object.reference());
                self.insert(object, marks);
            }
            Event::Delete(reference) => {
                self.lists.observe(&reference);
                self.delete(&reference, marks);
            }
            Event::Servers(servers) => {
                self.servers = servers;
                self.reserve(marks);
            }
            Event::Routes(_) => {}
            Event::Notice(notice) => marks.notices.push(notice),
        }
    }

    /// Updates the reserved addresses and ports after a change of the node, the ranges or the
    /// servers.
    fn reserve(&mut self, marks: &mut Marks) {
        let claims = self.claims.reserve(self.reserved());
        let mut conflicts = Conflicts::default();
        self.note_claims(claims, &mut conflicts, marks);
        marks.notices.extend(conflicts.notices());
    }

    fn reserved(&self) -> Reserved {
        let node = self.node().map(|node| &**node);
        let (on, bound) = &self.node_ports;
        let ranges = Family::ALL.map(|family| on.ranges(family, *bound, node));
        let answers = |ip: &IpAddr| ranges.iter().flatten().any(|range| range.contains(ip));
        let of_node = node.map(|node| node.internal_ips.iter().chain(&node.external_ips));
        let own: BTreeSet<IpAddr> = of_node
            .into_iter()
            .flatten()
            .chain(bound)
            .copied()
            .collect();
        // An address inside the ranges may be on an interface that is not in the Node object.
        let is_here = |server: &&SocketAddr| own.contains(&server.ip()) || answers(&server.ip());
        Reserved {
            service_ranges: self.service_cidrs().collect(),
            servers_here: self.servers.iter().filter(is_here).copied().collect(),
            servers: self.servers.clone(),
            node_port_addresses: own.into_iter().filter(answers).collect(),
        }
    }

    fn names(&self, kind: Kind) -> HashSet<ObjectName> {
        match kind {
            Kind::Service => self.services.keys().cloned().collect(),
            Kind::EndpointSlice => self.slices.keys().cloned().collect(),
            Kind::Node => {
                let node = self.node.iter();
                node.map(|node| ObjectName::new("", &node.name)).collect()
            }
            Kind::ServiceCidr => self.service_cidrs.keys().cloned().collect(),
            Kind::Pod | Kind::Namespace | Kind::NetworkPolicy | Kind::ClusterNetworkPolicy => {
                HashSet::new()
            }
        }
    }

    fn insert(&mut self, object: Object, marks: &mut Marks) {
        match object {
            Object::Service(service) => {
                let name = service.name.clone();
                self.begin_apply(Event::Apply(Object::Service(service)), marks);
                self.continue_apply(&name, usize::MAX, marks);
            }
            Object::EndpointSlice(slice) => self.insert_slice(slice, marks),
            Object::Node(node) => self.set_node(node, marks),
            Object::ServiceCidr(cidr) => {
                if self.service_cidrs.get(&cidr.name) != Some(&cidr) {
                    self.service_cidrs.insert(cidr.name.clone(), cidr);
                    marks.service_cidrs = true;
                    self.reserve(marks);
                }
            }
            Object::Pod(_)
            | Object::Namespace(_)
            | Object::NetworkPolicy(_)
            | Object::ClusterNetworkPolicy(_) => {}
        }
    }

    fn insert_slice(&mut self, slice: EndpointSlice, marks: &mut Marks) {
        let name = slice.name.clone();
        let old = self.slices.get(&name);
        if old == Some(&slice) {
            return;
        }
        if let Some(old_service) = old.map(|old| old.service.clone()) {
            marks.services.insert(old_service.clone());
            if old_service != slice.service {
                self.detach(&old_service, &name);
            }
        }
        marks.services.insert(slice.service.clone());
        let triggered = slice.triggered_at_ms.into_iter();
        let triggered = triggered.map(|at| (slice.service.clone(), at));
        marks.triggered_at_ms.extend(triggered);
        let slices = self.slices_of.entry(slice.service.clone()).or_default();
        if let Err(place) = slices.binary_search(&name) {
            slices.insert(place, name.clone());
        }
        self.dependents.set_slice(&name, Some(&slice));
        let old = self.slices.insert(name.clone(), slice);
        if self.is_complete() {
            self.note_orphan(&name, marks);
            if let Some(slice) = self.slices.get(&name) {
                self.note_service_address(slice, old.as_ref(), marks);
            }
        }
    }

    fn detach(&mut self, service: &ObjectName, slice: &ObjectName) {
        if let Some(slices) = self.slices_of.get_mut(service) {
            slices.retain(|known| known != slice);
            if slices.is_empty() {
                self.slices_of.remove(service);
                self.orphaned.remove(service);
            }
        }
    }

    fn delete(&mut self, object: &ObjectRef, marks: &mut Marks) {
        match object.kind {
            Kind::Service => {
                self.begin_apply(Event::Delete(object.clone()), marks);
                self.continue_apply(&object.name, usize::MAX, marks);
            }
            Kind::EndpointSlice => {
                if let Some(old) = self.slices.remove(&object.name) {
                    self.dependents.set_slice(&object.name, None);
                    self.detach(&old.service, &object.name);
                    marks.services.insert(old.service);
                }
            }
            // Pods may keep running on a node without an object, so the rules stay.
            Kind::Node => {
                if let Some(mut old) = self.node.take_if(|node| *node.name == *object.name.name()) {
                    Arc::make_mut(&mut old).going_away = true;
                    self.fallback_node = Some(old);
                }
            }
            Kind::ServiceCidr => {
                if self.service_cidrs.remove(&object.name).is_some() {
                    marks.service_cidrs = true;
                    self.reserve(marks);
                }
            }
            Kind::Pod | Kind::Namespace | Kind::NetworkPolicy | Kind::ClusterNetworkPolicy => {}
        }
    }

    /// Reports orphaned slices and conflicts after the first complete lists.
    fn first_notices(&mut self, marks: &mut Marks) {
        let mut slices: Vec<ObjectName> = self.slices.keys().cloned().collect();
        slices.sort_unstable();
        for name in &slices {
            self.note_orphan(name, marks);
        }
        let services = self.services.values();
        let lacking = services.flat_map(|service| self.claims.lacking(service));
        let mut conflicts = Conflicts::default();
        conflicts.add(&self.claims, lacking);
        marks.notices.extend(conflicts.notices());
    }

    /// Reports a slice whose service does not exist, once for each service.
    fn note_orphan(&mut self, name: &ObjectName, marks: &mut Marks) {
        let Some(slice) = self.slices.get(name) else {
            return;
        };
        let service = &slice.service;
        let known =
            self.services.contains_key(service) || self.queued_events.get(service) == Some(&true);
        if known || !self.orphaned.insert(service.clone()) {
            return;
        }
        marks.notices.push(Notice {
            subject: Subject::Object(ObjectRef::new(Kind::EndpointSlice, name.clone())),
            reason: Reason::OrphanSlice,
            message: format!(
                "belongs to Service {service}, \
                 which does not exist or is handled by another proxy; \
                 its endpoints are not used until it exists (check the label \
                 kubernetes.io/service-name)"
            ),
        });
    }

    /// Records the services that gained or lost claims, and their conflicts.
    fn note_claims(&self, mut claims: ClaimChanges, conflicts: &mut Conflicts, marks: &mut Marks) {
        // A frontend that moves between services is written in one transaction.
        marks.services.extend(claims.affected);
        if self.is_complete() {
            if !self.queued_events.is_empty() {
                claims.lost.retain(|(claim, claimant)| {
                    let cause = self.claims.conflict(claim, claimant);
                    let owner = cause.as_ref().and_then(ConflictCause::owner);
                    owner.is_none_or(|owner| self.queued_events.get(owner) != Some(&false))
                });
            }
            conflicts.add(&self.claims, claims.lost);
        }
    }

    /// Reports a slice with an endpoint in a ServiceCIDR, unless it had one before.
    fn note_service_address(
        &self,
        slice: &EndpointSlice,
        old: Option<&EndpointSlice>,
        marks: &mut Marks,
    ) {
        let first = |slice: &EndpointSlice| {
            let mut addresses = slice.endpoints.iter().map(|endpoint| endpoint.address);
            addresses.find(|address| self.service_cidrs().any(|range| range.contains(address)))
        };
        let Some(address) = first(slice).filter(|_| old.and_then(first).is_none()) else {
            return;
        };
        marks.notices.push(Notice {
            subject: Subject::Object(ObjectRef::new(Kind::EndpointSlice, slice.name.clone())),
            reason: Reason::InvalidField,
            message: format!(
                "the endpoint {address} of Service {} is in a ServiceCIDR; a packet is translated \
                 only once, so connections to it fail: use the endpoints of that service \
                 instead",
                slice.service
            ),
        });
    }
}

fn other_proxy(service: &ObjectName) -> Notice {
    Notice {
        subject: Subject::Object(ObjectRef::new(Kind::Service, service.clone())),
        reason: Reason::OtherProxy,
        message: "is handled by another proxy (label service.kubernetes.io/service-proxy-name)"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests;
