//! A directory of 10,000 manifests, each with a Service and its EndpointSlice: the first read, and
//! from a changed file to the event. `cargo bench --bench manifests`.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use nftlet::model::Event;
use nftlet::source::Manifests;
use tokio::sync::{mpsc, watch};

const FILES: usize = 10_000;

/// Writes a file whose service has a port.
fn write(directory: &Path, number: usize, port: u16) {
    let endpoints: String = (1..=10)
        .map(|host| {
            format!(
                "- addresses: [10.1.{}.{host}]\n  conditions: {{ready: true}}\n  nodeName: node-1\n",
                number % 256
            )
        })
        .collect();
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web-{number}\n  namespace: shop\n\
         spec:\n  clusterIP: 10.96.{}.{}\n  ports:\n  - name: http\n    port: {port}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: web-{number}-a\n  \
         namespace: shop\n  labels:\n    kubernetes.io/service-name: web-{number}\n\
         addressType: IPv4\nports:\n- name: http\n  port: 8080\nendpoints:\n{endpoints}",
        number / 250,
        number % 250 + 1
    );
    fs::write(directory.join(format!("{number}.yaml")), text).expect("a file is written");
}

fn load(directory: &Path) -> Manifests {
    let mut manifests = Manifests::new(vec![directory.to_owned()], "node-1".into());
    let events = manifests.load().expect("the files can be read");
    let objects = events.iter().filter(|it| matches!(it, Event::Apply(_)));
    assert_eq!(objects.count(), 2 * FILES);
    manifests
}

fn directory(criterion: &mut Criterion) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    (0..FILES).for_each(|number| write(path, number, 80));
    let mut group = criterion.benchmark_group("manifests");
    group.sample_size(10);
    group.bench_function("first-read", |bencher| bencher.iter(|| load(path)));

    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    // Another one each time.
    let mut port = 1024;
    group.bench_function("one-change", |bencher| {
        bencher.iter_custom(|iterations| {
            runtime.block_on(async {
                let (sender, mut events) = mpsc::channel(16);
                let (stop, stopped) = watch::channel(false);
                let source = tokio::spawn(load(path).follow(sender, stopped));
                let mut change = async |number: usize| {
                    port += 1;
                    let begun = Instant::now();
                    write(path, number % FILES, port);
                    events.recv().await.expect("the source runs");
                    begun.elapsed()
                };
                // The first one waits until the directories are watched.
                change(0).await;
                let mut took = Duration::ZERO;
                for number in 1..=usize::try_from(iterations).expect("few") {
                    took += change(number).await;
                }
                stop.send(true).expect("the source runs");
                source.await.expect("no panic").expect("no fault");
                took
            })
        });
    });
    group.finish();
}

criterion_group!(benches, directory);
criterion_main!(benches);
