//! Services, endpoints and nodes as plain facts.
//!
//! The types hold the fields of Kubernetes objects that nftlet uses: no client types, no
//! serialisation, no I/O. A [source](crate::source) creates them and sends them as [`Event`]s; an
//! [engine](crate::engine) keeps them.

#![warn(missing_docs)]

mod cluster_policy;
mod event;
mod facts;
mod kind;
mod labels;
mod name;
mod node_ports;
mod policy;
mod relist;

pub use cluster_policy::{Action, ClusterNetworkPolicy, Tier, TierPeer, TierRule};
pub use event::{Delivery, Event, HostRoute, Notice, Object, ObjectRef, Reason, Subject};
pub(crate) use facts::MOST_ELEMENTS;
pub use facts::{
    Endpoint, EndpointSlice, Family, Hints, Node, Protocol, Service, ServiceCidr, ServiceKind,
    ServicePort, SlicePort, TrafficPolicy,
};
pub use kind::Kind;
pub(crate) use kind::group_of;
pub use labels::Labels;
pub use name::ObjectName;
pub(crate) use node_ports::NodePortAddresses;
pub(crate) use policy::{
    Evidence, NAMESPACE_NAME, NamedPort, Peer, PolicyMode, PolicyPort, PolicyRule, PortMatch,
    Requirement, Sandbox,
};
pub use policy::{LabelSelector, Namespace, NetworkPolicy, Pod};
pub(crate) use relist::RelistTracker;
