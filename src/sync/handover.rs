//! Channels that notify followers of changes that took effect.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use tokio::sync::watch;

use crate::policies::{Audited, Isolated, PolicyChanges};
use crate::services::{ServiceChanges, Sticky};

/// The channels to the followers. Sending does not block: each follower has a queue of its own.
#[derive(Default)]
pub struct Followers {
    services: Vec<Sender<Arc<ServiceChanges>>>,
    policies: Vec<Sender<Arc<PolicyChanges>>>,
    isolated: Option<watch::Sender<Isolated>>,
    audited: Option<watch::Sender<Audited>>,
    sticky: Option<watch::Sender<Sticky>>,
    /// The number of changes of services with session affinity.
    affinity_version: u64,
}

impl fmt::Debug for Followers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Followers").finish_non_exhaustive()
    }
}

impl Followers {
    /// Subscribes to changes of services.
    pub(crate) fn services(&mut self) -> Receiver<Arc<ServiceChanges>> {
        let (sender, receiver) = channel();
        self.services.push(sender);
        receiver
    }

    /// Subscribes to changes of policies.
    pub(crate) fn policies(&mut self) -> Receiver<Arc<PolicyChanges>> {
        let (sender, receiver) = channel();
        self.policies.push(sender);
        receiver
    }

    /// Watches the isolated addresses of this node.
    pub(crate) fn isolated(&mut self) -> watch::Receiver<Isolated> {
        self.isolated
            .get_or_insert_with(|| watch::channel(Isolated::default()).0)
            .subscribe()
    }

    /// Watches the addresses of this node with audited policies.
    pub(crate) fn audited(&mut self) -> watch::Receiver<Audited> {
        self.audited
            .get_or_insert_with(|| watch::channel(Audited::default()).0)
            .subscribe()
    }

    /// Watches the namespaces with session affinity.
    pub(crate) fn sticky(&mut self) -> watch::Receiver<Sticky> {
        self.sticky
            .get_or_insert_with(|| watch::channel(Sticky::default()).0)
            .subscribe()
    }

    /// Returns the number of changes of services with session affinity so far.
    pub(super) fn affinity_version(&self) -> u64 {
        self.affinity_version
    }

    pub(super) fn hand_services(&mut self, mut change: ServiceChanges) {
        if change.is_empty() {
            return;
        }
        if let (Some(sender), Some(sticky)) = (&self.sticky, &change.sticky) {
            sender.send_replace(sticky.clone());
        }
        self.affinity_version += u64::from(change.concerns_affinity());
        change.affinity_version = self.affinity_version;
        hand(&mut self.services, change);
    }

    pub(super) fn hand_policies(&mut self, change: PolicyChanges) {
        if change.is_empty() {
            return;
        }
        if let (Some(sender), Some(isolated)) = (&self.isolated, &change.isolated) {
            sender.send_if_modified(|known| {
                let is_other = known != isolated;
                *known = isolated.clone();
                is_other
            });
        }
        if let (Some(sender), Some(audited)) = (&self.audited, &change.audited) {
            sender.send_replace(audited.clone());
        }
        hand(&mut self.policies, change);
    }
}

/// Sends to all followers that have not ended.
fn hand<C>(to: &mut Vec<Sender<Arc<C>>>, change: C) {
    let change = Arc::new(change);
    to.retain(|sender| sender.send(change.clone()).is_ok());
}
