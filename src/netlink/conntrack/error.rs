//! Errors of connection tracking.

use std::io;

use thiserror::Error;

use super::flow::Flow;
use super::tracked::Tracked;
use crate::netlink::error::{self, Error};

/// An error of connection tracking.
#[derive(Debug, Error)]
pub enum ConntrackError {
    /// The kernel does not list entries.
    #[error("cannot list {what}: {source}; {hint}", hint = hint(.source))]
    List {
        /// The kind of entries.
        what: &'static str,
        /// The kernel's errno.
        source: io::Error,
    },
    /// A UDP flow cannot be deleted.
    #[error("cannot delete the UDP flow {flow}: {source}; {hint}", hint = hint(.source))]
    DeleteFlow {
        flow: Box<Flow>,
        /// The kernel's errno.
        source: io::Error,
    },
    /// A connection cannot be deleted.
    #[error("cannot cut the connection {connection}: {source}; {hint}", hint = hint(.source))]
    Cut {
        connection: Box<Tracked>,
        /// The kernel's errno.
        source: io::Error,
    },
    /// The netlink socket failed.
    #[error(transparent)]
    Netlink(#[from] Error),
}

/// Returns a hint for errno values that an administrator can act on.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EINVAL | libc::EOPNOTSUPP) => {
            "this kernel has no connection tracking over netlink (load the module nf_conntrack_netlink)"
        }
        _ => error::hint(error),
    }
}
