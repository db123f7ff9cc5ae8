//! Compiles the touched objects into the parts of the tables that change.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use super::delta::{self, TableDelta, isolate, sort};
use super::engine::{Engine, Part, RulesKey, RulesUse};
use super::layout::{Direction, table_id};
use super::profile::RulesOf;
use super::rules::{self, policy_rules, skeleton};
use super::sets::{Member, SetId};
use super::tiers::{closed, tier_rules};
use crate::model::{Family, Kind, ObjectName, ObjectRef};
use crate::nft::{Chain, Element, Name, Ruleset, Table, Transaction, Verdict, diff};

impl Engine {
    /// Compiles what changed since the last call. Returns the operations that bring the tables from
    /// the state after the last call to the new one.
    pub(super) fn compile(&mut self) -> Transaction {
        self.forget_departed(Instant::now());
        let mut touched = std::mem::take(&mut self.touched);
        let mut deltas: [TableDelta; 2] = Default::default();
        self.draft_layers(&mut deltas, |delta| &mut delta.before);
        let (replanned, mut uses_touched) = self.replan(&touched.addresses, &mut deltas);
        self.draft_layers(&mut deltas, |delta| &mut delta.after);
        self.update_known(&touched.addresses, touched.routes, &mut deltas);
        self.replanned |= replanned;
        // Whether a cluster policy denies anything decides, too.
        if replanned || touched.routes || touched.policies.iter().any(is_cluster_policy) {
            self.update_links(&mut deltas);
        }
        let changed = self.uses_of(&touched.policies);
        uses_touched.extend(changed.iter().cloned());
        // The sets whose use changes, and whether a table used them before.
        let mut was_used: BTreeMap<(Family, SetId), bool> = BTreeMap::new();
        for key in &uses_touched {
            let delta = delta::of(&mut deltas, key.0);
            self.recompile_chains(key, changed.contains(key), delta, &mut was_used);
        }
        self.compiled.append(&mut touched.policies);
        self.fill_sets(touched.members, &was_used, &mut deltas);
        for (_, set) in was_used.into_keys() {
            self.sets.sweep(set);
        }
        self.finish(deltas)
    }

    /// Forgets the departed pods that have expired.
    pub(super) fn forget_departed(&mut self, now: Instant) {
        while let Some(address) = self.inventory.departed_expired(now) {
            let departed = self.inventory.departed(address).map(|pod| &pod.name);
            let claimants = self.inventory.claimants(address).chain(departed);
            let names: Vec<ObjectName> = claimants.cloned().collect();
            for name in &names {
                self.touch_pod(name);
            }
            let namespaces = self.known_namespaces(&names);
            self.inventory.forget_departed(now);
            self.namespaces_changed(namespaces);
            self.touched.addresses.insert(address);
        }
    }

    /// Returns the chains with rules of some policies.
    fn uses_of(&self, policies: &BTreeSet<ObjectRef>) -> BTreeSet<RulesKey> {
        let mut found = BTreeSet::new();
        let of_namespaces = policies.iter().filter(|it| it.kind == Kind::NetworkPolicy);
        for policy in of_namespaces {
            let keys = Family::ALL.into_iter().flat_map(|family| {
                let directions = Direction::ALL.into_iter();
                let of = RulesOf::Policy(policy.name.clone());
                directions.map(move |direction| (family, direction, of.clone()))
            });
            found.extend(keys.filter(|key| self.rule_chains.contains_key(key)));
        }
        let of_cluster = policies.iter().filter(|it| is_cluster_policy(it));
        let of_cluster: BTreeSet<&ObjectName> = of_cluster.map(|policy| &policy.name).collect();
        if !of_cluster.is_empty() {
            let keys = self.rule_chains.keys().filter(|(.., of)| match of {
                RulesOf::Tier(list) | RulesOf::TierBeforeAudit(list) => {
                    list.policies.iter().any(|it| of_cluster.contains(it))
                }
                RulesOf::Policy(_) => false,
            });
            found.extend(keys.cloned());
        }
        found
    }

    /// Compiles a chain of policies.
    fn compile_rules(&mut self, (family, direction, of): &RulesKey) -> (Chain, Vec<Part>) {
        let mut parts = Vec::new();
        let mut rules = Vec::new();
        let (kind, names) = match of {
            RulesOf::Policy(name) => (Kind::NetworkPolicy, std::slice::from_ref(name)),
            RulesOf::Tier(list) | RulesOf::TierBeforeAudit(list) => {
                (Kind::ClusterNetworkPolicy, &*list.policies)
            }
        };
        for name in names {
            let object = ObjectRef::new(kind, name.clone());
            let is_refused = self.quarantined.contains(&object);
            let mut used = BTreeSet::new();
            let mut name_of = |spec| {
                let (id, name) = self.sets.get(spec, &self.inventory);
                used.insert(id);
                name
            };
            let mut own = match (of, is_refused) {
                (RulesOf::Policy(_), true) => Vec::new(),
                (RulesOf::Policy(_), false) => {
                    let policy = self.inventory.policy(name);
                    policy.map_or_else(Vec::new, |policy| {
                        policy_rules(policy, *direction, *family, &mut name_of)
                    })
                }
                (RulesOf::Tier(_) | RulesOf::TierBeforeAudit(_), true) => vec![closed(*direction)],
                (RulesOf::Tier(_) | RulesOf::TierBeforeAudit(_), false) => {
                    let accept = match of {
                        RulesOf::TierBeforeAudit(_) => Verdict::Return,
                        _ => Verdict::Accept,
                    };
                    let policy = self.inventory.cluster().get(name);
                    policy.map_or_else(Vec::new, |policy| {
                        tier_rules(policy, &accept, *direction, *family, &mut name_of)
                    })
                }
            };
            parts.push(Part {
                policy: object,
                rules: own.len(),
                sets: used.into_iter().collect(),
            });
            rules.append(&mut own);
        }
        (Chain { base: None, rules }, parts)
    }

    /// Compiles a chain of policies again, or drops it if no pod uses it. `changed` says that a
    /// policy itself changed.
    fn recompile_chains(
        &mut self,
        key: &RulesKey,
        changed: bool,
        delta: &mut TableDelta,
        was_used: &mut BTreeMap<(Family, SetId), bool>,
    ) {
        let (family, direction, of) = key;
        let Some(old) = self.rule_chains.remove(key) else {
            return;
        };
        if !changed && old.users > 0 && old.chain.is_some() {
            self.rule_chains.insert(key.clone(), old);
            return;
        }
        let (chain, parts) = if old.users > 0 {
            let (chain, parts) = self.compile_rules(key);
            (Some(Arc::new(chain)), parts)
        } else {
            (None, Vec::new())
        };
        let new = RulesUse {
            users: old.users,
            chain,
            parts,
        };
        for (sets, more) in [(old.sets(), false), (new.sets(), true)] {
            for set in sets {
                let before = self.sets.count(set, *family, more);
                was_used.entry((*family, set)).or_insert(before > 0);
            }
        }
        let sides = [(&mut delta.before, &old), (&mut delta.after, &new)];
        for (table, RulesUse { chain, .. }) in sides {
            if let Some(chain) = chain {
                let name = of.chain(*direction);
                table.chains.insert(name, Chain::clone(chain));
            }
        }
        if new.users > 0 {
            self.rule_chains.insert(key.clone(), new);
        }
    }

    /// Drafts new and removed sets, and the changes of the touched pods and nodes in the others.
    fn fill_sets(
        &self,
        touched: HashMap<ObjectRef, Vec<Member>>,
        was_used: &BTreeMap<(Family, SetId), bool>,
        deltas: &mut [TableDelta; 2],
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
                    let before = &mut delta::of(deltas, family).before;
                    before.sets.insert(name, declared);
                }
                (false, true) => fresh.push((family, set)),
                _ => {}
            }
        }
        let [v4, v6] = deltas;
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
        let versions = touched.into_iter().map(|(object, before)| {
            let after = self.sets.of(&object, &self.inventory);
            (before, after)
        });
        let versions: Vec<(Vec<Member>, Vec<Member>)> = versions.collect();
        if versions.iter().all(|(before, after)| before == after) {
            return;
        }
        // Unchanged elements go to both sides: if another pod loses one of them, it must stay.
        for (before, after) in versions {
            for (elements, is_after) in [(before, false), (after, true)] {
                for Member { family, set, key } in elements {
                    if !stays(family, set) {
                        continue;
                    }
                    let Some((name, declared)) = self.sets.declared(set) else {
                        continue;
                    };
                    let delta = delta::of(deltas, family);
                    // A set on one side only would be created or deleted.
                    for table in [&mut delta.before, &mut delta.after] {
                        table
                            .sets
                            .entry(name.clone())
                            .or_insert_with(|| declared.clone());
                    }
                    let table = if is_after {
                        &mut delta.after
                    } else {
                        &mut delta.before
                    };
                    if let Some(set) = table.sets.get_mut(&name) {
                        set.elements.push(Element::new(key));
                    }
                }
            }
        }
    }

    /// Adds complete sets to the tables.
    fn fill(&self, fresh: &[(Family, SetId)], tables: [&mut Table; 2]) {
        let mut ids: Vec<SetId> = fresh.iter().map(|(_, set)| *set).collect();
        ids.sort_unstable();
        ids.dedup();
        let mut elements: HashMap<(Family, SetId), Vec<Element>> = HashMap::new();
        for (family, set) in fresh {
            elements.insert((*family, *set), self.sets.fixed_elements(*set));
        }
        self.sets.for_each_member(&ids, &self.inventory, |element| {
            let Member { family, set, key } = element;
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

    fn finish(&mut self, deltas: [TableDelta; 2]) -> Transaction {
        let wanted = self.inventory.has_policies() || self.closed.is_some();
        let existed = std::mem::replace(&mut self.exists, wanted);
        if existed && wanted {
            let (mut before, mut after) = (Ruleset::default(), Ruleset::default());
            for (family, mut delta) in Family::ALL.into_iter().zip(deltas) {
                delta.align();
                before.tables.insert(table_id(family), delta.before);
                after.tables.insert(table_id(family), delta.after);
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
        diff(&before, self.tables())
    }

    /// Compiles the tables after the last [`Engine::compile`] from scratch.
    pub(super) fn tables(&self) -> Ruleset {
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
                delta::add_links(table, &self.links);
            }
            if let Some(closed) = &self.closed {
                closed.add_to(table, family);
            }
            table.sets.values_mut().for_each(sort);
        }
        let mut add = |family: Family, name: Name, chain: Chain| {
            let [v4, v6] = &mut tables;
            let table = match family {
                Family::V4 => v4,
                Family::V6 => v6,
            };
            table.chains.insert(name, chain);
        };
        for ((family, direction, name), used) in &self.profiles {
            let chain = rules::pods_chain(*direction, &used.profile);
            add(*family, name.clone(), chain);
        }
        for ((family, direction, of), used) in &self.rule_chains {
            if let Some(chain) = &used.chain {
                add(*family, of.chain(*direction), Chain::clone(chain));
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

fn is_cluster_policy(policy: &ObjectRef) -> bool {
    policy.kind == Kind::ClusterNetworkPolicy
}
