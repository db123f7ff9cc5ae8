//! Keeping up with the objects of one kind.
//!
//! A reflector first reads a complete list, streamed over the watch where the server offers
//! that, else in pages, and then follows the changes from the version of the list on. When the
//! connection ends it resumes from the last version it saw, and nothing is listed again. Only
//! when the server has forgotten that version (410 Gone) is there another list; the reflector
//! knows the names it has delivered, and sends what the new list lacks as deletions. An object
//! of that list that cannot be decoded is thus not taken for a deleted one.

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
use super::timing::{Backoff, Pause, Timing};
use super::watch_error::{ApiStatus, WatchError, one_line};
use crate::logging::Throttle;
use crate::model::{Event, Kind};
use crate::source::Sender;
use crate::source::convert::{Decoded, identify};

/// Streamed lists that may end early before lists are paged instead.
const MOST_BROKEN_STREAMS: u32 = 2;
/// How often it is logged that the server no longer has a version.
const LOG_GONE_EVERY: Duration = Duration::from_secs(60);

/// The watch of one kind.
pub(super) struct Reflector {
    requester: Requester,
    timing: Timing,
    faults: Arc<Faults>,
    stats: Arc<SourceStats>,
    deliveries: Deliveries,
    reach: Arc<Reach>,
    /// How often the server had come back at the last look.
    returns: u64,
    /// The same when the watch was opened.
    opened: u64,
    /// Changes when the server is found silent, and nothing more is to be expected of it.
    silent: watch::Receiver<u64>,
    /// Whether lists are streamed.
    streaming: bool,
    broken_streams: u32,
    /// The version to resume from; `None` asks for a list.
    version: Option<String>,
    /// The version that the next list must have come to, so that it may come from the server's watch
    /// cache. Another server behind the same address may be behind the one that answered before.
    at_least: Option<String>,
    /// Whether a list followed at once when a version was gone, since the last success.
    relisted: bool,
    /// Since when a watch delivers changes; nothing before it is open and its list complete,
    /// since a list that is cut off begins anew and has won nothing.
    following: Option<Instant>,
    /// Whether a fault of the server was noted that has not ended.
    faulty: bool,
    /// The lines about versions that the server no longer has.
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
            returns: reach.returns(),
            opened: 0,
            reach,
            silent,
            streaming: true,
            broken_streams: 0,
            version: None,
            at_least: None,
            relisted: false,
            following: None,
            faulty: false,
            gone: Throttle::new(LOG_GONE_EVERY),
        }
    }

    fn kind(&self) -> Kind {
        self.requester.selection.kind
    }

    /// Runs until the receiver of the events is gone.
    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::default();
        loop {
            let Err(fault) = self.session().await;
            let followed = self.following.take();
            let returns = self.reach.returns();
            let returned = std::mem::replace(&mut self.returns, returns) != returns;
            // A server that answers others and breaks off the requests of this kind is not back.
            let flaps = returned && matches!(fault, WatchError::Unreachable(_));
            if (returned && !flaps)
                || followed.is_some_and(|since| since.elapsed() >= self.timing.stable)
            {
                backoff.reset();
                self.relisted = false;
            }
            let mut pause = match self.after(&fault, &mut backoff).await {
                Ok(pause) => pause,
                Err(_) => return,
            };
            if flaps {
                pause.at_least = pause.usual;
            }
            let reach = self.reach.clone();
            let waited = reach.pause(pause, returns, self.timing.wake);
            if self.waiting(waited).await.is_err() {
                return;
            }
        }
    }

    /// Draws the conclusions from the end of a session; returns how long to pause.
    async fn after(
        &mut self,
        fault: &WatchError,
        backoff: &mut Backoff,
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
            WatchError::UnknownField(message) if self.requester.selection.spare_fields() => {
                tracing::info!(%kind, message, "the API server does not know the field to select by (Kubernetes before 1.31); going on without");
                return Ok(Pause::default());
            }
            // The version is not understood by what may be another server at the old address.
            WatchError::NoStreaming => self.version = None,
            WatchError::Absent(_) if kind == Kind::ServiceCidr => {
                if !self.deliveries.is_complete() {
                    tracing::info!(
                        "the API server has no ServiceCIDRs (Kubernetes before 1.33); going on without"
                    );
                    self.deliveries.complete_without().await?;
                }
                // That is an answer, and the right one.
                backoff.reset();
                self.healthy();
                return Ok(self.timing.absent_recheck.into());
            }
            // Without the ranges only one kind of rule is missing; no reason to serve nothing.
            WatchError::Refused { code: 403, .. } if kind == Kind::ServiceCidr => {
                self.deliveries.complete_without().await?
            }
            _ => {}
        }
        // A server that has just started does not know yet what is granted.
        let passing = matches!(fault, WatchError::Refused { .. })
            && self.reach.is_settling(self.timing.settle);
        let told = !passing && (fault.is_certain() || backoff.attempts() > 0);
        if told && let Some((sort, message)) = fault.describe(&self.requester.selection) {
            self.faulty = true;
            let news = self.faults.begin(kind, sort, message);
            if let Some(notice) = news {
                self.deliveries
                    .send(Instant::now(), Event::Notice(notice))
                    .await?;
            }
        }
        Ok(match fault {
            WatchError::Busy { retry_after, .. } => {
                let at_least = Duration::from_secs((*retry_after).into());
                backoff.next_after(&self.timing, at_least)
            }
            // That spares no server, and ends when any connection of the process does.
            WatchError::NoDescriptor(_) => backoff
                .next(&self.timing)
                .min(self.timing.first_pause)
                .into(),
            _ if passing => backoff.next(&self.timing).min(self.timing.probe).into(),
            _ => backoff.next(&self.timing).into(),
        })
    }

    /// Lists if necessary, then watches until that ends.
    async fn session(&mut self) -> Result<std::convert::Infallible, WatchError> {
        self.silent.mark_unchanged();
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
        self.opened = self.reach.returns();
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
            let line = self.line_of(&mut lines, patience).await?;
            let at = Instant::now();
            stats.count_bytes(line.len());
            if !line.is_empty() {
                self.line(line, at).await?;
            }
        }
    }

    /// Waits for the next line. A watch that follows changes and from which no fault comes is well
    /// after a while, whether something comes or not.
    async fn line_of<'l>(
        &mut self,
        lines: &'l mut WatchLines,
        patience: Duration,
    ) -> Result<&'l [u8], WatchError> {
        let (reach, opened) = (self.reach.clone(), self.opened);
        let listing = self.deliveries.is_listing();
        let next = async move {
            tokio::select! {
                biased;
                line = lines.next(patience) => line,
                // After an outage, a watch from before may be dead without a sign.
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
            match self.waiting(first).await? {
                Some(line) => return line,
                None => self.healthy(),
            }
        }
        self.waiting(next).await?
    }

    /// Waits for the answer to a request, unless the server is found silent meanwhile.
    async fn unless_silent<T>(
        &mut self,
        answer: impl Future<Output = Result<T, WatchError>>,
    ) -> Result<T, WatchError> {
        let answer = or_silent(self.silent.clone(), answer);
        self.waiting(answer).await?
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
                // Some servers put a bare Status on the stream.
                if let Ok(status) = serde_json::from_slice::<ApiStatus>(line)
                    && status.code.is_some()
                {
                    return Err(status.into());
                }
                let begin = one_line(&String::from_utf8_lossy(line.get(..80).unwrap_or(line)));
                return Err(WatchError::Foreign(format!(
                    "a watch of something else than events: {error}: {begin:?}"
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
                    let cause = "the end of a list without a resourceVersion".to_owned();
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
                    let cause = "an error that is no Status".to_owned();
                    return Err(WatchError::Foreign(cause));
                }
                return Err(status.into());
            }
            other => {
                tracing::debug!(kind = %self.kind(), other, "an event of an unknown type was skipped")
            }
        }
        if !self.deliveries.is_listing() {
            self.healthy();
        }
        Ok(())
    }

    /// Decodes a line that is as most are. Of the others, and of those with faults, the whole is
    /// to be read first.
    fn decode_at_once(&mut self, line: &[u8]) -> Option<Decoded> {
        let line = std::str::from_utf8(line).ok()?;
        self.deliveries.decode(current_object(line)?).ok()
    }

    /// Notes the version of a change. The objects of a streamed list come in any order of versions.
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
        // The watch cache gives no pages.
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
                // The pages have become too old to be continued: all in one, then.
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
                let cause = "a page of a list that leads to itself".to_owned();
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

    /// The server has said all there is at present.
    async fn end_list(&mut self, at: Instant) -> Result<(), WatchError> {
        self.broken_streams = 0;
        self.at_least = None;
        self.healthy();
        self.deliveries.end_list(at).await
    }

    /// The server does what it should. An open connection alone does not show that: a fault can
    /// come as the first event on it.
    fn healthy(&mut self) {
        if std::mem::take(&mut self.faulty) && self.faults.end(self.kind()) {
            self.faults.log_end();
        }
    }

    /// Waits for something, and meanwhile for the moment to go on without the own Node.
    async fn waiting<F: Future>(&mut self, future: F) -> Result<F::Output, WatchError> {
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

/// What comes of waiting for the server, or that it was found silent before.
async fn or_silent<T>(
    mut silent: watch::Receiver<u64>,
    answer: impl Future<Output = Result<T, WatchError>>,
) -> Result<T, WatchError> {
    let given_up = async move {
        // The sender ends with everything else.
        match silent.changed().await {
            Ok(()) => (),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        answer = answer => answer,
        () = given_up => Err(WatchError::Silent),
    }
}
