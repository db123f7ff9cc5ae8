//! The metrics of Events.

use prometheus::{Error, IntCounter};

use crate::serve::metrics::{Registry, unsigned};

/// The metrics of Events. Clones share them.
#[derive(Clone, Debug)]
pub struct EventMetrics {
    given_up: IntCounter,
}

impl EventMetrics {
    /// Creates and registers the metrics.
    ///
    /// # Errors
    ///
    /// When one of their names is taken.
    pub fn register(registry: &Registry) -> Result<Self, Error> {
        Ok(Self {
            given_up: registry.counter(
                "nftlet_events_given_up_total",
                "Events that the API server refused, or failed to take again and again",
            )?,
        })
    }

    /// Counts Events that are not retried any more.
    pub(super) fn given_up(&self, count: usize) {
        self.given_up.inc_by(unsigned(count));
    }
}
