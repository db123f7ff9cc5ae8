//! Tracked connections of all protocols: listed to be judged, and removed one by one.
//!
//! A connection whose entry is removed is none any more for the rules: its next packet meets them
//! as a first one.

use std::fmt;
use std::io;
use std::net::IpAddr;

use super::{Conntrack, Tuple, kind};
use crate::netlink::attr::Writer;
use crate::netlink::encode::{begin_message, end_message, family_number};
use crate::netlink::error::Error;
use crate::netlink::socket::Message;
use crate::netlink::uapi;
use crate::nft::Family;

const CONNECTIONS: &str = "the tracked connections";

/// A connection as the kernel tracks it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracked {
    /// Who opened it.
    pub source: IpAddr,
    /// Who answers: the source of the answers, thus behind the translation of the destination.
    pub replier: IpAddr,
    /// The IP protocol number.
    pub protocol: u8,
    /// The port that answers, for a protocol that has ports.
    pub port: Option<u16>,
    /// What the kernel knows it by.
    pub handle: Handle,
}

/// What the kernel knows a connection by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handle {
    id: u32,
    zone: Option<u16>,
    /// The tuple of each direction, as the kernel wrote it: protocols differ in what is in it.
    original: Box<[u8]>,
    reply: Box<[u8]>,
}

/// Which entry of a connection to remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The entry that was listed, be there a later one with the same addresses.
    Listed,
    /// Whichever has the addresses of the answers: one that an answer on its way has opened
    /// the other way round, after the listed one was removed.
    Reversed,
}

impl Tracked {
    /// Reads a dumped connection; `None` if it is one that belongs to another connection
    /// (`CTA_TUPLE_MASTER`): rules let such pass as `related`, and the policies are not asked.
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
            handle: Handle {
                id: attributes.be32(uapi::CTA_ID)?,
                zone: attributes.be16(uapi::CTA_ZONE),
                original: original.into(),
                reply: reply.into(),
            },
        })
    }

    fn family(&self) -> Family {
        super::family_of(self.source)
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

impl Conntrack {
    /// Hands out the connections of a family, of all protocols, as they come from the kernel.
    /// As with [`Conntrack::flows`] one may come up twice.
    ///
    /// # Errors
    ///
    /// As for [`Conntrack::flows`].
    pub fn connections(
        &mut self,
        family: Family,
        mut each: impl FnMut(Tracked),
    ) -> Result<(), Error> {
        self.dump(CONNECTIONS, family, &[], &mut |message| {
            if let Some(tracked) = Tracked::read(message) {
                each(tracked);
            }
        })
    }

    /// Removes a connection. False if it is gone already.
    ///
    /// # Errors
    ///
    /// [`Error::Connection`] if the kernel refuses; others if it cannot be asked.
    pub fn remove(&mut self, tracked: &Tracked, which: Removal) -> Result<bool, Error> {
        let handle = &tracked.handle;
        let number = family_number(tracked.family());
        let errno = self.request_deletion("the removal of a connection", number, |writer| {
            match which {
                Removal::Listed => {
                    writer.bytes(uapi::CTA_TUPLE_ORIG | NESTED, &handle.original);
                    writer.be32(uapi::CTA_ID, handle.id);
                }
                Removal::Reversed => writer.bytes(uapi::CTA_TUPLE_ORIG | NESTED, &handle.reply),
            }
            if let Some(zone) = handle.zone {
                writer.be16(uapi::CTA_ZONE, zone);
            }
        })?;
        match errno {
            0 => Ok(true),
            libc::ENOENT => Ok(false),
            errno => Err(Error::Connection {
                connection: Box::new(tracked.clone()),
                source: io::Error::from_raw_os_error(errno),
            }),
        }
    }

    /// Sends a request to delete an entry and returns the kernel's errno, 0 for success.
    pub(super) fn request_deletion(
        &mut self,
        what: &'static str,
        family: u8,
        write: impl FnOnce(&mut Writer),
    ) -> Result<i32, Error> {
        let seq = self.socket.reserve_numbers(1);
        self.request.clear();
        let message = kind(uapi::IPCTNL_MSG_CT_DELETE);
        let start = begin_message(&mut self.request, message, 0, seq, family);
        write(&mut Writer::new(&mut self.request));
        end_message(&mut self.request, start);
        self.socket.ask(what, seq, &self.request)
    }
}

/// `NLA_F_NESTED`: the value is attributes.
const NESTED: u16 = 0x8000;
