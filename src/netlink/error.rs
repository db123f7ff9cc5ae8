//! What can go wrong between nftlet and the kernel.

use std::fmt;
use std::io;

use thiserror::Error;

use super::conntrack::{Flow, Tracked};
use crate::ruleset::{Declaration, Element, Name, Op, Stray, TableId, text};

/// An error of the netlink layer.
#[derive(Debug, Error)]
pub enum Error {
    /// The netlink socket could not be opened or configured.
    #[error("cannot open a netlink socket for {what}: {source}; {hint}", hint = hint(.source))]
    Open {
        /// What it is for.
        what: &'static str,
        /// The error of the socket.
        source: io::Error,
    },
    /// A name cannot be given to the kernel.
    #[error("{place}: the name contains a zero byte or is longer than the kernel allows")]
    Name {
        /// Where the name stands.
        place: Place,
    },
    /// Something read back from the kernel was about to be written.
    #[error("{place}: a rule that nftlet did not write cannot be written")]
    ForeignRule {
        /// The rule.
        place: Place,
    },
    /// A message did not reach the kernel.
    #[error("cannot send {what} of {bytes} bytes to the kernel: {source}; {hint}", hint = hint(.source))]
    Send {
        /// What it is.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The error of the socket.
        source: io::Error,
    },
    /// The kernel refused a transaction; nothing of it took effect.
    #[error("the kernel refused {place}: {source}{detail}; {hint}", hint = hint(.source))]
    Refused {
        /// What it refused.
        place: Box<Place>,
        /// Its errno.
        source: io::Error,
        /// What the kernel said about it, where it said something.
        detail: String,
    },
    /// The kernel refused a transaction, because a table belongs to another process.
    #[error(
        "the kernel refused {place}: table {table} belongs to another process ({owner}), and only \
         that one may change it; end that process, with which its table goes, or have it use \
         another name"
    )]
    Owned {
        /// What it refused.
        place: Box<Place>,
        /// The table.
        table: Box<TableId>,
        /// Whose it is.
        owner: Owner,
        /// Its errno.
        source: io::Error,
    },
    /// The answer of the kernel could not be read.
    #[error("cannot read the kernel's answer to {what}: {source}; {hint}", hint = hint(.source))]
    Receive {
        /// What was asked.
        what: &'static str,
        /// The error of the socket.
        source: io::Error,
    },
    /// The tracked connections cannot be worked with.
    #[error("cannot list {what}: {source}; {hint}", hint = conntrack_hint(.source))]
    Flows {
        /// What was asked for.
        what: &'static str,
        /// The kernel's errno.
        source: io::Error,
    },
    /// A tracked connection could not be deleted.
    #[error("cannot delete the UDP flow {flow}: {source}; {hint}", hint = conntrack_hint(.source))]
    Flow {
        /// The connection.
        flow: Box<Flow>,
        /// The kernel's errno.
        source: io::Error,
    },
    /// A tracked connection could not be removed.
    #[error("cannot cut the connection {connection}: {source}; {hint}", hint = conntrack_hint(.source))]
    Connection {
        /// The connection.
        connection: Box<Tracked>,
        /// The kernel's errno.
        source: io::Error,
    },
    /// The ipsets cannot be listed.
    #[error("cannot list the ipsets: {source}; {hint}", hint = hint(.source))]
    IpSets {
        /// The kernel's errno.
        source: io::Error,
    },
    /// An ipset could not be destroyed.
    #[error("cannot destroy the ipset {name}: {source}; {hint}", hint = hint(.source))]
    IpSet {
        /// The set.
        name: String,
        /// The kernel's errno.
        source: io::Error,
    },
    /// A network interface could not be deleted.
    #[error("cannot delete the network interface {name}: {source}; {hint}", hint = hint(.source))]
    Link {
        /// The interface.
        name: String,
        /// The kernel's errno.
        source: io::Error,
    },
    /// A group of logged packets cannot be listened to.
    #[error("cannot listen to NFLOG group {group}: {source}; {hint}", hint = log_hint(.source))]
    LogGroup {
        /// The group.
        group: u16,
        /// The kernel's errno.
        source: io::Error,
    },
    /// A dump kept being interrupted by changes.
    #[error(
        "the dump of {what} was interrupted {times} times by changes; it will be tried again when the other writer is quiet"
    )]
    Interrupted {
        /// What was dumped.
        what: &'static str,
        /// How often it was tried.
        times: u32,
    },
}

impl Error {
    /// What the kernel refused, if that is what happened.
    pub fn refused(&self) -> Option<&Place> {
        match self {
            Error::Refused { place, .. } | Error::Owned { place, .. } => Some(place),
            _ => None,
        }
    }

    /// What the errno of a refusal says about what was refused: the kernel names the element it was
    /// at, whatever went wrong there.
    pub fn blame(&self) -> Blame {
        match (self, self.errno()) {
            (Error::Refused { .. }, Some(libc::ENOENT | libc::EEXIST | libc::EBUSY)) => {
                Blame::Conflict
            }
            (
                Error::Refused { .. },
                Some(
                    libc::ENOMEM
                    | libc::ENOBUFS
                    | libc::EAGAIN
                    | libc::EINTR
                    | libc::EPERM
                    | libc::EACCES,
                ),
            ) => Blame::Nothing,
            (Error::Refused { .. }, _) => Blame::Named,
            _ => Blame::Nothing,
        }
    }

    /// The system's error behind it, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Open { source, .. }
            | Error::Send { source, .. }
            | Error::Refused { source, .. }
            | Error::Owned { source, .. }
            | Error::Receive { source, .. }
            | Error::Flows { source, .. }
            | Error::Flow { source, .. }
            | Error::Connection { source, .. }
            | Error::IpSets { source }
            | Error::LogGroup { source, .. }
            | Error::IpSet { source, .. }
            | Error::Link { source, .. } => source.raw_os_error(),
            Error::Name { .. } | Error::ForeignRule { .. } | Error::Interrupted { .. } => None,
        }
    }
}

/// The process to which a table belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The netlink port by which the kernel knows it.
    pub port: u32,
    /// The name of the process that has this number, which by default is the owner.
    pub process: Option<String>,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "netlink port {}", self.port)?;
        match &self.process {
            Some(process) => write!(f, ", which is the id of process {process}"),
            None => Ok(()),
        }
    }
}

/// What a refusal says about the object that the kernel names with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// It cannot be had as it is.
    Named,
    /// It does not fit what the tables hold.
    Conflict,
    /// Nothing: any other one would have met the same.
    Nothing,
}

/// A hint for the errno values that a person can do something about.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "nftlet needs the capability CAP_NET_ADMIN (run it as root)"
        }
        Some(libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT) => {
            "this kernel has no nf_tables (load the module nf_tables; nftlet needs Linux 5.13)"
        }
        Some(libc::EOPNOTSUPP) => {
            "this kernel lacks an nftables feature (nftlet needs Linux 5.13 with nft_nat, nft_masq, nft_fib, nft_reject, nft_numgen and nft_ct)"
        }
        Some(libc::ENOENT) => {
            "something it refers to does not exist; it will be compared with the kernel and repaired"
        }
        Some(libc::EEXIST) => {
            "the kernel has another object of that name; it will be compared with the kernel and repaired"
        }
        Some(libc::EBUSY) => "something still refers to it",
        Some(libc::EMSGSIZE | libc::ENOBUFS) => {
            "a netlink buffer is too small; CAP_NET_ADMIN lets nftlet enlarge it (inside a user namespace, raise the sysctl net.core.wmem_max)"
        }
        Some(libc::ENOMEM) => "the kernel is out of memory",
        _ => "it will be tried again",
    }
}

/// The same for tracked connections.
fn conntrack_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EINVAL | libc::EOPNOTSUPP) => {
            "this kernel has no connection tracking over netlink (load the module nf_conntrack_netlink)"
        }
        _ => hint(error),
    }
}

/// The same for groups of logged packets. The kernel has one errno for a group that somebody else
/// has bound and for a missing capability.
fn log_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EBUSY) => {
            "another program (ulogd, or a second nftlet) listens to this group, so choose another one; or nftlet lacks the capability CAP_NET_ADMIN"
        }
        Some(libc::EINVAL | libc::EOPNOTSUPP) => {
            "this kernel cannot log over netlink (load the module nfnetlink_log)"
        }
        _ => hint(error),
    }
}

/// A part of a transaction, printed as a person would name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A table.
    Table(TableId),
    /// A chain.
    Chain(TableId, Name),
    /// A rule, as text.
    Rule(TableId, Name, String),
    /// A set.
    Set(TableId, Name),
    /// An element of a set.
    Element(TableId, Name, Box<Element>, String),
    /// An object that nftlet does not make.
    Stray(TableId, Stray),
    /// The transaction as a whole.
    Transaction,
}

impl Place {
    /// The table that it is in.
    pub fn table(&self) -> Option<&TableId> {
        match self {
            Place::Table(table)
            | Place::Chain(table, _)
            | Place::Rule(table, ..)
            | Place::Set(table, _)
            | Place::Element(table, ..)
            | Place::Stray(table, _) => Some(table),
            Place::Transaction => None,
        }
    }

    /// The place of an operation, and of one of its elements where that is known.
    pub fn of(op: &Op, element: Option<usize>) -> Self {
        match op {
            Op::AddTable(table) | Op::DeleteTable(table) => Place::Table(table.clone()),
            Op::AddSet(table, set, _) | Op::DeleteSet(table, set) | Op::FlushSet(table, set) => {
                Place::Set(table.clone(), set.clone())
            }
            Op::AddChain(table, chain, _)
            | Op::FlushChain(table, chain)
            | Op::DeleteChain(table, chain) => Place::Chain(table.clone(), chain.clone()),
            Op::DeleteStray(table, stray) => Place::Stray(table.clone(), stray.clone()),
            Op::AddRule(table, chain, rule) => {
                Place::Rule(table.clone(), chain.clone(), text::rule(rule, table.family))
            }
            Op::AddElements(table, set, declaration, elements)
            | Op::DeleteElements(table, set, declaration, elements) => {
                element.and_then(|index| elements.get(index)).map_or_else(
                    || Place::Set(table.clone(), set.clone()),
                    |element| Self::element(table, set, declaration, element),
                )
            }
        }
    }

    fn element(table: &TableId, set: &Name, declaration: &Declaration, element: &Element) -> Self {
        let printed = text::element(element, declaration, table.family);
        Place::Element(
            table.clone(),
            set.clone(),
            Box::new(element.clone()),
            printed,
        )
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Table(table) => write!(f, "table {table}"),
            Place::Chain(table, chain) => write!(f, "chain {chain} of table {table}"),
            Place::Rule(table, chain, rule) => {
                write!(f, "rule \"{rule}\" of chain {chain} in table {table}")
            }
            Place::Set(table, set) => write!(f, "set {set} of table {table}"),
            Place::Element(table, set, _, element) => {
                write!(f, "element {{ {element} }} of set {set} in table {table}")
            }
            Place::Stray(table, stray) => write!(f, "{stray} of table {table}"),
            Place::Transaction => f.write_str("the transaction"),
        }
    }
}
