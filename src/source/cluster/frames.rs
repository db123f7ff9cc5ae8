//! The lines of a watch, and the text of a list around its objects.
//!
//! The objects themselves stay unparsed text at first, so that one that cannot be decoded does not
//! spoil the page.

use std::borrow::Cow;

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::watch_error::one_line;
use crate::model::Kind;

#[derive(Deserialize)]
pub(super) struct WatchLine<'a> {
    #[serde(rename = "type", borrow)]
    pub(super) type_: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) object: &'a RawValue,
}

/// Returns the object of an `ADDED` or `MODIFIED` line that is written as API servers write it.
///
/// The text may not be valid JSON; then the line must be parsed as a [`WatchLine`]. This saves
/// scanning the object once to find its end before it is decoded.
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

/// A list from which [`super::list`] has removed the objects.
#[derive(Default, Deserialize)]
#[serde(default)]
#[serde(rename_all = "camelCase")]
pub(super) struct ListPage<'a> {
    #[serde(borrow)]
    pub(super) api_version: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) kind: Cow<'a, str>,
    pub(super) metadata: MarkerMeta,
    /// `None` if there is no such field.
    #[serde(deserialize_with = "items")]
    items: Option<()>,
}

/// Reads the array without its items. Servers before Kubernetes 1.26 may write `null` for an
/// empty one.
fn items<'de, D: Deserializer<'de>>(from: D) -> Result<Option<()>, D::Error> {
    Option::<Vec<IgnoredAny>>::deserialize(from).map(|_| Some(()))
}

impl ListPage<'_> {
    /// Checks that this is a list of a kind. Anything else must not be taken for an empty list,
    /// which would delete all objects.
    ///
    /// # Errors
    /// A description of what it is instead.
    pub(super) fn check(&self, kind: Kind) -> Result<(), String> {
        let (version, asked) = (kind.api_version(), format!("{kind}List"));
        if self.api_version == version && self.kind == asked {
            return Ok(());
        }
        let (version, kind) = (one_line(&self.api_version), one_line(&self.kind));
        Err(match (&*version, &*kind) {
            ("", "") => "an object without apiVersion and kind".to_owned(),
            (_, "") => format!("an object of {version} without a kind before its items"),
            _ => format!("a {version} {kind}"),
        })
    }

    /// Checks that this is a list of a kind. Returns its version.
    ///
    /// # Errors
    /// A description of what it is instead.
    pub(super) fn version(&mut self, kind: Kind) -> Result<String, String> {
        self.check(kind)?;
        if self.items.is_none() {
            return Err(format!("a {kind}List without items"));
        }
        let version = usable(self.metadata.resource_version.take());
        version.ok_or_else(|| format!("a {kind}List without a resourceVersion"))
    }
}

/// Filters out versions that a watch cannot be resumed from: the empty one and `0` start a watch
/// at any version.
pub(super) fn usable(version: Option<String>) -> Option<String> {
    version.filter(|version| !version.is_empty() && version != "0")
}

/// Returns a deserialiser of an object.
pub(super) fn json(raw: &RawValue) -> serde_json::Deserializer<serde_json::de::StrRead<'_>> {
    serde_json::Deserializer::from_str(raw.get())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_list_that_was_asked_for_is_one() {
        let content = |json: &str, kind| {
            let mut page: ListPage<'_> = serde_json::from_str(json).expect("JSON");
            page.version(kind)
        };
        for (json, found) in [
            (
                r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"5"},"items":[]}"#,
                Ok("5"),
            ),
            (
                r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"5"},"items":null}"#,
                Ok("5"),
            ),
            (
                r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"5"}}"#,
                Err("a ServiceList without items"),
            ),
            (
                r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"5","continue":"x"}}"#,
                Err("a ServiceList without items"),
            ),
            (
                r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"0"},"items":[]}"#,
                Err("a ServiceList without a resourceVersion"),
            ),
            (
                r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":""},"items":[]}"#,
                Err("a ServiceList without a resourceVersion"),
            ),
            (
                r#"{"kind":"ServiceList","apiVersion":"v1","items":[]}"#,
                Err("a ServiceList without a resourceVersion"),
            ),
            (
                r#"{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"5"},"items":[]}"#,
                Err("a v1 PodList"),
            ),
            (
                r#"{"kind":"ServiceList","apiVersion":"v2","metadata":{"resourceVersion":"5"},"items":[]}"#,
                Err("a v2 ServiceList"),
            ),
            (
                r#"{"kind":"Table","apiVersion":"meta.k8s.io/v1","metadata":{"resourceVersion":"5"},"rows":[]}"#,
                Err("a meta.k8s.io/v1 Table"),
            ),
            (
                r#"{"metadata":{"resourceVersion":"5"},"items":[]}"#,
                Err("an object without apiVersion and kind"),
            ),
            ("{}", Err("an object without apiVersion and kind")),
        ] {
            let found = found.map(str::to_owned).map_err(str::to_owned);
            assert_eq!(content(json, Kind::Service), found, "{json}");
        }
        let slices = r#"{"kind":"EndpointSliceList","apiVersion":"discovery.k8s.io/v1","metadata":{"resourceVersion":"5"},"items":[]}"#;
        assert!(content(slices, Kind::EndpointSlice).is_ok());
        let older = slices.replace("/v1", "/v1beta1");
        assert!(content(&older, Kind::EndpointSlice).is_err());
    }

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
