//! What the operator decides about rules.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::{Family, Node};

/// Options of the command line that shape the rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `--cluster-cidr`: the pod network. Traffic to ClusterIPs from elsewhere is masqueraded;
    /// without a range of a family nothing of that family is (kube-proxy's
    /// `--detect-local-mode=ClusterCIDR`).
    pub cluster_cidrs: Vec<IpNet>,
    /// `--masquerade-all`: masquerade all traffic to ClusterIPs.
    pub masquerade_all: bool,
    /// `--nodeport-addresses`.
    pub nodeport_addresses: NodePortAddresses,
    /// Addresses to use where no Node object tells the node's own.
    pub host_addresses: Vec<IpAddr>,
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
    /// The pod network of a family.
    pub fn cluster_cidr(&self, family: Family) -> Option<IpNet> {
        let mut cidrs = self.cluster_cidrs.iter().copied();
        cidrs.find(|net| Family::of(net.addr()) == family)
    }

    /// The ranges whose local addresses answer NodePorts. Loopback addresses never do.
    pub fn nodeport_ranges(&self, family: Family, node: Option<&Node>) -> Vec<IpNet> {
        match &self.nodeport_addresses {
            NodePortAddresses::Primary => {
                let primary = match node {
                    Some(node) => node.primary_ip(family),
                    None => {
                        let mut addresses = self.host_addresses.iter().copied();
                        addresses.find(|address| Family::of(*address) == family)
                    }
                };
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
