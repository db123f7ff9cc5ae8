//! Neighbours: what others on the node notice while nftlet writes rules of a huge cluster.
//!
//! ```text
//!   client ────────── node ────────── pod          echo: a datagram there and back, forwarded
//!                      │
//!          probe: another's transaction, or nft    written meanwhile:
//!                                                  in steps, or all in one transaction
//! ```
//!
//! The kernel takes one nftables transaction of a network namespace at a time, and on most kernels
//! it keeps the processor until it has finished. So others wait who change a table of their own,
//! and so do packets. Three probes measure it, each in a fresh namespace: a transaction that changes
//! one element of another table over netlink; the same by the program `nft`; a datagram that is
//! forwarded there and back. Each probe goes on while nothing else is written, while rules are
//! written in steps as nftlet does it, and while the same rules are written as one transaction. The
//! longest wait counts.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::Context;
use crate::facts::ruleset;
use crate::report::Value::Seconds;
use crate::report::{Report, Table};
use crate::samples::Samples;
use crate::subject::{self, Ruleset, Writer};
use nftlet_lab::cluster::{Cluster, Size};
use nftlet_lab::netns::{Lab, LabOptions, Protocol};

/// How long the probes go on while nothing else is written.
const UNDISTURBED: Duration = Duration::from_secs(1);
/// The pause between attempts, so that probes are no load.
const PAUSE: Duration = Duration::from_millis(1);
const ECHO: u16 = 7;
/// An answer that takes longer is lost.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Clusters: services x endpoints of each, with commas between.
    #[arg(long, value_delimiter = ',', default_value = "10000x10,50000x20")]
    sizes: Vec<Size>,
    /// How often rules are written in each way beside each probe; the longest wait of all counts.
    #[arg(long, default_value = "2", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
}

/// Who waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probe {
    Transaction,
    Program,
    Packet,
}

const PROBES: [(Probe, &str); 3] = [
    (Probe::Transaction, "another's transaction"),
    (Probe::Program, "the program nft, one element"),
    (Probe::Packet, "a datagram there and back"),
];

/// How rules are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    NotAtAll,
    Steps,
    Whole,
}

/// What is written: the words for it, the rules before, the rules after, and whether steps differ
/// from one transaction.
type Case = (&'static str, Ruleset, Ruleset, bool);

/// What a probe waited while rules were written, and how long that took, in seconds.
#[derive(Debug, Default)]
struct Waits {
    each: Samples,
    writing: f64,
}

impl Arguments {
    pub fn run(&self, context: &Context) -> Report {
        let mut report = Report::new("neighbours", [("rounds", &self.rounds)]);
        let mut table = Table::new("How long others wait while nftlet writes", "cluster");
        for size in &self.sizes {
            for case in cases(*size) {
                self.measure(*size, &case, context, &mut table);
            }
        }
        report.tables.push(table);
        report
    }

    fn measure(&self, size: Size, case: &Case, context: &Context, table: &mut Table) {
        let (words, before, after, stepped) = case;
        for (probe, who) in PROBES {
            let what = format!("{words}: {who}");
            context.progress(format_args!("{size}  {what}"));
            let waits = |way, rounds| measure(probe, way, rounds, before, after);
            let undisturbed = waits(Way::NotAtAll, 1);
            let steps = waits(Way::Steps, self.rounds);
            let row = table.row(
                what,
                size,
                "longest in steps",
                Seconds(steps.each.largest()),
            );
            row.and("undisturbed", Seconds(undisturbed.each.median()))
                .and("longest undisturbed", Seconds(undisturbed.each.largest()))
                .and("all in steps", Seconds(steps.writing));
            if *stepped {
                let whole = waits(Way::Whole, self.rounds);
                row.and("longest in one", Seconds(whole.each.largest()))
                    .and("all in one", Seconds(whole.writing));
            }
        }
    }
}

/// Returns what is written for a cluster.
fn cases(size: Size) -> [Case; 3] {
    let mut cluster = Cluster::plain(size);
    let rules = ruleset(cluster.objects());
    cluster.grow(size.services / 2, 1);
    let grown = ruleset(cluster.objects());
    let otherwise = subject::declared_otherwise(&rules);
    [
        ("first rules", Ruleset::default(), rules.clone(), true),
        (
            "first service with a number of endpoints",
            rules.clone(),
            grown,
            false,
        ),
        ("a set declared otherwise", otherwise, rules, false),
    ]
}

/// Returns what a probe waits while rules are written so often.
fn measure(probe: Probe, way: Way, rounds: u32, before: &Ruleset, after: &Ruleset) -> Waits {
    let mut all = Waits::default();
    for _ in 0..rounds {
        let lab = Lab::new(LabOptions {
            pods_per_node: 1,
            ..LabOptions::default()
        });
        let node = lab.node().ns();
        node.nft_load("table ip neighbour { set s { type inet_service; }; }");
        let earlier = subject::transaction(&Ruleset::default(), before);
        node.run(|| Writer::open().write_in_steps(earlier));
        let transaction = subject::transaction(before, after);
        let stop = Arc::new(AtomicBool::new(false));
        let prober = start(probe, &lab, Arc::clone(&stop));
        let writing = node.run(|| {
            let mut writer = Writer::open();
            let started = Instant::now();
            match way {
                Way::NotAtAll => thread::sleep(UNDISTURBED),
                Way::Steps => writer.write_in_steps(transaction),
                Way::Whole => writer.write(&transaction),
            }
            started.elapsed().as_secs_f64()
        });
        stop.store(true, Ordering::Relaxed);
        let waited = prober.join();
        all.each
            .append(waited.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        all.writing = all.writing.max(writing);
    }
    all
}

/// Starts to probe, until stopped; the result is what each attempt took, in seconds.
fn start(probe: Probe, lab: &Lab, stop: Arc<AtomicBool>) -> JoinHandle<Samples> {
    let node = lab.node().ns().clone();
    match probe {
        Probe::Transaction => {
            let mut writer = node.run(Writer::open);
            repeat(stop, move |number| {
                let add = number.is_multiple_of(2);
                writer.write(&subject::change_of_another("neighbour", "s", add));
            })
        }
        Probe::Program => repeat(stop, move |number| {
            let verb = if number.is_multiple_of(2) {
                "add"
            } else {
                "delete"
            };
            node.nft(&[verb, "element", "ip", "neighbour", "s", "{ 80 }"]);
        }),
        Probe::Packet => {
            let pod = &lab.node().pods[0];
            let echo = pod.serve(Protocol::Udp, ECHO);
            let socket = lab.client().ns.run(|| {
                let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
                socket.connect((pod.v4, echo[0].address().port()))?;
                socket.set_read_timeout(Some(PATIENCE)).map(|()| socket)
            });
            let socket = socket.unwrap_or_else(|error| panic!("no socket: {error}"));
            repeat(stop, move |_| {
                // The server lives as long as the probe.
                let _ = &echo;
                let answered = socket.send(b"?").and_then(|_| socket.recv(&mut [0; 512]));
                answered.unwrap_or_else(|error| panic!("a datagram was lost: {error}"));
            })
        }
    }
}

/// Times attempts on a thread of its own until stopped.
fn repeat(
    stop: Arc<AtomicBool>,
    mut attempt: impl FnMut(u64) + Send + 'static,
) -> JoinHandle<Samples> {
    thread::spawn(move || {
        let mut waits = Samples::default();
        for number in 0.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let started = Instant::now();
            attempt(number);
            waits.push(started.elapsed().as_secs_f64());
            thread::sleep(PAUSE);
        }
        waits
    })
}
