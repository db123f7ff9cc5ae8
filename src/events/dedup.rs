//! Deduplicates Events, and limits their rate.
//!
//! The first notice of its kind becomes an Event, and the next ones raise its count. A bucket for
//! the node and one for each object limit how many new Events are written.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use super::object::EventDraft;
use crate::model::{ObjectName, ObjectRef};

/// The size of a bucket, for a node and for an object.
const BURST: f64 = 25.0;
/// How often a bucket is filled by one Event. Those of objects are client-go's limit for a source.
const NODE_EVERY: Duration = Duration::from_secs(5);
const OBJECT_EVERY: Duration = Duration::from_secs(300);
/// The number of Events and of objects that are remembered.
const MOST: usize = 1024;

/// An Event that was admitted.
#[derive(Debug)]
struct Series {
    draft: EventDraft,
    /// The number of notices.
    count: i32,
    /// The count that was written last.
    written_count: i32,
    written: Instant,
    progress: Progress,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// The Event or its count waits to be written.
    Waiting,
    Written,
    /// It cannot be written, and is not admitted again.
    GivenUp,
}

/// The Events that were admitted, and the buckets.
#[derive(Debug)]
pub(super) struct Dedup {
    series_every: Duration,
    /// By the namespace and the name of the Event.
    known: HashMap<ObjectName, Series>,
    node: Bucket,
    objects: HashMap<Option<ObjectRef>, Bucket>,
}

impl Dedup {
    /// `series_every` is the time between two writes of a count.
    pub(super) fn new(series_every: Duration) -> Self {
        Self {
            series_every,
            known: HashMap::new(),
            node: Bucket::full(NODE_EVERY, Instant::now()),
            objects: HashMap::new(),
        }
    }

    /// Returns whether to create an Event. Otherwise it counts as one more of a known Event, or
    /// there are too many.
    pub(super) fn admit(&mut self, draft: &EventDraft, now: Instant) -> bool {
        if let Some(series) = self.known.get_mut(&draft.key()) {
            series.count = series.count.saturating_add(1);
            // If the server has deleted the Event, the new one has the latest message.
            series.draft = draft.clone();
            return false;
        }
        if self.objects.len() >= MOST {
            // Evicts the bucket unused for longest, which has refilled the most.
            let oldest = self.objects.iter().min_by_key(|(_, bucket)| bucket.at);
            if let Some(oldest) = oldest.map(|(object, _)| object.clone()) {
                self.objects.remove(&oldest);
            }
        }
        let object = self.objects.entry(draft.object.clone());
        let object = object.or_insert_with(|| Bucket::full(OBJECT_EVERY, now));
        if object.has(now) && self.node.has(now) {
            object.take();
            self.node.take();
            self.insert(draft.clone(), now);
            true
        } else {
            false
        }
    }

    /// Adds an Event that waits to be written.
    pub(super) fn insert(&mut self, draft: EventDraft, now: Instant) {
        if self.known.len() >= MOST {
            let oldest = self.known.iter().min_by_key(|(_, series)| series.written);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                self.known.remove(&oldest);
            }
        }
        let series = Series {
            count: 1,
            written_count: 1,
            written: now,
            progress: Progress::Waiting,
            draft,
        };
        self.known.insert(series.draft.key(), series);
    }

    /// Marks an Event or its count as written.
    pub(super) fn written(&mut self, draft: &EventDraft, now: Instant) {
        if let Some(series) = self.known.get_mut(&draft.key()) {
            series.written = now;
            series.progress = Progress::Written;
        }
    }

    /// Marks an Event as given up, so that it is not admitted again.
    pub(super) fn gave_up(&mut self, draft: &EventDraft) {
        if let Some(series) = self.known.get_mut(&draft.key()) {
            series.progress = Progress::GivenUp;
        }
    }

    /// Forgets an Event, which may be admitted again.
    pub(super) fn forget(&mut self, draft: &EventDraft) {
        self.known.remove(&draft.key());
    }

    pub(super) fn forget_all(&mut self) {
        self.known.clear();
    }

    /// Returns when the next count is due.
    pub(super) fn due(&mut self) -> Option<Instant> {
        let every = self.series_every;
        let grown = self.known.values().filter(|series| series.is_outdated());
        let first = grown.map(|series| series.written + every).min()?;
        Some(first.max(self.node.next()))
    }

    /// Returns an Event whose count is due, with the count.
    pub(super) fn begin_update(&mut self, now: Instant) -> Option<(EventDraft, i32)> {
        let every = self.series_every;
        let due = |series: &&mut Series| series.is_outdated() && series.written + every <= now;
        let series = self.known.values_mut().find(due)?;
        if !self.node.has(now) {
            return None;
        }
        self.node.take();
        series.progress = Progress::Waiting;
        series.written_count = series.count;
        Some((series.draft.clone(), series.count))
    }
}

impl Series {
    /// Returns whether the Event was written with a lower count.
    fn is_outdated(&self) -> bool {
        self.progress == Progress::Written && self.count > self.written_count
    }
}

/// A token bucket.
#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
    every: Duration,
}

impl Bucket {
    fn full(every: Duration, now: Instant) -> Self {
        Self {
            tokens: BURST,
            at: now,
            every,
        }
    }

    /// Returns whether there is a token.
    fn has(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at);
        self.tokens = (self.tokens + passed.div_duration_f64(self.every)).min(BURST);
        self.at = self.at.max(now);
        self.tokens >= 1.0
    }

    fn take(&mut self) {
        self.tokens -= 1.0;
    }

    /// Returns when there is a token.
    fn next(&self) -> Instant {
        self.at + self.every.mul_f64((1.0 - self.tokens).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Kind, Notice, Reason, Subject};
    use k8s_openapi::jiff::Timestamp;

    const SERIES: Duration = Duration::from_secs(300);

    fn draft(service: &str, message: &str) -> EventDraft {
        let name = ObjectName::new("shop", service);
        let notice = Notice {
            subject: Subject::Object(ObjectRef::new(Kind::Service, name)),
            reason: Reason::InvalidField,
            message: message.into(),
        };
        EventDraft::of(
            &notice,
            "node-1",
            Timestamp::UNIX_EPOCH,
            Timestamp::UNIX_EPOCH,
        )
    }

    /// Reports a number of different faults of an object, and returns how many are admitted.
    fn admitted(dedup: &mut Dedup, service: &str, count: usize, now: Instant) -> usize {
        let drafts = (0..count).map(|number| draft(service, &format!("{number} {now:?}")));
        drafts.filter(|draft| dedup.admit(draft, now)).count()
    }

    #[test]
    fn a_burst_is_admitted_and_then_one_every_five_seconds() {
        let mut dedup = Dedup::new(SERIES);
        let start = Instant::now();
        let of_each = (0..40).map(|service| admitted(&mut dedup, &format!("s{service}"), 1, start));
        assert_eq!(of_each.sum::<usize>(), 25);
        assert_eq!(
            admitted(&mut dedup, "a", 1, start + NODE_EVERY.mul_f64(0.9)),
            0
        );
        assert_eq!(
            admitted(&mut dedup, "a", 5, start + NODE_EVERY.mul_f64(1.1)),
            1
        );
        // A quiet hour allows the burst again, and no more.
        let later = start + Duration::from_secs(3600);
        let of_each = (0..40).map(|service| admitted(&mut dedup, &format!("t{service}"), 1, later));
        assert_eq!(of_each.sum::<usize>(), 25);
    }

    #[test]
    fn one_object_does_not_use_up_the_rate_of_others() {
        let mut dedup = Dedup::new(SERIES);
        let start = Instant::now();
        assert_eq!(admitted(&mut dedup, "noisy", 100, start), 25);
        let later = start + NODE_EVERY * 10;
        assert_eq!(admitted(&mut dedup, "noisy", 100, later), 0);
        assert_eq!(admitted(&mut dedup, "quiet", 100, later), 10);
        assert_eq!(
            admitted(&mut dedup, "noisy", 100, start + OBJECT_EVERY * 2),
            2
        );
    }

    #[test]
    fn repeated_notices_are_counted_and_the_count_is_written_at_intervals() {
        let mut dedup = Dedup::new(SERIES);
        let start = Instant::now();
        let web = draft("web", "bad");
        assert!(dedup.admit(&web, start));
        dedup.written(&web, start);
        assert_eq!(dedup.due(), None);
        for _ in 0..1_000 {
            assert!(!dedup.admit(&web, start));
        }
        assert_eq!(dedup.due(), Some(start + SERIES));
        assert!(dedup.begin_update(start + SERIES / 2).is_none());
        let (draft, count) = dedup.begin_update(start + SERIES).expect("it is due");
        assert_eq!((draft.name, count), (web.name.clone(), 1_001));
        assert!(!dedup.admit(&web, start + SERIES));
        assert_eq!(dedup.due(), None, "the count before waits to be written");
        dedup.written(&web, start + SERIES);
        assert_eq!(dedup.due(), Some(start + SERIES * 2));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut dedup = Dedup::new(SERIES);
        let start = Instant::now();
        for number in 0..u32::try_from(MOST).expect("small") + 10 {
            let now = start + NODE_EVERY * number;
            let web = draft(&format!("s{number}"), "bad");
            assert!(dedup.admit(&web, now));
        }
        assert_eq!(dedup.known.len(), MOST);
        assert_eq!(dedup.objects.len(), MOST);
    }

    #[test]
    fn a_series_has_the_latest_message() {
        let mut dedup = Dedup::new(SERIES);
        let start = Instant::now();
        let run = Timestamp::UNIX_EPOCH;
        let at = |message: &str| {
            let notice = Notice {
                subject: Subject::Other("table nftlet".into()),
                reason: Reason::ForeignChange,
                message: message.into(),
            };
            EventDraft::of(&notice, "node-1", run, run)
        };
        let first = at("the first");
        assert!(dedup.admit(&first, start));
        dedup.written(&first, start);
        assert!(!dedup.admit(&at("the second"), start));
        let (draft, count) = dedup.begin_update(start + SERIES).expect("it is due");
        assert_eq!(draft.event(None).note.as_deref(), Some("the second"));
        assert_eq!(count, 2);
    }

    #[test]
    fn an_event_given_up_is_not_admitted_again() {
        let mut dedup = Dedup::new(SERIES);
        let start = Instant::now();
        let web = draft("web", "bad");
        assert!(dedup.admit(&web, start));
        dedup.gave_up(&web);
        let later = start + SERIES * 2;
        assert!(!dedup.admit(&web, later));
        assert_eq!(dedup.due(), None);
        assert!(dedup.begin_update(later).is_none());
        dedup.forget(&web);
        assert!(dedup.admit(&web, later));
    }

    #[test]
    fn objects_of_one_name_in_two_namespaces_are_two() {
        let mut dedup = Dedup::new(SERIES);
        let now = Instant::now();
        let refused = |namespace: &str| {
            let name = ObjectName::new(namespace, "web");
            let notice = Notice {
                subject: Subject::Object(ObjectRef::new(Kind::Service, name)),
                reason: Reason::KernelRefused,
                message: "too many elements".into(),
            };
            let zero = Timestamp::UNIX_EPOCH;
            EventDraft::of(&notice, "node-1", zero, zero)
        };
        assert!(dedup.admit(&refused("a"), now));
        assert!(dedup.admit(&refused("b"), now));
        assert!(!dedup.admit(&refused("a"), now));
    }
}
