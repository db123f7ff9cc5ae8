//! What hangs around the network policies: who cuts connections, who tells of denied packets,
//! who counts these, and who looks after bridges; and who forgets clients with session affinity.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::drops::{self, Totals};
use super::{Error, clients, system};
use crate::followers::affinity::Forgetter;
use crate::followers::connections::{self, Cutter};
use crate::followers::denied;
use crate::host::addresses;
use crate::host::bridges::{BridgeChange, BridgeWatch};
use crate::model::{Notice, Reason, Subject};
use crate::netlink::{LogReader, Nftables};
use crate::policies::Isolated;
use crate::policies::LOG_GROUP;
use crate::serve::metrics::Metrics;
use crate::settings::{LogFormat, Settings};
use crate::sync::{Followers, LogAndSend, Query, Reporter};

/// Questions that may wait for the controller.
const QUESTIONS: usize = 64;
/// How often bridges are looked at although the isolated pods are the same.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// What the controller and its loop need to know of those around.
#[derive(Default)]
pub(super) struct Observers {
    pub(super) questions: Option<mpsc::Receiver<Query>>,
    /// The group that denied packets are to be sent to.
    pub(super) log_group: Option<u16>,
}

/// Whether there are policies to be looked after.
pub(super) fn is_on(args: &Settings) -> bool {
    args.network_policy.is_on() && !args.once
}

/// Starts the threads that are asked for. They end with the controller or the process.
pub(super) fn start(
    args: &Settings,
    metrics: &Arc<Metrics>,
    followers: &mut Followers,
    reporter: &LogAndSend,
) -> Result<Observers, Error> {
    let mut observers = Observers::default();
    let (ask, questions) = mpsc::channel(QUESTIONS);
    if !args.once {
        observers.questions = Some(questions);
        forget(metrics, followers, reporter, ask.clone())?;
    }
    // A kernel without such groups would refuse the rules that log, and all others with them.
    let reader = open_log(args);
    observers.log_group = reader.as_ref().map(|_| LOG_GROUP);
    if !is_on(args) {
        return Ok(observers);
    }
    count_drops(metrics, followers.isolated())?;
    let (changes, strict) = (followers.policies(), args.network_policy_strict);
    let (judge, metrics) = (ask.clone(), metrics.clone());
    let cut = move || {
        Cutter::new(connections::open, changes, judge, strict, &metrics).run();
    };
    spawn("cuts", "the thread that cuts connections", cut)?;
    if let Some(reader) = reader {
        let fields = args.log_format == LogFormat::Json;
        let follow = move || denied::follow(reader, || LogReader::open(LOG_GROUP), &ask, fields);
        spawn("denied", "the thread that logs denied packets", follow)?;
    }
    Ok(observers)
}

/// Starts the thread that forgets clients whose endpoint is gone, and looks for those that cannot
/// be remembered.
fn forget(
    metrics: &Arc<Metrics>,
    followers: &mut Followers,
    reporter: &LogAndSend,
    ask: mpsc::Sender<Query>,
) -> Result<(), Error> {
    let watch = clients::Watch::start(followers.sticky(), metrics, reporter.clone())?;
    let forgetter = Forgetter::new(Nftables::open, followers.services());
    let work = move || {
        forgetter.run(&ask, clients::LOOK_EVERY, || {
            watch.look();
        });
    };
    spawn("clients", "the thread that forgets clients", work)
}

/// Opens what reads denied packets, where they are to be logged and can be.
fn open_log(args: &Settings) -> Option<LogReader> {
    let wanted = args.log_denied && args.network_policy.is_on();
    let opened = wanted.then(|| LogReader::open(LOG_GROUP))?;
    let told = opened.inspect_err(|error| {
        tracing::warn!("{error}; policies are enforced, denied packets are not logged");
    });
    told.ok()
}

pub(super) fn spawn(
    name: &str,
    what: &'static str,
    work: impl FnOnce() + Send + 'static,
) -> Result<(), Error> {
    let thread = thread::Builder::new().name(name.into()).spawn(work);
    thread.map(drop).map_err(system(what))
}

/// Has the metrics read the counters of the rules at each scrape, over a socket of their own.
fn count_drops(metrics: &Metrics, isolated: watch::Receiver<Isolated>) -> Result<(), Error> {
    let reader: Mutex<(Option<Nftables>, Totals)> = Mutex::default();
    let read = move || {
        // A panic of an earlier scrape leaves nothing half done but the socket.
        let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
        let (socket, totals) = &mut *reader;
        let nftables = match socket.take() {
            Some(nftables) => Ok(nftables),
            None => Nftables::open(),
        };
        // The list is cloned: holding on to it would make the controller wait.
        let isolated = Isolated::clone(&isolated.borrow());
        let read = nftables.and_then(|mut nftables| {
            let drops = totals.add(drops::read(&mut nftables, &isolated)?);
            *socket = Some(nftables);
            Ok(drops)
        });
        read.inspect_err(|error| tracing::debug!("{error}; drops are not counted this time"))
            .ok()
    };
    Ok(metrics.policy_drops(read)?)
}

/// Tells where traffic of isolated pods passes the policies by on a bridge, until the controller
/// is gone.
pub(super) async fn watch_bridges(
    mut isolated: watch::Receiver<Isolated>,
    metrics: Arc<Metrics>,
    reporter: LogAndSend,
) {
    let mut watch = BridgeWatch::new("/");
    let mut again = interval(LOOK_EVERY);
    again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            changed = isolated.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            _ = again.tick() => {}
        }
        let pods: Vec<IpAddr> = {
            let isolated = isolated.borrow_and_update();
            isolated.iter().map(|(address, _)| *address).collect()
        };
        for change in watch.check(&addresses::attached(), &pods) {
            match change {
                BridgeChange::Begins(unfiltered) => {
                    metrics.notice(Reason::BridgeTraffic.as_str());
                    reporter.notice(&Notice {
                        subject: Subject::Other(format!("bridge {}", unfiltered.bridge).into()),
                        reason: Reason::BridgeTraffic,
                        message: unfiltered.to_string(),
                    });
                }
                BridgeChange::Ends(unfiltered) => reporter.ended(
                    Subject::Other(format!("bridge {}", unfiltered.bridge).into()),
                    Reason::BridgeTraffic,
                    &format!(
                        "pod-to-pod {} traffic no longer bypasses NetworkPolicy",
                        unfiltered.family()
                    ),
                ),
            }
        }
        for ipv6 in [false, true] {
            metrics.bridge_unfiltered(ipv6, watch.is_unfiltered(ipv6));
        }
    }
}
