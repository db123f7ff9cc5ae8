//! Reachability of the API server, learned from all requests.
//!
//! Each watch doubles its pauses between attempts, up to half a minute. When the server is back,
//! the first answer to any request ends all pauses: each watch retries after a random part of
//! [`Timing::wake`](super::Timing::wake), but not before the time that the server set with
//! `Retry-After`.

use std::time::Duration;

use futures::FutureExt;
use hyper::StatusCode;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::timing::{Pause, random};

/// Whether the server answers, and when it last returned from an outage.
#[derive(Debug, Default)]
pub(super) struct Reach(watch::Sender<Reachability>);

#[derive(Debug, Default)]
struct Reachability {
    /// Whether the server was unreachable and has not answered since.
    away: bool,
    /// The number of outages that have ended.
    outages_ended: u64,
    returned: Option<Instant>,
}

impl Reach {
    /// Records that the server cannot be reached.
    pub(super) fn lost(&self) {
        self.0
            .send_if_modified(|state| !std::mem::replace(&mut state.away, true));
    }

    /// Records an answer. One with a status of [`is_busy`], which may come from a proxy or a load
    /// balancer, does not end an outage.
    pub(super) fn answered(&self, status: StatusCode) {
        if is_busy(status) {
            return;
        }
        self.0.send_if_modified(|state| {
            let back = std::mem::replace(&mut state.away, false);
            if back {
                state.outages_ended += 1;
                state.returned = Some(Instant::now());
            }
            back
        });
    }

    /// Returns the number of outages that have ended.
    pub(super) fn outages_ended(&self) -> u64 {
        self.0.borrow().outages_ended
    }

    /// Waits until the number of ended outages differs from `outages_ended`.
    pub(super) async fn returned_since(&self, outages_ended: u64) {
        let mut states = self.0.subscribe();
        // The wait cannot fail, since `self` has the sender.
        let _ = states
            .wait_for(|state| state.outages_ended != outages_ended)
            .await;
    }

    /// Returns whether the server is unreachable, or returned less than `settle` ago.
    pub(super) fn is_settling(&self, settle: Duration) -> bool {
        let state = self.0.borrow();
        state.away || state.returned.is_some_and(|at| at.elapsed() < settle)
    }

    pub(super) fn is_away(&self) -> bool {
        self.0.borrow().away
    }

    /// Waits until the server is unreachable.
    pub(super) async fn away(&self) {
        // The wait cannot fail, since `self` has the sender.
        let _ = self.0.subscribe().wait_for(|state| state.away).await;
    }

    /// Waits for a pause. It ends early, within `jitter`, once the number of ended outages differs
    /// from `outages_ended`.
    pub(super) async fn pause(&self, pause: Pause, outages_ended: u64, jitter: Duration) {
        let began = Instant::now();
        let mut states = self.0.subscribe();
        tokio::select! {
            biased;
            () = sleep(pause.usual) => {}
            () = states.wait_for(|state| state.outages_ended != outages_ended).map(drop) => {
                let at = Instant::now() + jitter.mul_f64(random());
                sleep_until(at.max(began + pause.at_least)).await;
            }
        }
    }
}

/// Returns whether a status asks to retry later.
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
            // A load balancer answers in place of the server.
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
        assert_eq!(reach.outages_ended(), 1);
        // A return that was seen before does not end the pause.
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
