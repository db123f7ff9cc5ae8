//! The command line.
//!
//! Flags that kube-proxy has as well keep its names and meanings. A value that cannot be used is
//! refused here, in one line that tells what to write instead, before anything else begins.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{ArgAction, Parser};
use thiserror::Error;

pub use cleanup::Cleanup;
pub use command_line::{Command, CommandLine, one_line};
pub use conntrack::{ConntrackArgs, duration};
pub use detect_local::{DetectLocal, DetectLocalMode, InterfaceName};
pub use error::Error;
use kube_proxy::switch;
pub use kube_proxy::{Ignored, Verbose, verbosity_of};
pub use network_policy::NetworkPolicyMode;
pub use process::{OOM_SCORE_ADJ, ProcessArgs, ProxyMode, masquerade_bit, oom_score_adj};
use values::server;
pub use values::{BindAddress, ClusterCidrs, LogFormat, Manifests, NodePortAddresses, node_name};

mod cleanup;
mod command_line;
mod conntrack;
mod detect_local;
mod error;
pub mod file;
mod kube_proxy;
mod network_policy;
mod process;
mod values;

/// What `--version` says: the version, and the commit where the build was told one by the variable
/// `NFTLET_COMMIT`.
static VERSION: LazyLock<String> = LazyLock::new(|| version(option_env!("NFTLET_COMMIT")));

fn version(commit: Option<&str>) -> String {
    let version = env!("CARGO_PKG_VERSION");
    match commit.filter(|commit| !["", "unknown"].contains(commit)) {
        Some(commit) => format!("{version} ({commit})"),
        None => version.to_owned(),
    }
}

/// The flag with the address of the probes.
pub const HEALTHZ_BIND_ADDRESS: &str = "--healthz-bind-address";

/// The flag with the address of the metrics.
pub const METRICS_BIND_ADDRESS: &str = "--metrics-bind-address";

/// How long a round of work may take before it counts as late, twice over; kube-proxy's
/// `nftables.syncPeriod`.
pub const SYNC_PERIOD: Duration = Duration::from_secs(30);

/// Where kube-proxy answers probes: on all addresses, since load balancers ask from outside.
const HEALTHZ: Defaults = Defaults {
    port: 10256,
    v4: Ipv4Addr::UNSPECIFIED,
    v6: Ipv6Addr::UNSPECIFIED,
};

/// Where kube-proxy answers Prometheus: inside the node only.
const METRICS: Defaults = Defaults {
    port: 10249,
    v4: Ipv4Addr::LOCALHOST,
    v6: Ipv6Addr::LOCALHOST,
};

/// What an address to listen on has where nothing else is said; the family is that of the node's
/// own address (`--bind-address`).
struct Defaults {
    port: u16,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

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
#[command(args_conflicts_with_subcommands = true, disable_help_subcommand = true)]
pub struct Settings {
    /// What to print instead of doing any work.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// The configuration file and what is done with the process.
    #[command(flatten)]
    pub process: ProcessArgs,

    /// Read the address of the API server and the credentials for it from this file.
    #[arg(long, value_name = "FILE", help_heading = "Source")]
    pub kubeconfig: Option<PathBuf>,

    /// The address of the API server, in place of the one in the kubeconfig or the pod's
    /// environment, whose credentials are used.
    #[arg(
        long,
        value_name = "URL",
        help_heading = "Source",
        value_parser = server,
        conflicts_with = "manifests"
    )]
    pub master: Option<String>,

    /// Read the objects from a YAML or JSON file, a directory of such files, or standard input
    /// (-) instead of a cluster, and follow the changes of files. May be given several times.
    #[arg(
        long,
        value_name = "PATH",
        help_heading = "Source",
        value_parser = OsStringValueParser::new().try_map(Manifests::parse),
        conflicts_with = "kubeconfig"
    )]
    pub manifests: Vec<Manifests>,

    /// Remove all rules where the manifests hold no object at the start. Otherwise the rules of an
    /// earlier run stay in force until there is one.
    #[arg(long, help_heading = "Source", requires = "manifests")]
    pub allow_empty: bool,

    /// The name of this node in the cluster [default: the variable NODE_NAME, else the host name
    /// in lower case].
    #[arg(
        long,
        value_name = "NODE",
        help_heading = "Source",
        value_parser = node_name
    )]
    pub hostname_override: Option<String>,

    /// Print the rules as `nft` would read them and exit; change nothing.
    #[arg(long, help_heading = "Mode", conflicts_with = "once")]
    pub dry_run: bool,

    /// Write the rules once and exit; they stay.
    #[arg(long, help_heading = "Mode")]
    pub once: bool,

    /// Remove rules, print what was removed, and exit: those of nftlet and of kube-proxy (all), or
    /// of one of them. Connections that exist go on.
    #[arg(
        long,
        value_name = "all|nftlet|kube-proxy",
        help_heading = "Mode",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "all",
        conflicts_with_all = ["dry_run", "once", "manifests", "keep_kube_proxy"]
    )]
    pub cleanup: Option<Cleanup>,

    /// Leave kube-proxy's rules where they are. Otherwise they are removed once nftlet's own stand.
    #[arg(long, help_heading = "Mode")]
    pub keep_kube_proxy: bool,

    /// The pod network, at most one range per IP family. Traffic to ClusterIPs from elsewhere is
    /// masqueraded; without a range of a family none of that family is.
    #[arg(
        long,
        value_name = "CIDR[,CIDR]",
        help_heading = "Services",
        default_value_t,
        hide_default_value = true
    )]
    pub cluster_cidr: ClusterCidrs,

    /// Tell traffic of pods by ClusterCIDR (the range of --cluster-cidr), NodeCIDR (the ranges in
    /// spec.podCIDRs of the Node), BridgeInterface (the bridge it comes in by) or
    /// InterfaceNamePrefix (the name of the interface it comes in by).
    #[arg(long, value_name = "MODE", help_heading = "Services", default_value_t)]
    pub detect_local_mode: DetectLocalMode,

    /// The bridge that the pods of this node are attached to; with BridgeInterface.
    #[arg(long, value_name = "NAME", help_heading = "Services")]
    pub pod_bridge_interface: Option<InterfaceName>,

    /// What the names of the interfaces of this node's pods begin with; with InterfaceNamePrefix.
    #[arg(long, value_name = "PREFIX", help_heading = "Services")]
    pub pod_interface_name_prefix: Option<InterfaceName>,

    /// Answer NodePorts on the local addresses inside these ranges, or on the node's own address
    /// of each family (primary). A family without a range means all of its local addresses. May be
    /// given several times.
    #[arg(
        long,
        value_name = "primary|CIDR,...",
        help_heading = "Services",
        default_values_t = [NodePortAddresses::Primary]
    )]
    pub nodeport_addresses: Vec<NodePortAddresses>,

    /// Masquerade all traffic to ClusterIPs, wherever it comes from.
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
    pub masquerade_all: bool,

    /// The bit of the packet mark, from 0 to 31, that asks for masquerading; others must not use
    /// it.
    #[arg(
        long,
        alias = "iptables-masquerade-bit",
        value_name = "N",
        help_heading = "Services",
        default_value_t = 14,
        value_parser = masquerade_bit
    )]
    pub masquerade_bit: u8,

    /// The node's own address, in place of those in its Node object; an unspecified address
    /// (0.0.0.0, ::) means those.
    #[arg(long, value_name = "IP", help_heading = "Services")]
    pub bind_address: Option<IpAddr>,

    /// Kernel settings of connection tracking.
    #[command(flatten)]
    pub conntrack: ConntrackArgs,

    /// Enforce the cluster's NetworkPolicies (on), or neither read nor enforce them (off).
    #[arg(
        long,
        value_name = "on|off",
        help_heading = "Policies",
        default_value_t
    )]
    pub network_policy: NetworkPolicyMode,

    /// Cut established connections of this node's pods within a second when the NetworkPolicies
    /// allow them no more, instead of letting them end by themselves. Not with --once.
    #[arg(long, help_heading = "Policies")]
    pub network_policy_strict: bool,

    /// Log the packets that NetworkPolicies deny, with the names of the pods: of each direction
    /// and IP family 10 a second at most. Not with --once.
    #[arg(long, help_heading = "Policies")]
    pub log_denied: bool,

    /// Answer /metrics here: `IP`, `IP:PORT`, `[IPv6]:PORT`, `:PORT` for all addresses, or an
    /// empty text for nowhere [default: 127.0.0.1:10249, or `[::1]:10249` where --bind-address is
    /// IPv6; nowhere with --manifests, --dry-run or --once].
    #[arg(long, value_name = "ADDR", help_heading = "Observability")]
    pub metrics_bind_address: Option<BindAddress>,

    /// Answer /healthz and /livez here, in the same forms [default: 0.0.0.0:10256, or `[::]:10256`
    /// where --bind-address is IPv6; nowhere with --manifests, --dry-run or --once].
    #[arg(long, value_name = "ADDR", help_heading = "Observability")]
    pub healthz_bind_address: Option<BindAddress>,

    /// Do not start while one of the two ports cannot be had, instead of trying on.
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
    pub bind_address_hard_fail: bool,

    /// Log more: -v what is done with each change, -vv every step, -vvv the libraries too. A
    /// number is a verbosity of kube-proxy: 4 and 5 are -v, 6 and 7 -vv, more -vvv.
    #[arg(
        short = 'v',
        alias = "v",
        value_name = "N",
        help_heading = "Observability",
        num_args = 0..=1,
        default_missing_value = "",
        value_parser = Verbose::parse
    )]
    pub verbose: Vec<Verbose>,

    /// kube-proxy's way to say the port of `--healthz-bind-address`, or nowhere by 0.
    #[arg(long, value_name = "PORT", hide = true)]
    pub healthz_port: Option<u16>,

    /// The same of `--metrics-bind-address`.
    #[arg(long, value_name = "PORT", hide = true)]
    pub metrics_port: Option<u16>,

    /// Flags of kube-proxy that have no effect.
    #[command(flatten)]
    pub ignored: Ignored,

    /// Write the log as text or as json.
    #[arg(
        long,
        alias = "logging-format",
        value_name = "text|json",
        help_heading = "Observability",
        default_value_t
    )]
    pub log_format: LogFormat,

    /// `nftables.syncPeriod` of the configuration file, which has no flag: how long a round of
    /// work may take before it counts as late, twice over.
    #[arg(skip)]
    pub sync_period: Option<Duration>,
}

impl Settings {
    /// Where the probes are answered, if anywhere.
    pub fn healthz_address(&self) -> Option<SocketAddr> {
        self.address(self.healthz_bind_address, self.healthz_port, &HEALTHZ)
    }

    /// Where the metrics are answered, if anywhere.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.address(self.metrics_bind_address, self.metrics_port, &METRICS)
    }

    /// How much is logged, from 0 to 3.
    pub fn verbosity(&self) -> u8 {
        Verbose::sum(&self.verbose)
    }

    /// On which of the node's addresses NodePorts answer.
    ///
    /// # Errors
    ///
    /// When `primary` stands beside ranges.
    pub fn nodeport_addresses(&self) -> Result<NodePortAddresses, Error> {
        let mut all = self.nodeport_addresses.iter();
        let mut sum = all.next().cloned().unwrap_or_default();
        for more in all {
            match (&mut sum, more) {
                (NodePortAddresses::Ranges(sum), NodePortAddresses::Ranges(more)) => {
                    sum.extend(more);
                }
                (NodePortAddresses::Primary, NodePortAddresses::Primary) => {}
                _ => return Err(Error::PrimaryAndRanges),
            }
        }
        Ok(sum)
    }

    /// The name of this node: the flag's, else that of the variable `NODE_NAME`, else the host's.
    /// Kubernetes knows nodes in lower case only.
    pub fn node_name(&self, env: Option<String>, hostname: &str) -> String {
        let given = [self.hostname_override.as_deref(), env.as_deref()];
        let mut names = given.into_iter().flatten().map(str::trim);
        names
            .find(|name| !name.is_empty())
            .unwrap_or(hostname.trim())
            .to_lowercase()
    }

    /// How traffic of pods is told.
    ///
    /// # Errors
    ///
    /// When the mode needs the name of an interface and there is none.
    pub fn detect_local(&self) -> Result<DetectLocal, Error> {
        let needed = |name: &Option<InterfaceName>, error| match name {
            Some(InterfaceName(name)) if !name.is_empty() => Ok(name.clone()),
            _ => Err(error),
        };
        Ok(match self.detect_local_mode {
            DetectLocalMode::ClusterCidr => {
                DetectLocal::ClusterCidr(self.cluster_cidr.as_slice().to_vec())
            }
            DetectLocalMode::NodeCidr => DetectLocal::NodeCidr,
            DetectLocalMode::BridgeInterface => {
                DetectLocal::BridgeInterface(needed(&self.pod_bridge_interface, Error::NoBridge)?)
            }
            DetectLocalMode::InterfaceNamePrefix => DetectLocal::InterfaceNamePrefix(needed(
                &self.pod_interface_name_prefix,
                Error::NoPrefix,
            )?),
        })
    }

    fn address(
        &self,
        given: Option<BindAddress>,
        port: Option<u16>,
        defaults: &Defaults,
    ) -> Option<SocketAddr> {
        if port == Some(0) {
            return None;
        }
        let port = port.unwrap_or(defaults.port);
        match given {
            Some(address) => address.resolve(port),
            // These runs are for looking, often beside a proxy that holds the ports.
            None if !self.manifests.is_empty() || self.dry_run || self.once => None,
            None => {
                let own = self.bind_address.map(|own| own.to_canonical());
                let address = match own {
                    Some(IpAddr::V6(_)) => IpAddr::V6(defaults.v6),
                    Some(IpAddr::V4(_)) | None => IpAddr::V4(defaults.v4),
                };
                Some(SocketAddr::new(address, port))
            }
        }
    }
}

#[cfg(test)]
mod tests;
