//! The measurement: windows of time, and what is looked at when the changes are over.
//!
//! Four times a second nftlet's metrics and what the kernel says of the process are read. The
//! backlog is the changes that were sent by then, less those that nftlet counts as programmed.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::agreement;
use crate::changes::{Changes, Sent};
use crate::cluster::Size;
use crate::lab::Lab;
use crate::live::Live;
use crate::process::{Metrics, Process, tick};
use crate::results::{End, Measured, Window};
use crate::samples::Samples;
use crate::server::{Server, is_list};
use crate::traffic::{Tally, Traffic};

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How long endpoints change.
    pub length: Duration,
    /// Changes a second.
    pub rate: u32,
    /// Connections a second.
    pub connections: u32,
    /// The size of the cluster.
    pub size: Size,
    /// The program.
    pub nftlet: PathBuf,
}

/// The windows of the whole time.
pub const WINDOWS: u32 = 20;
/// From one look at the process to the next.
const LOOK: Duration = Duration::from_millis(250);
/// Traffic without changes, before and after them.
const CALM: Duration = Duration::from_secs(2);
/// How long the last changes are waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// In so long an audit falls due, which waits a minute for calm before it reads nevertheless.
const AUDITED: Duration = Duration::from_secs(600);
const AUDIT_PATIENCE: Duration = Duration::from_secs(120);
const AUDITS: &str = "nftlet_audits_total";
/// nftlet's own clock, from receiving a change to the kernel's answer.
const LATENCY: &str = "nftlet_programming_latency_seconds";
/// What must stay at nothing.
const FAILURES: [&str; 2] = [
    "nftlet_netlink_errors_total",
    "nftlet_foreign_changes_healed_total",
];

/// Measures.
pub fn measure(plan: &Plan, mut progress: impl FnMut(&str)) -> Measured {
    progress("encoding the objects");
    let live = Arc::new(Live::new(plan.size));
    let mut changes = Changes::new(plan.size, live.clone());
    let lab = Lab::new();
    let server = Server::new(lab.node.clone());
    server.put(changes.objects());
    progress("starting nftlet");
    let (process, _) = server.start(&plan.nftlet);
    // Otherwise an audit has nothing to read.
    lab.node.nft_load("table ip neighbour { }");
    let lists = lists(&server);
    let traffic = Traffic::start(&lab, live, plan.connections);
    thread::sleep(CALM);
    progress("endpoints change");
    let before = traffic.take();
    let watch = Watch {
        process: &process,
        traffic: &traffic,
        sent: AtomicU64::new(0),
        already: process.metrics().histogram(LATENCY, "").1,
    };
    let (windows, sent) = watch.windows(plan, &server, &mut changes, &mut progress);
    let settled = watch.until_programmed(sent.last);
    progress("the changes are over");
    thread::sleep(CALM);
    let repeated = lab.repeated();
    let after = traffic.stop();
    if plan.length >= AUDITED {
        progress("an audit is waited for");
        until_audited(&process);
    }
    let metrics = process.metrics();
    progress("comparing the kernel with the objects");
    let difference = agreement::difference(&lab.node, &server.api);
    let failures = FAILURES.iter().map(|name| metrics.get(name)).sum::<f64>();
    let of_audits = metrics.labelled(AUDITS).into_iter();
    let end = End {
        settled,
        late: sent.late.as_secs_f64(),
        difference: difference.ops.len() as u64,
        first_difference: difference.ops.first().map(|op| shorten(&format!("{op:?}"))),
        failures: failures as u64,
        lists_again: self::lists(&server) - lists,
        repeated,
        failed_in_calm: before.failed + after.failed,
        slow_in_calm: before.slow + after.slow,
        connections_in_calm: before.count() + after.count(),
        peak: process.memory().peak as f64,
        audits: of_audits
            .map(|(label, count)| (label, count as u64))
            .collect(),
        told: [before.told, windows.1, after.told].concat(),
    };
    process.stop();
    Measured {
        windows: windows.0,
        end,
    }
}

/// Waits until there was an audit.
fn until_audited(process: &Process) {
    let started = Instant::now();
    while process.metrics().labelled(AUDITS).is_empty() {
        assert!(started.elapsed() < AUDIT_PATIENCE, "there is no audit");
        thread::sleep(LOOK);
    }
}

/// How many lists were read so far.
fn lists(server: &Server) -> u64 {
    let requests = server.api.requests();
    requests.iter().filter(|request| is_list(request)).count() as u64
}

fn shorten(text: &str) -> String {
    text.chars().take(400).collect()
}

/// Somebody who looks at the process all the time.
struct Watch<'a> {
    process: &'a Process,
    traffic: &'a Traffic,
    /// The changes that were sent.
    sent: AtomicU64,
    /// What nftlet had programmed before them.
    already: u64,
}

/// What was seen at the border of two windows.
struct Border {
    at: Instant,
    metrics: Metrics,
    ticks: u64,
    sent: u64,
}

impl Watch<'_> {
    /// Has changes sent, and divides the time into windows. Also returns failures in words.
    fn windows(
        &self,
        plan: &Plan,
        server: &Server,
        changes: &mut Changes,
        progress: &mut impl FnMut(&str),
    ) -> ((Vec<Window>, Vec<String>), Sent) {
        let (mut windows, mut told) = (Vec::new(), Vec::new());
        let count = &self.sent;
        let sent = thread::scope(|scope| {
            let sender = scope.spawn(|| changes.send(server, plan.rate, plan.length, count));
            let started = Instant::now();
            let mut from = self.border();
            for number in 1..=WINDOWS {
                let until = started + plan.length * number / WINDOWS;
                let (mut backlog, mut resident) = (Samples::default(), Samples::default());
                // At least once, however long an answer took.
                loop {
                    backlog.push(self.backlog() as f64);
                    resident.push(self.process.memory().resident as f64);
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    thread::sleep(LOOK.min(left));
                }
                let to = self.border();
                let mut tally = self.traffic.take();
                let place = (from.at - started).as_secs_f64()..(to.at - started).as_secs_f64();
                let seen = window(place, &from, &to, [&backlog, &resident], &tally);
                progress(&seen.line());
                told.append(&mut tally.told);
                windows.push(seen);
                from = to;
            }
            sender.join().expect("the sender does not panic")
        });
        ((windows, told), sent)
    }

    fn border(&self) -> Border {
        Border {
            at: Instant::now(),
            sent: self.sent.load(Ordering::Relaxed),
            metrics: self.process.metrics(),
            ticks: self.process.ticks(),
        }
    }

    /// The changes that were sent and are not in force.
    fn backlog(&self) -> u64 {
        let sent = self.sent.load(Ordering::Relaxed) + self.already;
        sent.saturating_sub(self.process.metrics().histogram(LATENCY, "").1)
    }

    /// Waits until everything is in force, and tells how long after a moment that was seen.
    fn until_programmed(&self, last: Instant) -> f64 {
        loop {
            let waited = last.elapsed();
            if self.backlog() == 0 {
                return waited.as_secs_f64();
            }
            assert!(
                waited < PATIENCE,
                "{} changes are not in force {waited:.0?} after the last one",
                self.backlog()
            );
        }
    }
}

fn window(
    place: std::ops::Range<f64>,
    from: &Border,
    to: &Border,
    [backlog, resident]: [&Samples; 2],
    tally: &Tally,
) -> Window {
    let (sum, count) = to.metrics.histogram(LATENCY, "");
    let (sum_before, count_before) = from.metrics.histogram(LATENCY, "");
    let programmed = count - count_before;
    let later = to.metrics.buckets(LATENCY).into_iter();
    let buckets = later
        .zip(from.metrics.buckets(LATENCY))
        .map(|((bound, after), (_, before))| (bound, after - before));
    Window {
        from: place.start,
        to: place.end,
        changes: to.sent - from.sent,
        programmed,
        backlog: backlog.mean(),
        most_backlog: backlog.largest(),
        latency: (sum - sum_before) / programmed.max(1) as f64,
        latency_p99: quantile(&buckets.collect::<Vec<_>>(), 0.99),
        resident: resident.mean(),
        processor: (to.ticks - from.ticks) as f64 * tick(),
        connections: tally.count(),
        connect: tally.quantile(50),
        connect_p99: tally.quantile(99),
        longest_connect: tally.quantile(100),
        failed: tally.failed,
        slow: tally.slow,
    }
}

/// A quantile of a histogram, as Prometheus would estimate it: even inside of a bucket.
fn quantile(buckets: &[(f64, u64)], part: f64) -> f64 {
    let all = buckets.last().map_or(0, |(_, count)| *count) as f64;
    let (mut lower, mut below) = (0.0, 0.0);
    for &(bound, count) in buckets {
        let count = count as f64;
        if count >= part * all && bound.is_finite() {
            let inside = (part * all - below) / (count - below).max(1.0);
            return lower + (bound - lower) * inside;
        }
        if bound.is_finite() {
            (lower, below) = (bound, count);
        }
    }
    lower
}
