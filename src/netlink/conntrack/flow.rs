//! UDP flows, and filters for them.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use super::UDP;
use super::tuple::{Tuple, family_of};
use crate::netlink::message::{AttrReader, AttrWriter};
use crate::netlink::socket::Message;
use crate::netlink::uapi;
use crate::nft::TableFamily;

/// A UDP flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Distinguishes the flow from a later one with the same addresses.
    pub id: u32,
    /// The conntrack zone in the original direction; 0 unless rules assign zones.
    pub zone: u16,
    /// The client that sent the first packet.
    pub source: SocketAddr,
    /// The destination before any translation.
    pub destination: SocketAddr,
    /// The source of the replies: the destination after translation.
    pub replier: SocketAddr,
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (source, destination, replier) = (self.source, self.destination, self.replier);
        write!(f, "{source} > {destination}")?;
        if self.is_translated() {
            write!(f, " (answered by {replier})")?;
        }
        match self.zone {
            0 => Ok(()),
            zone => write!(f, " in zone {zone}"),
        }
    }
}

impl Flow {
    /// Returns whether the destination was translated.
    pub fn is_translated(&self) -> bool {
        self.replier != self.destination
    }

    /// Parses a dumped entry; `None` if its protocol is not UDP.
    pub(super) fn read(message: Message) -> Option<Self> {
        let attributes = message.attributes();
        let original = attributes.get(uapi::CTA_TUPLE_ORIG)?;
        let (source, destination) = udp_tuple(original)?;
        let (replier, _) = udp_tuple(attributes.get(uapi::CTA_TUPLE_REPLY)?)?;
        // A zone of both directions is an attribute of the flow, a zone of one direction is an
        // attribute of that direction's tuple.
        let zone = attributes
            .be16(uapi::CTA_ZONE)
            .or_else(|| AttrReader::new(original).be16(uapi::CTA_TUPLE_ZONE));
        Some(Self {
            id: attributes.be32(uapi::CTA_ID)?,
            zone: zone.unwrap_or_default(),
            source,
            destination,
            replier,
        })
    }

    pub(super) fn family(&self) -> TableFamily {
        family_of(self.destination.ip())
    }

    /// Writes the tuple of the original direction.
    pub(super) fn write_tuple(&self, writer: &mut AttrWriter) {
        let (source, destination) = (self.source, self.destination);
        let tuple = writer.begin(uapi::CTA_TUPLE_ORIG);
        let addresses = writer.begin(uapi::CTA_TUPLE_IP);
        let mut address = |v4: u16, v6: u16, address: IpAddr| match address {
            IpAddr::V4(address) => writer.bytes(v4, &address.octets()),
            IpAddr::V6(address) => writer.bytes(v6, &address.octets()),
        };
        address(uapi::CTA_IP_V4_SRC, uapi::CTA_IP_V6_SRC, source.ip());
        address(uapi::CTA_IP_V4_DST, uapi::CTA_IP_V6_DST, destination.ip());
        writer.end(addresses);
        let protocol = writer.begin(uapi::CTA_TUPLE_PROTO);
        writer.bytes(uapi::CTA_PROTO_NUM, &[UDP]);
        writer.be16(uapi::CTA_PROTO_SRC_PORT, source.port());
        writer.be16(uapi::CTA_PROTO_DST_PORT, destination.port());
        writer.end(protocol);
        writer.end(tuple);
    }
}

/// Selects UDP flows by family and, optionally, by address and port of the original destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowFilter {
    family: TableFamily,
    address: Option<IpAddr>,
    port: Option<u16>,
}

impl FlowFilter {
    /// Matches all flows of a family.
    pub fn all(family: TableFamily) -> Self {
        Self {
            family,
            address: None,
            port: None,
        }
    }

    /// Matches the flows to an address and port.
    pub fn to(destination: SocketAddr) -> Self {
        Self {
            family: family_of(destination.ip()),
            address: Some(destination.ip()),
            port: Some(destination.port()),
        }
    }

    /// Matches the flows of a family to a port on any address.
    pub fn to_port(family: TableFamily, port: u16) -> Self {
        Self {
            family,
            address: None,
            port: Some(port),
        }
    }

    pub(super) fn family(&self) -> TableFamily {
        self.family
    }

    /// Returns whether a flow matches.
    pub(crate) fn admits(&self, flow: &Flow) -> bool {
        let destination = flow.destination;
        flow.family() == self.family
            && self
                .address
                .is_none_or(|address| address == destination.ip())
            && self.port.is_none_or(|port| port == destination.port())
    }

    /// Returns the attributes by which the kernel filters.
    ///
    /// They contain no IPv6 address: the kernel negates the comparison (`ipv6_addr_cmp` in
    /// `ctnetlink_filter_match_tuple`) and would skip exactly the matching flows.
    pub(super) fn attributes(&self) -> Vec<u8> {
        let mut flags = uapi::CTA_FILTER_F_PROTO_NUM;
        let mut bytes = Vec::new();
        let mut writer = AttrWriter::new(&mut bytes);
        let tuple = writer.begin(uapi::CTA_TUPLE_ORIG);
        if let Some(IpAddr::V4(address)) = self.address {
            flags |= uapi::CTA_FILTER_F_IP_DST;
            let addresses = writer.begin(uapi::CTA_TUPLE_IP);
            writer.bytes(uapi::CTA_IP_V4_DST, &address.octets());
            writer.end(addresses);
        }
        let protocol = writer.begin(uapi::CTA_TUPLE_PROTO);
        writer.bytes(uapi::CTA_PROTO_NUM, &[UDP]);
        if let Some(port) = self.port {
            flags |= uapi::CTA_FILTER_F_PROTO_DST_PORT;
            writer.be16(uapi::CTA_PROTO_DST_PORT, port);
        }
        writer.end(protocol);
        writer.end(tuple);
        let filter = writer.begin(uapi::CTA_FILTER);
        // In host byte order, unlike most numbers of netfilter.
        writer.bytes(uapi::CTA_FILTER_ORIG_FLAGS, &flags.to_ne_bytes());
        writer.end(filter);
        bytes
    }
}

/// Returns source and destination of one direction; `None` if its protocol is not UDP.
fn udp_tuple(bytes: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let tuple = Tuple::read(bytes).filter(|tuple| tuple.protocol == UDP)?;
    Some((
        SocketAddr::new(tuple.source, tuple.source_port?),
        SocketAddr::new(tuple.destination, tuple.destination_port?),
    ))
}
