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

pub mod affinity;
mod audit;
pub mod connections;
pub mod conntrack;
pub mod denied;
mod health_checks;
mod hooks;
mod kernel;
mod policies;
mod portions;
mod programmed;
mod questions;
mod removed;
mod repair;
mod report;
mod run;
mod schedule;
mod update;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::compile::{self, Settings, TooLarge};
use crate::health::Checks;
use crate::metrics::Metrics;
use crate::model::{
    Changes, Delivery, Event, Family, Kind, Node, Notice, ObjectName, ObjectRef, Reason, Store,
    Subject,
};
use crate::netlink;
use crate::policy::Engine;
use crate::ruleset::{self, Ruleset, Transaction};
use crate::source::SourceStats;

pub use audit::{Audits, EVERY as AUDIT_EVERY, Finding, Snapshot, Step, Verdict};
pub use hooks::remove_foreign_hooks;
pub use kernel::Kernel;
pub use policies::Isolated;
pub use programmed::{Programmed, Sticky};
pub use questions::Question;
pub use report::{Log, LogAndSend, Reporter};
pub use run::{Exit, Signals, run};

use affinity::Suspects;
use conntrack::Work;
use health_checks::HealthChecks;
use policies::{Followers, Policies};
use portions::{Queue, Timings};
use programmed::Effects;
use repair::ForeignChange;

/// How many events that wait for their rules are timed; the kernel may be out of order for long.
const MOST_WAITING: usize = 1 << 16;
/// How many services or policies are left out in one attempt before giving up until the next.
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
    /// Services that ask for more elements than one may have; left out until they ask for fewer.
    too_large: BTreeSet<ObjectName>,
    /// Changes that are written in portions.
    queue: Queue,
    /// The elements of a portion.
    portion: usize,
    state: State,
    metrics: &'a Metrics,
    reporter: &'a dyn Reporter,
    changes: Changes,
    /// Arrival times of events whose rules are not in force yet, with the service of each.
    waiting: Vec<(Option<ObjectName>, Instant)>,
    /// Times of events whose rules are in force with the next write.
    in_time: Timings,
    /// How many service and endpoint changes these are.
    pending: (usize, usize),
    /// Frontends whose flows may be stale once the rules are in force.
    flows: Work,
    /// Clients that may be left without their endpoint once the rules are in force. They stay here
    /// until they are handed over, whatever fails meanwhile.
    clients: Suspects,
    /// Where flows go then.
    cleaner: Option<conntrack::Queue>,
    /// Who reads the maps of clients with session affinity.
    forgetter: Option<affinity::Queue>,
    /// Where the namespaces that remember clients are published.
    sticky: Option<watch::Sender<Sticky>>,
    health_checks: Option<HealthChecks>,
    policies: Option<Policies>,
    /// What keeps lists from being complete is asked there.
    source_stats: Option<Arc<SourceStats>>,
    followers: Followers,
    /// Whether denied packets are logged with fields.
    log_fields: bool,
    /// Operations that undid what others had changed.
    healed: usize,
    /// What others changed in the tables of services.
    foreign: ForeignChange,
    /// The generation that the kernel is in if nobody else wrote since it was read: own writes
    /// count up. `None` until it is read, or when that is to be done again.
    vouched: Option<u32>,
    /// Somebody else wrote while nobody listened.
    doubtful: bool,
    /// How many transactions were written.
    writes: u64,
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
            store: settings.store(Store::default()),
            settings,
            refused: BTreeSet::new(),
            too_large: BTreeSet::new(),
            queue: Queue::default(),
            portion: portions::MOST_ELEMENTS,
            state: State::Listing,
            metrics,
            reporter,
            changes: Changes::default(),
            waiting: Vec::new(),
            in_time: Timings::default(),
            pending: (0, 0),
            flows: Work::default(),
            clients: Suspects::default(),
            cleaner: None,
            forgetter: None,
            sticky: None,
            health_checks: None,
            policies: None,
            source_stats: None,
            followers: Followers::default(),
            log_fields: false,
            healed: 0,
            foreign: ForeignChange::default(),
            vouched: None,
            doubtful: false,
            writes: 0,
        }
    }

    /// With so many elements in a portion of a large change, about.
    #[must_use]
    pub fn with_portions_of(mut self, elements: usize) -> Self {
        self.portion = elements;
        self
    }

    /// With what stands in for the own node while its object is missing.
    #[must_use]
    pub fn with_stand_in(mut self, node: Node) -> Self {
        self.store = self.settings.store(Store::with_stand_in(node));
        self
    }

    /// With someone to delete the UDP flows that changes of the rules leave stale.
    #[must_use]
    pub fn with_cleaner(mut self, cleaner: conntrack::Queue) -> Self {
        self.cleaner = Some(cleaner);
        self
    }

    /// With someone to read which clients are remembered, who asks [`Question::Forget`].
    #[must_use]
    pub fn with_forgetter(mut self, forgetter: affinity::Queue) -> Self {
        self.forgetter = Some(forgetter);
        self
    }

    /// Publishes the namespaces that remember clients, each time others do.
    #[must_use]
    pub fn with_sticky(mut self, sticky: watch::Sender<Sticky>) -> Self {
        self.sticky = Some(sticky);
        self
    }

    /// Publishes the health checks that services want, each time their rules are in force.
    #[must_use]
    pub fn with_health_checks(mut self, checks: watch::Sender<Checks>) -> Self {
        self.health_checks = Some(HealthChecks::new(checks));
        self
    }

    /// With the policies of an engine. Without one the policy tables are left alone.
    #[must_use]
    pub fn with_policies(mut self, engine: Engine) -> Self {
        self.policies = Some(Policies::new(engine));
        self
    }

    /// With the counters of the source of events.
    #[must_use]
    pub fn with_source_stats(mut self, stats: Arc<SourceStats>) -> Self {
        self.source_stats = Some(stats);
        self
    }

    /// Publishes the isolated pods of this node, each time others are.
    #[must_use]
    pub fn with_isolated(mut self, isolated: watch::Sender<Isolated>) -> Self {
        self.followers.isolated = Some(isolated);
        self
    }

    /// With someone to cut the connections that the policies allow no more.
    #[must_use]
    pub fn with_cutter(mut self, cutter: connections::Bell) -> Self {
        self.followers.cutter = Some(cutter);
        self
    }

    /// Logs denied packets with their parts as fields, for a log that machines read.
    #[must_use]
    pub fn with_log_fields(mut self, fields: bool) -> Self {
        self.log_fields = fields;
        self
    }

    /// The objects as they are known.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The rules the objects ask for, from scratch, as a new process would compile them. Services
    /// that ask for too much are left out and named.
    pub fn wanted(store: &Store, settings: &Settings) -> (Ruleset, Vec<Notice>) {
        let mut programmed = Programmed::new(settings.clone());
        programmed.set_skeletons(store, None);
        let mut notices = Vec::new();
        for service in store.services() {
            let name = &service.name;
            let plan = compile::plan(store, name, settings, None).unwrap_or_else(|error| {
                notices.push(too_large(name, error));
                None
            });
            if let Some(change) = programmed.change(name, plan) {
                programmed.replace(name, &change, &mut Effects::default(), None);
            }
        }
        (programmed.ruleset(), notices)
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
        self.state == State::Synced && !(self.queue.is_empty() && self.changes.is_empty())
    }

    /// Brings parts of the rules in line with the events taken over.
    pub fn work(&mut self, parts: Parts) -> Outcomes {
        // In this order: a new pod is isolated before a service leads to it.
        let policies = parts.policies.then(|| self.handle_policies());
        let services = parts.services.then(|| match self.state {
            State::Listing if !self.store.is_complete() => Outcome::Waiting,
            State::Listing | State::Unknown => self.resync(),
            State::Synced => self.update(),
        });
        Outcomes { services, policies }
    }

    /// Takes over events without writing anything.
    pub fn take_over(&mut self, deliveries: impl IntoIterator<Item = Delivery>) {
        let (mut services, mut endpoints) = (0, 0);
        let mut changes = std::mem::take(&mut self.changes);
        for delivery in deliveries {
            match delivery.event.kind() {
                Some(Kind::Service) => services += 1,
                Some(Kind::EndpointSlice) => endpoints += 1,
                Some(Kind::Node | Kind::ServiceCidr) | None => {}
                Some(Kind::Pod | Kind::Namespace | Kind::NetworkPolicy) => {}
            }
            let Some(delivery) = self.put_off_event(delivery) else {
                continue;
            };
            let counts = !matches!(delivery.event, Event::Servers(_) | Event::Notice(_));
            if counts && self.waiting.len() < MOST_WAITING {
                let service = delivery.event.service().cloned();
                self.waiting.push((service, delivery.at));
            }
            if let Some(event) = self.take_policy_event(delivery) {
                self.store.apply(event, &mut changes);
            }
        }
        self.metrics.changes(services, endpoints);
        self.pending = (self.pending.0 + services, self.pending.1 + endpoints);
        self.metrics.pending(self.pending.0, self.pending.1);
        self.note_changes(changes);
    }

    /// Reports what the store found, and keeps what is to be compiled.
    fn note_changes(&mut self, mut changes: Changes) {
        if !changes.is_empty() {
            self.metrics.queued();
        }
        for notice in changes.notices.drain(..) {
            self.report(notice);
        }
        // While lists are read the names of all services pile up here, over many calls.
        if !self.refused.is_empty() {
            for name in &changes.services {
                self.refused.remove(name);
            }
        }
        changes.triggered_at_ms.truncate(MOST_WAITING);
        self.changes = changes;
    }

    fn write(&mut self, transaction: Transaction) -> Result<(), netlink::Error> {
        for step in transaction.into_steps() {
            let started = Instant::now();
            let applied = self.kernel.apply(&step);
            if applied.is_err() && step.is_cleanup() {
                for family in [ruleset::Family::Ip, ruleset::Family::Ip6] {
                    if step.ops.iter().any(|op| op.table().family == family) {
                        let ipv6 = family == ruleset::Family::Ip6;
                        self.metrics.cleanup_failure(ipv6);
                    }
                }
            }
            let applied = applied?;
            self.writes += 1;
            self.vouched = self.vouched.map(|generation| generation.wrapping_add(1));
            self.doubtful |= applied.unheard && self.kernel.generation().ok() != self.vouched;
            tracing::debug!(
                operations = step.ops.len(),
                elements = applied.elements,
                bytes = applied.bytes,
                took = ?started.elapsed(),
                "transaction"
            );
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
    fn settle(&mut self) {
        self.pending = (0, 0);
        self.metrics.pending(0, 0);
        self.hand_over();
        if !self
            .policies
            .as_ref()
            .is_some_and(|p| p.state == State::Unknown)
        {
            let waiting = self.waiting.drain(..).map(|(_, at)| at);
            for at in waiting.chain(self.in_time.arrived.drain(..)) {
                self.metrics.programmed(at.elapsed());
            }
        }
        let triggered = std::mem::take(&mut self.changes.triggered_at_ms);
        let triggered = triggered.into_iter().map(|(_, at)| at);
        for triggered in triggered.chain(self.in_time.triggered_at_ms.drain(..)) {
            if let Some(since) = milliseconds_since(triggered) {
                self.metrics.network_programming(since);
            }
        }
        if let Some(checks) = &mut self.health_checks {
            let (refused, too_large) = (&self.refused, &self.too_large);
            checks.publish(&self.store, |name| {
                refused.contains(name) || too_large.contains(name)
            });
        }
        for kind in Kind::ALL {
            let of_policies = self.policies.as_ref().map_or(0, |p| p.engine.count(kind));
            let count = self.store.count(kind) + of_policies;
            self.metrics.objects(kind.as_str(), count);
        }
        self.metrics
            .refused(self.refused.len() + self.too_large.len());
        self.metrics.chains(self.programmed.chains());
        self.publish_sticky();
        let no_local = self.programmed.no_local_endpoints();
        self.metrics.no_local_endpoints(no_local);
    }

    fn publish_sticky(&mut self) {
        if let Some(sender) = &self.sticky
            && let Some(sticky) = self.programmed.take_other_clients()
        {
            sender.send_replace(sticky);
        }
    }

    /// Takes over what changes bring with them once their rules are in force. This precedes the
    /// write, because steps of one that fails may be in force.
    fn note(&mut self, effects: Effects) {
        self.flows.merge(effects.flows);
        self.clients.merge(effects.clients);
    }

    /// Hands over what was noted, now that the rules are in force.
    fn hand_over(&mut self) {
        self.clean_flows();
        self.forget();
    }

    /// Hands over the frontends whose flows may be stale.
    fn clean_flows(&mut self) {
        let mut work = std::mem::take(&mut self.flows);
        let Some(cleaner) = self.cleaner.as_ref().filter(|_| !work.is_empty()) else {
            return;
        };
        let node = self.store.node().map(|node| &**node);
        let ranges = Family::ALL.map(|family| self.settings.nodeport_ranges(family, node));
        work.set_node_ports(ranges.concat());
        cleaner.send(work);
    }

    /// How long to wait until a shared chain was unused for as long as such are kept; `None` while
    /// all are used.
    pub fn unused_chains_due(&self) -> Option<Duration> {
        let synced = self.state == State::Synced;
        let since = self.programmed.unused_since().filter(|_| synced)?;
        Some(KEEP_UNUSED_CHAINS.saturating_sub(since.elapsed()))
    }

    /// Removes the shared chains that were unused for as long as such are kept.
    pub fn remove_unused_chains(&mut self) -> Outcomes {
        let moment = Instant::now().checked_sub(KEEP_UNUSED_CHAINS);
        moment.map_or_else(Outcomes::default, |moment| {
            self.remove_chains_unused_since(moment)
        })
    }

    /// Removes the shared chains that no service has used since a moment. Does nothing while it is
    /// unknown what is in force.
    pub fn remove_chains_unused_since(&mut self, moment: Instant) -> Outcomes {
        if self.state != State::Synced {
            return Outcomes::default();
        }
        let transaction = self.programmed.remove_chains_unused_since(moment);
        let outcome = match self.write(transaction) {
            Ok(()) => {
                self.publish_sticky();
                Outcome::Synced
            }
            Err(error) => self.write_failed(&error),
        };
        Outcomes {
            services: Some(outcome),
            policies: None,
        }
    }

    fn report(&self, notice: Notice) {
        self.metrics.notice(notice.reason.as_str());
        self.reporter.notice(&notice);
    }
}

fn too_large(service: &ObjectName, error: TooLarge) -> Notice {
    Notice {
        subject: Subject::Object(ObjectRef::new(Kind::Service, service.clone())),
        reason: Reason::TooLarge,
        message: error.to_string(),
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
