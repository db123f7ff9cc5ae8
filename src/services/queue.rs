//! Work on large services, done in portions so that others get their turn between two of them.
//!
//! The kernel lets nobody else in while it works on a transaction, and the reconciler handles no
//! event. So what a batch of events changes is done at once only as far as it makes no more than
//! so many elements, the smallest changes first. A service that has more waits here, until
//!
//! 1. its newest event is taken over by the store,
//! 2. its plan is compiled and compared with the one in force,
//! 3. the difference is written, portion by portion, in the order of its steps. [`PlanChange`] says
//!    why packets may come in between.
//!
//! Each of these is done with as many calls as it takes. Before each the loop takes over events, and
//! what they change goes first. Of several events of a service the newest alone counts.
//!
//! Namespaces take turns, so that a namespace waits for one portion of each of the others at most.
//!
//! While a plan is compiled or written, the frontends of the old plan and of the new one are taken:
//! another service that wants one of them goes without until the change is written. Both are
//! compiled again then.

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
    /// The services in line, by their namespace.
    lines: BTreeMap<String, VecDeque<ObjectName>>,
    /// The namespace that had its turn last.
    last: String,
    taken: HashMap<(Family, Claim), ObjectName>,
    /// Services to compile again once a change is written.
    again: BTreeSet<ObjectName>,
}

/// What is to be done for a service, and what follows.
#[derive(Debug, Default)]
struct QueuedService {
    /// The newest event that the store does not know of.
    event: Option<Event>,
    /// Its plan is to be compiled.
    compile: bool,
    /// Its plan is being compiled. The frontends that are compiled are taken.
    compilation: Option<Compilation>,
    /// An event was taken over with which it is not compiled yet.
    taken_over: bool,
    /// What follows once the change is in force that is being written.
    write: Option<Replaced>,
    /// The plans whose frontends are taken.
    holds: Vec<Arc<ServicePlan>>,
}

impl QueuedService {
    fn is_busy(&self) -> bool {
        self.compile || self.compilation.is_some() || self.write.is_some()
    }
}

/// What is to be done next for a service.
#[derive(Debug)]
pub(super) enum Task {
    /// Take over an event, with which the plan is to be compiled.
    TakeOver(Event),
    /// Compile its plan, or some more of it.
    Compile,
    /// Write a portion of its change.
    Write,
}

/// What a service leaves behind for which a task is done.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// What its change replaced.
    pub replaced: Option<Replaced>,
    /// The plan is to be compiled again.
    pub compile: bool,
}

impl ServiceQueue {
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether something is to be done for a service.
    pub fn has(&self, service: &ObjectName) -> bool {
        self.waiting.contains_key(service)
    }

    /// Whether a service waits for more than that its event is taken over.
    pub fn contains(&self, service: &ObjectName) -> bool {
        let waiting = self.waiting.get(service);
        waiting.is_some_and(QueuedService::is_busy)
    }

    /// Whether an event of the service waits.
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

    /// Whether a change of the service is being written.
    pub(crate) fn is_written(&self, service: &ObjectName) -> bool {
        let waiting = self.waiting.get(service);
        waiting.is_some_and(|waiting| waiting.write.is_some())
    }

    /// Puts an event in line, in the place of an older one.
    pub(crate) fn put_off(&mut self, service: &ObjectName, event: Event) {
        self.enter(service).event = Some(event);
    }

    /// Drops the event of a service, which a newer one replaces that does not wait.
    pub(crate) fn drop_event(&mut self, service: &ObjectName) {
        if let Some(waiting) = self.waiting.get_mut(service) {
            waiting.event = None;
            self.leave_if_idle(service);
        }
    }

    /// Drops all events: a list replaces them.
    pub(crate) fn drop_events(&mut self) {
        for service in self.services() {
            self.drop_event(&service);
        }
    }

    /// Has a service compiled, whose frontends in the plan in force are taken from now on.
    pub fn compile(&mut self, service: &ObjectName, in_force: Option<&Arc<ServicePlan>>) {
        self.enter(service).compile = true;
        self.take(service, in_force);
    }

    /// Compiles a service again once a change is written.
    pub(crate) fn look_again(&mut self, service: &ObjectName) {
        self.again.insert(service.clone());
    }

    /// Takes the frontends of a plan. One that is taken already stays with the first.
    pub fn take(&mut self, service: &ObjectName, plan: Option<&Arc<ServicePlan>>) {
        let Some(plan) = plan else { return };
        let waiting = self.enter(service);
        if waiting.holds.iter().any(|held| Arc::ptr_eq(held, plan)) {
            return;
        }
        waiting.holds.push(plan.clone());
        self.taken.reserve(plan.frontends.len());
        for frontend in &plan.frontends {
            let taken = self.taken.entry((frontend.family, frontend.at));
            taken.or_insert_with(|| service.clone());
        }
    }

    /// Takes a frontend. Returns whether no other service has it.
    pub(crate) fn take_frontend(&mut self, service: &ObjectName, frontend: &Frontend) -> bool {
        let taken = self.taken.entry((frontend.family, frontend.at));
        taken.or_insert_with(|| service.clone()) == service
    }

    /// Goes on to compile a service with a later call.
    pub(crate) fn compile_on(&mut self, service: &ObjectName, compilation: Compilation) {
        self.enter(service).compilation = Some(compilation);
    }

    /// What is compiled of a service.
    pub(crate) fn take_compilation(&mut self, service: &ObjectName) -> Option<Compilation> {
        self.waiting.get_mut(service)?.compilation.take()
    }

    /// Notes the plan whose frontends are taken already.
    pub fn compiled(&mut self, service: &ObjectName, plan: Option<&Arc<ServicePlan>>) {
        let waiting = self.enter(service);
        waiting.holds.extend(plan.cloned());
    }

    /// The service that has a frontend of this plan until its change is written.
    pub(crate) fn taker(&self, service: &ObjectName, plan: &ServicePlan) -> Option<&ObjectName> {
        if self.taken.is_empty() {
            return None;
        }
        let mut frontends = plan.frontends.iter();
        frontends.find_map(|frontend| {
            let taker = self.taken.get(&(frontend.family, frontend.at));
            taker.filter(|taker| *taker != service)
        })
    }

    /// Leaves the frontends out of a plan that others have until their changes are written.
    pub(crate) fn withhold(&self, service: &ObjectName, plan: &mut ServicePlan) {
        let frontends = std::mem::take(&mut plan.frontends).into_vec();
        let free = frontends.into_iter().filter(|frontend| {
            let taker = self.taken.get(&(frontend.family, frontend.at));
            taker.is_none_or(|taker| taker == service)
        });
        plan.frontends = free.collect();
    }

    /// Has the change to a plan written, with what follows once it is in force.
    pub fn write(
        &mut self,
        service: &ObjectName,
        plan: Option<&Arc<ServicePlan>>,
        replaced: Replaced,
    ) {
        self.take(service, plan);
        self.enter(service).write = Some(replaced);
    }

    /// The service whose turn it is.
    pub fn next(&self) -> Option<ObjectName> {
        let after = (Bound::Excluded(&*self.last), Bound::Unbounded);
        let mut lines = self.lines.range::<str, _>(after).chain(&self.lines);
        let (_, line) = lines.next()?;
        line.front().cloned()
    }

    /// Notes that a service has had its turn, and with it the namespace.
    pub(crate) fn had_turn(&mut self, service: &ObjectName) {
        service.namespace().clone_into(&mut self.last);
    }

    /// What is to be done next for a service. An event, or that the service is to be compiled, is
    /// said once.
    pub fn task(&mut self, service: &ObjectName) -> Option<Task> {
        let waiting = self.waiting.get_mut(service)?;
        if waiting.write.is_some() {
            return Some(Task::Write);
        }
        if waiting.compilation.is_some() {
            return Some(Task::Compile);
        }
        // Events may come again and again, but what one of them brought is compiled.
        if !waiting.taken_over
            && let Some(event) = waiting.event.take()
        {
            waiting.taken_over = true;
            return Some(Task::TakeOver(event));
        }
        waiting.taken_over = false;
        std::mem::take(&mut waiting.compile).then_some(Task::Compile)
    }

    /// Gives the frontends back of a service whose change is written, or whose plan is compiled and
    /// has none. It stays in line with an event that waits.
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
            if let Entry::Occupied(taken) = self.taken.entry((frontend.family, frontend.at))
                && taken.get() == service
            {
                taken.remove();
            }
        }
        // With an event that waits it goes on behind the others of its namespace.
        if let Some(line) = self.lines.get_mut(service.namespace())
            && line.front() == Some(service)
        {
            line.rotate_left(1);
        }
        self.leave_if_idle(service);
        done
    }

    /// Takes a service out for which nothing is to be done.
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

    /// The services that were to be compiled again.
    pub(crate) fn take_again(&mut self) -> BTreeSet<ObjectName> {
        std::mem::take(&mut self.again)
    }

    /// All services in line.
    pub fn services(&self) -> Vec<ObjectName> {
        self.waiting.keys().cloned().collect()
    }
}
