//! What others on the node notice while nftlet writes rules of a huge cluster.
//!
//! ```text
//! cargo bench --bench neighbours -- [--sizes 10000x10,50000x20] [--markdown]
//! ```
//!
//! ```text
//!   client ── veth ── node ── veth ── server       echo: a datagram there and back, forwarded
//!                      │
//!          probe: another's transaction, or nft    programmed meanwhile:
//!                                                  in steps, or all in one transaction
//! ```
//!
//! The kernel takes one nftables transaction of a network namespace at a time, and on most kernels
//! it keeps the processor until it has done. So there are two questions: how long others wait who
//! want to change a table of their own, and how long packets wait. Three probes ask them, each in
//! a fresh namespace: a transaction that changes one element of another table over netlink; the
//! same by the program `nft`; a datagram that is forwarded there and back. Each probe goes on
//! without a break while nobody else writes, while nftlet's transaction is written in steps as
//! the agent does it, and while the same transaction is written as one. The longest wait counts.
//!
//! Three things are written: the first rules; those for a service with a number of endpoints that no
//! other has, for which the kernel looks at all elements of the maps that the new chain reads; and
//! all rules in place of those of another nftlet that declared a set otherwise.
//!
//! A missed budget ends the benchmark with an error.

#[path = "budgets/mod.rs"]
mod budgets;
#[path = "objects/mod.rs"]
mod cluster;
#[path = "machine/mod.rs"]
mod machine;
use nftlet_lab::netns;
#[path = "table/mod.rs"]
mod table;
#[path = "workload/mod.rs"]
mod workload;

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use nftlet::compile::ServiceSet;
use nftlet::model::{Changes, Store};
use nftlet::netlink::Nftables;
use nftlet::ruleset::{
    Declaration, Element, Family, Key, Op, Ruleset, Selector, SetKind, TableId, Transaction, diff,
};

use budgets::Outcome;
use cluster::Size;
use netns::{Namespace, require_net_admin};
use table::{Form, time};
use workload::{Workload, settings};

/// How long the probes go on while nobody else writes.
const UNDISTURBED: Duration = Duration::from_secs(1);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 2);
const ECHO: u16 = 7;
/// An answer that takes longer is lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// Measures how long others wait while nftlet writes rules of a huge cluster.
#[derive(Debug, Parser)]
#[command(name = "neighbours")]
struct Arguments {
    /// Clusters, as services x endpoints of each, apart by commas.
    #[arg(long, value_delimiter = ',', default_value = "10000x10,50000x20")]
    sizes: Vec<Size>,
    /// How often each is written in each way beside each probe; the longest wait of all counts.
    #[arg(long, default_value = "2", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Print the table as Markdown.
    #[arg(long)]
    markdown: bool,
    /// Write the table to a file as JSON as well.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// What cargo adds to the arguments of every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Who waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probe {
    Transaction,
    Program,
    Packet,
}

impl Probe {
    const ALL: [Self; 3] = [Self::Transaction, Self::Program, Self::Packet];

    /// The longest that it may wait while the rules are written in steps, in seconds. The program
    /// makes several requests, and each may have to wait.
    fn budget(self) -> f64 {
        match self {
            Self::Transaction | Self::Packet => 0.1,
            Self::Program => 0.25,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Transaction => "another's transaction",
            Self::Program => "the program nft, one element",
            Self::Packet => "a datagram there and back",
        }
    }
}

/// How the rules are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Nobody,
    Steps,
    Whole,
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scene {
    /// Everything, where nothing is.
    First,
    /// What a service needs that has one endpoint more than all others.
    NewNumber,
    /// Everything, in place of a table with a set that is declared otherwise.
    Replaced,
}

impl Scene {
    const ALL: [Self; 3] = [Self::First, Self::NewNumber, Self::Replaced];

    fn as_str(self) -> &'static str {
        match self {
            Self::First => "first rules",
            Self::NewNumber => "first service with a number of endpoints",
            Self::Replaced => "a set declared otherwise",
        }
    }

    /// What is there before, and what after.
    fn rules(self, size: Size) -> (Ruleset, Ruleset) {
        let mut workload = Workload::new(size.services, size.endpoints);
        let wanted = wanted(&workload);
        match self {
            Self::First => (Ruleset::default(), wanted),
            Self::NewNumber => {
                workload.grow(size.services / 2);
                (wanted, self::wanted(&workload))
            }
            Self::Replaced => {
                let mut before = wanted.clone();
                for table in before.tables.values_mut() {
                    let set = table.sets.get_mut(&ServiceSet::Frontends.name());
                    let set = set.expect("the table has frontends");
                    let declaration = Declaration::clone(&set.declaration);
                    set.declaration = Arc::new(declaration.comment("of another version"));
                }
                (before, wanted)
            }
        }
    }
}

/// What a probe waited while rules were written in one way, and how long that took, in seconds.
#[derive(Clone, Debug, Default)]
struct Waits {
    each: Vec<f64>,
    writing: f64,
}

impl Waits {
    fn longest(&self) -> f64 {
        self.each.iter().copied().fold(0.0, f64::max)
    }

    fn median(&mut self) -> f64 {
        self.each.sort_unstable_by(f64::total_cmp);
        self.each
            .get(self.each.len() / 2)
            .copied()
            .unwrap_or_default()
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if !require_net_admin() {
        return ExitCode::FAILURE;
    }
    let started = Instant::now();
    let (mut rows, mut outcomes) = (Vec::new(), Vec::new());
    for (size, scene) in arguments
        .sizes
        .iter()
        .flat_map(|size| Scene::ALL.map(|scene| (*size, scene)))
    {
        let services = table::count(Some(size.services as f64));
        let cluster = format!("{services} x {}", size.endpoints);
        let (before, after) = scene.rules(size);
        for probe in Probe::ALL {
            let what = format!("{}: {}", scene.as_str(), probe.as_str());
            eprintln!(
                "{:>6.1} s  {cluster}  {what}",
                started.elapsed().as_secs_f64()
            );
            let waits = |way, rounds| measure(probe, way, rounds, &before, &after);
            let mut nobody = waits(Way::Nobody, 1);
            let steps = waits(Way::Steps, arguments.rounds);
            // Nothing else is ever cut.
            let whole = (scene == Scene::First).then(|| waits(Way::Whole, arguments.rounds));
            let met = steps.longest() <= probe.budget();
            let (longest, budget) = (time(Some(steps.longest())), time(Some(probe.budget())));
            outcomes.push(Outcome {
                what: format!("{what}, {cluster}"),
                measured: longest.clone(),
                budget: format!("at most {budget}"),
                met,
            });
            rows.push(vec![
                what,
                cluster.clone(),
                time(Some(nobody.median())),
                time(Some(nobody.longest())),
                longest,
                time(whole.as_ref().map(Waits::longest)),
                budget,
                if met { "yes" } else { "NO" }.to_owned(),
                time(Some(steps.writing)),
                time(whole.as_ref().map(|whole| whole.writing)),
            ]);
        }
    }
    eprintln!();
    let table = table::Table {
        title: "How long others wait while nftlet writes",
        head: &[
            "what is written, and who waits",
            "services",
            "undisturbed",
            "longest",
            "longest in steps",
            "longest in one",
            "budget",
            "met",
            "all of it in steps",
            "all in one",
        ],
        rows,
    };
    let form = if arguments.markdown {
        Form::Markdown
    } else {
        Form::of_output()
    };
    print!("{}", table.text(form));
    if let Some(file) = &arguments.json {
        let written = machine::write(file, &table.json());
        written.unwrap_or_else(|error| panic!("{error}"));
    }
    match budgets::conclude("neighbours", &outcomes) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("Budgets were missed.");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// The rules that nftlet wants for a cluster.
fn wanted(workload: &Workload) -> Ruleset {
    let (mut store, mut changes) = (Store::default(), Changes::default());
    for event in workload.lists() {
        store.apply(event, &mut changes);
    }
    nftlet::compile::wanted(&store, &settings()).0
}

/// What a probe waits while the rules are written so often.
fn measure(probe: Probe, way: Way, rounds: u32, before: &Ruleset, after: &Ruleset) -> Waits {
    let mut all = Waits::default();
    for _ in 0..rounds {
        let lab = Lab::new();
        let earlier = diff(&Ruleset::default(), before.clone());
        lab.node.run(|| write(Way::Steps, earlier));
        let transaction = diff(before, after.clone());
        let stop = Arc::new(AtomicBool::new(false));
        let prober = lab.start(probe, Arc::clone(&stop));
        let writing = lab.node.run(|| write(way, transaction));
        stop.store(true, Ordering::Relaxed);
        let waited = prober.join();
        all.each
            .append(&mut waited.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        all.writing = all.writing.max(writing.as_secs_f64());
    }
    all
}

/// Writes rules in the network namespace of the calling thread; returns how long that took.
fn write(way: Way, transaction: Transaction) -> Duration {
    let mut kernel = Nftables::open().unwrap_or_else(|error| panic!("{error}"));
    let mut apply = |step: &Transaction| {
        let applied = kernel.apply(step);
        applied.unwrap_or_else(|error| panic!("{error}"));
    };
    let started = Instant::now();
    match way {
        Way::Nobody => thread::sleep(UNDISTURBED),
        Way::Steps => transaction.into_steps().for_each(|step| apply(&step)),
        Way::Whole => apply(&transaction),
    }
    started.elapsed()
}

/// A node between two machines, with a table of somebody else.
struct Lab {
    node: Namespace,
    client: Namespace,
    server: Namespace,
}

impl Lab {
    fn new() -> Self {
        let [node, client, server] = ["node", "client", "server"].map(Namespace::new);
        node.sysctl("net.ipv4.ip_forward", "1");
        for (machine, device, address) in [(&client, "c", CLIENT), (&server, "s", SERVER)] {
            let [a, b, c, _] = address.octets();
            let gateway = Ipv4Addr::new(a, b, c, 1);
            node.veth(device, machine, "eth0");
            node.addr_add(device, &format!("{gateway}/24"));
            machine.addr_add("eth0", &format!("{address}/24"));
            machine.route_add("default", &format!("via {gateway}"));
        }
        node.nft_load("table ip neighbour { set s { type inet_service; }; }");
        Self {
            node,
            client,
            server,
        }
    }

    /// Starts to probe until told to stop; the result is what each attempt took, in seconds.
    fn start(&self, probe: Probe, stop: Arc<AtomicBool>) -> thread::JoinHandle<Vec<f64>> {
        let node = self.node.clone();
        match probe {
            Probe::Transaction => {
                let mut kernel = node.run(Nftables::open).unwrap_or_else(|e| panic!("{e}"));
                repeat(stop, move |number| {
                    let applied = kernel.apply(&change(number));
                    applied.unwrap_or_else(|error| panic!("{error}"));
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
            Probe::Packet => self.ask(stop),
        }
    }

    fn ask(&self, stop: Arc<AtomicBool>) -> thread::JoinHandle<Vec<f64>> {
        let open = |machine: &Namespace, address: Ipv4Addr, port| {
            let socket = machine.run(|| UdpSocket::bind((address, port)));
            let socket = socket.unwrap_or_else(|error| panic!("no socket: {error}"));
            let limited = socket.set_read_timeout(Some(PATIENCE));
            limited.unwrap_or_else(|error| panic!("no time limit: {error}"));
            socket
        };
        let echo = open(&self.server, SERVER, ECHO);
        let asking = open(&self.client, CLIENT, 0);
        thread::spawn(move || {
            let mut buffer = [0; 8];
            while let Ok((length, from)) = echo.recv_from(&mut buffer) {
                let Some(datagram) = buffer.get(..length).filter(|bytes| !bytes.is_empty()) else {
                    return;
                };
                // The asker notices what is not answered.
                let _ = echo.send_to(datagram, from);
            }
        });
        let to = SocketAddr::from((SERVER, ECHO));
        thread::spawn(move || {
            let waits = attempts(&stop, |number| {
                let sent = asking.send_to(&number.to_be_bytes(), to);
                sent.unwrap_or_else(|error| panic!("a datagram was not sent: {error}"));
                let mut answer = [0; 8];
                let answered = asking.recv_from(&mut answer);
                answered.unwrap_or_else(|error| panic!("a datagram was lost: {error}"));
            });
            // Ends the echo.
            let _ = asking.send_to(&[], to);
            waits
        })
    }
}

/// Does something over and over on a thread of its own.
fn repeat(
    stop: Arc<AtomicBool>,
    attempt: impl FnMut(u64) + Send + 'static,
) -> thread::JoinHandle<Vec<f64>> {
    thread::spawn(move || attempts(&stop, attempt))
}

/// Times attempts until told to stop, with a pause after each, so that they are no load.
fn attempts(stop: &AtomicBool, mut attempt: impl FnMut(u64)) -> Vec<f64> {
    const PAUSE: Duration = Duration::from_millis(1);
    let mut waits = Vec::new();
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
}

/// Adds the one element of the other table, or deletes it, in turn.
fn change(number: u64) -> Transaction {
    let id = TableId::new(Family::Ip, "neighbour");
    let declaration = Declaration::new(SetKind::Set, [Selector::DestinationPort]);
    let elements = vec![Element::new(Key::build().port(80).finish())];
    let make = if number.is_multiple_of(2) {
        Op::AddElements
    } else {
        Op::DeleteElements
    };
    let op = make(id, "s".into(), Arc::new(declaration), elements);
    Transaction { ops: vec![op] }
}
