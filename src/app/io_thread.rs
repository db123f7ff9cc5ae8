//! The I/O thread, which runs the source, the HTTP ports, and the signal handlers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;

use super::followers::Counters;
use super::metrics::Metrics;
use super::socket::{AgentPages, DropHistory, MainLoop};
use super::{Error, connect, followers, load, manifests, single_threaded, system};
use crate::events::Recorder;
use crate::followers::{bridges, health_checks};
use crate::model::{Delivery, Event, Notice, Reason, Subject};
use crate::policies::Isolated;
use crate::serve::checks::{self, CheckError, Checks, Quota};
use crate::serve::health::{Health, Outage};
use crate::serve::http::{self, Router};
use crate::serve::pages::Pages;
use crate::serve::socket::Socket;
use crate::settings::Settings;
use crate::settings::file::{self, Ended, File};
use crate::source::{ServerFault, SourceStats};
use crate::sync::{LogAndSend, Query, Reporter};

/// How often the log summarizes reports that have no line of their own.
const COUNT_EVERY: Duration = Duration::from_secs(60);
/// The pause before another attempt to listen on the socket.
const BIND_AGAIN: Duration = Duration::from_secs(5);

/// The state of the I/O thread.
pub(super) struct IoThread {
    /// Asks the main loop.
    pub(super) ask: mpsc::Sender<Query>,
    pub(super) counters: Counters,
    /// The address of the API server and the counters of its watches.
    pub(super) server: Option<(String, Arc<SourceStats>)>,
    pub(super) args: Settings,
    /// The given flags that have no field in a configuration file.
    pub(super) flags: Vec<String>,
    /// The contents of the configuration file, if there is one.
    pub(super) file: Option<File>,
    pub(super) pages: Pages,
    pub(super) node_name: String,
    pub(super) metrics: Metrics,
    pub(super) health: Health,
    pub(super) health_checks: watch::Receiver<Checks>,
    /// The file descriptors for health checks.
    pub(super) quota: Quota,
    pub(super) isolated: watch::Receiver<Isolated>,
    pub(super) stop: watch::Sender<bool>,
    pub(super) stopped: watch::Receiver<bool>,
    pub(super) reporter: LogAndSend,
    /// Receives the notices of all reporters.
    pub(super) notices: mpsc::Receiver<Notice>,
    /// Receives a message when a port held by another process becomes free.
    pub(super) freed: std::sync::mpsc::Sender<()>,
}

impl IoThread {
    /// Starts all tasks, reports the result through `ready`, and runs until stopped.
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
        // An unanswered DNS query would delay the exit.
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
            let first = load(&mut manifests, &self.args, &self.node_name)?;
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
            cluster.register_metrics(&self.metrics.registry)?;
            let source = cluster.stats();
            self.server = Some((cluster.server().to_owned(), source.clone()));
            stats = Some(source.clone());
            self.health.depends_on(move || {
                let ServerFault { since, message } = source.fault()?;
                Some(Outage { since, message })
            });
            if !self.args.once {
                let recorder = Recorder::new(cluster.client(), self.node_name.clone())
                    .with_metrics(self.metrics.events.clone());
                let (_, nothing) = mpsc::channel(1);
                let notices = std::mem::replace(&mut self.notices, nothing);
                tasks.push(tokio::spawn(recorder.run(notices)));
            }
            tasks.push(tokio::spawn(cluster.run(events, stopped)));
        }
        // Not earlier: while this thread reads standard input, it cannot handle signals.
        tasks.push(self.handle_signals()?);
        tasks.extend(self.serve_http()?);
        tasks.extend(self.follow_configuration());
        if !self.args.once {
            tasks.extend(self.serve_socket());
        }
        if !self.args.once && self.args.services.is_on() {
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
        if followers::is_on(&self.args) {
            let (isolated, metrics) = (self.isolated.clone(), self.metrics.followers.clone());
            let reporter = self.reporter.clone();
            let watching = bridges::watch(isolated, metrics, reporter);
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

    /// Ends the process when the configuration file changes and is valid.
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
                        "{} has changed; exiting, to be restarted with the new settings",
                        path.display()
                    );
                    stop.send_replace(true);
                }
                Ok(Ended::Stopped) => {}
                Err(error) => {
                    tracing::error!("{error}; changes take effect with the next start");
                }
            }
        }))
    }

    /// Returns the name of a setting in messages: its field if there is a configuration file, its
    /// flag otherwise.
    fn name_of(&self, flag: &'static str, field: &'static str) -> &'static str {
        if self.file.is_some() { field } else { flag }
    }

    /// Opens the configured ports.
    fn serve_http(&self) -> Result<Vec<tokio::task::JoinHandle<()>>, Error> {
        let mut tasks = Vec::new();
        if let Some(address) = self.args.healthz_address() {
            let name = self.name_of("--healthz-bind-address", "healthzBindAddress");
            let router = self.probes();
            tasks.push(self.serve(address, name, router)?);
        }
        if let Some(address) = self.args.metrics_address() {
            let mut router = self.probes().metrics(self.metrics.registry.clone());
            if self.args.services.is_on() {
                router = router.text("/proxyMode", || "nftables".into());
            }
            let name = self.name_of("--metrics-bind-address", "metricsBindAddress");
            let router = self.pages.on(router);
            tasks.push(self.serve(address, name, router)?);
        }
        Ok(tasks)
    }

    fn serve_health_checks(&self) -> tokio::task::JoinHandle<()> {
        let (metrics, reporter) = (self.metrics.http.clone(), self.reporter.clone());
        let failed = move |error: &CheckError| reporter.notice(&health_checks::port_notice(error));
        let (wanted, health) = (self.health_checks.clone(), self.health.clone());
        let (quota, stopped) = (self.quota, self.stopped.clone());
        tokio::spawn(checks::serve_checks(
            wanted, health, quota, metrics, failed, stopped,
        ))
    }

    /// Answers the commands that ask the agent. While another agent listens on the socket, as during
    /// an update, this is retried.
    fn serve_socket(&self) -> Option<tokio::task::JoinHandle<()>> {
        let path = self.args.socket.clone();
        if path.as_os_str().is_empty() {
            return None;
        }
        let pages = Arc::new(AgentPages {
            main_loop: Arc::new(MainLoop::new(self.ask.clone())),
            node_name: self.node_name.as_str().into(),
            flags: self.flags.clone(),
            configuration: file::effective(&self.args),
            health: self.health.clone(),
            server: self.server.clone(),
            started: Instant::now(),
            drops: DropHistory::new(self.counters.drops.clone()),
            audit: self.counters.audit.clone(),
        });
        let (history, stop) = (pages.clone(), self.stopped.clone());
        tokio::spawn(async move { history.drops.follow(stop).await });
        let stopped = self.stopped.clone();
        Some(tokio::spawn(async move {
            let mut warned = false;
            let socket = loop {
                match Socket::bind(&path) {
                    Ok(socket) => break socket,
                    Err(error) if warned => tracing::debug!("{error}"),
                    Err(error) => {
                        warned = true;
                        tracing::warn!("{error}; commands cannot ask this agent");
                    }
                }
                tokio::time::sleep(BIND_AGAIN).await;
            };
            socket.serve(pages, stopped).await;
        }))
    }

    fn probes(&self) -> Router {
        Router::new().probes(&self.health, &self.metrics.http)
    }

    fn serve(
        &self,
        address: SocketAddr,
        flag: &'static str,
        router: Router,
    ) -> Result<tokio::task::JoinHandle<()>, Error> {
        let (hard_fail, stopped) = (self.args.bind_address_hard_fail, self.stopped.clone());
        let freed = self.freed.clone();
        let bound_late = move || {
            let _ = freed.send(());
        };
        let server = http::start(address, flag, hard_fail, router, stopped, bound_late)?;
        Ok(tokio::spawn(server))
    }
}
