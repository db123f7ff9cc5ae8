//! The number of set elements of a service, computed before it is compiled.
//!
//! Every frontend has an element for each of its endpoints, so a small object can need very many.
//! Endpoints without traffic are counted as well, because they may become ready at any time.

use thiserror::Error;

use crate::model::{Family, MOST_ELEMENTS, Node, ObjectName, Service, TrafficPolicy};
use crate::services::{SlicesOf, Store};

/// A service needs more set elements than the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "needs {elements} set elements (ports times addresses times endpoints), more than the limit of \
     {MOST_ELEMENTS}; it has no rules: divide it into several services"
)]
pub struct TooLarge {
    /// The number that it needs; [`usize::MAX`] for an overflow.
    pub elements: usize,
}

/// Returns the number of set elements of a service; 0 if it does not exist.
pub fn elements(store: &Store, name: &ObjectName) -> usize {
    let service = store.service(name).filter(|s| s.has_frontends());
    let node = store.node().map(|node| &**node);
    service.map_or(0, |service| {
        elements_of(service, &store.slices_of(name), node)
    })
}

/// Checks the number of set elements of a service.
pub(super) fn check(
    service: &Service,
    slices: &SlicesOf,
    node: Option<&Node>,
) -> Result<(), TooLarge> {
    let elements = elements_of(service, slices, node).max(service.frontends());
    if elements > MOST_ELEMENTS {
        return Err(TooLarge { elements });
    }
    Ok(())
}

fn elements_of(service: &Service, slices: &SlicesOf, node: Option<&Node>) -> usize {
    let node = node.map(|node| &*node.name);
    // For each slice: the endpoints, and those on this node.
    let counts: Vec<(usize, usize)> = slices
        .all()
        .map(|slice| {
            let mine = slice.endpoints.iter();
            let mine = mine.filter(|e| node.is_some() && e.node.as_deref() == node);
            (slice.endpoints.len(), mine.count())
        })
        .collect();
    // Endpoints that may be on this node.
    let possibly_here = slices.all().map(|slice| {
        let unknown = slice.endpoints.iter();
        unknown
            .filter(|e| e.node.is_none() || node.is_none() || e.node.as_deref() == node)
            .count()
    });
    let mut sum = possibly_here.fold(service.cluster_ips.len(), usize::saturating_add);
    let policy_local = service.external_policy == TrafficPolicy::Local;
    for family in Family::ALL {
        let of = |addresses: &[std::net::IpAddr]| {
            let own = addresses.iter().filter(|a| Family::of(**a) == family);
            own.count()
        };
        let cluster_ips = of(&service.cluster_ips);
        let balancers = of(&service.load_balancer_ips);
        let external_ips = of(&service.external_ips);
        let ranges = service.source_ranges.iter();
        let ranges = ranges.filter(|net| Family::of(net.addr()) == family);
        if balancers > 0 {
            sum = sum.saturating_add(ranges.count());
        }
        for port in &service.ports {
            let (mut endpoints, mut local) = (0usize, 0usize);
            for (place, ..) in slices.of(port, family) {
                let (all, mine) = counts.get(place).copied().unwrap_or_default();
                endpoints = endpoints.saturating_add(all);
                local = local.saturating_add(mine);
            }
            let node_port = usize::from(port.node_port.is_some() && cluster_ips > 0);
            let external = balancers
                .saturating_add(external_ips)
                .saturating_add(node_port);
            // One for the frontend, two for session affinity.
            let leads = 1 + 2 * usize::from(service.affinity_seconds.is_some());
            let each = endpoints.saturating_add(leads);
            let each_external = if policy_local {
                each.saturating_add(local).saturating_add(1)
            } else {
                each
            };
            sum = sum
                .saturating_add(cluster_ips.saturating_mul(each))
                .saturating_add(external.saturating_mul(each_external))
                // The verdicts for clients in the source ranges.
                .saturating_add(balancers);
        }
    }
    sum
}
