//! The plan of an isolated address.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::layout::Direction;
use super::profile::Profile;
use crate::model::ObjectName;

/// An isolated address of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Isolation {
    /// For each direction in which it is isolated, the pods that may have the address. Traffic must
    /// be allowed by the policies of each of them.
    pub holders: BTreeMap<Direction, Vec<Holder>>,
}

impl Isolation {
    /// Returns whether a policy of a holder is enforced; else they are audited.
    pub fn is_enforced(&self) -> bool {
        let mut holders = self.holders.values().flatten();
        holders.any(|holder| holder.profile.is_enforced())
    }
}

/// A pod that may have an isolated address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub pod: ObjectName,
    /// Whether its object was deleted while it ran.
    pub departed: bool,
    /// The policies that select it for the direction.
    pub profile: Arc<Profile>,
}
