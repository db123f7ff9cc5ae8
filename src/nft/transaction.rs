//! What is to be changed in the kernel, as an ordered list of operations.

use std::sync::Arc;

use super::rule::Rule;
use super::table::{BaseChain, Declaration, Element, Name, Stray, TableId};

/// One change to a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Make a table.
    AddTable(TableId),
    /// Remove a table with all it contains.
    DeleteTable(TableId),
    /// Declare a set; its elements come separately.
    AddSet(TableId, Name, Arc<Declaration>),
    /// Remove a set that no rule uses any more.
    DeleteSet(TableId, Name),
    /// Make an empty chain.
    AddChain(TableId, Name, Option<BaseChain>),
    /// Remove all rules of a chain.
    FlushChain(TableId, Name),
    /// Remove an empty chain that nothing leads to any more.
    DeleteChain(TableId, Name),
    /// Append a rule to a chain.
    AddRule(TableId, Name, Rule),
    /// Remove elements.
    DeleteElements(TableId, Name, Arc<Declaration>, Vec<Element>),
    /// Add elements.
    AddElements(TableId, Name, Arc<Declaration>, Vec<Element>),
    /// Remove all elements of a set.
    FlushSet(TableId, Name),
    /// Remove an object to which nothing refers any more.
    DeleteStray(TableId, Stray),
}

impl Op {
    /// The table the operation changes.
    pub fn table(&self) -> &TableId {
        match self {
            Op::AddTable(table)
            | Op::DeleteTable(table)
            | Op::AddSet(table, ..)
            | Op::DeleteSet(table, _)
            | Op::AddChain(table, ..)
            | Op::FlushChain(table, _)
            | Op::DeleteChain(table, _)
            | Op::AddRule(table, ..)
            | Op::DeleteElements(table, ..)
            | Op::AddElements(table, ..)
            | Op::FlushSet(table, _)
            | Op::DeleteStray(table, _) => table,
        }
    }

    /// The chain, set or object that the operation changes; none where it changes a table.
    pub fn name(&self) -> Option<&Name> {
        match self {
            Op::AddTable(_) | Op::DeleteTable(_) => None,
            Op::AddSet(_, name, _)
            | Op::DeleteSet(_, name)
            | Op::AddChain(_, name, _)
            | Op::FlushChain(_, name)
            | Op::DeleteChain(_, name)
            | Op::AddRule(_, name, _)
            | Op::DeleteElements(_, name, ..)
            | Op::AddElements(_, name, ..)
            | Op::FlushSet(_, name) => Some(name),
            Op::DeleteStray(_, stray) => Some(&stray.name),
        }
    }

    /// The number of set elements the operation names.
    pub fn elements(&self) -> usize {
        match self {
            Op::DeleteElements(.., elements) | Op::AddElements(.., elements) => elements.len(),
            Op::AddTable(_)
            | Op::DeleteTable(_)
            | Op::AddSet(..)
            | Op::DeleteSet(..)
            | Op::AddChain(..)
            | Op::FlushChain(..)
            | Op::DeleteChain(..)
            | Op::AddRule(..)
            | Op::FlushSet(..)
            | Op::DeleteStray(..) => 0,
        }
    }
}

/// Operations that take effect together or not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    /// The operations, in the order the kernel must see them.
    pub ops: Vec<Op>,
}

impl Transaction {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Whether it only removes chains, sets and tables, so that what is in force stays the same.
    pub(crate) fn is_cleanup(&self) -> bool {
        self.ops.iter().all(|op| match op {
            Op::FlushChain(..)
            | Op::DeleteChain(..)
            | Op::DeleteSet(..)
            | Op::DeleteTable(_)
            | Op::DeleteStray(..) => true,
            Op::AddTable(_)
            | Op::AddSet(..)
            | Op::AddChain(..)
            | Op::AddRule(..)
            | Op::DeleteElements(..)
            | Op::AddElements(..)
            | Op::FlushSet(..) => false,
        })
    }

    /// The number of elements added and deleted.
    pub fn elements(&self) -> usize {
        self.ops.iter().map(Op::elements).sum()
    }
}
