//! The interface that the engines for services and for network policies have in common.
//!
//! An [`Engine`] turns events into rules. It performs no I/O and has neither threads nor metrics. A
//! driver writes the rules, compares them with the kernel, and hands each change to the followers
//! once it is in force.
//!
//! ```text
//! events ─> apply ─> marks ─> update(budget) ─> Transaction ─> kernel
//!                                          └──> Change ──────> followers, when it is in force
//! ```

#![warn(missing_docs)]

use std::time::Instant;

pub(crate) use shared_map::SharedMap;

use crate::model::{self, Event, Kind, Notice, ObjectRef};
use crate::nft::{self, ObjectPath, Ruleset, Transaction};

mod shared_map;

/// The approximate number of set elements that one transaction deletes and adds, where a change can
/// be divided. While the kernel processes a transaction, no other transaction runs and no event is
/// handled.
pub const BUDGET: usize = 2_000;

/// Returns the family of the tables for an address family.
pub(crate) fn table_family(family: model::Family) -> nft::TableFamily {
    match family {
        model::Family::V4 => nft::TableFamily::Ip,
        model::Family::V6 => nft::TableFamily::Ip6,
    }
}

/// A function that compiles a ruleset.
pub type Compile = Box<dyn FnOnce() -> Ruleset + Send>;

/// Compiles objects into the rules of its tables.
pub trait Engine {
    /// The part of an update that followers need.
    type Change: Change;

    /// The name of its tables; there is one for each address family.
    const TABLE: &'static str;

    /// Returns the effect of quarantine on an object of a kind, for messages.
    fn in_quarantine(kind: Kind) -> &'static str;

    /// Applies an event. Ignores events about kinds of other engines.
    fn apply(&mut self, event: &Event);

    /// Returns whether all kinds are listed completely, so that the rules may be written.
    fn is_ready(&self) -> bool;

    /// Returns the kinds that are not listed completely.
    fn missing(&self) -> Vec<Kind>;

    /// Returns the number of known objects of a kind; 0 for kinds of other engines.
    fn count(&self, kind: Kind) -> usize;

    /// Returns the rules that must be in force before all kinds are listed, if any. They are added to
    /// those of an earlier process: chains and sets that are not among them stay, and so do the
    /// elements of sets that have none here.
    fn early_rules(&self) -> Option<Ruleset> {
        None
    }

    /// Compiles what changed since the last call, up to about `budget` elements, and returns the
    /// operations that bring the tables from the state after the last call to the new one.
    fn update(&mut self, budget: usize) -> Update<Self::Change>;

    /// Compiles everything that changed at once, before a comparison of the whole tables with the
    /// kernel. `first` says that this is the first comparison, so that rules of an earlier process
    /// may be in force.
    fn rebuild(&mut self, first: bool) -> Self::Change;

    /// Returns the rules that all transactions so far add up to.
    fn ruleset(&self) -> Ruleset;

    /// Returns a function that compiles what [`Engine::ruleset`] returns now, for another thread. The
    /// objects are shared; the cost grows with the chains only.
    fn snapshot(&self) -> Compile;

    /// Returns what the transaction of a comparison changes in rules that this process did not
    /// write.
    fn changes_of_foreign_rules(actual: &Ruleset, transaction: &Transaction) -> Self::Change {
        let _ = (actual, transaction);
        Self::Change::default()
    }

    /// Returns the objects to which refused nftables objects belong, each with the index of the
    /// refused one, in order. Objects in quarantine are left out.
    fn blame(&self, refused: &[&ObjectPath]) -> Vec<(usize, ObjectRef)>;

    /// Compiles an object to rules that the kernel accepts, until it changes or
    /// [`Engine::retry_quarantined`] is called.
    fn quarantine(&mut self, object: &ObjectRef) -> Self::Change;

    /// Ends the quarantine of all objects; the next update compiles them.
    fn retry_quarantined(&mut self);

    /// Returns when [`Engine::update`] has something to do without an event.
    fn due(&self) -> Option<Instant>;

    /// Returns the notices about objects since the last call.
    fn take_notices(&mut self) -> Vec<Notice>;
}

/// A change of the rules. Changes that take effect together are appended to each other.
pub trait Change: Default {
    /// Adds a later change.
    fn append(&mut self, later: Self);

    /// Marks the change as the result of a comparison of the whole tables, before which other rules
    /// may have been in force.
    fn set_rewritten(&mut self);
}

/// The result of [`Engine::update`].
#[derive(Debug, Default)]
pub struct Update<C> {
    /// The operations.
    pub transaction: Transaction,
    /// The change that they make.
    pub change: C,
    /// Whether another call has something to do.
    pub more: bool,
}
