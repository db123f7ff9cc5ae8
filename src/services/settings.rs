//! The settings of the rules for services.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::layout::POD_NETWORKS;
use crate::model::{Family, Node, NodePortAddresses};
use crate::nft::{Comparison, Operand, Selector, Statement};
use crate::services::Store;

/// The options on which the rules for services depend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceSettings {
    /// Whether services are left to another program. Then there are no rules.
    pub off: bool,
    /// `--detect-local-mode` with its ranges or interface: which traffic comes from pods.
    pub detect_local: DetectLocal,
    /// `--masquerade-all`: masquerade all traffic to ClusterIPs.
    pub masquerade_all: bool,
    /// `--nodeport-addresses`.
    pub nodeport_addresses: NodePortAddresses,
    /// `--bind-address`, which overrides the Node's primary address of its family.
    pub bind_address: Option<IpAddr>,
    /// `--masquerade-bit`.
    pub masquerade_bit: MasqueradeBit,
}

/// The number of the bit in the packet mark that requests masquerading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MasqueradeBit(u8);

impl MasqueradeBit {
    /// Returns the bit with a number from 0 to 31; `None` for greater numbers.
    pub fn new(number: u8) -> Option<Self> {
        (number < 32).then_some(Self(number))
    }

    /// Returns the mark with only this bit set.
    pub fn mark(self) -> u32 {
        1 << self.0
    }
}

impl Default for MasqueradeBit {
    /// Returns kube-proxy's default, 0x4000, which other software on Kubernetes nodes does not use.
    fn default() -> Self {
        Self(14)
    }
}

/// How traffic of pods is recognised (kube-proxy's `--detect-local-mode`).
///
/// Traffic to ClusterIPs that does not come from pods is masqueraded, and pods of this node are
/// exempt from external policy Local.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    /// By the pod network of the cluster. In a family without a range it is not recognised.
    ClusterCidr(Vec<IpNet>),
    /// By the pod network of this node, from `spec.podCIDRs` of the Node object.
    NodeCidr,
    /// By the bridge to which the node's pods are attached.
    BridgeInterface(Arc<str>),
    /// By the prefix of the pods' interface names.
    InterfaceNamePrefix(Arc<str>),
}

impl Default for DetectLocal {
    fn default() -> Self {
        DetectLocal::ClusterCidr(Vec::new())
    }
}

/// The property of a packet by which rules of one family recognise traffic of pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LocalDetector {
    /// None: traffic of pods is not recognised.
    None,
    /// The source address.
    PodNetworks,
    /// The input interface.
    Interface(Operand),
}

impl LocalDetector {
    /// Returns a match of packets that come from pods, or do not; `None` if they are not
    /// recognised.
    pub(crate) fn match_local_pods(&self, comparison: Comparison) -> Option<Statement> {
        match self {
            LocalDetector::None => None,
            LocalDetector::PodNetworks => Some(Statement::InSet(
                vec![Selector::SourceAddress],
                comparison,
                POD_NETWORKS.into(),
            )),
            LocalDetector::Interface(operand) => Some(Statement::Match(
                Selector::InputInterface,
                comparison,
                operand.clone(),
            )),
        }
    }
}

impl ServiceSettings {
    /// Returns how rules of a family recognise traffic of pods. It does not depend on the Node
    /// object, whose ranges are elements of a set. (One rule of the skeleton exists only if there
    /// is a range.)
    pub(crate) fn detector(&self, family: Family) -> LocalDetector {
        match &self.detect_local {
            DetectLocal::ClusterCidr(_) if self.pod_networks(family, None).is_empty() => {
                LocalDetector::None
            }
            DetectLocal::ClusterCidr(_) | DetectLocal::NodeCidr => LocalDetector::PodNetworks,
            DetectLocal::BridgeInterface(name) => {
                LocalDetector::Interface(Operand::Interface(name.clone()))
            }
            DetectLocal::InterfaceNamePrefix(prefix) => {
                LocalDetector::Interface(Operand::InterfacePrefix(prefix.clone()))
            }
        }
    }

    /// Returns the ranges of pod addresses in a family, if pods are recognised by address.
    pub(crate) fn pod_networks(&self, family: Family, node: Option<&Node>) -> Vec<IpNet> {
        let ranges = match &self.detect_local {
            DetectLocal::ClusterCidr(ranges) => ranges.as_slice(),
            DetectLocal::NodeCidr => node.map_or(&[][..], |node| &node.pod_cidrs),
            DetectLocal::BridgeInterface(_) | DetectLocal::InterfaceNamePrefix(_) => &[],
        };
        let own = ranges.iter().copied();
        own.filter(|net| Family::of(net.addr()) == family).collect()
    }

    /// Returns the store with the addresses on which NodePorts answer. Without services it needs no
    /// lists.
    pub fn store(&self, store: Store) -> Store {
        let store = if self.off {
            store.without_lists()
        } else {
            store
        };
        store.with_node_ports(self.nodeport_addresses.clone(), self.bind_address)
    }

    /// Returns the ranges whose local addresses answer NodePorts. Loopback addresses never do.
    pub(crate) fn nodeport_ranges(&self, family: Family, node: Option<&Node>) -> Vec<IpNet> {
        self.nodeport_addresses
            .ranges(family, self.bind_address, node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_primary_address_is_the_bound_one_then_the_internal_then_the_external() {
        let ips = |texts: &[&str]| texts.iter().map(|ip| ip.parse().unwrap()).collect();
        let mut node = Node {
            name: "node-1".into(),
            internal_ips: ips(&["fd00::1", "10.0.0.1", "10.0.0.2"]),
            external_ips: ips(&["203.0.113.1", "2001:db8::1"]),
            pod_cidrs: vec![],
            zone: None,
            going_away: false,
            labels: Default::default(),
            addresses: Default::default(),
        };
        let mut settings = ServiceSettings::default();
        let primary = |settings: &ServiceSettings, node: &Node| {
            Family::ALL.map(|family| {
                let ranges = settings.nodeport_ranges(family, Some(node));
                ranges.iter().map(ToString::to_string).collect::<String>()
            })
        };
        assert_eq!(primary(&settings, &node), ["10.0.0.1/32", "fd00::1/128"]);
        node.internal_ips = ips(&["fd00::1"]);
        assert_eq!(primary(&settings, &node), ["203.0.113.1/32", "fd00::1/128"]);
        node.external_ips = vec![];
        assert_eq!(primary(&settings, &node), ["", "fd00::1/128"]);
        settings.bind_address = Some("192.0.2.1".parse().unwrap());
        assert_eq!(primary(&settings, &node), ["192.0.2.1/32", "fd00::1/128"]);
    }
}
