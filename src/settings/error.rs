//! Errors of values.

use std::net::IpAddr;

use ipnet::IpNet;
use thiserror::Error;

/// An invalid value. clap puts the value and its flag before the message.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum Error {
    #[error("{0:?} is not a duration; write one such as 24h, 90s or 1h30m, or 0; at most 2562047h")]
    Duration(String),
    #[error("`{0}` is not a range of addresses; write it like 10.244.0.0/16 or fd00:10::/64")]
    Range(String),
    #[error("`{0}` has no prefix length; write {0}/{bits} for this one address", bits = if .0.is_ipv4() { 32 } else { 128 })]
    Prefix(IpAddr),
    #[error("a range is missing before or after a comma; write ranges like {0}")]
    Gap(&'static str),
    #[error("{0} and {1} are both {family}; give at most one range per family", family = family(.0))]
    TwoOfAFamily(IpNet, IpNet),
    #[error(
        "`primary` cannot be combined with ranges; write either primary or ranges like 10.0.0.0/8"
    )]
    PrimaryAndRanges,
    #[error(
        "`{0}` is not an IP address; write IP, IP:PORT, [IPv6]:PORT, :PORT or an empty value to disable it"
    )]
    Address(String),
    #[error("`{0}` is not a port; write a number from 0 to 65535, where 0 is any free port")]
    Port(String),
    #[error(
        "a node name has at most 253 of the characters a-z, 0-9, - and . and begins and ends with a letter or digit; see kubectl get nodes"
    )]
    NodeName,
    #[error("the path is empty; write a file, a directory, or - for standard input")]
    Manifests,
    #[error(
        "there is no such mode; write ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix"
    )]
    DetectLocalMode,
    #[error(
        "--detect-local-mode BridgeInterface needs the bridge of the pods; give it with --pod-bridge-interface, for example cni0"
    )]
    NoBridge,
    #[error(
        "--detect-local-mode InterfaceNamePrefix needs the prefix of the pods' interfaces; give it with --pod-interface-name-prefix, for example veth"
    )]
    NoPrefix,
    #[error("a name of an interface has at most {longest} bytes; this one has {length}")]
    LongInterface { length: usize, longest: usize },
    #[error(
        "the name of an interface cannot contain `{0}`; it has letters, digits and characters such as - _ . but no space, / : * or quotes"
    )]
    InterfaceCharacter(char),
    #[error(
        "there is no mode `{0}`; omit it or write nftables (iptables and ipvs are accepted and mean the same)"
    )]
    ProxyMode(String),
    #[error("`{0}` is not a number from -1000 to 1000")]
    OomScoreAdj(String),
    #[error("`{0}` is not the number of a bit; write one from 0 to 31")]
    MasqueradeBit(String),
    #[error("`{0}` is not the address of an API server; write it like https://192.0.2.10:6443")]
    Server(String),
    #[error("`{0}` is neither true nor false")]
    Switch(String),
    #[error("`{0}` is not a whole number up to {max}", max = i32::MAX)]
    Number(String),
    #[error("{0} is below zero; write 0 or more")]
    Negative(i32),
    #[error("`{0}` is not a verbosity; write a number such as 2, or -v, -vv or -vvv")]
    Verbosity(String),
    #[error("an entry is empty; write primary or ranges like 10.0.0.0/8")]
    EmptyEntry,
    #[error(
        "a configuration file cannot disable {0}: an empty value means the default there; give an address such as 127.0.0.1 to write a file"
    )]
    NowhereInFile(&'static str),
    #[error("there is no such format; write text or json")]
    LogFormat,
    #[error(
        "there is no such scope; write all, nftlet or kube-proxy after an equals sign, as in --cleanup=nftlet"
    )]
    Cleanup,
    #[error("there is no such value; write on or off")]
    OnOff,
    #[error("--services=off and --network-policy=off leave nothing to do; omit one of them")]
    NothingToDo,
    #[error("--init-only sets kernel parameters for services; omit it or --services=off")]
    InitOnlyWithoutServices,
    #[error("there is no such answer; write drop or reject")]
    DenyWith,
    #[error("there is no such value; write open or closed")]
    PodStartup,
    #[error("--pod-startup=closed needs --network-policy=on")]
    ClosedWithoutPolicies,
    #[error(
        "--pod-startup=closed cannot be combined with --once, since new pods would stay closed"
    )]
    ClosedOnce,
}

pub(super) fn family(net: &IpNet) -> &'static str {
    match net {
        IpNet::V4(_) => "IPv4",
        IpNet::V6(_) => "IPv6",
    }
}
