//! The loop that keeps the kernel as the objects ask for.
//!
//! ```text
//! deliveries ─> Engine (services, policies) ─> Driver ─> KernelSession ─> kernel
//!                                                │
//!                                                └─ what changed, once it is in force ─> followers
//! ```
//!
//! [`Reconciler::handle`] takes all events that arrived since the last call, compiles only what they
//! touch, and writes the difference to what was written before. There is no delay and no timer in the
//! way of a change: what arrives while the kernel works forms the next transaction.
//!
//! Services and policies have a [`Driver`] each: a failure of one does not hold up the other. Policies
//! come first, so that a new pod is isolated before a service leads to it.

mod audit;
mod driver;
mod handover;
mod hooks;
mod kernel;
mod latency;
mod queries;
mod report;
mod run;
mod schedule;
mod session;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use crate::engine::Engine as _;
use crate::model::{Delivery, Event, Kind, Node, Notice, Reason, Subject};
use crate::netlink;
use crate::policies;
use crate::serve::metrics::Metrics;
use crate::services::Store;
use crate::services::{self, ServiceSettings};
use crate::source::SourceStats;

pub use audit::{Audits, EVERY as AUDIT_EVERY, Finding, Snapshot, Step, Verdict};
pub use driver::{Driver, Healed, InForce, State};
pub use handover::Followers;
pub use hooks::remove_foreign_hooks;
pub use kernel::Kernel;
pub use queries::{Query, Removal, Removed};
pub use report::{Log, LogAndSend, Reporter};
pub use run::{Exit, Signals, run};
pub use session::KernelSession;

use latency::Latency;

/// Keeps the kernel as the objects ask for.
pub struct Reconciler<'a, K> {
    kernel: KernelSession<'a, K>,
    services: Driver<services::Engine>,
    policies: Option<Driver<policies::Engine>>,
    latency: Latency,
    followers: Followers,
    /// What keeps lists from being complete.
    source_stats: Option<Arc<SourceStats>>,
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

/// The parts of the rules, which are written, fail and are tried again apart from each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// The tables of services.
    pub services: bool,
    /// The tables of network policies.
    pub policies: bool,
}

impl Parts {
    /// All of them.
    pub const ALL: Self = Self {
        services: true,
        policies: true,
    };
    /// The services alone.
    pub const SERVICES: Self = Self {
        services: true,
        policies: false,
    };
}

/// What was achieved in each part; `None` in one that was left alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// The tables of services.
    pub services: Option<Outcome>,
    /// The tables of network policies.
    pub policies: Option<Outcome>,
}

impl Outcomes {
    /// Whether a part ended so.
    pub fn any(self, outcome: Outcome) -> bool {
        [self.services, self.policies].contains(&Some(outcome))
    }

    /// What was achieved on the whole.
    pub fn together(self) -> Outcome {
        let worse = [Outcome::Failed, Outcome::Waiting].into_iter();
        let worst = worse.into_iter().find(|outcome| self.any(*outcome));
        worst.unwrap_or(Outcome::Synced)
    }
}

impl<'a, K: Kernel> Reconciler<'a, K> {
    /// Creates a reconciler that has seen nothing yet.
    pub fn new(
        kernel: K,
        settings: ServiceSettings,
        metrics: &'a Metrics,
        reporter: &'a dyn Reporter,
    ) -> Self {
        Self {
            kernel: KernelSession::new(kernel, metrics, reporter),
            services: Driver::new(services::Engine::new(settings)),
            policies: None,
            latency: Latency::default(),
            followers: Followers::default(),
            source_stats: None,
        }
    }

    /// Divides changes of services with more elements.
    #[must_use]
    pub fn with_portions_of(mut self, elements: usize) -> Self {
        self.services.set_budget(elements);
        self.services.engine = self.services.engine.with_portions_of(elements);
        self
    }

    /// Sets the Node that is used while the own Node object is missing.
    #[must_use]
    pub fn with_fallback_node(mut self, node: Node) -> Self {
        self.services.engine = self.services.engine.with_fallback_node(node);
        self
    }

    /// Enforces the policies of an engine. Without one the policy tables are left alone.
    #[must_use]
    pub fn with_policies(mut self, engine: policies::Engine) -> Self {
        self.policies = Some(Driver::new(engine));
        self
    }

    /// Sets who acts once rules are in force.
    #[must_use]
    pub fn with_followers(mut self, followers: Followers) -> Self {
        self.followers = followers;
        self
    }

    /// Sets the counters of the source of events.
    #[must_use]
    pub fn with_source_stats(mut self, stats: Arc<SourceStats>) -> Self {
        self.source_stats = Some(stats);
        self
    }

    /// Returns the objects that services are made of.
    pub fn store(&self) -> &Store {
        self.services.engine.store()
    }

    /// Returns the engine of the policies.
    pub fn policies(&self) -> Option<&policies::Engine> {
        self.policies.as_ref().map(|policies| &policies.engine)
    }

    /// Takes over events and brings the kernel in line with them.
    pub fn handle(&mut self, deliveries: impl IntoIterator<Item = Delivery>) -> Outcome {
        self.take_over(deliveries);
        let mut outcome = self.work(Parts::ALL).together();
        while outcome == Outcome::Synced && self.has_more() {
            outcome = self.work(Parts::SERVICES).together();
        }
        outcome
    }

    /// Whether changes of services wait for another call of [`Reconciler::work`], because not all
    /// of them were to be written at once.
    pub fn has_more(&self) -> bool {
        self.services.has_more()
    }

    /// Takes over events without writing anything.
    pub fn take_over(&mut self, deliveries: impl IntoIterator<Item = Delivery>) {
        let (services, endpoints) = self.latency.pending();
        for delivery in deliveries {
            self.latency.arrived(&delivery);
            if let Event::Notice(notice) = &delivery.event {
                self.kernel.report(notice);
            }
            self.services.engine.apply(&delivery.event);
            if let Some(policies) = &mut self.policies {
                policies.engine.apply(&delivery.event);
            }
        }
        for notice in self.services.engine.take_notices() {
            self.kernel.report(&notice);
        }
        let triggers = self.services.engine.take_triggers();
        self.latency.triggered(triggers);
        let metrics = self.kernel.metrics;
        let pending = self.latency.pending();
        metrics.changes(pending.0 - services, pending.1 - endpoints);
        metrics.pending(pending.0, pending.1);
        if self.services.engine.is_marked() {
            metrics.queued();
        }
    }

    /// Brings parts of the rules in line with the events taken over.
    pub fn work(&mut self, parts: Parts) -> Outcomes {
        // In this order: a new pod is isolated before a service leads to it.
        let policies = parts.policies.then(|| self.work_on_policies());
        let services = parts.services.then(|| self.work_on_services());
        Outcomes { services, policies }
    }

    /// What new events changed is written first, and then a portion of what waits.
    fn work_on_services(&mut self) -> Outcome {
        let marked = self.services.engine.is_marked();
        let mut outcome = self.services.work(&mut self.kernel);
        self.services_in_force();
        if marked && outcome == Outcome::Synced && self.has_more() {
            outcome = self.services.work(&mut self.kernel);
            self.services_in_force();
        }
        outcome
    }

    fn work_on_policies(&mut self) -> Outcome {
        let Some(policies) = &mut self.policies else {
            return Outcome::Synced;
        };
        let outcome = policies.work(&mut self.kernel);
        let state = policies.state;
        self.policies_in_force_now();
        match outcome {
            // The first lists of policies hold up nothing else.
            Outcome::Waiting if state == State::Listing => Outcome::Synced,
            outcome => outcome,
        }
    }

    /// Compares the services with what the kernel holds and writes the difference.
    ///
    /// Does nothing before the lists are complete.
    pub fn resync(&mut self) -> Outcome {
        let outcome = self.services.compare(&mut self.kernel);
        self.services_in_force();
        outcome
    }

    /// Measures and hands over what became of services.
    fn services_in_force(&mut self) {
        let Some((in_force, change)) = self.services.take_in_force() else {
            return;
        };
        let metrics = self.kernel.metrics;
        if in_force.wrote {
            metrics.sync(in_force.compared, in_force.took);
        }
        self.followers.hand_services(change);
        let engine = &self.services.engine;
        let is_waiting = |service: &_| engine.is_waiting(service);
        let policies = self.policies.as_ref();
        if policies.is_some_and(|policies| policies.state == State::Unknown) {
            self.latency.triggers_in_force(metrics, is_waiting);
        } else {
            self.latency.in_force(metrics, is_waiting);
        }
        metrics.pending(0, 0);
        for kind in Kind::ALL {
            let of_policies = policies.map_or(0, |policies| policies.engine.count(kind));
            metrics.objects(kind.as_str(), engine.count(kind) + of_policies);
        }
        metrics.refused(engine.left_out());
        metrics.chains(engine.chains());
        metrics.no_local_endpoints(engine.no_local_endpoints());
    }

    /// Measures and hands over what became of policies.
    fn policies_in_force_now(&mut self) {
        let Some(policies) = &mut self.policies else {
            return;
        };
        let Some((in_force, change)) = policies.take_in_force() else {
            return;
        };
        if in_force.wrote {
            let isolated = policies.engine.isolated().filter_map(|(_, pod)| pod);
            let isolated: BTreeSet<_> = isolated.collect();
            let metrics = self.kernel.metrics;
            metrics.policy_sync(in_force.took, isolated.len());
        }
        self.followers.hand_policies(change);
    }

    /// Compares with what the kernel holds after another program changed the tables, and puts back
    /// what was changed. Returns whether anything was. Reads nothing if no other program can have
    /// changed anything since the last time.
    pub fn heal(&mut self) -> (Outcomes, bool) {
        if self.is_synced() && self.kernel.is_as_expected() {
            return (Outcomes::default(), false);
        }
        if self.waits_for_lists() {
            self.kernel.remove_foreign_hooks();
        }
        self.kernel.expect_present();
        let policies = self.policies.as_mut();
        let policies = policies.map_or_else(Healed::default, |it| it.heal(&mut self.kernel));
        self.policies_in_force_now();
        let services = self.services.heal(&mut self.kernel);
        self.services_in_force();
        let outcomes = Outcomes {
            services: services.outcome,
            policies: policies.outcome,
        };
        (outcomes, policies.changed || services.changed)
    }

    /// Asks the kernel for its generation, and notes the time if all rules are as wanted.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub fn ping_kernel(&mut self) -> Result<(), netlink::Error> {
        self.kernel.generation()?;
        if self.is_synced() && !self.services.engine.is_marked() {
            self.kernel.metrics.in_order();
        }
        Ok(())
    }

    /// Whether what was written is known to be in force, as far as something was to be written.
    pub fn is_synced(&self) -> bool {
        let policies = self.policies.as_ref();
        let unknown = policies.is_some_and(|policies| policies.state == State::Unknown);
        self.services.state == State::Synced && !unknown
    }

    /// Whether some tables cannot be compared, because it is not known yet what they are to hold.
    fn waits_for_lists(&self) -> bool {
        let policies = self.policies.as_ref();
        let policies =
            policies.is_some_and(|it| it.state == State::Listing || !it.engine.is_ready());
        self.services.state == State::Listing || policies
    }

    /// Whether another program wrote to the kernel while the monitor received no notifications; says
    /// so once.
    pub fn take_missed_notifications(&mut self) -> bool {
        self.kernel.take_missed_notifications()
    }

    /// Tries the objects again with the next call that the kernel refused earlier.
    pub fn retry_quarantined(&mut self) {
        if let Some(policies) = &mut self.policies {
            policies.engine.retry_quarantined();
        }
        self.services.engine.retry_quarantined();
    }

    /// Returns when a part has something to do although no event came.
    pub fn due(&self) -> Option<Instant> {
        let policies = self.policies.as_ref().and_then(Driver::due);
        self.services.due().into_iter().chain(policies).min()
    }

    /// Whether the policies' kinds were listed, or no policies are enforced.
    pub fn policies_ready(&self) -> bool {
        let policies = self.policies.as_ref();
        policies.is_none_or(|policies| policies.engine.is_ready())
    }

    /// Whether policies are in force, or what keeps them from it; `None` where there is nothing to
    /// enforce.
    pub fn policies_in_force(&self) -> Option<Result<(), String>> {
        let policies = self.policies.as_ref().filter(|it| it.engine.is_on())?;
        // While lists are read again the rules of the former ones are in force; but the first policies
        // of a cluster wait for the first lists of pods.
        let known = policies.has_written() && !policies.engine.has_first_policies();
        if known && policies.state != State::Unknown {
            return Some(Ok(()));
        }
        if let Some(failure) = policies.failure() {
            return Some(Err(failure.to_owned()));
        }
        let missing = policies.engine.missing();
        let kinds: Vec<&str> = missing.iter().map(|kind| kind.as_str()).collect();
        let mut why = format!("waiting for the complete list of {}", kinds.join(", "));
        let stats = self.source_stats.iter();
        let faults =
            stats.flat_map(|stats| missing.iter().filter_map(|kind| stats.fault_of(*kind)));
        // One fault can be that of several kinds.
        for fault in faults.collect::<BTreeSet<String>>() {
            why.push_str("; ");
            why.push_str(&fault);
        }
        Some(Err(why))
    }

    /// Reports that policies are not in force, and why.
    fn report_not_in_force(&self) {
        if let Some(Err(why)) = self.policies_in_force() {
            self.kernel.report(&Notice {
                subject: Subject::Other("network policies".into()),
                reason: Reason::PoliciesNotInForce,
                message: format!("they are not in force on this node: {why}"),
            });
        }
    }

    /// Returns the kinds that were not listed yet.
    pub fn missing(&self) -> Vec<Kind> {
        let policies = self.policies.as_ref();
        let missing = policies.map_or_else(Vec::new, |policies| policies.engine.missing());
        [self.services.engine.missing(), missing].concat()
    }

    /// Removes the shared chains that no service has used since a moment. Does nothing while it is
    /// unknown what is in force.
    pub fn remove_chains_unused_since(&mut self, moment: Instant) -> Outcomes {
        if self.services.state != State::Synced {
            return Outcomes::default();
        }
        self.services.engine.expire_unused_chains(moment);
        self.work(Parts::SERVICES)
    }
}

#[cfg(test)]
pub(crate) mod tests;
