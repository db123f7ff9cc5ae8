//! Compiles the touched objects into the parts of the tables that change.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use super::delta::{self, TableDelta, isolate, sort};
use super::engine::{Engine, PolicyUse};
use super::layout::{Direction, table_id};
use super::rules::{self, policy_chain, skeleton};
use super::sets::{PodElement, SetId};
use crate::model::{Family, ObjectName};
use crate::nft::{Chain, Element, Name, Ruleset, Table, Transaction, diff};

impl Engine {
    /// Compiles what changed since the last call. Returns the operations that bring the tables from
    /// the state after the last call to the new one.
    pub(super) fn compile(&mut self) -> Transaction {
        self.forget_departed(Instant::now());
        let touched = std::mem::take(&mut self.touched);
        let mut deltas: [TableDelta; 2] = Default::default();
        self.draft_layers(&mut deltas, |delta| &mut delta.before);
        let (replanned, mut uses_touched) = self.plan_again(&touched.addresses, &mut deltas);
        self.draft_layers(&mut deltas, |delta| &mut delta.after);
        self.know_again(&touched.addresses, touched.routes, &mut deltas);
        self.replanned |= replanned;
        if replanned || touched.routes {
            self.links_again(&mut deltas);
        }
        for policy in &touched.policies {
            let keys = Family::ALL.into_iter().flat_map(|family| {
                let directions = Direction::ALL.into_iter();
                directions.map(move |direction| (family, direction, policy.clone()))
            });
            uses_touched.extend(keys.filter(|key| self.uses.contains_key(key)));
        }
        // The sets whose use changes, and whether a table used them before.
        let mut was_used: BTreeMap<(Family, SetId), bool> = BTreeMap::new();
        for key in &uses_touched {
            let changed = touched.policies.contains(&key.2);
            self.compile_again(key, changed, delta::of(&mut deltas, key.0), &mut was_used);
        }
        self.fill_sets(touched.pods, &was_used, &mut deltas);
        for (_, set) in was_used.into_keys() {
            self.sets.sweep(set);
        }
        self.finish(deltas)
    }

    /// Forgets the departed pods that have expired.
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

    /// Compiles the chain of a policy again, or drops it if no pod uses it. `changed` says that the
    /// policy itself changed.
    fn compile_again(
        &mut self,
        key: &(Family, Direction, ObjectName),
        changed: bool,
        delta: &mut TableDelta,
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
            if self.quarantined.contains(name) {
                return (Some(Arc::default()), Vec::new());
            }
            let (chain, sets) = policy_chain(policy, *direction, *family, |spec| {
                self.sets.get(spec, &self.inventory)
            });
            (Some(Arc::new(chain)), sets)
        });
        for (sets, more) in [(&old.sets, false), (&sets, true)] {
            for set in sets {
                let before = self.sets.count(*set, *family, more);
                was_used.entry((*family, *set)).or_insert(before > 0);
            }
        }
        let chain_name = direction.policy_chain(name);
        if let Some(chain) = old.chain {
            delta
                .before
                .chains
                .insert(chain_name.clone(), Chain::clone(&chain));
        }
        if let Some(chain) = &chain {
            delta.after.chains.insert(chain_name, Chain::clone(chain));
        }
        if old.pods > 0 {
            let pods = old.pods;
            self.uses
                .insert(key.clone(), PolicyUse { pods, chain, sets });
        }
    }

    /// Drafts new and removed sets, and the changes of the touched pods in the others.
    fn fill_sets(
        &self,
        touched: HashMap<ObjectName, Vec<PodElement>>,
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
        for (name, before) in touched {
            let pod = self.inventory.pod(&name);
            let after = pod.map_or_else(Vec::new, |pod| self.sets.of_pod(pod, &self.inventory));
            if before == after {
                continue;
            }
            for (elements, is_after) in [(before, false), (after, true)] {
                for PodElement { family, set, key } in elements {
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
            let PodElement { family, set, key } = element;
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
        let wanted = self.inventory.counts().2 > 0 || self.closed.is_some();
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
        for ((family, direction, name), used) in &self.uses {
            if let Some(chain) = &used.chain {
                add(*family, direction.policy_chain(name), Chain::clone(chain));
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
