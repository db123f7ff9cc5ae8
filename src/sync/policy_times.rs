//! Since when the rules of each policy are in force.

use std::collections::{BTreeSet, HashMap};
use std::time::SystemTime;

use crate::model::ObjectRef;

/// The time at which the last change of each policy took effect.
#[derive(Debug, Default)]
pub(crate) struct PolicyTimes(HashMap<ObjectRef, SystemTime>);

impl PolicyTimes {
    /// Records that changes of policies are in force since `now`. Those that are not accepted, because
    /// they were deleted or refused, are forgotten.
    pub(super) fn record(
        &mut self,
        changed: BTreeSet<ObjectRef>,
        is_accepted: impl Fn(&ObjectRef) -> bool,
        now: SystemTime,
    ) {
        for policy in changed {
            if is_accepted(&policy) {
                self.0.insert(policy, now);
            } else {
                self.0.remove(&policy);
            }
        }
    }

    pub(super) fn get(&self, policy: &ObjectRef) -> Option<SystemTime> {
        self.0.get(policy).copied()
    }
}
