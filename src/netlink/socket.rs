//! A netlink socket: requests, answers, dumps.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::error::Error;
use super::message::{AttrReader, begin_message, end_message};

const HEADER: usize = 16;
/// The size of the receive buffer. The kernel fills at most 32 KiB of a larger one.
const RECEIVE_BUFFER: usize = 64 * 1024;
/// The timeout for an answer. The kernel answers at once, so that a missing answer was dropped.
const ANSWER_WITHIN: libc::timeval = libc::timeval {
    tv_sec: 30,
    tv_usec: 0,
};
/// The number of attempts at a dump that is interrupted.
pub(crate) const DUMP_ATTEMPTS: u32 = 32;

/// A netlink socket in the network namespace in which it was opened.
pub(crate) struct Socket {
    socket: mnl::Socket,
    seq: u32,
    send_buffer: usize,
    buffer: Vec<u8>,
}

// SAFETY: libmnl's socket is a descriptor and an address without ties to a thread, and is only
// accessible through its owner.
unsafe impl Send for Socket {}

/// A message from the kernel.
#[derive(Clone, Copy)]
pub(crate) struct Message<'a> {
    /// Message type with the subsystem in the upper byte.
    pub kind: u16,
    /// The message including its header.
    pub bytes: &'a [u8],
}

/// A request for objects.
#[derive(Clone, Copy)]
pub(crate) struct Dump<'a> {
    /// The kind of objects, for error messages.
    pub what: &'static str,
    /// Message type with the subsystem in the upper byte.
    pub kind: u16,
    /// `nfgen_family`; 0 for all.
    pub family: u8,
    /// Attributes that filter the objects.
    pub attributes: &'a [u8],
}

/// The outcome of a dump.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum DumpStatus {
    /// The dump contains every object once.
    Complete,
    /// The objects changed meanwhile, and the dump must be repeated.
    Interrupted,
}

impl Socket {
    /// Opens a socket to netfilter in the current network namespace. Errors mention `what`.
    pub(crate) fn open(what: &'static str) -> Result<Self, Error> {
        Self::open_on(mnl::Bus::Netfilter, what)
    }

    /// Opens a socket of a netlink protocol.
    pub(crate) fn open_on(bus: mnl::Bus, what: &'static str) -> Result<Self, Error> {
        let failed = |source| Error::Open { what, source };
        let socket = Self {
            socket: mnl::Socket::new(bus).map_err(failed)?,
            seq: 0,
            send_buffer: 0,
            buffer: vec![0; RECEIVE_BUFFER],
        };
        // Extended acknowledgements name the attribute at fault. Capped ones do not repeat the
        // message, which for a large one would overflow the receive buffer.
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            socket
                .set_option(libc::SOL_NETLINK, option, 1)
                .map_err(failed)?;
        }
        let limit = ANSWER_WITHIN;
        // SAFETY: the descriptor is open as long as `socket`; the value outlives the call and its
        // size is given.
        let limited = unsafe {
            libc::setsockopt(
                socket.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const limit).cast(),
                size_of::<libc::timeval>() as libc::socklen_t,
            )
        };
        if limited != 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // Strict checking of filters in dumps exists since Linux 5.6.
        let _ = socket.set_option(libc::SOL_NETLINK, libc::NETLINK_GET_STRICT_CHK, 1);
        Ok(socket)
    }

    fn set_option(&self, level: libc::c_int, option: libc::c_int, value: i32) -> io::Result<()> {
        set_option(self.descriptor(), level, option, value)
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }

    /// Returns the netlink port of the socket.
    pub(crate) fn port(&self) -> u32 {
        self.socket.portid()
    }

    /// Returns a handle for joining and leaving a multicast group. Does not join it.
    pub(crate) fn membership(&self, group: u32) -> io::Result<Membership> {
        Ok(Membership {
            descriptor: self.descriptor().try_clone_to_owned()?,
            group: i32::try_from(group).unwrap_or_default(),
        })
    }

    /// Drops notifications about changes made through the socket with a port.
    pub(crate) fn ignore_port(&self, port: u32) -> io::Result<()> {
        /// Offset of `nlmsg_pid`, the port that caused the notification.
        const PORT_OFFSET: u32 = 12;
        let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
            code: code as u16,
            jt,
            jf,
            k,
        };
        // The filter loads words in network byte order, but the port is in host byte order.
        let mut program = [
            step(
                libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
                0,
                0,
                PORT_OFFSET,
            ),
            step(
                libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
                0,
                1,
                port.to_be(),
            ),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        ];
        let filter = libc::sock_fprog {
            len: program.len() as libc::c_ushort,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: the descriptor is open as long as `self`; the program and the structure that
        // points to it outlive the call, which copies both; their sizes are given.
        let result = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const filter).cast(),
                size_of::<libc::sock_fprog>() as libc::socklen_t,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Waits for a datagram and calls `each` with its messages. Returns without any after a timeout.
    pub(crate) fn listen(&mut self, each: impl FnMut(Message)) -> io::Result<()> {
        let datagram = match self.receive(true) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            received => received?.unwrap_or_default(),
        };
        messages(datagram).for_each(each);
        Ok(())
    }

    /// Enlarges the send buffer to fit a batch, which must be sent as one datagram.
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
            // CAP_NET_ADMIN of a user namespace is not sufficient. Use the limit for unprivileged
            // processes; if it is too small for the batch, sending fails.
            self.set_option(libc::SOL_SOCKET, libc::SO_SNDBUF, size)?;
        }
        self.send_buffer = usize::try_from(size).unwrap_or_default();
        Ok(())
    }

    /// Returns the next sequence number.
    pub(crate) fn next_number(&self) -> u32 {
        self.seq.wrapping_add(1)
    }

    /// Reserves sequence numbers for a number of messages and returns the first.
    pub(crate) fn reserve_numbers(&mut self, messages: u32) -> u32 {
        let first = self.next_number();
        self.seq = self.seq.wrapping_add(messages);
        first
    }

    /// Sends messages. Errors mention `what`.
    pub(crate) fn send(&mut self, what: &'static str, bytes: &[u8]) -> Result<(), Error> {
        let failed = |source| Error::Send {
            what,
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

    /// Receives a datagram. Without `wait`, returns `None` if none is queued.
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

    /// Calls `each` with the queued errors, oldest first. The kernel processes requests within
    /// `sendmsg`, so that all answers are queued when sending returns.
    ///
    /// If the queue overflows, the kernel reports this before the first error, and drops the last
    /// errors and all messages until the queue is empty. Therefore this handles the queued errors
    /// before it fails with `ENOBUFS`.
    pub(crate) fn errors(&mut self, mut each: impl FnMut(Acknowledgement)) -> io::Result<()> {
        let mut dropped = None;
        loop {
            match self.receive(false) {
                Ok(Some(datagram)) => {
                    let reports =
                        messages(datagram).filter_map(|message| Acknowledgement::parse(&message));
                    reports
                        .filter(|report| report.errno != 0)
                        .for_each(&mut each);
                }
                Ok(None) => return dropped.map_or(Ok(()), Err),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => dropped = Some(error),
                Err(error) => return Err(error),
            }
        }
    }

    /// Discards queued answers to earlier requests, or queued notifications.
    pub fn discard(&mut self) -> io::Result<()> {
        match self.errors(|_| {}) {
            Err(error) if error.raw_os_error() != Some(libc::ENOBUFS) => Err(error),
            _ => Ok(()),
        }
    }

    /// Sends a request numbered `seq` and returns the kernel's errno, 0 on success.
    pub(crate) fn ask(
        &mut self,
        what: &'static str,
        seq: u32,
        request: &[u8],
    ) -> Result<i32, Error> {
        self.send(what, request)?;
        let mut errno = 0;
        self.errors(|report| {
            if report.seq == seq {
                errno = report.errno;
            }
        })
        .map_err(|source| Error::Receive { what, source })?;
        Ok(errno)
    }

    /// Requests an object that is one message, and parses it with `read`.
    pub(crate) fn fetch<T>(
        &mut self,
        what: &'static str,
        kind: u16,
        read: impl FnOnce(Message) -> Option<T>,
    ) -> Result<T, Error> {
        let failed = |source| Error::Receive { what, source };
        let seq = self.reserve_numbers(1);
        let mut request = Vec::new();
        let start = begin_message(&mut request, kind, 0, seq, 0);
        end_message(&mut request, start);
        // The answer must fit in the queue.
        self.discard().map_err(failed)?;
        self.send(what, &request)?;
        loop {
            let datagram = self.receive(true).map_err(failed)?.unwrap_or_default();
            let Some(answer) = messages(datagram).find(|message| message.seq() == seq) else {
                continue;
            };
            if i32::from(answer.kind) == libc::NLMSG_ERROR {
                let errno = io::Error::from_raw_os_error(answer.errno());
                return Err(failed(errno));
            }
            let unreadable = || failed(io::Error::from(io::ErrorKind::InvalidData));
            return read(answer).ok_or_else(unreadable);
        }
    }

    /// Requests objects and calls `each` with the message about each. Returns 0 after `count` messages,
    /// or the errno that ended the answer early.
    pub(crate) fn fetch_all(
        &mut self,
        request: Dump,
        count: usize,
        mut each: impl FnMut(Message),
    ) -> Result<i32, Error> {
        let what = request.what;
        let failed = |source| Error::Receive { what, source };
        let seq = self.reserve_numbers(1);
        let mut bytes = Vec::new();
        let start = begin_message(&mut bytes, request.kind, 0, seq, request.family);
        bytes.extend_from_slice(request.attributes);
        end_message(&mut bytes, start);
        self.discard().map_err(failed)?;
        self.send(what, &bytes)?;
        let mut left = count;
        while left > 0 {
            let datagram = self.receive(true).map_err(failed)?.unwrap_or_default();
            for message in messages(datagram).filter(|message| message.seq() == seq) {
                if i32::from(message.kind) == libc::NLMSG_ERROR {
                    return Ok(message.errno());
                }
                left = left.saturating_sub(1);
                each(message);
            }
        }
        Ok(0)
    }

    /// Dumps objects and calls `each` with each. An interrupted dump may miss or repeat objects.
    pub(crate) fn dump(
        &mut self,
        dump: Dump,
        mut each: impl FnMut(Message),
    ) -> Result<DumpStatus, Error> {
        let what = dump.what;
        let seq = self.reserve_numbers(1);
        let mut request = Vec::new();
        let flags = libc::NLM_F_DUMP as u16;
        let start = begin_message(&mut request, dump.kind, flags, seq, dump.family);
        request.extend_from_slice(dump.attributes);
        end_message(&mut request, start);
        let failed = |source| Error::Receive { what, source };
        self.discard().map_err(failed)?;
        self.send("a request", &request)?;
        let mut interrupted = false;
        loop {
            let datagram = self.receive(true).map_err(failed)?.unwrap_or_default();
            for message in messages(datagram) {
                if message.seq() != seq {
                    continue;
                }
                interrupted |= message.flags() & libc::NLM_F_DUMP_INTR as u16 != 0;
                match i32::from(message.kind) {
                    libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                        let errno = message.errno();
                        // A family or set that does not exist has no objects.
                        if errno == libc::EINTR || errno == libc::EAGAIN {
                            interrupted = true;
                        } else if errno != 0 && errno != libc::ENOENT {
                            return Err(failed(io::Error::from_raw_os_error(errno)));
                        }
                        return Ok(if interrupted {
                            DumpStatus::Interrupted
                        } else {
                            DumpStatus::Complete
                        });
                    }
                    _ => each(message),
                }
            }
        }
    }
}

/// Joins and leaves a multicast group, even while another thread waits for messages of the socket.
#[derive(Debug)]
pub(crate) struct Membership {
    /// A duplicate of the socket's descriptor.
    descriptor: OwnedFd,
    group: i32,
}

impl Membership {
    /// Joins the group.
    pub(crate) fn join(&self) -> io::Result<()> {
        self.set(libc::NETLINK_ADD_MEMBERSHIP)
    }

    /// Leaves the group.
    pub(crate) fn leave(&self) -> io::Result<()> {
        self.set(libc::NETLINK_DROP_MEMBERSHIP)
    }

    fn set(&self, option: libc::c_int) -> io::Result<()> {
        let descriptor = self.descriptor.as_fd();
        set_option(descriptor, libc::SOL_NETLINK, option, self.group)
    }
}

fn set_option(
    descriptor: BorrowedFd,
    level: libc::c_int,
    option: libc::c_int,
    value: i32,
) -> io::Result<()> {
    // SAFETY: the descriptor is open as long as it is borrowed; the value outlives the call and
    // its size is given.
    let result = unsafe {
        libc::setsockopt(
            descriptor.as_raw_fd(),
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

impl<'a> Message<'a> {
    /// Returns the attributes after the netlink and netfilter headers.
    pub(crate) fn attributes(self) -> AttrReader<'a> {
        AttrReader::new(self.bytes.get(HEADER + 4..).unwrap_or_default())
    }

    /// Returns `nfgen_family`.
    pub(crate) fn family(self) -> u8 {
        self.bytes.get(HEADER).copied().unwrap_or_default()
    }

    fn word(self, offset: usize) -> u32 {
        self.bytes
            .get(offset..offset + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u32::from_ne_bytes)
    }

    fn seq(self) -> u32 {
        self.word(8)
    }

    fn flags(self) -> u16 {
        self.bytes
            .get(6..8)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u16::from_ne_bytes)
    }

    /// Returns the errno of an error message or of the end of a dump, as a positive number.
    fn errno(self) -> i32 {
        (self.word(HEADER) as i32).wrapping_neg()
    }
}

/// Splits one or several datagrams into messages.
pub(crate) fn messages(bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = rest.get(..4)?.try_into().ok().map(u32::from_ne_bytes)?;
        let length = usize::try_from(length).ok().filter(|l| *l >= HEADER)?;
        let bytes = rest.get(..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        Some(Message { kind, bytes })
    })
}

/// The kernel's answer to a message.
pub(crate) struct Acknowledgement {
    /// The sequence number of the message.
    pub seq: u32,
    /// The errno as a positive number, 0 on success.
    pub errno: i32,
    /// The offset of the attribute at fault in the message.
    pub offset: Option<u32>,
    /// The error message of the kernel.
    pub text: Option<String>,
}

impl Acknowledgement {
    fn parse(message: &Message) -> Option<Self> {
        /// The length of the netlink header, the errno, and the header of the message in question.
        const FIXED: usize = HEADER + 4 + HEADER;
        // NLMSGERR_ATTR_* of the kernel.
        const ATTR_TEXT: u16 = 1;
        const ATTR_OFFSET: u16 = 2;
        if i32::from(message.kind) != libc::NLMSG_ERROR {
            return None;
        }
        let attributes = AttrReader::new(message.bytes.get(FIXED..)?);
        let offset = attributes.get(ATTR_OFFSET).and_then(|b| b.try_into().ok());
        Some(Self {
            seq: message.word(HEADER + 4 + 8),
            errno: message.errno(),
            offset: offset.map(u32::from_ne_bytes),
            text: attributes.string(ATTR_TEXT).map(str::to_owned),
        })
    }
}
