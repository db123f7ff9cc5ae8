//! The addresses of the node on which NodePorts answer.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Family, Node};

/// The value of `--nodeport-addresses`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The primary address of each family, from the Node object.
    #[default]
    Primary,
    /// The addresses inside the ranges; in a family without a range, all addresses.
    Inside(Vec<IpNet>),
}

impl NodePortAddresses {
    /// Returns the ranges whose local addresses answer NodePorts. Loopback addresses never do.
    /// `bound` overrides the Node's primary address of its family.
    pub fn ranges(&self, family: Family, bound: Option<IpAddr>, node: Option<&Node>) -> Vec<IpNet> {
        match self {
            NodePortAddresses::Primary => {
                let bound = bound.filter(|ip| Family::of(*ip) == family);
                let primary = bound.or_else(|| node?.primary_ip(family));
                primary.map(IpNet::from).into_iter().collect()
            }
            NodePortAddresses::Inside(ranges) => {
                let mut given: Vec<IpNet> = ranges
                    .iter()
                    .filter(|net| Family::of(net.addr()) == family)
                    .copied()
                    .collect();
                if given.is_empty() {
                    given.push(everything(family));
                }
                given.into_iter().flat_map(without_loopback).collect()
            }
        }
    }
}

/// Returns the range of all addresses of a family.
fn everything(family: Family) -> IpNet {
    match family {
        Family::V4 => ipnet::Ipv4Net::default().into(),
        Family::V6 => ipnet::Ipv6Net::default().into(),
    }
}

/// Returns ranges that cover a range except the loopback network.
fn without_loopback(range: IpNet) -> Vec<IpNet> {
    let loopback: IpNet = match range {
        IpNet::V4(_) => ipnet::Ipv4Net::new_assert([127, 0, 0, 0].into(), 8).into(),
        IpNet::V6(_) => IpNet::from(IpAddr::V6(std::net::Ipv6Addr::LOCALHOST)),
    };
    if loopback.contains(&range) {
        return Vec::new();
    }
    if !range.contains(&loopback) {
        return vec![range];
    }
    // Halves the range that contains the loopback network and keeps the other half, for each bit of
    // its prefix.
    let mut parts = Vec::new();
    let mut current = range;
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
        let all = |family| without_loopback(everything(family));
        let v4 = all(Family::V4);
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
        let v6 = all(Family::V6);
        assert_eq!(covers(&v6, "::1"), 0);
        assert_eq!(covers(&v6, "::2"), 1);
        assert_eq!(covers(&v6, "fe80::1"), 1);
    }

    #[test]
    fn a_family_without_a_range_means_all_of_it() {
        let inside = NodePortAddresses::Inside(vec!["10.0.0.0/8".parse().unwrap()]);
        assert_eq!(
            inside.ranges(Family::V4, None, None),
            ["10.0.0.0/8".parse::<IpNet>().unwrap()]
        );
        assert_eq!(
            inside.ranges(Family::V6, None, None),
            without_loopback(everything(Family::V6))
        );
    }

    #[test]
    fn no_range_answers_on_loopback() {
        let inside = |ranges: &[&str], family| {
            let ranges = ranges.iter().map(|range| range.parse().unwrap());
            NodePortAddresses::Inside(ranges.collect()).ranges(family, None, None)
        };
        for (ranges, family) in [
            (&["127.0.0.0/8"], Family::V4),
            (&["127.0.0.1/32"], Family::V4),
            (&["::1/128"], Family::V6),
        ] {
            assert_eq!(inside(ranges, family), [], "{ranges:?}");
        }
        let most = inside(&["0.0.0.0/1", "192.168.0.0/16"], Family::V4);
        let covers = |address: [u8; 4]| most.iter().any(|net| net.contains(&IpAddr::from(address)));
        assert!(covers([126, 255, 255, 255]) && covers([192, 168, 0, 1]) && covers([0, 0, 0, 1]));
        assert!(!covers([127, 0, 0, 1]) && !covers([128, 0, 0, 0]));
    }
}
