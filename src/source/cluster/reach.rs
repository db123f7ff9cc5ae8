//! Whether the API server can be reached, as the requests of all kinds find together.
//!
//! Each watch pauses longer and longer between attempts, up to half a minute. When the server comes
//! back, the first answer to any request ends the pauses of all: each watch tries again after a
//! random part of [`Timing::wake`](super::Timing::wake), but not before the time that the server
//! set with `Retry-After`.

use std::time::Duration;

use futures::FutureExt;
use hyper::StatusCode;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::timing::{Pause, random};

/// Knows whether the server answers, and when it came back.
#[derive(Debug, Default)]
pub(super) struct Reach(watch::Sender<Reachability>);

#[derive(Debug, Default)]
struct Reachability {
    /// Whether the server could not be reached, and has not answered since.
    away: bool,
    /// Counts how often it came back.
    returns: u64,
    returned: Option<Instant>,
}

impl Reach {
    /// Notes that the server cannot be reached.
    pub(super) fn lost(&self) {
        self.0
            .send_if_modified(|state| !std::mem::replace(&mut state.away, true));
    }

    /// Notes an answer. One that says that the server (or what stands before it) has no answer at
    /// present does not end an outage.
    pub(super) fn answered(&self, status: StatusCode) {
        if is_busy(status) {
            return;
        }
        self.0.send_if_modified(|state| {
            let back = std::mem::replace(&mut state.away, false);
            if back {
                state.returns += 1;
                state.returned = Some(Instant::now());
            }
            back
        });
    }

    /// How often the server came back.
    pub(super) fn returns(&self) -> u64 {
        self.0.borrow().returns
    }

    /// Waits until the server has come back more often than so.
    pub(super) async fn returned_since(&self, returns: u64) {
        let mut states = self.0.subscribe();
        // The sender is in `self`.
        let _ = states.wait_for(|state| state.returns != returns).await;
    }

    /// Whether the server is away or came back less than so long ago.
    pub(super) fn is_settling(&self, settle: Duration) -> bool {
        let state = self.0.borrow();
        state.away || state.returned.is_some_and(|at| at.elapsed() < settle)
    }

    pub(super) fn is_away(&self) -> bool {
        self.0.borrow().away
    }

    /// Waits until the server is away.
    pub(super) async fn away(&self) {
        // The sender is in `self`.
        let _ = self.0.subscribe().wait_for(|state| state.away).await;
    }

    /// Waits for a pause, which ends early, within `jitter`, when the server has come back more
    /// often than `returns`.
    pub(super) async fn pause(&self, pause: Pause, returns: u64, jitter: Duration) {
        let began = Instant::now();
        let mut states = self.0.subscribe();
        tokio::select! {
            biased;
            () = sleep(pause.usual) => {}
            () = states.wait_for(|state| state.returns != returns).map(drop) => {
                let at = Instant::now() + jitter.mul_f64(random());
                sleep_until(at.max(began + pause.at_least)).await;
            }
        }
    }
}

/// Whether a status asks to come back later.
pub(super) fn is_busy(status: StatusCode) -> bool {
    status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const JITTER: Duration = Duration::from_millis(400);

    #[tokio::test(start_paused = true)]
    async fn a_return_ends_the_pauses_of_all() {
        let reach = Reach::default();
        reach.lost();
        let began = Instant::now();
        let asked = Pause {
            usual: HOUR,
            at_least: Duration::from_secs(7),
        };
        let back = async {
            sleep(Duration::from_secs(5)).await;
            // What stands before the server answers in its place.
            reach.answered(StatusCode::BAD_GATEWAY);
            reach.answered(StatusCode::TOO_MANY_REQUESTS);
            assert!(reach.is_away());
            reach.answered(StatusCode::FORBIDDEN);
        };
        let timed = async |pause| {
            reach.pause(pause, 0, JITTER).await;
            began.elapsed()
        };
        let (usual, asked, short, ()) = tokio::join!(
            timed(HOUR.into()),
            timed(asked),
            timed(Duration::from_secs(1).into()),
            back
        );
        let woken = Duration::from_secs(5);
        assert!(usual >= woken && usual <= woken + JITTER, "{usual:?}");
        let wanted = Duration::from_secs(7);
        assert!(asked >= wanted && asked < wanted + JITTER, "{asked:?}");
        assert_eq!(short.as_secs(), 1);
        assert_eq!(reach.returns(), 1);
        // Who has seen the return is not woken by it.
        let began = Instant::now();
        let pause = Pause::from(Duration::from_secs(9));
        reach.pause(pause, 1, JITTER).await;
        assert_eq!(began.elapsed().as_secs(), 9);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_back_needs_a_while() {
        let reach = Reach::default();
        let settle = Duration::from_secs(10);
        // An answer without an outage is no return.
        reach.answered(StatusCode::OK);
        assert!(!reach.is_settling(settle));
        reach.lost();
        sleep(HOUR).await;
        assert!(reach.is_settling(settle));
        reach.answered(StatusCode::OK);
        sleep(settle / 2).await;
        reach.answered(StatusCode::OK);
        assert!(reach.is_settling(settle));
        sleep(settle / 2).await;
        assert!(!reach.is_settling(settle));
    }
}
