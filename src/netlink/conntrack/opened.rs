//! The connections that a client opened, with their state.

use std::net::IpAddr;

use super::tuple::{Tuple, family_of};
use crate::netlink::message::{AttrReader, AttrWriter};
use crate::netlink::socket::Message;
use crate::netlink::uapi;
use crate::nft::TableFamily;

const TCP: u8 = libc::IPPROTO_TCP as u8;
const SCTP: u8 = libc::IPPROTO_SCTP as u8;
/// `IPS_SEEN_REPLY`.
const SEEN_REPLY: u32 = 1 << 1;
/// The states of TCP in the order of their numbers, as `conntrack -L` names them.
const TCP_STATES: [&str; 10] = [
    "NONE",
    "SYN_SENT",
    "SYN_RECV",
    "ESTABLISHED",
    "FIN_WAIT",
    "CLOSE_WAIT",
    "LAST_ACK",
    "TIME_WAIT",
    "CLOSE",
    "SYN_SENT2",
];
/// The same of SCTP.
const SCTP_STATES: [&str; 9] = [
    "NONE",
    "CLOSED",
    "COOKIE_WAIT",
    "COOKIE_ECHOED",
    "ESTABLISHED",
    "SHUTDOWN_SENT",
    "SHUTDOWN_RECD",
    "SHUTDOWN_ACK_SENT",
    "HEARTBEAT_SENT",
];

/// A tracked connection, by the addresses before any translation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenedConnection {
    /// Distinguishes it from a later one with the same addresses.
    pub id: u32,
    /// The client that opened it.
    pub source: IpAddr,
    /// The client's port, for a protocol with ports.
    pub source_port: Option<u16>,
    /// The destination before any translation.
    pub destination: IpAddr,
    /// Its port.
    pub port: Option<u16>,
    /// The IP protocol number.
    pub protocol: u8,
    /// The source of the replies: the destination after translation.
    pub replier: IpAddr,
    /// Its port.
    pub replier_port: Option<u16>,
    /// The state as `conntrack -L` has it; `REPLIED` or `UNREPLIED` for protocols without states.
    pub state: &'static str,
}

impl OpenedConnection {
    pub(super) fn read(message: Message) -> Option<Self> {
        let attributes = message.attributes();
        let original = Tuple::read(attributes.get(uapi::CTA_TUPLE_ORIG)?)?;
        let reply = Tuple::read(attributes.get(uapi::CTA_TUPLE_REPLY)?)?;
        Some(Self {
            id: attributes.be32(uapi::CTA_ID)?,
            source: original.source,
            source_port: original.source_port,
            destination: original.destination,
            port: original.destination_port,
            protocol: original.protocol,
            replier: reply.source,
            replier_port: reply.source_port,
            state: state(attributes, original.protocol),
        })
    }
}

fn state(attributes: AttrReader, protocol: u8) -> &'static str {
    let (kind, names) = match protocol {
        TCP => (uapi::CTA_PROTOINFO_TCP, &TCP_STATES[..]),
        SCTP => (uapi::CTA_PROTOINFO_SCTP, &SCTP_STATES[..]),
        _ => (0, &[][..]),
    };
    let known = attributes
        .nested(uapi::CTA_PROTOINFO)
        .and_then(|info| info.nested(kind))
        .and_then(|info| info.get(uapi::CTA_PROTOINFO_STATE)?.first().copied())
        .and_then(|number| names.get(usize::from(number)));
    let status = attributes.be32(uapi::CTA_STATUS).unwrap_or_default();
    let replied = if status & SEEN_REPLY == 0 {
        "UNREPLIED"
    } else {
        "REPLIED"
    };
    known.copied().unwrap_or(replied)
}

/// Selects connections by client and destination before any translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenedBy {
    /// The client.
    pub source: IpAddr,
    /// The destination.
    pub destination: IpAddr,
    /// The IP protocol number.
    pub protocol: u8,
    /// The port of the destination, for a protocol with ports.
    pub port: Option<u16>,
}

impl OpenedBy {
    pub(super) fn family(&self) -> TableFamily {
        family_of(self.destination)
    }

    pub(super) fn admits(&self, opened: &OpenedConnection) -> bool {
        (self.source, self.destination) == (opened.source, opened.destination)
            && self.protocol == opened.protocol
            && self.port.is_none_or(|port| opened.port == Some(port))
    }

    /// Returns the attributes by which the kernel filters. As in
    /// [`FlowFilter`](super::FlowFilter), they contain no IPv6 addresses.
    pub(super) fn attributes(&self) -> Vec<u8> {
        let mut flags = uapi::CTA_FILTER_F_PROTO_NUM;
        let mut bytes = Vec::new();
        let mut writer = AttrWriter::new(&mut bytes);
        let tuple = writer.begin(uapi::CTA_TUPLE_ORIG);
        if let (IpAddr::V4(source), IpAddr::V4(destination)) = (self.source, self.destination) {
            flags |= uapi::CTA_FILTER_F_IP_SRC | uapi::CTA_FILTER_F_IP_DST;
            let addresses = writer.begin(uapi::CTA_TUPLE_IP);
            writer.bytes(uapi::CTA_IP_V4_SRC, &source.octets());
            writer.bytes(uapi::CTA_IP_V4_DST, &destination.octets());
            writer.end(addresses);
        }
        let protocol = writer.begin(uapi::CTA_TUPLE_PROTO);
        writer.bytes(uapi::CTA_PROTO_NUM, &[self.protocol]);
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
