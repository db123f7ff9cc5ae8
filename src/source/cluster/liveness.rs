//! Noticing that the server has fallen silent, and that it is back.
//!
//! A server that goes away without closing its connections, as when a cable is cut, leaves
//! watches that nothing comes from, and nothing is usual: a quiet cluster sends a bookmark a
//! minute. So when nothing has come for a while the server is asked for its version. An answer of
//! any kind is a sign of life. Without one the watches are given up, and requests that wait for an
//! answer too; their reflectors find out what is wrong.
//!
//! While the server is away, it is asked for its version at short intervals, by one request at a
//! time for all kinds together. The answer wakes the reflectors (see [`Reach`]).

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

/// Where every server tells its version, to everybody.
const VERSION: &str = "/version";

/// Looks after the watches of one server.
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

    /// Changes when the watches are to be given up.
    pub(super) fn silent(&self) -> watch::Receiver<u64> {
        self.silent.subscribe()
    }

    /// Runs for ever.
    pub(super) async fn run(self) {
        loop {
            tokio::select! {
                () = self.notice_silence() => {}
                () = self.reach.away() => self.await_return().await,
            }
        }
    }

    /// Gives up the watches each time that the server is silent, until it is away.
    async fn notice_silence(&self) {
        let mut heard = self.stats.bytes();
        loop {
            tokio::time::sleep(self.timing.quiet).await;
            let before = std::mem::replace(&mut heard, self.stats.bytes());
            // Where a fault is known, the reflectors are on it.
            if heard != before || self.stats.fault().is_some() || !self.ask().await.is_silent() {
                continue;
            }
            self.give_up();
            self.reach.lost();
        }
    }

    fn give_up(&self) {
        tracing::debug!("the API server is silent; giving up the watches");
        self.silent.send_modify(|times| *times += 1);
    }

    /// Asks again and again, until any request is answered. The client notes the answers.
    async fn await_return(&self) {
        let mut at_least = Duration::ZERO;
        // A request that failed says nothing about the watches, which may wait for the same server.
        let (began, heard) = (Instant::now(), self.stats.bytes());
        let mut given_up = false;
        while self.reach.is_away() {
            tokio::time::sleep(varied(self.timing.probe).max(at_least)).await;
            let asked = self.ask().await;
            let quiet = began.elapsed() >= self.timing.quiet && self.stats.bytes() == heard;
            if asked.is_silent() && quiet && !std::mem::replace(&mut given_up, true) {
                self.give_up();
            }
            let busy = asked.answer().filter(|answer| is_busy(answer.status()));
            let seconds = busy.and_then(|answer| retry_after(answer.headers()));
            at_least = Duration::from_secs(seconds.unwrap_or_default().into())
                .min(self.timing.longest_pause);
        }
    }

    async fn ask(&self) -> ProbeResult {
        let Ok(request) = hyper::Request::get(VERSION).body(Body::empty()) else {
            return ProbeResult::Not;
        };
        let answer = self.client.send(request);
        match tokio::time::timeout(self.timing.liveness_timeout, answer).await {
            Ok(Ok(answer)) => ProbeResult::Answered(answer),
            Ok(Err(kube::Error::Service(error))) if lacks_descriptor(&*error) => ProbeResult::Not,
            Ok(Err(_)) | Err(_) => ProbeResult::InVain,
        }
    }
}

/// What came of a question.
enum ProbeResult {
    Answered(Response<Body>),
    InVain,
    /// It could not be sent: this process has no file descriptor for a connection.
    Not,
}

impl ProbeResult {
    fn is_silent(&self) -> bool {
        matches!(self, Self::InVain)
    }

    fn answer(self) -> Option<Response<Body>> {
        match self {
            Self::Answered(answer) => Some(answer),
            Self::InVain | Self::Not => None,
        }
    }
}

fn lacks_descriptor(error: &(dyn std::error::Error + 'static)) -> bool {
    let unanswered = error.downcast_ref::<Unanswered>();
    unanswered.is_some_and(|unanswered| unanswered.no_descriptor)
}
