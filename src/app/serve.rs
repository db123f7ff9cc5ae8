//! What runs on the I/O thread: the source, the HTTP ports, and the signal handlers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;

use super::pages::Pages;
use super::{Error, connect, load, manifests, observe, single_threaded, system};
use crate::events::Recorder;
use crate::logging::LogQueue;
use crate::model::{Delivery, Event, Kind, Notice, ObjectName, ObjectRef, Reason, Subject};
use crate::policies::Isolated;
use crate::serve::health::{self, CheckError, Checks, Health, Outage, Probe, Quota, Router};
use crate::serve::metrics::Metrics;
use crate::settings::Settings;
use crate::settings::file::{self, Ended, File};
use crate::source::{ServerFault, SourceStats};
use crate::sync::{LogAndSend, Reporter};

/// How often reports without a line of their own are counted in the log.
const COUNT_EVERY: Duration = Duration::from_secs(60);

/// What runs on the I/O thread.
pub(super) struct Io {
    pub(super) args: Settings,
    /// The configuration file that the settings come from.
    pub(super) file: Option<File>,
    pub(super) pages: Pages,
    pub(super) node_name: String,
    pub(super) log: LogQueue,
    pub(super) metrics: Arc<Metrics>,
    pub(super) health: Health,
    pub(super) health_checks: watch::Receiver<Checks>,
    /// The descriptors for them.
    pub(super) quota: Quota,
    pub(super) isolated: watch::Receiver<Isolated>,
    pub(super) stop: watch::Sender<bool>,
    pub(super) stopped: watch::Receiver<bool>,
    pub(super) reporter: LogAndSend,
    /// What the reporters send.
    pub(super) notices: mpsc::Receiver<Notice>,
    /// Told when a port becomes free that somebody else had.
    pub(super) freed: std::sync::mpsc::Sender<()>,
}

impl Io {
    /// Starts everything, says so, and works until asked to stop.
    pub(super) fn run(
        self,
        events: mpsc::Sender<Delivery>,
        ready: oneshot::Sender<Result<Option<Arc<SourceStats>>, Error>>,
    ) {
        let runtime = match single_threaded() {
            Ok(runtime) => runtime,
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        let mut stopped = self.stopped.clone();
        runtime.block_on(async {
            match self.start(events).await {
                Ok((tasks, stats)) => {
                    let _ = ready.send(Ok(stats));
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
        mut self,
        events: mpsc::Sender<Delivery>,
    ) -> Result<(Vec<tokio::task::JoinHandle<()>>, Option<Arc<SourceStats>>), Error> {
        let mut tasks = Vec::new();
        let stopped = self.stopped.clone();
        let mut stats = None;
        if let Some(mut manifests) = manifests(&self.args, &self.node_name) {
            let first = load(&mut manifests, &self.node_name)?;
            let once = self.args.once;
            if let Err(error) = manifests.require_objects() {
                if once {
                    let notices = first.iter().filter_map(|event| match event {
                        Event::Notice(notice) => Some(notice),
                        _ => None,
                    });
                    notices.for_each(|notice| self.reporter.notice(notice));
                    return Err(error.into());
                }
                self.reporter.notice(&Notice {
                    subject: Subject::Other("manifests".into()),
                    reason: Reason::InvalidFile,
                    message: error.to_string(),
                });
            }
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
            self.metrics.include(cluster.request_metrics())?;
            let source = cluster.stats();
            stats = Some(source.clone());
            self.health.depends_on(move || {
                let ServerFault { since, message } = source.fault()?;
                Some(Outage { since, message })
            });
            if !self.args.once {
                let metrics = self.metrics.clone();
                let recorder = Recorder::new(cluster.client(), self.node_name.clone())
                    .counting(move || metrics.event_given_up());
                let (_, nothing) = mpsc::channel(1);
                let notices = std::mem::replace(&mut self.notices, nothing);
                tasks.push(tokio::spawn(recorder.run(notices)));
            }
            tasks.push(tokio::spawn(cluster.run(events, stopped)));
        }
        // Not before: until here this thread may have waited for standard input, and nobody
        // would have looked at a signal.
        tasks.push(self.handle_signals()?);
        tasks.extend(self.serve_http(stats.clone()).await?);
        tasks.extend(self.follow_configuration());
        if !self.args.once {
            tasks.push(self.serve_health_checks());
        }
        let reporter = self.reporter.clone();
        tasks.push(tokio::spawn(async move {
            let mut again = tokio::time::interval(COUNT_EVERY);
            again.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                again.tick().await;
                reporter.log_counts();
            }
        }));
        if observe::is_on(&self.args) {
            let (isolated, metrics) = (self.isolated.clone(), self.metrics.clone());
            let reporter = self.reporter.clone();
            let watching = observe::watch_bridges(isolated, metrics, reporter);
            tasks.push(tokio::spawn(watching));
        }
        Ok((tasks, stats))
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

    /// Ends the process when the configuration file becomes another one that can be used.
    fn follow_configuration(&self) -> Option<tokio::task::JoinHandle<()>> {
        let (path, file) = (self.args.config.clone()?, self.file.clone()?);
        if self.args.once {
            return None;
        }
        let (stop, stopped) = (self.stop.clone(), self.stopped.clone());
        Some(tokio::spawn(async move {
            match file::follow(path.clone(), file, stopped).await {
                Ok(Ended::Changed) => {
                    tracing::info!(
                        "{} has changed; ending, to be started again with it",
                        path.display()
                    );
                    stop.send_replace(true);
                }
                Ok(Ended::Stopped) => {}
                Err(error) => {
                    tracing::error!("{error}; a change takes effect with the next start");
                }
            }
        }))
    }

    /// How the operator knows the setting of a port: by its flag, or by its field in the file.
    fn name_of(&self, flag: &'static str, field: &'static str) -> &'static str {
        if self.file.is_some() { field } else { flag }
    }

    /// Opens the ports that are asked for.
    async fn serve_http(
        &self,
        stats: Option<Arc<SourceStats>>,
    ) -> Result<Vec<tokio::task::JoinHandle<()>>, Error> {
        let mut tasks = Vec::new();
        if let Some(address) = self.args.healthz_address() {
            let name = self.name_of("--healthz-bind-address", "healthzBindAddress");
            let router = self.probes();
            tasks.push(self.serve(address, name, router).await?);
        }
        if let Some(address) = self.args.metrics_address() {
            let (metrics, log) = (self.metrics.clone(), self.log.clone());
            let page = move || {
                metrics.log_lines_dropped(log.dropped());
                if let Some(stats) = &stats {
                    copy_stats(stats, &metrics);
                }
                metrics.encode()
            };
            let router = self
                .probes()
                .metrics(page)
                .text("/proxyMode", || "nftables".into());
            let name = self.name_of("--metrics-bind-address", "metricsBindAddress");
            let router = self.pages.on(router);
            tasks.push(self.serve(address, name, router).await?);
        }
        Ok(tasks)
    }

    fn serve_health_checks(&self) -> tokio::task::JoinHandle<()> {
        let (metrics, reporter) = (self.metrics.clone(), self.reporter.clone());
        let failed = move |error: &CheckError| {
            metrics.health_check_port_error();
            if !error.again {
                let notice = port_notice(error);
                metrics.notice(notice.reason.as_str());
                reporter.notice(&notice);
            }
        };
        let (wanted, health) = (self.health_checks.clone(), self.health.clone());
        let (quota, stopped) = (self.quota, self.stopped.clone());
        tokio::spawn(health::serve_checks(wanted, health, quota, failed, stopped))
    }

    fn probes(&self) -> Router {
        let metrics = self.metrics.clone();
        Router::new().probes(&self.health, move |probe, code| match probe {
            Probe::Healthz => metrics.healthz(code),
            Probe::Livez => metrics.livez(code),
            Probe::Readyz => {}
        })
    }

    async fn serve(
        &self,
        address: SocketAddr,
        flag: &'static str,
        router: Router,
    ) -> Result<tokio::task::JoinHandle<()>, Error> {
        let bound = match health::bind(address, flag) {
            Err(error) if self.args.bind_address_hard_fail => return Err(error.into()),
            Err(error) => {
                // Services must not wait for a port that only tells about them.
                tracing::warn!("{error}; until then nftlet works without it and tries on");
                None
            }
            Ok(listener) => Some(listener),
        };
        let (stopped, freed) = (self.stopped.clone(), self.freed.clone());
        Ok(tokio::spawn(async move {
            let listener = match bound {
                Some(listener) => listener,
                None => {
                    let listener = health::bind_again(address, flag).await;
                    tracing::info!("listening on {address} now");
                    // Nobody has to hear it.
                    let _ = freed.send(());
                    listener
                }
            };
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
