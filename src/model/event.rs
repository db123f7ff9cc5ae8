//! What a source tells the reconciler.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::{EndpointSlice, Node, ObjectName, Service, ServiceCidr};

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
    /// Something a person should know about; nothing else changes.
    Notice(Notice),
}

impl Event {
    /// The kind of the object that changed; `None` for all other events.
    pub fn kind(&self) -> Option<Kind> {
        match self {
            Event::Apply(object) => Some(object.kind()),
            Event::Delete(reference) => Some(reference.kind),
            Event::ListStarted(_) | Event::ListComplete(_) | Event::Notice(_) => None,
        }
    }
}

/// The object kinds that sources deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// core/v1 Service.
    Service,
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice,
    /// core/v1 Node: the one nftlet runs on.
    Node,
    /// networking.k8s.io/v1 ServiceCIDR.
    ServiceCidr,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 4] = [
        Kind::Service,
        Kind::EndpointSlice,
        Kind::Node,
        Kind::ServiceCidr,
    ];

    /// The `kind` of the API object.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
            Kind::Node => "Node",
            Kind::ServiceCidr => "ServiceCIDR",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
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
}

impl Object {
    /// The kind.
    pub fn kind(&self) -> Kind {
        match self {
            Object::Service(_) => Kind::Service,
            Object::EndpointSlice(_) => Kind::EndpointSlice,
            Object::Node(_) => Kind::Node,
            Object::ServiceCidr(_) => Kind::ServiceCidr,
        }
    }

    /// Kind and name.
    pub fn reference(&self) -> ObjectRef {
        match self {
            Object::Service(o) => ObjectRef::new(Kind::Service, o.name.clone()),
            Object::EndpointSlice(o) => ObjectRef::new(Kind::EndpointSlice, o.name.clone()),
            Object::Node(o) => ObjectRef::new(Kind::Node, ObjectName::new("", &o.name)),
            Object::ServiceCidr(o) => ObjectRef::new(Kind::ServiceCidr, o.name.clone()),
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
    /// A file could not be read or parsed.
    InvalidFile,
    /// An object of a kind that nftlet does not use.
    UnknownKind,
    /// Two services claim the same address and port.
    Conflict,
    /// A slice names a service that does not exist.
    OrphanSlice,
    /// The API server refused or could not be reached.
    ApiServer,
    /// The own Node object is missing.
    NodeMissing,
    /// The kernel refused what an object asked for.
    KernelRefused,
    /// Somebody else changed nftlet's tables.
    ForeignChange,
    /// The port of a health check cannot be listened on.
    HealthCheckPort,
}

impl Reason {
    /// The stable text form.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::InvalidField => "InvalidField",
            Reason::InvalidObject => "InvalidObject",
            Reason::InvalidFile => "InvalidFile",
            Reason::UnknownKind => "UnknownKind",
            Reason::Conflict => "Conflict",
            Reason::OrphanSlice => "OrphanSlice",
            Reason::ApiServer => "ApiServer",
            Reason::NodeMissing => "NodeMissing",
            Reason::KernelRefused => "KernelRefused",
            Reason::ForeignChange => "ForeignChange",
            Reason::HealthCheckPort => "HealthCheckPort",
        }
    }
}
