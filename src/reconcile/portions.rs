//! Changes that are written in portions, so that others get their turn between two of them.
//!
//! The kernel lets nobody else in while it works on a transaction, and the reconciler handles no
//! event. So what a batch of events changes is written at once only as far as it makes no more
//! than so many elements, the smallest changes first. The others wait here and are written by and
//! by, in the order of their steps. [`PlanChange`] says why packets may come in between. Before
//! each portion the loop takes over events, and what they change goes first.
//!
//! Namespaces take turns, so that a namespace waits for one portion of each of the others at most.
//!
//! While a change waits, its service is not compiled again, and the frontends of its old and new
//! plan are taken: another service that wants one of them goes without until the change is
//! written. Both are compiled again then.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

use foldhash::HashMap;

use super::programmed::Effects;
use crate::compile::{PlanChange, ServicePlan};
use crate::model::{Claim, Family, ObjectName};

/// The elements that a transaction deletes and adds, about, where it can be chosen.
pub(super) const MOST_ELEMENTS: usize = 2_000;

/// When the events arrived that a change follows, for the metrics.
#[derive(Debug, Default)]
pub(super) struct Timings {
    pub arrived: Vec<Instant>,
    pub triggered_at_ms: Vec<i64>,
}

/// The changes that wait.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: HashMap<ObjectName, Waiting>,
    /// The services in line, by their namespace.
    lines: BTreeMap<String, VecDeque<ObjectName>>,
    /// The namespace that had its turn last.
    last: String,
    taken: HashMap<(Family, Claim), ObjectName>,
    /// Services to compile again once a change is written.
    again: BTreeSet<ObjectName>,
}

/// A change that waits.
#[derive(Debug)]
pub(super) struct Waiting {
    change: Arc<PlanChange>,
    /// What follows once it is in force.
    pub effects: Effects,
    pub timings: Timings,
}

impl Queue {
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether a change of the service waits.
    pub fn contains(&self, service: &ObjectName) -> bool {
        self.waiting.contains_key(service)
    }

    /// Compiles a service again once a change is written.
    pub fn look_again(&mut self, service: &ObjectName) {
        self.again.insert(service.clone());
    }

    /// Takes the frontends of a plan. One that is taken already stays with the first.
    pub fn take(&mut self, service: &ObjectName, plan: Option<&Arc<ServicePlan>>) {
        for frontend in plan.into_iter().flat_map(|plan| &plan.frontends) {
            let taken = self.taken.entry((frontend.family, frontend.at));
            taken.or_insert_with(|| service.clone());
        }
    }

    /// The service that has a frontend of this plan until its change is written.
    pub fn taker(&self, service: &ObjectName, plan: &ServicePlan) -> Option<&ObjectName> {
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
    pub fn withhold(&self, service: &ObjectName, plan: &mut ServicePlan) {
        let frontends = std::mem::take(&mut plan.frontends).into_vec();
        let free = frontends.into_iter().filter(|frontend| {
            let taker = self.taken.get(&(frontend.family, frontend.at));
            taker.is_none_or(|taker| taker == service)
        });
        plan.frontends = free.collect();
    }

    /// Puts a change in line, whose old plan's frontends are taken already.
    pub fn push(&mut self, service: &ObjectName, change: Arc<PlanChange>, effects: Effects) {
        self.take(service, change.after());
        let line = self.lines.entry(service.namespace().to_owned());
        line.or_default().push_back(service.clone());
        let waiting = Waiting {
            change,
            effects,
            timings: Timings::default(),
        };
        self.waiting.insert(service.clone(), waiting);
    }

    /// Has events timed until the change of a service is written. Gives them back if none waits.
    pub fn add_timings(&mut self, service: &ObjectName, mut timings: Timings) -> Timings {
        if let Some(waiting) = self.waiting.get_mut(service) {
            let all = &mut waiting.timings;
            all.arrived.append(&mut timings.arrived);
            all.triggered_at_ms.append(&mut timings.triggered_at_ms);
        }
        timings
    }

    /// The service whose turn it is.
    pub fn next(&self) -> Option<ObjectName> {
        let after = (Bound::Excluded(&*self.last), Bound::Unbounded);
        let mut lines = self.lines.range::<str, _>(after).chain(&self.lines);
        let (_, line) = lines.next()?;
        line.front().cloned()
    }

    /// Notes that a service has had its turn, and with it the namespace.
    pub fn had_turn(&mut self, service: &ObjectName) {
        service.namespace().clone_into(&mut self.last);
    }

    /// Takes a change out that is written.
    pub fn written(&mut self, service: &ObjectName) -> Option<Waiting> {
        let waiting = self.waiting.remove(service)?;
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
        self.release(service, waiting.change.before());
        self.release(service, waiting.change.after());
        Some(waiting)
    }

    /// Gives the frontends of a plan back.
    pub fn release(&mut self, service: &ObjectName, plan: Option<&Arc<ServicePlan>>) {
        for frontend in plan.into_iter().flat_map(|plan| &plan.frontends) {
            let key = (frontend.family, frontend.at);
            if self.taken.get(&key) == Some(service) {
                self.taken.remove(&key);
            }
        }
    }

    /// The services that were to be compiled again.
    pub fn take_again(&mut self) -> BTreeSet<ObjectName> {
        std::mem::take(&mut self.again)
    }

    /// All services in line.
    pub fn services(&self) -> Vec<ObjectName> {
        self.waiting.keys().cloned().collect()
    }
}
