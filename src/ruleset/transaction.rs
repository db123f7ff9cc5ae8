//! What is to be changed in the kernel, as an ordered list of operations.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::rule::Rule;
use super::table::{BaseChain, Declaration, Element, Name, TableId};

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
            | Op::FlushSet(table, _) => table,
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
            | Op::FlushSet(..) => 0,
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

    /// The number of elements added and deleted.
    pub fn elements(&self) -> usize {
        self.ops.iter().map(Op::elements).sum()
    }

    /// The transaction as steps to apply one after the other, none of which is ever empty.
    ///
    /// A packet walks chains as they were when it entered the base chain, but finds elements as
    /// they are. If one transaction brought a chain and the verdict element that leads to it,
    /// such a packet could be led into a chain that has no rules for it yet. New chains of a
    /// table in use therefore come in a step of their own, with the sets their rules read.
    pub fn into_steps(self) -> Vec<Transaction> {
        let made: BTreeSet<TableId> = self
            .ops
            .iter()
            .filter_map(|op| match op {
                Op::AddTable(table) => Some(table.clone()),
                _ => None,
            })
            .collect();
        // A chain that is deleted and made again in the same transaction is not new.
        let mut remade: BTreeSet<(TableId, Name)> = BTreeSet::new();
        let mut new: BTreeSet<(TableId, Name)> = BTreeSet::new();
        for op in &self.ops {
            match op {
                Op::DeleteChain(table, name) => {
                    remade.insert((table.clone(), name.clone()));
                }
                Op::AddChain(table, name, None) if !made.contains(table) => {
                    new.insert((table.clone(), name.clone()));
                }
                _ => {}
            }
        }
        new.retain(|chain| !remade.contains(chain));
        let (first, second) = self.ops.into_iter().partition(|op| match op {
            Op::AddSet(table, ..) => !made.contains(table) && !new.is_empty(),
            Op::AddChain(table, name, _) | Op::AddRule(table, name, _) => {
                new.contains(&(table.clone(), name.clone()))
            }
            _ => false,
        });
        [first, second]
            .into_iter()
            .map(|ops| Transaction { ops })
            .filter(|step| !step.is_empty())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ruleset::{Family, Selector, SetKind, Statement, Verdict};

    fn id() -> TableId {
        TableId::new(Family::Ip, "t")
    }

    fn rule() -> Rule {
        Rule::new([Statement::Verdict(Verdict::Drop)])
    }

    fn elements() -> Op {
        let declaration = Declaration::new(SetKind::VerdictMap, [Selector::L4Protocol]);
        Op::AddElements(id(), "m".into(), Arc::new(declaration), vec![])
    }

    #[test]
    fn new_chains_of_a_table_in_use_come_first() {
        let ops = vec![
            Op::FlushChain(id(), "old".into()),
            Op::AddChain(id(), "new".into(), None),
            Op::AddRule(id(), "new".into(), rule()),
            Op::AddRule(id(), "old".into(), rule()),
            elements(),
        ];
        let steps = Transaction { ops }.into_steps();
        assert_eq!(steps.len(), 2);
        assert_eq!(
            steps[0].ops,
            [
                Op::AddChain(id(), "new".into(), None),
                Op::AddRule(id(), "new".into(), rule())
            ]
        );
        assert_eq!(steps[1].ops.len(), 3);
    }

    #[test]
    fn a_new_table_comes_in_one_step() {
        let ops = vec![
            Op::AddTable(id()),
            Op::AddChain(id(), "new".into(), None),
            Op::AddRule(id(), "new".into(), rule()),
            elements(),
        ];
        let whole = Transaction { ops };
        assert_eq!(whole.clone().into_steps(), [whole]);
        assert!(Transaction::default().into_steps().is_empty());
    }
}
