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
//! * `change`: one replaced endpoint from the event to the transaction, with a kernel that does
//!   nothing.

#[path = "workload/mod.rs"]
mod workload;

use std::cell::RefCell;
use std::hint::black_box;
use std::rc::Rc;
use std::time::Duration;

use criterion::{
    BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
    measurement::WallTime,
};
use nftlet::compile;
use nftlet::metrics::Metrics;
use nftlet::model::{Changes, Notice, Store};
use nftlet::netlink::{Applied, Error, encode};
use nftlet::reconcile::{Kernel, Outcome, Reconciler, Reporter};
use nftlet::ruleset::{Element, Ruleset, TableId, Transaction, diff, text};
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
                    black_box(compile::plan(&before, &service.name, &settings, None));
                }
            });
        });
        let name = &workload.services[size / 2].name;
        let previous = compile::plan(&before, name, &settings, None);
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
        let wanted = Reconciler::<Absent>::wanted(&store, &settings);
        let first = diff(&Ruleset::default(), wanted.clone());
        let elements = Throughput::Elements(first.elements() as u64);

        let mut ruleset = group(criterion, "ruleset");
        ruleset.throughput(elements.clone());
        ruleset.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter_with_large_drop(|| Reconciler::<Absent>::wanted(&store, &settings));
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

criterion_group!(benches, compile, rules, change);
criterion_main!(benches);
