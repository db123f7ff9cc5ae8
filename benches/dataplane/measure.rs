//! The measurements of one cluster size.

use std::process::Command;

use nftlet::metrics::Metrics;
use nftlet::model::Event;
use serde::{Deserialize, Serialize};

use crate::agent::{Agent, Cost};
use crate::baseline;
use crate::netns::Namespace;
use crate::workload::{Random, Workload};

/// How many changes are timed one by one.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Services.
    pub services: usize,
    /// Endpoints of each.
    pub endpoints: usize,
    /// Fresh namespaces for nftlet's first program.
    pub rounds: usize,
    /// Single endpoint changes.
    pub changes: usize,
}

/// One thing that was measured on both sides.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What happened.
    pub what: String,
    /// nftlet's samples.
    pub nftlet: Vec<Cost>,
    /// nftlet's samples in which encoding was measured apart.
    pub nftlet_split: Vec<Cost>,
    /// The other side's samples.
    pub baseline: Vec<Load>,
    /// What was promised.
    pub budget: Option<Budget>,
}

/// A run of nft on the ruleset in kube-proxy's shape, times in seconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Load {
    /// From starting the program to its end.
    pub wall: f64,
    /// The processor time of that in the kernel, as the kernel counts it: in ticks of a few
    /// milliseconds, so that only a mean of many runs tells something of short ones.
    pub kernel: f64,
    /// The length of the commands.
    pub bytes: usize,
}

/// A bound on nftlet's median.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// Less than so many seconds.
    Seconds(f64),
    /// Less than this part of the baseline's.
    PartOfBaseline(f64),
}

/// Memory of a process that did the first program and nothing else, in bytes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Memory {
    /// The most it ever had.
    pub peak: u64,
    /// What it kept.
    pub kept: u64,
}

/// All measurements of one size.
#[derive(Debug, Serialize)]
pub struct Measured {
    /// Services.
    pub services: usize,
    /// Endpoints of each.
    pub endpoints: usize,
    /// The measurements.
    pub rows: Vec<Row>,
    /// Memory for the first program.
    pub memory: Memory,
}

/// The size for which budgets were set.
const BUDGETED: (usize, usize) = (10_000, 10);
/// How many services change in the measurement of many changes at once.
const AT_ONCE: usize = 1_000;
/// How many samples tell enough of what has no budget.
const FEW: usize = 50;

const FIRST: usize = 0;
const RESTART: usize = 1;
const REPLACE: usize = 2;
const COUNT: usize = 3;
const NEW_COUNT: usize = 4;
const BATCH: usize = 5;
const ADD: usize = 6;
const DELETE: usize = 7;
const HEAL: usize = 8;
const AUDIT: usize = 9;
const WHAT: [&str; 10] = [
    "first program",
    "restart, nothing changed",
    "one endpoint replaced",
    "one endpoint more or less",
    "the same, first service with that number",
    "one endpoint replaced in many services at once",
    "a service added",
    "a service deleted",
    "`flush ruleset` healed",
    "copy for an audit",
];
/// Healing a small cluster after `nft flush ruleset`, in seconds.
const HEAL_SMALL: (usize, f64) = (1_000, 0.1);
/// Healing a large one, in times of its first program.
const HEAL_LARGE: f64 = 2.0;

/// Runs everything for one size.
pub fn measure(plan: &Plan, mut progress: impl FnMut(&str)) -> Measured {
    let mut rows: Vec<Row> = WHAT.iter().map(|what| Row::new(what)).collect();
    if plan.services >= BUDGETED.0 && plan.endpoints >= BUDGETED.1 {
        rows[FIRST].budget = Some(Budget::PartOfBaseline(0.1));
        rows[REPLACE].budget = Some(Budget::Seconds(0.002));
    }
    let many = AT_ONCE.min(plan.services);
    rows[BATCH].what = format!("one endpoint replaced in {many} services at once");
    let workload = Workload::new(plan.services, plan.endpoints);

    progress("nftlet: memory of the first program");
    let memory = memory_of_child(plan);
    // Namespaces live until the end: taking one down keeps the kernel busy in the background.
    let mut namespaces = Vec::new();
    for round in 0..=plan.rounds {
        progress(&format!(
            "nftlet: first program, {}",
            match round {
                0 => "once to warm up and to time its parts".to_owned(),
                round => format!("{round} of {}", plan.rounds),
            }
        ));
        let namespace = Namespace::new("nftlet");
        namespace.run(|| nftlet_round(plan, &workload, round, &mut rows));
        namespaces.push(namespace);
    }
    let first = rows[FIRST].nftlet_median().unwrap_or_default();
    rows[HEAL].budget = if plan.services <= HEAL_SMALL.0 {
        Some(Budget::Seconds(HEAL_SMALL.1))
    } else {
        Some(Budget::Seconds(first * HEAL_LARGE))
    };
    let namespace = Namespace::new("baseline");
    baseline_round(plan, &workload, &namespace, &mut rows, &mut progress);
    Measured {
        services: plan.services,
        endpoints: plan.endpoints,
        rows,
        memory,
    }
}

/// One namespace from empty rules on. Round 0 measures encoding apart, the last one does the
/// single changes.
fn nftlet_round(plan: &Plan, workload: &Workload, round: usize, rows: &mut [Row]) {
    let split = round == 0;
    let metrics = Metrics::new().expect("metrics have different names");
    let mut agent = Agent::new(&metrics);
    if split {
        agent.split();
    }
    let mut note = |row: usize, cost: Cost| {
        let row = &mut rows[row];
        if split {
            row.nftlet_split.push(cost);
        } else {
            row.nftlet.push(cost);
        }
    };
    note(FIRST, agent.handle(workload.lists()));

    let mut successor = Agent::new(&metrics);
    let cost = successor.handle(workload.lists());
    assert_eq!(cost.transactions, 0, "a restart finds what it wants");
    note(RESTART, cost);
    drop(successor);

    note(AUDIT, agent.audit());
    note(HEAL, agent.heal(flush_ruleset));

    let mut workload = workload.clone();
    let mut random = Random::new();
    let single = split || round == plan.rounds;
    if single {
        for _ in 0..if split { FEW } else { plan.changes } {
            let event = replace_any(&mut workload, plan, &mut random);
            note(REPLACE, agent.handle(vec![event]));
        }
    }
    let service = random.below(plan.services);
    note(NEW_COUNT, agent.handle(vec![workload.grow(service)]));
    agent.handle(vec![workload.shrink(service)]);
    let events = replace_many(&mut workload, plan);
    note(BATCH, agent.handle(events));
    if single {
        for _ in 0..FEW {
            let service = random.below(plan.services);
            note(COUNT, agent.handle(vec![workload.grow(service)]));
            note(COUNT, agent.handle(vec![workload.shrink(service)]));
        }
        for _ in 0..FEW {
            let service = workload.add_service(plan.endpoints);
            note(ADD, agent.handle(workload.service_events(service)));
            note(DELETE, agent.handle(workload.delete_events(service)));
        }
    }
}

fn baseline_round(
    plan: &Plan,
    workload: &Workload,
    namespace: &Namespace,
    rows: &mut [Row],
    mut progress: impl FnMut(&str),
) {
    let mut load = |row: usize, commands: String| {
        let cost = baseline::load(namespace, &commands);
        rows[row].baseline.push(Load {
            wall: cost.wall.as_secs_f64(),
            kernel: cost.kernel.as_secs_f64(),
            bytes: commands.len(),
        });
    };
    progress("kube-proxy's shape: first program");
    load(FIRST, baseline::table(workload));

    progress("kube-proxy's shape: changes");
    let mut workload = workload.clone();
    let mut random = Random::new();
    // Each takes a good part of a second in a large table.
    let times = if plan.services > 2_000 { 7 } else { 21 };
    for _ in 0..times {
        let service = random.below(plan.services);
        workload.replace_endpoint(service, random.below(plan.endpoints));
        load(REPLACE, baseline::change(&workload, service));
        let service = random.below(plan.services);
        workload.grow(service);
        load(COUNT, baseline::change(&workload, service));
        let service = workload.add_service(plan.endpoints);
        load(ADD, baseline::add(&workload, service));
        load(DELETE, baseline::delete(&workload, service));
    }
    progress("kube-proxy's shape: many changes at once");
    replace_many(&mut workload, plan);
    let many = AT_ONCE.min(plan.services);
    let commands = (0..many).map(|service| baseline::change(&workload, service));
    load(BATCH, commands.collect());
}

/// Empties the ruleset of the calling thread's namespace, as the reload of a firewall does.
fn flush_ruleset() {
    let status = Command::new("nft").args(["flush", "ruleset"]).status();
    let flushed = status.is_ok_and(|status| status.success());
    assert!(flushed, "nft can flush the ruleset");
}

/// Replaces a random endpoint of a random service.
fn replace_any(workload: &mut Workload, plan: &Plan, random: &mut Random) -> Event {
    let service = random.below(plan.services);
    workload.replace_endpoint(service, random.below(plan.endpoints))
}

/// Replaces an endpoint of each of many services.
fn replace_many(workload: &mut Workload, plan: &Plan) -> Vec<Event> {
    (0..AT_ONCE.min(plan.services))
        .map(|service| workload.replace_endpoint(service, service % plan.endpoints))
        .collect()
}

/// Measures memory in a process that holds no more than the agent does.
fn memory_of_child(plan: &Plan) -> Memory {
    let program = std::env::current_exe().expect("the benchmark knows its program");
    let output = Command::new(program)
        .arg(format!("--sizes={}", plan.services))
        .arg(format!("--endpoints={}", plan.endpoints))
        .arg("--memory")
        .output()
        .expect("the benchmark can start itself");
    assert!(
        output.status.success(),
        "measuring memory fails: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("the benchmark understands itself")
}

/// Programs a namespace and tells how much memory that took.
pub fn memory(plan: &Plan) -> Memory {
    let namespace = Namespace::new("nftlet");
    namespace.enter();
    let metrics = Metrics::new().expect("metrics have different names");
    let mut agent = Agent::new(&metrics);
    // The workload is gone when the memory is read; what it took may show in the peak.
    let events = Workload::new(plan.services, plan.endpoints).lists();
    agent.handle(events);
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kibibytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        kibibytes.expect("the kernel counts memory in kB") * 1024
    };
    Memory {
        peak: field("VmHWM:"),
        kept: field("VmRSS:"),
    }
}

impl Row {
    fn new(what: &str) -> Self {
        Self {
            what: what.to_owned(),
            nftlet: Vec::new(),
            nftlet_split: Vec::new(),
            baseline: Vec::new(),
            budget: None,
        }
    }

    /// nftlet's median in seconds.
    pub fn nftlet_median(&self) -> Option<f64> {
        percentile(self.nftlet.iter().map(|cost| cost.total), 50)
    }

    /// The other side's median in seconds.
    pub fn baseline_median(&self) -> Option<f64> {
        percentile(self.baseline.iter().map(|load| load.wall), 50)
    }

    /// The mean of the other side's time in the kernel in seconds.
    pub fn baseline_kernel(&self) -> Option<f64> {
        let sum: f64 = self.baseline.iter().map(|load| load.kernel).sum();
        (!self.baseline.is_empty()).then(|| sum / self.baseline.len() as f64)
    }

    /// Whether the budget was kept; `None` without a budget.
    pub fn met(&self) -> Option<bool> {
        let nftlet = self.nftlet_median()?;
        match self.budget? {
            Budget::Seconds(bound) => Some(nftlet < bound),
            Budget::PartOfBaseline(part) => Some(nftlet < part * self.baseline_median()?),
        }
    }
}

/// The smallest sample that so many percent of all do not exceed.
pub fn percentile(samples: impl Iterator<Item = f64>, percent: usize) -> Option<f64> {
    let mut sorted: Vec<f64> = samples.collect();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}
