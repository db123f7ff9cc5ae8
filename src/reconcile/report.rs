//! What people are told.

use crate::model::{Notice, Reason};
use crate::netlink::Error;

/// Receives what a person should know. Implementations must not block.
pub trait Reporter: Send + Sync {
    /// Something is wrong with an object or a file.
    fn notice(&self, notice: &Notice);
    /// The kernel could not be written or read; it will be tried again.
    fn failed(&self, error: &Error);
    /// Stale UDP flows could not be deleted; the rules are in force.
    fn flows_stay(&self, error: &Error);
}

/// Reports to the log.
#[derive(Debug, Default)]
pub struct Log;

impl Reporter for Log {
    fn notice(&self, notice: &Notice) {
        let (subject, reason, message) = (&notice.subject, notice.reason.as_str(), &notice.message);
        match notice.reason {
            // Slices arrive before their services all the time in a living cluster.
            Reason::OrphanSlice | Reason::UnknownKind => {
                tracing::info!(reason, "{subject}: {message}");
            }
            _ => tracing::warn!(reason, "{subject}: {message}"),
        }
    }

    fn failed(&self, error: &Error) {
        tracing::error!("{error}");
    }

    fn flows_stay(&self, error: &Error) {
        tracing::warn!(
            "{error}; until then UDP clients that keep their socket may stay with endpoints \
             that are gone"
        );
    }
}
