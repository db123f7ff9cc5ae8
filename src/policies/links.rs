//! The interfaces that lead to the pods of this node.
//!
//! Every pod has an IPv6 link-local address that no object contains. Traffic from and to it can only
//! be recognised by the interface. The host's routes name it, both for the network of a bridge with
//! many pods and for a single pod with an interface of its own.

use std::net::IpAddr;
use std::sync::Arc;

use crate::model::HostRoute;

/// Returns the interface of the route with the longest prefix that contains an address; of equal ones
/// that of the first, which the kernel prefers.
pub(super) fn interface(routes: &[HostRoute], address: IpAddr) -> Option<&Arc<str>> {
    let containing = routes.iter().filter(|it| it.network.contains(&address));
    // `max_by_key` returns the last of equal ones.
    let best = containing.rev().max_by_key(|it| it.network.prefix_len())?;
    Some(&best.interface)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_names_the_interface() {
        let routes = [
            ("10.1.0.0/16", "cni0"),
            ("10.1.2.0/24", "cni1"),
            ("10.1.2.0/24", "cni2"),
            ("10.1.2.7/32", "cali1"),
            ("fd00:1::/64", "cni0"),
        ];
        let routes = routes.map(|(network, interface)| HostRoute {
            network: network.parse().unwrap(),
            interface: interface.into(),
        });
        for (address, expected) in [
            ("10.1.1.5", Some("cni0")),
            ("10.1.2.5", Some("cni1")),
            ("10.1.2.7", Some("cali1")),
            ("10.2.0.1", None),
            ("fd00:1::5", Some("cni0")),
            ("fd00:2::5", None),
        ] {
            let found = interface(&routes, address.parse().unwrap());
            assert_eq!(found.map(|it| &**it), expected, "{address}");
        }
    }
}
