//! The known pods, namespaces and policies.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use smallvec::SmallVec;

use super::claimants::AddressClaimants;
use super::cluster::ClusterPolicies;
use super::departed::Departed;
use super::index::{Index, Namespaces, PodSelector, only_namespace};
use super::nodes::Nodes;
use super::spec::AddressScope;
use crate::engine::SharedMap;
use crate::model::{
    ClusterNetworkPolicy, LabelSelector, Labels, NAMESPACE_NAME, Namespace, NetworkPolicy, Node,
    ObjectName, Pod, PolicyMode, Sandbox,
};

/// The objects from which policies are compiled.
#[derive(Debug, Default)]
pub(crate) struct Inventory {
    node: Arc<str>,
    pods: SharedMap<ObjectName, Arc<Pod>>,
    pods_of: SharedMap<Box<str>, SharedMap<ObjectName, ()>>,
    /// The pods that claim each address.
    claimants: SharedMap<IpAddr, AddressClaimants>,
    /// Pods of this node that were deleted while a container ran.
    departed: Departed,
    /// The names of this node's pods.
    local: BTreeSet<ObjectName>,
    namespaces: SharedMap<Box<str>, Labels>,
    /// The modes of namespaces that have one.
    modes: BTreeMap<Box<str>, PolicyMode>,
    policies: BTreeMap<ObjectName, Arc<NetworkPolicy>>,
    /// The policies by the pods that they select.
    targets: Index<ObjectName>,
    cluster: ClusterPolicies,
    nodes: Nodes,
}

impl Inventory {
    /// Creates an empty inventory for the node of this name.
    pub fn new(node: Arc<str>) -> Self {
        Self {
            node,
            ..Self::default()
        }
    }

    /// Returns a copy without policies, which shares the objects. Its cost does not depend on the
    /// number of objects of other nodes.
    pub(crate) fn without_policies(&self) -> Self {
        Self {
            node: self.node.clone(),
            pods: self.pods.clone(),
            pods_of: self.pods_of.clone(),
            claimants: self.claimants.clone(),
            departed: self.departed.clone(),
            local: self.local.clone(),
            namespaces: self.namespaces.clone(),
            modes: self.modes.clone(),
            nodes: self.nodes.without_index(),
            ..Self::default()
        }
    }

    /// Returns the number of pods, and of claims of addresses, that are copied because another
    /// inventory shares them.
    #[cfg(test)]
    pub(crate) fn copied(&self, other: &Self) -> usize {
        let claims = self.claimants.copied(&other.claimants);
        let of_namespaces = self.pods_of.iter().map(|(name, pods)| {
            let others = other.pods_of.get(name);
            others.map_or(0, |others| pods.copied(others))
        });
        self.pods.copied(&other.pods) + claims + of_namespaces.sum::<usize>()
    }

    pub fn pod(&self, name: &ObjectName) -> Option<&Pod> {
        self.pods.get(name).map(|pod| &**pod)
    }

    /// Returns all pods, in no order.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values().map(|pod| &**pod)
    }

    /// Returns the pods of a namespace, in no order.
    pub(crate) fn pods_of(&self, namespace: &str) -> impl Iterator<Item = &Pod> {
        let names = self.pods_of.get(namespace).into_iter();
        let names = names.flat_map(SharedMap::keys);
        names.filter_map(|name| self.pod(name))
    }

    /// Returns the pods of this node.
    pub fn local(&self) -> impl Iterator<Item = &ObjectName> {
        self.local.iter()
    }

    /// Returns the pods of this node in a namespace.
    pub(crate) fn local_of<'a>(
        &'a self,
        namespace: &'a str,
    ) -> impl Iterator<Item = &'a ObjectName> {
        let first = ObjectName::new(namespace, "");
        let rest = self.local.range(first..);
        rest.take_while(move |name| name.namespace() == namespace)
    }

    /// Returns whether a node is this one.
    pub(crate) fn is_own(&self, node: &str) -> bool {
        *node == *self.node
    }

    /// Returns whether a pod runs on this node.
    pub(crate) fn is_local(&self, pod: &Pod) -> bool {
        pod.node.as_deref() == Some(&*self.node)
    }

    pub(crate) fn pod_names(&self) -> HashSet<ObjectName> {
        self.pods.keys().cloned().collect()
    }

    pub(crate) fn namespace_names(&self) -> HashSet<ObjectName> {
        let names = self.namespaces.keys();
        names.map(|name| ObjectName::new("", name)).collect()
    }

    /// Returns the names of the policies.
    pub(crate) fn policy_names(&self) -> HashSet<ObjectName> {
        self.policies.keys().cloned().collect()
    }

    /// Returns the numbers of pods, namespaces and network policies.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.pods.len(), self.namespaces.len(), self.policies.len())
    }

    /// Returns whether there is a policy, of the cluster or of a namespace.
    pub fn has_policies(&self) -> bool {
        !self.policies.is_empty() || self.cluster.len() > 0
    }

    /// Returns all policies, sorted by name.
    pub(crate) fn policies(&self) -> impl Iterator<Item = &Arc<NetworkPolicy>> {
        self.policies.values()
    }

    pub(crate) fn cluster(&self) -> &ClusterPolicies {
        &self.cluster
    }

    /// Returns the cluster policies that select a pod, in their order.
    pub(crate) fn cluster_policies_for(&self, pod: &Pod) -> Vec<&Arc<ClusterNetworkPolicy>> {
        if self.cluster.len() == 0 {
            return Vec::new();
        }
        let of_namespace = self.namespace(pod.name.namespace());
        self.cluster.selecting(pod, &of_namespace)
    }

    /// Replaces a cluster policy; `None` deletes it.
    pub(crate) fn set_cluster_policy(
        &mut self,
        name: &ObjectName,
        policy: Option<ClusterNetworkPolicy>,
    ) {
        let mut cluster = std::mem::take(&mut self.cluster);
        cluster.set(name, policy, self.namespaces());
        self.cluster = cluster;
    }

    /// Updates the subjects of cluster policies after a namespace was created, got other labels, or
    /// was deleted.
    pub(crate) fn namespace_changed(&mut self, name: &str) {
        let labels = self.has_namespace(name).then(|| self.namespace(name));
        self.cluster.namespace_changed(name, labels.as_ref());
    }

    pub(crate) fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// Returns whether a node has an address, if the node is known.
    pub(crate) fn node_has(&self, node: &str, address: IpAddr) -> bool {
        let node = self.nodes.get(&ObjectName::new("", node));
        node.is_some_and(|node| node.addresses.contains(&address))
    }

    /// Replaces a node; `None` deletes it.
    pub(crate) fn set_node(&mut self, name: &ObjectName, node: Option<&Node>) {
        self.nodes.set(name, node);
    }

    pub fn policy(&self, name: &ObjectName) -> Option<&Arc<NetworkPolicy>> {
        self.policies.get(name)
    }

    /// Returns the policies that select a pod, sorted by name.
    pub(crate) fn policies_for(&self, pod: &Pod) -> Vec<&Arc<NetworkPolicy>> {
        let mut names = Vec::new();
        let namespace = pod.name.namespace();
        // A policy selects pods of its own namespace, regardless of the namespace's labels.
        let labels = Labels::default();
        self.targets
            .of_pod(namespace, &labels, &pod.labels, |name| {
                names.push(name.clone())
            });
        names.sort_unstable();
        names.iter().filter_map(|name| self.policy(name)).collect()
    }

    /// Returns the labels of a namespace; only its name if it has no object.
    pub fn namespace(&self, name: &str) -> Labels {
        let known = self.namespaces.get(name).cloned();
        known.unwrap_or_else(|| Self::labels_without_object(name))
    }

    /// Returns the labels of a namespace without an object.
    pub(crate) fn labels_without_object(name: &str) -> Labels {
        [(NAMESPACE_NAME, name)].into_iter().collect()
    }

    /// Returns the namespaces that have an object or a pod, departed ones included, with their
    /// labels.
    pub fn namespaces(&self) -> impl Iterator<Item = (&str, Labels)> {
        let without_object = self
            .pods_of
            .keys()
            .filter(|name| !self.namespaces.contains_key(*name));
        let names = self.namespaces.keys().chain(without_object);
        let departed = self.departed.all().map(|(_, pod)| pod.name.namespace());
        let departed: BTreeSet<&str> = departed
            .filter(|name| {
                !self.namespaces.contains_key(*name) && !self.pods_of.contains_key(*name)
            })
            .collect();
        let names = names.map(|name| &**name).chain(departed);
        names.map(|name| (name, self.namespace(name)))
    }

    pub fn selects(&self, selector: &PodSelector, pod: &Pod) -> bool {
        let namespace = pod.name.namespace();
        let of_namespace = match &selector.namespaces {
            Namespaces::Named(_) => Labels::default(),
            Namespaces::Labelled(_) => self.namespace(namespace),
        };
        selector.matches(namespace, &of_namespace, &pod.labels)
    }

    /// Returns whether selectors of a peer, in a policy of namespace `own`, select a pod, as their
    /// [`PodSelector`] does.
    pub(crate) fn is_peer(
        &self,
        own: &str,
        namespaces: Option<&LabelSelector>,
        pods: &LabelSelector,
        pod: &Pod,
    ) -> bool {
        let namespace = pod.name.namespace();
        let in_namespace = match namespaces {
            None => *namespace == *own,
            Some(selector) => match only_namespace(selector) {
                Some(name) => *namespace == **name,
                None => selector.matches(&self.namespace(namespace)),
            },
        };
        in_namespace && pods.matches(&pod.labels)
    }

    /// Returns the pods that may have an address: the claimants that no other outranks. There are
    /// several if the statuses do not decide.
    pub fn holders(&self, address: IpAddr) -> impl Iterator<Item = &Pod> {
        let claimants = self.claimants.get(&address);
        let holders = claimants
            .into_iter()
            .flat_map(|claimants| claimants.holders(|_| true));
        holders.filter_map(|claimant| self.pod(&claimant.name))
    }

    /// Returns the pod that has an address, if that is certain. Selectors of peers match only such
    /// a pod. A pod without a sandbox is never certain.
    pub fn owner(&self, address: IpAddr) -> Option<&Pod> {
        self.certain(address, self.holders(address))
    }

    pub fn addresses(&self, pod: &Pod, scope: AddressScope) -> SmallVec<[IpAddr; 2]> {
        if scope.local && !self.is_local(pod) {
            return SmallVec::new();
        }
        let has = |address: &IpAddr| match scope {
            AddressScope { claimed: false, .. } => {
                let owner = if scope.local {
                    self.local_owner(*address)
                } else {
                    self.owner(*address)
                };
                owner.is_some_and(|owner| owner.name == pod.name)
            }
            AddressScope { local: true, .. } => {
                let mut holders = self.local_holders(*address);
                holders.any(|holder| holder.name == pod.name)
            }
            AddressScope { local: false, .. } => {
                let mut holders = self.holders(*address);
                holders.any(|holder| holder.name == pod.name)
            }
        };
        pod.addresses.iter().copied().filter(has).collect()
    }

    /// Returns the pods that have an address, as [`Inventory::addresses`] does for one of them.
    pub(crate) fn having(&self, address: IpAddr, scope: AddressScope) -> SmallVec<[&Pod; 1]> {
        match scope {
            AddressScope {
                claimed: false,
                local,
            } => {
                let owner = if local {
                    self.local_owner(address)
                } else {
                    self.owner(address)
                };
                owner.into_iter().collect()
            }
            AddressScope { local: true, .. } => {
                let holders = self.local_holders(address);
                holders.chain(self.departed(address)).collect()
            }
            AddressScope { local: false, .. } => {
                let holders = self.holders(address);
                holders.chain(self.departed(address)).collect()
            }
        }
    }

    /// Returns the pods of this node that may have an address, by the same order among themselves.
    /// An outdated object of another node's pod must not exempt a pod of this node from its
    /// policies, unless that pod has no sandbox.
    pub(crate) fn local_holders(&self, address: IpAddr) -> impl Iterator<Item = &Pod> {
        let claimants = self.claimants.get(&address);
        let holders = claimants.into_iter().flat_map(|claimants| {
            let gone_count = claimants.are_all_gone();
            claimants.holders(move |it| it.local && (gone_count || !it.is_gone()))
        });
        holders.filter_map(|claimant| self.pod(&claimant.name))
    }

    /// Returns the pod of this node that has an address, if that is certain.
    pub(crate) fn local_owner(&self, address: IpAddr) -> Option<&Pod> {
        self.certain(address, self.local_holders(address))
    }

    /// Returns the only holder of an address, if there is one and it may have a sandbox.
    fn certain<'a>(
        &self,
        address: IpAddr,
        mut holders: impl Iterator<Item = &'a Pod>,
    ) -> Option<&'a Pod> {
        let first = holders.next()?;
        let alone = holders.next().is_none() && self.departed(address).is_none();
        (alone && first.evidence.sandbox != Sandbox::Gone).then_some(first)
    }

    /// Returns the pods of this node that may hold an address, so that their policies (if any)
    /// apply to it. Leaves out the departed pod.
    pub(crate) fn isolating(&self, address: IpAddr) -> impl Iterator<Item = &Pod> {
        let departed = self.departed.at(address).map(|pod| pod.evidence);
        self.local_holders(address)
            .filter(move |pod| departed.is_none_or(|departed| !departed.outranks(&pod.evidence)))
    }

    pub fn departed(&self, address: IpAddr) -> Option<&Pod> {
        self.departed.at(address)
    }

    /// Returns the departed pods with their addresses.
    pub(crate) fn all_departed(&self) -> impl Iterator<Item = (IpAddr, &Pod)> {
        self.departed.all()
    }

    /// Returns the departed pods of a namespace with their addresses.
    pub(crate) fn departed_of<'a>(
        &'a self,
        namespace: &'a str,
    ) -> impl Iterator<Item = (IpAddr, &'a Pod)> {
        let all = self.departed.all();
        all.filter(move |(_, pod)| pod.name.namespace() == namespace)
    }

    /// Returns the departed pods with a name, and their addresses.
    pub(crate) fn departed_named<'a>(
        &'a self,
        name: &'a ObjectName,
    ) -> impl Iterator<Item = (IpAddr, &'a Pod)> {
        self.departed
            .all()
            .filter(move |(_, pod)| pod.name == *name)
    }

    /// Returns when the first departed pod expires.
    pub(crate) fn departed_due(&self) -> Option<Instant> {
        self.departed.due()
    }

    /// Returns the address of an expired departed pod.
    pub(crate) fn departed_expired(&self, now: Instant) -> Option<IpAddr> {
        self.departed.expired(now)
    }

    /// Forgets the departed pod of [`Inventory::departed_expired`].
    pub(crate) fn forget_departed(&mut self, now: Instant) {
        self.departed.forget_oldest(now);
    }

    /// Returns the names of the pods that claim an address.
    pub fn claimants(&self, address: IpAddr) -> impl Iterator<Item = &ObjectName> {
        let claimants = self.claimants.get(&address);
        let all = claimants.into_iter().flat_map(|claimants| &claimants.all);
        all.map(|claimant| &claimant.name)
    }

    /// Returns the pods that claim an address of a pod, including the pod itself if it is known.
    pub fn rivals(&self, pod: &Pod) -> Vec<ObjectName> {
        let mut rivals: Vec<ObjectName> = pod
            .addresses
            .iter()
            .flat_map(|address| self.claimants(*address))
            .cloned()
            .collect();
        rivals.sort_unstable();
        rivals.dedup();
        rivals
    }

    /// Replaces a pod; `None` deletes it. A pod that is deleted while a container runs is
    /// remembered as departed from `now` on, since its containers may keep running.
    pub(crate) fn set_pod(&mut self, name: &ObjectName, pod: Option<Pod>, now: Instant) {
        let known = self.pods.get(name).filter(|_| pod.is_none());
        let held = known.map_or_else(SmallVec::new, |pod| self.held_by(pod));
        let old = self.pods.remove(name);
        if let Some(old) = &old {
            self.unlink(old);
            for address in held {
                self.departed.insert(address, old, now);
            }
        }
        let Some(pod) = pod else {
            return;
        };
        if !self.pods_of.contains_key(name.namespace()) {
            let none = SharedMap::default();
            self.pods_of.insert(name.namespace().into(), none);
        }
        if let Some(pods) = self.pods_of.get_mut(name.namespace()) {
            pods.insert(name.clone(), ());
        }
        if claims_addresses(&pod) {
            let local = self.is_local(&pod);
            for address in &pod.addresses {
                if !self.claimants.contains_key(address) {
                    let none = AddressClaimants::default();
                    self.claimants.insert(*address, none);
                }
                if let Some(claimants) = self.claimants.get_mut(address) {
                    claimants.insert(name, pod.evidence, local);
                }
                let is_new = old.as_ref().is_none_or(|old| !claims(old, *address));
                self.departed.claimed(*address, &pod.evidence, is_new);
            }
            if local {
                self.local.insert(name.clone());
            }
        }
        self.pods.insert(name.clone(), Arc::new(pod));
    }

    /// Returns the addresses that a pod of this node may have, if a container of it runs.
    fn held_by(&self, pod: &Pod) -> SmallVec<[IpAddr; 2]> {
        if !pod.running || !self.is_local(pod) {
            return SmallVec::new();
        }
        // One that a departed pod outranks does not take its place.
        let holds = |address: &IpAddr| {
            let mut holders = self.isolating(*address);
            holders.any(|holder| holder.name == pod.name)
        };
        pod.addresses.iter().copied().filter(holds).collect()
    }

    fn unlink(&mut self, pod: &Pod) {
        self.local.remove(&pod.name);
        if let Some(pods) = self.pods_of.get_mut(pod.name.namespace()) {
            pods.remove(&pod.name);
            if pods.is_empty() {
                self.pods_of.remove(pod.name.namespace());
            }
        }
        for address in &pod.addresses {
            if let Some(claimants) = self.claimants.get_mut(address) {
                claimants.remove(&pod.name);
                if claimants.all.is_empty() {
                    self.claimants.remove(address);
                }
            }
        }
    }

    /// Returns whether a namespace has an object or a pod, departed ones included.
    pub(crate) fn has_namespace(&self, name: &str) -> bool {
        self.namespaces.contains_key(name)
            || self.pods_of.contains_key(name)
            || self.departed_of(name).next().is_some()
    }

    pub(crate) fn has_namespace_object(&self, name: &str) -> bool {
        self.namespaces.contains_key(name)
    }

    /// Returns whether a namespace is known with the same labels and mode.
    pub fn knows(&self, namespace: &Namespace) -> bool {
        let name = namespace.name.name();
        self.namespaces.get(name) == Some(&namespace.labels) && self.mode_of(name) == namespace.mode
    }

    /// Returns the mode of a namespace.
    pub(crate) fn mode_of(&self, namespace: &str) -> Option<PolicyMode> {
        self.modes.get(namespace).copied()
    }

    /// Returns the mode of a policy: its own, else that of its namespace.
    pub(crate) fn mode(&self, policy: &NetworkPolicy) -> PolicyMode {
        let of_namespace = || self.mode_of(policy.name.namespace());
        policy.mode.or_else(of_namespace).unwrap_or_default()
    }

    /// Replaces a namespace; `None` deletes it.
    pub(crate) fn set_namespace(&mut self, name: &str, namespace: Option<Namespace>) {
        match namespace.as_ref().and_then(|namespace| namespace.mode) {
            Some(mode) => self.modes.insert(name.into(), mode),
            None => self.modes.remove(name),
        };
        match namespace {
            Some(namespace) => self.namespaces.insert(name.into(), namespace.labels),
            None => self.namespaces.remove(name),
        };
    }

    /// Replaces a policy; `None` deletes it. Returns the old one.
    pub(crate) fn set_policy(
        &mut self,
        name: &ObjectName,
        policy: Option<NetworkPolicy>,
    ) -> Option<Arc<NetworkPolicy>> {
        let old = self.policies.remove(name);
        if let Some(old) = &old {
            self.targets.remove(name, &target(old));
        }
        if let Some(policy) = policy {
            self.targets.insert(name.clone(), &target(&policy), []);
            self.policies.insert(name.clone(), Arc::new(policy));
        }
        old
    }
}

/// Returns the selector of the pods that a policy applies to.
fn target(policy: &NetworkPolicy) -> PodSelector {
    PodSelector {
        namespaces: Namespaces::Named(policy.name.namespace().into()),
        pods: policy.pods.clone(),
    }
}

/// Returns whether the addresses in a pod's status are its own. Those of a host-network pod are the
/// node's; those of a terminated pod may belong to another pod by now.
fn claims_addresses(pod: &Pod) -> bool {
    !pod.host_network && !pod.ended
}

fn claims(pod: &Pod, address: IpAddr) -> bool {
    claims_addresses(pod) && pod.addresses.contains(&address)
}
