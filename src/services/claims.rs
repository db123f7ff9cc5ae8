//! Which service owns a frontend that several claim, and which frontends no service gets.
//!
//! An address and port, or a port of the node, belongs to one service only. A claim as ClusterIP
//! precedes one as load balancer IP, and that one as external IP; among equal claims the oldest
//! service wins (by `metadata.creationTimestamp`, then by name). When the owner releases the claim,
//! the next service gets it.
//!
//! The API server allocates ClusterIPs; all other addresses are set by users who may write a
//! Service. So the latter have no effect at the ClusterIP of another service, in a ServiceCIDR,
//! where a NodePort answers, and where nftlet itself connects to the API server ([`Reserved`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use foldhash::{HashMap, HashSet};
use ipnet::IpNet;
use smallvec::SmallVec;

use crate::model::{ObjectName, Protocol, Service};
use claim_change::{ClaimDifference, Wishes};

mod claim_change;

pub(crate) use claim_change::ClaimChange;

/// A frontend or port that only one service can have.
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
                write!(f, "{} {protocol}", SocketAddr::new(*address, *port))
            }
            Claim::NodePort(protocol, port) => write!(f, "NodePort {port} {protocol}"),
        }
    }
}

/// The use of a claim by a service, the strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    ClusterIp,
    NodePort,
    LoadBalancerIp,
    ExternalIp,
}

/// A service's place in the queue for a claim; the smallest one owns the claim.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Claimant {
    rank: Rank,
    created: i64,
    pub(crate) name: ObjectName,
    /// Whether the claim is a `healthCheckNodePort`.
    health_check: bool,
}

/// A claim of a service, with its rank and whether it is a health check.
type Wish = (Claim, Rank, bool);

/// Addresses and ports that services cannot claim, except as ClusterIPs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reserved {
    /// The ranges of ClusterIPs.
    pub service_ranges: Vec<IpNet>,
    /// The addresses and ports of the API server that nftlet connects to.
    pub servers: BTreeSet<SocketAddr>,
    /// Addresses of the node on which NodePorts answer.
    pub node_port_addresses: BTreeSet<IpAddr>,
    /// Those of `servers` that may be on this node.
    pub servers_here: BTreeSet<SocketAddr>,
}

/// Why a service does not own what it claims.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ConflictCause {
    /// Another service with the same rank is older.
    Older(ObjectName, UsedAs),
    /// Another service has a stronger rank.
    Stronger(ObjectName),
    /// The address is the ClusterIP of a service.
    ClusterIp(ObjectName),
    /// The address lies in a ServiceCIDR.
    ServiceCidr(IpNet),
    /// A NodePort of a service answers there.
    NodePort(ObjectName),
    /// nftlet connects to the API server there.
    ApiServer,
}

impl ConflictCause {
    /// Returns the service that owns the claim or prevents others from owning it.
    pub(crate) fn owner(&self) -> Option<&ObjectName> {
        match self {
            ConflictCause::Older(name, _)
            | ConflictCause::Stronger(name)
            | ConflictCause::ClusterIp(name)
            | ConflictCause::NodePort(name) => Some(name),
            ConflictCause::ServiceCidr(_) | ConflictCause::ApiServer => None,
        }
    }
}

/// The use of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum UsedAs {
    Frontend,
    HealthCheck,
}

/// All claims of all services.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    queues: HashMap<Claim, SmallVec<[Claimant; 1]>>,
    /// The services that have a ClusterIP, regardless of ports.
    cluster_ips: HashMap<IpAddr, SmallVec<[ObjectName; 1]>>,
    /// The ports of addresses that are claimed as other than a ClusterIP.
    others: BTreeMap<IpAddr, HashSet<(Protocol, u16)>>,
    reserved: Reserved,
}

/// The effect of a change of claims on services.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct ClaimChanges {
    /// Other services that gained or lost a claim.
    pub affected: BTreeSet<ObjectName>,
    /// New claims that were not granted, and claims that services lost.
    pub(crate) lost: Vec<(Claim, Claimant)>,
}

impl Claims {
    /// Returns a service with this ClusterIP.
    pub(crate) fn with_cluster_ip(&self, address: IpAddr) -> Option<&ObjectName> {
        self.cluster_ips.get(&address)?.first()
    }

    /// Returns the service that owns a claim.
    pub fn owner(&self, claim: &Claim) -> Option<&ObjectName> {
        self.holder(claim).map(|claimant| &claimant.name)
    }

    /// Returns whether a service owns a port of the node as its health check.
    pub(crate) fn owns_health_check(&self, name: &ObjectName, port: u16) -> bool {
        let holder = self.holder(&Claim::NodePort(Protocol::Tcp, port));
        holder.is_some_and(|holder| holder.health_check && holder.name == *name)
    }

    fn holder(&self, claim: &Claim) -> Option<&Claimant> {
        let first = self.queues.get(claim)?.first()?;
        self.withheld(claim, first).is_none().then_some(first)
    }

    /// Returns why no service with the claimant's rank can own a claim.
    fn withheld(&self, claim: &Claim, claimant: &Claimant) -> Option<ConflictCause> {
        if claimant.rank == Rank::ClusterIp {
            return None;
        }
        let reserved = &self.reserved;
        match *claim {
            Claim::Address(address, protocol, port) => {
                if let Some(name) = self
                    .cluster_ips
                    .get(&address)
                    .and_then(|names| names.first())
                {
                    return Some(ConflictCause::ClusterIp(name.clone()));
                }
                let mut ranges = reserved.service_ranges.iter();
                if let Some(range) = ranges.find(|range| range.contains(&address)) {
                    return Some(ConflictCause::ServiceCidr(*range));
                }
                let server = SocketAddr::new(address, port);
                if protocol == Protocol::Tcp && reserved.servers.contains(&server) {
                    return Some(ConflictCause::ApiServer);
                }
                if !reserved.node_port_addresses.contains(&address) {
                    return None;
                }
                let node_port = self.holder(&Claim::NodePort(protocol, port))?;
                // A service's own NodePort does not conflict with its addresses.
                (node_port.name != claimant.name)
                    .then(|| ConflictCause::NodePort(node_port.name.clone()))
            }
            Claim::NodePort(Protocol::Tcp, port) => {
                let mut servers = reserved.servers_here.iter();
                servers
                    .any(|server| server.port() == port)
                    .then_some(ConflictCause::ApiServer)
            }
            Claim::NodePort(..) => None,
        }
    }

    /// Returns why a claimant does not own a claim; `None` if it does.
    pub(crate) fn conflict(&self, claim: &Claim, claimant: &Claimant) -> Option<ConflictCause> {
        let withheld = self.withheld(claim, claimant);
        withheld.or_else(|| {
            let first = self.queues.get(claim)?.first()?;
            let owner = first.name.clone();
            if owner == claimant.name {
                None
            } else if first.rank == claimant.rank {
                Some(ConflictCause::Older(owner, first.used_as()))
            } else {
                Some(ConflictCause::Stronger(owner))
            }
        })
    }

    /// Returns the claims of a service that it does not own.
    pub(crate) fn lacking(&self, service: &Service) -> Vec<(Claim, Claimant)> {
        let wishes = Wishes::of(Some(service));
        let lacking = wishes
            .iter()
            .filter(|(claim, ..)| self.owner(claim) != Some(&service.name));
        lacking
            .map(|wish| (wish.0, claimant(service, &wish)))
            .collect()
    }

    /// Continues a change until `most` claims of addresses are compared; the first call also
    /// changes the claims that depend on each other. Returns the effect, and whether the change is
    /// complete.
    pub(crate) fn advance(
        &mut self,
        claim_change: &mut ClaimChange,
        most: usize,
    ) -> (ClaimChanges, bool) {
        let mut changes = ClaimChanges::default();
        if !claim_change.is_begun() {
            changes = self.change_dependent(claim_change);
        }
        let (differences, more) = claim_change.next(most);
        let touched = differences.iter().map(|it| it.claim).collect();
        let others = self.apply_differences(claim_change, touched, &differences, |_| ());
        changes.affected.extend(others.affected);
        changes.lost.extend(others.lost);
        (changes, !more)
    }

    /// Changes the claims that depend on each other.
    fn change_dependent(&mut self, claim_change: &mut ClaimChange) -> ClaimChanges {
        let Some(name) = claim_change.name().cloned() else {
            return ClaimChanges::default();
        };
        let (before, after) = claim_change.cluster_ips();
        let mut touched = Vec::new();
        for difference in claim_change.node_ports() {
            touched.push(difference.claim);
            touched.extend(self.beside(&difference.claim));
        }
        for address in before.symmetric_difference(&after) {
            touched.extend(self.others_at(*address));
        }
        touched.sort_unstable();
        touched.dedup();
        let differences = touched.iter().filter_map(|claim| claim_change.at(*claim));
        let differences: Vec<ClaimDifference> = differences.collect();
        let changes =
            self.apply_differences(claim_change, touched.clone(), &differences, |claims| {
                for address in before.difference(&after) {
                    claims.drop_cluster_ip(*address, &name);
                }
                for address in after.difference(&before) {
                    let names = claims.cluster_ips.entry(*address).or_default();
                    names.push(name.clone());
                }
            });
        claim_change.begin(touched);
        changes
    }

    /// Applies some differences of a service's claims, and calls `also` at the same time.
    fn apply_differences(
        &mut self,
        claim_change: &ClaimChange,
        touched: Vec<Claim>,
        differences: &[ClaimDifference],
        also: impl FnOnce(&mut Self),
    ) -> ClaimChanges {
        let Some(name) = claim_change.name() else {
            return ClaimChanges::default();
        };
        let released: Vec<Wish> = differences.iter().filter_map(|it| it.released).collect();
        let taken: Vec<Wish> = differences.iter().filter_map(|it| it.taken).collect();
        let (old, new) = (claim_change.old(), claim_change.target());
        let gets = new.map(|new| (&**new, &*taken));
        self.apply_and_compare_owners(touched, name, gets, |claims| {
            if let Some(old) = old {
                claims.release(old, &released);
            }
            also(claims);
            if let Some(new) = new {
                claims.take(new, &taken);
            }
        })
    }

    /// Replaces the reserved addresses and ports.
    pub(crate) fn reserve(&mut self, reserved: Reserved) -> ClaimChanges {
        if self.reserved == reserved {
            return ClaimChanges::default();
        }
        let touched = self.touched_by(&reserved);
        let no_service = ObjectName::new("", "");
        self.apply_and_compare_owners(touched, &no_service, None, |claims| {
            claims.reserved = reserved;
        })
    }

    /// Returns the claims at addresses and ports that are reserved only before or only after a
    /// change.
    fn touched_by(&self, reserved: &Reserved) -> Vec<Claim> {
        let old = &self.reserved;
        let mut touched = Vec::new();
        for server in old.servers.symmetric_difference(&reserved.servers) {
            touched.push(Claim::Address(server.ip(), Protocol::Tcp, server.port()));
        }
        for server in old
            .servers_here
            .symmetric_difference(&reserved.servers_here)
        {
            let claim = Claim::NodePort(Protocol::Tcp, server.port());
            touched.push(claim);
            touched.extend(self.beside(&claim));
        }
        let of = |reserved: &Reserved| -> BTreeSet<IpNet> {
            reserved.service_ranges.iter().map(IpNet::trunc).collect()
        };
        for range in of(old).symmetric_difference(&of(reserved)) {
            for (address, _) in self.others.range(range.network()..=range.broadcast()) {
                touched.extend(self.others_at(*address));
            }
        }
        let addresses = &old.node_port_addresses;
        for address in addresses.symmetric_difference(&reserved.node_port_addresses) {
            touched.extend(self.others_at(*address));
        }
        touched
    }

    /// Applies `change` and compares the owners of the touched claims before and after. Finds other
    /// services that gained or lost a claim, and new wishes of the changing service that it does
    /// not get.
    fn apply_and_compare_owners(
        &mut self,
        mut touched: Vec<Claim>,
        changing: &ObjectName,
        wishes: Option<(&Service, &[Wish])>,
        change: impl FnOnce(&mut Self),
    ) -> ClaimChanges {
        touched.sort_unstable();
        touched.dedup();
        let holders = touched.iter().map(|claim| self.holder(claim).cloned());
        let before: Vec<Option<Claimant>> = holders.collect();
        change(self);
        let mut changes = ClaimChanges::default();
        for (claim, before) in touched.into_iter().zip(before) {
            let after = self.owner(&claim);
            if after != Some(changing)
                && let Some((service, wishes)) = wishes
                && let Ok(place) = wishes.binary_search_by_key(&claim, |wish| wish.0)
            {
                let wish = wishes.get(place).into_iter();
                let lacks = wish.map(|wish| (claim, claimant(service, wish)));
                changes.lost.extend(lacks);
            }
            if after == before.as_ref().map(|before| &before.name) {
                continue;
            }
            changes
                .affected
                .extend(after.filter(|name| *name != changing).cloned());
            if let Some(loser) = before.filter(|loser| loser.name != *changing) {
                changes.affected.insert(loser.name.clone());
                changes.lost.push((claim, loser));
            }
        }
        changes
    }

    /// Returns the claims of the addresses on which a port of the node answers.
    fn beside(&self, claim: &Claim) -> impl Iterator<Item = Claim> + '_ {
        let port = match *claim {
            Claim::NodePort(protocol, port) => Some((protocol, port)),
            Claim::Address(..) => None,
        };
        port.into_iter().flat_map(|(protocol, port)| {
            let addresses = self.reserved.node_port_addresses.iter();
            addresses.map(move |address| Claim::Address(*address, protocol, port))
        })
    }

    fn others_at(&self, address: IpAddr) -> impl Iterator<Item = Claim> + '_ {
        let ports = self.others.get(&address).into_iter().flatten();
        ports.map(move |(protocol, port)| Claim::Address(address, *protocol, *port))
    }

    fn release(&mut self, service: &Service, wishes: &[Wish]) {
        for wish in wishes {
            let claim = wish.0;
            let Some(queue) = self.queues.get_mut(&claim) else {
                continue;
            };
            if let Ok(place) = queue.binary_search(&claimant(service, wish)) {
                queue.remove(place);
            }
            if queue.is_empty() {
                self.queues.remove(&claim);
            }
            self.note_others(claim);
        }
    }

    fn take(&mut self, service: &Service, wishes: &[Wish]) {
        self.queues.reserve(wishes.len());
        for wish in wishes {
            let claim = wish.0;
            let claimant = claimant(service, wish);
            let queue = self.queues.entry(claim).or_default();
            if let Err(place) = queue.binary_search(&claimant) {
                queue.insert(place, claimant);
            }
            self.note_others(claim);
        }
    }

    /// Updates `others` after a change of a claim's queue, whose last claimant has the weakest
    /// rank.
    fn note_others(&mut self, claim: Claim) {
        let Claim::Address(address, protocol, port) = claim else {
            return;
        };
        let last = self.queues.get(&claim).and_then(|queue| queue.last());
        if last.is_some_and(|last| last.rank != Rank::ClusterIp) {
            let ports = self.others.entry(address).or_default();
            ports.insert((protocol, port));
        } else if let Some(ports) = self.others.get_mut(&address) {
            ports.remove(&(protocol, port));
            if ports.is_empty() {
                self.others.remove(&address);
            }
        }
    }

    fn drop_cluster_ip(&mut self, address: IpAddr, name: &ObjectName) {
        if let Some(names) = self.cluster_ips.get_mut(&address) {
            names.retain(|known| known != name);
            if names.is_empty() {
                self.cluster_ips.remove(&address);
            }
        }
    }
}

impl Claimant {
    pub(crate) fn used_as(&self) -> UsedAs {
        if self.health_check {
            UsedAs::HealthCheck
        } else {
            UsedAs::Frontend
        }
    }
}

fn claimant(service: &Service, (_, rank, health_check): &Wish) -> Claimant {
    Claimant {
        rank: *rank,
        created: age(service),
        name: service.name.clone(),
        health_check: *health_check,
    }
}

fn age(service: &Service) -> i64 {
    service.created.unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_what_is_reserved_looks_at_the_claims_there() {
        let mut claims = Claims::default();
        for last in 1..=200 {
            let address = IpAddr::from([198, 51, 100, last]);
            let claim = Claim::Address(address, Protocol::Tcp, 80);
            let claimant = Claimant {
                rank: Rank::ExternalIp,
                created: 0,
                name: ObjectName::new("shop", &last.to_string()),
                health_check: false,
            };
            claims.queues.entry(claim).or_default().push(claimant);
            claims.note_others(claim);
        }
        let ranges = |texts: &[&str]| Reserved {
            service_ranges: texts.iter().map(|text| text.parse().unwrap()).collect(),
            ..Reserved::default()
        };
        let mut touched = |reserved: Reserved| {
            let touched = claims.touched_by(&reserved).len();
            claims.reserved = reserved;
            touched
        };
        assert_eq!(touched(ranges(&["10.96.0.0/16"])), 0);
        assert_eq!(touched(ranges(&["10.96.0.0/16", "198.51.100.4/30"])), 4);
        assert_eq!(touched(ranges(&["198.51.100.4/30", "10.96.0.0/15"])), 0);
        assert_eq!(touched(ranges(&["10.96.0.0/15"])), 4);
        let mut of_node = ranges(&["10.96.0.0/15"]);
        of_node.node_port_addresses = [[198, 51, 100, 9].into()].into();
        assert_eq!(touched(of_node), 1);
    }
}
