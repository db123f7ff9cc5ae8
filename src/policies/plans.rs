//! The plans of isolated addresses of this node: the pods whose policies apply to them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::HashMap;

use super::cluster::rules_in;
use super::delta::{self, TableDelta, isolate};
use super::engine::{Engine, PodsChain, ProfileUse, RulesKey};
use super::isolation::{Holder, Isolation};
use super::layout::{self, Direction};
use super::links;
use super::profile::Profile;
use super::rules;
use crate::model::{
    Action, ClusterNetworkPolicy, Family, Kind, Labels, NetworkPolicy, ObjectName, ObjectRef, Pod,
    PolicyMode, Tier,
};
use crate::nft::{Set, Table};

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

    /// Plans addresses of this node again and drafts the changes of their elements and chains.
    /// Returns whether there are any, and the chains of policies whose use may change.
    pub(super) fn replan(
        &mut self,
        addresses: &BTreeSet<IpAddr>,
        deltas: &mut [TableDelta; 2],
    ) -> (bool, BTreeSet<RulesKey>) {
        let mut known = KnownProfiles::default();
        // The chains whose use changes, with the number of addresses before.
        let mut chains: BTreeMap<PodsChain, u32> = BTreeMap::new();
        let mut differs = false;
        for address in addresses {
            let new = self.plan(*address, &mut known);
            if self.plans.get(address) == new.as_ref() {
                continue;
            }
            differs = true;
            let old = match new.clone() {
                Some(new) => self.plans.insert(*address, new),
                None => self.plans.remove(address),
            };
            let delta = delta::of(deltas, Family::of(*address));
            for (plan, table, more) in [
                (&old, &mut delta.before, false),
                (&new, &mut delta.after, true),
            ] {
                if let Some(plan) = plan {
                    isolate(table, *address, plan, self.settings.strict);
                    self.count(*address, plan, more, &mut chains);
                }
            }
        }
        (differs, self.update_pod_chains(chains, deltas))
    }

    /// Counts the layers and chains that a plan uses.
    fn count(
        &mut self,
        address: IpAddr,
        plan: &Isolation,
        more: bool,
        chains: &mut BTreeMap<PodsChain, u32>,
    ) {
        let family = Family::of(address);
        for (direction, all) in &plan.holders {
            for layer in 1..all.len() {
                let key = (family, *direction, layer);
                let count = self.layers.entry(key).or_default();
                *count = changed(*count, more);
                if *count == 0 {
                    self.layers.remove(&key);
                }
            }
            for Holder { profile, .. } in all {
                let key = (family, *direction, profile.chain(*direction));
                let used = self.profiles.entry(key.clone());
                let used = used.or_insert_with(|| ProfileUse {
                    profile: profile.clone(),
                    addresses: 0,
                });
                chains.entry(key).or_insert(used.addresses);
                used.addresses = changed(used.addresses, more);
            }
        }
    }

    /// Drafts the chains of pods that are new or removed. Returns the chains to which they lead.
    fn update_pod_chains(
        &mut self,
        chains: BTreeMap<PodsChain, u32>,
        deltas: &mut [TableDelta; 2],
    ) -> BTreeSet<RulesKey> {
        let mut touched = BTreeSet::new();
        for (key, before) in chains {
            let Some(used) = self.profiles.get(&key) else {
                continue;
            };
            let (profile, after) = (used.profile.clone(), used.addresses);
            if after == 0 {
                self.profiles.remove(&key);
            }
            let (family, direction, name) = key;
            let delta = delta::of(deltas, family);
            if !profile.audited.is_empty() {
                // A set on one side only would be created or deleted.
                let sides = [(before, &mut delta.before), (after, &mut delta.after)];
                for (_, table) in sides.into_iter().filter(|(users, _)| *users > 0) {
                    let set = table.sets.entry(profile.audited_set(direction));
                    set.or_insert_with(|| Set {
                        declaration: layout::counted(),
                        elements: Vec::new(),
                    });
                }
            }
            if (before == 0) == (after == 0) {
                continue;
            }
            let table = if after > 0 {
                &mut delta.after
            } else {
                &mut delta.before
            };
            let chain = rules::pods_chain(direction, &profile);
            table.chains.insert(name, chain);
            for rules in profile.parts() {
                let key = (family, direction, rules);
                let used = self.rule_chains.entry(key.clone()).or_default();
                used.users = changed(used.users, after > 0);
                touched.insert(key);
            }
        }
        touched
    }

    /// Returns the interfaces that lead to pods whose packets may be denied.
    fn links_of_isolated(&self) -> BTreeSet<(Direction, Arc<str>)> {
        let links = self.plans.iter().flat_map(|(address, plan)| {
            let link = links::interface(&self.routes, *address).into_iter();
            link.flat_map(|link| {
                let denied = plan.holders.iter().filter(|(direction, all)| {
                    let mut all = all.iter();
                    all.any(|holder| self.denies(&holder.profile, **direction))
                });
                denied.map(|(direction, _)| (*direction, link.clone()))
            })
        });
        links.collect()
    }

    pub(super) fn update_links(&mut self, deltas: &mut [TableDelta; 2]) {
        let links = self.links_of_isolated();
        let before = std::mem::replace(&mut self.links, links);
        if before != self.links {
            let [_, v6] = deltas;
            delta::add_links(&mut v6.before, &before);
            delta::add_links(&mut v6.after, &self.links);
        }
    }

    /// Plans an address of this node. Returns `None` if it is not isolated.
    fn plan(&self, address: IpAddr, known: &mut KnownProfiles) -> Option<Isolation> {
        let mut pods: Vec<&Pod> = self.inventory.isolating(address).collect();
        pods.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let departed = self.inventory.departed(address);
        let pods = pods.into_iter().map(|pod| (pod, false));
        let mut holders: BTreeMap<Direction, Vec<Holder>> = BTreeMap::new();
        for (pod, departed) in pods.chain(departed.map(|pod| (pod, true))) {
            for (direction, profile) in known.of(pod, self) {
                let all = holders.entry(*direction).or_default();
                // Pods of one workload mostly have the same policies.
                if !all.iter().any(|holder| holder.profile == *profile) {
                    all.push(Holder {
                        pod: pod.name.clone(),
                        departed,
                        profile: profile.clone(),
                    });
                }
            }
        }
        for all in holders.values_mut().filter(|all| all.len() > MAX_HOLDERS) {
            // What is only audited must not deny.
            all.retain(|holder| holder.profile.is_enforced());
            if all.len() > MAX_HOLDERS {
                all.truncate(1);
                for holder in all {
                    holder.profile = Arc::new(Profile::closed());
                }
            }
        }
        holders.retain(|_, all| !all.is_empty());
        (!holders.is_empty()).then_some(Isolation { holders })
    }

    /// Returns the profiles of a pod for the directions in which policies apply to it.
    pub(super) fn profiles(&self, pod: &Pod) -> BTreeMap<Direction, Arc<Profile>> {
        let policies = self.inventory.policies_for(pod);
        let cluster = self.inventory.cluster_policies_for(pod);
        let profiles = Direction::ALL.into_iter().filter_map(|direction| {
            let profile = self.profile(&policies, &cluster, direction)?;
            // The same for all pods that share the chain.
            let chain = profile.chain(direction);
            let used = Family::ALL.into_iter().find_map(|family| {
                let key = (family, direction, chain.clone());
                self.profiles.get(&key).map(|used| used.profile.clone())
            });
            Some((direction, used.unwrap_or_else(|| Arc::new(profile))))
        });
        profiles.collect()
    }

    /// Returns the profile of the policies that select a pod; `None` if none has rules for the
    /// direction.
    fn profile(
        &self,
        policies: &[&Arc<NetworkPolicy>],
        cluster: &[&Arc<ClusterNetworkPolicy>],
        direction: Direction,
    ) -> Option<Profile> {
        let isolating = policies.iter();
        let isolating = isolating.filter(|it| rules::rules_of(it, direction).is_some());
        let (audited, enforced): (Vec<_>, Vec<_>) = isolating.partition(|it| self.is_audited(it));
        let names = |policies: Vec<&&Arc<NetworkPolicy>>| -> Vec<ObjectName> {
            policies.iter().map(|policy| policy.name.clone()).collect()
        };
        let of_tier = |tier| {
            let of_tier = cluster.iter().filter(|policy| policy.tier == tier);
            let concerned = of_tier.filter(|it| !rules_in(it, direction).is_empty());
            concerned.map(|it| it.name.clone()).collect()
        };
        let enforced = Some(names(enforced)).filter(|names| !names.is_empty());
        let (admin, baseline) = (of_tier(Tier::Admin), of_tier(Tier::Baseline));
        Profile::new(admin, enforced, baseline, names(audited))
    }

    /// Returns whether a policy denies nothing because it is audited.
    pub(crate) fn is_audited(&self, policy: &NetworkPolicy) -> bool {
        self.settings.audit && self.inventory.mode(policy) == PolicyMode::Audit
    }

    /// Returns whether packets of the pods with a profile may be denied in a direction.
    fn denies(&self, profile: &Profile, direction: Direction) -> bool {
        let lists = profile.admin.iter().chain(&profile.baseline);
        let mut asked = lists.flat_map(|list| &list.policies);
        profile.policies.is_some()
            || asked.any(|name| {
                let object = ObjectRef::new(Kind::ClusterNetworkPolicy, name.clone());
                let policy = self.inventory.cluster().get(name);
                let mut rules = policy.into_iter().flat_map(|it| rules_in(it, direction));
                self.quarantined.contains(&object) || rules.any(|rule| rule.action == Action::Deny)
            })
    }
}

/// The profiles of pods with the same namespace and labels, which are mostly those of one workload.
/// Valid as long as no object changes.
#[derive(Debug, Default)]
pub(crate) struct KnownProfiles(HashMap<(Box<str>, Labels), BTreeMap<Direction, Arc<Profile>>>);

impl KnownProfiles {
    /// Returns the profiles of a pod for the directions in which it is isolated.
    pub(super) fn of(&mut self, pod: &Pod, engine: &Engine) -> &BTreeMap<Direction, Arc<Profile>> {
        let key = (pod.name.namespace().into(), pod.labels.clone());
        self.0.entry(key).or_insert_with(|| engine.profiles(pod))
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
