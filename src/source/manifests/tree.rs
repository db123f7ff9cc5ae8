//! A YAML node with its place in the file, and a `serde` deserialiser over it.
//!
//! The place is why this exists: a fault deep inside one item of a long list is reported with
//! the line and column of the value at fault, and the other items are not affected.
//! Scalars are read the way the wanted type asks for, so `port: 80` is a number and
//! `name: 80` a string.

use std::borrow::Cow;
use std::fmt;
use std::rc::Rc;

use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Unexpected, Visitor};

/// A line and a column, both counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub line: u64,
    pub column: u64,
}

/// A YAML value and where it begins.
#[derive(Debug)]
pub(super) struct Node<'a> {
    pub at: Position,
    pub value: Value<'a>,
}

/// What a node holds.
#[derive(Debug)]
pub(super) enum Value<'a> {
    /// A scalar; only plain (unquoted) ones can be null, a number or a boolean.
    Scalar {
        text: Cow<'a, str>,
        plain: bool,
    },
    Sequence(Vec<Node<'a>>),
    /// Key and value in the order of the file.
    Mapping(Vec<(Cow<'a, str>, Node<'a>)>),
    /// A node that has an anchor, shared by the aliases that refer to it.
    Shared(Rc<Node<'a>>),
}

impl<'a> Node<'a> {
    /// The node itself, or the one that an alias refers to.
    pub(super) fn resolved(&self) -> &Node<'a> {
        let mut node = self;
        while let Value::Shared(shared) = &node.value {
            node = shared;
        }
        node
    }

    /// The value of a key of a mapping.
    pub(super) fn get(&self, key: &str) -> Option<&Node<'a>> {
        match &self.resolved().value {
            Value::Mapping(entries) => entries
                .iter()
                .find(|(name, _)| name == key)
                .map(|(_, node)| node),
            _ => None,
        }
    }

    /// The text of a scalar that is not null.
    pub(super) fn text(&self) -> Option<&str> {
        match &self.resolved().value {
            Value::Scalar { text, plain } if !(*plain && is_null(text)) => Some(text),
            _ => None,
        }
    }

    /// Whether the node is absent in all but name.
    pub(super) fn is_null(&self) -> bool {
        matches!(&self.resolved().value, Value::Scalar { text, plain: true } if is_null(text))
    }
}

fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

/// YAML 1.1 as well as 1.2: Kubernetes reads manifests by the older rules.
fn boolean(text: &str) -> Option<bool> {
    match text {
        "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => Some(true),
        "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => Some(false),
        _ => None,
    }
}

fn integer(text: &str) -> Option<i64> {
    if let Some(digits) = text.strip_prefix("0x") {
        return i64::from_str_radix(digits, 16).ok();
    }
    if let Some(digits) = text.strip_prefix("0o") {
        return i64::from_str_radix(digits, 8).ok();
    }
    text.parse().ok()
}

/// A value that does not fit, with its place and the path of fields to it.
#[derive(Debug)]
pub(super) struct Fault {
    pub at: Option<Position>,
    path: String,
    message: String,
}

impl Fault {
    fn at(mut self, position: Position) -> Self {
        self.at.get_or_insert(position);
        self
    }

    fn below(mut self, field: &str) -> Self {
        let separator = if self.path.is_empty() || self.path.starts_with('[') {
            ""
        } else {
            "."
        };
        self.path = format!("{field}{separator}{}", self.path);
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            f.write_str(&self.message)
        } else {
            write!(f, "{}: {}", self.path, self.message)
        }
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self {
            at: None,
            path: String::new(),
            message: message.to_string(),
        }
    }
}

impl<'de> Deserializer<'de> for &'de Node<'_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let node = self.resolved();
        match &node.value {
            Value::Scalar { text, plain: true } if is_null(text) => visitor.visit_unit(),
            Value::Scalar { text, plain: true } => {
                if let Some(value) = boolean(text) {
                    visitor.visit_bool(value)
                } else if let Some(value) = integer(text) {
                    visitor.visit_i64(value)
                } else {
                    visitor.visit_borrowed_str(text)
                }
            }
            Value::Scalar { text, .. } => visitor.visit_borrowed_str(text),
            Value::Sequence(items) => visitor.visit_seq(Items {
                items: items.iter().enumerate(),
            }),
            Value::Mapping(entries) => visitor.visit_map(Entries {
                entries: entries.iter(),
                current: None,
            }),
            // `resolved` never ends at a shared node.
            Value::Shared(_) => visitor.visit_unit(),
        }
        .map_err(|fault| fault.at(node.at))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        if self.is_null() {
            visitor.visit_none()
        } else {
            visitor.visit_some(self)
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let node = self.resolved();
        match (&node.value, node.text()) {
            (Value::Scalar { .. }, Some(text)) => visitor
                .visit_borrowed_str(text)
                .map_err(|fault: Fault| fault.at(node.at)),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_str(visitor)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let node = self.resolved();
        match &node.value {
            // A number beyond 64 bits is still a number that is out of range.
            Value::Scalar { text, plain: true }
                if integer(text).is_none()
                    && !text.is_empty()
                    && text.bytes().all(|byte| byte.is_ascii_digit()) =>
            {
                visitor.visit_i64(i64::MAX)
            }
            Value::Scalar { text, plain: true } if integer(text).is_none() => {
                Err(de::Error::invalid_type(Unexpected::Str(text), &visitor))
            }
            _ => self.deserialize_any(visitor),
        }
        .map_err(|fault: Fault| fault.at(node.at))
    }

    /// Nothing below an unused field is looked at.
    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier
    }
}

struct Items<'de, 'a> {
    items: std::iter::Enumerate<std::slice::Iter<'de, Node<'a>>>,
}

impl<'de> SeqAccess<'de> for Items<'de, '_> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Fault> {
        self.items
            .next()
            .map(|(index, node)| {
                seed.deserialize(node)
                    .map_err(|fault| fault.at(node.at).below(&format!("[{index}]")))
            })
            .transpose()
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len())
    }
}

struct Entries<'de, 'a> {
    entries: std::slice::Iter<'de, (Cow<'a, str>, Node<'a>)>,
    current: Option<&'de (Cow<'a, str>, Node<'a>)>,
}

impl<'de> MapAccess<'de> for Entries<'de, '_> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Fault> {
        self.current = self.entries.next();
        self.current
            .map(|(key, node)| {
                seed.deserialize(StrDeserializer::<Fault>::new(key))
                    .map_err(|fault| fault.at(node.at))
            })
            .transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let Some((key, node)) = self.current.take() else {
            return Err(de::Error::custom("a value was asked for before its key"));
        };
        seed.deserialize(node)
            .map_err(|fault| fault.at(node.at).below(key))
    }
}
