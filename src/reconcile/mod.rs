//! The loop that keeps the kernel as the objects ask for.
//!
//! ```text
//! deliveries ─> Store ─> changed services ─> plans ─> difference ─> Kernel
//!                                             │                       │
//!                              Programmed (what was written) <────────┘ refused or failed:
//!                                                                       read back, compare, retry
//! ```
//!
//! [`Reconciler::handle`] takes all events that arrived since the last call, compiles only the
//! services they touch, and writes the difference to what was written before. There is no delay
//! and no timer in the way of a change: what arrives while the kernel works forms the next
//! transaction.
//!
//! Nothing is written before every kind was listed once. The first write, and the one after a
//! failure, compares with what the kernel really holds ([`Reconciler::resync`]): rules left by an
//! earlier run stay in force and are changed, never flushed. If the kernel refuses an element
//! even then, the service it belongs to is left out and reported, and the others are written.

mod health_checks;
mod kernel;
mod programmed;
mod report;
mod run;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::compile::{self, Settings, TABLE};
use crate::health::Checks;
use crate::metrics::Metrics;
use crate::model::{
    Changes, Delivery, Event, Kind, Notice, ObjectName, ObjectRef, Reason, Store, Subject,
};
use crate::netlink::{self, Place};
use crate::ruleset::{Ruleset, Transaction, diff};

pub use kernel::Kernel;
pub use programmed::Programmed;
pub use report::{Log, Reporter};
pub use run::{Exit, Signals, run};

use health_checks::HealthChecks;
use programmed::Draft;

/// How many services are left out in one attempt before giving up until the next.
const MOST_REFUSALS: usize = 64;
/// How long unused shared chains stay: a service that scales up and down finds its chain again.
const KEEP_UNUSED_CHAINS: Duration = Duration::from_secs(60);

/// Keeps the kernel as the objects ask for.
pub struct Reconciler<'a, K> {
    kernel: K,
    settings: Settings,
    store: Store,
    programmed: Programmed,
    /// Services the kernel refused; left out until they change or `forgive` is called.
    refused: BTreeSet<ObjectName>,
    state: State,
    metrics: &'a Metrics,
    reporter: &'a dyn Reporter,
    /// When chains became unused that may be removed later.
    unused_since: Option<Instant>,
    changes: Changes,
    /// Arrival times of events whose rules are not in force yet.
    waiting: Vec<Instant>,
    health_checks: Option<HealthChecks>,
}

/// How far the kernel is known to agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Waiting for the first complete lists.
    Listing,
    /// What was written is what `Programmed` says.
    Synced,
    /// A write failed; the kernel must be read again.
    Unknown,
}

/// What [`Reconciler::handle`] and [`Reconciler::resync`] achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Not all kinds are listed yet; nothing was written.
    Waiting,
    /// The kernel is as wanted.
    Synced,
    /// The kernel could not be brought there; try [`Reconciler::resync`] again after a while.
    Failed,
}

impl<'a, K: Kernel> Reconciler<'a, K> {
    /// A reconciler that has seen nothing yet.
    pub fn new(
        kernel: K,
        settings: Settings,
        metrics: &'a Metrics,
        reporter: &'a dyn Reporter,
    ) -> Self {
        Self {
            kernel,
            programmed: Programmed::new(settings.clone()),
            settings,
            store: Store::default(),
            refused: BTreeSet::new(),
            state: State::Listing,
            metrics,
            reporter,
            unused_since: None,
            changes: Changes::default(),
            waiting: Vec::new(),
            health_checks: None,
        }
    }

    /// Publishes the health checks that services want, each time their rules are in force.
    #[must_use]
    pub fn with_health_checks(mut self, checks: watch::Sender<Checks>) -> Self {
        self.health_checks = Some(HealthChecks::new(checks));
        self
    }

    /// The objects as they are known.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The rules the objects ask for, from scratch, as a new process would compile them.
    pub fn wanted(store: &Store, settings: &Settings) -> Ruleset {
        let mut programmed = Programmed::new(settings.clone());
        let mut draft = Draft::default();
        programmed.set_skeletons(store, &mut draft);
        for service in store.services() {
            let plan = compile::plan(store, &service.name, settings, None);
            programmed.set_plan(&service.name, plan, &mut draft);
        }
        programmed.ruleset()
    }

    /// Takes over events and brings the kernel in line with them.
    pub fn handle(&mut self, deliveries: impl IntoIterator<Item = Delivery>) -> Outcome {
        let mut changes = std::mem::take(&mut self.changes);
        for delivery in deliveries {
            if !matches!(delivery.event, Event::Notice(_)) {
                self.waiting.push(delivery.at);
            }
            self.store.apply(delivery.event, &mut changes);
        }
        for notice in changes.notices.drain(..) {
            self.report(notice);
        }
        for name in &changes.services {
            self.refused.remove(name);
        }
        self.changes = changes;
        match self.state {
            State::Listing if !self.store.is_complete() => Outcome::Waiting,
            State::Listing | State::Unknown => self.resync(),
            State::Synced => self.update(),
        }
    }

    /// Writes what changed.
    fn update(&mut self) -> Outcome {
        let started = Instant::now();
        let changes = std::mem::take(&mut self.changes);
        if changes.is_empty() {
            self.settle(&changes);
            return Outcome::Synced;
        }
        let mut draft = Draft::default();
        self.draft(&changes, &mut draft);
        let transaction = draft.finish(&self.programmed);
        match self.write(transaction) {
            Ok(()) => {
                self.metrics.sync(false, started.elapsed());
                self.settle(&changes);
                Outcome::Synced
            }
            Err(error) => {
                self.metrics.failure();
                self.reporter.failed(&error);
                self.state = State::Unknown;
                self.changes.triggered_at_ms = changes.triggered_at_ms;
                self.resync()
            }
        }
    }

    /// Compiles what changed into the draft.
    fn draft(&mut self, changes: &Changes, draft: &mut Draft) {
        if changes.node || changes.service_cidrs {
            self.programmed.set_skeletons(&self.store, draft);
        }
        if changes.node {
            // Which endpoints are local is in every service's plan.
            let mut names: BTreeSet<ObjectName> =
                self.store.services().map(|s| s.name.clone()).collect();
            names.extend(changes.services.iter().cloned());
            self.draft_services(&names, draft);
        } else {
            self.draft_services(&changes.services, draft);
        }
    }

    fn draft_services(&mut self, names: &BTreeSet<ObjectName>, draft: &mut Draft) {
        for name in names {
            let plan = if self.refused.contains(name) {
                None
            } else {
                let previous = self.programmed.plan(name);
                compile::plan(&self.store, name, &self.settings, previous)
            };
            self.programmed.set_plan(name, plan, draft);
            if let Some(checks) = &mut self.health_checks {
                checks.changed(name);
            }
        }
    }

    /// Compares with what the kernel holds and writes the difference.
    ///
    /// Does nothing before the lists are complete.
    pub fn resync(&mut self) -> Outcome {
        if !self.store.is_complete() {
            return Outcome::Waiting;
        }
        let started = Instant::now();
        let mut changes = std::mem::take(&mut self.changes);
        let first = self.state == State::Listing;
        if first {
            changes.node = true;
            changes.service_cidrs = true;
            self.programmed.forget_chains();
        }
        self.draft(&changes, &mut Draft::default());
        for _ in 0..=MOST_REFUSALS {
            match self.attempt() {
                Ok(healed) => {
                    if !first {
                        self.metrics.healed(healed);
                    }
                    self.metrics.sync(true, started.elapsed());
                    self.state = State::Synced;
                    self.settle(&changes);
                    return Outcome::Synced;
                }
                Err(error) => {
                    self.metrics.failure();
                    if !self.isolate(&error) {
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

    /// Reads, compares, writes; returns the number of operations it took.
    fn attempt(&mut self) -> Result<usize, netlink::Error> {
        let wanted = self.programmed.ruleset();
        let actual = self.kernel.read(&[TABLE], &wanted)?;
        let transaction = diff(&actual, wanted);
        let operations = transaction.ops.len();
        self.write(transaction)?;
        Ok(operations)
    }

    /// Leaves out the service to which a refused element belongs. False if the error cannot be
    /// laid at one service's door.
    fn isolate(&mut self, error: &netlink::Error) -> bool {
        let Some(Place::Element(table, set, element, _)) = error.refused() else {
            return false;
        };
        let Some(owner) = self.programmed.owner(table, set, &element.key) else {
            return false;
        };
        self.programmed
            .set_plan(&owner, None, &mut Draft::default());
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

    /// Tries the services again that the kernel refused earlier.
    pub fn forgive(&mut self) {
        self.changes.services.append(&mut self.refused);
    }

    fn write(&mut self, transaction: Transaction) -> Result<(), netlink::Error> {
        for step in transaction.into_steps() {
            let started = Instant::now();
            let applied = self.kernel.apply(&step)?;
            self.metrics.transaction(
                started.elapsed(),
                applied.messages,
                applied.elements,
                applied.bytes,
            );
        }
        Ok(())
    }

    /// Books what a successful write means.
    fn settle(&mut self, changes: &Changes) {
        for at in self.waiting.drain(..) {
            self.metrics.programmed(at.elapsed());
        }
        for triggered in &changes.triggered_at_ms {
            if let Some(since) = milliseconds_since(*triggered) {
                self.metrics.network_programming(since);
            }
        }
        let checks = self.health_checks.as_mut();
        for notice in checks.map_or_else(Vec::new, |c| c.publish(&self.store, &self.refused)) {
            self.report(notice);
        }
        for kind in Kind::ALL {
            self.metrics.objects(kind.as_str(), self.store.count(kind));
        }
        self.metrics.refused(self.refused.len());
        self.metrics.chains(self.programmed.chains());
        let unused = self.programmed.has_unused_chains();
        self.unused_since = match self.unused_since {
            Some(since) if unused => Some(since),
            _ => unused.then(Instant::now),
        };
    }

    /// Removes shared chains that have been unused for a while. Returns how long to wait until
    /// it is worth calling again.
    pub fn sweep(&mut self) -> Option<Duration> {
        let since = self.unused_since.filter(|_| self.state == State::Synced)?;
        let wait = KEEP_UNUSED_CHAINS.saturating_sub(since.elapsed());
        if !wait.is_zero() {
            return Some(wait);
        }
        self.remove_unused_chains();
        None
    }

    /// Removes shared chains that no service uses, at once.
    pub fn remove_unused_chains(&mut self) {
        self.unused_since = None;
        let transaction = self.programmed.remove_unused_chains();
        if let Err(error) = self.write(transaction) {
            self.reporter.failed(&error);
            self.state = State::Unknown;
        }
    }

    fn report(&self, notice: Notice) {
        self.metrics.notice(notice.reason.as_str());
        self.reporter.notice(&notice);
    }
}

/// The time from a moment in milliseconds since 1970 until now; `None` for the future.
fn milliseconds_since(moment: i64) -> Option<Duration> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.ok()?
        .checked_sub(Duration::from_millis(u64::try_from(moment).ok()?))
}

#[cfg(test)]
mod tests;
