//! The sets that policies share: pods by selector, address blocks, and named ports.
//!
//! A set is identified by what it stands for ([`Meaning`]), and named by a digest of that, so
//! that the same policies get the same names in every run. It exists in a table while a rule of
//! that table uses it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;
use smallvec::SmallVec;

use super::index::{Index, Namespaces, PodSelector};
use super::inventory::Inventory;
use super::layout::{digest_of, port_key};
use crate::model::{Family, Pod, Protocol};
use crate::ruleset::{Declaration, Element, Key, Name, Selector, Set, SetKind, merge_intervals};

/// What a set stands for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Meaning {
    /// The addresses of the pods that a selector selects.
    Pods(PodSelector),
    /// Addresses in networks, without others.
    Blocks(Vec<(IpNet, Vec<IpNet>)>),
    /// (address, protocol, port) of the pods that give a port a name.
    Port {
        /// The name.
        name: Arc<str>,
        /// The protocol.
        protocol: Protocol,
        /// Whether only pods of this node are in it: ingress asks for no others.
        local: bool,
    },
}

impl fmt::Display for Meaning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Meaning::Pods(PodSelector { namespaces, pods }) => match namespaces {
                Namespaces::Named(name) => write!(f, "pods {pods} in namespace {name}"),
                Namespaces::Labelled(labels) => write!(f, "pods {pods} in namespaces {labels}"),
            },
            Meaning::Blocks(blocks) => {
                f.write_str("blocks")?;
                for (block, except) in blocks {
                    write!(f, " {block}")?;
                    for (index, except) in except.iter().enumerate() {
                        write!(f, "{}{except}", if index == 0 { " except " } else { "," })?;
                    }
                }
                Ok(())
            }
            Meaning::Port {
                name,
                protocol,
                local,
            } => {
                let whose = if *local {
                    "pods of this node"
                } else {
                    "all pods"
                };
                write!(f, "port {name} ({protocol}) of {whose}")
            }
        }
    }
}

/// Identifies a set while it is in use.
pub(super) type SetId = u32;

/// An element that a pod brings to a set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Membership {
    pub family: Family,
    pub set: SetId,
    pub key: Key,
}

#[derive(Debug)]
struct Entry {
    meaning: Arc<Meaning>,
    name: Name,
    declaration: Arc<Declaration>,
    /// How many rules of either family's table use it.
    uses: [u32; 2],
}

/// All sets in use.
#[derive(Debug, Default)]
pub(super) struct Sets {
    entries: BTreeMap<SetId, Entry>,
    ids: HashMap<Arc<Meaning>, (SetId, Name)>,
    next: SetId,
    finder: Finder,
}

/// The sets of a named port, and whether only pods of this node are in them.
type PortSets = SmallVec<[(bool, SetId); 2]>;

/// Finds the sets that a pod belongs to.
#[derive(Debug, Default)]
struct Finder {
    selectors: Index<SetId>,
    ports: HashMap<(Arc<str>, Protocol), PortSets>,
}

impl Finder {
    fn insert(&mut self, id: SetId, meaning: &Meaning, inventory: &Inventory) {
        match meaning {
            Meaning::Pods(selector) => self.selectors.insert(id, selector, inventory.namespaces()),
            Meaning::Port {
                name,
                protocol,
                local,
            } => {
                let of_name = self.ports.entry((name.clone(), *protocol)).or_default();
                of_name.push((*local, id));
            }
            Meaning::Blocks(_) => {}
        }
    }

    fn remove(&mut self, id: SetId, meaning: &Meaning) {
        match meaning {
            Meaning::Pods(selector) => self.selectors.remove(&id, selector),
            Meaning::Port { name, protocol, .. } => {
                let of_name = (name.clone(), *protocol);
                if let Some(ids) = self.ports.get_mut(&of_name) {
                    ids.retain(|(_, known)| *known != id);
                    if ids.is_empty() {
                        self.ports.remove(&of_name);
                    }
                }
            }
            Meaning::Blocks(_) => {}
        }
    }

    /// Calls `found` with each element that a pod brings to a set.
    fn of_pod(&self, pod: &Pod, inventory: &Inventory, mut found: impl FnMut(Membership)) {
        if self.selectors.is_empty() && self.ports.is_empty() {
            return;
        }
        let addresses = inventory.addresses(pod);
        if addresses.is_empty() {
            return;
        }
        let namespace = pod.name.namespace();
        let of_namespace = inventory.namespace(namespace);
        self.selectors
            .of_pod(namespace, &of_namespace, &pod.labels, |set| {
                for address in &addresses {
                    found(Membership {
                        family: Family::of(*address),
                        set: *set,
                        key: Key::address(*address),
                    });
                }
            });
        if self.ports.is_empty() {
            return;
        }
        let is_local = inventory.is_local(pod);
        for port in pod.ports.iter() {
            let sets = self.ports.get(&(port.name.clone(), port.protocol));
            let sets = sets.into_iter().flatten();
            for (_, set) in sets.filter(|(local, _)| is_local || !local) {
                for address in &addresses {
                    let key = Key::build().address(*address);
                    found(Membership {
                        family: Family::of(*address),
                        set: *set,
                        key: key
                            .protocol(port.protocol.number())
                            .port(port.port)
                            .finish(),
                    });
                }
            }
        }
    }
}

fn index(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

impl Sets {
    /// The set of a meaning and its name, made if there is none yet.
    pub fn get(&mut self, meaning: Meaning, inventory: &Inventory) -> (SetId, Name) {
        if let Some((id, name)) = self.ids.get(&meaning) {
            return (*id, name.clone());
        }
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        self.finder.insert(id, &meaning, inventory);
        let meaning = Arc::new(meaning);
        let name = name(&meaning);
        self.ids.insert(meaning.clone(), (id, name.clone()));
        self.entries.insert(
            id,
            Entry {
                name: name.clone(),
                declaration: Arc::new(declaration(&meaning)),
                meaning,
                uses: [0, 0],
            },
        );
        (id, name)
    }

    /// A set without its elements.
    pub fn declared(&self, id: SetId) -> Option<(Name, Set)> {
        let entry = self.entries.get(&id)?;
        let set = Set {
            declaration: entry.declaration.clone(),
            elements: Vec::new(),
        };
        Some((entry.name.clone(), set))
    }

    /// Counts one more or one less use in a family's table. Returns how many there were before.
    pub fn count(&mut self, id: SetId, family: Family, more: bool) -> u32 {
        let Some(uses) = self
            .entries
            .get_mut(&id)
            .and_then(|entry| entry.uses.get_mut(index(family)))
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

    /// Whether a family's table uses a set.
    pub fn is_used(&self, id: SetId, family: Family) -> bool {
        let uses = self
            .entries
            .get(&id)
            .and_then(|entry| entry.uses.get(index(family)));
        uses.is_some_and(|uses| *uses > 0)
    }

    /// The sets that a family's table uses.
    pub fn used(&self, family: Family) -> impl Iterator<Item = SetId> {
        let ids = self.entries.keys().copied();
        ids.filter(move |id| self.is_used(*id, family))
    }

    /// Forgets a set that no table uses.
    pub fn sweep(&mut self, id: SetId) {
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
        self.ids.remove(&entry.meaning);
        self.finder.remove(id, &entry.meaning);
    }

    /// Notes that a namespace is new, has other labels, or is gone.
    pub fn namespace_changed(&mut self, name: &str, inventory: &Inventory) {
        let known = inventory.has_namespace(name);
        let labels = known.then(|| inventory.namespace(name));
        self.finder
            .selectors
            .namespace_changed(name, labels.as_ref());
    }

    /// The elements that a pod brings to sets, sorted.
    pub fn of_pod(&self, pod: &Pod, inventory: &Inventory) -> Vec<Membership> {
        let mut found = Vec::new();
        self.finder
            .of_pod(pod, inventory, |membership| found.push(membership));
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Calls `found` with the elements that all pods bring to some of the sets, in no order.
    ///
    /// Only pods that may be in one of them are looked at, and only for these sets.
    pub fn for_each_member(
        &self,
        ids: &[SetId],
        inventory: &Inventory,
        mut found: impl FnMut(Membership),
    ) {
        let mut finder = Finder::default();
        let mut namespaces: BTreeSet<&str> = BTreeSet::new();
        let (mut everywhere, mut local) = (false, false);
        for id in ids {
            let Some(entry) = self.entries.get(id) else {
                continue;
            };
            finder.insert(*id, &entry.meaning, inventory);
            match &*entry.meaning {
                Meaning::Pods(selector) => match &selector.namespaces {
                    Namespaces::Named(name) => {
                        namespaces.insert(name);
                    }
                    Namespaces::Labelled(labels) if labels.is_everything() => everywhere = true,
                    Namespaces::Labelled(labels) => {
                        let selected = inventory.namespaces().filter(|(_, of)| labels.matches(of));
                        namespaces.extend(selected.map(|(name, _)| name));
                    }
                },
                Meaning::Port { local: true, .. } => local = true,
                Meaning::Port { local: false, .. } => everywhere = true,
                Meaning::Blocks(_) => {}
            }
        }
        let mut look_at = |pod: &Pod| finder.of_pod(pod, inventory, &mut found);
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

    /// The elements that a set has whatever pods there are.
    pub fn fixed_elements(&self, id: SetId, family: Family) -> Vec<Element> {
        match self.entries.get(&id).map(|entry| &*entry.meaning) {
            Some(Meaning::Blocks(blocks)) => merge_intervals(remaining(blocks, family)),
            _ => Vec::new(),
        }
    }
}

/// The networks of a family that are in the blocks and in none of their exceptions.
pub(super) fn remaining(blocks: &[(IpNet, Vec<IpNet>)], family: Family) -> Vec<IpNet> {
    let of_family = blocks
        .iter()
        .filter(|(block, _)| Family::of(block.addr()) == family);
    let mut remaining = Vec::new();
    for (block, except) in of_family {
        subtract(block.trunc(), except, &mut remaining);
    }
    remaining
}

/// Splits a network until no part of it is both inside and outside of an exception.
fn subtract(network: IpNet, except: &[IpNet], remaining: &mut Vec<IpNet>) {
    if except.iter().any(|except| except.contains(&network)) {
        return;
    }
    if !except.iter().any(|except| network.contains(except)) {
        remaining.push(network);
        return;
    }
    if let Ok(halves) = network.subnets(network.prefix_len().saturating_add(1)) {
        for half in halves {
            subtract(half, except, remaining);
        }
    }
}

fn name(meaning: &Meaning) -> Name {
    let prefix = match meaning {
        Meaning::Pods(_) => "pods",
        Meaning::Blocks(_) => "blocks",
        Meaning::Port { .. } => "port",
    };
    // The text form is unambiguous only for what the API server admits; the digest must not
    // depend on that.
    Name::from(format!("{prefix}-{}", digest_of(&format!("{meaning:?}"))))
}

fn declaration(meaning: &Meaning) -> Declaration {
    let declaration = match meaning {
        Meaning::Pods(_) => Declaration::new(SetKind::Set, [Selector::SourceAddress]),
        Meaning::Blocks(_) => Declaration {
            interval: true,
            ..Declaration::new(SetKind::Set, [Selector::SourceAddress])
        },
        Meaning::Port { .. } => Declaration::new(SetKind::Set, port_key()),
    };
    declaration.comment(&meaning.to_string())
}

#[cfg(test)]
mod tests {
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
            block("fd00::/64", &[]),
        ];
        assert_eq!(
            remaining(&blocks, Family::V4),
            nets(&["10.0.0.0/32", "10.0.0.2/31"])
        );
        assert_eq!(remaining(&blocks, Family::V6), nets(&["fd00::/64"]));
        let host = [block("10.0.0.7/32", &["10.0.0.7/32"])];
        assert!(remaining(&host, Family::V4).is_empty());
    }
}
