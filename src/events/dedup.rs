//! Which Events are written: what was told already, and how much may be told.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use super::object::Draft;
use crate::model::ObjectRef;

/// How many Events at once, of a node and of one object.
const BURST: f64 = 25.0;
/// After that, one so often: of a node, and of one object (client-go's limit for a source).
const NODE_EVERY: Duration = Duration::from_secs(5);
const OBJECT_EVERY: Duration = Duration::from_secs(300);
/// How many Events and objects are remembered.
const MOST: usize = 1024;

/// What to do with a notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Advice {
    /// Write an Event.
    Create,
    /// It is part of a series, or there were too many.
    Nothing,
}

/// An Event that was handed out to be written.
#[derive(Debug)]
struct Told {
    draft: Draft,
    /// How often it happened, and how often it was when it was written last.
    count: i32,
    written_count: i32,
    written: Instant,
    progress: Progress,
}

/// How far an Event has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// It, or its count, waits to be written.
    Waiting,
    Written,
    /// It cannot be written, and is not handed out again.
    GivenUp,
}

/// What was told.
#[derive(Debug)]
pub(super) struct Dedup {
    series_every: Duration,
    told: HashMap<String, Told>,
    node: Bucket,
    objects: HashMap<Option<ObjectRef>, Bucket>,
}

impl Dedup {
    /// Nothing was told yet. The count of a series is written so often.
    pub(super) fn new(series_every: Duration) -> Self {
        Self {
            series_every,
            told: HashMap::new(),
            node: Bucket::full(NODE_EVERY, Instant::now()),
            objects: HashMap::new(),
        }
    }

    /// What to do with something that happened now.
    pub(super) fn advise(&mut self, draft: &Draft, now: Instant) -> Advice {
        if let Some(told) = self.told.get_mut(&draft.name) {
            told.count = told.count.saturating_add(1);
            // Should the server have forgotten the Event, the new one says what happened last.
            told.draft = draft.clone();
            return Advice::Nothing;
        }
        if self.objects.len() >= MOST {
            // The longest unused has recovered most.
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
            self.hand_out(draft.clone(), now);
            Advice::Create
        } else {
            Advice::Nothing
        }
    }

    /// Notes an Event that is about to be written.
    pub(super) fn hand_out(&mut self, draft: Draft, now: Instant) {
        if self.told.len() >= MOST {
            let oldest = self.told.iter().min_by_key(|(_, told)| told.written);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                self.told.remove(&oldest);
            }
        }
        let told = Told {
            count: 1,
            written_count: 1,
            written: now,
            progress: Progress::Waiting,
            draft,
        };
        self.told.insert(told.draft.name.clone(), told);
    }

    /// Notes that an Event, or its count, was written.
    pub(super) fn written(&mut self, name: &str, now: Instant) {
        if let Some(told) = self.told.get_mut(name) {
            told.written = now;
            told.progress = Progress::Written;
        }
    }

    /// Notes that an Event cannot be written. It is not handed out again while it is remembered.
    pub(super) fn gave_up(&mut self, name: &str) {
        if let Some(told) = self.told.get_mut(name) {
            told.progress = Progress::GivenUp;
        }
    }

    /// Forgets an Event, which may be handed out again.
    pub(super) fn forget(&mut self, name: &str) {
        self.told.remove(name);
    }

    /// Forgets all Events.
    pub(super) fn forget_all(&mut self) {
        self.told.clear();
    }

    /// When the next count is to be written, if any.
    pub(super) fn due(&mut self) -> Option<Instant> {
        let every = self.series_every;
        let grown = self.told.values().filter(|told| told.is_outdated());
        let first = grown.map(|told| told.written + every).min()?;
        Some(first.max(self.node.next()))
    }

    /// The Event whose count is to be written now, with the count.
    pub(super) fn begin_update(&mut self, now: Instant) -> Option<(Draft, i32)> {
        let every = self.series_every;
        let due = |told: &&mut Told| told.is_outdated() && told.written + every <= now;
        let told = self.told.values_mut().find(due)?;
        if !self.node.has(now) {
            return None;
        }
        self.node.take();
        told.progress = Progress::Waiting;
        told.written_count = told.count;
        Some((told.draft.clone(), told.count))
    }
}

impl Told {
    /// Whether the Event is written with a lower count.
    fn is_outdated(&self) -> bool {
        self.progress == Progress::Written && self.count > self.written_count
    }
}

/// Allows a burst, and after that one every so often.
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

    /// Whether one more is allowed.
    fn has(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at);
        self.tokens = (self.tokens + passed.div_duration_f64(self.every)).min(BURST);
        self.at = self.at.max(now);
        self.tokens >= 1.0
    }

    fn take(&mut self) {
        self.tokens -= 1.0;
    }

    /// When one more is allowed.
    fn next(&self) -> Instant {
        self.at + self.every.mul_f64((1.0 - self.tokens).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Kind, Notice, ObjectName, Reason, Subject};
    use k8s_openapi::jiff::Timestamp;

    const SERIES: Duration = Duration::from_secs(300);

    fn draft(service: &str, message: &str) -> Draft {
        let name = ObjectName::new("shop", service);
        let notice = Notice {
            subject: Subject::Object(ObjectRef::new(Kind::Service, name)),
            reason: Reason::InvalidField,
            message: message.into(),
        };
        Draft::of(
            &notice,
            "node-1",
            Timestamp::UNIX_EPOCH,
            Timestamp::UNIX_EPOCH,
        )
    }

    /// How many of so many different things about an object are told at a time.
    fn told(dedup: &mut Dedup, service: &str, count: usize, now: Instant) -> usize {
        let drafts = (0..count).map(|number| draft(service, &format!("{number} {now:?}")));
        let advices = drafts.map(|draft| dedup.advise(&draft, now));
        advices.filter(|advice| *advice == Advice::Create).count()
    }

    #[test]
    fn a_burst_is_told_and_then_one_every_five_seconds() {
        let mut dedup = Dedup::new(SERIES);
        let start = Instant::now();
        let of_each = (0..40).map(|service| told(&mut dedup, &format!("s{service}"), 1, start));
        assert_eq!(of_each.sum::<usize>(), 25);
        assert_eq!(told(&mut dedup, "a", 1, start + NODE_EVERY.mul_f64(0.9)), 0);
        assert_eq!(told(&mut dedup, "a", 5, start + NODE_EVERY.mul_f64(1.1)), 1);
        // A quiet hour allows the burst again, and no more.
        let later = start + Duration::from_secs(3600);
        let of_each = (0..40).map(|service| told(&mut dedup, &format!("t{service}"), 1, later));
        assert_eq!(of_each.sum::<usize>(), 25);
    }

    #[test]
    fn one_object_does_not_use_up_what_others_may_tell() {
        let mut dedup = Dedup::new(SERIES);
        let start = Instant::now();
        assert_eq!(told(&mut dedup, "noisy", 100, start), 25);
        let later = start + NODE_EVERY * 10;
        assert_eq!(told(&mut dedup, "noisy", 100, later), 0);
        assert_eq!(told(&mut dedup, "quiet", 100, later), 10);
        assert_eq!(told(&mut dedup, "noisy", 100, start + OBJECT_EVERY * 2), 2);
    }

    #[test]
    fn the_same_again_is_counted_and_the_count_is_written_now_and_then() {
        let mut dedup = Dedup::new(SERIES);
        let start = Instant::now();
        let web = draft("web", "bad");
        assert_eq!(dedup.advise(&web, start), Advice::Create);
        dedup.written(&web.name, start);
        assert_eq!(dedup.due(), None);
        for _ in 0..1_000 {
            assert_eq!(dedup.advise(&web, start), Advice::Nothing);
        }
        assert_eq!(dedup.due(), Some(start + SERIES));
        assert!(dedup.begin_update(start + SERIES / 2).is_none());
        let (told, count) = dedup.begin_update(start + SERIES).expect("it is due");
        assert_eq!((told.name, count), (web.name.clone(), 1_001));
        assert_eq!(dedup.advise(&web, start + SERIES), Advice::Nothing);
        assert_eq!(dedup.due(), None, "the count before waits to be written");
        dedup.written(&web.name, start + SERIES);
        assert_eq!(dedup.due(), Some(start + SERIES * 2));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut dedup = Dedup::new(SERIES);
        let start = Instant::now();
        for number in 0..u32::try_from(MOST).expect("small") + 10 {
            let now = start + NODE_EVERY * number;
            let web = draft(&format!("s{number}"), "bad");
            assert_eq!(dedup.advise(&web, now), Advice::Create);
        }
        assert_eq!(dedup.told.len(), MOST);
        assert_eq!(dedup.objects.len(), MOST);
    }

    #[test]
    fn a_series_tells_what_happened_last() {
        let mut dedup = Dedup::new(SERIES);
        let start = Instant::now();
        let run = Timestamp::UNIX_EPOCH;
        let at = |message: &str| {
            let notice = Notice {
                subject: Subject::Other("table nftlet".into()),
                reason: Reason::ForeignChange,
                message: message.into(),
            };
            Draft::of(&notice, "node-1", run, run)
        };
        let first = at("the first");
        assert_eq!(dedup.advise(&first, start), Advice::Create);
        dedup.written(&first.name, start);
        assert_eq!(dedup.advise(&at("the second"), start), Advice::Nothing);
        let (draft, count) = dedup.begin_update(start + SERIES).expect("it is due");
        assert_eq!(draft.event(None).note.as_deref(), Some("the second"));
        assert_eq!(count, 2);
    }

    #[test]
    fn what_was_given_up_is_not_handed_out_again() {
        let mut dedup = Dedup::new(SERIES);
        let start = Instant::now();
        let web = draft("web", "bad");
        assert_eq!(dedup.advise(&web, start), Advice::Create);
        dedup.gave_up(&web.name);
        let later = start + SERIES * 2;
        assert_eq!(dedup.advise(&web, later), Advice::Nothing);
        assert_eq!(dedup.due(), None);
        assert!(dedup.begin_update(later).is_none());
        dedup.forget(&web.name);
        assert_eq!(dedup.advise(&web, later), Advice::Create);
    }
}
