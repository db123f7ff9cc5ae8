//! The composition root: wires sources, reconciler, kernel and HTTP ports by the command line.
//!
//! ```text
//!  thread "nftlet"                      thread "io"
//!  ┌───────────────────────┐  events   ┌─────────────────────────────────────┐
//!  │ Reconciler ─> Nftables │ <──────── │ source (cluster or manifests)        │
//!  │ blocks in sendmsg      │           │ HTTP ports, signals                  │
//!  └───────────────────────┘           └─────────────────────────────────────┘
//! ```
//!
//! Two more threads wait for work: "flows" deletes stale UDP flows, "monitor" hears of changes that
//! others make to nftlet's tables.
//!
//! Writing to the kernel blocks, decoding objects and answering probes must not wait for it:
//! each has a thread with a single-threaded runtime. A third thread, "flows", deletes UDP flows
//! that a change of the rules left stale.

mod dry_run;
mod serve;

use std::io::{self, IsTerminal};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use clap::Parser;
use thiserror::Error;
use tokio::runtime;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use self::serve::Io;
use crate::cli::{self, Args, LogFormat};
use crate::compile::{DetectLocal, NodePortAddresses, Settings, TABLE};
use crate::health::{self, Checks, Health};
use crate::metrics::Metrics;
use crate::model::{Event, Kind, Node, Notice, Object, Reason, Store, Subject};
use crate::netlink::{self, Heard, Monitor, Nftables};
use crate::reconcile::conntrack::{self, Cleaner, KernelFlows};
use crate::reconcile::{self, Exit, Log, Reconciler, Signals};
use crate::ruleset::Ruleset;
use crate::source::cluster::Error as ClusterError;
use crate::source::manifests::Error as ManifestsError;
use crate::source::{Cluster, Manifests};
use crate::sysctl;

/// The oldest kernel nftlet works on, as kube-proxy's nftables mode.
const OLDEST_KERNEL: (u32, u32) = (5, 13);
/// Events that may wait between the source and the reconciler.
const QUEUE: usize = 4096;

/// Why nftlet ended without having done what it was asked for.
#[derive(Debug, Error)]
pub enum Error {
    /// Arguments that do not go together.
    #[error(transparent)]
    Arguments(#[from] cli::Error),
    /// The kernel cannot be worked with.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    /// The kernel is too old.
    #[error(
        "this kernel is Linux {found}; nftlet needs {}.{} or newer for what it asks of nftables",
        OLDEST_KERNEL.0, OLDEST_KERNEL.1
    )]
    OldKernel {
        /// Its release as it calls itself.
        found: String,
    },
    /// The manifests cannot be read.
    #[error(transparent)]
    Manifests(#[from] ManifestsError),
    /// There is no API server to talk to.
    #[error("{0}")]
    Cluster(#[source] ClusterError),
    /// Neither a cluster nor manifests.
    #[error(
        "{0}; name one with --kubeconfig FILE, or work without a cluster with --manifests PATH"
    )]
    NoSource(#[source] ClusterError),
    /// An HTTP port cannot be opened.
    #[error(transparent)]
    Http(#[from] health::Error),
    /// The metrics cannot be registered.
    #[error("cannot set up metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The system refused a thread, a runtime or a signal handler.
    #[error("cannot start {what}: {source}")]
    System {
        /// What was to be started.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The ruleset cannot be printed.
    #[error("cannot print the rules: {0}")]
    Print(#[source] io::Error),
    /// With `--once`: the rules could not be written.
    #[error("the rules could not be written; the messages above say why")]
    NotProgrammed,
    /// With `--once`: a signal came first.
    #[error("stopped before the rules were written; those in force stay")]
    Interrupted,
    /// The source ended by itself.
    #[error("the source of objects ended unexpectedly; the rules in force stay")]
    SourceEnded,
}

/// Does what the command line says and tells on standard error what kept it from that. Exits
/// with 2 for a command line that makes no sense, and with 1 for every other error.
pub fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nftlet: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs nftlet as the command line says. The rules stay in the kernel when it returns.
///
/// # Errors
///
/// Everything that keeps nftlet from starting, and for `--dry-run` and `--once` everything that
/// keeps them from being done.
pub fn run(args: &Args) -> Result<(), Error> {
    start_logging(args);
    let node_name = args.node_name(std::env::var("NODE_NAME").ok(), &host_name());
    let settings = settings(args)?;
    if args.dry_run {
        return dry_run::run(args, &node_name, &settings);
    }
    check_kernel()?;
    let mut nftables = Nftables::open()?;
    // The first answer tells about permissions and a missing nf_tables before anything else.
    nftables.read(&[], &Ruleset::default())?;
    let metrics = Arc::new(Metrics::new()?);
    let health = Health::new(health::PERIOD);
    let (events, received) = mpsc::channel(QUEUE);
    let (stop, stopped) = watch::channel(false);
    let (ready, started) = oneshot::channel();
    let (health_checks, wanted_checks) = watch::channel(Checks::new());
    let stand_in_name = node_name.clone();
    let io = Io {
        args: args.clone(),
        node_name,
        metrics: metrics.clone(),
        health: health.clone(),
        health_checks: wanted_checks,
        stop,
        stopped: stopped.clone(),
    };
    let io = thread::Builder::new()
        .name("io".into())
        .spawn(move || io.run(events, ready))
        .map_err(system("the I/O thread"))?;
    // The sender is dropped without a message only if the thread panicked.
    started.blocking_recv().unwrap_or(Err(Error::SourceEnded))?;
    track_connections(args);
    let reporter = Log;
    let (cleaner, pending) = conntrack::queue();
    let flows = start_cleaner(pending, metrics.clone())?;
    let foreign = Arc::new(Notify::new());
    let (ready, begin) = oneshot::channel();
    if !args.once {
        start_monitor(&nftables, begin, foreign.clone())?;
    }
    let mut reconciler = Reconciler::new(nftables, settings, &metrics, &reporter)
        .with_stand_in(stand_in(&stand_in_name))
        .with_cleaner(cleaner)
        .with_health_checks(health_checks);
    let signals = Signals {
        stop: stopped,
        once: args.once,
        foreign,
        ready: Some(ready),
    };
    let exit =
        single_threaded()?.block_on(reconcile::run(&mut reconciler, received, signals, &health));
    let summary = summary(reconciler.store());
    // The cleaner ends when its queue goes away, after what is in it.
    drop(reconciler);
    let _ = flows.join();
    match exit {
        Exit::Programmed => {
            tracing::info!("{summary}");
            Ok(())
        }
        Exit::Stopped => {
            let _ = io.join();
            if args.once {
                return Err(Error::Interrupted);
            }
            tracing::info!("stopped; the rules stay in force");
            Ok(())
        }
        Exit::Failed => Err(Error::NotProgrammed),
        Exit::SourcesGone => Err(Error::SourceEnded),
    }
}

/// Starts the thread that hears of changes that others make to nftlet's tables. It ends with the
/// process. Without the news nftlet works, but heals only what it meets.
fn start_monitor(
    own: &Nftables,
    begin: oneshot::Receiver<()>,
    foreign: Arc<Notify>,
) -> Result<(), Error> {
    let mut monitor = match Monitor::open(&[TABLE], own) {
        Ok(monitor) => monitor,
        Err(error) => {
            tracing::warn!("{error}; changes that others make to the rules are not noticed");
            return Ok(());
        }
    };
    let listen = move || {
        if begin.blocking_recv().is_err() {
            return;
        }
        if let Err(error) = monitor.listen() {
            tracing::warn!("{error}; changes that others make to the rules are not noticed");
            return;
        }
        loop {
            match monitor.wait() {
                Ok(Heard::Change | Heard::Lost) => foreign.notify_one(),
                Err(error) => {
                    tracing::warn!("{error}; changes of others are not noticed any more");
                    return;
                }
            }
        }
    };
    thread::Builder::new()
        .name("monitor".into())
        .spawn(listen)
        .map(drop)
        .map_err(system("the thread that hears of foreign changes"))
}

/// Starts the thread that deletes stale UDP flows: listing flows takes long where there are many,
/// and the next change of the rules must not wait for it.
fn start_cleaner(
    pending: conntrack::Pending,
    metrics: Arc<Metrics>,
) -> Result<thread::JoinHandle<()>, Error> {
    thread::Builder::new()
        .name("flows".into())
        .spawn(move || Cleaner::new(KernelFlows::open, pending, &metrics, &Log).run())
        .map_err(system("the thread for UDP flows"))
}

fn system(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::System { what, source }
}

fn single_threaded() -> Result<runtime::Runtime, Error> {
    runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(system("a runtime"))
}

fn start_logging(args: &Args) {
    use tracing_subscriber::filter::{EnvFilter, LevelFilter};
    let level = match args.verbose {
        0 => LevelFilter::INFO,
        1 => LevelFilter::DEBUG,
        2.. => LevelFilter::TRACE,
    };
    // The libraries' own debug output is of interest only when everything is asked for.
    let filter = if args.verbose < 3 {
        // The HTTP client says each failed request; the source tells of the server once.
        EnvFilter::new(format!("error,kube_client=off,nftlet={level}"))
    } else {
        EnvFilter::new("trace")
    };
    let logging = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(args.verbose > 0)
        .with_env_filter(filter);
    // A second call (in tests) keeps the first subscriber.
    let _ = match args.log_format {
        LogFormat::Text => logging.try_init(),
        LogFormat::Json => logging.json().try_init(),
    };
}

fn settings(args: &Args) -> Result<Settings, Error> {
    Ok(Settings {
        detect_local: match args.detect_local()? {
            cli::DetectLocal::ClusterCidr(ranges) => DetectLocal::ClusterCidr(ranges),
            cli::DetectLocal::NodeCidr => DetectLocal::NodeCidr,
            cli::DetectLocal::BridgeInterface(name) => DetectLocal::BridgeInterface(name.into()),
            cli::DetectLocal::InterfaceNamePrefix(prefix) => {
                DetectLocal::InterfaceNamePrefix(prefix.into())
            }
        },
        masquerade_all: args.masquerade_all,
        nodeport_addresses: match &args.nodeport_addresses {
            cli::NodePortAddresses::Primary => NodePortAddresses::Primary,
            cli::NodePortAddresses::Ranges(ranges) => NodePortAddresses::Inside(ranges.clone()),
        },
        bind_address: args.bind_address.filter(|ip| !ip.is_unspecified()),
    })
}

/// Makes the kernel settings of connection tracking that a flag asks for.
fn track_connections(args: &Args) {
    let flags = &args.conntrack;
    let asked = sysctl::Conntrack {
        max_per_core: flags.conntrack_max_per_core.unwrap_or_default(),
        min: flags.conntrack_min,
        tcp_established: flags.conntrack_tcp_timeout_established.unwrap_or_default(),
        tcp_close_wait: flags.conntrack_tcp_timeout_close_wait.unwrap_or_default(),
        tcp_be_liberal: flags.conntrack_tcp_be_liberal,
        udp: flags.conntrack_udp_timeout.unwrap_or_default(),
        udp_stream: flags.conntrack_udp_timeout_stream.unwrap_or_default(),
    };
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    for unset in sysctl::apply(Path::new("/"), &asked.wanted(cores)) {
        tracing::warn!("{unset}");
    }
}

fn host_name() -> String {
    let uname = rustix::system::uname();
    uname.nodename().to_string_lossy().into_owned()
}

/// What is used of a node whose object is missing: its name, by which endpoints are local, and the
/// host's addresses.
fn stand_in(name: &str) -> Node {
    Node {
        name: name.into(),
        internal_ips: host_addresses(),
        external_ips: Vec::new(),
        pod_cidrs: Vec::new(),
        zone: None,
        going_away: false,
    }
}

/// The host's own global addresses.
fn host_addresses() -> Vec<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else {
        return Vec::new();
    };
    let addresses = interfaces.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    });
    let global = |address: &IpAddr| match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    };
    addresses.filter(global).collect()
}

fn check_kernel() -> Result<(), Error> {
    check_release(&rustix::system::uname().release().to_string_lossy())
}

fn check_release(release: &str) -> Result<(), Error> {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) < OLDEST_KERNEL => Err(Error::OldKernel {
            found: release.to_owned(),
        }),
        // A kernel that does not say its version may well work.
        _ => Ok(()),
    }
}

fn summary(store: &Store) -> String {
    let count = |kind: Kind| store.count(kind);
    format!(
        "{} services, {} endpoint slices, {} service ranges, node {}",
        count(Kind::Service),
        count(Kind::EndpointSlice),
        count(Kind::ServiceCidr),
        store.node().map_or("unknown", |node| &*node.name)
    )
}

/// The path by which the manifests source knows standard input.
const STANDARD_INPUT: &str = "-";

fn manifests(args: &Args, node_name: &str) -> Option<Manifests> {
    let paths: Vec<PathBuf> = args
        .manifests
        .iter()
        .map(|source| match source {
            cli::Manifests::StandardInput => PathBuf::from(STANDARD_INPUT),
            cli::Manifests::Path(path) => path.clone(),
        })
        .collect();
    (!paths.is_empty()).then(|| Manifests::new(paths, node_name.to_owned()))
}

/// Reads the manifests, and warns where they do not tell about the own node.
fn load(manifests: &mut Manifests, node_name: &str) -> Result<Vec<Event>, Error> {
    let mut events = manifests.load()?;
    let known = events
        .iter()
        .any(|event| matches!(event, Event::Apply(Object::Node(_))));
    if !known {
        events.push(Event::Notice(Notice {
            subject: Subject::Other(format!("Node {node_name}").into()),
            reason: Reason::NodeMissing,
            message: "the manifests hold no such Node; NodePorts answer on this host's first \
                      address of each family (name another node with --hostname-override)"
                .into(),
        }));
    }
    Ok(events)
}

async fn connect(args: &Args, node_name: &str) -> Result<Cluster, Error> {
    Cluster::connect(args.kubeconfig.clone(), node_name.to_owned())
        .await
        .map_err(|error| match error {
            ClusterError::NoCluster => Error::NoSource(error),
            other => Error::Cluster(other),
        })
}

#[cfg(test)]
mod tests {
    use super::check_release;

    #[test]
    fn kernels_that_are_too_old_are_named() {
        for release in [
            "5.13.0",
            "6.1.0-13-amd64",
            "10.0",
            "6.18.44-fc-v445",
            "unknown",
            "",
        ] {
            assert!(check_release(release).is_ok(), "{release}");
        }
        for release in ["5.12.19", "4.19.0-25-amd64", "5.4"] {
            let error = check_release(release).unwrap_err().to_string();
            let expected = format!("this kernel is Linux {release}; nftlet needs 5.13 or newer");
            assert!(error.starts_with(&expected), "{error}");
        }
    }
}
