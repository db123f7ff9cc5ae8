//! Objects and events for tests.

use super::*;
use crate::services::SourceList;

pub(crate) fn service(name: &str, cluster_ips: &[&str], ports: &[u16]) -> Service {
    Service {
        name: ObjectName::new("shop", name),
        created: None,
        kind: ServiceKind::ClusterIp,
        cluster_ips: cluster_ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        ports: ports
            .iter()
            .map(|port| ServicePort {
                name: format!("p{port}").into(),
                protocol: Protocol::Tcp,
                port: *port,
                node_port: None,
            })
            .collect(),
        external_ips: vec![],
        load_balancer_ips: vec![],
        source_ranges: vec![],
        external_policy: TrafficPolicy::Cluster,
        internal_policy: TrafficPolicy::Cluster,
        affinity_seconds: None,
        health_check_node_port: None,
    }
}

/// A service whose load balancer allows clients in the prefix of 10.0.0.0 with a length.
pub(crate) fn restricted(length: u8) -> Service {
    let mut service = service("restricted", &["10.96.0.70"], &[80]);
    service.load_balancer_ips = vec!["203.0.113.70".parse().unwrap()];
    service.source_ranges = vec![prefix(length)];
    service
}

/// The chain of the source ranges of [`restricted`].
pub(crate) fn source_list(length: u8) -> Name {
    SourceList::new(&[prefix(length)], None).name()
}

fn prefix(length: u8) -> ipnet::IpNet {
    ipnet::IpNet::new([10, 0, 0, 0].into(), length).unwrap()
}

pub(crate) fn slice(
    name: &str,
    service: &Service,
    family: Family,
    endpoints: &[u8],
) -> EndpointSlice {
    let address = |last: u8| match family {
        Family::V4 => IpAddr::from([10, 244, 1, last]),
        Family::V6 => format!("fd00:10:244:1::{last:x}").parse().unwrap(),
    };
    EndpointSlice {
        name: ObjectName::new("shop", name),
        service: service.name.clone(),
        created: None,
        family,
        ports: service
            .ports
            .iter()
            .map(|port| SlicePort {
                name: port.name.clone(),
                protocol: port.protocol,
                port: 8000 + port.port,
            })
            .collect(),
        endpoints: endpoints
            .iter()
            .map(|last| Endpoint {
                address: address(*last),
                ready: true,
                serving: true,
                terminating: false,
                node: Some(if last % 2 == 0 { "node-1" } else { "node-2" }.into()),
                hints: None,
            })
            .collect(),
        triggered_at_ms: None,
    }
}

pub(crate) fn node() -> Node {
    Node {
        name: "node-1".into(),
        internal_ips: vec!["192.168.10.1".parse().unwrap()],
        external_ips: vec![],
        pod_cidrs: vec![],
        zone: None,
        going_away: false,
        labels: Default::default(),
        addresses: Default::default(),
    }
}

pub(crate) fn put(object: impl Into<Object>) -> Event {
    Event::Apply(object.into())
}

impl From<Service> for Object {
    fn from(service: Service) -> Self {
        Object::Service(service)
    }
}

impl From<EndpointSlice> for Object {
    fn from(slice: EndpointSlice) -> Self {
        Object::EndpointSlice(slice)
    }
}

impl From<Node> for Object {
    fn from(node: Node) -> Self {
        Object::Node(node)
    }
}

pub(crate) fn delete(kind: Kind, name: &str) -> Event {
    Event::Delete(ObjectRef::new(kind, ObjectName::new("shop", name)))
}

/// The events of complete lists that hold the given objects.
pub(crate) fn lists(objects: Vec<Object>) -> Vec<Event> {
    let mut events: Vec<_> = Kind::SERVICES.map(Event::ListStarted).into();
    events.extend(objects.into_iter().map(Event::Apply));
    events.extend(Kind::SERVICES.map(Event::ListComplete));
    events
}
