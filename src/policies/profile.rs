//! The profile of a pod: the policies that apply to its traffic in one direction.
//!
//! Pods with the same profile share a chain, so that a policy that selects all pods of the node
//! adds one chain and moves their addresses there.

use crate::model::ObjectName;
use crate::nft::{Name, digest_of};

use super::layout::Direction;

/// The policies that apply to a pod in one direction.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Profile {
    /// Equal profiles have the same digest in every run.
    digest: String,
    /// The policies that select the pod for the direction, sorted.
    pub policies: Vec<ObjectName>,
}

impl Profile {
    /// Creates a profile of sorted policies. Without any it denies everything.
    pub fn new(policies: Vec<ObjectName>) -> Self {
        Self {
            digest: digest_of(&format!("{policies:?}")),
            policies,
        }
    }

    /// Returns the name of the chain of all pods with this profile.
    pub fn chain(&self, direction: Direction) -> Name {
        direction.pods_chain(&self.digest)
    }
}
