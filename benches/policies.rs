//! What programming network policies takes.
//!
//! ```text
//! cargo bench --bench policies -- [--pods 10000,100000] [--policies 1000]
//! ```
//!
//! The reconciler programs a network namespace of its own; the clock runs from handing it an event
//! until the kernel has answered. [`cluster`] tells which pods and policies there are. Nothing is
//! compared with another program: none keeps policies in this form.

#[path = "workload/policies.rs"]
mod cluster;
use nftlet_lab::netns;

use std::hint::black_box;
use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::Parser;
use nftlet::compile::Settings;
use nftlet::host::routes;
use nftlet::metrics::Metrics;
use nftlet::model::{Delivery, Event, Kind, Object, ObjectName, ObjectRef, Pod};
use nftlet::netlink::{Applied, Error, Monitor, Nftables};
use nftlet::policy::{self, Engine};
use nftlet::reconcile::{Kernel, Log, Outcome, Reconciler};
use nftlet::ruleset::{Element, Ruleset, TableId, Transaction};
use serde::Serialize;

use cluster::{ALLOWED, Cluster, LOCAL, NODE};

/// Single changes of each kind.
const CHANGES: usize = 300;
/// Fresh namespaces for the first program.
const ROUNDS: usize = 3;

/// Measures programming network policies.
#[derive(Debug, Parser)]
#[command(name = "policies")]
struct Arguments {
    /// Numbers of pods, apart by commas.
    #[arg(long, value_delimiter = ',', default_value = "10000,100000")]
    pods: Vec<usize>,
    /// Policies.
    #[arg(long, default_value = "1000")]
    policies: usize,
    /// Write all medians to a file as well.
    #[arg(long, value_name = "FILE")]
    json: Option<std::path::PathBuf>,
    /// Print what memory the first program takes and end; the benchmark calls itself so.
    #[arg(long, hide = true)]
    memory: bool,
    /// What cargo adds to the arguments of every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// The kernel, with a count of what is written.
struct Counted {
    kernel: Nftables,
    elements: std::rc::Rc<std::cell::Cell<usize>>,
    messages: std::rc::Rc<std::cell::Cell<usize>>,
}

impl Kernel for Counted {
    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, Error> {
        let applied = self.kernel.apply(transaction)?;
        self.elements.set(self.elements.get() + applied.elements);
        self.messages.set(self.messages.get() + applied.messages);
        Ok(applied)
    }

    fn read(&mut self, names: &[&str], wanted: &Ruleset) -> Result<Ruleset, Error> {
        self.kernel.read(names, wanted)
    }

    fn elements(&mut self, table: &TableId, set: &str) -> Result<Vec<Element>, Error> {
        self.kernel.elements(table, set)
    }

    fn generation(&mut self) -> Result<u32, Error> {
        self.kernel.generation()
    }
}

#[derive(Debug, Default, Serialize)]
struct Samples {
    what: &'static str,
    pods: usize,
    seconds: Vec<f64>,
    elements: Vec<usize>,
    /// Seconds the median may take.
    budget: Option<f64>,
}

impl Samples {
    fn percentile(&self, percent: usize) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[(sorted.len() * percent).div_ceil(100).saturating_sub(1)]
    }

    fn met(&self) -> Option<bool> {
        self.budget.map(|budget| self.percentile(50) < budget)
    }
}

struct Agent<'a> {
    reconciler: Reconciler<'a, Counted>,
    elements: std::rc::Rc<std::cell::Cell<usize>>,
    messages: std::rc::Rc<std::cell::Cell<usize>>,
}

impl<'a> Agent<'a> {
    fn new(metrics: &'a Metrics) -> Self {
        let kernel = Nftables::open().unwrap_or_else(|error| panic!("{error}"));
        let (elements, messages) = Default::default();
        let counted = Counted {
            kernel,
            elements: std::rc::Rc::clone(&elements),
            messages: std::rc::Rc::clone(&messages),
        };
        let engine = Engine::new(policy::Settings {
            node: NODE.into(),
            ..policy::Settings::default()
        })
        .with_links(routes::find);
        let reconciler =
            Reconciler::new(counted, Settings::default(), metrics, &Log).with_policies(engine);
        Self {
            reconciler,
            elements,
            messages,
        }
    }

    /// A change of a pod: at least one element.
    fn change_pod(&mut self, samples: &mut Samples, events: Vec<Delivery>) {
        self.handle(samples, events);
        let elements = self.elements.get();
        assert!(elements > 0, "{} touched nothing", samples.what);
    }

    /// A change of a policy, which may leave the elements as they are.
    fn change_policy(&mut self, samples: &mut Samples, events: Vec<Delivery>) {
        self.handle(samples, events);
        let messages = self.messages.get();
        assert!(messages > 0, "{} touched nothing", samples.what);
    }

    fn handle(&mut self, samples: &mut Samples, events: Vec<Delivery>) {
        self.elements.set(0);
        self.messages.set(0);
        let started = Instant::now();
        assert_eq!(self.reconciler.handle(events), Outcome::Synced);
        samples.seconds.push(started.elapsed().as_secs_f64());
        samples.elements.push(self.elements.get());
    }
}

fn apply(pod: Pod) -> Vec<Delivery> {
    vec![Delivery::now(Event::Apply(Object::Pod(pod)))]
}

fn delete(kind: Kind, name: ObjectName) -> Vec<Delivery> {
    vec![Delivery::now(Event::Delete(ObjectRef::new(kind, name)))]
}

fn measure(pods: usize, policies: usize) -> Vec<Samples> {
    let cluster = Cluster::new(pods, policies);
    let budgeted = pods <= 10_000;
    let new = |what, budget: f64, always: bool| Samples {
        what,
        pods,
        budget: (budgeted || always).then_some(budget),
        ..Samples::default()
    };
    let mut first = new("first program", 1.0, false);
    let mut restart = Samples {
        what: "restart, nothing changed",
        pods,
        ..Samples::default()
    };
    let mut added = new("remote pod added", 0.001, true);
    let mut relabelled = new("remote pod relabelled", 0.001, true);
    let mut removed = new("remote pod removed", 0.001, true);
    let mut local_added = new("local pod added", 0.003, false);
    let mut local_removed = Samples {
        what: "local pod removed",
        pods,
        ..Samples::default()
    };
    let mut policy_added = Samples {
        what: "policy added",
        pods,
        ..Samples::default()
    };
    let mut policy_removed = Samples {
        what: "policy removed",
        pods,
        ..Samples::default()
    };
    for round in 0..ROUNDS {
        let namespace = netns::Namespace::new("policies");
        namespace.run(|| {
            let metrics = Metrics::new().expect("metrics have different names");
            let mut agent = Agent::new(&metrics);
            agent.handle(&mut first, cluster.lists());
            agent_again(&metrics, &cluster, &mut restart);
            if round + 1 < ROUNDS {
                return;
            }
            // As in the agent, somebody listens for changes after the first program.
            let mut monitor = Monitor::new(&[policy::TABLE], &agent.reconciler_kernel());
            monitor.listen().unwrap_or_else(|error| panic!("{error}"));
            for change in 0..CHANGES {
                let mut pod = cluster.later_pod(change);
                agent.change_pod(&mut added, apply(pod.clone()));
                pod.labels = cluster.labels[(change + 1) % ALLOWED].clone();
                agent.change_pod(&mut relabelled, apply(pod.clone()));
                agent.change_pod(&mut removed, delete(Kind::Pod, pod.name));
            }
            for change in 0..CHANGES {
                let mut pod = cluster.later_pod(change);
                pod.node = Some(NODE.into());
                agent.change_pod(&mut local_added, apply(pod.clone()));
                agent.change_pod(&mut local_removed, delete(Kind::Pod, pod.name));
            }
            for change in 0..CHANGES {
                let mut policy = cluster.selecting_policy(change);
                policy.name = ObjectName::new(policy.name.namespace(), "another");
                let name = policy.name.clone();
                let event = Event::Apply(Object::NetworkPolicy(policy));
                agent.change_policy(&mut policy_added, vec![Delivery::now(event)]);
                agent.change_policy(&mut policy_removed, delete(Kind::NetworkPolicy, name));
            }
        });
    }
    vec![
        first,
        restart,
        added,
        relabelled,
        removed,
        local_added,
        local_removed,
        policy_added,
        policy_removed,
    ]
}

impl Agent<'_> {
    /// A socket whose own changes a monitor leaves out; the agent's own cannot be borrowed.
    fn reconciler_kernel(&self) -> Nftables {
        Nftables::open().unwrap_or_else(|error| panic!("{error}"))
    }
}

/// A new process that finds the rules in place.
fn agent_again(metrics: &Metrics, cluster: &Cluster, restart: &mut Samples) {
    let mut successor = Agent::new(metrics);
    successor.handle(restart, cluster.lists());
    assert_eq!(
        restart.elements.last(),
        Some(&0),
        "a restart finds what it wants"
    );
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Memory {
    pods: usize,
    peak: f64,
    kept: f64,
    without: f64,
}

fn mebibytes(field: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kibibytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    kibibytes.expect("the kernel counts memory in kB") / 1024.0
}

/// Programs a namespace and tells how much memory that took.
fn memory(pods: usize, policies: usize) {
    let namespace = netns::Namespace::new("policies");
    namespace.enter();
    let metrics = Metrics::new().expect("metrics have different names");
    let mut agent = Agent::new(&metrics);
    let without = mebibytes("VmRSS:");
    // As from a source, in batches; a source shares labels, ports and node names too.
    let mut events = Cluster::new(pods, policies).lists().into_iter();
    loop {
        let batch: Vec<Delivery> = events.by_ref().take(4096).collect();
        if batch.is_empty() {
            break;
        }
        black_box(agent.reconciler.handle(batch));
    }
    drop(events);
    println!("{} {} {without}", mebibytes("VmHWM:"), mebibytes("VmRSS:"));
}

fn memory_of_child(pods: usize, policies: usize) -> Memory {
    let program = std::env::current_exe().expect("the benchmark knows its program");
    let output = Command::new(program)
        .arg(format!("--pods={pods}"))
        .arg(format!("--policies={policies}"))
        .arg("--memory")
        .output()
        .expect("the benchmark can start itself");
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers: Vec<f64> = text
        .split_whitespace()
        .filter_map(|n| n.parse().ok())
        .collect();
    let [peak, kept, without] = numbers[..] else {
        panic!(
            "measuring memory fails: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    Memory {
        pods,
        peak,
        kept,
        without,
    }
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.0} µs", s * 1e6),
    }
}

fn print(all: &[Samples], memories: &[Memory], policies: usize) {
    println!("Network policies: {policies}, pods of this node: {LOCAL}\n");
    println!(
        "| what                     |    pods |    median |       p99 | elements |  budget | met |"
    );
    println!(
        "|--------------------------|--------:|----------:|----------:|---------:|--------:|----:|"
    );
    for samples in all {
        let mut elements = samples.elements.clone();
        elements.sort_unstable();
        println!(
            "| {:24} | {:7} | {:>9} | {:>9} | {:8} | {:>7} | {:>3} |",
            samples.what,
            samples.pods,
            time(samples.percentile(50)),
            if samples.seconds.len() >= 100 {
                time(samples.percentile(99))
            } else {
                "-".into()
            },
            elements[elements.len() / 2],
            samples.budget.map_or("-".into(), time),
            match samples.met() {
                None => "-",
                Some(true) => "yes",
                Some(false) => "NO",
            }
        );
    }
    println!();
    println!("| memory          |    pods | kept, MiB | peak, MiB |");
    println!("|-----------------|--------:|----------:|----------:|");
    for memory in memories {
        println!(
            "| of the objects  | {:7} | {:9.1} | {:9.1} |",
            memory.pods,
            memory.kept - memory.without,
            memory.peak - memory.without
        );
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.memory {
        memory(arguments.pods[0], arguments.policies);
        return ExitCode::SUCCESS;
    }
    let (mut all, mut memories) = (Vec::new(), Vec::new());
    for pods in &arguments.pods {
        eprintln!("{pods} pods, {} policies ...", arguments.policies);
        memories.push(memory_of_child(*pods, arguments.policies));
        all.extend(measure(*pods, arguments.policies));
    }
    print(&all, &memories, arguments.policies);
    if let Some(file) = &arguments.json {
        let json = serde_json::to_string_pretty(&(&all, &memories)).expect("numbers are JSON");
        if let Err(error) = std::fs::write(file, json) {
            eprintln!("cannot write {}: {error}", file.display());
            return ExitCode::FAILURE;
        }
    }
    match all
        .iter()
        .filter(|samples| samples.met() == Some(false))
        .count()
    {
        0 => ExitCode::SUCCESS,
        missed => {
            eprintln!("{missed} budgets were missed.");
            ExitCode::FAILURE
        }
    }
}
