//! Which kinds were listed, and what a list that is being read has not brought up yet.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::{Kind, ObjectName, ObjectRef};

/// Keeps account of the complete lists that a source sends (see [`Event`](super::Event)).
#[derive(Debug, Default)]
pub struct Lists {
    complete: BTreeSet<Kind>,
    /// For a kind that is being listed: the known objects that did not come up yet.
    unseen: HashMap<Kind, HashSet<ObjectName>>,
}

impl Lists {
    /// A list of a kind begins; `known` are its objects so far.
    pub fn start(&mut self, kind: Kind, known: HashSet<ObjectName>) {
        self.unseen.insert(kind, known);
    }

    /// An object was applied or deleted.
    pub fn saw(&mut self, object: &ObjectRef) {
        if let Some(unseen) = self.unseen.get_mut(&object.kind) {
            unseen.remove(&object.name);
        }
    }

    /// The list is complete. Returns the known objects that were not in it: they are gone.
    pub fn complete(&mut self, kind: Kind) -> HashSet<ObjectName> {
        self.complete.insert(kind);
        self.unseen.remove(&kind).unwrap_or_default()
    }

    /// Whether a kind was listed completely once.
    pub fn is_complete(&self, kind: Kind) -> bool {
        self.complete.contains(&kind)
    }

    /// Whether a list of the kind is being read.
    pub fn is_open(&self, kind: Kind) -> bool {
        self.unseen.contains_key(&kind)
    }
}
