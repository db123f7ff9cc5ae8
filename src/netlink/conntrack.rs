//! What the kernel tracks: UDP flows, and connections of all protocols.
//!
//! A flow keeps the translation that its first packet got for as long as packets come, whatever
//! becomes of the rules. [`Conntrack::flows`] lists flows, [`Conntrack::delete`] removes one, so
//! that its next packet meets the rules as a first one. [`Conntrack::connections`] and
//! [`Conntrack::remove`] do the same for connections of all protocols (`connections`).
//!
//! Kernels since 5.8 pick the flows to dump by fields of the original direction (`CTA_FILTER`):
//! they still walk the whole table, but only what is asked for is written and read.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::attr::{Reader, Writer};
use super::encode::family_number;
use super::error::Error;
use super::socket::{DUMP_ATTEMPTS, Dump, Message, Reading, Socket};
use super::uapi;
use crate::nft::Family;

mod connections;

pub use connections::{Handle, Removal, Tracked};

const UDP: u8 = libc::IPPROTO_UDP as u8;
const FLOWS: &str = "the UDP flows";

/// A UDP flow: where its packets were sent, and who answers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Tells the flow from a later one with the same addresses.
    pub id: u32,
    /// The conntrack zone in the original direction; 0 unless rules assign zones.
    pub zone: u16,
    /// Who began the flow.
    pub source: SocketAddr,
    /// What the packets were sent to, before any translation.
    pub destination: SocketAddr,
    /// Where they went: the source of the answers. Equal to the destination if that was not
    /// translated.
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
    /// Whether the destination was translated.
    pub fn is_translated(&self) -> bool {
        self.replier != self.destination
    }

    /// Reads a dumped flow; `None` if it is none of UDP.
    fn read(message: Message) -> Option<Self> {
        let attributes = message.attributes();
        let original = attributes.get(uapi::CTA_TUPLE_ORIG)?;
        let (source, destination) = udp_tuple(original)?;
        let (replier, _) = udp_tuple(attributes.get(uapi::CTA_TUPLE_REPLY)?)?;
        // A zone of both directions is an attribute of the flow, one of a single direction is
        // an attribute of that.
        let zone = attributes
            .be16(uapi::CTA_ZONE)
            .or_else(|| Reader::new(original).be16(uapi::CTA_TUPLE_ZONE));
        Some(Self {
            id: attributes.be32(uapi::CTA_ID)?,
            zone: zone.unwrap_or_default(),
            source,
            destination,
            replier,
        })
    }

    fn family(&self) -> Family {
        family_of(self.destination.ip())
    }
}

/// Which UDP flows to list: those of a family, and of these only those whose original destination
/// has the address and the port, where given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowFilter {
    family: Family,
    address: Option<IpAddr>,
    port: Option<u16>,
}

impl FlowFilter {
    /// All flows of a family.
    pub fn all(family: Family) -> Self {
        Self {
            family,
            address: None,
            port: None,
        }
    }

    /// The flows to an address and port.
    pub fn to(destination: SocketAddr) -> Self {
        Self {
            family: family_of(destination.ip()),
            address: Some(destination.ip()),
            port: Some(destination.port()),
        }
    }

    /// The flows of a family to a port on any address.
    pub fn to_port(family: Family, port: u16) -> Self {
        Self {
            family,
            address: None,
            port: Some(port),
        }
    }

    /// Whether a flow is asked for.
    pub fn admits(&self, flow: &Flow) -> bool {
        let destination = flow.destination;
        flow.family() == self.family
            && self
                .address
                .is_none_or(|address| address == destination.ip())
            && self.port.is_none_or(|port| port == destination.port())
    }

    /// The attributes by which the kernel picks flows.
    ///
    /// An IPv6 address is not among them: the kernel compares it the wrong way round (the result
    /// of `ipv6_addr_cmp` is negated in `ctnetlink_filter_match_tuple`) and would leave out
    /// exactly the flows that are asked for.
    fn attributes(&self) -> Vec<u8> {
        let mut flags = uapi::CTA_FILTER_F_PROTO_NUM;
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes);
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
        // Unlike most of netfilter's numbers in the order of the host.
        writer.bytes(uapi::CTA_FILTER_ORIG_FLAGS, &flags.to_ne_bytes());
        writer.end(filter);
        bytes
    }
}

/// A connection to the kernel's connection tracking, in the network namespace it was opened in.
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
    /// [`Error::Open`], usually for want of `CAP_NET_ADMIN`.
    pub fn open() -> Result<Self, Error> {
        Ok(Self {
            socket: Socket::open("connection tracking")?,
            kernel_filters: true,
            request: Vec::new(),
        })
    }

    /// Leaves the picking of flows to nftlet, as it is with a kernel that refuses filters. All
    /// flows of the family are then read.
    #[must_use]
    pub fn without_kernel_filters(mut self) -> Self {
        self.kernel_filters = false;
        self
    }

    /// Hands out the flows that a filter asks for, as they come from the kernel.
    ///
    /// A flow may come up twice: the table changes under the dump all the time, and may be
    /// resized.
    ///
    /// # Errors
    ///
    /// [`Error::Flows`] if the kernel has no connection tracking over netlink, or does not allow
    /// it; others if the answer cannot be read. The connection is then of no further use.
    pub fn flows(&mut self, filter: &FlowFilter, mut each: impl FnMut(&Flow)) -> Result<(), Error> {
        let mut each = |message: Message| {
            // Kernels differ in what they filter by, so that every flow is looked at.
            if let Some(flow) = Flow::read(message).filter(|flow| filter.admits(flow)) {
                each(&flow);
            }
        };
        if self.kernel_filters {
            let attributes = filter.attributes();
            match self.dump(FLOWS, filter.family, &attributes, &mut each) {
                Err(Error::Flows { .. }) => self.kernel_filters = false,
                settled => return settled,
            }
        }
        self.dump(FLOWS, filter.family, &[], &mut each)
    }

    /// Dumps entries of a family. One that is interrupted is started again.
    fn dump(
        &mut self,
        what: &'static str,
        family: Family,
        attributes: &[u8],
        each: &mut dyn FnMut(Message),
    ) -> Result<(), Error> {
        let dump = Dump {
            what,
            kind: kind(uapi::IPCTNL_MSG_CT_GET),
            family: family_number(family),
            attributes,
        };
        for _ in 0..DUMP_ATTEMPTS {
            match self.socket.dump(dump, &mut *each) {
                Ok(Reading::Complete) => return Ok(()),
                Ok(Reading::Interrupted) => {}
                Err(Error::Receive { source, .. }) if is_refusal(&source) => {
                    return Err(Error::Flows { what, source });
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::Interrupted {
            what,
            times: DUMP_ATTEMPTS,
        })
    }

    /// Deletes a flow. False if it is gone already, be there another with the same addresses.
    ///
    /// # Errors
    ///
    /// [`Error::Flow`] if the kernel refuses; others if it cannot be asked.
    pub fn delete(&mut self, flow: &Flow) -> Result<bool, Error> {
        let number = family_number(flow.family());
        let errno = self.request_deletion("the deletion of a UDP flow", number, |writer| {
            write_tuple(writer, flow.source, flow.destination);
            // A kernel without zones refuses even zone 0.
            if flow.zone != 0 {
                writer.be16(uapi::CTA_ZONE, flow.zone);
            }
            writer.be32(uapi::CTA_ID, flow.id);
        })?;
        match errno {
            0 => Ok(true),
            libc::ENOENT => Ok(false),
            errno => Err(Error::Flow {
                flow: Box::new(*flow),
                source: io::Error::from_raw_os_error(errno),
            }),
        }
    }
}

fn kind(message: u16) -> u16 {
    (libc::NFNL_SUBSYS_CTNETLINK as u16) << 8 | message
}

/// Whether an error means that the kernel does not understand the request.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

fn family_of(address: IpAddr) -> Family {
    match address {
        IpAddr::V4(_) => Family::Ip,
        IpAddr::V6(_) => Family::Ip6,
    }
}

fn write_tuple(writer: &mut Writer, source: SocketAddr, destination: SocketAddr) {
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

/// One direction of a tracked connection.
#[derive(Clone, Copy, Debug)]
struct Tuple {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    /// Only for protocols with ports.
    source_port: Option<u16>,
    destination_port: Option<u16>,
}

impl Tuple {
    fn read(bytes: &[u8]) -> Option<Self> {
        let tuple = Reader::new(bytes);
        let protocol = tuple.nested(uapi::CTA_TUPLE_PROTO)?;
        let [number] = *protocol.get(uapi::CTA_PROTO_NUM)? else {
            return None;
        };
        let addresses = tuple.nested(uapi::CTA_TUPLE_IP)?;
        let address = |v4: u16, v6: u16| {
            let v4 = addresses.get(v4).and_then(|b| <[u8; 4]>::try_from(b).ok());
            let v6 = || addresses.get(v6).and_then(|b| <[u8; 16]>::try_from(b).ok());
            v4.map(|octets| IpAddr::V4(Ipv4Addr::from(octets)))
                .or_else(|| Some(IpAddr::V6(Ipv6Addr::from(v6()?))))
        };
        Some(Self {
            source: address(uapi::CTA_IP_V4_SRC, uapi::CTA_IP_V6_SRC)?,
            destination: address(uapi::CTA_IP_V4_DST, uapi::CTA_IP_V6_DST)?,
            protocol: number,
            source_port: protocol.be16(uapi::CTA_PROTO_SRC_PORT),
            destination_port: protocol.be16(uapi::CTA_PROTO_DST_PORT),
        })
    }
}

/// Source and destination of one direction; `None` if its protocol is another than UDP.
fn udp_tuple(bytes: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let tuple = Tuple::read(bytes).filter(|tuple| tuple.protocol == UDP)?;
    Some((
        SocketAddr::new(tuple.source, tuple.source_port?),
        SocketAddr::new(tuple.destination, tuple.destination_port?),
    ))
}

#[cfg(test)]
mod tests;
