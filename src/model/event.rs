//! What a source tells the reconciler.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::{
    EndpointSlice, Kind, Namespace, NetworkPolicy, Node, ObjectName, Pod, Service, ServiceCidr,
};

/// An event with the moment it reached nftlet, from which latencies are counted.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// When the bytes of the event were read.
    pub at: Instant,
    /// The event.
    pub event: Event,
}

impl Delivery {
    /// Stamps an event with the current time.
    pub fn now(event: Event) -> Self {
        Self {
            at: Instant::now(),
            event,
        }
    }
}

/// What happened to the objects of a source.
///
/// A source first sends, for every [`Kind`] it covers, `ListStarted`, the objects as `Apply`,
/// and `ListComplete`; nothing is programmed before all kinds are complete. Later a source may
/// list a kind again in the same way: objects that do not come up again are gone.
#[derive(Clone, Debug)]
pub enum Event {
    /// A complete list of a kind begins.
    ListStarted(Kind),
    /// The list that began is complete; known objects of the kind that were not in it are gone.
    ListComplete(Kind),
    /// An object is as given.
    Apply(Object),
    /// An object is gone.
    Delete(ObjectRef),
    /// Where the source's own connections to the API server lead: all addresses and ports.
    Servers(BTreeSet<SocketAddr>),
    /// Something a person should know about; nothing else changes.
    Notice(Notice),
}

impl Event {
    /// The service that a Service or an EndpointSlice is about, where the event says it.
    pub fn service(&self) -> Option<&ObjectName> {
        match self {
            Event::Apply(Object::Service(service)) => Some(&service.name),
            Event::Apply(Object::EndpointSlice(slice)) => Some(&slice.service),
            Event::Delete(object) if object.kind == Kind::Service => Some(&object.name),
            _ => None,
        }
    }

    /// Whether it concerns objects of these kinds: one of them or a list.
    pub(crate) fn is_about(&self, kinds: &[Kind]) -> bool {
        let kind = match self {
            Event::ListStarted(kind) | Event::ListComplete(kind) => Some(*kind),
            Event::Apply(_) | Event::Delete(_) | Event::Servers(_) | Event::Notice(_) => {
                self.kind()
            }
        };
        kind.is_some_and(|kind| kinds.contains(&kind))
    }

    /// The kind of the object that changed; `None` for all other events.
    pub fn kind(&self) -> Option<Kind> {
        match self {
            Event::Apply(object) => Some(object.kind()),
            Event::Delete(reference) => Some(reference.kind),
            Event::ListStarted(_)
            | Event::ListComplete(_)
            | Event::Servers(_)
            | Event::Notice(_) => None,
        }
    }
}

/// An object of any kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A service.
    Service(Service),
    /// An endpoint slice.
    EndpointSlice(EndpointSlice),
    /// The own node.
    Node(Node),
    /// A service address range.
    ServiceCidr(ServiceCidr),
    /// A pod, of any node.
    Pod(Pod),
    /// A namespace.
    Namespace(Namespace),
    /// A network policy.
    NetworkPolicy(NetworkPolicy),
}

impl Object {
    /// The kind.
    pub fn kind(&self) -> Kind {
        match self {
            Object::Service(_) => Kind::Service,
            Object::EndpointSlice(_) => Kind::EndpointSlice,
            Object::Node(_) => Kind::Node,
            Object::ServiceCidr(_) => Kind::ServiceCidr,
            Object::Pod(_) => Kind::Pod,
            Object::Namespace(_) => Kind::Namespace,
            Object::NetworkPolicy(_) => Kind::NetworkPolicy,
        }
    }

    /// Kind and name.
    pub fn reference(&self) -> ObjectRef {
        match self {
            Object::Service(o) => ObjectRef::new(Kind::Service, o.name.clone()),
            Object::EndpointSlice(o) => ObjectRef::new(Kind::EndpointSlice, o.name.clone()),
            Object::Node(o) => ObjectRef::new(Kind::Node, ObjectName::new("", &o.name)),
            Object::ServiceCidr(o) => ObjectRef::new(Kind::ServiceCidr, o.name.clone()),
            Object::Pod(o) => ObjectRef::new(Kind::Pod, o.name.clone()),
            Object::Namespace(o) => ObjectRef::new(Kind::Namespace, o.name.clone()),
            Object::NetworkPolicy(o) => ObjectRef::new(Kind::NetworkPolicy, o.name.clone()),
        }
    }
}

/// Kind and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectRef {
    /// The kind.
    pub kind: Kind,
    /// Namespace and name.
    pub name: ObjectName,
}

impl ObjectRef {
    /// Joins a kind and a name.
    pub fn new(kind: Kind, name: ObjectName) -> Self {
        Self { kind, name }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// One clear sentence about something that is wrong with the input or cannot be done.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Notice {
    /// What it is about.
    pub subject: Subject,
    /// A short stable word for metrics and events.
    pub reason: Reason,
    /// What, where and how to mend it, on one line.
    pub message: String,
}

/// What a [`Notice`] is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// An object.
    Object(ObjectRef),
    /// A place in a file.
    File {
        /// The file as it was named on the command line or found below it.
        path: PathBuf,
        /// Line and column, both counted from 1.
        position: Option<(u64, u64)>,
    },
    /// Something else with a name of its own, such as an API server's address.
    Other(Arc<str>),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Subject::Object(object) => object.fmt(f),
            Subject::File {
                path,
                position: Some((line, column)),
            } => write!(f, "{}:{line}:{column}", path.display()),
            Subject::File {
                path,
                position: None,
            } => path.display().fmt(f),
            Subject::Other(name) => f.write_str(name),
        }
    }
}

/// Why a [`Notice`] was given; the text form is stable and used as a metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// A field of an object cannot be used and was left out.
    InvalidField,
    /// An object could not be decoded at all.
    InvalidObject,
    /// A part of a NetworkPolicy cannot be understood; what it was to allow stays denied.
    InvalidPolicy,
    /// A file could not be read or parsed.
    InvalidFile,
    /// An object of a kind that nftlet does not use.
    UnknownKind,
    /// A service claims an address and port that it does not get: another one has it, or no
    /// service may have it.
    Conflict,
    /// A slice names a service that does not exist.
    OrphanSlice,
    /// A service is left to another proxy.
    OtherProxy,
    /// The API server refused or could not be reached.
    ApiServer,
    /// The own Node object is missing.
    NodeMissing,
    /// The kernel refused what an object asked for.
    KernelRefused,
    /// A service asks for more set elements than one may have.
    TooLarge,
    /// Somebody else changed nftlet's tables.
    ForeignChange,
    /// The port of a health check cannot be listened on.
    HealthCheckPort,
    /// Traffic on a bridge passes the network policies by.
    BridgeTraffic,
    /// Network policies are to be enforced on this node and are not.
    PoliciesNotInForce,
    /// The rules could not be written to the kernel, or read from it.
    SyncFailed,
    /// A kernel setting that was asked for could not be made.
    KernelSetting,
    /// The services of a namespace remember as many clients as they may.
    AffinityFull,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::InvalidField,
        Self::InvalidObject,
        Self::InvalidPolicy,
        Self::InvalidFile,
        Self::UnknownKind,
        Self::Conflict,
        Self::OrphanSlice,
        Self::OtherProxy,
        Self::ApiServer,
        Self::NodeMissing,
        Self::KernelRefused,
        Self::TooLarge,
        Self::ForeignChange,
        Self::HealthCheckPort,
        Self::BridgeTraffic,
        Self::PoliciesNotInForce,
        Self::SyncFailed,
        Self::KernelSetting,
        Self::AffinityFull,
    ];

    /// The stable text form.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::InvalidField => "InvalidField",
            Reason::InvalidObject => "InvalidObject",
            Reason::InvalidPolicy => "InvalidPolicy",
            Reason::InvalidFile => "InvalidFile",
            Reason::UnknownKind => "UnknownKind",
            Reason::Conflict => "Conflict",
            Reason::OrphanSlice => "OrphanSlice",
            Reason::OtherProxy => "OtherProxy",
            Reason::ApiServer => "ApiServer",
            Reason::NodeMissing => "NodeMissing",
            Reason::KernelRefused => "KernelRefused",
            Reason::TooLarge => "TooLarge",
            Reason::ForeignChange => "ForeignChange",
            Reason::HealthCheckPort => "HealthCheckPort",
            Reason::BridgeTraffic => "BridgeTraffic",
            Reason::PoliciesNotInForce => "PoliciesNotInForce",
            Reason::SyncFailed => "SyncFailed",
            Reason::KernelSetting => "KernelSetting",
            Reason::AffinityFull => "AffinityFull",
        }
    }

    /// Whether it happens all the time in a living cluster, where slices arrive before their
    /// services, and calls for nobody.
    pub(crate) fn is_routine(self) -> bool {
        matches!(
            self,
            Reason::OrphanSlice | Reason::OtherProxy | Reason::UnknownKind
        )
    }

    /// Whether it is about what this node met, and not about an object that all nodes read alike.
    pub(crate) fn is_of_the_node(self) -> bool {
        match self {
            Reason::InvalidField
            | Reason::InvalidObject
            | Reason::InvalidPolicy
            | Reason::InvalidFile
            | Reason::UnknownKind
            | Reason::Conflict
            | Reason::OrphanSlice
            | Reason::OtherProxy
            | Reason::TooLarge => false,
            Reason::ApiServer
            | Reason::NodeMissing
            | Reason::KernelRefused
            | Reason::ForeignChange
            | Reason::HealthCheckPort
            | Reason::BridgeTraffic
            | Reason::PoliciesNotInForce
            | Reason::SyncFailed
            | Reason::KernelSetting
            | Reason::AffinityFull => true,
        }
    }
}
