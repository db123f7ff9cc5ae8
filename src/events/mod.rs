//! Writes notices as Events (events.k8s.io/v1) of the cluster.
//!
//! ```text
//! notice ─> dedup: new, and within the rate? ─> object: Event ─> API server (create or patch)
//! ```
//!
//! An Event refers to the object that it is about, or to the Node. A fault of an object has the same
//! Event name on every node, so that a thousand nodes create one Event. Repeated notices make the
//! Event a series, whose count is written every few minutes.
//!
//! Events are best effort and delay nothing else: notices arrive through a bounded channel, and are
//! dropped if it is full. While the server is unreachable they wait. An Event that fails goes to
//! the end of the queue, and is given up if others succeed and it fails again. If the server
//! forbids all Events, this is logged, and nothing is sent for an hour.

mod dedup;
mod metrics;
mod object;

use std::collections::VecDeque;
use std::fmt;
use std::future::pending;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::GroupVersionKind;
use kube::{Api, Client};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use self::dedup::Dedup;
pub use self::metrics::EventMetrics;
use self::object::EventDraft;
use crate::backoff::Backoff;
use crate::logging::{Count, Repeats};
use crate::model::{Kind, Notice};

/// The number of notices that may wait in the channel.
pub const QUEUE: usize = 256;

/// The number of Events that may wait to be written.
const MOST_WAITING: usize = 256;
/// The number of failures after which an Event is given up, if others succeed.
const MOST_TRIES: u32 = 5;
/// The age at which an Event that fails is given up: API servers keep Events for an hour.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
/// How often the number of Events given up is logged.
const COUNT_EVERY: Duration = Duration::from_secs(300);

/// The waiting times of a recorder.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between two writes of the count of a series.
    pub series: Duration,
    /// For the server's answer.
    pub answer: Duration,
    /// Before the second attempt to reach the server; the next pauses are longer.
    pub retry: Duration,
    /// After the server has forbidden Events.
    pub silence: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            series: Duration::from_secs(300),
            answer: Duration::from_secs(10),
            retry: Duration::from_secs(10),
            silence: Duration::from_secs(3600),
        }
    }
}

/// The longest pause between two attempts, as a multiple of [`Pace::retry`].
const LONGEST_RETRY: u32 = 6;

/// Writes the Events of a node.
pub struct Recorder {
    server: EventServer,
    node: String,
    /// The start of this run.
    run: Timestamp,
    pace: Pace,
    dedup: Dedup,
    waiting: VecDeque<PendingWrite>,
    /// The one whose answer is awaited.
    sent: Option<PendingWrite>,
    /// The number of Events written.
    written: u64,
    backoff: Backoff,
    /// Nothing is sent before this time.
    not_before: Instant,
    silent_until: Option<Instant>,
    /// Whether the server failed and has not answered since. A server that has just started may
    /// refuse access because its roles are not loaded.
    settling: bool,
    metrics: Option<EventMetrics>,
    /// Limits the log lines about Events given up.
    lines: Repeats<()>,
}

/// An Event or a count that waits to be written.
#[derive(Clone, Debug)]
struct PendingWrite {
    draft: EventDraft,
    /// The count to write; `None` for a new Event.
    count: Option<i32>,
    since: Instant,
    /// The number of failures while others were written.
    tries: u32,
    /// [`Recorder::written`] at its last failure.
    written_before: Option<u64>,
}

#[derive(Clone)]
struct EventServer {
    client: Client,
    answer: Duration,
}

enum EventRequest {
    Create(Box<Event>),
    Patch(Value),
}

/// Why an Event was not written.
enum WriteError {
    /// nftlet may not write Events at all.
    Forbidden(String),
    /// Another attempt may succeed.
    Busy(String),
    /// The Event to patch, or its namespace, does not exist.
    Absent,
    /// This Event is invalid or not permitted.
    Refused(String),
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WriteError::Forbidden(text) | WriteError::Busy(text) | WriteError::Refused(text) => {
                f.write_str(text)
            }
            WriteError::Absent => f.write_str("its namespace does not exist"),
        }
    }
}

impl From<kube::Error> for WriteError {
    fn from(error: kube::Error) -> Self {
        let status = match &error {
            kube::Error::Api(status) => status,
            // The client's message describes the failure.
            kube::Error::Service(unanswered) => return WriteError::Busy(unanswered.to_string()),
            other => {
                let chain =
                    std::iter::successors(Some(other as &dyn std::error::Error), |it| it.source());
                let cause = chain.last().map(ToString::to_string).unwrap_or_default();
                return WriteError::Busy(format!(
                    "the answer of the API server cannot be read: {cause}"
                ));
            }
        };
        let message = status.message.clone();
        let details = status.details.as_ref();
        let causes = details.map_or(&[][..], |details| &details.causes);
        // A namespace that is being deleted accepts no new objects; other namespaces do.
        let terminating = |reason: &str| reason == "NamespaceTerminating";
        match status.code {
            403 if causes.iter().any(|cause| terminating(&cause.reason)) => WriteError::Absent,
            403 if forbids_events(&message) => WriteError::Forbidden(message),
            404 => WriteError::Absent,
            // Expired credentials are renewed; the others are transient by definition.
            401 | 408 | 409 | 429 => WriteError::Busy(message),
            400..500 => WriteError::Refused(message),
            _ => WriteError::Busy(message),
        }
    }
}

/// Returns whether a message is the API server's authorizer's. Quotas and admission policies answer
/// with 403 as well, but refuse a single Event or namespace.
fn forbids_events(message: &str) -> bool {
    ["create", "patch"]
        .iter()
        .any(|verb| message.contains(&format!("cannot {verb} resource \"events\"")))
}

impl Recorder {
    /// Creates a recorder for the node of this name.
    pub fn new(client: Client, node: String) -> Self {
        Self::with_pace(client, node, Pace::default())
    }

    /// Creates a recorder with other waiting times.
    pub fn with_pace(client: Client, node: String, pace: Pace) -> Self {
        let answer = pace.answer;
        Self {
            server: EventServer { client, answer },
            node,
            run: Timestamp::now(),
            dedup: Dedup::new(pace.series),
            backoff: Backoff::new(pace.retry, pace.retry * LONGEST_RETRY),
            pace,
            waiting: VecDeque::new(),
            sent: None,
            written: 0,
            settling: false,
            not_before: Instant::now(),
            silent_until: None,
            metrics: None,
            lines: Repeats::new(1, COUNT_EVERY),
        }
    }

    /// Counts the Events that are given up.
    #[must_use]
    pub fn with_metrics(mut self, metrics: EventMetrics) -> Self {
        self.metrics = Some(metrics);
        self
    }

    /// Writes an Event of the start, and then those of the notices from a channel until it is closed.
    pub async fn run(mut self, mut notices: mpsc::Receiver<Notice>) {
        let now = Instant::now();
        let starting = EventDraft::starting(&self.node, self.run);
        self.dedup.insert(starting.clone(), now);
        self.waiting
            .push_back(PendingWrite::new(starting, None, now));
        let mut answer: Option<BoxFuture<'static, Result<(), WriteError>>> = None;
        loop {
            let due = self.dedup.due();
            let counts = self.lines.due().map(Instant::from_std);
            let may_send = answer.is_none() && !self.waiting.is_empty();
            tokio::select! {
                notice = notices.recv() => match notice {
                    Some(notice) => self.take(&notice),
                    None => return,
                },
                () = until(due), if self.has_room() => self.take_count(),
                () = sleep_until(self.not_before), if may_send => {
                    answer = self.send().map(FutureExt::boxed);
                }
                result = or_never(&mut answer) => {
                    answer = None;
                    self.take_answer(result);
                }
                () = until(counts) => self.log_counts(),
            }
        }
    }

    fn has_room(&self) -> bool {
        self.waiting.len() < MOST_WAITING
    }

    fn take(&mut self, notice: &Notice) {
        let now = Instant::now();
        if self.silent_until.is_some_and(|until| now < until) || !self.has_room() {
            return;
        }
        let draft = EventDraft::of(notice, &self.node, self.run, Timestamp::now());
        if self.dedup.admit(&draft, now) {
            self.waiting.push_back(PendingWrite::new(draft, None, now));
        }
    }

    /// Queues the count of a series.
    fn take_count(&mut self) {
        let now = Instant::now();
        if let Some((draft, count)) = self.dedup.begin_update(now) {
            self.waiting
                .push_back(PendingWrite::new(draft, Some(count), now));
        }
    }

    /// Begins to write the Event that has waited longest.
    fn send(&mut self) -> Option<impl Future<Output = Result<(), WriteError>> + 'static> {
        let next = self.waiting.pop_front()?;
        self.sent = Some(next.clone());
        Some(self.server.clone().write(next))
    }

    fn take_answer(&mut self, result: Result<(), WriteError>) {
        let Some(mut sent) = self.sent.take() else {
            return;
        };
        match result {
            Ok(()) => {
                self.dedup.written(&sent.draft, Instant::now());
                self.written += 1;
                self.backoff.reset();
                self.settling = false;
            }
            Err(WriteError::Forbidden(_)) if std::mem::take(&mut self.settling) => {
                self.not_before = Instant::now() + self.pace.retry;
                self.waiting.push_front(sent);
            }
            // The server has deleted the Event by now: create it again.
            Err(WriteError::Absent) if sent.count.is_some() => {
                sent.count = None;
                self.waiting.push_front(sent);
            }
            Err(WriteError::Busy(message)) => self.try_again(sent, message),
            Err(fault) => self.give_up(&sent, &fault),
        }
    }

    /// Moves an Event to the end of the queue. Gives it up after some failures while others succeed;
    /// while all fail, the server is the cause.
    fn try_again(&mut self, mut failed: PendingWrite, message: String) {
        if self.backoff.is_reset() {
            tracing::info!(
                "Events cannot be written at present: {message}; they are delayed, and some may be \
                 lost"
            );
        }
        self.settling = true;
        self.not_before = Instant::now() + self.backoff.next();
        if failed
            .written_before
            .is_none_or(|before| before < self.written)
        {
            failed.tries += 1;
        }
        failed.written_before = Some(self.written);
        if failed.tries >= MOST_TRIES || failed.since.elapsed() >= LONGEST_WAIT {
            self.give_up(&failed, &WriteError::Busy(message));
        } else {
            self.waiting.push_back(failed);
        }
    }

    fn count_given_up(&self, count: usize) {
        if let Some(metrics) = &self.metrics {
            metrics.given_up(count);
        }
    }

    fn give_up(&mut self, lost: &PendingWrite, fault: &WriteError) {
        self.dedup.gave_up(&lost.draft);
        self.count_given_up(1);
        match fault {
            WriteError::Forbidden(_) => {
                self.count_given_up(self.waiting.len());
                self.waiting.clear();
                // Events after the pause may be written.
                self.dedup.forget_all();
                self.silent_until = Some(Instant::now() + self.pace.silence);
                tracing::warn!(
                    "the API server forbids Events: {fault}; add to nftlet's ClusterRole the rule \
                     {{apiGroups: [\"events.k8s.io\"], resources: [\"events\"], verbs: [\"create\", \
                     \"patch\"]}}; nothing else needs it"
                );
            }
            WriteError::Absent => {
                // The namespace may be created again.
                self.dedup.forget(&lost.draft);
                tracing::debug!("an Event was not written: {fault}");
            }
            WriteError::Refused(_) | WriteError::Busy(_) => {
                let EventDraft {
                    namespace, name, ..
                } = &lost.draft;
                let text = format!("{namespace}/{name}: {fault}");
                if self.lines.add(&(), &text, Instant::now().into_std()) {
                    tracing::warn!("gave up an Event that the API server does not accept: {text}");
                }
            }
        }
    }

    fn log_counts(&mut self) {
        for Count { reports, last, .. } in self.lines.counts(Instant::now().into_std()) {
            tracing::warn!("gave up {reports} more Events; the last one: {last}");
        }
    }
}

impl PendingWrite {
    fn new(draft: EventDraft, count: Option<i32>, since: Instant) -> Self {
        Self {
            draft,
            count,
            since,
            tries: 0,
            written_before: None,
        }
    }
}

/// Waits until a time, or forever without one.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => pending().await,
    }
}

/// Waits for a future, or forever without one.
async fn or_never<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}

impl EventServer {
    async fn write(self, what: PendingWrite) -> Result<(), WriteError> {
        let draft = what.draft;
        let request = match what.count {
            Some(count) => EventRequest::Patch(draft.series(count, Timestamp::now())),
            None => EventRequest::Create(Box::new(draft.event(self.uid(&draft).await))),
        };
        match timeout(self.answer, self.send(&draft, &request)).await {
            Ok(answer) => answer.map_err(WriteError::from),
            Err(_) => Err(WriteError::Busy(
                "the API server does not answer".to_owned(),
            )),
        }
    }

    async fn send(&self, draft: &EventDraft, request: &EventRequest) -> Result<(), kube::Error> {
        let api: Api<Event> = Api::namespaced(self.client.clone(), &draft.namespace);
        let answer = match request {
            EventRequest::Create(event) => api.create(&PostParams::default(), event).await,
            EventRequest::Patch(patch) => {
                let patch = Patch::Merge(patch);
                api.patch(&draft.name, &PatchParams::default(), &patch)
                    .await
            }
        };
        match answer {
            // Another node has written it, or this one before a restart.
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => Ok(()),
            other => other.map(drop),
        }
    }

    /// Returns the UID of the object that a new Event is about: `kubectl describe` searches by it.
    /// Nothing else in nftlet needs UIDs. Without it, the Event still has the object's name.
    async fn uid(&self, draft: &EventDraft) -> Option<String> {
        let object = draft.object.as_ref()?;
        let resource = ApiResource::from_gvk_with_plural(
            &GroupVersionKind::gvk(object.kind.group(), "v1", object.kind.as_str()),
            object.kind.plural(),
        );
        if object.kind == Kind::Node {
            // Events of a Node have its name as UID.
            return None;
        }
        let (client, name) = (self.client.clone(), &object.name);
        let api: Api<DynamicObject> = if name.namespace().is_empty() {
            Api::all_with(client, &resource)
        } else {
            Api::namespaced_with(client, name.namespace(), &resource)
        };
        let params = ListParams::default()
            .fields(&format!("metadata.name={}", name.name()))
            .limit(1);
        let listed = timeout(self.answer, api.list_metadata(&params)).await;
        let found = listed.ok()?.ok()?.items.into_iter().next()?;
        found.metadata.uid
    }
}
