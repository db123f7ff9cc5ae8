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
use std::time::{Duration, Instant};

use nftlet::model::Kind;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::cluster::{NODE, POD_CIDRS, Put};
use crate::process::Process;
use crate::subject::News;
use nftlet_lab::fake_api::{
    CIDRS, FakeApi, NAMESPACES, NODES, PODS, POLICIES, Recorded, SERVICES, SLICES,
};
use nftlet_lab::netns::Namespace;

/// How long nothing may be heard after a single change, and after many, until it is over.
const QUIET: Duration = Duration::from_millis(1);
pub const QUIET_AT_ONCE: Duration = Duration::from_millis(100);
/// nftlet's own clock, from receiving a change to the kernel's answer.
pub const LATENCY: &str = "nftlet_programming_latency_seconds";

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
        let objects = objects.into_iter();
        self.api
            .put_all(objects.map(|(kind, object)| (collection(kind), object)))
    }

    /// Deletes objects; returns the moment before.
    pub fn delete(&self, objects: &[Put]) -> Instant {
        let started = Instant::now();
        for (kind, object) in objects {
            let field = |name: &str| object["metadata"][name].as_str().expect("a string");
            let key = format!("{}/{}", field("namespace"), field("name"));
            self.api.delete(collection(*kind), &key);
        }
        started
    }

    /// Starts nftlet on the node and waits for its rules; returns how long that took.
    pub fn start(&self) -> (Process, Duration) {
        let kubeconfig = self.api.write_kubeconfig(self.directory.path());
        let arguments = [
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--hostname-override={NODE}"),
            format!("--cluster-cidr={}", POD_CIDRS.join(",")),
        ];
        let mut process = Process::start(self.namespace(), &self.nftlet, &arguments);
        let took = process.until_in_place();
        (process, took)
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

/// Returns the path of the objects of a kind.
fn collection(kind: Kind) -> &'static str {
    match kind {
        Kind::Service => SERVICES,
        Kind::EndpointSlice => SLICES,
        Kind::Node => NODES,
        Kind::ServiceCidr => CIDRS,
        Kind::Pod => PODS,
        Kind::Namespace => NAMESPACES,
        Kind::NetworkPolicy => POLICIES,
    }
}

/// A process, its server, and the news of its node's kernel.
pub struct Watched<'a> {
    /// The process.
    pub process: Process,
    /// The server.
    pub server: &'a Server,
    /// The news.
    pub news: News,
}

/// How long a change took, in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// By nftlet's clock: from reading the bytes to the kernel's answer.
    pub own: f64,
    /// From the server's sending to the news of the last transaction.
    pub end_to_end: f64,
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
    pub fn change(&self, objects: u64, change: impl FnOnce(&Server) -> Instant) -> Took {
        let (sum, count) = self.latency();
        self.news.forget();
        let sent = change(self.server);
        let mut heard = self.news.first();
        loop {
            heard = self.news.last(QUIET).unwrap_or(heard);
            let (sum_now, count_now) = self.latency();
            // The kernel's news may be here before its answer is there.
            if count_now >= count + objects {
                return Took {
                    own: (sum_now - sum) / objects as f64,
                    end_to_end: (heard - sent).as_secs_f64(),
                };
            }
        }
    }

    /// Replaces an object, as [`Self::change`] does.
    pub fn put(&self, object: Put) -> Took {
        self.change(1, |server| server.put([object]))
    }

    /// Makes many changes at once; returns the seconds from the server's sending to the news of
    /// the last transaction. The process is not asked meanwhile.
    pub fn put_many(&self, objects: Vec<Put>) -> f64 {
        let wanted = self.latency().1 + objects.len() as u64;
        self.news.forget();
        let sent = self.server.put(objects);
        let mut heard = self.news.first();
        loop {
            heard = self.news.last(QUIET_AT_ONCE).unwrap_or(heard);
            if self.latency().1 >= wanted {
                return (heard - sent).as_secs_f64();
            }
        }
    }

    fn latency(&self) -> (f64, u64) {
        self.process.metrics().histogram(LATENCY, "")
    }
}
