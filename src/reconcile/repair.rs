//! What is written is compared with what the kernel holds: at the start, after a failure, and when
//! somebody else changed the tables.
//!
//! ```text
//!            every kind listed once              transaction failed
//! Listing ───────────────────────────> Synced ──────────────────────> Unknown
//!    │        read, compare, write        ▲ │                            │
//!    └── nothing is written before        │ └─ heal: the same, if others wrote
//!                                         └───────── resync ─────────────┘
//! ```
//!
//! A refusal that is the fault of one element leaves out the service that it belongs to
//! ([`Reconciler::isolate`]). Whether others wrote is told by the number of commits: those of the
//! reconciler itself are counted (`vouched`), and where the kernel is at that number nothing is read.

use std::time::{Duration, Instant};

use super::affinity::Suspects;
use super::policies::Policies;
use super::programmed::Effects;
use super::removed::Removed;
use super::{Kernel, MOST_REFUSALS, Outcome, Outcomes, Reconciler, State};
use crate::compile::TABLE;
use crate::model::{Kind, Notice, ObjectRef, Reason, Subject};
use crate::netlink::{self, Blame, Place};
use crate::ruleset::diff;

/// What follows from a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// What was refused is at fault, and cannot be had.
    Fault,
    /// It may be that somebody wrote to the tables after they were read: read them again.
    Doubtful,
    /// Nothing that was to be written is at fault.
    Passing,
}

/// Judges a refusal. A conflict with what the tables hold may be the doing of somebody who wrote to
/// them after they were read. What was refused is to blame only if it is refused again (`before`)
/// after another reading.
pub(super) fn judge(error: &netlink::Error, before: &mut Option<Place>) -> Refusal {
    match (error.blame(), error.refused()) {
        (Blame::Named, Some(_)) => Refusal::Fault,
        (Blame::Conflict, Some(place)) if before.as_ref() == Some(place) => Refusal::Fault,
        (Blame::Conflict, Some(place)) => {
            *before = Some(place.clone());
            Refusal::Doubtful
        }
        _ => Refusal::Passing,
    }
}

/// A change of the tables by others that is not put back yet, with the operations that this takes as
/// far as they are known.
///
/// What a comparison finds after a failed write may be nftlet's own and does not count.
#[derive(Debug, Default)]
pub(super) struct ForeignChange(Option<usize>);

impl ForeignChange {
    /// Notes that others changed something, which the next comparison finds.
    pub fn suspect(&mut self) {
        self.0.get_or_insert(0);
    }

    /// Takes the operations that a comparison found. Further ones may be nftlet's own.
    pub fn found(&mut self, operations: usize) {
        if let Some(known @ 0) = &mut self.0 {
            *known = operations;
        }
    }

    /// Returns the operations that put it back, and forgets them.
    pub fn put_back(&mut self) -> usize {
        self.0.take().unwrap_or_default()
    }
}

impl<K: Kernel> Reconciler<'_, K> {
    /// Compares with what the kernel holds and writes the difference.
    ///
    /// Does nothing before the lists are complete.
    pub fn resync(&mut self) -> Outcome {
        if !self.store.is_complete() {
            return Outcome::Waiting;
        }
        let started = Instant::now();
        self.abandon_portions();
        let mut changes = std::mem::take(&mut self.changes);
        let first = self.state == State::Listing;
        if first {
            changes.node = true;
            changes.service_cidrs = true;
            self.programmed.forget_chains();
        }
        let mut effects = self.take_changes(&changes);
        if first {
            // No plan was in force before: which policies become Local shows in the kernel.
            effects.clients = Suspects::default();
        }
        self.note(effects);
        let mut refused_before = None;
        for _ in 0..=MOST_REFUSALS {
            match self.attempt() {
                Ok(_) => {
                    self.metrics.sync(true, started.elapsed());
                    let foreign = self.foreign.put_back();
                    self.report_healing(TABLE, foreign, started.elapsed());
                    self.state = State::Synced;
                    self.suspect_all();
                    self.changes.triggered_at_ms = changes.triggered_at_ms;
                    self.settle();
                    return Outcome::Synced;
                }
                Err(error) => {
                    self.metrics.failure();
                    if !self.isolate(&error, &mut refused_before) {
                        self.reporter.failed(&error);
                        break;
                    }
                }
            }
        }
        self.state = State::Unknown;
        self.changes = changes;
        Outcome::Failed
    }

    /// Reports a failed write and compares with what the kernel holds, since steps of the write may
    /// be in force.
    pub(super) fn write_failed(&mut self, error: &netlink::Error) -> Outcome {
        self.metrics.failure();
        self.reporter.failed(error);
        self.state = State::Unknown;
        if self.is_foreign(error) {
            self.foreign.suspect();
        }
        self.resync()
    }

    /// Whether a failed write shows a change by others: what was to be written does not fit what the
    /// tables hold, and others have written something.
    pub(super) fn is_foreign(&mut self, error: &netlink::Error) -> bool {
        error.blame() == Blame::Conflict && !self.is_vouched_for()
    }

    /// Compares with what the kernel holds after somebody else changed the tables, and puts back
    /// what was changed. Returns whether anything was. Reads nothing where nobody else can have
    /// changed anything since the last time.
    pub fn heal(&mut self) -> (Outcomes, bool) {
        let now = self.kernel.generation().ok();
        if self.vouches_for(now) && self.is_synced() {
            return (Outcomes::default(), false);
        }
        if self.waits_for_lists() {
            self.remove_foreign_hooks();
        }
        self.vouched = self.kernel.generation().ok();
        let (policies, policies_changed) = self.heal_policies();
        let (services, services_changed) = self.heal_services();
        let outcomes = Outcomes { services, policies };
        (outcomes, policies_changed || services_changed)
    }

    /// Asks the kernel for a sign of life, and notes the time where all is as it should be.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub fn sign_of_life(&mut self) -> Result<(), netlink::Error> {
        self.kernel.generation()?;
        if self.is_synced() && self.changes.is_empty() {
            self.metrics.in_order();
        }
        Ok(())
    }

    /// Whether nobody else has written since the kernel was compared.
    pub(super) fn is_vouched_for(&mut self) -> bool {
        let now = self.kernel.generation().ok();
        self.vouches_for(now)
    }

    pub(super) fn vouches_for(&self, generation: Option<u32>) -> bool {
        generation.is_some() && generation == self.vouched
    }

    /// Whether what was written is known to be in force, as far as something was to be written.
    pub fn is_synced(&self) -> bool {
        let policies = self.policies.as_ref();
        self.state == State::Synced && policies.is_none_or(|p| p.state != State::Unknown)
    }

    /// Whether some tables cannot be compared, because it is not known yet what they are to hold.
    fn waits_for_lists(&self) -> bool {
        let of_policies = |it: &Policies| it.state == State::Listing || !it.engine.is_ready();
        self.state == State::Listing || self.policies.as_ref().is_some_and(of_policies)
    }

    /// Whether somebody else wrote to the kernel while the monitor was kept from hearing it; tells
    /// so once.
    pub fn take_doubt(&mut self) -> bool {
        std::mem::take(&mut self.doubtful)
    }

    /// Notes the generation before the kernel is read for the first time.
    pub(super) fn vouch(&mut self) {
        if self.vouched.is_none() {
            self.vouched = self.kernel.generation().ok();
        }
    }

    fn heal_services(&mut self) -> (Option<Outcome>, bool) {
        if self.state != State::Synced {
            // The next attempt compares anyway.
            return (None, false);
        }
        let started = Instant::now();
        self.foreign.suspect();
        match self.attempt() {
            Ok(0) => {
                self.foreign.put_back();
                (Some(Outcome::Synced), false)
            }
            Ok(_) => {
                self.metrics.sync(true, started.elapsed());
                let foreign = self.foreign.put_back();
                self.report_healing(TABLE, foreign, started.elapsed());
                self.suspect_all();
                self.hand_over();
                (Some(Outcome::Synced), true)
            }
            Err(error) => (Some(self.write_failed(&error)), true),
        }
    }

    /// Whatever happened while the kernel was not as wanted, the flows and the remembered clients
    /// of all services may tell of it.
    fn suspect_all(&mut self) {
        for plan in self.programmed.plans() {
            self.flows.suspect(plan, |_| true);
            self.clients.all_of(plan);
        }
    }

    /// Notes what a comparison is about to change of frontends.
    fn note_removed(&mut self, removed: Removed) {
        self.flows.gone(removed.fronts);
        if !removed.bound.is_empty() {
            for plan in self.programmed.plans() {
                self.clients.bind(plan, &removed.bound);
            }
        }
    }

    /// Counts and reports operations that put back what others had changed, if there were any.
    pub(super) fn report_healing(&mut self, table: &str, operations: usize, took: Duration) {
        if operations == 0 {
            return;
        }
        self.metrics.healed(operations);
        self.healed = self.healed.wrapping_add(operations);
        self.report(Notice {
            subject: Subject::Other(format!("table {table}").into()),
            reason: Reason::ForeignChange,
            message: format!(
                "somebody else changed it; {operations} operations put it back within {took:.1?} \
                 (find out who: nft monitor)"
            ),
        });
    }

    /// Reads, compares, writes. Returns the number of operations.
    fn attempt(&mut self) -> Result<usize, netlink::Error> {
        self.vouch();
        let wanted = self.programmed.ruleset();
        let actual = self.kernel.read(&[TABLE], &wanted)?;
        let transaction = diff(&actual, wanted);
        // If a later step fails, the next comparison does not find what earlier ones removed.
        self.note_removed(Removed::of(&actual, &transaction));
        let operations = transaction.ops.len();
        self.foreign.found(operations);
        self.write(transaction)?;
        Ok(operations)
    }

    /// Leaves out the service to which a refused element belongs. False if the error cannot be
    /// laid at one service's door.
    fn isolate(&mut self, error: &netlink::Error, before: &mut Option<Place>) -> bool {
        let Some(Place::Element(table, set, element, _)) = error.refused() else {
            return false;
        };
        match judge(error, before) {
            Refusal::Fault => {}
            Refusal::Doubtful => return true,
            Refusal::Passing => return false,
        }
        let Some(owner) = self.programmed.owner(table, set, &element.key) else {
            return false;
        };
        let mut effects = Effects::default();
        if let Some(change) = self.programmed.change(&owner, None) {
            self.programmed.replace(&owner, &change, &mut effects, None);
        }
        self.note(effects);
        self.report(Notice {
            subject: Subject::Object(ObjectRef::new(Kind::Service, owner.clone())),
            reason: Reason::KernelRefused,
            message: format!("{error}; the service is left out until it changes"),
        });
        if let Some(checks) = &mut self.health_checks {
            checks.changed(&owner);
        }
        self.refused.insert(owner);
        true
    }

    /// Tries the services and policies again that the kernel refused earlier.
    pub fn forgive(&mut self) {
        if let Some(policies) = &mut self.policies {
            policies.engine.forgive();
            policies.engine.look_at_links();
        }
        self.changes.services.append(&mut self.refused);
    }
}
