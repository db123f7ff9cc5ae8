//! Reading of label selectors.

use std::sync::Arc;

use serde_json::Value;

use super::fields::{FieldReader, FieldResult, Path, Rejected};
use crate::model::{LabelSelector, Requirement};

/// The valid requirements of a selector, and whether all are valid.
pub(super) struct Requirements {
    pub valid: Vec<Requirement>,
    pub all: FieldResult<()>,
}

impl FieldReader<'_> {
    /// Reads a selector. Rejects one with an invalid requirement.
    pub(super) fn selector(&mut self, at: &Path<'_>, value: &Value) -> FieldResult<LabelSelector> {
        let found = self.requirements(at, value);
        found.all?;
        Ok(LabelSelector::new(found.valid))
    }

    /// Reads the valid requirements of a selector.
    pub(super) fn requirements(&mut self, at: &Path<'_>, value: &Value) -> Requirements {
        let mut found = Requirements {
            valid: Vec::new(),
            all: Ok(()),
        };
        let map = match self.mapping(at, value) {
            Ok(map) => map,
            Err(rejected) => {
                found.all = Err(rejected);
                return found;
            }
        };
        for (name, value) in map.iter().filter(|(_, value)| !value.is_null()) {
            let at = at.field(name);
            match name.as_str() {
                "matchLabels" => self.match_labels(&at, value, &mut found),
                "matchExpressions" => self.match_expressions(&at, value, &mut found),
                _ => {
                    let hint = "is in an unknown field; the known ones are matchLabels and matchExpressions";
                    found.all = Err(self.reject(&at, value, hint));
                }
            }
        }
        found
    }

    fn match_labels(&mut self, at: &Path<'_>, value: &Value, found: &mut Requirements) {
        let map = match self.mapping(at, value) {
            Ok(map) => map,
            Err(rejected) => return found.all = Err(rejected),
        };
        for (key, value) in map {
            let at = at.field(key);
            let read = self.label_key(&at, key).and_then(|key| {
                let value = self.label_value(&at, value)?;
                Ok(Requirement::In(key, vec![value]))
            });
            found.take(read);
        }
    }

    fn match_expressions(&mut self, at: &Path<'_>, value: &Value, found: &mut Requirements) {
        let entries = match self.entries(at, value) {
            Ok(entries) => entries,
            Err(rejected) => return found.all = Err(rejected),
        };
        for (index, entry) in entries.iter().enumerate() {
            let read = self.expression(&Path::Entry(at, index), entry);
            found.take(read);
        }
    }

    fn expression(&mut self, at: &Path<'_>, value: &Value) -> FieldResult<Requirement> {
        let [key, operator, values] = self.fields(at, value, ["key", "operator", "values"])?;
        let key_at = at.field("key");
        let key = match key {
            Some(key) => self.text(&key_at, key)?,
            None => "",
        };
        let key = self.label_key(&key_at, key)?;
        let values_at = at.field("values");
        let values = match values {
            Some(values) => self.list(&values_at, values, Self::label_value)?,
            None => Vec::new(),
        };
        let operator = operator.unwrap_or(&Value::Null);
        let with_values = match operator.as_str() {
            Some("In" | "NotIn") => true,
            Some("Exists" | "DoesNotExist") => false,
            _ => {
                let hint = "is not an operator; write In, NotIn, Exists or DoesNotExist";
                return Err(self.reject(&at.field("operator"), operator, hint));
            }
        };
        if with_values == values.is_empty() {
            let hint = if with_values {
                "needs values; list at least one"
            } else {
                "takes no values; remove them"
            };
            return Err(self.reject(&values_at, operator, hint));
        }
        Ok(match operator.as_str() {
            Some("In") => Requirement::In(key, values),
            Some("NotIn") => Requirement::NotIn(key, values),
            Some("Exists") => Requirement::Exists(key),
            _ => Requirement::DoesNotExist(key),
        })
    }

    fn label_key(&mut self, at: &Path<'_>, key: &str) -> FieldResult<Arc<str>> {
        if is_label_key(key) {
            return Ok(self.interner.string(key));
        }
        let hint = "is not the key of a label; write a name such as app or example.com/app";
        Err(self.reject(at, &Value::from(key), hint))
    }

    fn label_value(&mut self, at: &Path<'_>, value: &Value) -> FieldResult<Arc<str>> {
        let text = self.text(at, value)?;
        if text.is_empty() || is_label_name(text) {
            return Ok(self.interner.string(text));
        }
        let hint = "is not the value of a label; write up to 63 letters, digits, '-', '_' and '.'";
        Err(self.reject(at, value, hint))
    }
}

impl Requirements {
    fn take(&mut self, read: FieldResult<Requirement>) {
        match read {
            Ok(requirement) => self.valid.push(requirement),
            Err(Rejected) => self.all = Err(Rejected),
        }
    }
}

/// Returns whether a text is a name with an optional DNS prefix (apimachinery's `IsQualifiedName`).
fn is_label_key(key: &str) -> bool {
    match key.split_once('/') {
        Some((prefix, name)) => is_dns_name(prefix) && is_label_name(name),
        None => is_label_name(key),
    }
}

/// Returns whether a text has 1 to 63 letters, digits, `-`, `_` and `.`, with a letter or digit at
/// both ends.
fn is_label_name(text: &str) -> bool {
    let ends = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
    let inside = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    text.len() <= 63
        && ends(text.bytes().next())
        && ends(text.bytes().last())
        && text.bytes().all(inside)
}

fn is_dns_name(text: &str) -> bool {
    let ends = |byte: Option<u8>| {
        byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    };
    let inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    text.len() <= 253
        && text.split('.').all(|label| {
            ends(label.bytes().next()) && ends(label.bytes().last()) && label.bytes().all(inside)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_valid_label_keys_are_accepted() {
        for key in [
            "app",
            "App_1.b-c",
            "0",
            "example.com/app",
            "kubernetes.io/metadata.name",
        ] {
            assert!(is_label_key(key), "{key}");
        }
        let long = "a".repeat(64);
        for key in [
            "",
            "-a",
            "a-",
            "a b",
            "a/b/c",
            "/a",
            "a/",
            "Example.com/a",
            "a..b/c",
            "-a.b/c",
            &long,
        ] {
            assert!(!is_label_key(key), "{key}");
        }
    }
}
