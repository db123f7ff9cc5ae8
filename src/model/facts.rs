//! The facts nftlet keeps of each object kind.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::ObjectName;

/// An IP address family; each has a table of its own in the kernel.
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

    /// The family of an address.
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
    /// The IP protocol number.
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

/// What sort of service an object is, as far as rules are concerned.
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

/// The most set elements that one service may ask for.
pub(crate) const MOST_ELEMENTS: usize = 500_000;

/// A Service, reduced to the fields that become rules.
///
/// Addresses are already parsed; the source reports and leaves out those that are malformed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// `metadata.creationTimestamp` in seconds since 1970; the older of two services wins a
    /// contested frontend. Absent (files written by hand) counts as newest.
    pub created: Option<i64>,
    /// The sort of service.
    pub kind: ServiceKind,
    /// `clusterIPs` (or `clusterIP`), one per address family at most.
    pub cluster_ips: Vec<IpAddr>,
    /// `ports`.
    pub ports: Vec<ServicePort>,
    /// `externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` with `ipMode` VIP or absent.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `loadBalancerSourceRanges`; empty means everyone.
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
    /// Whether packets are handled for this service at all.
    pub fn has_frontends(&self) -> bool {
        match self.kind {
            ServiceKind::ClusterIp | ServiceKind::NodePort | ServiceKind::LoadBalancer => true,
            ServiceKind::ExternalName | ServiceKind::Headless | ServiceKind::OtherProxy => false,
        }
    }

    /// Returns the most frontends that it can ask for: one for each port of each address, and a
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

    /// Whether its ports and addresses alone ask for more than [`MOST_ELEMENTS`].
    pub(crate) fn is_oversized(&self) -> bool {
        self.frontends() > MOST_ELEMENTS
    }
}

/// One entry of `spec.ports`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServicePort {
    /// The name that joins it to a port of the EndpointSlices; empty for the only port.
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
    /// `metadata.creationTimestamp` in seconds since 1970. Absent (files written by hand) counts as
    /// newest.
    pub created: Option<i64>,
    /// `addressType`.
    pub family: Family,
    /// Ports with a number; entries without one are left out by the source.
    pub ports: Vec<SlicePort>,
    /// The endpoints, first address of each.
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
    /// `hints`, if there are any; shared, because most endpoints have none and many the same.
    pub hints: Option<Arc<Hints>>,
}

// There can be a million.
const _: () = assert!(size_of::<Endpoint>() <= 48);

impl Endpoint {
    /// The zones it is hinted for; `None` when it carries no zone hints.
    pub(crate) fn zone_hints(&self) -> Option<&[Arc<str>]> {
        self.hints.as_ref()?.zones.as_deref()
    }

    /// The nodes it is hinted for; `None` when it carries no node hints.
    pub(crate) fn node_hints(&self) -> Option<&[Arc<str>]> {
        self.hints.as_ref()?.nodes.as_deref()
    }
}

/// Where the traffic of an endpoint should come from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Hints {
    /// `forZones[].name`, if that is there.
    pub zones: Option<Box<[Arc<str>]>>,
    /// `forNodes[].name`, if that is there.
    pub nodes: Option<Box<[Arc<str>]>>,
}

/// The node nftlet runs on.
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
    /// Whether the node is going away: it has a deletion timestamp or the taint
    /// `ToBeDeletedByClusterAutoscaler`.
    pub going_away: bool,
}

impl Node {
    /// Whether the rules are the same for both. Being about to go away matters to health checks
    /// alone.
    pub(crate) fn rules_as(&self, other: &Self) -> bool {
        let with_mine = |other: &Self| Self {
            going_away: self.going_away,
            ..other.clone()
        };
        *self == with_mine(other)
    }

    /// The node's primary address of a family: the first InternalIP, else the first ExternalIP
    /// (kube-proxy's order).
    pub(crate) fn primary_ip(&self, family: Family) -> Option<IpAddr> {
        self.internal_ips
            .iter()
            .chain(&self.external_ips)
            .copied()
            .find(|ip| Family::of(*ip) == family)
    }
}

/// A ServiceCIDR: a range that ClusterIPs are allocated from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceCidr {
    /// `metadata.name`.
    pub name: ObjectName,
    /// `spec.cidrs`.
    pub cidrs: Vec<IpNet>,
}
