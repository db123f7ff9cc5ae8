//! The nftables socket: writes transactions and reads dumps.

use std::io;

use super::encode::{Batch, encode};
use super::error::{Error, Refusal};
use super::mute::MutedMonitor;
use super::socket::{DUMP_ATTEMPTS, Dump, DumpStatus, Message, Socket, messages};
use super::uapi;
use crate::nft::{ObjectPath, Transaction};

/// A socket to nftables in the network namespace in which it was opened.
pub struct Nftables {
    pub(super) socket: Socket,
    monitor: Option<MutedMonitor>,
}

/// Larger transactions mute the monitor: building their notifications takes longer than leaving the
/// multicast group and joining it again.
const LARGE: usize = 1_000;

/// The most refusals of one transaction that are kept.
const MOST_REFUSALS: usize = 256;

/// Measurements of a transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Messages in the batch.
    pub messages: usize,
    /// Elements added and deleted.
    pub elements: usize,
    /// Size of the batch in bytes.
    pub bytes: usize,
    /// The monitor was muted meanwhile: [`Nftables::generation`] shows whether another process
    /// committed something.
    pub missed_notifications: bool,
}

/// The concatenated messages of a dump.
pub(super) struct Dumped(Vec<u8>);

impl Dumped {
    /// Returns the messages in the order in which they came.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Message<'_>> {
        messages(&self.0)
    }
}

impl Nftables {
    /// Opens a socket in the current network namespace.
    ///
    /// # Errors
    ///
    /// [`Error::Open`], usually because `CAP_NET_ADMIN` or the kernel module nf_tables is missing.
    pub fn open() -> Result<Self, Error> {
        let socket = Socket::open("nftables")?;
        Ok(Self {
            socket,
            monitor: None,
        })
    }

    /// Mutes a monitor during large transactions.
    pub fn mute_during_large_writes(&mut self, monitor: MutedMonitor) {
        self.monitor = Some(monitor);
    }

    /// Returns the generation of the ruleset. Every commit in the network namespace, by any process
    /// and to any table, adds one. A transaction that fails or changes nothing does not.
    ///
    /// # Errors
    ///
    /// [`Error::Send`] or [`Error::Receive`] when the kernel does not answer.
    pub fn generation(&mut self) -> Result<u32, Error> {
        let kind = libc::NFNL_SUBSYS_NFTABLES << 8 | libc::NFT_MSG_GETGEN;
        self.socket
            .fetch("the ruleset's generation", kind as u16, |answer| {
                answer.attributes().be32(uapi::NFTA_GEN_ID)
            })
    }

    /// Returns the netlink port, by which notifications name the author of a change.
    pub(super) fn port(&self) -> u32 {
        self.socket.port()
    }

    /// Writes a transaction atomically.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] names the operations or elements that the kernel refused. Other errors
    /// concern encoding and sending.
    pub fn apply(&mut self, transaction: &Transaction) -> Result<Applied, Error> {
        if transaction.is_empty() {
            return Ok(Applied::default());
        }
        let first_seq = self.socket.next_number();
        let batch = encode(transaction, first_seq)?;
        self.socket.reserve_numbers(batch.messages() as u32 + 2);
        let elements = transaction.elements();
        let muted = self.monitor.as_ref().filter(|monitor| {
            // A monitor that could not join again misses this write too; `unmute` tries once more.
            monitor.is_left() || (elements > LARGE && monitor.mute())
        });
        let sent = self.socket.send("a transaction", &batch.bytes);
        if let Some(monitor) = muted {
            monitor.unmute();
        }
        let missed_notifications = muted.is_some();
        sent?;
        self.answer(&batch, first_seq, transaction)
            .map_err(|error| self.with_owner(error))?;
        Ok(Applied {
            messages: batch.messages(),
            elements,
            bytes: batch.bytes.len(),
            missed_notifications,
        })
    }

    /// Replaces a refusal with [`Error::Owned`] if the table belongs to another process.
    fn with_owner(&mut self, error: Error) -> Error {
        let table = error.refused().and_then(ObjectPath::table).cloned();
        let permission = error.errno() == Some(libc::EPERM);
        // If the owner cannot be read, the refusal is reported without it.
        let owner = table
            .filter(|_| permission)
            .and_then(|table| Some((self.owner(&table).ok()??, table)));
        match (error, owner) {
            (Error::Refused { first, .. }, Some((owner, table))) => Error::Owned {
                path: Box::new(first.path),
                table: Box::new(table),
                owner,
                source: first.source,
            },
            (error, _) => error,
        }
    }

    /// Reads the kernel's answer to a batch. No answer means success.
    fn answer(
        &mut self,
        batch: &Batch,
        first_seq: u32,
        transaction: &Transaction,
    ) -> Result<(), Error> {
        let mut refusals = Vec::new();
        let read = self.socket.errors(|report| {
            let index = report.seq.wrapping_sub(first_seq);
            // Answers to an earlier batch whose reading failed must not be taken for ours.
            if index as usize > batch.messages() + 1 || refusals.len() >= MOST_REFUSALS {
                return;
            }
            refusals.push(Refusal {
                path: batch.path(transaction, index, report.offset),
                source: io::Error::from_raw_os_error(report.errno),
                detail: report
                    .text
                    .map_or_else(String::new, |text| format!(" ({text})")),
            });
        });
        // If the receive buffer overflowed, the first errors were read. Without any, the batch failed
        // all the same.
        let lost = read.err().map(|source| Error::Receive {
            what: "a transaction",
            source,
        });
        let mut refusals = refusals.into_iter();
        let refused = refusals.next().map(|first| Error::Refused {
            first: Box::new(first),
            others: refusals.collect(),
        });
        refused.or(lost).map_or(Ok(()), Err)
    }

    /// Requests objects by name or key and calls `each` with the message about each. Returns the errno
    /// that ended the answer early, 0 if all objects were received.
    pub(super) fn fetch_all(
        &mut self,
        what: &'static str,
        kind: libc::c_int,
        family: u8,
        attributes: &[u8],
        count: usize,
        each: impl FnMut(Message),
    ) -> Result<i32, Error> {
        let request = Dump {
            what,
            kind: (libc::NFNL_SUBSYS_NFTABLES << 8 | kind) as u16,
            family,
            attributes,
        };
        self.socket.fetch_all(request, count, each)
    }

    /// Dumps the objects that match `attributes`. A dump during which the ruleset changed is
    /// repeated.
    pub(super) fn dump(
        &mut self,
        what: &'static str,
        kind: libc::c_int,
        family: u8,
        attributes: &[u8],
    ) -> Result<Dumped, Error> {
        let keep = |dumped: &mut Vec<u8>, message: Message| {
            dumped.extend_from_slice(message.bytes);
            // Messages are aligned to four bytes.
            dumped.resize(dumped.len().next_multiple_of(4), 0);
        };
        self.dump_into(what, kind, family, attributes, Vec::new, keep)
            .map(Dumped)
    }

    /// Dumps without keeping the messages: calls `each` with each message and the value that `start`
    /// creates whenever the dump begins.
    pub(super) fn dump_into<T>(
        &mut self,
        what: &'static str,
        kind: libc::c_int,
        family: u8,
        attributes: &[u8],
        start: impl Fn() -> T,
        mut each: impl FnMut(&mut T, Message),
    ) -> Result<T, Error> {
        let request = Dump {
            what,
            kind: (libc::NFNL_SUBSYS_NFTABLES << 8 | kind) as u16,
            family,
            attributes,
        };
        for _ in 0..DUMP_ATTEMPTS {
            let mut found = start();
            let reading = self
                .socket
                .dump(request, |message| each(&mut found, message))?;
            if reading == DumpStatus::Complete {
                return Ok(found);
            }
        }
        Err(Error::Interrupted {
            what,
            times: DUMP_ATTEMPTS,
        })
    }
}
