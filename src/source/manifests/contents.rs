//! The objects of one file.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::json::{Locator, without_place};
use super::tree::{Node, Position, Value};
use super::yaml::{Part, read_section, sections};
use crate::model::{Kind, Notice, Object, ObjectRef, Reason, Subject};
use crate::source::convert::{Converter, Decoded, object_name};
use crate::source::wire::{Head, HeadMeta};

/// What a file holds, and what is wrong with it.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// The usable objects, each with the place where it begins.
    pub objects: Vec<(Object, Position)>,
    /// Objects that are in the file but could not be decoded.
    pub damaged: Vec<ObjectRef>,
    /// Whether some part of the file could not even be attributed to an object.
    pub unreadable: bool,
    /// What is wrong, with places.
    pub notices: Vec<Notice>,
}

/// Which of the objects in files count.
#[derive(Debug)]
pub(super) struct Wanted {
    /// The own Node; others are none of this node's business.
    pub node_name: String,
    /// Whether those of network policies do.
    pub network_policies: bool,
}

impl Wanted {
    /// The kinds that count.
    pub(super) fn kinds(&self) -> &'static [Kind] {
        if self.network_policies {
            &Kind::ALL
        } else {
            &Kind::SERVICES
        }
    }
}

/// Reads a manifest, YAML or JSON. `path` names it in notices; what is not `wanted` is left out.
pub(super) fn read(
    path: &Path,
    text: &str,
    wanted: &Wanted,
    converter: &mut Converter,
) -> Contents {
    let mut reader = Reader {
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
    if is_json || looks_like_json {
        if let Err((at, message)) = reader.json(text) {
            if is_json {
                reader.syntax(at, &message);
            } else {
                // `{a: b}` is YAML though it is no JSON.
                reader.out = Contents::default();
                reader.skipped.clear();
                reader.yaml(text);
            }
        }
    } else {
        reader.yaml(text);
    }
    reader.finish()
}

/// What an `apiVersion` and `kind` mean.
enum Class {
    Used(Kind),
    /// A known kind of a version that is not understood; holds the one to write instead.
    OtherVersion(&'static str),
    List,
    Unknown,
}

fn classify(api_version: &str, kind: &str) -> Class {
    let (used, expected) = match kind {
        "Service" => (Kind::Service, "v1"),
        "Node" => (Kind::Node, "v1"),
        "Pod" => (Kind::Pod, "v1"),
        "Namespace" => (Kind::Namespace, "v1"),
        "EndpointSlice" => (Kind::EndpointSlice, "discovery.k8s.io/v1"),
        // The beta has the same fields.
        "ServiceCIDR" if api_version == "networking.k8s.io/v1beta1" => {
            return Class::Used(Kind::ServiceCidr);
        }
        "ServiceCIDR" => (Kind::ServiceCidr, "networking.k8s.io/v1"),
        // Where the kind was before; whoever kept such a file wants it enforced.
        "NetworkPolicy" if api_version == "extensions/v1beta1" => {
            return Class::OtherVersion("networking.k8s.io/v1");
        }
        "NetworkPolicy" => (Kind::NetworkPolicy, "networking.k8s.io/v1"),
        _ if kind.ends_with("List") => return Class::List,
        _ => return Class::Unknown,
    };
    // `Service` of another group, such as serving.knative.dev/v1, is another kind altogether.
    let group = |api_version: &str| {
        api_version
            .split_once('/')
            .map(|(group, _)| group.to_owned())
    };
    if api_version == expected {
        Class::Used(used)
    } else if group(api_version) == group(expected) {
        Class::OtherVersion(expected)
    } else {
        Class::Unknown
    }
}

struct Reader<'c> {
    path: &'c Path,
    wanted: &'c Wanted,
    converter: &'c mut Converter,
    out: Contents,
    skipped: BTreeMap<String, usize>,
}

impl Reader<'_> {
    fn finish(mut self) -> Contents {
        if !self.skipped.is_empty() {
            let list: Vec<String> = self
                .skipped
                .iter()
                .map(|(kind, count)| format!("{count} {kind}"))
                .collect();
            let message = format!(
                "skipped {}: nftlet has no use for these kinds",
                list.join(", ")
            );
            self.notice(Reason::UnknownKind, None, message);
        }
        self.out
    }

    fn notice(&mut self, reason: Reason, at: Option<Position>, message: String) {
        self.out.notices.push(Notice {
            subject: Subject::File {
                path: self.path.to_owned(),
                position: at.map(|at| (at.line, at.column)),
            },
            reason,
            message,
        });
    }

    fn syntax(&mut self, at: Position, message: &str) {
        self.out.unreadable = true;
        self.notice(
            Reason::InvalidFile,
            Some(at),
            format!("the file cannot be parsed here: {message}; the document it is in is not used beyond this point"),
        );
    }

    fn yaml(&mut self, text: &str) {
        for section in sections(text) {
            let mut list = PendingList::new(self);
            let read = read_section(&section, &mut |part| match part {
                Part::Item(item) => {
                    let head = yaml_head(&item);
                    if head.kind.is_some() || head.api_version.is_some() {
                        self.yaml_object(&item, None);
                    } else {
                        list.without_kind.push(item);
                    }
                }
                Part::Document(root) => {
                    let list = std::mem::replace(&mut list, PendingList::new(self));
                    self.yaml_root(&root, list);
                }
            });
            if let Err(fault) = read {
                self.syntax(fault.at, &fault.message);
            }
        }
    }

    fn yaml_root(&mut self, root: &Node<'_>, list: PendingList<'_>) {
        let head = yaml_head(root);
        let api_version = head.api_version.as_deref().unwrap_or_default();
        let kind = head.kind.as_deref().unwrap_or_default();
        if matches!(classify(api_version, kind), Class::List) && root.get("items").is_some() {
            let implied = item_kind(api_version, kind);
            for item in &list.without_kind {
                self.yaml_object(item, implied);
            }
        } else {
            // Something else that happens to have a field `items`.
            list.forget_items(self);
            self.yaml_object(root, None);
        }
    }

    /// Takes an object or, recursively, the items of a list. `implied` is what a typed list
    /// says its items are.
    fn yaml_object(&mut self, node: &Node<'_>, implied: Option<(&str, &str)>) {
        if node.is_null() {
            return;
        }
        let head = yaml_head(node);
        match (self.class(&head, implied, node.at), &head.kind) {
            (Some(Class::List), Some(kind)) => {
                let api_version = head.api_version.as_deref().unwrap_or_default();
                let implied = item_kind(api_version, kind);
                if let Some(Value::Sequence(items)) =
                    node.get("items").map(|items| &items.resolved().value)
                {
                    for item in items {
                        self.yaml_object(item, implied);
                    }
                }
            }
            (Some(Class::Used(kind)), _) => {
                let decoded = self.converter.decode(kind, node).map_err(|fault| {
                    let at = fault.at.unwrap_or(node.at);
                    (at, fault.to_string())
                });
                self.object(kind, &head, node.at, decoded);
            }
            _ => {}
        }
    }

    /// # Errors
    /// Where the text stops being JSON.
    fn json(&mut self, text: &str) -> Result<(), (Position, String)> {
        let mut locator = Locator::new(text);
        for document in serde_json::Deserializer::from_str(text).into_iter::<&RawValue>() {
            match document {
                Ok(raw) => self.json_object(raw, None, &mut locator),
                Err(fault) => {
                    let at = Position {
                        line: fault.line() as u64,
                        column: fault.column() as u64,
                    };
                    return Err((at, without_place(&fault)));
                }
            }
        }
        Ok(())
    }

    fn json_object(
        &mut self,
        raw: &RawValue,
        implied: Option<(&str, &str)>,
        locator: &mut Locator<'_>,
    ) {
        #[derive(Deserialize, Default)]
        #[serde(default)]
        struct Items<'a> {
            #[serde(borrow)]
            items: Option<Vec<&'a RawValue>>,
        }
        let at = locator.position_of(raw);
        let head = match serde_json::from_str::<Head>(raw.get()) {
            Ok(head) => head,
            Err(fault) => {
                return self.misfit(
                    at.of_fault(&fault),
                    &Head::default(),
                    None,
                    &without_place(&fault),
                );
            }
        };
        match (self.class(&head, implied, at), &head.kind) {
            (Some(Class::List), Some(kind)) => {
                let api_version = head.api_version.as_deref().unwrap_or_default();
                let implied = item_kind(api_version, kind);
                match serde_json::from_str::<Items<'_>>(raw.get()) {
                    Ok(list) => {
                        for item in list.items.unwrap_or_default() {
                            self.json_object(item, implied, locator);
                        }
                    }
                    Err(fault) => {
                        self.misfit(at.of_fault(&fault), &head, None, &without_place(&fault))
                    }
                }
            }
            (Some(Class::Used(kind)), _) => {
                let mut from = serde_json::Deserializer::from_str(raw.get());
                let decoded = self
                    .converter
                    .decode(kind, &mut from)
                    .map_err(|fault| (at.of_fault(&fault), without_place(&fault)));
                self.object(kind, &head, at, decoded);
            }
            _ => {}
        }
    }

    /// What an object is; notes it when it is of no use.
    fn class(&mut self, head: &Head, implied: Option<(&str, &str)>, at: Position) -> Option<Class> {
        let (implied_version, implied_kind) = implied.unwrap_or_default();
        let api_version = head.api_version.as_deref().unwrap_or(implied_version);
        let kind = head.kind.as_deref().unwrap_or(implied_kind);
        if kind.is_empty() || api_version.is_empty() {
            self.misfit(
                at,
                head,
                None,
                "apiVersion or kind is missing; every object needs both",
            );
            return None;
        }
        let class = classify(api_version, kind);
        match class {
            Class::Unknown => *self.skipped.entry(kind.to_owned()).or_default() += 1,
            Class::OtherVersion(expected) => {
                let message =
                    format!("apiVersion \"{api_version}\" is not understood; write {expected}");
                self.misfit(at, head, None, &message);
            }
            // Whoever switched them off need not be told.
            Class::Used(kind) if !self.wanted.kinds().contains(&kind) => return None,
            Class::Used(_) | Class::List => {}
        }
        Some(class)
    }

    fn object(
        &mut self,
        kind: Kind,
        head: &Head,
        at: Position,
        decoded: Result<Decoded, (Position, String)>,
    ) {
        let decoded = match decoded {
            Ok(decoded) => decoded,
            Err((at, message)) => return self.misfit(at, head, Some(kind), &message),
        };
        if kind == Kind::Node && decoded.name.name() != self.wanted.node_name {
            return;
        }
        for notice in decoded.notices {
            self.notice(notice.reason, Some(at), notice.message);
        }
        if let Some(object) = decoded.object {
            self.out.objects.push((object, at));
        }
    }

    /// Notes an object that cannot be used, by name as far as it has one.
    fn misfit(&mut self, at: Position, head: &Head, kind: Option<Kind>, message: &str) {
        let meta = head.metadata.as_ref();
        let name = meta.and_then(|meta| meta.name.as_deref());
        let namespace = meta.and_then(|meta| meta.namespace.as_deref());
        let used = kind.and_then(|kind| {
            let name = object_name(kind, name, namespace).ok()?;
            Some(ObjectRef::new(kind, name))
        });
        let subject = match &used {
            Some(object) => object.to_string(),
            None => format!(
                "{} {}",
                head.kind.as_deref().unwrap_or("an object"),
                name.unwrap_or("without a name")
            ),
        };
        match used {
            Some(object) => self.out.damaged.push(object),
            None => self.out.unreadable = true,
        }
        self.notice(
            Reason::InvalidObject,
            Some(at),
            format!("{subject}: {message}; the object is not used until it is mended"),
        );
    }
}

/// Items of a list that is still being read: a YAML list names its own kind after its items.
struct PendingList<'a> {
    without_kind: Vec<Node<'a>>,
    objects: usize,
    damaged: usize,
    notices: usize,
    unreadable: bool,
    skipped: BTreeMap<String, usize>,
}

impl PendingList<'_> {
    fn new(reader: &Reader<'_>) -> Self {
        Self {
            without_kind: Vec::new(),
            objects: reader.out.objects.len(),
            damaged: reader.out.damaged.len(),
            notices: reader.out.notices.len(),
            unreadable: reader.out.unreadable,
            skipped: reader.skipped.clone(),
        }
    }

    /// Takes back everything that the items gave.
    fn forget_items(self, reader: &mut Reader<'_>) {
        reader.out.objects.truncate(self.objects);
        reader.out.damaged.truncate(self.damaged);
        reader.out.notices.truncate(self.notices);
        reader.out.unreadable = self.unreadable;
        reader.skipped = self.skipped;
    }
}

fn yaml_head(node: &Node<'_>) -> Head {
    let text = |node: Option<&Node<'_>>| node.and_then(Node::text).map(str::to_owned);
    let meta = node.get("metadata");
    Head {
        api_version: text(node.get("apiVersion")),
        kind: text(node.get("kind")),
        metadata: Some(HeadMeta {
            name: text(meta.and_then(|meta| meta.get("name"))),
            namespace: text(meta.and_then(|meta| meta.get("namespace"))),
            resource_version: None,
        }),
    }
}

/// What the items of a typed list are; a plain `List` says nothing.
fn item_kind<'a>(api_version: &'a str, kind: &'a str) -> Option<(&'a str, &'a str)> {
    kind.strip_suffix("List")
        .filter(|kind| !kind.is_empty())
        .map(|kind| (api_version, kind))
}
