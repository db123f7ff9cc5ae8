//! A change of the claims of a service that is applied in portions.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::{Claim, Rank, Wish, age};
use crate::model::{ObjectName, Protocol, Service};

/// A change of the claims of one service, which [`Claims::advance`] applies in portions.
///
/// Claims of addresses are independent of each other and change in the order of address and port.
/// The dependent claims change before them, all at once: NodePorts and ClusterIPs, with the claims
/// of addresses that they prevent.
///
/// [`Claims::advance`]: super::Claims::advance
#[derive(Debug)]
pub(crate) struct ClaimChange {
    old: Option<Arc<Service>>,
    new: Option<Arc<Service>>,
    before: Wishes,
    after: Wishes,
    /// Whether the age of the service changed, and with it its place in all queues.
    age_changed: bool,
    /// The claims that changed at once, sorted; `None` before that.
    changed_at_once: Option<Vec<Claim>>,
    /// How many claims of addresses of the old and the new version were compared.
    compared: (usize, usize),
}

/// A change of one claim.
#[derive(Debug)]
pub(super) struct ClaimDifference {
    pub claim: Claim,
    pub released: Option<Wish>,
    pub taken: Option<Wish>,
}

impl ClaimChange {
    /// Compares two versions of a service; `None` if it does not exist.
    pub(crate) fn new(old: Option<Arc<Service>>, new: Option<Arc<Service>>) -> Self {
        Self {
            before: Wishes::of(old.as_deref()),
            after: Wishes::of(new.as_deref()),
            age_changed: old.as_deref().map(age) != new.as_deref().map(age),
            old,
            new,
            changed_at_once: None,
            compared: (0, 0),
        }
    }

    pub(super) fn old(&self) -> Option<&Service> {
        self.old.as_deref()
    }

    /// Returns the new version of the service.
    pub(crate) fn target(&self) -> Option<&Arc<Service>> {
        self.new.as_ref()
    }

    pub(super) fn is_begun(&self) -> bool {
        self.changed_at_once.is_some()
    }

    /// Records the claims that changed at once, sorted.
    pub(super) fn begin(&mut self, changed_at_once: Vec<Claim>) {
        self.changed_at_once = Some(changed_at_once);
    }

    /// Returns the name of the service.
    pub(super) fn name(&self) -> Option<&ObjectName> {
        let service = self.new.as_ref().or(self.old.as_ref());
        service.map(|service| &service.name)
    }

    /// Returns the ClusterIPs before and after.
    pub(super) fn cluster_ips(&self) -> (BTreeSet<IpAddr>, BTreeSet<IpAddr>) {
        let of = |service: Option<&Arc<Service>>| {
            let addresses = service.into_iter().flat_map(|service| &service.cluster_ips);
            addresses.copied().collect()
        };
        (of(self.old.as_ref()), of(self.new.as_ref()))
    }

    pub(super) fn node_ports(&self) -> Vec<ClaimDifference> {
        let claims = self.before.node_ports.iter().chain(&self.after.node_ports);
        let claims: BTreeSet<Claim> = claims.map(|wish| wish.0).collect();
        claims.into_iter().filter_map(|it| self.at(it)).collect()
    }

    /// Returns the change of one claim, if any.
    pub(super) fn at(&self, claim: Claim) -> Option<ClaimDifference> {
        self.difference(claim, self.before.find(&claim), self.after.find(&claim))
    }

    /// Compares the next claims of addresses, up to `most`. Returns the differences, and whether
    /// more remain.
    pub(super) fn next(&mut self, most: usize) -> (Vec<ClaimDifference>, bool) {
        let (mut found, mut count) = (Vec::new(), 0);
        loop {
            let (before, after) = self.compared;
            let (before, after) = (self.before.address(before), self.after.address(after));
            let next = [before, after].into_iter().flatten().map(|wish| wish.0);
            let Some(claim) = next.min() else {
                return (found, false);
            };
            if count == most {
                return (found, true);
            }
            count += 1;
            let before = before.filter(|wish| wish.0 == claim);
            let after = after.filter(|wish| wish.0 == claim);
            self.compared.0 += usize::from(before.is_some());
            self.compared.1 += usize::from(after.is_some());
            let changed_at_once = self.changed_at_once.as_deref().unwrap_or_default();
            if changed_at_once.binary_search(&claim).is_err() {
                found.extend(self.difference(claim, before, after));
            }
        }
    }

    fn difference(
        &self,
        claim: Claim,
        before: Option<Wish>,
        after: Option<Wish>,
    ) -> Option<ClaimDifference> {
        let differs = before != after || (self.age_changed && before.is_some());
        differs.then_some(ClaimDifference {
            claim,
            released: before,
            taken: after,
        })
    }
}

/// All claims of a service, each once with its strongest rank; none for a service with too many
/// frontends.
///
/// The claims of addresses are the product of addresses and ports.
#[derive(Debug, Default)]
pub(super) struct Wishes {
    /// Sorted, each once.
    addresses: Vec<(IpAddr, Rank)>,
    /// Sorted, each once.
    ports: Vec<(Protocol, u16)>,
    /// Sorted, each claim once.
    node_ports: Vec<Wish>,
}

impl Wishes {
    pub(super) fn of(service: Option<&Service>) -> Self {
        let wants = |service: &&Service| service.has_frontends() && !service.is_oversized();
        let Some(service) = service.filter(wants) else {
            return Self::default();
        };
        let mut addresses = Vec::new();
        for (of_rank, rank) in [
            (&service.cluster_ips, Rank::ClusterIp),
            (&service.load_balancer_ips, Rank::LoadBalancerIp),
            (&service.external_ips, Rank::ExternalIp),
        ] {
            addresses.extend(of_rank.iter().map(|address| (*address, rank)));
        }
        addresses.sort_unstable();
        addresses.dedup_by_key(|(address, _)| *address);
        let ports = service.ports.iter();
        let mut ports: Vec<_> = ports.map(|port| (port.protocol, port.port)).collect();
        ports.sort_unstable();
        ports.dedup();
        let wish = |protocol, number, health_check| {
            let claim = Claim::NodePort(protocol, number);
            (claim, Rank::NodePort, health_check)
        };
        let of_ports = service.ports.iter();
        let of_ports = of_ports.filter_map(|it| Some(wish(it.protocol, it.node_port?, false)));
        let health_check = service.health_check_node_port;
        let health_check = health_check.map(|number| wish(Protocol::Tcp, number, true));
        let mut node_ports: Vec<Wish> = of_ports.chain(health_check).collect();
        node_ports.sort_unstable();
        node_ports.dedup_by_key(|(claim, ..)| *claim);
        Self {
            addresses,
            ports,
            node_ports,
        }
    }

    /// Returns all claims, sorted.
    pub(super) fn iter(&self) -> impl Iterator<Item = Wish> + '_ {
        let addresses = (0..).map_while(|place| self.address(place));
        addresses.chain(self.node_ports.iter().copied())
    }

    /// Returns the claim of an address with a place in their order.
    fn address(&self, place: usize) -> Option<Wish> {
        let (address, port) = (
            place.checked_div(self.ports.len())?,
            place.checked_rem(self.ports.len())?,
        );
        let (address, rank) = *self.addresses.get(address)?;
        let (protocol, port) = *self.ports.get(port)?;
        Some((Claim::Address(address, protocol, port), rank, false))
    }

    fn find(&self, claim: &Claim) -> Option<Wish> {
        match *claim {
            Claim::Address(address, protocol, port) => {
                self.ports.binary_search(&(protocol, port)).ok()?;
                let addresses = &self.addresses;
                let place = addresses.binary_search_by_key(&address, |(address, _)| *address);
                let (_, rank) = *addresses.get(place.ok()?)?;
                Some((*claim, rank, false))
            }
            Claim::NodePort(..) => {
                let place = self.node_ports.binary_search_by_key(claim, |wish| wish.0);
                self.node_ports.get(place.ok()?).copied()
            }
        }
    }
}
