//! What nftlet itself takes, without a kernel: `cargo bench --bench micro`.
//!
//! For 1,000 and 10,000 services with 10 endpoints each:
//!
//! * `compile`: the plans of all services from scratch, and of one whose endpoint was replaced;
//! * `ruleset`: the plans of all services put together as the tables to compare with the
//!   kernel's (what a start and a repair do);
//! * `diff`: the tables with none, as at the first start, and with equal ones, as at a restart;
//! * `encode`: the netlink messages of the first program and of one replaced endpoint;
//! * `text`: the ruleset as `--dry-run` prints it;
//! * `decode`: services with their slices, pods and network policies from the lines of a watch, and
//!   services from a file of manifests;
//! * `selectors`: one pod against the selectors of 1,000 and 10,000 policies, one by one; and such
//!   a pod of another node that got other labels, from the event to the transaction;
//! * `change`: one replaced endpoint from the event to the transaction, with a kernel that does
//!   nothing.
//!
//! Where `CRITERION_HOME` and `NFTLET_BENCH_JSON` are set, as in `make bench`, the medians are
//! written to the file that the latter names.

#[path = "objects/mod.rs"]
mod cluster;
#[path = "scale/pods.rs"]
mod pods;
#[path = "workload/policies.rs"]
mod policies;
#[path = "workload/mod.rs"]
mod workload;

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt::Write as _;
use std::hint::black_box;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use criterion::{
    BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group,
    measurement::WallTime,
};
use nftlet::compile;
use nftlet::engine::{BUDGET, Engine as _};
use nftlet::metrics::Metrics;
use nftlet::model::{Changes, Event, Kind, Notice, Object, Store};
use nftlet::netlink::{Applied, Error, encode};
use nftlet::policy::{self, Engine};
use nftlet::reconcile::{Kernel, Outcome, Reconciler, Reporter};
use nftlet::ruleset::{Element, Ruleset, TableId, Transaction, diff, text};
use nftlet::source::{Decoder, Manifests};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use workload::{Random, Workload, deliveries, settings};

const SIZES: [usize; 2] = [1_000, 10_000];
const ENDPOINTS: usize = 10;

/// Accepts everything, holds nothing, and keeps the last transaction.
#[derive(Clone, Default)]
struct Absent(Rc<RefCell<Transaction>>);

impl Kernel for Absent {
    fn apply(&mut self, transaction: &Transaction) -> Result<Applied, Error> {
        *self.0.borrow_mut() = transaction.clone();
        Ok(Applied::default())
    }

    fn read(&mut self, _: &[&str], _: &Ruleset) -> Result<Ruleset, Error> {
        Ok(Ruleset::default())
    }

    fn elements(&mut self, _: &TableId, _: &str) -> Result<Vec<Element>, Error> {
        Ok(Vec::new())
    }

    fn generation(&mut self) -> Result<u32, Error> {
        Ok(0)
    }
}

/// The objects are sound and the kernel accepts everything, so nobody should be told anything.
struct Strict;

impl Reporter for Strict {
    fn notice(&self, notice: &Notice) {
        panic!("{}: {}", notice.subject, notice.message);
    }

    fn failed(&self, error: &Error) {
        panic!("{error}");
    }

    fn flows_stay(&self, error: &Error) {
        panic!("{error}");
    }
}

fn store(workload: &Workload) -> Store {
    let (mut store, mut changes) = (Store::default(), Changes::default());
    for event in workload.lists() {
        store.apply(event, &mut changes);
    }
    store
}

fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10);
    group.warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(2));
    group
}

fn compile(criterion: &mut Criterion) {
    let (settings, mut group) = (settings(), group(criterion, "compile"));
    for size in SIZES {
        let workload = Workload::new(size, ENDPOINTS);
        let before = store(&workload);
        group.throughput(Throughput::Elements(size as u64));
        group.bench_function(BenchmarkId::new("all", size), |bencher| {
            bencher.iter(|| {
                for service in &workload.services {
                    let plan = compile::plan(&before, &service.name, &settings, None);
                    black_box(plan).expect("a service of an ordinary size");
                }
            });
        });
        let name = &workload.services[size / 2].name;
        let previous = compile::plan(&before, name, &settings, None);
        let previous = previous.expect("a service of an ordinary size");
        let mut changed = workload.clone();
        changed.replace_endpoint(size / 2, 3);
        let after = store(&changed);
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("one", size), |bencher| {
            bencher.iter(|| compile::plan(&after, name, &settings, previous.as_ref()));
        });
    }
}

fn rules(criterion: &mut Criterion) {
    let settings = settings();
    for size in SIZES {
        let store = store(&Workload::new(size, ENDPOINTS));
        let wanted = nftlet::compile::wanted(&store, &settings).0;
        let first = diff(&Ruleset::default(), wanted.clone());
        let elements = Throughput::Elements(first.elements() as u64);

        let mut ruleset = group(criterion, "ruleset");
        ruleset.throughput(elements.clone());
        ruleset.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter_with_large_drop(|| nftlet::compile::wanted(&store, &settings).0);
        });
        ruleset.finish();

        let mut differences = group(criterion, "diff");
        differences.throughput(elements.clone());
        for (name, actual) in [("first", &Ruleset::default()), ("equal", &wanted)] {
            differences.bench_function(BenchmarkId::new(name, size), |bencher| {
                bencher.iter_batched(
                    || wanted.clone(),
                    |wanted| diff(actual, wanted),
                    BatchSize::PerIteration,
                );
            });
        }
        differences.finish();

        let mut messages = group(criterion, "encode");
        messages.throughput(elements.clone());
        messages.bench_function(BenchmarkId::new("first", size), |bencher| {
            bencher.iter_with_large_drop(|| encode(&first, 1));
        });
        messages.finish();

        let mut printed = group(criterion, "text");
        printed.throughput(elements);
        printed.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter_with_large_drop(|| {
                let mut out = Vec::new();
                text::render(&wanted, &mut out).map(|()| out)
            });
        });
        printed.finish();
    }
}

fn change(criterion: &mut Criterion) {
    for size in SIZES {
        let mut workload = Workload::new(size, ENDPOINTS);
        let metrics = Metrics::new().expect("metrics have different names");
        let kernel = Absent::default();
        let mut reconciler = Reconciler::new(kernel.clone(), settings(), &metrics, &Strict);
        let outcome = reconciler.handle(deliveries(workload.lists()));
        assert_eq!(outcome, Outcome::Synced);

        let mut random = Random::new();
        let mut changes = group(criterion, "change");
        changes.sample_size(50);
        changes.bench_function(BenchmarkId::new("one-endpoint", size), |bencher| {
            bencher.iter_batched(
                || {
                    let (service, endpoint) = (random.below(size), random.below(ENDPOINTS));
                    deliveries(vec![workload.replace_endpoint(service, endpoint)])
                },
                |events| assert_eq!(reconciler.handle(events), Outcome::Synced),
                BatchSize::SmallInput,
            );
        });
        changes.finish();

        let one = kernel.0.take();
        let mut messages = group(criterion, "encode");
        messages.throughput(Throughput::Elements(one.elements() as u64));
        messages.bench_function(BenchmarkId::new("one-endpoint", size), |bencher| {
            bencher.iter(|| encode(&one, 1));
        });
        messages.finish();
    }
}

/// Objects as they come, without the server's and the file system's part.
fn decode(criterion: &mut Criterion) {
    let mut group = group(criterion, "decode");
    for services in SIZES {
        let size = cluster::Size {
            services,
            endpoints: ENDPOINTS,
        };
        let cluster = cluster::Cluster::new(size);
        let services_and_slices = cluster.objects();
        decode_lines(&mut group, "services", services, services_and_slices);
    }
    let pods = pods::Pods::new(10_000, 1_000);
    for (name, kind) in [("pods", Kind::Pod), ("policies", Kind::NetworkPolicy)] {
        let objects = || pods.objects().filter(|(of, _)| *of == kind);
        decode_lines(&mut group, name, objects().count(), objects());
    }
    // Who works without an API server has a few hundred services.
    let services = 100;
    let size = cluster::Size {
        services,
        endpoints: ENDPOINTS,
    };
    let cluster = cluster::Cluster::new(size);
    let mut text = String::new();
    for (_, object) in cluster.objects() {
        // JSON is YAML.
        writeln!(text, "---\n{object:#}").expect("writing to a String cannot fail");
    }
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("cluster.yaml");
    std::fs::write(&file, &text).expect("a file is written");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function(BenchmarkId::new("manifests", services), |bencher| {
        bencher.iter(|| {
            let mut manifests = Manifests::new(vec![file.clone()], workload::NODE.into());
            let events = manifests.load().expect("the file can be read");
            let faults = events.iter().filter(|it| matches!(it, Event::Notice(_)));
            assert_eq!(faults.count(), 0);
            events
        });
    });
}

/// A line of a watch, as the source takes it apart.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(rename = "type", borrow)]
    type_: Cow<'a, str>,
    #[serde(borrow)]
    object: &'a RawValue,
}

/// Objects as the server sends them in a watch.
fn decode_lines(
    group: &mut BenchmarkGroup<WallTime>,
    name: &str,
    count: usize,
    objects: impl Iterator<Item = (Kind, Value)>,
) {
    let lines: Vec<(Kind, String)> = objects
        .map(|(kind, object)| {
            let line = json!({"type": "ADDED", "object": object});
            (kind, line.to_string())
        })
        .collect();
    let bytes: usize = lines.iter().map(|(_, line)| line.len()).sum();
    group.throughput(Throughput::Bytes(bytes as u64));
    group.bench_function(BenchmarkId::new(name, count), |bencher| {
        bencher.iter(|| {
            let mut decoder = Decoder::default();
            for (kind, line) in &lines {
                let line: Line = serde_json::from_str(line).expect("it is a line of a watch");
                assert_eq!(line.type_, "ADDED");
                let decoded = decoder.decode(*kind, line.object.get().as_bytes());
                let (object, notices) = decoded.expect("the objects are sound");
                assert!(notices.is_empty());
                black_box(object);
            }
        });
    });
}

fn selectors(criterion: &mut Criterion) {
    const PODS: usize = 10_000;
    let mut group = group(criterion, "selectors");
    group.sample_size(50);
    for policies in SIZES {
        let cluster = policies::Cluster::new(PODS, policies);
        let mut engine = Engine::new(policy::Settings {
            node: policies::NODE.into(),
            ..policy::Settings::default()
        });
        for delivery in cluster.lists() {
            engine.apply(&delivery.event);
        }
        engine.update(BUDGET);
        let mut pod = cluster.later_pod(0);
        let all: Vec<_> = (0..policies)
            .map(|number| cluster.policy(number).pods)
            .collect();
        group.bench_function(BenchmarkId::new("one-by-one", policies), |bencher| {
            bencher.iter(|| all.iter().filter(|it| it.matches(&pod.labels)).count());
        });
        let mut change = 0;
        group.bench_function(BenchmarkId::new("pod-relabelled", policies), |bencher| {
            bencher.iter_batched(
                || {
                    change += 1;
                    pod.labels = cluster.labels[change % 2].clone();
                    Event::Apply(Object::Pod(pod.clone()))
                },
                |event| {
                    engine.apply(&event);
                    let transaction = engine.update(BUDGET).transaction;
                    assert!(!transaction.ops.is_empty());
                    transaction
                },
                BatchSize::SmallInput,
            );
        });
    }
}

criterion_group!(benches, compile, rules, decode, selectors, change);

fn main() {
    benches();
    Criterion::default().configure_from_args().final_summary();
    let home = std::env::var_os("CRITERION_HOME");
    if let Some((home, file)) = home.zip(std::env::var_os("NFTLET_BENCH_JSON")) {
        let mut medians = Map::new();
        collect(Path::new(&home), &mut Vec::new(), &mut medians);
        let text = serde_json::to_string_pretty(&medians).expect("numbers are JSON");
        std::fs::write(&file, text + "\n").unwrap_or_else(|error| {
            panic!("cannot write {}: {error}", file.display());
        });
    }
}

/// The medians in nanoseconds that criterion left in a directory, by the names of the benchmarks.
fn collect(directory: &Path, name: &mut Vec<String>, medians: &mut Map<String, Value>) {
    let estimates = std::fs::read(directory.join("new/estimates.json"));
    if let Ok(estimates) = estimates {
        let estimates: Value = serde_json::from_slice(&estimates).expect("criterion writes JSON");
        let median = estimates["median"]["point_estimate"].clone();
        medians.insert(name.join("/"), median);
        return;
    }
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.path().is_dir()) {
        name.push(entry.file_name().to_string_lossy().into_owned());
        collect(&entry.path(), name, medians);
        name.pop();
    }
}
