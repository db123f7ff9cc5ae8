//! The health checks of services (`healthCheckNodePort`).
//!
//! A load balancer asks each node, on a port of the service's own, whether the service has
//! endpoints there. The wanted ports arrive through a watch channel; [`serve_checks`] keeps one
//! listener for each. Each request reads the number of endpoints from the same channel, so a
//! change of that number needs no work here.

use std::collections::BTreeMap;
use std::future::pending;
use std::io;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::HeaderValue;
use hyper::{Method, Response, StatusCode, Uri};
use rustix::io::Errno;
use serde_json::json;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::health::Health;
use super::http::{Answer, HttpMetrics, JSON, Limits, TEXT, respond, serve_within, stopped};
use super::listen::listen;
use super::share::Share;
use crate::backoff::Backoff;

pub use super::share::Quota;

/// The header from which load balancers take the weight of a node.
const WEIGHT: &str = "x-load-balancing-endpoint-weight";

/// The wanted health checks, by port.
pub type Checks = BTreeMap<u16, Check>;

/// The health check of one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub namespace: String,
    pub name: String,
    /// The number of ready endpoints on this node.
    pub local_endpoints: usize,
}

/// A failure to listen on the port of a health check.
#[derive(Debug, Error)]
#[error("cannot listen on healthCheckNodePort {port}: {source}; load balancers get no answer from this node; {hint}", hint = hint(.source))]
pub struct CheckError {
    pub port: u16,
    pub check: Check,
    /// Whether the previous attempt for the same service and port failed, too.
    pub again: bool,
    pub source: io::Error,
}

/// Returns advice for the operator.
fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "stop the program that holds the port, or give the service another healthCheckNodePort (nftlet retries)"
        }
        io::ErrorKind::PermissionDenied => {
            "choose a port above 1023 or grant the capability NET_BIND_SERVICE (nftlet retries)"
        }
        _ if error.raw_os_error() == Some(Errno::MFILE.raw_os_error()) => {
            "raise the hard limit of open files (LimitNOFILE= of the container runtime), or use fewer services with a healthCheckNodePort (nftlet retries)"
        }
        _ => "nftlet retries",
    }
}

/// The pauses between attempts to listen on a port.
const RETRY: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));

/// Listens on the wanted ports and follows their changes until `shutdown` is true.
///
/// Each answer also contains whether nftlet itself is healthy. Ports and connections use no more
/// file descriptors than `quota` allows. `failed` is called for the first of consecutive failures
/// to listen on a port for a service.
pub async fn serve_checks(
    wanted: watch::Receiver<Checks>,
    health: Health,
    quota: Quota,
    metrics: HttpMetrics,
    failed: impl Fn(&CheckError) + Send + Sync,
    shutdown: watch::Receiver<bool>,
) {
    let failed = move |error: &CheckError| {
        metrics.check_port_failed();
        if !error.again {
            failed(error);
        }
    };
    let ports = Ports::new(RETRY, quota, wanted.clone(), health);
    ports.follow(wanted, failed, shutdown).await;
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => pending().await,
    }
}

/// The ports and their states.
struct Ports {
    retry: Backoff,
    /// The maximum number of open ports.
    most: usize,
    connections: Arc<Share>,
    answers: watch::Receiver<Checks>,
    health: Health,
    known: BTreeMap<u16, Port>,
}

enum Port {
    /// Requests are answered until the sender is dropped.
    Open {
        stop: watch::Sender<bool>,
        server: JoinHandle<()>,
    },
    /// The last attempt to listen failed.
    Waiting {
        attempt: Instant,
        backoff: Backoff,
        service: (String, String),
    },
    /// No longer wanted; the last connections are ending.
    Closing(JoinHandle<()>),
}

impl Ports {
    fn new(retry: Backoff, quota: Quota, answers: watch::Receiver<Checks>, health: Health) -> Self {
        Self {
            retry,
            most: quota.ports,
            connections: Share::new(quota.connections),
            answers,
            health,
            known: BTreeMap::new(),
        }
    }

    /// Opens and closes ports as the wanted checks change, until the shutdown.
    async fn follow(
        mut self,
        mut wanted: watch::Receiver<Checks>,
        failed: impl Fn(&CheckError) + Send + Sync,
        mut shutdown: watch::Receiver<bool>,
    ) {
        loop {
            let now: Checks = wanted.borrow_and_update().clone();
            self.bring_to(&now, &failed).await;
            tokio::select! {
                () = stopped(&mut shutdown) => break,
                changed = wanted.changed() => if changed.is_err() {
                    // The sender was dropped: the open ports stay open until the shutdown.
                    stopped(&mut shutdown).await;
                    break;
                },
                () = until(self.next_attempt()) => {}
            }
        }
        self.close().await;
    }

    /// Closes ports that are no longer wanted, opens new ones, and retries failed ones when due.
    async fn bring_to(&mut self, wanted: &Checks, failed: &(impl Fn(&CheckError) + Send + Sync)) {
        let before = std::mem::take(&mut self.known);
        for (port, state) in before {
            let kept = match state {
                Port::Open { stop, server } if !wanted.contains_key(&port) => {
                    debug!("closing healthCheckNodePort {port}");
                    drop(stop);
                    Some(Port::Closing(server))
                }
                Port::Waiting { .. } if !wanted.contains_key(&port) => None,
                Port::Closing(server) if server.is_finished() => None,
                other => Some(other),
            };
            self.known.extend(kept.map(|state| (port, state)));
        }
        for (port, check) in wanted {
            self.attend(*port, check, failed).await;
        }
    }

    /// Opens a wanted port unless it is open already or its next attempt is not due yet.
    async fn attend(
        &mut self,
        port: u16,
        check: &Check,
        failed: &(impl Fn(&CheckError) + Send + Sync),
    ) {
        let service = (check.namespace.clone(), check.name.clone());
        let last_backoff = match self.known.remove(&port) {
            Some(open @ Port::Open { .. }) => {
                self.known.insert(port, open);
                return;
            }
            Some(Port::Waiting {
                attempt,
                backoff,
                service: same,
            }) if same == service => {
                if attempt > Instant::now() {
                    let state = Port::Waiting {
                        attempt,
                        backoff,
                        service,
                    };
                    self.known.insert(port, state);
                    return;
                }
                Some(backoff)
            }
            Some(Port::Closing(server)) => {
                // The port is wanted again. Its old connections end within the grace period.
                finished(server).await;
                None
            }
            Some(Port::Waiting { .. }) | None => None,
        };
        let state = match self.listen(port) {
            Ok(listener) => {
                debug!(
                    "answering health checks of {}/{} on port {port}",
                    check.namespace, check.name
                );
                self.open(port, listener)
            }
            Err(source) => {
                failed(&CheckError {
                    port,
                    check: check.clone(),
                    again: last_backoff.is_some(),
                    source,
                });
                let mut backoff = last_backoff.unwrap_or(self.retry);
                Port::Waiting {
                    attempt: Instant::now() + backoff.next(),
                    backoff,
                    service,
                }
            }
        };
        self.known.insert(port, state);
    }

    fn listen(&self, port: u16) -> io::Result<TcpListener> {
        let open = self.known.values();
        let open = open.filter(|port| !matches!(port, Port::Waiting { .. }));
        if open.count() >= self.most {
            return Err(Errno::MFILE.into());
        }
        listen((Ipv6Addr::UNSPECIFIED, port).into())
    }

    fn open(&self, port: u16, listener: TcpListener) -> Port {
        let (stop, stopped) = watch::channel(false);
        let answers = Arc::new(Answers {
            port,
            checks: self.answers.clone(),
            health: self.health.clone(),
        });
        let share = self.connections.clone();
        let server = async move {
            serve_within(Limits::default(), &share, listener, answers, stopped).await;
        };
        Port::Open {
            stop,
            server: tokio::spawn(server),
        }
    }

    fn next_attempt(&self) -> Option<Instant> {
        let waiting = self.known.values().filter_map(|port| match port {
            Port::Waiting { attempt, .. } => Some(*attempt),
            Port::Open { .. } | Port::Closing(_) => None,
        });
        waiting.min()
    }

    /// Closes all ports and waits for their connections to end.
    async fn close(self) {
        let servers = self.known.into_values().filter_map(|port| match port {
            Port::Open { server, .. } | Port::Closing(server) => Some(server),
            Port::Waiting { .. } => None,
        });
        // Collected first, so that all are stopped before any is awaited.
        let servers: Vec<_> = servers.collect();
        for server in servers {
            finished(server).await;
        }
    }
}

async fn finished(server: JoinHandle<()>) {
    if let Err(error) = server.await {
        debug!("a health check server ended early: {error}");
    }
}

/// Answers on one port, to any method and path, since load balancers differ in both.
struct Answers {
    port: u16,
    checks: watch::Receiver<Checks>,
    health: Health,
}

impl Answer for Answers {
    async fn answer(&self, _: &Method, _: &Uri) -> Response<Full<Bytes>> {
        let healthy = self.health.proxy_healthy();
        match self.checks.borrow().get(&self.port) {
            Some(check) => check.answer(healthy),
            // The connection was accepted before the check was removed.
            None => respond(
                StatusCode::SERVICE_UNAVAILABLE,
                TEXT,
                "no service has this healthCheckNodePort\n".to_owned(),
            ),
        }
    }
}

impl Check {
    fn answer(&self, proxy_healthy: bool) -> Response<Full<Bytes>> {
        let code = if self.local_endpoints > 0 && proxy_healthy {
            StatusCode::OK
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        };
        let body = json!({
            "service": {"namespace": self.namespace, "name": self.name},
            "localEndpoints": self.local_endpoints,
            "serviceProxyHealthy": proxy_healthy,
        });
        let mut response = respond(code, JSON, body.to_string());
        let weight = HeaderValue::from(self.local_endpoints);
        response.headers_mut().insert(WEIGHT, weight);
        response
    }
}

#[cfg(test)]
mod tests;
