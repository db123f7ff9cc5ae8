//! Parsing of addresses and ranges in Kubernetes objects.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

/// Why an address or range cannot be used, as the end of a sentence about the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum AddressFault {
    #[error("is not an IP address; write one such as 10.0.0.1 or fd00::1")]
    NotAnAddress,
    #[error("is unspecified, loopback, multicast or broadcast; write a unicast address")]
    Special,
    #[error("is link-local, which neither services nor endpoints may be; write another address")]
    LinkLocal,
    #[error("is not an address range; write one such as 10.0.0.0/8 or fd00::/64")]
    NotARange,
}

/// Parses an address. IPv4 octets with leading zeros, which objects from before Kubernetes 1.23 may
/// have, are decimal. As in the API server, an IPv4-mapped IPv6 address is the IPv4 address.
pub(super) fn parse_ip(text: &str) -> Result<IpAddr, AddressFault> {
    match text.parse::<IpAddr>() {
        Ok(ip) => Ok(ip.to_canonical()),
        Err(_) => parse_padded_ipv4(text)
            .map(IpAddr::V4)
            .ok_or(AddressFault::NotAnAddress),
    }
}

/// Parses a unicast address that is not loopback.
pub(super) fn parse_unicast(text: &str) -> Result<IpAddr, AddressFault> {
    let ip = parse_ip(text)?;
    let of_this_network = match ip {
        IpAddr::V4(v4) => v4.octets()[0] == 0 || v4.is_broadcast(),
        IpAddr::V6(_) => false,
    };
    if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || of_this_network {
        return Err(AddressFault::Special);
    }
    Ok(ip)
}

/// Parses an address that the author of an object chose: that of an endpoint or load balancer, or
/// an external IP. Link-local addresses, such as a cloud's metadata service, are rejected, as the API
/// does for endpoints and external IPs.
pub(super) fn parse_routable(text: &str) -> Result<IpAddr, AddressFault> {
    let ip = parse_unicast(text)?;
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if link_local {
        return Err(AddressFault::LinkLocal);
    }
    Ok(ip)
}

/// Parses `address/length`; bits beyond the length are cleared.
pub(super) fn parse_range(text: &str) -> Result<IpNet, AddressFault> {
    let (address, length) = text.split_once('/').ok_or(AddressFault::NotARange)?;
    let ip = match address.parse::<IpAddr>() {
        Ok(ip) => ip,
        Err(_) => parse_padded_ipv4(address)
            .map(IpAddr::V4)
            .ok_or(AddressFault::NotARange)?,
    };
    if length.is_empty() || !length.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(AddressFault::NotARange);
    }
    let length = length.parse::<u8>().map_err(|_| AddressFault::NotARange)?;
    IpNet::new(ip, length)
        .map(|range| range.trunc())
        .map_err(|_| AddressFault::NotARange)
}

/// Parses four decimal octets that may have leading zeros.
fn parse_padded_ipv4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0_u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.is_empty() || !part.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let digits = part.trim_start_matches('0');
        *octet = if digits.is_empty() {
            0
        } else {
            digits.parse().ok()?
        };
    }
    parts.next().is_none().then(|| Ipv4Addr::from(octets))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octets_with_leading_zeros_are_decimal() {
        assert_eq!(parse_ip("010.000.008.09"), Ok([10, 0, 8, 9].into()));
        assert_eq!(parse_ip("10.0.0.0256"), Err(AddressFault::NotAnAddress));
        assert_eq!(parse_ip("10.0.0"), Err(AddressFault::NotAnAddress));
        assert_eq!(parse_ip("10.0.0.1.2"), Err(AddressFault::NotAnAddress));
        assert_eq!(parse_ip("10.0.0.+1"), Err(AddressFault::NotAnAddress));
        assert_eq!(
            parse_range("010.0.0.7/08").map(|range| range.to_string()),
            Ok("10.0.0.0/8".to_owned())
        );
    }

    #[test]
    fn a_mapped_address_is_the_ipv4_address() {
        assert_eq!(parse_ip("::ffff:10.0.0.1"), Ok([10, 0, 0, 1].into()));
    }

    #[test]
    fn special_addresses_are_no_destination() {
        for text in [
            "0.0.0.0",
            "0.1.2.3",
            "255.255.255.255",
            "::ffff:127.0.0.1",
            "::",
            "127.0.0.1",
            "127.255.255.254",
            "::1",
            "224.0.0.1",
            "239.255.255.255",
            "ff02::1",
            "ff0e::1",
        ] {
            assert_eq!(parse_unicast(text), Err(AddressFault::Special), "{text}");
            assert_eq!(parse_routable(text), Err(AddressFault::Special), "{text}");
        }
    }

    #[test]
    fn link_local_addresses_are_no_destination_but_a_cluster_may_be_made_of_them() {
        for text in [
            "169.254.169.254",
            "169.254.0.0",
            "::ffff:169.254.169.254",
            "fe80::1",
            "febf::1",
        ] {
            assert_eq!(parse_routable(text), Err(AddressFault::LinkLocal), "{text}");
            assert!(parse_unicast(text).is_ok(), "{text}");
        }
        for text in ["169.253.255.255", "169.255.0.0", "fec0::1", "1.0.0.0"] {
            assert!(parse_routable(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn ranges_need_a_length_that_fits() {
        for text in [
            "10.0.0.1",
            "10.0.0.0/33",
            "fd00::/129",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "x/8",
        ] {
            assert_eq!(parse_range(text), Err(AddressFault::NotARange), "{text}");
        }
        assert_eq!(
            parse_range("fd00::1/64").map(|range| range.to_string()),
            Ok("fd00::/64".to_owned())
        );
    }
}
