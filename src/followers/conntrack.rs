//! Which UDP flows lead nowhere since services changed.
//!
//! The kernel translates the first packet of a flow and remembers it for the others, so a client
//! that keeps its socket stays with an endpoint that is gone. TCP finds out by itself; UDP does
//! not, and its flow lives on as long as the client goes on asking. Such flows are deleted, and
//! their next packets meet the rules in force.
//!
//! ```text
//!  rules in force ── ServiceChanges ──> Pending ── Work ──> Cleaner, on a thread of its own
//!                                                              │ one dump a frontend, or
//!                                                              v one of all UDP flows
//!                                                            Tracker: list, judge, delete
//! ```
//!
//! A flow belongs to a frontend by its original destination: address and port, or for a NodePort
//! an own address of the node on which NodePorts answer. It is stale
//!
//! - if the frontend stands and the source of the answers is none of its serving endpoints: those
//!   that are ready, chosen by policy and topology or not, and those that still serve while they
//!   terminate. A flow that began before the service existed, and was not translated, is answered
//!   by the frontend's own address and thus stale too;
//! - if the frontend is gone and the destination was translated.

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

pub use cleaner::{Cleaner, KernelFlows, Tracker};
pub use queue::{Pending, Received};

/// What the flows of a UDP service port are recognised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Front {
    /// The original destination.
    Address(SocketAddr),
    /// The original destination port, on an own address.
    NodePort(Family, u16),
}

impl Front {
    /// The address family of its flows.
    pub fn family(&self) -> Family {
        match self {
            Front::Address(at) => Family::of(at.ip()),
            Front::NodePort(family, _) => *family,
        }
    }

    /// The original destination port.
    pub fn port(&self) -> u16 {
        match self {
            Front::Address(at) => at.port(),
            Front::NodePort(_, port) => *port,
        }
    }
}

/// The endpoints that may answer the flows of a frontend, sorted.
pub type Serving = Arc<[Target]>;

/// The frontends whose flows may have become stale.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Work {
    entries: HashMap<Front, Entry>,
    /// The ranges whose own addresses answer NodePorts.
    node_ports: Arc<[IpNet]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    /// `None` once the frontend is gone.
    serving: Option<Serving>,
    /// Whether flows have to be looked for. Endpoints that are merely more than before leave no
    /// stale flow, but must be known to whoever works by an earlier list.
    suspect: bool,
}

/// What becomes of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// It belongs to none of the frontends.
    Unconcerned,
    /// It leads to a serving endpoint.
    Kept,
    /// It leads nowhere, or past the service.
    Stale,
}

impl Work {
    /// Notes how a plan differs from the one before. Within a batch a frontend that moved from
    /// one service to another stands, in whichever order the two are noted.
    pub fn change(&mut self, old: Option<&ServicePlan>, new: Option<&ServicePlan>) {
        let before: HashMap<Front, Serving> = fronts(old).collect();
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
        self.gone(fronts.filter(|front| !after.contains(front)));
    }

    /// Notes that frontends are gone, unless they stand.
    pub fn gone(&mut self, fronts: impl IntoIterator<Item = Front>) {
        for front in fronts {
            self.entries.entry(front).or_insert(Entry {
                serving: None,
                suspect: true,
            });
        }
    }

    /// Notes all frontends of a plan that `of` wants.
    pub fn suspect(&mut self, plan: &ServicePlan, of: impl Fn(&Front) -> bool) {
        for (front, serving) in fronts(Some(plan)).filter(|(front, _)| of(front)) {
            self.set(front, Some(serving), true);
        }
    }

    fn set(&mut self, front: Front, serving: Option<Serving>, suspect: bool) {
        let earlier = self.entries.get(&front);
        let suspect = suspect || earlier.is_some_and(|entry| entry.suspect);
        self.entries.insert(front, Entry { serving, suspect });
    }

    /// Sets the ranges whose own addresses answer NodePorts.
    pub fn set_node_ports(&mut self, ranges: impl Into<Arc<[IpNet]>>) {
        self.node_ports = ranges.into();
    }

    /// Takes over what was noted later.
    pub fn merge(&mut self, later: Work) {
        if later.is_empty() {
            return;
        }
        for (front, entry) in later.entries {
            self.set(front, entry.serving, entry.suspect);
        }
        self.node_ports = later.node_ports;
    }

    /// Whether nothing was noted.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The number of frontends noted.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The frontends whose flows have to be looked for.
    pub fn suspects(&self) -> impl Iterator<Item = Front> + '_ {
        let entries = self.entries.iter();
        entries
            .filter(|(_, entry)| entry.suspect)
            .map(|(front, _)| *front)
    }

    /// Those of the host's addresses on which NodePorts answer.
    pub fn node_port_addresses(&self, own: impl IntoIterator<Item = IpAddr>) -> HashSet<IpAddr> {
        let answers = |address: &IpAddr| self.node_ports.iter().any(|net| net.contains(address));
        own.into_iter().filter(answers).collect()
    }

    /// Judges a flow; `node_port_addresses` are those on which NodePorts answer.
    pub fn judge(&self, flow: &Flow, node_port_addresses: &HashSet<IpAddr>) -> Judgement {
        let at = flow.destination;
        let entry = self.entries.get(&Front::Address(at)).or_else(|| {
            let front = Front::NodePort(Family::of(at.ip()), at.port());
            let entry = self.entries.get(&front)?;
            node_port_addresses.contains(&at.ip()).then_some(entry)
        });
        let stale = match entry.map(|entry| &entry.serving) {
            None => return Judgement::Unconcerned,
            Some(Some(serving)) => {
                let replier = (flow.replier.ip(), flow.replier.port());
                serving.binary_search(&replier).is_err()
            }
            Some(None) => flow.is_translated(),
        };
        if stale {
            Judgement::Stale
        } else {
            Judgement::Kept
        }
    }
}

/// The UDP frontends of a plan with their serving endpoints.
fn fronts(plan: Option<&ServicePlan>) -> impl Iterator<Item = (Front, Serving)> + '_ {
    // Frontends of one port mostly share a pool, and stand side by side.
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

/// The UDP frontend with a claim.
fn front(family: Family, at: &Claim) -> Option<Front> {
    match *at {
        Claim::Address(address, Protocol::Udp, port) => {
            Some(Front::Address(SocketAddr::new(address, port)))
        }
        Claim::NodePort(Protocol::Udp, port) => Some(Front::NodePort(family, port)),
        Claim::Address(..) | Claim::NodePort(..) => None,
    }
}

/// Whether a plan has UDP frontends.
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
