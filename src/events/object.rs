//! Converts a notice to an Event.

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};

use crate::model::{Kind, Notice, ObjectName, ObjectRef, Reason, Subject};

const CONTROLLER: &str = "nftlet";
/// The namespace of Events about objects without one.
const DEFAULT_NAMESPACE: &str = "default";
// The API's limits of bytes.
const LONGEST_NAME: usize = 253;
const LONGEST_INSTANCE: usize = 128;
const LONGEST_NOTE: usize = 1024;
/// The bytes of the hash in a name.
const HASH: usize = 8;

/// What an Event says, before the identity of its object is known.
#[derive(Clone, Debug)]
pub(super) struct EventDraft {
    /// `None` for the node.
    pub object: Option<ObjectRef>,
    pub namespace: String,
    pub name: String,
    node: String,
    kind: &'static str,
    reason: &'static str,
    action: &'static str,
    note: String,
    at: Timestamp,
}

/// Returns what nftlet was doing, for the field `action`.
fn action(reason: Reason) -> &'static str {
    match reason {
        Reason::InvalidField
        | Reason::InvalidObject
        | Reason::InvalidPolicy
        | Reason::UnsupportedField
        | Reason::InvalidFile
        | Reason::UnknownKind
        | Reason::Conflict
        | Reason::OrphanSlice
        | Reason::OtherProxy
        | Reason::TooLarge => "ReadObject",
        Reason::ApiServer | Reason::NodeMissing => "WatchObjects",
        Reason::KernelRefused
        | Reason::ForeignChange
        | Reason::SyncFailed
        | Reason::OutsidePodNetwork
        | Reason::PoliciesNotInForce => "WriteRules",
        Reason::HealthCheckPort => "ServeHealthCheck",
        Reason::BridgeTraffic => "WatchBridges",
        Reason::KernelSetting => "MakeSettings",
        Reason::AffinityFull => "RememberClients",
        Reason::WouldDeny => "AuditPolicy",
    }
}

impl EventDraft {
    /// Returns the Event of a notice, on a node, in a run that began at `run`.
    pub(super) fn of(notice: &Notice, node: &str, run: Timestamp, at: Timestamp) -> Self {
        let object = match &notice.subject {
            Subject::Object(object) if object.kind != Kind::Node => Some(object.clone()),
            Subject::Object(_) | Subject::File { .. } | Subject::Other(_) => None,
        };
        let reason = notice.reason.as_str();
        // A fault of an object is the same on all nodes. A fault of a node stays the same when its
        // message changes, but ends with the run.
        let identity = if notice.reason.is_of_the_node() || object.is_none() {
            format!("{reason} {node} {run}")
        } else {
            format!("{reason} {}", notice.message)
        };
        Self::new(
            object,
            node,
            ("Warning", reason, action(notice.reason)),
            &notice.message,
            &identity,
            at,
        )
    }

    pub(super) fn starting(node: &str, at: Timestamp) -> Self {
        let note = concat!("nftlet ", env!("CARGO_PKG_VERSION"), " has started");
        let identity = format!("Starting {node} {at}");
        let words = ("Normal", "Starting", "StartNftlet");
        Self::new(None, node, words, note, &identity, at)
    }

    fn new(
        object: Option<ObjectRef>,
        node: &str,
        (kind, reason, action): (&'static str, &'static str, &'static str),
        note: &str,
        identity: &str,
        at: Timestamp,
    ) -> Self {
        let about = object.clone().unwrap_or_else(|| node_of(node));
        let namespace = Some(about.name.namespace()).filter(|name| !name.is_empty());
        Self {
            namespace: namespace.unwrap_or(DEFAULT_NAMESPACE).to_owned(),
            name: name(&about, identity),
            object,
            node: node.to_owned(),
            kind,
            reason,
            action,
            note: truncate(note, LONGEST_NOTE),
            at,
        }
    }

    /// Returns the Event, about an object with this identity if it is known.
    pub(super) fn event(&self, uid: Option<String>) -> Event {
        let about = self.object.clone().unwrap_or_else(|| node_of(&self.node));
        let namespace = Some(about.name.namespace()).filter(|name| !name.is_empty());
        let regarding = ObjectReference {
            api_version: Some(about.kind.api_version().to_owned()),
            kind: Some(about.kind.as_str().to_owned()),
            name: Some(about.name.name().to_owned()),
            namespace: namespace.map(str::to_owned),
            // `kubectl describe node` finds Events by the name, as the kubelet writes them.
            uid: if about.kind == Kind::Node {
                Some(self.node.clone())
            } else {
                uid
            },
            ..ObjectReference::default()
        };
        let instance = format!("{CONTROLLER}-{}", self.node);
        Event {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                namespace: Some(self.namespace.clone()),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(self.at)),
            reporting_controller: Some(CONTROLLER.to_owned()),
            reporting_instance: Some(truncate(&instance, LONGEST_INSTANCE)),
            action: Some(self.action.to_owned()),
            reason: Some(self.reason.to_owned()),
            type_: Some(self.kind.to_owned()),
            note: Some(self.note.clone()),
            regarding: Some(regarding),
            ..Event::default()
        }
    }

    /// Returns the patch that sets the count of a series.
    /// Returns the namespace and the name.
    pub(super) fn key(&self) -> ObjectName {
        ObjectName::new(&self.namespace, &self.name)
    }

    pub(super) fn series(&self, count: i32, last: Timestamp) -> Value {
        json!({"series": {"count": count, "lastObservedTime": MicroTime(last)}})
    }
}

fn node_of(name: &str) -> ObjectRef {
    ObjectRef::new(Kind::Node, ObjectName::new("", name))
}

/// Returns the name of an Event: that of its object and a hash, so that all nodes use the same name
/// for the same Event.
fn name(about: &ObjectRef, identity: &str) -> String {
    let whole = format!("{} {identity}", about.kind);
    let hash = digest(&SHA256, whole.as_bytes());
    let hash = hash.as_ref().iter().take(HASH);
    let hash: String = hash.map(|byte| format!("{byte:02x}")).collect();
    let object = truncate(about.name.name(), LONGEST_NAME - hash.len() - 1);
    format!("{}.{hash}", object.trim_end_matches(['.', '-']))
}

/// Returns the longest prefix of a text that fits.
fn truncate(text: &str, longest: usize) -> String {
    let mut ends = (0..=longest.min(text.len())).rev();
    let fitting = ends.find_map(|end| text.get(..end));
    fitting.unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(kind: Kind, name: ObjectName, reason: Reason, message: &str) -> Notice {
        Notice {
            subject: Subject::Object(ObjectRef::new(kind, name)),
            reason,
            message: message.into(),
        }
    }

    fn draft(notice: &Notice, node: &str) -> EventDraft {
        EventDraft::of(notice, node, Timestamp::UNIX_EPOCH, Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn an_event_refers_to_its_object() {
        let slice = ObjectName::new("shop", "web-1");
        let notice = notice(Kind::EndpointSlice, slice, Reason::InvalidField, "bad");
        let event = draft(&notice, "node-1").event(Some("u".into()));
        let regarding = event.regarding.expect("an object");
        assert_eq!(
            regarding.api_version.as_deref(),
            Some("discovery.k8s.io/v1")
        );
        assert_eq!(regarding.kind.as_deref(), Some("EndpointSlice"));
        assert_eq!(regarding.namespace.as_deref(), Some("shop"));
        assert_eq!(regarding.name.as_deref(), Some("web-1"));
        assert_eq!(regarding.uid.as_deref(), Some("u"));
        assert_eq!(event.metadata.namespace.as_deref(), Some("shop"));
        assert_eq!(event.reason.as_deref(), Some("InvalidField"));
        assert_eq!(event.type_.as_deref(), Some("Warning"));
        assert_eq!(event.note.as_deref(), Some("bad"));
        assert_eq!(event.reporting_instance.as_deref(), Some("nftlet-node-1"));
    }

    #[test]
    fn an_event_without_an_object_refers_to_the_node() {
        let notice = Notice {
            subject: Subject::Other("table nftlet".into()),
            reason: Reason::ForeignChange,
            message: "3 operations".into(),
        };
        let event = draft(&notice, "node-1").event(None);
        let regarding = event.regarding.expect("an object");
        assert_eq!(regarding.kind.as_deref(), Some("Node"));
        assert_eq!(regarding.uid.as_deref(), Some("node-1"));
        assert_eq!(regarding.namespace, None);
        assert_eq!(event.metadata.namespace.as_deref(), Some("default"));
    }

    #[test]
    fn nodes_agree_on_the_name_of_what_they_all_find() {
        let web = || ObjectName::new("shop", "web");
        let name = |node: &str, reason, message: &str| {
            draft(&notice(Kind::Service, web(), reason, message), node).name
        };
        let invalid = name("node-1", Reason::InvalidField, "port");
        assert_eq!(invalid, name("node-2", Reason::InvalidField, "port"));
        assert_ne!(invalid, name("node-1", Reason::InvalidField, "address"));
        assert_ne!(invalid, name("node-1", Reason::Conflict, "port"));
        // A kernel's refusal belongs to its node, whatever the message.
        let refused = name("node-1", Reason::KernelRefused, "once");
        assert_eq!(refused, name("node-1", Reason::KernelRefused, "twice"));
        assert_ne!(refused, name("node-2", Reason::KernelRefused, "once"));
    }

    #[test]
    fn every_start_is_an_event_of_its_own() {
        let start = |second| EventDraft::starting("node-1", Timestamp::constant(second, 0)).name;
        assert_ne!(start(1), start(2));
    }

    #[test]
    fn what_is_too_long_for_the_api_is_cut() {
        let long = "a".repeat(300);
        let notice = notice(
            Kind::Service,
            ObjectName::new("shop", &long),
            Reason::InvalidField,
            &"ä".repeat(1000),
        );
        let event = draft(&notice, &long).event(None);
        assert!(event.metadata.name.expect("a name").len() <= LONGEST_NAME);
        assert_eq!(event.note.expect("a note").len(), LONGEST_NOTE);
        let instance = event.reporting_instance.expect("an instance");
        assert_eq!(instance.len(), LONGEST_INSTANCE);
    }
}
