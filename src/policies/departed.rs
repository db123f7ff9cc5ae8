//! Pods of this node whose objects were deleted while a container ran.
//!
//! A pod that is deleted by force is removed from the API at once. The kubelet stops its containers
//! later, or never if the node is disconnected. The address stays isolated meanwhile.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::logging::Throttle;
use crate::model::{Evidence, Pod, Sandbox};

/// The time for which the address of such a pod stays isolated.
const KEPT_FOR: Duration = Duration::from_secs(300);
/// The minimum interval of log lines about too many departed pods.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// The maximum number of departed pods; a node has a few hundred pods.
const MOST: usize = 1024;

/// The departed pods by address.
#[derive(Clone, Debug)]
pub(super) struct Departed {
    pods: BTreeMap<IpAddr, (Pod, Instant)>,
    /// Addresses in the order of expiry. Some are removed already, or occur again later.
    order: VecDeque<(Instant, IpAddr)>,
    /// Limits the log lines about addresses that are forgotten early.
    too_many: Throttle,
}

impl Default for Departed {
    fn default() -> Self {
        Self {
            pods: BTreeMap::new(),
            order: VecDeque::new(),
            too_many: Throttle::new(LOG_EVERY),
        }
    }
}

impl Departed {
    pub fn at(&self, address: IpAddr) -> Option<&Pod> {
        self.pods.get(&address).map(|(pod, _)| pod)
    }

    /// Returns the departed pods with their addresses.
    pub fn all(&self) -> impl Iterator<Item = (IpAddr, &Pod)> {
        let pods = self.pods.iter();
        pods.map(|(address, (pod, _))| (*address, pod))
    }

    /// Adds the address of a pod that was deleted.
    pub fn insert(&mut self, address: IpAddr, pod: &Pod, now: Instant) {
        let until = now + KEPT_FOR;
        self.pods.insert(address, (pod.clone(), until));
        self.order.push_back((until, address));
    }

    /// Returns whether there are too many.
    fn is_full(&self) -> bool {
        self.pods.len() > MOST
    }

    /// Forgets the departed pod of an address if a pod took it over. `is_new` says that the pod did
    /// not claim it before, so that it got the address since, whatever its status says about
    /// containers.
    pub(crate) fn claimed(&mut self, address: IpAddr, evidence: &Evidence, is_new: bool) {
        let Some((departed, _)) = self.pods.get(&address) else {
            return;
        };
        let has_sandbox = evidence.sandbox != Sandbox::Gone;
        if has_sandbox && (is_new || evidence.outranks(&departed.evidence)) {
            self.pods.remove(&address);
        }
    }

    /// Returns when the next one expires.
    pub fn due(&self) -> Option<Instant> {
        self.order.front().map(|(until, _)| *until)
    }

    /// Returns an expired address, or the oldest of too many.
    pub(crate) fn expired(&self, now: Instant) -> Option<IpAddr> {
        let (until, address) = self.order.front()?;
        (*until <= now || self.is_full()).then_some(*address)
    }

    /// Forgets the oldest one, unless its address was taken over since.
    pub(crate) fn forget_oldest(&mut self, now: Instant) {
        let Some((until, address)) = self.order.pop_front() else {
            return;
        };
        let is_this = |(_, known): &(Pod, Instant)| *known == until;
        if !self.pods.get(&address).is_some_and(is_this) {
            return;
        }
        let early = self.pods.remove(&address).filter(|_| until > now);
        if let Some((pod, _)) = early
            && let Some(unlogged) = self.too_many.add(now)
        {
            tracing::warn!(
                unlogged,
                "more than {MOST} pods of this node were deleted while they ran; the address \
                 {address} of pod {} is no longer isolated",
                pod.name
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::model::{Labels, ObjectName};

    use super::*;

    #[test]
    fn an_address_counts_once_however_often_its_pods_depart() {
        let pod = Pod {
            name: ObjectName::new("shop", "web"),
            node: None,
            host_network: false,
            ended: false,
            running: true,
            evidence: Evidence::default(),
            addresses: Default::default(),
            labels: Labels::default(),
            owner: None,
            ports: Default::default(),
        };
        let ip = |last| IpAddr::from([10, 0, 0, last]);
        let (mut departed, now) = (Departed::default(), Instant::now());
        departed.insert(ip(1), &pod, now);
        for _ in 0..MOST {
            departed.insert(ip(2), &pod, now);
        }
        assert_eq!(departed.expired(now), None);
        assert!(departed.at(ip(1)).is_some());
        assert_eq!(departed.expired(now + KEPT_FOR), Some(ip(1)));
    }
}
