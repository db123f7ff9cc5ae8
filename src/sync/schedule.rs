//! Times of work that no event triggers: retries, repairs and repeated reports.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::outcome::{Engines, Outcome, Outcomes};
use crate::backoff::Backoff;

const SHORTEST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// The pauses before an engine that failed is retried.
const RETRY: Backoff = Backoff::new(SHORTEST_RETRY, LONGEST_RETRY);
/// The pauses between two repairs of foreign changes.
const REPAIR: Backoff = Backoff::new(Duration::from_millis(20), LONGEST_RETRY);
/// Longer pauses lead to a warning.
const WARN_ABOVE: Duration = Duration::from_secs(2);
/// The time after which policies that are not in force are reported.
const UNENFORCED_AFTER: Duration = Duration::from_secs(30);
/// The interval of further reports.
const UNENFORCED_EVERY: Duration = Duration::from_secs(300);
/// After this time without foreign changes the next repair is immediate.
const QUIET: Duration = Duration::from_secs(60);

/// The times at which engines that failed are retried, independent of each other.
#[derive(Debug, Default)]
pub(super) struct Retries {
    services: Option<EngineRetry>,
    policies: Option<EngineRetry>,
}

#[derive(Clone, Copy, Debug)]
struct EngineRetry {
    /// `None` while another thread compares for it.
    at: Option<Instant>,
    backoff: Backoff,
}

impl Retries {
    /// Schedules a retry for each engine that failed, after a pause that doubles, and cancels the retry of
    /// each that succeeded.
    pub(crate) fn record(&mut self, outcomes: Outcomes) {
        for (retry, outcome) in [
            (&mut self.services, outcomes.services),
            (&mut self.policies, outcomes.policies),
        ] {
            match outcome {
                Some(Outcome::Failed) => {
                    let mut backoff = retry.map_or(RETRY, |retry| retry.backoff);
                    let at = Some(Instant::now() + backoff.next());
                    *retry = Some(EngineRetry { at, backoff });
                }
                Some(Outcome::Comparing) => {
                    if let Some(retry) = retry {
                        retry.at = None;
                    }
                }
                Some(Outcome::Synced | Outcome::Waiting) => *retry = None,
                None => {}
            }
        }
    }

    /// Returns whether no engine failed and waits for a retry, or for a comparison.
    pub(crate) fn is_empty(&self) -> bool {
        self.services.is_none() && self.policies.is_none()
    }

    /// Returns the engines that do not wait for a retry. Only these write events at once, since an attempt
    /// after a failure reads and compares whole tables.
    pub(crate) fn without_retry(&self) -> Engines {
        Engines {
            services: at(self.services).is_none(),
            policies: at(self.policies).is_none(),
        }
    }

    /// Waits until an engine is due, forever without any, and returns those due.
    pub(crate) async fn due(&self) -> Engines {
        let (services, policies) = (at(self.services), at(self.policies));
        let Some(next) = services.into_iter().chain(policies).min() else {
            return std::future::pending().await;
        };
        sleep_until(next).await;
        let now = Instant::now();
        Engines {
            services: services.is_some_and(|at| at <= now),
            policies: policies.is_some_and(|at| at <= now),
        }
    }
}

fn at(retry: Option<EngineRetry>) -> Option<Instant> {
    retry?.at
}

/// The time of the next repair: at once, unless the tables are changed repeatedly.
#[derive(Debug)]
pub(super) struct Healing {
    due: Option<Instant>,
    /// The earliest next repair.
    allowed: Instant,
    backoff: Backoff,
}

impl Default for Healing {
    fn default() -> Self {
        Self {
            due: None,
            allowed: Instant::now(),
            backoff: REPAIR,
        }
    }
}

impl Healing {
    /// Requests a repair.
    pub(crate) fn request(&mut self) {
        self.due.get_or_insert(self.allowed);
    }

    /// Waits until a repair is due, forever without a request.
    pub(crate) async fn due(&self) {
        match self.due {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    /// Records a comparison: whether it restored foreign changes, and the time taken.
    ///
    /// Pauses grow while another process keeps changing the tables, until a quiet minute. If
    /// notifications are lost because other processes write a lot, unnecessary comparisons take a fifth
    /// of the time at most.
    pub(crate) fn done(&mut self, changed: bool, took: Duration) {
        let now = Instant::now();
        self.due = None;
        if now.saturating_duration_since(self.allowed) > QUIET {
            self.backoff.reset();
        }
        if changed {
            let before = self.backoff.current();
            let pause = self.backoff.next();
            if pause > WARN_ABOVE && pause != before {
                tracing::warn!(
                    "another process keeps changing nftlet's tables; the next repair is in {pause:?}"
                );
            }
        }
        self.allowed = now + self.backoff.current().max(took * 4);
    }
}

/// The times of reports that network policies are not in force.
#[derive(Debug, Default)]
pub(super) struct Unenforced {
    next: Option<Instant>,
    /// Whether to log when they are in force again.
    announce: bool,
}

impl Unenforced {
    /// Records whether policies are in force.
    pub(crate) fn record(&mut self, in_force: bool) {
        if !in_force {
            self.next
                .get_or_insert_with(|| Instant::now() + UNENFORCED_AFTER);
            return;
        }
        self.next = None;
        if std::mem::take(&mut self.announce) {
            tracing::info!("network policies are in force");
        }
    }

    /// Waits until a report is due, forever if they are in force.
    pub(crate) async fn due(&self) {
        match self.next {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    /// Records a report.
    pub(crate) fn reported(&mut self) {
        self.announce = true;
        self.next = Some(Instant::now() + UNENFORCED_EVERY);
    }

    /// Requests a log line when they are in force.
    pub(crate) fn announce(&mut self) {
        self.announce = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICES_FAILED: Outcomes = Outcomes {
        services: Some(Outcome::Failed),
        policies: Some(Outcome::Synced),
    };
    const POLICIES_FAILED: Outcomes = Outcomes {
        services: None,
        policies: Some(Outcome::Failed),
    };

    #[tokio::test(start_paused = true)]
    async fn each_engine_has_its_own_pauses_which_grow_while_it_fails() {
        let mut retries = Retries::default();
        assert!(retries.is_empty());
        retries.record(SERVICES_FAILED);
        let start = Instant::now();
        let only_services = Engines {
            services: true,
            policies: false,
        };
        assert_eq!(retries.due().await, only_services);
        assert_eq!(start.elapsed(), SHORTEST_RETRY);
        let mut before = start.elapsed();
        for _ in 0..5 {
            retries.record(SERVICES_FAILED);
            let start = Instant::now();
            assert_eq!(retries.due().await, only_services);
            assert!(start.elapsed() > before, "{:?}", start.elapsed());
            before = start.elapsed();
        }
        // The other engine begins with a short pause, independent of the first.
        retries.record(SERVICES_FAILED);
        retries.record(POLICIES_FAILED);
        assert_eq!(retries.without_retry(), Engines::default());
        let start = Instant::now();
        let due = retries.due().await;
        assert!(due.policies && !due.services);
        assert!(start.elapsed() <= SHORTEST_RETRY + Duration::from_millis(2));
        retries.record(Outcomes {
            services: Some(Outcome::Synced),
            policies: None,
        });
        let ready = retries.without_retry();
        assert!(ready.services && !ready.policies && !retries.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_although_a_comparison_lies_in_between() {
        let mut retries = Retries::default();
        let comparing = Outcomes {
            services: Some(Outcome::Comparing),
            policies: None,
        };
        let mut before = Duration::ZERO;
        for _ in 0..5 {
            retries.record(SERVICES_FAILED);
            let start = Instant::now();
            retries.due().await;
            assert!(start.elapsed() > before, "{:?}", start.elapsed());
            before = start.elapsed();
            retries.record(comparing);
            assert!(!retries.is_empty());
            assert_eq!(retries.without_retry(), Engines::ALL);
            let day = Duration::from_secs(86_400);
            assert!(tokio::time::timeout(day, retries.due()).await.is_err());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn policies_that_are_not_in_force_are_reported_every_five_minutes() {
        let mut unenforced = Unenforced::default();
        let waited = async |unenforced: &Unenforced| {
            let start = Instant::now();
            unenforced.due().await;
            start.elapsed().as_secs()
        };
        unenforced.record(false);
        tokio::time::advance(Duration::from_secs(20)).await;
        unenforced.record(false);
        assert_eq!(waited(&unenforced).await, 10);
        for _ in 0..3 {
            unenforced.reported();
            unenforced.record(false);
            assert_eq!(waited(&unenforced).await, 300);
        }
        unenforced.record(true);
        let day = Duration::from_secs(86_400);
        assert!(tokio::time::timeout(day, unenforced.due()).await.is_err());
        unenforced.record(false);
        assert_eq!(waited(&unenforced).await, 30, "it begins anew");
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_for_lists_is_not_tried_again_by_the_clock() {
        let mut retries = Retries::default();
        retries.record(SERVICES_FAILED);
        retries.record(Outcomes {
            services: Some(Outcome::Waiting),
            policies: None,
        });
        assert!(retries.is_empty());
        let day = Duration::from_secs(86_400);
        assert!(tokio::time::timeout(day, retries.due()).await.is_err());
    }
}
