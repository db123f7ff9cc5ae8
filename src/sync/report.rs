//! Reports to administrators: log lines and Events.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::metrics::SyncMetrics;
use crate::logging::{Count, Repeats};
use crate::model::{Notice, Reason, Subject};
use crate::mutex::lock;
use crate::netlink::{ConntrackError, Error};

/// Receives reports for administrators. Implementations must not block.
pub trait Reporter: Send + Sync {
    /// Reports a fault of an object, a file or the node.
    fn notice(&self, notice: &Notice);
    /// Reports that the kernel could not be written or read. nftlet retries.
    fn failed(&self, error: &Error);
    /// Reports that stale UDP flows could not be deleted. nftlet retries.
    fn stale_flows_remain(&self, error: &ConntrackError);
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

    fn stale_flows_remain(&self, error: &ConntrackError) {
        tracing::warn!(
            "{error}; UDP clients that keep their socket may be sent to removed endpoints until a \
             retry succeeds"
        );
    }
}

/// Counts notices, reports to the log, and sends notices that require action to a channel. If the
/// channel is full, the notice is only logged.
///
/// Each subject has a limited number of lines for a reason in a window, and each namespace a limited
/// number of subjects. Further reports are counted (`log_counts`).
#[derive(Clone, Debug)]
pub struct LogAndSend {
    notices: mpsc::Sender<Notice>,
    metrics: SyncMetrics,
    limits: Arc<Mutex<LineLimits>>,
}

/// The most lines of a subject for a reason in a window, which is the most faults that are reported of
/// one object at a time.
const LINES: usize = 9;
/// The length of a window.
const WINDOW: Duration = Duration::from_secs(300);
/// The most subjects of one namespace with lines of their own in a window.
const MOST_OF_NAMESPACE: usize = 100;
/// The most subjects with lines of their own in a window.
const MOST: usize = 2_000;

/// Reports with the same key share a limit.
type ReportKey = (Subject, Reason);

/// Decides which reports are logged.
#[derive(Debug)]
struct LineLimits {
    repeats: Repeats<ReportKey>,
    /// The number of subjects of each namespace among them.
    of_namespace: HashMap<String, usize>,
}

impl Default for LineLimits {
    fn default() -> Self {
        Self {
            repeats: Repeats::new(LINES, WINDOW),
            of_namespace: HashMap::new(),
        }
    }
}

impl LineLimits {
    /// Returns whether to log a report.
    fn allow(&mut self, subject: &Subject, reason: Reason, text: &str, now: Instant) -> bool {
        let own = (subject.clone(), reason);
        if self.repeats.contains(&own) {
            return self.repeats.add(&own, text, now);
        }
        let namespace = namespace(subject);
        let in_all = self.of_namespace.values().sum::<usize>();
        let known = self.of_namespace.get(namespace).copied().unwrap_or(0);
        if known < MOST_OF_NAMESPACE && in_all < MOST {
            let known = self.of_namespace.entry(namespace.to_owned()).or_default();
            *known += 1;
            return self.repeats.add(&own, text, now);
        }
        let others = if known < MOST_OF_NAMESPACE || namespace.is_empty() {
            "others".to_owned()
        } else {
            format!("others in namespace {namespace}")
        };
        let others = (Subject::Other(others.into()), reason);
        self.repeats
            .add(&others, &format!("{subject}: {text}"), now)
    }

    /// Returns the counts of windows that ended before a moment.
    fn counts(&mut self, now: Instant) -> Vec<Count<ReportKey>> {
        let counts = self.repeats.counts(now);
        self.of_namespace.clear();
        for (subject, _) in self.repeats.keys() {
            let namespace = namespace(subject).to_owned();
            *self.of_namespace.entry(namespace).or_default() += 1;
        }
        counts
    }
}

/// Returns the namespace of an object; empty for other subjects.
fn namespace(subject: &Subject) -> &str {
    match subject {
        Subject::Object(object) => object.name.namespace(),
        Subject::File { .. } | Subject::Other(_) => "",
    }
}

impl LogAndSend {
    /// Creates a reporter that sends to a channel.
    pub(crate) fn new(notices: mpsc::Sender<Notice>, metrics: SyncMetrics) -> Self {
        Self {
            notices,
            metrics,
            limits: Arc::default(),
        }
    }

    /// Logs that a reported fault has ended.
    pub(crate) fn ended(&self, subject: Subject, reason: Reason, message: &str) {
        if self.allow(&subject, reason, message) {
            tracing::info!(reason = reason.as_str(), "{subject}: {message}");
        }
    }

    /// Logs the numbers of suppressed reports in past windows. Must be called regularly.
    pub(crate) fn log_counts(&self) {
        self.log_counts_until(Instant::now());
    }

    /// Logs the numbers of suppressed reports in all windows, at the end of the process.
    pub(crate) fn log_last_counts(&self) {
        self.log_counts_until(Instant::now() + WINDOW);
    }

    fn log_counts_until(&self, moment: Instant) {
        for Count { key, reports, last } in self.limits().counts(moment) {
            let (subject, reason) = key;
            let line = format!("{subject}: {reports} more like this; the last one: {last}");
            if reason.is_routine() {
                tracing::info!(reason = reason.as_str(), "{line}");
            } else {
                tracing::warn!(reason = reason.as_str(), "{line}");
            }
        }
    }

    fn allow(&self, subject: &Subject, reason: Reason, message: &str) -> bool {
        self.limits()
            .allow(subject, reason, message, Instant::now())
    }

    fn limits(&self) -> MutexGuard<'_, LineLimits> {
        lock(&self.limits)
    }
}

impl Reporter for LogAndSend {
    fn notice(&self, notice: &Notice) {
        self.metrics.notice(notice.reason);
        if self.allow(&notice.subject, notice.reason, &notice.message) {
            Log.notice(notice);
        }
        if !notice.reason.is_routine() {
            let _ = self.notices.try_send(notice.clone());
        }
    }

    fn failed(&self, error: &Error) {
        self.metrics.notice(Reason::SyncFailed);
        let subject = Subject::Other("the kernel".into());
        let message = error.to_string();
        if self.allow(&subject, Reason::SyncFailed, &message) {
            Log.failed(error);
        }
        let _ = self.notices.try_send(Notice {
            subject,
            reason: Reason::SyncFailed,
            message: format!("{message}; nftlet retries"),
        });
    }

    fn stale_flows_remain(&self, error: &ConntrackError) {
        Log.stale_flows_remain(error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Kind, ObjectName, ObjectRef};
    use crate::serve::metrics::Registry;

    fn metrics() -> SyncMetrics {
        SyncMetrics::register(&Registry::new().unwrap()).unwrap()
    }

    fn notice(reason: Reason) -> Notice {
        Notice {
            subject: Subject::Other("x".into()),
            reason,
            message: "y".into(),
        }
    }

    #[test]
    fn notices_that_require_action_are_sent_without_waiting_for_room() {
        let (sender, mut receiver) = mpsc::channel(2);
        let reporter = LogAndSend::new(sender, metrics());
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

    fn of_service(namespace: &str, name: &str) -> Subject {
        let name = ObjectName::new(namespace, name);
        Subject::Object(ObjectRef::new(Kind::Service, name))
    }

    /// Returns how many of the reports are logged.
    fn lines(
        limits: &mut LineLimits,
        now: Instant,
        reports: impl Iterator<Item = Subject>,
    ) -> usize {
        let reports = reports.enumerate();
        let allowed = reports.filter(|(number, subject)| {
            let text = format!("port {number}");
            limits.allow(subject, Reason::Conflict, &text, now)
        });
        allowed.count()
    }

    #[test]
    fn a_service_that_changes_all_the_time_has_a_few_lines_and_a_count() {
        let (mut limits, now) = (LineLimits::default(), Instant::now());
        let web = || of_service("shop", "web");
        let of_web = std::iter::repeat_with(web).take(23_000);
        assert_eq!(lines(&mut limits, now, of_web), LINES);
        assert_eq!(limits.counts(now + WINDOW / 2), []);
        let counts = limits.counts(now + WINDOW);
        let [Count { key, reports, last }] = &counts[..] else {
            panic!("{counts:?}");
        };
        assert_eq!(key, &(web(), Reason::Conflict));
        assert_eq!((*reports, &**last), (22_991, "port 22999"));
    }

    #[test]
    fn a_namespace_of_many_faults_leaves_lines_to_the_others() {
        let (mut limits, now) = (LineLimits::default(), Instant::now());
        let many = |namespace: &'static str, count: usize| {
            (0..count).map(move |number| of_service(namespace, &format!("web-{number}")))
        };
        let of_loud = lines(&mut limits, now, many("loud", 5_000));
        assert_eq!(of_loud, MOST_OF_NAMESPACE + LINES);
        assert_eq!(lines(&mut limits, now, many("shop", 20)), 20);
        let counts = limits.counts(now + WINDOW);
        let [Count { key, reports, last }] = &counts[..] else {
            panic!("{counts:?}");
        };
        assert_eq!(key.0.to_string(), "others in namespace loud");
        assert_eq!(*reports, 5_000 - 100 - 9);
        assert_eq!(last, "Service loud/web-4999: port 4999");
        // Later they have lines again.
        let later = now + WINDOW * 2;
        limits.counts(later);
        assert_eq!(lines(&mut limits, later, many("loud", 20)), 20);
    }

    #[test]
    fn all_lines_of_a_window_are_bounded() {
        let (mut limits, now) = (LineLimits::default(), Instant::now());
        let all = (0..10_000).map(|number| of_service(&format!("team-{number}"), "web"));
        assert_eq!(lines(&mut limits, now, all), MOST + LINES);
    }
}
