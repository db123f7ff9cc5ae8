//! Writes the tables of one engine.
//!
//! ```text
//!           engine is ready                      transaction failed
//! Listing ──────────────────> Synced ─────────────────────────────────> Unknown
//!    │   read, compare, write   ▲ │                                        │
//!    └─ nothing is written      │ └─ heal: the same, if others wrote       │
//!                               └──────── read, compare, write ────────────┘
//! ```
//!
//! Before the engine knows all objects, only its early rules ([`Engine::early_rules`]) are written.
//! The first write, and the one after a failure, compares with the kernel, in another thread if
//! there is one ([`comparison`](super::comparison)): rules of an earlier process remain in force
//! and are changed, never flushed. Objects that the kernel refuses even then go into quarantine,
//! all of one transaction at once, and the others are written.

use std::time::{Duration, Instant};

use super::kernel::Kernel;
use super::outcome::Outcome;
use super::reader::{PendingComparison, TableDifference};
use super::session::KernelSession;
use crate::engine::{BUDGET, Change, Engine};
use crate::model::{Notice, ObjectRef, Reason, Subject};
use crate::netlink::{Error, ErrorClass, Refusal};
use crate::nft::{ObjectPath, Ruleset, add_parts};

/// The most attempts to write a comparison, each with further objects in quarantine.
const MOST_ATTEMPTS: usize = 64;

/// The most readings of the tables in a row. Meanwhile no event is handled.
const MOST_READINGS: usize = 8;

/// What a driver knows about the rules in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DriverState {
    /// Waiting for the first complete lists.
    Listing,
    /// The kernel holds what was written.
    Synced,
    /// A write failed, and the kernel must be read again.
    Unknown,
}

/// Writes the tables of an engine.
#[derive(Debug)]
pub(crate) struct Driver<E: Engine> {
    pub(super) engine: E,
    pub(super) state: DriverState,
    budget: usize,
    /// Whether a comparison was attempted before.
    has_compared: bool,
    /// Whether the rules of complete lists were written before.
    has_written_all: bool,
    /// The early rules that were written last.
    early: Option<Ruleset>,
    /// Whether the last update left portions to write.
    more: bool,
    /// The comparison that another thread makes.
    pub(super) pending: Option<PendingComparison<E::Change>>,
    /// The changes that followers were not notified of. Added before a write, because steps of a failed
    /// one may be in force.
    change: E::Change,
    /// What the last calls did and how long it took. `None` if the rules are not in force.
    stats: Option<SyncStats>,
    /// A change of the tables by another process.
    foreign: ForeignChange,
    /// The last error of the kernel.
    failure: Option<String>,
}

/// What the last calls of a driver did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SyncStats {
    /// Whether anything was written.
    pub wrote: bool,
    /// Whether the tables were compared with the kernel.
    pub compared: bool,
    /// The time taken.
    pub took: Duration,
}

/// The result of a comparison.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Healed {
    /// The outcome; `None` if nothing was compared.
    pub outcome: Option<Outcome>,
    /// Whether something was restored, or could not be.
    pub changed: bool,
}

impl<E: Engine> Driver<E>
where
    E::Change: Send + 'static,
{
    /// Creates a driver that has written nothing.
    pub(crate) fn new(engine: E) -> Self {
        Self {
            engine,
            state: DriverState::Listing,
            budget: BUDGET,
            has_compared: false,
            has_written_all: false,
            early: None,
            more: false,
            pending: None,
            change: E::Change::default(),
            stats: None,
            foreign: ForeignChange::default(),
            failure: None,
        }
    }

    /// Sets the most elements of an update.
    pub(crate) fn set_budget(&mut self, elements: usize) {
        self.budget = elements;
    }

    /// Returns whether the rules of complete lists were written before.
    pub(crate) fn has_written_all(&self) -> bool {
        self.has_written_all
    }

    /// Returns the last error of the kernel, while the rules in force are unknown.
    pub(crate) fn failure(&self) -> Option<&str> {
        let failure = self.failure.as_deref();
        failure.filter(|_| self.state == DriverState::Unknown)
    }

    /// Returns whether portions wait for another call of [`Driver::work`].
    pub(crate) fn has_more(&self) -> bool {
        self.state == DriverState::Synced && self.more
    }

    /// Returns when [`Driver::work`] has something to do without an event.
    pub(crate) fn due(&self) -> Option<Instant> {
        // In other states the next attempt does it.
        self.engine
            .due()
            .filter(|_| self.state == DriverState::Synced)
    }

    /// Takes the changes since the last call, if all of them are in force.
    pub(crate) fn take_in_force(&mut self) -> Option<(SyncStats, E::Change)> {
        let stats = self.stats.take()?;
        Some((stats, std::mem::take(&mut self.change)))
    }

    /// Writes the changes since the last call, or compares everything if the rules in force are
    /// unknown.
    pub(crate) fn work<K: Kernel>(&mut self, kernel: &mut KernelSession<'_, K>) -> Outcome {
        if !self.engine.is_ready() && !self.is_comparing() {
            // The rules in force remain until the lists are complete.
            return match self.state {
                DriverState::Listing | DriverState::Unknown => self.write_early_rules(kernel),
                DriverState::Synced => Outcome::Synced,
            };
        }
        match self.state {
            DriverState::Listing | DriverState::Unknown => self.compare_elsewhere(kernel),
            DriverState::Synced => self.update(kernel),
        }
    }

    /// Adds the rules that must be in force before the lists are complete, unless they were written.
    fn write_early_rules<K: Kernel>(&mut self, kernel: &mut KernelSession<'_, K>) -> Outcome {
        let wanted = self.engine.early_rules();
        if wanted == self.early {
            return Outcome::Waiting;
        }
        let parts = wanted.clone().unwrap_or_default();
        let read = kernel.read(E::TABLE, &parts);
        let written = read.and_then(|actual| kernel.write(add_parts(&actual, parts), &mut 0));
        match written {
            Ok(()) => {
                self.early = wanted;
                Outcome::Waiting
            }
            Err(error) => {
                kernel.failed(&error);
                Outcome::Failed
            }
        }
    }

    /// Adds the early rules again while the lists are incomplete, since another process may have
    /// removed them. Returns the outcome if that failed.
    pub(crate) fn restore_early_rules<K: Kernel>(
        &mut self,
        kernel: &mut KernelSession<'_, K>,
    ) -> Option<Outcome> {
        let waits = self.state != DriverState::Synced && !self.is_comparing();
        if !waits || self.engine.is_ready() || self.early.take().is_none() {
            return None;
        }
        let outcome = self.write_early_rules(kernel);
        (outcome == Outcome::Failed).then_some(outcome)
    }

    fn update<K: Kernel>(&mut self, kernel: &mut KernelSession<'_, K>) -> Outcome {
        let started = Instant::now();
        let update = self.engine.update(self.budget);
        self.report_notices(kernel);
        self.more = update.more;
        self.change.append(update.change);
        let wrote = !update.transaction.is_empty();
        match kernel.write(update.transaction, &mut 0) {
            Ok(()) => {
                self.synced(SyncStats {
                    wrote,
                    compared: false,
                    took: started.elapsed(),
                });
                Outcome::Synced
            }
            Err(error) => self.write_failed(kernel, &error),
        }
    }

    /// Reports a failed write and compares with the kernel, since steps of the write may be in force.
    pub(crate) fn write_failed<K: Kernel>(
        &mut self,
        kernel: &mut KernelSession<'_, K>,
        error: &Error,
    ) -> Outcome {
        // The conflict may be due to another process, which has written something.
        if error.is_conflict() && !kernel.is_as_expected() {
            self.foreign.suspect();
        }
        self.failed(kernel, error);
        self.compare(kernel)
    }

    /// Compares everything with the kernel and writes the difference.
    ///
    /// Does nothing before the engine is ready.
    pub(crate) fn compare<K: Kernel>(&mut self, kernel: &mut KernelSession<'_, K>) -> Outcome {
        self.pending = None;
        if !self.engine.is_ready() {
            return Outcome::Waiting;
        }
        let started = Instant::now();
        self.rebuild(kernel);
        match self.attempt_all(kernel) {
            Ok(()) => {
                self.comparison_written(kernel, started);
                Outcome::Synced
            }
            Err(error) => {
                self.failed(kernel, &error);
                Outcome::Failed
            }
        }
    }

    /// Compiles everything that changed, before a comparison.
    pub(super) fn rebuild<K: Kernel>(&mut self, kernel: &KernelSession<'_, K>) {
        let first = !std::mem::replace(&mut self.has_compared, true);
        let change = self.engine.rebuild(first);
        self.change.append(change);
        self.report_notices(kernel);
    }

    /// Has everything compared when the lists that are being read again are complete. Until then the
    /// wanted rules are not known.
    pub(super) fn compare_when_listed(&mut self) {
        if self.state == DriverState::Synced && !self.engine.is_ready() {
            self.state = DriverState::Listing;
        }
    }

    /// Compares with the kernel after another process may have changed the tables, and restores them.
    pub(crate) fn heal<K: Kernel>(&mut self, kernel: &mut KernelSession<'_, K>) -> Healed {
        self.compare_when_listed();
        if self.state != DriverState::Synced {
            let restored = self.restore_early_rules(kernel);
            let restarted = restored.or_else(|| self.restart_comparison(kernel));
            // Nothing is compared here: the next attempt reads the tables anyway. `changed`
            // lengthens the pause before the next call, so that a process that keeps writing cannot
            // delay that attempt for ever.
            return Healed {
                outcome: restarted,
                changed: restarted.is_some(),
            };
        }
        // Changes that wait to be written must not count as foreign.
        let outcome = self.update(kernel);
        if outcome != Outcome::Synced {
            return Healed {
                outcome: Some(outcome),
                changed: true,
            };
        }
        let started = Instant::now();
        self.foreign.suspect();
        let wanted = self.engine.ruleset();
        let read = kernel.read(E::TABLE, &wanted);
        let written = read.and_then(|actual| {
            let difference = TableDifference::of::<E>(&actual, wanted);
            self.write(kernel, difference, &mut 0)
        });
        match written {
            Ok(0) => {
                self.foreign.take();
                Healed {
                    outcome: Some(Outcome::Synced),
                    changed: false,
                }
            }
            Ok(_) => {
                self.comparison_written(kernel, started);
                Healed {
                    outcome: Some(Outcome::Synced),
                    changed: true,
                }
            }
            Err(error) => Healed {
                outcome: Some(self.write_failed(kernel, &error)),
                changed: true,
            },
        }
    }

    /// Reads, compares and writes, repeatedly with refused objects in quarantine.
    fn attempt_all<K: Kernel>(&mut self, kernel: &mut KernelSession<'_, K>) -> Result<(), Error> {
        let mut conflict = None;
        let mut actual: Option<Ruleset> = None;
        let (mut attempts, mut readings) = (0, 0);
        loop {
            let wanted = self.engine.ruleset();
            let known = match actual.take() {
                Some(actual) => actual,
                None => {
                    readings += 1;
                    kernel.read(E::TABLE, &wanted)?
                }
            };
            let mut written = 0;
            let difference = TableDifference::of::<E>(&known, wanted);
            let Err(error) = self.write(kernel, difference, &mut written) else {
                return Ok(());
            };
            attempts += 1;
            if attempts > MOST_ATTEMPTS || readings > MOST_READINGS {
                return Err(error);
            }
            match self.evaluate_failure(&error, &mut conflict) {
                FailureAction::Quarantine(refused) => {
                    self.quarantine(kernel, &refused);
                    // If nothing was written, the tables have not changed since they were read.
                    actual = (written == 0).then_some(known);
                }
                FailureAction::ReadAgain => {}
                FailureAction::GiveUp => return Err(error),
            }
            kernel.metrics.failure();
        }
    }

    /// Decides what to do after a failed write. Another process may have caused a conflict after the
    /// tables were read, so that only the second conflict at the same path leads to quarantine.
    fn evaluate_failure(&self, error: &Error, before: &mut Option<ObjectPath>) -> FailureAction {
        let permanent = error
            .refusals()
            .filter(|it| it.class() == ErrorClass::Permanent);
        let mut found = self.blamed(permanent);
        if let Some(first) = error.refusals().next()
            && found.is_empty()
            && first.class() == ErrorClass::Conflict
        {
            if before.as_ref() != Some(&first.path) {
                *before = Some(first.path.clone());
                return FailureAction::ReadAgain;
            }
            found = self.blamed([first]);
        }
        if found.is_empty() {
            FailureAction::GiveUp
        } else {
            FailureAction::Quarantine(found)
        }
    }

    /// Returns the objects to blame for refusals, without duplicates, each with the reason.
    fn blamed<'a>(
        &self,
        refusals: impl IntoIterator<Item = &'a Refusal>,
    ) -> Vec<(ObjectRef, String)> {
        let refusals: Vec<&Refusal> = refusals.into_iter().collect();
        let paths: Vec<&ObjectPath> = refusals.iter().map(|refusal| &refusal.path).collect();
        let mut found: Vec<(ObjectRef, String)> = Vec::new();
        for (index, object) in self.engine.blame(&paths) {
            if let Some(refusal) = refusals.get(index)
                && found.iter().all(|(other, _)| *other != object)
            {
                found.push((object, format!("the kernel refused {refusal}")));
            }
        }
        found
    }

    fn quarantine<K: Kernel>(
        &mut self,
        kernel: &KernelSession<'_, K>,
        refused: &[(ObjectRef, String)],
    ) {
        for (object, why) in refused {
            let change = self.engine.quarantine(object);
            self.change.append(change);
            kernel.report(&Notice {
                subject: Subject::Object(object.clone()),
                reason: Reason::KernelRefused,
                message: format!("{why}; {}", E::in_quarantine(object.kind)),
            });
        }
    }

    /// Writes the difference and returns the number of operations. `written` counts the steps that took
    /// effect.
    pub(super) fn write<K: Kernel>(
        &mut self,
        kernel: &mut KernelSession<'_, K>,
        difference: TableDifference<E::Change>,
        written: &mut usize,
    ) -> Result<usize, Error> {
        // If a later step fails, the next comparison does not show what earlier steps removed.
        self.change.append(difference.change);
        let operations = difference.transaction.ops.len();
        self.foreign.found(operations);
        kernel.write(difference.transaction, written)?;
        Ok(operations)
    }

    pub(super) fn comparison_written<K: Kernel>(
        &mut self,
        kernel: &KernelSession<'_, K>,
        started: Instant,
    ) {
        let operations = self.foreign.take();
        if operations > 0 {
            report_healing(kernel, E::TABLE, operations, started.elapsed());
        }
        // Followers may not know the changes of an earlier attempt or process.
        self.change.set_rewritten();
        // Events may be waiting.
        self.more = true;
        self.synced(SyncStats {
            wrote: true,
            compared: true,
            took: started.elapsed(),
        });
    }

    fn synced(&mut self, now: SyncStats) {
        self.state = DriverState::Synced;
        self.has_written_all = true;
        self.failure = None;
        let before = self.stats.take();
        self.stats = Some(before.map_or(now, |before| SyncStats {
            wrote: before.wrote || now.wrote,
            compared: before.compared || now.compared,
            took: before.took + now.took,
        }));
    }

    pub(super) fn failed<K: Kernel>(&mut self, kernel: &KernelSession<'_, K>, error: &Error) {
        kernel.failed(error);
        self.state = DriverState::Unknown;
        self.stats = None;
        self.failure = Some(error.to_string());
    }

    fn report_notices<K: Kernel>(&mut self, kernel: &KernelSession<'_, K>) {
        for notice in self.engine.take_notices() {
            kernel.report(&notice);
        }
    }
}

/// The reaction to a failed write.
enum FailureAction {
    /// Put these objects into quarantine, each with the reason.
    Quarantine(Vec<(ObjectRef, String)>),
    /// Read the tables again: another process may have written to them.
    ReadAgain,
    /// Return the error: no object is at fault.
    GiveUp,
}

/// A change of the tables by another process that is not restored yet.
///
/// Differences after a failed write do not count, since they may be nftlet's own.
#[derive(Debug, Default)]
enum ForeignChange {
    #[default]
    None,
    /// Another process may have changed something.
    Suspected,
    /// It takes this number of operations to restore the tables.
    Found(usize),
}

impl ForeignChange {
    /// Records that another process may have changed something.
    fn suspect(&mut self) {
        if let Self::None = self {
            *self = Self::Suspected;
        }
    }

    /// Records the operations of a comparison, unless they may be nftlet's own.
    fn found(&mut self, operations: usize) {
        if let Self::Suspected = self
            && operations > 0
        {
            *self = Self::Found(operations);
        }
    }

    /// Returns and resets the number of operations.
    fn take(&mut self) -> usize {
        match std::mem::take(self) {
            Self::None | Self::Suspected => 0,
            Self::Found(operations) => operations,
        }
    }
}

/// Counts and reports operations that restored the tables.
fn report_healing<K: Kernel>(
    kernel: &KernelSession<'_, K>,
    table: &str,
    operations: usize,
    took: Duration,
) {
    kernel.metrics.healed(operations);
    kernel.report(&Notice {
        subject: Subject::Other(format!("table {table}").into()),
        reason: Reason::ForeignChange,
        message: format!(
            "modified by another process; restored ({operations} operations, {took:.1?}); find the \
             process with nft monitor"
        ),
    });
}
