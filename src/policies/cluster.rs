//! The known cluster network policies, and which of them select a pod.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::index::{Index, PodSelector};
use super::layout::Direction;
use crate::model::{ClusterNetworkPolicy, Labels, ObjectName, Pod, Tier, TierPeer, TierRule};

/// The cluster network policies.
#[derive(Debug, Default)]
pub(crate) struct ClusterPolicies {
    all: BTreeMap<ObjectName, Arc<ClusterNetworkPolicy>>,
    /// The policies by the pods that they select.
    subjects: Index<ObjectName>,
    /// How many of them have peers that are nodes.
    of_nodes: usize,
}

impl ClusterPolicies {
    /// Returns all policies, sorted by name.
    pub fn all(&self) -> impl Iterator<Item = &Arc<ClusterNetworkPolicy>> {
        self.all.values()
    }

    pub fn get(&self, name: &ObjectName) -> Option<&Arc<ClusterNetworkPolicy>> {
        self.all.get(name)
    }

    /// Returns the number of policies.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn names(&self) -> HashSet<ObjectName> {
        self.all.keys().cloned().collect()
    }

    /// Returns whether a policy has nodes as peers.
    pub fn need_nodes(&self) -> bool {
        self.of_nodes > 0
    }

    /// Returns the policies that select a pod, in the order in which they are asked within their
    /// tiers.
    pub fn selecting(&self, pod: &Pod, of_namespace: &Labels) -> Vec<&Arc<ClusterNetworkPolicy>> {
        let mut found = Vec::new();
        let namespace = pod.name.namespace();
        self.subjects
            .of_pod(namespace, of_namespace, &pod.labels, |name| {
                found.extend(self.get(name));
            });
        found.sort_unstable_by(|a, b| (a.priority, &a.name).cmp(&(b.priority, &b.name)));
        found
    }

    /// Returns whether some policy selects pods of a namespace with only one of two sets of labels.
    pub fn distinguish(&self, before: &Labels, after: &Labels) -> bool {
        self.subjects.distinguishes(before, after)
    }

    /// Updates the index after a namespace was created, got other labels, or was deleted (`None`).
    pub fn namespace_changed(&mut self, name: &str, labels: Option<&Labels>) {
        self.subjects.namespace_changed(name, labels);
    }

    /// Replaces a policy; `None` deletes it. `namespaces` are the known namespaces with their labels.
    pub fn set<'n>(
        &mut self,
        name: &ObjectName,
        policy: Option<ClusterNetworkPolicy>,
        namespaces: impl IntoIterator<Item = (&'n str, Labels)>,
    ) {
        if let Some(old) = self.all.remove(name) {
            self.subjects.remove(name, &subject(&old));
            self.of_nodes = self.of_nodes.saturating_sub(usize::from(has_nodes(&old)));
        }
        if let Some(policy) = policy {
            self.subjects
                .insert(name.clone(), &subject(&policy), namespaces);
            self.of_nodes += usize::from(has_nodes(&policy));
            self.all.insert(name.clone(), Arc::new(policy));
        }
    }
}

pub(super) fn rules_in(policy: &ClusterNetworkPolicy, direction: Direction) -> &[TierRule] {
    match direction {
        Direction::Ingress => &policy.ingress,
        Direction::Egress => &policy.egress,
    }
}

/// Returns the selector of the pods that a policy applies to.
pub(super) fn subject(policy: &ClusterNetworkPolicy) -> PodSelector {
    PodSelector::new(&policy.subject_namespaces, &policy.subject_pods)
}

fn has_nodes(policy: &ClusterNetworkPolicy) -> bool {
    let rules = policy.ingress.iter().chain(&policy.egress);
    let mut peers = rules.flat_map(|rule| rule.peers.iter().flatten());
    peers.any(|peer| matches!(peer, TierPeer::Nodes(_)))
}

/// Returns the word for a tier in names.
pub(super) fn tier_word(tier: Tier) -> &'static str {
    match tier {
        Tier::Admin => "admin",
        Tier::Baseline => "baseline",
    }
}
