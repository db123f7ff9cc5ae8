//! The routes of this host.
//!
//! They name the interfaces that lead to its pods. An interface with a default route also leads to other
//! hosts, so its routes are left out.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

use ipnet::IpNet;

use crate::model::HostRoute;

// Of the kernel's route.h.
const RTF_GATEWAY: u32 = 0x0002;
const RTF_REJECT: u32 = 0x0200;

/// A route: of the main table for IPv4, of any table for IPv6.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    route: HostRoute,
    flags: u32,
}

/// Reads the direct routes of the main table in the network namespace of the calling thread; see
/// [`Event::Routes`](crate::model::Event::Routes).
///
/// # Errors
///
/// When a table exists and cannot be read.
pub fn direct() -> io::Result<Arc<[HostRoute]>> {
    direct_below(Path::new("/proc/thread-self/net"))
}

fn direct_below(folder: &Path) -> io::Result<Arc<[HostRoute]>> {
    let read = |name: &str| match fs::read_to_string(folder.join(name)) {
        // The host lacks the family.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read,
    };
    let (v4, v6) = (read("route")?, read("ipv6_route")?);
    let entries = v4.lines().filter_map(v4_route);
    let entries = entries.chain(v6.lines().filter_map(v6_route));
    let mut entries: Vec<Entry> = entries.filter(|it| it.flags & RTF_REJECT == 0).collect();
    let is_default = |entry: &Entry| entry.route.network.prefix_len() == 0;
    let shared = entries.iter().filter(|entry| is_default(entry));
    let shared: HashSet<Arc<str>> = shared.map(|it| it.route.interface.clone()).collect();
    entries.retain(|entry| {
        let is_direct = entry.flags & RTF_GATEWAY == 0 && !is_default(entry);
        is_direct && !shared.contains(&entry.route.interface)
    });
    Ok(entries.into_iter().map(|entry| entry.route).collect())
}

/// A line of `/proc/net/route`: interface, destination, gateway, flags, three counters, mask.
/// An address is the hexadecimal number that its bytes form in host order.
fn v4_route(line: &str) -> Option<Entry> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let [link, destination, _, flags, _, _, _, mask, ..] = fields[..] else {
        return None;
    };
    let address = |text| {
        let number = u32::from_str_radix(text, 16).ok()?;
        Some(IpAddr::V4(Ipv4Addr::from(number.to_ne_bytes())))
    };
    Some(Entry {
        route: HostRoute {
            network: IpNet::with_netmask(address(destination)?, address(mask)?).ok()?,
            interface: link.into(),
        },
        flags: u32::from_str_radix(flags, 16).ok()?,
    })
}

/// A line of `/proc/net/ipv6_route`: destination and its length, source and its length, gateway,
/// metric, two counters, flags, interface.
fn v6_route(line: &str) -> Option<Entry> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let [destination, length, _, _, _, _, _, _, flags, link] = fields[..] else {
        return None;
    };
    let address = Ipv6Addr::from(u128::from_str_radix(destination, 16).ok()?);
    let length = u8::from_str_radix(length, 16).ok()?;
    Some(Entry {
        route: HostRoute {
            network: IpNet::new(address.into(), length).ok()?,
            interface: link.into(),
        },
        flags: u32::from_str_radix(flags, 16).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(v4: &str, v6: &str) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("route"), v4).unwrap();
        fs::write(folder.path().join("ipv6_route"), v6).unwrap();
        let found = direct_below(folder.path()).unwrap();
        let found = found.iter();
        found
            .map(|it| format!("{} {}", it.network, it.interface))
            .collect()
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn direct_routes_are_read_but_those_beside_a_default_route() {
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
        assert_eq!(
            found(v4, v6),
            [
                "10.1.1.0/24 cni0",
                "10.1.2.7/32 cali1",
                "fd00:1::/64 cni0",
                "fe80::/64 cni0"
            ]
        );
    }

    #[test]
    fn what_cannot_be_read_is_no_route() {
        let lines = "Iface\nx y z\n\ncni0\tzz\t0\t1\t0\t0\t0\t0\n";
        assert!(found(lines, lines).is_empty());
    }

    #[test]
    fn a_family_that_the_host_lacks_has_no_routes_and_an_error_is_one() {
        let folder = tempfile::tempdir().unwrap();
        assert!(direct_below(folder.path()).unwrap().is_empty());
        fs::create_dir(folder.path().join("route")).unwrap();
        assert!(direct_below(folder.path()).is_err());
    }
}
