//! What a person should know, as Events (events.k8s.io/v1) of the cluster.
//!
//! ```text
//! notices ─> Dedup: new? often enough told? ─> object: Event ─> API server (create, or patch)
//! ```
//!
//! An Event stands at the object that it is about, or else at the Node. What every node finds
//! wrong with an object alike has one name in the whole cluster, so that a thousand nodes make one
//! Event of it and not a thousand. The same again makes an Event a series, whose count is written
//! every few minutes.
//!
//! Events are a courtesy and hold up nothing: notices come through a bounded channel, and those
//! that do not fit are dropped. While the server cannot be reached they wait; one that fails
//! lets the others go first, and is given up when these succeed and it does not. A server that
//! takes no Events at all is named in the log once.

mod dedup;
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

use self::dedup::{Advice, Dedup};
use self::object::Draft;
use crate::logging::{Count, Repeats};
use crate::model::{Kind, Notice};

/// How many notices may wait to become Events.
pub const QUEUE: usize = 256;

/// How many Events may wait to be written.
const MOST_WAITING: usize = 256;
/// How often an Event may fail while others are written.
const MOST_TRIES: u32 = 5;
/// How long an Event is worth writing: an API server keeps it for an hour.
const WORTH: Duration = Duration::from_secs(3600);
/// How often lines say how many more Events were given up.
const COUNT_EVERY: Duration = Duration::from_secs(300);

/// How long a recorder waits for what.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between two updates of a series.
    pub series: Duration,
    /// For an answer.
    pub answer: Duration,
    /// Before the second attempt, when the server cannot be reached; the next pauses are longer.
    pub retry: Duration,
    /// How long nothing is tried after the server said that it takes no Events.
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

/// The longest pause between two attempts, in first pauses.
const LONGEST_RETRY: u32 = 6;

/// Writes Events of one node.
pub struct Recorder {
    server: Server,
    node: String,
    /// When this run began.
    run: Timestamp,
    pace: Pace,
    dedup: Dedup,
    waiting: VecDeque<Waiting>,
    /// The one that is on its way.
    sent: Option<Waiting>,
    /// How many were written.
    written: u64,
    /// The pause after the next failure, in first pauses.
    pauses: u32,
    /// Nothing is sent before.
    not_before: Instant,
    silent_until: Option<Instant>,
    /// The server was out of order, and may not know yet what it grants.
    settling: bool,
    given_up: Box<dyn Fn() + Send + Sync>,
    /// The lines about those that are given up.
    lines: Repeats<()>,
}

/// Something that waits to be written.
#[derive(Clone, Debug)]
struct Waiting {
    draft: Draft,
    /// The count to write; none for a new Event.
    count: Option<i32>,
    since: Instant,
    /// How often it failed although others were written.
    tries: u32,
    /// How many others had been written when it failed last.
    written_before: Option<u64>,
}

/// Where Events are written.
#[derive(Clone)]
struct Server {
    client: Client,
    answer: Duration,
}

/// What is sent to the server.
enum Request {
    Create(Box<Event>),
    Patch(Value),
}

/// Why an Event was not written.
enum Fault {
    /// The server does not take Events from nftlet at all.
    Forbidden(String),
    /// Another attempt may do better.
    Busy(String),
    /// There is no such Event (any more), or no such namespace.
    Absent,
    /// This Event is refused, and would be again.
    Refused(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Forbidden(text) | Fault::Busy(text) | Fault::Refused(text) => f.write_str(text),
            Fault::Absent => f.write_str("its namespace is gone"),
        }
    }
}

impl From<kube::Error> for Fault {
    fn from(error: kube::Error) -> Self {
        let status = match &error {
            kube::Error::Api(status) => status,
            // The client says in a sentence why there was no answer.
            kube::Error::Service(unanswered) => return Fault::Busy(unanswered.to_string()),
            other => {
                let chain =
                    std::iter::successors(Some(other as &dyn std::error::Error), |it| it.source());
                let cause = chain.last().map(ToString::to_string).unwrap_or_default();
                return Fault::Busy(format!(
                    "an answer of the API server cannot be read: {cause}"
                ));
            }
        };
        let message = status.message.clone();
        let details = status.details.as_ref();
        let causes = details.map_or(&[][..], |details| &details.causes);
        // A namespace on its way out takes nothing new; that says nothing about the others.
        let terminating = |reason: &str| reason == "NamespaceTerminating";
        match status.code {
            403 if causes.iter().any(|cause| terminating(&cause.reason)) => Fault::Absent,
            403 if forbids_events(&message) => Fault::Forbidden(message),
            404 => Fault::Absent,
            // Credentials that are renewed, and what says itself that it passes.
            401 | 408 | 409 | 429 => Fault::Busy(message),
            400..500 => Fault::Refused(message),
            _ => Fault::Busy(message),
        }
    }
}

/// Whether a message is that of the API server's authorizer: a quota and an admission policy answer
/// with 403 as well, and mean one Event or one namespace.
fn forbids_events(message: &str) -> bool {
    ["create", "patch"]
        .iter()
        .any(|verb| message.contains(&format!("cannot {verb} resource \"events\"")))
}

impl Recorder {
    /// A recorder for the node of this name. Nothing is sent yet.
    pub fn new(client: Client, node: String) -> Self {
        Self::with_pace(client, node, Pace::default())
    }

    /// The same with other waiting times.
    pub fn with_pace(client: Client, node: String, pace: Pace) -> Self {
        let answer = pace.answer;
        Self {
            server: Server { client, answer },
            node,
            run: Timestamp::now(),
            dedup: Dedup::new(pace.series),
            pace,
            waiting: VecDeque::new(),
            sent: None,
            written: 0,
            pauses: 1,
            settling: false,
            not_before: Instant::now(),
            silent_until: None,
            given_up: Box::new(|| {}),
            lines: Repeats::new(1, COUNT_EVERY),
        }
    }

    /// Calls `given_up` for each Event that is given up.
    #[must_use]
    pub fn counting(mut self, given_up: impl Fn() + Send + Sync + 'static) -> Self {
        self.given_up = Box::new(given_up);
        self
    }

    /// Tells that nftlet has started, and then what comes through the channel, until its sender is
    /// gone.
    pub async fn run(mut self, mut notices: mpsc::Receiver<Notice>) {
        let now = Instant::now();
        let starting = Draft::starting(&self.node, self.run);
        self.dedup.hand_out(starting.clone(), now);
        self.waiting.push_back(Waiting::new(starting, None, now));
        let mut answer: Option<BoxFuture<'static, Result<(), Fault>>> = None;
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
        let draft = Draft::of(notice, &self.node, self.run, Timestamp::now());
        match self.dedup.advise(&draft, now) {
            Advice::Create => self.waiting.push_back(Waiting::new(draft, None, now)),
            Advice::Nothing => {}
        }
    }

    /// Has the count of a series written.
    fn take_count(&mut self) {
        let now = Instant::now();
        if let Some((draft, count)) = self.dedup.begin_update(now) {
            self.waiting
                .push_back(Waiting::new(draft, Some(count), now));
        }
    }

    /// Begins to write what has waited longest.
    fn send(&mut self) -> Option<impl Future<Output = Result<(), Fault>> + 'static> {
        let next = self.waiting.pop_front()?;
        self.sent = Some(next.clone());
        Some(self.server.clone().write(next))
    }

    fn take_answer(&mut self, result: Result<(), Fault>) {
        let Some(mut sent) = self.sent.take() else {
            return;
        };
        match result {
            Ok(()) => {
                self.dedup.written(&sent.draft.name, Instant::now());
                self.written += 1;
                self.pauses = 1;
                self.settling = false;
            }
            Err(Fault::Forbidden(_)) if std::mem::take(&mut self.settling) => {
                self.not_before = Instant::now() + self.pace.retry;
                self.waiting.push_front(sent);
            }
            // Events are kept for an hour or so.
            Err(Fault::Absent) if sent.count.is_some() => {
                sent.count = None;
                self.waiting.push_front(sent);
            }
            Err(Fault::Busy(message)) => self.try_again(sent, message),
            Err(fault) => self.give_up(&sent, &fault),
        }
    }

    /// Lets the others go first. What fails although they succeed is given up after some tries; a
    /// server that fails with all of them is to blame itself.
    fn try_again(&mut self, mut failed: Waiting, message: String) {
        if self.pauses == 1 {
            tracing::info!(
                "Events cannot be written at present: {message}; they are late, and some may be \
                 missing"
            );
        }
        self.settling = true;
        self.not_before = Instant::now() + self.pace.retry * self.pauses;
        self.pauses = (self.pauses * 2).min(LONGEST_RETRY);
        if failed
            .written_before
            .is_none_or(|before| before < self.written)
        {
            failed.tries += 1;
        }
        failed.written_before = Some(self.written);
        if failed.tries >= MOST_TRIES || failed.since.elapsed() >= WORTH {
            self.give_up(&failed, &Fault::Busy(message));
        } else {
            self.waiting.push_back(failed);
        }
    }

    fn give_up(&mut self, lost: &Waiting, fault: &Fault) {
        self.dedup.gave_up(&lost.draft.name);
        (self.given_up)();
        match fault {
            Fault::Forbidden(_) => {
                self.waiting.iter().for_each(|_| (self.given_up)());
                self.waiting.clear();
                // What happens after the silence may be written.
                self.dedup.forget_all();
                self.silent_until = Some(Instant::now() + self.pace.silence);
                tracing::warn!(
                    "the API server takes no Events: {fault}; add to nftlet's ClusterRole the rule \
                     {{apiGroups: [\"events.k8s.io\"], resources: [\"events\"], verbs: [\"create\", \
                     \"patch\"]}}; everything else works without"
                );
            }
            Fault::Absent => {
                // The namespace may come again.
                self.dedup.forget(&lost.draft.name);
                tracing::debug!("an Event was not written: {fault}");
            }
            Fault::Refused(_) | Fault::Busy(_) => {
                let Draft {
                    namespace, name, ..
                } = &lost.draft;
                let text = format!("{namespace}/{name}: {fault}");
                if self.lines.add(&(), &text, Instant::now().into_std()) {
                    tracing::warn!(
                        "the API server does not take an Event, which is given up: {text}"
                    );
                }
            }
        }
    }

    fn log_counts(&mut self) {
        for Count { reports, last, .. } in self.lines.counts(Instant::now().into_std()) {
            tracing::warn!("{reports} more Events were given up; the last one: {last}");
        }
    }
}

impl Waiting {
    fn new(draft: Draft, count: Option<i32>, since: Instant) -> Self {
        Self {
            draft,
            count,
            since,
            tries: 0,
            written_before: None,
        }
    }
}

/// Waits for a moment, if there is one.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => pending().await,
    }
}

/// Waits for an answer, if one is to come.
async fn or_never<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}

impl Server {
    /// Writes a new Event, or a count.
    async fn write(self, what: Waiting) -> Result<(), Fault> {
        let draft = what.draft;
        let request = match what.count {
            Some(count) => Request::Patch(draft.series(count, Timestamp::now())),
            None => Request::Create(Box::new(draft.event(self.uid(&draft).await))),
        };
        match timeout(self.answer, self.send(&draft, &request)).await {
            Ok(answer) => answer.map_err(Fault::from),
            Err(_) => Err(Fault::Busy("the API server does not answer".to_owned())),
        }
    }

    async fn send(&self, draft: &Draft, request: &Request) -> Result<(), kube::Error> {
        let api: Api<Event> = Api::namespaced(self.client.clone(), &draft.namespace);
        let answer = match request {
            Request::Create(event) => api.create(&PostParams::default(), event).await,
            Request::Patch(patch) => {
                let patch = Patch::Merge(patch);
                api.patch(&draft.name, &PatchParams::default(), &patch)
                    .await
            }
        };
        match answer {
            // Another node, or this one before a restart, has told what is wrong with an object.
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => Ok(()),
            other => other.map(drop),
        }
    }

    /// The identity of the object that a new Event is about: `kubectl describe` looks for it.
    /// It is asked for here because nothing else needs it. Without it the Event still says its
    /// object's name.
    async fn uid(&self, draft: &Draft) -> Option<String> {
        let object = draft.object.as_ref()?;
        let resource = ApiResource::from_gvk_with_plural(
            &GroupVersionKind::gvk(object.kind.group(), "v1", object.kind.as_str()),
            object.kind.plural(),
        );
        if object.kind == Kind::Node {
            // By convention the Events of a Node carry its name.
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
