//! Tables, chains, sets and their elements.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::key::{Data, FieldType, Key};
use super::name::{Name, TableFamily, clean_comment};
use super::rule::{Rule, Verdict};
use super::selector::Selector;

/// The family and the name of a table.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableId {
    /// The family.
    pub family: TableFamily,
    /// The name.
    pub name: Name,
}

impl TableId {
    /// Creates the identifier of a table.
    pub fn new(family: TableFamily, name: impl Into<Name>) -> Self {
        Self {
            family,
            name: name.into(),
        }
    }
}

impl fmt::Display for TableId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family.keyword(), self.name)
    }
}

/// Tables with their contents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// The tables.
    pub tables: BTreeMap<TableId, Table>,
}

/// A table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Sets, maps and verdict maps.
    pub sets: BTreeMap<Name, Set>,
    /// Chains.
    pub chains: BTreeMap<Name, Chain>,
    /// Objects in the kernel of kinds that nftlet never creates; empty in a wanted table.
    pub strays: BTreeSet<Stray>,
    /// Whether it was read from the kernel and has flags that nftlet never sets, such as dormant.
    /// It differs from every wanted table.
    pub foreign: bool,
}

/// An object of a kind that nftlet never creates.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Stray {
    /// Its kind.
    pub kind: StrayKind,
    /// Its name.
    pub name: Name,
}

/// The kinds of objects that nftlet never creates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StrayKind {
    /// A stateful object, such as a named counter, quota or limit, with its type number in the
    /// kernel.
    Object(u32),
    /// A flowtable.
    Flowtable,
}

impl fmt::Display for Stray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            StrayKind::Object(_) => "object",
            StrayKind::Flowtable => "flowtable",
        };
        write!(f, "{kind} {}", self.name)
    }
}

/// A chain of rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Hook and priority of a base chain.
    pub base: Option<BaseChain>,
    /// The rules.
    pub rules: Vec<Rule>,
}

/// The type of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChainKind {
    /// `type filter`.
    Filter,
    /// `type nat`: sees only the first packet of a connection.
    Nat,
}

/// The netfilter hook of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hook {
    /// Before routing.
    Prerouting,
    /// For this host.
    Input,
    /// Through this host.
    Forward,
    /// From this host.
    Output,
    /// After routing.
    Postrouting,
}

/// Type, hook and priority of a base chain. The policy is always `accept`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BaseChain {
    /// The type.
    pub kind: ChainKind,
    /// The hook.
    pub hook: Hook,
    /// The priority as a number: -100 is `dstnat`, 0 `filter`, 100 `srcnat`.
    pub priority: i32,
}

/// The kind of a set, by the value of its elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SetKind {
    /// Nothing: a plain set.
    Set,
    /// A verdict.
    VerdictMap,
    /// A value of these fields.
    Map(Vec<Selector>),
}

/// How a named set, map or verdict map is declared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declaration {
    /// Set, map or verdict map.
    pub kind: SetKind,
    /// The fields of the key.
    pub key: Vec<Selector>,
    /// Whether elements are intervals from `key` to `key_end`.
    pub interval: bool,
    /// The default lifetime of elements. Rules fill a set with a timeout (`flags dynamic,timeout`),
    /// so its elements are not compared.
    pub timeout: Option<Duration>,
    /// The maximum number of elements; the kernel requires it for sets with a timeout.
    pub size: Option<u32>,
    /// Whether each element counts the packets and bytes that it matched. The counts are not
    /// compared.
    pub counter: bool,
    /// A comment for the reader of the ruleset, in the form that [`Declaration::comment`] ensures.
    pub comment: Option<Arc<str>>,
}

impl Declaration {
    /// Creates the declaration of a set or map without flags.
    pub fn new(kind: SetKind, key: impl Into<Vec<Selector>>) -> Self {
        Self {
            kind,
            key: key.into(),
            interval: false,
            timeout: None,
            size: None,
            counter: false,
            comment: None,
        }
    }

    /// Sets the comment.
    #[must_use]
    pub fn comment(mut self, comment: &str) -> Self {
        self.comment = Some(clean_comment(comment));
        self
    }

    /// Returns whether it was read from the kernel and is none that nftlet creates.
    pub(crate) fn is_foreign(&self) -> bool {
        self.key.is_empty()
    }

    /// Returns the types of the key's fields.
    pub fn key_types(&self, family: TableFamily) -> Vec<FieldType> {
        self.key.iter().map(|s| s.field_type(family)).collect()
    }

    /// Returns the types of the value's fields; empty for sets and verdict maps.
    pub(crate) fn data_types(&self, family: TableFamily) -> Vec<FieldType> {
        match &self.kind {
            SetKind::Map(data) => data.iter().map(|s| s.field_type(family)).collect(),
            SetKind::Set | SetKind::VerdictMap => Vec::new(),
        }
    }

    /// Returns whether the key has several fields.
    pub fn concatenated(&self) -> bool {
        self.key.len() > 1
    }
}

/// A named set, map or verdict map with its elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// How it is declared.
    pub declaration: Arc<Declaration>,
    /// The elements, sorted by key, each key once. Empty for a set with a timeout.
    pub elements: Vec<Element>,
}

impl From<Declaration> for Set {
    fn from(declaration: Declaration) -> Self {
        Self {
            declaration: Arc::new(declaration),
            elements: Vec::new(),
        }
    }
}

/// An element of a set or map.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Element {
    /// The key, or the first key of an interval.
    pub key: Key,
    /// The last key of an interval, inclusive. Boxed, because few elements have one.
    pub key_end: Option<Box<Key>>,
    /// The value.
    pub value: Value,
    /// A comment for the reader of the ruleset.
    pub comment: Option<Arc<str>>,
}

// A comparison can hold two million.
const _: () = assert!(size_of::<Element>() <= 112);

impl Element {
    /// Creates an element of a plain set.
    pub fn new(key: Key) -> Self {
        Self {
            key,
            key_end: None,
            value: Value::None,
            comment: None,
        }
    }

    /// Creates an element of a map.
    pub fn with_data(key: Key, data: Data) -> Self {
        Self {
            value: Value::Data(data),
            ..Self::new(key)
        }
    }

    /// Creates an element of a verdict map.
    pub fn with_verdict(key: Key, verdict: Verdict) -> Self {
        Self {
            value: Value::Verdict(verdict),
            ..Self::new(key)
        }
    }

    /// Sets the comment.
    #[must_use]
    pub fn comment(mut self, comment: &str) -> Self {
        self.comment = Some(clean_comment(comment));
        self
    }
}

/// The value of an element.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Value {
    /// No value, in a plain set.
    None,
    /// The value in a map.
    Data(Data),
    /// The value in a verdict map.
    Verdict(Verdict),
}
