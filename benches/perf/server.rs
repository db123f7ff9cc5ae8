//! The API server and the node that it serves, both in one network namespace, and what the node's
//! kernel reports while nftlet runs there.
//!
//! ```text
//!  this process                              nftlet
//!  ┌─────────────┐  HTTP: lists, watches  ┌──────────┐
//!  │ Server      │ ─────────────────────> │          │
//!  │             │  log, metrics, /proc   │ Process  │
//!  │ Watched     │ <───────────────────── │          │
//!  │ News        │ <──────── kernel <──── │          │
//!  └─────────────┘                        └──────────┘
//! ```

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::process::{Metrics, PATIENCE, Process};
use crate::subject::News;
use nftlet_lab::cluster::{NODE, POD_CIDRS, Put};
use nftlet_lab::fake_api::{FakeApi, Recorded, SERVICES, SLICES};
use nftlet_lab::netns::Namespace;

/// How long nothing may be heard after a single change, and after many, until it is over.
const QUIET: Duration = Duration::from_millis(1);
pub const QUIET_AT_ONCE: Duration = Duration::from_millis(100);
/// After so long without news it is asked whether a change needed no transaction.
const UNHEARD: Duration = Duration::from_millis(10);
/// The pause between bursts of changes that are sent by the clock.
pub const PAUSE: Duration = Duration::from_millis(10);
/// How often the server then sends bookmarks and forgets the oldest history, as real ones do.
const HOUSEKEEPING: Duration = Duration::from_secs(60);
/// How long it remembers.
const HISTORY: Duration = Duration::from_secs(100);
/// nftlet's own clock, from receiving a change to the kernel's answer.
pub const LATENCY: &str = "nftlet_programming_latency_seconds";
/// The part of it from sending a transaction to the kernel's answer.
pub const TRANSACTION: &str = "nftlet_transaction_duration_seconds";

/// An API server in memory, and the namespaces in which it can be reached.
pub struct Server {
    nftlet: PathBuf,
    /// The node's is the last one; the others were nodes before. They are kept: the removal of one
    /// keeps the kernel busy in the background.
    namespaces: Vec<Namespace>,
    /// The server itself.
    pub api: FakeApi,
    directory: TempDir,
    /// The last field, since the server's tasks end in it.
    pub runtime: Runtime,
}

impl Server {
    /// Starts a server without objects on a node.
    pub fn new(node: Namespace, nftlet: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        // The port is opened on a thread inside the namespace, and stays there.
        let api = node.run(|| runtime.block_on(FakeApi::start()));
        Self {
            nftlet: nftlet.to_owned(),
            namespaces: vec![node],
            api,
            directory: tempfile::tempdir().expect("a directory"),
            runtime,
        }
    }

    /// Creates or replaces objects at once; returns the moment in which the watches are notified.
    pub fn put(&self, objects: impl IntoIterator<Item = Put>) -> Instant {
        self.api.put_all(objects)
    }

    /// Deletes objects; returns the moment before.
    pub fn delete(&self, objects: &[Put]) -> Instant {
        let started = Instant::now();
        for (path, object) in objects {
            let field = |name: &str| object["metadata"][name].as_str().expect("a string");
            let key = format!("{}/{}", field("namespace"), field("name"));
            self.api.delete(path, &key);
        }
        started
    }

    /// Starts nftlet on the node and waits for its rules; returns how long that took.
    pub fn start(&self) -> (Process, Duration) {
        self.start_with(
            &self.nftlet,
            &[format!("--socket={}", self.socket().display())],
        )
    }

    /// Returns the socket on which nftlet answers questions.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("nftlet.sock")
    }

    /// As [`Server::start`], with another build of nftlet.
    pub fn start_other(&self, nftlet: &Path) -> (Process, Duration) {
        self.start_with(nftlet, &[])
    }

    fn start_with(&self, nftlet: &Path, more: &[String]) -> (Process, Duration) {
        let kubeconfig = self.api.write_kubeconfig(self.directory.path());
        let arguments = [
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--hostname-override={NODE}"),
            format!("--cluster-cidr={}", POD_CIDRS.join(",")),
        ];
        let arguments = [&arguments, more].concat();
        let mut process = Process::start(self.namespace(), nftlet, &arguments);
        let took = process.until_in_place();
        (process, took)
    }

    /// Starts kube-proxy in nftables mode on the node. Between its writes is the shortest pause, since it
    /// takes zero for its default of a second.
    pub fn start_kube_proxy(&self, program: &Path) -> Process {
        let kubeconfig = self.api.write_kubeconfig(self.directory.path());
        let file = self.directory.path().join("kube-proxy.yaml");
        let configuration = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "hostnameOverride": NODE,
            "clusterCIDR": POD_CIDRS.join(","),
            "clientConnection": {"kubeconfig": kubeconfig, "contentType": "application/json"},
            "nftables": {"minSyncPeriod": "1ms", "syncPeriod": "1h"},
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s",
                "tcpCloseWaitTimeout": "0s"},
        });
        std::fs::write(&file, configuration.to_string()).expect("a file is written");
        let arguments = [format!("--config={}", file.display())];
        Process::start(self.namespace(), program, &arguments)
    }

    /// Sends so many changes a second for so long, by the clock: a burst is due every ten
    /// milliseconds, whether or not the one before is in force. After half of the time the server
    /// ends all watches, as real ones do every few minutes. `sent` counts the changes.
    pub fn pace(
        &self,
        rate: u32,
        length: Duration,
        sent: &AtomicU64,
        mut change: impl FnMut() -> Put,
    ) -> Sent {
        let burst = f64::from(rate) * PAUSE.as_secs_f64();
        let bursts = (length.as_secs_f64() / PAUSE.as_secs_f64()) as u32;
        let kept = (f64::from(rate) * HISTORY.as_secs_f64()) as usize;
        let started = Instant::now();
        let mut done = Sent {
            last: started,
            late: Duration::ZERO,
        };
        let (mut made, mut tidy) = (0, started + HOUSEKEEPING);
        for number in 0..bursts {
            let wanted = (f64::from(number + 1) * burst) as u64;
            let changes: Vec<Put> = (made..wanted).map(|_| change()).collect();
            made = wanted;
            let due = started + PAUSE * number;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            // Before they can be in force, so that a backlog is never less than none.
            sent.store(made, Ordering::Relaxed);
            done.last = self.put(changes);
            done.late = done.late.max(done.last.saturating_duration_since(due));
            if number == bursts / 2 {
                self.api.end_watches();
            }
            if done.last > tidy {
                self.api.trim(kept);
                self.api.bookmark();
                tidy += HOUSEKEEPING;
            }
        }
        done
    }

    /// Replaces the node by one that has just started, without any rules.
    pub fn another_node(&mut self) {
        let node = Namespace::new("node");
        node.run(|| self.runtime.block_on(self.api.listen()));
        self.namespaces.push(node);
    }

    /// Returns the namespace of the node.
    pub fn namespace(&self) -> &Namespace {
        self.namespaces.last().expect("there is always a node")
    }

    /// Breaks all connections, and waits until nftlet watches again.
    pub fn cut(&self) {
        self.runtime.block_on(async {
            self.api.break_connections().await;
            for path in [SERVICES, SLICES] {
                self.api.until_watched(path, 1).await;
            }
        });
    }

    /// Returns the paths of the lists that were read after a number of requests. Others are
    /// watches that resume from a version, the request for the server's version, and Events.
    pub fn lists_since(&self, requests: usize) -> Vec<String> {
        let everything = |request: &Recorded| {
            let resumes = !matches!(request.get("resourceVersion"), "" | "0");
            let all = request.get("sendInitialEvents") == "true" || !resumes;
            request.method == "GET" && request.path != "/version" && (all || !request.is_watch())
        };
        let requests = self.api.requests().into_iter().skip(requests);
        requests
            .filter(everything)
            .map(|request| request.path)
            .collect()
    }
}

/// The times of changes that were sent by the clock.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// The time of the last change.
    pub last: Instant,
    /// By how much a burst was late at most.
    pub late: Duration,
}

/// A process, its server, and the news of its node's kernel.
pub struct Watched<'a> {
    pub process: Process,
    pub server: &'a Server,
    pub news: News,
}

/// How long a change took, in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// By nftlet's clock: from reading the bytes to the kernel's answer, a mean of the objects.
    pub own: f64,
    /// By nftlet's clock: from sending the transactions to the kernel's answers.
    pub kernel: f64,
    /// From the server's sending to the news of the last transaction; nothing without transactions.
    pub end_to_end: Option<f64>,
}

impl<'a> Watched<'a> {
    /// Begins to listen to the kernel of a process's node.
    pub fn new(process: Process, server: &'a Server) -> Self {
        let news = News::listen(server.namespace());
        Self {
            process,
            server,
            news,
        }
    }

    /// Makes a change of so many objects and waits until it is in force.
    pub fn change(&self, objects: usize, change: impl FnOnce(&Server) -> Instant) -> Took {
        self.change_quietly(objects, QUIET, change)
    }

    /// As [`Self::change`], where nothing may be heard for so long until it is over. The process is
    /// not asked meanwhile.
    pub fn change_quietly(
        &self,
        objects: usize,
        quiet: Duration,
        change: impl FnOnce(&Server) -> Instant,
    ) -> Took {
        let before = self.process.metrics();
        let (sum, count) = before.histogram(LATENCY, "");
        self.news.forget();
        let sent = change(self.server);
        let mut heard = None;
        loop {
            heard = heard.or_else(|| self.news.first(UNHEARD));
            heard = self.news.last(quiet).or(heard);
            let now = self.process.metrics();
            let (sum_now, count_now) = now.histogram(LATENCY, "");
            // The kernel's news may be here before its answer is there, or since they were waited for.
            if count_now >= count + objects as u64 {
                heard = self.news.last(quiet).or(heard);
                let kernel = |metrics: &Metrics| metrics.histogram(TRANSACTION, "").0;
                return Took {
                    own: (sum_now - sum) / objects as f64,
                    kernel: kernel(&now) - kernel(&before),
                    end_to_end: heard.map(|heard| (heard - sent).as_secs_f64()),
                };
            }
            assert!(sent.elapsed() < PATIENCE, "a change is not in force");
        }
    }

    /// Replaces an object, as [`Self::change`] does.
    pub fn put(&self, object: Put) -> Took {
        self.change(1, |server| server.put([object]))
    }

    /// Makes many changes at once.
    pub fn put_many(&self, objects: Vec<Put>) -> Took {
        self.change_quietly(objects.len(), QUIET_AT_ONCE, |server| server.put(objects))
    }
}
