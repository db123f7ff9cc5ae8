//! The interfaces of this host that lead to its pods.
//!
//! Every pod has an IPv6 link-local address that no object contains. Traffic from and to it can only
//! be recognised by the interface. The routes name it, both for the network of a bridge with many
//! pods and for a single pod with an interface of its own.
//!
//! An interface with a default route also leads to other hosts, which need link-local addresses. It
//! is therefore never returned.

use std::collections::HashSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;

// Of the kernel's route.h.
const RTF_GATEWAY: u32 = 0x0002;
const RTF_REJECT: u32 = 0x0200;

/// A route of the main table.
#[derive(Debug, PartialEq, Eq)]
struct Route {
    network: IpNet,
    link: String,
    flags: u32,
}

/// Returns the interfaces by which the host reaches addresses without a router in between, in the
/// network namespace of the calling thread.
pub fn find(addresses: &[IpAddr]) -> Vec<(IpAddr, Arc<str>)> {
    find_below(Path::new("/proc/thread-self/net"), addresses)
}

fn find_below(folder: &Path, addresses: &[IpAddr]) -> Vec<(IpAddr, Arc<str>)> {
    // A host without a family has no such file.
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
    let (v4, v6) = (read("route"), read("ipv6_route"));
    let routes = v4.lines().filter_map(v4_route);
    let routes = routes.chain(v6.lines().filter_map(v6_route));
    let routes: Vec<Route> = routes.filter(|it| it.flags & RTF_REJECT == 0).collect();
    let is_default = |route: &&Route| route.network.prefix_len() == 0;
    let shared = routes.iter().filter(is_default);
    let shared: HashSet<&str> = shared.map(|route| route.link.as_str()).collect();
    let direct = routes.iter().filter(|route| {
        let direct = route.flags & RTF_GATEWAY == 0 && !is_default(route);
        direct && !shared.contains(route.link.as_str())
    });
    let direct: Vec<&Route> = direct.collect();
    let found = addresses.iter().filter_map(|address| {
        let leading = direct.iter().filter(|it| it.network.contains(address));
        let best = leading.max_by_key(|route| route.network.prefix_len())?;
        Some((*address, Arc::from(best.link.as_str())))
    });
    found.collect()
}

/// A line of `/proc/net/route`: interface, destination, gateway, flags, three counters, mask.
/// Addresses are numbers in host order of the bytes as they are.
fn v4_route(line: &str) -> Option<Route> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let [link, destination, _, flags, _, _, _, mask, ..] = fields[..] else {
        return None;
    };
    let address = |text| {
        let number = u32::from_str_radix(text, 16).ok()?;
        Some(IpAddr::V4(Ipv4Addr::from(number.to_ne_bytes())))
    };
    Some(Route {
        network: IpNet::with_netmask(address(destination)?, address(mask)?).ok()?,
        link: link.into(),
        flags: u32::from_str_radix(flags, 16).ok()?,
    })
}

/// A line of `/proc/net/ipv6_route`: destination and its length, source and its length, gateway,
/// metric, two counters, flags, interface.
fn v6_route(line: &str) -> Option<Route> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let [destination, length, _, _, _, _, _, _, flags, link] = fields[..] else {
        return None;
    };
    let address = Ipv6Addr::from(u128::from_str_radix(destination, 16).ok()?);
    let length = u8::from_str_radix(length, 16).ok()?;
    Some(Route {
        network: IpNet::new(address.into(), length).ok()?,
        link: link.into(),
        flags: u32::from_str_radix(flags, 16).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(v4: &str, v6: &str, addresses: &[&str]) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("route"), v4).unwrap();
        fs::write(folder.path().join("ipv6_route"), v6).unwrap();
        let addresses: Vec<IpAddr> = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
        let found = find_below(folder.path(), &addresses);
        found
            .iter()
            .map(|(ip, link)| format!("{ip} {link}"))
            .collect()
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn the_closest_direct_route_names_the_interface() {
        let v4 = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0
cni0\t0001010A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
cali1\t0702010A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0
flannel.1\t0003010A\t0003010A\t0003\t0\t0\t0\t00FFFFFF\t0\t0\t0
*\t0002010A\t00000000\t0201\t0\t0\t0\t00FFFFFF\t0\t0\t0
";
        let v6 = "\
fd000001000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     cni0
fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     cni0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
";
        let addresses = [
            "10.1.1.5",
            "10.1.2.7",
            "10.1.2.8",
            "10.1.3.9",
            "10.9.9.9",
            "192.0.2.1",
            "fd00:1::5",
            "fd00:2::5",
        ];
        assert_eq!(
            found(v4, v6, &addresses),
            ["10.1.1.5 cni0", "10.1.2.7 cali1", "fd00:1::5 cni0"]
        );
    }

    #[test]
    fn what_cannot_be_read_is_no_route() {
        let lines = "Iface\nx y z\n\ncni0\tzz\t0\t1\t0\t0\t0\t0\n";
        assert!(found(lines, lines, &["10.1.1.5", "fd00::1"]).is_empty());
    }
}
