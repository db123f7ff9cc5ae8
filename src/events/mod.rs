//! What a person should know, as Events (events.k8s.io/v1) of the cluster.
//!
//! ```text
//! notices ─> Book: new? often enough told? ─> object: Event ─> API server (create, or patch)
//! ```
//!
//! An Event stands at the object that it is about, or else at the Node. What every node finds
//! wrong with an object alike has one name in the whole cluster, so that a thousand nodes make one
//! Event of it and not a thousand. The same again makes an Event a series, whose count is written
//! every few minutes.
//!
//! Events are a courtesy and hold up nothing: notices come through a bounded channel, whoever
//! fills it drops what does not fit, and a server that cannot or will not take Events is named in
//! the log once.

mod book;
mod object;

use std::fmt;
use std::time::Duration;

use k8s_openapi::api::events::v1::Event;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use self::book::{Advice, Book};
use self::object::{Draft, resource};
use crate::model::{Kind, Notice};

/// How many notices may wait to become Events.
pub const QUEUE: usize = 256;

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
const LONGEST_RETRY: u32 = 32;

/// Writes Events of one node.
pub struct Recorder {
    client: Client,
    node: String,
    /// When this run began.
    run: Timestamp,
    pace: Pace,
    book: Book,
    silent_until: Option<Instant>,
}

/// What is sent to the server.
enum Request {
    Create(Box<Event>),
    Patch(Value),
}

/// Why an Event was not written.
enum Fault {
    /// The server does not take Events from nftlet at all.
    Refused(String),
    /// Another attempt may do better.
    Busy(String),
    /// There is no such Event (any more), or no such namespace.
    Absent,
    /// This Event is not wanted.
    Invalid(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Refused(text) | Fault::Busy(text) | Fault::Invalid(text) => f.write_str(text),
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
            403 => Fault::Refused(message),
            404 => Fault::Absent,
            400 | 405 | 409 | 413 | 422 => Fault::Invalid(message),
            _ => Fault::Busy(message),
        }
    }
}

impl Recorder {
    /// A recorder for the node of this name. Nothing is sent yet.
    pub fn new(client: Client, node: String) -> Self {
        Self::with_pace(client, node, Pace::default())
    }

    /// The same with other waiting times.
    pub fn with_pace(client: Client, node: String, pace: Pace) -> Self {
        Self {
            client,
            node,
            run: Timestamp::now(),
            book: Book::new(pace.series),
            pace,
            silent_until: None,
        }
    }

    /// Tells that nftlet has started, and then what comes through the channel, until its sender is
    /// gone.
    pub async fn run(mut self, mut notices: mpsc::Receiver<Notice>) {
        self.create(Draft::starting(&self.node, self.run)).await;
        loop {
            let due = self.book.due();
            tokio::select! {
                notice = notices.recv() => match notice {
                    Some(notice) => self.take(&notice).await,
                    None => return,
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    self.update().await;
                }
            }
        }
    }

    async fn take(&mut self, notice: &Notice) {
        let now = Instant::now();
        if self.silent_until.is_some_and(|until| now < until) {
            return;
        }
        let draft = Draft::of(notice, &self.node, self.run, Timestamp::now());
        match self.book.advise(&draft, now) {
            Advice::Create => self.create(draft).await,
            Advice::Nothing => {}
        }
    }

    /// Writes a new Event.
    async fn create(&mut self, draft: Draft) {
        let uid = self.uid(&draft).await;
        let event = Box::new(draft.event(uid));
        match self.insist(&draft, &Request::Create(event)).await {
            Ok(()) => self.book.created(draft, Instant::now()),
            Err(fault) => self.give_up(&fault),
        }
    }

    /// Writes the count of a series.
    async fn update(&mut self) {
        let Some((draft, count)) = self.book.begin_update(Instant::now()) else {
            return;
        };
        let series = draft.series(count, Timestamp::now());
        match self.insist(&draft, &Request::Patch(series)).await {
            Ok(()) => {}
            // Events are kept for an hour or so.
            Err(Fault::Absent) => self.create(draft).await,
            Err(fault) => self.give_up(&fault),
        }
    }

    /// Sends a request until the server has answered it. A server that has just started refuses
    /// what is granted, so after an outage only a second refusal counts.
    async fn insist(&self, draft: &Draft, request: &Request) -> Result<(), Fault> {
        let mut pauses = 1;
        let mut settling = false;
        loop {
            let answer = match timeout(self.pace.answer, self.send(draft, request)).await {
                Ok(answer) => answer.map_err(Fault::from),
                Err(_) => Err(Fault::Busy("the API server does not answer".to_owned())),
            };
            match answer {
                Err(Fault::Refused(_)) if settling => {
                    settling = false;
                    sleep(self.pace.retry).await;
                    continue;
                }
                Err(Fault::Busy(message)) if pauses == 1 => tracing::info!(
                    "Events cannot be written at present: {message}; they are late, and some \
                     may be missing"
                ),
                Err(Fault::Busy(_)) => {}
                answer => return answer,
            }
            settling = true;
            sleep(self.pace.retry * pauses).await;
            pauses = (pauses * 2).min(LONGEST_RETRY);
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
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            other => other.map(drop),
        }
    }

    fn give_up(&mut self, fault: &Fault) {
        match fault {
            Fault::Refused(_) => {
                self.silent_until = Some(Instant::now() + self.pace.silence);
                tracing::warn!(
                    "the API server takes no Events: {fault}; add to nftlet's ClusterRole the rule \
                     {{apiGroups: [\"events.k8s.io\"], resources: [\"events\"], verbs: [\"create\", \
                     \"patch\"]}}; everything else works without"
                );
            }
            Fault::Invalid(_) | Fault::Absent | Fault::Busy(_) => {
                tracing::debug!("an Event was not written: {fault}");
            }
        }
    }

    /// The identity of the object that a new Event is about: `kubectl describe` looks for it.
    /// It is asked for here because nothing else needs it. Without it the Event still says its
    /// object's name.
    async fn uid(&self, draft: &Draft) -> Option<String> {
        let object = draft.object.as_ref()?;
        let resource = ApiResource::from_gvk_with_plural(
            &resource(object.kind).gvk(),
            resource(object.kind).plural,
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
        let listed = timeout(self.pace.answer, api.list_metadata(&params)).await;
        let found = listed.ok()?.ok()?.items.into_iter().next()?;
        found.metadata.uid
    }
}
