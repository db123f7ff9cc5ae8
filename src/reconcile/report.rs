//! What people are told.

use tokio::sync::mpsc;

use crate::model::{Notice, Reason, Subject};
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
        if notice.reason.is_routine() {
            tracing::info!(reason, "{subject}: {message}");
        } else {
            tracing::warn!(reason, "{subject}: {message}");
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

/// Reports to the log, and hands on what calls for somebody. What the channel has no room for is
/// in the log only.
#[derive(Clone, Debug)]
pub struct LogAndSend(pub mpsc::Sender<Notice>);

impl Reporter for LogAndSend {
    fn notice(&self, notice: &Notice) {
        Log.notice(notice);
        if !notice.reason.is_routine() {
            let _ = self.0.try_send(notice.clone());
        }
    }

    fn failed(&self, error: &Error) {
        Log.failed(error);
        let _ = self.0.try_send(Notice {
            subject: Subject::Other("the kernel".into()),
            reason: Reason::SyncFailed,
            message: format!("{error}; nftlet keeps trying"),
        });
    }

    fn flows_stay(&self, error: &Error) {
        Log.flows_stay(error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(reason: Reason) -> Notice {
        Notice {
            subject: Subject::Other("x".into()),
            reason,
            message: "y".into(),
        }
    }

    #[test]
    fn what_calls_for_somebody_is_handed_on_and_nobody_waits_for_room() {
        let (sender, mut receiver) = mpsc::channel(2);
        let reporter = LogAndSend(sender);
        for reason in [Reason::OrphanSlice, Reason::Conflict, Reason::UnknownKind] {
            reporter.notice(&notice(reason));
        }
        for _ in 0..5 {
            reporter.notice(&notice(Reason::ForeignChange));
        }
        let mut received = std::iter::from_fn(|| receiver.try_recv().ok());
        assert_eq!(received.next(), Some(notice(Reason::Conflict)));
        assert_eq!(received.next(), Some(notice(Reason::ForeignChange)));
        assert_eq!(received.next(), None);
    }
}
