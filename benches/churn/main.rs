//! Churn: endpoints change all the time, clients connect all the time, for minutes.
//!
//! `make churn` (as root, or with sudo); `make churn ARGS='--seconds 60'` for a short one.
//!
//! The program itself runs on a node of network namespaces ([`lab`]), beside an API server in
//! memory that it reaches over HTTP:
//!
//! ```text
//!  client ──── node: nftlet <── HTTP ── API server <── 500 changes a second ([`changes`])
//!    │           │  rules
//!    │           v
//!    └── ClusterIP ──> endpoint ────── servers: answer on every address of every live service
//!  ([`traffic`])
//! ```
//!
//! Of the services of the cluster one in a hundred is *live*: its endpoints are addresses at which
//! somebody really answers, and goes on answering after an endpoint was replaced. So a connection
//! that fails is the fault of the rules. Changes are sent by the clock, whether or not the ones
//! before are in force: who cannot keep up is left with a backlog.
//!
//! The time is divided into twenty windows ([`measure`]). Nothing may grow from the second quarter
//! of the time to the last, no connection may fail, and in the end the kernel must hold what the
//! objects ask for ([`agreement`]). These are budgets ([`results`]); a missed one ends the
//! benchmark with an error.

mod agreement;
#[path = "../budgets/mod.rs"]
mod budgets;
mod changes;
#[path = "../objects/mod.rs"]
mod cluster;
use nftlet_lab::fake_api;
mod lab;
mod live;
#[path = "../machine/mod.rs"]
mod machine;
mod measure;
use nftlet_lab::netns;
mod plot;
#[path = "../scale/process.rs"]
mod process;
mod report;
mod results;
#[path = "../samples/mod.rs"]
mod samples;
#[path = "../scale/server.rs"]
mod server;
#[path = "../table/mod.rs"]
mod table;
mod traffic;
#[path = "../workload/mod.rs"]
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{fs, io};

use clap::Parser;

use cluster::Size;
use machine::{kernel_and_processors, named, refusal, write};
use measure::Plan;
use results::Report;
use table::Form;

/// Changes endpoints all the time, with traffic, and looks whether anything fails or grows.
#[derive(Debug, Parser)]
#[command(name = "churn")]
struct Arguments {
    /// How long endpoints change.
    #[arg(long, default_value = "600", value_parser = clap::value_parser!(u32).range(10..=86_400))]
    seconds: u32,
    /// Changes a second.
    #[arg(long, default_value = "500", value_parser = clap::value_parser!(u32).range(100..=10_000))]
    rate: u32,
    /// Connections a second.
    #[arg(long, default_value = "1000", value_parser = clap::value_parser!(u32).range(2..=5_000))]
    connections: u32,
    /// Services and the endpoints of each.
    #[arg(long, default_value = "10000x10")]
    size: Size,
    /// The program; cargo builds one with the profile of benchmarks otherwise.
    #[arg(long, value_name = "FILE", default_value = env!("CARGO_BIN_EXE_nftlet"))]
    nftlet: PathBuf,
    /// Where the numbers go; the picture goes beside them, with the ending svg.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure nothing: tables and picture from the numbers of an earlier run.
    #[arg(long, value_name = "FILE")]
    again: Option<PathBuf>,
    /// Print the tables as Markdown.
    #[arg(long)]
    markdown: bool,
    /// What cargo adds to the arguments of every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
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

/// Measures and reports; returns whether no budget was missed.
fn run(arguments: &Arguments) -> io::Result<bool> {
    let mut report = match &arguments.again {
        Some(file) => {
            let text = fs::read(file).map_err(|error| named("read", file, error))?;
            serde_json::from_slice(&text)?
        }
        None => measure(arguments)?,
    };
    report.judge();
    if let Some(file) = &arguments.json {
        write(file, &(serde_json::to_string_pretty(&report)? + "\n"))?;
        write(&file.with_extension("svg"), &plot::draw(&report))?;
    }
    let form = if arguments.markdown {
        Form::Markdown
    } else {
        Form::of_output()
    };
    eprintln!();
    print!("{}", report::render(&report, form));
    report::tell_failures(&report);
    budgets::conclude("churn", &report::outcomes(&report))
}

fn measure(arguments: &Arguments) -> io::Result<Report> {
    if let Some(reason) = refusal() {
        return Err(io::Error::other(format!(
            "This benchmark programs kernels in network namespaces, which is not possible here: \
             {reason}. Run it as root, or with `make churn`, which asks for the right."
        )));
    }
    live::check(arguments.size).map_err(io::Error::other)?;
    let plan = Plan {
        length: Duration::from_secs(arguments.seconds.into()),
        rate: arguments.rate,
        connections: arguments.connections,
        size: arguments.size,
        nftlet: arguments.nftlet.clone(),
    };
    let started = Instant::now();
    eprintln!("measuring {}", plan.nftlet.display());
    let measured = measure::measure(&plan, |step| {
        eprintln!("{:>6.1} s  {step}", started.elapsed().as_secs_f64());
    });
    let (kernel, processors) = kernel_and_processors()?;
    Ok(Report {
        kernel,
        processors,
        seconds: arguments.seconds,
        rate: arguments.rate,
        connections: arguments.connections,
        size: arguments.size,
        budgets: Vec::new(),
        measured,
    })
}
