//! Changes in the rules of services, for followers.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::plan::ServicePlan;
use super::removed::RemovedFrontends;
use super::tables::Sticky;
use crate::engine::Change;
use crate::model::{Family, ObjectName, Service};
use crate::services::Store;

/// The changes of an update.
#[derive(Clone, Debug, Default)]
pub struct ServiceChanges {
    /// The services whose plans or health checks changed, in order. One may occur several times.
    pub replaced: Vec<Replaced>,
    /// Frontends of earlier processes that a comparison changed.
    pub removed: RemovedFrontends,
    /// Whether the tables were compared with the kernel: other rules may have been in force before.
    pub rewritten: bool,
    /// The networks whose local addresses answer NodePorts, if they may have changed.
    pub node_ports: Option<Arc<[IpNet]>>,
    /// The namespaces with session affinity, if they changed.
    pub sticky: Option<Sticky>,
    /// How many changes concerned session affinity so far.
    pub affinity_version: u64,
}

/// The plan of a service before and after a change.
#[derive(Clone, Debug)]
pub struct Replaced {
    pub service: ObjectName,
    /// The plan that was in force; `None` if the service had no rules.
    pub old: Option<Arc<ServicePlan>>,
    /// The plan that is in force now.
    pub new: Option<Arc<ServicePlan>>,
    /// Whether the rules before are those of an earlier process, and so unknown.
    pub adopted: bool,
    /// The health check of the service after the change.
    pub health_check: Option<HealthCheck>,
}

/// The state of a `healthCheckNodePort`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    pub port: u16,
    /// The number of ready endpoints on this node; 0 for a service without rules.
    pub local_endpoints: usize,
}

impl Replaced {
    /// Returns whether the plan changed.
    pub(crate) fn is_other_plan(&self) -> bool {
        match (&self.old, &self.new) {
            (Some(old), Some(new)) => !Arc::ptr_eq(old, new),
            (None, None) => false,
            _ => true,
        }
    }
}

impl Change for ServiceChanges {
    fn append(&mut self, later: Self) {
        self.replaced.extend(later.replaced);
        self.removed.append(later.removed);
        self.rewritten |= later.rewritten;
        self.node_ports = later.node_ports.or(self.node_ports.take());
        self.sticky = later.sticky.or(self.sticky.take());
    }

    fn set_rewritten(&mut self) {
        self.rewritten = true;
    }
}

impl ServiceChanges {
    /// Returns whether nothing changed.
    pub fn is_empty(&self) -> bool {
        let Self {
            replaced,
            removed,
            rewritten,
            node_ports,
            sticky,
            affinity_version: _,
        } = self;
        let same = node_ports.is_none() && sticky.is_none();
        replaced.is_empty() && *removed == RemovedFrontends::default() && !rewritten && same
    }
}

impl ServiceChanges {
    /// Returns whether remembered clients may refer to endpoints that are not in use.
    pub(crate) fn concerns_affinity(&self) -> bool {
        let has = |plan: &Option<Arc<ServicePlan>>| {
            plan.as_ref().is_some_and(|plan| plan.affinity.is_some())
        };
        let mut replaced = self.replaced.iter();
        let became_local = !self.removed.became_local.is_empty();
        self.rewritten || became_local || replaced.any(|it| has(&it.old) || has(&it.new))
    }
}

impl HealthCheck {
    /// Returns the health check of a service, unless another service owns its port.
    ///
    /// With `is_left_out` the service has no rules, so that no endpoint is reachable.
    pub fn of(store: &Store, service: &ObjectName, is_left_out: bool) -> Option<Self> {
        let service = store.service(service)?;
        let port = service.health_check_node_port?;
        if !store.owns_health_check(&service.name, port) {
            return None;
        }
        let local_endpoints = if is_left_out {
            0
        } else {
            local_ready_endpoints(store, service)
        };
        Some(Self {
            port,
            local_endpoints,
        })
    }
}

/// Returns the number of ready endpoint addresses on this node. Terminating endpoints are not
/// counted, although they receive traffic if there are no others.
fn local_ready_endpoints(store: &Store, service: &Service) -> usize {
    let Some(node) = store.node() else { return 0 };
    let ports = service.ports.iter();
    let slices = store.slices_of(&service.name);
    let pairs = ports.flat_map(|port| Family::ALL.map(|family| (port, family)));
    let addresses: BTreeSet<IpAddr> = pairs
        .flat_map(|(port, family)| slices.endpoints(port, family))
        .map(|of| of.endpoint)
        .filter(|endpoint| endpoint.ready && endpoint.node.as_deref() == Some(&node.name))
        .map(|endpoint| endpoint.address)
        .collect();
    addresses.len()
}
