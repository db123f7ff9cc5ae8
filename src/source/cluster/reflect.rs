//! Keeping up with the objects of one kind.
//!
//! A reflector first reads a complete list, streamed over the watch where the server offers
//! that, else in pages, and then follows the changes from the version of the list on. When the
//! connection ends it resumes from the last version it saw, and nothing is listed again. Only
//! when the server has forgotten that version (410 Gone) is there another list; the reflector
//! knows the names it has delivered, and sends what the new list lacks as deletions. An object
//! of that list that cannot be decoded is thus not taken for a deleted one.

use std::collections::{HashMap, HashSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::value::RawValue;
use tokio::sync::watch;
use tokio::time::Instant as Deadline;

use super::fault::{Fault, Faults, Status};
use super::frames::{Marker, Page, WatchLine, json};
use super::request::{Lines, Requester};
use super::stats::SourceStats;
use super::timing::{Backoff, Timing};
use crate::model::{Delivery, Event, Kind, Notice, Object, ObjectName, ObjectRef, Reason, Subject};
use crate::source::Sender;
use crate::source::convert::{Converter, identify};

/// Streamed lists that may end early before lists are paged instead.
const MOST_BROKEN_STREAMS: u32 = 2;

/// The watch of one kind.
pub(super) struct Reflector {
    requester: Requester,
    sender: Sender,
    timing: Timing,
    faults: Arc<Faults>,
    stats: Arc<SourceStats>,
    converter: Converter,
    /// Changes when the server is found silent, and nothing more is to be expected of it.
    silent: watch::Receiver<u64>,
    /// When to go on without the own Node.
    node_deadline: Option<Deadline>,
    /// Whether lists are streamed.
    streaming: bool,
    broken_streams: u32,
    /// The version to resume from; `None` asks for a list.
    version: Option<String>,
    /// The names that were delivered and not deleted.
    known: HashSet<ObjectName>,
    /// While a list is being read, the names that came up in it.
    listing: Option<HashSet<ObjectName>>,
    /// Since when a watch delivers changes; nothing before it is open and its list complete,
    /// since a list that is cut off begins anew and has won nothing.
    following: Option<Instant>,
    /// What was said about objects at fault, so that it is not repeated with their every change.
    told: HashMap<ObjectName, Vec<Notice>>,
    /// Whether a fault of the server was noted that has not ended.
    faulty: bool,
    /// Whether `ListStarted` was sent.
    started: bool,
    /// Whether `ListComplete` was sent.
    complete: bool,
    /// Whether the list was read to its end, though its node is still missing.
    waiting_for_node: bool,
}

impl Reflector {
    pub(super) fn new(
        requester: Requester,
        sender: Sender,
        timing: Timing,
        faults: Arc<Faults>,
        stats: Arc<SourceStats>,
        silent: watch::Receiver<u64>,
    ) -> Self {
        let is_node = requester.selection.kind == Kind::Node;
        Self {
            node_deadline: is_node.then(|| Deadline::now() + timing.node_wait),
            requester,
            sender,
            timing,
            faults,
            stats,
            silent,
            converter: Converter::default(),
            streaming: true,
            broken_streams: 0,
            version: None,
            known: HashSet::new(),
            listing: None,
            following: None,
            told: HashMap::new(),
            faulty: false,
            started: false,
            complete: false,
            waiting_for_node: false,
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
            if followed.is_some_and(|since| since.elapsed() >= self.timing.stable) {
                backoff.reset();
            }
            let pause = match self.after(&fault, &mut backoff).await {
                Ok(pause) => pause,
                Err(_) => return,
            };
            if self.waiting(tokio::time::sleep(pause)).await.is_err() {
                return;
            }
        }
    }

    /// Draws the conclusions from the end of a session; returns how long to pause.
    async fn after(&mut self, fault: &Fault, backoff: &mut Backoff) -> Result<Duration, Fault> {
        let kind = self.kind();
        tracing::debug!(%kind, ?fault, "a session with the API server ended");
        let unfinished = self.listing.take().is_some();
        match fault {
            Fault::Closed => return Err(Fault::Closed),
            Fault::Ended if unfinished && self.streaming => {
                self.broken_streams += 1;
                if self.broken_streams >= MOST_BROKEN_STREAMS {
                    tracing::info!(%kind, "the API server does not finish streamed lists; reading lists in pages");
                    self.streaming = false;
                    return Ok(Duration::ZERO);
                }
            }
            Fault::Gone => {
                tracing::info!(%kind, "the API server no longer has the version to resume from; listing again");
                self.version = None;
            }
            Fault::NoStreaming if self.streaming && self.version.is_none() => {
                tracing::debug!(%kind, "the API server does not stream lists; reading them in pages");
                self.streaming = false;
                return Ok(Duration::ZERO);
            }
            Fault::UnknownField(message) if self.requester.selection.spare_fields() => {
                tracing::info!(%kind, message, "the API server does not know the field to select by (Kubernetes before 1.31); going on without");
                return Ok(Duration::ZERO);
            }
            // The version is not understood by what may be another server at the old address.
            Fault::NoStreaming => self.version = None,
            Fault::Absent(_) if kind == Kind::ServiceCidr => {
                if !self.complete {
                    tracing::info!(
                        "the API server has no ServiceCIDRs (Kubernetes before 1.33); going on without"
                    );
                    self.complete_without().await?;
                }
                // That is an answer, and the right one.
                backoff.reset();
                self.healthy();
                return Ok(self.timing.absent_recheck);
            }
            // Without the ranges only one kind of rule is missing; no reason to serve nothing.
            Fault::Refused { code: 403, .. } if kind == Kind::ServiceCidr => {
                self.complete_without().await?
            }
            _ => {}
        }
        let told = fault.is_certain() || backoff.attempts() > 0;
        if told && let Some((sort, message)) = fault.describe(&self.requester.selection) {
            self.faulty = true;
            let news = self.faults.begin(kind, sort, message);
            if let Some(notice) = news {
                self.send(Instant::now(), Event::Notice(notice)).await?;
            }
        }
        Ok(match fault {
            Fault::Busy { retry_after, .. } => {
                let at_least = Duration::from_secs((*retry_after).into());
                backoff.next_after(&self.timing, at_least)
            }
            _ => backoff.next(&self.timing),
        })
    }

    /// Lists if necessary, then watches until that ends.
    async fn session(&mut self) -> Result<std::convert::Infallible, Fault> {
        self.silent.mark_unchanged();
        if self.version.is_none() && !self.streaming {
            self.paged_list().await?;
        }
        let version = self.version.clone();
        let stats = self.stats.clone();
        let stats = stats.kind(self.kind());
        let requester = self.requester.clone();
        let mut lines = self
            .unless_silent(async move { requester.watch(version.as_deref()).await })
            .await?;
        stats.count_watch();
        if self.version.is_none() {
            self.begin_list().await?;
        }
        loop {
            let patience = if self.listing.is_some() {
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
        lines: &'l mut Lines,
        patience: Duration,
    ) -> Result<&'l [u8], Fault> {
        let mut next = pin!(or_silent(self.silent.clone(), lines.next(patience)));
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
        answer: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        let answer = or_silent(self.silent.clone(), answer);
        self.waiting(answer).await?
    }

    async fn line(&mut self, line: &[u8], at: Instant) -> Result<(), Fault> {
        let parsed = match serde_json::from_slice::<WatchLine<'_>>(line) {
            Ok(parsed) => parsed,
            Err(error) => {
                // Some servers put a bare Status on the stream.
                if let Ok(status) = serde_json::from_slice::<Status>(line)
                    && status.code.is_some()
                {
                    return Err(status.into());
                }
                return Err(Fault::Unreachable(format!(
                    "the watch carries something else than events: {error}"
                )));
            }
        };
        if parsed.type_ != "ERROR" && self.listing.is_none() {
            self.healthy();
        }
        match &*parsed.type_ {
            "ADDED" | "MODIFIED" => {
                let version = self.object(parsed.object, at).await?;
                // The objects of a streamed list come in any order of versions.
                if self.listing.is_none() && version.is_some() {
                    self.version = version;
                }
            }
            "DELETED" => match identify(self.kind(), &mut json(parsed.object)) {
                Ok(identity) => {
                    self.stats.kind(self.kind()).count_event();
                    if let Some(listed) = &mut self.listing {
                        listed.remove(&identity.name);
                    } else if identity.resource_version.is_some() {
                        self.version = identity.resource_version;
                    }
                    self.delete(identity.name, at).await?;
                }
                Err(error) => self.undecodable(None, &error, at).await?,
            },
            "BOOKMARK" => {
                let marker = serde_json::from_str::<Marker>(parsed.object.get())
                    .unwrap_or_default()
                    .metadata;
                let ends_list = marker
                    .annotations
                    .is_some_and(|it| it.list_end.as_deref() == Some("true"));
                if self.listing.is_none() || ends_list {
                    self.version = marker.resource_version.or(self.version.take());
                }
                if ends_list {
                    self.end_list(at).await?;
                }
            }
            "ERROR" => {
                let status =
                    serde_json::from_str::<Status>(parsed.object.get()).unwrap_or_default();
                return Err(status.into());
            }
            other => {
                tracing::debug!(kind = %self.kind(), other, "an event of an unknown type was skipped")
            }
        }
        Ok(())
    }

    /// Reads a list page by page.
    async fn paged_list(&mut self) -> Result<(), Fault> {
        let stats = self.stats.clone();
        let stats = stats.kind(self.kind());
        let mut limit = Some(self.timing.page);
        let mut token: Option<String> = None;
        loop {
            let requester = self.requester.clone();
            let next = token.clone();
            let answer = self
                .unless_silent(async move { requester.list(limit, next).await })
                .await;
            let at = Instant::now();
            let bytes = match answer {
                Ok(bytes) => bytes,
                // The pages have become too old to be continued: all in one, then.
                Err(Fault::Gone) if token.is_some() => {
                    (limit, token) = (None, None);
                    continue;
                }
                Err(fault) => return Err(fault),
            };
            stats.count_bytes(bytes.len());
            let page: Page<'_> = serde_json::from_slice(&bytes).map_err(|error| {
                Fault::Unreachable(format!("the answer is not a list of objects: {error}"))
            })?;
            // An empty list takes everything away; something else must not pass for one.
            if page.metadata.resource_version.is_none() {
                let cause = "the answer is not a list of objects: it has no resourceVersion";
                return Err(Fault::Unreachable(cause.to_owned()));
            }
            if token.is_none() {
                self.begin_list().await?;
            }
            for item in page.items.unwrap_or_default() {
                self.object(item, at).await?;
            }
            token = page.metadata.token.filter(|token| !token.is_empty());
            if token.is_none() {
                self.version = page.metadata.resource_version;
                return self.end_list(at).await;
            }
        }
    }

    async fn begin_list(&mut self) -> Result<(), Fault> {
        self.stats.kind(self.kind()).count_list();
        self.listing = Some(HashSet::new());
        if !self.complete {
            // A list that was cut off and begins anew has delivered nothing that counts.
            self.known.clear();
            self.started = true;
            self.send(Instant::now(), Event::ListStarted(self.kind()))
                .await?;
        }
        Ok(())
    }

    async fn end_list(&mut self, at: Instant) -> Result<(), Fault> {
        self.broken_streams = 0;
        self.healthy();
        let listed = self.listing.take().unwrap_or_default();
        if self.complete {
            let gone: Vec<ObjectName> = self.known.difference(&listed).cloned().collect();
            for name in gone {
                self.delete(name, at).await?;
            }
        } else if self.kind() == Kind::Node && self.known.is_empty() && self.node_deadline.is_some()
        {
            self.waiting_for_node = true;
        } else {
            self.complete(at).await?;
        }
        Ok(())
    }

    async fn complete(&mut self, at: Instant) -> Result<(), Fault> {
        self.complete = true;
        self.node_deadline = None;
        self.waiting_for_node = false;
        self.send(at, Event::ListComplete(self.kind())).await
    }

    /// Delivers an empty list, so that the other kinds are not held up.
    async fn complete_without(&mut self) -> Result<(), Fault> {
        if self.complete {
            return Ok(());
        }
        let now = Instant::now();
        if !self.started {
            self.started = true;
            self.send(now, Event::ListStarted(self.kind())).await?;
        }
        self.complete(now).await
    }

    /// Takes an object of a list or a change; returns its version.
    async fn object(&mut self, raw: &RawValue, at: Instant) -> Result<Option<String>, Fault> {
        let kind = self.kind();
        self.stats.kind(kind).count_event();
        let decoded = match self.converter.decode(kind, &mut json(raw)) {
            Ok(decoded) => decoded,
            Err(error) => {
                let identity = identify(kind, &mut json(raw)).ok();
                let (name, version) = identity
                    .map(|identity| (identity.name, identity.resource_version))
                    .unzip();
                if let (Some(listed), Some(name)) = (&mut self.listing, &name) {
                    listed.insert(name.clone());
                }
                self.undecodable(name, &error, at).await?;
                return Ok(version.flatten());
            }
        };
        self.tell(&decoded.name, decoded.notices, at).await?;
        match decoded.object {
            Some(object) => {
                if let Some(listed) = &mut self.listing {
                    listed.insert(decoded.name.clone());
                }
                self.known.insert(decoded.name);
                self.apply(object, at).await?;
            }
            // It has become none of nftlet's business.
            None => self.delete(decoded.name, at).await?,
        }
        Ok(decoded.resource_version)
    }

    async fn apply(&mut self, object: Object, at: Instant) -> Result<(), Fault> {
        self.send(at, Event::Apply(object)).await?;
        if self.waiting_for_node {
            self.complete(at).await?;
        }
        Ok(())
    }

    async fn delete(&mut self, name: ObjectName, at: Instant) -> Result<(), Fault> {
        self.told.remove(&name);
        if !self.known.remove(&name) {
            return Ok(());
        }
        let object = ObjectRef::new(self.kind(), name);
        self.send(at, Event::Delete(object)).await
    }

    async fn undecodable(
        &mut self,
        name: Option<ObjectName>,
        error: &serde_json::Error,
        at: Instant,
    ) -> Result<(), Fault> {
        let kind = self.kind();
        self.stats.kind(kind).count_undecodable();
        let (subject, who) = match &name {
            Some(name) => {
                let object = ObjectRef::new(kind, name.clone());
                (Subject::Object(object.clone()), object.to_string())
            }
            None => (
                Subject::Other(self.requester.selection.plural.into()),
                format!("a {kind} without a usable name"),
            ),
        };
        let message = format!(
            "{who}: the object cannot be decoded: {error}; what was known of it stays in force until it is mended"
        );
        let notice = Notice {
            subject,
            reason: Reason::InvalidObject,
            message,
        };
        match name {
            Some(name) => self.tell(&name, vec![notice], at).await,
            None => self.send(at, Event::Notice(notice)).await,
        }
    }

    /// Sends what is wrong with an object, unless that was said before.
    async fn tell(
        &mut self,
        name: &ObjectName,
        notices: Vec<Notice>,
        at: Instant,
    ) -> Result<(), Fault> {
        if notices.is_empty() {
            self.told.remove(name);
            return Ok(());
        }
        if self.told.get(name) == Some(&notices) {
            return Ok(());
        }
        self.told.insert(name.clone(), notices.clone());
        for notice in notices {
            self.send(at, Event::Notice(notice)).await?;
        }
        Ok(())
    }

    /// The server does what it should. An open connection alone does not show that: a fault can
    /// come as the first event on it.
    fn healthy(&mut self) {
        if std::mem::take(&mut self.faulty) && self.faults.end(self.kind()) {
            tracing::info!(
                server = self.faults.server(),
                "the API server answers again"
            );
        }
    }

    async fn send(&mut self, at: Instant, event: Event) -> Result<(), Fault> {
        self.sender
            .send(Delivery { at, event })
            .await
            .map_err(|_| Fault::Closed)
    }

    /// Waits for something, and meanwhile for the moment to go on without the own Node.
    async fn waiting<F: Future>(&mut self, future: F) -> Result<F::Output, Fault> {
        let mut future = pin!(future);
        loop {
            let Some(deadline) = self.node_deadline else {
                return Ok(future.await);
            };
            tokio::select! {
                output = &mut future => return Ok(output),
                () = tokio::time::sleep_until(deadline) => self.go_on_without_node().await?,
            }
        }
    }

    async fn go_on_without_node(&mut self) -> Result<(), Fault> {
        self.node_deadline = None;
        let node_name = self.requester.selection.node_name();
        let message = format!(
            "the Node \"{node_name}\" has been missing for {:?}; nftlet goes on without its addresses and zone (if the node has another name, give it with --hostname-override)",
            self.timing.node_wait
        );
        let notice = Notice {
            subject: Subject::Object(ObjectRef::new(Kind::Node, ObjectName::new("", node_name))),
            reason: Reason::NodeMissing,
            message,
        };
        self.send(Instant::now(), Event::Notice(notice)).await?;
        self.complete_without().await
    }
}

/// What comes of waiting for the server, or that it was found silent before.
async fn or_silent<T>(
    mut silent: watch::Receiver<u64>,
    answer: impl Future<Output = Result<T, Fault>>,
) -> Result<T, Fault> {
    let given_up = async move {
        // The sender ends with everything else.
        match silent.changed().await {
            Ok(()) => (),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        answer = answer => answer,
        () = given_up => Err(Fault::Silent),
    }
}
