//! Settings whose value is one of a few words.

use std::fmt;
use std::str::FromStr;

use super::Error;

/// Implements `FromStr` and `Display` from a table of the words for each value. `Display` writes
/// the first one.
macro_rules! words {
    ($type:ident, $error:expr, $($value:ident = $word:literal $(| $other:literal)*),+ $(,)?) => {
        impl FromStr for $type {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self, Error> {
                match text.trim() {
                    $($word $(| $other)* => Ok(Self::$value),)+
                    other => Err($error(other)),
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(Self::$value => $word,)+
                })
            }
        }
    };
}

/// What `--cleanup` removes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cleanup {
    /// All that nftlet and kube-proxy wrote.
    All,
    /// nftlet's rules.
    Nftlet,
    /// What kube-proxy wrote.
    KubeProxy,
    /// Nothing, as without the flag.
    Nothing,
}

// kube-proxy's flag is true or false.
words!(
    Cleanup,
    |_| Error::Cleanup,
    All = "all" | "true",
    Nftlet = "nftlet",
    KubeProxy = "kube-proxy",
    Nothing = "false",
);

/// How traffic of pods is recognised: `--detect-local-mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum DetectLocalMode {
    /// By the pod network of the cluster.
    #[default]
    ClusterCidr,
    /// By the pod networks of this node.
    NodeCidr,
    /// By the bridge of the pods.
    BridgeInterface,
    /// By the names of the pods' interfaces.
    InterfaceNamePrefix,
}

// kube-proxy accepts an empty text as the default.
words!(
    DetectLocalMode,
    |_| Error::DetectLocalMode,
    ClusterCidr = "ClusterCIDR" | "",
    NodeCidr = "NodeCIDR",
    BridgeInterface = "BridgeInterface",
    InterfaceNamePrefix = "InterfaceNamePrefix",
);

/// The format of log lines: `--log-format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum LogFormat {
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

words!(
    LogFormat,
    |_| Error::LogFormat,
    Text = "text",
    Json = "json"
);

/// Whether a part of nftlet works: `--services`, `--network-policy`, `--audit-annotations`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum OnOff {
    #[default]
    On,
    /// Its objects are not read, and it has no rules.
    Off,
}

words!(OnOff, |_| Error::OnOff, On = "on", Off = "off");

impl OnOff {
    pub(crate) fn is_on(self) -> bool {
        self == Self::On
    }
}

/// What happens to packets that NetworkPolicies deny: `--deny-with`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum DenyMode {
    #[default]
    Drop,
    Reject,
}

words!(
    DenyMode,
    |_| Error::DenyWith,
    Drop = "drop",
    Reject = "reject"
);

/// What pods of this node can send and receive before their policies are known: `--pod-startup`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum PodStartup {
    /// Everything.
    #[default]
    Open,
    /// Nothing.
    Closed,
}

words!(
    PodStartup,
    |_| Error::PodStartup,
    Open = "open",
    Closed = "closed"
);

/// The mode of kube-proxy: `--proxy-mode`, and `mode` in the file. nftlet uses nftables in each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ProxyMode {
    #[default]
    Nftables,
    /// Accepted, as `Ipvs`, since kube-proxy may share the configuration.
    Iptables,
    Ipvs,
}

words!(
    ProxyMode,
    |text: &str| Error::ProxyMode(text.to_owned()),
    Nftables = "nftables" | "",
    Iptables = "iptables",
    Ipvs = "ipvs",
);

impl ProxyMode {
    /// Returns the warning about a mode other than nftables.
    pub(crate) fn note(self) -> Option<String> {
        (self != Self::Nftables)
            .then(|| format!("mode {self} is for kube-proxy; nftlet uses nftables"))
    }
}
