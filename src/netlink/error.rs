//! What can go wrong between nftlet and the kernel.

use std::fmt;
use std::io;

use thiserror::Error;

use super::conntrack::{Flow, Tracked};
use crate::nft::{ObjectPath, TableId};

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
    #[error("{path}: the name contains a zero byte or is longer than the kernel allows")]
    Name {
        /// Where the name stands.
        path: ObjectPath,
    },
    /// Something read back from the kernel was about to be written.
    #[error("{path}: a rule that nftlet did not write cannot be written")]
    ForeignRule {
        /// The rule.
        path: ObjectPath,
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
    #[error("the kernel refused {}{}", .first, more(.others))]
    Refused {
        /// The refusal that the kernel reported first.
        first: Box<Refusal>,
        /// The other ones, in the order of the transaction. They may follow from the first.
        others: Vec<Refusal>,
    },
    /// The kernel refused a transaction, because a table belongs to another process.
    #[error(
        "the kernel refused {path}: table {table} belongs to another process ({owner}), and only \
         that one may change it; end that process, with which its table goes, or have it use \
         another name"
    )]
    Owned {
        /// What it refused.
        path: Box<ObjectPath>,
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
    /// Returns the object that the kernel refused first, if it refused a transaction.
    pub fn refused(&self) -> Option<&ObjectPath> {
        match self {
            Error::Refused { first, .. } => Some(&first.path),
            Error::Owned { path, .. } => Some(path),
            _ => None,
        }
    }

    /// Returns all refusals of a transaction.
    pub fn refusals(&self) -> impl Iterator<Item = &Refusal> {
        let (first, others) = match self {
            Error::Refused { first, others } => (Some(&**first), &others[..]),
            _ => (None, &[][..]),
        };
        first.into_iter().chain(others)
    }

    /// Whether what was to be written does not fit what the tables hold.
    pub fn is_conflict(&self) -> bool {
        self.refusals().next().map(Refusal::class) == Some(ErrorClass::Conflict)
    }

    /// The system's error behind it, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Refused { first, .. } => first.source.raw_os_error(),
            Error::Open { source, .. }
            | Error::Send { source, .. }
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

/// An object that the kernel refused, with the reason.
#[derive(Debug)]
pub struct Refusal {
    /// The object.
    pub path: ObjectPath,
    /// The errno.
    pub source: io::Error,
    /// The message of the extended acknowledgement; empty if there was none.
    pub detail: String,
}

impl Refusal {
    /// Classifies the errno. The kernel names the element that it was at, whatever went wrong there.
    pub fn class(&self) -> ErrorClass {
        match self.source.raw_os_error() {
            Some(libc::ENOENT | libc::EEXIST | libc::EBUSY) => ErrorClass::Conflict,
            Some(
                libc::ENOMEM
                | libc::ENOBUFS
                | libc::EAGAIN
                | libc::EINTR
                | libc::EPERM
                | libc::EACCES,
            ) => ErrorClass::Transient,
            _ => ErrorClass::Permanent,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            path,
            source,
            detail,
        } = self;
        write!(f, "{path}: {source}{detail}; {}", hint(source))
    }
}

fn more(others: &[Refusal]) -> String {
    match others.len() {
        0 => String::new(),
        count => format!(" (and {count} more)"),
    }
}

/// What a refusal says about the object that it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// The object itself is at fault: it is refused again until it changes.
    Permanent,
    /// The object does not fit what the tables hold.
    Conflict,
    /// Any other object would have been refused, too.
    Transient,
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
