//! Questions as people write them.

use std::fmt;
use std::net::IpAddr;

use crate::model::{ObjectName, Protocol};

/// A question: may this source open a connection to that destination?
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    pub from: End,
    pub to: End,
    /// None for every port, and for ICMP.
    pub port: Option<PortName>,
    /// None if it is not given; the inner value is none for ICMP.
    given: Option<Option<Protocol>>,
}

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// A pod.
    Pod(ObjectName),
    /// A service; as a source its endpoints.
    Service(ObjectName),
    /// The pods of a Deployment, or of another owner of this name.
    Workload(ObjectName),
    /// An address.
    Address(IpAddr),
    /// The own node.
    Node,
    /// Addresses outside of the cluster, one of each kind that rules distinguish.
    Internet,
}

/// A port by number or by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PortName {
    Number(u16),
    Name(String),
}

/// Why a question cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QuestionError {
    /// The end is none of the known forms.
    #[error(
        "`{0}` is not a source or destination; write namespace/pod, svc/namespace/name, \
         deploy/namespace/name, an IP address, node or internet"
    )]
    End(String),
    /// The port is neither a number nor a name.
    #[error("`{0}` is not a port; give a number from 1 to 65535 or the name of a port")]
    Port(String),
    /// A source has a port.
    #[error("the source `{0}` has a port or protocol; only the destination has one")]
    SourceWithPort(String),
    /// ICMP has no ports.
    #[error("`{0}`: ICMP has no ports; leave the port out")]
    IcmpPort(String),
    /// A line of a batch that does not have two words.
    #[error(
        "`{0}` is not a question; write a source and a destination, such as shop/cart shop/db:5432"
    )]
    Words(String),
}

impl Question {
    /// Reads a question from its two words.
    ///
    /// # Errors
    ///
    /// If one of them has none of the known forms.
    pub fn new(from: &str, to: &str) -> Result<Self, QuestionError> {
        let (source, port, protocol) = split(from)?;
        if port.is_some() || protocol.is_some() {
            return Err(QuestionError::SourceWithPort(from.to_owned()));
        }
        let (destination, port, protocol) = split(to)?;
        if protocol == Some(None) && port.is_some() {
            return Err(QuestionError::IcmpPort(to.to_owned()));
        }
        Ok(Self {
            from: source,
            to: destination,
            port,
            given: protocol,
        })
    }

    /// Returns the protocol, by default TCP; none for ICMP.
    pub fn protocol(&self) -> Option<Protocol> {
        self.given.unwrap_or(Some(Protocol::Tcp))
    }

    /// Returns whether the question is about a named port of a protocol.
    pub fn asks_for(&self, protocol: Protocol) -> bool {
        self.given.is_none_or(|given| given == Some(protocol))
    }

    /// Reads a question from a line of a batch.
    ///
    /// # Errors
    ///
    /// If it is not a question.
    pub fn from_line(line: &str) -> Result<Self, QuestionError> {
        let mut words = line.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some(from), Some(to), None) => Self::new(from, to),
            _ => Err(QuestionError::Words(line.trim().to_owned())),
        }
    }
}

/// A protocol by its name; the inner value is none for ICMP.
type Named = Option<Option<Protocol>>;

fn protocol(name: &str) -> Named {
    match name.to_ascii_uppercase().as_str() {
        "TCP" => Some(Some(Protocol::Tcp)),
        "UDP" => Some(Some(Protocol::Udp)),
        "SCTP" => Some(Some(Protocol::Sctp)),
        "ICMP" => Some(None),
        _ => None,
    }
}

/// Splits an end, its port and its protocol.
fn split(text: &str) -> Result<(End, Option<PortName>, Named), QuestionError> {
    let (rest, of) = match text.rsplit_once('/') {
        Some((rest, name)) if protocol(name).is_some() && is_end(rest) => (rest, protocol(name)),
        _ => (text, None),
    };
    let (name, port) = split_port(rest);
    let end = end(name).ok_or_else(|| QuestionError::End(name.to_owned()))?;
    let port = port.map(|port| {
        let fault = || QuestionError::Port(port.to_owned());
        if port.is_empty() {
            return Err(fault());
        }
        if port.bytes().all(|byte| byte.is_ascii_digit()) {
            let number = port.parse::<u16>().ok().filter(|number| *number > 0);
            return number.map(PortName::Number).ok_or_else(fault);
        }
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-';
        let is_name = port.chars().all(is_name);
        is_name
            .then(|| PortName::Name(port.to_owned()))
            .ok_or_else(fault)
    });
    Ok((end, port.transpose()?, of))
}

/// Returns whether a text before `/tcp` is complete: a pod may have this name.
fn is_end(text: &str) -> bool {
    let (name, port) = split_port(text);
    port.is_some() || end(name).is_some()
}

/// Splits a port, which follows a name, an IPv4 address, or an IPv6 address in brackets.
fn split_port(text: &str) -> (&str, Option<&str>) {
    if let Some(rest) = text.strip_prefix('[') {
        return match rest.split_once(']') {
            Some((address, "")) => (address, None),
            Some((address, port)) => match port.strip_prefix(':') {
                Some(port) => (address, Some(port)),
                None => (text, None),
            },
            None => (text, None),
        };
    }
    match text.split_once(':') {
        // Several colons are an IPv6 address.
        Some((name, port)) if !port.contains(':') => (name, Some(port)),
        _ => (text, None),
    }
}

fn end(text: &str) -> Option<End> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(End::Address(address.to_canonical()));
    }
    let parts: Vec<&str> = text.split('/').collect();
    if parts.iter().any(|part| part.is_empty()) {
        return None;
    }
    match *parts.as_slice() {
        ["node"] => Some(End::Node),
        ["internet"] => Some(End::Internet),
        [namespace, name] => Some(End::Pod(ObjectName::new(namespace, name))),
        ["pod" | "pods", namespace, name] => Some(End::Pod(ObjectName::new(namespace, name))),
        ["svc" | "service" | "services", namespace, name] => {
            Some(End::Service(ObjectName::new(namespace, name)))
        }
        ["deploy" | "deployment" | "deployments", namespace, name] => {
            Some(End::Workload(ObjectName::new(namespace, name)))
        }
        _ => None,
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Pod(name) => write!(f, "{name}"),
            End::Service(name) => write!(f, "svc/{name}"),
            End::Workload(name) => write!(f, "deploy/{name}"),
            End::Address(address) => write!(f, "{address}"),
            End::Node => f.write_str("node"),
            End::Internet => f.write_str("internet"),
        }
    }
}

impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PortName::Number(number) => write!(f, "{number}"),
            PortName::Name(name) => f.write_str(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(to: &str) -> Result<(String, Option<String>, Option<Protocol>), QuestionError> {
        let question = Question::new("shop/cart", to)?;
        let port = question.port.as_ref().map(ToString::to_string);
        let protocol = question.protocol();
        Ok((question.to.to_string(), port, protocol))
    }

    #[test]
    fn destinations_have_a_port_and_a_protocol() {
        let (tcp, udp) = (Some(Protocol::Tcp), Some(Protocol::Udp));
        for (text, to, port, protocol) in [
            ("shop/web", "shop/web", None, tcp),
            ("shop/web:80", "shop/web", Some("80"), tcp),
            ("pod/shop/web:http/udp", "shop/web", Some("http"), udp),
            ("svc/shop/web:80/TCP", "svc/shop/web", Some("80"), tcp),
            ("deploy/shop/web", "deploy/shop/web", None, tcp),
            ("10.0.0.1:53/UDP", "10.0.0.1", Some("53"), udp),
            ("fd00::1", "fd00::1", None, tcp),
            ("[fd00::1]:80", "fd00::1", Some("80"), tcp),
            ("[fd00::1]/ICMP", "fd00::1", None, None),
            ("::ffff:10.0.0.1", "10.0.0.1", None, tcp),
            ("node:22", "node", Some("22"), tcp),
            ("internet:443", "internet", Some("443"), tcp),
            // Pods of this name.
            ("shop/tcp", "shop/tcp", None, tcp),
            ("shop/udp/tcp", "shop/udp", None, tcp),
        ] {
            let expected = (to.to_owned(), port.map(str::to_owned), protocol);
            assert_eq!(asked(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn faults_name_what_is_wrong() {
        for (text, part) in [
            ("web", "`web` is not a source or destination"),
            ("shop/", "`shop/` is not"),
            ("job/shop/web", "`job/shop/web` is not"),
            ("shop/web:0", "`0` is not a port"),
            ("shop/web:70000", "`70000` is not a port"),
            ("shop/web:", "`` is not a port"),
            ("shop/web:80/ICMP", "ICMP has no ports"),
            ("[fd00::1", "`[fd00::1` is not"),
        ] {
            let error = asked(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let error = Question::new("shop/cart:80", "shop/web").unwrap_err();
        assert_eq!(error, QuestionError::SourceWithPort("shop/cart:80".into()));
        for line in ["", "one", "a/b c/d e/f"] {
            assert!(Question::from_line(line).is_err(), "{line}");
        }
        assert!(Question::from_line(" shop/cart  10.0.0.1:80 ").is_ok());
    }
}
