//! The metrics of all modules.

use crate::events::EventMetrics;
use crate::followers::FollowerMetrics;
use crate::logging::LogQueue;
use crate::serve::http::HttpMetrics;
use crate::serve::metrics::Registry;
use crate::sync::SyncMetrics;

/// The metrics of all modules, and their registry. The metrics of a cluster are registered after it
/// is connected.
#[derive(Clone, Debug)]
pub(super) struct Metrics {
    pub(super) registry: Registry,
    pub(super) sync: SyncMetrics,
    pub(super) followers: FollowerMetrics,
    pub(super) events: EventMetrics,
    pub(super) http: HttpMetrics,
}

impl Metrics {
    /// Registers the metrics.
    ///
    /// # Errors
    ///
    /// If two of them have the same name.
    pub(super) fn register(log: &LogQueue) -> Result<Self, prometheus::Error> {
        let registry = Registry::new()?;
        registry.add_log(log.clone())?;
        Ok(Self {
            sync: SyncMetrics::register(&registry)?,
            followers: FollowerMetrics::register(&registry)?,
            events: EventMetrics::register(&registry)?,
            http: HttpMetrics::register(&registry)?,
            registry,
        })
    }
}
