//! The types and parsers of values of flags and of the configuration file.

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;

use super::Error;
use super::error::family;

/// Checks the path of manifests, where `-` is standard input.
pub(super) fn manifests(path: OsString) -> Result<PathBuf, Error> {
    if path.is_empty() {
        return Err(Error::Manifests);
    }
    Ok(path.into())
}

/// The ranges of the pod network, at most one of each family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ClusterCidrs(Vec<IpNet>);

impl ClusterCidrs {
    /// Returns the ranges, each truncated to its network.
    pub(crate) fn as_slice(&self) -> &[IpNet] {
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

/// The addresses of the node on which NodePorts are served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum NodePortAddressesSetting {
    /// The node's own address of each family.
    #[default]
    Primary,
    /// The local addresses in these ranges; all those of a family without a range.
    Ranges(Vec<IpNet>),
}

impl NodePortAddressesSetting {
    /// Returns the entries of the list in the file.
    pub(super) fn entries(&self) -> Vec<String> {
        match self {
            Self::Primary => vec![self.to_string()],
            Self::Ranges(ranges) => ranges.iter().map(IpNet::to_string).collect(),
        }
    }
}

impl FromStr for NodePortAddressesSetting {
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
            // kube-proxy accepts an empty list as the default.
            return Ok(Self::Primary);
        }
        Ok(Self::Ranges(ranges))
    }
}

impl fmt::Display for NodePortAddressesSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Primary => f.write_str("primary"),
            Self::Ranges(ranges) => join(f, ranges),
        }
    }
}

/// Parses ranges separated by commas.
fn ranges(text: &str, example: &'static str) -> Result<Vec<IpNet>, Error> {
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

fn join(f: &mut fmt::Formatter<'_>, ranges: &[IpNet]) -> fmt::Result {
    for (position, net) in ranges.iter().enumerate() {
        if position > 0 {
            f.write_str(",")?;
        }
        write!(f, "{net}")?;
    }
    Ok(())
}

/// The kernel's limit, without the terminating byte.
const LONGEST_INTERFACE_NAME: usize = 15;

/// The name of an interface, or a prefix of names. An empty text is no name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InterfaceName(pub(super) String);

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for InterfaceName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let name = text.trim();
        // The kernel accepts a few more, but they need quotes in the text of rules.
        let fits = |c: char| c.is_ascii_graphic() && !"/:*\"'`\\".contains(c);
        match name.chars().find(|c| !fits(*c)) {
            Some(wrong) => Err(Error::InterfaceCharacter(wrong)),
            None if name.len() > LONGEST_INTERFACE_NAME => Err(Error::LongInterface {
                length: name.len(),
                longest: LONGEST_INTERFACE_NAME,
            }),
            None => Ok(Self(name.to_owned())),
        }
    }
}

/// An address to listen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BindAddress {
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

impl From<SocketAddr> for BindAddress {
    fn from(address: SocketAddr) -> Self {
        Self::At(address.ip(), Some(address.port()))
    }
}

impl fmt::Display for BindAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nowhere => Ok(()),
            Self::At(address, Some(port)) => SocketAddr::new(*address, *port).fmt(f),
            Self::At(address, None) => address.fmt(f),
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
            // On Linux, a socket on :: accepts IPv4 as well.
            Ipv6Addr::UNSPECIFIED.into()
        } else {
            // Without brackets, the port of an IPv6 address would be ambiguous.
            IpAddr::V4(address.parse().map_err(|_| wrong())?)
        };
        Ok(Self::At(address, Some(port(number)?)))
    }
}

fn port(text: &str) -> Result<u16, Error> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Error::Port(text.to_owned()));
    }
    text.parse().map_err(|_| Error::Port(text.to_owned()))
}

/// Parses a node name, which is a DNS subdomain. Converts it to lower case, since kube-proxy accepts
/// any host name.
pub(super) fn node_name(text: &str) -> Result<String, Error> {
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

/// Parses the address of an API server. The default scheme is HTTP, as in kube-proxy.
pub(super) fn server(text: &str) -> Result<String, Error> {
    let text = text.trim();
    let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
    let host = rest.split('/').next().unwrap_or_default();
    let is_host = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
    let usable =
        matches!(scheme, "http" | "https") && !host.is_empty() && host.chars().all(is_host);
    // An address with a password is checked later: clap's message would contain it.
    if usable || text.contains('@') {
        Ok(format!("{scheme}://{rest}"))
    } else {
        Err(Error::Server(text.to_owned()))
    }
}

/// Parses a boolean of kube-proxy's flags.
pub(super) fn switch(text: &str) -> Result<bool, Error> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(Error::Switch(text.to_owned())),
    }
}

/// Parses a boolean of YAML 1.1, which Kubernetes reads.
pub(super) fn yaml_switch(text: &str) -> Result<bool, Error> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" => Ok(true),
        "false" | "no" | "off" => Ok(false),
        _ => Err(Error::Switch(text.to_owned())),
    }
}

/// Parses a number from 0 to kube-proxy's maximum.
pub(super) fn count(text: &str) -> Result<u32, Error> {
    let number: i32 = text
        .trim()
        .parse()
        .map_err(|_| Error::Number(text.to_owned()))?;
    number.try_into().map_err(|_| Error::Negative(number))
}

pub(super) fn oom_score_adj(text: &str) -> Result<i16, Error> {
    let number = text.trim().parse().ok();
    number
        .filter(|number| (-1000..=1000).contains(number))
        .ok_or_else(|| Error::OomScoreAdj(text.to_owned()))
}

pub(super) fn masquerade_bit(text: &str) -> Result<u8, Error> {
    let number = text.trim().parse().ok();
    number
        .filter(|number| *number < 32)
        .ok_or_else(|| Error::MasqueradeBit(text.to_owned()))
}

/// Parses a duration of Go, such as `24h0m0s`. Go's maximum is 292 years.
pub(super) fn duration(text: &str) -> Result<Duration, Error> {
    if text.trim() == "0" {
        return Ok(Duration::ZERO);
    }
    let parsed = text.trim().parse::<jiff::SignedDuration>();
    parsed
        .ok()
        .and_then(|duration| Duration::try_from(duration).ok())
        .filter(|duration| i64::try_from(duration.as_nanos()).is_ok())
        .ok_or_else(|| Error::Duration(text.to_owned()))
}

/// Formats a duration as Go does, with milliseconds.
pub(super) fn go_duration(duration: Duration) -> String {
    let (all, millis) = (duration.as_secs(), duration.subsec_millis());
    let (hours, minutes, seconds) = (all / 3600, all / 60 % 60, all % 60);
    let seconds = match millis {
        0 => format!("{seconds}s"),
        _ if all == 0 => return format!("{millis}ms"),
        _ => format!("{seconds}.{millis:03}s"),
    };
    match (hours, minutes) {
        (0, 0) => seconds,
        (0, _) => format!("{minutes}m{seconds}"),
        _ => format!("{hours}h{minutes}m{seconds}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_go_does_and_read_back() {
        for (text, wanted) in [
            ("0", "0s"),
            ("15m", "15m0s"),
            ("24h", "24h0m0s"),
            ("1h30m5s", "1h30m5s"),
            ("90s", "1m30s"),
            ("250ms", "250ms"),
            ("1s 500ms", "1.500s"),
        ] {
            let read = duration(text).expect("a duration");
            assert_eq!(go_duration(read), wanted);
            assert_eq!(duration(wanted), Ok(read), "{wanted}");
        }
    }
}
