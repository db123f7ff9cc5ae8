//! The whole process against its budgets: from the API server to the kernel.
//!
//! `make scale SIZES=1000x10,10000x10` (as root, or with sudo).
//!
//! The program itself runs in a network namespace, beside an API server in memory that it reaches
//! over HTTP. For each size the server is given the objects of a cluster ([`cluster`]); nftlet is
//! started, left alone, and sees changes; [`measure`] tells the steps, [`process`] and [`ear`] how
//! it is watched. The same services in kube-proxy's shape are loaded with `nft` in another
//! namespace of the same run.
//!
//! How each quantity is measured:
//!
//! * *first program*: nftlet's own metric for a comparison with the kernel that writes everything.
//!   It runs from the end of the last list to the kernel's answer: compile, read, compare, write;
//! * *start*: from before the process is started until the line "the rules are in place" is read
//!   from its log. Nobody asks it meanwhile;
//! * *one change, from the bytes read*: the sum of `nftlet_programming_latency_seconds` before and
//!   after, which is exact, while its quantiles are those of buckets;
//! * *one change, from the server*: from the moment the server's watches are told to the kernel's
//!   news of the committed transaction, which this process hears. Both take their part of the same
//!   processors;
//! * *memory* and *processor time*: what the kernel says in `/proc`;
//! * *bytes and requests*: counted by the server.
//!
//! Budgets are in [`results`]; a missed one ends the benchmark with an error.

#[path = "../dataplane/baseline.rs"]
mod baseline;
#[path = "../budgets/mod.rs"]
mod budgets;
#[path = "../objects/mod.rs"]
mod cluster;
mod ear;
use nftlet_lab::fake_api;
#[path = "../machine/mod.rs"]
mod machine;
mod measure;
use nftlet_lab::netns;
mod plot;
mod pods;
mod process;
mod report;
mod results;
#[path = "../samples/mod.rs"]
mod samples;
mod server;
#[path = "../table/mod.rs"]
mod table;
#[path = "../workload/mod.rs"]
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use std::{fs, io};

use clap::Parser;

use cluster::Size;
use machine::{kernel_and_processors, named, refusal, write};
use measure::{Plan, measure};
use results::Report;
use table::Form;

/// Measures the whole process against its budgets.
#[derive(Debug, Parser)]
#[command(name = "scale")]
struct Arguments {
    /// Services and the endpoints of each, apart by commas.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1000x10,10000x10,30000x10,50000x20"
    )]
    sizes: Vec<Size>,
    /// Starts from empty rules.
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    starts: u32,
    /// Single changes of each kind.
    #[arg(long, default_value = "500", value_parser = clap::value_parser!(u32).range(1..))]
    changes: u32,
    /// NetworkPolicies, measured at the largest size of up to 10,000 services; 0 for none.
    #[arg(long, default_value = "1000")]
    policies: usize,
    /// Pods, for the policies.
    #[arg(long, default_value = "100000", value_parser = clap::value_parser!(u32).range(1_000..=1_000_000))]
    pods: u32,
    /// The largest number of services for which kube-proxy's shape is loaded as well, if that takes
    /// no more than five minutes.
    #[arg(long, default_value = "50000")]
    kube_proxy_up_to: usize,
    /// The program; cargo builds one with the profile of benchmarks otherwise.
    #[arg(long, value_name = "FILE", default_value = env!("CARGO_BIN_EXE_nftlet"))]
    nftlet: PathBuf,
    /// Where the numbers (scale.json) and the picture (scale.svg) go.
    #[arg(long, value_name = "DIRECTORY", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results"))]
    results: PathBuf,
    /// Measure nothing: table and picture from the numbers of an earlier run.
    #[arg(long)]
    again: bool,
    /// Print the table as Markdown.
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
    let (numbers, picture) = (
        arguments.results.join("scale.json"),
        arguments.results.join("scale.svg"),
    );
    let report = if arguments.again {
        let text = fs::read(&numbers).map_err(|error| named("read", &numbers, error))?;
        serde_json::from_slice(&text)?
    } else {
        if let Some(reason) = refusal() {
            return Err(io::Error::other(format!(
                "This benchmark programs kernels in network namespaces, which is not possible \
                 here: {reason}. Run it as root, or with `make scale`, which asks for the right."
            )));
        }
        fs::create_dir_all(&arguments.results)
            .map_err(|error| named("create", &arguments.results, error))?;
        let report = measure_all(arguments)?;
        write(&numbers, &serde_json::to_string_pretty(&report)?)?;
        report
    };
    write(&picture, &plot::draw(&report))?;
    let form = if arguments.markdown {
        Form::Markdown
    } else {
        Form::of_output()
    };
    print!("{}", report::render(&report, form));
    eprintln!("\n{} and {}", numbers.display(), picture.display());
    budgets::conclude("scale", &report.outcomes())
}

fn measure_all(arguments: &Arguments) -> io::Result<Report> {
    let started = Instant::now();
    eprintln!("measuring {}", arguments.nftlet.display());
    let mut sizes = arguments.sizes.clone();
    sizes.sort_by_key(|size| size.services * size.endpoints);
    let with_policies = sizes.iter().filter(|size| size.services <= 10_000);
    let with_policies = with_policies.max_by_key(|size| size.services).copied();
    let (mut measured, mut kept) = (Vec::new(), Vec::new());
    for size in sizes {
        let plan = Plan {
            size,
            starts: arguments.starts as usize,
            changes: arguments.changes as usize,
            policies: (Some(size) == with_policies && arguments.policies > 0)
                .then_some((arguments.policies, arguments.pods as usize)),
            kube_proxy: size.services <= arguments.kube_proxy_up_to,
            nftlet: arguments.nftlet.clone(),
        };
        measured.push(measure(&plan, &mut kept, |step| {
            let seconds = started.elapsed().as_secs_f64();
            eprintln!("{seconds:>6.1} s  {size}  {step}");
        }));
    }
    let (kernel, processors) = kernel_and_processors()?;
    let mut report = Report {
        kernel,
        processors,
        sizes: measured,
    };
    report.compare();
    eprintln!();
    Ok(report)
}
