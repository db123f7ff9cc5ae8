//! The touched parts of the tables, before and after; their difference is written.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::isolation::{Holder, Isolation};
use super::layout::{self, Direction, ISOLATED, TO_ITSELF};
use crate::model::Family;
use crate::nft::{Declaration, Element, Key, Name, Set, Table, Verdict};

/// The touched parts of one family's table.
#[derive(Debug, Default)]
pub(super) struct TableDelta {
    pub before: Table,
    pub after: Table,
}

impl TableDelta {
    /// Prepares the two sides for comparison: sorts elements, and adds the sets that every table
    /// has to both sides, since a set on one side only would be created or deleted.
    pub(crate) fn align(&mut self) {
        let both = Direction::ALL.into_iter();
        let names =
            both.flat_map(|direction| [direction.pods(0), direction.denied(), direction.links()]);
        for name in names.chain([ISOLATED, TO_ITSELF].map(Name::from)) {
            let sides = [&self.before, &self.after];
            let declaration = sides
                .into_iter()
                .find_map(|table| table.sets.get(&name).map(|set| set.declaration.clone()));
            for table in [&mut self.before, &mut self.after] {
                if let Some(declaration) = declaration.clone() {
                    table.sets.entry(name.clone()).or_insert(Set {
                        declaration,
                        elements: Vec::new(),
                    });
                }
            }
        }
        for table in [&mut self.before, &mut self.after] {
            table.sets.values_mut().for_each(sort);
        }
    }
}

pub(super) fn of(deltas: &mut [TableDelta; 2], family: Family) -> &mut TableDelta {
    let [v4, v6] = deltas;
    match family {
        Family::V4 => v4,
        Family::V6 => v6,
    }
}

/// Adds the interfaces that lead to isolated pods to a table or a part of one.
pub(super) fn add_links(table: &mut Table, links: &BTreeSet<(Direction, Arc<str>)>) {
    for (direction, link) in links {
        let set = table.sets.entry(direction.links()).or_insert(Set {
            declaration: layout::links(),
            elements: Vec::new(),
        });
        let key = Key::build().interface(link).finish();
        set.elements.push(Element::new(key));
    }
}

/// Sorts the elements of a set, each once: several pods that may have an address have the same.
pub(super) fn sort(set: &mut Set) {
    set.elements.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    set.elements.dedup_by(|a, b| a.key == b.key);
}

/// Adds the elements of an isolated address to a table or a part of one.
pub(super) fn isolate(table: &mut Table, address: IpAddr, plan: &Isolation, strict: bool) {
    let key = Key::address(address);
    let mut add = |set: Name, declaration: Arc<Declaration>, element: Element| {
        let elements = Vec::new();
        let set = table.sets.entry(set).or_insert(Set {
            declaration,
            elements,
        });
        set.elements.push(element);
    };
    for (direction, all) in &plan.holders {
        for (layer, Holder { profile, .. }) in all.iter().enumerate() {
            let verdict = Verdict::Goto(profile.chain(*direction));
            let element = Element::with_verdict(key.clone(), verdict);
            add(direction.pods(layer), layout::pods(), element);
            if !profile.audited.is_empty() {
                let set = profile.audited_set(*direction);
                add(set, layout::counted(), Element::new(key.clone()));
            }
        }
        if all.iter().any(|holder| holder.profile.is_enforced()) {
            let element = Element::new(key.clone());
            add(direction.denied(), layout::counted(), element);
        }
    }
    if strict && plan.is_enforced() {
        add(ISOLATED.into(), layout::addresses(), Element::new(key));
    }
    let itself = Key::build().address(address).address(address).finish();
    add(TO_ITSELF.into(), layout::ends(), Element::new(itself));
}
