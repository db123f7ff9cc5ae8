//! Errors of netlink.

use std::fmt;
use std::io;

use thiserror::Error;

use crate::nft::{ObjectPath, TableId};

/// An error of the netlink layer.
#[derive(Debug, Error)]
pub enum Error {
    /// The netlink socket could not be opened or configured.
    #[error("cannot open a netlink socket for {what}: {source}; {hint}", hint = hint(.source))]
    Open {
        /// The purpose of the socket.
        what: &'static str,
        /// The error of the socket.
        source: io::Error,
    },
    /// The kernel does not accept a name.
    #[error("{path}: the name contains a zero byte or is longer than the kernel allows")]
    Name {
        /// The object with the name.
        path: ObjectPath,
    },
    /// A rule that was read back from the kernel cannot be encoded.
    #[error("{path}: a rule that nftlet did not write cannot be written")]
    ForeignRule {
        /// The rule.
        path: ObjectPath,
    },
    /// The kernel refused what every ruleset uses.
    #[error(
        "this kernel lacks features of nftables: {}; load the modules, or use Linux 5.10 or newer with all of them",
        missing.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    )]
    MissingFeatures { missing: Vec<MissingFeature> },
    /// A message did not reach the kernel.
    #[error("cannot send {what} of {bytes} bytes to the kernel: {source}; {hint}", hint = hint(.source))]
    Send {
        /// The kind of message.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The error of the socket.
        source: io::Error,
    },
    /// The kernel refused a transaction, none of which took effect.
    #[error("the kernel refused {}{}", .first, more(.others))]
    Refused {
        /// The refusal that the kernel reported first.
        first: Box<Refusal>,
        /// Further refusals in the order of the transaction, which may be consequences of the first.
        others: Vec<Refusal>,
    },
    /// The kernel refused a transaction, because a table belongs to another process.
    #[error(
        "the kernel refused {path}: table {table} belongs to another process ({owner}), and only \
         its owner may change it; end that process, which removes its table, or configure another \
         table name for it"
    )]
    Owned {
        /// The refused object.
        path: Box<ObjectPath>,
        table: Box<TableId>,
        /// The process that owns the table.
        owner: Owner,
        /// The kernel's errno.
        source: io::Error,
    },
    /// The answer of the kernel could not be read.
    #[error("cannot read the kernel's answer to {what}: {source}; {hint}", hint = hint(.source))]
    Receive {
        /// The request.
        what: &'static str,
        /// The error of the socket.
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
    /// An NFLOG group cannot be bound.
    #[error("cannot listen to NFLOG group {group}: {source}; {hint}", hint = log_hint(.source))]
    LogGroup {
        group: u16,
        /// The kernel's errno.
        source: io::Error,
    },
    /// Changes interrupted every attempt at a dump.
    #[error(
        "the dump of {what} was interrupted {times} times by changes; retrying when the other process writes less"
    )]
    Interrupted {
        /// The dumped objects.
        what: &'static str,
        /// The number of attempts.
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
    pub(crate) fn refusals(&self) -> impl Iterator<Item = &Refusal> {
        let (first, others) = match self {
            Error::Refused { first, others } => (Some(&**first), &others[..]),
            _ => (None, &[][..]),
        };
        first.into_iter().chain(others)
    }

    /// Returns whether the transaction conflicts with the contents of the tables.
    pub(crate) fn is_conflict(&self) -> bool {
        self.refusals().next().map(Refusal::class) == Some(ErrorClass::Conflict)
    }

    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Error::Refused { first, .. } => first.source.raw_os_error(),
            Error::Open { source, .. }
            | Error::Send { source, .. }
            | Error::Owned { source, .. }
            | Error::Receive { source, .. }
            | Error::IpSets { source }
            | Error::LogGroup { source, .. }
            | Error::IpSet { source, .. }
            | Error::Link { source, .. } => source.raw_os_error(),
            Error::MissingFeatures { .. }
            | Error::Name { .. }
            | Error::ForeignRule { .. }
            | Error::Interrupted { .. } => None,
        }
    }
}

/// A feature of nftables that this kernel does not have.
#[derive(Debug)]
pub struct MissingFeature {
    pub(super) feature: &'static str,
    /// The kernel module that has it.
    pub(super) module: &'static str,
    /// The kernel's errno.
    pub(super) source: io::Error,
}

impl fmt::Display for MissingFeature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            feature,
            module,
            source,
        } = self;
        write!(f, "{feature} (module {module}): {source}")
    }
}

/// The process that owns a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its netlink port.
    pub port: u32,
    /// The name of the process whose id equals the port, which by default is the owner.
    pub process: Option<String>,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "netlink port {}", self.port)?;
        match &self.process {
            Some(process) => write!(f, ", the id of process {process}"),
            None => Ok(()),
        }
    }
}

/// A refused object with the reason.
#[derive(Debug)]
pub struct Refusal {
    pub path: ObjectPath,
    /// The errno.
    pub source: io::Error,
    /// The text of the extended acknowledgement; empty without one.
    pub detail: String,
}

impl Refusal {
    /// Classifies the errno: the kernel names an element even if the error is unrelated to it.
    pub(crate) fn class(&self) -> ErrorClass {
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

/// The cause of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// The object is invalid: the kernel refuses it until it changes.
    Permanent,
    /// The object conflicts with the contents of the tables.
    Conflict,
    /// The state of the system: the kernel would have refused any other object, too.
    Transient,
}

/// Returns a hint for errno values that an administrator can act on.
pub(super) fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "nftlet needs the capability CAP_NET_ADMIN (run it as root)"
        }
        Some(libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT) => {
            "this kernel has no nf_tables (load the module nf_tables)"
        }
        Some(libc::EOPNOTSUPP) => "this kernel lacks a feature of nftables",
        Some(libc::ENOENT) => {
            "an object it refers to does not exist; nftlet compares with the kernel and repairs"
        }
        Some(libc::EEXIST) => {
            "the kernel has a different object of that name; nftlet compares with the kernel and repairs"
        }
        Some(libc::EBUSY) => "another object still refers to it",
        Some(libc::EMSGSIZE | libc::ENOBUFS) => {
            "a netlink buffer is too small; CAP_NET_ADMIN lets nftlet enlarge it (inside a user namespace, raise the sysctl net.core.wmem_max)"
        }
        Some(libc::ENOMEM) => "the kernel is out of memory",
        _ => "nftlet retries",
    }
}

/// Like [`hint`], for NFLOG groups. The kernel uses one errno for a group that another process has
/// bound and for a missing capability.
fn log_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EBUSY) => {
            "another process (ulogd, or a second nftlet) has bound this group: choose another one; or nftlet lacks the capability CAP_NET_ADMIN"
        }
        Some(libc::EINVAL | libc::EOPNOTSUPP) => {
            "this kernel cannot log over netlink (load the module nfnetlink_log)"
        }
        _ => hint(error),
    }
}
