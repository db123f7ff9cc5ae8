//! Reading the documents of a file as values, and the positions of invalid ones.
//!
//! A file is first split into documents, so that a syntax error affects only one of them. The items
//! of a list are passed on one by one while the document is read: the output of
//! `kubectl get -o yaml` for a large cluster is a single list, which is never in memory as a whole.
//!
//! Values have no positions. A document with invalid values is read again, as YAML also if it is
//! JSON, to find their positions.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use serde_saphyr::options::DuplicateKeyPolicy;
use serde_saphyr::{Location, NonFiniteFloatPolicy, Options, Spanned};

/// The maximum depth of a YAML document with its aliases expanded. For JSON it is that of
/// `serde_json`, 128.
const DEEPEST: usize = 64;
/// The maximum number of parser events that the aliases of a YAML document expand to.
const MOST_ALIASED: usize = 1 << 18;
/// The maximum length of text that the aliases of a YAML document expand to.
const MOST_TEXT: usize = 16 << 20;

/// A line and a column, both counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub line: u64,
    pub column: u64,
}

impl Position {
    pub(super) const START: Self = Self { line: 1, column: 1 };

    /// Returns the position after a text that begins here.
    pub(super) fn after(self, text: &[u8]) -> Self {
        let lines = text.iter().filter(|byte| **byte == b'\n').count() as u64;
        let last = text.rsplit(|byte| *byte == b'\n').next();
        let column = String::from_utf8_lossy(last.unwrap_or_default())
            .chars()
            .count() as u64;
        match lines {
            0 => self.plus(1, column + 1),
            _ => self.plus(lines + 1, column + 1),
        }
    }

    /// Converts a line and column of a text that begins here.
    fn plus(self, line: u64, column: u64) -> Self {
        let first = if line == 1 { self.column - 1 } else { 0 };
        Self {
            line: self.line + line.saturating_sub(1),
            column: first + column,
        }
    }
}

/// A syntax error and its position.
#[derive(Debug)]
pub(super) struct SyntaxFault {
    pub at: Position,
    pub message: String,
}

/// A value of a document.
#[derive(Debug, PartialEq)]
pub(super) struct Captured {
    pub value: Value,
    /// The path of a field that occurs twice in a mapping of the value.
    pub twice: Option<String>,
}

impl From<Value> for Captured {
    fn from(value: Value) -> Self {
        Self { value, twice: None }
    }
}

/// One document of a file.
#[derive(Debug)]
pub(super) struct Document<'a> {
    text: &'a str,
    start: Position,
    syntax: Syntax,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Syntax {
    Yaml,
    Json,
}

/// Splits a YAML file before its `---` lines and after its `...` lines, which are markers even in a
/// block scalar.
pub(super) fn yaml_documents(text: &str) -> Vec<Document<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let is = |line: &str, marker| {
        line.strip_prefix(marker)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
    };
    let (mut cuts, mut offset) = (vec![(0, 0)], 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        if is(line, "---") {
            cuts.push((offset, number));
        }
        offset += line.len();
        if is(line, "...") {
            cuts.push((offset, number + 1));
        }
    }
    cuts.push((text.len(), 0));
    let blank = |line: &str| {
        let line = line.trim();
        line.is_empty() || line.starts_with(['#', '%']) || line == "---" || line == "..."
    };
    let documents = cuts.windows(2).filter_map(|cuts| {
        let &[(begin, lines), (end, _)] = cuts else {
            return None;
        };
        let text = text.get(begin..end)?;
        (!text.lines().all(blank)).then_some(Document {
            text,
            start: Position::START.plus(lines as u64 + 1, 1),
            syntax: Syntax::Yaml,
        })
    });
    documents.collect()
}

/// Splits a file of JSON values. Returns the values before the first syntax error, and the error.
pub(super) fn json_documents(text: &str) -> (Vec<Document<'_>>, Option<SyntaxFault>) {
    let (mut documents, mut offset, mut start) = (Vec::new(), 0, Position::START);
    for document in serde_json::Deserializer::from_str(text).into_iter::<&RawValue>() {
        match document {
            Ok(raw) => {
                let begin = raw.get().as_ptr().addr() - text.as_ptr().addr();
                start = start.after(text.as_bytes().get(offset..begin).unwrap_or_default());
                offset = begin;
                documents.push(Document {
                    text: raw.get(),
                    start,
                    syntax: Syntax::Json,
                });
            }
            Err(fault) => return (documents, Some(json_fault(Position::START, &fault))),
        }
    }
    (documents, None)
}

fn json_fault(start: Position, fault: &serde_json::Error) -> SyntaxFault {
    let (line, column) = (fault.line() as u64, fault.column() as u64);
    let text = fault.to_string();
    let place = format!(" at line {line} column {column}");
    SyntaxFault {
        at: start.plus(line, column),
        message: text.strip_suffix(&place).unwrap_or(&text).to_owned(),
    }
}

/// Receives an item of the field `items` at the root of a document, with its index.
type TakeItem<'t> = dyn FnMut(usize, Captured) + 't;

impl Document<'_> {
    /// Reads the document. The items of a list are passed to `take` and not returned.
    ///
    /// # Errors
    /// On a syntax error. Items passed to `take` before it are valid.
    pub(super) fn read(&self, take: &mut TakeItem<'_>) -> Result<Captured, SyntaxFault> {
        let root = Capture(CaptureRole::Root(take));
        match self.syntax {
            Syntax::Json => root
                .deserialize(&mut serde_json::Deserializer::from_str(self.text))
                .map_err(|fault| json_fault(self.start, &fault)),
            Syntax::Yaml => self.yaml(root).map_err(|fault| self.yaml_fault(&fault)),
        }
    }

    fn yaml<'t, S>(&'t self, seed: S) -> Result<S::Value, serde_saphyr::Error>
    where
        S: DeserializeSeed<'t>,
    {
        let options = options(self.text.len());
        serde_saphyr::with_deserializer_from_str_with_options(self.text, options, |yaml| {
            seed.deserialize(yaml)
        })
    }

    fn yaml_fault(&self, fault: &serde_saphyr::Error) -> SyntaxFault {
        let message = match fault {
            serde_saphyr::Error::AliasError { .. }
            | serde_saphyr::Error::AliasReplayLimitExceeded { .. }
            | serde_saphyr::Error::AliasReplayStackDepthExceeded { .. }
            | serde_saphyr::Error::Budget { .. } => format!(
                "values nest more than {DEEPEST} deep here, or aliases expand to more than \
                 {MOST_ALIASED} values or {} MiB of text; write the values out, in several documents",
                MOST_TEXT >> 20
            ),
            _ => {
                let text = fault.to_string();
                let (text, _) = text.split_once(" at line ").unwrap_or((&text, ""));
                text.to_owned()
            }
        };
        let at = fault.location().unwrap_or(Location::UNKNOWN);
        SyntaxFault {
            at: self.start.plus(at.line().max(1), at.column().max(1)),
            message,
        }
    }

    /// Finds the positions of the values at the paths. One that is not found gets the position of
    /// the document. No path may be inside another one.
    pub(super) fn positions(
        &self,
        paths: impl Iterator<Item = String>,
    ) -> BTreeMap<String, Position> {
        let mut positions = paths.map(|path| (path, self.start)).collect();
        // A syntax error further down has been reported.
        let _ = self.yaml(Locate {
            start: self.start,
            path: String::new(),
            positions: &mut positions,
        });
        positions
    }
}

/// Returns the options of the parser. It accepts duplicate keys, which [`Captured::twice`] reports
/// for one object.
fn options(length: usize) -> Options {
    let unlimited = usize::MAX;
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: unlimited,
            max_aliases: unlimited,
            max_anchors: unlimited,
            max_recorded_anchor_events: length + 4 * MOST_ALIASED,
            max_depth: DEEPEST,
            max_nodes: unlimited,
            // An escape is at least half as long as its text.
            max_total_scalar_bytes: 2 * length + MOST_TEXT,
            max_merge_keys: unlimited,
            enforce_alias_anchor_ratio: false,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MOST_ALIASED,
        },
        emit_comments: false,
        duplicate_keys: DuplicateKeyPolicy::LastWins,
        ignore_binary_tag_for_string: true,
        non_finite_float_policy: NonFiniteFloatPolicy::AsString,
        with_snippet: false,
    }
}

/// Reads a [`Captured`] value.
struct Capture<'t>(CaptureRole<'t>);

enum CaptureRole<'t> {
    Root(&'t mut TakeItem<'t>),
    Items(&'t mut TakeItem<'t>),
    Inside,
}

/// Appends a field or, in brackets, an index to a path.
pub(super) fn inside(path: &str, step: &str) -> String {
    let dot = if path.is_empty() || step.is_empty() || step.starts_with('[') {
        ""
    } else {
        "."
    };
    format!("{path}{dot}{step}")
}

impl<'de> DeserializeSeed<'de> for Capture<'_> {
    type Value = Captured;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Captured, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Capture<'_> {
    type Value = Captured;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Captured, E> {
        Ok(Value::Null.into())
    }

    fn visit_bool<E>(self, value: bool) -> Result<Captured, E> {
        Ok(Value::from(value).into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Captured, E> {
        Ok(Value::from(value).into())
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Captured, E> {
        self.visit_i64(i64::try_from(value).unwrap_or(i64::MAX))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Captured, E> {
        if value.abs() >= i64::MAX as f64 {
            // An integer beyond 64 bits is out of range, not of another type.
            self.visit_i64(value as i64)
        } else {
            Ok(Value::from(value).into())
        }
    }

    fn visit_str<E>(self, value: &str) -> Result<Captured, E> {
        Ok(Value::from(value).into())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut access: A) -> Result<Captured, A::Error> {
        let (mut items, mut twice) = (Vec::new(), None);
        for number in 0.. {
            let Some(item) = access.next_element_seed(Capture(CaptureRole::Inside))? else {
                break;
            };
            if let CaptureRole::Items(take) = &mut self.0 {
                take(number, item);
                continue;
            }
            if let (None, Some(below)) = (&twice, item.twice) {
                twice = Some(inside(&format!("[{number}]"), &below));
            }
            items.push(item.value);
        }
        let value = Value::Array(items);
        Ok(Captured { value, twice })
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut access: A) -> Result<Captured, A::Error> {
        let (mut fields, mut twice) = (Map::new(), None);
        while let Some(name) = access.next_key::<String>()? {
            let role = match &mut self.0 {
                CaptureRole::Root(take) if name == "items" => CaptureRole::Items(*take),
                _ => CaptureRole::Inside,
            };
            let value = access.next_value_seed(Capture(role))?;
            let again = fields.contains_key(&name).then(String::new);
            if let (None, Some(below)) = (&twice, again.or(value.twice)) {
                twice = Some(inside(&name, &below));
            }
            fields.insert(name, value.value);
        }
        let value = Value::Object(fields);
        Ok(Captured { value, twice })
    }
}

/// Finds the positions of values.
struct Locate<'t> {
    start: Position,
    /// The path of the value that is read.
    path: String,
    positions: &'t mut BTreeMap<String, Position>,
}

impl Locate<'_> {
    fn inside(&mut self, step: &str) -> Locate<'_> {
        Locate {
            start: self.start,
            path: inside(&self.path, step),
            positions: self.positions,
        }
    }
}

impl<'de> DeserializeSeed<'de> for Locate<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        if let Some(place) = self.positions.get_mut(&self.path) {
            let at = Spanned::<IgnoredAny>::deserialize(from)?.referenced;
            *place = self.start.plus(at.line(), at.column());
            return Ok(());
        }
        let paths = self.positions.range(self.path.clone()..);
        let leads_on = paths
            .map_while(|(path, _)| path.strip_prefix(&self.path))
            .any(|rest| self.path.is_empty() || rest.starts_with(['.', '[']));
        if leads_on {
            from.deserialize_any(self)
        } else {
            IgnoredAny::deserialize(from).map(drop)
        }
    }
}

impl<'de> Visitor<'de> for Locate<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value with others inside")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut access: A) -> Result<(), A::Error> {
        let mut number = 0;
        while access
            .next_element_seed(self.inside(&format!("[{number}]")))?
            .is_some()
        {
            number += 1;
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut access: A) -> Result<(), A::Error> {
        while let Some(name) = access.next_key::<String>()? {
            access.next_value_seed(self.inside(&name))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
