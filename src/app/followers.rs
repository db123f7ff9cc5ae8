//! Starts the followers, each on a thread of its own.

use std::sync::Arc;
use std::thread;

use tokio::sync::mpsc;

use super::metrics::Metrics;
use super::{Error, system};
use crate::followers::affinity::Forgetter;
use crate::followers::audited::{AuditCounters, AuditLog};
use crate::followers::connections::{self, Cutter};
use crate::followers::denied;
use crate::followers::drops::DropCounters;
use crate::followers::not_remembered::{self, NotRemembered};
use crate::netlink::{LogReader, Nftables};
use crate::policies::LOG_GROUP;
use crate::settings::{LogFormat, Settings};
use crate::sync::{Followers, LogAndSend, Query};

/// The number of queries that may wait for the main loop.
pub(super) const QUERIES: usize = 64;

/// Inputs that the followers provide.
#[derive(Default)]
pub(super) struct Observers {
    /// The NFLOG group whose packets are read.
    pub(super) log_group: Option<u16>,
}

/// The counters of policies that metrics and commands read.
#[derive(Clone, Default)]
pub(super) struct Counters {
    pub(super) drops: Option<Arc<DropCounters>>,
    pub(super) audit: Option<Arc<Audit>>,
}

/// What audited policies would deny.
pub(super) struct Audit {
    pub(super) counters: Arc<AuditCounters>,
    pub(super) log: AuditLog,
}

impl Counters {
    /// Creates the counters that the settings request.
    pub(super) fn new(args: &Settings, followers: &mut Followers, reporter: &LogAndSend) -> Self {
        let is_audited = is_on(args) && args.audit_annotations.is_on();
        Self {
            drops: is_on(args).then(|| DropCounters::new(followers.isolated())),
            audit: is_audited.then(|| {
                Arc::new(Audit {
                    counters: AuditCounters::new(followers.audited()),
                    log: AuditLog::new(reporter.clone()),
                })
            }),
        }
    }
}

/// Returns whether followers of policies run.
pub(super) fn is_on(args: &Settings) -> bool {
    args.network_policy.is_on() && !args.once
}

/// Starts the followers that the settings request. They end with the main loop or the process.
pub(super) fn start(
    args: &Settings,
    metrics: &Metrics,
    followers: &mut Followers,
    reporter: &LogAndSend,
    ask: &mpsc::Sender<Query>,
    counters: &Counters,
) -> Result<Observers, Error> {
    let mut observers = Observers::default();
    if !args.once && args.services.is_on() {
        forget(metrics, followers, reporter, ask.clone())?;
    }
    if !is_on(args) {
        return Ok(observers);
    }
    // A kernel without NFLOG would reject the rules that log, and the whole transaction with them.
    let reader = open_log(args);
    observers.log_group = reader.as_ref().map(|_| LOG_GROUP);
    if let Some(drops) = &counters.drops {
        drops.register(&metrics.registry)?;
    }
    if let Some(audit) = &counters.audit {
        audit.counters.register(&metrics.registry)?;
    }
    let (changes, strict) = (followers.policies(), args.network_policy_strict);
    let (judge, metrics) = (ask.clone(), metrics.followers.clone());
    let cut = move || {
        Cutter::new(connections::open, changes, judge, strict, &metrics).run();
    };
    spawn("cuts", "the thread that cuts connections", cut)?;
    if let Some(reader) = reader {
        let ask = ask.clone();
        let fields = args.log_format == LogFormat::Json;
        let audit = counters.audit.clone();
        let follow = move || {
            let nothing = AuditLog::default();
            let log = audit.as_ref().map_or(&nothing, |audit| &audit.log);
            denied::follow(reader, || LogReader::open(LOG_GROUP), &ask, log, fields);
        };
        spawn("denied", "the thread that logs packets", follow)?;
    }
    Ok(observers)
}

/// Starts the thread that removes stale session affinity and reports clients that cannot be
/// remembered.
fn forget(
    metrics: &Metrics,
    followers: &mut Followers,
    reporter: &LogAndSend,
    ask: mpsc::Sender<Query>,
) -> Result<(), Error> {
    let counted = NotRemembered::register(&metrics.registry, followers.sticky(), reporter.clone())?;
    let forgetter = Forgetter::new(Nftables::open, followers.services());
    let work = move || {
        forgetter.run(&ask, not_remembered::INTERVAL, || {
            counted.read();
        });
    };
    spawn("clients", "the thread that forgets clients", work)
}

/// Opens the reader of logged packets, if requested and possible.
fn open_log(args: &Settings) -> Option<LogReader> {
    let opened = args.logs_packets().then(|| LogReader::open(LOG_GROUP))?;
    let opened = opened.inspect_err(|error| {
        tracing::warn!("{error}; policies are enforced, packets are not logged");
    });
    opened.ok()
}

pub(super) fn spawn(
    name: &str,
    what: &'static str,
    work: impl FnOnce() + Send + 'static,
) -> Result<(), Error> {
    let thread = thread::Builder::new().name(name.into()).spawn(work);
    thread.map(drop).map_err(system(what))
}
