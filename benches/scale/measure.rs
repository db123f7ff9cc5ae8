//! The measurements of one cluster size.
//!
//! ```text
//!  this process                              nftlet
//!  ┌─────────────┐  HTTP: lists, watches  ┌──────────┐
//!  │ FakeApi     │ ─────────────────────> │          │
//!  │             │  log, metrics, /proc   │ Process  │
//!  │ measure     │ <───────────────────── │          │
//!  │ Ear         │ <── news ── kernel <── │          │
//!  └─────────────┘                        └──────────┘
//! ```
//!
//! Both are in one network namespace. Nothing of nftlet is changed or told that it is measured.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::baseline;
use crate::cluster::{Cluster, Put, Size};
use crate::ear::Ear;
use crate::fake_api::{PODS, Streaming};
use crate::netns::Namespace;
use crate::pods::Pods;
use crate::process::{Process, tick};
use crate::results::{KubeProxy, Measured, What};
use crate::samples::Samples;
use crate::server::{Server, is_list};
use crate::workload::Random;

/// What is done for a size.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The size.
    pub size: Size,
    /// Starts from empty rules.
    pub starts: usize,
    /// Single changes of each kind.
    pub changes: usize,
    /// Policies and pods, if they are measured at this size.
    pub policies: Option<(usize, usize)>,
    /// Whether to load kube-proxy's shape.
    pub kube_proxy: bool,
    /// The program.
    pub nftlet: PathBuf,
}

/// The changes whose processor time is counted together.
const COUNTED: usize = 1_000;
/// The services that change at once.
const AT_ONCE: usize = 1_000;
/// How often they do.
const ROUNDS: usize = 5;
/// How long a process is left alone before its memory is read, and then before its idleness is.
const SETTLE: Duration = Duration::from_secs(2);
const IDLE: Duration = Duration::from_secs(10);
/// Nothing more belongs to a single change, and to many at once, when nothing was heard for so
/// long.
const QUIET: Duration = Duration::from_millis(1);
const QUIET_AT_ONCE: Duration = Duration::from_millis(100);
/// nftlet's own clocks: from receiving a change, and of a comparison with the kernel.
const LATENCY: &str = "nftlet_programming_latency_seconds";
const FULL: &str = "kubeproxy_sync_full_proxy_rules_duration_seconds";
const TRANSACTION: &str = "nftlet_transaction_duration_seconds";
const POLICY: &str = "nftlet_policy_sync_duration_seconds";
const FAMILY: &str = "{ip_family=\"IPv4\"}";

/// Runs everything for one size.
///
/// The namespaces are handed over to be kept: taking one down keeps the kernel busy in the
/// background, and so would rules that are flushed.
pub fn measure(plan: &Plan, kept: &mut Vec<Namespace>, mut progress: impl FnMut(&str)) -> Measured {
    let mut measured = Measured {
        size: plan.size,
        policies: plan.policies,
        values: Vec::new(),
        kube_proxy: KubeProxy::NotTried,
    };
    progress("encoding the objects");
    let mut cluster = Cluster::new(plan.size);
    let mut server = Server::new(Namespace::new("scale"));
    server.put(cluster.objects());

    let process = starts(plan, &mut server, &mut measured, &mut progress);
    progress("idle");
    settle(&process, &mut measured);
    let process = Watched::new(process, &server);
    changes(plan, &process, &mut cluster, &mut measured, &mut progress);
    process.process.stop();

    progress("start with rules in place");
    restart(plan, &server, &mut measured);
    progress("start with lists in pages");
    server.another_node(Namespace::new("scale"));
    server.api.set_streaming(Streaming::Rejected);
    let (paged, took) = server.start(&plan.nftlet);
    measured.note(What::StartPaged, took.as_secs_f64());
    measured.note(What::PeakPaged, paged.memory().peak as f64);
    paged.stop();
    server.api.set_streaming(Streaming::Yes);

    if let Some((policies, pods)) = plan.policies {
        progress(&format!("{policies} policies, {pods} pods"));
        let pods = Pods::new(pods, policies);
        with_policies(plan, &mut server, pods, &mut measured);
    }
    if plan.kube_proxy {
        progress(&format!(
            "kube-proxy's shape, {} s at most",
            baseline::PATIENCE.as_secs()
        ));
        let namespace = Namespace::new("kube-proxy");
        measured.kube_proxy = kube_proxy(&namespace, &mut cluster);
        kept.push(namespace);
    }
    kept.append(&mut server.namespaces);
    measured
}

/// Starts the process again and again; returns the last one.
fn starts(
    plan: &Plan,
    server: &mut Server,
    measured: &mut Measured,
    progress: &mut impl FnMut(&str),
) -> Process {
    let (mut starts, mut processor) = (Samples::default(), Samples::default());
    let (mut first, mut transactions) = (Samples::default(), Samples::default());
    let mut running: Option<Process> = None;
    let (mut sent, mut asked) = (0, 0);
    for number in 1..=plan.starts {
        progress(&format!("start {number} of {}", plan.starts));
        if let Some(process) = running.take() {
            process.stop();
            server.another_node(Namespace::new("scale"));
        }
        (sent, asked) = (server.api.sent(), server.api.requests().len());
        let (process, took) = server.start(&plan.nftlet);
        starts.push(took.as_secs_f64());
        processor.push(process.ticks() as f64 * tick());
        let metrics = process.metrics();
        transactions.push(metrics.histogram(TRANSACTION, "").0);
        let (sum, count) = metrics.histogram(FULL, FAMILY);
        assert_eq!(count, 1, "the first rules are written once");
        first.push(sum);
        running = Some(process);
    }
    let requests = server.api.requests().split_off(asked);
    measured.note(What::FirstProgram, first.median());
    measured.note(What::FirstTransactions, transactions.median());
    measured.note(What::Start, starts.median());
    measured.note(What::StartProcessor, processor.median());
    measured.note(What::StartBytes, (server.api.sent() - sent) as f64);
    measured.note(What::StartRequests, requests.len() as f64);
    let mut lists: Vec<&str> = requests
        .iter()
        .filter(|request| is_list(request))
        .map(|request| request.path.as_str())
        .collect();
    let all = lists.len();
    lists.sort_unstable();
    lists.dedup();
    measured.note(What::ListedTwice, (all - lists.len()) as f64);
    running.expect("there is at least one start")
}

/// Looks at the process while nothing happens.
fn settle(process: &Process, measured: &mut Measured) {
    std::thread::sleep(SETTLE);
    let before = process.ticks();
    std::thread::sleep(IDLE);
    measured.note(What::Idle, (process.ticks() - before) as f64);
    let memory = process.memory();
    measured.note(What::Resident, memory.resident as f64);
    measured.note(What::Peak, memory.peak as f64);
}

/// Starts the process once more where the rules of the one before are in place.
fn restart(plan: &Plan, server: &Server, measured: &mut Measured) {
    let (process, took) = server.start(&plan.nftlet);
    measured.note(What::Restart, took.as_secs_f64());
    let (compared, _) = process.metrics().histogram(FULL, FAMILY);
    measured.note(What::RestartComparison, compared);
    measured.note(What::PeakRestart, process.memory().peak as f64);
    process.stop();
}

fn changes(
    plan: &Plan,
    process: &Watched,
    cluster: &mut Cluster,
    measured: &mut Measured,
    progress: &mut impl FnMut(&str),
) {
    let mut random = Random::new();
    let Size {
        services,
        endpoints,
    } = plan.size;
    let replace = |cluster: &mut Cluster, random: &mut Random| {
        cluster.replace(random.below(services), random.below(endpoints))
    };

    progress("one endpoint replaced");
    let (mut own, mut whole) = (Samples::default(), Samples::default());
    for _ in 0..plan.changes {
        let change = process.change([replace(cluster, &mut random)]);
        own.push(change.own);
        whole.push(change.end_to_end);
    }
    measured.note(What::Replaced, own.median());
    measured.note(What::ReplacedP99, own.percentile(99));
    measured.note(What::ReplacedEndToEnd, whole.median());
    measured.note(What::ReplacedEndToEndP99, whole.percentile(99));

    progress("processor time of changes");
    let api = &process.server.api;
    let (sent, asked) = (api.sent(), api.requests().len());
    let before = process.process.ticks();
    for _ in 0..COUNTED {
        process.ear.forget();
        process.server.put([replace(cluster, &mut random)]);
        process.ear.first();
    }
    let ticks = process.process.ticks() - before;
    measured.note(What::ProcessorOfChanges, ticks as f64 * tick());
    let bytes = (api.sent() - sent) as f64 / COUNTED as f64;
    measured.note(What::ChangeBytes, bytes);
    measured.note(What::ChangeRequests, (api.requests().len() - asked) as f64);
    process.ear.last(QUIET_AT_ONCE);

    progress("one endpoint more or less");
    let (mut own, mut whole) = (Samples::default(), Samples::default());
    for _ in 0..plan.changes.div_ceil(2) {
        let service = random.below(services);
        for put in [cluster.grow(service), cluster.shrink(service)] {
            let change = process.change([put]);
            own.push(change.own);
            whole.push(change.end_to_end);
        }
    }
    measured.note(What::Count, own.median());
    measured.note(What::CountEndToEnd, whole.median());

    progress("many changes at once");
    let mut at_once = Samples::default();
    for round in 0..ROUNDS {
        let many = (0..AT_ONCE).map(|number| {
            let number = round * AT_ONCE + number;
            cluster.replace(number % services, number % endpoints)
        });
        at_once.push(process.change_many(many.collect()));
    }
    measured.note(What::AtOnce, at_once.median());

    progress("a cut connection");
    let asked = api.requests().len();
    process.server.cut();
    process.change([replace(cluster, &mut random)]);
    let again = api.requests().split_off(asked);
    let lists: Vec<&str> = again
        .iter()
        .filter(|request| !request.is_watch() || matches!(request.get("resourceVersion"), "" | "0"))
        .map(|request| request.path.as_str())
        .collect();
    if !lists.is_empty() {
        progress(&format!("read again: {}", lists.join(", ")));
    }
    measured.note(What::ListedAfterCut, lists.len() as f64);
    let memory = process.process.memory();
    measured.note(What::ResidentInTheEnd, memory.resident as f64);
}

fn with_policies(plan: &Plan, server: &mut Server, mut pods: Pods, measured: &mut Measured) {
    server.put(pods.objects());
    server.another_node(Namespace::new("scale"));
    let (process, _) = server.start(&plan.nftlet);
    server.runtime.block_on(server.api.until_watched(PODS, 1));
    while process.metrics().histogram(POLICY, "").1 == 0 {
        std::thread::sleep(Duration::from_millis(100));
    }
    std::thread::sleep(SETTLE);
    let without = measured.get(What::Resident);
    let without = without.expect("the same cluster was measured without policies");
    let memory = process.memory().resident as f64 - without;
    measured.note(What::PolicyMemory, memory);
    let process = Watched::new(process, server);
    let (mut own, mut whole) = (Samples::default(), Samples::default());
    for number in 0..plan.changes {
        let change = process.change([pods.relabel(number)]);
        own.push(change.own);
        whole.push(change.end_to_end);
    }
    measured.note(What::PodChange, own.median());
    measured.note(What::PodChangeP99, own.percentile(99));
    measured.note(What::PodChangeEndToEnd, whole.median());
    process.process.stop();
}

/// The other ruleset for the same services: all of it, and a few services with other endpoints.
fn kube_proxy(namespace: &Namespace, cluster: &mut Cluster) -> KubeProxy {
    let table = baseline::table(cluster.workload());
    let Some(first) = baseline::load_within(namespace, &table, baseline::PATIENCE) else {
        return KubeProxy::TooSlow(baseline::PATIENCE.as_secs_f64());
    };
    let mut random = Random::new();
    let mut changes = Samples::default();
    for _ in 0..ROUNDS {
        let service = random.below(cluster.workload().services.len());
        cluster.replace(service, 0);
        let commands = baseline::change(cluster.workload(), service);
        changes.push(baseline::load(namespace, &commands).wall.as_secs_f64());
    }
    KubeProxy::Loaded {
        first: first.wall.as_secs_f64(),
        change: changes.median(),
    }
}

/// A process with somebody who listens to what the kernel says of it.
struct Watched<'a> {
    process: Process,
    server: &'a Server,
    ear: Ear,
}

/// How long a change took, in seconds.
struct Change {
    /// By nftlet's clock: from reading the bytes to the kernel's answer.
    own: f64,
    /// From the server's sending to the news of the last transaction.
    end_to_end: f64,
}

impl<'a> Watched<'a> {
    fn new(process: Process, server: &'a Server) -> Self {
        let ear = Ear::new(server.namespace());
        Self {
            process,
            server,
            ear,
        }
    }

    /// Makes a change and waits until it is in force.
    fn change<const N: usize>(&self, objects: [Put; N]) -> Change {
        let (sum, count) = self.latency();
        self.ear.forget();
        let told = self.server.put(objects);
        let mut heard = self.ear.first();
        loop {
            heard = self.ear.last(QUIET).unwrap_or(heard);
            let (sum_now, count_now) = self.latency();
            // The kernel's news may be here before its answer is there.
            if count_now >= count + N as u64 {
                return Change {
                    own: (sum_now - sum) / N as f64,
                    end_to_end: (heard - told).as_secs_f64(),
                };
            }
        }
    }

    /// Makes many changes at once; returns how long it took from the server's sending to the
    /// news of the last transaction. Nobody disturbs the process meanwhile by asking.
    fn change_many(&self, objects: Vec<Put>) -> f64 {
        let wanted = self.latency().1 + objects.len() as u64;
        self.ear.forget();
        let told = self.server.put(objects);
        let mut heard: Instant = self.ear.first();
        loop {
            heard = self.ear.last(QUIET_AT_ONCE).unwrap_or(heard);
            if self.latency().1 >= wanted {
                return (heard - told).as_secs_f64();
            }
        }
    }

    fn latency(&self) -> (f64, u64) {
        self.process.metrics().histogram(LATENCY, "")
    }
}
