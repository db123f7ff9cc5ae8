//! Addresses that went from one pod to another.
//!
//! Rules let a connection pass once it is established. What was established with a pod that is gone
//! must not reach the one that has its address now, so whoever follows the rules is told of such an
//! address and looks at its connections.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;

use crate::model::ObjectName;

/// The most addresses that are remembered after their pods went. Connections without packets end
/// by themselves, so those that became free long ago do not matter.
const MOST_FREE: usize = 4096;

/// Collects such addresses.
#[derive(Debug, Default)]
pub(super) struct Moved {
    untold: BTreeSet<IpAddr>,
    free: BTreeSet<IpAddr>,
    /// The same, in the order in which they became free; some are not any more.
    order: VecDeque<IpAddr>,
}

impl Moved {
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
            if self.free.insert(address) {
                self.order.push_back(address);
            }
            if self.order.len() > MOST_FREE
                && let Some(oldest) = self.order.pop_front()
            {
                self.free.remove(&oldest);
            }
            return;
        }
        if self.free.remove(&address) || !before.is_empty() || arrived {
            self.untold.insert(address);
        }
    }

    /// Those that were not told yet.
    pub fn take(&mut self) -> BTreeSet<IpAddr> {
        std::mem::take(&mut self.untold)
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
        let mut moved = Moved::default();
        moved.note(ip(1), none(), pod("first"), false);
        assert!(moved.take().is_empty(), "nobody had it before");
        moved.note(ip(1), pod("first"), none(), false);
        assert!(moved.take().is_empty(), "nobody has it now");
        moved.note(ip(1), none(), pod("first"), false);
        assert_eq!(moved.take(), [ip(1)].into(), "a pod of the same name");
        moved.note(ip(1), pod("first"), pod("second"), false);
        assert_eq!(moved.take(), [ip(1)].into(), "without a pause");
        moved.note(ip(1), pod("second"), pod("second"), true);
        assert!(moved.take().is_empty(), "the same pod");
        moved.note(ip(2), none(), pod("here"), true);
        assert_eq!(moved.take(), [ip(2)].into(), "on this node");
    }

    #[test]
    fn what_became_free_long_ago_is_forgotten() {
        let pod = || vec![ObjectName::new("shop", "web")];
        let ip = |number: usize| IpAddr::from(u32::try_from(number).unwrap().to_be_bytes());
        let mut moved = Moved::default();
        for number in 0..MOST_FREE + 1 {
            moved.note(ip(number), pod(), Vec::new(), false);
        }
        assert_eq!(moved.free.len(), MOST_FREE);
        moved.note(ip(0), Vec::new(), pod(), false);
        assert!(moved.take().is_empty());
        moved.note(ip(1), Vec::new(), pod(), false);
        assert_eq!(moved.take(), [ip(1)].into());
    }
}
