//! The API server and the node that asks it: both in one network namespace.

#![allow(dead_code, reason = "each benchmark uses its own part")]

use std::path::Path;
use std::time::{Duration, Instant};

use nftlet::model::Kind;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::cluster::{POD_CIDRS, Put};
use crate::fake_api::{
    CIDRS, FakeApi, NAMESPACES, NODES, PODS, POLICIES, Recorded, SERVICES, SLICES,
};
use crate::netns::Namespace;
use crate::process::Process;
use crate::workload::NODE;

/// An API server in memory, and the namespaces in which it can be reached.
pub struct Server {
    /// The node's is the last one; the others were nodes before.
    pub namespaces: Vec<Namespace>,
    /// The server itself.
    pub api: FakeApi,
    directory: TempDir,
    /// Last, so that the server's tasks have something to end in.
    pub runtime: Runtime,
}

impl Server {
    /// Starts a server that knows nothing beside a node.
    pub fn new(node: Namespace) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        // The port is opened on a thread inside the namespace, and stays there.
        let api = node.run(|| runtime.block_on(FakeApi::start()));
        Self {
            namespaces: vec![node],
            api,
            directory: tempfile::tempdir().expect("a directory"),
            runtime,
        }
    }

    /// Creates or replaces objects at once; returns the moment in which nftlet is told.
    pub fn put(&self, objects: impl IntoIterator<Item = Put>) -> Instant {
        let objects = objects.into_iter();
        self.api
            .put_all(objects.map(|(kind, object)| (collection(kind), object)))
    }

    /// Starts nftlet on the node and waits for its rules; tells how long that took.
    pub fn start(&self, nftlet: &Path) -> (Process, Duration) {
        let kubeconfig = self.api.write_kubeconfig(self.directory.path());
        let arguments = [
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--hostname-override={NODE}"),
            format!("--cluster-cidr={POD_CIDRS}"),
        ];
        let mut process = Process::start(self.namespace(), nftlet, &arguments);
        let took = process.until_in_place();
        (process, took)
    }

    /// A node that has just started, without any rules, in place of the one before.
    pub fn another_node(&mut self, node: Namespace) {
        node.run(|| self.runtime.block_on(self.api.listen()));
        self.namespaces.push(node);
    }

    /// The namespace of the node.
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
}

/// Where the objects of a kind are on the server.
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

/// Whether a request asks for all objects of a kind. Others are watches that go on from a version,
/// the server's version as a sign of life, and Events.
pub fn is_list(request: &Recorded) -> bool {
    let resumes = !matches!(request.get("resourceVersion"), "" | "0");
    let everything = request.get("sendInitialEvents") == "true" || !resumes;
    request.method == "GET" && request.path != "/version" && (everything || !request.is_watch())
}
