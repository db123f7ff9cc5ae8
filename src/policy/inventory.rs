//! The pods, namespaces and policies that are known.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use smallvec::SmallVec;

use super::index::{Index, Namespaces, PodSelector};
use crate::model::{Labels, NAMESPACE_NAME, Namespace, NetworkPolicy, ObjectName, Pod};

/// What policies are compiled from.
#[derive(Debug, Default)]
pub struct Inventory {
    node: Arc<str>,
    pods: HashMap<ObjectName, Box<Pod>>,
    pods_of: HashMap<Box<str>, HashSet<ObjectName>>,
    /// The pods that could have an address.
    claimants: HashMap<IpAddr, SmallVec<[ObjectName; 1]>>,
    /// The pods of this node.
    local: BTreeSet<ObjectName>,
    namespaces: HashMap<Box<str>, Labels>,
    policies: BTreeMap<ObjectName, Arc<NetworkPolicy>>,
    /// Which policies select a pod.
    targets: Index<ObjectName>,
}

impl Inventory {
    /// Nothing known yet, on a node of this name.
    pub fn new(node: Arc<str>) -> Self {
        Self {
            node,
            ..Self::default()
        }
    }

    /// A pod.
    pub fn pod(&self, name: &ObjectName) -> Option<&Pod> {
        self.pods.get(name).map(|pod| &**pod)
    }

    /// All pods, in no order.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values().map(|pod| &**pod)
    }

    /// The pods of a namespace, in no order.
    pub fn pods_of(&self, namespace: &str) -> impl Iterator<Item = &Pod> {
        let names = self.pods_of.get(namespace).into_iter().flatten();
        names.filter_map(|name| self.pod(name))
    }

    /// The pods of this node.
    pub fn local(&self) -> impl Iterator<Item = &ObjectName> {
        self.local.iter()
    }

    /// The pods of this node that are in a namespace.
    pub fn local_of<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a ObjectName> {
        let first = ObjectName::new(namespace, "");
        let rest = self.local.range(first..);
        rest.take_while(move |name| name.namespace() == namespace)
    }

    /// Whether a pod runs on this node.
    pub fn is_local(&self, pod: &Pod) -> bool {
        pod.node.as_deref() == Some(&*self.node)
    }

    /// The names of a kind's objects.
    pub fn pod_names(&self) -> HashSet<ObjectName> {
        self.pods.keys().cloned().collect()
    }

    /// The names of the namespaces that have an object.
    pub fn namespace_names(&self) -> HashSet<ObjectName> {
        let names = self.namespaces.keys();
        names.map(|name| ObjectName::new("", name)).collect()
    }

    /// The names of the policies.
    pub fn policy_names(&self) -> HashSet<ObjectName> {
        self.policies.keys().cloned().collect()
    }

    /// The numbers of pods, namespaces and policies.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.pods.len(), self.namespaces.len(), self.policies.len())
    }

    /// A policy.
    pub fn policy(&self, name: &ObjectName) -> Option<&Arc<NetworkPolicy>> {
        self.policies.get(name)
    }

    /// The policies that select a pod, sorted by name.
    pub fn policies_for(&self, pod: &Pod) -> Vec<&Arc<NetworkPolicy>> {
        let mut names = Vec::new();
        let namespace = pod.name.namespace();
        // A policy selects pods of its own namespace, whatever that namespace's labels are.
        let labels = Labels::default();
        self.targets
            .of_pod(namespace, &labels, &pod.labels, |name| {
                names.push(name.clone())
            });
        names.sort_unstable();
        names.iter().filter_map(|name| self.policy(name)).collect()
    }

    /// The labels of a namespace; of one without an object just its name.
    pub fn namespace(&self, name: &str) -> Labels {
        let known = self.namespaces.get(name).cloned();
        known.unwrap_or_else(|| [(NAMESPACE_NAME, name)].into_iter().collect())
    }

    /// The namespaces that have an object or a pod, with their labels.
    pub fn namespaces(&self) -> impl Iterator<Item = (&str, Labels)> {
        let without_object = self
            .pods_of
            .keys()
            .filter(|name| !self.namespaces.contains_key(*name));
        let names = self.namespaces.keys().chain(without_object);
        names.map(|name| (&**name, self.namespace(name)))
    }

    /// Whether a selector selects a pod.
    pub fn selects(&self, selector: &PodSelector, pod: &Pod) -> bool {
        let namespace = pod.name.namespace();
        let of_namespace = match &selector.namespaces {
            Namespaces::Named(_) => Labels::default(),
            Namespaces::Labelled(_) => self.namespace(namespace),
        };
        selector.matches(namespace, &of_namespace, &pod.labels)
    }

    /// The pod that has an address: of several that claim it one that is not terminating, of
    /// those the newest.
    pub fn owner(&self, address: IpAddr) -> Option<&Pod> {
        self.best(address, |_| true)
    }

    /// The addresses that a pod has.
    pub fn addresses(&self, pod: &Pod) -> SmallVec<[IpAddr; 2]> {
        let claimed = pod.addresses.iter().copied();
        claimed
            .filter(|address| {
                self.owner(*address)
                    .is_some_and(|owner| owner.name == pod.name)
            })
            .collect()
    }

    /// The pod of this node that has an address, by the same rule. An object that is left of another
    /// node's pod must not free a pod of this one from its policies.
    pub fn local_owner(&self, address: IpAddr) -> Option<&Pod> {
        self.best(address, |pod| self.is_local(pod))
    }

    /// The addresses at which a pod of this node is isolated.
    pub fn isolated_addresses(&self, pod: &Pod) -> SmallVec<[IpAddr; 2]> {
        if !self.is_local(pod) {
            return SmallVec::new();
        }
        let claimed = pod.addresses.iter().copied();
        claimed
            .filter(|address| {
                self.local_owner(*address)
                    .is_some_and(|owner| owner.name == pod.name)
            })
            .collect()
    }

    fn best(&self, address: IpAddr, counts: impl Fn(&Pod) -> bool) -> Option<&Pod> {
        let claimants = self.claimants.get(&address)?.iter();
        let pods = claimants.filter_map(|name| self.pod(name));
        pods.filter(|pod| counts(pod))
            .max_by_key(|pod| (!pod.terminating, pod.created, &pod.name))
    }

    /// The pods that claim an address of a pod, itself among them if it is known.
    pub fn rivals(&self, pod: &Pod) -> Vec<ObjectName> {
        let mut rivals: Vec<ObjectName> = pod
            .addresses
            .iter()
            .filter_map(|address| self.claimants.get(address))
            .flatten()
            .cloned()
            .collect();
        rivals.sort_unstable();
        rivals.dedup();
        rivals
    }

    /// Replaces a pod, `None` for one that is gone.
    pub fn set_pod(&mut self, name: &ObjectName, pod: Option<Pod>) {
        if let Some(old) = self.pods.remove(name) {
            self.unlink(&old);
        }
        let Some(pod) = pod else {
            return;
        };
        match self.pods_of.get_mut(name.namespace()) {
            Some(pods) => {
                pods.insert(name.clone());
            }
            None => {
                let pods = HashSet::from([name.clone()]);
                self.pods_of.insert(name.namespace().into(), pods);
            }
        }
        if claims_addresses(&pod) {
            for address in &pod.addresses {
                let claimants = self.claimants.entry(*address).or_default();
                if !claimants.contains(name) {
                    claimants.push(name.clone());
                }
            }
            if self.is_local(&pod) {
                self.local.insert(name.clone());
            }
        }
        self.pods.insert(name.clone(), Box::new(pod));
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
                claimants.retain(|name| *name != pod.name);
                if claimants.is_empty() {
                    self.claimants.remove(address);
                }
            }
        }
    }

    /// Whether a namespace has an object or a pod.
    pub fn has_namespace(&self, name: &str) -> bool {
        self.namespaces.contains_key(name) || self.pods_of.contains_key(name)
    }

    /// Whether a namespace is known just so.
    pub fn knows(&self, namespace: &Namespace) -> bool {
        self.namespaces.get(namespace.name.name()) == Some(&namespace.labels)
    }

    /// Replaces a namespace, `None` for one that is gone.
    pub fn set_namespace(&mut self, name: &str, namespace: Option<Namespace>) {
        match namespace {
            Some(namespace) => self.namespaces.insert(name.into(), namespace.labels),
            None => self.namespaces.remove(name),
        };
    }

    /// Replaces a policy, `None` for one that is gone. Returns the old one.
    pub fn set_policy(
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

/// The pods that a policy applies to.
fn target(policy: &NetworkPolicy) -> PodSelector {
    PodSelector {
        namespaces: Namespaces::Named(policy.name.namespace().into()),
        pods: policy.pods.clone(),
    }
}

/// Whether the addresses in a pod's status are its own. Those of a host-network pod are the
/// node's; those of a pod that has ended may be another one's by now.
fn claims_addresses(pod: &Pod) -> bool {
    !pod.host_network && !pod.ended
}
