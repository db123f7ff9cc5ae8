//! Address ranges as elements of interval sets.

use std::net::IpAddr;

use ipnet::IpNet;

use super::key::Key;
use super::table::Element;

/// Returns the elements that cover exactly the given networks.
///
/// Joins networks that overlap or touch: the kernel refuses overlapping intervals, and equal sets
/// of addresses get equal elements. All networks must be of one family.
pub fn merge(networks: impl IntoIterator<Item = IpNet>) -> Vec<Element> {
    let mut ranges: Vec<(IpAddr, IpAddr)> = networks
        .into_iter()
        .map(|net| (net.network(), net.broadcast()))
        .collect();
    ranges.sort_unstable();
    let mut merged: Vec<(IpAddr, IpAddr)> = Vec::new();
    for (start, end) in ranges {
        match merged.last_mut() {
            Some(last) if start <= last.1 || successor(last.1) == Some(start) => {
                last.1 = last.1.max(end);
            }
            _ => merged.push((start, end)),
        }
    }
    merged
        .into_iter()
        .map(|(start, end)| Element {
            key_end: Some(Box::new(Key::address(end))),
            ..Element::new(Key::address(start))
        })
        .collect()
}

fn successor(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => u32::from(v4).checked_add(1).map(|n| IpAddr::V4(n.into())),
        IpAddr::V6(v6) => u128::from(v6).checked_add(1).map(|n| IpAddr::V6(n.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(networks: &[&str]) -> Vec<(Key, Key)> {
        merge(networks.iter().map(|n| n.parse().unwrap()))
            .into_iter()
            .map(|e| (e.key, *e.key_end.unwrap()))
            .collect()
    }

    fn range(start: &str, end: &str) -> (Key, Key) {
        (
            Key::address(start.parse().unwrap()),
            Key::address(end.parse().unwrap()),
        )
    }

    #[test]
    fn joins_what_overlaps_or_touches() {
        assert_eq!(
            merged(&["10.1.0.0/16", "10.0.0.0/16", "10.0.3.0/24", "10.3.0.0/16"]),
            [
                range("10.0.0.0", "10.1.255.255"),
                range("10.3.0.0", "10.3.255.255")
            ]
        );
    }

    #[test]
    fn reaches_the_last_address() {
        assert_eq!(
            merged(&["0.0.0.0/0", "255.255.255.255/32"]),
            [range("0.0.0.0", "255.255.255.255")]
        );
        assert_eq!(
            merged(&["ffff::/16"]),
            [range("ffff::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")]
        );
    }
}
