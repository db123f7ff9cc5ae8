//! Deletes stale UDP flows after services changed.
//!
//! The kernel applies the translation of a flow's first packet to all later ones. A client that keeps
//! its socket continues to send to an endpoint even after its removal. TCP connections end by
//! themselves; a UDP flow exists as long as the client sends. Deleting the entry makes the next packet
//! traverse the rules.
//!
//! ```text
//!  rules in force ── ServiceChanges ──> Pending ── DirtyFrontends ──> Cleaner, on its own thread
//!                                                                       │ one dump for each frontend,
//!                                                                       v or one of all UDP flows
//!                                                                     Tracker: list, evaluate, delete
//! ```
//!
//! A flow belongs to the frontend of its original destination: address and port, or for a NodePort the
//! port on an address of the node that accepts NodePorts. It is stale
//!
//! - if the frontend exists and the source of the replies is none of its serving endpoints. These are
//!   all ready endpoints, even if policy or topology do not select them, and endpoints that serve while
//!   terminating. A flow from before the service existed was not translated: its replies come from the
//!   frontend's address, so that it is stale, too;
//! - if the frontend was removed and the destination was translated.

mod cleaner;
mod queue;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::model::{Family, Protocol};
use crate::netlink::Flow;
use crate::services::Claim;
use crate::services::{Pool, ServicePlan, Target};

pub(crate) use cleaner::{Cleaner, KernelFlows};
pub(crate) use queue::Pending;

/// Identifies the flows of a UDP service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum UdpFrontend {
    /// The original destination.
    Address(SocketAddr),
    /// The original destination port, on an address of the node.
    NodePort(Family, u16),
}

impl UdpFrontend {
    /// Returns the address family of its flows.
    pub(crate) fn family(&self) -> Family {
        match self {
            UdpFrontend::Address(at) => Family::of(at.ip()),
            UdpFrontend::NodePort(family, _) => *family,
        }
    }

    /// Returns the original destination port.
    pub(crate) fn port(&self) -> u16 {
        match self {
            UdpFrontend::Address(at) => at.port(),
            UdpFrontend::NodePort(_, port) => *port,
        }
    }
}

/// The serving endpoints of a frontend, sorted.
pub(crate) type Serving = Arc<[Target]>;

/// Frontends whose flows may be stale.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DirtyFrontends {
    entries: HashMap<UdpFrontend, DirtyFrontend>,
    /// Addresses of the node in these ranges accept NodePorts.
    node_ports: Arc<[IpNet]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct DirtyFrontend {
    /// `None` if the frontend was removed.
    serving: Option<Serving>,
    /// Whether to look for stale flows. False if endpoints were only added; the entry then lets a
    /// running sweep keep their flows.
    sweep: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FlowState {
    /// The flow belongs to none of the frontends.
    Unconcerned,
    /// Its endpoint serves the frontend.
    Kept,
    /// Its endpoint does not serve the frontend, or it bypasses the service.
    Stale,
}

impl DirtyFrontends {
    /// Adds the differences between two plans of a service. A frontend that moves from one service to
    /// another exists afterwards, independent of the order of the two calls.
    pub(crate) fn change(&mut self, old: Option<&ServicePlan>, new: Option<&ServicePlan>) {
        let before: HashMap<UdpFrontend, Serving> = fronts(old).collect();
        let mut after = HashSet::new();
        for (front, serving) in fronts(new) {
            after.insert(front);
            let same = before.get(&front);
            if same == Some(&serving) {
                continue;
            }
            let only_more = same.is_some_and(|before| {
                let stays = |target| serving.binary_search(target).is_ok();
                !before.is_empty() && before.iter().all(stays)
            });
            self.set(front, Some(serving), !only_more);
        }
        let fronts = before.into_keys();
        self.remove(fronts.filter(|front| !after.contains(front)));
    }

    /// Adds removed frontends, unless an existing one was added before.
    pub(crate) fn remove(&mut self, fronts: impl IntoIterator<Item = UdpFrontend>) {
        for front in fronts {
            self.entries.entry(front).or_insert(DirtyFrontend {
                serving: None,
                sweep: true,
            });
        }
    }

    /// Adds all frontends of a plan that match `of`.
    pub(crate) fn add_plan(&mut self, plan: &ServicePlan, of: impl Fn(&UdpFrontend) -> bool) {
        for (front, serving) in fronts(Some(plan)).filter(|(front, _)| of(front)) {
            self.set(front, Some(serving), true);
        }
    }

    fn set(&mut self, front: UdpFrontend, serving: Option<Serving>, sweep: bool) {
        let earlier = self.entries.get(&front);
        let sweep = sweep || earlier.is_some_and(|entry| entry.sweep);
        self.entries.insert(front, DirtyFrontend { serving, sweep });
    }

    /// Sets the ranges in which addresses of the node accept NodePorts.
    pub(crate) fn set_node_ports(&mut self, ranges: impl Into<Arc<[IpNet]>>) {
        self.node_ports = ranges.into();
    }

    /// Merges later changes.
    pub(crate) fn merge(&mut self, later: DirtyFrontends) {
        if later.is_empty() {
            return;
        }
        for (front, entry) in later.entries {
            self.set(front, entry.serving, entry.sweep);
        }
        self.node_ports = later.node_ports;
    }

    /// Returns whether there are no frontends.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the number of frontends.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns the frontends whose flows may be stale.
    pub(crate) fn to_sweep(&self) -> impl Iterator<Item = UdpFrontend> + '_ {
        let entries = self.entries.iter();
        entries
            .filter(|(_, entry)| entry.sweep)
            .map(|(front, _)| *front)
    }

    /// Selects the addresses of the node that accept NodePorts.
    pub(crate) fn node_port_addresses(
        &self,
        own: impl IntoIterator<Item = IpAddr>,
    ) -> HashSet<IpAddr> {
        let answers = |address: &IpAddr| self.node_ports.iter().any(|net| net.contains(address));
        own.into_iter().filter(answers).collect()
    }

    /// Determines the state of a flow. `node_port_addresses` are the node's addresses that accept
    /// NodePorts.
    pub(crate) fn evaluate(&self, flow: &Flow, node_port_addresses: &HashSet<IpAddr>) -> FlowState {
        let at = flow.destination;
        let entry = self.entries.get(&UdpFrontend::Address(at)).or_else(|| {
            let front = UdpFrontend::NodePort(Family::of(at.ip()), at.port());
            let entry = self.entries.get(&front)?;
            node_port_addresses.contains(&at.ip()).then_some(entry)
        });
        let stale = match entry.map(|entry| &entry.serving) {
            None => return FlowState::Unconcerned,
            Some(Some(serving)) => {
                let replier = (flow.replier.ip(), flow.replier.port());
                serving.binary_search(&replier).is_err()
            }
            Some(None) => flow.is_translated(),
        };
        if stale {
            FlowState::Stale
        } else {
            FlowState::Kept
        }
    }
}

/// Returns the UDP frontends of a plan with their serving endpoints.
fn fronts(plan: Option<&ServicePlan>) -> impl Iterator<Item = (UdpFrontend, Serving)> + '_ {
    // Neighbouring frontends mostly share a pool.
    let mut last: Option<(usize, Serving)> = None;
    let frontends = plan.into_iter().flat_map(|plan| {
        let frontends = plan.frontends.iter();
        frontends.map(move |frontend| (plan, frontend))
    });
    frontends.filter_map(move |(plan, frontend)| {
        let index = frontend.route.first_pool();
        let pool = plan.pools.get(index)?;
        let front = front(pool.family, &frontend.at)?;
        let serving = match &last {
            Some((of, serving)) if *of == index => serving.clone(),
            _ => serving(pool),
        };
        last = Some((index, serving.clone()));
        Some((front, serving))
    })
}

/// Returns the UDP frontend for a claim.
fn front(family: Family, at: &Claim) -> Option<UdpFrontend> {
    match *at {
        Claim::Address(address, Protocol::Udp, port) => {
            Some(UdpFrontend::Address(SocketAddr::new(address, port)))
        }
        Claim::NodePort(Protocol::Udp, port) => Some(UdpFrontend::NodePort(family, port)),
        Claim::Address(..) | Claim::NodePort(..) => None,
    }
}

fn has_udp(plan: &ServicePlan) -> bool {
    let mut frontends = plan.frontends.iter();
    frontends.any(|frontend| front(frontend.family, &frontend.at).is_some())
}

fn serving(pool: &Pool) -> Serving {
    let mut targets: Vec<Target> = pool.targets.iter().chain(&pool.unchosen).copied().collect();
    targets.sort_unstable();
    targets.into()
}

#[cfg(test)]
mod tests;
