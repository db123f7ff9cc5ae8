//! Reading a part of an object field by field, where a fault must not pass for an absent field.
//!
//! A [`FieldReader`] walks over a JSON value with the [`Path`] to where it is. Whatever it does not
//! understand (a wrong type, a field that does not exist) it reports and gives back as
//! [`Rejected`], so that the caller can leave out what the fault is part of.

use std::borrow::Cow;
use std::fmt;
use std::sync::LazyLock;

use serde_json::{Map, Value};

use super::intern::Interner;
use super::report::FieldReport;

/// Where a value stands in its object; printed as `spec.ingress[0].from`.
#[derive(Clone, Copy)]
pub(super) enum Path<'a> {
    /// A field of the object itself.
    Top(&'static str),
    /// A field of a mapping.
    Field(&'a Path<'a>, &'a str),
    /// An entry of a list.
    Entry(&'a Path<'a>, usize),
}

impl<'a> Path<'a> {
    /// The path to a field of the mapping that stands here.
    pub(super) fn field(&'a self, name: &'a str) -> Path<'a> {
        Path::Field(self, name)
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Path::Top(name) => f.write_str(name),
            Path::Field(above, name) => write!(f, "{above}.{name}"),
            Path::Entry(above, index) => write!(f, "{above}[{index}]"),
        }
    }
}

/// A fault was reported, and what it is part of cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rejected;

/// What was read, or that a fault was reported.
pub(super) type FieldResult<T> = Result<T, Rejected>;

/// Reads values and reports what it does not understand.
pub(super) struct FieldReader<'a> {
    pub interner: &'a mut Interner,
    report: &'a mut FieldReport,
    /// What follows from a fault; the end of every sentence about one.
    consequence: &'static str,
}

impl<'a> FieldReader<'a> {
    pub(super) fn new(
        interner: &'a mut Interner,
        report: &'a mut FieldReport,
        consequence: &'static str,
    ) -> Self {
        Self {
            interner,
            report,
            consequence,
        }
    }

    /// Reports a value; `fault` tells what is wrong with it and how to mend it.
    pub(super) fn reject(
        &mut self,
        at: &Path<'_>,
        value: &Value,
        fault: impl fmt::Display,
    ) -> Rejected {
        let consequence = self.consequence;
        self.report
            .left_out(at, shown(value), format_args!("{fault}; {consequence}"));
        Rejected
    }

    /// A mapping. `null` is an empty one, also as the entry of a list: the API server's decoder
    /// leaves a struct as it is where it meets `null`.
    pub(super) fn mapping<'v>(
        &mut self,
        at: &Path<'_>,
        value: &'v Value,
    ) -> FieldResult<&'v Map<String, Value>> {
        static EMPTY: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
        match value {
            Value::Object(map) => Ok(map),
            Value::Null => Ok(&EMPTY),
            other => Err(self.reject(at, other, "is not a mapping; write fields and values")),
        }
    }

    /// Refuses fields that are not among the known ones: a misspelt field means something else
    /// than its absence.
    pub(super) fn no_others(
        &mut self,
        at: &Path<'_>,
        map: &Map<String, Value>,
        known: &[&str],
    ) -> FieldResult<()> {
        let mut sound = Ok(());
        for (name, value) in map {
            if !known.contains(&&**name) {
                let hint = format_args!(
                    "is in a field that nftlet does not know; the known ones are {}",
                    Listed(known)
                );
                sound = Err(self.reject(&at.field(name), value, hint));
            }
        }
        sound
    }

    /// The known fields of a mapping that may have no others; `null` is the same as absent.
    pub(super) fn fields<'v, const N: usize>(
        &mut self,
        at: &Path<'_>,
        value: &'v Value,
        known: [&str; N],
    ) -> FieldResult<[Option<&'v Value>; N]> {
        let map = self.mapping(at, value)?;
        self.no_others(at, map, &known)?;
        Ok(known.map(|name| present(map, name)))
    }

    /// Every entry of a list, each read by `read`; rejected if one of them is, but only after all
    /// were looked at.
    pub(super) fn list<T>(
        &mut self,
        at: &Path<'_>,
        value: &Value,
        mut read: impl FnMut(&mut Self, &Path<'_>, &Value) -> FieldResult<T>,
    ) -> FieldResult<Vec<T>> {
        let entries = self.entries(at, value)?;
        let read: Vec<FieldResult<T>> = entries
            .iter()
            .enumerate()
            .map(|(index, entry)| read(self, &Path::Entry(at, index), entry))
            .collect();
        read.into_iter().collect()
    }

    /// The entries of a list.
    pub(super) fn entries<'v>(
        &mut self,
        at: &Path<'_>,
        value: &'v Value,
    ) -> FieldResult<&'v [Value]> {
        match value {
            Value::Array(entries) => Ok(entries),
            other => Err(self.reject(at, other, "is not a list; begin each entry with \"-\"")),
        }
    }

    /// A string. `null` is an empty one, as for the API server.
    pub(super) fn text<'v>(&mut self, at: &Path<'_>, value: &'v Value) -> FieldResult<&'v str> {
        match value {
            Value::String(text) => Ok(text),
            Value::Null => Ok(""),
            Value::Number(_) | Value::Bool(_) => {
                Err(self.reject(at, value, "is not a string; put it in quotes"))
            }
            other => Err(self.reject(at, other, "is not a string; write one")),
        }
    }
}

/// The value of a field that is neither absent nor `null`.
pub(super) fn present<'v>(map: &'v Map<String, Value>, name: &str) -> Option<&'v Value> {
    map.get(name).filter(|value| !value.is_null())
}

/// A value as a message shows it: short.
fn shown(value: &Value) -> Cow<'_, str> {
    match value {
        Value::String(text) => Cow::Borrowed(text),
        Value::Object(map) if map.is_empty() => Cow::Borrowed("{}"),
        Value::Object(_) => Cow::Borrowed("{...}"),
        Value::Array(entries) if entries.is_empty() => Cow::Borrowed("[]"),
        Value::Array(_) => Cow::Borrowed("[...]"),
        Value::Null | Value::Bool(_) | Value::Number(_) => Cow::Owned(value.to_string()),
    }
}

/// Names as a sentence lists them.
struct Listed<'a>(&'a [&'a str]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, name) in self.0.iter().enumerate() {
            f.write_str(match index {
                0 => "",
                _ if index + 1 == self.0.len() => " and ",
                _ => ", ",
            })?;
            f.write_str(name)?;
        }
        Ok(())
    }
}
