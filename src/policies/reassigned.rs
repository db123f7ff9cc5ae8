//! Addresses that went from one pod to another.
//!
//! Rules let a connection pass once it is established. What was established with a pod that is gone
//! must not reach the one that has its address now, so whoever follows the rules is told of such an
//! address and looks at its connections.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;

use crate::model::ObjectName;

/// The most addresses that are remembered after their pods went: as many as a cluster with the usual
/// range of IPv4 addresses has.
const MOST_FREE: usize = 1 << 16;

/// Collects such addresses.
#[derive(Debug, Default)]
pub(super) struct ReassignedAddresses {
    reassigned: BTreeSet<IpAddr>,
    /// Those that a pod had and none has now.
    free: HashSet<IpAddr>,
    /// More became free than are remembered: any address may have been another pod's.
    overflowed: bool,
}

impl ReassignedAddresses {
    /// Notes which pods may have an address before and after a change. `arrived` says that it is one of a pod
    /// that came to this node just now: whoever had it before may be long forgotten.
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

    /// Those that were not told yet.
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
