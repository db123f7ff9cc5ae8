//! The queue of large services, whose changes are processed in portions.
//!
//! While the kernel processes a transaction, no other transaction runs and no event is handled. So
//! the changes of a batch of events are written at once only up to the size of a portion, the
//! smallest first. A service with a larger change waits here, until
//!
//! 1. its newest event is applied to the store,
//! 2. its plan is compiled and compared with the one in force,
//! 3. the difference is written, portion by portion, in the order of its steps. [`PlanChange`] says
//!    why packets may come in between.
//!
//! Each of these takes as many calls as necessary. Events that arrive between calls are handled
//! first. Of several events of a service only the newest is applied.
//!
//! Namespaces take turns, so that a namespace waits for at most one portion of each other one.
//!
//! While a plan is compiled or written, the frontends of the old and the new plan are reserved:
//! another service that owns one of them by now goes without until the change is written, and is
//! then compiled again.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use foldhash::HashMap;

use super::plan::{Frontend, ServicePlan};
use super::replaced::Replaced;
use super::service::Compilation;
use crate::model::{Event, Family, ObjectName};
use crate::services::Claim;

/// The services that wait.
#[derive(Debug, Default)]
pub(super) struct ServiceQueue {
    waiting: HashMap<ObjectName, QueuedService>,
    /// The waiting services in order, by namespace.
    lines: BTreeMap<String, VecDeque<ObjectName>>,
    /// The namespace that had its turn last.
    last: String,
    /// The frontends of the plans that are being compiled or written, with their services.
    reserved: HashMap<(Family, Claim), ObjectName>,
    /// Services to compile again when another service's change, which held their frontends, is
    /// written.
    recompile: BTreeSet<ObjectName>,
}

/// The pending tasks of a service.
#[derive(Debug, Default)]
struct QueuedService {
    /// The newest event, not yet applied to the store.
    event: Option<Event>,
    /// Whether its plan has to be compiled.
    compile: bool,
    /// The plan that is being compiled. Its frontends are reserved.
    compilation: Option<Compilation>,
    /// Whether an event was applied since the plan was last compiled.
    event_applied: bool,
    /// The change that is being written, for followers.
    write: Option<Replaced>,
    /// The plans whose frontends are reserved.
    holds: Vec<Arc<ServicePlan>>,
}

impl QueuedService {
    fn is_busy(&self) -> bool {
        self.compile || self.compilation.is_some() || self.write.is_some()
    }
}

/// The next task of a service.
#[derive(Debug)]
pub(super) enum Task {
    /// Apply an event, after which the plan has to be compiled.
    ApplyEvent(Event),
    /// Compile its plan, or a portion of it.
    Compile,
    /// Write a portion of its change.
    Write,
}

/// The result of the completed tasks of a service.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// The change that was written.
    pub replaced: Option<Replaced>,
    /// Whether the plan has to be compiled again.
    pub compile: bool,
}

impl ServiceQueue {
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Returns whether a service has a task.
    pub fn is_queued(&self, service: &ObjectName) -> bool {
        self.waiting.contains_key(service)
    }

    /// Returns whether the service has a task other than a waiting event.
    pub fn is_compiling_or_writing(&self, service: &ObjectName) -> bool {
        let waiting = self.waiting.get(service);
        waiting.is_some_and(QueuedService::is_busy)
    }

    /// Returns whether an event of the service waits.
    pub(crate) fn has_event(&self, service: &ObjectName) -> bool {
        let waiting = self.waiting.get(service);
        waiting.is_some_and(|waiting| waiting.event.is_some())
    }

    fn enter(&mut self, service: &ObjectName) -> &mut QueuedService {
        if !self.waiting.contains_key(service) {
            let line = self.lines.entry(service.namespace().to_owned());
            line.or_default().push_back(service.clone());
        }
        self.waiting.entry(service.clone()).or_default()
    }

    /// Returns whether a change of the service is being written.
    pub(crate) fn is_being_written(&self, service: &ObjectName) -> bool {
        let waiting = self.waiting.get(service);
        waiting.is_some_and(|waiting| waiting.write.is_some())
    }

    /// Queues an event, which replaces an older one of the service.
    pub(crate) fn put_off(&mut self, service: &ObjectName, event: Event) {
        self.enter(service).event = Some(event);
    }

    pub(crate) fn drop_event(&mut self, service: &ObjectName) {
        if let Some(waiting) = self.waiting.get_mut(service) {
            waiting.event = None;
            self.leave_if_idle(service);
        }
    }

    /// Drops all queued events.
    pub(crate) fn drop_events(&mut self) {
        for service in self.services() {
            self.drop_event(&service);
        }
    }

    /// Queues a service to be compiled, and reserves the frontends of its plan in force.
    pub fn compile(&mut self, service: &ObjectName, in_force: Option<&Arc<ServicePlan>>) {
        self.enter(service).compile = true;
        self.reserve(service, in_force);
    }

    /// Marks a service to be compiled again when the change that holds its frontends is written.
    pub(crate) fn recompile_on_release(&mut self, service: &ObjectName) {
        self.recompile.insert(service.clone());
    }

    /// Reserves the frontends of a plan, except those reserved for another service.
    pub fn reserve(&mut self, service: &ObjectName, plan: Option<&Arc<ServicePlan>>) {
        let Some(plan) = plan else { return };
        let waiting = self.enter(service);
        if waiting.holds.iter().any(|held| Arc::ptr_eq(held, plan)) {
            return;
        }
        waiting.holds.push(plan.clone());
        self.reserved.reserve(plan.frontends.len());
        for frontend in &plan.frontends {
            let reserved = self.reserved.entry((frontend.family, frontend.at));
            reserved.or_insert_with(|| service.clone());
        }
    }

    /// Reserves a frontend. Returns `false` if it is reserved for another service.
    pub(crate) fn reserve_frontend(&mut self, service: &ObjectName, frontend: &Frontend) -> bool {
        let reserved = self.reserved.entry((frontend.family, frontend.at));
        reserved.or_insert_with(|| service.clone()) == service
    }

    /// Stores a partial compilation, to continue with a later call.
    pub(crate) fn compile_on(&mut self, service: &ObjectName, compilation: Compilation) {
        self.enter(service).compilation = Some(compilation);
    }

    /// Removes and returns the partial compilation of a service.
    pub(crate) fn take_compilation(&mut self, service: &ObjectName) -> Option<Compilation> {
        self.waiting.get_mut(service)?.compilation.take()
    }

    /// Records the compiled plan, whose frontends are already reserved.
    pub fn compiled(&mut self, service: &ObjectName, plan: Option<&Arc<ServicePlan>>) {
        let waiting = self.enter(service);
        waiting.holds.extend(plan.cloned());
    }

    /// Returns another service for which a frontend of this plan is reserved.
    pub(crate) fn reserver(&self, service: &ObjectName, plan: &ServicePlan) -> Option<&ObjectName> {
        if self.reserved.is_empty() {
            return None;
        }
        let mut frontends = plan.frontends.iter();
        frontends.find_map(|frontend| {
            let reserver = self.reserved.get(&(frontend.family, frontend.at));
            reserver.filter(|reserver| *reserver != service)
        })
    }

    /// Removes the frontends from a plan that are reserved for other services.
    pub(crate) fn withhold(&self, service: &ObjectName, plan: &mut ServicePlan) {
        let frontends = std::mem::take(&mut plan.frontends).into_vec();
        let free = frontends.into_iter().filter(|frontend| {
            let reserver = self.reserved.get(&(frontend.family, frontend.at));
            reserver.is_none_or(|reserver| reserver == service)
        });
        plan.frontends = free.collect();
    }

    /// Queues the change to a plan to be written; `replaced` is for followers.
    pub fn write(
        &mut self,
        service: &ObjectName,
        plan: Option<&Arc<ServicePlan>>,
        replaced: Replaced,
    ) {
        self.reserve(service, plan);
        self.enter(service).write = Some(replaced);
    }

    /// Returns the service whose turn it is.
    pub fn next(&self) -> Option<ObjectName> {
        let after = (Bound::Excluded(&*self.last), Bound::Unbounded);
        let mut lines = self.lines.range::<str, _>(after).chain(&self.lines);
        let (_, line) = lines.next()?;
        line.front().cloned()
    }

    /// Ends the turn of a service's namespace.
    pub(crate) fn had_turn(&mut self, service: &ObjectName) {
        service.namespace().clone_into(&mut self.last);
    }

    /// Returns the next task of a service. Removes it, unless it is to write.
    pub fn task(&mut self, service: &ObjectName) -> Option<Task> {
        let waiting = self.waiting.get_mut(service)?;
        if waiting.write.is_some() {
            return Some(Task::Write);
        }
        if waiting.compilation.is_some() {
            return Some(Task::Compile);
        }
        // A service is compiled after each event, however many follow.
        if !waiting.event_applied
            && let Some(event) = waiting.event.take()
        {
            waiting.event_applied = true;
            return Some(Task::ApplyEvent(event));
        }
        waiting.event_applied = false;
        std::mem::take(&mut waiting.compile).then_some(Task::Compile)
    }

    /// Releases the frontends of a service whose change is written, or that has nothing to change.
    /// It keeps its place if an event waits.
    pub fn done(&mut self, service: &ObjectName) -> Done {
        let Some(waiting) = self.waiting.get_mut(service) else {
            return Done::default();
        };
        let plans = std::mem::take(&mut waiting.holds);
        let compilation = waiting.compilation.take();
        let done = Done {
            replaced: waiting.write.take(),
            compile: std::mem::take(&mut waiting.compile) || compilation.is_some(),
        };
        let held = plans.iter().flat_map(|plan| &plan.frontends);
        for frontend in held.chain(compilation.iter().flat_map(Compilation::frontends)) {
            if let Entry::Occupied(reserved) = self.reserved.entry((frontend.family, frontend.at))
                && reserved.get() == service
            {
                reserved.remove();
            }
        }
        // If an event waits, the service continues behind the others of its namespace.
        if let Some(line) = self.lines.get_mut(service.namespace())
            && line.front() == Some(service)
        {
            line.rotate_left(1);
        }
        self.leave_if_idle(service);
        done
    }

    /// Removes a service without tasks.
    fn leave_if_idle(&mut self, service: &ObjectName) {
        let waiting = self.waiting.get(service);
        if waiting.is_none_or(|it| it.event.is_some() || it.is_busy()) {
            return;
        }
        self.waiting.remove(service);
        if let Some(line) = self.lines.get_mut(service.namespace()) {
            if line.front() == Some(service) {
                line.pop_front();
            } else {
                line.retain(|other| other != service);
            }
            if line.is_empty() {
                self.lines.remove(service.namespace());
            }
        }
    }

    /// Removes and returns the services to compile again.
    pub(crate) fn take_recompile(&mut self) -> BTreeSet<ObjectName> {
        std::mem::take(&mut self.recompile)
    }

    /// Returns all waiting services.
    pub fn services(&self) -> Vec<ObjectName> {
        self.waiting.keys().cloned().collect()
    }
}
