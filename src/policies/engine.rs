//! Turns pods, namespaces and policies into rules.
//!
//! The engine keeps, beside the objects, the plan of each isolated address of this node and the
//! sets that each policy's chain uses. A batch of events leaves marks: pods with the set elements
//! that they had before, addresses to plan again, policies to compile again. `update` compiles the
//! touched parts of the tables, before and after; the difference of the two is the transaction.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use super::inventory::Inventory;
use super::isolation::Isolation;
use super::layout::{Direction, TABLE, table_id};
use super::profile::Profile;
use super::reassigned::ReassignedAddresses;
use super::sets::{PodElement, SetId, Sets};
use super::startup::ClosedNetwork;
use super::{PolicyChanges, PolicySettings};
use crate::engine::{self, Update};
use crate::model::{
    Event, Family, HostRoute, Kind, Namespace, Notice, Object, ObjectName, ObjectRef, Pod,
    RelistTracker,
};
use crate::nft::{Chain, Name, ObjectPath, Ruleset, TableId};

/// A chain of pods: its family, direction and name.
pub(super) type PodsChain = (Family, Direction, Name);

/// A profile with a chain.
#[derive(Clone, Debug)]
pub(super) struct ProfileUse {
    pub profile: Arc<Profile>,
    /// The number of elements that lead to the chain.
    pub addresses: u32,
}

/// A policy's chain in one family's table.
#[derive(Clone, Debug, Default)]
pub(super) struct PolicyUse {
    /// The number of chains of pods that jump to it.
    pub pods: u32,
    pub chain: Option<Arc<Chain>>,
    /// The sets in its rules.
    pub sets: Vec<SetId>,
}

/// The marks of events since the last update.
#[derive(Debug, Default)]
pub(super) struct Touched {
    /// Pods, with their set elements before.
    pub pods: HashMap<ObjectName, Vec<PodElement>>,
    /// Addresses of this node whose isolation may have changed.
    pub addresses: BTreeSet<IpAddr>,
    /// Policies that changed.
    pub policies: BTreeSet<ObjectName>,
    /// Whether the host's routes changed.
    pub routes: bool,
}

/// Turns pods, namespaces and policies into rules.
#[derive(Debug)]
pub struct Engine {
    pub(super) settings: PolicySettings,
    pub(super) inventory: Inventory,
    lists: RelistTracker,
    pub(super) sets: Sets,
    pub(super) plans: BTreeMap<IpAddr, Isolation>,
    /// Whether plans changed since the last change for followers.
    pub(super) replanned: bool,
    /// The number of addresses with a second and further holder, by family, direction and layer.
    pub(super) layers: BTreeMap<(Family, Direction, usize), u32>,
    pub(super) profiles: BTreeMap<PodsChain, ProfileUse>,
    pub(super) uses: BTreeMap<(Family, Direction, ObjectName), PolicyUse>,
    /// Policies that the kernel refused. They allow nothing until they change or are retried.
    pub(super) quarantined: BTreeSet<ObjectName>,
    /// The direct routes of the host.
    pub(super) routes: Arc<[HostRoute]>,
    /// The interfaces that lead to isolated pods.
    pub(super) links: BTreeSet<(Direction, Arc<str>)>,
    pub(super) reassigned: ReassignedAddresses,
    /// The pod network, if it is closed to unknown addresses.
    pub(super) closed: Option<ClosedNetwork>,
    /// Whether the tables exist, as they do while there is a policy or the pod network is closed.
    pub(super) exists: bool,
    /// Whether policies are enforced.
    on: bool,
    pub(super) touched: Touched,
}

impl Engine {
    /// Creates an engine without objects.
    pub fn new(settings: PolicySettings) -> Self {
        Self {
            inventory: Inventory::new(settings.node.clone()),
            closed: ClosedNetwork::new(&settings),
            settings,
            lists: RelistTracker::default(),
            sets: Sets::default(),
            plans: BTreeMap::new(),
            replanned: false,
            layers: BTreeMap::new(),
            profiles: BTreeMap::new(),
            uses: BTreeMap::new(),
            quarantined: BTreeSet::new(),
            routes: Arc::default(),
            links: BTreeSet::new(),
            reassigned: ReassignedAddresses::default(),
            exists: false,
            on: true,
            touched: Touched::default(),
        }
    }

    /// Creates an engine that removes the tables: it needs no lists and has no policies.
    pub fn off(settings: PolicySettings) -> Self {
        let mut engine = Self {
            on: false,
            ..Self::new(settings)
        };
        for kind in Kind::POLICY {
            engine.lists.complete(kind);
        }
        engine
    }

    /// Returns whether policies are enforced.
    pub(crate) fn is_on(&self) -> bool {
        self.on
    }

    /// Returns whether the first policies were added since the last update.
    pub(crate) fn has_first_policies(&self) -> bool {
        !self.exists && self.inventory.counts().2 > 0
    }

    fn is_listed(&self, kind: Kind) -> bool {
        self.lists.is_complete(kind) && !self.lists.is_open(kind)
    }

    /// Returns a pod that may have an address, for logs.
    pub(crate) fn pod_at(&self, address: IpAddr) -> Option<&ObjectName> {
        let mut local = self.inventory.isolating(address);
        let departed = || self.inventory.departed(address);
        let pod = local.next().or_else(departed);
        let pod = pod.or_else(|| self.inventory.holders(address).next());
        pod.map(|pod| &pod.name)
    }

    /// Returns the policies to which a chain of a table belongs.
    fn policies_of_chain(&self, table: &TableId, chain: &Name) -> Vec<ObjectName> {
        self.users(table, |direction, name, _| {
            direction.policy_chain(name) == *chain
        })
    }

    /// Returns the policies that use a set of a table.
    fn policies_of_set(&self, table: &TableId, set: &Name) -> Vec<ObjectName> {
        let Some(id) = self.sets.named(set) else {
            return Vec::new();
        };
        self.users(table, |_, _, used| used.sets.contains(&id))
    }

    /// Returns the policies in force, except those in quarantine, for which `is_user` returns true.
    fn users(
        &self,
        table: &TableId,
        is_user: impl Fn(Direction, &ObjectName, &PolicyUse) -> bool,
    ) -> Vec<ObjectName> {
        let uses = self.uses.iter();
        let of_table = uses.filter(|((family, ..), _)| table_id(*family) == *table);
        let users = of_table.filter(|((_, direction, name), used)| {
            !self.quarantined.contains(name) && is_user(*direction, name, used)
        });
        let mut names: Vec<ObjectName> = users.map(|((.., name), _)| name.clone()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Returns a copy for another thread, which compiles the same ruleset. Its cost grows with what
    /// this node enforces, but not with the pods of the cluster.
    pub(super) fn copy(&self) -> Self {
        Self {
            inventory: self.inventory.without_policies(),
            sets: self.sets.without_indexes(),
            plans: self.plans.clone(),
            layers: self.layers.clone(),
            profiles: self.profiles.clone(),
            uses: self.uses.clone(),
            links: self.links.clone(),
            closed: self.closed.clone(),
            exists: self.exists,
            ..Self::new(self.settings.clone())
        }
    }

    /// Returns the change for followers.
    fn change(&mut self, rules: bool) -> PolicyChanges {
        let isolated = std::mem::take(&mut self.replanned).then(|| {
            let isolated = self.isolated();
            let isolated = isolated.map(|(address, pod)| (address, pod.cloned()));
            isolated.collect()
        });
        PolicyChanges {
            rules,
            isolated,
            reassigned: self.reassigned.take(),
            rewritten: false,
        }
    }

    /// Returns the isolated addresses of this node, each with its pod; `None` if the Pod object was
    /// deleted.
    pub fn isolated(&self) -> impl Iterator<Item = (IpAddr, Option<&ObjectName>)> {
        self.plans.iter().map(|(address, plan)| {
            let mut holders = plan.holders.values().flatten();
            let present = holders.find(|holder| !holder.departed);
            (*address, present.map(|holder| &holder.pod))
        })
    }

    fn take_over(&mut self, event: &Event) {
        match event {
            &Event::ListStarted(kind) if Kind::POLICY.contains(&kind) => {
                let known = match kind {
                    Kind::Pod => self.inventory.pod_names(),
                    Kind::Namespace => self.inventory.namespace_names(),
                    Kind::NetworkPolicy => self.inventory.policy_names(),
                    _ => Default::default(),
                };
                self.lists.start(kind, known);
            }
            &Event::ListComplete(kind) if Kind::POLICY.contains(&kind) => {
                for name in self.lists.complete(kind) {
                    self.delete(&ObjectRef::new(kind, name));
                }
                // Without a policy pods are not watched: those missing in the list may still run.
                if self.inventory.counts().2 == 0 {
                    self.reassigned = ReassignedAddresses::default();
                }
            }
            &Event::ListComplete(Kind::Node) => {
                if let Some(closed) = &mut self.closed {
                    closed.set_node_listed();
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
                        if known.is_some_and(|known| **known == *policy) {
                            return;
                        }
                        self.touch_policy(&policy.name);
                        self.inventory
                            .set_policy(&policy.name, Some(policy.clone()));
                    }
                    Object::Node(node) if node.name == self.settings.node => {
                        if let Some(closed) = &mut self.closed {
                            closed.set_node(node);
                        }
                    }
                    _ => {}
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
            Kind::NetworkPolicy => {
                self.touch_policy(&object.name);
                self.inventory.set_policy(&object.name, None);
            }
            _ => {}
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
        let namespace = name.namespace();
        let known = self.inventory.has_namespace(namespace);
        self.inventory.set_pod(name, pod.cloned(), Instant::now());
        for name in &concerned {
            self.touch_pod(name);
        }
        if known != self.inventory.has_namespace(namespace) {
            self.sets.namespace_changed(namespace, &self.inventory);
        }
        // A pod that is new in a list may have had the address for long.
        let listing = self.lists.is_open(Kind::Pod);
        let after = holders(&self.inventory);
        for (address, (before, after)) in addresses.iter().zip(before.into_iter().zip(after)) {
            let local = self.inventory.local_holders(*address).next().is_some();
            self.reassigned
                .note(*address, before, after, local && !listing);
            let was_known = self.closed.as_ref().is_some_and(|it| it.knows(*address));
            if local || was_known || self.plans.contains_key(address) {
                self.touched.addresses.insert(*address);
            }
        }
    }

    /// Records the set elements of a pod before it changes.
    pub(super) fn touch_pod(&mut self, name: &ObjectName) {
        if !self.touched.pods.contains_key(name) {
            let pod = self.inventory.pod(name);
            let brought = pod.map_or_else(Vec::new, |pod| self.sets.of_pod(pod, &self.inventory));
            self.touched.pods.insert(name.clone(), brought);
        }
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
            let pods = self.inventory.pods_of(name);
            let names: Vec<ObjectName> = pods.map(|pod| pod.name.clone()).collect();
            for name in &names {
                self.touch_pod(name);
            }
        }
        self.inventory.set_namespace(name, namespace.cloned());
        self.sets.namespace_changed(name, &self.inventory);
    }

    #[cfg(test)]
    pub(super) fn touched_pods(&self) -> usize {
        self.touched.pods.len()
    }

    fn touch_policy(&mut self, name: &ObjectName) {
        self.quarantined.remove(name);
        let local = self.inventory.local_of(name.namespace());
        let pods = local.filter_map(|name| self.inventory.pod(name));
        let addresses = pods.flat_map(|pod| pod.addresses.iter().copied());
        self.touched.addresses.extend(addresses);
        let departed = self.inventory.departed_of(name.namespace());
        self.touched.addresses.extend(departed);
        self.touched.policies.insert(name.clone());
    }
}

impl engine::Engine for Engine {
    type Change = PolicyChanges;

    const TABLE: &'static str = TABLE;
    const QUARANTINE: &'static str = "the policy allows nothing until it changes";

    fn apply(&mut self, event: &Event) {
        self.take_over(event);
    }

    /// Before all kinds are listed, and while one is listed again, the rules would deny traffic
    /// that missing objects allow.
    fn is_ready(&self) -> bool {
        let defined = self.closed.as_ref().is_none_or(ClosedNetwork::is_defined);
        defined && Kind::POLICY.iter().all(|kind| self.is_listed(*kind))
    }

    fn missing(&self) -> Vec<Kind> {
        let kinds = Kind::POLICY.into_iter();
        kinds.filter(|kind| !self.is_listed(*kind)).collect()
    }

    fn count(&self, kind: Kind) -> usize {
        let (pods, namespaces, policies) = self.inventory.counts();
        match kind {
            Kind::Pod => pods,
            Kind::Namespace => namespaces,
            Kind::NetworkPolicy => policies,
            Kind::Service
            | Kind::EndpointSlice
            | Kind::Node
            | Kind::ServiceCidr
            | Kind::ClusterNetworkPolicy => 0,
        }
    }

    /// Ignores the budget: changes of policies are never large.
    fn update(&mut self, _budget: usize) -> Update<PolicyChanges> {
        let transaction = self.compile();
        let changed = !transaction.is_empty();
        Update {
            transaction,
            change: self.change(changed),
            more: false,
        }
    }

    fn rebuild(&mut self, first: bool) -> PolicyChanges {
        self.compile();
        if first {
            self.replanned = true;
            // The earlier pods of the addresses are unknown, and most pods have had them for long.
            self.reassigned.take();
        }
        self.change(true)
    }

    fn early_rules(&self) -> Option<Ruleset> {
        self.closed.as_ref().map(ClosedNetwork::early_rules)
    }

    fn ruleset(&self) -> Ruleset {
        self.tables()
    }

    fn snapshot(&self) -> engine::Compile {
        let copy = self.copy();
        Box::new(move || copy.tables())
    }

    fn blame(&self, refused: &[&ObjectPath]) -> Vec<(usize, ObjectRef)> {
        let mut found = Vec::new();
        for (index, path) in refused.iter().enumerate() {
            let policies = match path {
                ObjectPath::Chain(table, chain) | ObjectPath::Rule(table, chain, _) => {
                    self.policies_of_chain(table, chain)
                }
                ObjectPath::Set(table, set) | ObjectPath::Element(table, set, ..) => {
                    self.policies_of_set(table, set)
                }
                ObjectPath::Table(_) | ObjectPath::Stray(..) | ObjectPath::Transaction => continue,
            };
            let policies = policies.into_iter();
            found.extend(policies.map(|name| (index, ObjectRef::new(Kind::NetworkPolicy, name))));
        }
        found
    }

    /// Compiles a policy that still isolates its pods but allows nothing.
    fn quarantine(&mut self, object: &ObjectRef) -> PolicyChanges {
        self.touched.policies.insert(object.name.clone());
        self.quarantined.insert(object.name.clone());
        self.compile();
        self.change(true)
    }

    fn retry_quarantined(&mut self) {
        self.touched.policies.append(&mut self.quarantined);
    }

    /// Addresses of departed pods expire.
    fn due(&self) -> Option<Instant> {
        self.inventory.departed_due().filter(|_| self.is_ready())
    }

    fn take_notices(&mut self) -> Vec<Notice> {
        self.take_place_notices()
    }
}
