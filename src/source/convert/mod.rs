//! From API objects to the facts of [`model`](crate::model).
//!
//! One decode path serves both sources: [`Converter::decode`] takes any `serde` deserialiser,
//! reads the fields of [`wire`](super::wire) and turns them into facts. What is wrong with a
//! part of an object (an address, a port) becomes a [`Notice`] and only that part is left out (of
//! a NetworkPolicy the whole rule, so that nothing is allowed that was not meant to be);
//! an object that does not fit its schema at all, or has no usable name, is an error of the
//! deserialiser, which knows the position.

mod address;
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

/// Turns API objects into facts; one per source, since it shares repeated strings.
#[derive(Debug, Default)]
pub(super) struct Converter {
    interner: Interner,
}

/// What became of one object.
#[derive(Debug)]
pub(super) struct Decoded {
    /// What the object says it is.
    pub declared: Declared,
    /// Namespace and name.
    pub name: ObjectName,
    /// `metadata.resourceVersion`.
    pub resource_version: Option<String>,
    /// The facts; `None` for an object that is well-formed but none of nftlet's business (a
    /// slice of host names).
    pub object: Option<Object>,
    /// The parts that were left out.
    pub notices: Vec<Notice>,
}

impl Converter {
    /// Decodes one object of a kind.
    ///
    /// # Errors
    /// Whatever the deserialiser reports for an object that does not fit the schema, and a
    /// custom error for one whose `metadata` gives no usable name.
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
                    |converter, name, _| {
                        Some(Object::Namespace(converter.namespace(name, &namespace)))
                    },
                )
            }
            Kind::NetworkPolicy => {
                let policy = wire::NetworkPolicy::deserialize(from)?;
                let declared =
                    Declared::of(kind, policy.api_version.as_deref(), policy.kind.as_deref());
                self.finish(
                    kind,
                    declared,
                    policy.metadata.as_ref(),
                    |converter, name, report| {
                        Some(Object::NetworkPolicy(converter.network_policy(
                            name,
                            policy.spec.as_ref(),
                            report,
                        )))
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

/// What an object says it is, compared with what was asked for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Declared {
    /// Nothing, as in a list, which says it for all its items.
    Nothing,
    /// What was asked for.
    AsAsked,
    /// Something else.
    Other(String),
}

impl Declared {
    fn of(kind: Kind, api_version: Option<&str>, name: Option<&str>) -> Self {
        match (non_empty(api_version), non_empty(name)) {
            (None, None) => Self::Nothing,
            (Some(version), Some(name))
                if version == kind.api_version() && name == kind.as_str() =>
            {
                Self::AsAsked
            }
            (version, name) => Self::Other(format!(
                "{} {}",
                shortened(version.unwrap_or("unversioned")),
                shortened(name.unwrap_or("object without a kind"))
            )),
        }
    }

    /// Reads what an object says it is, whatever else is in it.
    ///
    /// # Errors
    /// Those of the deserialiser for what is no object.
    pub(super) fn read<'de, D: Deserializer<'de>>(kind: Kind, from: D) -> Result<Self, D::Error> {
        let type_ = wire::Type::deserialize(from)?;
        Ok(Self::of(
            kind,
            type_.api_version.as_deref(),
            type_.kind.as_deref(),
        ))
    }
}

/// As much of a name as belongs into a message.
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

impl<'m> From<&'m wire::HeadMeta> for Names<'m> {
    fn from(meta: &'m wire::HeadMeta) -> Self {
        Self {
            name: meta.name.as_deref(),
            namespace: meta.namespace.as_deref(),
            resource_version: meta.resource_version.as_deref(),
        }
    }
}

/// The identity of an object, even where the rest of it cannot be decoded.
#[derive(Debug)]
pub(super) struct Identity {
    /// Namespace and name.
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

/// Joins `metadata.namespace` and `metadata.name`. A namespaced object without a namespace is
/// in `default`, as for `kubectl apply`; the namespace of a cluster-scoped object is ignored.
///
/// # Errors
/// A sentence for a name that is missing or contains characters that no API object can have.
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

/// The API treats an empty string as an absent one.
fn non_empty(text: Option<&str>) -> Option<&str> {
    text.filter(|text| !text.is_empty())
}

/// Reads a `protocol` field: TCP when absent.
fn protocol(text: Option<&str>) -> Option<Protocol> {
    match non_empty(text) {
        None | Some("TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(_) => None,
    }
}

/// A number that is a usable port.
fn port(number: i64) -> Option<u16> {
    u16::try_from(number).ok().filter(|port| *port != 0)
}

/// Reads an RFC 3339 time.
fn timestamp(text: Option<&str>) -> Option<Timestamp> {
    non_empty(text)?.parse().ok()
}

const PORT_HINT: &str = "is not a port; write a number from 1 to 65535";
const PROTOCOL_HINT: &str = "is not a protocol nftlet knows; write TCP, UDP or SCTP";

#[cfg(test)]
mod tests;
