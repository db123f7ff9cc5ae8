//! The agent: connects the parts, runs the controller, and ends with it.

use std::sync::Arc;
use std::thread::JoinHandle;

use serde_json::json;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::followers::Counters;
use super::io_thread::IoThread;
use super::metrics::Metrics;
use super::objects::{fallback_node, policy_engine, summary};
use super::{
    Error, QUEUE, configure, followers, kube_proxy_cleanup, monitor, routes, single_threaded,
    sysctls, system,
};
use crate::events;
use crate::followers::FollowerMetrics;
use crate::followers::affinity::Forgetter;
use crate::followers::conntrack::{self, Cleaner, KernelFlows};
use crate::followers::health_checks::HealthChecks;
use crate::logging::LogQueue;
use crate::model::Delivery;
use crate::netlink::{Needs, Nftables};
use crate::nft::Ruleset;
use crate::serve::checks::{Checks, Quota};
use crate::serve::health::Health;
use crate::serve::pages::Pages;
use crate::services;
use crate::settings::file::{self, File};
use crate::settings::{CommandLine, Settings};
use crate::source::SourceStats;
use crate::sync::{
    self, Audits, Controller, Exit, Followers, Log, LogAndSend, Reporter as _, Signals,
};

pub(super) struct Start<'a> {
    pub line: &'a CommandLine,
    pub file: Option<File>,
    pub node_name: String,
    pub service_settings: services::ServiceSettings,
    /// The limit of open files.
    pub descriptors: usize,
    pub log: &'a LogQueue,
}

/// Keeps the kernel's rules up to date until a signal stops it; with `--once` until the rules of
/// the first complete lists are in force.
pub(super) fn run(start: Start) -> Result<(), Error> {
    let settings = &start.line.settings;
    let mut nftables = open_nftables(settings)?;
    let metrics = Metrics::register(start.log)?;
    let health = health(settings, &metrics)?;
    let (sender, notices) = mpsc::channel(events::QUEUE);
    let reporter = LogAndSend::new(sender, metrics.sync.clone());
    // First of all: a foreign chain could block nftlet's own requests over the network.
    if let Err(error) = sync::remove_foreign_base_chains(&mut nftables, &metrics.sync, &reporter) {
        reporter.failed(&error);
    }
    let mut followers = Followers::default();
    let (delivered, received) = mpsc::channel(QUEUE);
    if settings.network_policy.is_on() {
        // Before any object, so that the first rules have them.
        routes::start(&delivered, settings.once)?;
    }
    let (stop, stopped) = watch::channel(false);
    let (freed, port_freed) = std::sync::mpsc::channel();
    let (publish_checks, health_checks) = watch::channel(Checks::new());
    let counters = Counters::new(settings, &mut followers, &reporter);
    let (ask, queries) = mpsc::channel(followers::QUERIES);
    let queries = (!settings.once).then_some(queries);
    let io = IoThread {
        ask: ask.clone(),
        counters: counters.clone(),
        server: None,
        args: settings.clone(),
        flags: start.line.without_field(),
        file: start.file,
        pages: Pages::new(
            json!({ file::GROUP: file::effective(settings) }),
            start.line.values(),
        ),
        node_name: start.node_name.clone(),
        metrics: metrics.clone(),
        health: health.clone(),
        health_checks,
        quota: Quota::of(start.descriptors),
        isolated: followers.isolated(),
        stop,
        stopped: stopped.clone(),
        reporter: reporter.clone(),
        notices,
        freed,
    };
    let (io, stats) = start_io(io, delivered)?;

    // What waits for the first rules.
    let mut ready = Vec::new();
    let has_services = settings.services.is_on();
    let sysctls = if has_services {
        sysctls::start(settings, &reporter, &mut ready)?
    } else {
        None
    };
    if !settings.once {
        configure::set_oom_score(settings);
    }
    let observers = followers::start(
        settings,
        &metrics,
        &mut followers,
        &reporter,
        &ask,
        &counters,
    )?;
    // With --once the process would end before the thread of the follower has worked.
    let affinity = (settings.once && has_services)
        .then(|| Forgetter::new(Nftables::open, followers.services()));
    let mut cleaner = None;
    if has_services {
        cleaner = Some(start_cleaner(&mut followers, metrics.followers.clone())?);
        let changes = followers.services();
        followers::spawn("health-checks", "the thread for health checks", move || {
            HealthChecks::new(publish_checks).run(&changes);
        })?;
    }
    let foreign = Arc::new(Notify::new());
    let missed = Arc::new(Notify::new());
    let mut audits = None;
    if !settings.once {
        monitor::start(
            &mut nftables,
            first_rules(&mut ready),
            foreign.clone(),
            missed.clone(),
        )?;
        let audit = Audits::start(Nftables::open()?);
        audits = Some(audit.map_err(system("the thread that compares rules"))?);
        if has_services && !settings.keep_kube_proxy {
            kube_proxy_cleanup::start(first_rules(&mut ready), port_freed)?;
        }
    }

    let mut controller =
        Controller::new(nftables, start.service_settings, &metrics.sync, &reporter)
            .with_fallback_node(fallback_node(&start.node_name))
            .with_policies(policy_engine(
                settings,
                &start.node_name,
                observers.log_group,
            )?)
            .with_followers(followers);
    if let Some(audits) = &audits {
        controller = controller.with_reader(audits.reader());
    }
    if let Some(stats) = stats {
        controller = controller.with_source_stats(stats);
    }
    let signals = Signals {
        stop: stopped,
        once: settings.once,
        foreign,
        missed,
        audits,
        ready,
        queries,
    };
    let exit = single_threaded()?.block_on(sync::run(&mut controller, received, signals, &health));

    if let Some(mut affinity) = affinity {
        affinity.work(|transaction, version| controller.remove(transaction, version));
    }
    let summary = summary(controller.store(), controller.policies(), settings);
    // This closes the cleaner's channel; it works off what is in it.
    drop(controller);
    let _ = cleaner.map(JoinHandle::join);
    reporter.log_last_counts();
    match exit {
        Exit::Programmed => {
            let _ = sysctls.map(JoinHandle::join);
            tracing::info!("{summary}");
            Ok(())
        }
        Exit::Stopped => {
            let _ = io.join();
            if settings.once {
                return Err(Error::Interrupted);
            }
            tracing::info!("stopped; the rules stay in force");
            Ok(())
        }
        Exit::Failed => Err(Error::NotProgrammed),
        Exit::SourcesGone => Err(Error::SourceEnded),
        Exit::NoPodNetwork => Err(Error::NoPodNetwork(start.node_name)),
    }
}

/// Opens nftables, so that a missing capability or kernel module is reported before anything else.
fn open_nftables(settings: &Settings) -> Result<Nftables, Error> {
    let mut nftables = Nftables::open()?;
    nftables.read(&[], &Ruleset::default())?;
    nftables.require(Needs {
        services: settings.services.is_on(),
        policies: settings.network_policy.is_on(),
    })?;
    Ok(nftables)
}

fn health(settings: &Settings, metrics: &Metrics) -> Result<Health, Error> {
    let health = Health::new(settings.sync_period());
    if settings.network_policy.is_on() {
        health.expect_policies();
    } else {
        metrics.sync.without_policies(&metrics.registry)?;
    }
    Ok(health)
}

/// Starts the I/O thread, and waits until its ports are open and its source is connected.
fn start_io(
    io: IoThread,
    events: mpsc::Sender<Delivery>,
) -> Result<(JoinHandle<()>, Option<Arc<SourceStats>>), Error> {
    let (ready, started) = oneshot::channel();
    let thread = std::thread::Builder::new()
        .name("io".into())
        .spawn(move || io.run(events, ready))
        .map_err(system("the I/O thread"))?;
    // The thread drops the sender without a message only if it panics.
    let stats = started.blocking_recv().unwrap_or(Err(Error::SourceEnded))?;
    Ok((thread, stats))
}

/// Starts the thread that deletes stale conntrack entries of UDP. Reading a large conntrack table
/// takes long, and changes of the rules must not wait for it.
fn start_cleaner(
    followers: &mut Followers,
    metrics: FollowerMetrics,
) -> Result<JoinHandle<()>, Error> {
    let pending = conntrack::Pending::new(followers.services());
    std::thread::Builder::new()
        .name("flows".into())
        .spawn(move || Cleaner::new(KernelFlows::open, pending, &metrics, &Log).run())
        .map_err(system("the thread for UDP flows"))
}

/// Returns a channel that receives a message once the first rules are in force.
fn first_rules(ready: &mut Vec<oneshot::Sender<()>>) -> oneshot::Receiver<()> {
    let (sender, receiver) = oneshot::channel();
    ready.push(sender);
    receiver
}
