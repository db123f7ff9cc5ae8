//! The change from one plan of a service to the next, in steps that can be written in portions.
//!
//! Most changes are written in one transaction. Those of a very large service are not, so that
//! other services are written in between. Packets meet the intermediate states, which are correct
//! because of the order of the steps:
//!
//! 1. Add the shared chains that the new plan needs, and the elements of `hairpin` for its
//!    endpoints.
//! 2. Delete the lead elements of removed frontends, and replace those of frontends that do not get
//!    more endpoints.
//! 3. Replace the endpoints, each index in one step.
//! 4. Add the lead elements of new frontends, and replace those of frontends that get more endpoints.
//! 5. Delete surplus indexes of frontends that get more endpoints in one map and fewer in the
//!    other.
//! 6. Delete elements that several services can need, and release the shared chains of the old
//!    plan.
//!
//! All lead elements of a frontend change in one step, and so in one transaction. The invariant: a
//! number counts no endpoints that are not there, old or new. It exists from step 4 of the change
//! that adds it to step 2 of the one that deletes it; its indexes are added before and deleted after.
//! A frontend with fewer endpoints has the smaller number before its last indexes are deleted, one
//! with more has the larger number after they are added. A packet that drew a deleted index before
//! looks its number up again, as after a change in one transaction.
//!
//! No other change may touch the frontends of the two plans until the last step is written.

use std::net::IpAddr;
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt};

use super::layout::{By, EndpointScope, ServiceSet};
use super::plan::{
    ElementOf, Frontend, Leads, Route, SCOPES, ServicePlan, Target, endpoint_element, shared_key,
};
use crate::model::Family;
use crate::nft::{Element, Key};
use crate::services::Claim;

/// A change from one plan of a service to the next.
#[derive(Debug)]
pub struct PlanChange {
    old: Option<Arc<ServicePlan>>,
    new: Option<Arc<ServicePlan>>,
    pairs: Vec<Pair>,
    steps: Vec<PlanStep>,
    elements: usize,
}

/// The places of a frontend in the two plans.
#[derive(Clone, Copy, Debug)]
struct Pair {
    old: Option<usize>,
    new: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
enum PlanStep {
    /// The new plan needs a shared element, given by its place in the list.
    Acquire(ServiceSet, usize),
    /// The old plan no longer needs it.
    Release(ServiceSet, usize),
    /// All lead elements of a frontend, given by its place in the pairs.
    Leads(usize),
    /// One endpoint of a frontend, given by its index.
    Endpoint(usize, EndpointScope, usize),
}

/// A change of one element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Edit {
    /// Delete it.
    Delete(ServiceSet, Element),
    /// Add it.
    Add(ServiceSet, Element),
    /// Count one more service that needs it.
    Acquire(ServiceSet, Key),
    /// Count one service less that needs it.
    Release(ServiceSet, Key),
}

impl PlanChange {
    /// Compares two plans; `None` if they are equal.
    pub fn between(old: Option<Arc<ServicePlan>>, new: Option<Arc<ServicePlan>>) -> Option<Self> {
        if old == new {
            return None;
        }
        let pairs = pairs(frontends(old.as_ref()), frontends(new.as_ref()));
        let mut change = Self {
            old,
            new,
            pairs,
            steps: Vec::new(),
            elements: 0,
        };
        change.plan_steps();
        Some(change)
    }

    /// Returns the old plan.
    pub fn before(&self) -> Option<&Arc<ServicePlan>> {
        self.old.as_ref()
    }

    pub fn after(&self) -> Option<&Arc<ServicePlan>> {
        self.new.as_ref()
    }

    /// Returns the number of steps.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Returns whether no element differs.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Returns the approximate number of elements that are deleted and added.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Returns whether a step changes an element that several services can need.
    pub fn is_shared(&self, step: usize) -> bool {
        let step = self.steps.get(step);
        matches!(step, Some(PlanStep::Acquire(..) | PlanStep::Release(..)))
    }

    /// Calls `then` with each edit of a step.
    pub(crate) fn edits(&self, step: usize, mut then: impl FnMut(Family, Edit)) {
        match self.steps.get(step) {
            None => {}
            Some(PlanStep::Acquire(set, place)) => {
                if let Some(address) = shared(self.new.as_ref(), *set).get(*place) {
                    then(
                        Family::of(*address),
                        Edit::Acquire(*set, shared_key(*set, *address)),
                    );
                }
            }
            Some(PlanStep::Release(set, place)) => {
                if let Some(address) = shared(self.old.as_ref(), *set).get(*place) {
                    then(
                        Family::of(*address),
                        Edit::Release(*set, shared_key(*set, *address)),
                    );
                }
            }
            Some(PlanStep::Leads(pair)) => self.lead_edits(*pair, then),
            Some(PlanStep::Endpoint(pair, scope, index)) => {
                let (old, new) = self.sides(*pair);
                for (side, make) in [
                    (old, Edit::Delete as fn(ServiceSet, Element) -> Edit),
                    (new, Edit::Add),
                ] {
                    let Some((plan, frontend)) = side else {
                        continue;
                    };
                    if let Some(target) = target(plan, frontend, *scope, *index) {
                        let (set, element) = endpoint_element(frontend, *scope, *index, target);
                        then(frontend.family, make(set, element));
                    }
                }
            }
        }
    }

    /// Returns the service's own elements in the table of a family after a number of steps.
    pub(crate) fn own_elements_after(&self, steps: usize, family: Family) -> Vec<ElementOf> {
        let old = self.old.as_ref();
        let mut found: HashMap<(ServiceSet, Key), Element> = old
            .map_or_else(Vec::new, |plan| plan.own_elements(family))
            .into_iter()
            .map(|(set, element)| ((set, element.key.clone()), element))
            .collect();
        for step in 0..steps {
            self.edits(step, |of, edit| match edit {
                _ if of != family => {}
                Edit::Delete(set, element) => {
                    found.remove(&(set, element.key));
                }
                Edit::Add(set, element) => {
                    found.insert((set, element.key.clone()), element);
                }
                Edit::Acquire(..) | Edit::Release(..) => {}
            });
        }
        let found = found.into_iter();
        found.map(|((set, _), element)| (set, element)).collect()
    }

    fn sides(&self, pair: usize) -> (Side<'_>, Side<'_>) {
        let Some(pair) = self.pairs.get(pair) else {
            return (None, None);
        };
        (
            side(self.old.as_ref(), pair.old),
            side(self.new.as_ref(), pair.new),
        )
    }

    fn lead_edits(&self, pair: usize, mut then: impl FnMut(Family, Edit)) {
        let (old, new) = self.sides(pair);
        let elements = |side: Side| {
            let mut elements = Vec::new();
            if let Some((plan, frontend)) = side {
                plan.lead_elements(frontend, &mut elements);
            }
            elements.sort_unstable_by(|(a, x), (b, y)| (a, &x.key).cmp(&(b, &y.key)));
            elements
        };
        let Some(family) = old.or(new).map(|(_, frontend)| frontend.family) else {
            return;
        };
        let (before, after) = (elements(old), elements(new));
        let contains = |element: &ElementOf, list: &[ElementOf]| {
            let key = (element.0, &element.1.key);
            let found = list.binary_search_by(|(set, other)| (*set, &other.key).cmp(&key));
            found.is_ok_and(|place| list.get(place) == Some(element))
        };
        for element in before.iter().filter(|element| !contains(element, &after)) {
            then(family, Edit::Delete(element.0, element.1.clone()));
        }
        for element in after.iter().filter(|element| !contains(element, &before)) {
            then(family, Edit::Add(element.0, element.1.clone()));
        }
    }

    fn plan_steps(&mut self) {
        let mut steps = Vec::new();
        let (old, new) = (self.old.as_ref(), self.new.as_ref());
        let lists = |set| (shared(old, set), shared(new, set));
        let (before, after) = lists(ServiceSet::Hairpin);
        acquire(&mut steps, ServiceSet::Hairpin, before, after);
        let (mut early, mut data, mut late, mut surplus) = (vec![], vec![], vec![], vec![]);
        let mut elements = 0;
        // Adjacent frontends belong to one port and mostly lead to the same.
        let mut last = None;
        for (place, _) in self.pairs.iter().enumerate() {
            let (before, after) = self.sides(place);
            let (was, is) = (targets(before), targets(after));
            let grows = was.iter().zip(&is).any(|(was, is)| is.len() > was.len());
            // A new frontend without endpoints waits as well, so that all new ones are written
            // last.
            let waits = grows || before.is_none();
            let led_by = (led_by(before), led_by(after));
            let differs = match last {
                Some((of, differs)) if of == led_by => differs,
                _ => leads(before) != leads(after),
            };
            last = Some((led_by, differs));
            if differs {
                let list = if waits { &mut late } else { &mut early };
                list.push(PlanStep::Leads(place));
                elements += lead_count(before) + lead_count(after);
            }
            for (scope, (was, is)) in SCOPES.into_iter().zip(was.iter().zip(is)) {
                for index in 0..was.len().max(is.len()) {
                    let (out, into) = (was.get(index), is.get(index));
                    if out == into {
                        continue;
                    }
                    let list = if waits && into.is_none() {
                        &mut surplus
                    } else {
                        &mut data
                    };
                    list.push(PlanStep::Endpoint(place, scope, index));
                    elements += usize::from(out.is_some()) + usize::from(into.is_some());
                }
            }
        }
        for mut list in [early, data, late, surplus] {
            steps.append(&mut list);
        }
        let (before, after) = lists(ServiceSet::Hairpin);
        release(&mut steps, ServiceSet::Hairpin, before, after);
        let (before, after) = lists(ServiceSet::ClusterIps);
        release(&mut steps, ServiceSet::ClusterIps, before, after);
        acquire(&mut steps, ServiceSet::ClusterIps, before, after);
        let shared =
            |step: &&PlanStep| matches!(step, PlanStep::Acquire(..) | PlanStep::Release(..));
        self.elements = elements + steps.iter().filter(shared).count();
        self.steps = steps;
    }
}

/// A frontend with its plan.
type Side<'a> = Option<(&'a ServicePlan, &'a Frontend)>;

fn side(plan: Option<&Arc<ServicePlan>>, place: Option<usize>) -> Side<'_> {
    let plan = plan?;
    Some((plan, plan.frontends.get(place?)?))
}

fn targets(side: Side<'_>) -> [&[Target]; 2] {
    side.map_or([&[]; 2], |(plan, frontend)| plan.targets(frontend))
}

fn leads(side: Side<'_>) -> Option<Leads<'_>> {
    side.and_then(|(plan, frontend)| plan.leads(frontend))
}

/// Returns what determines the lead elements of a frontend within one plan.
fn led_by(side: Side<'_>) -> Option<(By, Family, Route, bool)> {
    side.map(|(_, it)| (it.by(), it.family, it.route, it.firewalled))
}

fn target(
    plan: &ServicePlan,
    frontend: &Frontend,
    scope: EndpointScope,
    index: usize,
) -> Option<Target> {
    let mut maps = SCOPES.into_iter().zip(plan.targets(frontend));
    let (_, targets) = maps.find(|(of, _)| *of == scope)?;
    targets.get(index).copied()
}

fn frontends(plan: Option<&Arc<ServicePlan>>) -> &[Frontend] {
    plan.map_or(&[], |plan| &plan.frontends)
}

fn key(frontend: &Frontend) -> (Family, Claim) {
    (frontend.family, frontend.at)
}

/// Returns the approximate number of lead elements of a frontend.
fn lead_count(side: Side<'_>) -> usize {
    side.map_or(0, |(plan, frontend)| {
        1 + usize::from(frontend.firewalled) + 2 * usize::from(plan.affinity.is_some())
    })
}

/// Pairs the frontends of two plans.
fn pairs(old: &[Frontend], new: &[Frontend]) -> Vec<Pair> {
    let same = old.len() == new.len() && old.iter().map(key).eq(new.iter().map(key));
    if same {
        let both = |place| Pair {
            old: Some(place),
            new: Some(place),
        };
        return (0..old.len()).map(both).collect();
    }
    let mut places: HashMap<(Family, Claim), usize> = HashMap::new();
    if !new.is_empty() {
        places.extend(old.iter().map(key).zip(0..));
    }
    let mut kept = vec![false; old.len()];
    let mut pairs = Vec::with_capacity(old.len().max(new.len()));
    for (place, frontend) in new.iter().enumerate() {
        let before = places.get(&key(frontend)).copied();
        if let Some(kept) = before.and_then(|place| kept.get_mut(place)) {
            *kept = true;
        }
        pairs.push(Pair {
            old: before,
            new: Some(place),
        });
    }
    let removed = kept.iter().enumerate().filter(|(_, kept)| !**kept);
    pairs.extend(removed.map(|(place, _)| Pair {
        old: Some(place),
        new: None,
    }));
    pairs
}

/// Returns the sorted addresses of a plan's elements in a shared set.
fn shared(plan: Option<&Arc<ServicePlan>>, set: ServiceSet) -> &[IpAddr] {
    plan.map_or(&[], |plan| match set {
        ServiceSet::Hairpin => &plan.hairpin,
        _ => &plan.cluster_ips,
    })
}

fn acquire(steps: &mut Vec<PlanStep>, set: ServiceSet, before: &[IpAddr], after: &[IpAddr]) {
    let places = only_in(after, before);
    steps.extend(places.map(|place| PlanStep::Acquire(set, place)));
}

fn release(steps: &mut Vec<PlanStep>, set: ServiceSet, before: &[IpAddr], after: &[IpAddr]) {
    let places = only_in(before, after);
    steps.extend(places.map(|place| PlanStep::Release(set, place)));
}

/// Returns the places in `list` of the addresses that `other` lacks. Both are sorted.
fn only_in<'a>(list: &'a [IpAddr], other: &'a [IpAddr]) -> impl Iterator<Item = usize> + 'a {
    let mut rest = other.iter().peekable();
    list.iter().enumerate().filter_map(move |(place, address)| {
        while rest.next_if(|other| *other < address).is_some() {}
        rest.next_if_eq(&address).is_none().then_some(place)
    })
}
