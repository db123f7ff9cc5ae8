//! Watching the objects of one kind.
//!
//! A reflector first reads a complete list, streamed over the watch if the server supports that,
//! else in pages, then follows the changes from the version of the list. When the connection ends,
//! it resumes from the last version received, without another list. Only if the server no longer
//! has that version (410 Gone) does it list again: it knows the names it has delivered, and sends
//! deletions for names that the new list lacks. An object of that list that cannot be decoded is
//! not taken for a deleted one.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::deliver::Deliveries;
use super::faults::Faults;
use super::frames::{Marker, WatchLine, current_object, json, usable};
use super::reach::Reach;
use super::request::{Requester, WatchLines};
use super::stats::SourceStats;
use super::timing::{Attempts, Pause, Timing, varied};
use super::watch_error::{ApiStatus, WatchError, one_line};
use crate::logging::Throttle;
use crate::model::{Event, Kind};
use crate::source::Sender;
use crate::source::convert::{Decoded, identify};

/// How many streamed lists may break off before lists are read in pages.
const MOST_BROKEN_STREAMS: u32 = 2;
/// The shortest time between log lines about a version that the server no longer has.
const LOG_GONE_EVERY: Duration = Duration::from_secs(60);

/// The watch of one kind.
pub(super) struct Reflector {
    requester: Requester,
    timing: Timing,
    faults: Arc<Faults>,
    stats: Arc<SourceStats>,
    deliveries: Deliveries,
    reach: Arc<Reach>,
    /// [`Reach::outages_ended`] at the end of the last session.
    outages_ended: u64,
    /// [`Reach::outages_ended`] when the watch was opened.
    outages_ended_at_open: u64,
    /// Changes when the server is found silent.
    silent: watch::Receiver<u64>,
    /// Whether lists are streamed.
    streaming: bool,
    broken_streams: u32,
    /// The version to resume from; without one, a list is read first.
    version: Option<String>,
    /// The minimum version of the next list, which lets the server answer from its watch cache.
    /// Another server behind the same address may be behind the one that answered before.
    at_least: Option<String>,
    /// Whether a list was read without a pause after 410 Gone, since the last success.
    relisted: bool,
    /// Since when a watch delivers changes. `None` until its list is complete, since a list that
    /// breaks off must start again.
    following: Option<Instant>,
    /// Whether the server has the kind, as far as is known.
    served: bool,
    /// Whether discovery has said once, and not denied since, that the server lacks the kind.
    absent_once: bool,
    /// Whether the server did not know the path of the kind since the last success. It is reported
    /// if it happens again although discovery says that the server has the kind.
    path_unknown_once: bool,
    /// Whether the kind has a fault in `faults`.
    faulty: bool,
    /// Limits the log lines about versions that the server no longer has.
    gone: Throttle,
}

impl Reflector {
    pub(super) fn new(
        requester: Requester,
        sender: Sender,
        timing: Timing,
        faults: Arc<Faults>,
        stats: Arc<SourceStats>,
        reach: Arc<Reach>,
        silent: watch::Receiver<u64>,
    ) -> Self {
        let selection = &requester.selection;
        Self {
            deliveries: Deliveries::new(selection, sender, stats.clone(), timing.node_wait),
            requester,
            timing,
            faults,
            stats,
            outages_ended: reach.outages_ended(),
            outages_ended_at_open: 0,
            reach,
            silent,
            streaming: true,
            broken_streams: 0,
            version: None,
            at_least: None,
            relisted: false,
            following: None,
            served: false,
            absent_once: false,
            path_unknown_once: false,
            faulty: false,
            gone: Throttle::new(LOG_GONE_EVERY),
        }
    }

    fn kind(&self) -> Kind {
        self.requester.selection.kind
    }

    /// Runs until the receiver of the events is dropped.
    pub(super) async fn run(mut self) {
        let mut attempts = Attempts::new(&self.timing);
        loop {
            let Err(fault) = self.session().await;
            let followed = self.following.take();
            let outages_ended = self.reach.outages_ended();
            let returned =
                std::mem::replace(&mut self.outages_ended, outages_ended) != outages_ended;
            // The server answers other kinds, but not this one: keep the usual pause.
            let only_others_answered = returned && matches!(fault, WatchError::Unreachable(_));
            if (returned && !only_others_answered)
                || followed.is_some_and(|since| since.elapsed() >= self.timing.stable)
            {
                attempts.reset();
                self.relisted = false;
            }
            let mut pause = match self.after(&fault, &mut attempts).await {
                Ok(pause) => pause,
                Err(_) => return,
            };
            if only_others_answered {
                pause.at_least = pause.usual;
            }
            let reach = self.reach.clone();
            let waited = reach.pause(pause, outages_ended, self.timing.wake);
            if self.wait_with_deadline(waited).await.is_err() {
                return;
            }
        }
    }

    /// Handles the end of a session. Returns how long to pause.
    async fn after(
        &mut self,
        fault: &WatchError,
        attempts: &mut Attempts,
    ) -> Result<Pause, WatchError> {
        let kind = self.kind();
        tracing::debug!(%kind, ?fault, "a session with the API server ended");
        let unfinished = self.deliveries.break_off();
        match fault {
            WatchError::Closed => return Err(WatchError::Closed),
            WatchError::Ended if unfinished && self.streaming => {
                self.broken_streams += 1;
                if self.broken_streams >= MOST_BROKEN_STREAMS {
                    tracing::info!(%kind, "the API server does not finish streamed lists; reading lists in pages");
                    self.streaming = false;
                    return Ok(Pause::default());
                }
            }
            WatchError::Gone => {
                if let Some(unlogged) = self.gone.add(Instant::now()) {
                    tracing::info!(%kind, unlogged, "the API server no longer has the version to resume from; listing again");
                }
                self.at_least = self.version.take();
                if self.at_least.is_some() && !std::mem::replace(&mut self.relisted, true) {
                    return Ok(Pause::default());
                }
            }
            WatchError::Ahead => {
                if let Some(unlogged) = self.gone.add(Instant::now()) {
                    tracing::info!(%kind, unlogged, "the API server has lost the version to resume from; listing again");
                }
                (self.version, self.at_least) = (None, None);
            }
            WatchError::NoStreaming if self.streaming && self.version.is_none() => {
                tracing::debug!(%kind, "the API server does not stream lists; reading them in pages");
                self.streaming = false;
                return Ok(Pause::default());
            }
            WatchError::UnknownField(message) if self.requester.selection.drop_fields() => {
                tracing::info!(%kind, message, "the API server does not support the field selector (Kubernetes before 1.31); continuing without it");
                return Ok(Pause::default());
            }
            // Another server at the same address may not know the version.
            WatchError::NoStreaming => self.version = None,
            WatchError::Absent(_) if kind == Kind::ServiceCidr => {
                if !self.deliveries.is_complete() {
                    tracing::info!(
                        "the API server has no ServiceCIDRs (Kubernetes before 1.33); continuing without them"
                    );
                    self.deliveries.complete_without().await?;
                }
                // The server is healthy, it only lacks the API.
                attempts.reset();
                self.healthy();
                return Ok(self.timing.absent_recheck.into());
            }
            WatchError::NotServed => return self.not_served(attempts).await,
            // The kind may be gone, which discovery knows.
            WatchError::Absent(_) if self.is_optional() => self.version = None,
            // Services work without the ranges, so they must not wait for them.
            WatchError::Refused { code: 403, .. } if kind == Kind::ServiceCidr => {
                self.deliveries.complete_without().await?
            }
            _ => {}
        }
        // A server that has just started may not have loaded all roles.
        let may_be_starting = matches!(fault, WatchError::Refused { .. })
            && self.reach.is_settling(self.timing.settle);
        let reported = match fault {
            WatchError::Absent(_) if self.is_optional() => {
                std::mem::replace(&mut self.path_unknown_once, true)
            }
            _ => !may_be_starting && (fault.is_certain() || attempts.has_failed()),
        };
        if reported && let Some((sort, message)) = fault.describe(&self.requester.selection) {
            self.faulty = true;
            if matches!(fault, WatchError::Refused { .. }) {
                self.stats.set_refusal(&message);
            }
            if let Some(notice) = self.faults.begin(kind, sort, message) {
                self.deliveries
                    .send(Instant::now(), Event::Notice(notice))
                    .await?;
            }
        }
        Ok(match fault {
            WatchError::Busy { retry_after, .. } => {
                let at_least = Duration::from_secs((*retry_after).into());
                attempts.next_after(at_least)
            }
            // Long pauses would spare no server, and a descriptor may be free at any time.
            WatchError::NoDescriptor(_) => attempts.next().min(self.timing.first_pause).into(),
            _ if may_be_starting => attempts.next().min(self.timing.probe).into(),
            _ => attempts.next().into(),
        })
    }

    /// Returns whether a server need not have the kind.
    fn is_optional(&self) -> bool {
        self.requester.selection.discovery.is_some()
    }

    /// Continues without the kind once discovery has said twice that the server does not have it: one
    /// answer may be that of a server that has just started, and policies would be removed that are in
    /// force. Returns how long to pause until discovery is asked again.
    async fn not_served(&mut self, attempts: &mut Attempts) -> Result<Pause, WatchError> {
        let kind = self.kind();
        if !self.deliveries.is_complete() && !std::mem::replace(&mut self.absent_once, true) {
            return Ok(self.timing.first_pause.into());
        }
        self.deliveries.complete_without().await?;
        if self.served && std::mem::replace(&mut self.absent_once, true) {
            tracing::info!(%kind, "the API server no longer has the kind; its objects are no longer in force");
            self.served = false;
            self.deliveries.withdraw().await?;
        }
        attempts.reset();
        self.healthy();
        let pause = varied(self.timing.discovery);
        // At the return of the server, a second answer would be no better than the first.
        Ok(Pause {
            usual: pause,
            at_least: pause,
        })
    }

    /// Asks discovery whether the server has the kind.
    async fn discover(&mut self) -> Result<(), WatchError> {
        let requester = self.requester.clone();
        let served = self
            .unless_silent(async move { requester.is_served().await })
            .await?;
        if !served {
            return Err(WatchError::NotServed);
        }
        self.absent_once = false;
        if !std::mem::replace(&mut self.served, true) && self.deliveries.is_complete() {
            tracing::info!(kind = %self.kind(), "the API server has the kind now; watching it");
        }
        Ok(())
    }

    /// Reads a list if necessary, then watches until the connection ends.
    async fn session(&mut self) -> Result<std::convert::Infallible, WatchError> {
        self.silent.mark_unchanged();
        if self.version.is_none() && self.is_optional() {
            self.discover().await?;
        }
        if self.version.is_none() && !self.streaming {
            self.paged_list().await?;
        }
        let (version, at_least) = (self.version.clone(), self.at_least.clone());
        let stats = self.stats.clone();
        let stats = stats.kind(self.kind());
        let requester = self.requester.clone();
        let mut lines = self
            .unless_silent(async move {
                let (version, at_least) = (version.as_deref(), at_least.as_deref());
                requester.watch(version, at_least).await
            })
            .await?;
        stats.count_watch();
        self.outages_ended_at_open = self.reach.outages_ended();
        if self.version.is_none() {
            self.deliveries.begin_list().await?;
        }
        loop {
            let patience = if self.deliveries.is_listing() {
                self.timing.list_idle
            } else {
                self.following.get_or_insert_with(Instant::now);
                self.timing.idle
            };
            let line = self.next_line(&mut lines, patience).await?;
            let at = Instant::now();
            stats.count_bytes(line.len());
            if !line.is_empty() {
                self.line(line, at).await?;
            }
        }
    }

    /// Waits for the next line. A watch of changes that stays open for [`Timing::stable`] ends the
    /// fault of the kind even without a line.
    async fn next_line<'l>(
        &mut self,
        lines: &'l mut WatchLines,
        patience: Duration,
    ) -> Result<&'l [u8], WatchError> {
        let (reach, opened) = (self.reach.clone(), self.outages_ended_at_open);
        let listing = self.deliveries.is_listing();
        let next = async move {
            tokio::select! {
                biased;
                line = lines.next(patience) => line,
                // A watch from before an outage may be dead without an error.
                () = reach.returned_since(opened), if !listing => Err(WatchError::Ended),
            }
        };
        let mut next = pin!(or_silent(self.silent.clone(), next));
        if self.faulty && self.following.is_some() {
            let stable = tokio::time::sleep(self.timing.stable);
            let first = async {
                tokio::select! {
                    line = &mut next => Some(line),
                    () = stable => None,
                }
            };
            match self.wait_with_deadline(first).await? {
                Some(line) => return line,
                None => self.healthy(),
            }
        }
        self.wait_with_deadline(next).await?
    }

    /// Waits for an answer, or fails once the server is found silent.
    async fn unless_silent<T>(
        &mut self,
        answer: impl Future<Output = Result<T, WatchError>>,
    ) -> Result<T, WatchError> {
        let answer = or_silent(self.silent.clone(), answer);
        self.wait_with_deadline(answer).await?
    }

    async fn line(&mut self, line: &[u8], at: Instant) -> Result<(), WatchError> {
        if let Some(decoded) = self.decode_at_once(line) {
            let version = self.deliveries.take(decoded, at).await?;
            if !self.deliveries.is_listing() {
                self.healthy();
            }
            self.resume_from(version);
            return Ok(());
        }
        let parsed = match serde_json::from_slice::<WatchLine<'_>>(line) {
            Ok(parsed) => parsed,
            Err(error) => {
                // Some servers send a Status without an event around it.
                if let Ok(status) = serde_json::from_slice::<ApiStatus>(line)
                    && status.code.is_some()
                {
                    return Err(status.into());
                }
                let begin = one_line(&String::from_utf8_lossy(line.get(..80).unwrap_or(line)));
                return Err(WatchError::Foreign(format!(
                    "a line that is not a watch event: {error}: {begin:?}"
                )));
            }
        };
        match &*parsed.type_ {
            "ADDED" | "MODIFIED" => {
                let version = self.deliveries.object(parsed.object, at).await?;
                self.resume_from(version);
            }
            "DELETED" => {
                self.deliveries.check_raw(parsed.object)?;
                match identify(self.kind(), &mut json(parsed.object)) {
                    Ok(identity) => {
                        self.resume_from(identity.resource_version);
                        self.deliveries.deleted(identity.name, at).await?;
                    }
                    Err(error) => self.deliveries.undecodable(None, &error, at).await?,
                }
            }
            "BOOKMARK" => {
                self.deliveries.check_raw(parsed.object)?;
                let marker = serde_json::from_str::<Marker>(parsed.object.get())
                    .unwrap_or_default()
                    .metadata;
                let ends_list = marker
                    .annotations
                    .is_some_and(|it| it.list_end.as_deref() == Some("true"));
                let version = usable(marker.resource_version);
                if ends_list && version.is_none() {
                    let cause = "a bookmark that ends a list without a resourceVersion".to_owned();
                    return Err(WatchError::Foreign(cause));
                }
                if !self.deliveries.is_listing() || ends_list {
                    self.version = version.or(self.version.take());
                }
                if ends_list {
                    self.end_list(at).await?;
                }
            }
            "ERROR" => {
                let status =
                    serde_json::from_str::<ApiStatus>(parsed.object.get()).unwrap_or_default();
                if status.code.is_none() && status.reason.is_none() {
                    let cause = "an error event without a Status".to_owned();
                    return Err(WatchError::Foreign(cause));
                }
                return Err(status.into());
            }
            other => {
                tracing::debug!(kind = %self.kind(), other, "skipped a watch event of an unknown type")
            }
        }
        if !self.deliveries.is_listing() {
            self.healthy();
        }
        Ok(())
    }

    /// Decodes an `ADDED` or `MODIFIED` line as servers write it. Returns `None` for other lines and
    /// invalid objects, which need the whole event.
    fn decode_at_once(&mut self, line: &[u8]) -> Option<Decoded> {
        let line = std::str::from_utf8(line).ok()?;
        self.deliveries.decode(current_object(line)?).ok()
    }

    /// Records the version of a change. The objects of a streamed list are not in order of version.
    fn resume_from(&mut self, version: Option<String>) {
        let version = usable(version);
        if !self.deliveries.is_listing() && version.is_some() {
            self.version = version;
        }
    }

    /// Reads a list page by page.
    async fn paged_list(&mut self) -> Result<(), WatchError> {
        let stats = self.stats.clone();
        let stats = stats.kind(self.kind());
        let at_least = self.at_least.clone();
        // The watch cache ignores the limit, so all is requested at once.
        let mut limit = Some(self.timing.page).filter(|_| at_least.is_none());
        let mut token: Option<String> = None;
        loop {
            let requester = self.requester.clone();
            let (next, at_least) = (token.clone(), at_least.clone());
            let answer = self
                .unless_silent(async move { requester.list(limit, next, at_least).await })
                .await;
            let mut list = match answer {
                Ok(list) => list,
                // The continue token has expired: read all in one page.
                Err(WatchError::Gone) if token.is_some() => {
                    (limit, token) = (None, None);
                    continue;
                }
                Err(fault) => return Err(fault),
            };
            let mut begun = token.is_some();
            while let Some(item) = self.unless_silent(list.next()).await? {
                if !std::mem::replace(&mut begun, true) {
                    self.deliveries.begin_list().await?;
                }
                stats.count_bytes(item.get().len());
                self.deliveries.item(item, Instant::now()).await?;
            }
            let end = list.end()?;
            stats.count_bytes(end.bytes);
            if end.token.is_some() && end.token == token {
                let cause = "a page of a list whose continue token is its own".to_owned();
                return Err(WatchError::Foreign(cause));
            }
            if !begun {
                self.deliveries.begin_list().await?;
            }
            token = end.token;
            if token.is_none() {
                self.version = Some(end.version);
                return self.end_list(Instant::now()).await;
            }
        }
    }

    async fn end_list(&mut self, at: Instant) -> Result<(), WatchError> {
        self.broken_streams = 0;
        self.at_least = None;
        self.healthy();
        self.deliveries.end_list(at).await
    }

    /// Ends the fault of the kind. An open connection alone is no reason to call this: its first
    /// event may be an error.
    fn healthy(&mut self) {
        self.path_unknown_once = false;
        if std::mem::take(&mut self.faulty) && self.faults.end(self.kind()) {
            self.faults.log_end();
        }
    }

    /// Awaits a future. Meanwhile stops waiting for the own Node when its deadline passes.
    async fn wait_with_deadline<F: Future>(&mut self, future: F) -> Result<F::Output, WatchError> {
        let mut future = pin!(future);
        loop {
            let Some(deadline) = self.deliveries.node_deadline() else {
                return Ok(future.await);
            };
            tokio::select! {
                output = &mut future => return Ok(output),
                () = tokio::time::sleep_until(deadline) => self.deliveries.go_on_without_node().await?,
            }
        }
    }
}

/// Waits for an answer, or fails once the server is found silent.
async fn or_silent<T>(
    mut silent: watch::Receiver<u64>,
    answer: impl Future<Output = Result<T, WatchError>>,
) -> Result<T, WatchError> {
    let found_silent = async move {
        // The sender is dropped only when the source ends.
        match silent.changed().await {
            Ok(()) => (),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        answer = answer => answer,
        () = found_silent => Err(WatchError::Silent),
    }
}
