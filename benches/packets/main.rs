//! What packets pay for services: new connections through a ClusterIP, and established ones.
//!
//! `make packets ARGS='--sizes 100,10000'` (as root, or with sudo).
//!
//! A lane ([`lanes`]) is a client, a node and a server in network namespaces of their own. Lanes
//! differ in the rules of their node only: nftlet's at several sizes, kube-proxy's shape of the
//! same services, nothing at all. All of them exist at once, and [`traffic`] goes through each in
//! turn, in small batches of many rounds ([`measure`]). So whatever else the machine does hits all
//! alike, and [`results`] compares the lanes within each round before it takes a median. See
//! [`report`] for the tables.

#[path = "../dataplane/agent.rs"]
#[allow(dead_code, reason = "only the first program is needed")]
mod agent;
#[path = "../dataplane/baseline.rs"]
mod baseline;
#[path = "../budgets/mod.rs"]
mod budgets;
mod lanes;
#[path = "../machine/mod.rs"]
mod machine;
mod measure;
use nftlet_lab::netns;
#[path = "../workload/policies.rs"]
mod policies;
mod report;
mod results;
#[path = "../table/mod.rs"]
mod table;
mod traffic;
#[path = "../workload/mod.rs"]
mod workload;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use serde::Serialize;

use machine::{kernel_and_processors, refusal_of_large_rulesets, write};
use measure::{Plan, measure};
use results::{Comparison, Results};
use table::Form;

/// Measures new and established connections through nftlet's rules, kube-proxy's, and none.
#[derive(Debug, Parser)]
#[command(name = "packets")]
struct Arguments {
    /// Numbers of services, apart by commas.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "100,10000,50000",
        value_parser = clap::value_parser!(u32).range(1..=300_000)
    )]
    sizes: Vec<u32>,
    /// Endpoints of each service.
    #[arg(long, default_value = "10", value_parser = clap::value_parser!(u32).range(1..=100))]
    endpoints: u32,
    /// The largest size that is also loaded in kube-proxy's shape, if that takes no more than five
    /// minutes: the time grows with the square.
    #[arg(long, default_value = "50000", value_name = "SERVICES")]
    baseline_up_to: u32,
    /// Rounds, each of which goes through all lanes.
    #[arg(long, default_value = "150", value_parser = clap::value_parser!(u32).range(10..=2_000))]
    rounds: u32,
    /// New connections, and round trips, through each lane in each round.
    #[arg(long, default_value = "200", value_parser = clap::value_parser!(u32).range(10..=1_000))]
    batch: u32,
    /// What is printed.
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
    /// Print the tables as Markdown; the same as --output markdown.
    #[arg(long)]
    markdown: bool,
    /// Write the medians of all rounds to a file as well.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// What cargo adds to the arguments of every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Markdown,
    Json,
}

/// Everything that was measured, and where.
#[derive(Debug, Serialize)]
struct Report<'a> {
    kernel: String,
    processors: usize,
    results: &'a Results,
    comparisons: &'a [Comparison],
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let ended = match refusal_of_large_rulesets() {
        Some(reason) => Err(io::Error::other(format!(
            "This benchmark programs kernels in network namespaces, which is not possible here: \
             {reason}. Run it as root, or with `make packets`, which asks for the right."
        ))),
        None => run(&arguments),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> io::Result<()> {
    let mut sizes: Vec<usize> = arguments.sizes.iter().map(|size| *size as usize).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let plan = Plan {
        sizes,
        endpoints: arguments.endpoints as usize,
        baseline_up_to: arguments.baseline_up_to as usize,
        rounds: arguments.rounds as usize,
        batch: arguments.batch as usize,
    };
    let started = Instant::now();
    let results = measure(&plan, |step| {
        eprintln!("{:>6.1} s  {step}", started.elapsed().as_secs_f64());
    });
    eprintln!();
    let comparisons = results.comparisons();
    let (kernel, processors) = kernel_and_processors()?;
    let json = serde_json::to_string(&Report {
        kernel,
        processors,
        results: &results,
        comparisons: &comparisons,
    })?;
    if let Some(file) = &arguments.json {
        write(file, &json)?;
    }
    let tables = |form| print!("{}", report::render(&results, &comparisons, form));
    match arguments.output {
        Output::Json => println!("{json}"),
        Output::Table if !arguments.markdown => tables(Form::of_output()),
        Output::Table | Output::Markdown => tables(Form::Markdown),
    }
    let mut outcomes: Vec<_> = comparisons.iter().filter_map(Comparison::outcome).collect();
    outcomes.extend(results.without_rival());
    if budgets::conclude("packets", &outcomes)? {
        Ok(())
    } else {
        Err(io::Error::other("Budgets were missed."))
    }
}
