//! Notifications about the host's routes.

use super::error::Error;
use super::socket::Socket;

/// The kernel's `RTNLGRP_LINK`, `RTNLGRP_IPV4_ROUTE` and `RTNLGRP_IPV6_ROUTE`. An interface that goes
/// down or away takes its IPv4 routes along without a notification about each.
const GROUPS: [u32; 3] = [1, 7, 11];
const WHAT: &str = "notifications about routes";

/// Receives notifications about changes of routes and interfaces.
pub struct RouteMonitor(Socket);

impl RouteMonitor {
    /// Begins to listen in the current network namespace.
    ///
    /// # Errors
    ///
    /// [`Error::Open`] when the socket cannot be opened or a group cannot be joined.
    pub fn open() -> Result<Self, Error> {
        let failed = |source| Error::Open { what: WHAT, source };
        let socket = Socket::open_on(mnl::Bus::Route, WHAT)?;
        for group in GROUPS {
            let membership = socket.membership(group).map_err(failed)?;
            membership.join().map_err(failed)?;
        }
        Ok(Self(socket))
    }

    /// Waits until routes or interfaces may have changed, and discards all notifications that have
    /// arrived. Whether the kernel dropped some of them makes no difference.
    ///
    /// # Errors
    ///
    /// [`Error::Receive`] when the socket does not work any more.
    pub fn wait(&mut self) -> Result<(), Error> {
        let failed = |source| Error::Receive { what: WHAT, source };
        let mut changed = false;
        while !changed {
            match self.0.listen(|_| changed = true) {
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => break,
                received => received.map_err(failed)?,
            }
        }
        self.0.discard().map_err(failed)
    }
}
