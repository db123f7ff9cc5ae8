//! The services of a cluster as an API server sends them.
//!
//! The [`Workload`] that the other benchmarks share, with another mix: of a hundred services 90
//! have just a ClusterIP, five are of type NodePort, three of type LoadBalancer, and two have
//! session affinity. Every tenth has both address families. The objects carry what real ones do,
//! read by nftlet or not: labels, owners, references to the pods, managed fields.

#![allow(dead_code, reason = "each benchmark uses its own part")]

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use nftlet::model::{Endpoint, Kind, Service, ServiceKind};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::workload::{NODE, NODE_IP, SERVICE_CIDR, Workload};

/// The pod ranges of both families, as `--cluster-cidr` takes them.
pub const POD_CIDRS: &str = "10.128.0.0/9,fd00::/64";
const SERVICE_CIDR_V6: &str = "fd01::/108";
/// As many endpoints as the controller puts into one slice: every service has one per family.
const MOST_ENDPOINTS: usize = 100;
/// All services together must leave room in the ranges above.
const MOST_SERVICES: usize = 300_000;
const FIRST_NODE_PORT: usize = 30_000;
const AFFINITY_SECONDS: u32 = 10_800;

/// An object with its kind.
pub type Put = (Kind, Value);

/// How large a cluster is, written as `10000x10`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Services.
    pub services: usize,
    /// Endpoints of each.
    pub endpoints: usize,
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('x').and_then(|(services, endpoints)| {
            Some((services.parse().ok()?, endpoints.parse().ok()?))
        });
        match numbers {
            Some((services, endpoints))
                if (1..=MOST_SERVICES).contains(&services)
                    && (1..MOST_ENDPOINTS).contains(&endpoints) =>
            {
                Ok(Self {
                    services,
                    endpoints,
                })
            }
            Some(_) => Err(format!(
                "1 to {MOST_SERVICES} services with 1 to {} endpoints can be measured",
                MOST_ENDPOINTS - 1
            )),
            None => Err("a size is written as SERVICESxENDPOINTS, for example 10000x10".into()),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.services, self.endpoints)
    }
}

/// The objects of a cluster.
pub struct Cluster {
    workload: Workload,
}

impl Cluster {
    /// A cluster of a size.
    pub fn new(size: Size) -> Self {
        let mut workload = Workload::new(size.services, size.endpoints);
        for (index, service) in workload.services.iter_mut().enumerate() {
            mix(index, service);
        }
        Self { workload }
    }

    /// The same services with one family, for the ruleset in kube-proxy's shape.
    pub fn workload(&self) -> &Workload {
        &self.workload
    }

    /// Everything there is at first.
    pub fn objects(&self) -> impl Iterator<Item = Put> + '_ {
        let services = 0..self.workload.services.len();
        let of_services = services.flat_map(|index| {
            let slices = [Some(self.slice(index, false)), self.slice_v6(index)];
            std::iter::once((Kind::Service, self.service(index)))
                .chain(slices.into_iter().flatten())
        });
        [(Kind::Node, node()), (Kind::ServiceCidr, cidrs())]
            .into_iter()
            .chain(of_services)
    }

    /// Replaces an endpoint of a service; returns its slice of IPv4 addresses. (A service with
    /// both families has a second one, which the controller writes on its own.)
    pub fn replace(&mut self, service: usize, endpoint: usize) -> Put {
        self.workload.replace_endpoint(service, endpoint);
        self.slice(service, false)
    }

    /// Adds an endpoint to a service; returns its slice of IPv4 addresses.
    pub fn grow(&mut self, service: usize) -> Put {
        self.workload.grow(service);
        self.slice(service, false)
    }

    /// Takes an endpoint away from a service; returns its slice of IPv4 addresses.
    pub fn shrink(&mut self, service: usize) -> Put {
        self.workload.shrink(service);
        self.slice(service, false)
    }

    /// Changes the endpoints of a service in any way; returns its slice of IPv4 addresses.
    pub fn edit(&mut self, service: usize, edit: impl FnOnce(&mut Vec<Endpoint>)) -> Put {
        edit(&mut self.workload.endpoints[service]);
        self.slice(service, false)
    }

    fn service(&self, index: usize) -> Value {
        let service = &self.workload.services[index];
        let mut families = vec!["IPv4"];
        let mut addresses: Vec<String> = service.cluster_ips.iter().map(text).collect();
        if dual_stack(index) {
            families.push("IPv6");
            addresses.push(twin("fd01::", index as u32 + 1).to_string());
        }
        let ports = service.ports.iter().map(|port| {
            let mut port_json = json!({"name": &*port.name, "protocol": "TCP", "port": port.port,
                "targetPort": &*port.name});
            if let Some(node_port) = port.node_port {
                port_json["nodePort"] = json!(node_port);
            }
            port_json
        });
        let mut spec = json!({
            "type": match service.kind {
                ServiceKind::NodePort => "NodePort",
                ServiceKind::LoadBalancer => "LoadBalancer",
                _ => "ClusterIP",
            },
            "clusterIP": addresses[0],
            "clusterIPs": addresses,
            "ipFamilies": families,
            "ipFamilyPolicy": if dual_stack(index) { "RequireDualStack" } else { "SingleStack" },
            "internalTrafficPolicy": "Cluster",
            "ports": ports.collect::<Vec<_>>(),
            "selector": {"app.kubernetes.io/name": service.name.name()},
            "sessionAffinity": "None",
        });
        if service.kind != ServiceKind::ClusterIp {
            spec["externalTrafficPolicy"] = json!("Cluster");
        }
        if let Some(seconds) = service.affinity_seconds {
            spec["sessionAffinity"] = json!("ClientIP");
            spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
        }
        let ingress = service.load_balancer_ips.iter();
        let ingress = ingress.map(|address| json!({"ip": text(address), "ipMode": "VIP"}));
        let balancer = match service.load_balancer_ips.len() {
            0 => json!({}),
            _ => json!({"ingress": ingress.collect::<Vec<_>>()}),
        };
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": service.name.name(),
                "namespace": service.name.namespace(),
                "uid": uid("5", index),
                "creationTimestamp": timestamp(service.created.unwrap_or_default()),
                "labels": {
                    "app.kubernetes.io/name": service.name.name(),
                    "app.kubernetes.io/managed-by": "Helm",
                    "helm.sh/chart": "service-1.2.3",
                },
                "annotations": {"meta.helm.sh/release-name": service.name.name()},
                "managedFields": [managed("helm", &SERVICE_FIELDS)],
            },
            "spec": spec,
            "status": {"loadBalancer": balancer},
        })
    }

    fn slice_v6(&self, service: usize) -> Option<Put> {
        dual_stack(service).then(|| self.slice(service, true))
    }

    fn slice(&self, service: usize, v6: bool) -> Put {
        let object = &self.workload.services[service];
        let (name, namespace) = (object.name.name(), object.name.namespace());
        let endpoints = &self.workload.endpoints[service];
        let endpoints = endpoints
            .iter()
            .map(|one| endpoint(one, name, namespace, v6));
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{name}-{}", if v6 { "v6" } else { "v4" }),
                "namespace": namespace,
                "generateName": format!("{name}-"),
                "uid": uid(if v6 { "7" } else { "6" }, service),
                "generation": 1,
                "creationTimestamp": timestamp(object.created.unwrap_or_default()),
                "labels": {
                    "app.kubernetes.io/name": name,
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                    "kubernetes.io/service-name": name,
                },
                "ownerReferences": [{
                    "apiVersion": "v1", "kind": "Service", "name": name,
                    "uid": uid("5", service), "controller": true, "blockOwnerDeletion": true,
                }],
                "managedFields": [managed("kube-controller-manager", &SLICE_FIELDS)],
            },
            "addressType": if v6 { "IPv6" } else { "IPv4" },
            "ports": object.ports.iter().map(|port| {
                json!({"name": &*port.name, "protocol": "TCP", "port": 8080})
            }).collect::<Vec<_>>(),
            "endpoints": endpoints.collect::<Vec<_>>(),
        });
        (Kind::EndpointSlice, slice)
    }
}

/// Gives a service its type and what goes with it.
fn mix(index: usize, service: &mut Service) {
    service.kind = match index % 100 {
        0..5 => ServiceKind::NodePort,
        5..8 => ServiceKind::LoadBalancer,
        _ => ServiceKind::ClusterIp,
    };
    service.affinity_seconds = (8..10).contains(&(index % 100)).then_some(AFFINITY_SECONDS);
    let external = service.kind != ServiceKind::ClusterIp;
    for port in &mut service.ports {
        let number = FIRST_NODE_PORT + index / 100 * 8 + index % 100;
        port.node_port = external.then_some(number as u16);
    }
    let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 0)) + 1 + index as u32);
    service.load_balancer_ips = match service.kind {
        ServiceKind::LoadBalancer => vec![address.into()],
        _ => vec![],
    };
}

fn dual_stack(service: usize) -> bool {
    service % 10 == 3
}

fn endpoint(endpoint: &Endpoint, service: &str, namespace: &str, v6: bool) -> Value {
    let IpAddr::V4(v4) = endpoint.address else {
        unreachable!("the workload has IPv4 addresses");
    };
    let pod = u32::from(v4) - u32::from(Ipv4Addr::new(10, 128, 0, 0));
    let address = if v6 {
        twin("fd00::", pod).to_string()
    } else {
        v4.to_string()
    };
    json!({
        "addresses": [address],
        "conditions": {"ready": true, "serving": true, "terminating": false},
        "nodeName": endpoint.node.as_deref(),
        "zone": "zone-a",
        "targetRef": {
            "kind": "Pod",
            "name": format!("{service}-6d4cf56db6-{pod:x}"),
            "namespace": namespace,
            "uid": uid("9", pod as usize),
        },
    })
}

/// The IPv6 address that belongs to a number.
fn twin(range: &str, number: u32) -> Ipv6Addr {
    let base: Ipv6Addr = range.parse().expect("an address");
    Ipv6Addr::from(u128::from(base) + u128::from(number))
}

fn node() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NODE, "labels": {"topology.kubernetes.io/zone": "zone-a"}},
        "spec": {},
        "status": {"addresses": [
            {"type": "InternalIP", "address": NODE_IP.to_string()},
            {"type": "InternalIP", "address": "fd02::1"},
        ]},
    })
}

fn cidrs() -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": [SERVICE_CIDR, SERVICE_CIDR_V6]},
    })
}

const SERVICE_FIELDS: [&str; 8] = [
    "metadata/annotations/meta.helm.sh~1release-name",
    "metadata/labels/app.kubernetes.io~1managed-by",
    "metadata/labels/app.kubernetes.io~1name",
    "metadata/labels/helm.sh~1chart",
    "spec/internalTrafficPolicy",
    "spec/ports/k:{\"port\":80,\"protocol\":\"TCP\"}",
    "spec/selector",
    "spec/type",
];
const SLICE_FIELDS: [&str; 7] = [
    "addressType",
    "endpoints",
    "metadata/generateName",
    "metadata/labels/endpointslice.kubernetes.io~1managed-by",
    "metadata/labels/kubernetes.io~1service-name",
    "metadata/ownerReferences/k:{\"uid\":\"owner\"}",
    "ports",
];

/// An entry of `managedFields`: who wrote which fields. nftlet reads none of it, and has to skip
/// it in every object.
pub fn managed(manager: &str, fields: &[&str]) -> Value {
    let mut tree = Map::new();
    for path in fields {
        let mut at = &mut tree;
        for part in path.split('/') {
            let part = part.replace("~1", "/");
            let key = if part.contains(':') {
                part
            } else {
                format!("f:{part}")
            };
            let below = at.entry(key).or_insert_with(|| json!({}));
            at = below.as_object_mut().expect("only objects are put in");
        }
    }
    json!({"manager": manager, "operation": "Update", "apiVersion": "v1",
        "time": timestamp(1_700_000_000), "fieldsType": "FieldsV1", "fieldsV1": tree})
}

/// A UID of the usual form; the same for the same number.
pub fn uid(kind: &str, number: usize) -> String {
    format!("{kind}f3c2a1b-8d4e-4c6f-9a7b-{number:012x}")
}

/// A moment as the API writes it.
pub fn timestamp(seconds: i64) -> String {
    let moment = jiff::Timestamp::from_second(seconds).expect("within the years that it knows");
    moment.to_string()
}

fn text(address: &IpAddr) -> String {
    address.to_string()
}
