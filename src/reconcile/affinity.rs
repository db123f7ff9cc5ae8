//! Forgetting clients whose endpoint went away.
//!
//! Packets fill the affinity map: (client, frontend) to the endpoint the client was sent to. It
//! is nftlet's task to remove the elements whose endpoint no longer serves the frontend; until
//! then their clients would go on to be sent there. [`Remembered`] collects, from the plans that
//! change, which endpoints clients of a frontend may still be sent to.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use super::{Kernel, Reconciler};
use crate::compile::{self, AFFINITY, Route, Scope, ServicePlan, Target};
use crate::model::{Claim, Family, Protocol};
use crate::netlink;
use crate::ruleset::{Element, Op, Transaction, Value};

/// How often remembered clients are read again when some time out meanwhile.
const FORGET_ATTEMPTS: usize = 8;

/// The endpoints that clients may still be sent to, for the frontends that lost some.
#[derive(Debug, Default)]
pub struct Remembered {
    allowed: HashMap<(Family, Claim), Allowed>,
    /// Whether a frontend that is not listed has no clients to remember at all.
    complete: bool,
    /// Where the clients are that external policy Local does not bind: the pods and the node.
    inside: Vec<IpNet>,
}

/// The endpoints of one frontend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Allowed {
    /// For pods and the node.
    inside: BTreeSet<Target>,
    /// For all others: fewer under external policy Local.
    outside: BTreeSet<Target>,
}

impl Allowed {
    fn extend(&mut self, other: Allowed) {
        self.inside.extend(other.inside);
        self.outside.extend(other.outside);
    }

    fn is_subset(&self, other: &Allowed) -> bool {
        self.inside.is_subset(&other.inside) && self.outside.is_subset(&other.outside)
    }
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
            if !before.is_subset(&now) || self.allowed.contains_key(&frontend) {
                self.allowed.entry(frontend).or_default().extend(now);
            }
        }
        for (frontend, now) in after {
            if let Some(allowed) = self.allowed.get_mut(&frontend) {
                allowed.extend(now);
            }
        }
    }

    /// Adds what other changes did, of other services.
    pub fn merge(&mut self, others: Self) {
        for (frontend, allowed) in others.allowed {
            self.allowed.entry(frontend).or_default().extend(allowed);
        }
    }

    /// Sets where pods and the node are, as far as that is known by address.
    pub fn set_inside(&mut self, networks: Vec<IpNet>) {
        self.inside = networks;
    }

    /// Whether no client needs to be forgotten in a family.
    pub fn is_empty(&self, family: Family) -> bool {
        !self.complete && self.allowed.keys().all(|(of, _)| *of != family)
    }

    /// The elements of the affinity map whose endpoint no longer serves their frontend. `owned`
    /// tells whether a service has a frontend now: where one has the address, a port of the same
    /// number that another one has on the nodes is not meant.
    pub fn stale(
        &self,
        family: Family,
        elements: Vec<Element>,
        owned: impl Fn(&Claim) -> bool,
    ) -> Vec<Element> {
        let mut stale = elements;
        stale.retain(|element| {
            let Some(entry) = Entry::read(family, element) else {
                return false;
            };
            let address = Claim::Address(entry.address, entry.protocol, entry.port);
            let node_port = Claim::NodePort(entry.protocol, entry.port);
            let by_address = self.allowed.get(&(family, address));
            let known = match by_address {
                None if !owned(&address) => self.allowed.get(&(family, node_port)),
                _ => by_address,
            };
            known.map_or(self.complete, |allowed| {
                let inside = self.inside.iter().any(|net| net.contains(&entry.client));
                let endpoints = if inside {
                    &allowed.inside
                } else {
                    &allowed.outside
                };
                !endpoints.contains(&entry.target)
            })
        });
        stale
    }
}

/// The endpoints of each frontend whose clients are remembered.
fn targets(plan: Option<&ServicePlan>) -> HashMap<(Family, Claim), Allowed> {
    let Some(plan) = plan.filter(|plan| plan.affinity_seconds.is_some()) else {
        return HashMap::new();
    };
    let mut found: HashMap<(Family, Claim), Allowed> = HashMap::new();
    for (frontend, pool) in plan.reach() {
        let allowed = found.entry((pool.family, frontend.at)).or_default();
        let bound = matches!(frontend.route, Route::LocalPolicy { .. });
        if !bound || pool.scope == Scope::Cluster {
            allowed.inside.extend(&pool.targets);
        }
        if !bound || pool.scope == Scope::Local {
            allowed.outside.extend(&pool.targets);
        }
    }
    found
}

impl<K: Kernel> Reconciler<'_, K> {
    /// Forgets the clients that are remembered for an endpoint that went away.
    ///
    /// This follows the transaction that took the endpoint away: the other way round a client
    /// could be sent there, and be remembered for it, once more.
    pub(super) fn forget(&mut self, mut remembered: Remembered) {
        let node = self.store.node().map(|node| &**node);
        let pods = Family::ALL.map(|family| self.settings.pod_networks(family, node));
        let own = node.map(|node| [&node.internal_ips[..], &node.external_ips].concat());
        let own = own.unwrap_or_default().into_iter().map(IpNet::from);
        remembered.set_inside(pods.into_iter().flatten().chain(own).collect());
        for family in Family::ALL {
            if remembered.is_empty(family) {
                continue;
            }
            for attempt in 1..=FORGET_ATTEMPTS {
                match self.forget_once(family, &remembered) {
                    Ok(()) => break,
                    Err(error) if attempt < FORGET_ATTEMPTS => {
                        // An element that times out between reading and deleting fails the
                        // whole transaction; what is left is read again.
                        tracing::debug!("session affinity: {error}");
                    }
                    Err(error) => tracing::warn!(
                        "{error}; clients with session affinity may stay with {family} endpoints \
                         that are gone until the next change of their service"
                    ),
                }
            }
        }
    }

    fn forget_once(
        &mut self,
        family: Family,
        remembered: &Remembered,
    ) -> Result<(), netlink::Error> {
        let table = compile::table_id(family);
        let known = self.kernel.elements(&table, AFFINITY)?;
        let stale = remembered.stale(family, known, |claim| self.store.owner(claim).is_some());
        if stale.is_empty() {
            return Ok(());
        }
        let declaration = compile::affinity_declaration();
        let ops = vec![Op::DeleteElements(
            table,
            AFFINITY.into(),
            declaration,
            stale,
        )];
        self.write(Transaction { ops })
    }
}

/// An element of the affinity map.
struct Entry {
    client: IpAddr,
    address: IpAddr,
    protocol: Protocol,
    port: u16,
    target: Target,
}

impl Entry {
    fn read(family: Family, element: &Element) -> Option<Self> {
        let Value::Data(data) = &element.value else {
            return None;
        };
        let length = match family {
            Family::V4 => 4,
            Family::V6 => 16,
        };
        let (client, frontend) = element.key.as_bytes().split_at_checked(length)?;
        let (at, rest) = frontend.split_at_checked(length)?;
        let protocol = match rest.first()? {
            6 => Protocol::Tcp,
            17 => Protocol::Udp,
            132 => Protocol::Sctp,
            _ => return None,
        };
        let (endpoint, endpoint_port) = data.as_bytes().split_at_checked(length)?;
        Some(Self {
            client: address(client)?,
            address: address(at)?,
            protocol,
            port: number(rest.get(4..)?)?,
            target: (address(endpoint)?, number(endpoint_port)?),
        })
    }
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
