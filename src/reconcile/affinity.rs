//! Forgetting clients whose endpoint went away.
//!
//! Packets fill the affinity map: (client, frontend) to the endpoint the client was sent to. It
//! is nftlet's task to remove the elements whose endpoint no longer serves the frontend; until
//! then their clients would go on to be sent there. [`Remembered`] collects, from the plans that
//! change, which endpoints clients of a frontend may still be sent to.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use crate::compile::{ServicePlan, Target};
use crate::model::{Claim, Family, Protocol};
use crate::ruleset::{Element, Key, Value};

/// The endpoints that clients may still be sent to, for the frontends that lost some.
#[derive(Debug, Default)]
pub struct Remembered {
    allowed: HashMap<(Family, Claim), BTreeSet<Target>>,
    /// Whether a frontend that is not listed has no clients to remember at all.
    complete: bool,
}

impl Remembered {
    /// What all plans allow: everything else is stale.
    pub fn all<'a>(plans: impl IntoIterator<Item = &'a ServicePlan>) -> Self {
        let mut remembered = Self {
            complete: true,
            ..Self::default()
        };
        for plan in plans {
            remembered.allowed.extend(targets(Some(plan)));
        }
        remembered
    }

    /// Notes that a plan replaces another.
    pub fn replace(&mut self, old: Option<&ServicePlan>, new: Option<&ServicePlan>) {
        let mut after = targets(new);
        for (frontend, before) in targets(old) {
            let now = after.remove(&frontend).unwrap_or_default();
            // Two changed services may pass a frontend on to one another, in either order.
            let lost = !before.is_subset(&now);
            if lost || self.allowed.contains_key(&frontend) {
                self.allowed.entry(frontend).or_default().extend(now);
            }
        }
        for (frontend, now) in after {
            if let Some(allowed) = self.allowed.get_mut(&frontend) {
                allowed.extend(now);
            }
        }
    }

    /// Whether no client needs to be forgotten in a family.
    pub fn is_empty(&self, family: Family) -> bool {
        !self.complete && self.allowed.keys().all(|(of, _)| *of != family)
    }

    /// The elements of the affinity map whose endpoint no longer serves their frontend.
    pub fn stale(&self, family: Family, elements: Vec<Element>) -> Vec<Element> {
        let mut stale = elements;
        stale.retain(|element| {
            let Some((address, frontend, target)) = read(family, element) else {
                return false;
            };
            let by_address = Claim::Address(address, frontend.0, frontend.1);
            let by_port = Claim::NodePort(frontend.0, frontend.1);
            let allowed = self
                .allowed
                .get(&(family, by_address))
                .or_else(|| self.allowed.get(&(family, by_port)));
            allowed.map_or(self.complete, |allowed| !allowed.contains(&target))
        });
        stale
    }
}

/// The endpoints of each frontend whose clients are remembered.
fn targets(plan: Option<&ServicePlan>) -> HashMap<(Family, Claim), BTreeSet<Target>> {
    let Some(plan) = plan.filter(|plan| plan.affinity_seconds.is_some()) else {
        return HashMap::new();
    };
    let mut found: HashMap<(Family, Claim), BTreeSet<Target>> = HashMap::new();
    for (frontend, pool) in plan.reach() {
        found
            .entry((pool.family, frontend.at))
            .or_default()
            .extend(&pool.targets);
    }
    found
}

/// Frontend address, protocol and port, and endpoint of an element of the affinity map.
fn read(family: Family, element: &Element) -> Option<(IpAddr, (Protocol, u16), Target)> {
    let Value::Data(data) = &element.value else {
        return None;
    };
    let length = match family {
        Family::V4 => 4,
        Family::V6 => 16,
    };
    let key = element.key.as_bytes();
    let frontend = key.get(length..)?;
    let protocol = match frontend.get(length)? {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        132 => Protocol::Sctp,
        _ => return None,
    };
    let port = frontend.get(length + 4..)?;
    Some((
        address(frontend.get(..length)?)?,
        (protocol, number(port)?),
        target(data, length)?,
    ))
}

fn target(data: &Key, length: usize) -> Option<Target> {
    let bytes = data.as_bytes();
    Some((
        address(bytes.get(..length)?)?,
        number(bytes.get(length..)?)?,
    ))
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}

fn number(bytes: &[u8]) -> Option<u16> {
    let (port, _) = bytes.split_first_chunk::<2>()?;
    Some(u16::from_be_bytes(*port))
}
