//! Frontends that a comparison with the kernel changes and that an earlier process, or another
//! program, wrote.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;

use super::dispatch::has_local_policy;
use super::layout::{By, ServiceSet, table_id};
use super::plan::Target;
use crate::model::{Family, Protocol};
use crate::nft::{Data, Element, Key, Name, Op, Ruleset, TableId, Transaction};
use crate::services::Claim;

/// Frontends in the kernel that a comparison changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemovedFrontends {
    /// Frontends that were deleted.
    pub deleted: HashSet<(Family, Claim)>,
    /// Frontends whose external policy became Local.
    pub became_local: HashSet<(Family, Claim)>,
}

/// The maps of frontends.
const FRONTENDS: [(ServiceSet, By); 2] = [
    (ServiceSet::Frontends, By::Address),
    (ServiceSet::NodePorts, By::NodePort),
];

impl RemovedFrontends {
    /// Adds the frontends of a later comparison.
    pub fn append(&mut self, later: Self) {
        self.deleted.extend(later.deleted);
        self.became_local.extend(later.became_local);
    }

    /// Returns the frontends of the actual ruleset that a transaction changes.
    pub fn of(actual: &Ruleset, transaction: &Transaction) -> Self {
        let mut removed = Self::default();
        for family in Family::ALL {
            let id = table_id(family);
            for (set, by) in FRONTENDS {
                let changed = changed(actual, transaction, &id, &set.name());
                for (key, (before, after)) in changed {
                    let Some(claim) = claim(family, by, key) else {
                        continue;
                    };
                    if after.is_none() {
                        removed.deleted.insert((family, claim));
                    }
                    let is_local =
                        |element: Option<&Element>| element.is_some_and(has_local_policy);
                    if before.is_some() && is_local(after) && !is_local(before) {
                        removed.became_local.insert((family, claim));
                    }
                }
            }
        }
        removed
    }
}

type BeforeAfter<'a> = (Option<&'a Element>, Option<&'a Element>);

/// Returns the elements of a set that a transaction deletes or replaces, before and after.
fn changed<'a>(
    actual: &'a Ruleset,
    transaction: &'a Transaction,
    id: &TableId,
    name: &Name,
) -> BTreeMap<&'a Key, BeforeAfter<'a>> {
    let mut changed: BTreeMap<&Key, BeforeAfter> = BTreeMap::new();
    for op in &transaction.ops {
        let deleted = match op {
            Op::DeleteElements(table, set, _, elements) if table == id && set == name => elements,
            Op::DeleteTable(table) if table == id => {
                let set = actual.tables.get(id).and_then(|table| table.sets.get(name));
                let Some(set) = set else { continue };
                &set.elements
            }
            Op::AddElements(table, set, _, elements) if table == id && set == name => {
                for element in elements {
                    if let Some((_, after)) = changed.get_mut(&element.key) {
                        *after = Some(element);
                    }
                }
                continue;
            }
            _ => continue,
        };
        for element in deleted {
            changed.insert(&element.key, (Some(element), None));
        }
    }
    changed
}

/// Returns the frontend with a key; `None` if nftlet never writes such a key.
fn claim(family: Family, by: By, key: &Key) -> Option<Claim> {
    let bytes = key.as_bytes();
    let (at, port) = match by {
        By::Address => {
            let (at, port) = bytes.split_at_checked(match family {
                Family::V4 => 4,
                Family::V6 => 16,
            })?;
            (Some(address(at)?), port)
        }
        By::NodePort => (None, bytes),
    };
    let protocol = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
        .into_iter()
        .find(|protocol| port.first() == Some(&protocol.number()))?;
    let number = self::port(port.get(4..)?)?;
    Some(match at {
        Some(at) => Claim::Address(at, protocol, number),
        None => Claim::NodePort(protocol, number),
    })
}

/// Reads an endpoint from the value of an affinity map.
pub fn target(data: &Data) -> Option<Target> {
    let bytes = data.as_bytes();
    // The port and its padding follow the address.
    let (at, port) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
    Some((address(at)?, self::port(port)?))
}

/// Reads an address from the bytes of a key.
pub fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}

/// Reads a port from the bytes of a key.
pub fn port(bytes: &[u8]) -> Option<u16> {
    let (port, _) = bytes.split_first_chunk::<2>()?;
    Some(u16::from_be_bytes(*port))
}
