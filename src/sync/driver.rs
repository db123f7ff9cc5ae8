//! Keeps the tables of one engine as it wants them.
//!
//! ```text
//!           engine is ready                      transaction failed
//! Listing ──────────────────> Synced ─────────────────────────────────> Unknown
//!    │   read, compare, write   ▲ │                                        │
//!    └─ nothing is written      │ └─ heal: the same, if others wrote       │
//!                               └──────── read, compare, write ────────────┘
//! ```
//!
//! Nothing is written before the engine knows all objects. The first write, and the one after a
//! failure, compares with what the kernel holds: rules of an earlier process stay in force and are
//! changed, never flushed. Objects that the kernel refuses even then go into quarantine, all of a
//! transaction at once, and the others are written.

use std::time::{Duration, Instant};

use super::session::KernelSession;
use super::{Kernel, Outcome};
use crate::engine::{BUDGET, Change, Engine};
use crate::model::{Notice, ObjectRef, Reason, Subject};
use crate::netlink::{Error, ErrorClass, Refusal};
use crate::nft::{ObjectPath, Ruleset, diff};

/// The most attempts to write a comparison, each with further objects in quarantine.
const MOST_ATTEMPTS: usize = 64;

/// How far the kernel is known to agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Waiting for the first complete lists.
    Listing,
    /// The kernel holds what was written.
    Synced,
    /// A write failed; the kernel must be read again.
    Unknown,
}

/// Keeps the tables of an engine as it wants them.
#[derive(Debug)]
pub struct Driver<E: Engine> {
    pub(super) engine: E,
    pub(super) state: State,
    budget: usize,
    /// Whether a comparison was attempted.
    begun: bool,
    /// Whether rules of complete lists were written once.
    written: bool,
    /// The last update left more to be done.
    more: bool,
    /// What changed since followers were last handed something. This is noted before a write,
    /// because steps of one that fails may be in force.
    change: E::Change,
    /// What the last calls achieved, for metrics and followers.
    in_force: Option<InForce>,
    /// What other programs changed in the tables.
    foreign: ForeignChange,
    /// The last error of the kernel.
    failure: Option<String>,
}

/// How the wanted rules came to be in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InForce {
    /// Anything was written.
    pub wrote: bool,
    /// The tables were compared with the kernel.
    pub compared: bool,
    /// The time it took.
    pub took: Duration,
}

/// What a comparison achieved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Healed {
    /// The outcome; `None` if nothing was compared.
    pub outcome: Option<Outcome>,
    /// Something was put back, or could not be.
    pub changed: bool,
}

impl<E: Engine> Driver<E> {
    /// Creates a driver that has written nothing.
    pub fn new(engine: E) -> Self {
        Self {
            engine,
            state: State::Listing,
            budget: BUDGET,
            begun: false,
            written: false,
            more: false,
            change: E::Change::default(),
            in_force: None,
            foreign: ForeignChange::default(),
            failure: None,
        }
    }

    /// Sets the number of elements of an update.
    pub fn set_budget(&mut self, elements: usize) {
        self.budget = elements;
    }

    /// Returns the engine.
    pub fn engine(&self) -> &E {
        &self.engine
    }

    /// Returns the state.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether rules of complete lists were written once.
    pub fn has_written(&self) -> bool {
        self.written
    }

    /// Returns the last error of the kernel, if it is unknown what is in force.
    pub fn failure(&self) -> Option<&str> {
        let failure = self.failure.as_deref();
        failure.filter(|_| self.state == State::Unknown)
    }

    /// Whether an update waits for another call of [`Driver::work`].
    pub fn has_more(&self) -> bool {
        self.state == State::Synced && self.more
    }

    /// Returns when [`Driver::work`] has something to do although no event came.
    pub fn due(&self) -> Option<Instant> {
        // Otherwise the next attempt does it.
        self.engine.due().filter(|_| self.state == State::Synced)
    }

    /// Takes what changed since the last call, if all of it is in force.
    pub fn take_in_force(&mut self) -> Option<(InForce, E::Change)> {
        let in_force = self.in_force.take()?;
        Some((in_force, std::mem::take(&mut self.change)))
    }

    /// Writes what changed since the last call, or compares everything if it is not known what is in
    /// force.
    pub fn work<K: Kernel>(&mut self, kernel: &mut KernelSession<'_, K>) -> Outcome {
        if !self.engine.is_ready() {
            // What is in force stays so until the lists are complete.
            return match self.state {
                State::Listing | State::Unknown => Outcome::Waiting,
                State::Synced => Outcome::Synced,
            };
        }
        match self.state {
            State::Listing | State::Unknown => self.compare(kernel),
            State::Synced => self.update(kernel),
        }
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
                self.synced(InForce {
                    wrote,
                    compared: false,
                    took: started.elapsed(),
                });
                Outcome::Synced
            }
            Err(error) => self.write_failed(kernel, &error),
        }
    }

    /// Reports a failed write and compares with what the kernel holds, since steps of the write may
    /// be in force.
    pub fn write_failed<K: Kernel>(
        &mut self,
        kernel: &mut KernelSession<'_, K>,
        error: &Error,
    ) -> Outcome {
        // It does not fit what the tables hold, and another program has written something.
        if error.is_conflict() && !kernel.is_as_expected() {
            self.foreign.suspect();
        }
        self.failed(kernel, error);
        self.compare(kernel)
    }

    /// Compares everything with what the kernel holds and writes the difference.
    ///
    /// Does nothing before the engine is ready.
    pub fn compare<K: Kernel>(&mut self, kernel: &mut KernelSession<'_, K>) -> Outcome {
        if !self.engine.is_ready() {
            return Outcome::Waiting;
        }
        let started = Instant::now();
        let first = !std::mem::replace(&mut self.begun, true);
        let change = self.engine.rebuild(first);
        self.change.append(change);
        self.report_notices(kernel);
        match self.attempt_all(kernel) {
            Ok(()) => {
                self.compared(kernel, started);
                Outcome::Synced
            }
            Err(error) => {
                self.failed(kernel, &error);
                Outcome::Failed
            }
        }
    }

    /// Compares with what the kernel holds after another program changed the tables, and puts back
    /// what it changed.
    pub fn heal<K: Kernel>(&mut self, kernel: &mut KernelSession<'_, K>) -> Healed {
        if self.state == State::Synced && !self.engine.is_ready() {
            // What is wanted is known when the lists are complete.
            self.state = State::Listing;
        }
        if self.state != State::Synced {
            // The next attempt compares anyway.
            return Healed::default();
        }
        // What waits to be written is no change of others.
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
        let written =
            read.and_then(|actual| self.write_difference(kernel, &actual, wanted, &mut 0));
        match written {
            Ok(0) => {
                self.foreign.put_back();
                Healed {
                    outcome: Some(Outcome::Synced),
                    changed: false,
                }
            }
            Ok(_) => {
                self.compared(kernel, started);
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

    /// Reads, compares, writes; again with those objects in quarantine that the kernel refuses.
    fn attempt_all<K: Kernel>(&mut self, kernel: &mut KernelSession<'_, K>) -> Result<(), Error> {
        let mut conflict = None;
        let mut actual: Option<Ruleset> = None;
        let mut attempts = 0;
        loop {
            let wanted = self.engine.ruleset();
            let known = match actual.take() {
                Some(actual) => actual,
                None => kernel.read(E::TABLE, &wanted)?,
            };
            let mut written = 0;
            let Err(error) = self.write_difference(kernel, &known, wanted, &mut written) else {
                return Ok(());
            };
            attempts += 1;
            if attempts > MOST_ATTEMPTS {
                return Err(error);
            }
            match self.judge(&error, &mut conflict) {
                Judgement::Quarantine(refused) => {
                    self.quarantine(kernel, &refused);
                    // Nothing has changed since it was read.
                    actual = (written == 0).then_some(known);
                }
                Judgement::ReadAgain => {}
                Judgement::GiveUp => return Err(error),
            }
            kernel.metrics.failure();
        }
    }

    /// Judges a failed write. What conflicts with the tables may have been written by another program
    /// after they were read: it is refused twice before it counts.
    fn judge(&self, error: &Error, before: &mut Option<ObjectPath>) -> Judgement {
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
                return Judgement::ReadAgain;
            }
            found = self.blamed([first]);
        }
        if found.is_empty() {
            Judgement::GiveUp
        } else {
            Judgement::Quarantine(found)
        }
    }

    /// Returns the objects to which refused things belong, each once, with the reason.
    fn blamed<'a>(
        &self,
        refusals: impl IntoIterator<Item = &'a Refusal>,
    ) -> Vec<(ObjectRef, String)> {
        let mut found: Vec<(ObjectRef, String)> = Vec::new();
        for refusal in refusals {
            for object in self.engine.blame(&refusal.path) {
                if found.iter().all(|(other, _)| *other != object) {
                    found.push((object, format!("the kernel refused {refusal}")));
                }
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
                message: format!("{why}; {}", E::QUARANTINE),
            });
        }
    }

    /// Writes the difference and returns the number of operations. `written` counts the steps that
    /// are in force.
    fn write_difference<K: Kernel>(
        &mut self,
        kernel: &mut KernelSession<'_, K>,
        actual: &Ruleset,
        wanted: Ruleset,
        written: &mut usize,
    ) -> Result<usize, Error> {
        let transaction = diff(actual, wanted);
        // If a later step fails, the next comparison does not find what earlier ones removed.
        self.change
            .append(self.engine.compared(actual, &transaction));
        let operations = transaction.ops.len();
        self.foreign.found(operations);
        kernel.write(transaction, written)?;
        Ok(operations)
    }

    fn compared<K: Kernel>(&mut self, kernel: &KernelSession<'_, K>, started: Instant) {
        let operations = self.foreign.put_back();
        if operations > 0 {
            report_healing(kernel, E::TABLE, operations, started.elapsed());
        }
        // An earlier attempt, or process, may not have handed over what it changed.
        self.change.set_rewritten();
        // Events may wait.
        self.more = true;
        self.synced(InForce {
            wrote: true,
            compared: true,
            took: started.elapsed(),
        });
    }

    fn synced(&mut self, now: InForce) {
        self.state = State::Synced;
        self.written = true;
        self.failure = None;
        let before = self.in_force.take();
        self.in_force = Some(before.map_or(now, |before| InForce {
            wrote: before.wrote || now.wrote,
            compared: before.compared || now.compared,
            took: before.took + now.took,
        }));
    }

    fn failed<K: Kernel>(&mut self, kernel: &KernelSession<'_, K>, error: &Error) {
        kernel.failed(error);
        self.state = State::Unknown;
        self.in_force = None;
        self.failure = Some(error.to_string());
    }

    fn report_notices<K: Kernel>(&mut self, kernel: &KernelSession<'_, K>) {
        for notice in self.engine.take_notices() {
            kernel.report(&notice);
        }
    }
}

/// What follows from a failed write.
enum Judgement {
    /// These objects are at fault, each with the reason.
    Quarantine(Vec<(ObjectRef, String)>),
    /// Another program may have written to the tables after they were read.
    ReadAgain,
    /// Nothing that was to be written is at fault.
    GiveUp,
}

/// A change of the tables by another program that is not put back yet, with the operations that this
/// takes as far as they are known.
///
/// What a comparison finds after a failed write may be nftlet's own and does not count.
#[derive(Debug, Default)]
struct ForeignChange(Option<usize>);

impl ForeignChange {
    /// Notes that another program changed something, which the next comparison finds.
    fn suspect(&mut self) {
        self.0.get_or_insert(0);
    }

    /// Takes the operations that a comparison found. Further ones may be nftlet's own.
    fn found(&mut self, operations: usize) {
        if let Some(known @ 0) = &mut self.0 {
            *known = operations;
        }
    }

    /// Returns the operations that put it back, and forgets them.
    fn put_back(&mut self) -> usize {
        self.0.take().unwrap_or_default()
    }
}

/// Counts and reports operations that put back what another program had changed.
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
