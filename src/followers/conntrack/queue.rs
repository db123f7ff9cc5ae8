//! What changes of services mean for UDP flows, collected until the cleaner takes it.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::{Front, Judgement, Work, front, has_udp};
use crate::model::ObjectName;
use crate::netlink::Flow;
use crate::services::{ServiceChanges, ServicePlan};

/// The changes of services that a cleaner has not handled yet.
#[derive(Debug)]
pub struct Pending {
    changes: Receiver<Arc<ServiceChanges>>,
    /// The plans in force with UDP frontends.
    plans: HashMap<ObjectName, Arc<ServicePlan>>,
    node_ports: Arc<[IpNet]>,
    work: Work,
}

/// What receiving gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// Work to do.
    Work(Work),
    /// The time is over.
    Nothing,
    /// There will be no more.
    Closed,
}

impl Pending {
    /// Creates a queue of the changes that are received.
    pub fn new(changes: Receiver<Arc<ServiceChanges>>) -> Self {
        Self {
            changes,
            plans: HashMap::new(),
            node_ports: Arc::default(),
            work: Work::default(),
        }
    }

    /// Takes the work that waits, if there is some.
    pub fn take(&mut self) -> Option<Work> {
        self.take_over_all();
        let work = std::mem::take(&mut self.work);
        (!work.is_empty()).then_some(work)
    }

    /// Waits for work, where a limit is given not longer than that.
    pub fn receive(&mut self, limit: Option<Duration>) -> Received {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        loop {
            if let Some(work) = self.take() {
                return Received::Work(work);
            }
            let received = match deadline {
                None => self.changes.recv().map_err(RecvTimeoutError::from),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    self.changes.recv_timeout(left)
                }
            };
            match received {
                Ok(changes) => self.take_over(&changes),
                Err(RecvTimeoutError::Timeout) => return Received::Nothing,
                Err(RecvTimeoutError::Disconnected) => return Received::Closed,
            }
        }
    }

    /// Whether the work that waits keeps a flow: an endpoint may have come since the work at
    /// hand was taken.
    pub fn keeps(&mut self, flow: &Flow, node_port_addresses: &HashSet<IpAddr>) -> bool {
        self.take_over_all();
        self.work.judge(flow, node_port_addresses) == Judgement::Kept
    }

    fn take_over_all(&mut self) {
        while let Ok(changes) = self.changes.try_recv() {
            self.take_over(&changes);
        }
    }

    fn take_over(&mut self, changes: &ServiceChanges) {
        for replaced in changes.replaced.iter().filter(|it| it.is_other_plan()) {
            let [old, new] = [&replaced.old, &replaced.new]
                .map(|plan| plan.as_ref().filter(|plan| has_udp(plan)));
            self.work
                .change(old.map(|plan| &**plan), new.map(|plan| &**plan));
            match new {
                Some(new) => self.plans.insert(replaced.service.clone(), new.clone()),
                None => self.plans.remove(&replaced.service),
            };
        }
        let deleted = changes.removed.deleted.iter();
        self.work
            .gone(deleted.filter_map(|(family, claim)| front(*family, claim)));
        let is_suspect = |front: &Front| {
            let node_port = matches!(front, Front::NodePort(..));
            // NodePorts may answer on other addresses.
            changes.rewritten || (node_port && changes.node_ports.is_some())
        };
        if changes.rewritten || changes.node_ports.is_some() {
            for plan in self.plans.values() {
                self.work.suspect(plan, is_suspect);
            }
        }
        if let Some(ranges) = &changes.node_ports {
            self.node_ports = ranges.clone();
        }
        self.work.set_node_ports(self.node_ports.clone());
    }
}
