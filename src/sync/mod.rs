//! The control loop: writes to the kernel what the objects require.
//!
//! ```text
//! deliveries ─> Engine (services, policies) ─> Driver ─> KernelSession ─> kernel
//!                                                │
//!                                                └─ changes that took effect ─> followers
//! ```
//!
//! [`Controller::apply`] applies all waiting events; [`Controller::work`] compiles what they affect
//! and writes the difference. [`Controller::handle`] does both, for tests and benchmarks. No timer
//! delays a change: events that arrive during a write form the next transaction.
//!
//! Services and policies have a `Driver` each, so that a failure of one does not delay the other.
//! Policies are written first: a new pod is isolated before a service forwards traffic to it.

mod audit;
mod comparison;
mod driver;
mod handover;
mod hooks;
mod kernel;
mod latency;
mod metrics;
mod outcome;
mod policy_times;
mod queries;
mod reader;
mod report;
mod run;
mod schedule;
mod session;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use crate::engine::Engine as _;
use crate::model::{Delivery, Event, Kind, Node, Notice, Reason, Subject};
use crate::netlink;
use crate::policies;
use crate::services::Store;
use crate::services::{self, ServiceSettings};
use crate::source::SourceStats;

pub use audit::Audits;
pub(crate) use driver::{Driver, DriverState, Healed};
pub use handover::Followers;
pub(crate) use hooks::remove_foreign_base_chains;
pub use kernel::Kernel;
pub use metrics::SyncMetrics;
pub use outcome::{Engines, Outcome, Outcomes};
pub(crate) use policy_times::PolicyTimes;
pub use queries::{ElementRemoval, Look, Names, Query, RemovalOutcome, View};
pub use reader::TableReader;
pub use report::{Log, LogAndSend, Reporter};
pub use run::{Exit, Signals, run};
pub(crate) use session::KernelSession;

use latency::Latency;

/// Writes to the kernel what the objects require, and repairs it.
pub struct Controller<'a, K> {
    kernel: KernelSession<'a, K>,
    services: Driver<services::Engine>,
    policies: Option<Driver<policies::Engine>>,
    policy_times: PolicyTimes,
    latency: Latency,
    followers: Followers,
    /// Names the faults that prevent complete lists.
    source_stats: Option<Arc<SourceStats>>,
}

impl<'a, K: Kernel> Controller<'a, K> {
    /// Creates a controller that knows no objects yet.
    pub fn new(
        kernel: K,
        settings: ServiceSettings,
        metrics: &'a SyncMetrics,
        reporter: &'a dyn Reporter,
    ) -> Self {
        Self {
            kernel: KernelSession::new(kernel, metrics, reporter),
            services: Driver::new(services::Engine::new(settings)),
            policies: None,
            policy_times: PolicyTimes::default(),
            latency: Latency::default(),
            followers: Followers::default(),
            source_stats: None,
        }
    }

    /// Sets the number of elements above which changes of services are written in portions.
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

    /// Enforces the policies of an engine. Without one, the policy tables are not touched.
    #[must_use]
    pub fn with_policies(mut self, engine: policies::Engine) -> Self {
        self.policies = Some(Driver::new(engine));
        self
    }

    /// Sets the followers of changes that took effect.
    #[must_use]
    pub fn with_followers(mut self, followers: Followers) -> Self {
        self.followers = followers;
        self
    }

    /// Sets the thread that compares whole tables. Without one, the calls that write compare, too.
    #[must_use]
    pub fn with_reader(mut self, reader: TableReader) -> Self {
        self.kernel.set_reader(reader);
        self
    }

    /// Sets the counters of the source of events.
    #[must_use]
    pub fn with_source_stats(mut self, stats: Arc<SourceStats>) -> Self {
        self.source_stats = Some(stats);
        self
    }

    /// Returns the objects of services.
    pub fn store(&self) -> &Store {
        self.services.engine.store()
    }

    pub fn policies(&self) -> Option<&policies::Engine> {
        self.policies.as_ref().map(|policies| &policies.engine)
    }

    /// Applies events and writes the resulting changes.
    pub fn handle(&mut self, deliveries: impl IntoIterator<Item = Delivery>) -> Outcome {
        self.apply(deliveries);
        let mut outcome = self.work(Engines::ALL).together();
        while outcome == Outcome::Synced && self.has_more() {
            outcome = self.work(Engines::SERVICES).together();
        }
        outcome
    }

    /// Returns whether portions of services wait for another call of [`Controller::work`].
    pub fn has_more(&self) -> bool {
        self.services.has_more()
    }

    /// Returns whether portions wait, or another thread compares tables.
    pub(crate) fn is_at_work(&self) -> bool {
        let policies = self.policies.as_ref();
        let comparing = self.services.is_comparing() || policies.is_some_and(Driver::is_comparing);
        self.has_more() || comparing
    }

    /// Applies events to the engines without writing anything.
    pub fn apply(&mut self, deliveries: impl IntoIterator<Item = Delivery>) {
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

    /// Writes the rules of policies that must be in force before the lists are complete, if any.
    pub fn start(&mut self) -> Outcomes {
        let policies = self.policies.as_ref();
        let early = policies.is_some_and(|it| it.engine.early_rules().is_some());
        self.work(Engines {
            services: false,
            policies: early,
        })
    }

    /// Restores what another process may have changed before the lists are complete.
    pub(crate) fn restore_before_lists(&mut self) -> Outcomes {
        self.kernel.remove_foreign_base_chains();
        let policies = self.policies.as_mut();
        Outcomes {
            services: None,
            policies: policies.and_then(|it| it.restore_early_rules(&mut self.kernel)),
        }
    }

    /// Returns whether pods must be isolated before they are known, and the Node object does not
    /// say where.
    pub(crate) fn node_lacks_pod_network(&self) -> bool {
        let policies = self.policies.as_ref();
        policies.is_some_and(|policies| policies.engine.node_lacks_pod_network())
    }

    /// Writes the changes of the selected engines.
    pub fn work(&mut self, engines: Engines) -> Outcomes {
        // Policies first: a new pod is isolated before a service forwards traffic to it.
        let policies = engines.policies.then(|| self.work_on_policies());
        let services = engines.services.then(|| self.work_on_services());
        Outcomes { services, policies }
    }

    /// Writes the changes of new events first, then a portion that waits.
    fn work_on_services(&mut self) -> Outcome {
        let marked = self.services.engine.is_marked();
        let mut outcome = self.services.work(&mut self.kernel);
        self.finish_services();
        if marked && outcome == Outcome::Synced && self.has_more() {
            outcome = self.services.work(&mut self.kernel);
            self.finish_services();
        }
        outcome
    }

    fn work_on_policies(&mut self) -> Outcome {
        let Some(policies) = &mut self.policies else {
            return Outcome::Synced;
        };
        let mut outcome = policies.work(&mut self.kernel);
        let mut state = policies.state;
        self.finish_policies();
        // Events that arrived while another thread compared are not written yet.
        if let Some(policies) = &mut self.policies
            && outcome == Outcome::Synced
            && policies.has_more()
        {
            outcome = policies.work(&mut self.kernel);
            state = policies.state;
            self.finish_policies();
        }
        match outcome {
            // Services do not wait for the first lists of policies.
            Outcome::Waiting if state == DriverState::Listing && self.services.engine.is_on() => {
                Outcome::Synced
            }
            outcome => outcome,
        }
    }

    /// Compares the services with what the kernel holds and writes the difference.
    ///
    /// Does nothing before the lists are complete.
    #[cfg(test)]
    pub(crate) fn resync(&mut self) -> Outcome {
        let outcome = self.services.compare(&mut self.kernel);
        self.finish_services();
        outcome
    }

    /// Updates metrics and notifies followers after services took effect.
    fn finish_services(&mut self) {
        let Some((stats, change)) = self.services.take_in_force() else {
            return;
        };
        let metrics = self.kernel.metrics;
        if stats.wrote {
            metrics.sync(stats.compared, stats.took);
        }
        self.followers.hand_services(change);
        metrics.compiled(self.services.engine.take_compiled());
        let engine = &self.services.engine;
        let is_waiting = |service: &_| engine.is_waiting(service);
        self.latency.in_force(metrics, is_waiting);
        let (services, endpoints) = self.latency.pending();
        metrics.pending(services, endpoints);
        let policies = self.policies.as_ref();
        for kind in Kind::ALL {
            let of_policies = policies.map_or(0, |policies| policies.engine.count(kind));
            metrics.objects(kind.as_str(), engine.count(kind) + of_policies);
        }
        metrics.refused(engine.left_out());
        metrics.chains(engine.chains());
        metrics.no_local_endpoints(engine.no_local_endpoints());
    }

    /// Updates metrics and notifies followers after policies took effect.
    fn finish_policies(&mut self) {
        let Some(policies) = &mut self.policies else {
            return;
        };
        let Some((stats, mut change)) = policies.take_in_force() else {
            return;
        };
        let changed = std::mem::take(&mut change.policies);
        let is_accepted = |policy: &_| policies.engine.is_accepted(policy);
        self.policy_times
            .record(changed, is_accepted, SystemTime::now());
        let metrics = self.kernel.metrics;
        if stats.wrote {
            metrics.policy_sync(stats.took);
        }
        // A comparison in another thread leaves the events since its start.
        if !policies.has_more() {
            self.latency.policies_in_force(metrics);
        }
        if let Some(isolated) = &change.isolated {
            let pods = isolated.iter().filter_map(|(_, pod)| pod.as_ref());
            metrics.isolated_pods(pods.collect::<BTreeSet<_>>().len());
        }
        self.followers.hand_policies(change);
    }

    /// Compares with the kernel after another process may have changed the tables, and restores them.
    /// Returns whether anything was restored. Reads nothing if no other process committed anything
    /// since the last comparison.
    pub fn heal(&mut self) -> (Outcomes, bool) {
        if self.is_synced() && self.kernel.is_as_expected() {
            return (Outcomes::default(), false);
        }
        if self.waits_for_lists() {
            self.kernel.remove_foreign_base_chains();
        }
        self.kernel.set_expected_to_current();
        let policies = self.policies.as_mut();
        let policies = policies.map_or_else(Healed::default, |it| it.heal(&mut self.kernel));
        self.finish_policies();
        let services = self.services.heal(&mut self.kernel);
        self.finish_services();
        let outcomes = Outcomes {
            services: services.outcome,
            policies: policies.outcome,
        };
        (outcomes, policies.changed || services.changed)
    }

    /// Requests the kernel's generation, and records the time if all wanted rules are in force.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub(crate) fn ping_kernel(&mut self) -> Result<(), netlink::Error> {
        self.kernel.generation()?;
        if self.is_synced() && !self.services.engine.is_marked() {
            self.kernel.metrics.in_order();
        }
        Ok(())
    }

    /// Returns whether the rules written last are known to be in force.
    pub(crate) fn is_synced(&self) -> bool {
        let policies = self.policies.as_ref().is_none_or(|policies| {
            policies.state == DriverState::Synced
                || policies.state == DriverState::Listing && self.services.engine.is_on()
        });
        self.services.state == DriverState::Synced && policies
    }

    /// Returns whether some tables cannot be compared, because lists are not complete.
    fn waits_for_lists(&self) -> bool {
        let policies = self.policies.as_ref();
        let policies =
            policies.is_some_and(|it| it.state == DriverState::Listing || !it.engine.is_ready());
        self.services.state == DriverState::Listing || policies
    }

    /// Returns and resets whether another process committed something while the monitor was muted.
    pub(crate) fn take_missed_notifications(&mut self) -> bool {
        self.kernel.take_missed_notifications()
    }

    /// Releases the objects that the kernel refused earlier, so that the next call writes them.
    pub fn retry_quarantined(&mut self) {
        if let Some(policies) = &mut self.policies {
            policies.engine.retry_quarantined();
        }
        self.services.engine.retry_quarantined();
    }

    /// Returns when an engine has something to do without an event.
    pub fn due(&self) -> Option<Instant> {
        let policies = self.policies.as_ref().and_then(Driver::due);
        self.services.due().into_iter().chain(policies).min()
    }

    /// Returns whether the lists of policies are complete, or no policies are enforced.
    pub(crate) fn policies_ready(&self) -> bool {
        let policies = self.policies.as_ref();
        policies.is_none_or(|policies| policies.engine.is_ready())
    }

    /// Returns whether policies are in force, or the reason why not; `None` if there are none to
    /// enforce.
    pub(crate) fn policies_in_force(&self) -> Option<Result<(), String>> {
        let policies = self.policies.as_ref().filter(|it| it.engine.is_on())?;
        // While lists are read again, the previous rules are in force. The first policies of a
        // cluster, however, wait for the first lists of pods.
        let known = policies.has_written_all() && !policies.engine.has_first_policies();
        let pod_network = policies.engine.pod_network();
        if known && policies.state != DriverState::Unknown {
            if policies.engine.waits_for_nodes() {
                return Some(Err(
                    "waiting for the list of all Nodes, which cluster policies select".to_owned(),
                ));
            }
            return Some(pod_network);
        }
        if let Some(failure) = policies.failure() {
            return Some(Err(failure.to_owned()));
        }
        if policies.is_comparing() {
            return Some(Err(
                "the tables are being compared with the kernel".to_owned()
            ));
        }
        let missing = policies.engine.missing();
        if missing.is_empty() && pod_network.is_err() {
            return Some(pod_network);
        }
        let kinds: Vec<&str> = missing.iter().map(|kind| kind.as_str()).collect();
        let mut why = format!("waiting for the complete list of {}", kinds.join(", "));
        let stats = self.source_stats.iter();
        let faults =
            stats.flat_map(|stats| missing.iter().filter_map(|kind| stats.fault_of(*kind)));
        // Several kinds may have the same fault.
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
                message: format!("not in force on this node: {why}"),
            });
        }
    }

    /// Returns the kinds without a complete list.
    pub(crate) fn missing(&self) -> Vec<Kind> {
        let policies = self.policies.as_ref();
        let missing = policies.map_or_else(Vec::new, |policies| policies.engine.missing());
        [self.services.engine.missing(), missing].concat()
    }
}

#[cfg(test)]
pub(crate) mod tests;
