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
//!     fault (what went wrong, told once)    timing (pauses)    liveness (is it silent?)
//!     demand (Pods and Namespaces are reflected while there is a NetworkPolicy)
//!     servers (where the connections lead)    traffic (what every request passes through)
//!     reach (is the server there? wakes those that wait when it is back)
//!     list (objects of a list while it comes)
//! ```
//!
//! The watches are nftlet's own and not those of `kube::runtime`, which lack:
//!
//! - bounds: on the bytes of an object, of what is around the objects of a list, and of a refusal;
//! - checks that an answer is of the kind that was asked for, so that a proxy's page or another
//!   API's list is no empty list;
//! - an end of all pauses when any kind finds the server back, and `Retry-After` as their least;
//! - a new list after 410 that sends only what differs, with the last known state of an object that
//!   cannot be decoded still in force;
//! - streamed lists, with pages from the servers that refuse them, decided once for each kind;
//! - a silent connection noticed within 15 s, by a question that all kinds share;
//! - decoding from the bytes of the connection into the few fields that are used, without copies of
//!   their text.
//!
//! Credentials that change on disk are picked up without a restart: a token file is read again at
//! least once a minute (keeping the last token if that fails), and inside a pod the CA bundle as
//! well, by the HTTP client of `kube`.

mod bounded;
mod deliver;
mod demand;
mod faults;
mod frames;
mod kubeconfig;
mod limits;
mod list;
mod liveness;
mod proxy;
mod reach;
mod reflect;
mod request;
mod requests;
mod selection;
mod servers;
mod stats;
mod timing;
mod token;
mod traffic;
mod watch_error;

use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{OptionFuture, join_all};
use futures::join;
use hyper::Uri;
use hyper::http::uri::{Authority, InvalidUri};
use kube::client::ClientBuilder;
use kube::config::{InClusterError, Kubeconfig, KubeconfigError, NoProxyError};
use kube::{Client, Config};
use prometheus::core::Collector;
use tokio::sync::watch;
use tower::filter::FilterLayer;
use tower::layer::layer_fn;

use self::demand::Demand;
use self::faults::Faults;
use self::liveness::Liveness;
use self::reach::Reach;
use self::reflect::Reflector;
use self::request::Requester;
use self::requests::RequestMetrics;
use self::selection::Selection;
use self::servers::Servers;
pub use self::stats::{KindStats, ServerFault, SourceStats};
pub use self::timing::Timing;
use self::token::TokenFile;
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
    /// The address of the server is none.
    #[error(
        "{place}: `{address}` is not the address of an API server: {reason}; write it like https://192.0.2.10:6443"
    )]
    Address {
        /// Where it stands.
        place: String,
        /// What was given.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The token cannot be used.
    #[error(
        "cannot use the token in {place}: {reason}; the file has to be readable and hold the token alone, on one line"
    )]
    Token {
        /// The file, or where in the kubeconfig it stands.
        place: String,
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
            Some((path, read)) => kubeconfig::read(&path, read).await?,
            None => (in_cluster(given.as_deref())?, None),
        };
        if let Some(server) = &given {
            config.cluster_url = address(server, "--master")?;
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
        let token = TokenFile::take(&mut config)?;
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
        let client = client(config, token, Arc::new(traffic)).map_err(|source| Error::Client {
            server: server.clone(),
            source,
        })?;
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

    /// The way to the server, for what else there is to ask or tell it. Answers with more than an
    /// object can have are errors.
    pub fn client(&self) -> Client {
        bounded::bounded(&self.client)
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
        let liveness = Liveness::new(
            self.client.clone(),
            self.stats.clone(),
            self.timing.clone(),
            self.reach.clone(),
        );
        let silent = liveness.silent();
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
            () = liveness.run() => {}
            () = follow => {}
            // An error says that the sender is gone, and with it whoever could ask.
            _ = shutdown.wait_for(|stop| *stop) => {}
        }
    }
}

fn client(
    config: Config,
    mut token: Option<TokenFile>,
    traffic: Arc<Traffic>,
) -> Result<Client, kube::Error> {
    let builder = ClientBuilder::try_from(config)?;
    let sign = move |request| {
        Ok::<_, Infallible>(match &mut token {
            Some(token) => token.sign(request),
            None => request,
        })
    };
    let observed = layer_fn(|service| Observed {
        service,
        traffic: traffic.clone(),
    });
    let builder = builder.with_layer(&FilterLayer::new(sign));
    Ok(builder.with_layer(&observed).build())
}

/// Reads the address of a server; `place` is where it stands.
fn address(text: &str, place: impl fmt::Display) -> Result<Uri, Error> {
    let fault = |reason: String| Error::Address {
        place: place.to_string(),
        address: proxy::without_password(text).to_owned(),
        reason,
    };
    let uri: Uri = text
        .parse()
        .map_err(|error: InvalidUri| fault(error.to_string()))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err(fault(
            "it does not begin with https:// or http://".to_owned(),
        ));
    }
    if uri.host().is_none_or(str::is_empty) {
        return Err(fault("it names no host".to_owned()));
    }
    let authority = uri.authority().map_or("", Authority::as_str);
    let has_port = !authority.ends_with(uri.host().unwrap_or_default());
    if has_port && uri.port_u16().is_none() {
        return Err(fault("its port is not a number up to 65535".to_owned()));
    }
    Ok(without_user(uri))
}

/// Removes the user and password of an address: they are not sent, and would be in the log.
fn without_user(uri: Uri) -> Uri {
    let mut parts = uri.clone().into_parts();
    let authority = parts.authority.as_ref().map(Authority::as_str);
    let Some((_, host)) = authority.and_then(|authority| authority.rsplit_once('@')) else {
        return uri;
    };
    tracing::warn!(
        "the user and password in the address of the API server are not used; name them as \
         username and password of a user in the kubeconfig"
    );
    parts.authority = host.parse().ok();
    Uri::from_parts(parts).unwrap_or(uri)
}

/// What a pod knows of its cluster. An address without credentials is enough where it is given.
fn in_cluster(server: Option<&str>) -> Result<Config, Error> {
    match (Config::incluster(), server) {
        (Ok(config), _) => Ok(config),
        (Err(InClusterError::ReadEnvironmentVariable(_)), Some(server)) => {
            Ok(Config::new(address(server, "--master")?))
        }
        (Err(InClusterError::ReadEnvironmentVariable(_)), None) => Err(Error::NoCluster),
        (Err(source), _) => Err(Error::ServiceAccount { source }),
    }
}
