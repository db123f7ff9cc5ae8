//! What changed in the rules of policies, for those that act once the rules are in force.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use crate::engine::Change;
use crate::model::ObjectName;

/// The isolated addresses of this node in order, with their pods as far as their objects exist.
pub(crate) type Isolated = Arc<[(IpAddr, Option<ObjectName>)]>;

/// Changes of policies that took effect.
#[derive(Clone, Debug, Default)]
pub struct PolicyChanges {
    /// The isolated addresses, if any rule changed.
    pub isolated: Option<Isolated>,
    /// Addresses with another pod than before.
    pub reassigned: BTreeSet<IpAddr>,
    /// The tables were compared with the kernel: other rules may have been in force for a while.
    pub rewritten: bool,
}

impl PolicyChanges {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.isolated.is_none() && self.reassigned.is_empty() && !self.rewritten
    }
}

impl Change for PolicyChanges {
    fn append(&mut self, mut later: Self) {
        self.isolated = later.isolated.or(self.isolated.take());
        self.reassigned.append(&mut later.reassigned);
        self.rewritten |= later.rewritten;
    }

    fn set_rewritten(&mut self) {
        self.rewritten = true;
    }
}
