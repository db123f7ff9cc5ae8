//! Conversion of API objects to the facts of [`model`](crate::model).
//!
//! Both sources decode alike: [`Converter::decode`] takes any `serde` deserialiser, reads the
//! fields of [`wire`](super::wire) and converts them. An invalid part of an object (an address, a
//! port) becomes a [`Notice`], and only that part is left out; of a NetworkPolicy the whole rule is,
//! so that it allows nothing unintended. An object that does not fit its schema, or has no usable
//! name, is an error of the deserialiser, which knows the position; so is a ClusterNetworkPolicy
//! without a usable subject, tier or priority.

mod address;
mod cluster_policy;
mod endpoints;
mod fields;
mod intern;
mod node;
mod pod;
mod policy;
mod report;
mod selector;
mod service;

use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Deserializer, de::Error as _};

use self::intern::Interner;
use self::report::FieldReport;
use super::wire;
use crate::model::{Kind, Notice, Object, ObjectName, ObjectRef, Protocol};

/// Converts API objects to facts. Each source has one, since it shares repeated strings.
#[derive(Debug, Default)]
pub(super) struct Converter {
    interner: Interner,
}

/// A decoded object.
#[derive(Debug)]
pub(super) struct Decoded {
    pub declared: Declared,
    pub name: ObjectName,
    /// `metadata.resourceVersion`.
    pub resource_version: Option<String>,
    /// The facts; `None` for a valid object that has no rules, such as a slice of host names.
    pub object: Option<Object>,
    /// Notices about the parts that were left out.
    pub notices: Vec<Notice>,
}

impl Converter {
    /// Decodes one object of a kind.
    ///
    /// # Errors
    /// If the object does not fit the schema, or its `metadata` has no usable name.
    pub(super) fn decode<'de, D: Deserializer<'de>>(
        &mut self,
        kind: Kind,
        from: D,
    ) -> Result<Decoded, D::Error> {
        match kind {
            Kind::Service => {
                let service = wire::Service::deserialize(from)?;
                let declared = Declared::of(
                    kind,
                    service.api_version.as_deref(),
                    service.kind.as_deref(),
                );
                self.finish(
                    kind,
                    declared,
                    service.metadata.as_ref(),
                    |converter, name, report| {
                        Some(Object::Service(converter.service(name, &service, report)))
                    },
                )
            }
            Kind::EndpointSlice => {
                let slice = wire::EndpointSlice::deserialize(from)?;
                let declared =
                    Declared::of(kind, slice.api_version.as_deref(), slice.kind.as_deref());
                self.finish(
                    kind,
                    declared,
                    slice.metadata.as_ref(),
                    |converter, name, report| {
                        converter
                            .endpoint_slice(name, &slice, report)
                            .map(Object::EndpointSlice)
                    },
                )
            }
            Kind::Node => {
                let node = wire::Node::deserialize(from)?;
                let declared =
                    Declared::of(kind, node.api_version.as_deref(), node.kind.as_deref());
                self.finish(
                    kind,
                    declared,
                    node.metadata.as_ref(),
                    |converter, name, report| {
                        Some(Object::Node(converter.node(name, &node, report)))
                    },
                )
            }
            Kind::ServiceCidr => {
                let cidr = wire::ServiceCidr::deserialize(from)?;
                let declared =
                    Declared::of(kind, cidr.api_version.as_deref(), cidr.kind.as_deref());
                self.finish(
                    kind,
                    declared,
                    cidr.metadata.as_ref(),
                    |converter, name, report| {
                        Some(Object::ServiceCidr(
                            converter.service_cidr(name, &cidr, report),
                        ))
                    },
                )
            }
            Kind::Pod => {
                let pod = wire::Pod::deserialize(from)?;
                let declared = Declared::of(kind, pod.api_version.as_deref(), pod.kind.as_deref());
                self.finish(
                    kind,
                    declared,
                    pod.metadata.as_ref(),
                    |converter, name, report| Some(Object::Pod(converter.pod(name, &pod, report))),
                )
            }
            Kind::Namespace => {
                let namespace = wire::Namespace::deserialize(from)?;
                let declared = Declared::of(
                    kind,
                    namespace.api_version.as_deref(),
                    namespace.kind.as_deref(),
                );
                self.finish(
                    kind,
                    declared,
                    namespace.metadata.as_ref(),
                    |converter, name, report| {
                        Some(Object::Namespace(
                            converter.namespace(name, &namespace, report),
                        ))
                    },
                )
            }
            Kind::ClusterNetworkPolicy => {
                let policy = wire::Policy::deserialize(from)?;
                let declared =
                    Declared::of(kind, policy.api_version.as_deref(), policy.kind.as_deref());
                let mut unusable = None;
                let decoded = self.finish(
                    kind,
                    declared,
                    policy.metadata.as_ref(),
                    |converter, name, report| {
                        converter
                            .cluster_network_policy(name, policy.spec.as_ref(), report)
                            .map(Object::ClusterNetworkPolicy)
                            .map_err(|fault| unusable = Some(fault))
                            .ok()
                    },
                )?;
                unusable.map_or(Ok(decoded), |fault| Err(D::Error::custom(fault)))
            }
            Kind::NetworkPolicy => {
                let policy = wire::Policy::deserialize(from)?;
                let declared =
                    Declared::of(kind, policy.api_version.as_deref(), policy.kind.as_deref());
                self.finish(
                    kind,
                    declared,
                    policy.metadata.as_ref(),
                    |converter, name, report| {
                        let mut converted =
                            converter.network_policy(name, policy.spec.as_ref(), report);
                        let meta = policy.metadata.as_ref();
                        let annotations = meta.and_then(|meta| meta.annotations.as_ref());
                        let mode = annotations.and_then(|it| it.get(policy::MODE));
                        converted.mode = policy::mode(mode, report);
                        Some(Object::NetworkPolicy(converted))
                    },
                )
            }
        }
    }

    fn finish<'m, E: serde::de::Error>(
        &mut self,
        kind: Kind,
        declared: Declared,
        meta: Option<impl Into<Names<'m>>>,
        convert: impl FnOnce(&mut Self, &ObjectName, &mut FieldReport) -> Option<Object>,
    ) -> Result<Decoded, E> {
        let meta = meta.map(Into::into).unwrap_or_default();
        let name = object_name(kind, meta.name, meta.namespace).map_err(E::custom)?;
        let mut report = FieldReport::new(ObjectRef::new(kind, name.clone()));
        let object = convert(self, &name, &mut report);
        Ok(Decoded {
            declared,
            name,
            resource_version: meta.resource_version.map(str::to_owned),
            object,
            notices: report.finish(),
        })
    }
}

/// The `apiVersion` and `kind` of an object, compared with the requested kind.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Declared {
    /// Absent, as for the items of a list, which has them for all of its items.
    Absent,
    /// Those of the requested kind.
    Requested,
    /// Others.
    Other(String),
}

impl Declared {
    fn of(kind: Kind, api_version: Option<&str>, name: Option<&str>) -> Self {
        match (non_empty(api_version), non_empty(name)) {
            (None, None) => Self::Absent,
            (Some(version), Some(name))
                if version == kind.api_version() && name == kind.as_str() =>
            {
                Self::Requested
            }
            (version, name) => Self::Other(format!(
                "{} {}",
                shortened(version.unwrap_or("unversioned")),
                shortened(name.unwrap_or("object without a kind"))
            )),
        }
    }

    /// Reads only `apiVersion` and `kind` of an object.
    ///
    /// # Errors
    /// If the value is not an object.
    pub(super) fn read<'de, D: Deserializer<'de>>(kind: Kind, from: D) -> Result<Self, D::Error> {
        let type_ = wire::Type::deserialize(from)?;
        Ok(Self::of(
            kind,
            type_.api_version.as_deref(),
            type_.kind.as_deref(),
        ))
    }
}

/// Shortens a name for a message.
fn shortened(name: &str) -> String {
    name.chars().take(80).collect()
}

/// The part of `metadata` that identifies an object and its version.
#[derive(Default)]
struct Names<'m> {
    name: Option<&'m str>,
    namespace: Option<&'m str>,
    resource_version: Option<&'m str>,
}

impl<'m, L> From<&'m wire::Meta<'_, L>> for Names<'m> {
    fn from(meta: &'m wire::Meta<'_, L>) -> Self {
        Self {
            name: meta.name.as_deref(),
            namespace: meta.namespace.as_deref(),
            resource_version: meta.resource_version.as_deref(),
        }
    }
}

impl<'m> From<&'m wire::PolicyMeta> for Names<'m> {
    fn from(meta: &'m wire::PolicyMeta) -> Self {
        Self {
            name: meta.name.as_deref(),
            namespace: meta.namespace.as_deref(),
            resource_version: meta.resource_version.as_deref(),
        }
    }
}

impl<'m> From<&'m wire::HeadMeta> for Names<'m> {
    fn from(meta: &'m wire::HeadMeta) -> Self {
        Self {
            name: meta.name.as_deref(),
            namespace: meta.namespace.as_deref(),
            resource_version: meta.resource_version.as_deref(),
        }
    }
}

/// The identity of an object, which can be read even if the rest of it cannot be decoded.
#[derive(Debug)]
pub(super) struct Identity {
    pub name: ObjectName,
    /// `metadata.resourceVersion`.
    pub resource_version: Option<String>,
}

/// Reads only the identity of an object of a kind.
///
/// # Errors
/// As for [`Converter::decode`].
pub(super) fn identify<'de, D: Deserializer<'de>>(
    kind: Kind,
    from: D,
) -> Result<Identity, D::Error> {
    let meta = wire::Head::deserialize(from)?.metadata.unwrap_or_default();
    let name = object_name(kind, meta.name.as_deref(), meta.namespace.as_deref())
        .map_err(D::Error::custom)?;
    Ok(Identity {
        name,
        resource_version: meta.resource_version,
    })
}

/// Joins `metadata.namespace` and `metadata.name`. As with `kubectl apply`, the default of a
/// namespaced object is the namespace `default`; that of a cluster-scoped object is ignored.
///
/// # Errors
/// A sentence about a name that is missing or has characters that no API object can have.
pub(super) fn object_name(
    kind: Kind,
    name: Option<&str>,
    namespace: Option<&str>,
) -> Result<ObjectName, String> {
    let name = non_empty(name).ok_or("metadata.name is missing; give the object a name")?;
    let namespace = if kind.is_namespaced() {
        non_empty(namespace).unwrap_or("default")
    } else {
        ""
    };
    for (field, text) in [("name", name), ("namespace", namespace)] {
        let usable = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
        if text.len() > 253 || !text.bytes().all(usable) {
            return Err(format!(
                "metadata.{field} {text:?} is not a name; use lower-case letters, digits, '-' and '.'"
            ));
        }
    }
    Ok(ObjectName::new(namespace, name))
}

/// Returns `None` for an empty string, which the API treats as absent.
fn non_empty(text: Option<&str>) -> Option<&str> {
    text.filter(|text| !text.is_empty())
}

/// Parses a `protocol` field, whose default is TCP.
fn protocol(text: Option<&str>) -> Option<Protocol> {
    match non_empty(text) {
        None | Some("TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(_) => None,
    }
}

/// Converts a port number, unless it is 0 or out of range.
fn port(number: i64) -> Option<u16> {
    u16::try_from(number).ok().filter(|port| *port != 0)
}

/// Parses an RFC 3339 time.
fn timestamp(text: Option<&str>) -> Option<Timestamp> {
    non_empty(text)?.parse().ok()
}

const PORT_HINT: &str = "is not a port; write a number from 1 to 65535";
const PROTOCOL_HINT: &str = "is not a protocol nftlet knows; write TCP, UDP or SCTP";

#[cfg(test)]
mod tests;
