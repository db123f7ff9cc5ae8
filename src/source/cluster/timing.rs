//! How long the watches wait for what.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// How long a [`Cluster`](super::Cluster) waits for what. The defaults suit real clusters;
/// tests use shorter ones.
#[derive(Clone, Debug)]
pub struct Timing {
    /// How long the own Node may be missing before nftlet goes on without it.
    pub node_wait: Duration,
    /// The pause before the second attempt in a row; the first is made at once.
    pub first_pause: Duration,
    /// The longest pause between attempts.
    pub longest_pause: Duration,
    /// A watch that followed changes this long was a success: the next attempt is made at once.
    pub stable: Duration,
    /// How long a watch may be silent before it counts as dead. API servers send a bookmark
    /// about once a minute.
    pub idle: Duration,
    /// How long nothing may come on any watch before the server is asked for a sign of life.
    pub quiet: Duration,
    /// How long the sign of life may take.
    pub liveness_timeout: Duration,
    /// The pause between looks whether a server that is away is back, varied at random.
    pub probe: Duration,
    /// The watches try again within this time after the server is back, at random.
    pub wake: Duration,
    /// How long after its return a server may refuse access although it is granted: one that has
    /// just started does not know all roles yet. Pauses are at most [`probe`](Self::probe) then.
    pub settle: Duration,
    /// How long a server may take to answer a request.
    pub response: Duration,
    /// How long the server may be silent before the end of a streamed list, until it counts as
    /// one that does not know streamed lists.
    pub list_idle: Duration,
    /// How often to look whether an API that the server does not have has come.
    pub absent_recheck: Duration,
    /// How long Pods and Namespaces are still watched after the last NetworkPolicy is gone, so
    /// that one that is replaced does not make all of them be listed again.
    pub linger: Duration,
    /// How many objects to ask for at once in a paged list.
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
            linger: Duration::from_secs(60),
            page: 500,
        }
    }
}

/// How long to wait before the next attempt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pause {
    /// Without a return of the server.
    pub usual: Duration,
    /// In any case: what the server asked for.
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

/// The pauses between attempts: none, then growing ones, each varied at random so that the nodes
/// of a cluster do not come back all at once.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// Forgets the failures.
    pub(super) fn reset(&mut self) {
        self.attempts = 0;
    }

    /// How many attempts in a row have failed.
    pub(super) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The pause before the next attempt to ask a server that said when to come back.
    pub(super) fn next_after(&mut self, timing: &Timing, at_least: Duration) -> Pause {
        // It said the same to everybody.
        let at_least = at_least.min(timing.longest_pause);
        let at_least = at_least.mul_f64(1.0 + random() / 2.0);
        Pause {
            usual: self.next(timing).max(at_least),
            at_least,
        }
    }

    /// The pause before the next attempt.
    pub(super) fn next(&mut self, timing: &Timing) -> Duration {
        let attempt = self.attempts;
        self.attempts = attempt.saturating_add(1);
        if attempt == 0 {
            return Duration::ZERO;
        }
        let factor = 2_u32.saturating_pow(attempt - 1);
        let pause = timing.first_pause.saturating_mul(factor);
        varied(pause.min(timing.longest_pause))
    }
}

/// How long the server is asked to keep a watch open, in seconds; varied for the same reason.
pub(super) fn watch_seconds() -> u32 {
    270 + (random() * 20.0) as u32
}

/// A random duration of 0.5 to 1.5 times this one.
pub(super) fn varied(duration: Duration) -> Duration {
    duration.mul_f64(0.5 + random())
}

/// A number from 0 to 1, good enough for spreading load: every `RandomState` hashes differently.
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
        let mut backoff = Backoff::default();
        assert_eq!(backoff.next(&timing), Duration::ZERO);
        let mut base = timing.first_pause;
        for _ in 0..40 {
            let pause = backoff.next(&timing);
            assert!(
                pause >= base.mul_f64(0.5) && pause <= base.mul_f64(1.5),
                "{pause:?} for {base:?}"
            );
            base = (base * 2).min(timing.longest_pause);
        }
        backoff.reset();
        assert_eq!(backoff.next(&timing), Duration::ZERO);
    }

    #[test]
    fn a_server_may_say_when_to_come_back() {
        let timing = Timing::default();
        for (asked, least) in [(0, 0), (7, 7), (3600, 30)] {
            let pause = Backoff::default().next_after(&timing, Duration::from_secs(asked));
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
