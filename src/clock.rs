//! The monotonic clock.

use std::time::Instant;

/// Returns the present time. Tests can stop the clock, which is tokio's.
pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
