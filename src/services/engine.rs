//! Turns services and their endpoints into rules.
//!
//! `apply` stores objects in the [`Store`], which marks the services that an event concerns.
//! `update` compiles these into plans, compares each plan with the one in force, and returns the
//! operations for the elements that differ.
//!
//! Small changes are returned at once, in one transaction; large ones enter the [`ServiceQueue`], of
//! which each call processes one portion.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::change::PlanChange;
use super::layout::TABLE;
use super::plan::ServicePlan;
use super::queue::ServiceQueue;
use super::removed::RemovedFrontends;
use super::replaced::{HealthCheck, Replaced, ServiceChanges};
use super::service::plan;
use super::settings::ServiceSettings;
use super::size::{TooLarge, elements};
use super::tables::{NoLocalEndpoints, Tables, TransactionDraft};
use crate::clock;
use crate::engine::{self, BUDGET, Update};
use crate::model::{Event, Family, Kind, Node, Notice, ObjectName, ObjectRef, Reason, Subject};
use crate::nft::{ObjectPath, Ruleset, Transaction};
use crate::services::{Marks, Store};

mod portions;

/// The time for which unused shared chains are kept: a service that is deleted and created anew uses
/// them again.
const KEEP_UNUSED_CHAINS: Duration = Duration::from_secs(60);

/// The engine of the rules for services.
#[derive(Debug)]
pub struct Engine {
    settings: ServiceSettings,
    store: Store,
    tables: Tables,
    /// Services left out because the kernel refused them.
    quarantined: BTreeSet<ObjectName>,
    /// Services left out because they need too many elements.
    too_large: BTreeSet<ObjectName>,
    /// Services whose changes are applied, compiled and written in portions.
    queue: ServiceQueue,
    /// The number of elements of a portion.
    portion: usize,
    /// Whether the rules were compiled as a whole once; only then may events wait.
    started: bool,
    marks: Marks,
    change: ServiceChanges,
    /// The networks whose local addresses answer NodePorts, as last given to followers.
    node_ports: Option<Arc<[IpNet]>>,
    /// The number of services compiled since it was last taken.
    compiled: usize,
    notices: Vec<Notice>,
    /// Services that had a health check in their last change.
    checked: HashSet<ObjectName>,
}

/// The changes of plans after a batch of events.
type PlanChanges = Vec<(ObjectName, PlanChange)>;

impl Engine {
    /// Creates an engine that knows no objects.
    pub fn new(settings: ServiceSettings) -> Self {
        Self {
            tables: Tables::new(settings.clone()),
            store: settings.store(Store::default()),
            settings,
            quarantined: BTreeSet::new(),
            too_large: BTreeSet::new(),
            queue: ServiceQueue::default(),
            portion: BUDGET,
            started: false,
            marks: Marks::default(),
            change: ServiceChanges::default(),
            node_ports: None,
            compiled: 0,
            notices: Vec::new(),
            checked: HashSet::new(),
        }
    }

    /// Sets the Node to use while the own Node object is missing. Call it before the first event.
    #[must_use]
    pub(crate) fn with_fallback_node(mut self, node: Node) -> Self {
        self.store = self.settings.store(Store::with_fallback_node(node));
        self
    }

    /// Sets the number of elements above which a change is divided. Call it before the first event.
    #[must_use]
    pub(crate) fn with_portions_of(mut self, elements: usize) -> Self {
        self.portion = elements;
        self
    }

    /// Returns whether there are rules for services.
    pub(crate) fn is_on(&self) -> bool {
        !self.settings.off
    }

    pub(crate) fn settings(&self) -> &ServiceSettings {
        &self.settings
    }

    /// Returns the known objects.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Returns the compiled tables.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Returns whether a change of a service is being written and no newer event of it waits.
    #[cfg(test)]
    pub(crate) fn is_being_written(&self, service: &ObjectName) -> bool {
        self.queue.is_being_written(service) && !self.queue.has_event(service)
    }

    /// Returns whether no service waits.
    #[cfg(test)]
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_empty()
    }

    /// Returns the number of services that have no rules because the kernel refused them or they
    /// are too large.
    pub fn left_out(&self) -> usize {
        self.quarantined.len() + self.too_large.len()
    }

    /// Returns the services whose rules the kernel refused.
    pub(crate) fn refused(&self) -> impl Iterator<Item = &ObjectName> {
        self.quarantined.iter()
    }

    /// Returns whether the kernel refused the rules of a service.
    pub(crate) fn is_refused(&self, name: &ObjectName) -> bool {
        self.quarantined.contains(name)
    }

    /// Returns and resets the number of services compiled, each as often as it was.
    pub(crate) fn take_compiled(&mut self) -> usize {
        std::mem::take(&mut self.compiled)
    }

    /// Returns the number of shared chains in the kernel.
    pub fn chains(&self) -> usize {
        self.tables.chains()
    }

    /// Returns how many services drop traffic because of a policy Local and no endpoint on this
    /// node.
    pub(crate) fn no_local_endpoints(&self) -> NoLocalEndpoints {
        self.tables.no_local_endpoints()
    }

    /// Returns the plan of a service that is in force or being written.
    pub fn plan(&self, service: &ObjectName) -> Option<&Arc<ServicePlan>> {
        self.tables.shared_plan(service)
    }

    /// Returns whether a change of a service is not yet written completely.
    pub(crate) fn is_waiting(&self, service: &ObjectName) -> bool {
        self.queue.is_queued(service) || self.marks.services.contains(service)
    }

    /// Returns whether an event changed something since the last update.
    pub(crate) fn is_marked(&self) -> bool {
        !self.marks.is_empty()
    }

    /// Removes and returns the services whose endpoints changed, with the time of each change in
    /// milliseconds since 1970 (annotation `endpoints.kubernetes.io/last-change-trigger-time`).
    pub(crate) fn take_triggers(&mut self) -> Vec<(ObjectName, i64)> {
        std::mem::take(&mut self.marks.triggered_at_ms)
    }

    fn apply_event(&mut self, event: Event) {
        self.store.apply(event, &mut self.marks);
        self.note_marks();
    }

    fn note_marks(&mut self) {
        self.notices.append(&mut self.marks.notices);
        // While lists are read, the marks grow to all services over many calls.
        if !self.quarantined.is_empty() {
            for name in &self.marks.services {
                self.quarantined.remove(name);
            }
        }
    }

    fn update_marked(&mut self, draft: &mut TransactionDraft) {
        let mut marks = std::mem::take(&mut self.marks);
        self.marks.triggered_at_ms = std::mem::take(&mut marks.triggered_at_ms);
        if marks.node || marks.service_cidrs {
            self.tables.set_skeletons(&self.store, Some(draft));
        }
        let mut now = self.plan_changes(&mut marks);
        let later = self.split_off_large(&mut now);
        // A change that is written later keeps the frontends of the old plan until then.
        for (name, change) in &later {
            self.queue.reserve(name, change.before());
        }
        for (name, change) in now {
            match self.without_reserved(&name, change) {
                Some(change) => self.replace(&name, &change, Some(draft)),
                None => self.note_unchanged(&name),
            }
        }
        for (name, change) in later {
            match self.without_reserved(&name, change) {
                Some(change) => self.begin(&name, change),
                None => {
                    self.done(&name);
                }
            }
        }
        if marks.node {
            self.note_node_ports();
        }
    }

    /// Compiles the marked services, except large ones and services that wait already.
    fn plan_changes(&mut self, marks: &mut Marks) -> PlanChanges {
        let mut found = Vec::new();
        // Before others are compiled, which may get a frontend that one of these has.
        let (later, now): (Vec<_>, Vec<_>) = std::mem::take(&mut marks.services)
            .into_iter()
            .partition(|name| self.queue.is_compiling_or_writing(name) || self.is_large(name));
        for name in later {
            let in_force = self.tables.shared_plan(&name);
            self.queue.compile(&name, in_force);
        }
        for name in now {
            let plan = self.compile(&name);
            match self.change(&name, plan) {
                Some(change) => found.push((name, change)),
                None => self.note_unchanged(&name),
            }
        }
        found
    }

    /// Returns whether a service has or needs more elements than a portion.
    fn is_large(&self, name: &ObjectName) -> bool {
        let plan = self.tables.plan(name);
        elements(&self.store, name) > self.portion
            || plan.is_some_and(|plan| plan.elements() > self.portion)
    }

    /// Compiles a service. Returns `None` if it has no rules or is left out.
    fn compile(&mut self, name: &ObjectName) -> Option<ServicePlan> {
        self.note_compiled(name);
        let previous = self.tables.plan(name);
        let plan = plan(&self.store, name, &self.settings, previous);
        let plan = self.unless_too_large(name, plan).flatten();
        plan.filter(|_| !self.quarantined.contains(name))
    }

    fn note_compiled(&mut self, name: &ObjectName) {
        tracing::trace!("Service {name} is compiled");
        self.compiled += 1;
    }

    /// Records whether a service is too large, and reports it once.
    fn unless_too_large<T>(&mut self, name: &ObjectName, found: Result<T, TooLarge>) -> Option<T> {
        match found {
            Ok(found) => {
                self.too_large.remove(name);
                Some(found)
            }
            Err(error) => {
                if self.too_large.insert(name.clone()) {
                    self.notices.push(too_large(name, error));
                }
                None
            }
        }
    }

    /// Returns the change to a new plan, without frontends that another service has until its
    /// change is written.
    fn change(&mut self, name: &ObjectName, mut plan: Option<ServicePlan>) -> Option<PlanChange> {
        if let Some(plan) = &mut plan
            && self.queue.reserver(name, plan).is_some()
        {
            self.queue.withhold(name, plan);
            self.queue.recompile_on_release(name);
        }
        self.tables.change(name, plan)
    }

    /// Returns a change without the frontends that other changes of the same update have reserved.
    fn without_reserved(&mut self, name: &ObjectName, change: PlanChange) -> Option<PlanChange> {
        match change.after() {
            Some(new) if self.queue.reserver(name, new).is_some() => {
                let plan = ServicePlan::clone(new);
                self.change(name, Some(plan))
            }
            _ => Some(change),
        }
    }

    /// Removes and returns the changes that do not fit into one portion; the smallest ones stay.
    fn split_off_large(&self, changes: &mut PlanChanges) -> PlanChanges {
        let elements = |(_, change): &(ObjectName, PlanChange)| change.elements();
        if changes.iter().map(elements).sum::<usize>() <= self.portion {
            return Vec::new();
        }
        changes.sort_by_key(elements);
        let mut sum = 0;
        let now = changes.iter().take_while(|change| {
            sum += elements(change);
            sum <= self.portion
        });
        let now = now.count();
        changes.split_off(now)
    }

    /// Replaces the plan of a service at once.
    fn replace(
        &mut self,
        name: &ObjectName,
        change: &PlanChange,
        draft: Option<&mut TransactionDraft>,
    ) {
        self.tables.replace(name, change, draft);
        self.note(replaced(name, change));
    }

    fn note(&mut self, replaced: Replaced) {
        let name = &replaced.service;
        let left_out = self.quarantined.contains(name) || self.too_large.contains(name);
        let health_check = HealthCheck::of(&self.store, name, left_out);
        if health_check.is_some() {
            self.checked.insert(name.clone());
        } else {
            self.checked.remove(name);
        }
        self.change.replaced.push(Replaced {
            health_check,
            ..replaced
        });
    }

    /// Records a service with the same plan as before, if it has or had a health check.
    fn note_unchanged(&mut self, name: &ObjectName) {
        let service = self.store.service(name);
        let has_port = service.is_some_and(|service| service.health_check_node_port.is_some());
        if !has_port && !self.checked.contains(name) {
            return;
        }
        let plan = self.tables.shared_plan(name).cloned();
        self.note(Replaced {
            service: name.clone(),
            old: plan.clone(),
            new: plan,
            adopted: false,
            health_check: None,
        });
    }

    fn note_node_ports(&mut self) {
        let node = self.store.node().map(|node| &**node);
        let ranges = Family::ALL.map(|family| self.settings.nodeport_ranges(family, node));
        let ranges: Arc<[IpNet]> = ranges.concat().into();
        if self.node_ports.as_ref() != Some(&ranges) {
            self.node_ports = Some(ranges.clone());
            self.change.node_ports = Some(ranges);
        }
    }

    fn take_change(&mut self) -> ServiceChanges {
        ServiceChanges {
            sticky: self.tables.take_changed_affinity_namespaces(),
            ..std::mem::take(&mut self.change)
        }
    }

    /// Returns the operations that remove expired chains.
    fn remove_expired_chains(&mut self) -> Transaction {
        let moment = clock::now().checked_sub(KEEP_UNUSED_CHAINS);
        moment.map_or_else(Transaction::default, |moment| {
            self.tables.remove_chains_unused_since(moment)
        })
    }
}

impl engine::Engine for Engine {
    type Change = ServiceChanges;

    const TABLE: &'static str = TABLE;
    fn in_quarantine(_kind: Kind) -> &'static str {
        "the service is left out until it changes"
    }

    fn apply(&mut self, event: &Event) {
        let is_ours = if self.settings.off {
            // Whether the node is about to go.
            event.is_about(&[Kind::Node])
        } else {
            matches!(event, Event::Servers(_)) || event.is_about(&Kind::SERVICES)
        };
        if is_ours && let Some(event) = self.put_off_event(event.clone()) {
            self.apply_event(event);
        }
    }

    fn is_ready(&self) -> bool {
        self.store.is_complete()
    }

    fn missing(&self) -> Vec<Kind> {
        self.store.missing()
    }

    fn count(&self, kind: Kind) -> usize {
        self.store.count(kind)
    }

    fn update(&mut self, budget: usize) -> Update<ServiceChanges> {
        self.portion = budget;
        let mut draft = TransactionDraft::default();
        let transaction = if self.is_marked() {
            self.update_marked(&mut draft);
            draft.finish(&self.tables)
        } else if !self.queue.is_empty() {
            self.work_on_queue(&mut draft);
            draft.finish(&self.tables)
        } else {
            self.remove_expired_chains()
        };
        Update {
            transaction,
            change: self.take_change(),
            more: self.is_marked() || !self.queue.is_empty(),
        }
    }

    fn rebuild(&mut self, first: bool) -> ServiceChanges {
        self.abandon_portions();
        let mut marks = std::mem::take(&mut self.marks);
        self.marks.triggered_at_ms = std::mem::take(&mut marks.triggered_at_ms);
        if first {
            marks.node = true;
            marks.service_cidrs = true;
            self.tables.forget_chains();
        }
        if marks.node || marks.service_cidrs {
            self.tables.set_skeletons(&self.store, None);
        }
        for name in std::mem::take(&mut marks.services) {
            let plan = self.compile(&name);
            match self.tables.change(&name, plan) {
                Some(change) => self.replace(&name, &change, None),
                None => self.note_unchanged(&name),
            }
        }
        if marks.node {
            self.note_node_ports();
        }
        self.started = true;
        let mut change = self.take_change();
        for replaced in &mut change.replaced {
            replaced.adopted = first;
        }
        change
    }

    fn ruleset(&self) -> Ruleset {
        self.tables.ruleset()
    }

    fn snapshot(&self) -> engine::Compile {
        let tables = self.tables.clone();
        Box::new(move || tables.ruleset())
    }

    fn changes_of_foreign_rules(actual: &Ruleset, transaction: &Transaction) -> ServiceChanges {
        ServiceChanges {
            removed: RemovedFrontends::of(actual, transaction),
            ..ServiceChanges::default()
        }
    }

    fn blame(&self, refused: &[&ObjectPath]) -> Vec<(usize, ObjectRef)> {
        let owners = self.tables.owners(refused).into_iter();
        owners
            .map(|(index, name)| (index, ObjectRef::new(Kind::Service, name)))
            .collect()
    }

    fn quarantine(&mut self, object: &ObjectRef) -> ServiceChanges {
        let name = &object.name;
        self.quarantined.insert(name.clone());
        match self.tables.change(name, None) {
            Some(change) => self.replace(name, &change, None),
            None => self.note_unchanged(name),
        }
        self.take_change()
    }

    fn retry_quarantined(&mut self) {
        self.marks.services.append(&mut self.quarantined);
    }

    /// Unused chains are removed when nothing else waits.
    fn due(&self) -> Option<Instant> {
        let is_idle = !self.is_marked() && self.queue.is_empty();
        let unused_since = self.tables.unused_since().filter(|_| is_idle)?;
        Some(unused_since + KEEP_UNUSED_CHAINS)
    }

    fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }
}

/// Compiles the rules for the objects of a store from scratch, as a new process does. Returns
/// notices about services that are too large and therefore left out.
pub fn wanted(store: &Store, settings: &ServiceSettings) -> (Ruleset, Vec<Notice>) {
    let mut tables = Tables::new(settings.clone());
    tables.set_skeletons(store, None);
    let mut notices = Vec::new();
    for service in store.services() {
        let name = &service.name;
        let plan = plan(store, name, settings, None).unwrap_or_else(|error| {
            notices.push(too_large(name, error));
            None
        });
        if let Some(change) = tables.change(name, plan) {
            tables.replace(name, &change, None);
        }
    }
    (tables.ruleset(), notices)
}

fn replaced(name: &ObjectName, change: &PlanChange) -> Replaced {
    Replaced {
        service: name.clone(),
        old: change.before().cloned(),
        new: change.after().cloned(),
        adopted: false,
        health_check: None,
    }
}

fn too_large(service: &ObjectName, error: TooLarge) -> Notice {
    Notice {
        subject: Subject::Object(ObjectRef::new(Kind::Service, service.clone())),
        reason: Reason::TooLarge,
        message: error.to_string(),
    }
}
