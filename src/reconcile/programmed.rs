//! What was written to the kernel, in the compact form of plans.
//!
//! The tables are the sum of a skeleton, the plans of all services, the elements several
//! services ask for (counted), and the shared chains (counted). Replacing one plan yields the
//! operations for just the elements in which it differs.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use super::affinity::Suspects;
use super::conntrack::Work;
use crate::compile::{
    Clients, ElementOf, ServicePlan, ServiceSet, Settings, SharedChain, skeleton, table_id,
};
use crate::model::{Family, ObjectName, Store};
use crate::ruleset::{
    Element, Key, Name, Op, Ruleset, SetOf, Sums, Table, TableId, Transaction, diff,
};

/// The rules in force.
#[derive(Clone, Debug, Default)]
pub struct Programmed {
    settings: Settings,
    skeletons: BTreeMap<Family, Table>,
    /// Shared with copies, which cost little then.
    plans: HashMap<ObjectName, Arc<ServicePlan>>,
    /// How many services ask for an element.
    shared: HashMap<(Family, ServiceSet, Key), u32>,
    /// Who uses a chain. Chains in the kernel stay here when nobody uses them.
    chains: BTreeMap<(Family, SharedChain), Use>,
    /// Other namespaces than before remember clients.
    other_clients: bool,
    no_local_endpoints: NoLocalEndpoints,
}

/// Who uses a shared chain.
#[derive(Clone, Copy, Debug)]
enum Use {
    /// So many frontends.
    By(u32),
    /// Nobody any more, since then.
    UnusedSince(Instant),
}

impl Use {
    fn is_unused(self) -> bool {
        matches!(self, Use::UnusedSince(_))
    }
}

/// The namespaces whose services remember clients.
pub type Sticky = Arc<BTreeSet<Clients>>;

/// How many services drop traffic because they have endpoints, but none on this node: for each
/// family by the internal and by the external policy.
pub type NoLocalEndpoints = [[usize; 2]; 2];

/// The operations that a batch of changes amounts to.
#[derive(Debug, Default)]
pub struct Draft {
    skeleton: Vec<Op>,
    tables: BTreeMap<Family, TableDraft>,
}

/// What a batch of changes means besides rules, once these are in force.
#[derive(Debug, Default)]
pub struct Effects {
    /// Clients that may be left without their endpoint.
    pub clients: Suspects,
    /// Frontends whose flows may be stale.
    pub flows: Work,
}

#[derive(Debug, Default)]
struct TableDraft {
    new_chains: Vec<SharedChain>,
    delete: BTreeMap<ServiceSet, Vec<Element>>,
    add: BTreeMap<ServiceSet, Vec<Element>>,
    /// Counted elements that were touched, with whether they existed before.
    touched: BTreeMap<(ServiceSet, Key), bool>,
}

impl Programmed {
    /// Nothing in force yet.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            ..Self::default()
        }
    }

    /// The plan in force for a service.
    pub fn plan(&self, service: &ObjectName) -> Option<&ServicePlan> {
        self.plans.get(service).map(|plan| &**plan)
    }

    /// All plans in force.
    pub fn plans(&self) -> impl Iterator<Item = &ServicePlan> {
        self.plans.values().map(|plan| &**plan)
    }

    /// The number of shared chains in the kernel.
    pub fn chains(&self) -> usize {
        self.chains.len()
    }

    /// Compiles the skeletons anew and drafts what changed in them.
    pub fn set_skeletons(&mut self, store: &Store, mut draft: Option<&mut Draft>) {
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

    /// Replaces the plan of a service, `None` for a service without rules.
    ///
    /// The difference is drafted, unless the tables are going to be compared with the kernel's
    /// as a whole, from which all operations follow.
    pub fn set_plan(
        &mut self,
        service: &ObjectName,
        new: Option<ServicePlan>,
        effects: &mut Effects,
        mut draft: Option<&mut Draft>,
    ) {
        let old = self.plans.remove(service);
        let (before, after) = (old.as_deref(), new.as_ref());
        if before != after {
            effects.flows.change(before, after);
            effects.clients.replace(before, after);
            for family in Family::ALL {
                let table = draft
                    .as_deref_mut()
                    .map(|draft| draft.tables.entry(family).or_default());
                self.replace(family, before, after, table);
            }
            self.count_no_local(before, after);
        }
        if let Some(new) = new {
            self.plans.insert(service.clone(), Arc::new(new));
        }
    }

    fn replace(
        &mut self,
        family: Family,
        old: Option<&ServicePlan>,
        new: Option<&ServicePlan>,
        mut draft: Option<&mut TableDraft>,
    ) {
        self.count_chains(family, old, new, draft.as_deref_mut());
        self.count_shared(family, old, new, draft.as_deref_mut());
        if let Some(draft) = draft {
            let elements = |plan: Option<&ServicePlan>| {
                let mut elements = plan.map_or_else(Vec::new, |plan| plan.own_elements(family));
                elements.sort_unstable_by(|(a, x), (b, y)| (a, &x.key).cmp(&(b, &y.key)));
                elements
            };
            draft.replace(elements(old), elements(new));
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

    /// How many services have endpoints, but none where a policy Local wants them.
    pub fn no_local_endpoints(&self) -> NoLocalEndpoints {
        self.no_local_endpoints
    }

    fn count_chains(
        &mut self,
        family: Family,
        old: Option<&ServicePlan>,
        new: Option<&ServicePlan>,
        mut draft: Option<&mut TableDraft>,
    ) {
        for chain in new.into_iter().flat_map(|plan| plan.chains(family)) {
            let key = (family, chain);
            if !self.chains.contains_key(&key) {
                self.other_clients |= matches!(key.1, SharedChain::Follow(_));
                if let Some(draft) = draft.as_deref_mut() {
                    draft.new_chains.push(key.1.clone());
                }
            }
            let users = self.chains.entry(key).or_insert(Use::By(0));
            *users = match *users {
                Use::By(count) => Use::By(count + 1),
                Use::UnusedSince(_) => Use::By(1),
            };
        }
        for chain in old.into_iter().flat_map(|plan| plan.chains(family)) {
            if let Some(users) = self.chains.get_mut(&(family, chain)) {
                *users = match *users {
                    Use::By(count) if count > 1 => Use::By(count - 1),
                    Use::By(_) => Use::UnusedSince(Instant::now()),
                    unused @ Use::UnusedSince(_) => unused,
                };
            }
        }
    }

    fn count_shared(
        &mut self,
        family: Family,
        old: Option<&ServicePlan>,
        new: Option<&ServicePlan>,
        mut draft: Option<&mut TableDraft>,
    ) {
        let elements = |plan: Option<&ServicePlan>| {
            plan.map_or_else(Vec::new, |plan| plan.shared_elements(family))
        };
        let mut touch = |set: ServiceSet, key: Key, existed: bool| {
            if let Some(draft) = draft.as_deref_mut() {
                draft.touched.entry((set, key)).or_insert(existed);
            }
        };
        for (set, element) in elements(new) {
            let count = self
                .shared
                .entry((family, set, element.key.clone()))
                .or_default();
            touch(set, element.key, *count > 0);
            *count += 1;
        }
        for (set, element) in elements(old) {
            let key = (family, set, element.key);
            if let Some(count) = self.shared.get_mut(&key) {
                let existed = *count > 0;
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.shared.remove(&key);
                }
                touch(set, key.2, existed);
            }
        }
    }

    /// Everything in force as a ruleset.
    pub fn ruleset(&self) -> Ruleset {
        let mut ruleset = self.frame();
        // In the order of their first frontends most elements come in the order of their keys.
        let mut plans: Vec<&ServicePlan> = self.plans().collect();
        plans.sort_unstable_by_key(|plan| plan.frontends.first().map(|frontend| &frontend.at));
        for family in self.skeletons.keys() {
            let Some(table) = ruleset.tables.get_mut(&table_id(*family)) else {
                continue;
            };
            let own = plans.iter().flat_map(|plan| plan.own_elements(*family));
            for (set, elements) in by_set(own.chain(self.shared_elements(*family))) {
                if let Some(set) = table.sets.get_mut(&set.name()) {
                    set.elements = elements;
                }
            }
        }
        ruleset
    }

    /// Everything in force as a ruleset but the elements that services make.
    fn frame(&self) -> Ruleset {
        let mut ruleset = Ruleset::default();
        for (family, skeleton) in &self.skeletons {
            let mut table = skeleton.clone();
            let chains = self.chains.keys().filter(|(of, _)| of == family);
            for (_, chain) in chains {
                table
                    .chains
                    .insert(chain.name(), chain.chain(&self.settings, *family));
                table.sets.extend(chain.sets());
            }
            ruleset.tables.insert(table_id(*family), table);
        }
        ruleset
    }

    /// Everything in force as a ruleset without elements, of which the sums take note.
    pub fn summed(&self, sums: &mut Sums) -> Ruleset {
        let mut frame = self.frame();
        sums.take(&mut frame);
        for family in self.skeletons.keys() {
            let id = table_id(*family);
            let names = ServiceSet::ALL.iter();
            let sets: BTreeMap<ServiceSet, SetOf> = names
                .map(|set| (*set, sums.set(&id, &set.name())))
                .collect();
            let own = self.plans.values().flat_map(|p| p.own_elements(*family));
            for (set, element) in own.chain(self.shared_elements(*family)) {
                if let Some(set) = sets.get(&set) {
                    sums.add(*set, &element);
                }
            }
        }
        frame
    }

    fn shared_elements(&self, family: Family) -> impl Iterator<Item = ElementOf> + '_ {
        let shared = self.shared.keys().filter(move |(of, ..)| *of == family);
        shared.map(|(_, set, key)| (*set, Element::new(key.clone())))
    }

    /// Forgets chains that no service uses, where the kernel is about to be compared anyway.
    pub fn forget_chains(&mut self) {
        self.other_clients = true;
        self.chains.retain(|_, users| !users.is_unused());
    }

    /// When the first of the chains that no service uses now lost its last user.
    pub fn unused_since(&self) -> Option<Instant> {
        let unused = self.chains.values().filter_map(|users| match users {
            Use::By(_) => None,
            Use::UnusedSince(since) => Some(*since),
        });
        unused.min()
    }

    /// The namespaces that remember clients, if they are others than at the last call.
    pub fn take_other_clients(&mut self) -> Option<Sticky> {
        if !std::mem::take(&mut self.other_clients) {
            return None;
        }
        let clients = self.chains.keys().filter_map(|(_, chain)| match chain {
            SharedChain::Follow(clients) => Some(clients.clone()),
            _ => None,
        });
        Some(Arc::new(clients.collect()))
    }

    /// The operations that delete the chains that no service has used since a moment, with their
    /// sets.
    pub fn remove_chains_unused_since(&mut self, moment: Instant) -> Transaction {
        let mut ops = Vec::new();
        let unused: Vec<_> = self
            .chains
            .iter()
            .filter(|(_, users)| match users {
                Use::By(_) => false,
                Use::UnusedSince(since) => *since <= moment,
            })
            .map(|(chain, _)| chain.clone())
            .collect();
        for (family, chain) in &unused {
            ops.push(Op::FlushChain(table_id(*family), chain.name()));
        }
        for (family, chain) in &unused {
            ops.push(Op::DeleteChain(table_id(*family), chain.name()));
        }
        for key in unused {
            let sets = key.1.sets().into_iter();
            ops.extend(sets.map(|(name, _)| Op::DeleteSet(table_id(key.0), name)));
            self.other_clients |= matches!(key.1, SharedChain::Follow(_));
            self.chains.remove(&key);
        }
        Transaction { ops }
    }

    /// The service to which an element belongs. Walks all plans: for errors only.
    pub fn owner(&self, table: &TableId, set: &Name, key: &Key) -> Option<ObjectName> {
        let family = Family::ALL.into_iter().find(|f| table_id(*f) == *table)?;
        let mut owners = self.plans.iter().filter(|(_, plan)| {
            if plan.sources(family).is_some_and(|list| list.name() == *set) {
                return true;
            }
            let own = plan.own_elements(family);
            let shared = plan.shared_elements(family);
            own.iter()
                .chain(&shared)
                .any(|(of, element)| of.name() == *set && element.key == *key)
        });
        owners.next().map(|(name, _)| name.clone())
    }
}

impl TableDraft {
    /// Drafts the difference between two lists of elements, both sorted by set and key.
    fn replace(&mut self, before: Vec<ElementOf>, after: Vec<ElementOf>) {
        let (mut old, mut new) = (before.into_iter().peekable(), after.into_iter().peekable());
        loop {
            let order = match (old.peek(), new.peek()) {
                (Some((a, x)), Some((b, y))) => (a, &x.key).cmp(&(b, &y.key)),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return,
            };
            let gone = old.next_if(|_| order.is_le());
            let come = new.next_if(|_| order.is_ge());
            if gone == come {
                continue;
            }
            if let Some((set, element)) = gone {
                self.delete.entry(set).or_default().push(element);
            }
            if let Some((set, element)) = come {
                self.add.entry(set).or_default().push(element);
            }
        }
    }
}

impl Draft {
    /// The drafted operations in the order the kernel must see them.
    pub fn finish(self, programmed: &Programmed) -> Transaction {
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
            let chains: Vec<_> = chains
                .map(|shared| (shared.name(), shared.chain(&programmed.settings, family)))
                .collect();
            for (name, chain) in &chains {
                ops.push(Op::AddChain(id.clone(), name.clone(), chain.base));
            }
            for (name, chain) in chains {
                let rules = chain.rules.into_iter();
                ops.extend(rules.map(|rule| Op::AddRule(id.clone(), name.clone(), rule)));
            }
            let (mut delete, mut add) = (draft.delete, draft.add);
            for ((set, key), existed) in draft.touched {
                let shared = (family, set, key);
                let exists = programmed.shared.contains_key(&shared);
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

/// Elements by their set, sorted by key.
fn by_set(elements: impl IntoIterator<Item = ElementOf>) -> BTreeMap<ServiceSet, Vec<Element>> {
    let mut sets: BTreeMap<ServiceSet, Vec<Element>> = BTreeMap::new();
    for (set, element) in elements {
        sets.entry(set).or_default().push(element);
    }
    for elements in sets.values_mut() {
        // Stable for its speed: it makes use of what is in order already.
        elements.sort_by(|a, b| a.key.cmp(&b.key));
    }
    sets
}
