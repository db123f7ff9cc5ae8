//! The addresses of the host's interfaces.

use std::net::IpAddr;

use ipnet::IpNet;
use nix::sys::socket::SockaddrStorage;

/// An address of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attached {
    /// The name of the interface.
    pub(crate) interface: String,
    /// The address with its prefix length; without a netmask, that of a single address.
    pub(crate) network: IpNet,
}

/// Returns the addresses of all interfaces in the network namespace of the calling thread.
pub(crate) fn attached() -> Vec<Attached> {
    // This fails only when memory is exhausted.
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else {
        return Vec::new();
    };
    let attached = interfaces.filter_map(|interface| {
        let address = ip(&interface.address?)?;
        let mask = interface.netmask.as_ref().and_then(ip);
        let network = mask.and_then(|mask| IpNet::with_netmask(address, mask).ok());
        Some(Attached {
            interface: interface.interface_name,
            network: network.unwrap_or(address.into()),
        })
    });
    attached.collect()
}

/// Returns the addresses of the host, without their interfaces.
pub(crate) fn all() -> Vec<IpAddr> {
    attached().iter().map(|it| it.network.addr()).collect()
}

/// Returns the addresses by which other hosts reach this one: neither loopback nor link-local.
pub(crate) fn global() -> Vec<IpAddr> {
    let mut addresses = all();
    addresses.retain(|address| match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    });
    addresses
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|it| IpAddr::V4(it.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|it| IpAddr::V6(it.ip())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_attached() {
        let loopback: IpAddr = [127, 0, 0, 1].into();
        let attached = attached();
        let found = attached.iter().find(|it| it.network.addr() == loopback);
        let found = found.expect("loopback has an address");
        assert_eq!(found.network.prefix_len(), 8);
        assert!(all().contains(&loopback));
        assert!(!global().contains(&loopback));
    }
}
