//! Tuples: addresses, protocol and ports of one direction.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::netlink::message::AttrReader;
use crate::netlink::uapi;
use crate::nft::TableFamily;

/// One direction of a tracked connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tuple {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    /// Only for protocols with ports.
    pub source_port: Option<u16>,
    pub destination_port: Option<u16>,
}

impl Tuple {
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let tuple = AttrReader::new(bytes);
        let protocol = tuple.nested(uapi::CTA_TUPLE_PROTO)?;
        let [number] = *protocol.get(uapi::CTA_PROTO_NUM)? else {
            return None;
        };
        let addresses = tuple.nested(uapi::CTA_TUPLE_IP)?;
        let address = |v4: u16, v6: u16| {
            let v4 = addresses.get(v4).and_then(|b| <[u8; 4]>::try_from(b).ok());
            let v6 = || addresses.get(v6).and_then(|b| <[u8; 16]>::try_from(b).ok());
            v4.map(|octets| IpAddr::V4(Ipv4Addr::from(octets)))
                .or_else(|| Some(IpAddr::V6(Ipv6Addr::from(v6()?))))
        };
        Some(Self {
            source: address(uapi::CTA_IP_V4_SRC, uapi::CTA_IP_V6_SRC)?,
            destination: address(uapi::CTA_IP_V4_DST, uapi::CTA_IP_V6_DST)?,
            protocol: number,
            source_port: protocol.be16(uapi::CTA_PROTO_SRC_PORT),
            destination_port: protocol.be16(uapi::CTA_PROTO_DST_PORT),
        })
    }
}

pub(crate) fn family_of(address: IpAddr) -> TableFamily {
    match address {
        IpAddr::V4(_) => TableFamily::Ip,
        IpAddr::V6(_) => TableFamily::Ip6,
    }
}
