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
