//! The known nodes, for peers that select nodes.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::engine::SharedMap;
use crate::model::{LabelSelector, Labels, Node, ObjectName};

/// The labels and addresses of the known nodes. A copy shares them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Nodes {
    all: SharedMap<ObjectName, Arc<KnownNode>>,
    /// The nodes with an address; in a copy there are none.
    with_address: HashMap<IpAddr, BTreeSet<ObjectName>>,
}

/// What is known of a node.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct KnownNode {
    pub labels: Labels,
    pub addresses: Arc<[IpAddr]>,
}

impl Nodes {
    /// Returns a copy that shares the nodes and cannot find them by their addresses.
    pub fn without_index(&self) -> Self {
        Self {
            all: self.all.clone(),
            with_address: HashMap::new(),
        }
    }

    pub fn get(&self, name: &ObjectName) -> Option<&KnownNode> {
        self.all.get(name).map(|node| &**node)
    }

    /// Returns the names of all nodes, in no order.
    pub fn names(&self) -> impl Iterator<Item = &ObjectName> {
        self.all.keys()
    }

    /// Returns the names of all nodes.
    pub fn name_set(&self) -> HashSet<ObjectName> {
        self.names().cloned().collect()
    }

    /// Returns whether a node is known with the same labels and addresses.
    pub fn knows(&self, node: &Node) -> bool {
        let known = self.get(&ObjectName::new("", &node.name));
        known.is_some_and(|it| it.labels == node.labels && it.addresses == node.addresses)
    }

    /// Returns the nodes with one of some addresses.
    pub fn having(&self, addresses: &[IpAddr]) -> impl Iterator<Item = &ObjectName> {
        let found = addresses.iter().filter_map(|it| self.with_address.get(it));
        found.flatten()
    }

    /// Returns whether a node with an address is selected by its labels.
    pub fn selected(&self, labels: &LabelSelector, address: IpAddr) -> bool {
        let names = self.with_address.get(&address).into_iter().flatten();
        let mut nodes = names.filter_map(|name| self.get(name));
        nodes.any(|node| labels.matches(&node.labels))
    }

    /// Replaces a node; `None` deletes it.
    pub fn set(&mut self, name: &ObjectName, node: Option<&Node>) {
        if let Some(old) = self.all.remove(name) {
            for address in old.addresses.iter() {
                if let Some(names) = self.with_address.get_mut(address) {
                    names.remove(name);
                    if names.is_empty() {
                        self.with_address.remove(address);
                    }
                }
            }
        }
        let Some(node) = node else {
            return;
        };
        for address in node.addresses.iter() {
            let names = self.with_address.entry(*address).or_default();
            names.insert(name.clone());
        }
        let known = KnownNode {
            labels: node.labels.clone(),
            addresses: node.addresses.clone(),
        };
        self.all.insert(name.clone(), Arc::new(known));
    }
}
