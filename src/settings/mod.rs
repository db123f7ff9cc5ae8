//! The settings: flags, and the configuration file of kube-proxy.
//!
//! [`Settings`] declares each setting once, as a flag with a typed value. A field of the
//! configuration file is one line in `file/fields.rs`, which names the flag, and reads and writes
//! the same value. Flags that kube-proxy has as well keep its names and meanings. A value that
//! is invalid is an error at the start, in one line that says what to write instead.
//!
//! ```text
//! arguments ─> CommandLine ─────────┐
//!                                   ├─> Settings ─> --write-config-to, /configz
//! file ─> File (fields, notes) ─────┘
//!   └─> follow (a valid change ends the process)
//! ```

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{ArgAction, Parser};

pub(crate) use command_line::{CommandLine, one_line, print_completion, print_man};
pub(crate) use commands::{
    Audit, Command, Diff, DiffOutput, Explain, Output, Policies, Reach, ReachBy, ReachOutput,
    Services, Status,
};
pub(crate) use error::Error;
use kube_proxy::{Ignored, Verbose};
pub(crate) use modes::{
    Cleanup, DenyMode, DetectLocalMode, LogFormat, OnOff, PodStartup, ProxyMode,
};
pub(crate) use resolve::DetectLocalSetting;
pub(crate) use values::{BindAddress, ClusterCidrs, InterfaceName, NodePortAddressesSetting};
use values::{
    count, duration, manifests, masquerade_bit, node_name, oom_score_adj, server, switch,
};

mod command_line;
mod commands;
mod error;
pub(crate) mod file;
mod kube_proxy;
mod modes;
mod resolve;
mod values;

/// The text of `--version`: the version, and the commit if the build had the variable
/// `NFTLET_COMMIT`.
static VERSION: LazyLock<String> = LazyLock::new(|| version(option_env!("NFTLET_COMMIT")));

fn version(commit: Option<&str>) -> String {
    let version = env!("CARGO_PKG_VERSION");
    match commit.filter(|commit| !["", "unknown"].contains(commit)) {
        Some(commit) => format!("{version} ({commit})"),
        None => version.to_owned(),
    }
}

const CONNTRACK: &str = "Connection tracking (0 leaves the kernel's value)";

const AFTER_HELP: &str = "\
Without --kubeconfig and --manifests, nftlet uses the service account of its pod.

Examples:
  nftlet --kubeconfig /etc/kubernetes/proxy.conf --cluster-cidr 10.244.0.0/16
  nftlet --manifests services.yaml --dry-run
  kubectl get services,endpointslices -A -o yaml | nftlet --manifests - --dry-run";

/// Programs the Kubernetes services of a node with nftables, in place of kube-proxy, and enforces
/// NetworkPolicies.
///
/// nftlet watches the objects of the cluster and writes each change to the kernel as one atomic
/// transaction over netlink.
#[derive(Clone, Debug, Parser, PartialEq, Eq)]
#[command(name = "nftlet", version = VERSION.as_str(), max_term_width = 100, after_help = AFTER_HELP)]
#[command(
    override_usage = "nftlet [--kubeconfig FILE | --manifests PATH...] [--dry-run | --once] [OPTIONS]\n       nftlet --cleanup[=all|nftlet|kube-proxy]\n       nftlet completion bash|zsh|fish\n       nftlet man"
)]
pub struct Settings {
    /// Read the settings from a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1), such as
    /// the one kubeadm writes. Flags of its settings are ignored, except --hostname-override, -v
    /// and --log-format. nftlet exits when the file changes, so that its supervisor restarts it.
    #[arg(long, value_name = "FILE", help_heading = "Configuration")]
    pub(crate) config: Option<PathBuf>,

    /// Write the settings as a complete KubeProxyConfiguration and exit.
    #[arg(
        long,
        value_name = "FILE",
        help_heading = "Configuration",
        conflicts_with_all = ["dry_run", "once", "init_only"]
    )]
    pub(crate) write_config_to: Option<PathBuf>,

    /// Set the kernel parameters of connection tracking, which may need more privileges than the
    /// rules, and exit.
    #[arg(
        long,
        help_heading = "Configuration",
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

    /// Accepted for compatibility with kube-proxy: nftables, iptables and ipvs all mean nftables.
    #[arg(
        long,
        value_name = "MODE",
        help_heading = "Configuration",
        default_value_t
    )]
    pub(crate) proxy_mode: ProxyMode,

    /// The OOM score adjustment of this process, from -1000 (never killed) to 1000 (killed first)
    /// [default: -999, if the process may set it].
    #[arg(
        long,
        value_name = "N",
        help_heading = "Configuration",
        allow_negative_numbers = true,
        value_parser = oom_score_adj
    )]
    pub(crate) oom_score_adj: Option<i16>,

    /// Read the address of the API server and the credentials from this file.
    #[arg(long, value_name = "FILE", help_heading = "Source")]
    pub(crate) kubeconfig: Option<PathBuf>,

    /// The address of the API server, instead of that in the kubeconfig or the pod's environment.
    /// The credentials are still theirs.
    #[arg(
        long,
        value_name = "URL",
        help_heading = "Source",
        value_parser = server,
        conflicts_with = "manifests"
    )]
    pub(crate) master: Option<String>,

    /// Read objects from a YAML or JSON file, a directory of such files, or standard input (-)
    /// instead of a cluster, and follow changes of files. May be given several times.
    #[arg(
        long,
        value_name = "PATH",
        help_heading = "Source",
        value_parser = OsStringValueParser::new().try_map(manifests),
        conflicts_with = "kubeconfig"
    )]
    pub(crate) manifests: Vec<PathBuf>,

    /// Remove all rules if the manifests contain no object at the start. Otherwise the rules of an
    /// earlier run stay in force until there is one.
    #[arg(long, help_heading = "Source", requires = "manifests")]
    pub(crate) allow_empty: bool,

    /// The name of this node in the cluster [default: the variable NODE_NAME, else the host name
    /// in lower case].
    #[arg(
        long,
        value_name = "NODE",
        help_heading = "Source",
        value_parser = node_name
    )]
    pub hostname_override: Option<String>,

    /// Answer questions of nftlet's commands on this unix socket; empty for none. Not with --once.
    #[arg(
        long,
        value_name = "PATH",
        help_heading = "Ports",
        default_value = "/run/nftlet/nftlet.sock",
        value_parser = OsStringValueParser::new().map(PathBuf::from)
    )]
    pub(crate) socket: PathBuf,

    /// Print the rules in the syntax of nft(8) and exit. Change nothing.
    #[arg(long, help_heading = "Mode", conflicts_with = "once")]
    pub(crate) dry_run: bool,

    /// Write the rules once and exit. The rules stay.
    #[arg(long, help_heading = "Mode")]
    pub(crate) once: bool,

    /// Remove the rules of nftlet and of kube-proxy (all), or of one of them, print what was
    /// removed, and exit. Existing connections continue.
    #[arg(
        long,
        value_name = "all|nftlet|kube-proxy",
        help_heading = "Mode",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "all",
        conflicts_with_all = ["dry_run", "once", "manifests", "keep_kube_proxy"]
    )]
    pub(crate) cleanup: Option<Cleanup>,

    /// Keep kube-proxy's rules. Otherwise they are removed once nftlet's are in force.
    #[arg(long, help_heading = "Mode")]
    pub(crate) keep_kube_proxy: bool,

    /// Program services (on), or leave them to another program such as kube-proxy and enforce
    /// NetworkPolicies only (off). With off, flags about services and connection tracking have no
    /// effect.
    #[arg(
        long,
        value_name = "on|off",
        help_heading = "Services",
        default_value_t
    )]
    pub(crate) services: OnOff,

    /// The pod network, at most one range per IP family. Traffic to ClusterIPs from other addresses
    /// is masqueraded; without a range of a family, no traffic of that family is.
    #[arg(
        long,
        value_name = "CIDR[,CIDR]",
        help_heading = "Services",
        default_value_t,
        hide_default_value = true
    )]
    pub(crate) cluster_cidr: ClusterCidrs,

    /// Recognise traffic of pods by ClusterCIDR (the ranges of --cluster-cidr), NodeCIDR
    /// (spec.podCIDRs of the Node), BridgeInterface (the bridge on which it arrives) or
    /// InterfaceNamePrefix (the name of the interface on which it arrives).
    #[arg(long, value_name = "MODE", help_heading = "Services", default_value_t)]
    pub(crate) detect_local_mode: DetectLocalMode,

    /// The bridge of this node's pods, for BridgeInterface.
    #[arg(long, value_name = "NAME", help_heading = "Services")]
    pub(crate) pod_bridge_interface: Option<InterfaceName>,

    /// The prefix of the interfaces of this node's pods, for InterfaceNamePrefix.
    #[arg(long, value_name = "PREFIX", help_heading = "Services")]
    pub(crate) pod_interface_name_prefix: Option<InterfaceName>,

    /// Serve NodePorts on the local addresses in these ranges, or on the node's own address of each
    /// family (primary). Of a family without a range, all local addresses are served. May be given
    /// several times.
    #[arg(
        long,
        value_name = "primary|CIDR,...",
        help_heading = "Services",
        default_values_t = [NodePortAddressesSetting::Primary]
    )]
    pub(crate) nodeport_addresses: Vec<NodePortAddressesSetting>,

    /// Masquerade all traffic to ClusterIPs, from any source.
    #[arg(
        long,
        help_heading = "Services",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        default_value_t = false,
        hide_default_value = true,
        value_name = "true|false",
        value_parser = switch,
        action = ArgAction::Set
    )]
    pub(crate) masquerade_all: bool,

    /// The bit of the packet mark, from 0 to 31, that marks packets for masquerading. Other programs
    /// must not use it.
    #[arg(
        long,
        alias = "iptables-masquerade-bit",
        value_name = "N",
        help_heading = "Services",
        default_value_t = 14,
        value_parser = masquerade_bit
    )]
    pub(crate) masquerade_bit: u8,

    /// The node's own address, instead of those in its Node object. 0.0.0.0 and :: select those in
    /// the Node object.
    #[arg(long, value_name = "IP", help_heading = "Services")]
    pub(crate) bind_address: Option<IpAddr>,

    /// Tracked connections per core [default: 32768, if the process may set it].
    #[arg(long, value_name = "N", help_heading = CONNTRACK, value_parser = count)]
    pub(crate) conntrack_max_per_core: Option<u32>,

    /// The lowest number of tracked connections, unless --conntrack-max-per-core is 0.
    #[arg(
        long,
        value_name = "N",
        help_heading = CONNTRACK,
        default_value_t = 131_072,
        value_parser = count
    )]
    pub(crate) conntrack_min: u32,

    /// The timeout of idle established TCP connections [default: 24h, if the process may set it].
    #[arg(long, value_name = "DURATION", help_heading = CONNTRACK, value_parser = duration)]
    pub(crate) conntrack_tcp_timeout_established: Option<Duration>,

    /// The timeout of TCP connections in CLOSE_WAIT [default: 1h, if the process may set it].
    #[arg(long, value_name = "DURATION", help_heading = CONNTRACK, value_parser = duration)]
    pub(crate) conntrack_tcp_timeout_close_wait: Option<Duration>,

    /// Track TCP packets outside of the window, instead of marking them invalid.
    #[arg(
        long,
        help_heading = CONNTRACK,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        default_value_t = false,
        hide_default_value = true,
        value_name = "true|false",
        value_parser = switch,
        action = ArgAction::Set
    )]
    pub(crate) conntrack_tcp_be_liberal: bool,

    /// The timeout of UDP flows without a reply.
    #[arg(long, value_name = "DURATION", help_heading = CONNTRACK, value_parser = duration)]
    pub(crate) conntrack_udp_timeout: Option<Duration>,

    /// The timeout of UDP flows with replies.
    #[arg(long, value_name = "DURATION", help_heading = CONNTRACK, value_parser = duration)]
    pub(crate) conntrack_udp_timeout_stream: Option<Duration>,

    /// Enforce NetworkPolicies and ClusterNetworkPolicies (on), or neither read nor enforce them (off).
    #[arg(
        long,
        value_name = "on|off",
        help_heading = "Policies",
        default_value_t
    )]
    pub(crate) network_policy: OnOff,

    /// Honour the annotation nftlet.dev/mode=audit of NetworkPolicies and Namespaces: such policies
    /// deny nothing, and what they would deny is counted and logged; see nftlet audit. Who may
    /// annotate them can then undo what they deny.
    #[arg(
        long,
        value_name = "on|off",
        help_heading = "Policies",
        default_value_t = OnOff::Off
    )]
    pub(crate) audit_annotations: OnOff,

    /// Before the policies of a pod of this node are in force, let it send and receive everything
    /// (open) or nothing (closed). Pods are recognised by spec.podCIDRs of the Node, or by the
    /// interface of --detect-local-mode BridgeInterface or InterfaceNamePrefix. Not with --once.
    #[arg(
        long,
        value_name = "open|closed",
        help_heading = "Policies",
        default_value_t
    )]
    pub(crate) pod_startup: PodStartup,

    /// Cut established connections of this node's pods that NetworkPolicies no longer allow, within
    /// a second. Otherwise they continue until they end. Not with --once.
    #[arg(long, help_heading = "Policies")]
    pub(crate) network_policy_strict: bool,

    /// Log packets that NetworkPolicies deny, with the names of the pods, at most 10 a second for
    /// each direction and IP family. Not with --once.
    #[arg(long, help_heading = "Policies")]
    pub(crate) log_denied: bool,

    /// Drop packets that NetworkPolicies deny, or reject them: with a TCP reset, or an ICMP error for
    /// other protocols. At most 100 a second of each are rejected in each direction and IP family; the
    /// others are dropped.
    #[arg(
        long,
        value_name = "drop|reject",
        help_heading = "Policies",
        default_value_t
    )]
    pub(crate) deny_with: DenyMode,

    /// Serve /metrics on this address: `IP`, `IP:PORT`, `[IPv6]:PORT`, `:PORT` for all addresses, or
    /// an empty value to disable it [default: 127.0.0.1:10249, or `[::1]:10249` if --bind-address is
    /// IPv6; disabled with --manifests, --dry-run or --once].
    #[arg(long, value_name = "ADDR", help_heading = "Observability")]
    pub(crate) metrics_bind_address: Option<BindAddress>,

    /// Serve /healthz, /readyz and /livez on this address, in the same forms [default:
    /// 0.0.0.0:10256, or `[::]:10256` if --bind-address is IPv6; disabled with --manifests, --dry-run
    /// or --once].
    #[arg(long, value_name = "ADDR", help_heading = "Observability")]
    pub(crate) healthz_bind_address: Option<BindAddress>,

    /// Exit if the address for metrics or for probes cannot be bound, instead of retrying.
    #[arg(
        long,
        help_heading = "Observability",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        default_value_t = false,
        hide_default_value = true,
        value_name = "true|false",
        value_parser = switch,
        action = ArgAction::Set
    )]
    pub(crate) bind_address_hard_fail: bool,

    /// Log each change (-v), every step (-vv), or the libraries as well (-vvv). A number is a
    /// verbosity of kube-proxy: 4 and 5 mean -v, 6 and 7 mean -vv, more means -vvv.
    #[arg(
        short = 'v',
        alias = "v",
        value_name = "N",
        help_heading = "Observability",
        num_args = 0..=1,
        default_missing_value = "",
        value_parser = Verbose::parse
    )]
    pub(crate) verbose: Vec<Verbose>,

    /// The port of `--healthz-bind-address`; 0 disables it.
    #[arg(long, value_name = "PORT", hide = true)]
    pub(crate) healthz_port: Option<u16>,

    /// The port of `--metrics-bind-address`; 0 disables it.
    #[arg(long, value_name = "PORT", hide = true)]
    pub(crate) metrics_port: Option<u16>,

    #[command(flatten)]
    pub(crate) ignored: Ignored,

    /// Write the log as text or as json.
    #[arg(
        long,
        alias = "logging-format",
        value_name = "text|json",
        help_heading = "Observability",
        default_value_t
    )]
    pub(crate) log_format: LogFormat,

    /// `nftables.syncPeriod` of the configuration file, which has no flag. Changes that wait twice as
    /// long make the agent unhealthy.
    #[arg(skip)]
    pub(crate) sync_period: Option<Duration>,
}

impl Default for Settings {
    /// Returns the settings of a command line without flags.
    fn default() -> Self {
        Self::parse_from(["nftlet"])
    }
}

#[cfg(test)]
mod tests;
