//! The sets that policies share: pods by selector, address blocks, and named ports.
//!
//! A set is identified by its specification ([`SetSpec`]) and named by a digest of it, so that the
//! same policies get the same names in every run. It exists in a table while a rule of that table
//! uses it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;
use smallvec::SmallVec;

use super::index::{Index, Namespaces, PodSelector};
use super::inventory::Inventory;
use super::layout::port_key;
use crate::model::{Family, Labels, Pod, Protocol};
use crate::nft::{
    Declaration, Element, Key, Name, Selector, Set, SetKind, digest_of, merge_intervals,
};

/// The specification of a set: the elements that it contains.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum SetSpec {
    /// The addresses of the pods that a selector selects.
    Pods(PodSelector),
    /// The addresses in networks, each without its exceptions.
    Blocks(Vec<(IpNet, Vec<IpNet>)>),
    /// Ports of a protocol, in sorted, disjoint ranges. A set of (protocol, range) for all
    /// protocols would be a concatenation with an interval, which the kernel fills in quadratic
    /// time.
    Ports(Protocol, Vec<PortRange>),
    /// (address, protocol, port) of the named ports of pods.
    NamedPorts {
        /// The names with their protocols.
        ports: Vec<(Arc<str>, Protocol)>,
        /// Whether only pods of this node are in it; ingress needs no others.
        local: bool,
    },
}

/// First and last port of a range.
pub(super) type PortRange = (u16, u16);

impl fmt::Display for SetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SetSpec::Pods(PodSelector { namespaces, pods }) => match namespaces {
                Namespaces::Named(name) => write!(f, "pods {pods} in namespace {name}"),
                Namespaces::Labelled(labels) => write!(f, "pods {pods} in namespaces {labels}"),
            },
            SetSpec::Blocks(blocks) => {
                f.write_str("blocks")?;
                for (block, except) in blocks {
                    write!(f, " {block}")?;
                    for (index, except) in except.iter().enumerate() {
                        write!(f, "{}{except}", if index == 0 { " except " } else { "," })?;
                    }
                }
                Ok(())
            }
            SetSpec::Ports(protocol, ranges) => {
                write!(f, "{protocol} ports")?;
                for (from, to) in ranges {
                    write!(f, " {from}")?;
                    if from != to {
                        write!(f, "-{to}")?;
                    }
                }
                Ok(())
            }
            SetSpec::NamedPorts { ports, local } => {
                f.write_str("ports")?;
                for (name, protocol) in ports {
                    write!(f, " {name} ({protocol})")?;
                }
                f.write_str(if *local {
                    " of pods of this node"
                } else {
                    " of all pods"
                })
            }
        }
    }
}

/// The identifier of a set while it is in use.
pub(super) type SetId = u32;

/// An element of a set that belongs to a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PodElement {
    pub family: Family,
    pub set: SetId,
    pub key: Key,
}

#[derive(Clone, Debug)]
struct SetEntry {
    spec: Arc<SetSpec>,
    name: Name,
    declaration: Arc<Declaration>,
    /// The elements that do not depend on pods.
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

/// The sets of a named port, with whether they contain only pods of this node.
type PortSets = SmallVec<[(bool, SetId); 2]>;

/// Finds the sets that a pod belongs to.
#[derive(Debug, Default)]
struct SetIndex {
    selectors: Index<SetId>,
    ports: HashMap<(Arc<str>, Protocol), PortSets>,
}

impl SetIndex {
    fn insert(&mut self, id: SetId, spec: &SetSpec, inventory: &Inventory) {
        match spec {
            SetSpec::Pods(selector) => self.selectors.insert(id, selector, inventory.namespaces()),
            SetSpec::NamedPorts { ports, local } => {
                for port in ports {
                    let of_name = self.ports.entry(port.clone()).or_default();
                    of_name.push((*local, id));
                }
            }
            SetSpec::Blocks(_) | SetSpec::Ports(..) => {}
        }
    }

    fn remove(&mut self, id: SetId, spec: &SetSpec) {
        match spec {
            SetSpec::Pods(selector) => self.selectors.remove(&id, selector),
            SetSpec::NamedPorts { ports, .. } => {
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

    /// Calls `found` with each set element of a pod.
    fn of_pod(&self, pod: &Pod, inventory: &Inventory, mut found: impl FnMut(PodElement)) {
        if self.selectors.is_empty() && self.ports.is_empty() {
            return;
        }
        let addresses = inventory.addresses(pod);
        if !addresses.is_empty() {
            let namespace = pod.name.namespace();
            let of_namespace = inventory.namespace(namespace);
            self.selectors
                .of_pod(namespace, &of_namespace, &pod.labels, |set| {
                    for address in &addresses {
                        found(PodElement {
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
        let of_this_node = inventory.local_addresses(pod);
        // Two names of one port are one element.
        let mut ports: Vec<(SetId, bool, Protocol, u16)> = Vec::new();
        for port in pod.ports.iter() {
            let sets = self.ports.get(&(port.name.clone(), port.protocol));
            let sets = sets.into_iter().flatten();
            ports.extend(sets.map(|(local, set)| (*set, *local, port.protocol, port.port)));
        }
        ports.sort_unstable();
        ports.dedup();
        for (set, local, protocol, port) in ports {
            for address in if local { &of_this_node } else { &addresses } {
                let key = Key::build().address(*address);
                found(PodElement {
                    family: Family::of(*address),
                    set,
                    key: key.protocol(protocol.number()).port(port).finish(),
                });
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
        self.index.selectors.distinguishes(before, after)
    }

    /// Updates the index after a namespace was created, got other labels, or was deleted.
    pub(crate) fn namespace_changed(&mut self, name: &str, inventory: &Inventory) {
        let known = inventory.has_namespace(name);
        let labels = known.then(|| inventory.namespace(name));
        self.index
            .selectors
            .namespace_changed(name, labels.as_ref());
    }

    /// Returns the set elements of a pod, sorted.
    pub fn of_pod(&self, pod: &Pod, inventory: &Inventory) -> Vec<PodElement> {
        let mut found = Vec::new();
        self.index
            .of_pod(pod, inventory, |element| found.push(element));
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Calls `found` with the elements of all pods in some of the sets, in no order.
    ///
    /// It examines only pods that may be in one of these sets.
    pub(crate) fn for_each_member(
        &self,
        ids: &[SetId],
        inventory: &Inventory,
        mut found: impl FnMut(PodElement),
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
                SetSpec::Pods(selector) => match &selector.namespaces {
                    Namespaces::Named(name) => {
                        namespaces.insert(name);
                    }
                    Namespaces::Labelled(labels) if labels.is_everything() => everywhere = true,
                    Namespaces::Labelled(labels) => {
                        let selected = inventory.namespaces().filter(|(_, of)| labels.matches(of));
                        namespaces.extend(selected.map(|(name, _)| name));
                    }
                },
                SetSpec::NamedPorts { local: true, .. } => local = true,
                SetSpec::NamedPorts { local: false, .. } => everywhere = true,
                SetSpec::Blocks(_) | SetSpec::Ports(..) => {}
            }
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

    /// Returns the elements of a set that do not depend on pods.
    pub(crate) fn fixed_elements(&self, id: SetId) -> Vec<Element> {
        let entry = self.entries.get(&id);
        entry.map_or_else(Vec::new, |entry| entry.fixed.to_vec())
    }

    /// Returns the set with a name.
    pub fn named(&self, name: &Name) -> Option<SetId> {
        let mut entries = self.entries.iter();
        let found = entries.find(|(_, entry)| entry.name == *name);
        found.map(|(id, _)| *id)
    }
}

fn fixed_elements(spec: &SetSpec) -> Vec<Element> {
    match spec {
        SetSpec::Blocks(blocks) => merge_intervals(remaining(blocks)),
        SetSpec::Ports(_, ranges) => {
            let key = |port| Key::build().port(port).finish();
            let is_interval = has_ranges(ranges);
            let elements = ranges.iter().map(|(from, to)| Element {
                key_end: is_interval.then(|| Box::new(key(*to))),
                ..Element::new(key(*from))
            });
            elements.collect()
        }
        SetSpec::Pods(_) | SetSpec::NamedPorts { .. } => Vec::new(),
    }
}

fn has_ranges(ranges: &[PortRange]) -> bool {
    ranges.iter().any(|(from, to)| from != to)
}

/// Returns the networks of the blocks, each without its own exceptions.
fn remaining(blocks: &[(IpNet, Vec<IpNet>)]) -> Vec<IpNet> {
    let mut remaining = Vec::new();
    for (block, except) in blocks {
        // Sorted and disjoint, so that those inside of a network are adjacent.
        let except = IpNet::aggregate(&except.iter().map(IpNet::trunc).collect());
        subtract(block.trunc(), &except, &mut remaining);
    }
    remaining
}

/// Splits a network until each part is completely inside or outside of an exception.
fn subtract(network: IpNet, except: &[IpNet], remaining: &mut Vec<IpNet>) {
    let (first, last) = (network.network(), network.broadcast());
    let from = except.partition_point(|net| net.broadcast() < first);
    let to = except.partition_point(|net| net.network() <= last);
    let Some(inside @ [one, ..]) = except.get(from..to) else {
        remaining.push(network);
        return;
    };
    if one.contains(&network) {
        return;
    }
    if let Ok(halves) = network.subnets(network.prefix_len().saturating_add(1)) {
        for half in halves {
            subtract(half, inside, remaining);
        }
    }
}

fn name(spec: &SetSpec) -> Name {
    let prefix = match spec {
        SetSpec::Pods(_) => "pods",
        SetSpec::Blocks(_) => "blocks",
        SetSpec::Ports(..) => "ports",
        SetSpec::NamedPorts { .. } => "named-ports",
    };
    // The printed form is ambiguous for names that the API server would refuse, but files can
    // contain.
    Name::from(format!("{prefix}-{}", digest_of(&format!("{spec:?}"))))
}

fn declaration(spec: &SetSpec) -> Declaration {
    let declaration = match spec {
        SetSpec::Pods(_) => Declaration::new(SetKind::Set, [Selector::SourceAddress]),
        SetSpec::Blocks(_) => Declaration {
            interval: true,
            ..Declaration::new(SetKind::Set, [Selector::SourceAddress])
        },
        SetSpec::Ports(_, ranges) => Declaration {
            interval: has_ranges(ranges),
            ..Declaration::new(SetKind::Set, [Selector::DestinationPort])
        },
        SetSpec::NamedPorts { .. } => Declaration::new(SetKind::Set, port_key()),
    };
    declaration.comment(&spec.to_string())
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn exceptions_are_cut_out() {
        let block = |net: &str, except: &[&str]| (net.parse().unwrap(), nets(except));
        let blocks = [
            block("10.0.0.0/30", &["10.0.0.1/32"]),
            block("192.168.0.0/24", &["192.168.0.0/24"]),
            block("172.16.0.0/31", &["172.16.0.0/32", "172.0.0.0/8"]),
            block("fd00::/64", &[]),
        ];
        assert_eq!(
            remaining(&blocks),
            nets(&["10.0.0.0/32", "10.0.0.2/31", "fd00::/64"])
        );
        let host = [block("10.0.0.7/32", &["10.0.0.7/32"])];
        assert!(remaining(&host).is_empty());
        let nested = [block(
            "10.0.0.0/29",
            &["10.0.0.0/30", "10.0.0.1/32", "10.0.0.7/32"],
        )];
        assert_eq!(remaining(&nested), nets(&["10.0.0.4/31", "10.0.0.6/32"]));
    }

    #[test]
    fn the_cost_of_exceptions_grows_with_their_number() {
        // Every second address: nothing can be joined. Pair by pair this would be 10^10 steps.
        let hosts = (0..100_000u32).map(|host| 0x0a00_0000 + 2 * host);
        let except: Vec<IpNet> = hosts
            .map(|host| IpNet::from(IpAddr::V4(host.into())))
            .collect();
        let block = ("10.0.0.0/8".parse().unwrap(), except);
        let left = merge_intervals(remaining(&[block]));
        assert_eq!(left.len(), 100_000);
    }
}
