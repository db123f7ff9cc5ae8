//! Changes that others make to tables.
//!
//! The kernel tells every socket of a group about each committed change. A filter in the kernel
//! drops what nftlet itself wrote before it is queued, so that writing a hundred thousand
//! elements does not overflow the queue with nftlet's own news.

use super::error::Error;
use super::nftables::Nftables;
use super::socket::{Message, Socket};

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
        Ok(Self { socket, tables })
    }

    /// Begins to listen.
    ///
    /// From now on the kernel composes news of every change, its own socket's too before the
    /// filter drops them: writing a hundred thousand elements takes twice as long. So this is
    /// for after the first program.
    ///
    /// # Errors
    ///
    /// [`Error::Open`] when the group cannot be joined.
    pub fn listen(&self) -> Result<(), Error> {
        let failed = |source| Error::Open { what: WHAT, source };
        self.socket.join(GROUP).map_err(failed)
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
