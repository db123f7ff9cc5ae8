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

mod affinity;
mod audit;
pub mod connections;
pub mod conntrack;
pub mod denied;
mod health_checks;
mod kernel;
mod policies;
mod programmed;
mod questions;
mod report;
mod run;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::watch;

use crate::compile::{self, AFFINITY, Settings, TABLE};
use crate::health::Checks;
use crate::metrics::Metrics;
use crate::model::{
    Changes, Delivery, Event, Family, Kind, Node, Notice, ObjectName, ObjectRef, Reason, Store,
    Subject,
};
use crate::netlink::{self, Place};
use crate::policy::Engine;
use crate::ruleset::{Op, Ruleset, Transaction, diff};

pub use audit::{Audits, EVERY as AUDIT_EVERY, Finding, Snapshot, Step, Verdict};
pub use kernel::Kernel;
pub use policies::Isolated;
pub use programmed::Programmed;
pub use questions::Question;
pub use report::{Log, LogAndSend, Reporter};
pub use run::{Exit, Signals, run};

use affinity::Remembered;
use conntrack::{Front, Work};
use health_checks::HealthChecks;
use policies::{Followers, Policies};
use programmed::{Draft, Effects};

/// How often remembered clients are read again when some time out meanwhile.
const FORGET_ATTEMPTS: usize = 8;
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
    state: State,
    metrics: &'a Metrics,
    reporter: &'a dyn Reporter,
    /// When chains became unused that may be removed later.
    unused_since: Option<Instant>,
    changes: Changes,
    /// Arrival times of events whose rules are not in force yet.
    waiting: Vec<Instant>,
    /// How many service and endpoint changes these are.
    pending: (usize, usize),
    /// Frontends whose flows may be stale once the rules are in force.
    flows: Work,
    /// Where these go then.
    cleaner: Option<conntrack::Queue>,
    health_checks: Option<HealthChecks>,
    policies: Option<Policies>,
    followers: Followers,
    /// Whether denied packets are logged with fields.
    log_fields: bool,
    /// Operations that undid what others had changed.
    healed: usize,
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

impl Outcome {
    /// What two parts that are independent of each other achieved together.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Outcome::Failed, _) | (_, Outcome::Failed) => Outcome::Failed,
            (Outcome::Waiting, _) | (_, Outcome::Waiting) => Outcome::Waiting,
            (Outcome::Synced, Outcome::Synced) => Outcome::Synced,
        }
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
            settings,
            store: Store::default(),
            refused: BTreeSet::new(),
            state: State::Listing,
            metrics,
            reporter,
            unused_since: None,
            changes: Changes::default(),
            waiting: Vec::new(),
            pending: (0, 0),
            flows: Work::default(),
            cleaner: None,
            health_checks: None,
            policies: None,
            followers: Followers::default(),
            log_fields: false,
            healed: 0,
            vouched: None,
            doubtful: false,
            writes: 0,
        }
    }

    /// With what stands in for the own node while its object is missing.
    #[must_use]
    pub fn with_stand_in(mut self, node: Node) -> Self {
        self.store = Store::with_stand_in(node);
        self
    }

    /// With someone to delete the UDP flows that changes of the rules leave stale.
    #[must_use]
    pub fn with_cleaner(mut self, cleaner: conntrack::Queue) -> Self {
        self.cleaner = Some(cleaner);
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

    /// The rules the objects ask for, from scratch, as a new process would compile them.
    pub fn wanted(store: &Store, settings: &Settings) -> Ruleset {
        let mut programmed = Programmed::new(settings.clone());
        programmed.set_skeletons(store, None);
        for service in store.services() {
            let plan = compile::plan(store, &service.name, settings, None);
            programmed.set_plan(&service.name, plan, &mut Effects::default(), None);
        }
        programmed.ruleset()
    }

    /// Takes over events and brings the kernel in line with them.
    pub fn handle(&mut self, deliveries: impl IntoIterator<Item = Delivery>) -> Outcome {
        self.take_over(deliveries);
        let policies = self.handle_policies();
        let services = match self.state {
            State::Listing if !self.store.is_complete() => Outcome::Waiting,
            State::Listing | State::Unknown => self.resync(),
            State::Synced => self.update(),
        };
        services.and(policies)
    }

    /// Takes over events without writing anything: for while a retry is due, because each attempt
    /// reads and compares whole tables, however few events there are.
    pub fn take_over(&mut self, deliveries: impl IntoIterator<Item = Delivery>) {
        let mut changes = std::mem::take(&mut self.changes);
        let (mut services, mut endpoints) = (0, 0);
        for delivery in deliveries {
            let counts = !matches!(delivery.event, Event::Notice(_));
            if counts && self.waiting.len() < MOST_WAITING {
                self.waiting.push(delivery.at);
            }
            match delivery.event.kind() {
                Some(Kind::Service) => services += 1,
                Some(Kind::EndpointSlice) => endpoints += 1,
                Some(Kind::Node | Kind::ServiceCidr) | None => {}
                Some(Kind::Pod | Kind::Namespace | Kind::NetworkPolicy) => {}
            }
            if let Some(event) = self.take_policy_event(delivery) {
                self.store.apply(event, &mut changes);
            }
        }
        self.metrics.changes(services, endpoints);
        self.pending = (self.pending.0 + services, self.pending.1 + endpoints);
        self.metrics.pending(self.pending.0, self.pending.1);
        self.metrics.queued();
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

    /// Writes what changed.
    fn update(&mut self) -> Outcome {
        let started = Instant::now();
        let changes = std::mem::take(&mut self.changes);
        if changes.is_empty() {
            self.settle(&changes);
            return Outcome::Synced;
        }
        for name in &changes.services {
            tracing::trace!("Service {name} is compiled again");
        }
        let mut draft = Draft::default();
        let effects = self.draft(&changes, Some(&mut draft));
        self.flows.merge(effects.flows);
        let transaction = draft.finish(&self.programmed);
        match self.write(transaction) {
            Ok(()) => {
                self.metrics.sync(false, started.elapsed());
                self.settle(&changes);
                self.forget(effects.remembered);
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

    /// Compiles what changed, into the draft if there is one.
    fn draft(&mut self, changes: &Changes, mut draft: Option<&mut Draft>) -> Effects {
        if changes.node || changes.service_cidrs {
            self.programmed
                .set_skeletons(&self.store, draft.as_deref_mut());
        }
        let mut effects = Effects::default();
        let mut set_plan = |name: &ObjectName| {
            let plan = if self.refused.contains(name) {
                None
            } else {
                let previous = self.programmed.plan(name);
                compile::plan(&self.store, name, &self.settings, previous)
            };
            self.programmed
                .set_plan(name, plan, &mut effects, draft.as_deref_mut());
            if let Some(checks) = &mut self.health_checks {
                checks.changed(name);
            }
        };
        if changes.node {
            // Which endpoints are local is in every service's plan.
            let store = &self.store;
            let gone = changes.services.iter();
            gone.filter(|name| store.service(name).is_none())
                .for_each(&mut set_plan);
            store.services().for_each(|service| set_plan(&service.name));
            // NodePorts may answer on other addresses now.
            for plan in self.programmed.plans() {
                let node_port = |front: &Front| matches!(front, Front::NodePort(..));
                effects.flows.suspect(plan, node_port);
            }
        } else {
            changes.services.iter().for_each(set_plan);
        }
        effects
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
        let effects = self.draft(&changes, None);
        self.flows.merge(effects.flows);
        for _ in 0..=MOST_REFUSALS {
            match self.attempt() {
                Ok(healed) => {
                    if !first {
                        self.metrics.healed(healed);
                    }
                    self.metrics.sync(true, started.elapsed());
                    self.state = State::Synced;
                    // Whatever happened while the kernel was not as wanted, the flows of all
                    // services may tell of it.
                    for plan in self.programmed.plans() {
                        self.flows.suspect(plan, |_| true);
                    }
                    self.settle(&changes);
                    self.forget(Remembered::all(self.programmed.plans()));
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

    /// Compares with what the kernel holds after somebody else changed the tables, and puts back
    /// what was changed. Returns whether anything was. Reads nothing where nobody else can have
    /// changed anything since the last time.
    pub fn heal(&mut self) -> (Outcome, bool) {
        let now = self.kernel.generation().ok();
        if self.vouches_for(now) && self.is_synced() {
            return (Outcome::Synced, false);
        }
        self.vouched = now;
        let (policies, policies_changed) = self.heal_policies();
        let (services, services_changed) = self.heal_services();
        let changed = policies_changed || services_changed;
        (services.and(policies), changed)
    }

    /// Whether nobody else has written since the kernel was compared.
    fn is_vouched_for(&mut self) -> bool {
        let now = self.kernel.generation().ok();
        self.vouches_for(now)
    }

    fn vouches_for(&self, generation: Option<u32>) -> bool {
        generation.is_some() && generation == self.vouched
    }

    /// Whether what was written is known to be in force, as far as something was to be written.
    fn is_synced(&self) -> bool {
        let policies = self.policies.as_ref();
        self.state == State::Synced && policies.is_none_or(|p| p.state != State::Unknown)
    }

    /// Whether somebody else wrote to the kernel while the monitor was kept from hearing it; tells
    /// so once.
    pub fn take_doubt(&mut self) -> bool {
        std::mem::take(&mut self.doubtful)
    }

    /// Notes the generation before the kernel is read for the first time.
    fn vouch(&mut self) {
        if self.vouched.is_none() {
            self.vouched = self.kernel.generation().ok();
        }
    }

    fn heal_services(&mut self) -> (Outcome, bool) {
        if self.state != State::Synced {
            // What is about to be written compares anyway.
            return (self.resync(), true);
        }
        let started = Instant::now();
        match self.attempt() {
            Ok(0) => (Outcome::Synced, false),
            Ok(operations) => {
                self.metrics.sync(true, started.elapsed());
                self.report_healing(TABLE, operations, started.elapsed());
                (Outcome::Synced, true)
            }
            Err(error) => {
                self.metrics.failure();
                self.reporter.failed(&error);
                self.state = State::Unknown;
                (self.resync(), true)
            }
        }
    }

    fn report_healing(&mut self, table: &str, operations: usize, took: Duration) {
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

    /// Reads, compares, writes; returns the number of operations it took.
    fn attempt(&mut self) -> Result<usize, netlink::Error> {
        self.vouch();
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
        let mut effects = Effects::default();
        self.programmed.set_plan(&owner, None, &mut effects, None);
        self.flows.merge(effects.flows);
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

    fn write(&mut self, transaction: Transaction) -> Result<(), netlink::Error> {
        for step in transaction.into_steps() {
            let started = Instant::now();
            let applied = self.kernel.apply(&step)?;
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

    /// Forgets the clients that are remembered for an endpoint that went away.
    ///
    /// This follows the transaction that took the endpoint away: the other way round a client
    /// could be sent there, and be remembered for it, once more.
    fn forget(&mut self, mut remembered: Remembered) {
        let node = self.store.node().map(|node| &**node);
        let pods = Family::ALL.map(|family| self.settings.pod_networks(family, node));
        let own = node.map(|node| [&node.internal_ips[..], &node.external_ips].concat());
        let own = own.unwrap_or_default().into_iter().map(IpNet::from);
        remembered.set_inside(pods.into_iter().flatten().chain(own).collect());
        for family in Family::ALL {
            if remembered.is_empty(family) {
                continue;
            }
            for attempt in 1..=FORGET_ATTEMPTS {
                match self.forget_once(family, &remembered) {
                    Ok(()) => break,
                    Err(error) if attempt < FORGET_ATTEMPTS => {
                        // An element that times out between reading and deleting fails the
                        // whole transaction; what is left is read again.
                        tracing::debug!("session affinity: {error}");
                    }
                    Err(error) => tracing::warn!(
                        "{error}; clients with session affinity may stay with {family} endpoints \
                         that are gone until the next change of their service"
                    ),
                }
            }
        }
    }

    fn forget_once(
        &mut self,
        family: Family,
        remembered: &Remembered,
    ) -> Result<(), netlink::Error> {
        let table = compile::table_id(family);
        let known = self.kernel.elements(&table, AFFINITY)?;
        let stale = remembered.stale(family, known);
        if stale.is_empty() {
            return Ok(());
        }
        let declaration = compile::affinity_declaration();
        let ops = vec![Op::DeleteElements(
            table,
            AFFINITY.into(),
            declaration,
            stale,
        )];
        self.write(Transaction { ops })
    }

    /// Books what a successful write means.
    fn settle(&mut self, changes: &Changes) {
        self.pending = (0, 0);
        self.metrics.pending(0, 0);
        self.clean_flows();
        if !self
            .policies
            .as_ref()
            .is_some_and(|p| p.state == State::Unknown)
        {
            for at in self.waiting.drain(..) {
                self.metrics.programmed(at.elapsed());
            }
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
            let of_policies = self.policies.as_ref().map_or(0, |p| p.engine.count(kind));
            let count = self.store.count(kind) + of_policies;
            self.metrics.objects(kind.as_str(), count);
        }
        self.metrics.refused(self.refused.len());
        self.metrics.chains(self.programmed.chains());
        let no_local = self.programmed.no_local_endpoints();
        self.metrics.no_local_endpoints(no_local);
        let unused = self.programmed.has_unused_chains();
        self.unused_since = match self.unused_since {
            Some(since) if unused => Some(since),
            _ => unused.then(Instant::now),
        };
    }

    /// Hands over the frontends whose flows may be stale, now that the rules are in force.
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

    /// How long to wait until [`Reconciler::remove_unused_chains`] is worth calling; `None` while
    /// all chains are used.
    pub fn unused_chains_due(&self) -> Option<Duration> {
        let since = self.unused_since.filter(|_| self.state == State::Synced)?;
        Some(KEEP_UNUSED_CHAINS.saturating_sub(since.elapsed()))
    }

    /// Removes shared chains that no service uses, at once.
    pub fn remove_unused_chains(&mut self) -> Outcome {
        self.unused_since = None;
        let transaction = self.programmed.remove_unused_chains();
        match self.write(transaction) {
            Ok(()) => Outcome::Synced,
            Err(error) => {
                self.metrics.failure();
                self.reporter.failed(&error);
                self.state = State::Unknown;
                self.resync()
            }
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
