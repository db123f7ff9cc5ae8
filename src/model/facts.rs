//! Services, endpoints, nodes and service address ranges.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::{Labels, ObjectName};

/// An IP address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families, IPv4 first.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// Returns the family of an address.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// A transport protocol that services can use (`spec.ports[].protocol`), with its IP protocol number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Protocol {
    /// TCP, the default of the API.
    Tcp = 6,
    /// UDP.
    Udp = 17,
    /// SCTP.
    Sctp = 132,
}

impl Protocol {
    /// Returns the IP protocol number.
    pub fn number(self) -> u8 {
        self as u8
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

/// The type of a service, as far as rules depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ServiceKind {
    /// `type: ClusterIP` with an address.
    ClusterIp,
    /// `type: NodePort`.
    NodePort,
    /// `type: LoadBalancer`.
    LoadBalancer,
    /// `type: ExternalName`: answered by DNS, has no rules.
    ExternalName,
    /// `clusterIP: None` or no address yet: has no rules.
    Headless,
    /// Left to another proxy (label `service.kubernetes.io/service-proxy-name`): has no rules.
    OtherProxy,
}

/// `externalTrafficPolicy` and `internalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TrafficPolicy {
    /// All endpoints of the cluster (the default of the API).
    #[default]
    Cluster,
    /// Only endpoints on this node.
    Local,
}

/// The maximum number of set elements of one service. A service that needs more has no rules.
pub(crate) const MOST_ELEMENTS: usize = 500_000;

/// A Service, reduced to the fields that become rules.
///
/// The source reports malformed addresses and leaves them out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// `metadata.creationTimestamp` in seconds since 1970: of two services with one frontend the
    /// older has it. `None` (files written by hand) counts as newest.
    pub created: Option<i64>,
    /// The type, with the cases in which the service has no rules.
    pub kind: ServiceKind,
    /// `clusterIPs` (or `clusterIP`), one per address family at most.
    pub cluster_ips: Vec<IpAddr>,
    /// `ports`.
    pub ports: Vec<ServicePort>,
    /// `externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` with `ipMode` VIP or absent.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `loadBalancerSourceRanges`; empty allows all clients.
    pub source_ranges: Vec<IpNet>,
    /// `externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// `internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `sessionAffinity: ClientIP` with its timeout in seconds.
    pub affinity_seconds: Option<u32>,
    /// `healthCheckNodePort`, for a LoadBalancer with external policy Local.
    pub health_check_node_port: Option<u16>,
}

impl Service {
    /// Returns whether the service has frontends, and so rules.
    pub fn has_frontends(&self) -> bool {
        match self.kind {
            ServiceKind::ClusterIp | ServiceKind::NodePort | ServiceKind::LoadBalancer => true,
            ServiceKind::ExternalName | ServiceKind::Headless | ServiceKind::OtherProxy => false,
        }
    }

    /// Returns the maximum number of its frontends: one for each port of each address, and a
    /// NodePort for each port.
    pub fn frontends(&self) -> usize {
        if !self.has_frontends() {
            return 0;
        }
        let lists = [
            &self.cluster_ips,
            &self.load_balancer_ips,
            &self.external_ips,
        ];
        let addresses: usize = lists.into_iter().map(Vec::len).sum();
        self.ports.len().saturating_mul(addresses.saturating_add(1))
    }

    /// Returns whether the frontends alone need more than [`MOST_ELEMENTS`].
    pub(crate) fn is_oversized(&self) -> bool {
        self.frontends() > MOST_ELEMENTS
    }
}

/// One entry of `spec.ports`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServicePort {
    /// The name, by which EndpointSlices refer to the port; empty for the only port.
    pub name: Arc<str>,
    /// The protocol.
    pub protocol: Protocol,
    /// The port of the frontends, not 0.
    pub port: u16,
    /// The port on the node's own addresses.
    pub node_port: Option<u16>,
}

/// An EndpointSlice of one address family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Namespace and name of the slice itself.
    pub name: ObjectName,
    /// The service it belongs to (label `kubernetes.io/service-name`, same namespace).
    pub service: ObjectName,
    /// `metadata.creationTimestamp` in seconds since 1970. `None` (files written by hand) counts as
    /// newest.
    pub created: Option<i64>,
    /// `addressType`.
    pub family: Family,
    /// The ports; the source leaves out entries without a number.
    pub ports: Vec<SlicePort>,
    /// The endpoints, each with its first address.
    pub endpoints: Vec<Endpoint>,
    /// Annotation `endpoints.kubernetes.io/last-change-trigger-time`, milliseconds since 1970.
    pub triggered_at_ms: Option<i64>,
}

/// One entry of an EndpointSlice's `ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// Empty when absent.
    pub name: Arc<str>,
    /// The protocol.
    pub protocol: Protocol,
    /// The target port, not 0.
    pub port: u16,
}

/// One entry of an EndpointSlice's `endpoints`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The first address.
    pub address: IpAddr,
    /// `conditions.ready`, true when absent.
    pub ready: bool,
    /// `conditions.serving`, true when absent.
    pub serving: bool,
    /// `conditions.terminating`, false when absent.
    pub terminating: bool,
    /// `nodeName`.
    pub node: Option<Arc<str>>,
    /// `hints`, shared by endpoints with the same ones.
    pub hints: Option<Arc<Hints>>,
}

// A cluster can have a million.
const _: () = assert!(size_of::<Endpoint>() <= 48);

impl Endpoint {
    /// Returns the zones of its hints; `None` without zone hints.
    pub(crate) fn zone_hints(&self) -> Option<&[Arc<str>]> {
        self.hints.as_ref()?.zones.as_deref()
    }

    /// Returns the nodes of its hints; `None` without node hints.
    pub(crate) fn node_hints(&self) -> Option<&[Arc<str>]> {
        self.hints.as_ref()?.nodes.as_deref()
    }
}

/// The zones and nodes whose traffic an endpoint should receive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Hints {
    /// `forZones[].name`.
    pub zones: Option<Box<[Arc<str>]>>,
    /// `forNodes[].name`.
    pub nodes: Option<Box<[Arc<str>]>>,
}

/// The node that nftlet runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `status.addresses` of type InternalIP, in order.
    pub internal_ips: Vec<IpAddr>,
    /// `status.addresses` of type ExternalIP, in order.
    pub external_ips: Vec<IpAddr>,
    /// `spec.podCIDRs` (or `podCIDR`).
    pub pod_cidrs: Vec<IpNet>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// Whether the node is about to be removed: it has a deletion timestamp or the taint
    /// `ToBeDeletedByClusterAutoscaler`. Health checks of load balancers fail then.
    pub going_away: bool,
    /// `metadata.labels`.
    pub labels: Labels,
    /// All addresses in `status.addresses`, whatever their type, sorted.
    pub addresses: Arc<[IpAddr]>,
}

impl Node {
    /// Returns the node's primary address of a family: the first InternalIP, else the first
    /// ExternalIP, as in kube-proxy.
    pub(crate) fn primary_ip(&self, family: Family) -> Option<IpAddr> {
        self.internal_ips
            .iter()
            .chain(&self.external_ips)
            .copied()
            .find(|ip| Family::of(*ip) == family)
    }
}

/// A ServiceCIDR: ranges that ClusterIPs are allocated from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceCidr {
    /// `metadata.name`.
    pub name: ObjectName,
    /// `spec.cidrs`.
    pub cidrs: Vec<IpNet>,
}
