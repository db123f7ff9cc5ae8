//! Tables, chains, sets and their elements.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::key::{Data, FieldType, Key};
use super::rule::{Rule, Verdict};
use super::selector::Selector;

/// The family of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
}

impl Family {
    /// The keyword of nft: `ip` or `ip6`.
    pub fn keyword(self) -> &'static str {
        match self {
            Family::Ip => "ip",
            Family::Ip6 => "ip6",
        }
    }
}

/// The name of a chain, set or table, cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Arc<str>);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Name {
    fn from(name: &str) -> Self {
        Self(Arc::from(name))
    }
}

impl From<String> for Name {
    fn from(name: String) -> Self {
        Self(Arc::from(name))
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Family and name of a table.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableId {
    /// The family.
    pub family: Family,
    /// The name.
    pub name: Name,
}

impl TableId {
    /// Joins family and name.
    pub fn new(family: Family, name: impl Into<Name>) -> Self {
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

/// Tables and what they contain.
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
    /// What was read back of kinds that nftlet never makes; empty in what is wanted.
    pub strays: BTreeSet<Stray>,
    /// It was read back and is a table as nftlet makes none, like one that is dormant: equal to
    /// nothing that is wanted.
    pub foreign: bool,
}

/// An object of a kind that nftlet never makes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Stray {
    /// Its kind.
    pub kind: StrayKind,
    /// Its name.
    pub name: Name,
}

/// The kinds of objects that nftlet never makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StrayKind {
    /// A stateful object, such as a named counter, quota or limit, by the kernel's number of its
    /// type.
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
    /// Where packets enter, for a base chain.
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

/// Where and when packets enter a chain. The policy is always `accept`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BaseChain {
    /// The type.
    pub kind: ChainKind,
    /// The hook.
    pub hook: Hook,
    /// The priority as a number: -100 is `dstnat`, 0 `filter`, 100 `srcnat`.
    pub priority: i32,
}

/// What a set maps its keys to.
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
    /// Whether elements are intervals, from their key to their `key_end`.
    pub interval: bool,
    /// The default lifetime of elements. A set with a timeout is filled from the packet path
    /// too (`flags dynamic,timeout`); its elements are not nftlet's to compare.
    pub timeout: Option<Duration>,
    /// The greatest number of elements; the kernel wants it for sets with a timeout.
    pub size: Option<u32>,
    /// Whether every element counts the packets and bytes that it matched. The counts are no part
    /// of an element's value.
    pub counter: bool,
    /// A word for the person who reads the ruleset; [`Declaration::comment`] makes it fit.
    pub comment: Option<Arc<str>>,
}

impl Declaration {
    /// A set or map with the given key and without any flag.
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

    /// The same declaration with a comment. A set that nft can declare by example only
    /// (`typeof`) has little room for one: the kernel keeps 256 bytes for both.
    #[must_use]
    pub fn comment(mut self, comment: &str) -> Self {
        self.comment = Some(clean_comment(comment));
        self
    }

    /// Whether it was read back and is such as nftlet makes none.
    pub(crate) fn is_foreign(&self) -> bool {
        self.key.is_empty()
    }

    /// The types of the key's fields.
    pub fn key_types(&self, family: Family) -> Vec<FieldType> {
        self.key.iter().map(|s| s.field_type(family)).collect()
    }

    /// The types of the value's fields; empty for sets and verdict maps.
    pub(crate) fn data_types(&self, family: Family) -> Vec<FieldType> {
        match &self.kind {
            SetKind::Map(data) => data.iter().map(|s| s.field_type(family)).collect(),
            SetKind::Set | SetKind::VerdictMap => Vec::new(),
        }
    }

    /// Whether the key has several fields.
    pub fn concatenated(&self) -> bool {
        self.key.len() > 1
    }

    /// Whether nft can only declare it by example (`typeof`): an index has no named type.
    pub(crate) fn needs_typeof(&self, family: Family) -> bool {
        self.key_types(family)
            .iter()
            .chain(&self.data_types(family))
            .any(|field| *field == FieldType::Integer)
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

/// Makes a text fit for a comment: nft has no escapes inside a quoted string, and the kernel
/// keeps at most 127 bytes.
pub(super) fn clean_comment(text: &str) -> Arc<str> {
    const LONGEST: usize = 127;
    let cleaned: String = text
        .chars()
        .map(|c| {
            if c == '"' || c == '\\' || c.is_control() {
                '?'
            } else {
                c
            }
        })
        .collect();
    let end = (0..=LONGEST.min(cleaned.len()))
        .rev()
        .find(|end| cleaned.is_char_boundary(*end));
    Arc::from(cleaned.get(..end.unwrap_or_default()).unwrap_or_default())
}

/// An element of a set or map.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Element {
    /// The key, or the first key of an interval.
    pub key: Key,
    /// The last key of an interval, inclusive; apart, because few elements have one.
    pub key_end: Option<Box<Key>>,
    /// What the key is mapped to.
    pub value: Value,
    /// A word for the person who reads the ruleset.
    pub comment: Option<Arc<str>>,
}

// There can be a million, of both sides of a comparison.
const _: () = assert!(size_of::<Element>() <= 112);

impl Element {
    /// An element of a plain set.
    pub fn new(key: Key) -> Self {
        Self {
            key,
            key_end: None,
            value: Value::None,
            comment: None,
        }
    }

    /// An element of a map.
    pub fn with_data(key: Key, data: Data) -> Self {
        Self {
            value: Value::Data(data),
            ..Self::new(key)
        }
    }

    /// An element of a verdict map.
    pub fn with_verdict(key: Key, verdict: Verdict) -> Self {
        Self {
            value: Value::Verdict(verdict),
            ..Self::new(key)
        }
    }

    /// The same element with a comment.
    #[must_use]
    pub fn comment(mut self, comment: &str) -> Self {
        self.comment = Some(clean_comment(comment));
        self
    }
}

/// The value of an element.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Value {
    /// A plain set has none.
    None,
    /// A map's.
    Data(Data),
    /// A verdict map's.
    Verdict(Verdict),
}
