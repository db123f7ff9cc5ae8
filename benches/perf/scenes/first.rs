//! First rules: nftlet starts beside an API server that has a whole cluster.
//!
//! The time of the first program is nftlet's metric of a comparison with the kernel that writes
//! everything: from the end of the last list to the kernel's answer. That of the start ends with
//! the line of the log that reports the rules; the process is not asked meanwhile. Then the
//! process is left alone, audits its rules, `nft flush ruleset` is repaired, and nftlet starts once
//! more with its rules in place. An older nftlet starts in turns with the one that is measured.

use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::SIZES;
use crate::Context;
use crate::kube_proxy::{self, FULL};
use crate::process::{Process, seconds};
use crate::report::Value::{Bytes, Number, Ratio, Seconds, Text};
use crate::report::{Report, Table, Value};
use crate::samples::Samples;
use crate::server::{Server, TRANSACTION};
use nftlet_lab::cluster::{Cluster, Size};
use nftlet_lab::netns::Namespace;

/// How long a process is left alone before its memory is read, and then before its idleness is.
pub const SETTLE: Duration = Duration::from_secs(2);
const IDLE: Duration = Duration::from_secs(10);
/// Comparisons of two programs take so many times as many starts.
const PAIRS: u32 = 3;
/// How often nftlet is asked whether the ruleset is repaired. It is flushed once, since nftlet repairs
/// repeated changes later and later.
const ASK: Duration = Duration::from_millis(25);
/// Up to so many services the time of a repair has a budget of its own.
const SMALL: usize = 1_000;
/// With which cluster others with as many endpoints per service are compared.
const COMPARED: Size = Size {
    services: 10_000,
    endpoints: 10,
};
const FAMILY: &str = "{ip_family=\"IPv4\"}";
const HEALED: &str = "nftlet_foreign_changes_healed_total";

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Clusters: services x endpoints of each, with commas between.
    #[arg(long, value_delimiter = ',', default_value = SIZES)]
    sizes: Vec<Size>,
    /// Starts from empty rules.
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    starts: u32,
    /// An older nftlet to compare with, in three times as many starts.
    #[arg(long, value_name = "FILE")]
    before: Option<PathBuf>,
    /// The most services that are loaded in kube-proxy's shape, too, for five minutes at most.
    #[arg(long, default_value = "30000", value_name = "SERVICES")]
    kube_proxy_up_to: usize,
    /// The most services with which the program kube-proxy is started, if `KUBE_PROXY` names it.
    #[arg(long, default_value = "10000", value_name = "SERVICES")]
    program_up_to: usize,
}

/// What was seen of starts from empty rules: seconds, and bytes.
#[derive(Default)]
struct Starts {
    whole: Samples,
    processor: Samples,
    program: Samples,
    transactions: Samples,
    memory: Samples,
}

impl Starts {
    /// Adds a start, and leaves the process alone for a while.
    fn push(&mut self, process: &Process, took: Duration) {
        self.whole.push(took.as_secs_f64());
        self.processor.push(seconds(process.ticks()));
        let metrics = process.metrics();
        self.transactions.push(metrics.histogram(TRANSACTION, "").0);
        let (sum, count) = metrics.histogram(FULL, FAMILY);
        assert_eq!(count, 1, "the first rules are written once");
        self.program.push(sum);
        sleep(SETTLE);
        self.memory.push(process.memory().resident);
    }
}

impl Arguments {
    pub fn run(&self, context: &Context) -> Report {
        let mut report = Report::new("first", [("starts", &self.starts)]);
        let mut table = Table::new("First rules of a cluster", "cluster");
        let mut sizes = self.sizes.clone();
        sizes.sort_by_key(|size| size.services * size.endpoints);
        let mut compared = None;
        for size in sizes {
            let first = self.measure(size, compared, context, &mut table);
            if size == COMPARED {
                compared = Some(first);
            }
        }
        report.tables.push(table);
        report
    }

    /// Measures a cluster and returns the time of its first program.
    fn measure(
        &self,
        size: Size,
        compared: Option<f64>,
        context: &Context,
        table: &mut Table,
    ) -> f64 {
        let progress = |step: &str| context.progress(format_args!("{size}  {step}"));
        let cluster = Cluster::new(size);
        let mut server = Server::new(Namespace::new("node"), &context.nftlet);
        server.put(cluster.objects());

        let [mut starts, mut before] = [(); 2].map(|()| Starts::default());
        let (mut sent, mut asked) = (0, 0);
        let mut running: Option<Process> = None;
        let rounds = self.starts * if self.before.is_some() { PAIRS } else { 1 };
        for number in 1..=rounds {
            progress(&format!("start {number} of {rounds}"));
            if let Some(process) = running.take() {
                process.stop();
                server.another_node();
            }
            if let Some(older) = &self.before {
                let (process, took) = server.start_other(older);
                before.push(&process, took);
                process.stop();
                server.another_node();
            }
            (sent, asked) = (server.api.sent(), server.api.requests().len());
            let (process, took) = server.start();
            starts.push(&process, took);
            running = Some(process);
        }
        let process = running.expect("there is at least one start");
        let sent = server.api.sent() - sent;
        let requests = server.api.requests().len() - asked;
        let mut lists = server.lists_since(asked);
        let all = lists.len();
        lists.sort_unstable();
        lists.dedup();

        progress("idle");
        let ticks = process.ticks();
        sleep(IDLE);
        let idle = process.ticks() - ticks;
        let memory = process.memory();

        progress("an audit");
        let audit = process.audit();
        let audited = process.memory();

        progress("`nft flush ruleset`");
        let healed = heal(&process, &server);
        process.stop();

        progress("start with rules in place");
        let (restarted, restart) = server.start();
        let (comparison, _) = restarted.metrics().histogram(FULL, FAMILY);
        let peak_restart = restarted.memory().peak;
        restarted.stop();

        let shape = self.kube_proxy(&cluster, size, progress);
        let program = (size.services <= self.program_up_to).then(|| {
            progress("kube-proxy, if there is one");
            kube_proxy::Program::start(&mut server)
        });
        let program = program.flatten().map(|(program, took)| {
            let first = program.process.metrics().histogram(FULL, FAMILY).0;
            [
                Seconds(first),
                Seconds(took),
                Bytes(program.process.memory().peak),
            ]
        });
        let [other_first, other_start, other_peak] =
            program.map_or([const { None }; 3], |it| it.map(Some));

        let first = starts.program.median();
        let row = table.row("first program", size, "nftlet", Seconds(first));
        row.and("kube-proxy's shape", shape.clone())
            .and("kube-proxy", other_first);
        let start = Seconds(starts.whole.median());
        let row = table.row("process start to rules in place", size, "nftlet", start);
        row.and("kube-proxy", other_start);
        let row = table.row("memory, peak", size, "nftlet", Bytes(memory.peak));
        row.and("kube-proxy", other_peak);
        let mut note = |what: &str, value| {
            table.row(what, size, "nftlet", value);
        };
        for (what, now, then) in [
            (
                "first program over before",
                &starts.program,
                &before.program,
            ),
            (
                "memory after settling over before",
                &starts.memory,
                &before.memory,
            ),
        ] {
            if then.count() > 0 {
                note(what, Ratio(now.over(then).median()));
            }
        }
        note(
            "first program, of it transactions",
            Seconds(starts.transactions.median()),
        );
        note(
            "process start, processor time",
            Seconds(starts.processor.median()),
        );
        note("sent by the server, start", Bytes(sent as f64));
        note("requests, start", Number(requests as f64));
        note(
            "lists read again, start",
            Number((all - lists.len()) as f64),
        );
        note(
            "processor ticks in 10 s without change",
            Number(idle as f64),
        );
        note("memory after settling", Bytes(starts.memory.median()));
        note("memory, peak, an audit included", Bytes(audited.peak));
        note("audit", Seconds(audit.as_secs_f64()));
        note("`flush ruleset` healed", Seconds(healed));
        if size.services > SMALL {
            note(
                "`flush ruleset` healed over first program",
                Ratio(healed / first),
            );
        }
        note(
            "process start, rules in place already",
            Seconds(restart.as_secs_f64()),
        );
        note(
            "rules in place already, of it the comparison",
            Seconds(comparison),
        );
        note("memory, peak, rules in place already", Bytes(peak_restart));
        if let Some(compared) = compared.filter(|_| size.endpoints == COMPARED.endpoints) {
            note(
                "first program over that of 10,000 x 10",
                Ratio(first / compared),
            );
        }
        if let Seconds(other) = shape {
            note(
                "first program over kube-proxy's shape",
                Ratio(first / other),
            );
        }
        first
    }

    /// Loads the same services in kube-proxy's shape.
    fn kube_proxy(&self, cluster: &Cluster, size: Size, progress: impl Fn(&str)) -> Value {
        if size.services > self.kube_proxy_up_to {
            return Text("not tried".to_owned());
        }
        let limit = kube_proxy::PATIENCE.as_secs();
        progress(&format!("kube-proxy's shape, {limit} s at most"));
        let took = kube_proxy::load(&Namespace::new("kube-proxy"), &kube_proxy::table(cluster));
        took.map_or_else(
            || Text(format!("> {limit} s")),
            |took| Seconds(took.as_secs_f64()),
        )
    }
}

/// Empties the ruleset, as the reload of a firewall does, and returns the seconds from then until
/// nftlet reports its rules to be in force again.
fn heal(process: &Process, server: &Server) -> f64 {
    let seen = || {
        let metrics = process.metrics();
        (metrics.histogram(FULL, FAMILY).1, metrics.get(HEALED))
    };
    let before = seen();
    server.namespace().nft(&["flush", "ruleset"]);
    let started = Instant::now();
    loop {
        let took = started.elapsed();
        let now = seen();
        if now.0 > before.0 && now.1 > before.1 {
            return took.as_secs_f64();
        }
        sleep(ASK);
    }
}
