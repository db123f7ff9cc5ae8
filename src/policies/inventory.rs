//! The pods, namespaces and policies that are known.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use smallvec::SmallVec;

use super::claimants::AddressClaimants;
use super::departed::Departed;
use super::index::{Index, Namespaces, PodSelector};
use crate::model::{Labels, NAMESPACE_NAME, Namespace, NetworkPolicy, ObjectName, Pod, Sandbox};

/// What policies are compiled from.
#[derive(Debug, Default)]
pub(crate) struct Inventory {
    node: Arc<str>,
    pods: HashMap<ObjectName, Box<Pod>>,
    pods_of: HashMap<Box<str>, HashSet<ObjectName>>,
    /// The pods that could have an address.
    claimants: HashMap<IpAddr, AddressClaimants>,
    /// Pods of this node whose objects went while a container ran.
    departed: Departed,
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
    pub(crate) fn pods_of(&self, namespace: &str) -> impl Iterator<Item = &Pod> {
        let names = self.pods_of.get(namespace).into_iter().flatten();
        names.filter_map(|name| self.pod(name))
    }

    /// The pods of this node.
    pub fn local(&self) -> impl Iterator<Item = &ObjectName> {
        self.local.iter()
    }

    /// The pods of this node that are in a namespace.
    pub(crate) fn local_of<'a>(
        &'a self,
        namespace: &'a str,
    ) -> impl Iterator<Item = &'a ObjectName> {
        let first = ObjectName::new(namespace, "");
        let rest = self.local.range(first..);
        rest.take_while(move |name| name.namespace() == namespace)
    }

    /// Whether a pod runs on this node.
    pub(crate) fn is_local(&self, pod: &Pod) -> bool {
        pod.node.as_deref() == Some(&*self.node)
    }

    /// The names of a kind's objects.
    pub(crate) fn pod_names(&self) -> HashSet<ObjectName> {
        self.pods.keys().cloned().collect()
    }

    /// The names of the namespaces that have an object.
    pub(crate) fn namespace_names(&self) -> HashSet<ObjectName> {
        let names = self.namespaces.keys();
        names.map(|name| ObjectName::new("", name)).collect()
    }

    /// The names of the policies.
    pub(crate) fn policy_names(&self) -> HashSet<ObjectName> {
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
    pub(crate) fn policies_for(&self, pod: &Pod) -> Vec<&Arc<NetworkPolicy>> {
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

    /// The pods that may have an address now: of those that claim it, the ones that no other
    /// outranks. More than one where it cannot be decided.
    pub fn holders(&self, address: IpAddr) -> impl Iterator<Item = &Pod> {
        let claimants = self.claimants.get(&address);
        let holders = claimants
            .into_iter()
            .flat_map(|claimants| claimants.holders(|_| true));
        holders.filter_map(|claimant| self.pod(&claimant.name))
    }

    /// The pod that has an address, if that is certain: the one that selectors of rules which allow
    /// are asked about. None without a sandbox is.
    pub fn owner(&self, address: IpAddr) -> Option<&Pod> {
        self.certain(address, self.holders(address))
    }

    /// The addresses that a pod has for certain.
    pub fn addresses(&self, pod: &Pod) -> SmallVec<[IpAddr; 2]> {
        let claimed = pod.addresses.iter().copied();
        claimed
            .filter(|address| {
                self.owner(*address)
                    .is_some_and(|owner| owner.name == pod.name)
            })
            .collect()
    }

    /// The pods of this node that may have an address, by the same order among themselves. An object
    /// that is left of another node's pod must not free a pod of this one from its policies, unless
    /// that one has no sandbox.
    pub(crate) fn local_holders(&self, address: IpAddr) -> impl Iterator<Item = &Pod> {
        let claimants = self.claimants.get(&address);
        let holders = claimants.into_iter().flat_map(|claimants| {
            let gone_count = claimants.are_all_gone();
            claimants.holders(move |it| it.local && (gone_count || !it.is_gone()))
        });
        holders.filter_map(|claimant| self.pod(&claimant.name))
    }

    /// The pod of this node that has an address, if that is certain.
    pub(crate) fn local_owner(&self, address: IpAddr) -> Option<&Pod> {
        self.certain(address, self.local_holders(address))
    }

    /// The one pod that has an address, where there is one alone and it may have a sandbox.
    fn certain<'a>(
        &self,
        address: IpAddr,
        mut holders: impl Iterator<Item = &'a Pod>,
    ) -> Option<&'a Pod> {
        let first = holders.next()?;
        let alone = holders.next().is_none() && self.departed(address).is_none();
        (alone && first.evidence.sandbox != Sandbox::Gone).then_some(first)
    }

    /// The pods of this node whose policies are asked about an address, without the departed one.
    pub(crate) fn isolating(&self, address: IpAddr) -> impl Iterator<Item = &Pod> {
        let departed = self.departed.at(address).map(|pod| pod.evidence);
        self.local_holders(address)
            .filter(move |pod| departed.is_none_or(|departed| !departed.outranks(&pod.evidence)))
    }

    /// The addresses that a pod of this node has for certain, as far as this node is concerned.
    pub(crate) fn local_addresses(&self, pod: &Pod) -> SmallVec<[IpAddr; 2]> {
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

    /// The pod whose object went while it had an address of this node.
    pub fn departed(&self, address: IpAddr) -> Option<&Pod> {
        self.departed.at(address)
    }

    /// The addresses of departed pods of a namespace.
    pub(crate) fn departed_of(&self, namespace: &str) -> impl Iterator<Item = IpAddr> {
        self.departed.of(namespace)
    }

    /// When the first departed pod is to be forgotten.
    pub(crate) fn departed_due(&self) -> Option<Instant> {
        self.departed.due()
    }

    /// The address of a departed pod that is to be forgotten.
    pub(crate) fn departed_expired(&self, now: Instant) -> Option<IpAddr> {
        self.departed.expired(now)
    }

    /// Forgets that one.
    pub(crate) fn forget_departed(&mut self, now: Instant) {
        self.departed.forget_oldest(now);
    }

    /// The pods that claim an address.
    pub fn claimants(&self, address: IpAddr) -> impl Iterator<Item = &ObjectName> {
        let claimants = self.claimants.get(&address);
        let all = claimants.into_iter().flat_map(|claimants| &claimants.all);
        all.map(|claimant| &claimant.name)
    }

    /// The pods that claim an address of a pod, itself among them if it is known.
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

    /// Replaces a pod, `None` for one that is gone. One that goes while a container runs is
    /// remembered from `now` on, since its containers may go on.
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
            let local = self.is_local(&pod);
            for address in &pod.addresses {
                let claimants = self.claimants.entry(*address).or_default();
                claimants.insert(name, pod.evidence, local);
                let is_new = old.as_ref().is_none_or(|old| !claims(old, *address));
                self.departed.claimed(*address, &pod.evidence, is_new);
            }
            if local {
                self.local.insert(name.clone());
            }
        }
        self.pods.insert(name.clone(), Box::new(pod));
    }

    /// The addresses of this node that a pod may have and at which a container of it runs.
    fn held_by(&self, pod: &Pod) -> SmallVec<[IpAddr; 2]> {
        if !pod.running || !self.is_local(pod) {
            return SmallVec::new();
        }
        let holds = |address: &IpAddr| {
            let mut holders = self.local_holders(*address);
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

    /// Whether a namespace has an object or a pod.
    pub(crate) fn has_namespace(&self, name: &str) -> bool {
        self.namespaces.contains_key(name) || self.pods_of.contains_key(name)
    }

    /// Whether a namespace is known just so.
    pub fn knows(&self, namespace: &Namespace) -> bool {
        self.namespaces.get(namespace.name.name()) == Some(&namespace.labels)
    }

    /// Replaces a namespace, `None` for one that is gone.
    pub(crate) fn set_namespace(&mut self, name: &str, namespace: Option<Namespace>) {
        match namespace {
            Some(namespace) => self.namespaces.insert(name.into(), namespace.labels),
            None => self.namespaces.remove(name),
        };
    }

    /// Replaces a policy, `None` for one that is gone. Returns the old one.
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

fn claims(pod: &Pod, address: IpAddr) -> bool {
    claims_addresses(pod) && pod.addresses.contains(&address)
}
