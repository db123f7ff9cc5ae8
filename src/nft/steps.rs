//! Cuts a transaction into steps, each of which is atomic and correct by itself.
//!
//! ```text
//!  Transaction ── into_steps ──> foundation   tables that are made: sets without elements, chains;
//!                                             new chains of tables in use
//!                                data  data   what the sets of tables that are made hold
//!                                leads leads  the verdicts in them, which lead to chains
//!                                main         all else: base chains, tables in use
//!                                last         chains that nothing leads to any more
//! ```
//!
//! Most transactions have one step, *main*. There are three reasons for others.
//!
//! **Packets on their way.** A packet walks chains as they were when it entered the base chain, but
//! finds elements as they are. If one transaction brought a chain and the verdict element that
//! leads to it, such a packet could be led into a chain that has no rules for it yet. New chains of
//! a table in use therefore come before. The table's new sets come with them, filled: whoever is
//! led to a new chain must find there what its rules look for.
//!
//! **Large tables that are made.** The kernel lets no other transaction in while it works on one,
//! and the hash table of a set, small at first, is moved to a larger one by a worker that may have
//! to wait for the processor until the transaction ends; meanwhile each element is looked for in
//! every table that is not yet moved. So elements come so many at a time. Rules come before them,
//! because the kernel looks at every element of a map when a rule comes that reads it. Base chains
//! come when all else is there: no packet can meet a part of the table, and the kernel need not
//! follow all verdicts from the base chains each time some are added.
//!
//! **Kernels before 6.2** let go of a chain only some time after the transaction that deletes the
//! element that led to it, and refuse to delete it until then. What is asked for is in force by
//! that time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::vec;

use super::table::{Declaration, Element, Name, SetKind, TableId};
use super::transaction::{Op, Transaction};

/// The number of elements that a table is filled with at a time. With four times as many the
/// kernel does not get faster, and others wait longer.
const MOST_ELEMENTS: usize = 8_000;

/// When an operation comes, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Foundation,
    Data,
    Leads,
    Main,
    Last,
}

impl Transaction {
    /// The transaction as steps to apply one after the other, none of which is ever empty. If one
    /// fails, those before it stay in force, and none after it may be tried.
    ///
    /// Steps are cut as they are asked for, so that not all of them are in memory at once.
    pub fn into_steps(self) -> impl Iterator<Item = Transaction> {
        self.into_steps_of(MOST_ELEMENTS)
    }

    /// [`Transaction::into_steps`] with so many elements at a time where a table is made.
    pub(super) fn into_steps_of(self, most: usize) -> impl Iterator<Item = Transaction> {
        let plan = Plan {
            built: Built::of(&self.ops, most),
            first: FirstStep::of(&self.ops),
            last: LastStep::of(&self.ops),
        };
        let mut stages: BTreeMap<Stage, Vec<Op>> = BTreeMap::new();
        for op in self.ops {
            stages.entry(plan.stage(&op)).or_default().push(op);
        }
        let steps = stages.into_iter().flat_map(move |(stage, ops)| {
            let most = match stage {
                Stage::Data | Stage::Leads => most,
                Stage::Foundation | Stage::Main | Stage::Last => usize::MAX,
            };
            Cut {
                ops: ops.into_iter(),
                rest: None,
                most,
            }
        });
        steps.map(|ops| Transaction { ops })
    }
}

/// Operations in pieces that add so many elements. Interval sets stay whole, because the kernel
/// judges overlaps while they are half filled.
struct Cut {
    ops: vec::IntoIter<Op>,
    /// What is left of an operation that did not fit into the piece before.
    rest: Option<Rest>,
    most: usize,
}

struct Rest {
    table: TableId,
    set: Name,
    declaration: Arc<Declaration>,
    elements: vec::IntoIter<Element>,
}

impl Cut {
    /// The next operation, with at most so many elements if it can be cut.
    fn next_op(&mut self, room: usize) -> Option<Op> {
        if self.rest.is_none() {
            match self.ops.next()? {
                Op::AddElements(table, set, declaration, elements)
                    if elements.len() > room && !declaration.interval =>
                {
                    self.rest = Some(Rest {
                        table,
                        set,
                        declaration,
                        elements: elements.into_iter(),
                    });
                }
                whole => return Some(whole),
            }
        }
        let rest = self.rest.as_mut()?;
        let piece = rest.elements.by_ref().take(room).collect();
        let op = Op::AddElements(
            rest.table.clone(),
            rest.set.clone(),
            rest.declaration.clone(),
            piece,
        );
        if rest.elements.len() == 0 {
            self.rest = None;
        }
        Some(op)
    }
}

impl Iterator for Cut {
    type Item = Vec<Op>;

    fn next(&mut self) -> Option<Vec<Op>> {
        let (mut piece, mut room) = (Vec::new(), self.most);
        while room > 0
            && let Some(op) = self.next_op(room)
        {
            room = room.saturating_sub(op.elements());
            piece.push(op);
        }
        (!piece.is_empty()).then_some(piece)
    }
}

/// Where each operation of a transaction belongs.
struct Plan {
    built: Built,
    first: FirstStep,
    last: LastStep,
}

impl Plan {
    fn stage(&self, op: &Op) -> Stage {
        if let Some(base_chains) = self.built.0.get(op.table()) {
            return match op {
                Op::AddTable(_) | Op::AddSet(..) => Stage::Foundation,
                Op::AddElements(_, _, declaration, _)
                    if declaration.kind == SetKind::VerdictMap =>
                {
                    Stage::Leads
                }
                Op::AddElements(..) => Stage::Data,
                Op::AddChain(_, name, _) | Op::AddRule(_, name, _)
                    if !base_chains.contains(name) =>
                {
                    Stage::Foundation
                }
                _ => Stage::Main,
            };
        }
        if self.first.holds(op) {
            Stage::Foundation
        } else if self.last.holds(op) {
            Stage::Last
        } else {
            Stage::Main
        }
    }
}

/// The large tables that are made, with the names of their base chains.
struct Built(BTreeMap<TableId, BTreeSet<Name>>);

impl Built {
    fn of(ops: &[Op], most: usize) -> Self {
        let mut made = BTreeMap::new();
        for op in ops {
            if let Op::AddTable(id) = op {
                made.insert(id.clone(), (0, BTreeSet::new()));
            }
        }
        if made.is_empty() {
            return Self(BTreeMap::new());
        }
        for op in ops {
            match op {
                // Its rules are in force until the new ones are.
                Op::DeleteTable(id) => {
                    made.remove(id);
                }
                Op::AddChain(id, name, Some(_)) => {
                    if let Some((_, base_chains)) = made.get_mut(id) {
                        base_chains.insert(name.clone());
                    }
                }
                other => {
                    if let Some((elements, _)) = made.get_mut(other.table()) {
                        *elements += other.elements();
                    }
                }
            }
        }
        let large = made
            .into_iter()
            .filter(|(_, (elements, _))| *elements > most);
        Self(
            large
                .map(|(id, (_, base_chains))| (id, base_chains))
                .collect(),
        )
    }
}

/// The chains and sets that come before everything else of a transaction.
///
/// Verdicts in the new sets lead to chains that exist already or come in the same step. The only
/// chains that come later are base chains, to which no verdict can lead, and those of tables that
/// are not split.
#[derive(Default)]
struct FirstStep {
    chains: BTreeSet<(TableId, Name)>,
    sets: BTreeSet<(TableId, Name)>,
}

impl FirstStep {
    fn of(ops: &[Op]) -> Self {
        let mut first = Self::default();
        // Nothing leads into a table that is made. In a table where a chain or set is deleted and
        // made again, as happens in repairs, new objects may refer to either of the two.
        let mut whole: BTreeSet<&TableId> = BTreeSet::new();
        let mut deleted_chains = BTreeSet::new();
        let mut deleted_sets = BTreeSet::new();
        for op in ops {
            match op {
                Op::AddTable(table) => {
                    whole.insert(table);
                }
                Op::DeleteChain(table, name) => {
                    deleted_chains.insert((table, name));
                }
                Op::DeleteSet(table, name) => {
                    deleted_sets.insert((table, name));
                }
                Op::AddChain(table, name, base) => {
                    if deleted_chains.contains(&(table, name)) {
                        whole.insert(table);
                    }
                    if base.is_none() {
                        first.chains.insert((table.clone(), name.clone()));
                    }
                }
                Op::AddSet(table, name, _) => {
                    if deleted_sets.contains(&(table, name)) {
                        whole.insert(table);
                    }
                    first.sets.insert((table.clone(), name.clone()));
                }
                Op::DeleteTable(_)
                | Op::FlushChain(..)
                | Op::AddRule(..)
                | Op::DeleteElements(..)
                | Op::AddElements(..)
                | Op::FlushSet(..)
                | Op::DeleteStray(..) => {}
            }
        }
        first.chains.retain(|(table, _)| !whole.contains(table));
        let split: BTreeSet<&TableId> = first.chains.iter().map(|(table, _)| table).collect();
        first.sets.retain(|(table, _)| split.contains(table));
        first
    }

    fn holds(&self, op: &Op) -> bool {
        let names = match op {
            Op::AddChain(..) | Op::AddRule(..) => &self.chains,
            Op::AddSet(..) | Op::DeleteElements(..) | Op::AddElements(..) | Op::FlushSet(..) => {
                &self.sets
            }
            Op::AddTable(_)
            | Op::DeleteTable(_)
            | Op::DeleteSet(..)
            | Op::FlushChain(..)
            | Op::DeleteChain(..)
            | Op::DeleteStray(..) => return false,
        };
        // Most transactions only change elements.
        !names.is_empty()
            && op
                .name()
                .is_some_and(|name| names.contains(&(op.table().clone(), name.clone())))
    }
}

/// The tables whose chains are deleted when all else is in force.
#[derive(Default)]
struct LastStep(BTreeSet<TableId>);

impl LastStep {
    fn of(ops: &[Op]) -> Self {
        let mut tables = BTreeSet::new();
        for op in ops {
            if let Op::DeleteElements(table, _, declaration, _) = op
                && declaration.kind == SetKind::VerdictMap
                && !tables.contains(table)
            {
                tables.insert(table.clone());
            }
        }
        if tables.is_empty() {
            return Self(tables);
        }
        let mut deleted = BTreeSet::new();
        for op in ops {
            match op {
                Op::DeleteChain(table, name) => {
                    deleted.insert((table, name));
                }
                // A name cannot be given twice.
                Op::AddChain(table, name, _) if deleted.contains(&(table, name)) => {
                    tables.remove(table);
                }
                _ => {}
            }
        }
        Self(tables)
    }

    fn holds(&self, op: &Op) -> bool {
        matches!(op, Op::DeleteChain(table, _) if self.0.contains(table))
    }
}

#[cfg(test)]
mod tests;
