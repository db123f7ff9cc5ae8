//! Changes: services and endpoints that change, one at a time and a thousand at once.
//!
//! *From the bytes read* is the sum of `nftlet_programming_latency_seconds` before and after, which
//! is exact, while its quantiles are those of buckets; a change of several objects counts the mean of
//! them. *In the kernel* is the same of `nftlet_transaction_duration_seconds`, the sum of all
//! transactions. *From the server* begins when the server's watches are notified and ends with the
//! kernel's news of the committed transaction. All share the processors of the machine with the
//! server. Bytes and requests are counted by the server.
//!
//! Changes of the number of endpoints are those of services that are added to the cluster, each with
//! ten endpoints and a ClusterIP alone.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::SIZES;
use crate::Context;
use crate::kube_proxy;
use crate::process::{PATIENCE, seconds};
use crate::report::Value::{Bytes, Number, Ratio, Seconds};
use crate::report::{Report, Row, Table, Value};
use crate::samples::Samples;
use crate::server::{LATENCY, QUIET_AT_ONCE, Server, Took, Watched};
use nftlet_lab::cluster::{Cluster, Condition, Endpoint, Put, Random, Size};
use nftlet_lab::netns::Namespace;

/// The changes whose processor time is counted together.
/// Changes before those that are measured.
const WARM_UP: usize = 20;
const COUNTED: usize = 1_000;
/// How many services change at once, and how often.
const AT_ONCE: usize = 1_000;
const ROUNDS: usize = 5;
/// Services whose number of endpoints changes, and their endpoints.
const TRIED: usize = 50;
const TEN: usize = 10;
const SCALED: usize = 20;
/// How many endpoints come at once in each part of a rollout of ten.
const SURGES: [usize; 4] = [3, 3, 2, 2];
/// Changes a second of which the processor time is measured.
const RATE: u32 = 500;
/// With which cluster the others are compared.
const SMALL: Size = Size {
    services: 1_000,
    endpoints: 10,
};
/// Changes of each kind with the program kube-proxy.
const FEW: usize = 10;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Clusters: services x endpoints of each, with commas between.
    #[arg(long, value_delimiter = ',', default_value = SIZES)]
    sizes: Vec<Size>,
    /// Single changes of each kind.
    #[arg(long, default_value = "500", value_parser = clap::value_parser!(u32).range(1..))]
    changes: u32,
    /// How long the largest cluster changes 500 times a second.
    #[arg(long, default_value = "120", value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// The most services that are loaded in kube-proxy's shape, too, for five minutes at most, and
    /// with which the program is started, if the environment variable `KUBE_PROXY` names it.
    #[arg(long, default_value = "10000", value_name = "SERVICES")]
    kube_proxy_up_to: usize,
}

/// The times of each of many changes.
#[derive(Default)]
pub struct Times {
    own: Samples,
    kernel: Samples,
    end_to_end: Samples,
}

impl Times {
    pub fn push(&mut self, took: Took) {
        self.own.push(took.own);
        self.kernel.push(took.kernel);
        if let Some(took) = took.end_to_end {
            self.end_to_end.push(took);
        }
    }

    fn append(&mut self, other: &Self) {
        self.own.append(other.own.clone());
        self.kernel.append(other.kernel.clone());
        self.end_to_end.append(other.end_to_end.clone());
    }

    /// Writes them as a row.
    pub fn note<'a>(&self, what: &str, of: impl ToString, table: &'a mut Table) -> &'a mut Row {
        let own = Seconds(self.own.median());
        let row = table.row(what, of, "from the bytes read", own);
        row.and("p99", self.own.p99().map(Seconds));
        if self.end_to_end.count() > 0 {
            row.and("from the server", Seconds(self.end_to_end.median()))
                .and("from the server, p99", self.end_to_end.p99().map(Seconds));
        }
        row
    }

    /// Returns the median of the part in the kernel.
    pub fn kernel(&self) -> Value {
        Seconds(self.kernel.median())
    }

    /// Writes the part in the kernel as a row.
    fn note_kernel(&self, what: &str, of: Size, table: &mut Table) {
        let kernel = Seconds(self.kernel.median());
        let row = table.row(format!("{what}, in the kernel"), of, "median", kernel);
        row.and("p99", self.kernel.p99().map(Seconds));
    }
}

impl Arguments {
    pub fn run(&self, context: &Context) -> Report {
        let parameters: [(_, &dyn ToString); 2] =
            [("changes", &self.changes), ("seconds", &self.seconds)];
        let mut report = Report::new("changes", parameters);
        let mut tables = [
            "Changes, one at a time",
            "Changes, all together",
            "Changes, beside kube-proxy",
        ]
        .map(|title| Table::new(title, "cluster"));
        let mut sizes = self.sizes.clone();
        sizes.sort_by_key(|size| size.services * size.endpoints);
        let mut small = None;
        for size in &sizes {
            let largest = Some(size) == sizes.last();
            let times = self.measure(*size, largest, context, &mut tables);
            if *size == SMALL {
                small = Some(times);
            } else if let Some(small) = &small {
                for (now, then, what) in [
                    (&times[0], &small[0], "one endpoint more"),
                    (&times[1], &small[1], "one endpoint less"),
                ] {
                    let over =
                        |of: fn(&Times) -> &Samples| Ratio(of(now).median() / of(then).median());
                    let over_small = format!("{what} over that of 1,000 x 10");
                    tables[1].row(over_small, size, "nftlet", over(|it| &it.own));
                    let over_small = format!("{what}, in the kernel, over that of 1,000 x 10");
                    tables[1].row(over_small, size, "nftlet", over(|it| &it.kernel));
                }
            }
        }
        report.tables = tables.into_iter().filter(|it| !it.is_empty()).collect();
        report
    }

    /// Measures a cluster; returns the times of one endpoint more and less.
    fn measure(
        &self,
        size: Size,
        largest: bool,
        context: &Context,
        [single, whole, beside]: &mut [Table; 3],
    ) -> [Times; 2] {
        let progress = |step: &str| context.progress(format_args!("{size}  {step}"));
        let mut cluster = Cluster::new(size);
        let mut server = Server::new(Namespace::new("node"), &context.nftlet);
        server.put(cluster.objects());
        let mut tried = Tried::new(&mut cluster);
        server.put(tried.objects(&cluster));
        progress("start");
        let watched = Watched::new(server.start().0, &server);
        let mut random = Random::default();
        let any = |random: &mut Random, cluster: &mut Cluster| {
            cluster.replace(random.below(size.services), random.below(size.endpoints))
        };

        progress("one endpoint replaced");
        // The first changes after the start take up to 20 ms in the kernel, with any nftlet.
        for _ in 0..WARM_UP {
            watched.put(any(&mut random, &mut cluster));
        }
        let mut replaced = Times::default();
        for _ in 0..self.changes {
            replaced.push(watched.put(any(&mut random, &mut cluster)));
        }

        progress("processor time of changes");
        let (sent, asked) = (server.api.sent(), server.api.requests().len());
        let before = watched.process.ticks();
        for _ in 0..COUNTED {
            watched.news.forget();
            server.put([any(&mut random, &mut cluster)]);
            watched
                .news
                .first(QUIET_AT_ONCE * 100)
                .expect("a change is written");
        }
        let ticks = watched.process.ticks() - before;
        let bytes = (server.api.sent() - sent) as f64 / COUNTED as f64;
        let requests = server.api.requests().len() - asked;
        watched.news.last(QUIET_AT_ONCE);

        let rounds = self.changes.div_ceil(2) as usize;
        let number = tried.measure(rounds, &mut cluster, &watched, size, single, progress);

        progress("many changes at once");
        let mut at_once = Samples::default();
        for round in 0..ROUNDS {
            let many = (round * AT_ONCE..(round + 1) * AT_ONCE)
                .map(|number| cluster.replace(number % size.services, number % size.endpoints));
            at_once.push(
                watched
                    .put_many(many.collect())
                    .end_to_end
                    .unwrap_or_default(),
            );
        }

        progress("a cut connection");
        let asked = server.api.requests().len();
        server.cut();
        watched.put(any(&mut random, &mut cluster));
        let lists = server.lists_since(asked);
        if !lists.is_empty() {
            progress(&format!("read again: {}", lists.join(", ")));
        }
        let paced = largest.then(|| {
            progress("changes by the clock");
            self.pace(&mut cluster, &watched, &tried)
        });
        let memory = watched.process.memory().resident;
        watched.process.stop();

        let shape = self.kube_proxy(&mut cluster, size, progress);
        let p99 = Seconds(replaced.own.percentile(99));
        let row = replaced.note("one endpoint replaced", size, single);
        row.and("kube-proxy's shape", shape);
        single.row("one endpoint replaced, p99", size, "p99", p99);
        replaced.note_kernel("one endpoint replaced", size, single);
        let mut both = Times::default();
        number.iter().for_each(|times| both.append(times));
        both.note("one endpoint more or less", size, single);
        if let Some(program) = self.program(&mut server, size, progress) {
            let mut note = |what: &str, nftlet: &Times, change: &mut dyn FnMut(usize) -> Put| {
                let (sum, count) = program.partial_syncs();
                let took = (0..FEW).map(|number| program.change(&server, change(number)));
                let took: Samples = took.collect();
                let (later, more) = program.partial_syncs();
                let own = (later - sum) / (more - count).max(1) as f64;
                let row = beside.row(what, size, "nftlet", Seconds(nftlet.end_to_end.median()));
                row.and("kube-proxy", Seconds(took.median()))
                    .and("kube-proxy, longest", Seconds(took.largest()))
                    .and("kube-proxy's own clock", Seconds(own));
            };
            note(
                "one endpoint replaced, from the server",
                &replaced,
                &mut |_| any(&mut random, &mut cluster),
            );
            note(
                "one endpoint more or less, from the server",
                &both,
                &mut |number| tried.more_or_less(number, &mut cluster),
            );
        }
        let mut note = |what, value| {
            whole.row(what, size, "nftlet", value);
        };
        note(
            "1,000 changes at once, from the server",
            Seconds(at_once.median()),
        );
        note("processor time of 1,000 changes", Seconds(seconds(ticks)));
        note("sent by the server, one change", Bytes(bytes));
        note("requests, 1,000 changes", Number(requests as f64));
        note(
            "lists read again, connection cut",
            Number(lists.len() as f64),
        );
        note("memory after all changes", Bytes(memory));
        if let Some(part) = paced {
            note("processor time at 500 changes a second", Ratio(part));
        }
        number
    }

    /// Adds and removes endpoints by the clock; returns the part of a processor that it takes.
    fn pace(&self, cluster: &mut Cluster, watched: &Watched, tried: &Tried) -> f64 {
        let length = Duration::from_secs(self.seconds.into());
        let in_force = || watched.process.metrics().histogram(LATENCY, "").1;
        let (sent, before, ticks) = (AtomicU64::new(0), in_force(), watched.process.ticks());
        let mut number = 0;
        let started = Instant::now();
        watched.server.pace(RATE, length, &sent, || {
            number += 1;
            tried.more_or_less(number, cluster)
        });
        while in_force() < before + sent.load(Ordering::Relaxed) {
            assert!(
                started.elapsed() < length + PATIENCE,
                "changes are not in force"
            );
            std::thread::sleep(QUIET_AT_ONCE);
        }
        seconds(watched.process.ticks() - ticks) / started.elapsed().as_secs_f64()
    }

    /// Replaces endpoints in kube-proxy's shape of the same services.
    fn kube_proxy(
        &self,
        cluster: &mut Cluster,
        size: Size,
        progress: impl Fn(&str),
    ) -> Option<Value> {
        if size.services > self.kube_proxy_up_to {
            return None;
        }
        progress("kube-proxy's shape");
        let namespace = Namespace::new("kube-proxy");
        kube_proxy::load(&namespace, &kube_proxy::table(cluster))?;
        let mut random = Random::default();
        let changes = (0..ROUNDS).map(|_| {
            let service = random.below(size.services);
            cluster.replace(service, 0);
            let took = kube_proxy::load(&namespace, &kube_proxy::change(cluster, service));
            took.expect("a change takes less than the limit")
                .as_secs_f64()
        });
        Some(Seconds(changes.collect::<Samples>().median()))
    }

    /// Starts the program kube-proxy, if there is one.
    fn program(
        &self,
        server: &mut Server,
        size: Size,
        progress: impl Fn(&str),
    ) -> Option<kube_proxy::Program> {
        if size.services > self.kube_proxy_up_to {
            return None;
        }
        progress("kube-proxy, if there is one");
        kube_proxy::Program::start(server).map(|(program, _)| program)
    }
}

/// Services whose number of endpoints changes.
struct Tried(Vec<usize>);

impl Tried {
    /// Adds the services to a cluster.
    fn new(cluster: &mut Cluster) -> Self {
        Self((0..TRIED).map(|_| cluster.add_plain_service(TEN)).collect())
    }

    fn objects<'a>(&'a self, cluster: &'a Cluster) -> impl Iterator<Item = Put> + 'a {
        let services = self.0.iter();
        services.flat_map(|service| cluster.service_objects(*service))
    }

    /// Adds an endpoint to a service, or removes one from it, in turns.
    fn more_or_less(&self, number: usize, cluster: &mut Cluster) -> Put {
        let service = self.0[number % TRIED];
        if cluster.endpoints[service].len() > TEN {
            cluster.shrink(service, 1)
        } else {
            cluster.grow(service, 1)
        }
    }

    /// Measures changes of each kind; returns those of one endpoint more and less.
    fn measure(
        &mut self,
        rounds: usize,
        cluster: &mut Cluster,
        watched: &Watched,
        size: Size,
        table: &mut Table,
        progress: impl Fn(&str),
    ) -> [Times; 2] {
        let times = || [(); 2].map(|()| Times::default());
        let service = |number: usize| self.0[number % TRIED];
        let mut pairs = Vec::new();
        for (before, more, words) in [
            (0, 1, ["first endpoint", "last endpoint removed"]),
            (1, SCALED - 1, ["1 endpoint to 20", "20 endpoints to 1"]),
            (TEN, 1, ["one endpoint more", "one endpoint less"]),
        ] {
            progress(words[0]);
            self.resize(before, cluster, watched);
            let [mut up, mut down] = times();
            for number in 0..rounds {
                up.push(watched.put(cluster.grow(service(number), more)));
                down.push(watched.put(cluster.shrink(service(number), more)));
            }
            pairs.push((words, [up, down]));
        }
        progress("services added and deleted");
        let [mut added, mut deleted] = times();
        for number in 0..rounds {
            let objects: Vec<_> = cluster.service_objects(service(number)).collect();
            deleted.push(watched.change(objects.len(), |server| server.delete(&objects)));
            added.push(watched.change(objects.len(), |server| server.put(objects.clone())));
        }
        progress("rollouts");
        let rollouts = self
            .0
            .iter()
            .map(|service| rollout(*service, cluster, watched));
        let rollouts: Samples = rollouts.collect();
        progress("the Node");
        let mut label = Times::default();
        for number in 1..=rounds {
            label.push(watched.put(Cluster::node(number)));
        }
        pairs.push((["a service added", "a service deleted"], [added, deleted]));
        for (words, times) in &pairs {
            for (what, times) in words.iter().zip(times) {
                times.note(what, size, table);
                times.note_kernel(what, size, table);
            }
        }
        label.note("a Node label that no service depends on", size, table);
        let kernel = Seconds(rollouts.median());
        let what = "rollout of 10 endpoints, 20 changes, in the kernel";
        table.row(what, size, "median", kernel);
        pairs.swap_remove(2).1
    }

    /// Gives all of the services another number of endpoints.
    fn resize(&self, count: usize, cluster: &mut Cluster, watched: &Watched) {
        let changes = self.0.iter().map(|service| {
            let now = cluster.endpoints[*service].len();
            if count > now {
                cluster.grow(*service, count - now)
            } else {
                cluster.shrink(*service, now - count)
            }
        });
        watched.put_many(changes.collect());
    }
}

/// Replaces the endpoints of a service as a Deployment does: some start, get ready, as many of the
/// old ones drain, and leave one after the other. Returns the seconds in the kernel.
fn rollout(service: usize, cluster: &mut Cluster, watched: &Watched) -> f64 {
    let mut kernel = 0.0;
    let mut step = |put| kernel += watched.put(put).kernel;
    for surge in SURGES {
        let more: Vec<_> = (0..surge).map(|_| cluster.endpoint()).collect();
        let condition = |condition| move |it: &mut Endpoint| it.condition = condition;
        step(cluster.edit(service, |endpoints| {
            endpoints.extend(more);
            endpoints[TEN..]
                .iter_mut()
                .for_each(condition(Condition::NotReady));
        }));
        step(cluster.edit(service, |endpoints| {
            endpoints[TEN..]
                .iter_mut()
                .for_each(condition(Condition::Ready));
        }));
        step(cluster.edit(service, |endpoints| {
            endpoints[..surge]
                .iter_mut()
                .for_each(condition(Condition::Draining));
        }));
        step(cluster.edit(service, |endpoints| _ = endpoints.remove(0)));
        step(cluster.edit(service, |endpoints| _ = endpoints.drain(..surge - 1)));
    }
    kernel
}
