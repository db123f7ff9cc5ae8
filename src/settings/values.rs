//! The values of flags: how they are written, and what they mean.

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use ipnet::IpNet;

use super::Error;
use super::error::family;

/// Where objects are read from without a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Manifests {
    /// `-`: standard input.
    StandardInput,
    /// A file or a directory.
    Path(PathBuf),
}

impl Manifests {
    pub(super) fn parse(value: OsString) -> Result<Self, Error> {
        if value.is_empty() {
            Err(Error::Manifests)
        } else if value == "-" {
            Ok(Self::StandardInput)
        } else {
            Ok(Self::Path(value.into()))
        }
    }
}

/// The ranges of the pod network, at most one of each family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterCidrs(Vec<IpNet>);

impl ClusterCidrs {
    /// The ranges, each from its first address on.
    pub fn as_slice(&self) -> &[IpNet] {
        &self.0
    }
}

impl FromStr for ClusterCidrs {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut found: Vec<IpNet> = Vec::new();
        for net in ranges(text, "10.244.0.0/16,fd00:10::/64")? {
            if let Some(other) = found.iter().find(|other| family(other) == family(&net)) {
                return Err(Error::TwoOfAFamily(*other, net));
            }
            found.push(net);
        }
        Ok(Self(found))
    }
}

impl fmt::Display for ClusterCidrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        join(f, &self.0)
    }
}

/// On which of the node's addresses NodePorts answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The node's own address of each family.
    #[default]
    Primary,
    /// The local addresses inside these ranges; a family without a range means all of its own.
    Ranges(Vec<IpNet>),
}

impl FromStr for NodePortAddresses {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut parts = text.split(',').map(str::trim);
        if text.trim() == "primary" {
            return Ok(Self::Primary);
        }
        if parts.any(|part| part == "primary") {
            return Err(Error::PrimaryAndRanges);
        }
        let ranges = ranges(text, "10.0.0.0/8,fd00::/8")?;
        if ranges.is_empty() {
            // An empty list is the default, with kube-proxy too.
            return Ok(Self::Primary);
        }
        Ok(Self::Ranges(ranges))
    }
}

impl fmt::Display for NodePortAddresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Primary => f.write_str("primary"),
            Self::Ranges(ranges) => join(f, ranges),
        }
    }
}

/// Parses ranges separated by commas; none in an empty text.
pub(super) fn ranges(text: &str, example: &'static str) -> Result<Vec<IpNet>, Error> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    text.split(',')
        .map(|part| {
            let part = part.trim();
            if part.is_empty() {
                return Err(Error::Gap(example));
            }
            if let Ok(address) = part.parse::<IpAddr>() {
                return Err(Error::Prefix(address));
            }
            match part.parse::<IpNet>() {
                Ok(net) => Ok(net.trunc()),
                Err(_) => Err(Error::Range(part.to_owned())),
            }
        })
        .collect()
}

pub(super) fn join(f: &mut fmt::Formatter<'_>, ranges: &[IpNet]) -> fmt::Result {
    for (position, net) in ranges.iter().enumerate() {
        if position > 0 {
            f.write_str(",")?;
        }
        write!(f, "{net}")?;
    }
    Ok(())
}

/// An address to listen on, as given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BindAddress {
    /// The empty text.
    Nowhere,
    /// An address, with the default port unless one is given.
    At(IpAddr, Option<u16>),
}

impl BindAddress {
    pub(super) fn resolve(self, default_port: u16) -> Option<SocketAddr> {
        match self {
            Self::Nowhere => None,
            Self::At(address, port) => Some(SocketAddr::new(address, port.unwrap_or(default_port))),
        }
    }
}

impl FromStr for BindAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(Self::Nowhere);
        }
        if let Ok(address) = text.parse() {
            return Ok(Self::At(address, None));
        }
        let wrong = || Error::Address(text.to_owned());
        if let Some(inside) = text.strip_prefix('[') {
            let (address, rest) = inside.split_once(']').ok_or_else(wrong)?;
            let address: Ipv6Addr = address.parse().map_err(|_| wrong())?;
            let port = match rest.strip_prefix(':') {
                Some(number) => Some(port(number)?),
                None if rest.is_empty() => None,
                None => return Err(wrong()),
            };
            return Ok(Self::At(address.into(), port));
        }
        let (address, number) = text.rsplit_once(':').ok_or_else(wrong)?;
        let address = if address.is_empty() {
            // Linux lets a socket on :: answer IPv4 as well.
            Ipv6Addr::UNSPECIFIED.into()
        } else {
            // An IPv6 address has to be in brackets here: where it ended would be a guess.
            IpAddr::V4(address.parse().map_err(|_| wrong())?)
        };
        Ok(Self::At(address, Some(port(number)?)))
    }
}

pub(super) fn port(text: &str) -> Result<u16, Error> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Error::Port(text.to_owned()));
    }
    text.parse().map_err(|_| Error::Port(text.to_owned()))
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For programs: one JSON object per line.
    Json,
}

impl FromStr for LogFormat {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(Error::LogFormat),
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Checks a node name as the API server would: a DNS subdomain. Capitals pass, since kube-proxy
/// accepts a host name as the host has it.
///
/// # Errors
///
/// [`Error::NodeName`] for what no node can be called.
pub fn node_name(text: &str) -> Result<String, Error> {
    let name = text.trim().to_lowercase();
    let label = |label: &str| {
        let edge = |edge: Option<u8>| edge.is_some_and(|byte| byte.is_ascii_alphanumeric());
        edge(label.bytes().next())
            && edge(label.bytes().last())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    if name.len() <= 253 && name.split('.').all(label) {
        Ok(name)
    } else {
        Err(Error::NodeName)
    }
}

/// The address of an API server; without a scheme it is HTTP, as kube-proxy has it.
pub(super) fn server(text: &str) -> Result<String, Error> {
    let text = text.trim();
    let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
    let host = rest.split('/').next().unwrap_or_default();
    let is_host = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
    let usable =
        matches!(scheme, "http" | "https") && !host.is_empty() && host.chars().all(is_host);
    // An address with a password is judged later: here the message would have it.
    if usable || text.contains('@') {
        Ok(format!("{scheme}://{rest}"))
    } else {
        Err(Error::Server(text.to_owned()))
    }
}
