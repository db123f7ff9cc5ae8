//! Limits repeated lines of the log, and counts the lines that were not logged.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::time::{Duration, Instant};

/// Limits the lines about each of several subjects.
///
/// In each window of time, a subject has a line for each new text, up to a bound. All other reports
/// are counted, and the count is returned at the end of the window.
#[derive(Debug)]
pub(crate) struct Repeats<K> {
    window: Duration,
    /// The highest number of lines about a subject in a window.
    lines: usize,
    windows: HashMap<K, Window>,
    hasher: RandomState,
    /// A time before which no window ends.
    next: Option<Instant>,
}

/// The reports about a subject in the current window.
#[derive(Debug)]
struct Window {
    end: Instant,
    /// Hashes of the texts that were logged, since texts may be long.
    logged: Vec<u64>,
    counted: u64,
    last: String,
    last_hash: u64,
}

/// The number of characters of a text that are kept.
const LONGEST: usize = 500;

/// The reports about a subject that were not logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Count<K> {
    /// The subject.
    pub(crate) key: K,
    /// Their number.
    pub(crate) reports: u64,
    /// The text of the last one, or its beginning.
    pub(crate) last: String,
}

impl<K: Clone + Eq + Hash> Repeats<K> {
    /// Allows a number of lines about a subject in each window.
    pub(crate) fn new(lines: usize, window: Duration) -> Self {
        Self {
            window,
            lines,
            windows: HashMap::new(),
            hasher: RandomState::new(),
            next: None,
        }
    }

    /// Returns whether there was a report about a subject in its current window.
    pub(crate) fn contains(&self, key: &K) -> bool {
        self.windows.contains_key(key)
    }

    /// Returns the subjects with a report in their current window.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &K> {
        self.windows.keys()
    }

    /// Returns whether to log a report; otherwise counts it.
    pub(crate) fn add(&mut self, key: &K, text: &str, now: Instant) -> bool {
        let hash = self.hasher.hash_one(text);
        let Some(window) = self.windows.get_mut(key) else {
            self.windows
                .insert(key.clone(), Window::begin(hash, now + self.window));
            self.next.get_or_insert(now + self.window);
            return true;
        };
        if window.logged.len() < self.lines && !window.logged.contains(&hash) {
            window.logged.push(hash);
            return true;
        }
        window.counted += 1;
        window.last_hash = hash;
        window.last.clear();
        window.last.extend(text.chars().take(LONGEST));
        false
    }

    /// Returns when to call [`Repeats::counts`] next.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.next
    }

    /// Ends the windows that are over, and returns their counts. A subject with a count begins another
    /// window, in which the last text counts as logged.
    pub(crate) fn counts(&mut self, now: Instant) -> Vec<Count<K>> {
        let mut counts = Vec::new();
        if self.next.is_none_or(|next| next > now) {
            return counts;
        }
        let length = self.window;
        self.windows.retain(|key, window| {
            if window.end > now {
                return true;
            }
            let reports = std::mem::take(&mut window.counted);
            if reports > 0 {
                let last = std::mem::take(&mut window.last);
                *window = Window::begin(window.last_hash, now + length);
                let key = key.clone();
                counts.push(Count { key, reports, last });
            }
            reports > 0
        });
        self.next = self.windows.values().map(|window| window.end).min();
        counts
    }
}

impl Window {
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

/// Logs at most one line in each interval.
#[derive(Clone, Debug)]
pub(crate) struct Throttle {
    every: Duration,
    logged: Option<Instant>,
    unlogged: u64,
}

impl Throttle {
    /// Allows one line every `every`.
    pub(crate) fn new(every: Duration) -> Self {
        Self {
            every,
            logged: None,
            unlogged: 0,
        }
    }

    /// Returns `None` if a line is not to be logged, and otherwise the number of lines that were not
    /// since the last one.
    pub(crate) fn add(&mut self, now: Instant) -> Option<u64> {
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
        assert!(repeats.add(&"api", "bad", start), "another subject");
        assert_eq!(repeats.counts(start + WINDOW / 2), []);
        assert_eq!(repeats.due(), Some(start + WINDOW));
        assert_eq!(repeats.counts(start + WINDOW), [count("web", 40, "bad")]);
    }

    #[test]
    fn different_reports_about_a_subject_are_logged_up_to_a_bound() {
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
        assert!(!repeats.add(&"web", &long, start + WINDOW), "logged before");
    }

    #[test]
    fn a_repeated_report_is_counted_in_each_window_and_forgotten_when_it_ends() {
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
    fn a_line_has_the_number_of_lines_not_logged_before_it() {
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
