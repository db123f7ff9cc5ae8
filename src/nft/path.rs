//! Names of nftables objects in errors.

use std::fmt;

use super::name::Name;
use super::table::{Declaration, Element, Stray, TableId};
use super::text;
use super::transaction::Op;

/// The nftables object that an operation of a transaction concerns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectPath {
    /// A table.
    Table(TableId),
    /// A chain.
    Chain(TableId, Name),
    /// A rule, as text.
    Rule(TableId, Name, String),
    /// A set.
    Set(TableId, Name),
    /// An element of a set.
    Element(TableId, Name, Box<Element>, String),
    /// An object of a kind that nftlet never creates.
    Stray(TableId, Stray),
    /// The transaction as a whole.
    Transaction,
}

impl ObjectPath {
    /// Returns the table that it is in.
    pub fn table(&self) -> Option<&TableId> {
        match self {
            ObjectPath::Table(table)
            | ObjectPath::Chain(table, _)
            | ObjectPath::Rule(table, ..)
            | ObjectPath::Set(table, _)
            | ObjectPath::Element(table, ..)
            | ObjectPath::Stray(table, _) => Some(table),
            ObjectPath::Transaction => None,
        }
    }

    /// Returns the path of the object that an operation changes, or of one of its elements, given
    /// its index.
    pub fn of(op: &Op, element: Option<usize>) -> Self {
        match op {
            Op::AddTable(table) | Op::DeleteTable(table) => ObjectPath::Table(table.clone()),
            Op::AddSet(table, set, _) | Op::DeleteSet(table, set) | Op::FlushSet(table, set) => {
                ObjectPath::Set(table.clone(), set.clone())
            }
            Op::AddChain(table, chain, _)
            | Op::FlushChain(table, chain)
            | Op::DeleteChain(table, chain) => ObjectPath::Chain(table.clone(), chain.clone()),
            Op::DeleteStray(table, stray) => ObjectPath::Stray(table.clone(), stray.clone()),
            Op::AddRule(table, chain, rule) => {
                ObjectPath::Rule(table.clone(), chain.clone(), text::rule(rule, table.family))
            }
            Op::AddElements(table, set, declaration, elements)
            | Op::DeleteElements(table, set, declaration, elements) => {
                element.and_then(|index| elements.get(index)).map_or_else(
                    || ObjectPath::Set(table.clone(), set.clone()),
                    |element| Self::element(table, set, declaration, element),
                )
            }
        }
    }

    fn element(table: &TableId, set: &Name, declaration: &Declaration, element: &Element) -> Self {
        let printed = text::element(element, declaration, table.family);
        ObjectPath::Element(
            table.clone(),
            set.clone(),
            Box::new(element.clone()),
            printed,
        )
    }
}

impl fmt::Display for ObjectPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ObjectPath::Table(table) => write!(f, "table {table}"),
            ObjectPath::Chain(table, chain) => write!(f, "chain {chain} of table {table}"),
            ObjectPath::Rule(table, chain, rule) => {
                write!(f, "rule \"{rule}\" of chain {chain} in table {table}")
            }
            ObjectPath::Set(table, set) => write!(f, "set {set} of table {table}"),
            ObjectPath::Element(table, set, _, element) => {
                write!(f, "element {{ {element} }} of set {set} in table {table}")
            }
            ObjectPath::Stray(table, stray) => write!(f, "{stray} of table {table}"),
            ObjectPath::Transaction => f.write_str("the transaction"),
        }
    }
}
