//! Cuts large changes of tables in use, so that others get their turn between two transactions.
//!
//! Each portion holds some of the changed services as a whole, so that every service is as before or as
//! after it whenever a packet comes. That would not do for a frontend that moves from one service to
//! another, so changes are cut only where nothing but endpoints changed: as after a relist, or a
//! rollout of everything.

use std::collections::{BTreeSet, VecDeque};
use std::mem;

use crate::model::{Changes, ObjectName, Store};

/// The endpoints in a portion, unless a service alone has more. Where all of them are others a
/// transaction deletes and adds as many elements as a step of a large table that is made.
const MOST_ENDPOINTS: usize = 4_000;

/// The services of changes in the portions that are written one after the other; there is always one.
pub fn cut(store: &Store, changes: &mut Changes) -> VecDeque<BTreeSet<ObjectName>> {
    let services = mem::take(&mut changes.services);
    let whole = changes.frontends || changes.node || changes.service_cidrs;
    if whole || services.len() <= 1 {
        return [services].into();
    }
    let (mut portions, mut portion, mut endpoints) = (VecDeque::new(), BTreeSet::new(), 0);
    for name in services {
        let more = store.endpoints_of(&name);
        if endpoints + more > MOST_ENDPOINTS && !portion.is_empty() {
            portions.push_back(mem::take(&mut portion));
            endpoints = 0;
        }
        endpoints += more;
        portion.insert(name);
    }
    portions.push_back(portion);
    portions
}
