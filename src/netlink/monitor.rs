//! Changes that others make to tables.
//!
//! The kernel tells every socket of a group about each committed change. A filter in the kernel
//! drops what nftlet itself wrote before it is queued, so that writing a hundred thousand
//! elements does not overflow the queue with nftlet's own news.
//!
//! The news are composed before they are dropped, which makes a large write take twice as long.
//! So the monitor leaves the group while its owner writes a lot ([`Absence`]); whether others
//! wrote meanwhile is seen from the number of commits ([`Nftables::generation`]).

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    socket: Option<Socket>,
    tables: &'static [&'static str],
    /// The port whose changes are no news.
    own: u32,
    seat: Arc<Mutex<Seat>>,
}

/// Takes a [`Monitor`] out of the kernel's audience for a while.
#[derive(Debug)]
pub struct Absence(Arc<Mutex<Seat>>);

/// The place of a monitor in the kernel's audience.
#[derive(Debug, Default)]
struct Seat {
    /// That of the socket which listens; `None` while none does.
    membership: Option<Membership>,
    /// The group could not be joined again.
    lost: bool,
}

impl Seat {
    /// Leaves the group. Returns whether the monitor misses from now on what happens.
    fn leave(&mut self) -> bool {
        let membership = self.membership.as_ref();
        self.lost || membership.is_some_and(|membership| membership.leave().is_ok())
    }

    /// Joins the group again. A failure concerns nothing but the news: it is tried again with each
    /// write, and by the monitor.
    fn join(&mut self) {
        let membership = self.membership.as_ref();
        self.lost = membership.is_some_and(|membership| membership.join().is_err());
    }

    /// Joins the group again where this failed before. Returns whether it succeeded now.
    fn regain(&mut self) -> bool {
        let lost = self.lost;
        if lost {
            self.join();
        }
        lost && !self.lost
    }
}

fn lock(seat: &Mutex<Seat>) -> MutexGuard<'_, Seat> {
    seat.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Absence {
    /// Has the kernel compose no news for the monitor from now on. Returns false if it did not
    /// listen before.
    pub(super) fn begin(&self) -> bool {
        lock(&self.0).leave()
    }

    /// Whether the monitor hears nothing since an absence, because it could not come back.
    pub(super) fn lasts(&self) -> bool {
        lock(&self.0).lost
    }

    /// Lets the monitor hear again what happens from now on.
    pub(super) fn end(&self) {
        lock(&self.0).join();
    }
}

/// What a [`Monitor`] heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Somebody else changed one of the tables.
    Change,
    /// News were lost: there were more than the queue holds, or the monitor was kept away.
    Lost,
}

impl Monitor {
    /// Prepares to listen, in the network namespace of the thread that calls
    /// [`Monitor::listen`], for changes to the tables of these names that come from anyone but
    /// `own`.
    pub fn new(tables: &'static [&'static str], own: &Nftables) -> Self {
        Self {
            socket: None,
            tables,
            own: own.port(),
            seat: Arc::default(),
        }
    }

    /// Returns what leaves the group during large writes, so that the kernel composes no news; see
    /// [`Nftables::write_unheard_by`].
    pub fn absence(&self) -> Absence {
        Absence(self.seat.clone())
    }

    /// Begins to listen, with a new socket. What happened before is not heard: ask
    /// [`Nftables::generation`].
    ///
    /// # Errors
    ///
    /// [`Error::Open`] when the socket cannot be opened or the group cannot be joined.
    pub fn listen(&mut self) -> Result<(), Error> {
        let failed = |source| Error::Open { what: WHAT, source };
        lock(&self.seat).membership = None;
        let socket = Socket::open(WHAT)?;
        socket.ignore_port(self.own).map_err(failed)?;
        let membership = socket.membership(GROUP).map_err(failed)?;
        membership.join().map_err(failed)?;
        self.socket = Some(socket);
        *lock(&self.seat) = Seat {
            membership: Some(membership),
            lost: false,
        };
        Ok(())
    }

    /// Waits until something is heard.
    ///
    /// # Errors
    ///
    /// [`Error::Receive`] when the socket does not work any more, or there is none:
    /// [`Monitor::listen`] again.
    pub fn wait(&mut self) -> Result<Heard, Error> {
        let failed = |source| Error::Receive { what: WHAT, source };
        let tables = self.tables;
        let Some(socket) = &mut self.socket else {
            return Err(failed(io::ErrorKind::NotConnected.into()));
        };
        loop {
            if lock(&self.seat).regain() {
                return Ok(Heard::Lost);
            }
            let mut concerns = false;
            let received = socket.listen(|message| {
                concerns |= changes_one_of(&message, tables);
            });
            match received {
                Ok(()) if concerns => return Ok(Heard::Change),
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Ok(Heard::Lost);
                }
                Err(source) => return Err(failed(source)),
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A group of another part of the kernel, which anybody may join, and one that does not exist.
    const FREE: u32 = 1;
    const ABSENT: u32 = 9_999;

    fn seat(group: u32) -> Membership {
        let socket = Socket::open_on(mnl::Bus::Route, "a test").unwrap();
        socket.membership(group).unwrap()
    }

    #[test]
    fn a_group_that_cannot_be_joined_again_is_joined_later() {
        let shared = Arc::new(Mutex::new(Seat::default()));
        let absence = Absence(shared.clone());
        assert!(!absence.begin(), "nobody listens");
        absence.end();
        assert!(!absence.lasts());
        lock(&shared).membership = Some(seat(FREE));
        assert!(absence.begin());
        lock(&shared).membership = Some(seat(ABSENT));
        absence.end();
        assert!(absence.lasts());
        assert!(!lock(&shared).regain());
        assert!(absence.begin(), "it hears nothing in the next write, too");
        lock(&shared).membership = Some(seat(FREE));
        assert!(lock(&shared).regain(), "it missed something");
        assert!(!lock(&shared).regain(), "it has missed nothing since");
        assert!(!absence.lasts());
    }
}
