//! Compiles what changed.
//!
//! The engine keeps, beside the objects, the plan of each isolated address of this node and which
//! sets each policy's chain uses. A batch of events leaves marks: pods with what they brought to
//! the sets before, addresses to plan again, policies to compile again. [`Engine::update`]
//! works these off into the parts of the tables that are touched, before and after, and the
//! difference of the two is the transaction.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use super::inventory::Inventory;
use super::layout::{Direction, table_id};
use super::moved::Moved;
use super::parts::{self, Parts, isolate, sort};
use super::plans::Isolation;
use super::rules::{self, policy_chain, skeleton};
use super::sets::{Membership, SetId, Sets};
use super::{FindLinks, Settings};
use crate::model::{Event, Family, Kind, Lists, Object, ObjectName, ObjectRef, Pod};
use crate::ruleset::{Chain, Element, Name, Ruleset, Table, TableId, Transaction, diff};

/// A policy's chain in one family's table.
#[derive(Debug, Default)]
pub(super) struct PolicyUse {
    /// How many pods' chains jump to it.
    pub pods: u32,
    chain: Option<Chain>,
    /// The sets that its rules use.
    sets: Vec<SetId>,
}

/// What events touched since the last update.
#[derive(Debug, Default)]
pub(super) struct Touched {
    /// Pods, with what they brought to sets before.
    pods: HashMap<ObjectName, Vec<Membership>>,
    /// Addresses of this node that may be isolated in another way now.
    addresses: BTreeSet<IpAddr>,
    /// Policies with other rules.
    policies: BTreeSet<ObjectName>,
    /// Whether the host's interfaces are to be looked up although no plan changes.
    pub links: bool,
}

/// Turns pods, namespaces and policies into rules.
#[derive(Debug)]
pub struct Engine {
    pub(super) settings: Settings,
    pub(super) inventory: Inventory,
    lists: Lists,
    sets: Sets,
    pub(super) plans: BTreeMap<IpAddr, Isolation>,
    /// How many addresses have so many pods to ask in a direction and family, from the second on.
    pub(super) layers: BTreeMap<(Family, Direction, usize), u32>,
    pub(super) uses: BTreeMap<(Family, Direction, ObjectName), PolicyUse>,
    /// Policies that the kernel refused: closed until they change or [`Engine::forgive`] is called.
    pub(super) refused: BTreeSet<ObjectName>,
    pub(super) find_links: FindLinks,
    /// The interfaces that lead to isolated pods.
    pub(super) links: BTreeSet<(Direction, Arc<str>)>,
    moved: Moved,
    /// Whether the tables exist: while there is any policy.
    exists: bool,
    /// Whether policies are enforced at all.
    on: bool,
    pub(super) touched: Touched,
}

impl Engine {
    /// An engine that has seen nothing yet.
    pub fn new(settings: Settings) -> Self {
        Self {
            inventory: Inventory::new(settings.node.clone()),
            settings,
            lists: Lists::default(),
            sets: Sets::default(),
            plans: BTreeMap::new(),
            layers: BTreeMap::new(),
            uses: BTreeMap::new(),
            refused: BTreeSet::new(),
            find_links: |_| Vec::new(),
            links: BTreeSet::new(),
            moved: Moved::default(),
            exists: false,
            on: true,
            touched: Touched::default(),
        }
    }

    /// With someone who knows the interfaces of the host. Without one link-local addresses are as
    /// those of pods that nobody isolates.
    #[must_use]
    pub fn with_links(mut self, find: FindLinks) -> Self {
        self.find_links = find;
        self
    }

    /// Whether connections shall be cut that no policy allows any more.
    pub fn is_strict(&self) -> bool {
        self.settings.strict
    }

    /// An engine that keeps the tables away: it needs no list and knows no policy.
    pub fn off(settings: Settings) -> Self {
        let mut engine = Self {
            on: false,
            ..Self::new(settings)
        };
        for kind in Kind::POLICY {
            engine.lists.complete(kind);
        }
        engine
    }

    /// Whether policies are enforced at all.
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Whether there are policies now, and were none at the last update.
    pub fn has_first_policies(&self) -> bool {
        !self.exists && self.inventory.counts().2 > 0
    }

    /// Whether all kinds were listed and none is being listed. Before that the rules would deny
    /// what the missing objects allow.
    pub fn is_ready(&self) -> bool {
        Kind::POLICY.iter().all(|kind| self.is_listed(*kind))
    }

    /// The kinds that are not listed completely.
    pub fn missing(&self) -> Vec<Kind> {
        let kinds = Kind::POLICY.into_iter();
        kinds.filter(|kind| !self.is_listed(*kind)).collect()
    }

    fn is_listed(&self, kind: Kind) -> bool {
        self.lists.is_complete(kind) && !self.lists.is_open(kind)
    }

    /// The number of objects of a kind.
    pub fn count(&self, kind: Kind) -> usize {
        let (pods, namespaces, policies) = self.inventory.counts();
        match kind {
            Kind::Pod => pods,
            Kind::Namespace => namespaces,
            Kind::NetworkPolicy => policies,
            _ => 0,
        }
    }

    /// The pod that has an address, or one that may have it: for logs.
    pub fn pod_at(&self, address: IpAddr) -> Option<&ObjectName> {
        let mut local = self.inventory.isolating(address);
        let departed = || self.inventory.departed(address);
        let pod = local.next().or_else(departed);
        let pod = pod.or_else(|| self.inventory.holders(address).next());
        pod.map(|pod| &pod.name)
    }

    /// The addresses that other pods have than at the last call, so that connections may be left
    /// of the former ones.
    pub fn take_moved(&mut self) -> BTreeSet<IpAddr> {
        self.moved.take()
    }

    /// The policies to which a chain of a table belongs.
    pub fn policies_of_chain(&self, table: &TableId, chain: &Name) -> Vec<ObjectName> {
        self.users(table, |direction, name, _| {
            direction.policy_chain(name) == *chain
        })
    }

    /// The policies that use a set of a table.
    pub fn policies_of_set(&self, table: &TableId, set: &Name) -> Vec<ObjectName> {
        let Some(id) = self.sets.named(set) else {
            return Vec::new();
        };
        self.users(table, |_, _, used| used.sets.contains(&id))
    }

    /// Those that are in force and not closed yet.
    fn users(
        &self,
        table: &TableId,
        is_user: impl Fn(Direction, &ObjectName, &PolicyUse) -> bool,
    ) -> Vec<ObjectName> {
        let uses = self.uses.iter();
        let of_table = uses.filter(|((family, ..), _)| table_id(*family) == *table);
        let users = of_table.filter(|((_, direction, name), used)| {
            !self.refused.contains(name) && is_user(*direction, name, used)
        });
        let mut names: Vec<ObjectName> = users.map(|((.., name), _)| name.clone()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Closes a policy that the kernel refused: it selects its pods and allows nothing.
    pub fn refuse(&mut self, policy: ObjectName) {
        self.touched.policies.insert(policy.clone());
        self.refused.insert(policy);
    }

    /// Has the policies tried again that were refused.
    pub fn forgive(&mut self) {
        self.touched.policies.append(&mut self.refused);
    }

    /// The isolated addresses of this node with their pods; `None` where the object of the pod is
    /// gone.
    pub fn isolated(&self) -> impl Iterator<Item = (IpAddr, Option<&ObjectName>)> {
        self.plans.iter().map(|(address, plan)| {
            let mut asked = plan.asked.values().flatten();
            let present = asked.find(|asked| !asked.departed);
            (*address, present.map(|asked| &asked.pod))
        })
    }

    /// When the address of a pod that was deleted while it ran is to be isolated no more, which
    /// [`Engine::update`] does.
    pub fn departed_due(&self) -> Option<Instant> {
        self.inventory.departed_due()
    }

    /// Takes over one event about pods, namespaces or policies; others are ignored.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::ListStarted(kind) if Kind::POLICY.contains(&kind) => {
                let known = match kind {
                    Kind::Pod => self.inventory.pod_names(),
                    Kind::Namespace => self.inventory.namespace_names(),
                    _ => self.inventory.policy_names(),
                };
                self.lists.start(kind, known);
            }
            Event::ListComplete(kind) if Kind::POLICY.contains(&kind) => {
                for name in self.lists.complete(kind) {
                    self.delete(&ObjectRef::new(kind, name));
                }
            }
            Event::Apply(object) => {
                self.lists.saw(&object.reference());
                match object {
                    Object::Pod(pod) => self.set_pod(&pod.name.clone(), Some(pod)),
                    Object::Namespace(namespace) => {
                        let name = namespace.name.clone();
                        if self.inventory.knows(&namespace) {
                            return;
                        }
                        self.touch_namespace(name.name());
                        self.inventory.set_namespace(name.name(), Some(namespace));
                        self.sets.namespace_changed(name.name(), &self.inventory);
                    }
                    Object::NetworkPolicy(policy) => {
                        let name = policy.name.clone();
                        if self
                            .inventory
                            .policy(&name)
                            .is_some_and(|old| **old == policy)
                        {
                            return;
                        }
                        self.touch_policy(&name);
                        self.inventory.set_policy(&name, Some(policy));
                    }
                    _ => {}
                }
            }
            Event::Delete(reference) => {
                self.lists.saw(&reference);
                self.delete(&reference);
            }
            Event::ListStarted(_) | Event::ListComplete(_) | Event::Notice(_) => {}
        }
    }

    fn delete(&mut self, object: &ObjectRef) {
        match object.kind {
            Kind::Pod => self.set_pod(&object.name, None),
            Kind::Namespace => {
                let name = object.name.name();
                self.touch_namespace(name);
                self.inventory.set_namespace(name, None);
                self.sets.namespace_changed(name, &self.inventory);
            }
            Kind::NetworkPolicy => {
                self.touch_policy(&object.name);
                self.inventory.set_policy(&object.name, None);
            }
            _ => {}
        }
    }

    fn set_pod(&mut self, name: &ObjectName, pod: Option<Pod>) {
        let old = self.inventory.pod(name);
        if old == pod.as_ref() {
            return;
        }
        // Whoever has an address of the old or the new version may lose or gain it.
        let mut concerned = BTreeSet::from([name.clone()]);
        for version in old.into_iter().chain(&pod) {
            concerned.extend(self.inventory.rivals(version));
        }
        let addresses: BTreeSet<IpAddr> = old
            .into_iter()
            .chain(&pod)
            .flat_map(|version| version.addresses.iter().copied())
            .collect();
        for name in &concerned {
            self.touch_pod(name);
        }
        let holders = |inventory: &Inventory| -> Vec<Vec<ObjectName>> {
            let of = |address: &IpAddr| {
                let holders = inventory.holders(*address);
                let mut names: Vec<ObjectName> = holders.map(|pod| pod.name.clone()).collect();
                names.sort_unstable();
                names
            };
            addresses.iter().map(of).collect()
        };
        let before = holders(&self.inventory);
        let namespace = name.namespace();
        let known = self.inventory.has_namespace(namespace);
        self.inventory.set_pod(name, pod, Instant::now());
        for name in &concerned {
            self.touch_pod(name);
        }
        if known != self.inventory.has_namespace(namespace) {
            self.sets.namespace_changed(namespace, &self.inventory);
        }
        // What a list tells for the first time may have been so for long.
        let listing = self.lists.is_open(Kind::Pod);
        let after = holders(&self.inventory);
        for (address, (before, after)) in addresses.iter().zip(before.into_iter().zip(after)) {
            let local = self.inventory.local_holders(*address).next().is_some();
            self.moved.note(*address, before, after, local && !listing);
            if local || self.plans.contains_key(address) {
                self.touched.addresses.insert(*address);
            }
        }
    }

    /// Notes what a pod brings to sets before it changes.
    fn touch_pod(&mut self, name: &ObjectName) {
        if !self.touched.pods.contains_key(name) {
            let pod = self.inventory.pod(name);
            let brought = pod.map_or_else(Vec::new, |pod| self.sets.of_pod(pod, &self.inventory));
            self.touched.pods.insert(name.clone(), brought);
        }
    }

    fn touch_namespace(&mut self, namespace: &str) {
        let pods = self.inventory.pods_of(namespace);
        let names: Vec<ObjectName> = pods.map(|pod| pod.name.clone()).collect();
        for name in &names {
            self.touch_pod(name);
        }
    }

    #[cfg(test)]
    pub(super) fn has_touched_pods(&self) -> bool {
        !self.touched.pods.is_empty()
    }

    fn touch_policy(&mut self, name: &ObjectName) {
        self.refused.remove(name);
        let local = self.inventory.local_of(name.namespace());
        let pods = local.filter_map(|name| self.inventory.pod(name));
        let addresses = pods.flat_map(|pod| pod.addresses.iter().copied());
        self.touched.addresses.extend(addresses);
        let departed = self.inventory.departed_of(name.namespace());
        self.touched.addresses.extend(departed);
        self.touched.policies.insert(name.clone());
    }

    /// Compiles what changed since the last call. Returns the operations that bring the tables
    /// from what the last call (or [`Engine::ruleset`]) gave to what is wanted now.
    pub fn update(&mut self) -> Transaction {
        self.forget_departed(Instant::now());
        let touched = std::mem::take(&mut self.touched);
        let mut parts: [Parts; 2] = Default::default();
        let mut uses_touched: BTreeSet<(Family, Direction, ObjectName)> = BTreeSet::new();
        let mut replanned = touched.links;
        self.draft_layers(&mut parts, |parts| &mut parts.before);
        for address in &touched.addresses {
            replanned |= self.plan_again(*address, &mut parts, &mut uses_touched);
        }
        self.draft_layers(&mut parts, |parts| &mut parts.after);
        if replanned {
            self.links_again(&mut parts);
        }
        for policy in &touched.policies {
            let keys = Family::ALL.into_iter().flat_map(|family| {
                let directions = Direction::ALL.into_iter();
                directions.map(move |direction| (family, direction, policy.clone()))
            });
            uses_touched.extend(keys.filter(|key| self.uses.contains_key(key)));
        }
        // The sets whose uses change, with whether a table used them before.
        let mut was_used: BTreeMap<(Family, SetId), bool> = BTreeMap::new();
        for key in &uses_touched {
            let changed = touched.policies.contains(&key.2);
            self.compile_again(key, changed, parts::of(&mut parts, key.0), &mut was_used);
        }
        self.fill_sets(touched.pods, &was_used, &mut parts);
        for (_, set) in was_used.into_keys() {
            self.sets.sweep(set);
        }
        self.finish(parts)
    }

    /// Forgets the departed pods whose time is over.
    pub(super) fn forget_departed(&mut self, now: Instant) {
        while let Some(address) = self.inventory.departed_expired(now) {
            let claimants: Vec<ObjectName> = self.inventory.claimants(address).cloned().collect();
            for name in &claimants {
                self.touch_pod(name);
            }
            self.inventory.forget_departed(now);
            self.touched.addresses.insert(address);
        }
    }

    /// Compiles the chain of a policy again, or drops it if no pod is left that uses it. `changed`
    /// says that the policy is another one than before.
    fn compile_again(
        &mut self,
        key: &(Family, Direction, ObjectName),
        changed: bool,
        parts: &mut Parts,
        was_used: &mut BTreeMap<(Family, SetId), bool>,
    ) {
        let (family, direction, name) = key;
        let Some(old) = self.uses.remove(key) else {
            return;
        };
        if !changed && old.pods > 0 && old.chain.is_some() {
            self.uses.insert(key.clone(), old);
            return;
        }
        let policy = self.inventory.policy(name).filter(|_| old.pods > 0);
        let (chain, sets) = policy.map_or((None, Vec::new()), |policy| {
            if self.refused.contains(name) {
                return (Some(Chain::default()), Vec::new());
            }
            let (chain, sets) = policy_chain(policy, *direction, *family, |meaning| {
                self.sets.get(meaning, &self.inventory)
            });
            (Some(chain), sets)
        });
        for (sets, more) in [(&old.sets, false), (&sets, true)] {
            for set in sets {
                let before = self.sets.count(*set, *family, more);
                was_used.entry((*family, *set)).or_insert(before > 0);
            }
        }
        let chain_name = direction.policy_chain(name);
        if let Some(chain) = old.chain {
            parts.before.chains.insert(chain_name.clone(), chain);
        }
        if let Some(chain) = &chain {
            parts.after.chains.insert(chain_name, chain.clone());
        }
        if old.pods > 0 {
            let pods = old.pods;
            self.uses
                .insert(key.clone(), PolicyUse { pods, chain, sets });
        }
    }

    /// Drafts the sets that come and go, and what the touched pods change in the others.
    fn fill_sets(
        &self,
        touched: HashMap<ObjectName, Vec<Membership>>,
        was_used: &BTreeMap<(Family, SetId), bool>,
        parts: &mut [Parts; 2],
    ) {
        let mut fresh = Vec::new();
        for (key, was_used) in was_used {
            let (family, set) = *key;
            let is_used = self.sets.is_used(set, family);
            let Some((name, declared)) = self.sets.declared(set) else {
                continue;
            };
            match (was_used, is_used) {
                (true, false) => {
                    let before = &mut parts::of(parts, family).before;
                    before.sets.insert(name, declared);
                }
                (false, true) => fresh.push((family, set)),
                _ => {}
            }
        }
        let [v4, v6] = parts;
        self.fill(&fresh, [&mut v4.after, &mut v6.after]);
        let stays = |family: Family, set: SetId| {
            let used_before = was_used.get(&(family, set)).copied().unwrap_or(true);
            used_before && self.sets.is_used(set, family)
        };
        if Family::ALL
            .iter()
            .all(|family| !self.sets.used(*family).any(|set| stays(*family, set)))
        {
            return;
        }
        for (name, before) in touched {
            let pod = self.inventory.pod(&name);
            let after = pod.map_or_else(Vec::new, |pod| self.sets.of_pod(pod, &self.inventory));
            if before == after {
                continue;
            }
            for (memberships, is_after) in [(before, false), (after, true)] {
                for Membership { family, set, key } in memberships {
                    if !stays(family, set) {
                        continue;
                    }
                    let Some((name, declared)) = self.sets.declared(set) else {
                        continue;
                    };
                    let parts = parts::of(parts, family);
                    // A set that one of the two lacks would be made or deleted.
                    for table in [&mut parts.before, &mut parts.after] {
                        table
                            .sets
                            .entry(name.clone())
                            .or_insert_with(|| declared.clone());
                    }
                    let table = if is_after {
                        &mut parts.after
                    } else {
                        &mut parts.before
                    };
                    if let Some(set) = table.sets.get_mut(&name) {
                        set.elements.push(Element::new(key));
                    }
                }
            }
        }
    }

    /// Puts complete sets into the tables.
    fn fill(&self, fresh: &[(Family, SetId)], tables: [&mut Table; 2]) {
        let mut ids: Vec<SetId> = fresh.iter().map(|(_, set)| *set).collect();
        ids.sort_unstable();
        ids.dedup();
        let mut elements: HashMap<(Family, SetId), Vec<Element>> = HashMap::new();
        for (family, set) in fresh {
            elements.insert((*family, *set), self.sets.fixed_elements(*set));
        }
        self.sets
            .for_each_member(&ids, &self.inventory, |membership| {
                let Membership { family, set, key } = membership;
                if let Some(elements) = elements.get_mut(&(family, set)) {
                    elements.push(Element::new(key));
                }
            });
        let mut tables = Family::ALL.into_iter().zip(tables).collect::<Vec<_>>();
        for ((of, id), elements) in elements {
            let declared = self.sets.declared(id);
            let table = tables.iter_mut().find(|(family, _)| *family == of);
            if let (Some((name, mut set)), Some((_, table))) = (declared, table) {
                set.elements = elements;
                sort(&mut set);
                table.sets.insert(name, set);
            }
        }
    }

    fn finish(&mut self, parts: [Parts; 2]) -> Transaction {
        let wanted = self.inventory.counts().2 > 0;
        let existed = std::mem::replace(&mut self.exists, wanted);
        if existed && wanted {
            let (mut before, mut after) = (Ruleset::default(), Ruleset::default());
            for (family, mut parts) in Family::ALL.into_iter().zip(parts) {
                parts.level();
                before.tables.insert(table_id(family), parts.before);
                after.tables.insert(table_id(family), parts.after);
            }
            return diff(&before, after);
        }
        let tables = Family::ALL.map(|family| (table_id(family), Table::default()));
        let before = if existed {
            Ruleset {
                tables: tables.into(),
            }
        } else {
            Ruleset::default()
        };
        diff(&before, self.ruleset())
    }

    /// The tables as they are after the last [`Engine::update`], from scratch.
    pub fn ruleset(&self) -> Ruleset {
        if !self.exists {
            return Ruleset::default();
        }
        let mut tables = Family::ALL.map(|family| skeleton(family, &self.settings));
        for (family, table) in Family::ALL.into_iter().zip(&mut tables) {
            let of_family = self
                .plans
                .iter()
                .filter(|(ip, _)| Family::of(**ip) == family);
            for (address, plan) in of_family {
                isolate(table, *address, plan, self.settings.strict);
            }
            for (_, direction, layer) in self.layers.keys().filter(|(of, ..)| *of == family) {
                rules::add_layer(table, family, *direction, *layer, &self.settings);
            }
            if family == Family::V6 {
                parts::lead(table, &self.links);
            }
            table.sets.values_mut().for_each(sort);
        }
        for ((family, direction, name), used) in &self.uses {
            if let Some(chain) = &used.chain {
                let [v4, v6] = &mut tables;
                let table = match family {
                    Family::V4 => v4,
                    Family::V6 => v6,
                };
                table
                    .chains
                    .insert(direction.policy_chain(name), chain.clone());
            }
        }
        let used = Family::ALL.into_iter().flat_map(|family| {
            let sets = self.sets.used(family);
            sets.map(move |set| (family, set))
        });
        let used: Vec<(Family, SetId)> = used.collect();
        let [v4, v6] = &mut tables;
        self.fill(&used, [v4, v6]);
        let tables = Family::ALL.into_iter().zip(tables);
        Ruleset {
            tables: tables
                .map(|(family, table)| (table_id(family), table))
                .collect(),
        }
    }
}
