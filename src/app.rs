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
//! Writing to the kernel blocks, decoding objects and answering probes must not wait for it:
//! each has a thread with a single-threaded runtime.
//!
//! More threads wait for work: "flows" deletes stale UDP flows, "monitor" hears of changes that
//! others make to nftlet's tables, "audit" compares them now and then with what is wanted, "cuts"
//! removes connections that no policy allows any more, "clients" forgets those with session affinity
//! whose endpoint is gone, and where a flag asks for it "denied" hears of
//! denied packets. A last one, "leftovers", waits for the first rules, removes those of another
//! proxy, and looks for them again now and then.

mod clients;
mod configure;
mod descriptors;
mod drops;
mod dry_run;
mod leftovers;
mod monitor;
mod observe;
mod pages;
mod serve;
mod sysctls;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use thiserror::Error;
use tokio::runtime;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use self::pages::Pages;
use self::serve::Io;
use crate::engine::Engine as _;
use crate::events;
use crate::followers::affinity::Forgetter;
use crate::followers::conntrack::{self, Cleaner, KernelFlows};
use crate::followers::health_checks::HealthChecks;
use crate::host::{addresses, routes};
use crate::logging::Lines;
use crate::model::{Event, Kind, Node, NodePortAddresses, Notice, Object, Reason, Subject};
use crate::netlink::{self, Nftables};
use crate::nft::Ruleset;
use crate::policies::{self, Engine};
use crate::serve::health::{self, Checks, Health, Quota};
use crate::serve::metrics::Metrics;
use crate::services::Store;
use crate::services::{self, DetectLocal, MasqueradeBit};
use crate::settings::file;
use crate::settings::{self, Cleanup, CommandLine, LogFormat, Settings};
use crate::source::cluster::Error as ClusterError;
use crate::source::manifests::Error as ManifestsError;
use crate::source::{Cluster, Manifests};
use crate::sync::{
    self, Audits, Exit, Followers, Log, LogAndSend, Reconciler, Reporter as _, Signals,
};

/// The oldest kernel nftlet works on, as kube-proxy's nftables mode.
const OLDEST_KERNEL: (u32, u32) = (5, 13);
/// Events that may wait between the source and the reconciler.
const QUEUE: usize = 4096;

/// Why nftlet ended without having done what it was asked for.
#[derive(Debug, Error)]
pub(crate) enum Error {
    /// Arguments that do not go together.
    #[error(transparent)]
    Arguments(#[from] settings::Error),
    /// The configuration file cannot be used.
    #[error(transparent)]
    Configuration(#[from] file::Error),
    /// The settings cannot be written.
    #[error("cannot write the configuration to {}: {source}", path.display())]
    WriteConfiguration {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
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
    /// Too few files can be open.
    #[error(
        "cannot open {needed} files at once: {source}; allow nftlet more with ulimit -n or LimitNOFILE= of its unit"
    )]
    Descriptors {
        /// How many are needed.
        needed: usize,
        /// What the system said.
        source: io::Error,
    },
    /// What was asked for cannot be printed.
    #[error("cannot print: {0}")]
    Print(#[source] io::Error),
    /// With `--cleanup`: something stays.
    #[error("not everything could be removed; the messages above say what stays")]
    NotCleaned,
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

impl Error {
    /// 2 for settings that make no sense, 1 for everything else.
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Arguments(_) | Self::Configuration(_) => ExitCode::from(2),
            _ => ExitCode::FAILURE,
        }
    }
}

/// Does what the command line says and tells on standard error what kept it from that. Exits
/// with 2 for a command line or a configuration that makes no sense, and with 1 for every other
/// error.
pub fn main() -> ExitCode {
    let log = match Lines::start(io::stderr()) {
        Ok(log) => log,
        Err(error) => {
            let error = system("the thread that writes the log")(error);
            let _ = writeln!(io::stderr(), "nftlet: {error}");
            return error.exit_code();
        }
    };
    log.take_panics();
    let code = match CommandLine::parse(std::env::args_os()) {
        Ok(line) => ended(run(line, &log), &log),
        Err(error) if error.use_stderr() => {
            let error = settings::one_line(&error);
            log.add(format!("{error} (nftlet --help shows all flags)\n").as_bytes());
            ExitCode::from(2)
        }
        // Help or the version was asked for.
        Err(asked) => ended(print(|out| help(&asked, out)), &log),
    };
    log.flush();
    code
}

/// Says why it did not end well.
fn ended(result: Result<(), Error>, log: &Lines) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log.add(format!("nftlet: {error}\n").as_bytes());
            error.exit_code()
        }
    }
}

/// Writes what was asked for in place of work, with colours where a person reads it.
fn help(asked: &clap::Error, out: &mut dyn Write) -> io::Result<()> {
    let text = asked.render();
    if io::stdout().is_terminal() {
        write!(out, "{}", text.ansi())
    } else {
        write!(out, "{text}")
    }
}

/// Runs nftlet as the command line says. The rules stay in the kernel when it returns.
///
/// # Errors
///
/// Everything that keeps nftlet from starting, and for `--dry-run` and `--once` everything that
/// keeps them from being done.
fn run(mut line: CommandLine, log: &Lines) -> Result<(), Error> {
    if let Some(command) = line.command {
        return print(|mut out| command.print(&mut out));
    }
    let cleanup = line.settings.cleanup;
    if let Some(cleanup) = cleanup.filter(|asked| *asked != Cleanup::Nothing) {
        // Whatever the configuration says, and whether it can be read.
        start_logging(&line.settings, log);
        return leftovers::clean(cleanup);
    }
    let file = configure::read(&mut line)?;
    let args = &line.settings;
    start_logging(args, log);
    configure::tell(&line, file.as_ref());
    let node_name = args.node_name(std::env::var("NODE_NAME").ok(), &host_name());
    let settings = settings(args)?;
    if let Some(path) = &args.write_config_to {
        return configure::write(args, path);
    }
    if args.init_only {
        sysctls::initialise(args);
        return Ok(());
    }
    let descriptors = descriptors::raise();
    configure::check_descriptors()?;
    if args.dry_run {
        return dry_run::run(args, &node_name, &settings);
    }
    check_kernel()?;
    let mut nftables = Nftables::open()?;
    // The first answer tells about permissions and a missing nf_tables before anything else.
    nftables.read(&[], &Ruleset::default())?;
    let metrics = Arc::new(Metrics::new()?);
    metrics.expect_notices(Reason::ALL.map(Reason::as_str));
    let health = Health::new(args.sync_period());
    if args.network_policy.is_on() {
        health.expect_policies();
    } else {
        metrics.without_policies()?;
    }
    let (delivered, received) = mpsc::channel(QUEUE);
    let (stop, stopped) = watch::channel(false);
    let (ready, started) = oneshot::channel();
    let (health_checks, wanted_checks) = watch::channel(Checks::new());
    let mut followers = Followers::default();
    let own_name = node_name.clone();
    // Where nobody reads the notices they are dropped.
    let (sender, notices) = mpsc::channel(events::QUEUE);
    let reporter = LogAndSend::new(sender);
    let (freed, bell) = std::sync::mpsc::channel();
    // Before anything that asks over the network.
    if let Err(error) = sync::remove_foreign_hooks(&mut nftables, &metrics, &reporter) {
        reporter.failed(&error);
    }
    let io = Io {
        args: args.clone(),
        file,
        pages: Pages::new(&line),
        node_name,
        log: log.clone(),
        metrics: metrics.clone(),
        health: health.clone(),
        health_checks: wanted_checks,
        quota: Quota::of(descriptors),
        isolated: followers.isolated(),
        stop,
        stopped: stopped.clone(),
        reporter: reporter.clone(),
        notices,
        freed,
    };
    let io = thread::Builder::new()
        .name("io".into())
        .spawn(move || io.run(delivered, ready))
        .map_err(system("the I/O thread"))?;
    // The sender is dropped without a message only if the thread panicked.
    let stats = started.blocking_recv().unwrap_or(Err(Error::SourceEnded))?;
    let mut ready = Vec::new();
    let settings_thread = sysctls::start(args, &metrics, &reporter, &mut ready)?;
    if !args.once {
        configure::set_oom_score(args);
    }
    let observers = observe::start(args, &metrics, &mut followers, &reporter)?;
    // The end of the process would cut it short.
    let forgetter = args
        .once
        .then(|| Forgetter::new(Nftables::open, followers.services()));
    let pending = conntrack::Pending::new(followers.services());
    let flows = start_cleaner(pending, metrics.clone())?;
    let changes = followers.services();
    let publish = move || HealthChecks::new(health_checks).run(&changes);
    observe::spawn("health-checks", "the thread for health checks", publish)?;
    let foreign = Arc::new(Notify::new());
    let mut audits = None;
    if !args.once {
        let (told, begin) = oneshot::channel();
        ready.push(told);
        monitor::start(&mut nftables, begin, foreign.clone())?;
        let audited = Audits::start(Nftables::open()?, sync::AUDIT_EVERY);
        audits = Some(audited.map_err(system("the thread that compares rules"))?);
    }
    if !args.once && !args.keep_kube_proxy {
        let (told, begin) = oneshot::channel();
        ready.push(told);
        leftovers::start(begin, bell)?;
    }
    let mut reconciler = Reconciler::new(nftables, settings, &metrics, &reporter)
        .with_fallback_node(fallback_node(&own_name))
        .with_policies(policies(args, &own_name, observers.log_group))
        .with_followers(followers);
    if let Some(stats) = stats {
        reconciler = reconciler.with_source_stats(stats);
    }
    let signals = Signals {
        stop: stopped,
        once: args.once,
        foreign,
        audits,
        ready,
        questions: observers.questions,
    };
    let exit = single_threaded()?.block_on(sync::run(&mut reconciler, received, signals, &health));
    if let Some(mut forgetter) = forgetter {
        forgetter.work(|transaction, version| reconciler.remove(transaction, version));
    }
    let summary = summary(reconciler.store(), reconciler.policies());
    // The cleaner ends when its queue goes away, after what is in it.
    drop(reconciler);
    let _ = flows.join();
    reporter.log_last_counts();
    match exit {
        Exit::Programmed => {
            // The end of the process would cut it short.
            let _ = settings_thread.map(thread::JoinHandle::join);
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

fn start_logging(args: &Settings, log: &Lines) {
    use tracing_subscriber::filter::{EnvFilter, LevelFilter};
    let level = match args.verbosity() {
        0 => LevelFilter::INFO,
        1 => LevelFilter::DEBUG,
        2.. => LevelFilter::TRACE,
    };
    // The libraries' own debug output is of interest only when everything is asked for.
    let filter = if args.verbosity() < 3 {
        // The HTTP client says each failed request; the source tells of the server once.
        EnvFilter::new(format!("error,kube_client=off,nftlet={level}"))
    } else {
        EnvFilter::new("trace")
    };
    let logging = tracing_subscriber::fmt()
        .with_writer(log.clone())
        // It would say what is wrong with a line on standard error.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal())
        .with_target(args.verbosity() > 0)
        .with_env_filter(filter);
    // A second call (in tests) keeps the first subscriber.
    let _ = match args.log_format {
        LogFormat::Text => logging.try_init(),
        LogFormat::Json => logging.json().try_init(),
    };
}

fn settings(args: &Settings) -> Result<services::ServiceSettings, Error> {
    Ok(services::ServiceSettings {
        detect_local: match args.detect_local()? {
            settings::DetectLocal::ClusterCidr(ranges) => DetectLocal::ClusterCidr(ranges),
            settings::DetectLocal::NodeCidr => DetectLocal::NodeCidr,
            settings::DetectLocal::BridgeInterface(name) => {
                DetectLocal::BridgeInterface(name.into())
            }
            settings::DetectLocal::InterfaceNamePrefix(prefix) => {
                DetectLocal::InterfaceNamePrefix(prefix.into())
            }
        },
        masquerade_all: args.masquerade_all,
        nodeport_addresses: match args.nodeport_addresses()? {
            settings::NodePortAddresses::Primary => NodePortAddresses::Primary,
            settings::NodePortAddresses::Ranges(ranges) => NodePortAddresses::Inside(ranges),
        },
        bind_address: args.bind_address.filter(|ip| !ip.is_unspecified()),
        masquerade_bit: MasqueradeBit::new(args.masquerade_bit).unwrap_or_default(),
    })
}

/// Prints to standard output.
fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Error> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    write(&mut out)
        .and_then(|()| out.flush())
        .or_else(|error| match error.kind() {
            // The reader of a pipe has seen enough.
            io::ErrorKind::BrokenPipe => Ok(()),
            _ => Err(Error::Print(error)),
        })
}

/// Compiles the policies, or keeps their tables away.
fn policies(args: &Settings, node_name: &str, log_group: Option<u16>) -> Engine {
    let settings = policies::PolicySettings {
        node: node_name.into(),
        strict: args.network_policy_strict,
        log_group,
    };
    if args.network_policy.is_on() {
        Engine::new(settings).with_links(routes::find)
    } else {
        Engine::off(settings)
    }
}

fn host_name() -> String {
    let uname = rustix::system::uname();
    uname.nodename().to_string_lossy().into_owned()
}

/// What is used of a node whose object is missing: its name, by which endpoints are local, and the
/// host's addresses.
fn fallback_node(name: &str) -> Node {
    Node {
        name: name.into(),
        internal_ips: addresses::global(),
        external_ips: Vec::new(),
        pod_cidrs: Vec::new(),
        zone: None,
        going_away: false,
    }
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

/// What is known, in one line.
fn summary(store: &Store, policies: Option<&Engine>) -> String {
    let count = |kind: Kind| store.count(kind);
    let mut summary = format!(
        "{} services, {} endpoint slices, {} service ranges, node {}",
        count(Kind::Service),
        count(Kind::EndpointSlice),
        count(Kind::ServiceCidr),
        store.node().map_or("unknown", |node| &*node.name)
    );
    let policies = policies.map_or(0, |policies| policies.count(Kind::NetworkPolicy));
    if policies > 0 {
        summary.push_str(&format!(", {policies} network policies"));
    }
    summary
}

fn manifests(args: &Settings, node_name: &str) -> Option<Manifests> {
    (!args.manifests.is_empty()).then(|| {
        Manifests::new(args.manifests.clone(), node_name.to_owned())
            .with_network_policies(args.network_policy.is_on())
            .with_allow_empty(args.allow_empty || args.dry_run)
    })
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

async fn connect(args: &Settings, node_name: &str) -> Result<Cluster, Error> {
    let (kubeconfig, server) = (args.kubeconfig.clone(), args.master.clone());
    Cluster::connect(kubeconfig, server, node_name.to_owned())
        .await
        .map(|cluster| cluster.with_network_policies(args.network_policy.is_on()))
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
