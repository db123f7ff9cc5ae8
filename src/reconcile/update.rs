//! From events that were taken over to transactions.
//!
//! What is small is written at once, in one transaction; what is not goes to the [`Queue`], from
//! which one portion of work is done with each call of [`Reconciler::work`].
//!
//! [`Queue`]: super::portions::Queue

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use super::conntrack::Front;
use super::portions::{Done, Task};
use super::programmed::{Draft, Effects};
use super::{Kernel, Outcome, Reconciler, State, too_large};
use crate::compile::{self, Compilation, PlanChange, ServicePlan, TooLarge};
use crate::model::{Changes, Delivery, Event, Kind, Object, ObjectName};
use crate::netlink;

/// So many claims are taken over at once for each element of a portion, and so many frontends
/// compiled: each takes a fraction of what an element takes in the kernel.
const CLAIMS: usize = 2;

/// The changes of services that a batch of events amounts to.
type ServiceChanges = Vec<(ObjectName, PlanChange)>;

impl<K: Kernel> Reconciler<'_, K> {
    /// Puts an event in line that changes more claims at once than a portion has elements. Gives
    /// all others back. None waits while Services are listed: the list replaces what came before,
    /// and which objects are gone shows once all others are taken over.
    pub(super) fn put_off_event(&mut self, delivery: Delivery) -> Option<Delivery> {
        let (name, new) = match &delivery.event {
            Event::ListStarted(Kind::Service) => {
                self.queue.drop_events();
                return Some(delivery);
            }
            Event::Apply(Object::Service(service)) => (&service.name, service.frontends()),
            Event::Delete(object) if object.kind == Kind::Service => (&object.name, 0),
            _ => return Some(delivery),
        };
        let name = name.clone();
        let old = self.store.service(&name).map_or(0, |old| old.frontends());
        let may_wait = self.state == State::Synced && !self.store.is_listing(Kind::Service);
        let waits = self.queue.has_event(&name) || self.store.is_taking_over(&name);
        if may_wait && (old.max(new) > self.portion || waits) {
            let exists = matches!(delivery.event, Event::Apply(_));
            self.store.expect(&name, exists);
            self.queue.put_off(&name, delivery);
            return None;
        }
        self.queue.drop_event(&name);
        Some(delivery)
    }

    /// Writes what changed, as far as it is written at once, and then does a portion of what waits.
    pub(super) fn update(&mut self) -> Outcome {
        let started = Instant::now();
        let changes = std::mem::take(&mut self.changes);
        if changes.is_empty() && self.queue.is_empty() {
            self.changes.triggered_at_ms = changes.triggered_at_ms;
            self.settle();
            return Outcome::Synced;
        }
        let written = self.update_changes(changes);
        match written.and_then(|()| self.work_on_queue()) {
            Ok(()) => {
                self.metrics.sync(false, started.elapsed());
                Outcome::Synced
            }
            Err(error) => self.write_failed(&error),
        }
    }

    fn update_changes(&mut self, mut changes: Changes) -> Result<(), netlink::Error> {
        let mut draft = Draft::default();
        if changes.node || changes.service_cidrs {
            self.programmed.set_skeletons(&self.store, Some(&mut draft));
        }
        let mut now = self.service_changes(&mut changes);
        let later = self.put_off(&mut now);
        // What is to be written later has the frontends of the plans in force until then.
        for (name, change) in &later {
            self.queue.take(name, change.before());
        }
        let mut effects = Effects::default();
        for (name, change) in now {
            if let Some(change) = self.without_taken(&name, change) {
                self.programmed
                    .replace(&name, &change, &mut effects, Some(&mut draft));
            }
            self.health_check_changed(&name);
        }
        for (name, change) in later {
            match self.without_taken(&name, change) {
                Some(change) => self.begin(&name, change),
                None => {
                    self.done(&name);
                }
            }
        }
        if changes.node {
            // NodePorts may answer on other addresses now.
            for plan in self.programmed.plans() {
                let node_port = |front: &Front| matches!(front, Front::NodePort(..));
                effects.flows.suspect(plan, node_port);
            }
        }
        self.note(effects);
        let transaction = draft.finish(&self.programmed);
        self.changes
            .triggered_at_ms
            .append(&mut changes.triggered_at_ms);
        self.write(transaction)?;
        self.put_times_in_line();
        self.settle();
        Ok(())
    }

    /// Has the events of services that wait timed until these are written.
    fn put_times_in_line(&mut self) {
        let queue = &mut self.queue;
        self.waiting.retain(|(service, at)| {
            let line = service.as_ref().and_then(|it| queue.timings(it));
            line.map(|timings| timings.add(*at)).is_none()
        });
        self.changes.triggered_at_ms.retain(|(service, at)| {
            let line = queue.timings(service);
            line.map(|timings| timings.add_trigger(*at)).is_none()
        });
    }

    /// Compiles what changed. A large service is left for later, and one that waits already.
    fn service_changes(&mut self, changes: &mut Changes) -> ServiceChanges {
        let mut found = Vec::new();
        // Before any other is compiled, which may get a frontend that one of these has.
        let (later, now): (Vec<_>, Vec<_>) = self
            .concerned(changes)
            .into_iter()
            .partition(|name| self.queue.contains(name) || self.is_large(name));
        for name in later {
            let in_force = self.programmed.shared_plan(&name);
            self.queue.compile(&name, in_force);
        }
        for name in now {
            let plan = self.compile(&name);
            match self.change(&name, plan) {
                Some(change) => found.push((name, change)),
                None => self.health_check_changed(&name),
            }
        }
        found
    }

    /// The services to compile again.
    fn concerned(&self, changes: &mut Changes) -> BTreeSet<ObjectName> {
        let mut services = std::mem::take(&mut changes.services);
        if changes.node {
            // Which endpoints are local is in every service's plan.
            services.extend(self.store.services().map(|service| service.name.clone()));
        }
        for name in &services {
            tracing::trace!("Service {name} is compiled again");
        }
        services
    }

    /// Whether a service has, or is to have, more elements than a portion.
    fn is_large(&self, name: &ObjectName) -> bool {
        let plan = self.programmed.plan(name);
        compile::elements(&self.store, name) > self.portion
            || plan.is_some_and(|plan| plan.elements() > self.portion)
    }

    /// Compiles a service; `None` if it has no rules or is left out.
    fn compile(&mut self, name: &ObjectName) -> Option<ServicePlan> {
        let previous = self.programmed.plan(name);
        let plan = compile::plan(&self.store, name, &self.settings, previous);
        let plan = self.unless_too_large(name, plan).flatten();
        plan.filter(|_| !self.refused.contains(name))
    }

    /// Notes whether a service asks for too much.
    fn unless_too_large<T>(&mut self, name: &ObjectName, found: Result<T, TooLarge>) -> Option<T> {
        match found {
            Ok(found) => {
                self.too_large.remove(name);
                Some(found)
            }
            Err(error) => {
                if self.too_large.insert(name.clone()) {
                    self.report(too_large(name, error));
                }
                None
            }
        }
    }

    /// What a new plan changes, apart from frontends that another service has until its change is
    /// written.
    fn change(&mut self, name: &ObjectName, mut plan: Option<ServicePlan>) -> Option<PlanChange> {
        if let Some(plan) = &mut plan
            && self.queue.taker(name, plan).is_some()
        {
            self.queue.withhold(name, plan);
            self.queue.look_again(name);
        }
        self.programmed.change(name, plan)
    }

    /// The change that is left of one since others of the same events took their frontends.
    fn without_taken(&mut self, name: &ObjectName, change: PlanChange) -> Option<PlanChange> {
        match change.after() {
            Some(new) if self.queue.taker(name, new).is_some() => {
                let plan = ServicePlan::clone(new);
                self.change(name, Some(plan))
            }
            _ => Some(change),
        }
    }

    /// Takes out the changes that are not written at once: all but the smallest ones.
    fn put_off(&self, changes: &mut ServiceChanges) -> ServiceChanges {
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

    /// Begins to write a change.
    fn begin(&mut self, name: &ObjectName, change: PlanChange) {
        let (change, mut effects) = (Arc::new(change), Effects::default());
        self.programmed.begin(name, change.clone(), &mut effects);
        self.queue.write(name, change.after(), effects);
    }

    /// Does a portion of what waits: takes over one event, compiles one service, or writes so many
    /// elements. Changes that fit into one portion are not divided.
    fn work_on_queue(&mut self) -> Result<(), netlink::Error> {
        if self.queue.is_empty() {
            return Ok(());
        }
        let (mut draft, mut room) = (Draft::default(), self.portion);
        let mut compiled = false;
        while room > 0
            && let Some(name) = self.queue.next()
            && (!compiled || self.queue.is_written(&name))
        {
            let left = self.programmed.left(&name);
            let most = match left {
                _ if left <= room => usize::MAX,
                _ if room < self.portion => break,
                _ => room,
            };
            if self.store.is_taking_over(&name) {
                self.queue.had_turn(&name);
                self.take_over_some(&name);
                break;
            }
            match self.queue.task(&name) {
                None => break,
                Some(Task::Write) => {
                    self.queue.had_turn(&name);
                    let (elements, done) = self.programmed.advance(&name, most, Some(&mut draft));
                    room = room.saturating_sub(elements);
                    if done && self.done(&name) {
                        break;
                    }
                }
                Some(Task::Compile) => {
                    compiled = true;
                    let elements = self.compile_one(&name);
                    if elements.is_none_or(|elements| elements > room) {
                        self.queue.had_turn(&name);
                        break;
                    }
                }
                Some(Task::TakeOver(event)) => {
                    self.queue.had_turn(&name);
                    self.take_over_one(&name, event);
                    break;
                }
            }
        }
        let transaction = draft.finish(&self.programmed);
        self.write(transaction)?;
        if self.changes.is_empty() {
            self.settle();
        }
        Ok(())
    }

    /// Begins to take over an event that waited.
    fn take_over_one(&mut self, name: &ObjectName, event: Event) {
        let in_force = self.programmed.shared_plan(name);
        self.queue.compile(name, in_force);
        let mut changes = std::mem::take(&mut self.changes);
        self.store.begin(event, &mut changes);
        self.note_changes(changes);
        self.take_over_some(name);
    }

    /// Takes over some claims of a service. Others that it concerns are compiled with the next call.
    fn take_over_some(&mut self, name: &ObjectName) {
        let most = self.portion.saturating_mul(CLAIMS);
        let mut changes = std::mem::take(&mut self.changes);
        self.store.go_on(name, most, &mut changes);
        self.note_changes(changes);
    }

    /// Compiles some frontends of a service that waits for it. With the last of them, its change is
    /// begun; about how many elements that has is returned.
    fn compile_one(&mut self, name: &ObjectName) -> Option<usize> {
        let begun = self.queue.take_compilation(name).or_else(|| {
            let begun = Compilation::begin(&self.store, name);
            let begun = self.unless_too_large(name, begun).flatten();
            begun.filter(|_| !self.refused.contains(name))
        });
        let previous = self.programmed.plan(name);
        let mut plan = None;
        if let Some(mut compilation) = begun {
            let (most, queue) = (self.portion.saturating_mul(CLAIMS), &mut self.queue);
            let mut withheld = false;
            let (store, settings) = (&self.store, &self.settings);
            let complete = compilation.advance(store, settings, previous, most, |frontend| {
                let is_free = queue.take_frontend(name, frontend);
                withheld |= !is_free;
                is_free
            });
            if withheld {
                queue.look_again(name);
            }
            if !complete {
                queue.compile_on(name, compilation);
                return None;
            }
            plan = compilation.finish(store, previous);
        }
        match self.programmed.change(name, plan) {
            Some(change) => {
                self.queue.compiled(name, change.after());
                let elements = change.elements();
                self.begin(name, change);
                Some(elements)
            }
            None => {
                self.queue.had_turn(name);
                self.done(name);
                Some(0)
            }
        }
    }

    /// Takes over what a service brings with it that no longer waits. What had to wait for it is
    /// compiled again with the next call.
    ///
    /// Returns whether it is to be compiled again. Nothing else may be compiled before: the store may
    /// have given frontends to others that its plan in force still has.
    fn done(&mut self, name: &ObjectName) -> bool {
        let Done {
            effects,
            timings,
            compile,
        } = self.queue.done(name);
        self.note(effects);
        self.in_time.append(timings);
        let changes = &mut self.changes;
        changes.services.append(&mut self.queue.take_again());
        changes.services.extend(compile.then(|| name.clone()));
        self.health_check_changed(name);
        compile
    }

    /// Counts all that waits as written, where the tables are going to be compared as a whole.
    /// Events go on waiting.
    pub(super) fn abandon_portions(&mut self) {
        let mut changes = std::mem::take(&mut self.changes);
        self.store.finish(&mut changes);
        self.note_changes(changes);
        for name in self.queue.services() {
            self.programmed.advance(&name, usize::MAX, None);
            self.done(&name);
        }
    }

    /// Compiles what changed, where the tables are going to be compared as a whole.
    pub(super) fn take_changes(&mut self, changes: &Changes) -> Effects {
        if changes.node || changes.service_cidrs {
            self.programmed.set_skeletons(&self.store, None);
        }
        let mut effects = Effects::default();
        let mut concerned = Changes {
            services: changes.services.clone(),
            node: changes.node,
            ..Changes::default()
        };
        for name in self.concerned(&mut concerned) {
            let plan = self.compile(&name);
            if let Some(change) = self.programmed.change(&name, plan) {
                self.programmed.replace(&name, &change, &mut effects, None);
            }
            self.health_check_changed(&name);
        }
        effects
    }

    fn health_check_changed(&mut self, name: &ObjectName) {
        if let Some(checks) = &mut self.health_checks {
            checks.changed(name);
        }
    }
}
