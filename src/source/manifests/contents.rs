//! Reading the objects of one file.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;
use serde_path_to_error::Track;

use super::documents::{
    Captured, Document, Position, SyntaxFault, inside, json_documents, yaml_documents,
};
use super::notice::file_notice;
use crate::model::{Kind, Notice, Object, ObjectRef, Reason, group_of};
use crate::source::convert::{Converter, object_name};

/// The objects of a file, and notices about it.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub objects: BTreeMap<ObjectRef, Object>,
    /// Objects in the file that could not be decoded.
    pub invalid: BTreeSet<ObjectRef>,
    /// Whether a part of the file could not be attributed to an object.
    pub unnamed: bool,
    pub notices: Vec<Notice>,
}

/// The objects in files that are used.
#[derive(Debug)]
pub(super) struct ManifestFilter {
    /// The name of the own Node; others are used only for policies.
    pub node_name: String,
    /// Whether Services, EndpointSlices and ServiceCIDRs are used.
    pub services: bool,
    /// Whether the kinds of policies are used.
    pub network_policies: bool,
}

impl ManifestFilter {
    /// Returns the kinds that are used.
    pub(super) fn kinds(&self) -> impl Iterator<Item = Kind> {
        Kind::ALL.into_iter().filter(|kind| self.uses(*kind))
    }

    fn uses(&self, kind: Kind) -> bool {
        if Kind::POLICY.contains(&kind) {
            self.network_policies
        } else {
            self.services || kind == Kind::Node
        }
    }
}

/// Reads a manifest, YAML or JSON. `path` is used in notices.
pub(super) fn read(
    path: &Path,
    text: &str,
    wanted: &ManifestFilter,
    converter: &mut Converter,
) -> Contents {
    let mut reader = ManifestReader {
        path,
        wanted,
        converter,
        out: Contents::default(),
        skipped: BTreeMap::new(),
    };
    let is_json = path
        .extension()
        .is_some_and(|extension| extension == "json");
    let looks_like_json = text.trim_start().starts_with('{');
    let (documents, fault) = match (is_json || looks_like_json).then(|| json_documents(text)) {
        // `{a: b}` is YAML but not JSON.
        Some((documents, fault)) if is_json || fault.is_none() => (documents, fault),
        _ => (yaml_documents(text), None),
    };
    for document in documents {
        reader.document(&document);
    }
    if let Some(fault) = fault {
        reader.syntax(&fault);
    }
    reader.finish()
}

/// The meaning of an `apiVersion` and `kind`.
enum Class {
    Used(Kind),
    /// A known kind in an unsupported version, or its predecessor; holds what to write instead.
    OtherVersion(&'static str),
    List,
    Unknown,
}

/// What replaces an AdminNetworkPolicy.
const ADMIN: &str =
    "a ClusterNetworkPolicy of policy.networking.k8s.io/v1alpha2 with tier: Admin instead";
/// What replaces a BaselineAdminNetworkPolicy.
const BASELINE: &str =
    "a ClusterNetworkPolicy of policy.networking.k8s.io/v1alpha2 with tier: Baseline instead";

fn classify(api_version: &str, kind: &str) -> Class {
    let Some(used) = Kind::named(kind) else {
        let of_policies = group_of(api_version) == Kind::ClusterNetworkPolicy.group();
        return match kind {
            "AdminNetworkPolicy" if of_policies => Class::OtherVersion(ADMIN),
            "BaselineAdminNetworkPolicy" if of_policies => Class::OtherVersion(BASELINE),
            _ if kind.ends_with("List") => Class::List,
            _ => Class::Unknown,
        };
    };
    match (used, api_version) {
        _ if api_version == used.api_version() => Class::Used(used),
        // The beta has the same fields.
        (Kind::ServiceCidr, "networking.k8s.io/v1beta1") => Class::Used(used),
        // The former group of the kind. Its author expects the policy to be enforced.
        (Kind::NetworkPolicy, "extensions/v1beta1") => Class::OtherVersion(used.api_version()),
        _ if group_of(api_version) == used.group() => Class::OtherVersion(used.api_version()),
        // Another group, such as serving.knative.dev/v1, has another kind of the same name.
        _ => Class::Unknown,
    }
}

/// The type and name of an object.
struct ObjectHead<'v> {
    api_version: Option<&'v str>,
    kind: Option<&'v str>,
    name: Option<&'v str>,
    namespace: Option<&'v str>,
}

impl<'v> ObjectHead<'v> {
    /// Reads the head of an object; `implied` is the type of the items of a typed list.
    fn of(object: &'v Value, implied: Option<(&'v str, &'v str)>) -> Self {
        let text = |object: &'v Value, field| object.get(field).and_then(Value::as_str);
        let metadata = object.get("metadata").unwrap_or(&Value::Null);
        Self {
            api_version: text(object, "apiVersion").or(implied.map(|(version, _)| version)),
            kind: text(object, "kind").or(implied.map(|(_, kind)| kind)),
            name: text(metadata, "name"),
            namespace: text(metadata, "namespace"),
        }
    }

    fn class(&self) -> Class {
        let api_version = self.api_version.unwrap_or_default();
        classify(api_version, self.kind.unwrap_or_default())
    }

    /// Returns the type of the items of a typed list. A plain `List` has none.
    fn item_type(&self) -> Option<(&'v str, &'v str)> {
        let kind = self.kind?.strip_suffix("List")?;
        (!kind.is_empty()).then_some((self.api_version.unwrap_or_default(), kind))
    }
}

/// The objects of one document, and notices with the paths of invalid values.
#[derive(Default)]
struct DocumentContents {
    objects: Vec<(Object, String)>,
    invalid: Vec<ObjectRef>,
    unnamed: bool,
    notices: Vec<(Reason, String, String)>,
    skipped: BTreeMap<String, usize>,
}

struct ManifestReader<'c> {
    path: &'c Path,
    wanted: &'c ManifestFilter,
    converter: &'c mut Converter,
    out: Contents,
    skipped: BTreeMap<String, usize>,
}

impl ManifestReader<'_> {
    fn finish(mut self) -> Contents {
        if !self.skipped.is_empty() {
            let list: Vec<String> = self
                .skipped
                .iter()
                .map(|(kind, count)| format!("{count} {kind}"))
                .collect();
            let message = format!(
                "skipped {}: nftlet does not use these kinds",
                list.join(", ")
            );
            self.notice(Reason::UnknownKind, None, message);
        }
        self.out
    }

    fn notice(&mut self, reason: Reason, at: Option<Position>, message: String) {
        let notice = file_notice(self.path, at, reason, message);
        self.out.notices.push(notice);
    }

    fn syntax(&mut self, fault: &SyntaxFault) {
        self.out.unnamed = true;
        let message = format!(
            "the file cannot be parsed here: {}; the rest of this document is not used",
            fault.message
        );
        self.notice(Reason::InvalidFile, Some(fault.at), message);
    }

    fn document(&mut self, document: &Document<'_>) {
        let mut found = DocumentContents::default();
        let mut untyped = Vec::new();
        let root = document.read(&mut |number, item| {
            let head = ObjectHead::of(&item.value, None);
            if head.kind.is_some() || head.api_version.is_some() {
                self.object(&mut found, &item, item_path("", number), None);
            } else {
                // A list may have its type after its items.
                untyped.push((number, item));
            }
        });
        match root {
            Ok(root) => {
                let head = ObjectHead::of(&root.value, None);
                if matches!(head.class(), Class::List) && root.value.get("items").is_some() {
                    for (number, item) in untyped {
                        let at = item_path("", number);
                        self.object(&mut found, &item, at, head.item_type());
                    }
                } else {
                    // Not a list, but another kind with a field `items`.
                    found = DocumentContents::default();
                    self.object(&mut found, &root, String::new(), None);
                }
                self.take(document, found);
            }
            Err(fault) => {
                self.take(document, found);
                self.syntax(&fault);
            }
        }
    }

    /// Adds the objects and notices of a document.
    fn take(&mut self, document: &Document<'_>, mut found: DocumentContents) {
        for (object, at) in found.objects {
            match self.out.objects.entry(object.reference()) {
                Entry::Vacant(place) => {
                    place.insert(object);
                }
                Entry::Occupied(first) => {
                    let message = format!(
                        "{} is in this file twice; the first one is used, remove this one",
                        first.key()
                    );
                    found.notices.push((Reason::InvalidObject, at, message));
                }
            }
        }
        self.out.invalid.extend(found.invalid);
        self.out.unnamed |= found.unnamed;
        for (kind, count) in found.skipped {
            *self.skipped.entry(kind).or_default() += count;
        }
        if !found.notices.is_empty() {
            let positions = document.positions(found.notices.iter().map(|(_, at, _)| at.clone()));
            for (reason, at, message) in found.notices {
                self.notice(reason, positions.get(&at).copied(), message);
            }
        }
    }

    /// Adds an object or, recursively, the items of a list. `implied` is the type of the items of a
    /// typed list.
    fn object(
        &mut self,
        found: &mut DocumentContents,
        Captured { value, twice }: &Captured,
        at: String,
        implied: Option<(&str, &str)>,
    ) {
        if value.is_null() {
            return;
        }
        let head = ObjectHead::of(value, implied);
        let (Some(api_version), Some(kind)) = (head.api_version, head.kind) else {
            let message = "apiVersion or kind is missing; every object needs both";
            return found.reject(at, &head, message);
        };
        match (head.class(), twice) {
            (Class::Unknown, _) => *found.skipped.entry(kind.to_owned()).or_default() += 1,
            (Class::OtherVersion(expected), _) => {
                let message =
                    format!("apiVersion \"{api_version}\" is not supported; write {expected}");
                found.reject(at, &head, &message);
            }
            (Class::Used(kind), _) if !self.wanted.uses(kind) => {}
            (Class::Used(_) | Class::List, Some(field)) => {
                let message = format!("{field} occurs twice; remove one of them");
                found.reject(inside(&at, field), &head, &message);
            }
            (Class::List, None) => {
                let items = value.get("items").and_then(Value::as_array);
                for (number, item) in items.into_iter().flatten().enumerate() {
                    let item = item.clone().into();
                    self.object(found, &item, item_path(&at, number), head.item_type());
                }
            }
            (Class::Used(kind), None) => match self.converter.decode(kind, value) {
                Ok(decoded) => {
                    if kind == Kind::Node && decoded.name.name() != self.wanted.node_name {
                        let other = decoded.object.filter(|_| self.wanted.network_policies);
                        found.objects.extend(other.map(|node| (node, at)));
                        return;
                    }
                    for notice in decoded.notices {
                        let notice = (notice.reason, at.clone(), notice.message);
                        found.notices.push(notice);
                    }
                    found
                        .objects
                        .extend(decoded.object.map(|object| (object, at)));
                }
                Err(fault) => {
                    // Tracking the path costs more than decoding, so only invalid objects are
                    // decoded again for it.
                    let mut track = Track::new();
                    let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
                    let _ = self.converter.decode(kind, tracked);
                    let field = track.path().to_string();
                    let field = if field == "." { "" } else { &field };
                    let message = invalid_message(field, &fault);
                    found.reject(inside(&at, field), &head, &message);
                }
            },
        }
    }
}

impl DocumentContents {
    /// Reports an object that cannot be used.
    fn reject(&mut self, at: String, head: &ObjectHead<'_>, message: &str) {
        let used = match head.class() {
            Class::Used(kind) => object_name(kind, head.name, head.namespace)
                .ok()
                .map(|name| ObjectRef::new(kind, name)),
            _ => None,
        };
        let subject = match &used {
            Some(object) => object.to_string(),
            None => format!(
                "{} {}",
                head.kind.unwrap_or("an object"),
                head.name.unwrap_or("without a name")
            ),
        };
        match used {
            Some(object) => self.invalid.push(object),
            None => self.unnamed = true,
        }
        let message = format!("{subject}: {message}; the object is not used until it is corrected");
        self.notices.push((Reason::InvalidObject, at, message));
    }
}

fn invalid_message(field: &str, fault: &serde_json::Error) -> String {
    let fault = fault.to_string();
    let colon = if field.is_empty() { "" } else { ": " };
    // Unquoted scalars of another type, which the API server does not accept either.
    let scalar = ["integer", "floating point", "boolean"]
        .iter()
        .any(|kind| fault.starts_with(&format!("invalid type: {kind} ")));
    let hint = if scalar && fault.ends_with("expected a string") {
        "; put it in quotes"
    } else {
        ""
    };
    format!("{field}{colon}{fault}{hint}")
}

fn item_path(list: &str, number: usize) -> String {
    inside(list, &format!("items[{number}]"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(text: &str) -> (Vec<String>, Vec<String>) {
        let wanted = ManifestFilter {
            node_name: "node-1".to_owned(),
            services: true,
            network_policies: true,
        };
        let path = Path::new("a.yaml");
        let contents = read(path, text, &wanted, &mut Converter::default());
        let notices = contents.notices.iter();
        (
            contents.objects.keys().map(ToString::to_string).collect(),
            notices
                .map(|notice| format!("{}: {}", notice.subject, notice.message))
                .collect(),
        )
    }

    #[test]
    fn invalid_objects_are_reported_with_field_and_position() {
        let list = "apiVersion: v1\nkind: List\nitems:\n\
                    - {apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{}, {port: eighty}]}}\n\
                    - {apiVersion: v1, kind: Pod, metadata: {name: b, labels: {tier: 1}}}\n\
                    - {apiVersion: v1, kind: Service, metadata: {name: c}, spec: {}, spec: {}}\n\
                    - {apiVersion: v1, kind: ConfigMap, metadata: {name: d}, data: {a: 1, a: 2}}\n\
                    - {apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Node, metadata: 5}]}\n\
                    - {apiVersion: v1, kind: Service, metadata: {name: e}}\n\
                    - {apiVersion: v1, kind: Service, metadata: {name: e}}\n";
        let (objects, notices) = contents(list);
        assert_eq!(objects, ["Service default/e"]);
        let wanted = [
            "a.yaml:4:82: Service default/a: spec.ports[1].port: invalid type: string \"eighty\", expected i64; the object is not used",
            "a.yaml:5:66: Pod default/b: metadata.labels.tier: invalid type: integer `1`, expected a string; put it in quotes; the object",
            "a.yaml:6:72: Service default/c: spec occurs twice; remove one of them; the object",
            "a.yaml:8:79: Node without a name: metadata: invalid type: integer `5`",
            "a.yaml:10:3: Service default/e is in this file twice; the first one is used",
            "a.yaml: skipped 1 ConfigMap",
        ];
        assert_eq!(notices.len(), wanted.len(), "{notices:#?}");
        for (notice, wanted) in notices.iter().zip(wanted) {
            assert!(notice.starts_with(wanted), "{notice}\n{wanted}");
        }
    }

    #[test]
    fn items_of_other_kinds_than_lists_are_ignored() {
        let items = "items:\n- {apiVersion: v1, kind: Service, metadata: {name: a}}\n- {a: 1}\n";
        let (objects, notices) = contents(&format!("{items}apiVersion: x.org/v1\nkind: Menu\n"));
        assert!(objects.is_empty());
        assert_eq!(notices.len(), 1);
        assert!(
            notices[0].starts_with("a.yaml: skipped 1 Menu"),
            "{notices:?}"
        );
        let (objects, _) = contents(&format!("{items}apiVersion: v1\nkind: List\n"));
        assert_eq!(objects, ["Service default/a"]);
    }
}
