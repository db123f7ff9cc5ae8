//! The sets that policies share: pods and nodes by selector, address blocks, and named ports.
//!
//! A set is identified by its specification ([`SetSpec`]) and named by a digest of it, so that the
//! same policies get the same names in every run. It exists in a table while a rule of that table
//! uses it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use smallvec::SmallVec;

use super::index::{Index, Namespaces};
use super::inventory::Inventory;
use super::spec::{AddressScope, SetSpec, declaration, fixed_elements, name};
use crate::model::{Family, Kind, LabelSelector, Labels, ObjectRef, Pod, Protocol};
use crate::nft::{Declaration, Element, Key, Name, Set};

/// The identifier of a set while it is in use.
pub(super) type SetId = u32;

/// An element of a set that comes from a pod or a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Member {
    pub family: Family,
    pub set: SetId,
    pub key: Key,
}

#[derive(Clone, Debug)]
struct SetEntry {
    spec: Arc<SetSpec>,
    name: Name,
    declaration: Arc<Declaration>,
    /// The elements that do not depend on pods or nodes.
    fixed: Arc<[Element]>,
    /// The number of chains in each family's table that use it.
    uses: [u32; 2],
}

/// All sets in use.
#[derive(Debug, Default)]
pub(super) struct Sets {
    entries: BTreeMap<SetId, SetEntry>,
    ids: HashMap<Arc<SetSpec>, (SetId, Name)>,
    next: SetId,
    index: SetIndex,
}

/// The sets of a named port.
type PortSets = SmallVec<[(AddressScope, SetId); 2]>;

/// Finds the sets that a pod or a node belongs to.
#[derive(Debug, Default)]
struct SetIndex {
    pods: Index<SetId>,
    /// Sets of pods, with addresses that they only may have.
    claimants: Index<SetId>,
    ports: HashMap<(Arc<str>, Protocol), PortSets>,
    nodes: BTreeMap<SetId, LabelSelector>,
}

impl SetIndex {
    fn insert(&mut self, id: SetId, spec: &SetSpec, inventory: &Inventory) {
        match spec {
            SetSpec::Pods(selector) => self.pods.insert(id, selector, inventory.namespaces()),
            SetSpec::Claimants(selector) => {
                self.claimants.insert(id, selector, inventory.namespaces());
            }
            SetSpec::Nodes(labels) => {
                self.nodes.insert(id, labels.clone());
            }
            SetSpec::NamedPorts { ports, local } | SetSpec::ClaimedPorts { ports, local } => {
                let scope = AddressScope {
                    local: *local,
                    claimed: matches!(spec, SetSpec::ClaimedPorts { .. }),
                };
                for port in ports {
                    let of_name = self.ports.entry(port.clone()).or_default();
                    of_name.push((scope, id));
                }
            }
            SetSpec::Blocks(_) | SetSpec::Ports(..) => {}
        }
    }

    fn remove(&mut self, id: SetId, spec: &SetSpec) {
        match spec {
            SetSpec::Pods(selector) => self.pods.remove(&id, selector),
            SetSpec::Claimants(selector) => self.claimants.remove(&id, selector),
            SetSpec::Nodes(_) => {
                self.nodes.remove(&id);
            }
            SetSpec::NamedPorts { ports, .. } | SetSpec::ClaimedPorts { ports, .. } => {
                for of_name in ports {
                    if let Some(ids) = self.ports.get_mut(of_name) {
                        ids.retain(|(_, known)| *known != id);
                        if ids.is_empty() {
                            self.ports.remove(of_name);
                        }
                    }
                }
            }
            SetSpec::Blocks(_) | SetSpec::Ports(..) => {}
        }
    }

    /// Calls `found` with each set element of a pod or node.
    fn of(&self, object: &ObjectRef, inventory: &Inventory, found: &mut impl FnMut(Member)) {
        if object.kind == Kind::Node {
            self.of_node(object, inventory, found);
            return;
        }
        if let Some(pod) = inventory.pod(&object.name) {
            self.of_pod(pod, inventory, found);
        }
        if self.claimants.is_empty() && self.ports.is_empty() {
            return;
        }
        for (address, pod) in inventory.departed_named(&object.name) {
            self.of_departed(address, pod, inventory, found);
        }
    }

    fn of_node(&self, node: &ObjectRef, inventory: &Inventory, found: &mut impl FnMut(Member)) {
        let Some(node) = inventory.nodes().get(&node.name) else {
            return;
        };
        let sets = self.nodes.iter();
        for (set, _) in sets.filter(|(_, labels)| labels.matches(&node.labels)) {
            for address in node.addresses.iter() {
                found(Member {
                    family: Family::of(*address),
                    set: *set,
                    key: Key::address(*address),
                });
            }
        }
    }

    fn of_pod(&self, pod: &Pod, inventory: &Inventory, found: &mut impl FnMut(Member)) {
        let addresses = |scope| inventory.addresses(pod, scope);
        self.with_addresses(pod, inventory, addresses, found);
    }

    /// A departed pod only may have its address.
    fn of_departed(
        &self,
        address: IpAddr,
        pod: &Pod,
        inventory: &Inventory,
        found: &mut impl FnMut(Member),
    ) {
        let addresses =
            |scope: AddressScope| scope.claimed.then_some(address).into_iter().collect();
        self.with_addresses(pod, inventory, addresses, found);
    }

    fn with_addresses(
        &self,
        pod: &Pod,
        inventory: &Inventory,
        addresses: impl Fn(AddressScope) -> SmallVec<[IpAddr; 2]>,
        found: &mut impl FnMut(Member),
    ) {
        for (selectors, claimed) in [(&self.pods, false), (&self.claimants, true)] {
            if selectors.is_empty() {
                continue;
            }
            let local = false;
            let addresses = addresses(AddressScope { local, claimed });
            if addresses.is_empty() {
                continue;
            }
            let namespace = pod.name.namespace();
            let of_namespace = inventory.namespace(namespace);
            selectors.of_pod(namespace, &of_namespace, &pod.labels, |set| {
                for address in &addresses {
                    found(Member {
                        family: Family::of(*address),
                        set: *set,
                        key: Key::address(*address),
                    });
                }
            });
        }
        if self.ports.is_empty() {
            return;
        }
        // Two names of one port are one element.
        let mut ports: Vec<(AddressScope, SetId, Protocol, u16)> = Vec::new();
        for port in pod.ports.iter() {
            let sets = self.ports.get(&(port.name.clone(), port.protocol));
            let sets = sets.into_iter().flatten();
            ports.extend(sets.map(|(scope, set)| (*scope, *set, port.protocol, port.port)));
        }
        ports.sort_unstable();
        ports.dedup();
        for of_scope in ports.chunk_by(|a, b| a.0 == b.0) {
            let addresses = of_scope.first().map(|(scope, ..)| addresses(*scope));
            for address in addresses.into_iter().flatten() {
                for (_, set, protocol, port) in of_scope {
                    let key = Key::build().address(address);
                    found(Member {
                        family: Family::of(address),
                        set: *set,
                        key: key.protocol(protocol.number()).port(*port).finish(),
                    });
                }
            }
        }
    }
}

fn place_of(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

impl Sets {
    /// Returns a copy that cannot find the sets of a specification or of a pod.
    pub(crate) fn without_indexes(&self) -> Self {
        Self {
            entries: self.entries.clone(),
            ..Self::default()
        }
    }

    /// Returns the set of a specification and its name, and creates it if necessary.
    pub fn get(&mut self, spec: SetSpec, inventory: &Inventory) -> (SetId, Name) {
        if let Some((id, name)) = self.ids.get(&spec) {
            return (*id, name.clone());
        }
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        self.index.insert(id, &spec, inventory);
        let spec = Arc::new(spec);
        let name = name(&spec);
        self.ids.insert(spec.clone(), (id, name.clone()));
        self.entries.insert(
            id,
            SetEntry {
                name: name.clone(),
                declaration: Arc::new(declaration(&spec)),
                fixed: fixed_elements(&spec).into(),
                spec,
                uses: [0, 0],
            },
        );
        (id, name)
    }

    /// Returns name and declaration of a set.
    pub fn declared(&self, id: SetId) -> Option<(Name, Set)> {
        let entry = self.entries.get(&id)?;
        let set = Set {
            declaration: entry.declaration.clone(),
            elements: Vec::new(),
        };
        Some((entry.name.clone(), set))
    }

    /// Increments or decrements the uses of a set in a family's table. Returns the number before.
    pub fn count(&mut self, id: SetId, family: Family, more: bool) -> u32 {
        let Some(uses) = self
            .entries
            .get_mut(&id)
            .and_then(|entry| entry.uses.get_mut(place_of(family)))
        else {
            return 0;
        };
        let before = *uses;
        *uses = if more {
            before.saturating_add(1)
        } else {
            before.saturating_sub(1)
        };
        before
    }

    /// Returns whether a family's table uses a set.
    pub(crate) fn is_used(&self, id: SetId, family: Family) -> bool {
        let uses = self
            .entries
            .get(&id)
            .and_then(|entry| entry.uses.get(place_of(family)));
        uses.is_some_and(|uses| *uses > 0)
    }

    /// Returns the sets that a family's table uses.
    pub fn used(&self, family: Family) -> impl Iterator<Item = SetId> {
        let ids = self.entries.keys().copied();
        ids.filter(move |id| self.is_used(*id, family))
    }

    /// Forgets a set that no table uses.
    pub(crate) fn sweep(&mut self, id: SetId) {
        let unused = self
            .entries
            .get(&id)
            .is_some_and(|entry| entry.uses == [0, 0]);
        if !unused {
            return;
        }
        let Some(entry) = self.entries.remove(&id) else {
            return;
        };
        self.ids.remove(&entry.spec);
        self.index.remove(id, &entry.spec);
    }

    /// Returns whether some set contains pods of a namespace with only one of two sets of labels.
    pub(crate) fn distinguish(&self, before: &Labels, after: &Labels) -> bool {
        let of_pods = [&self.index.pods, &self.index.claimants];
        of_pods
            .into_iter()
            .any(|selectors| selectors.distinguishes(before, after))
    }

    /// Updates the index after a namespace was created, got other labels, or was deleted.
    pub(crate) fn namespace_changed(&mut self, name: &str, inventory: &Inventory) {
        let known = inventory.has_namespace(name);
        let labels = known.then(|| inventory.namespace(name));
        for selectors in [&mut self.index.pods, &mut self.index.claimants] {
            selectors.namespace_changed(name, labels.as_ref());
        }
    }

    /// Returns the set elements of a pod or a node, sorted.
    pub fn of(&self, object: &ObjectRef, inventory: &Inventory) -> Vec<Member> {
        let mut found = Vec::new();
        self.index
            .of(object, inventory, &mut |member| found.push(member));
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Calls `found` with the elements of all pods and nodes in some of the sets, in no order; an
    /// element that several of them have more than once.
    ///
    /// It examines only pods that may be in one of these sets.
    pub(crate) fn for_each_member(
        &self,
        ids: &[SetId],
        inventory: &Inventory,
        mut found: impl FnMut(Member),
    ) {
        let mut index = SetIndex::default();
        let mut namespaces: BTreeSet<&str> = BTreeSet::new();
        let (mut everywhere, mut local) = (false, false);
        for id in ids {
            let Some(entry) = self.entries.get(id) else {
                continue;
            };
            index.insert(*id, &entry.spec, inventory);
            match &*entry.spec {
                SetSpec::Pods(selector) | SetSpec::Claimants(selector) => {
                    match &selector.namespaces {
                        Namespaces::Named(name) => {
                            namespaces.insert(name);
                        }
                        Namespaces::Labelled(labels) if labels.is_everything() => everywhere = true,
                        Namespaces::Labelled(labels) => {
                            let all = inventory.namespaces();
                            let selected = all.filter(|(_, of)| labels.matches(of));
                            namespaces.extend(selected.map(|(name, _)| name));
                        }
                    }
                }
                SetSpec::NamedPorts { local: true, .. }
                | SetSpec::ClaimedPorts { local: true, .. } => local = true,
                SetSpec::NamedPorts { local: false, .. }
                | SetSpec::ClaimedPorts { local: false, .. } => everywhere = true,
                SetSpec::Nodes(_) | SetSpec::Blocks(_) | SetSpec::Ports(..) => {}
            }
        }
        if !index.nodes.is_empty() {
            for name in inventory.nodes().names() {
                let node = ObjectRef::new(Kind::Node, name.clone());
                index.of_node(&node, inventory, &mut found);
            }
        }
        for (address, pod) in inventory.all_departed() {
            index.of_departed(address, pod, inventory, &mut found);
        }
        let mut look_at = |pod: &Pod| index.of_pod(pod, inventory, &mut found);
        if everywhere {
            inventory.pods().for_each(look_at);
            return;
        }
        let pods = namespaces.iter().flat_map(|name| inventory.pods_of(name));
        pods.for_each(&mut look_at);
        if local {
            let pods = inventory.local().filter_map(|name| inventory.pod(name));
            let others = pods.filter(|pod| !namespaces.contains(pod.name.namespace()));
            others.for_each(look_at);
        }
    }

    /// Returns the elements of a set that do not depend on pods or nodes.
    pub(crate) fn fixed_elements(&self, id: SetId) -> Vec<Element> {
        let entry = self.entries.get(&id);
        entry.map_or_else(Vec::new, |entry| entry.fixed.to_vec())
    }

    pub fn named(&self, name: &Name) -> Option<SetId> {
        let mut entries = self.entries.iter();
        let found = entries.find(|(_, entry)| entry.name == *name);
        found.map(|(id, _)| *id)
    }
}
