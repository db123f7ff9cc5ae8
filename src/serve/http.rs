//! A small HTTP server for probes and metrics.
//!
//! The health port is open to the network, so no client can cost it much: requests have a small
//! buffer and a deadline, connections have a maximum lifetime, and when there are too many of them
//! the oldest is closed (`Share`). A probe is answered within milliseconds, so clients that hold
//! connections open displace only each other.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Body, Bytes};
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use super::health::{Health, Probe};
use super::listen::listen;
use super::metrics::Registry;
use super::share::{Seat, Share};
use crate::logging::Throttle;

pub use self::metrics::HttpMetrics;

mod metrics;

pub(super) const JSON: &str = "application/json";
pub(super) const TEXT: &str = "text/plain; charset=utf-8";

/// The content type of Prometheus' text format.
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// An error of the HTTP server.
#[derive(Debug, Error)]
pub enum Error {
    /// Listening on an address failed.
    #[error("cannot listen on {address}: {source}; {hint}", hint = hint(.flag, .source))]
    Bind {
        address: SocketAddr,
        /// The flag or field that configures it.
        flag: &'static str,
        /// The error of the socket.
        source: io::Error,
    },
}

/// Returns advice for the operator.
fn hint(flag: &str, error: &io::Error) -> String {
    let no_family = rustix::io::Errno::AFNOSUPPORT.raw_os_error();
    match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "stop the program that holds this port (kube-proxy has the same ports) or choose another one with {flag}"
        ),
        io::ErrorKind::AddrNotAvailable => {
            format!("give one of this node's addresses, or 0.0.0.0 or [::] for all, with {flag}")
        }
        io::ErrorKind::PermissionDenied => {
            format!("choose a port above 1023 with {flag} or grant the capability NET_BIND_SERVICE")
        }
        _ if error.raw_os_error() == Some(no_family) => {
            format!("this node has no IPv6; give an IPv4 address such as 0.0.0.0 with {flag}")
        }
        _ => format!("choose another address with {flag}"),
    }
}

/// Listens on an address, which the operator configures with `flag`. Must be called in a runtime.
///
/// `::` means all addresses of both families, or of IPv4 on a node without IPv6.
fn bind(address: SocketAddr, flag: &'static str) -> Result<TcpListener, Error> {
    listen(address).map_err(|source| Error::Bind {
        address,
        flag,
        source,
    })
}

/// The pause between two attempts to bind an address.
const RETRY: Duration = Duration::from_secs(1);

/// Listens on an address and answers requests as [`serve`] does.
///
/// If the address cannot be bound, the error is logged and binding is retried; `bound_late` is
/// called when it succeeds.
///
/// # Errors
///
/// With `hard_fail`, if the address cannot be bound.
pub(crate) fn start(
    address: SocketAddr,
    flag: &'static str,
    hard_fail: bool,
    router: Router,
    shutdown: watch::Receiver<bool>,
    bound_late: impl FnOnce() + Send + 'static,
) -> Result<impl Future<Output = ()> + Send + 'static, Error> {
    let bound = match bind(address, flag) {
        Err(error) if hard_fail => return Err(error),
        Err(error) => {
            warn!("{error}; nftlet runs without it and retries");
            None
        }
        Ok(listener) => Some(listener),
    };
    Ok(async move {
        let listener = match bound {
            Some(listener) => listener,
            None => {
                let listener = bind_again(address, flag).await;
                info!("listening on {address} now");
                bound_late();
                listener
            }
        };
        serve(listener, Arc::new(router), shutdown).await;
    })
}

/// Retries to listen on an address until it succeeds.
async fn bind_again(address: SocketAddr, flag: &'static str) -> TcpListener {
    loop {
        tokio::time::sleep(RETRY).await;
        match bind(address, flag) {
            Ok(listener) => return listener,
            Err(error) => debug!("{error}"),
        }
    }
}

/// The pages that a port serves.
#[derive(Default)]
pub(crate) struct Router {
    pages: Vec<Page>,
}

struct Page {
    path: &'static str,
    content_type: &'static str,
    answer: Arc<dyn Fn() -> (StatusCode, String) + Send + Sync>,
    /// The lock that serializes requests for an expensive page.
    turn: Option<Arc<Mutex<()>>>,
    /// Set for probes: requests can wait until it is ready.
    waits_for: Option<Health>,
}

/// The upper bound of `wait=SECONDS`.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Parses `wait=SECONDS` of a query.
fn requested_wait(query: Option<&str>) -> Option<Duration> {
    let seconds = query?.split('&').find_map(|it| it.strip_prefix("wait="))?;
    let seconds = Duration::from_secs(seconds.parse().ok()?);
    Some(seconds.min(LONGEST_WAIT))
}

impl Page {
    /// Waits until nftlet is ready if this is a probe and the query contains `wait`.
    async fn wait(&self, query: Option<&str>) {
        if let (Some(health), Some(patience)) = (&self.waits_for, requested_wait(query)) {
            // After a timeout, the answer shows that it is not ready.
            let _ = tokio::time::timeout(patience, health.until_ready()).await;
        }
    }

    /// Builds the page. An expensive one is built on a thread of its own, so that it delays no
    /// other request, and once at a time, even if clients disconnect and request it again.
    async fn make(&self) -> (StatusCode, String) {
        let Some(turn) = &self.turn else {
            return (self.answer)();
        };
        let turn = Arc::clone(turn).lock_owned().await;
        let answer = Arc::clone(&self.answer);
        let made = tokio::task::spawn_blocking(move || {
            let page = answer();
            drop(turn);
            page
        });
        made.await.unwrap_or_else(|error| {
            debug!("cannot build a page: {error}");
            let body = "cannot build the page\n".to_owned();
            (StatusCode::INTERNAL_SERVER_ERROR, body)
        })
    }
}

impl Router {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds `/healthz`, `/livez` and `/readyz`. With `?wait=SECONDS`, the answer is delayed until
    /// nftlet is ready, at most by that time.
    #[must_use]
    pub(crate) fn probes(mut self, health: &Health, metrics: &HttpMetrics) -> Self {
        for probe in Probe::ALL {
            let (health, metrics) = (health.clone(), metrics.clone());
            self.add(probe.path(), JSON, move || {
                let status = health.status(probe);
                metrics.answered(probe, status.code());
                let code = if status.healthy {
                    StatusCode::OK
                } else {
                    StatusCode::SERVICE_UNAVAILABLE
                };
                (code, status.body())
            });
        }
        for page in &mut self.pages {
            page.waits_for = Some(health.clone());
        }
        self
    }

    /// Adds `/metrics`. It is expensive, since some metrics are read from the kernel.
    #[must_use]
    pub(crate) fn metrics(mut self, registry: Registry) -> Self {
        self.add("/metrics", METRICS, move || {
            (StatusCode::OK, registry.encode())
        });
        if let Some(page) = self.pages.last_mut() {
            page.turn = Some(Arc::default());
        }
        self
    }

    /// Adds a page of plain text.
    #[must_use]
    pub(crate) fn text(
        mut self,
        path: &'static str,
        page: impl Fn() -> String + Send + Sync + 'static,
    ) -> Self {
        self.add(path, TEXT, move || (StatusCode::OK, page()));
        self
    }

    /// Adds a page of JSON.
    #[must_use]
    pub(crate) fn json(
        mut self,
        path: &'static str,
        page: impl Fn() -> String + Send + Sync + 'static,
    ) -> Self {
        self.add(path, JSON, move || (StatusCode::OK, page()));
        self
    }

    pub(crate) fn paths(&self) -> impl Iterator<Item = &'static str> {
        self.pages.iter().map(|page| page.path)
    }

    fn add(
        &mut self,
        path: &'static str,
        content_type: &'static str,
        answer: impl Fn() -> (StatusCode, String) + Send + Sync + 'static,
    ) {
        self.pages.push(Page {
            path,
            content_type,
            answer: Arc::new(answer),
            turn: None,
            waits_for: None,
        });
    }
}

/// Answers the requests of a port. Request bodies are never read.
pub(super) trait Answer: Send + Sync + 'static {
    fn answer(
        &self,
        method: &Method,
        uri: &Uri,
    ) -> impl Future<Output = Response<Full<Bytes>>> + Send;
}

impl Answer for Router {
    async fn answer(&self, method: &Method, uri: &Uri) -> Response<Full<Bytes>> {
        let path = uri.path();
        match self.pages.iter().find(|page| page.path == path) {
            None => {
                let paths: Vec<&str> = self.paths().collect();
                let body = format!("no such page; there are {}\n", paths.join(", "));
                respond(StatusCode::NOT_FOUND, TEXT, body)
            }
            Some(_) if !matches!(*method, Method::GET | Method::HEAD) => {
                let body = "only GET and HEAD are answered\n".to_owned();
                let mut response = respond(StatusCode::METHOD_NOT_ALLOWED, TEXT, body);
                let allowed = HeaderValue::from_static("GET, HEAD");
                response.headers_mut().insert(ALLOW, allowed);
                response
            }
            Some(page) => {
                page.wait(uri.query()).await;
                let (code, body) = page.make().await;
                respond(code, page.content_type, body)
            }
        }
    }
}

async fn answer<B: Body>(by: &impl Answer, request: Request<B>) -> Response<Full<Bytes>> {
    let mut response = by.answer(request.method(), request.uri()).await;
    if !request.body().is_end_stream() {
        // Closing the connection avoids reading the body, which no page uses.
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(CONNECTION, close);
    }
    response
}

impl fmt::Debug for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.paths()).finish()
    }
}

pub(super) fn respond(
    code: StatusCode,
    content_type: &'static str,
    body: String,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Limits on the use of a port by clients.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Simultaneous connections of a port; one more closes the oldest.
    connections: usize,
    /// Time until a request's last header has arrived, which also bounds how long a connection
    /// may be idle.
    request: Duration,
    /// Lifetime of a connection, idle or not.
    connection: Duration,
    /// Time to finish an answer when the connection must end.
    grace: Duration,
    /// Size of a request's line and headers.
    header_bytes: usize,
    /// Number of headers.
    headers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            request: Duration::from_secs(10),
            connection: Duration::from_secs(120),
            grace: Duration::from_secs(1),
            // The smallest size that hyper accepts.
            header_bytes: 8192,
            headers: 64,
        }
    }
}

/// How often failures to accept connections are logged.
const LOG_EVERY: Duration = Duration::from_secs(300);

/// Answers requests until `shutdown` is true or its sender is dropped; connections then have a
/// second to finish.
async fn serve(listener: TcpListener, router: Arc<Router>, shutdown: watch::Receiver<bool>) {
    let limits = Limits::default();
    let share = Share::new(limits.connections);
    serve_within(limits, &share, listener, router, shutdown).await;
}

/// Answers requests as [`serve`] does, within `limits`. Connections count towards `share`.
pub(super) async fn serve_within<A: Answer>(
    limits: Limits,
    share: &Arc<Share>,
    listener: TcpListener,
    answers: Arc<A>,
    mut shutdown: watch::Receiver<bool>,
) {
    let port = listener.local_addr().map_or(0, |address| address.port());
    let mut connections = JoinSet::new();
    let mut refused = Throttle::new(LOG_EVERY);
    loop {
        let accepted = tokio::select! {
            () = stopped(&mut shutdown) => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, client)) => {
                // Awaited before the next accept, so that few connections are without a seat.
                let seat = tokio::select! {
                    () = stopped(&mut shutdown) => break,
                    seat = share.enter(port, limits.connections) => seat,
                };
                let Some(seat) = seat else { continue };
                let answers = Arc::clone(&answers);
                let attended = attend(limits, stream, client, answers, shutdown.clone());
                connections.spawn(seated(seat, client, attended));
            }
            // The client disconnected before the accept.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                // Most likely no file descriptor is free: an immediate retry would only burn CPU,
                // and logging each failure would fill the log.
                if refused.add(Instant::now()).is_some() {
                    warn!("cannot accept HTTP connections on port {port}: {error}; nftlet retries");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Serves a connection until it ends or must make room for another.
async fn seated(mut seat: Seat, client: SocketAddr, attended: impl Future<Output = ()>) {
    tokio::select! {
        () = attended => {}
        () = seat.dismissed() => debug!("HTTP connection of {client} closed to make room for a newer one"),
    }
}

/// Answers the requests of one connection.
async fn attend<A: Answer>(
    limits: Limits,
    stream: TcpStream,
    client: SocketAddr,
    answers: Arc<A>,
    mut shutdown: watch::Receiver<bool>,
) {
    let service = service_fn(|request| {
        let answers = Arc::clone(&answers);
        async move { Ok::<_, Infallible>(answer(&*answers, request).await) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.request)
            .max_buf_size(limits.header_bytes)
            .max_headers(limits.headers)
            .serve_connection(TokioIo::new(stream), service)
    );
    tokio::select! {
        ended = connection.as_mut() => {
            if let Err(error) = ended {
                debug!("HTTP connection of {client} ended: {error}");
            }
            return;
        }
        () = stopped(&mut shutdown) => {}
        () = tokio::time::sleep(limits.connection) => {}
    }
    connection.as_mut().graceful_shutdown();
    if tokio::time::timeout(limits.grace, connection)
        .await
        .is_err()
    {
        debug!("HTTP connection of {client} aborted after the grace period");
    }
}

/// Waits for the shutdown. A dropped sender counts as one.
pub(super) async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    if shutdown.wait_for(|stop| *stop).await.is_err() {
        debug!("the sender of the shutdown signal was dropped");
    }
}

#[cfg(test)]
mod tests;
