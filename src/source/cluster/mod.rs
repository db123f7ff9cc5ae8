//! Objects from a Kubernetes API server.
//!
//! [`Cluster::connect`] finds the server and credentials, [`Cluster::run`] watches Services,
//! EndpointSlices, the own Node and the ServiceCIDRs with the selectors that kube-proxy uses, so
//! that headless services and those of other proxies never leave the server. (A service that
//! turns headless comes as a deletion.)
//!
//! ```text
//! request (list, watch; lines) ─> reflect (one kind: version, names, decode) ─> events
//!                 fault (what went wrong, told once)    timing (pauses)
//! ```
//!
//! The watches are nftlet's own and not those of `kube::runtime`, for two reasons: an object is
//! decoded straight into the few fields that are used, and an object that cannot be decoded is a
//! fault of that object alone, with its last known state in force even across a new list.
//!
//! Credentials that change on disk are picked up without a restart: the HTTP client of `kube`
//! reads a token file again at least once a minute (keeping the last token if that fails), and
//! inside a pod the CA bundle as well.

mod fault;
mod frames;
mod reflect;
mod request;
mod stats;
mod timing;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use tokio::sync::watch;

use self::fault::Faults;
use self::reflect::Reflector;
use self::request::{Requester, Selection};
pub use self::stats::{KindStats, SourceStats};
pub use self::timing::Timing;
use super::Sender;
use crate::model::Kind;

/// How long the TCP and TLS handshakes with the server may take.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no cluster to watch.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// nftlet runs outside of a cluster and was given no kubeconfig.
    #[error(
        "there is no cluster around: nftlet does not run in a pod, and no kubeconfig was given"
    )]
    NoCluster,
    /// nftlet runs in a pod whose service account cannot be used.
    #[error(
        "cannot use the pod's service account: {source}; check that automountServiceAccountToken is not false"
    )]
    ServiceAccount {
        /// What is wrong with it.
        source: InClusterError,
    },
    /// The kubeconfig cannot be used.
    #[error("cannot use the kubeconfig {}: {}; check the file and the files it refers to", path.display(), first_line(source))]
    Kubeconfig {
        /// The file, or the value of the variable KUBECONFIG.
        path: PathBuf,
        /// What is wrong with it.
        source: KubeconfigError,
    },
    /// The credentials or certificates cannot be used.
    #[error(
        "cannot prepare connections to {server}: {source}; check the certificates and credentials"
    )]
    Client {
        /// The server's address.
        server: String,
        /// What is wrong.
        source: kube::Error,
    },
}

/// What is wrong, without the lines of the file around it: they may hold a token.
fn first_line(source: &KubeconfigError) -> String {
    let text = source.to_string();
    text.lines().next().unwrap_or_default().to_owned()
}

/// An API server as a source of objects.
pub struct Cluster {
    client: Client,
    server: String,
    node_name: String,
    timing: Timing,
    stats: Arc<SourceStats>,
}

impl Cluster {
    /// Prepares to watch a cluster: the one of the kubeconfig file, else of the files in the
    /// environment variable KUBECONFIG, else the one that nftlet runs in. Nothing is sent yet.
    ///
    /// # Errors
    /// When there is no such configuration, or it cannot be used.
    pub async fn connect(kubeconfig: Option<PathBuf>, node_name: String) -> Result<Self, Error> {
        let from_environment = std::env::var_os("KUBECONFIG").filter(|value| !value.is_empty());
        let mut config = match (kubeconfig, from_environment) {
            (Some(path), _) => read_kubeconfig(&path, Kubeconfig::read_from(&path)).await?,
            (None, Some(value)) => {
                let merged = Kubeconfig::from_env().map(Option::unwrap_or_default);
                read_kubeconfig(Path::new(&value), merged).await?
            }
            (None, None) => Config::incluster().map_err(|source| match source {
                InClusterError::ReadEnvironmentVariable(_) => Error::NoCluster,
                source => Error::ServiceAccount { source },
            })?,
        };
        // The reflectors do their own retries, which know what can be resumed.
        config.default_retry = false;
        config.connect_timeout = Some(CONNECT_PATIENCE);
        let server = config.cluster_url.to_string();
        let client = Client::try_from(config).map_err(|source| Error::Client {
            server: server.clone(),
            source,
        })?;
        Ok(Self {
            client,
            server,
            node_name,
            timing: Timing::default(),
            stats: Arc::default(),
        })
    }

    /// The same with other waiting times.
    #[must_use]
    pub fn with_timing(self, timing: Timing) -> Self {
        Self { timing, ..self }
    }

    /// The server's address.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// The counters, which go on counting while [`run`](Cluster::run) has taken the cluster.
    pub fn stats(&self) -> Arc<SourceStats> {
        self.stats.clone()
    }

    /// Watches until `shutdown` turns true (or its sender is gone), or the receiver of `sender`
    /// is gone. Nothing else ends it: whatever is wrong with the server is told in notices and
    /// tried again.
    ///
    /// `ListStarted` of a kind comes again when a first list is cut off before its
    /// `ListComplete`. The Node's list is complete once the Node exists, or after
    /// [`Timing::node_wait`].
    pub async fn run(self, sender: Sender, mut shutdown: watch::Receiver<bool>) {
        let faults = Arc::new(Faults::new(self.server));
        let reflectors = Kind::ALL.map(|kind| {
            let selection = Selection::of(kind, &self.node_name);
            let requester = Requester::new(self.client.clone(), selection, self.timing.response);
            Reflector::new(
                requester,
                sender.clone(),
                self.timing.clone(),
                faults.clone(),
                self.stats.clone(),
            )
            .run()
        });
        // Otherwise the receiver would never see the end of the events.
        drop(sender);
        tokio::select! {
            _ = join_all(reflectors) => {}
            // An error says that the sender is gone, and with it whoever could ask.
            _ = shutdown.wait_for(|stop| *stop) => {}
        }
    }
}

async fn read_kubeconfig(
    path: &Path,
    kubeconfig: Result<Kubeconfig, KubeconfigError>,
) -> Result<Config, Error> {
    let fault = |source| Error::Kubeconfig {
        path: path.to_owned(),
        source,
    };
    let kubeconfig = kubeconfig.map_err(fault)?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .map_err(fault)
}
