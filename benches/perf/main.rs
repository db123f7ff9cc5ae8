//! What nftlet costs as a whole: its program, beside an API server in memory, in network
//! namespaces of this machine.
//!
//! ```text
//! cargo bench --bench perf -- SCENE [OPTIONS]        (as root)
//! ```
//!
//! Each scene measures, prints tables, and fails when a budget (`budgets.txt`) is missed. What
//! several scenes need is beside this file: [`server`] and [`process`] run the program,
//! [`kube_proxy`] is what it is compared with, [`facts`] and [`subject`] are all that is used of the
//! library, and [`report`] holds results. Clusters, the API server and namespaces are those of the
//! crate `nftlet-lab`.

#[path = "../facts/mod.rs"]
mod facts;
mod kube_proxy;
mod process;
mod report;
mod samples;
mod scenes;
mod server;
mod subject;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};

use report::Report;
use scenes::{
    changes, churn, conntrack, first, insight, neighbours, packets, policies, ranges, reach,
};

/// Measures nftlet as a whole, against its budgets.
#[derive(Debug, Parser)]
#[command(name = "perf")]
struct Arguments {
    #[command(subcommand)]
    scene: Scene,
    /// Write the result to SCENE.json in this directory, too.
    #[arg(long, global = true, value_name = "DIRECTORY")]
    results: Option<PathBuf>,
    /// The program to measure; one of cargo's profile for benchmarks by default.
    #[arg(long, global = true, value_name = "FILE", default_value = env!("CARGO_BIN_EXE_nftlet"))]
    nftlet: PathBuf,
    /// Cargo adds this to the arguments of every benchmark.
    #[arg(long, global = true, hide = true)]
    bench: bool,
}

#[derive(Debug, Subcommand)]
enum Scene {
    /// First rules of a cluster: time, memory, idleness, restart, repair.
    First(first::Arguments),
    /// Changes of services and endpoints, one by one and many at once.
    Changes(changes::Arguments),
    /// Network policies: first rules, memory, changes of pods and policies.
    Policies(policies::Arguments),
    /// New and established connections through the rules.
    Packets(packets::Arguments),
    /// Minutes of changes and connections: nothing may fail or grow.
    Churn(churn::Arguments),
    /// How long others wait while rules of a huge cluster are written.
    Neighbours(neighbours::Arguments),
    /// Deletion of stale UDP flows from a large table.
    Conntrack(conntrack::Arguments),
    /// How long the kernel takes to fill sets of ranges.
    Ranges(ranges::Arguments),
    /// Answers of the commands that explain, from a dump and from the running agent.
    Insight(insight::Arguments),
    /// Who can connect to whom in a large cluster, from a dump.
    Reach(reach::Arguments),
}

/// What every scene gets.
struct Context {
    nftlet: PathBuf,
    started: Instant,
}

impl Context {
    /// Prints a step on standard error, with the time since the start.
    fn progress(&self, step: impl std::fmt::Display) {
        eprintln!("{:>6.1} s  {step}", self.started.elapsed().as_secs_f64());
    }
}

impl Scene {
    fn run(&self, context: &Context) -> Report {
        match self {
            Self::First(scene) => scene.run(context),
            Self::Changes(scene) => scene.run(context),
            Self::Policies(scene) => scene.run(context),
            Self::Packets(scene) => scene.run(context),
            Self::Churn(scene) => scene.run(context),
            Self::Neighbours(scene) => scene.run(context),
            Self::Conntrack(scene) => scene.run(context),
            Self::Ranges(scene) => scene.run(context),
            Self::Insight(scene) => scene.run(context),
            Self::Reach(scene) => scene.run(context),
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // The map of the first user namespace covers every number; others limit transactions of nft.
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let first = map.split_whitespace().eq(["0", "0", "4294967295"]);
    if !first || !nix::unistd::geteuid().is_root() {
        eprintln!("perf needs root outside of user namespaces. `make bench` asks for it.");
        return ExitCode::FAILURE;
    }
    let context = Context {
        nftlet: arguments.nftlet,
        started: Instant::now(),
    };
    let report = arguments.scene.run(&context);
    match report.conclude(arguments.results.as_deref()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cannot run scripts/bench-report.py: {error}");
            ExitCode::FAILURE
        }
    }
}
