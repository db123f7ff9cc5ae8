//! Detection of a silent server, and of its return.
//!
//! If the server disappears without closing its connections, for example because a cable was cut,
//! its watches are silent. So are those of a quiet cluster, which sends one bookmark a minute. After
//! [`Timing::quiet`] without a byte, the server is therefore asked for its version. Any answer shows
//! that it is alive. Without one, all watches and pending requests are abandoned, and the reflectors
//! connect again.
//!
//! While the server is unreachable, its version is requested at short intervals, by one request at
//! a time for all kinds. The answer wakes the reflectors (see [`Reach`]).

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::Response;
use kube::Client;
use kube::client::Body;
use tokio::sync::watch;

use super::reach::{Reach, is_busy};
use super::request::retry_after;
use super::stats::SourceStats;
use super::timing::{Timing, varied};
use super::traffic::Unanswered;

/// A path that every server answers, without authorization.
const VERSION: &str = "/version";

/// Checks the liveness of one server.
pub(super) struct Liveness {
    client: Client,
    stats: Arc<SourceStats>,
    timing: Timing,
    reach: Arc<Reach>,
    /// Counts how often the server was found silent.
    silent: watch::Sender<u64>,
}

impl Liveness {
    pub(super) fn new(
        client: Client,
        stats: Arc<SourceStats>,
        timing: Timing,
        reach: Arc<Reach>,
    ) -> Self {
        Self {
            client,
            stats,
            timing,
            reach,
            silent: watch::Sender::new(0),
        }
    }

    /// Returns a receiver that changes when watches and pending requests must be abandoned.
    pub(super) fn silent(&self) -> watch::Receiver<u64> {
        self.silent.subscribe()
    }

    /// Checks the server until the future is dropped.
    pub(super) async fn run(self) {
        loop {
            tokio::select! {
                () = self.detect_silence() => {}
                () = self.reach.away() => self.await_return().await,
            }
        }
    }

    /// Abandons the watches each time the server is found silent. Never returns.
    async fn detect_silence(&self) {
        let mut received = self.stats.bytes();
        loop {
            tokio::time::sleep(self.timing.quiet).await;
            let before = std::mem::replace(&mut received, self.stats.bytes());
            // During a known fault, the reflectors retry already.
            if received != before || self.stats.fault().is_some() || !self.probe().await.is_silent()
            {
                continue;
            }
            self.abandon_watches();
            self.reach.lost();
        }
    }

    fn abandon_watches(&self) {
        tracing::debug!("the API server is silent; abandoning its watches");
        self.silent.send_modify(|times| *times += 1);
    }

    /// Probes the server until any request is answered, which [`Traffic`](super::traffic) notes.
    async fn await_return(&self) {
        let mut at_least = Duration::ZERO;
        // A failed request alone does not show that the watches are dead: they are abandoned only
        // after `quiet` without a byte.
        let (began, received) = (Instant::now(), self.stats.bytes());
        let mut abandoned = false;
        while self.reach.is_away() {
            tokio::time::sleep(varied(self.timing.probe).max(at_least)).await;
            let result = self.probe().await;
            let quiet = began.elapsed() >= self.timing.quiet && self.stats.bytes() == received;
            if result.is_silent() && quiet && !std::mem::replace(&mut abandoned, true) {
                self.abandon_watches();
            }
            let busy = result.answer().filter(|answer| is_busy(answer.status()));
            let seconds = busy.and_then(|answer| retry_after(answer.headers()));
            at_least = Duration::from_secs(seconds.unwrap_or_default().into())
                .min(self.timing.longest_pause);
        }
    }

    async fn probe(&self) -> ProbeResult {
        let Ok(request) = hyper::Request::get(VERSION).body(Body::empty()) else {
            return ProbeResult::NotSent;
        };
        let answer = self.client.send(request);
        match tokio::time::timeout(self.timing.liveness_timeout, answer).await {
            Ok(Ok(answer)) => ProbeResult::Answered(answer),
            Ok(Err(kube::Error::Service(error))) if lacks_descriptor(&*error) => {
                ProbeResult::NotSent
            }
            Ok(Err(_)) | Err(_) => ProbeResult::NoAnswer,
        }
    }
}

/// The outcome of a request for the version.
enum ProbeResult {
    Answered(Response<Body>),
    NoAnswer,
    /// Not sent, since this process has no file descriptor for a connection.
    NotSent,
}

impl ProbeResult {
    fn is_silent(&self) -> bool {
        matches!(self, Self::NoAnswer)
    }

    fn answer(self) -> Option<Response<Body>> {
        match self {
            Self::Answered(answer) => Some(answer),
            Self::NoAnswer | Self::NotSent => None,
        }
    }
}

fn lacks_descriptor(error: &(dyn std::error::Error + 'static)) -> bool {
    let unanswered = error.downcast_ref::<Unanswered>();
    unanswered.is_some_and(|unanswered| unanswered.no_descriptor)
}
