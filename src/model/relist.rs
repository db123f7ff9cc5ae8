//! Tracking of complete lists, so that objects missing from a new list are found.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::{Kind, ObjectName, ObjectRef};

/// Tracks the lists that a source sends (see [`Event`](super::Event)), by kind.
#[derive(Debug, Default)]
pub struct RelistTracker {
    complete: BTreeSet<Kind>,
    /// Known objects that the list being received has not contained so far.
    unseen: HashMap<Kind, HashSet<ObjectName>>,
}

impl RelistTracker {
    /// Starts a list of a kind; `known` holds the objects of earlier lists and changes.
    pub fn start(&mut self, kind: Kind, known: HashSet<ObjectName>) {
        self.unseen.insert(kind, known);
    }

    /// Records that an object was applied or deleted.
    pub fn observe(&mut self, object: &ObjectRef) {
        if let Some(unseen) = self.unseen.get_mut(&object.kind) {
            unseen.remove(&object.name);
        }
    }

    /// Ends the list. Returns the known objects that it did not contain, which no longer exist.
    pub fn complete(&mut self, kind: Kind) -> HashSet<ObjectName> {
        self.complete.insert(kind);
        self.unseen.remove(&kind).unwrap_or_default()
    }

    /// Returns whether a complete list of the kind was received.
    pub fn is_complete(&self, kind: Kind) -> bool {
        self.complete.contains(&kind)
    }

    /// Returns whether a list of the kind is being received.
    pub fn is_open(&self, kind: Kind) -> bool {
        self.unseen.contains_key(&kind)
    }
}
