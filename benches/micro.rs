//! What parts of nftlet cost, without a kernel and without an API server.
//!
//! ```text
//! cargo bench --bench micro [-- FILTER]
//! ```
//!
//! For 1,000 and 10,000 services with 10 endpoints each:
//!
//! * `compile`: the plans of all services from scratch, and of one whose endpoint was replaced;
//! * `ruleset`: the plans of all services put together as tables;
//! * `diff`: the tables with none, as at the first start, and with equal ones, as at a restart;
//! * `encode`: the netlink messages of the first program and of one replaced endpoint;
//! * `text`: the ruleset as `--dry-run` prints it;
//! * `decode`: services with their slices, pods and network policies from the lines of a watch, and
//!   services from a file of manifests;
//! * `manifests`: a directory of 10,000 files, each with a service and its slices: the first read, and
//!   from a changed file to the event;
//! * `selectors`: a pod of another node that got other labels, with 1,000 and 10,000 policies, from
//!   the event to the transaction;
//! * `change`: one replaced endpoint from the event to the transaction.

mod facts;

use std::borrow::Cow;
use std::cell::RefCell;
use std::hint::black_box;
use std::rc::Rc;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{
    BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use nftlet::engine::{BUDGET, Engine as _};
use nftlet::model::{Delivery, Event, Kind, Notice, ObjectName};
use nftlet::netlink::{Applied, ConntrackError, Error, encode};
use nftlet::nft::{Element, Ruleset, TableId, Transaction, diff, text};
use nftlet::policies::{self, Engine};
use nftlet::serve::metrics::Registry;
use nftlet::services;
use nftlet::source::{Decoder, Manifests};
use nftlet::sync::{Controller, Kernel, Outcome, Reporter, SyncMetrics};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;
use tokio::sync::{mpsc, watch};

use facts::{event, events, kind, ruleset, settings, store, wanted};
use nftlet_lab::cluster::{Cluster, NODE, Put, Random, Size};
use nftlet_lab::fake_api::{PODS as POD_OBJECTS, POLICIES};
use nftlet_lab::pods::{Pod, Pods};

const SIZES: [usize; 2] = [1_000, 10_000];
const ENDPOINTS: usize = 10;
const PODS: usize = 10_000;

fn cluster(services: usize) -> Cluster {
    let endpoints = ENDPOINTS;
    Cluster::new(Size {
        services,
        endpoints,
    })
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
        let mut cluster = cluster(size);
        let before = store(events(cluster.objects()));
        let names: Vec<ObjectName> = (0..size)
            .map(|service| {
                let (namespace, name) = Cluster::name(service);
                ObjectName::new(&namespace, &name)
            })
            .collect();
        let plan = |name, previous: Option<_>| {
            let plan = services::plan(&before, name, &settings, previous);
            plan.expect("a service of an ordinary size")
        };
        group.throughput(Throughput::Elements(size as u64));
        group.bench_function(BenchmarkId::new("all", size), |bencher| {
            bencher.iter(|| {
                names
                    .iter()
                    .for_each(|name| _ = black_box(plan(name, None)))
            });
        });
        let (changed, previous) = (&names[size / 2], plan(&names[size / 2], None));
        cluster.replace(size / 2, 3);
        let after = store(events(cluster.objects()));
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("one", size), |bencher| {
            bencher.iter(|| services::plan(&after, changed, &settings, previous.as_ref()));
        });
    }
}

fn rules(criterion: &mut Criterion) {
    for size in SIZES {
        let store = store(events(cluster(size).objects()));
        let rules = ruleset(cluster(size).objects());
        let first = diff(&Ruleset::default(), rules.clone());
        let elements = Throughput::Elements(first.elements() as u64);
        let mut measure = |name: &str, id, run: &mut dyn FnMut(&mut criterion::Bencher)| {
            let mut group = group(criterion, name);
            group.throughput(elements.clone());
            group.bench_function(id, run);
            group.finish();
        };
        let id = BenchmarkId::from_parameter(size);
        measure("ruleset", id.clone(), &mut |bencher| {
            bencher.iter_with_large_drop(|| wanted(&store));
        });
        for (name, actual) in [("first", &Ruleset::default()), ("equal", &rules)] {
            measure("diff", BenchmarkId::new(name, size), &mut |bencher| {
                let setup = || rules.clone();
                bencher.iter_batched(setup, |to| diff(actual, to), BatchSize::PerIteration);
            });
        }
        measure("encode", BenchmarkId::new("first", size), &mut |bencher| {
            bencher.iter_with_large_drop(|| encode(&first, 1));
        });
        measure("text", id, &mut |bencher| {
            bencher.iter_with_large_drop(|| {
                let mut out = Vec::new();
                text::render(&rules, &mut out).map(|()| out)
            });
        });
    }
}

/// A kernel that accepts everything, holds nothing, and keeps the last transaction.
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

/// Expects no reports: the objects are sound and the kernel accepts everything.
struct Strict;

impl Reporter for Strict {
    fn notice(&self, notice: &Notice) {
        panic!("{}: {}", notice.subject, notice.message);
    }

    fn failed(&self, error: &Error) {
        panic!("{error}");
    }

    fn stale_flows_remain(&self, error: &ConntrackError) {
        panic!("{error}");
    }
}

fn change(criterion: &mut Criterion) {
    for size in SIZES {
        let mut cluster = cluster(size);
        let registry = Registry::new().expect("metrics have different names");
        let metrics = SyncMetrics::register(&registry).expect("metrics have different names");
        let kernel = Absent::default();
        let mut controller = Controller::new(kernel.clone(), settings(), &metrics, &Strict);
        let lists = events(cluster.objects()).into_iter().map(Delivery::now);
        assert_eq!(controller.handle(lists), Outcome::Synced);

        let (mut random, mut decoder) = (Random::default(), Decoder::default());
        let mut replace = || {
            let put = cluster.replace(random.below(size), random.below(ENDPOINTS));
            vec![Delivery::now(event(&mut decoder, &put))]
        };
        // Its messages are measured below, whether or not changes are.
        assert_eq!(controller.handle(replace()), Outcome::Synced);
        let mut changes = group(criterion, "change");
        changes.sample_size(50);
        changes.bench_function(BenchmarkId::new("one-endpoint", size), |bencher| {
            bencher.iter_batched(
                &mut replace,
                |events| assert_eq!(controller.handle(events), Outcome::Synced),
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

/// Objects as they come, without the parts of the server and of the file system.
fn decode(criterion: &mut Criterion) {
    let mut group = group(criterion, "decode");
    for services in SIZES {
        decode_lines(
            &mut group,
            "services",
            services,
            cluster(services).objects(),
        );
    }
    let pods = Pods::new(PODS, 1_000);
    for (name, path) in [("pods", POD_OBJECTS), ("policies", POLICIES)] {
        let objects = || pods.objects().filter(|(of, _)| *of == path);
        decode_lines(&mut group, name, objects().count(), objects());
    }
    // Without an API server a few hundred services are usual.
    let services = 100;
    let text = manifest(cluster(services).objects());
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("cluster.yaml");
    std::fs::write(&file, &text).expect("a file is written");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function(BenchmarkId::new("manifests", services), |bencher| {
        bencher.iter(|| {
            let mut manifests = Manifests::new(vec![file.clone()], NODE.into());
            let events = manifests.load().expect("the file can be read");
            let faults = events.iter().filter(|it| matches!(it, Event::Notice(_)));
            assert_eq!(faults.count(), 0);
            events
        });
    });
}

/// A line of a watch.
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
    objects: impl Iterator<Item = Put>,
) {
    let line = |object| json!({"type": "ADDED", "object": object}).to_string();
    let lines: Vec<(Kind, String)> = objects.map(|(path, it)| (kind(path), line(it))).collect();
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
    let mut group = group(criterion, "selectors");
    group.sample_size(50);
    for policies in SIZES {
        let pods = Pods::new(PODS, policies);
        let mut engine = Engine::new(policies::PolicySettings {
            node: NODE.into(),
            ..policies::PolicySettings::default()
        });
        let events = events(pods.objects()).into_iter();
        events.for_each(|event| engine.apply(&event));
        engine.update(BUDGET);
        let mut decoder = Decoder::default();
        let mut relabelled = [0, 1].map(|application| {
            let pod = Pod {
                application,
                ..pods.later(0)
            };
            event(&mut decoder, &pods.object(&pod))
        });
        group.bench_function(BenchmarkId::new("pod-relabelled", policies), |bencher| {
            bencher.iter_batched(
                || {
                    relabelled.swap(0, 1);
                    relabelled[0].clone()
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

/// A directory of manifests, one for each service: the first read, and from a changed file to the
/// event.
fn directory(criterion: &mut Criterion) {
    let services = SIZES[1];
    let mut cluster = cluster(services);
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let write = |cluster: &Cluster, service: usize| {
        let file = path.join(format!("{service}.yaml"));
        std::fs::write(file, manifest(cluster.service_objects(service))).expect("it is written");
    };
    (0..services).for_each(|service| write(&cluster, service));
    let load = || {
        let mut manifests = Manifests::new(vec![path.to_owned()], NODE.into());
        let events = manifests.load().expect("the files can be read");
        assert!(events.len() > services, "{} events", events.len());
        manifests
    };
    let mut group = group(criterion, "manifests");
    group.bench_function(BenchmarkId::new("first-read", services), |bencher| {
        bencher.iter(load);
    });
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    group.bench_function(BenchmarkId::new("one-change", services), |bencher| {
        bencher.iter_custom(|iterations| {
            runtime.block_on(async {
                let (sender, mut events) = mpsc::channel(16);
                let (stop, stopped) = watch::channel(false);
                let source = tokio::spawn(load().follow(sender, stopped));
                let mut change = async |service: usize| {
                    cluster.replace(service, 0);
                    let begun = Instant::now();
                    write(&cluster, service);
                    events.recv().await.expect("the source runs");
                    begun.elapsed()
                };
                // The first one waits until the directories are watched.
                change(0).await;
                let mut took = Duration::ZERO;
                for number in 1..=iterations {
                    took += change(number as usize % services).await;
                }
                stop.send(true).expect("the source runs");
                source.await.expect("no panic").expect("no fault");
                took
            })
        });
    });
}

/// Returns objects as a file of manifests. JSON is YAML.
fn manifest(objects: impl Iterator<Item = Put>) -> String {
    objects.fold(String::new(), |text, (_, object)| {
        format!("{text}---\n{object:#}\n")
    })
}

criterion_group!(
    benches, compile, rules, decode, directory, selectors, change
);
criterion_main!(benches);
