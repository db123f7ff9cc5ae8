//! The plans of isolated addresses of this node: the pods whose policies apply to them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::delta::{self, TableDelta, isolate};
use super::engine::Engine;
use super::isolation::{Holder, Isolation};
use super::layout::Direction;
use super::links;
use super::rules;
use crate::model::{Family, ObjectName, Pod};
use crate::nft::Table;

/// The maximum number of holders of an address whose policies are evaluated one after the other. An
/// address with more is denied everything.
const MAX_HOLDERS: usize = 4;

impl Engine {
    /// Adds the base chains for addresses with several holders to a side of the deltas.
    pub(super) fn draft_layers(
        &self,
        deltas: &mut [TableDelta; 2],
        side: impl Fn(&mut TableDelta) -> &mut Table,
    ) {
        for (family, direction, layer) in self.layers.keys() {
            let table = side(delta::of(deltas, *family));
            rules::add_layer(table, *family, *direction, *layer, &self.settings);
        }
    }

    /// Plans an address of this node again and drafts the changes of its chains. Returns whether
    /// there are any.
    pub(super) fn plan_again(
        &mut self,
        address: IpAddr,
        deltas: &mut [TableDelta; 2],
        uses_touched: &mut BTreeSet<(Family, Direction, ObjectName)>,
    ) -> bool {
        let new = self.plan(address);
        let old = self.plans.remove(&address);
        let differs = old != new;
        if differs {
            let family = Family::of(address);
            let delta = delta::of(deltas, family);
            for (plan, table, more) in [
                (&old, &mut delta.before, false),
                (&new, &mut delta.after, true),
            ] {
                let Some(plan) = plan else {
                    continue;
                };
                isolate(table, address, plan, self.settings.strict);
                for (direction, all) in &plan.holders {
                    for layer in 1..all.len() {
                        let key = (family, *direction, layer);
                        let count = self.layers.entry(key).or_default();
                        *count = changed(*count, more);
                        if *count == 0 {
                            self.layers.remove(&key);
                        }
                    }
                    for policy in all.iter().flat_map(|holder| &holder.policies) {
                        let key = (family, *direction, policy.clone());
                        let used = self.uses.entry(key.clone()).or_default();
                        used.pods = changed(used.pods, more);
                        uses_touched.insert(key);
                    }
                }
            }
        }
        if let Some(new) = new {
            self.plans.insert(address, new);
        }
        differs
    }

    fn links_of_isolated(&self) -> BTreeSet<(Direction, Arc<str>)> {
        let links = self.plans.iter().flat_map(|(address, plan)| {
            let link = links::interface(&self.routes, *address).into_iter();
            link.flat_map(|link| plan.holders.keys().map(|it| (*it, link.clone())))
        });
        links.collect()
    }

    pub(super) fn links_again(&mut self, deltas: &mut [TableDelta; 2]) {
        let links = self.links_of_isolated();
        let before = std::mem::replace(&mut self.links, links);
        if before != self.links {
            let [_, v6] = deltas;
            delta::add_links(&mut v6.before, &before);
            delta::add_links(&mut v6.after, &self.links);
        }
    }

    /// Plans an address of this node. Returns `None` if it is not isolated.
    fn plan(&self, address: IpAddr) -> Option<Isolation> {
        let mut pods: Vec<&Pod> = self.inventory.isolating(address).collect();
        pods.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let departed = self.inventory.departed(address);
        let pods = pods.into_iter().map(|pod| (pod, false));
        let mut holders: BTreeMap<Direction, Vec<Holder>> = BTreeMap::new();
        for (pod, departed) in pods.chain(departed.map(|pod| (pod, true))) {
            for (direction, policies) in self.isolating_policies(pod) {
                let all = holders.entry(direction).or_default();
                // Pods of one workload mostly have the same policies.
                if !all.iter().any(|holder| holder.policies == policies) {
                    all.push(Holder {
                        pod: pod.name.clone(),
                        departed,
                        policies,
                    });
                }
            }
        }
        for all in holders.values_mut().filter(|all| all.len() > MAX_HOLDERS) {
            all.truncate(1);
            all.iter_mut().for_each(|holder| holder.policies.clear());
        }
        (!holders.is_empty()).then_some(Isolation { holders })
    }

    /// Returns the policies that select a pod, for each direction in which it is isolated.
    fn isolating_policies(&self, pod: &Pod) -> BTreeMap<Direction, Vec<ObjectName>> {
        let mut policies: BTreeMap<Direction, Vec<ObjectName>> = BTreeMap::new();
        for policy in self.inventory.policies_for(pod) {
            for direction in Direction::ALL {
                if rules::rules_of(policy, direction).is_some() {
                    policies
                        .entry(direction)
                        .or_default()
                        .push(policy.name.clone());
                }
            }
        }
        policies
    }
}

/// Returns a count incremented or decremented.
fn changed(count: u32, more: bool) -> u32 {
    if more {
        count.saturating_add(1)
    } else {
        count.saturating_sub(1)
    }
}
