//! Who owns a frontend that several services ask for, and which frontends no service gets.
//!
//! An address and port, or a port of the node, can lead to one service only. A ClusterIP comes
//! before the address of a load balancer, and that before an external IP; among equals the
//! oldest service has it (by `metadata.creationTimestamp`, then by name). When the owner lets go,
//! the next one gets it.
//!
//! ClusterIPs are given out by the API server, all other addresses are written by whoever may
//! write a Service. So the latter get nothing at an address that is the ClusterIP of another
//! service or lies in a ServiceCIDR, where a NodePort answers, and where nftlet itself reaches the
//! API server ([`Reserved`]).

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use foldhash::{HashMap, HashSet};
use ipnet::IpNet;
use smallvec::SmallVec;

use crate::model::{ObjectName, Protocol, Service};
use takeover::{ClaimDifference, Wishes};

mod takeover;

pub(crate) use takeover::Takeover;

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
                write!(f, "{} {protocol}", SocketAddr::new(*address, *port))
            }
            Claim::NodePort(protocol, port) => write!(f, "NodePort {port} {protocol}"),
        }
    }
}

/// What a claim is to a service, the strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    ClusterIp,
    NodePort,
    LoadBalancerIp,
    ExternalIp,
}

/// A service's place in the queue for a claim; the smallest one is the first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Claimant {
    rank: Rank,
    created: i64,
    pub(crate) name: ObjectName,
    /// Whether the port of the node is a `healthCheckNodePort`.
    health_check: bool,
}

/// What a service asks for, without the service.
type Wish = (Claim, Rank, bool);

/// Addresses and ports that are not for services to take, whatever they ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reserved {
    /// The ranges of ClusterIPs.
    pub service_ranges: Vec<IpNet>,
    /// Where nftlet's own connections to the API server lead.
    pub servers: BTreeSet<SocketAddr>,
    /// Addresses of the node on which NodePorts answer.
    pub node_port_addresses: BTreeSet<IpAddr>,
    /// Those of the servers that may be on this node.
    pub servers_here: BTreeSet<SocketAddr>,
}

/// Why a service does not get what it claims.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ConflictCause {
    /// Another service claims it too, is older, and has no other rank.
    Older(ObjectName, UsedAs),
    /// Another service claims it with a better rank.
    Stronger(ObjectName),
    /// The address is the ClusterIP of a service.
    ClusterIp(ObjectName),
    /// The address lies in a ServiceCIDR.
    ServiceCidr(IpNet),
    /// A NodePort of a service answers there.
    NodePort(ObjectName),
    /// nftlet reaches the API server there.
    ApiServer,
}

impl ConflictCause {
    /// The service that has the claim, or keeps others from it.
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

/// What the owner of a claim uses it as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum UsedAs {
    Frontend,
    HealthCheck,
}

/// All claims of all services.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    queues: HashMap<Claim, SmallVec<[Claimant; 1]>>,
    /// The services that have a ClusterIP, whatever their ports.
    cluster_ips: HashMap<IpAddr, SmallVec<[ObjectName; 1]>>,
    /// The ports at which addresses are claimed otherwise than as a ClusterIP.
    others: HashMap<IpAddr, HashSet<(Protocol, u16)>>,
    reserved: Reserved,
}

/// What a change of claims means for services.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct ClaimChanges {
    /// Other services that gained or lost a claim.
    pub affected: BTreeSet<ObjectName>,
    /// Services that ask for something new that they do not get, or lost what they had.
    pub(crate) lost: Vec<(Claim, Claimant)>,
}

impl Claims {
    /// The service that has a claim.
    pub fn owner(&self, claim: &Claim) -> Option<&ObjectName> {
        self.holder(claim).map(|claimant| &claimant.name)
    }

    /// Whether a port of the node is the health check of this service and of nothing else.
    pub(crate) fn owns_health_check(&self, name: &ObjectName, port: u16) -> bool {
        let holder = self.holder(&Claim::NodePort(Protocol::Tcp, port));
        holder.is_some_and(|holder| holder.health_check && holder.name == *name)
    }

    fn holder(&self, claim: &Claim) -> Option<&Claimant> {
        let first = self.queues.get(claim)?.first()?;
        self.withheld(claim, first).is_none().then_some(first)
    }

    /// Why nobody of a claimant's rank gets a claim.
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
                // A service's own NodePort takes nothing away from it.
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

    /// Why a claimant does not have a claim; `None` where it has it.
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

    /// The claims that a service asks for and does not have.
    pub(crate) fn lacking(&self, service: &Service) -> Vec<(Claim, Claimant)> {
        let wishes = Wishes::of(Some(service));
        let lacking = wishes
            .iter()
            .filter(|(claim, ..)| self.owner(claim) != Some(&service.name));
        lacking
            .map(|wish| (wish.0, claimant(service, &wish)))
            .collect()
    }

    /// Makes a change as far as so many claims of addresses are compared; with the first call also
    /// what changes together. Returns what that means, and whether the change is complete.
    pub(crate) fn advance(&mut self, takeover: &mut Takeover, most: usize) -> (ClaimChanges, bool) {
        let mut changes = ClaimChanges::default();
        if !takeover.is_begun() {
            changes = self.change_together(takeover);
        }
        let (differences, more) = takeover.next(most);
        let touched = differences.iter().map(|it| it.claim).collect();
        let others = self.change(takeover, touched, &differences, |_| ());
        changes.affected.extend(others.affected);
        changes.lost.extend(others.lost);
        (changes, !more)
    }

    /// Makes the part of a change in which claims depend on each other.
    fn change_together(&mut self, takeover: &mut Takeover) -> ClaimChanges {
        let Some(name) = takeover.name().cloned() else {
            return ClaimChanges::default();
        };
        let (before, after) = takeover.cluster_ips();
        let mut touched = Vec::new();
        for difference in takeover.node_ports() {
            touched.push(difference.claim);
            touched.extend(self.beside(&difference.claim));
        }
        for address in before.symmetric_difference(&after) {
            touched.extend(self.others_at(*address));
        }
        touched.sort_unstable();
        touched.dedup();
        let differences = touched.iter().filter_map(|claim| takeover.at(*claim));
        let differences: Vec<ClaimDifference> = differences.collect();
        let changes = self.change(takeover, touched.clone(), &differences, |claims| {
            for address in before.difference(&after) {
                claims.drop_cluster_ip(*address, &name);
            }
            for address in after.difference(&before) {
                let names = claims.cluster_ips.entry(*address).or_default();
                names.push(name.clone());
            }
        });
        takeover.begin(touched);
        changes
    }

    /// Changes some claims of a service, and what else is to change with them.
    fn change(
        &mut self,
        takeover: &Takeover,
        touched: Vec<Claim>,
        differences: &[ClaimDifference],
        also: impl FnOnce(&mut Self),
    ) -> ClaimChanges {
        let Some(name) = takeover.name() else {
            return ClaimChanges::default();
        };
        let released: Vec<Wish> = differences.iter().filter_map(|it| it.released).collect();
        let taken: Vec<Wish> = differences.iter().filter_map(|it| it.taken).collect();
        let (old, new) = (takeover.old(), takeover.target());
        let gets = new.map(|new| (&**new, &*taken));
        self.compare(touched, name, gets, |claims| {
            if let Some(old) = old {
                claims.release(old, &released);
            }
            also(claims);
            if let Some(new) = new {
                claims.take(new, &taken);
            }
        })
    }

    /// Replaces what no service may take. A change of the servers alone looks at their claims; any
    /// other one looks at all claims of addresses that are no ClusterIPs.
    pub(crate) fn reserve(&mut self, reserved: Reserved) -> ClaimChanges {
        let old = &self.reserved;
        if *old == reserved {
            return ClaimChanges::default();
        }
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
        if old.service_ranges != reserved.service_ranges
            || old.node_port_addresses != reserved.node_port_addresses
        {
            for address in self.others.keys() {
                touched.extend(self.others_at(*address));
            }
        }
        let no_service = ObjectName::new("", "");
        self.compare(touched, &no_service, None, |claims| {
            claims.reserved = reserved;
        })
    }

    /// Makes a change and finds out which services other than the changing one it gave claims to
    /// or took them from, and which of its new wishes, all of them touched, the changing one does
    /// not get.
    fn compare(
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

    /// The claims of addresses on which a port of the node answers.
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

    /// Brings `others` in line with the queue of a claim, whose last claimant has the worst rank.
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
