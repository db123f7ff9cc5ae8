//! The flags about the process itself: its configuration file, and what it does before it works.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgAction, Args};

use super::Error;
use super::kube_proxy::switch;

/// kube-proxy's value: among the last processes that the kernel ends when memory runs out.
pub const OOM_SCORE_ADJ: i16 = -999;

/// Where settings come from, and what happens to the process.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Configuration")]
pub struct ProcessArgs {
    /// Read the settings from a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1), such as
    /// the one kubeadm writes. Flags for what is in it are ignored, except --hostname-override,
    /// -v and --log-format. nftlet ends when the file changes, to be started again.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Write the settings as a complete KubeProxyConfiguration and exit.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dry_run", "once", "init_only"])]
    pub write_config_to: Option<PathBuf>,

    /// Make the kernel settings of connection tracking, which may need more rights than the rules,
    /// and exit.
    #[arg(
        long,
        conflicts_with_all = ["dry_run", "once"],
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        default_value_t = false,
        hide_default_value = true,
        value_name = "true|false",
        value_parser = switch,
        action = ArgAction::Set
    )]
    pub init_only: bool,

    /// Accepted for kube-proxy's sake: nftables, iptables and ipvs all mean nftables here.
    #[arg(long, value_name = "MODE", default_value_t)]
    pub proxy_mode: ProxyMode,

    /// How readily the kernel ends this process when memory runs out, from -1000 to 1000
    /// [default: -999, as far as the process may].
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = oom_score_adj
    )]
    pub oom_score_adj: Option<i16>,
}

/// `--proxy-mode`, and `mode` of the configuration file. Rules are of nftables in each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProxyMode {
    /// The mode that nftlet implements.
    #[default]
    Nftables,
    /// Accepted, since kube-proxy may share the configuration.
    Iptables,
    /// Accepted, since kube-proxy may share the configuration.
    Ipvs,
}

impl ProxyMode {
    /// Returns what to say where the mode is not nftables.
    pub fn note(self) -> Option<String> {
        (self != Self::Nftables)
            .then(|| format!("mode {self} is for kube-proxy; nftlet works with nftables"))
    }
}

impl FromStr for ProxyMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text.trim() {
            // An empty text is the default of each system.
            "" | "nftables" => Ok(Self::Nftables),
            "iptables" => Ok(Self::Iptables),
            "ipvs" => Ok(Self::Ipvs),
            _ => Err(Error::ProxyMode(text.to_owned())),
        }
    }
}

impl fmt::Display for ProxyMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
        })
    }
}

/// Checks a value for `/proc/self/oom_score_adj`.
///
/// # Errors
///
/// [`Error::OomScoreAdj`] for what is no number from -1000 to 1000.
pub fn oom_score_adj(text: &str) -> Result<i16, Error> {
    let number = text.trim().parse().ok();
    number
        .filter(|number| (-1000..=1000).contains(number))
        .ok_or_else(|| Error::OomScoreAdj(text.to_owned()))
}

/// Checks the number of a bit of the packet mark.
///
/// # Errors
///
/// [`Error::MasqueradeBit`] for what is no number from 0 to 31.
pub fn masquerade_bit(text: &str) -> Result<u8, Error> {
    let number = text.trim().parse().ok();
    number
        .filter(|number| *number < 32)
        .ok_or_else(|| Error::MasqueradeBit(text.to_owned()))
}
