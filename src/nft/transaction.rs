//! Changes of tables as an ordered list of operations.

use std::sync::Arc;

use super::name::Name;
use super::rule::Rule;
use super::table::{BaseChain, Declaration, Element, Stray, TableId};

/// One operation on a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Create a table.
    AddTable(TableId),
    /// Delete a table with its contents.
    DeleteTable(TableId),
    /// Create a set without elements.
    AddSet(TableId, Name, Arc<Declaration>),
    /// Delete a set that no rule uses.
    DeleteSet(TableId, Name),
    /// Create an empty chain.
    AddChain(TableId, Name, Option<BaseChain>),
    /// Delete all rules of a chain.
    FlushChain(TableId, Name),
    /// Delete an empty chain to which nothing refers.
    DeleteChain(TableId, Name),
    /// Append a rule to a chain.
    AddRule(TableId, Name, Rule),
    /// Delete elements.
    DeleteElements(TableId, Name, Arc<Declaration>, Vec<Element>),
    /// Add elements.
    AddElements(TableId, Name, Arc<Declaration>, Vec<Element>),
    /// Delete all elements of a set.
    FlushSet(TableId, Name),
    /// Delete an object to which nothing refers.
    DeleteStray(TableId, Stray),
}

impl Op {
    /// Returns the table that it changes.
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

    /// Returns the chain, set or object that it changes; `None` if it changes a table.
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

    /// Returns the number of set elements in it.
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

/// Operations that take effect atomically.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    /// The operations, in the order in which the kernel performs them.
    pub ops: Vec<Op>,
}

impl Transaction {
    /// Returns whether there are no operations.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Returns whether it only deletes objects to which nothing refers, so that no packet is
    /// handled differently.
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

    /// Returns the number of elements added and deleted.
    pub fn elements(&self) -> usize {
        self.ops.iter().map(Op::elements).sum()
    }
}
