//! What the two parts of the rules, services and network policies, have in common.
//!
//! An [`Engine`] turns events into rules. It performs no I/O and knows neither threads nor metrics. A
//! driver writes what it compiles, compares it with the kernel, and hands what changed to the followers
//! once the rules are in force.
//!
//! ```text
//! events ─> apply ─> marks ─> update(budget) ─> Transaction ─> kernel
//!                                          └──> Change ──────> followers, when it is in force
//! ```

use std::time::Instant;

use crate::model::{self, Event, Kind, Notice, ObjectRef};
use crate::nft::{self, ObjectPath, Ruleset, Transaction};

/// About how many elements a transaction deletes and adds, where it can be chosen. The kernel lets no
/// other transaction in meanwhile, and no event is handled.
pub const BUDGET: usize = 2_000;

/// Returns the family of the tables for an address family.
pub(crate) fn table_family(family: model::Family) -> nft::Family {
    match family {
        model::Family::V4 => nft::Family::Ip,
        model::Family::V6 => nft::Family::Ip6,
    }
}

/// A part of the rules, compiled from objects.
pub trait Engine {
    /// What an update changes, as far as followers need it.
    type Change: Change;

    /// The name of its tables, one for each address family.
    const TABLE: &'static str;

    /// What becomes of an object in quarantine, for messages.
    const QUARANTINE: &'static str;

    /// Takes over an event. Events about other kinds are ignored.
    fn apply(&mut self, event: &Event);

    /// Whether the rules may be written: all kinds are known completely.
    fn is_ready(&self) -> bool;

    /// Returns the kinds that are not listed completely.
    fn missing(&self) -> Vec<Kind>;

    /// Returns the number of known objects of a kind; 0 for kinds of other engines.
    fn count(&self, kind: Kind) -> usize;

    /// Compiles what changed since the last call, up to about `budget` elements, and returns the
    /// operations that lead there from what the last call gave.
    fn update(&mut self, budget: usize) -> Update<Self::Change>;

    /// Compiles everything that changed at once, for a comparison of the whole. `first` says that
    /// it is unknown what an earlier process has written.
    fn rebuild(&mut self, first: bool) -> Self::Change;

    /// Returns the rules that all transactions so far amount to.
    fn ruleset(&self) -> Ruleset;

    /// Returns what a comparison is about to change of rules that this process has not written.
    fn compared(&self, actual: &Ruleset, transaction: &Transaction) -> Self::Change {
        let _ = (actual, transaction);
        Self::Change::default()
    }

    /// Returns the objects to which something belongs that the kernel refused. Objects in quarantine
    /// are not among them.
    fn blame(&self, refused: &ObjectPath) -> Vec<ObjectRef>;

    /// Compiles an object in such a way that the kernel accepts it, until it changes or
    /// [`Engine::retry_quarantined`] is called.
    fn quarantine(&mut self, object: &ObjectRef) -> Self::Change;

    /// Compiles the objects in quarantine as they are with the next update.
    fn retry_quarantined(&mut self);

    /// Returns when [`Engine::update`] has something to do although no event came.
    fn due(&self) -> Option<Instant>;

    /// Returns what was found about objects since the last call.
    fn take_notices(&mut self) -> Vec<Notice>;
}

/// What changed in the rules. Changes that take effect together are appended to each other.
pub trait Change: Default {
    /// Adds a later change.
    fn append(&mut self, later: Self);

    /// Notes that the tables were compared as a whole and may have been different before.
    fn set_rewritten(&mut self);
}

/// A step towards the wanted rules.
#[derive(Debug, Default)]
pub struct Update<C> {
    /// The operations.
    pub transaction: Transaction,
    /// What they change.
    pub change: C,
    /// Whether more waits for another call.
    pub more: bool,
}
