//! The netlink socket: sends one batch as one message, reads answers and dumps.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use super::encode::{Batch, begin_message, encode, end_message};
use super::error::Error;
use crate::ruleset::Transaction;

const HEADER: usize = 16;
/// Room for one datagram of a dump; the kernel fills at most 32 KiB when offered more.
const RECEIVE_BUFFER: usize = 64 * 1024;
/// How often an interrupted dump is started again before giving up.
pub(super) const DUMP_ATTEMPTS: u32 = 32;

/// A connection to the kernel's nftables, in the network namespace it was opened in.
pub struct Nftables {
    socket: mnl::Socket,
    seq: u32,
    send_buffer: usize,
    buffer: Vec<u8>,
}

// SAFETY: libmnl's socket is a descriptor and an address without ties to a thread, and only its
// owner can reach it.
unsafe impl Send for Nftables {}

/// What a transaction took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Messages in the batch.
    pub messages: usize,
    /// Elements added and deleted.
    pub elements: usize,
    /// Size of the batch in bytes.
    pub bytes: usize,
}

/// One message of the kernel.
pub(super) struct Message {
    /// Message type with the subsystem in the upper byte.
    pub kind: u16,
    /// The bytes including the header.
    pub bytes: Vec<u8>,
}

impl Message {
    /// The attributes behind the netlink and netfilter headers.
    pub fn attributes(&self) -> &[u8] {
        self.bytes.get(HEADER + 4..).unwrap_or_default()
    }

    /// `nfgen_family`.
    pub fn family(&self) -> u8 {
        self.bytes.get(HEADER).copied().unwrap_or_default()
    }
}

/// The result of reading one dump.
enum Dump {
    Complete(Vec<Message>),
    Interrupted,
}

impl Nftables {
    /// Opens a socket in the current network namespace.
    ///
    /// # Errors
    ///
    /// [`Error::Open`], usually for want of `CAP_NET_ADMIN` or of nf_tables in the kernel.
    pub fn open() -> Result<Self, Error> {
        let socket = mnl::Socket::new(mnl::Bus::Netfilter).map_err(Error::Open)?;
        let nftables = Self {
            socket,
            seq: 0,
            send_buffer: 0,
            buffer: vec![0; RECEIVE_BUFFER],
        };
        // Extended acknowledgements say which attribute is at fault; capped ones do not repeat
        // the message, which would overflow the receive buffer for large messages.
        nftables
            .set_option(libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1)
            .map_err(Error::Open)?;
        nftables
            .set_option(libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1)
            .map_err(Error::Open)?;
        // Kernels since 5.6 check here what a dump filters by; older ones do without.
        let _ = nftables.set_option(libc::SOL_NETLINK, libc::NETLINK_GET_STRICT_CHK, 1);
        Ok(nftables)
    }

    fn set_option(&self, level: libc::c_int, option: libc::c_int, value: i32) -> io::Result<()> {
        // SAFETY: the descriptor is open as long as `self`; the value outlives the call and its
        // size is given.
        let result = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                level,
                option,
                (&raw const value).cast(),
                size_of::<i32>() as libc::socklen_t,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Makes the send buffer large enough for a batch; the kernel takes a message only whole.
    fn reserve(&mut self, bytes: usize) -> io::Result<()> {
        if bytes <= self.send_buffer {
            return Ok(());
        }
        let size = i32::try_from(bytes.next_power_of_two())
            .unwrap_or(i32::MAX)
            .max(256 * 1024);
        if let Err(error) = self.set_option(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, size) {
            if error.raw_os_error() != Some(libc::EPERM) {
                return Err(error);
            }
            // In a user namespace CAP_NET_ADMIN does not count for this: as much as anybody may
            // have, then. Should the kernel find it too small for the batch, it will say so.
            self.set_option(libc::SOL_SOCKET, libc::SO_SNDBUF, size)?;
        }
        self.send_buffer = usize::try_from(size).unwrap_or_default();
        Ok(())
    }

    /// Writes a transaction: all of it takes effect at once, or nothing does.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] names the operation (or element) the kernel refused first; the others
    /// tell why the transaction could not be encoded or sent.
    pub fn apply(&mut self, transaction: &Transaction) -> Result<Applied, Error> {
        if transaction.is_empty() {
            return Ok(Applied::default());
        }
        let first_seq = self.seq.wrapping_add(1);
        let batch = encode(transaction, first_seq)?;
        self.seq = first_seq.wrapping_add(batch.messages() as u32 + 1);
        self.send(&batch.bytes)?;
        self.answer(&batch, first_seq, transaction)?;
        Ok(Applied {
            messages: batch.messages(),
            elements: transaction.elements(),
            bytes: batch.bytes.len(),
        })
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let failed = |source| Error::Send {
            bytes: bytes.len(),
            source,
        };
        self.reserve(bytes.len()).map_err(failed)?;
        let sent = self.socket.send(bytes).map_err(failed)?;
        if sent == bytes.len() {
            Ok(())
        } else {
            Err(failed(io::Error::from(io::ErrorKind::WriteZero)))
        }
    }

    /// Receives one datagram if one is queued (or, when `wait`, as soon as one is).
    fn receive(&mut self, wait: bool) -> io::Result<Option<&[u8]>> {
        let flags = if wait { 0 } else { libc::MSG_DONTWAIT };
        loop {
            // SAFETY: the buffer is valid for its length, which is passed; the descriptor is
            // open as long as `self`.
            let received = unsafe {
                libc::recv(
                    self.socket.as_raw_fd(),
                    self.buffer.as_mut_ptr().cast(),
                    self.buffer.len(),
                    flags | libc::MSG_TRUNC,
                )
            };
            if let Ok(length) = usize::try_from(received) {
                if length > self.buffer.len() {
                    return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
                }
                return Ok(self.buffer.get(..length));
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock if !wait => return Ok(None),
                _ => return Err(error),
            }
        }
    }

    /// Reads what the kernel answered to a batch. The kernel works inside `sendmsg`, so all
    /// there is to read is queued by now; silence means success.
    fn answer(
        &mut self,
        batch: &Batch,
        first_seq: u32,
        transaction: &Transaction,
    ) -> Result<(), Error> {
        let mut first: Option<Error> = None;
        loop {
            let datagram = match self.receive(false) {
                Ok(Some(datagram)) => datagram,
                Ok(None) => break,
                // More errors than fit: the first ones were read or are lost, the batch failed.
                Err(source) => {
                    return Err(first.unwrap_or(Error::Receive {
                        what: "a transaction",
                        source,
                    }));
                }
            };
            for message in messages(datagram) {
                let Some(report) = Report::parse(&message) else {
                    continue;
                };
                let index = report.seq.wrapping_sub(first_seq);
                // Answers to an earlier batch whose reading failed must not be taken for ours.
                if report.errno == 0 || index as usize > batch.messages() + 1 || first.is_some() {
                    continue;
                }
                let place = batch.place(transaction, index, report.offset);
                first = Some(Error::Refused {
                    place: Box::new(place),
                    source: io::Error::from_raw_os_error(report.errno),
                    detail: report
                        .text
                        .map_or_else(String::new, |text| format!(" ({text})")),
                });
            }
        }
        first.map_or(Ok(()), Err)
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
    ) -> Result<Vec<Message>, Error> {
        for _ in 0..DUMP_ATTEMPTS {
            match self.dump_once(what, kind, family, attributes)? {
                Dump::Complete(messages) => return Ok(messages),
                Dump::Interrupted => {}
            }
        }
        Err(Error::Interrupted {
            what,
            times: DUMP_ATTEMPTS,
        })
    }

    fn dump_once(
        &mut self,
        what: &'static str,
        kind: libc::c_int,
        family: u8,
        attributes: &[u8],
    ) -> Result<Dump, Error> {
        self.seq = self.seq.wrapping_add(1);
        let seq = self.seq;
        let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | kind) as u16;
        let mut request = Vec::new();
        let start = begin_message(&mut request, kind, libc::NLM_F_DUMP as u16, seq, family);
        request.extend_from_slice(attributes);
        end_message(&mut request, start);
        self.send(&request)?;
        let failed = |source| Error::Receive { what, source };
        let (mut dumped, mut interrupted) = (Vec::new(), false);
        loop {
            let datagram = self
                .receive(true)
                .map_err(failed)?
                .map(<[u8]>::to_vec)
                .unwrap_or_default();
            for message in messages(&datagram) {
                if message.seq() != seq {
                    continue;
                }
                interrupted |= message.flags() & libc::NLM_F_DUMP_INTR as u16 != 0;
                match i32::from(message.kind) {
                    libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                        let errno = message.errno();
                        // A family or set that does not exist has nothing to dump.
                        if errno == libc::EINTR || errno == libc::EAGAIN {
                            interrupted = true;
                        } else if errno != 0 && errno != libc::ENOENT {
                            return Err(failed(io::Error::from_raw_os_error(errno)));
                        }
                        return Ok(if interrupted {
                            Dump::Interrupted
                        } else {
                            Dump::Complete(dumped)
                        });
                    }
                    _ => dumped.push(message),
                }
            }
        }
    }
}

impl Message {
    fn word(&self, offset: usize) -> u32 {
        self.bytes
            .get(offset..offset + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u32::from_ne_bytes)
    }

    fn seq(&self) -> u32 {
        self.word(8)
    }

    fn flags(&self) -> u16 {
        self.bytes
            .get(6..8)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u16::from_ne_bytes)
    }

    /// The errno of an error message or of the end of a dump, as a positive number.
    fn errno(&self) -> i32 {
        (self.word(HEADER) as i32).wrapping_neg()
    }
}

/// Splits a datagram into its messages.
fn messages(datagram: &[u8]) -> impl Iterator<Item = Message> + '_ {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = rest.get(..4)?.try_into().ok().map(u32::from_ne_bytes)?;
        let length = usize::try_from(length).ok().filter(|l| *l >= HEADER)?;
        let bytes = rest.get(..length)?.to_vec();
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        Some(Message { kind, bytes })
    })
}

/// What the kernel says about one message of a batch.
struct Report {
    seq: u32,
    errno: i32,
    /// Offset of the attribute at fault in the message.
    offset: Option<u32>,
    text: Option<String>,
}

impl Report {
    fn parse(message: &Message) -> Option<Self> {
        /// Netlink header, errno, and the header of the message it is about.
        const FIXED: usize = HEADER + 4 + HEADER;
        // NLMSGERR_ATTR_* of the kernel.
        const ATTR_TEXT: u16 = 1;
        const ATTR_OFFSET: u16 = 2;
        if i32::from(message.kind) != libc::NLMSG_ERROR {
            return None;
        }
        let attributes = super::attr::Reader::new(message.bytes.get(FIXED..)?);
        let offset = attributes.get(ATTR_OFFSET).and_then(|b| b.try_into().ok());
        Some(Self {
            seq: message.word(HEADER + 4 + 8),
            errno: message.errno(),
            offset: offset.map(u32::from_ne_bytes),
            text: attributes.string(ATTR_TEXT).map(str::to_owned),
        })
    }
}
