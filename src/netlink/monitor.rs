//! Changes that others make to tables.
//!
//! The kernel tells every socket of a group about each committed change. A filter in the kernel
//! drops what nftlet itself wrote before it is queued, so that writing a hundred thousand
//! elements does not overflow the queue with nftlet's own news.
//!
//! The news are composed before they are dropped, which makes a large write take twice as long.
//! So the monitor leaves the group while its owner writes a lot ([`Absence`]); whether others
//! wrote meanwhile is seen from the number of commits ([`Nftables::generation`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::error::Error;
use super::nftables::Nftables;
use super::socket::{Membership, Message, Socket};

/// The kernel's `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;
/// The attribute that names the table; it has the same number in every message about tables,
/// chains, rules, sets and elements.
const ATTR_TABLE: u16 = 1;
const WHAT: &str = "nftables notifications";

/// Hears of changes that others make to some tables.
pub struct Monitor {
    socket: Socket,
    tables: &'static [&'static str],
    listening: Arc<AtomicBool>,
}

/// Takes a [`Monitor`] out of the kernel's audience for a while.
#[derive(Debug)]
pub struct Absence {
    membership: Membership,
    listening: Arc<AtomicBool>,
}

impl Absence {
    /// Nothing is composed for the monitor from now on; false if it did not listen before.
    pub(super) fn begin(&self) -> bool {
        self.listening.load(Ordering::Acquire) && self.membership.leave().is_ok()
    }

    /// The monitor hears again what happens from now on.
    pub(super) fn end(&self) -> Result<(), Error> {
        let failed = |source| Error::Open { what: WHAT, source };
        self.membership.join().map_err(failed)
    }
}

/// What a [`Monitor`] heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Somebody else changed one of the tables.
    Change,
    /// News were lost, because there were more than the queue holds.
    Lost,
}

impl Monitor {
    /// Prepares to listen, in the current network namespace, for changes to the tables of these
    /// names that come from anyone but `own`.
    ///
    /// # Errors
    ///
    /// [`Error::Open`] when the socket cannot be opened.
    pub fn open(tables: &'static [&'static str], own: &Nftables) -> Result<Self, Error> {
        let socket = Socket::open(WHAT)?;
        let failed = |source| Error::Open { what: WHAT, source };
        socket.ignore_port(own.port()).map_err(failed)?;
        Ok(Self {
            socket,
            tables,
            listening: Arc::default(),
        })
    }

    /// What keeps the kernel from composing news for this monitor, for whoever writes a lot; see
    /// [`Nftables::write_unheard_by`].
    ///
    /// # Errors
    ///
    /// [`Error::Open`] when there are no descriptors left.
    pub fn absence(&self) -> Result<Absence, Error> {
        let failed = |source| Error::Open { what: WHAT, source };
        Ok(Absence {
            membership: self.socket.membership(GROUP).map_err(failed)?,
            listening: self.listening.clone(),
        })
    }

    /// Begins to listen.
    ///
    /// What happened before is not heard: ask [`Nftables::generation`].
    ///
    /// # Errors
    ///
    /// [`Error::Open`] when the group cannot be joined.
    pub fn listen(&self) -> Result<(), Error> {
        let failed = |source| Error::Open { what: WHAT, source };
        let membership = self.socket.membership(GROUP).map_err(failed)?;
        membership.join().map_err(failed)?;
        self.listening.store(true, Ordering::Release);
        Ok(())
    }

    /// Waits until something is heard.
    ///
    /// # Errors
    ///
    /// [`Error::Receive`] when the socket does not work any more.
    pub fn wait(&mut self) -> Result<Heard, Error> {
        let tables = self.tables;
        loop {
            let mut concerns = false;
            let received = self.socket.listen(|message| {
                concerns |= changes_one_of(&message, tables);
            });
            match received {
                Ok(()) if concerns => return Ok(Heard::Change),
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Ok(Heard::Lost);
                }
                Err(source) => {
                    return Err(Error::Receive { what: WHAT, source });
                }
            }
        }
    }
}

fn changes_one_of(message: &Message, tables: &[&str]) -> bool {
    let subsystem = i32::from(message.kind >> 8);
    // The end of each transaction is told too; it names no table.
    let generation = libc::NFT_MSG_NEWGEN;
    if subsystem != libc::NFNL_SUBSYS_NFTABLES || i32::from(message.kind & 0xff) == generation {
        return false;
    }
    let table = message.attributes().string(ATTR_TABLE);
    table.is_some_and(|table| tables.contains(&table))
}
