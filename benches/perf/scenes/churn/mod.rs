//! Churn: endpoints change all the time, clients connect all the time, for minutes.
//!
//! ```text
//!  client ──── node: nftlet <── HTTP ── API server <── 500 changes a second ([`changes`])
//!    │           │  rules
//!    │           v
//!    └── ClusterIP ──> endpoint ────── servers: answer on every address of every live service
//!  ([`traffic`])
//! ```
//!
//! Of the services of the cluster one in a hundred is *live* ([`live`]): its endpoints are addresses
//! at which a server really answers, and goes on answering after an endpoint was replaced. So a
//! connection that fails is the fault of the rules. Some live services go from one endpoint to none
//! and back, some between 60 and 70, and some roll out all the time. Changes are sent by the clock, whether or not
//! the ones before are in force, so that nftlet gets a backlog if it cannot keep up.
//!
//! The time is divided into twenty windows. Nothing may grow from the second quarter of the time to
//! the last, no connection may fail, and in the end the kernel must hold what the objects ask for.

mod changes;
mod live;
mod traffic;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::Context;
use crate::process::{AUDITS, PATIENCE, Process, seconds};
use crate::report::Value::{Bytes, Number, Ratio, Seconds};
use crate::report::{Report, Table, Value};
use crate::samples::Samples;
use crate::server::{LATENCY, PAUSE, Sent, Server};
use crate::subject;
use changes::Changes;
use live::Live;
use nftlet_lab::cluster::{Put, Size, grouped};
use nftlet_lab::fake_api::{CIDRS, NODES, SERVICES, SLICES};
use traffic::{Network, Tally, Traffic};

const WINDOWS: u32 = 20;
/// From one look at the process to the next.
const LOOK: Duration = Duration::from_millis(250);
/// Traffic without changes, before and after them.
const CALM: Duration = Duration::from_secs(2);
/// A load of so many seconds ends with an audit.
const AUDITED: Duration = Duration::from_secs(600);
/// Counters that must stay at zero.
const FAILURES: [&str; 2] = [
    "nftlet_netlink_errors_total",
    "nftlet_foreign_changes_healed_total",
];
/// By how much memory may grow before growth is counted.
const GROWTH: f64 = 1.05;
/// The cluster for which the peak of memory has a budget.
const BUDGETED: Size = Size {
    services: 10_000,
    endpoints: 10,
};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// How long endpoints change.
    #[arg(long, default_value = "600", value_parser = clap::value_parser!(u32).range(10..=86_400))]
    seconds: u32,
    /// Changes a second.
    #[arg(long, default_value = "500", value_parser = clap::value_parser!(u32).range(100..=10_000))]
    rate: u32,
    /// Connections a second.
    #[arg(long, default_value = "1000", value_parser = clap::value_parser!(u32).range(2..=5_000))]
    connections: u32,
    /// Services x endpoints of each.
    #[arg(long, default_value = "10000x10", value_parser = live::size)]
    size: Size,
}

/// What was seen at the border of two windows.
#[derive(Clone, Copy)]
struct Border {
    at: Instant,
    /// Changes that were sent.
    sent: u64,
    /// The seconds from the bytes read to the kernel's answer, of all changes, and their number.
    latency: (f64, u64),
    ticks: u64,
}

/// What was seen in a part of the time.
struct Window {
    from: Border,
    to: Border,
    /// Changes that were sent and not in force.
    backlog: Samples,
    resident: Samples,
    connections: Tally,
}

impl Arguments {
    pub fn run(&self, context: &Context) -> Report {
        let mut report = Report::new("churn", []);
        context.progress("encoding the objects");
        let live = Arc::new(Live::new(self.size));
        let mut changes = Changes::new(self.size, live.clone());
        let network = Network::new();
        let server = Server::new(network.node.clone(), &context.nftlet);
        server.put(changes.objects());
        context.progress("starting nftlet");
        let (process, _) = server.start();
        let asked = server.api.requests().len();
        let traffic = Traffic::start(&network, live, self.connections);
        thread::sleep(CALM);
        context.progress("endpoints change");
        let before = traffic.take();
        let watch = Watch {
            process: &process,
            traffic: &traffic,
            sent: AtomicU64::new(0),
            already: process.metrics().histogram(LATENCY, "").1,
        };
        let (windows, sent) = self.windows(&watch, &server, &mut changes, context);
        let settled = watch.until_programmed(sent.last);
        context.progress("the changes are over");
        thread::sleep(CALM);
        let repeated = network.repeated();
        let after = traffic.stop();
        if self.length() >= AUDITED {
            context.progress("an audit");
            process.audit();
        }
        let metrics = process.metrics();
        context.progress("comparing the kernel with the objects");
        let difference = subject::difference(&network.node, objects(&server)).ops;
        let failures: f64 = FAILURES.iter().map(|name| metrics.get(name)).sum();
        let lists = server.lists_since(asked).len();
        let audits = metrics.labelled(AUDITS);
        let tallies = || {
            let changing = windows.iter().map(|window| &window.connections);
            changing.chain([&before, &after])
        };
        let sum = |of: fn(&Tally) -> u64| tallies().map(of).sum::<u64>();

        let mut table = Table::new("Endpoints change, clients connect", "changes");
        let began = windows[0].from.at;
        windows.iter().for_each(|it| it.note(began, &mut table));
        report.tables.push(table);
        let of = format!(
            "{} changes, {} connections a second at {} for {} s",
            grouped(self.rate.into()),
            grouped(self.connections.into()),
            self.size,
            self.seconds
        );
        let mut table = Table::new("Churn: what may not fail or grow", "load");
        let mut note = |what: &str, value| {
            table.row(what, &of, "measured", value);
        };
        let count = |count: u64| Number(count as f64);
        note("failed connections", count(sum(|it| it.failed)));
        note("connections of a second or more", count(sum(|it| it.slow)));
        self.note_growth(&windows, &mut note);
        note("from the last change to all in force", Seconds(settled));
        let operations = count(difference.len() as u64);
        note("operations that the kernel differs by", operations);
        note("failed transactions, healed changes", Number(failures));
        note("lists read again", count(lists as u64));
        if !audits.is_empty() && self.size == BUDGETED {
            let peak = Bytes(process.memory().peak);
            note("memory, peak, an audit included", peak);
        }
        report.tables.push(table);
        let (late, refused) = (sent.late, sum(|it| it.refused));
        let audits: Vec<_> = audits.iter().map(|(it, n)| format!("{n} {it}")).collect();
        report.notes.push(format!(
            "a burst of changes was sent {late:.1?} late at most; {repeated} requests for \
             connections were repeated; services without endpoints refused {refused}; audits: {}",
            audits.join(", ")
        ));
        if let Some(first) = difference.first() {
            let text: String = format!("{first:?}").chars().take(400).collect();
            report
                .notes
                .push(format!("the kernel differs, first by {text}"));
        }
        for fault in tallies().flat_map(|tally| &tally.faults) {
            report.notes.push(format!("failed: {fault}"));
        }
        process.stop();
        report
    }

    fn length(&self) -> Duration {
        Duration::from_secs(self.seconds.into())
    }

    /// Sends changes, and divides the time into windows.
    fn windows(
        &self,
        watch: &Watch,
        server: &Server,
        changes: &mut Changes,
        context: &Context,
    ) -> (Vec<Window>, Sent) {
        let mut windows = Vec::new();
        let count = &watch.sent;
        let sent = thread::scope(|scope| {
            let sender =
                scope.spawn(|| server.pace(self.rate, self.length(), count, || changes.change()));
            let started = Instant::now();
            let mut from = watch.border();
            for number in 1..=WINDOWS {
                let until = started + self.length() * number / WINDOWS;
                let [mut backlog, mut resident] = [(); 2].map(|()| Samples::default());
                // At least once, however long an answer took.
                loop {
                    backlog.push(watch.backlog() as f64);
                    resident.push(watch.process.memory().resident);
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    thread::sleep(LOOK.min(left));
                }
                let to = watch.border();
                let connections = watch.traffic.take();
                let window = Window {
                    from,
                    to,
                    backlog,
                    resident,
                    connections,
                };
                context.progress(format_args!(
                    "{} changes, backlog {:.1}; {} connections, {} failed",
                    to.sent - from.sent,
                    window.backlog.mean(),
                    window.connections.count(),
                    window.connections.failed
                ));
                windows.push(window);
                from = to;
            }
            sender.join().expect("the sender does not panic")
        });
        (windows, sent)
    }

    /// Compares the second quarter of the time with the last, and the work done with that wanted.
    fn note_growth(&self, windows: &[Window], note: &mut impl FnMut(&str, Value)) {
        let quarter = windows.len() / 4;
        let (second, last) = (quarter..2 * quarter, windows.len() - quarter..windows.len());
        let quarters = |of: fn(&Window) -> f64| -> [Samples; 2] {
            let part = |part: Range<usize>| windows[part].iter().map(of).collect();
            [part(second.clone()), part(last.clone())]
        };
        let [before, after] = quarters(|it| it.resident.mean()).map(|memory| memory.mean());
        let growth = (after - before * GROWTH).max(0.0);
        note("memory, growth beyond 5 %", Bytes(growth));
        // Other work on the machine holds up a window now and then: medians leave it out.
        let [before, after] = quarters(|it| it.backlog.mean()).map(|backlog| backlog.median());
        let burst = f64::from(self.rate) * PAUSE.as_secs_f64();
        let growth = (after - before - burst).max(0.0);
        note("backlog, growth beyond one burst", Number(growth));
        let [before, after] = quarters(Window::latency).map(|latency| latency.median());
        let what = "a change, from the bytes read, last quarter over second";
        note(what, Ratio(after / before));
        let (first, all) = (&windows[0].from, &windows[windows.len() - 1].to);
        let length = (all.at - first.at).as_secs_f64();
        let missing = |rate: u32, made: u64| {
            let wanted = f64::from(rate) * length;
            Ratio((1.0 - made as f64 / wanted).max(0.0))
        };
        let made = windows.iter().map(|it| it.to.sent - it.from.sent).sum();
        note("changes not made in time, part", missing(self.rate, made));
        let made = windows.iter().map(|it| it.connections.count()).sum();
        let missing = missing(self.connections, made);
        note("connections not made in time, part", missing);
    }
}

impl Window {
    /// Returns the mean seconds from the bytes read to the kernel's answer.
    fn latency(&self) -> f64 {
        let ((sum, count), (before, count_before)) = (self.to.latency, self.from.latency);
        (sum - before) / (count - count_before).max(1) as f64
    }

    fn note(&self, began: Instant, table: &mut Table) {
        let (from, to) = (&self.from, &self.to);
        let [start, end] = [from, to].map(|border| (border.at - began).as_secs_f64());
        let took = &self.connections.took;
        let in_force = Number((to.latency.1 - from.latency.1) as f64);
        table
            .row(
                format!("{start:.0}-{end:.0} s"),
                to.sent - from.sent,
                "in force",
                in_force,
            )
            .and("backlog", Number(self.backlog.mean()))
            .and("most", Number(self.backlog.largest()))
            .and("a change", Seconds(self.latency()))
            .and("memory", Bytes(self.resident.mean()))
            .and("processor", Seconds(seconds(to.ticks - from.ticks)))
            .and("connections", Number(self.connections.count() as f64))
            .and("a connection", Seconds(took.median()))
            .and("a connection, p99", Seconds(took.percentile(99)))
            .and("longest", Seconds(took.largest()))
            .and("failed", Number(self.connections.failed as f64));
    }
}

/// Returns the objects of a server that rules for services depend on.
fn objects(server: &Server) -> impl Iterator<Item = Put> + '_ {
    let collections = [NODES, CIDRS, SERVICES, SLICES].into_iter();
    collections.flat_map(|path| {
        let objects = server.api.objects(path).into_iter();
        objects.map(move |object| (path, object))
    })
}

/// A process that is looked at all the time.
struct Watch<'a> {
    process: &'a Process,
    traffic: &'a Traffic,
    /// The changes that were sent.
    sent: AtomicU64,
    /// The changes that were in force before them.
    already: u64,
}

impl Watch<'_> {
    fn border(&self) -> Border {
        Border {
            at: Instant::now(),
            sent: self.sent.load(Ordering::Relaxed),
            latency: self.process.metrics().histogram(LATENCY, ""),
            ticks: self.process.ticks(),
        }
    }

    /// Returns the number of changes that were sent and are not in force.
    fn backlog(&self) -> u64 {
        let sent = self.sent.load(Ordering::Relaxed) + self.already;
        sent.saturating_sub(self.process.metrics().histogram(LATENCY, "").1)
    }

    /// Waits until everything is in force; returns how long after a time that was seen.
    fn until_programmed(&self, last: Instant) -> f64 {
        loop {
            let waited = last.elapsed();
            let backlog = self.backlog();
            if backlog == 0 {
                return waited.as_secs_f64();
            }
            assert!(
                waited < PATIENCE,
                "{backlog} changes are not in force after {waited:.0?}"
            );
        }
    }
}
