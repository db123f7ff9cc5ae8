//! Changes in the rules of network policies, for followers.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::layout::Direction;
use crate::engine::Change;
use crate::model::{ObjectName, ObjectRef};
use crate::nft::Name;

/// The isolated addresses of this node, sorted, each with its pod if the Pod object exists.
pub(crate) type Isolated = Arc<[(IpAddr, Option<ObjectName>)]>;

/// The addresses of this node with audited policies.
pub(crate) type Audited = Arc<[AuditedAddress]>;

/// An address of this node with policies that would deny in a direction, were they enforced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AuditedAddress {
    pub address: IpAddr,
    pub direction: Direction,
    /// The pod.
    pub pod: ObjectName,
    /// The set whose element for the address counts what the policies would deny.
    pub set: Name,
    /// The policies.
    pub policies: Vec<ObjectName>,
}

/// The changes of an update.
#[derive(Clone, Debug, Default)]
pub struct PolicyChanges {
    /// Whether any rule changed.
    pub rules: bool,
    /// All isolated addresses, if they or their policies changed.
    pub isolated: Option<Isolated>,
    /// All addresses with audited policies, if they or their policies changed.
    pub(crate) audited: Option<Audited>,
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
        self.audited = later.audited.or(self.audited.take());
        self.reassigned.append(&mut later.reassigned);
        self.policies.append(&mut later.policies);
        self.rewritten |= later.rewritten;
    }

    fn set_rewritten(&mut self) {
        self.rewritten = true;
    }
}
