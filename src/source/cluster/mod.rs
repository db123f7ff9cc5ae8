//! Objects from a Kubernetes API server.
//!
//! [`Cluster::connect`] finds the server and credentials. [`Cluster::run`] watches Services,
//! EndpointSlices, the node's own Node object and ServiceCIDRs with the selectors of kube-proxy, so
//! that the server does not send headless services and those of other proxies. (A service that
//! becomes headless is received as a deletion. Servers before Kubernetes 1.31 cannot select by
//! `spec.clusterIP` and send headless services too; they have no rules.) NetworkPolicies are
//! watched too, and ClusterNetworkPolicies where discovery says that the server has them; Pods and
//! Namespaces while a policy of either kind exists, or always; all Nodes while a policy selects nodes.
//!
//! ```text
//! request (list, watch) ─> reflect (state of one kind) ─> deliver (decode, names) ─> events
//!
//!     list         objects of a list, as they arrive
//!     watch_error  why a session ended            faults   lasting faults, reported once
//!     timing       timeouts and pauses            reach    ends the pauses when the server is back
//!     liveness     finds a silent server          demand   Pods, Namespaces, Nodes, on demand
//!     traffic      observes every request         servers  addresses of the server
//! ```
//!
//! The watches are nftlet's own and not those of `kube::runtime`, which lack:
//!
//! - limits on the size of an object, of the text around the objects of a list, and of an error;
//! - checks that an answer is of the requested kind, so that a proxy's error page or the list of
//!   another API is not taken for an empty list;
//! - an end of all pauses as soon as any request finds the server back, with `Retry-After` as their
//!   minimum;
//! - a new list after 410 Gone that delivers only the differences, and keeps the last valid state
//!   of an object that cannot be decoded;
//! - streamed lists with a fallback to pages, chosen once for each kind;
//! - detection of a silent connection within 15 s, by one request for all kinds;
//! - decoding from the bytes of the connection into the few fields that are used, without copies of
//!   their text.
//!
//! Speed and memory are no reasons: 50,000 Services and their EndpointSlices of 20 endpoints each, streamed
//! over the loopback interface and dropped by the receiver, took 1.2 s of processor time and a peak of
//! 17.5 MiB here, and 1.2 s and 9.4 MiB with `kube::runtime::watcher` and types of the same fields. The
//! watcher neither converts the objects nor remembers which ones there are.
//!
//! Credentials that change on disk are used without a restart: a token file is read again at least
//! once a minute (the last token stays in use if that fails), and in a pod `kube` reads the CA
//! bundle again.

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
use tokio::sync::watch;
use tokio::time::Instant;
use tower::filter::FilterLayer;
use tower::layer::layer_fn;

use self::demand::Demand;
use self::faults::Faults;
use self::liveness::Liveness;
use self::reach::Reach;
use self::reflect::Reflector;
use self::request::Requester;
use self::requests::RequestMetrics;
use self::selection::{OwnNode, Selection};
use self::servers::Servers;
pub use self::stats::{KindStats, ServerFault, SourceStats};
pub use self::timing::Timing;
use self::token::TokenFile;
use self::traffic::{Observed, Traffic, innermost};
pub(crate) use self::watch_error::KEPT;
use super::Sender;
use crate::model::Kind;
use crate::serve::metrics::Registry;

/// Time limit of the TCP and TLS handshakes with the server.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// Why a cluster cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// nftlet does not run in a pod, and no kubeconfig was given.
    #[error(
        "no cluster to connect to: nftlet does not run in a pod, and no kubeconfig was given; use --kubeconfig or --manifests"
    )]
    NoCluster,
    /// The service account of the pod cannot be used.
    #[error(
        "cannot use the pod's service account: {source}; check that automountServiceAccountToken is not false"
    )]
    ServiceAccount {
        /// The cause.
        source: InClusterError,
    },
    /// The kubeconfig cannot be used.
    #[error("cannot use the kubeconfig {}: {}; check the file and the files it refers to", path.display(), first_line(source))]
    Kubeconfig {
        /// The file, or the value of the variable KUBECONFIG.
        path: PathBuf,
        /// The cause.
        source: KubeconfigError,
    },
    /// The address of the server is not valid.
    #[error(
        "{place}: `{address}` is not the address of an API server: {reason}; write it like https://192.0.2.10:6443"
    )]
    Address {
        /// The flag or the field that holds it.
        place: String,
        /// The address as it was given, without a password.
        address: String,
        /// The cause.
        reason: String,
    },
    /// The token cannot be used.
    #[error(
        "cannot use the token in {place}: {reason}; the file must be readable and contain only the token, on one line"
    )]
    Token {
        /// The file, or the field of the kubeconfig.
        place: String,
        /// The cause.
        reason: String,
    },
    /// The proxy to the server cannot be used.
    #[error(
        "cannot use the proxy {proxy}: {reason}; write it like http://192.0.2.20:3128 in proxy-url of the kubeconfig or in the environment variable HTTPS_PROXY"
    )]
    Proxy {
        /// Its address, without a password.
        proxy: String,
        /// The cause.
        reason: String,
    },
    /// The variable NO_PROXY cannot be parsed.
    #[error(
        "cannot use the environment variable NO_PROXY: {source}; write addresses, ranges and host names, separated by commas"
    )]
    NoProxy {
        /// The cause.
        source: NoProxyError,
    },
    /// The metrics of the requests cannot be created.
    #[error(
        "cannot create the metrics of requests to the API server: {0}; this is a bug of nftlet"
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
        /// The cause.
        source: kube::Error,
    },
}

/// Returns the first line of an error. The others quote the file, which may contain a token.
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
    services: bool,
    network_policies: bool,
    pods: bool,
    all_nodes: bool,
    stats: Arc<SourceStats>,
}

impl Cluster {
    /// Prepares to watch a cluster: that of the kubeconfig file, else that of the files in the
    /// environment variable KUBECONFIG, else that of the pod. Sends no request.
    ///
    /// `server` replaces the address of the configuration, whose credentials are used. Without a
    /// configuration, requests to `server` have no credentials.
    ///
    /// # Errors
    /// If there is neither a configuration nor a `server`, or one of them cannot be used.
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
            tracing::info!("connecting to the API server through the proxy {proxy}");
        }
        let token = TokenFile::take(&mut config)?;
        // The reflectors retry, since they know what can be resumed.
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
            services: true,
            network_policies: true,
            pods: false,
            all_nodes: false,
            stats: Arc::default(),
        })
    }

    /// Sets the timeouts and pauses.
    #[must_use]
    pub fn with_timing(self, timing: Timing) -> Self {
        Self { timing, ..self }
    }

    /// Sets whether Services, EndpointSlices and ServiceCIDRs are watched. If not, no request and no
    /// event is about them; the own Node is watched all the same.
    #[must_use]
    pub fn with_services(self, services: bool) -> Self {
        Self { services, ..self }
    }

    /// Sets whether the kinds of policies are watched. If not, no request and no event is about
    /// them.
    #[must_use]
    pub fn with_network_policies(self, network_policies: bool) -> Self {
        Self {
            network_policies,
            ..self
        }
    }

    /// Sets whether Pods and Namespaces are watched without a NetworkPolicy, too.
    #[must_use]
    pub fn with_pods(self, pods: bool) -> Self {
        Self { pods, ..self }
    }

    /// Sets whether all Nodes are watched without a policy that selects nodes, too.
    #[must_use]
    pub(crate) fn with_all_nodes(self, all_nodes: bool) -> Self {
        Self { all_nodes, ..self }
    }

    /// Returns a client for other requests to the server. An answer that is longer than an object
    /// can be is an error.
    pub fn client(&self) -> Client {
        bounded::bounded(&self.client)
    }

    /// Returns the server's address.
    pub(crate) fn server(&self) -> &str {
        &self.server
    }

    /// Registers the metrics of the watches, and of all requests to the server, including those of
    /// [`client`](Cluster::client).
    pub(crate) fn register_metrics(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        self.request_metrics.register(registry)?;
        self.stats.register(registry)
    }

    /// Returns the counters, which [`run`](Cluster::run) updates.
    pub fn stats(&self) -> Arc<SourceStats> {
        self.stats.clone()
    }

    /// Delivers the addresses of the server ([`Event::Servers`](crate::model::Event::Servers)), then
    /// watches until `shutdown` becomes true or its sender is dropped, or the receiver of `sender`
    /// is dropped. Nothing else ends it: faults of the server are reported in notices and requests
    /// are retried.
    ///
    /// `ListStarted` of a kind is repeated if the first list breaks off before its `ListComplete`.
    /// The list of the Node is complete once the Node exists, or after [`Timing::node_wait`]. The
    /// lists of Pods and Namespaces are empty while there is no policy, unless they are always watched.
    /// `ListStarted` of both precedes the `Apply` of the first policy; [`Timing::linger`] after the
    /// deletion of the last one, both are listed as empty again. In the same way the Node is listed
    /// with all others while a policy selects nodes, and then alone again. The list of
    /// ClusterNetworkPolicies is empty while the server does not have the kind.
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
        let own = OwnNode {
            name: self.node_name,
            deadline: Instant::now() + self.timing.node_wait,
        };
        let reflector = |selection, sender| {
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
        // Policies may need other Nodes than the own one.
        let is_watched_here = |kind: &Kind| match kind {
            Kind::Node => !self.network_policies,
            _ => self.services,
        };
        let services = Kind::SERVICES
            .into_iter()
            .filter(is_watched_here)
            .map(|kind| reflector(Selection::of(kind, &own), sender.clone()).run());
        let services = join_all(services);
        let policies: OptionFuture<_> = self
            .network_policies
            .then(|| {
                let (own, linger) = (own.clone(), self.timing.linger);
                let demand = Demand::new(reflector, own, sender.clone(), faults.clone(), linger);
                let demand = demand.with_all_nodes(self.all_nodes);
                demand.run(self.pods)
            })
            .into();
        // With this sender the channel would stay open after the watches have ended.
        drop(sender);
        tokio::select! {
            _ = async { join!(services, policies) } => {}
            () = liveness.run() => {}
            () = follow => {}
            // The wait fails if the sender was dropped, which also ends the source.
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

/// Parses the address of a server; `place` is the flag or field that holds it.
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
        return Err(fault("it has no host".to_owned()));
    }
    let authority = uri.authority().map_or("", Authority::as_str);
    let has_port = !authority.ends_with(uri.host().unwrap_or_default());
    if has_port && uri.port_u16().is_none() {
        return Err(fault("its port is not a number up to 65535".to_owned()));
    }
    Ok(without_user(uri))
}

/// Removes user and password from an address, since they are not sent and must not be logged.
fn without_user(uri: Uri) -> Uri {
    let mut parts = uri.clone().into_parts();
    let authority = parts.authority.as_ref().map(Authority::as_str);
    let Some((_, host)) = authority.and_then(|authority| authority.rsplit_once('@')) else {
        return uri;
    };
    tracing::warn!(
        "user and password in the address of the API server are ignored; set username and \
         password of the user in the kubeconfig"
    );
    parts.authority = host.parse().ok();
    Uri::from_parts(parts).unwrap_or(uri)
}

/// Returns the configuration of the pod. Outside of a pod, `server` alone is used, without
/// credentials.
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
