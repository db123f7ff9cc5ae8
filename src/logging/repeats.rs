//! Which of many reports become lines of the log, and counts of the others.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::time::{Duration, Instant};

/// Limits the lines about each of several matters.
///
/// Within a window of time a matter gets a line for each new text, up to a bound; all other
/// reports are counted, and the count is returned once the window is over.
#[derive(Debug)]
pub struct Repeats<K> {
    window: Duration,
    /// The most lines about a matter in a window.
    lines: usize,
    matters: HashMap<K, Matter>,
    hasher: RandomState,
    /// No window of a matter ends earlier.
    next: Option<Instant>,
}

/// What was reported about a matter in the current window.
#[derive(Debug)]
struct Matter {
    end: Instant,
    /// The hashes of the texts that were logged: a text may be long.
    logged: Vec<u64>,
    counted: u64,
    last: String,
    last_hash: u64,
}

/// The most characters of a text that are kept.
const LONGEST: usize = 500;

/// Reports that were counted in place of being logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count<K> {
    /// The matter.
    pub key: K,
    /// How many they were.
    pub reports: u64,
    /// The text of the last one, or its beginning.
    pub last: String,
}

impl<K: Clone + Eq + Hash> Repeats<K> {
    /// Allows so many lines about a matter in each window.
    pub fn new(lines: usize, window: Duration) -> Self {
        Self {
            window,
            lines,
            matters: HashMap::new(),
            hasher: RandomState::new(),
            next: None,
        }
    }

    /// Whether anything was reported about a matter in its current window.
    pub fn contains(&self, key: &K) -> bool {
        self.matters.contains_key(key)
    }

    /// The matters with a report in their current window.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.matters.keys()
    }

    /// Takes a report. Returns whether it is to be logged; it is counted otherwise.
    pub fn add(&mut self, key: &K, text: &str, now: Instant) -> bool {
        let hash = self.hasher.hash_one(text);
        let Some(matter) = self.matters.get_mut(key) else {
            self.matters
                .insert(key.clone(), Matter::begin(hash, now + self.window));
            self.next.get_or_insert(now + self.window);
            return true;
        };
        if matter.logged.len() < self.lines && !matter.logged.contains(&hash) {
            matter.logged.push(hash);
            return true;
        }
        matter.counted += 1;
        matter.last_hash = hash;
        matter.last.clear();
        matter.last.extend(text.chars().take(LONGEST));
        false
    }

    /// When [`Repeats::counts`] has to be called again, if at all.
    pub fn due(&self) -> Option<Instant> {
        self.next
    }

    /// Ends the windows that are over, and returns what was counted in them. A matter that was
    /// counted begins another window, in which the text that was last is no news.
    pub fn counts(&mut self, now: Instant) -> Vec<Count<K>> {
        let mut counts = Vec::new();
        if self.next.is_none_or(|next| next > now) {
            return counts;
        }
        let window = self.window;
        self.matters.retain(|key, matter| {
            if matter.end > now {
                return true;
            }
            let reports = std::mem::take(&mut matter.counted);
            if reports > 0 {
                let last = std::mem::take(&mut matter.last);
                *matter = Matter::begin(matter.last_hash, now + window);
                let key = key.clone();
                counts.push(Count { key, reports, last });
            }
            reports > 0
        });
        self.next = self.matters.values().map(|matter| matter.end).min();
        counts
    }
}

impl Matter {
    fn begin(logged: u64, end: Instant) -> Self {
        Self {
            end,
            logged: vec![logged],
            counted: 0,
            last: String::new(),
            last_hash: logged,
        }
    }
}

/// Limits a line to one in each span of time.
#[derive(Debug)]
pub struct Throttle {
    every: Duration,
    logged: Option<Instant>,
    unlogged: u64,
}

impl Throttle {
    /// Allows a line so often.
    pub fn new(every: Duration) -> Self {
        Self {
            every,
            logged: None,
            unlogged: 0,
        }
    }

    /// Takes a line. Where it is to be logged, returns how many were not since the last one.
    pub fn add(&mut self, now: Instant) -> Option<u64> {
        if (self.logged).is_some_and(|logged| now.saturating_duration_since(logged) < self.every) {
            self.unlogged += 1;
            return None;
        }
        self.logged = Some(now);
        Some(std::mem::take(&mut self.unlogged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(300);

    fn repeats() -> (Repeats<&'static str>, Instant) {
        (Repeats::new(3, WINDOW), Instant::now())
    }

    fn count(key: &'static str, reports: u64, last: &str) -> Count<&'static str> {
        Count {
            key,
            reports,
            last: last.to_owned(),
        }
    }

    #[test]
    fn an_equal_report_is_counted_and_the_count_comes_once_the_window_is_over() {
        let (mut repeats, start) = repeats();
        assert!(repeats.add(&"web", "bad", start));
        for _ in 0..40 {
            assert!(!repeats.add(&"web", "bad", start));
        }
        assert!(repeats.add(&"api", "bad", start), "another matter");
        assert_eq!(repeats.counts(start + WINDOW / 2), []);
        assert_eq!(repeats.due(), Some(start + WINDOW));
        assert_eq!(repeats.counts(start + WINDOW), [count("web", 40, "bad")]);
    }

    #[test]
    fn different_reports_about_a_matter_are_lines_up_to_a_bound() {
        let (mut repeats, start) = repeats();
        let mut add = |number: usize| repeats.add(&"web", &format!("port {number}"), start);
        let logged = (0..45).filter(|number| add(*number)).count();
        assert_eq!(logged, 3);
        assert_eq!(
            repeats.counts(start + WINDOW),
            [count("web", 42, "port 44")]
        );
    }

    #[test]
    fn of_a_long_text_a_part_is_kept() {
        let (mut repeats, start) = repeats();
        let long = "ä".repeat(100_000);
        assert!(repeats.add(&"web", &long, start));
        assert!(!repeats.add(&"web", &long, start));
        let counts = repeats.counts(start + WINDOW);
        let [count] = &counts[..] else {
            panic!("{counts:?}");
        };
        assert_eq!(count.last, "ä".repeat(LONGEST));
        assert!(!repeats.add(&"web", &long, start + WINDOW), "no news");
    }

    #[test]
    fn a_matter_that_goes_on_is_a_count_in_each_window_and_one_that_ends_is_forgotten() {
        let (mut repeats, start) = repeats();
        for now in [start, start] {
            repeats.add(&"web", "bad", now);
        }
        let second = start + WINDOW;
        assert_eq!(repeats.counts(second), [count("web", 1, "bad")]);
        assert!(!repeats.add(&"web", "bad", second));
        assert!(repeats.add(&"web", "worse", second));
        let third = second + WINDOW;
        assert_eq!(repeats.counts(third), [count("web", 1, "bad")]);
        let fourth = third + WINDOW;
        assert_eq!(repeats.counts(fourth), []);
        assert_eq!(repeats.due(), None);
        assert!(!repeats.contains(&"web"));
        assert!(repeats.add(&"web", "bad", fourth));
    }

    #[test]
    fn a_line_comes_now_and_then_with_the_number_of_those_between() {
        let (mut throttle, start) = (Throttle::new(WINDOW), Instant::now());
        assert_eq!(throttle.add(start), Some(0));
        for _ in 0..5_000 {
            assert_eq!(throttle.add(start + WINDOW / 2), None);
        }
        assert_eq!(throttle.add(start + WINDOW), Some(5_000));
        assert_eq!(throttle.add(start + WINDOW), None);
        assert_eq!(throttle.add(start + WINDOW * 2), Some(1));
    }
}
