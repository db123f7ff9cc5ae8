//! What is wrong with a value.

use std::net::IpAddr;

use ipnet::IpNet;
use thiserror::Error;

use super::values::LONGEST_INTERFACE_NAME;

/// A value that cannot be used. clap puts the value and its flag before the text.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum Error {
    /// Not a duration.
    #[error("{0:?} is not a duration; write one such as 24h, 90s or 1h30m, or 0; at most 2562047h")]
    Duration(String),
    /// No range of addresses.
    #[error("`{0}` is not a range of addresses; write it like 10.244.0.0/16 or fd00:10::/64")]
    Range(String),
    /// An address where a range belongs.
    #[error("`{0}` has no prefix length; write {0}/{bits} for this one address", bits = if .0.is_ipv4() { 32 } else { 128 })]
    Prefix(IpAddr),
    /// Nothing between two commas.
    #[error("there is nothing before or after a comma; write the ranges like {0}")]
    Gap(&'static str),
    /// Two pod networks of one family.
    #[error("{0} and {1} are both {family}; give at most one range per family", family = family(.0))]
    TwoOfAFamily(IpNet, IpNet),
    /// `primary` beside ranges.
    #[error("`primary` stands for itself; write either primary or ranges like 10.0.0.0/8")]
    PrimaryAndRanges,
    /// No address to listen on.
    #[error(
        "`{0}` is not an IP address; write IP, IP:PORT, [IPv6]:PORT, :PORT or an empty text for nowhere"
    )]
    Address(String),
    /// No port.
    #[error("`{0}` is not a port; write a number from 0 to 65535, where 0 is any free port")]
    Port(String),
    /// No node name.
    #[error(
        "a node name has at most 253 of the characters a-z, 0-9, - and . and begins and ends with a letter or digit; see kubectl get nodes"
    )]
    NodeName,
    /// No path.
    #[error("the path is empty; write a file, a directory, or - for standard input")]
    Manifests,
    /// No mode.
    #[error(
        "there is no such mode; write ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix"
    )]
    DetectLocalMode,
    /// The mode BridgeInterface alone.
    #[error(
        "--detect-local-mode BridgeInterface needs the name of the pods' bridge; give it with --pod-bridge-interface, for example cni0"
    )]
    NoBridge,
    /// The mode InterfaceNamePrefix alone.
    #[error(
        "--detect-local-mode InterfaceNamePrefix needs what the names of the pods' interfaces begin with; give it with --pod-interface-name-prefix, for example veth"
    )]
    NoPrefix,
    /// Too long for an interface.
    #[error("names of interfaces have at most {LONGEST_INTERFACE_NAME} bytes, and this has {0}")]
    LongInterface(usize),
    /// Characters that no interface has.
    #[error(
        "`{0}` cannot be in the name of an interface; names have letters, digits and marks such as - _ . but no space, / : * or quotes"
    )]
    InterfaceCharacter(char),
    /// A mode that kube-proxy does not have on Linux.
    #[error(
        "there is no mode `{0}`; leave the mode out or write nftables (iptables and ipvs are accepted and mean the same)"
    )]
    ProxyMode(String),
    /// No score.
    #[error("`{0}` is not a number from -1000 to 1000")]
    OomScoreAdj(String),
    /// No bit of a mark.
    #[error("`{0}` is not the number of a bit; write one from 0 to 31")]
    MasqueradeBit(String),
    /// No address of a server.
    #[error("`{0}` is not the address of an API server; write it like https://192.0.2.10:6443")]
    Server(String),
    /// Neither true nor false.
    #[error("`{0}` is neither true nor false")]
    Switch(String),
    /// Not a whole number that kube-proxy can hold.
    #[error("`{0}` is not a whole number up to {max}", max = i32::MAX)]
    Number(String),
    /// A negative number.
    #[error("{0} is below zero; write 0 or more")]
    Negative(i32),
    /// No verbosity.
    #[error("`{0}` is not a verbosity; write a number such as 2, or -v, -vv or -vvv")]
    Verbosity(String),
    /// An empty entry in the list of a file.
    #[error("an entry is empty; write primary or ranges like 10.0.0.0/8")]
    EmptyEntry,
    /// A setting that a file cannot express.
    #[error(
        "a configuration file cannot say that nothing is answered: an empty {0} means the default there; give an address such as 127.0.0.1 to write a file"
    )]
    NowhereInFile(&'static str),
    /// No log format.
    #[error("there is no such format; write text or json")]
    LogFormat,
    /// Nothing that can be cleaned up.
    #[error("write all, nftlet or kube-proxy, joined to the flag: --cleanup=nftlet")]
    Cleanup,
    /// Not one of the values of `--network-policy`.
    #[error("there is no such value; write on or off")]
    NetworkPolicy,
}

pub(super) fn family(net: &IpNet) -> &'static str {
    match net {
        IpNet::V4(_) => "IPv4",
        IpNet::V6(_) => "IPv6",
    }
}
