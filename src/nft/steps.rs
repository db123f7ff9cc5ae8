//! Divides a transaction into steps, each of which is atomic and leaves correct rules.
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
//! Most transactions have one step, *main*. There are three reasons for more.
//!
//! **Packets in flight.** A packet evaluates the rules of the generation in which it entered the
//! base chain, but looks up the elements of the newest one. If one transaction added a chain and
//! the verdict element that leads to it, such a packet could enter a chain without rules. New
//! chains of a table in use are therefore written first, together with the table's new sets and
//! their elements, which the rules of these chains look up.
//!
//! **Large new tables.** No other transaction runs while the kernel processes one. The hash table
//! of a set starts small and a worker grows it, which may not get the processor until the
//! transaction ends; meanwhile each lookup searches all tables that are not yet merged. So elements
//! are added in portions. Rules are added before them, because adding a rule validates every
//! element of the maps that it reads. Base chains are added last: no packet meets a partial table,
//! and the kernel does not follow all verdicts from the base chains again with each portion.
//!
//! **Kernels before 6.2** release a chain some time after the transaction that deletes the last
//! element that leads to it, and refuse to delete it until then. The wanted rules are in force by
//! then.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::vec;

use super::name::Name;
use super::table::{Declaration, Element, SetKind, TableId};
use super::transaction::{Op, Transaction};

/// The number of elements of one portion. With four times as many the kernel is not faster, and
/// other programs wait longer.
const MOST_ELEMENTS: usize = 8_000;

/// The stage of an operation, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Foundation,
    Data,
    Leads,
    Main,
    Last,
}

impl Transaction {
    /// Returns the steps to apply in order; none is empty. If one fails, the steps before it stay
    /// in force, and those after it must not be applied.
    ///
    /// The iterator is lazy, so that not all steps are in memory at once.
    pub fn into_steps(self) -> impl Iterator<Item = Transaction> {
        self.into_steps_of(MOST_ELEMENTS)
    }

    /// [`Transaction::into_steps`] with portions of `most` elements.
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

/// Divides operations into portions of `most` elements. Interval sets are not divided, because the
/// kernel checks them for overlaps after each portion.
struct Cut {
    ops: vec::IntoIter<Op>,
    /// The rest of an operation that did not fit into the last portion.
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
    /// Returns the next operation, with at most `room` elements if it can be divided.
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

/// Assigns the operations of a transaction to stages.
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

/// The large new tables, with the names of their base chains.
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
                // A table that is replaced stays in force until the new one does.
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

/// The chains and sets that are written before everything else.
///
/// Verdicts in the new sets lead to chains that exist or are added in the same step. Only base
/// chains, to which no verdict can lead, and chains of tables that are not split are added later.
#[derive(Default)]
struct FirstStep {
    chains: BTreeSet<(TableId, Name)>,
    sets: BTreeSet<(TableId, Name)>,
}

impl FirstStep {
    fn of(ops: &[Op]) -> Self {
        let mut first = Self::default();
        // Tables written in one step: new ones, which no packet has entered, and those in which a
        // chain or set is deleted and created again, as in repairs, since new objects may refer to
        // either of the two.
        let mut unsplit: BTreeSet<&TableId> = BTreeSet::new();
        let mut deleted_chains = BTreeSet::new();
        let mut deleted_sets = BTreeSet::new();
        for op in ops {
            match op {
                Op::AddTable(table) => {
                    unsplit.insert(table);
                }
                Op::DeleteChain(table, name) => {
                    deleted_chains.insert((table, name));
                }
                Op::DeleteSet(table, name) => {
                    deleted_sets.insert((table, name));
                }
                Op::AddChain(table, name, base) => {
                    if deleted_chains.contains(&(table, name)) {
                        unsplit.insert(table);
                    }
                    if base.is_none() {
                        first.chains.insert((table.clone(), name.clone()));
                    }
                }
                Op::AddSet(table, name, _) => {
                    if deleted_sets.contains(&(table, name)) {
                        unsplit.insert(table);
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
        first.chains.retain(|(table, _)| !unsplit.contains(table));
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

/// The tables whose chains are deleted after everything else.
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
                // The old chain has to be deleted before one with the same name is created.
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
