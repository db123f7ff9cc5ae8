//! nftables rulesets as plain, typed, comparable values.
//!
//! A [`Ruleset`] holds tables: chains with their rules, and sets, maps and verdict maps with their
//! elements. This module depends neither on the kernel nor on Kubernetes.
//!
//! * [`diff()`] compares two rulesets and returns the [`Transaction`] that turns one into the
//!   other; [`Transaction::into_steps`] divides it where one atomic step does not suffice.
//! * [`text::render`] prints a ruleset in the syntax of `nft -f`.
//! * `netlink` encodes the same values for the kernel. Renderer and encoder match the same enums
//!   exhaustively, so that neither can lack a construct of the other.
//!
//! ```text
//! Ruleset
//!  └─ TableId -> Table
//!                 ├─ Name -> Chain -> [Rule -> [Statement]]
//!                 └─ Name -> Set   -> [Element], sorted by key
//! ```

#![warn(missing_docs)]

mod diff;
mod interval;
mod key;
mod name;
mod part;
mod path;
mod rule;
mod selector;
#[cfg(test)]
pub(crate) mod simulate;
mod steps;
mod table;
#[cfg(test)]
mod tests;
pub mod text;
mod transaction;

pub use diff::{add_parts, diff};
pub use interval::merge as merge_intervals;
pub(crate) use key::FieldType;
pub use key::{Data, Key, KeyBuilder};
pub use name::{Name, TableFamily};
pub(crate) use name::{digest_of, readable_name};
pub use part::RulesetPart;
pub use path::ObjectPath;
pub use rule::{Comparison, CtState, CtStatus, Operand, RejectWith, Rule, Statement, Verdict};
pub use selector::Selector;

pub use table::{
    BaseChain, Chain, ChainKind, Declaration, Element, Hook, Ruleset, Set, SetKind, Table, TableId,
    Value,
};
pub(crate) use table::{Stray, StrayKind};
pub use transaction::{Op, Transaction};
