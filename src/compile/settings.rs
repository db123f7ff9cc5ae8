//! What the operator decides about rules.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::layout::POD_NETWORKS;
use crate::model::{Family, Node};
use crate::ruleset::{Comparison, Operand, Selector, Statement};

/// Options of the command line that shape the rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `--detect-local-mode` with what it needs to know: which traffic comes from pods.
    pub detect_local: DetectLocal,
    /// `--masquerade-all`: masquerade all traffic to ClusterIPs.
    pub masquerade_all: bool,
    /// `--nodeport-addresses`.
    pub nodeport_addresses: NodePortAddresses,
    /// `--bind-address`: the primary address of its family, whatever the Node object says.
    pub bind_address: Option<IpAddr>,
    /// `--masquerade-bit`.
    pub masquerade_bit: MasqueradeBit,
}

/// The bit of the packet mark that asks for masquerading, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MasqueradeBit(u8);

impl MasqueradeBit {
    /// The bit with this number, from 0 to 31; `None` for a number beyond.
    pub fn new(number: u8) -> Option<Self> {
        (number < 32).then_some(Self(number))
    }

    /// The mark with this bit alone.
    pub fn mark(self) -> u32 {
        1 << self.0
    }
}

impl Default for MasqueradeBit {
    /// kube-proxy's default, 0x4000, which other software on Kubernetes nodes leaves alone.
    fn default() -> Self {
        Self(14)
    }
}

/// How traffic of pods is told from other traffic (kube-proxy's `--detect-local-mode`).
///
/// Traffic to ClusterIPs that does not come from pods is masqueraded, and pods of this node are
/// exempt from external policy Local.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    /// By the pod network of the cluster; a family without a range is not told apart.
    ClusterCidr(Vec<IpNet>),
    /// By the pod network of this node, from `spec.podCIDRs` of the Node object.
    NodeCidr,
    /// By the bridge that the node's pods are attached to.
    BridgeInterface(Arc<str>),
    /// By the beginning of the names of the pods' interfaces.
    InterfaceNamePrefix(Arc<str>),
}

impl Default for DetectLocal {
    fn default() -> Self {
        DetectLocal::ClusterCidr(Vec::new())
    }
}

/// What a rule looks at to tell traffic of pods, in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalDetector {
    /// Nothing: pods cannot be told.
    None,
    /// The source address.
    PodNetworks,
    /// The interface the packet came in by.
    Interface(Operand),
}

impl LocalDetector {
    /// Matches packets that come from pods, or those that do not; `None` where nothing tells.
    pub fn from_local_pods(&self, comparison: Comparison) -> Option<Statement> {
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

/// On which of the node's addresses NodePorts answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The primary address of each family, from the Node object.
    #[default]
    Primary,
    /// Those inside the ranges; a family without a range means all of its addresses.
    Inside(Vec<IpNet>),
}

impl Settings {
    /// How rules of a family tell traffic of pods. It does not depend on the Node object, whose
    /// ranges are elements of a set. (Whether there is a range at all decides on one rule of the
    /// skeleton.)
    pub fn detector(&self, family: Family) -> LocalDetector {
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

    /// The ranges of pod addresses in a family, where pods are told by address.
    pub fn pod_networks(&self, family: Family, node: Option<&Node>) -> Vec<IpNet> {
        let ranges = match &self.detect_local {
            DetectLocal::ClusterCidr(ranges) => ranges.as_slice(),
            DetectLocal::NodeCidr => node.map_or(&[][..], |node| &node.pod_cidrs),
            DetectLocal::BridgeInterface(_) | DetectLocal::InterfaceNamePrefix(_) => &[],
        };
        let own = ranges.iter().copied();
        own.filter(|net| Family::of(net.addr()) == family).collect()
    }

    /// The ranges whose local addresses answer NodePorts. Loopback addresses never do.
    pub fn nodeport_ranges(&self, family: Family, node: Option<&Node>) -> Vec<IpNet> {
        match &self.nodeport_addresses {
            NodePortAddresses::Primary => {
                let bound = self.bind_address.filter(|ip| Family::of(*ip) == family);
                let primary = bound.or_else(|| node?.primary_ip(family));
                primary.map(IpNet::from).into_iter().collect()
            }
            NodePortAddresses::Inside(ranges) => {
                let mut given: Vec<IpNet> = ranges
                    .iter()
                    .filter(|net| Family::of(net.addr()) == family)
                    .copied()
                    .collect();
                if given.is_empty() || given.iter().any(|net| net.prefix_len() == 0) {
                    given = everything_but_loopback(family);
                }
                given
            }
        }
    }
}

/// All addresses of a family without those of the loopback network.
fn everything_but_loopback(family: Family) -> Vec<IpNet> {
    let (all, loopback): (IpNet, IpNet) = match family {
        Family::V4 => (
            ipnet::Ipv4Net::default().into(),
            ipnet::Ipv4Net::new_assert([127, 0, 0, 0].into(), 8).into(),
        ),
        Family::V6 => (
            ipnet::Ipv6Net::default().into(),
            IpNet::from(IpAddr::V6(std::net::Ipv6Addr::LOCALHOST)),
        ),
    };
    // Halving around the loopback network leaves, for each bit of its prefix, the other half.
    let mut parts = Vec::new();
    let mut current = all;
    while current.prefix_len() < loopback.prefix_len() {
        let Ok(halves) = current.subnets(current.prefix_len() + 1) else {
            break;
        };
        let (with, without): (Vec<IpNet>, Vec<IpNet>) =
            halves.partition(|half| half.contains(&loopback));
        parts.extend(without);
        match with.first() {
            Some(half) => current = *half,
            None => break,
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_are_those_outside_of_loopback() {
        let v4 = everything_but_loopback(Family::V4);
        let covers = |nets: &[IpNet], address: &str| {
            let address: IpAddr = address.parse().unwrap();
            nets.iter().filter(|net| net.contains(&address)).count()
        };
        for address in ["126.255.255.255", "128.0.0.0", "0.0.0.0", "255.255.255.255"] {
            assert_eq!(covers(&v4, address), 1, "{address}");
        }
        for address in ["127.0.0.0", "127.0.0.1", "127.255.255.255"] {
            assert_eq!(covers(&v4, address), 0, "{address}");
        }
        let v6 = everything_but_loopback(Family::V6);
        assert_eq!(covers(&v6, "::1"), 0);
        assert_eq!(covers(&v6, "::2"), 1);
        assert_eq!(covers(&v6, "fe80::1"), 1);
    }

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
        };
        let mut settings = Settings::default();
        let primary = |settings: &Settings, node: &Node| {
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

    #[test]
    fn a_family_without_a_range_means_all_of_it() {
        let settings = Settings {
            nodeport_addresses: NodePortAddresses::Inside(vec!["10.0.0.0/8".parse().unwrap()]),
            ..Settings::default()
        };
        assert_eq!(
            settings.nodeport_ranges(Family::V4, None),
            ["10.0.0.0/8".parse::<IpNet>().unwrap()]
        );
        assert_eq!(
            settings.nodeport_ranges(Family::V6, None),
            everything_but_loopback(Family::V6)
        );
    }
}
