//! Connection tracking: lists and deletes UDP flows and connections.
//!
//! A tracked flow keeps the translation of its first packet as long as packets come, even after the
//! rules changed. Deleting the entry ([`Conntrack::delete`], [`Conntrack::cut`]) makes the next packet
//! traverse the rules like a first one.
//!
//! Kernels since 5.8 filter dumps by fields of the original direction (`CTA_FILTER`). They still walk
//! the whole table, but write only the matching entries.

use std::io;

use super::error::Error;
use super::message::{AttrWriter, begin_message, end_message, family_number};
use super::socket::{DUMP_ATTEMPTS, Dump, DumpStatus, Message, Socket};
use super::uapi;
use crate::nft::TableFamily;

mod error;
mod flow;
mod opened;
mod tracked;
mod tuple;

pub use error::ConntrackError;
pub use flow::{Flow, FlowFilter};
pub use opened::{OpenedBy, OpenedConnection};
#[cfg(test)]
pub(crate) use tracked::ConntrackHandle;
pub use tracked::{EntryToCut, Tracked};

const UDP: u8 = libc::IPPROTO_UDP as u8;
const FLOWS: &str = "the UDP flows";
const CONNECTIONS: &str = "the tracked connections";
/// `NLA_F_NESTED`: the value is attributes.
const NESTED: u16 = 0x8000;

/// A socket to the connection tracking of the network namespace in which it was opened.
pub struct Conntrack {
    socket: Socket,
    kernel_filters: bool,
    request: Vec<u8>,
}

impl Conntrack {
    /// Opens a socket in the current network namespace.
    ///
    /// # Errors
    ///
    /// [`Error::Open`], usually because `CAP_NET_ADMIN` is missing.
    pub fn open() -> Result<Self, ConntrackError> {
        Ok(Self {
            socket: Socket::open("connection tracking")?,
            kernel_filters: true,
            request: Vec::new(),
        })
    }

    /// Calls `each` with the flows that match a filter while the kernel lists them.
    ///
    /// A flow may come up twice, because the table changes and may be resized during the dump.
    ///
    /// # Errors
    ///
    /// [`ConntrackError::List`] if the kernel has no connection tracking over netlink or denies access
    /// to it; [`ConntrackError::Netlink`] if the answer cannot be read. Do not use the socket
    /// afterwards: messages of the dump may still be queued.
    pub fn flows(
        &mut self,
        filter: &FlowFilter,
        mut each: impl FnMut(&Flow),
    ) -> Result<(), ConntrackError> {
        let mut each = |message: Message| {
            // Older kernels filter by fewer fields, or by none.
            if let Some(flow) = Flow::read(message).filter(|flow| filter.admits(flow)) {
                each(&flow);
            }
        };
        if self.kernel_filters {
            let attributes = filter.attributes();
            match self.dump(FLOWS, filter.family(), &attributes, &mut each) {
                Err(ConntrackError::List { .. }) => self.kernel_filters = false,
                settled => return settled,
            }
        }
        self.dump(FLOWS, filter.family(), &[], &mut each)
    }

    /// Calls `each` with the connections of a family, of all protocols, while the kernel lists them.
    /// As in [`Conntrack::flows`], one may come up twice.
    ///
    /// # Errors
    ///
    /// As for [`Conntrack::flows`].
    pub fn connections(
        &mut self,
        family: TableFamily,
        mut each: impl FnMut(Tracked),
    ) -> Result<(), ConntrackError> {
        self.dump(CONNECTIONS, family, &[], &mut |message| {
            if let Some(tracked) = Tracked::read(message) {
                each(tracked);
            }
        })
    }

    /// Calls `each` with the connections that match a filter. As in [`Conntrack::flows`], one may come
    /// up twice.
    ///
    /// # Errors
    ///
    /// As for [`Conntrack::flows`].
    pub fn opened(
        &mut self,
        by: &OpenedBy,
        mut each: impl FnMut(OpenedConnection),
    ) -> Result<(), ConntrackError> {
        let mut each = |message: Message| {
            let opened = OpenedConnection::read(message);
            // Older kernels filter by fewer fields, or by none.
            if let Some(opened) = opened.filter(|opened| by.admits(opened)) {
                each(opened);
            }
        };
        if self.kernel_filters {
            match self.dump(CONNECTIONS, by.family(), &by.attributes(), &mut each) {
                Err(ConntrackError::List { .. }) => self.kernel_filters = false,
                settled => return settled,
            }
        }
        self.dump(CONNECTIONS, by.family(), &[], &mut each)
    }

    /// Dumps the entries of a family. A dump that was interrupted is repeated.
    fn dump(
        &mut self,
        what: &'static str,
        family: TableFamily,
        attributes: &[u8],
        each: &mut dyn FnMut(Message),
    ) -> Result<(), ConntrackError> {
        let dump = Dump {
            what,
            kind: kind(uapi::IPCTNL_MSG_CT_GET),
            family: family_number(family),
            attributes,
        };
        for _ in 0..DUMP_ATTEMPTS {
            match self.socket.dump(dump, &mut *each) {
                Ok(DumpStatus::Complete) => return Ok(()),
                Ok(DumpStatus::Interrupted) => {}
                Err(Error::Receive { source, .. }) if is_unsupported(&source) => {
                    return Err(ConntrackError::List { what, source });
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(ConntrackError::Netlink(Error::Interrupted {
            what,
            times: DUMP_ATTEMPTS,
        }))
    }

    /// Deletes a flow. Returns false if it no longer exists, even if another flow has the same
    /// addresses.
    ///
    /// # Errors
    ///
    /// [`ConntrackError::DeleteFlow`] if the kernel refuses; [`ConntrackError::Netlink`] if the request
    /// cannot be sent or answered.
    pub fn delete(&mut self, flow: &Flow) -> Result<bool, ConntrackError> {
        let number = family_number(flow.family());
        let errno = self.request_deletion("the deletion of a UDP flow", number, |writer| {
            flow.write_tuple(writer);
            // A kernel without zones refuses even zone 0.
            if flow.zone != 0 {
                writer.be16(uapi::CTA_ZONE, flow.zone);
            }
            writer.be32(uapi::CTA_ID, flow.id);
        })?;
        match errno {
            0 => Ok(true),
            libc::ENOENT => Ok(false),
            errno => Err(ConntrackError::DeleteFlow {
                flow: Box::new(*flow),
                source: io::Error::from_raw_os_error(errno),
            }),
        }
    }

    /// Deletes the entry of a connection. Returns false if it no longer exists.
    ///
    /// # Errors
    ///
    /// [`ConntrackError::Cut`] if the kernel refuses; [`ConntrackError::Netlink`] if the request cannot
    /// be sent or answered.
    pub fn cut(&mut self, tracked: &Tracked, entry: EntryToCut) -> Result<bool, ConntrackError> {
        let handle = &tracked.handle;
        let number = family_number(tracked.family());
        let errno = self.request_deletion("the removal of a connection", number, |writer| {
            match entry {
                EntryToCut::Listed => {
                    writer.bytes(uapi::CTA_TUPLE_ORIG | NESTED, &handle.original);
                    writer.be32(uapi::CTA_ID, handle.id);
                }
                EntryToCut::Reversed => {
                    writer.bytes(uapi::CTA_TUPLE_ORIG | NESTED, &handle.reply);
                }
            }
            if let Some(zone) = handle.zone {
                writer.be16(uapi::CTA_ZONE, zone);
            }
        })?;
        match errno {
            0 => Ok(true),
            libc::ENOENT => Ok(false),
            errno => Err(ConntrackError::Cut {
                connection: Box::new(tracked.clone()),
                source: io::Error::from_raw_os_error(errno),
            }),
        }
    }

    /// Requests the deletion of an entry and returns the kernel's errno, 0 on success.
    fn request_deletion(
        &mut self,
        what: &'static str,
        family: u8,
        write: impl FnOnce(&mut AttrWriter),
    ) -> Result<i32, Error> {
        let seq = self.socket.reserve_numbers(1);
        self.request.clear();
        let message = kind(uapi::IPCTNL_MSG_CT_DELETE);
        let start = begin_message(&mut self.request, message, 0, seq, family);
        write(&mut AttrWriter::new(&mut self.request));
        end_message(&mut self.request, start);
        self.socket.ask(what, seq, &self.request)
    }
}

fn kind(message: u16) -> u16 {
    (libc::NFNL_SUBSYS_CTNETLINK as u16) << 8 | message
}

/// Returns whether an errno means that the kernel does not understand the request.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

#[cfg(test)]
mod tests;
