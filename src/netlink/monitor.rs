//! Notifications about changes that other processes make to tables.
//!
//! The kernel notifies every socket of a multicast group of each committed change. A socket filter
//! drops notifications about nftlet's own changes before they are queued, so that writing a hundred
//! thousand elements does not overflow the queue.
//!
//! The kernel still builds the dropped notifications, which doubles the time of a large write.
//! Therefore the monitor leaves the group during large writes ([`MutedMonitor`]). Whether another
//! process wrote meanwhile shows in the number of commits ([`Nftables::generation`]).

use std::io;
use std::sync::{Arc, Mutex};

use super::error::Error;
use super::mute::{MutedMonitor, Subscription};
use super::nftables::Nftables;
use super::socket::{Message, Socket};
use crate::mutex::lock;

/// The kernel's `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;
/// The attribute that names the table; it has the same number in every message about tables,
/// chains, rules, sets and elements.
const ATTR_TABLE: u16 = 1;
const WHAT: &str = "nftables notifications";

/// Receives notifications about changes that other processes make to some tables.
pub struct Monitor {
    socket: Option<Socket>,
    tables: &'static [&'static str],
    /// The netlink port whose changes are ignored.
    own: u32,
    subscription: Arc<Mutex<Subscription>>,
}

/// What a [`Monitor`] received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notification {
    /// Another process changed one of the tables.
    Changed,
    /// Notifications were lost: the queue overflowed, or the monitor had left the group.
    Lost,
}

impl Monitor {
    /// Creates a monitor of the tables with these names that ignores the changes of `own`. It does
    /// not receive anything before [`Monitor::listen`], which decides on the network namespace.
    pub fn new(tables: &'static [&'static str], own: &Nftables) -> Self {
        Self {
            socket: None,
            tables,
            own: own.port(),
            subscription: Arc::default(),
        }
    }

    /// Returns the handle that mutes the monitor during large writes; see
    /// [`Nftables::mute_during_large_writes`].
    pub fn muted(&self) -> MutedMonitor {
        MutedMonitor::new(self.subscription.clone())
    }

    /// Joins the group with a new socket. Compare [`Nftables::generation`] to find out about earlier
    /// changes.
    ///
    /// # Errors
    ///
    /// [`Error::Open`] when the socket cannot be opened or the group cannot be joined.
    pub fn listen(&mut self) -> Result<(), Error> {
        let failed = |source| Error::Open { what: WHAT, source };
        lock(&self.subscription).membership = None;
        let socket = Socket::open(WHAT)?;
        socket.ignore_port(self.own).map_err(failed)?;
        let membership = socket.membership(GROUP).map_err(failed)?;
        membership.join().map_err(failed)?;
        self.socket = Some(socket);
        *lock(&self.subscription) = Subscription {
            membership: Some(membership),
            left: false,
        };
        Ok(())
    }

    /// Waits for the next notification.
    ///
    /// # Errors
    ///
    /// [`Error::Receive`] when the socket fails, or there is none. Call [`Monitor::listen`] again.
    pub fn wait(&mut self) -> Result<Notification, Error> {
        let failed = |source| Error::Receive { what: WHAT, source };
        let tables = self.tables;
        let Some(socket) = &mut self.socket else {
            return Err(failed(io::ErrorKind::NotConnected.into()));
        };
        loop {
            if lock(&self.subscription).rejoin_if_left() {
                return Ok(Notification::Lost);
            }
            let mut changed = false;
            let received = socket.listen(|message| {
                changed |= changes_one_of(&message, tables);
            });
            match received {
                Ok(()) if changed => return Ok(Notification::Changed),
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Ok(Notification::Lost);
                }
                Err(source) => return Err(failed(source)),
            }
        }
    }
}

fn changes_one_of(message: &Message, tables: &[&str]) -> bool {
    let subsystem = i32::from(message.kind >> 8);
    // The notification at the end of each transaction names no table.
    let generation = libc::NFT_MSG_NEWGEN;
    if subsystem != libc::NFNL_SUBSYS_NFTABLES || i32::from(message.kind & 0xff) == generation {
        return false;
    }
    let table = message.attributes().string(ATTR_TABLE);
    table.is_some_and(|table| tables.contains(&table))
}
