//! Label and field selectors.

use std::collections::BTreeMap;

use serde_json::Value;

/// What selectors look at.
#[derive(Default)]
pub struct Traits {
    labels: BTreeMap<String, String>,
    fields: BTreeMap<&'static str, String>,
}

/// The selectors of one request.
pub struct Selector {
    labels: Vec<String>,
    fields: Vec<String>,
}

impl Selector {
    pub fn new(labels: &str, fields: &str) -> Self {
        let parts = |text: &str| {
            let parts = text.split(',').filter(|part| !part.is_empty());
            parts.map(str::to_owned).collect()
        };
        Self {
            labels: parts(labels),
            fields: parts(fields),
        }
    }

    pub fn takes(&self, traits: &Traits) -> bool {
        let label = |part: &String| match part.strip_prefix('!') {
            Some(absent) => !traits.labels.contains_key(absent),
            None => match part.split_once('=') {
                Some((key, value)) => traits.labels.get(key).is_some_and(|is| is == value),
                None => traits.labels.contains_key(part),
            },
        };
        let field = |part: &String| {
            let value = |key: &str| traits.fields.get(key).map_or("", String::as_str).to_owned();
            match (part.split_once("!="), part.split_once('=')) {
                (Some((key, not)), _) => value(key) != not,
                (None, Some((key, is))) => value(key) == is,
                (None, None) => panic!("not a field selector: {part}"),
            }
        };
        self.labels.iter().all(label) && self.fields.iter().all(field)
    }
}

pub fn traits_of(object: &Value) -> Traits {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let labels = object["metadata"]["labels"]
        .as_object()
        .cloned()
        .unwrap_or_default();
    Traits {
        labels: labels
            .iter()
            .map(|(key, value)| (key.clone(), text(value)))
            .collect(),
        fields: [
            ("metadata.name", text(&object["metadata"]["name"])),
            ("spec.clusterIP", text(&object["spec"]["clusterIP"])),
            ("status.phase", text(&object["status"]["phase"])),
        ]
        .into(),
    }
}
