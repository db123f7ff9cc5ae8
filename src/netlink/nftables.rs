//! The kernel's nftables: writes one batch as one message, reads dumps.

use std::io;

use super::encode::{Batch, encode};
use super::error::{Error, Refusal};
use super::monitor::Absence;
use super::socket::{DUMP_ATTEMPTS, Dump, Message, Reading, Socket, messages};
use super::uapi;
use crate::nft::{ObjectPath, Transaction};

/// A connection to the kernel's nftables, in the network namespace it was opened in.
pub struct Nftables {
    socket: Socket,
    absence: Option<Absence>,
}

/// Transactions with more elements are large: telling others of them takes longer than a
/// listener's leaving and coming back.
const LARGE: usize = 1_000;

/// The most refusals of one transaction that are kept.
const MOST_REFUSALS: usize = 256;

/// What a transaction took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Messages in the batch.
    pub messages: usize,
    /// Elements added and deleted.
    pub elements: usize,
    /// Size of the batch in bytes.
    pub bytes: usize,
    /// The own monitor did not listen meanwhile: [`Nftables::generation`] tells whether others
    /// changed something.
    pub unheard: bool,
}

/// The messages of a dump, one behind the other.
pub(super) struct Dumped(Vec<u8>);

impl Dumped {
    /// The messages in the order they came.
    pub fn iter(&self) -> impl Iterator<Item = Message<'_>> {
        messages(&self.0)
    }
}

impl Nftables {
    /// Opens a socket in the current network namespace.
    ///
    /// # Errors
    ///
    /// [`Error::Open`], usually for want of `CAP_NET_ADMIN` or of nf_tables in the kernel.
    pub fn open() -> Result<Self, Error> {
        let socket = Socket::open("nftables")?;
        Ok(Self {
            socket,
            absence: None,
        })
    }

    /// Has the kernel compose no news for a monitor during large transactions.
    pub fn write_unheard_by(&mut self, absence: Absence) {
        self.absence = Some(absence);
    }

    /// The number of the ruleset's generation. Every commit in the network namespace, whoever
    /// made it and to whatever table, adds one; a transaction that fails, or changes nothing,
    /// does not.
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

    /// The address by which the kernel knows whose changes these are.
    pub(super) fn port(&self) -> u32 {
        self.socket.port()
    }

    /// Writes a transaction: all of it takes effect at once, or nothing does.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] names the operations (or elements) that the kernel refused; the other
    /// variants say why the transaction could not be encoded or sent.
    pub fn apply(&mut self, transaction: &Transaction) -> Result<Applied, Error> {
        if transaction.is_empty() {
            return Ok(Applied::default());
        }
        let first_seq = self.socket.next_number();
        let batch = encode(transaction, first_seq)?;
        self.socket.reserve_numbers(batch.messages() as u32 + 2);
        let elements = transaction.elements();
        let unheard = self.absence.as_ref().filter(|absence| {
            // Where it could not come back from the last one, this is the next attempt.
            absence.lasts() || (elements > LARGE && absence.begin())
        });
        let sent = self.socket.send("a transaction", &batch.bytes);
        if let Some(absence) = unheard {
            absence.end();
        }
        let unheard = unheard.is_some();
        sent?;
        self.answer(&batch, first_seq, transaction)
            .map_err(|error| self.with_owner(error))?;
        Ok(Applied {
            messages: batch.messages(),
            elements,
            bytes: batch.bytes.len(),
            unheard,
        })
    }

    /// Names the process to which the table belongs that could not be changed, if there is one.
    fn with_owner(&mut self, error: Error) -> Error {
        let table = error.refused().and_then(ObjectPath::table).cloned();
        let permission = error.errno() == Some(libc::EPERM);
        // An owner that cannot be asked for is none.
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

    /// Reads what the kernel answered to a batch; silence means success.
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
        // Of more errors than fit the first ones were read; without any the batch failed all the same.
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

    /// Asks for objects by name or key, and hands out the message about each. Returns the errno that
    /// ended it early, and 0 once all of them came.
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

    /// Dumps what a request asks for. `attributes` narrows it down.
    ///
    /// A dump during which the ruleset changed is started again.
    pub(super) fn dump(
        &mut self,
        what: &'static str,
        kind: libc::c_int,
        family: u8,
        attributes: &[u8],
    ) -> Result<Dumped, Error> {
        let keep = |dumped: &mut Vec<u8>, message: Message| {
            dumped.extend_from_slice(message.bytes);
            // Messages start at multiples of four.
            dumped.resize(dumped.len().next_multiple_of(4), 0);
        };
        self.dump_into(what, kind, family, attributes, Vec::new, keep)
            .map(Dumped)
    }

    /// The same without keeping the messages: each is handed out as it comes, together with what
    /// `start` makes each time the dump begins.
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
            if reading == Reading::Complete {
                return Ok(found);
            }
        }
        Err(Error::Interrupted {
            what,
            times: DUMP_ATTEMPTS,
        })
    }
}
