//! From events that were taken over to transactions.
//!
//! What is small is written at once, in one transaction; what is not goes to the [`Queue`] and is
//! written in portions, one with each call of [`Reconciler::work`].
//!
//! [`Queue`]: super::portions::Queue

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use super::conntrack::Front;
use super::portions::{Timings, Waiting};
use super::programmed::{Draft, Effects};
use super::{Kernel, Outcome, Reconciler, too_large};
use crate::compile::{self, PlanChange, ServicePlan};
use crate::model::{Changes, ObjectName};
use crate::netlink;

/// The changes of services that a batch of events amounts to.
type ServiceChanges = Vec<(ObjectName, PlanChange)>;

impl<K: Kernel> Reconciler<'_, K> {
    /// Writes what changed, as far as it is written at once, and then a portion of what waits.
    pub(super) fn update(&mut self) -> Outcome {
        let started = Instant::now();
        let changes = std::mem::take(&mut self.changes);
        if changes.is_empty() && self.queue.is_empty() {
            self.settle(changes.triggered_at_ms);
            return Outcome::Synced;
        }
        let written = self.update_changes(changes);
        match written.and_then(|()| self.update_portion()) {
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
        // A service whose change waits, and with which some of what changed has to wait.
        let mut waits_for = None;
        let mut now = self.service_changes(&mut changes, &mut waits_for);
        let later = self.put_off(&mut now);
        // What is to be written later has the frontends of the plans in force until then.
        for (name, change) in &later {
            self.queue.take(name, change.before());
        }
        let mut effects = Effects::default();
        for (name, change) in now {
            if let Some(change) = self.without_taken(&name, change, &mut waits_for) {
                self.programmed
                    .replace(&name, &change, &mut effects, Some(&mut draft));
            }
            self.health_check_changed(&name);
        }
        for (name, change) in later {
            let old = change.before().cloned();
            let Some(change) = self.without_taken(&name, change, &mut waits_for) else {
                self.queue.release(&name, old.as_ref());
                self.health_check_changed(&name);
                continue;
            };
            let (change, mut effects) = (Arc::new(change), Effects::default());
            self.programmed.begin(&name, change.clone(), &mut effects);
            self.queue.push(&name, change, effects);
            waits_for = Some(name);
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
        if let Err(error) = self.write(transaction) {
            self.changes.triggered_at_ms = changes.triggered_at_ms;
            return Err(error);
        }
        let mut triggered_at_ms = changes.triggered_at_ms;
        if let Some(name) = waits_for {
            let timings = Timings {
                arrived: std::mem::take(&mut self.waiting),
                triggered_at_ms,
            };
            let rest = self.queue.add_timings(&name, timings);
            self.waiting = rest.arrived;
            triggered_at_ms = rest.triggered_at_ms;
        }
        self.settle(triggered_at_ms);
        Ok(())
    }

    /// Compiles what changed. A service whose former change waits is left for later.
    fn service_changes(
        &mut self,
        changes: &mut Changes,
        waits_for: &mut Option<ObjectName>,
    ) -> ServiceChanges {
        let mut found = Vec::new();
        for name in self.concerned(changes) {
            if self.queue.contains(&name) {
                self.queue.look_again(&name);
                *waits_for = Some(name);
                continue;
            }
            let plan = self.compile(&name);
            match self.change(&name, plan, waits_for) {
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

    /// Compiles a service; `None` if it has no rules or is left out.
    fn compile(&mut self, name: &ObjectName) -> Option<ServicePlan> {
        let previous = self.programmed.plan(name);
        match compile::plan(&self.store, name, &self.settings, previous) {
            Ok(plan) => {
                self.too_large.remove(name);
                plan.filter(|_| !self.refused.contains(name))
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
    fn change(
        &mut self,
        name: &ObjectName,
        mut plan: Option<ServicePlan>,
        waits_for: &mut Option<ObjectName>,
    ) -> Option<PlanChange> {
        if let Some(plan) = &mut plan
            && let Some(taker) = self.queue.taker(name, plan)
        {
            *waits_for = Some(taker.clone());
            self.queue.withhold(name, plan);
            self.queue.look_again(name);
        }
        self.programmed.change(name, plan)
    }

    /// The change that is left of one since others of the same events took their frontends.
    fn without_taken(
        &mut self,
        name: &ObjectName,
        change: PlanChange,
        waits_for: &mut Option<ObjectName>,
    ) -> Option<PlanChange> {
        match change.after() {
            Some(new) if self.queue.taker(name, new).is_some() => {
                let plan = ServicePlan::clone(new);
                self.change(name, Some(plan), waits_for)
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

    /// Writes a portion of the changes that wait. Those that fit into one are not divided.
    fn update_portion(&mut self) -> Result<(), netlink::Error> {
        if self.queue.is_empty() {
            return Ok(());
        }
        let (mut draft, mut room) = (Draft::default(), self.portion);
        while room > 0
            && let Some(name) = self.queue.next()
        {
            let left = self.programmed.left(&name);
            let most = match left {
                _ if left <= room => usize::MAX,
                _ if room < self.portion => break,
                _ => room,
            };
            self.queue.had_turn(&name);
            let (elements, done) = self.programmed.advance(&name, most, Some(&mut draft));
            room = room.saturating_sub(elements);
            if done && let Some(waiting) = self.queue.written(&name) {
                self.take_back(&name, waiting);
            }
        }
        let transaction = draft.finish(&self.programmed);
        self.write(transaction)?;
        if self.changes.is_empty() {
            let triggered = std::mem::take(&mut self.changes.triggered_at_ms);
            self.settle(triggered);
        }
        Ok(())
    }

    /// Takes over what a change brings with it that no longer waits. What had to wait for it is
    /// compiled again with the next call.
    fn take_back(&mut self, name: &ObjectName, waiting: Waiting) {
        self.note(waiting.effects);
        self.waiting.extend(waiting.timings.arrived);
        let triggered = waiting.timings.triggered_at_ms;
        self.changes.triggered_at_ms.extend(triggered);
        let mut again = self.queue.take_again();
        self.changes.services.append(&mut again);
        self.health_check_changed(name);
    }

    /// Counts all that waits as written, where the tables are going to be compared as a whole.
    pub(super) fn abandon_portions(&mut self) {
        for name in self.queue.services() {
            self.programmed.advance(&name, usize::MAX, None);
            if let Some(waiting) = self.queue.written(&name) {
                self.take_back(&name, waiting);
            }
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
