//! Leaves the monitor's multicast group during large writes.

use std::sync::{Arc, Mutex};

use super::socket::Membership;
use crate::mutex::lock;

/// Makes a [`Monitor`](super::Monitor) leave its multicast group during large writes, so that the
/// kernel builds no notifications.
#[derive(Debug)]
pub struct MutedMonitor(Arc<Mutex<Subscription>>);

/// The membership of a monitor in the multicast group.
#[derive(Debug, Default)]
pub(super) struct Subscription {
    /// That of the current socket; `None` while the monitor has none.
    pub membership: Option<Membership>,
    /// Whether the group was left and could not be joined again.
    pub left: bool,
}

impl Subscription {
    /// Leaves the group. Returns whether the monitor misses notifications from now on.
    fn leave(&mut self) -> bool {
        let membership = self.membership.as_ref();
        self.left || membership.is_some_and(|membership| membership.leave().is_ok())
    }

    /// Joins the group again. A failure is no error of the write: the monitor and each later write
    /// try again.
    fn join(&mut self) {
        let membership = self.membership.as_ref();
        self.left = membership.is_some_and(|membership| membership.join().is_err());
    }

    /// Joins the group again if this failed before. Returns whether it succeeded now.
    pub(crate) fn rejoin_if_left(&mut self) -> bool {
        let was_left = self.left;
        if was_left {
            self.join();
        }
        was_left && !self.left
    }
}

impl MutedMonitor {
    pub(super) fn new(subscription: Arc<Mutex<Subscription>>) -> Self {
        Self(subscription)
    }

    /// Leaves the group. Returns false if the monitor was not a member.
    pub(super) fn mute(&self) -> bool {
        lock(&self.0).leave()
    }

    /// Joins the group again.
    pub(super) fn unmute(&self) {
        lock(&self.0).join();
    }

    /// Returns whether the last [`MutedMonitor::unmute`] failed.
    pub(super) fn is_left(&self) -> bool {
        lock(&self.0).left
    }
}

#[cfg(test)]
mod tests {
    use super::super::socket::Socket;
    use super::*;

    /// A group that needs no capability, and one that does not exist.
    const FREE: u32 = 1;
    const ABSENT: u32 = 9_999;

    fn membership(group: u32) -> Membership {
        let socket = Socket::open_on(mnl::Bus::Route, "a test").unwrap();
        socket.membership(group).unwrap()
    }

    #[test]
    fn a_group_that_cannot_be_joined_again_is_joined_later() {
        let shared = Arc::new(Mutex::new(Subscription::default()));
        let monitor = MutedMonitor::new(shared.clone());
        assert!(!monitor.mute(), "there is no socket");
        monitor.unmute();
        assert!(!monitor.is_left());
        lock(&shared).membership = Some(membership(FREE));
        assert!(monitor.mute());
        lock(&shared).membership = Some(membership(ABSENT));
        monitor.unmute();
        assert!(monitor.is_left());
        assert!(!lock(&shared).rejoin_if_left());
        assert!(monitor.mute(), "notifications of the next write are missed");
        lock(&shared).membership = Some(membership(FREE));
        assert!(lock(&shared).rejoin_if_left(), "some were missed");
        assert!(!lock(&shared).rejoin_if_left(), "none were missed since");
        assert!(!monitor.is_left());
    }
}
