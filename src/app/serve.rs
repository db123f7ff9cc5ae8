//! What runs on the I/O thread: the source, the HTTP ports, and the signal handlers.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};

use super::{Error, connect, load, manifests, single_threaded, system};
use crate::cli::{Args, HEALTHZ_BIND_ADDRESS, METRICS_BIND_ADDRESS};
use crate::health::{self, CheckError, Checks, Health, Probe, Router};
use crate::metrics::Metrics;
use crate::model::{Delivery, Kind, Notice, ObjectName, ObjectRef, Reason, Subject};
use crate::reconcile::{Log, Reporter};
use crate::source::SourceStats;

/// What runs on the I/O thread.
pub(super) struct Io {
    pub(super) args: Args,
    pub(super) node_name: String,
    pub(super) metrics: Arc<Metrics>,
    pub(super) health: Health,
    pub(super) health_checks: watch::Receiver<Checks>,
    pub(super) stop: watch::Sender<bool>,
    pub(super) stopped: watch::Receiver<bool>,
}

impl Io {
    /// Starts everything, says so, and works until asked to stop.
    pub(super) fn run(
        self,
        events: mpsc::Sender<Delivery>,
        ready: oneshot::Sender<Result<(), Error>>,
    ) {
        let runtime = match single_threaded() {
            Ok(runtime) => runtime,
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        runtime.block_on(async {
            match self.start(events).await {
                Ok(tasks) => {
                    let _ = ready.send(Ok(()));
                    let mut stopped = self.stopped.clone();
                    let _ = stopped.wait_for(|stop| *stop).await;
                    for task in tasks {
                        task.abort();
                    }
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        });
        // A question to a DNS server that does not answer would hold up the end.
        runtime.shutdown_background();
    }

    async fn start(
        &self,
        events: mpsc::Sender<Delivery>,
    ) -> Result<Vec<tokio::task::JoinHandle<()>>, Error> {
        let mut tasks = Vec::new();
        let stopped = self.stopped.clone();
        let mut stats = None;
        if let Some(mut manifests) = manifests(&self.args, &self.node_name) {
            let first = load(&mut manifests, &self.node_name)?;
            let once = self.args.once;
            tasks.push(tokio::spawn(async move {
                for event in first {
                    if events.send(Delivery::now(event)).await.is_err() {
                        return;
                    }
                }
                if once {
                    return;
                }
                if let Err(error) = manifests.follow(events, stopped).await {
                    tracing::error!("{error}");
                }
            }));
        } else {
            let cluster = connect(&self.args, &self.node_name).await?;
            tracing::info!("watching {}", cluster.server());
            stats = Some(cluster.stats());
            tasks.push(tokio::spawn(cluster.run(events, stopped)));
        }
        // Not before: until here this thread may have waited for standard input, and nobody
        // would have looked at a signal.
        tasks.push(self.handle_signals()?);
        tasks.extend(self.serve_http(stats).await?);
        if !self.args.once {
            tasks.push(self.serve_health_checks());
        }
        Ok(tasks)
    }

    fn handle_signals(&self) -> Result<tokio::task::JoinHandle<()>, Error> {
        let failed = system("signal handlers");
        let mut terminate = signal(SignalKind::terminate()).map_err(&failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(&failed)?;
        let stop = self.stop.clone();
        Ok(tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stop.send_replace(true);
        }))
    }

    /// Opens the ports that are asked for.
    async fn serve_http(
        &self,
        stats: Option<Arc<SourceStats>>,
    ) -> Result<Vec<tokio::task::JoinHandle<()>>, Error> {
        let mut tasks = Vec::new();
        if let Some(address) = self.args.healthz_address() {
            let router = self.probes();
            tasks.push(self.serve(address, HEALTHZ_BIND_ADDRESS, router).await?);
        }
        if let Some(address) = self.args.metrics_address() {
            let metrics = self.metrics.clone();
            let page = move || {
                if let Some(stats) = &stats {
                    copy_stats(stats, &metrics);
                }
                metrics.encode()
            };
            let router = self
                .probes()
                .metrics(page)
                .text("/proxyMode", || "nftables".into());
            tasks.push(self.serve(address, METRICS_BIND_ADDRESS, router).await?);
        }
        Ok(tasks)
    }

    fn serve_health_checks(&self) -> tokio::task::JoinHandle<()> {
        let metrics = self.metrics.clone();
        let failed = move |error: &CheckError| {
            metrics.health_check_port_error();
            if !error.again {
                let notice = port_notice(error);
                metrics.notice(notice.reason.as_str());
                Log.notice(&notice);
            }
        };
        let (wanted, health) = (self.health_checks.clone(), self.health.clone());
        let serve = health::serve_checks(wanted, health, failed, self.stopped.clone());
        tokio::spawn(serve)
    }

    fn probes(&self) -> Router {
        let metrics = self.metrics.clone();
        Router::new().probes(&self.health, move |probe, code| match probe {
            Probe::Healthz => metrics.healthz(code),
            Probe::Livez => metrics.livez(code),
        })
    }

    async fn serve(
        &self,
        address: SocketAddr,
        flag: &'static str,
        router: Router,
    ) -> Result<tokio::task::JoinHandle<()>, Error> {
        let listener = health::bind(address, flag).await?;
        let stopped = self.stopped.clone();
        Ok(tokio::spawn(async move {
            health::serve(listener, Arc::new(router), stopped).await;
        }))
    }
}

fn port_notice(error: &CheckError) -> Notice {
    let service = ObjectName::new(&error.check.namespace, &error.check.name);
    Notice {
        subject: Subject::Object(ObjectRef::new(Kind::Service, service)),
        reason: Reason::HealthCheckPort,
        message: error.to_string(),
    }
}

/// The source counts by itself; its numbers become metrics when somebody looks.
fn copy_stats(stats: &SourceStats, metrics: &Metrics) {
    for kind in Kind::ALL {
        let of = stats.kind(kind);
        let (lists, watches, events) = (of.lists(), of.watches(), of.events());
        metrics.watch(kind.as_str(), lists, watches.saturating_sub(1), events);
    }
}
