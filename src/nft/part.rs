//! Single chains and elements of a ruleset.

use std::sync::Arc;

use super::name::Name;
use super::table::{Chain, Declaration, Element, Ruleset, SetKind, TableId};
use super::text;

/// A chain with its rules, or an element of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RulesetPart {
    /// A chain.
    Chain(TableId, Name, Chain),
    /// An element, with the declaration of its set.
    Element(TableId, Name, Arc<Declaration>, Element),
}

impl RulesetPart {
    /// Returns the table that it is in.
    pub fn table(&self) -> &TableId {
        match self {
            RulesetPart::Chain(table, ..) | RulesetPart::Element(table, ..) => table,
        }
    }

    /// Returns the kind and the name of the chain or set, in the syntax of nft.
    pub fn object(&self) -> String {
        match self {
            RulesetPart::Chain(_, name, _) => format!("chain {name}"),
            RulesetPart::Element(_, name, declaration, _) => match declaration.kind {
                SetKind::Set => format!("set {name}"),
                SetKind::VerdictMap | SetKind::Map(_) => format!("map {name}"),
            },
        }
    }

    /// Returns the element in the syntax of nft.
    pub fn element(&self) -> Option<String> {
        match self {
            RulesetPart::Chain(..) => None,
            RulesetPart::Element(table, _, declaration, element) => {
                Some(text::element(element, declaration, table.family))
            }
        }
    }

    /// Returns whether a ruleset contains it.
    pub fn is_in(&self, ruleset: &Ruleset) -> bool {
        let Some(table) = ruleset.tables.get(self.table()) else {
            return false;
        };
        match self {
            RulesetPart::Chain(_, name, chain) => table.chains.get(name) == Some(chain),
            RulesetPart::Element(_, name, declaration, element) => {
                let set = table.sets.get(name);
                set.is_some_and(|set| {
                    set.declaration == *declaration && set.elements.contains(element)
                })
            }
        }
    }
}
