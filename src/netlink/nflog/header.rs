//! Parses the headers of logged packets.
//!
//! The bytes come from the network and may end anywhere, even within a header. Parsing terminates on
//! any input and returns only what the bytes contain.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::nft::TableFamily;

/// The headers of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// The source address.
    pub source: IpAddr,
    /// The destination address.
    pub destination: IpAddr,
    /// The protocol after the IP header and its extensions, or the last known extension if the bytes
    /// end there.
    pub protocol: u8,
    /// Source and destination port.
    pub ports: Option<(u16, u16)>,
}

/// Parses a packet from its IP header on; `None` without a complete IP header of the family.
pub(crate) fn parse(family: TableFamily, packet: &[u8]) -> Option<Header> {
    match family {
        TableFamily::Ip => ipv4(packet),
        TableFamily::Ip6 => ipv6(packet),
    }
}

fn ipv4(packet: &[u8]) -> Option<Header> {
    let [first] = at(packet, 0)?;
    // The length of the header with its options, in words.
    let words = usize::from(first & 0xf);
    if first >> 4 != 4 || words < 5 {
        return None;
    }
    let source: [u8; 4] = at(packet, 12)?;
    let destination: [u8; 4] = at(packet, 16)?;
    let [protocol] = at(packet, 9)?;
    let is_beginning = u16::from_be_bytes(at(packet, 6)?) & 0x1fff == 0;
    let payload = packet.get(words * 4..).filter(|_| is_beginning);
    Some(Header {
        source: Ipv4Addr::from(source).into(),
        destination: Ipv4Addr::from(destination).into(),
        protocol,
        ports: ports(protocol, payload.unwrap_or_default()),
    })
}

fn ipv6(packet: &[u8]) -> Option<Header> {
    let [first] = at(packet, 0)?;
    if first >> 4 != 6 {
        return None;
    }
    let [next] = at(packet, 6)?;
    let source: [u8; 16] = at(packet, 8)?;
    let destination: [u8; 16] = at(packet, 24)?;
    let (protocol, payload) = skip_extensions(next, packet.get(40..)?);
    Some(Header {
        source: Ipv6Addr::from(source).into(),
        destination: Ipv6Addr::from(destination).into(),
        protocol,
        ports: ports(protocol, payload),
    })
}

/// Returns the protocol after the extension headers and its bytes. Terminates because every header
/// consumes at least eight bytes.
fn skip_extensions(mut protocol: u8, mut bytes: &[u8]) -> (u8, &[u8]) {
    const NOTHING: &[u8] = &[];
    loop {
        let (Some([next, length]), offset) = (at(bytes, 0), at(bytes, 2)) else {
            return (protocol, bytes);
        };
        let length = usize::from(length);
        let length = match i32::from(protocol) {
            libc::IPPROTO_HOPOPTS
            | libc::IPPROTO_ROUTING
            | libc::IPPROTO_DSTOPTS
            | libc::IPPROTO_MH
            | HIP
            | SHIM6 => (length + 1) * 8,
            libc::IPPROTO_AH => (length + 2) * 4,
            libc::IPPROTO_FRAGMENT => match offset.map(u16::from_be_bytes) {
                // The offset is in the upper thirteen bits.
                Some(offset) if offset >> 3 == 0 => 8,
                Some(_) => return (next, NOTHING),
                None => return (protocol, NOTHING),
            },
            _ => return (protocol, bytes),
        };
        let Some(rest) = bytes.get(length..) else {
            return (protocol, NOTHING);
        };
        (protocol, bytes) = (next, rest);
    }
}

/// The Host Identity Protocol, which the libc crate does not name.
const HIP: i32 = 139;
/// Site multihoming, which the libc crate does not name.
const SHIM6: i32 = 140;

/// Returns the ports at the beginning of a payload, for protocols that have them there.
fn ports(protocol: u8, payload: &[u8]) -> Option<(u16, u16)> {
    let has_ports = matches!(
        i32::from(protocol),
        libc::IPPROTO_TCP
            | libc::IPPROTO_UDP
            | libc::IPPROTO_UDPLITE
            | libc::IPPROTO_DCCP
            | libc::IPPROTO_SCTP
    );
    let port = |offset| Some(u16::from_be_bytes(at(payload, offset)?));
    port(0).zip(port(2)).filter(|_| has_ports)
}

/// Returns `N` bytes at an offset.
fn at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const TCP: u8 = 6;
    const FRAGMENT: u8 = 44;
    const PORTS: [u8; 4] = [0x9c, 0x40, 0, 80];

    fn v4(fragment: u16, protocol: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 20];
        packet[0] = 0x40 | (5 + options.len() / 4) as u8;
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet[9] = protocol;
        packet[12..16].copy_from_slice(&[10, 0, 0, 1]);
        packet[16..20].copy_from_slice(&[10, 0, 0, 2]);
        [&packet, options, payload].concat()
    }

    /// A packet with extension headers: the number and the bytes of each.
    fn v6(extensions: &[(u8, Vec<u8>)], protocol: u8, payload: &[u8]) -> Vec<u8> {
        let source: Ipv6Addr = "2001:db8::1".parse().unwrap();
        let destination: Ipv6Addr = "2001:db8::2".parse().unwrap();
        let numbers = extensions.iter().map(|(number, _)| *number);
        let mut next = numbers.skip(1).chain([protocol]);
        let first = extensions.first().map_or(protocol, |(number, _)| *number);
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, first, 64];
        packet.extend(source.octets());
        packet.extend(destination.octets());
        for (_, bytes) in extensions {
            let from = packet.len();
            packet.extend(bytes);
            packet[from] = next.next().unwrap();
        }
        packet.extend(payload);
        packet
    }

    /// An extension header whose length field counts in eights.
    fn options(words: u8) -> Vec<u8> {
        let mut bytes = vec![0; 8 * (usize::from(words) + 1)];
        bytes[1] = words;
        bytes
    }

    fn authentication(words: u8) -> Vec<u8> {
        let mut bytes = vec![0; 4 * (usize::from(words) + 2)];
        bytes[1] = words;
        bytes
    }

    fn fragment(offset: u16) -> Vec<u8> {
        let [high, low] = (offset << 3 | 1).to_be_bytes();
        vec![0, 0, high, low, 1, 2, 3, 4]
    }

    fn found(family: TableFamily, packet: &[u8]) -> (u8, Option<(u16, u16)>) {
        let header = parse(family, packet).unwrap();
        let (source, destination) = match family {
            TableFamily::Ip => ("10.0.0.1", "10.0.0.2"),
            TableFamily::Ip6 => ("2001:db8::1", "2001:db8::2"),
        };
        assert_eq!(header.source.to_string(), source);
        assert_eq!(header.destination.to_string(), destination);
        (header.protocol, header.ports)
    }

    #[test]
    fn ipv4_with_and_without_options() {
        let all = (TCP, Some((40_000, 80)));
        assert_eq!(found(TableFamily::Ip, &v4(0, TCP, &[], &PORTS)), all);
        assert_eq!(found(TableFamily::Ip, &v4(0, TCP, &[1; 40], &PORTS)), all);
        // Ports behind the end of the copy, and a protocol without.
        assert_eq!(
            found(TableFamily::Ip, &v4(0, TCP, &[], &PORTS[..3])),
            (TCP, None)
        );
        assert_eq!(found(TableFamily::Ip, &v4(0, 1, &[], &PORTS)), (1, None));
    }

    #[test]
    fn only_the_first_fragment_has_ports() {
        const MORE_FRAGMENTS: u16 = 0x2000;
        let all = (TCP, Some((40_000, 80)));
        let nothing = (TCP, None);
        let first = v4(MORE_FRAGMENTS, TCP, &[], &PORTS);
        assert_eq!(found(TableFamily::Ip, &first), all);
        let later = v4(MORE_FRAGMENTS | 185, TCP, &[], &PORTS);
        assert_eq!(found(TableFamily::Ip, &later), nothing);
        let first = v6(&[(FRAGMENT, fragment(0))], TCP, &PORTS);
        assert_eq!(found(TableFamily::Ip6, &first), all);
        let later = v6(&[(FRAGMENT, fragment(185))], TCP, &PORTS);
        assert_eq!(found(TableFamily::Ip6, &later), nothing);
    }

    #[test]
    fn extension_headers_are_skipped() {
        let extensions = [
            (0, options(0)),
            (43, options(2)),
            (60, options(1)),
            (FRAGMENT, fragment(0)),
            (51, authentication(4)),
            (135, options(0)),
            (139, options(0)),
            (140, options(0)),
        ];
        let packet = v6(&extensions, 17, &PORTS);
        assert_eq!(found(TableFamily::Ip6, &packet), (17, Some((40_000, 80))));
        let encrypted = v6(&[(0, options(0))], 50, &PORTS);
        assert_eq!(found(TableFamily::Ip6, &encrypted), (50, None));
        let cut = v6(&[(0, options(200))], TCP, &PORTS);
        assert_eq!(found(TableFamily::Ip6, &cut[..128]), (0, None));
    }

    #[test]
    fn what_is_no_packet_of_the_family_is_none() {
        let (four, six) = (v4(0, TCP, &[], &PORTS), v6(&[], TCP, &PORTS));
        assert_eq!(parse(TableFamily::Ip6, &four), None);
        assert_eq!(parse(TableFamily::Ip, &six), None);
        assert_eq!(parse(TableFamily::Ip, &four[..19]), None);
        assert_eq!(parse(TableFamily::Ip6, &six[..39]), None);
        let mut short_header = four;
        short_header[0] = 0x44;
        assert_eq!(parse(TableFamily::Ip, &short_header), None);
    }

    fn extension() -> impl Strategy<Value = (u8, Vec<u8>)> {
        prop_oneof![
            (0u8..4).prop_map(|words| (0, options(words))),
            (0u8..4).prop_map(|words| (60, options(words))),
            (1u8..9).prop_map(|words| (51, authentication(words))),
            (0u16..2).prop_map(|offset| (FRAGMENT, fragment(offset))),
        ]
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_read(bytes in vec(any::<u8>(), 0..200), first in any::<u8>()) {
            for version in [0x40, 0x60] {
                let mut bytes = bytes.clone();
                if let Some(byte) = bytes.first_mut() {
                    *byte = version | first & 0xf;
                }
                for family in [TableFamily::Ip, TableFamily::Ip6] {
                    let least = if family == TableFamily::Ip { 20 } else { 40 };
                    let header = parse(family, &bytes);
                    prop_assert!(header.is_none() || bytes.len() >= least);
                }
            }
        }

        #[test]
        fn a_shorter_copy_has_fewer_fields_with_the_same_values(
            extensions in vec(extension(), 0..5),
            protocol in prop_oneof![Just(TCP), Just(17u8), Just(58u8)],
            ports: [u8; 4],
        ) {
            let packet = v6(&extensions, protocol, &ports);
            let whole = parse(TableFamily::Ip6, &packet).unwrap();
            for length in 0..packet.len() {
                let Some(header) = parse(TableFamily::Ip6, &packet[..length]) else {
                    prop_assert!(length < 40);
                    continue;
                };
                prop_assert_eq!(header.source, whole.source);
                prop_assert_eq!(header.destination, whole.destination);
                let known = extensions.iter().any(|(number, _)| *number == header.protocol);
                prop_assert!(known || header.protocol == protocol);
                prop_assert!(header.ports.is_none() || header.ports == whole.ports);
            }
        }
    }
}
