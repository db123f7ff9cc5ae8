//! Strict reading of JSON values, for objects in which an invalid field must not count as absent.
//!
//! A [`FieldReader`] reports wrong types and unknown fields with their [`Path`], and returns
//! [`Rejected`], so that the caller can leave out the part that contains them.

use std::borrow::Cow;
use std::fmt;
use std::sync::LazyLock;

use serde_json::{Map, Value};

use super::intern::Interner;
use super::report::FieldReport;

/// The path of a value in its object, printed as `spec.ingress[0].from`.
#[derive(Clone, Copy)]
pub(super) enum Path<'a> {
    /// A field of the object.
    Top(&'static str),
    /// A field of a mapping.
    Field(&'a Path<'a>, &'a str),
    /// An entry of a list.
    Entry(&'a Path<'a>, usize),
}

impl<'a> Path<'a> {
    /// Returns the path of a field of the mapping at this path.
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

/// A value was reported as invalid; the part that contains it cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rejected;

pub(super) type FieldResult<T> = Result<T, Rejected>;

/// Reads values and reports invalid ones.
pub(super) struct FieldReader<'a> {
    pub interner: &'a mut Interner,
    report: &'a mut FieldReport,
    /// What follows from an invalid value, as the end of every message.
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

    /// Reports a value. `fault` completes the sentence: what is wrong with it and how to correct it.
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

    /// Reports a valid field that nftlet does not support.
    pub(super) fn unsupported(&mut self, at: &Path<'_>, consequence: &str) -> Rejected {
        self.report.unsupported(at, consequence);
        Rejected
    }

    /// Reads a mapping. `null` is an empty one, even as an entry of a list, since the API server's
    /// decoder leaves a struct unchanged on `null`.
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

    /// Rejects fields that are not known: a misspelt field does not mean its absence.
    pub(super) fn check_known(
        &mut self,
        at: &Path<'_>,
        map: &Map<String, Value>,
        known: &[&str],
    ) -> FieldResult<()> {
        let mut sound = Ok(());
        for (name, value) in map {
            if !known.contains(&&**name) {
                let hint = format_args!(
                    "is in an unknown field; the known ones are {}",
                    Listed(known)
                );
                sound = Err(self.reject(&at.field(name), value, hint));
            }
        }
        sound
    }

    /// Reads a mapping that has only the known fields. Returns their values; `null` is absent.
    pub(super) fn fields<'v, const N: usize>(
        &mut self,
        at: &Path<'_>,
        value: &'v Value,
        known: [&str; N],
    ) -> FieldResult<[Option<&'v Value>; N]> {
        let map = self.mapping(at, value)?;
        self.check_known(at, map, &known)?;
        Ok(known.map(|name| present(map, name)))
    }

    /// Reads the entries of a list with `read`. Rejects the list if one of them is, after all have
    /// been read, so that each invalid entry is reported.
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

    /// Reads a list without its entries.
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

    /// Reads a string. `null` is an empty one, as for the API server.
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

/// Returns the value of a field, unless it is `null`.
pub(super) fn present<'v>(map: &'v Map<String, Value>, name: &str) -> Option<&'v Value> {
    map.get(name).filter(|value| !value.is_null())
}

/// Shortens a value for a message.
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

/// Displays names as a sentence lists them.
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
