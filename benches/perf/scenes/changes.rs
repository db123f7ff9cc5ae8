//! Changes: a service gets other endpoints, one at a time and a thousand at once.
//!
//! *From the bytes read* is the sum of `nftlet_programming_latency_seconds` before and after, which
//! is exact, while its quantiles are those of buckets. *From the server* begins when the server's
//! watches are notified and ends with the kernel's news of the committed transaction. Both share
//! the processors of the machine with the server. Bytes and requests are counted by the server.

use super::SIZES;
use crate::Context;
use crate::cluster::{Cluster, Random, Size};
use crate::kube_proxy;
use crate::process::tick;
use crate::report::Value::{Bytes, Number, Seconds};
use crate::report::{Report, Row, Table, Value};
use crate::samples::Samples;
use crate::server::{QUIET_AT_ONCE, Server, Took, Watched};
use nftlet_lab::netns::Namespace;

/// The changes whose processor time is counted together.
const COUNTED: usize = 1_000;
/// How many services change at once, and how often.
const AT_ONCE: usize = 1_000;
const ROUNDS: usize = 5;
/// Services that are added and deleted.
const ADDED: usize = 50;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Clusters: services x endpoints of each, with commas between.
    #[arg(long, value_delimiter = ',', default_value = SIZES)]
    sizes: Vec<Size>,
    /// Single changes of each kind.
    #[arg(long, default_value = "500", value_parser = clap::value_parser!(u32).range(1..))]
    changes: u32,
    /// The most services that are loaded in kube-proxy's shape, too, for five minutes at most.
    #[arg(long, default_value = "10000", value_name = "SERVICES")]
    kube_proxy_up_to: usize,
}

/// The two times of each of many changes.
#[derive(Default)]
pub struct Times {
    own: Samples,
    end_to_end: Samples,
}

impl Times {
    /// Adds a change.
    pub fn push(&mut self, took: Took) {
        self.own.push(took.own);
        self.end_to_end.push(took.end_to_end);
    }

    /// Writes them as a row, which is returned.
    pub fn note<'a>(&self, what: &str, of: impl ToString, table: &'a mut Table) -> &'a mut Row {
        let own = Seconds(self.own.median());
        let row = table.row(what, of, "from the bytes read", own);
        row.and("p99", self.own.p99().map(Seconds))
            .and("from the server", Seconds(self.end_to_end.median()))
            .and("from the server, p99", self.end_to_end.p99().map(Seconds))
    }
}

impl Arguments {
    /// Measures.
    pub fn run(&self, context: &Context) -> Report {
        let mut report = Report::new("changes");
        report.parameter("changes", self.changes);
        let mut single = Table::new("Changes, one at a time", "cluster");
        let mut whole = Table::new("Changes, all together", "cluster");
        for size in &self.sizes {
            self.measure(*size, context, [&mut single, &mut whole]);
        }
        report.table(single);
        report.table(whole);
        report
    }

    fn measure(&self, size: Size, context: &Context, [single, whole]: [&mut Table; 2]) {
        let progress = |step: &str| context.progress(format_args!("{size}  {step}"));
        let Size {
            services,
            endpoints,
        } = size;
        let mut cluster = Cluster::new(size);
        let server = Server::new(Namespace::new("node"), &context.nftlet);
        server.put(cluster.objects());
        progress("start");
        let watched = Watched::new(server.start().0, &server);
        let mut random = Random::new();

        progress("one endpoint replaced");
        let mut replaced = Times::default();
        for _ in 0..self.changes {
            let put = cluster.replace(random.below(services), random.below(endpoints));
            replaced.push(watched.put(put));
        }

        progress("processor time of changes");
        let (sent, asked) = (server.api.sent(), server.api.requests().len());
        let before = watched.process.ticks();
        for _ in 0..COUNTED {
            watched.news.forget();
            server.put([cluster.replace(random.below(services), random.below(endpoints))]);
            watched.news.first();
        }
        let ticks = watched.process.ticks() - before;
        let bytes = (server.api.sent() - sent) as f64 / COUNTED as f64;
        let requests = server.api.requests().len() - asked;
        watched.news.last(QUIET_AT_ONCE);

        progress("one endpoint more or less");
        let mut number = Times::default();
        for _ in 0..self.changes.div_ceil(2) {
            let service = random.below(services);
            number.push(watched.put(cluster.grow(service)));
            number.push(watched.put(cluster.shrink(service)));
        }

        progress("services added and deleted");
        let (mut added, mut deleted) = (Times::default(), Times::default());
        for _ in 0..ADDED {
            let service = cluster.add_service(endpoints);
            let objects: Vec<_> = cluster.service_objects(service).collect();
            let count = objects.len() as u64;
            added.push(watched.change(count, |server| server.put(objects.clone())));
            deleted.push(watched.change(count, |server| server.delete(&objects)));
            cluster.endpoints.pop();
        }

        progress("many changes at once");
        let mut at_once = Samples::default();
        for round in 0..ROUNDS {
            let many = (round * AT_ONCE..(round + 1) * AT_ONCE)
                .map(|number| cluster.replace(number % services, number % endpoints));
            at_once.push(watched.put_many(many.collect()));
        }

        progress("a cut connection");
        let asked = server.api.requests().len();
        server.cut();
        watched.put(cluster.replace(random.below(services), random.below(endpoints)));
        let lists = server.lists_since(asked);
        if !lists.is_empty() {
            progress(&format!("read again: {}", lists.join(", ")));
        }
        let memory = watched.process.memory().resident;
        watched.process.stop();

        let other = self.kube_proxy(&mut cluster, services, progress);
        let row = replaced.note("one endpoint replaced", size, single);
        row.and("kube-proxy's shape", other);
        let p99 = Seconds(replaced.own.percentile(99));
        single.row("one endpoint replaced, p99", size, "p99", p99);
        number.note("one endpoint more or less", size, single);
        added.note("a service added", size, single);
        deleted.note("a service deleted", size, single);
        let mut note = |what, value| {
            whole.row(what, size, "nftlet", value);
        };
        note(
            "1,000 changes at once, from the server",
            Seconds(at_once.median()),
        );
        note(
            "processor time of 1,000 changes",
            Seconds(ticks as f64 * tick()),
        );
        note("sent by the server, one change", Bytes(bytes));
        note("requests, 1,000 changes", Number(requests as f64));
        note(
            "lists read again, connection cut",
            Number(lists.len() as f64),
        );
        note("memory after all changes", Bytes(memory as f64));
    }

    /// Replaces endpoints in kube-proxy's shape of the same services.
    fn kube_proxy(
        &self,
        cluster: &mut Cluster,
        services: usize,
        progress: impl Fn(&str),
    ) -> Option<Value> {
        if services > self.kube_proxy_up_to {
            return None;
        }
        progress("kube-proxy's shape");
        let namespace = Namespace::new("kube-proxy");
        kube_proxy::load(&namespace, &kube_proxy::table(cluster))?;
        let mut random = Random::new();
        let changes = (0..ROUNDS).map(|_| {
            let service = random.below(services);
            cluster.replace(service, 0);
            let took = kube_proxy::load(&namespace, &kube_proxy::change(cluster, service));
            took.expect("a change takes less than the limit")
                .as_secs_f64()
        });
        Some(Seconds(changes.collect::<Samples>().median()))
    }
}
