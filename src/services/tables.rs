//! The rules in the kernel, in the compact form of plans.
//!
//! The tables consist of a skeleton, the plans of all services, the elements that several services
//! need (counted), and the shared chains (counted). Replacing a plan returns operations for the
//! elements that differ. A large change is written in portions ([`Tables::begin`],
//! [`Tables::advance`]); meanwhile the tables are the old plan after the steps written so far.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use super::chains::SharedChain;
use super::change::{Edit, PlanChange};
use super::layout::{Clients, ServiceSet, priority_map, table_id};
use super::plan::{ElementOf, ServicePlan};
use super::settings::ServiceSettings;
use super::skeleton::skeleton;
use super::sources::SourceList;

use crate::clock;
use crate::engine::SharedMap;
use crate::model::{Family, ObjectName};
use crate::nft::{
    Declaration, Element, Key, Name, ObjectPath, Op, Ruleset, Table, TableId, Transaction, diff,
};
use crate::services::Store;

/// The rules in force.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    settings: ServiceSettings,
    skeletons: BTreeMap<Family, Table>,
    plans: SharedMap<ObjectName, Arc<ServicePlan>>,
    /// Services whose plan is partially written.
    unfinished: HashMap<ObjectName, Unfinished>,
    /// The number of services that need a shared element.
    shared: SharedMap<(Family, ServiceSet, Key), u32>,
    /// The number of services that use each shared chain in the kernel.
    chains: BTreeMap<(Family, SharedChain), u32>,
    /// The chains without a user, since when. They stay for a while.
    unused: BTreeMap<(Family, SharedChain), Instant>,
    /// Whether the namespaces with session affinity changed.
    affinity_namespaces_changed: bool,
    no_local_endpoints: NoLocalEndpoints,
}

/// A change of a service that is written in portions.
#[derive(Clone, Debug)]
struct Unfinished {
    change: Arc<PlanChange>,
    /// The number of steps that are written.
    written: usize,
    /// The approximate number of elements in the other steps.
    left: usize,
}

/// The sets of the namespaces with session affinity.
pub(crate) type Sticky = Arc<BTreeSet<Clients>>;

/// The number of services that drop traffic because only other nodes have endpoints: for each
/// family by the internal and by the external policy.
pub(crate) type NoLocalEndpoints = [[usize; 2]; 2];

/// The operations of a batch of changes.
#[derive(Debug, Default)]
pub struct TransactionDraft {
    skeleton: Vec<Op>,
    tables: BTreeMap<Family, TableDraft>,
}

#[derive(Debug, Default)]
struct TableDraft {
    new_chains: Vec<SharedChain>,
    delete: BTreeMap<ServiceSet, Vec<Element>>,
    add: BTreeMap<ServiceSet, Vec<Element>>,
    /// Shared elements that were touched, and whether they existed before.
    touched: BTreeMap<(ServiceSet, Key), bool>,
}

impl Tables {
    /// Creates tables without rules.
    pub fn new(settings: ServiceSettings) -> Self {
        Self {
            settings,
            ..Self::default()
        }
    }

    /// Returns the plan of a service that is in force or being written.
    pub fn plan(&self, service: &ObjectName) -> Option<&ServicePlan> {
        self.plans.get(service).map(|plan| &**plan)
    }

    /// Returns the same plan as a shared pointer.
    pub(crate) fn shared_plan(&self, service: &ObjectName) -> Option<&Arc<ServicePlan>> {
        self.plans.get(service)
    }

    /// Returns all plans that are in force or being written.
    pub fn plans(&self) -> impl Iterator<Item = &ServicePlan> {
        self.plans.values().map(|plan| &**plan)
    }

    /// Returns the number of plans and of shared elements that are copied because other tables
    /// share them.
    #[cfg(test)]
    pub(crate) fn copied(&self, other: &Self) -> usize {
        self.plans.copied(&other.plans) + self.shared.copied(&other.shared)
    }

    /// Returns the number of shared chains in the kernel.
    pub fn chains(&self) -> usize {
        self.chains.len()
    }

    /// Compiles the skeletons again and drafts their changes. Without services there are none.
    pub(crate) fn set_skeletons(
        &mut self,
        store: &Store,
        mut draft: Option<&mut TransactionDraft>,
    ) {
        if self.settings.off {
            return;
        }
        let cidrs: Vec<_> = store.service_cidrs().collect();
        for family in Family::ALL {
            let node = store.node().map(|node| &**node);
            let table = skeleton(family, &self.settings, node, &cidrs);
            let old = self.skeletons.insert(family, table.clone());
            if let (Some(old), Some(draft)) = (old, draft.as_deref_mut()) {
                let as_ruleset = |table: Table| Ruleset {
                    tables: [(table_id(family), table)].into(),
                };
                let change = diff(&as_ruleset(old), as_ruleset(table));
                draft.skeleton.extend(change.ops);
            }
        }
    }

    /// Compares the plan of a service with a new one, `None` for a service without rules. Returns
    /// `None` if they are equal.
    pub fn change(&self, service: &ObjectName, new: Option<ServicePlan>) -> Option<PlanChange> {
        PlanChange::between(self.plans.get(service).cloned(), new.map(Arc::new))
    }

    /// Replaces the plan of a service at once.
    ///
    /// Without a draft no operations are recorded: a comparison of the whole tables with the kernel
    /// follows, which finds them.
    pub fn replace(
        &mut self,
        service: &ObjectName,
        change: &PlanChange,
        mut draft: Option<&mut TransactionDraft>,
    ) {
        self.take_plan(service, change);
        self.acquire_chains(change, draft.as_deref_mut());
        for step in 0..change.len() {
            if draft.is_some() || change.is_shared(step) {
                change.edits(step, |family, edit| {
                    self.edit(family, edit, draft.as_deref_mut());
                });
            }
        }
        self.release_chains(change);
    }

    /// Replaces the plan of a service by one that is written in portions.
    pub fn begin(&mut self, service: &ObjectName, change: Arc<PlanChange>) {
        self.take_plan(service, &change);
        let unfinished = Unfinished {
            left: change.elements(),
            change,
            written: 0,
        };
        self.unfinished.insert(service.clone(), unfinished);
    }

    /// Returns the approximate number of elements of a service's change that are not yet written.
    pub fn left(&self, service: &ObjectName) -> usize {
        let unfinished = self.unfinished.get(service);
        unfinished.map_or(0, |unfinished| unfinished.left)
    }

    /// Drafts further steps of a change, up to about `most` elements. Returns the number of
    /// elements, and whether the change is complete.
    pub(crate) fn advance(
        &mut self,
        service: &ObjectName,
        most: usize,
        mut draft: Option<&mut TransactionDraft>,
    ) -> (usize, bool) {
        let Some(mut unfinished) = self.unfinished.remove(service) else {
            return (0, true);
        };
        let change = unfinished.change.clone();
        if unfinished.written == 0 {
            self.acquire_chains(&change, draft.as_deref_mut());
        }
        let mut elements = 0;
        while unfinished.written < change.len() && elements < most {
            change.edits(unfinished.written, |family, edit| {
                elements += 1;
                self.edit(family, edit, draft.as_deref_mut());
            });
            unfinished.written += 1;
        }
        let finished = unfinished.written == change.len();
        if finished {
            self.release_chains(&change);
        } else {
            unfinished.left = unfinished.left.saturating_sub(elements);
            self.unfinished.insert(service.clone(), unfinished);
        }
        (elements, finished)
    }

    fn take_plan(&mut self, service: &ObjectName, change: &PlanChange) {
        let old = change.before().map(|plan| &**plan);
        let new = change.after().map(|plan| &**plan);
        self.count_no_local(old, new);
        match change.after() {
            Some(new) => self.plans.insert(service.clone(), new.clone()),
            None => self.plans.remove(service),
        };
    }

    fn edit(&mut self, family: Family, edit: Edit, draft: Option<&mut TransactionDraft>) {
        let draft = draft.map(|draft| draft.tables.entry(family).or_default());
        let (set, key, acquires) = match edit {
            Edit::Delete(set, element) => {
                if let Some(draft) = draft {
                    draft.delete.entry(set).or_default().push(element);
                }
                return;
            }
            Edit::Add(set, element) => {
                if let Some(draft) = draft {
                    draft.add.entry(set).or_default().push(element);
                }
                return;
            }
            Edit::Acquire(set, key) => (set, key, true),
            Edit::Release(set, key) => (set, key, false),
        };
        let place = (family, set, key);
        if let Some(draft) = draft {
            let touched = draft.touched.entry((set, place.2.clone()));
            touched.or_insert_with(|| self.shared.contains_key(&place));
        }
        let Some(count) = self.shared.get_mut(&place) else {
            if acquires {
                self.shared.insert(place, 1);
            }
            return;
        };
        if acquires {
            *count += 1;
        } else if *count > 1 {
            *count -= 1;
        } else {
            self.shared.remove(&place);
        }
    }

    fn count_no_local(&mut self, old: Option<&ServicePlan>, new: Option<&ServicePlan>) {
        let of = |plan: Option<&ServicePlan>, family| {
            plan.map_or([false; 2], |plan| plan.no_local_endpoints(family))
        };
        for (counts, family) in self.no_local_endpoints.iter_mut().zip(Family::ALL) {
            let change = of(old, family).into_iter().zip(of(new, family));
            for (count, (before, now)) in counts.iter_mut().zip(change) {
                *count = (*count + usize::from(now)).saturating_sub(usize::from(before));
            }
        }
    }

    /// Returns how many services drop traffic because of a policy Local and no endpoint on this
    /// node.
    pub(crate) fn no_local_endpoints(&self) -> NoLocalEndpoints {
        self.no_local_endpoints
    }

    fn acquire_chains(&mut self, change: &PlanChange, mut draft: Option<&mut TransactionDraft>) {
        let Some(new) = change.after() else { return };
        for family in Family::ALL {
            for chain in new.chains(family) {
                let key = (family, chain);
                if !self.chains.contains_key(&key) {
                    self.affinity_namespaces_changed |= matches!(key.1, SharedChain::Follow(_));
                    if let Some(draft) = draft.as_deref_mut() {
                        let table = draft.tables.entry(family).or_default();
                        table.new_chains.push(key.1.clone());
                    }
                }
                self.unused.remove(&key);
                *self.chains.entry(key).or_default() += 1;
            }
        }
    }

    fn release_chains(&mut self, change: &PlanChange) {
        let Some(old) = change.before() else { return };
        for family in Family::ALL {
            for chain in old.chains(family) {
                let key = (family, chain);
                if let Some(users) = self.chains.get_mut(&key) {
                    *users = users.saturating_sub(1);
                    if *users == 0 {
                        self.unused.entry(key).or_insert_with(clock::now);
                    }
                }
            }
        }
    }

    /// Returns the elements in force that belong to one service each. Those of completely written
    /// plans come first, in the order of `plans`.
    fn own_elements<'a>(
        &'a self,
        plans: impl Iterator<Item = (&'a ObjectName, &'a ServicePlan)> + 'a,
        family: Family,
    ) -> impl Iterator<Item = ElementOf> + 'a {
        let whole = plans.filter(|(name, _)| !self.unfinished.contains_key(*name));
        let whole = whole.flat_map(move |(_, plan)| plan.own_elements(family));
        let unfinished = self.unfinished.values();
        whole.chain(unfinished.flat_map(move |u| u.change.own_elements_after(u.written, family)))
    }

    fn named_plans(&self) -> impl Iterator<Item = (&ObjectName, &ServicePlan)> {
        self.plans.iter().map(|(name, plan)| (name, &**plan))
    }

    /// Returns the rules in force.
    pub fn ruleset(&self) -> Ruleset {
        let mut ruleset = self.frame();
        // Sorted by their first frontends, most elements are already in the order of their keys.
        let mut plans: Vec<_> = self.named_plans().collect();
        plans.sort_unstable_by_key(|(_, plan)| plan.frontends.first().map(|first| &first.at));
        for family in self.skeletons.keys() {
            let Some(table) = ruleset.tables.get_mut(&table_id(*family)) else {
                continue;
            };
            let own = self.own_elements(plans.iter().copied(), *family);
            for (set, elements) in by_set(own.chain(self.shared_elements(*family))) {
                if let Some(set) = table.sets.get_mut(&set.name()) {
                    set.elements = elements;
                }
            }
        }
        ruleset
    }

    /// Returns the rules in force without the elements of services.
    fn frame(&self) -> Ruleset {
        let mut ruleset = Ruleset::default();
        for (family, skeleton) in &self.skeletons {
            let mut table = skeleton.clone();
            let chains = self.chains.keys().filter(|(of, _)| of == family);
            for (_, shared) in chains {
                table.chains.extend(shared.chains());
                table.sets.extend(shared.sets());
                for (map, elements) in shared.elements() {
                    if let Some(map) = table.sets.get_mut(map) {
                        map.elements.clone_from(elements);
                    }
                }
            }
            ruleset.tables.insert(table_id(*family), table);
        }
        ruleset
    }

    fn shared_elements(&self, family: Family) -> impl Iterator<Item = ElementOf> + '_ {
        let shared = self.shared.keys().filter(move |(of, ..)| *of == family);
        shared.map(|(_, set, key)| (*set, Element::new(key.clone())))
    }

    /// Forgets unused chains, before a comparison of the whole tables.
    pub(crate) fn forget_chains(&mut self) {
        self.affinity_namespaces_changed = true;
        for key in std::mem::take(&mut self.unused).keys() {
            self.chains.remove(key);
        }
    }

    /// Returns since when the longest unused chain is unused.
    pub(crate) fn unused_since(&self) -> Option<Instant> {
        self.unused.values().min().copied()
    }

    /// Returns the sets of the namespaces with session affinity, if they changed since the last
    /// call.
    pub(crate) fn take_changed_affinity_namespaces(&mut self) -> Option<Sticky> {
        if !std::mem::take(&mut self.affinity_namespaces_changed) {
            return None;
        }
        let clients = self.chains.keys().filter_map(|(_, chain)| match chain {
            SharedChain::Follow(clients) => Some(clients.clone()),
            _ => None,
        });
        Some(Arc::new(clients.collect()))
    }

    /// Returns the operations that delete the chains that are unused since a time, with their sets.
    pub fn remove_chains_unused_since(&mut self, moment: Instant) -> Transaction {
        let mut ops = Vec::new();
        let unused = self.unused.iter().filter(|(_, since)| **since <= moment);
        let unused: Vec<_> = unused.map(|(chain, _)| chain.clone()).collect();
        for (family, shared) in &unused {
            ops.extend(leading(*family, shared, Op::DeleteElements));
        }
        for make in [Op::FlushChain, Op::DeleteChain] {
            for (family, shared) in &unused {
                let chains = shared.chains().into_iter();
                ops.extend(chains.map(|(name, _)| make(table_id(*family), name)));
            }
        }
        for key in unused {
            let sets = key.1.sets().into_iter();
            ops.extend(sets.map(|(name, _)| Op::DeleteSet(table_id(key.0), name)));
            self.affinity_namespaces_changed |= matches!(key.1, SharedChain::Follow(_));
            self.unused.remove(&key);
            self.chains.remove(&key);
        }
        Transaction { ops }
    }

    /// Returns the services to which the elements among some objects belong, each with the index of
    /// the object, in order. Walks all plans once: use it for errors only.
    pub fn owners(&self, objects: &[&ObjectPath]) -> Vec<(usize, ObjectName)> {
        let mut found = BTreeMap::new();
        for family in Family::ALL {
            let table = table_id(family);
            let mut wanted: HashMap<&Key, Vec<(usize, &Name)>> = HashMap::new();
            for (index, object) in objects.iter().enumerate() {
                if let ObjectPath::Element(of, set, element, _) = object
                    && *of == table
                {
                    wanted.entry(&element.key).or_default().push((index, set));
                }
            }
            if wanted.is_empty() {
                continue;
            }
            for (name, plan) in self.plans.iter() {
                let mut owns = |index: usize| {
                    found.entry(index).or_insert_with(|| name.clone());
                };
                if let Some(list) = plan.sources(family).map(SourceList::name) {
                    let of_list = wanted.values().flatten().filter(|(_, set)| **set == list);
                    of_list.for_each(|(index, _)| owns(*index));
                }
                let elements = plan.own_elements(family).into_iter();
                for (of, element) in elements.chain(plan.shared_elements(family)) {
                    let here = wanted.get(&element.key).into_iter().flatten();
                    let here = here.filter(|(_, set)| **set == of.name());
                    here.for_each(|(index, _)| owns(*index));
                }
            }
        }
        found.into_iter().collect()
    }
}

impl TransactionDraft {
    /// Returns the operations in the order in which the kernel has to perform them.
    pub fn finish(self, tables: &Tables) -> Transaction {
        let mut ops = self.skeleton;
        for (family, draft) in self.tables {
            let id = table_id(family);
            for (name, set) in draft.new_chains.iter().flat_map(SharedChain::sets) {
                let declaration = set.declaration;
                ops.push(Op::AddSet(id.clone(), name.clone(), declaration.clone()));
                if !set.elements.is_empty() {
                    let elements = set.elements;
                    ops.push(Op::AddElements(id.clone(), name, declaration, elements));
                }
            }
            let chains = draft.new_chains.iter();
            let chains: Vec<_> = chains.flat_map(SharedChain::chains).collect();
            for (name, chain) in &chains {
                ops.push(Op::AddChain(id.clone(), name.clone(), chain.base));
            }
            for (name, chain) in chains {
                let rules = chain.rules.into_iter();
                ops.extend(rules.map(|rule| Op::AddRule(id.clone(), name.clone(), rule)));
            }
            for shared in &draft.new_chains {
                ops.extend(leading(family, shared, Op::AddElements));
            }
            let (mut delete, mut add) = (draft.delete, draft.add);
            for ((set, key), existed) in draft.touched {
                let shared = (family, set, key);
                let exists = tables.shared.contains_key(&shared);
                let list = match (existed, exists) {
                    (false, true) => &mut add,
                    (true, false) => &mut delete,
                    _ => continue,
                };
                list.entry(set).or_default().push(Element::new(shared.2));
            }
            let operation = |make: fn(_, _, _, _) -> Op, set: ServiceSet, elements| {
                make(id.clone(), set.name(), set.declaration(), elements)
            };
            ops.extend(
                delete
                    .into_iter()
                    .map(|(set, elements)| operation(Op::DeleteElements, set, elements)),
            );
            ops.extend(
                add.into_iter()
                    .map(|(set, elements)| operation(Op::AddElements, set, elements)),
            );
        }
        Transaction { ops }
    }
}

/// Returns operations on the elements that lead to shared chains.
fn leading(
    family: Family,
    shared: &SharedChain,
    make: fn(TableId, Name, Arc<Declaration>, Vec<Element>) -> Op,
) -> impl Iterator<Item = Op> {
    shared.elements().iter().map(move |(map, elements)| {
        let declaration = priority_map(vec![]).declaration;
        make(table_id(family), map.clone(), declaration, elements.clone())
    })
}

/// Groups elements by set, sorted by key.
fn by_set(elements: impl IntoIterator<Item = ElementOf>) -> BTreeMap<ServiceSet, Vec<Element>> {
    let mut sets: BTreeMap<ServiceSet, Vec<Element>> = BTreeMap::new();
    for (set, element) in elements {
        sets.entry(set).or_default().push(element);
    }
    for elements in sets.values_mut() {
        // The stable sort is faster, because the elements are mostly in order.
        elements.sort_by(|a, b| a.key.cmp(&b.key));
    }
    sets
}
