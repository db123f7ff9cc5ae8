//! Timeouts of the watches, and the pauses between attempts.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use crate::backoff::Backoff;

/// Timeouts and pauses of a [`Cluster`](super::Cluster). Tests use shorter ones than the defaults.
#[derive(Clone, Debug)]
pub struct Timing {
    /// How long to wait for the own Node before continuing without it.
    pub node_wait: Duration,
    /// The pause before the second attempt in a row; there is none before the first.
    pub first_pause: Duration,
    /// The longest pause between attempts.
    pub longest_pause: Duration,
    /// How long a watch must follow changes for the next attempt to be made without a pause.
    pub stable: Duration,
    /// How long a watch may be silent. API servers send a bookmark about once a minute.
    pub idle: Duration,
    /// How long all watches may be silent before the liveness of the server is checked.
    pub quiet: Duration,
    /// Time limit of a liveness check.
    pub liveness_timeout: Duration,
    /// The pause between liveness checks of an unreachable server, varied at random.
    pub probe: Duration,
    /// The watches retry at random within this time after the server is back.
    pub wake: Duration,
    /// How long after its return the server may refuse access because it has not loaded all roles.
    /// Until then pauses are at most [`probe`](Self::probe).
    pub settle: Duration,
    /// Time limit of the answer to a request.
    pub response: Duration,
    /// How long a streamed list may be silent before lists are read in pages.
    pub list_idle: Duration,
    /// How often an API that the server lacks is requested again.
    pub absent_recheck: Duration,
    /// How often discovery is asked for a kind that the server does not have, varied at random.
    pub discovery: Duration,
    /// How long Pods and Namespaces are watched after the last policy was deleted, and all Nodes
    /// after the last one that selects nodes, so that replacing a policy does not list them again.
    pub linger: Duration,
    /// The number of objects in a page of a list.
    pub page: u32,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            node_wait: Duration::from_secs(30),
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(30),
            stable: Duration::from_secs(5),
            idle: Duration::from_secs(150),
            quiet: Duration::from_secs(15),
            liveness_timeout: Duration::from_secs(5),
            probe: Duration::from_millis(500),
            wake: Duration::from_millis(400),
            settle: Duration::from_secs(10),
            response: Duration::from_secs(60),
            list_idle: Duration::from_secs(10),
            absent_recheck: Duration::from_secs(600),
            discovery: Duration::from_secs(60),
            linger: Duration::from_secs(60),
            page: 500,
        }
    }
}

/// A pause before the next attempt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pause {
    /// The pause unless the server returns earlier.
    pub usual: Duration,
    /// The minimum set by the server, in any case.
    pub at_least: Duration,
}

impl From<Duration> for Pause {
    fn from(usual: Duration) -> Self {
        Self {
            usual,
            at_least: Duration::ZERO,
        }
    }
}

/// The pauses between attempts: none, then those of a [`Backoff`], varied at random so that the
/// nodes of a cluster do not retry in step.
#[derive(Debug)]
pub(super) struct Attempts {
    failed: bool,
    backoff: Backoff,
    longest: Duration,
}

impl Attempts {
    pub(super) fn new(timing: &Timing) -> Self {
        Self {
            failed: false,
            backoff: Backoff::new(timing.first_pause, timing.longest_pause),
            longest: timing.longest_pause,
        }
    }

    pub(super) fn reset(&mut self) {
        self.failed = false;
        self.backoff.reset();
    }

    /// Returns whether an attempt has failed since the last success.
    pub(super) fn has_failed(&self) -> bool {
        self.failed
    }

    /// Returns the pause before the next attempt, with a minimum set by the server.
    pub(super) fn next_after(&mut self, at_least: Duration) -> Pause {
        // Every client was given the same time, so it is varied too.
        let at_least = at_least.min(self.longest).mul_f64(1.0 + random() / 2.0);
        Pause {
            usual: self.next().max(at_least),
            at_least,
        }
    }

    /// Returns the pause before the next attempt.
    pub(super) fn next(&mut self) -> Duration {
        if std::mem::replace(&mut self.failed, true) {
            varied(self.backoff.next())
        } else {
            Duration::ZERO
        }
    }
}

/// Returns the seconds after which the server should end a watch, varied so that the watches of a
/// cluster do not end in step.
pub(super) fn watch_seconds() -> u32 {
    270 + (random() * 20.0) as u32
}

/// Returns a random duration of 0.5 to 1.5 times this one.
pub(super) fn varied(duration: Duration) -> Duration {
    duration.mul_f64(0.5 + random())
}

/// Returns a random number from 0 to 1. Every `RandomState` has different keys, which is good
/// enough to spread load.
pub(super) fn random() -> f64 {
    let bits = RandomState::new().build_hasher().finish();
    f64::from((bits >> 32) as u32) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_longest_and_start_over() {
        let timing = Timing::default();
        let mut attempts = Attempts::new(&timing);
        assert_eq!(attempts.next(), Duration::ZERO);
        let mut base = timing.first_pause;
        for _ in 0..40 {
            let pause = attempts.next();
            assert!(
                pause >= base.mul_f64(0.5) && pause <= base.mul_f64(1.5),
                "{pause:?} for {base:?}"
            );
            base = (base * 2).min(timing.longest_pause);
        }
        attempts.reset();
        assert_eq!(attempts.next(), Duration::ZERO);
    }

    #[test]
    fn a_server_may_say_when_to_come_back() {
        let timing = Timing::default();
        for (asked, least) in [(0, 0), (7, 7), (3600, 30)] {
            let pause = Attempts::new(&timing).next_after(Duration::from_secs(asked));
            let least = Duration::from_secs(least);
            assert!(
                pause.at_least >= least && pause.usual <= least.mul_f64(1.5),
                "{pause:?} for {asked} s"
            );
        }
    }

    #[test]
    fn random_numbers_differ_and_stay_in_range() {
        let numbers: Vec<f64> = (0..100).map(|_| random()).collect();
        assert!(numbers.iter().all(|number| (0.0..=1.0).contains(number)));
        assert!(
            numbers.iter().any(|number| *number < 0.5)
                && numbers.iter().any(|number| *number > 0.5)
        );
        assert!((0..100).all(|_| (270..=290).contains(&watch_seconds())));
    }
}
