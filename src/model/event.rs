//! Events: what a source sends to the engines.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;

use super::{
    ClusterNetworkPolicy, EndpointSlice, Kind, Namespace, NetworkPolicy, Node, ObjectName, Pod,
    Service, ServiceCidr,
};

/// An event with the time of its arrival, from which latencies are measured.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// When the bytes of the event were read.
    pub at: Instant,
    /// The event.
    pub event: Event,
}

impl Delivery {
    /// Returns an event that arrived now.
    pub fn now(event: Event) -> Self {
        Self {
            at: Instant::now(),
            event,
        }
    }
}

/// A change of the objects of a source.
///
/// A source first sends, for every [`Kind`] it covers, `ListStarted`, the objects as `Apply`, and
/// `ListComplete`; no rule is written before all kinds are complete. Later a source may list a kind
/// again in the same way: objects that are missing from the new list are deleted.
#[derive(Clone, Debug)]
pub enum Event {
    /// A complete list of a kind begins.
    ListStarted(Kind),
    /// The list is complete; known objects of the kind that were not in it are deleted.
    ListComplete(Kind),
    /// An object was created or changed.
    Apply(Object),
    /// An object was deleted.
    Delete(ObjectRef),
    /// The addresses and ports of the API server that the source connects to, all of them.
    Servers(BTreeSet<SocketAddr>),
    /// All direct routes of the host's main table, in the order in which the kernel prefers them. Routes
    /// over an interface that also has a default route are left out.
    Routes(Arc<[HostRoute]>),
    /// A problem to report to the operator; no object changes.
    Notice(Notice),
}

impl Event {
    /// Returns the service that the event concerns. The deletion of an EndpointSlice does not name
    /// its service.
    pub fn service(&self) -> Option<&ObjectName> {
        match self {
            Event::Apply(Object::Service(service)) => Some(&service.name),
            Event::Apply(Object::EndpointSlice(slice)) => Some(&slice.service),
            Event::Delete(object) if object.kind == Kind::Service => Some(&object.name),
            _ => None,
        }
    }

    /// Returns whether the event is about an object or a list of one of these kinds.
    pub(crate) fn is_about(&self, kinds: &[Kind]) -> bool {
        let kind = match self {
            Event::ListStarted(kind) | Event::ListComplete(kind) => Some(*kind),
            Event::Apply(_)
            | Event::Delete(_)
            | Event::Servers(_)
            | Event::Routes(_)
            | Event::Notice(_) => self.kind(),
        };
        kind.is_some_and(|kind| kinds.contains(&kind))
    }

    /// Returns the kind of the object that changed; `None` for all other events.
    pub fn kind(&self) -> Option<Kind> {
        match self {
            Event::Apply(object) => Some(object.kind()),
            Event::Delete(reference) => Some(reference.kind),
            Event::ListStarted(_)
            | Event::ListComplete(_)
            | Event::Servers(_)
            | Event::Routes(_)
            | Event::Notice(_) => None,
        }
    }
}

/// A route over which the host reaches a network without a router in between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRoute {
    /// The network.
    pub network: IpNet,
    /// The name of the interface.
    pub interface: Arc<str>,
}

/// An object of any kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A service.
    Service(Service),
    /// An endpoint slice.
    EndpointSlice(EndpointSlice),
    /// A node: the own one, and all others where a cluster network policy names nodes.
    Node(Node),
    /// A service address range.
    ServiceCidr(ServiceCidr),
    /// A pod, of any node.
    Pod(Pod),
    /// A namespace.
    Namespace(Namespace),
    /// A network policy.
    NetworkPolicy(NetworkPolicy),
    /// A cluster network policy.
    ClusterNetworkPolicy(ClusterNetworkPolicy),
}

impl Object {
    /// Returns the kind.
    pub fn kind(&self) -> Kind {
        match self {
            Object::Service(_) => Kind::Service,
            Object::EndpointSlice(_) => Kind::EndpointSlice,
            Object::Node(_) => Kind::Node,
            Object::ServiceCidr(_) => Kind::ServiceCidr,
            Object::Pod(_) => Kind::Pod,
            Object::Namespace(_) => Kind::Namespace,
            Object::NetworkPolicy(_) => Kind::NetworkPolicy,
            Object::ClusterNetworkPolicy(_) => Kind::ClusterNetworkPolicy,
        }
    }

    /// Returns kind and name.
    pub fn reference(&self) -> ObjectRef {
        match self {
            Object::Service(o) => ObjectRef::new(Kind::Service, o.name.clone()),
            Object::EndpointSlice(o) => ObjectRef::new(Kind::EndpointSlice, o.name.clone()),
            Object::Node(o) => ObjectRef::new(Kind::Node, ObjectName::new("", &o.name)),
            Object::ServiceCidr(o) => ObjectRef::new(Kind::ServiceCidr, o.name.clone()),
            Object::Pod(o) => ObjectRef::new(Kind::Pod, o.name.clone()),
            Object::Namespace(o) => ObjectRef::new(Kind::Namespace, o.name.clone()),
            Object::NetworkPolicy(o) => ObjectRef::new(Kind::NetworkPolicy, o.name.clone()),
            Object::ClusterNetworkPolicy(o) => {
                ObjectRef::new(Kind::ClusterNetworkPolicy, o.name.clone())
            }
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
    /// Creates a reference to an object.
    pub fn new(kind: Kind, name: ObjectName) -> Self {
        Self { kind, name }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// A message to the operator about input that cannot be used or an operation that failed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Notice {
    /// The object, file or host that it is about.
    pub subject: Subject,
    /// A short stable word for metrics and events.
    pub reason: Reason,
    /// One line: the fault, its place, and the remedy.
    pub message: String,
}

/// What a [`Notice`] is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// An object.
    Object(ObjectRef),
    /// A place in a file.
    File {
        /// The path as given on the command line or found below such a directory.
        path: PathBuf,
        /// Line and column, both counted from 1.
        position: Option<(u64, u64)>,
    },
    /// Anything else, by its name, such as the address of an API server.
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

/// The reason of a [`Notice`]. Its text form is stable: metrics use it as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// A field of an object cannot be used and was left out.
    InvalidField,
    /// An object could not be decoded at all.
    InvalidObject,
    /// A part of a NetworkPolicy or ClusterNetworkPolicy cannot be used; what it should allow is not
    /// allowed, or it denies more.
    InvalidPolicy,
    /// A field of an object is valid, and nftlet does not support it.
    UnsupportedField,
    /// A file could not be read or parsed.
    InvalidFile,
    /// An object of a kind that nftlet does not use.
    UnknownKind,
    /// A service claims an address and port that belongs to another service or is reserved.
    Conflict,
    /// A slice names a service that does not exist.
    OrphanSlice,
    /// A service is handled by another proxy.
    OtherProxy,
    /// The API server refused or could not be reached.
    ApiServer,
    /// The own Node object is missing.
    NodeMissing,
    /// The kernel refused the rules of an object.
    KernelRefused,
    /// A service needs more set elements than one may have.
    TooLarge,
    /// Another process changed nftlet's tables.
    ForeignChange,
    /// The port of a health check cannot be bound.
    HealthCheckPort,
    /// Traffic on a bridge bypasses the network policies.
    BridgeTraffic,
    /// Network policies are not enforced on this node although they should be.
    PoliciesNotInForce,
    /// The rules could not be written to the kernel, or read from it.
    SyncFailed,
    /// A kernel setting could not be changed.
    KernelSetting,
    /// A pod's address is outside of the pod network that is closed before pods are known.
    OutsidePodNetwork,
    /// The session affinity of a namespace has reached the limit of clients.
    AffinityFull,
    /// An audited policy would deny traffic.
    WouldDeny,
}

impl Reason {
    /// All reasons.
    pub const ALL: [Self; 22] = [
        Self::InvalidField,
        Self::InvalidObject,
        Self::InvalidPolicy,
        Self::UnsupportedField,
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
        Self::OutsidePodNetwork,
        Self::AffinityFull,
        Self::WouldDeny,
    ];

    /// Returns the stable text form.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::InvalidField => "InvalidField",
            Reason::InvalidObject => "InvalidObject",
            Reason::InvalidPolicy => "InvalidPolicy",
            Reason::UnsupportedField => "UnsupportedField",
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
            Reason::OutsidePodNetwork => "OutsidePodNetwork",
            Reason::AffinityFull => "AffinityFull",
            Reason::WouldDeny => "WouldDeny",
        }
    }

    /// Returns whether it occurs in normal operation, as when a slice arrives before its service,
    /// and needs no action.
    pub(crate) fn is_routine(self) -> bool {
        matches!(
            self,
            Reason::OrphanSlice | Reason::OtherProxy | Reason::UnknownKind
        )
    }

    /// Returns whether it is about this node, and not about an object that all nodes read.
    pub(crate) fn is_of_the_node(self) -> bool {
        match self {
            Reason::InvalidField
            | Reason::InvalidObject
            | Reason::InvalidPolicy
            | Reason::UnsupportedField
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
            | Reason::OutsidePodNetwork
            | Reason::AffinityFull
            | Reason::WouldDeny => true,
        }
    }
}
