//! Pauses between attempts.

use std::time::Duration;

/// Pauses of which each is twice as long as the one before, up to a maximum.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    shortest: Duration,
    longest: Duration,
    /// The last pause; zero before the first.
    current: Duration,
}

impl Backoff {
    pub(crate) const fn new(shortest: Duration, longest: Duration) -> Self {
        Self {
            shortest,
            longest,
            current: Duration::ZERO,
        }
    }

    /// Returns the next pause.
    pub(crate) fn next(&mut self) -> Duration {
        self.current = self
            .current
            .saturating_mul(2)
            .max(self.shortest)
            .min(self.longest);
        self.current
    }

    /// Returns the last pause; zero before the first and after a reset.
    pub(crate) fn current(&self) -> Duration {
        self.current
    }

    /// Returns whether the next pause is the first since the start or a reset. The failure before
    /// it is the one to log.
    pub(crate) fn is_reset(&self) -> bool {
        self.current.is_zero()
    }

    /// Starts over with the shortest pause.
    pub(crate) fn reset(&mut self) {
        self.current = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_start_over() {
        let mut backoff = Backoff::new(Duration::from_secs(3), Duration::from_secs(20));
        let mut seconds = || [(); 5].map(|()| backoff.next().as_secs());
        assert_eq!(seconds(), [3, 6, 12, 20, 20]);
        backoff.reset();
        assert!(backoff.is_reset() && backoff.current().is_zero());
        assert_eq!(backoff.next().as_secs(), 3);
        assert!(!backoff.is_reset());
        assert_eq!(backoff.current().as_secs(), 3);
    }
}
