//! Noticing that the server has fallen silent.
//!
//! A server that goes away without closing its connections, as when a cable is cut, leaves
//! watches that nothing comes from, and nothing is usual: a quiet cluster sends a bookmark a
//! minute. So when nothing has come for a while the server is asked for its version. An answer of
//! any kind is a sign of life. Without one the watches are given up, and requests that wait for an
//! answer too; their reflectors find out what is wrong.

use std::sync::Arc;

use kube::Client;
use kube::client::Body;
use tokio::sync::watch;

use super::stats::SourceStats;
use super::timing::Timing;

/// Where every server tells its version, to everybody.
const VERSION: &str = "/version";

/// Looks after the watches of one server.
pub(super) struct Pulse {
    client: Client,
    stats: Arc<SourceStats>,
    timing: Timing,
    /// Counts how often the server was found silent.
    silent: watch::Sender<u64>,
}

impl Pulse {
    pub(super) fn new(client: Client, stats: Arc<SourceStats>, timing: Timing) -> Self {
        Self {
            client,
            stats,
            timing,
            silent: watch::Sender::new(0),
        }
    }

    /// Changes when the watches are to be given up.
    pub(super) fn silent(&self) -> watch::Receiver<u64> {
        self.silent.subscribe()
    }

    /// Runs for ever.
    pub(super) async fn run(self) {
        let mut heard = self.stats.bytes();
        loop {
            tokio::time::sleep(self.timing.quiet).await;
            let before = std::mem::replace(&mut heard, self.stats.bytes());
            // Where a fault is known, the reflectors are on it.
            if heard != before || self.stats.fault().is_some() || self.answers().await {
                continue;
            }
            tracing::debug!("the API server is silent; giving up the watches");
            self.silent.send_modify(|times| *times += 1);
        }
    }

    async fn answers(&self) -> bool {
        let Ok(request) = http_get(VERSION) else {
            return true;
        };
        let answer = self.client.send(request);
        matches!(
            tokio::time::timeout(self.timing.pulse, answer).await,
            Ok(Ok(_))
        )
    }
}

fn http_get(path: &str) -> Result<hyper::Request<Body>, hyper::http::Error> {
    hyper::Request::get(path).body(Body::empty())
}
