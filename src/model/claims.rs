//! Who owns a frontend that several services ask for.
//!
//! An address and port, or a NodePort, can lead to one service only. The oldest service that
//! claims it has it (by `metadata.creationTimestamp`, then by name); the others are told. When
//! the owner lets go, the next oldest gets it.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;

use smallvec::SmallVec;

use super::{ObjectName, Protocol, Service};

/// Something that only one service can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Claim {
    /// A port on a ClusterIP, external IP or load balancer IP.
    Address(IpAddr, Protocol, u16),
    /// A port on the node's own addresses.
    NodePort(Protocol, u16),
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Claim::Address(address, protocol, port) => {
                write!(
                    f,
                    "{} {protocol}",
                    std::net::SocketAddr::new(*address, *port)
                )
            }
            Claim::NodePort(protocol, port) => write!(f, "NodePort {port} {protocol}"),
        }
    }
}

/// A service's place in the queue for a claim; the smallest one owns it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claimant {
    created: i64,
    name: ObjectName,
}

/// All claims of all services.
#[derive(Debug, Default)]
pub struct Claims {
    claimants: HashMap<Claim, SmallVec<[Claimant; 1]>>,
}

/// What a change of one service's claims means for the others.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ClaimChanges {
    /// Services that gained or lost a claim.
    pub affected: BTreeSet<ObjectName>,
    /// New conflicts: the claim, its owner, and the service that does not get it.
    pub conflicts: Vec<(Claim, ObjectName, ObjectName)>,
}

impl Claims {
    /// The service that has a claim.
    pub fn owner(&self, claim: &Claim) -> Option<&ObjectName> {
        self.claimants
            .get(claim)
            .and_then(|queue| queue.first())
            .map(|claimant| &claimant.name)
    }

    /// Replaces the claims of a service by those of its new form; `None` for a form that does
    /// not exist.
    pub fn change(&mut self, old: Option<&Service>, new: Option<&Service>) -> ClaimChanges {
        let (before, after) = (claims_of(old), claims_of(new));
        let mut changes = ClaimChanges::default();
        let moved = old.map(age) != new.map(age);
        for claim in before
            .iter()
            .filter(|claim| moved || !after.contains(*claim))
        {
            self.release(claim, old, &mut changes);
        }
        for claim in after
            .iter()
            .filter(|claim| moved || !before.contains(*claim))
        {
            self.take(*claim, new, &mut changes);
        }
        changes
    }

    fn release(&mut self, claim: &Claim, service: Option<&Service>, changes: &mut ClaimChanges) {
        let (Some(service), Some(queue)) = (service, self.claimants.get_mut(claim)) else {
            return;
        };
        let owned = queue
            .first()
            .is_some_and(|first| first.name == service.name);
        queue.retain(|claimant| claimant.name != service.name);
        match queue.first() {
            None => {
                self.claimants.remove(claim);
            }
            Some(next) if owned => {
                changes.affected.insert(next.name.clone());
            }
            Some(_) => {}
        }
    }

    fn take(&mut self, claim: Claim, service: Option<&Service>, changes: &mut ClaimChanges) {
        let Some(service) = service else { return };
        let claimant = Claimant {
            created: age(service),
            name: service.name.clone(),
        };
        let queue = self.claimants.entry(claim).or_default();
        let place = queue.partition_point(|other| *other < claimant);
        queue.insert(place, claimant);
        match (queue.first(), queue.get(1)) {
            (Some(first), Some(second)) if place == 0 => {
                changes.affected.insert(second.name.clone());
                let conflict = (claim, first.name.clone(), second.name.clone());
                changes.conflicts.push(conflict);
            }
            (Some(first), Some(_)) => {
                let conflict = (claim, first.name.clone(), service.name.clone());
                changes.conflicts.push(conflict);
            }
            _ => {}
        }
    }
}

fn age(service: &Service) -> i64 {
    service.created.unwrap_or(i64::MAX)
}

fn claims_of(service: Option<&Service>) -> BTreeSet<Claim> {
    service
        .map(|service| service.claims().collect())
        .unwrap_or_default()
}

impl Service {
    /// Everything this service wants for itself alone. An address may come up twice. Nothing for
    /// one with more frontends than a service may have.
    pub fn claims(&self) -> impl Iterator<Item = Claim> + '_ {
        let ports = if self.has_frontends() && !self.is_oversized() {
            self.ports.as_slice()
        } else {
            &[]
        };
        ports.iter().flat_map(|port| {
            let addresses = self
                .cluster_ips
                .iter()
                .chain(&self.external_ips)
                .chain(&self.load_balancer_ips)
                .map(|address| Claim::Address(*address, port.protocol, port.port));
            let node_port = port
                .node_port
                .map(|number| Claim::NodePort(port.protocol, number));
            addresses.chain(node_port)
        })
    }
}
