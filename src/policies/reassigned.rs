//! Addresses that were reassigned from one pod to another.
//!
//! The rules accept packets of established connections. A connection that was established with a
//! deleted pod must not reach the pod that has its address now, so the follower that cuts
//! connections gets such addresses.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;

use crate::model::ObjectName;

/// The maximum number of free addresses to remember: as many as the usual IPv4 range of a cluster
/// has.
const MOST_FREE: usize = 1 << 16;

/// Collects reassigned addresses.
#[derive(Debug, Default)]
pub(super) struct ReassignedAddresses {
    reassigned: BTreeSet<IpAddr>,
    /// Addresses that a pod had and no pod has now.
    free: HashSet<IpAddr>,
    /// Whether too many became free to remember: any address may have belonged to another pod.
    overflowed: bool,
}

impl ReassignedAddresses {
    /// Records the pods that may have an address before and after a change. `arrived` says that a
    /// pod of this node got the address just now; its former pod may not be remembered.
    pub fn note(
        &mut self,
        address: IpAddr,
        before: Vec<ObjectName>,
        after: Vec<ObjectName>,
        arrived: bool,
    ) {
        if before == after {
            return;
        }
        if after.is_empty() {
            if !self.overflowed {
                self.free.insert(address);
            }
            if self.free.len() > MOST_FREE {
                self.overflowed = true;
                self.free = HashSet::new();
            }
            return;
        }
        let was_free = self.free.remove(&address) || self.overflowed;
        if was_free || !before.is_empty() || arrived {
            self.reassigned.insert(address);
        }
    }

    /// Removes and returns the reassigned addresses.
    pub fn take(&mut self) -> BTreeSet<IpAddr> {
        std::mem::take(&mut self.reassigned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_moves_when_another_pod_has_it() {
        let pod = |name| vec![ObjectName::new("shop", name)];
        let none = Vec::new;
        let ip = |last| IpAddr::from([10, 0, 0, last]);
        let mut addresses = ReassignedAddresses::default();
        addresses.note(ip(1), none(), pod("first"), false);
        assert!(addresses.take().is_empty(), "nobody had it before");
        addresses.note(ip(1), pod("first"), none(), false);
        assert!(addresses.take().is_empty(), "nobody has it now");
        addresses.note(ip(1), none(), pod("first"), false);
        assert_eq!(addresses.take(), [ip(1)].into(), "a pod of the same name");
        addresses.note(ip(1), pod("first"), pod("second"), false);
        assert_eq!(addresses.take(), [ip(1)].into(), "without a pause");
        addresses.note(ip(1), pod("second"), pod("second"), true);
        assert!(addresses.take().is_empty(), "the same pod");
        addresses.note(ip(2), none(), pod("here"), true);
        assert_eq!(addresses.take(), [ip(2)].into(), "on this node");
    }

    #[test]
    fn an_address_that_became_free_long_ago_moves_too() {
        let pod = || vec![ObjectName::new("shop", "web")];
        let ip = |number: usize| IpAddr::from(u32::try_from(number).unwrap().to_be_bytes());
        let mut addresses = ReassignedAddresses::default();
        addresses.note(ip(0), pod(), Vec::new(), false);
        // Others come and go: they count once while they are free, and not at all while they are not.
        for _ in 0..MOST_FREE {
            addresses.note(ip(1), pod(), Vec::new(), false);
            addresses.note(ip(1), Vec::new(), pod(), false);
        }
        assert_eq!(addresses.take(), [ip(1)].into());
        for number in 1..MOST_FREE {
            addresses.note(ip(number), pod(), Vec::new(), false);
        }
        addresses.note(ip(MOST_FREE), Vec::new(), pod(), false);
        assert!(addresses.take().is_empty(), "nobody had it before");
        // One more, and it is not known any longer who had what.
        addresses.note(ip(MOST_FREE), pod(), Vec::new(), false);
        for number in [0, MOST_FREE, MOST_FREE + 1] {
            addresses.note(ip(number), Vec::new(), pod(), false);
            assert_eq!(addresses.take(), [ip(number)].into());
        }
        assert!(addresses.free.is_empty(), "nothing more is remembered");
    }
}
