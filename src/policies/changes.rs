//! Changes in the rules of network policies, for followers.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use crate::engine::Change;
use crate::model::{ObjectName, ObjectRef};

/// The isolated addresses of this node, sorted, each with its pod if the Pod object exists.
pub(crate) type Isolated = Arc<[(IpAddr, Option<ObjectName>)]>;

/// The changes of an update.
#[derive(Clone, Debug, Default)]
pub struct PolicyChanges {
    /// Whether any rule changed.
    pub rules: bool,
    /// All isolated addresses, if they or their policies changed.
    pub isolated: Option<Isolated>,
    /// Addresses that may belong to another pod than before.
    pub reassigned: BTreeSet<IpAddr>,
    /// The policies that were changed, deleted ones included.
    pub policies: BTreeSet<ObjectRef>,
    /// Whether the tables were compared with the kernel: other rules may have been in force before.
    pub rewritten: bool,
}

impl PolicyChanges {
    /// Returns whether no rule changed.
    pub fn is_empty(&self) -> bool {
        !self.rules && self.isolated.is_none() && self.reassigned.is_empty() && !self.rewritten
    }
}

impl Change for PolicyChanges {
    fn append(&mut self, mut later: Self) {
        self.rules |= later.rules;
        self.isolated = later.isolated.or(self.isolated.take());
        self.reassigned.append(&mut later.reassigned);
        self.policies.append(&mut later.policies);
        self.rewritten |= later.rewritten;
    }

    fn set_rewritten(&mut self) {
        self.rewritten = true;
    }
}
