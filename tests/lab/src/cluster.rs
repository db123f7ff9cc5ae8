//! The services of a cluster, as an API server sends them.
//!
//! Of a hundred services 90 have just a ClusterIP, five are of type NodePort, three of type
//! LoadBalancer, and two have session affinity; every tenth has both address families. Every
//! service has one port. Of a hundred endpoints one is on the node that is programmed. Objects
//! carry what real ones do, read by nftlet or not: labels, owners, references to pods, managed
//! fields. All of it follows from numbers alone, so that every run gets the same objects.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde_json::{Value, json};

use crate::fake_api::{CIDRS, NODES as NODE_OBJECTS, SERVICES, SLICES};

/// The node that is programmed.
pub const NODE: &str = "node-0";
/// Its address, where NodePorts answer.
pub const NODE_IP: Ipv4Addr = Ipv4Addr::new(192, 168, 10, 1);
/// The pod ranges of both families, as `--cluster-cidr` takes them.
pub const POD_CIDRS: [&str; 2] = ["10.128.0.0/9", "fd00::/64"];
/// The ranges of ClusterIPs of both families.
pub const SERVICE_CIDRS: [&str; 2] = ["10.64.0.0/11", "fd01::/108"];
/// The port that endpoints answer on.
pub const TARGET_PORT: u16 = 8080;

const NODES: u32 = 100;
const NAMESPACES: usize = 50;
/// The EndpointSlice controller puts so many endpoints into one slice: every service has one slice
/// per family.
const MOST_ENDPOINTS: usize = 100;
/// The most services that the ranges have room for.
const MOST_SERVICES: usize = 300_000;
const FIRST_NODE_PORT: usize = 30_000;
const FIRST_UDP_PORT: usize = 10_000;
const AFFINITY_SECONDS: u32 = 10_800;

/// The path of a collection of the API server, and an object of it.
pub type Put = (&'static str, Value);

/// How large a cluster is, written as `10000x10`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
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
        let Some((services, endpoints)) = numbers else {
            return Err("a size is written as SERVICESxENDPOINTS, for example 10000x10".into());
        };
        let fits =
            (1..=MOST_SERVICES).contains(&services) && (1..MOST_ENDPOINTS).contains(&endpoints);
        let size = Self {
            services,
            endpoints,
        };
        fits.then_some(size).ok_or_else(|| {
            let most = MOST_ENDPOINTS - 1;
            format!("a cluster has 1 to {MOST_SERVICES} services with 1 to {most} endpoints")
        })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let services = grouped(self.services as f64);
        write!(f, "{services} x {}", self.endpoints)
    }
}

/// The conditions of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    Ready,
    NotReady,
    /// Terminating and still serving.
    Draining,
}

/// An endpoint of a service.
#[derive(Clone, Copy, Debug)]
pub struct Endpoint {
    pub address: Ipv4Addr,
    /// The number of its node; 0 is the one that is programmed.
    pub node: u32,
    pub condition: Condition,
}

/// The services of a cluster and their endpoints.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// The endpoints of each service.
    pub endpoints: Vec<Vec<Endpoint>>,
    /// Whether every tenth service has both address families.
    pub dual_stack: bool,
    /// Whether two services of a hundred have session affinity.
    pub affinity: bool,
    /// Whether services are of UDP, each with a port of its own, and not of TCP with port 80.
    pub udp: bool,
    pods: u32,
}

impl Cluster {
    /// Returns a cluster of a size with the usual mix of services.
    pub fn new(size: Size) -> Self {
        let mut cluster = Self {
            endpoints: Vec::with_capacity(size.services),
            dual_stack: true,
            affinity: true,
            udp: false,
            pods: 0,
        };
        for _ in 0..size.services {
            cluster.add_service(size.endpoints);
        }
        cluster
    }

    /// Returns a cluster whose services have one family and no session affinity.
    pub fn plain(size: Size) -> Self {
        Self {
            dual_stack: false,
            affinity: false,
            ..Self::new(size)
        }
    }

    /// Adds a service behind the others and returns its number.
    pub fn add_service(&mut self, endpoints: usize) -> usize {
        let endpoints = (0..endpoints).map(|_| self.endpoint()).collect();
        self.endpoints.push(endpoints);
        self.endpoints.len() - 1
    }

    /// Adds services behind the others up to one with a ClusterIP of one family alone; returns its
    /// number.
    pub fn add_plain_service(&mut self, endpoints: usize) -> usize {
        loop {
            let service = self.add_service(endpoints);
            if service % 100 >= 10 && service % 10 != 3 {
                return service;
            }
        }
    }

    /// Returns an endpoint with an address that none had before.
    pub fn endpoint(&mut self) -> Endpoint {
        self.pods += 1;
        Endpoint {
            address: above(Ipv4Addr::new(10, 128, 0, 0), self.pods as usize),
            node: (self.pods - 1).wrapping_mul(7919) % NODES,
            condition: Condition::Ready,
        }
    }

    /// Returns the node, with a label that no service depends on.
    pub fn node(label: usize) -> Put {
        let node = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": NODE, "labels": {
                "topology.kubernetes.io/zone": "zone-a", "example.com/label": label.to_string()}},
            "spec": {},
            "status": {"addresses": [
                {"type": "InternalIP", "address": NODE_IP.to_string()},
                {"type": "InternalIP", "address": "fd02::1"},
            ]},
        });
        (NODE_OBJECTS, node)
    }

    /// Returns all objects, the node and the ServiceCIDR among them.
    pub fn objects(&self) -> impl Iterator<Item = Put> + '_ {
        let cidrs = json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": SERVICE_CIDRS},
        });
        let services = (0..self.endpoints.len()).flat_map(|index| self.service_objects(index));
        [Self::node(0), (CIDRS, cidrs)].into_iter().chain(services)
    }

    /// Returns a service with its slices.
    pub fn service_objects(&self, service: usize) -> impl Iterator<Item = Put> + '_ {
        let twin = self.has_twin(service).then(|| self.slice(service, true));
        let slices = [Some(self.slice(service, false)), twin];
        std::iter::once((SERVICES, self.service(service))).chain(slices.into_iter().flatten())
    }

    /// Edits the endpoints of a service; returns its slice of IPv4 addresses. (A service with both
    /// families has a second one, which the controller writes on its own.)
    pub fn edit(&mut self, service: usize, edit: impl FnOnce(&mut Vec<Endpoint>)) -> Put {
        edit(&mut self.endpoints[service]);
        self.slice(service, false)
    }

    /// Replaces an endpoint of a service; returns its slice.
    pub fn replace(&mut self, service: usize, endpoint: usize) -> Put {
        let other = self.endpoint();
        self.edit(service, |endpoints| endpoints[endpoint] = other)
    }

    /// Adds endpoints to a service; returns its slice.
    pub fn grow(&mut self, service: usize, count: usize) -> Put {
        let more: Vec<_> = (0..count).map(|_| self.endpoint()).collect();
        self.edit(service, |endpoints| endpoints.extend(more))
    }

    /// Removes the last endpoints of a service; returns its slice.
    pub fn shrink(&mut self, service: usize, count: usize) -> Put {
        self.edit(service, |endpoints| {
            endpoints.truncate(endpoints.len() - count)
        })
    }

    /// Returns the namespace and the name of a service.
    pub fn name(service: usize) -> (String, String) {
        let namespace = format!("team-{}", service % NAMESPACES);
        (namespace, format!("service-{service}"))
    }

    /// Returns the ClusterIP of a service.
    pub fn cluster_ip(service: usize) -> Ipv4Addr {
        above(Ipv4Addr::new(10, 64, 0, 0), service + 1)
    }

    /// Returns the port of a service.
    pub fn port(&self, service: usize) -> u16 {
        if self.udp {
            (FIRST_UDP_PORT + service) as u16
        } else {
            80
        }
    }

    /// Returns the NodePort of a service of type NodePort or LoadBalancer.
    pub fn node_port(service: usize) -> Option<u16> {
        let number = FIRST_NODE_PORT + service / 100 * 8 + service % 100;
        (service % 100 < 8).then_some(number as u16)
    }

    /// Returns the address of a service of type LoadBalancer.
    pub fn load_balancer(service: usize) -> Option<Ipv4Addr> {
        let balanced = (5..8).contains(&(service % 100));
        balanced.then(|| above(Ipv4Addr::new(198, 18, 0, 0), service + 1))
    }

    fn has_twin(&self, service: usize) -> bool {
        self.dual_stack && service % 10 == 3
    }

    fn service(&self, index: usize) -> Value {
        let (namespace, name) = Self::name(index);
        let (mut families, mut policy) = (vec!["IPv4"], "SingleStack");
        let mut addresses = vec![Self::cluster_ip(index).to_string()];
        if self.has_twin(index) {
            (families, policy) = (vec!["IPv4", "IPv6"], "RequireDualStack");
            addresses.push(twin("fd01::", index + 1));
        }
        let mut port = json!({"name": "http", "protocol": self.protocol(),
            "port": self.port(index), "targetPort": "http"});
        let (node_port, balancer) = (Self::node_port(index), Self::load_balancer(index));
        if let Some(number) = node_port {
            port["nodePort"] = json!(number);
        }
        let mut spec = json!({
            "type": match (node_port, balancer) {
                (_, Some(_)) => "LoadBalancer",
                (Some(_), _) => "NodePort",
                _ => "ClusterIP",
            },
            "clusterIP": addresses[0],
            "clusterIPs": addresses,
            "ipFamilies": families,
            "ipFamilyPolicy": policy,
            "internalTrafficPolicy": "Cluster",
            "ports": [port],
            "selector": {"app.kubernetes.io/name": name},
            "sessionAffinity": "None",
        });
        if node_port.is_some() {
            spec["externalTrafficPolicy"] = json!("Cluster");
        }
        if self.affinity && (8..10).contains(&(index % 100)) {
            spec["sessionAffinity"] = json!("ClientIP");
            spec["sessionAffinityConfig"] =
                json!({"clientIP": {"timeoutSeconds": AFFINITY_SECONDS}});
        }
        let status = balancer.map_or_else(
            || json!({}),
            |address| json!({"ingress": [{"ip": address.to_string(), "ipMode": "VIP"}]}),
        );
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": uid("5", index),
                "creationTimestamp": timestamp(index),
                "labels": {
                    "app.kubernetes.io/name": name,
                    "app.kubernetes.io/managed-by": "Helm",
                    "helm.sh/chart": "service-1.2.3",
                },
                "annotations": {"meta.helm.sh/release-name": name},
                "managedFields": [managed("helm")],
            },
            "spec": spec,
            "status": {"loadBalancer": status},
        })
    }

    fn protocol(&self) -> &'static str {
        if self.udp { "UDP" } else { "TCP" }
    }

    fn slice(&self, service: usize, v6: bool) -> Put {
        let (namespace, name) = Self::name(service);
        let endpoint = |endpoint: &Endpoint| {
            let pod = u32::from(endpoint.address) - u32::from(Ipv4Addr::new(10, 128, 0, 0));
            let address = match v6 {
                true => twin("fd00::", pod as usize),
                false => endpoint.address.to_string(),
            };
            json!({
                "addresses": [address],
                "conditions": {
                    "ready": endpoint.condition == Condition::Ready,
                    "serving": endpoint.condition != Condition::NotReady,
                    "terminating": endpoint.condition == Condition::Draining,
                },
                "nodeName": format!("node-{}", endpoint.node),
                "zone": "zone-a",
                "targetRef": {
                    "kind": "Pod",
                    "name": format!("{name}-6d4cf56db6-{pod:x}"),
                    "namespace": namespace,
                    "uid": uid("9", pod as usize),
                },
            })
        };
        let endpoints: Vec<Value> = self.endpoints[service].iter().map(endpoint).collect();
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{name}-{}", if v6 { "v6" } else { "v4" }),
                "namespace": namespace,
                "generateName": format!("{name}-"),
                "uid": uid(if v6 { "7" } else { "6" }, service),
                "generation": 1,
                "creationTimestamp": timestamp(service),
                "labels": {
                    "app.kubernetes.io/name": name,
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                    "kubernetes.io/service-name": name,
                },
                "ownerReferences": [{
                    "apiVersion": "v1", "kind": "Service", "name": name,
                    "uid": uid("5", service), "controller": true, "blockOwnerDeletion": true,
                }],
                "managedFields": [managed("kube-controller-manager")],
            },
            "addressType": if v6 { "IPv6" } else { "IPv4" },
            "ports": [{"name": "http", "protocol": self.protocol(), "port": TARGET_PORT}],
            "endpoints": endpoints,
        });
        (SLICES, slice)
    }
}

/// Returns the address that is so many above another one.
pub fn above(base: Ipv4Addr, number: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(base) + number as u32)
}

/// Returns the IPv6 address of a number.
fn twin(range: &str, number: usize) -> String {
    let base: Ipv6Addr = range.parse().expect("an address");
    Ipv6Addr::from(u128::from(base) + number as u128).to_string()
}

/// Returns an entry of `managedFields`, of the usual length. nftlet skips it in every object.
pub fn managed(manager: &str) -> Value {
    json!({
        "manager": manager, "operation": "Update", "apiVersion": "v1",
        "time": timestamp(0), "fieldsType": "FieldsV1",
        "fieldsV1": {
            "f:metadata": {
                "f:generateName": {},
                "f:labels": {".": {}, "f:app.kubernetes.io/name": {}, "f:helm.sh/chart": {}},
                "f:ownerReferences": {"k:{\"uid\":\"owner\"}": {}},
            },
            "f:spec": {"f:ports": {"k:{\"port\":80,\"protocol\":\"TCP\"}": {}}, "f:type": {}},
        },
    })
}

/// Returns a UID of the usual form; the same for the same number.
pub fn uid(kind: &str, number: usize) -> String {
    format!("{kind}f3c2a1b-8d4e-4c6f-9a7b-{number:012x}")
}

/// Returns one of many times, as the API writes them.
pub fn timestamp(number: usize) -> String {
    let [hour, minute, second] = [number / 3600 % 24, number / 60 % 60, number % 60];
    format!("2023-11-14T{hour:02}:{minute:02}:{second:02}Z")
}

/// Returns a whole number with a comma between thousands.
pub fn grouped(number: f64) -> String {
    let digits = format!("{:.0}", number.abs());
    let mut text = String::from(if number < 0.0 { "-" } else { "" });
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Numbers that look random and are the same in every run (xorshift).
#[derive(Debug)]
pub struct Random(u64);

impl Default for Random {
    /// Starts the sequence.
    fn default() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }
}

impl Random {
    /// Returns a number below a bound.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}
