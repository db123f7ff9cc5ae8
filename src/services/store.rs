//! The state of the cluster as nftlet sees it: all that services are made of.
//!
//! Events of other kinds ([`Kind::POLICY`]) mean nothing here.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use smallvec::SmallVec;

use super::claims::{Claim, ClaimChanges, Claims, ConflictCause, Reserved, Takeover};
use super::conflicts::Conflicts;
use crate::model::{
    Endpoint, EndpointSlice, Event, Family, Kind, Lists, Node, NodePortAddresses, Notice, Object,
    ObjectName, ObjectRef, Reason, Service, ServiceCidr, ServiceKind, Subject,
};

mod slices;

pub(crate) use slices::SlicesOf;

/// What a batch of events changed. Collected over events, taken by the reconciler.
#[derive(Debug, Default)]
pub struct Marks {
    /// Services whose rules may be different now: they, or their endpoints, or their claims
    /// changed.
    pub services: BTreeSet<ObjectName>,
    /// A service itself changed, not just its endpoints: frontends may move from one to another.
    pub frontends: bool,
    /// The own node changed.
    pub node: bool,
    /// The ranges of service addresses changed.
    pub service_cidrs: bool,
    /// Objects to tell a person about.
    pub notices: Vec<Notice>,
    /// Services whose endpoints changed, with the trigger time of the change in milliseconds since
    /// 1970.
    pub triggered_at_ms: Vec<(ObjectName, i64)>,
}

impl Marks {
    /// Whether nothing changed that could matter to rules.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && !self.node && !self.service_cidrs
    }
}

/// An endpoint of one service port, with the port its pods listen on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EndpointOf<'a> {
    /// The endpoint.
    pub endpoint: &'a Endpoint,
    /// The target port.
    pub port: u16,
}

impl EndpointOf<'_> {
    /// Address and port.
    pub fn target(&self) -> (IpAddr, u16) {
        (self.endpoint.address, self.port)
    }
}

/// All objects of [`Kind::SERVICES`], joined.
#[derive(Debug, Default)]
pub struct Store {
    services: HashMap<ObjectName, Arc<Service>>,
    slices: HashMap<ObjectName, EndpointSlice>,
    /// Sorted. Nearly every service has one for each family.
    slices_of: HashMap<ObjectName, SmallVec<[ObjectName; 1]>>,
    node: Option<Arc<Node>>,
    /// What is used while there is no own node: what was given for that, or what was known of a
    /// node that was deleted.
    fallback_node: Option<Arc<Node>>,
    service_cidrs: BTreeMap<ObjectName, ServiceCidr>,
    claims: Claims,
    /// Changes of services whose claims are on the way from one form to the next.
    takeovers: HashMap<ObjectName, Takeover>,
    lists: Lists,
    /// Where NodePorts answer, and the primary address that counts before the Node's.
    node_ports: (NodePortAddresses, Option<IpAddr>),
    /// Where nftlet's own connections to the API server lead.
    servers: BTreeSet<SocketAddr>,
    /// The services without an object of which slices were reported.
    orphaned: HashSet<ObjectName>,
    /// Services of which an event is to follow: whether there is a service with it.
    expected: HashMap<ObjectName, bool>,
}

impl Store {
    /// An empty store that knows a stand-in for the own node, used while its object is missing.
    pub(crate) fn with_fallback_node(node: Node) -> Self {
        Self {
            fallback_node: Some(Arc::new(node)),
            ..Self::default()
        }
    }

    /// The same store, with NodePorts on these addresses. `bound` is the node's primary address of
    /// its family, whatever the Node object says.
    #[must_use]
    pub(crate) fn with_node_ports(self, on: NodePortAddresses, bound: Option<IpAddr>) -> Self {
        let mut store = Self {
            node_ports: (on, bound),
            ..self
        };
        store.claims.reserve(store.reserved());
        store
    }

    /// Whether every kind of [`Kind::SERVICES`] was listed completely once.
    pub(crate) fn is_complete(&self) -> bool {
        Kind::SERVICES
            .iter()
            .all(|kind| self.lists.is_complete(*kind))
    }

    /// The kinds that were not listed yet, for the person who waits.
    pub fn missing(&self) -> Vec<Kind> {
        let missing = Kind::SERVICES
            .iter()
            .filter(|kind| !self.lists.is_complete(**kind));
        missing.copied().collect()
    }

    /// Whether a list of a kind is being read.
    pub(crate) fn is_listing(&self, kind: Kind) -> bool {
        self.lists.is_open(kind)
    }

    /// The number of objects of a kind; 0 for the kinds that are not kept here.
    pub fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Service => self.services.len(),
            Kind::EndpointSlice => self.slices.len(),
            Kind::Node => usize::from(self.node.is_some()),
            Kind::ServiceCidr => self.service_cidrs.len(),
            Kind::Pod | Kind::Namespace | Kind::NetworkPolicy => 0,
        }
    }

    /// A service.
    pub fn service(&self, name: &ObjectName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// All services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// The own node, or what stands in for it. One that was deleted is going away, and stays as
    /// it last was until there is another one.
    pub fn node(&self) -> Option<&Arc<Node>> {
        self.node.as_ref().or(self.fallback_node.as_ref())
    }

    /// The ranges of service addresses.
    pub(crate) fn service_cidrs(&self) -> impl Iterator<Item = ipnet::IpNet> + '_ {
        self.service_cidrs
            .values()
            .flat_map(|o| o.cidrs.iter().copied())
    }

    /// The service that owns a claim.
    pub fn owner(&self, claim: &Claim) -> Option<&ObjectName> {
        self.claims.owner(claim)
    }

    /// Whether the health check of a service may answer at a port of the node.
    pub(crate) fn owns_health_check(&self, service: &ObjectName, port: u16) -> bool {
        self.claims.owns_health_check(service, port)
    }

    /// The slices of a service.
    pub(crate) fn slices_of(&self, service: &ObjectName) -> SlicesOf<'_> {
        let names = self.slices_of.get(service).into_iter().flatten();
        SlicesOf::new(names.filter_map(|name| self.slices.get(name)))
    }

    /// Says that an event of a service is to follow, and whether there is a service with it. If so,
    /// its slices are no orphans; if not, what it claims is no conflict.
    pub fn expect(&mut self, service: &ObjectName, exists: bool) {
        self.expected.insert(service.clone(), exists);
    }

    /// Begins to take over an event, which [`Store::go_on`] does some claims at a time if it is one
    /// of a service. The service stays what it was until all of them are changed.
    pub fn begin(&mut self, event: Event, marks: &mut Marks) {
        let (name, new) = match event {
            Event::Apply(Object::Service(service)) => {
                (service.name.clone(), Some(Arc::new(service)))
            }
            Event::Delete(object) if object.kind == Kind::Service => (object.name, None),
            _ => return self.apply(event, marks),
        };
        self.go_on(&name, usize::MAX, marks);
        self.lists.saw(&ObjectRef::new(Kind::Service, name.clone()));
        let old = self.services.get(&name).cloned();
        if old == new {
            self.expected.remove(&name);
        } else {
            if let Some(exists) = self.expected.get_mut(&name) {
                *exists = new.is_some();
            }
            self.takeovers.insert(name, Takeover::new(old, new));
        }
    }

    /// Whether an event of a service is being taken over.
    pub(crate) fn is_taking_over(&self, service: &ObjectName) -> bool {
        self.takeovers.contains_key(service)
    }

    /// Goes on to take over an event of a service, with so many of its claims at most. It is taken
    /// over with the last of them.
    pub fn go_on(&mut self, name: &ObjectName, most: usize, marks: &mut Marks) {
        let Some(mut takeover) = self.takeovers.remove(name) else {
            return;
        };
        let (claims, complete) = self.claims.advance(&mut takeover, most);
        self.note_claims(claims, &mut takeover.conflicts, marks);
        if !complete {
            self.takeovers.insert(name.clone(), takeover);
            return;
        }
        self.expected.remove(name);
        match takeover.target() {
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
        marks.notices.extend(takeover.conflicts.notices());
        marks.frontends = true;
        marks.services.insert(name.clone());
    }

    /// Takes over what was begun.
    pub fn finish(&mut self, marks: &mut Marks) {
        let mut names: Vec<ObjectName> = self.takeovers.keys().cloned().collect();
        names.sort_unstable();
        for name in names {
            self.go_on(&name, usize::MAX, marks);
        }
    }

    /// Takes over one event and notes what it changed.
    pub fn apply(&mut self, event: Event, marks: &mut Marks) {
        match event {
            Event::ListStarted(kind) | Event::ListComplete(kind)
                if !Kind::SERVICES.contains(&kind) => {}
            Event::ListStarted(kind) => {
                if kind == Kind::Service {
                    self.finish(marks);
                    self.expected.clear();
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
                self.lists.saw(&object.reference());
                self.insert(object, marks);
            }
            Event::Delete(reference) => {
                self.lists.saw(&reference);
                self.delete(&reference, marks);
            }
            Event::Servers(servers) => {
                self.servers = servers;
                self.reserve(marks);
            }
            Event::Notice(notice) => marks.notices.push(notice),
        }
    }

    /// Brings what no service may take in line with the node, the ranges and the servers.
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
        // An address inside the ranges may be on an interface that the Node does not mention.
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
            Kind::Pod | Kind::Namespace | Kind::NetworkPolicy => HashSet::new(),
        }
    }

    fn insert(&mut self, object: Object, marks: &mut Marks) {
        match object {
            Object::Service(service) => {
                let name = service.name.clone();
                self.begin(Event::Apply(Object::Service(service)), marks);
                self.go_on(&name, usize::MAX, marks);
            }
            Object::EndpointSlice(slice) => self.insert_slice(slice, marks),
            Object::Node(node) => {
                let old = self.node();
                marks.node |= !old.is_some_and(|old| old.rules_as(&node));
                if self.node.as_deref() != Some(&node) {
                    self.node = Some(Arc::new(node));
                    self.reserve(marks);
                }
            }
            Object::ServiceCidr(cidr) => {
                if self.service_cidrs.get(&cidr.name) != Some(&cidr) {
                    self.service_cidrs.insert(cidr.name.clone(), cidr);
                    marks.service_cidrs = true;
                    self.reserve(marks);
                }
            }
            Object::Pod(_) | Object::Namespace(_) | Object::NetworkPolicy(_) => {}
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
                self.begin(Event::Delete(object.clone()), marks);
                self.go_on(&object.name, usize::MAX, marks);
            }
            Kind::EndpointSlice => {
                if let Some(old) = self.slices.remove(&object.name) {
                    self.detach(&old.service, &object.name);
                    marks.services.insert(old.service);
                }
            }
            // The rules stay those of a node on which pods may go on.
            Kind::Node => {
                if let Some(mut old) = self.node.take() {
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
            Kind::Pod | Kind::Namespace | Kind::NetworkPolicy => {}
        }
    }

    /// Reports what could not be judged before everything was listed.
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

    /// Reports a slice without a service, unless one of the same service was.
    fn note_orphan(&mut self, name: &ObjectName, marks: &mut Marks) {
        let Some(slice) = self.slices.get(name) else {
            return;
        };
        let service = &slice.service;
        let known =
            self.services.contains_key(service) || self.expected.get(service) == Some(&true);
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

    /// Notes the services that gained or lost claims, and what is refused to them.
    fn note_claims(&self, mut claims: ClaimChanges, conflicts: &mut Conflicts, marks: &mut Marks) {
        // A frontend that moves from one service to another is written at one stroke.
        marks.frontends |= !claims.affected.is_empty();
        marks.services.extend(claims.affected);
        if self.is_complete() {
            if !self.expected.is_empty() {
                claims.lost.retain(|(claim, claimant)| {
                    let cause = self.claims.conflict(claim, claimant);
                    let owner = cause.as_ref().and_then(ConflictCause::owner);
                    owner.is_none_or(|owner| self.expected.get(owner) != Some(&false))
                });
            }
            conflicts.add(&self.claims, claims.lost);
        }
    }

    /// Reports an endpoint of a slice that is a service address, unless the slice had one before.
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
