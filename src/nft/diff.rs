//! The difference between two rulesets.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use super::name::Name;
use super::table::{Chain, Element, Ruleset, Set, SetKind, Table, TableId};
use super::transaction::{Op, Transaction};

/// Returns the transaction that turns `actual` into `wanted`.
///
/// Equal parts are not touched. A chain whose rules differ is flushed and filled again; of a set
/// only the elements that differ are changed. A table is replaced as a whole if it is foreign or
/// the declaration of a set differs, because the kernel cannot redeclare a set in use. Tables that
/// are not in `wanted` are deleted.
///
/// `wanted` is consumed to avoid copies of the elements of new sets.
pub fn diff(actual: &Ruleset, mut wanted: Ruleset) -> Transaction {
    let mut ops = Vec::new();
    for id in actual.tables.keys() {
        if !wanted.tables.contains_key(id) {
            ops.push(Op::DeleteTable(id.clone()));
        }
    }
    while let Some((id, table)) = wanted.tables.pop_first() {
        let empty = Table::default();
        let before = match actual.tables.get(&id) {
            Some(before) if updatable(before, &table) => before,
            other => {
                if other.is_some() {
                    ops.push(Op::DeleteTable(id.clone()));
                }
                ops.push(Op::AddTable(id.clone()));
                &empty
            }
        };
        diff_table(&id, before, table, &mut ops);
    }
    Transaction { ops }
}

/// Returns the transaction that adds chains and sets to the tables of `actual`, or replaces those of
/// the same names. A set without elements in `parts` keeps its elements.
///
/// A table that cannot be updated is replaced by the parts alone.
pub fn add_parts(actual: &Ruleset, mut parts: Ruleset) -> Transaction {
    let mut before = Ruleset::default();
    for (id, part) in &mut parts.tables {
        let Some(table) = actual.tables.get(id) else {
            continue;
        };
        let mut same = Table {
            foreign: !updatable(table, part),
            ..Table::default()
        };
        for (name, set) in &mut part.sets {
            let Some(old) = table.sets.get(name).filter(|_| !same.foreign) else {
                continue;
            };
            if set.elements.is_empty() {
                set.elements.clone_from(&old.elements);
            }
            same.sets.insert(name.clone(), old.clone());
        }
        for name in part.chains.keys() {
            if let Some(old) = table.chains.get(name) {
                same.chains.insert(name.clone(), old.clone());
            }
        }
        before.tables.insert(id.clone(), same);
    }
    diff(&before, parts)
}

/// Returns whether one table can become the other without being replaced.
fn updatable(before: &Table, after: &Table) -> bool {
    !before.foreign
        && after.sets.iter().all(|(name, set)| {
            let old = before.sets.get(name);
            old.is_none_or(|old| old.declaration == set.declaration)
        })
}

fn diff_table(id: &TableId, before: &Table, after: Table, ops: &mut Vec<Op>) {
    for (name, set) in &after.sets {
        if !before.sets.contains_key(name) {
            ops.push(Op::AddSet(
                id.clone(),
                name.clone(),
                set.declaration.clone(),
            ));
        }
    }
    let unused_sets: Vec<Name> = before
        .sets
        .keys()
        .filter(|name| !after.sets.contains_key(*name))
        .cloned()
        .collect();
    let removed = emptied_chains(id, &before.chains, &after.chains, ops);
    for (name, chain) in &after.chains {
        if chain_is_new(&before.chains, name, chain) {
            ops.push(Op::AddChain(id.clone(), name.clone(), chain.base));
        }
    }
    for (name, chain) in after.chains {
        let old = before.chains.get(&name);
        if old == Some(&chain) {
            continue;
        }
        ops.extend(
            chain
                .rules
                .into_iter()
                .map(|rule| Op::AddRule(id.clone(), name.clone(), rule)),
        );
    }
    let mut additions = Vec::new();
    for (name, set) in after.sets {
        match before.sets.get(&name) {
            None if set.elements.is_empty() => {}
            None => additions.push(Op::AddElements(
                id.clone(),
                name,
                set.declaration,
                set.elements,
            )),
            Some(old) => set_ops(id, name, old, set, ops, &mut additions),
        }
    }
    ops.append(&mut additions);
    // A verdict map refers to chains until it is empty; a foreign one may refer to any.
    for name in &unused_sets {
        let set = before.sets.get(name);
        let leads = |set: &Set| {
            let declaration = &set.declaration;
            declaration.is_foreign()
                || (declaration.kind == SetKind::VerdictMap && !set.elements.is_empty())
        };
        if set.is_some_and(leads) {
            ops.push(Op::FlushSet(id.clone(), name.clone()));
        }
    }
    for name in removed {
        ops.push(Op::DeleteChain(id.clone(), name));
    }
    for name in unused_sets {
        ops.push(Op::DeleteSet(id.clone(), name));
    }
    for stray in &before.strays {
        ops.push(Op::DeleteStray(id.clone(), stray.clone()));
    }
}

/// Flushes the chains that change or are removed, and deletes chains that must be created anew.
/// Returns the chains to delete once nothing refers to them.
fn emptied_chains(
    id: &TableId,
    before: &BTreeMap<Name, Chain>,
    after: &BTreeMap<Name, Chain>,
    ops: &mut Vec<Op>,
) -> Vec<Name> {
    let mut removed = Vec::new();
    for (name, old) in before {
        let new = after.get(name);
        if new.is_some_and(|new| new.base == old.base && new.rules == old.rules) {
            continue;
        }
        if !old.rules.is_empty() {
            ops.push(Op::FlushChain(id.clone(), name.clone()));
        }
        match new {
            None => removed.push(name.clone()),
            Some(new) if new.base != old.base => {
                ops.push(Op::DeleteChain(id.clone(), name.clone()));
            }
            Some(_) => {}
        }
    }
    removed
}

fn chain_is_new(before: &BTreeMap<Name, Chain>, name: &Name, chain: &Chain) -> bool {
    before.get(name).is_none_or(|old| old.base != chain.base)
}

fn set_ops(
    id: &TableId,
    name: Name,
    old: &Set,
    new: Set,
    deletions: &mut Vec<Op>,
    additions: &mut Vec<Op>,
) {
    let declaration = new.declaration;
    if declaration.interval {
        // The kernel checks intervals for overlaps after each operation, not at the end of the
        // transaction. These sets are small, so they are flushed and filled again.
        if old.elements == new.elements {
            return;
        }
        if !old.elements.is_empty() {
            deletions.push(Op::FlushSet(id.clone(), name.clone()));
        }
        if !new.elements.is_empty() {
            additions.push(Op::AddElements(id.clone(), name, declaration, new.elements));
        }
        return;
    }
    let (delete, add) = diff_elements(&old.elements, &new.elements);
    if !delete.is_empty() {
        let declaration = declaration.clone();
        deletions.push(Op::DeleteElements(
            id.clone(),
            name.clone(),
            declaration,
            delete,
        ));
    }
    if !add.is_empty() {
        additions.push(Op::AddElements(id.clone(), name, declaration, add));
    }
}

/// Returns the elements to delete and to add so that `before` becomes `after`; both are sorted by
/// key.
///
/// An element with another value or comment is in both lists: the kernel does not change elements
/// in place.
pub(crate) fn diff_elements(before: &[Element], after: &[Element]) -> (Vec<Element>, Vec<Element>) {
    let (mut delete, mut add) = (Vec::new(), Vec::new());
    let (mut old, mut new) = (before.iter().peekable(), after.iter().peekable());
    loop {
        let order = match (old.peek(), new.peek()) {
            (Some(a), Some(b)) => a.key.cmp(&b.key),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return (delete, add),
        };
        match order {
            Ordering::Less => delete.extend(old.next().cloned()),
            Ordering::Greater => add.extend(new.next().cloned()),
            Ordering::Equal => {
                let (a, b) = (old.next(), new.next());
                if a != b {
                    delete.extend(a.cloned());
                    add.extend(b.cloned());
                }
            }
        }
    }
}
