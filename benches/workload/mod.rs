//! The cluster that is measured: services, their endpoints, and what happens to them.
//!
//! Nine of ten services have just a ClusterIP; of the others two thirds are of type NodePort and
//! the rest of type LoadBalancer with one address. Every service has one TCP port. Of a hundred
//! endpoints one is on this node. All of it follows from the numbers alone, so that every run
//! and both sides of a comparison get the same objects.

#![allow(dead_code, reason = "each benchmark uses its own part of the workload")]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use nftlet::compile::{DetectLocal, Settings};
use nftlet::model::{
    Delivery, Endpoint, EndpointSlice, Event, Family, Kind, Node, Object, ObjectName, ObjectRef,
    Protocol, Service, ServiceCidr, ServiceKind, ServicePort, SlicePort, TrafficPolicy,
};

/// The range of pod addresses.
pub const POD_CIDR: &str = "10.128.0.0/9";
/// The range of ClusterIPs.
pub const SERVICE_CIDR: &str = "10.64.0.0/11";
/// The node's address, where NodePorts answer.
pub const NODE_IP: Ipv4Addr = Ipv4Addr::new(192, 168, 10, 1);
/// The node that is programmed.
pub const NODE: &str = "node-0";

const NODES: u32 = 100;
const NAMESPACES: usize = 50;
/// What the EndpointSlice controller puts into one slice at most.
const SLICE: usize = 100;
const TARGET_PORT: u16 = 8080;
const FIRST_NODE_PORT: usize = 30_000;

/// A cluster's objects.
#[derive(Clone, Debug)]
pub struct Workload {
    /// The services.
    pub services: Vec<Service>,
    /// The endpoints of each service; the place in the list is that of the service.
    pub endpoints: Vec<Vec<Endpoint>>,
    node_names: Vec<Arc<str>>,
    pods: u32,
}

impl Workload {
    /// A cluster of so many services with so many endpoints each.
    pub fn new(services: usize, endpoints: usize) -> Self {
        let mut workload = Self {
            services: Vec::with_capacity(services),
            endpoints: Vec::with_capacity(services),
            node_names: (0..NODES).map(|n| format!("node-{n}").into()).collect(),
            pods: 0,
        };
        for _ in 0..services {
            workload.add_service(endpoints);
        }
        workload
    }

    /// Adds a service behind the others and returns its place.
    pub fn add_service(&mut self, endpoints: usize) -> usize {
        let index = self.services.len();
        self.services.push(service(index));
        let endpoints = (0..endpoints).map(|_| self.new_endpoint()).collect();
        self.endpoints.push(endpoints);
        index
    }

    /// An endpoint with an address that none had before.
    fn new_endpoint(&mut self) -> Endpoint {
        let pod = self.pods;
        self.pods += 1;
        let base = u32::from(Ipv4Addr::new(10, 128, 0, 0));
        let node = &self.node_names[(pod.wrapping_mul(7919) % NODES) as usize];
        Endpoint {
            address: Ipv4Addr::from(base + 1 + pod).into(),
            ready: true,
            serving: true,
            terminating: false,
            node: Some(node.clone()),
            hints: None,
        }
    }

    /// Replaces an endpoint of a service by a new one and returns the event that tells it.
    pub fn replace_endpoint(&mut self, service: usize, endpoint: usize) -> Event {
        self.endpoints[service][endpoint] = self.new_endpoint();
        self.slice_event(service, endpoint / SLICE)
    }

    /// Adds an endpoint to a service and returns the event that tells it.
    pub fn grow(&mut self, service: usize) -> Event {
        let endpoint = self.new_endpoint();
        self.endpoints[service].push(endpoint);
        self.slice_event(service, (self.endpoints[service].len() - 1) / SLICE)
    }

    /// Takes the last endpoint of a service away and returns the event that tells it.
    pub fn shrink(&mut self, service: usize) -> Event {
        self.endpoints[service].pop();
        self.slice_event(service, self.endpoints[service].len() / SLICE)
    }

    /// The events that tell of a service and its endpoints.
    pub fn service_events(&self, service: usize) -> Vec<Event> {
        let object = Object::Service(self.services[service].clone());
        let slices = (0..self.endpoints[service].len().div_ceil(SLICE))
            .map(|slice| self.slice_event(service, slice));
        std::iter::once(Event::Apply(object))
            .chain(slices)
            .collect()
    }

    /// The events that tell that a service and its endpoints are gone.
    pub fn delete_events(&self, service: usize) -> Vec<Event> {
        let delete = |kind, name| Event::Delete(ObjectRef::new(kind, name));
        let slices = (0..self.endpoints[service].len().div_ceil(SLICE))
            .map(|slice| delete(Kind::EndpointSlice, self.slice_name(service, slice)));
        let name = self.services[service].name.clone();
        std::iter::once(delete(Kind::Service, name))
            .chain(slices)
            .collect()
    }

    /// Complete lists of all kinds, as a source delivers them when it starts.
    pub fn lists(&self) -> Vec<Event> {
        let mut events: Vec<Event> = Kind::ALL.map(Event::ListStarted).into();
        let node = Node {
            name: NODE.into(),
            internal_ips: vec![NODE_IP.into()],
            external_ips: vec![],
            pod_cidrs: vec![],
            zone: None,
            going_away: false,
        };
        let cidr = ServiceCidr {
            name: ObjectName::new("", "kubernetes"),
            cidrs: SERVICE_CIDR.parse().into_iter().collect(),
        };
        events.push(Event::Apply(Object::Node(node)));
        events.push(Event::Apply(Object::ServiceCidr(cidr)));
        for service in 0..self.services.len() {
            events.extend(self.service_events(service));
        }
        events.extend(Kind::ALL.map(Event::ListComplete));
        events
    }

    fn slice_name(&self, service: usize, slice: usize) -> ObjectName {
        let service = &self.services[service].name;
        ObjectName::new(service.namespace(), &format!("{}-{slice}", service.name()))
    }

    fn slice_event(&self, service: usize, slice: usize) -> Event {
        let object = &self.services[service];
        let endpoints = self.endpoints[service].chunks(SLICE).nth(slice);
        let ports = object.ports.iter().map(|port| SlicePort {
            name: port.name.clone(),
            protocol: port.protocol,
            port: TARGET_PORT,
        });
        Event::Apply(Object::EndpointSlice(EndpointSlice {
            name: self.slice_name(service, slice),
            service: object.name.clone(),
            created: None,
            family: Family::V4,
            ports: ports.collect(),
            endpoints: endpoints.unwrap_or_default().to_vec(),
            triggered_at_ms: None,
        }))
    }

    /// Address and port of the endpoints of a service.
    pub fn targets(&self, service: usize) -> impl Iterator<Item = (IpAddr, u16)> + '_ {
        let endpoints = self.endpoints[service].iter();
        endpoints.map(|endpoint| (endpoint.address, TARGET_PORT))
    }
}

fn service(index: usize) -> Service {
    let above = |base: Ipv4Addr| Ipv4Addr::from(u32::from(base) + 1 + index as u32).into();
    let kind = match index % 30 {
        9 | 19 => ServiceKind::NodePort,
        29 => ServiceKind::LoadBalancer,
        _ => ServiceKind::ClusterIp,
    };
    let external = kind != ServiceKind::ClusterIp;
    let balanced = kind == ServiceKind::LoadBalancer;
    Service {
        name: ObjectName::new(
            &format!("team-{}", index % NAMESPACES),
            &format!("service-{index}"),
        ),
        created: Some(1_700_000_000 + index as i64),
        kind,
        cluster_ips: vec![above(Ipv4Addr::new(10, 64, 0, 0))],
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: external.then_some((FIRST_NODE_PORT + index / 10) as u16),
        }],
        external_ips: vec![],
        load_balancer_ips: balanced
            .then(|| above(Ipv4Addr::new(198, 18, 0, 0)))
            .into_iter()
            .collect(),
        source_ranges: vec![],
        external_policy: TrafficPolicy::Cluster,
        internal_policy: TrafficPolicy::Cluster,
        affinity_seconds: None,
        health_check_node_port: None,
    }
}

/// Masquerades what comes to ClusterIPs from outside of the pod network, as is usual.
pub fn settings() -> Settings {
    Settings {
        detect_local: DetectLocal::ClusterCidr(POD_CIDR.parse().into_iter().collect()),
        ..Settings::default()
    }
}

/// Events as they reach the reconciler.
pub fn deliveries(events: Vec<Event>) -> Vec<Delivery> {
    events.into_iter().map(Delivery::now).collect()
}

/// Numbers that look random and are the same in every run (xorshift).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Starts the sequence.
    pub fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    /// A number below a bound.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}
