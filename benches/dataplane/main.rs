//! What programming a kernel takes: nftlet, and the same services in kube-proxy's shape.
//!
//! `make bench ARGS='--sizes 1000'` (as root, or with sudo).
//!
//! For each size a cluster is made up, see [`workload`]. nftlet's side ([`agent`]) is the
//! reconciler with a real netlink socket in a fresh network namespace: the clock runs from handing
//! it the events until the kernel has answered. The other side ([`baseline`]) is the ruleset that
//! kube-proxy 1.36 writes for the same services, loaded with `nft -f -` in another namespace of
//! the same run, the clock running from the start of `nft` to its end. What kube-proxy itself
//! takes before and after is not counted, nor is what nftlet takes to decode objects.
//!
//! Both sides are compared within one run because machines differ; see [`report`] for the tables.

mod agent;
mod baseline;
#[path = "../budgets/mod.rs"]
mod budgets;
#[path = "../machine/mod.rs"]
mod machine;
mod measure;
use nftlet_lab::netns;
mod report;
#[path = "../table/mod.rs"]
mod table;
#[path = "../workload/mod.rs"]
mod workload;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use serde::Serialize;

use machine::{kernel_and_processors, refusal_of_large_rulesets, write};
use measure::{Measured, Plan, measure};
use report::render;
use table::Form;

/// Measures programming services: nftlet, and the same services in kube-proxy's shape.
#[derive(Debug, Parser)]
#[command(name = "dataplane")]
struct Arguments {
    /// Numbers of services, apart by commas.
    #[arg(
        long,
        env = "NFTLET_BENCH_SIZES",
        value_delimiter = ',',
        default_value = "1000,10000",
        value_parser = clap::value_parser!(u32).range(1..=300_000)
    )]
    sizes: Vec<u32>,
    /// Endpoints of each service.
    #[arg(long, default_value = "10", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    endpoints: u32,
    /// Fresh namespaces for nftlet's first program.
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Single endpoint changes.
    #[arg(long, default_value = "500", value_parser = clap::value_parser!(u32).range(1..))]
    changes: u32,
    /// What is printed.
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
    /// Print the tables as Markdown; the same as --output markdown.
    #[arg(long)]
    markdown: bool,
    /// Write all samples to a file as well.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Print what memory the first program takes and end; the benchmark calls itself so.
    #[arg(long, hide = true)]
    memory: bool,
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
    sizes: &'a [Measured],
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(reason) = refusal_of_large_rulesets() {
        eprintln!(
            "This benchmark programs kernels in network namespaces, which is not possible here: \
             {reason}. Run it as root, or with `make bench`, which asks for the right."
        );
        return ExitCode::FAILURE;
    }
    let plans: Vec<Plan> = arguments
        .sizes
        .iter()
        .map(|services| Plan {
            services: *services as usize,
            endpoints: arguments.endpoints as usize,
            rounds: arguments.rounds as usize,
            changes: arguments.changes as usize,
        })
        .collect();
    let result = if arguments.memory {
        plans.iter().try_for_each(|plan| {
            let json = serde_json::to_string(&measure::memory(plan))?;
            println!("{json}");
            Ok(())
        })
    } else {
        run(&arguments, &plans)
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments, plans: &[Plan]) -> io::Result<()> {
    let started = Instant::now();
    let mut sizes = Vec::new();
    for plan in plans {
        sizes.push(measure(plan, |step| {
            eprintln!(
                "{:>6.1} s  {} x {}  {step}",
                started.elapsed().as_secs_f64(),
                plan.services,
                plan.endpoints
            );
        }));
    }
    eprintln!();
    let (kernel, processors) = kernel_and_processors()?;
    let json = serde_json::to_string(&Report {
        kernel,
        processors,
        sizes: &sizes,
    })?;
    if let Some(file) = &arguments.json {
        write(file, &json)?;
    }
    match arguments.output {
        Output::Json => println!("{json}"),
        Output::Table if !arguments.markdown => print!("{}", render(&sizes, Form::of_output())),
        Output::Table | Output::Markdown => print!("{}", render(&sizes, Form::Markdown)),
    }
    if budgets::conclude("dataplane", &report::outcomes(&sizes))? {
        Ok(())
    } else {
        Err(io::Error::other("Budgets were missed."))
    }
}
