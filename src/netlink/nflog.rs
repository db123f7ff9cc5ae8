//! Receives logged packets over NFLOG.
//!
//! A rule copies the beginning of a packet to a numbered group, and the kernel sends it to the one
//! socket that has bound the group. A datagram may contain several packets, up to a tenth of a second
//! after the first.
//!
//! ```text
//! rule: log prefix "..." group N ──> kernel's queue ──socket──> LogReader ──> Denied
//!                                    prefix, interfaces,         headers
//!                                    first bytes                (`header`)
//! ```

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;

use super::error::Error;
use super::message::{AttrWriter, begin_message, end_message, family, set_resource};
use super::socket::{Message, Socket};
use super::uapi;

mod header;

const WHAT: &str = "logged packets";
/// The number of bytes copied of a packet: enough for an IP header with all options, or some extension
/// headers, and for the ports.
const COPIED: u32 = 128;
/// The time for which the kernel may collect packets before sending them, in hundredths of a second.
const LONGEST_DELAY: u32 = 10;

/// Receives the packets that rules log to a group.
pub struct LogReader {
    socket: Socket,
    waiting: VecDeque<Denied>,
}

/// A logged packet. nftlet's rules log the packets that they deny.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    /// The prefix of the log statement.
    pub prefix: String,
    /// The source address at the rule.
    pub source: IpAddr,
    /// The destination address at the rule, of the same family.
    pub destination: IpAddr,
    /// The number of the IP protocol.
    pub protocol: u8,
    /// The source port; `None` for protocols without ports and for all fragments but the first.
    pub source_port: Option<u16>,
    /// The destination port, as for the source port.
    pub destination_port: Option<u16>,
    /// The index of the input interface.
    pub input: Option<u32>,
    /// The index of the output interface.
    pub output: Option<u32>,
}

/// What a [`LogReader`] received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Logged {
    /// A packet.
    Denied(Denied),
    /// The queue overflowed, and packets were lost.
    Lost,
}

impl Denied {
    /// Parses a message; `None` if it does not contain an IP packet.
    fn read(message: &Message) -> Option<Self> {
        let subsystem = libc::NFNL_SUBSYS_ULOG as u16;
        if message.kind != subsystem << 8 | uapi::NFULNL_MSG_PACKET {
            return None;
        }
        let attributes = message.attributes();
        let packet = attributes.get(uapi::NFULA_PAYLOAD)?;
        let header = header::parse(family(message.family())?, packet)?;
        let prefix = attributes.get(uapi::NFULA_PREFIX).unwrap_or_default();
        let prefix = prefix.strip_suffix(&[0]).unwrap_or(prefix);
        let (source_port, destination_port) = header.ports.unzip();
        Some(Self {
            prefix: String::from_utf8_lossy(prefix).into_owned(),
            source: header.source,
            destination: header.destination,
            protocol: header.protocol,
            source_port,
            destination_port,
            input: attributes.be32(uapi::NFULA_IFINDEX_INDEV),
            output: attributes.be32(uapi::NFULA_IFINDEX_OUTDEV),
        })
    }
}

impl LogReader {
    /// Binds a group in the current network namespace.
    ///
    /// # Errors
    ///
    /// [`Error::LogGroup`] if another process has bound the group, or the kernel denies access;
    /// [`Error::Open`] when the socket cannot be opened.
    pub fn open(group: u16) -> Result<Self, Error> {
        let mut socket = Socket::open(WHAT)?;
        let seq = socket.reserve_numbers(1);
        socket.send("a request for logged packets", &bind(group, seq))?;
        let mut errno = 0;
        let read = socket.errors(|report| {
            if report.seq == seq {
                errno = report.errno;
            }
        });
        let failed = match (errno, read) {
            (0, Ok(())) => {
                return Ok(Self {
                    socket,
                    waiting: VecDeque::new(),
                });
            }
            (0, Err(source)) => source,
            (errno, _) => io::Error::from_raw_os_error(errno),
        };
        Err(Error::LogGroup {
            group,
            source: failed,
        })
    }

    /// Waits for the next packet. Skips packets other than IP.
    ///
    /// # Errors
    ///
    /// [`Error::Receive`] when the socket fails.
    pub fn wait(&mut self) -> Result<Logged, Error> {
        loop {
            if let Some(denied) = self.waiting.pop_front() {
                return Ok(Logged::Denied(denied));
            }
            let waiting = &mut self.waiting;
            let received = self
                .socket
                .listen(|message| waiting.extend(Denied::read(&message)));
            match received {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Ok(Logged::Lost);
                }
                Err(source) => return Err(Error::Receive { what: WHAT, source }),
            }
        }
    }
}

/// Encodes the message that binds a group and sets what is copied of its packets.
fn bind(group: u16, seq: u32) -> Vec<u8> {
    let kind = (libc::NFNL_SUBSYS_ULOG as u16) << 8 | uapi::NFULNL_MSG_CONFIG;
    let mut bytes = Vec::new();
    let start = begin_message(&mut bytes, kind, 0, seq, 0);
    set_resource(&mut bytes, start, group);
    let mut writer = AttrWriter::new(&mut bytes);
    writer.bytes(uapi::NFULA_CFG_CMD, &[uapi::NFULNL_CFG_CMD_BIND]);
    let [a, b, c, d] = COPIED.to_be_bytes();
    let mode = [a, b, c, d, uapi::NFULNL_COPY_PACKET, 0];
    writer.bytes(uapi::NFULA_CFG_MODE, &mode);
    writer.be32(uapi::NFULA_CFG_TIMEOUT, LONGEST_DELAY);
    end_message(&mut bytes, start);
    bytes
}
