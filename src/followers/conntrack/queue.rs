//! Translates changes of services to dirty frontends.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::{DirtyFrontends, FlowState, UdpFrontend, front, has_udp};
use crate::model::ObjectName;
use crate::netlink::Flow;
use crate::services::{ServiceChanges, ServicePlan};

/// The dirty frontends that the cleaner has not taken yet.
#[derive(Debug)]
pub(crate) struct Pending {
    changes: Receiver<Arc<ServiceChanges>>,
    /// The plans in force that have UDP frontends.
    plans: HashMap<ObjectName, Arc<ServicePlan>>,
    node_ports: Arc<[IpNet]>,
    dirty: DirtyFrontends,
}

/// The result of receiving.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// Frontends to sweep.
    Dirty(DirtyFrontends),
    /// The limit passed.
    Timeout,
    /// There will be no more changes.
    Closed,
}

impl Pending {
    /// Creates a queue that is fed by changes of services.
    pub(crate) fn new(changes: Receiver<Arc<ServiceChanges>>) -> Self {
        Self {
            changes,
            plans: HashMap::new(),
            node_ports: Arc::default(),
            dirty: DirtyFrontends::default(),
        }
    }

    /// Takes the dirty frontends, if there are any.
    pub(crate) fn take(&mut self) -> Option<DirtyFrontends> {
        self.receive_all();
        let dirty = std::mem::take(&mut self.dirty);
        (!dirty.is_empty()).then_some(dirty)
    }

    /// Waits for dirty frontends, for `limit` at most.
    pub(crate) fn receive(&mut self, limit: Option<Duration>) -> Received {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        loop {
            if let Some(dirty) = self.take() {
                return Received::Dirty(dirty);
            }
            let received = match deadline {
                None => self.changes.recv().map_err(RecvTimeoutError::from),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    self.changes.recv_timeout(left)
                }
            };
            match received {
                Ok(changes) => self.add(&changes),
                Err(RecvTimeoutError::Timeout) => return Received::Timeout,
                Err(RecvTimeoutError::Disconnected) => return Received::Closed,
            }
        }
    }

    /// Returns whether a flow is valid by changes after the last call of [`Pending::take`], which
    /// may have added its endpoint.
    pub(crate) fn keeps(&mut self, flow: &Flow, node_port_addresses: &HashSet<IpAddr>) -> bool {
        self.receive_all();
        self.dirty.evaluate(flow, node_port_addresses) == FlowState::Kept
    }

    fn receive_all(&mut self) {
        while let Ok(changes) = self.changes.try_recv() {
            self.add(&changes);
        }
    }

    fn add(&mut self, changes: &ServiceChanges) {
        // A service may have changed several times before its rules were in force.
        let mut first_old: HashMap<&ObjectName, Option<Arc<ServicePlan>>> = HashMap::new();
        for replaced in changes.replaced.iter().filter(|it| it.is_other_plan()) {
            let [old, new] = [&replaced.old, &replaced.new]
                .map(|plan| plan.as_ref().filter(|plan| has_udp(plan)));
            let service = &replaced.service;
            first_old.entry(service).or_insert_with(|| old.cloned());
            match new {
                Some(new) => self.plans.insert(service.clone(), new.clone()),
                None => self.plans.remove(service),
            };
        }
        let mut dirty = DirtyFrontends::default();
        for (service, old) in first_old {
            dirty.change(old.as_deref(), self.plans.get(service).map(|plan| &**plan));
        }
        // Later than what waits: a frontend of it may be deleted now.
        self.dirty.merge(dirty);
        let deleted = changes.removed.deleted.iter();
        self.dirty
            .remove(deleted.filter_map(|(family, claim)| front(*family, claim)));
        let may_be_stale = |front: &UdpFrontend| {
            let node_port = matches!(front, UdpFrontend::NodePort(..));
            // Other addresses may accept NodePorts.
            changes.rewritten || (node_port && changes.node_ports.is_some())
        };
        if changes.rewritten || changes.node_ports.is_some() {
            for plan in self.plans.values() {
                self.dirty.add_plan(plan, may_be_stale);
            }
        }
        if let Some(ranges) = &changes.node_ports {
            self.node_ports = ranges.clone();
        }
        self.dirty.set_node_ports(self.node_ports.clone());
    }
}
