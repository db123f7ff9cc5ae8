//! Tracked connections of all protocols.

use std::fmt;
use std::net::IpAddr;

use super::tuple::{Tuple, family_of};
use crate::netlink::socket::Message;
use crate::netlink::uapi;
use crate::nft::TableFamily;

/// A connection as the kernel tracks it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracked {
    /// The client that opened it.
    pub source: IpAddr,
    /// The source of the replies: the destination after translation.
    pub replier: IpAddr,
    /// The IP protocol number.
    pub protocol: u8,
    /// The port of the replier, for protocols with ports.
    pub port: Option<u16>,
    /// Identifies the entry in the kernel.
    pub handle: ConntrackHandle,
}

/// Identifies an entry of the kernel's connection tracking.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConntrackHandle {
    pub(super) id: u32,
    pub(super) zone: Option<u16>,
    /// The tuple of each direction in the kernel's encoding, which depends on the protocol.
    pub(super) original: Box<[u8]>,
    pub(super) reply: Box<[u8]>,
}

/// Selects the entry that [`Conntrack::cut`](super::Conntrack::cut) deletes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryToCut {
    /// The listed entry, not a later one with the same addresses.
    Listed,
    /// The entry in the opposite direction, which a late reply creates after the listed entry was
    /// deleted.
    Reversed,
}

impl Tracked {
    /// Parses a dumped entry; `None` if it belongs to another connection (`CTA_TUPLE_MASTER`), since
    /// rules accept such a connection as `related` without evaluating policies.
    pub(super) fn read(message: Message) -> Option<Self> {
        let attributes = message.attributes();
        if attributes.get(uapi::CTA_TUPLE_MASTER).is_some() {
            return None;
        }
        let original = attributes.get(uapi::CTA_TUPLE_ORIG)?;
        let reply = attributes.get(uapi::CTA_TUPLE_REPLY)?;
        let (opening, answering) = (Tuple::read(original)?, Tuple::read(reply)?);
        Some(Self {
            source: opening.source,
            replier: answering.source,
            protocol: opening.protocol,
            port: answering.source_port,
            handle: ConntrackHandle {
                id: attributes.be32(uapi::CTA_ID)?,
                zone: attributes.be16(uapi::CTA_ZONE),
                original: original.into(),
                reply: reply.into(),
            },
        })
    }

    pub(super) fn family(&self) -> TableFamily {
        family_of(self.source)
    }
}

impl fmt::Display for Tracked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (source, replier, protocol) = (self.source, self.replier, self.protocol);
        write!(f, "of IP protocol {protocol} from {source} to {replier}")?;
        match self.port {
            Some(port) => write!(f, " port {port}"),
            None => Ok(()),
        }
    }
}
