//! The envelopes in which objects travel: lines of a watch and pages of a list.
//!
//! The objects themselves stay unparsed text at first, so that one that cannot be decoded is a
//! fault of that object and not of the page.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

/// One line of a watch.
#[derive(Deserialize)]
pub(super) struct WatchLine<'a> {
    #[serde(rename = "type", borrow)]
    pub(super) type_: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) object: &'a RawValue,
}

/// The object of a line that says what an object is like now, where the line is written the way
/// servers write it. The object may turn out to be none, and is to be read from the whole
/// [`WatchLine`] then: this only spares looking for its end before it is decoded.
pub(super) fn current_object(line: &str) -> Option<&str> {
    let rest = line.strip_prefix(r#"{"type":""#)?;
    let rest = rest
        .strip_prefix("ADDED")
        .or_else(|| rest.strip_prefix("MODIFIED"))?;
    rest.strip_prefix(r#"","object":"#)?.strip_suffix('}')
}

/// The object of a bookmark, and the `metadata` of a list.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Marker {
    pub(super) metadata: MarkerMeta,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct MarkerMeta {
    pub(super) resource_version: Option<String>,
    #[serde(rename = "continue")]
    pub(super) token: Option<String>,
    pub(super) annotations: Option<MarkerAnnotations>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct MarkerAnnotations {
    #[serde(rename = "k8s.io/initial-events-end")]
    pub(super) list_end: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Page<'a> {
    pub(super) metadata: MarkerMeta,
    #[serde(borrow)]
    pub(super) items: Option<Vec<&'a RawValue>>,
}

/// A deserialiser for an object.
pub(super) fn json(raw: &RawValue) -> serde_json::Deserializer<serde_json::de::StrRead<'_>> {
    serde_json::Deserializer::from_str(raw.get())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_as_servers_write_them_are_taken_apart() {
        for (line, found) in [
            (r#"{"type":"ADDED","object":{"a":{}}}"#, Some(r#"{"a":{}}"#)),
            (r#"{"type":"MODIFIED","object":{}}"#, Some("{}")),
            (r#"{"type":"DELETED","object":{}}"#, None),
            (r#"{"type":"BOOKMARK","object":{}}"#, None),
            (r#"{"type": "ADDED","object":{}}"#, None),
            (r#"{"object":{},"type":"ADDED"}"#, None),
            (r#"{"type":"ADDED","object":{}} "#, None),
            ("", None),
        ] {
            assert_eq!(current_object(line), found, "{line}");
        }
    }
}
