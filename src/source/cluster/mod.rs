//! Objects from a Kubernetes API server.
//!
//! [`Cluster::connect`] finds the server and credentials, [`Cluster::run`] watches Services,
//! EndpointSlices, the own Node and the ServiceCIDRs with the selectors that kube-proxy uses, so
//! that headless services and those of other proxies never leave the server. (A service that
//! turns headless comes as a deletion. Servers before Kubernetes 1.31 cannot select by that, and
//! send headless services too, which have no rules.) NetworkPolicies are watched too, and Pods and
//! Namespaces while there is a policy.
//!
//! ```text
//! request (list, watch; lines) ─> reflect (one kind: version) ─> deliver (names, decode) ─> events
//!     fault (what went wrong, told once)    timing (pauses)    pulse (is it silent?)
//!     demand (Pods and Namespaces are reflected while there is a NetworkPolicy)
//!     servers (where the connections lead)    traffic (what every request passes through)
//!     reach (is the server there? wakes those that wait when it is back)
//! ```
//!
//! The watches are nftlet's own and not those of `kube::runtime`, for two reasons: an object is
//! decoded straight into the few fields that are used, and an object that cannot be decoded is a
//! fault of that object alone, with its last known state in force even across a new list.
//!
//! Credentials that change on disk are picked up without a restart: the HTTP client of `kube`
//! reads a token file again at least once a minute (keeping the last token if that fails), and
//! inside a pod the CA bundle as well.

mod deliver;
mod demand;
mod fault;
mod frames;
mod proxy;
mod pulse;
mod reach;
mod reflect;
mod request;
mod requests;
mod servers;
mod stats;
mod timing;
mod traffic;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::{OptionFuture, join_all};
use futures::join;
use hyper::Uri;
use kube::client::ClientBuilder;
use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError, NoProxyError};
use kube::{Client, Config};
use prometheus::core::Collector;
use tokio::sync::watch;

use self::demand::Demand;
use self::fault::Faults;
use self::pulse::Pulse;
use self::reach::Reach;
use self::reflect::Reflector;
use self::request::{Requester, Selection};
use self::requests::RequestMetrics;
use self::servers::Servers;
pub use self::stats::{KindStats, ServerFault, SourceStats};
pub use self::timing::Timing;
use self::traffic::{Observed, Traffic, innermost};
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
    /// The address that is to be used in place of the one found is none.
    #[error(
        "`{address}` is not the address of an API server: {reason}; write it like https://192.0.2.10:6443"
    )]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The proxy on the way to the server cannot be used.
    #[error(
        "cannot use the proxy {proxy}: {reason}; write it like http://192.0.2.20:3128 in proxy-url of the kubeconfig or in the variable HTTPS_PROXY"
    )]
    Proxy {
        /// Its address.
        proxy: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The list of servers without a proxy cannot be understood.
    #[error(
        "cannot use the variable NO_PROXY: {source}; write addresses, ranges and names of hosts with a comma between them"
    )]
    NoProxy {
        /// What is wrong with it.
        source: NoProxyError,
    },
    /// The metrics of the requests cannot be created.
    #[error(
        "cannot create the metrics of requests to the API server: {0}; this is a fault of nftlet"
    )]
    Metrics(#[source] prometheus::Error),
    /// The credentials or certificates cannot be used.
    #[error(
        "cannot prepare connections to {server}: {}; check the certificates and credentials",
        innermost(source)
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
    servers: Arc<Servers>,
    reach: Arc<Reach>,
    request_metrics: RequestMetrics,
    node_name: String,
    timing: Timing,
    network_policies: bool,
    stats: Arc<SourceStats>,
}

impl Cluster {
    /// Prepares to watch a cluster: the one of the kubeconfig file, else of the files in the
    /// environment variable KUBECONFIG, else the one that nftlet runs in. Nothing is sent yet.
    ///
    /// `server` is an address to use in place of the one found, with the credentials found; where
    /// nothing is found, without credentials.
    ///
    /// # Errors
    /// When there is no such configuration, or it cannot be used.
    pub async fn connect(
        kubeconfig: Option<PathBuf>,
        server: Option<String>,
        node_name: String,
    ) -> Result<Self, Error> {
        let given = server;
        let from_environment = std::env::var_os("KUBECONFIG").filter(|value| !value.is_empty());
        let kubeconfig = match (kubeconfig, from_environment) {
            (Some(path), _) => {
                let read = Kubeconfig::read_from(&path);
                Some((path, read))
            }
            (None, Some(value)) => {
                let merged = Kubeconfig::from_env().map(Option::unwrap_or_default);
                Some((value.into(), merged))
            }
            (None, None) => None,
        };
        let from_file = kubeconfig.is_some();
        let (mut config, named_proxy) = match kubeconfig {
            Some((path, read)) => read_kubeconfig(&path, read).await?,
            None => (in_cluster(given.as_deref())?, None),
        };
        if let Some(server) = &given {
            config.cluster_url = address(server)?;
        }
        if from_file {
            let variable = |name: &str| std::env::var(name).ok();
            config.proxy_url = proxy::choose(named_proxy, &config.cluster_url, variable)?;
        }
        if let Some(proxy) = &config.proxy_url {
            let proxy = proxy.to_string();
            let proxy = proxy::without_password(&proxy);
            tracing::info!("the way to the API server leads through the proxy {proxy}");
        }
        // The reflectors do their own retries, which know what can be resumed.
        config.default_retry = false;
        config.connect_timeout = Some(CONNECT_PATIENCE);
        let server = config.cluster_url.to_string();
        let (address, proxy) = (config.cluster_url.clone(), config.proxy_url.clone());
        let servers = Arc::new(Servers::new(&address, proxy.as_ref()));
        let reach = Arc::new(Reach::default());
        let in_cluster = !from_file && given.is_none();
        let request_metrics = RequestMetrics::new(&address, in_cluster).map_err(Error::Metrics)?;
        let traffic = Traffic::new(
            &address,
            proxy.as_ref(),
            reach.clone(),
            servers.clone(),
            request_metrics.clone(),
        );
        let traffic = Arc::new(traffic);
        let builder = ClientBuilder::try_from(config).map_err(|source| Error::Client {
            server: server.clone(),
            source,
        })?;
        let observed = tower::layer::layer_fn(|service| Observed {
            service,
            traffic: traffic.clone(),
        });
        let client = builder.with_layer(&observed).build();
        Ok(Self {
            client,
            server,
            servers,
            reach,
            request_metrics,
            node_name,
            timing: Timing::default(),
            network_policies: true,
            stats: Arc::default(),
        })
    }

    /// The same with other waiting times.
    #[must_use]
    pub fn with_timing(self, timing: Timing) -> Self {
        Self { timing, ..self }
    }

    /// The same with or without Pods, Namespaces and NetworkPolicies. Without, none of them is
    /// asked for, and no event is about them.
    #[must_use]
    pub fn with_network_policies(self, network_policies: bool) -> Self {
        Self {
            network_policies,
            ..self
        }
    }

    /// The way to the server, for what else there is to ask or tell it.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// The server's address.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// The metrics of all requests to the server, also those of [`client`](Cluster::client), for a
    /// registry.
    pub fn request_metrics(&self) -> [Box<dyn Collector>; 2] {
        self.request_metrics.collectors()
    }

    /// The counters, which go on counting while [`run`](Cluster::run) has taken the cluster.
    pub fn stats(&self) -> Arc<SourceStats> {
        self.stats.clone()
    }

    /// Delivers where the server is reached ([`Event::Servers`](crate::model::Event::Servers)), then
    /// watches until `shutdown` turns true (or its sender is gone), or the receiver of `sender`
    /// is gone. Nothing else ends it: whatever is wrong with the server is told in notices and
    /// tried again.
    ///
    /// `ListStarted` of a kind comes again when a first list is cut off before its
    /// `ListComplete`. The Node's list is complete once the Node exists, or after
    /// [`Timing::node_wait`]. The lists of Pods and Namespaces are empty while there is no
    /// NetworkPolicy. When the first one comes, `ListStarted` of both comes before its `Apply`;
    /// when the last one is gone for [`Timing::linger`], both are listed empty again.
    pub async fn run(self, sender: Sender, mut shutdown: watch::Receiver<bool>) {
        let resolved = tokio::select! {
            resolved = self.servers.announce(&sender) => resolved,
            _ = shutdown.wait_for(|stop| *stop) => return,
        };
        let servers = self.servers.clone();
        let follow = servers.follow(resolved, sender.clone());
        let pulse = Pulse::new(
            self.client.clone(),
            self.stats.clone(),
            self.timing.clone(),
            self.reach.clone(),
        );
        let silent = pulse.silent();
        let faults = Arc::new(Faults::new(self.server, self.stats.clone()));
        let reflector = |kind, sender| {
            let selection = Selection::of(kind, &self.node_name);
            let requester = Requester::new(self.client.clone(), selection, self.timing.response);
            Reflector::new(
                requester,
                sender,
                self.timing.clone(),
                faults.clone(),
                self.stats.clone(),
                self.reach.clone(),
                silent.clone(),
            )
        };
        let services = Kind::SERVICES.map(|kind| reflector(kind, sender.clone()).run());
        let policies: OptionFuture<_> = self
            .network_policies
            .then(|| {
                let linger = self.timing.linger;
                Demand::new(reflector, sender.clone(), faults.clone(), linger).run()
            })
            .into();
        // Otherwise the receiver would never see the end of the events.
        drop(sender);
        tokio::select! {
            _ = async { join!(join_all(services), policies) } => {}
            () = pulse.run() => {}
            () = follow => {}
            // An error says that the sender is gone, and with it whoever could ask.
            _ = shutdown.wait_for(|stop| *stop) => {}
        }
    }
}

fn address(text: &str) -> Result<Uri, Error> {
    text.parse::<Uri>().map_err(|error| Error::Address {
        address: text.to_owned(),
        reason: error.to_string(),
    })
}

/// What a pod knows of its cluster. An address without credentials is enough where it is given.
fn in_cluster(server: Option<&str>) -> Result<Config, Error> {
    match (Config::incluster(), server) {
        (Ok(config), _) => Ok(config),
        (Err(InClusterError::ReadEnvironmentVariable(_)), Some(server)) => {
            Ok(Config::new(address(server)?))
        }
        (Err(InClusterError::ReadEnvironmentVariable(_)), None) => Err(Error::NoCluster),
        (Err(source), _) => Err(Error::ServiceAccount { source }),
    }
}

/// What a kubeconfig says, and the proxy that it names.
async fn read_kubeconfig(
    path: &Path,
    kubeconfig: Result<Kubeconfig, KubeconfigError>,
) -> Result<(Config, Option<String>), Error> {
    let fault = |source| Error::Kubeconfig {
        path: path.to_owned(),
        source,
    };
    let kubeconfig = kubeconfig.map_err(fault)?;
    let proxy = proxy::named_in(&kubeconfig);
    let options = KubeConfigOptions::default();
    match Config::from_custom_kubeconfig(kubeconfig, &options).await {
        Ok(config) => Ok((config, proxy)),
        // kube has read both of the environment, too.
        Err(KubeconfigError::ParseNoProxy(source)) => Err(Error::NoProxy { source }),
        Err(KubeconfigError::ParseProxyUrl(source)) => Err(Error::Proxy {
            proxy: match &proxy {
                Some(named) => proxy::without_password(named).to_owned(),
                None => "in HTTPS_PROXY".to_owned(),
            },
            reason: source.to_string(),
        }),
        Err(source) => Err(fault(source)),
    }
}
