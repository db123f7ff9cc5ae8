//! Takes over events: updates the inventory, and marks what they concern.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::time::Instant;

use super::cluster::subject;
use super::engine::Engine;
use super::index::PodSelector;
use super::inventory::Inventory;
use super::reassigned::ReassignedAddresses;
use crate::model::{
    ClusterNetworkPolicy, Event, Kind, Namespace, NetworkPolicy, Node, Object, ObjectName,
    ObjectRef, Pod,
};

/// The kinds whose objects the engine keeps. Nodes matter only where a cluster policy names them.
fn is_kept(kind: Kind) -> bool {
    Kind::POLICY.contains(&kind) || kind == Kind::Node
}

impl Engine {
    pub(super) fn apply_event(&mut self, event: &Event) {
        match event {
            &Event::ListStarted(kind) if is_kept(kind) => {
                let known = match kind {
                    Kind::Pod => self.inventory.pod_names(),
                    Kind::Namespace => self.inventory.namespace_names(),
                    Kind::NetworkPolicy => self.inventory.policy_names(),
                    Kind::ClusterNetworkPolicy => self.inventory.cluster().names(),
                    Kind::Node => self.inventory.nodes().name_set(),
                    Kind::Service | Kind::EndpointSlice | Kind::ServiceCidr => HashSet::new(),
                };
                self.lists.start(kind, known);
            }
            &Event::ListComplete(kind) if is_kept(kind) => {
                for name in self.lists.complete(kind) {
                    self.delete(&ObjectRef::new(kind, name));
                }
                if kind == Kind::Node
                    && let Some(closed) = &mut self.closed
                {
                    closed.set_node_listed();
                }
                // Without a policy pods are not watched: those missing in the list may still run.
                if !self.inventory.has_policies() {
                    self.reassigned = ReassignedAddresses::default();
                }
            }
            Event::Apply(object) => {
                self.lists.observe(&object.reference());
                match object {
                    Object::Pod(pod) => self.set_pod(&pod.name, Some(pod)),
                    Object::Namespace(namespace) => {
                        if self.inventory.knows(namespace) {
                            return;
                        }
                        self.set_namespace(namespace.name.name(), Some(namespace));
                    }
                    Object::NetworkPolicy(policy) => {
                        let known = self.inventory.policy(&policy.name);
                        if known.is_none_or(|known| **known != *policy) {
                            self.set_policy(&policy.name, Some(policy.clone()));
                        }
                    }
                    Object::ClusterNetworkPolicy(policy) => {
                        let known = self.inventory.cluster().get(&policy.name);
                        if known.is_none_or(|known| **known != *policy) {
                            self.set_cluster_policy(&policy.name, Some(policy.clone()));
                        }
                    }
                    Object::Node(node) => {
                        if node.name == self.settings.node
                            && let Some(closed) = &mut self.closed
                        {
                            closed.set_node(node);
                        }
                        if !self.inventory.nodes().knows(node) {
                            self.set_node(&ObjectName::new("", &node.name), Some(node));
                        }
                    }
                    Object::Service(_) | Object::EndpointSlice(_) | Object::ServiceCidr(_) => {}
                }
            }
            Event::Delete(reference) => {
                self.lists.observe(reference);
                self.delete(reference);
            }
            Event::Routes(routes) => {
                self.touched.routes |= self.routes != *routes;
                self.routes = routes.clone();
            }
            Event::ListStarted(_)
            | Event::ListComplete(_)
            | Event::Servers(_)
            | Event::Notice(_) => {}
        }
    }

    fn delete(&mut self, object: &ObjectRef) {
        match object.kind {
            Kind::Pod => self.set_pod(&object.name, None),
            Kind::Namespace => {
                self.set_namespace(object.name.name(), None);
            }
            Kind::NetworkPolicy => self.set_policy(&object.name, None),
            Kind::ClusterNetworkPolicy => self.set_cluster_policy(&object.name, None),
            Kind::Node => self.set_node(&object.name, None),
            Kind::Service | Kind::EndpointSlice | Kind::ServiceCidr => {}
        }
    }

    fn set_pod(&mut self, name: &ObjectName, pod: Option<&Pod>) {
        let old = self.inventory.pod(name);
        if old == pod {
            return;
        }
        // Other pods that claim an address of the old or the new version may lose or gain it.
        let mut concerned = BTreeSet::from([name.clone()]);
        for version in old.into_iter().chain(pod) {
            concerned.extend(self.inventory.rivals(version));
            let departed = version.addresses.iter();
            let departed = departed.filter_map(|address| self.inventory.departed(*address));
            concerned.extend(departed.map(|pod| pod.name.clone()));
        }
        let addresses: BTreeSet<IpAddr> = old
            .into_iter()
            .chain(pod)
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
        let namespaces = self.known_namespaces(&concerned);
        self.inventory.set_pod(name, pod.cloned(), Instant::now());
        for name in &concerned {
            self.touch_pod(name);
        }
        self.namespaces_changed(namespaces);
        // A pod that is new in a list may have had the address for long.
        let listing = self.lists.is_open(Kind::Pod);
        let after = holders(&self.inventory);
        for (address, (before, after)) in addresses.iter().zip(before.into_iter().zip(after)) {
            let local = self.inventory.local_holders(*address).next().is_some();
            self.reassigned
                .note(*address, before, after, local && !listing);
            let departed = self.inventory.departed(*address).is_some();
            let was_known = self.closed.as_ref().is_some_and(|it| it.knows(*address));
            if local || departed || was_known || self.plans.contains_key(address) {
                self.touched.addresses.insert(*address);
            }
        }
    }

    /// Records the set elements of a pod before it changes.
    pub(super) fn touch_pod(&mut self, name: &ObjectName) {
        self.touch(ObjectRef::new(Kind::Pod, name.clone()));
    }

    /// Records the set elements of a pod or node before it changes.
    fn touch(&mut self, object: ObjectRef) {
        if !self.touched.members.contains_key(&object) {
            let members = self.sets.of(&object, &self.inventory);
            self.touched.members.insert(object, members);
        }
    }

    /// Returns the namespaces of some pods, with whether they are known.
    pub(super) fn known_namespaces<'a>(
        &self,
        pods: impl IntoIterator<Item = &'a ObjectName>,
    ) -> BTreeMap<&'a str, bool> {
        let namespaces = pods.into_iter().map(ObjectName::namespace);
        namespaces
            .map(|name| (name, self.inventory.has_namespace(name)))
            .collect()
    }

    /// Takes note of the namespaces that became known, or unknown.
    pub(super) fn namespaces_changed(&mut self, before: BTreeMap<&str, bool>) {
        for (name, known) in before {
            if known != self.inventory.has_namespace(name) {
                self.namespace_changed(name);
            }
        }
    }

    fn namespace_changed(&mut self, name: &str) {
        self.sets.namespace_changed(name, &self.inventory);
        self.inventory.namespace_changed(name);
    }

    /// Replaces a namespace; `None` deletes it. Most labels are in no selector, and the pods of the
    /// namespace are not concerned.
    fn set_namespace(&mut self, name: &str, namespace: Option<&Namespace>) {
        let before = self.inventory.namespace(name);
        let after = match namespace {
            Some(namespace) => namespace.labels.clone(),
            None => Inventory::labels_without_object(name),
        };
        if self.sets.distinguish(&before, &after) {
            // An element that several pods have stays while one of them has it.
            let pods = self.inventory.pods_of(name);
            let rivals = pods.flat_map(|pod| self.inventory.rivals(pod));
            let departed = self.inventory.departed_of(name).flat_map(|(address, pod)| {
                let claimants = self.inventory.claimants(address);
                claimants.chain([&pod.name]).cloned()
            });
            let mut names: BTreeSet<ObjectName> = rivals.chain(departed).collect();
            let pods = self.inventory.pods_of(name);
            names.extend(pods.map(|pod| pod.name.clone()));
            for name in &names {
                self.touch_pod(name);
            }
        }
        // In a closed network a pod may be known once its namespace is.
        let appears = self.closed.is_some()
            && self.inventory.has_namespace_object(name) != namespace.is_some();
        let mode = namespace.and_then(|namespace| namespace.mode);
        let is_mode_changed = self.settings.audit && self.inventory.mode_of(name) != mode;
        if appears || is_mode_changed || self.inventory.cluster().distinguish(&before, &after) {
            let addresses = self.local_addresses_of(name);
            self.touched.addresses.extend(addresses);
        }
        self.inventory.set_namespace(name, namespace.cloned());
        self.namespace_changed(name);
    }

    /// Returns the addresses that the pods of this node in a namespace claim, departed ones
    /// included.
    fn local_addresses_of(&self, namespace: &str) -> Vec<IpAddr> {
        let local = self.inventory.local_of(namespace);
        let pods = local.filter_map(|name| self.inventory.pod(name));
        let claimed = pods.flat_map(|pod| pod.addresses.iter().copied());
        let departed = self.inventory.departed_of(namespace);
        claimed
            .chain(departed.map(|(address, _)| address))
            .collect()
    }

    /// Returns the addresses that the pods of this node that a selector selects claim, departed ones
    /// included.
    fn local_addresses_selected(&self, selector: &PodSelector) -> Vec<IpAddr> {
        let local = self.inventory.local();
        let pods = local.filter_map(|name| self.inventory.pod(name));
        let claims = pods.flat_map(|pod| pod.addresses.iter().map(move |it| (*it, pod)));
        let claims = claims.chain(self.inventory.all_departed());
        let selected = claims.filter(|(_, pod)| self.inventory.selects(selector, pod));
        selected.map(|(address, _)| address).collect()
    }

    fn set_node(&mut self, name: &ObjectName, node: Option<&Node>) {
        let nodes = self.inventory.nodes();
        let known = nodes.get(name).map(|known| &known.addresses);
        let addresses = known.into_iter().chain(node.map(|node| &node.addresses));
        // An element that several nodes have stays while one of them has it.
        let others = addresses.flat_map(|addresses| nodes.having(addresses));
        let mut concerned: BTreeSet<ObjectName> = others.cloned().collect();
        concerned.insert(name.clone());
        for name in concerned {
            self.touch(ObjectRef::new(Kind::Node, name));
        }
        self.inventory.set_node(name, node);
    }

    fn set_policy(&mut self, name: &ObjectName, policy: Option<NetworkPolicy>) {
        let addresses = self.local_addresses_of(name.namespace());
        self.touched.addresses.extend(addresses);
        self.touch_policy(ObjectRef::new(Kind::NetworkPolicy, name.clone()));
        self.inventory.set_policy(name, policy);
    }

    fn set_cluster_policy(&mut self, name: &ObjectName, policy: Option<ClusterNetworkPolicy>) {
        let known = self.inventory.cluster().get(name);
        let versions = known.map(|known| &**known).into_iter().chain(&policy);
        let subjects: Vec<PodSelector> = versions.map(subject).collect();
        let addresses: Vec<IpAddr> = subjects
            .iter()
            .flat_map(|subject| self.local_addresses_selected(subject))
            .collect();
        self.touched.addresses.extend(addresses);
        self.touch_policy(ObjectRef::new(Kind::ClusterNetworkPolicy, name.clone()));
        self.inventory.set_cluster_policy(name, policy);
    }

    fn touch_policy(&mut self, policy: ObjectRef) {
        self.quarantined.remove(&policy);
        self.touched.policies.insert(policy);
    }

    #[cfg(test)]
    pub(super) fn touched_pods(&self) -> usize {
        self.touched.members.len()
    }
}
