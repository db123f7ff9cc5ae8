//! When the reconciler's loop does what no event asks for: retries and answers to foreign changes.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::{Outcome, Outcomes, Parts};

const SHORTEST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// The first pause between two answers to foreign changes.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
/// Pauses longer than this are worth a warning.
const LOUD: Duration = Duration::from_secs(2);
/// How long policies may wait, for lists or for the kernel, before that is reported.
const UNENFORCED_AFTER: Duration = Duration::from_secs(30);
/// How often it is reported while it lasts.
const UNENFORCED_EVERY: Duration = Duration::from_secs(300);
/// Tables left alone for so long are answered for at once again.
const QUIET: Duration = Duration::from_secs(60);

/// When the parts that failed are tried again. One that fails does not hold up the other.
#[derive(Debug, Default)]
pub(super) struct Retries {
    services: Option<Retry>,
    policies: Option<Retry>,
}

#[derive(Clone, Copy, Debug)]
struct Retry {
    at: Instant,
    wait: Duration,
}

impl Retries {
    /// Books what was achieved: a part that failed is tried again after a pause that grows, and
    /// one that did not needs no retry.
    pub fn book(&mut self, outcomes: Outcomes) {
        for (retry, outcome) in [
            (&mut self.services, outcomes.services),
            (&mut self.policies, outcomes.policies),
        ] {
            match outcome {
                Some(Outcome::Failed) => {
                    let wait =
                        retry.map_or(SHORTEST_RETRY, |retry| (retry.wait * 2).min(LONGEST_RETRY));
                    let at = Instant::now() + jittered(wait);
                    *retry = Some(Retry { at, wait });
                }
                Some(Outcome::Synced | Outcome::Waiting) => *retry = None,
                None => {}
            }
        }
    }

    /// Whether no part waits for a retry.
    pub fn is_empty(&self) -> bool {
        self.services.is_none() && self.policies.is_none()
    }

    /// The parts that events may be written to: those that wait for no retry. Each attempt at one
    /// that does would read and compare whole tables, however few events there are.
    pub fn undisturbed(&self) -> Parts {
        Parts {
            services: self.services.is_none(),
            policies: self.policies.is_none(),
        }
    }

    /// Waits until a part is due and tells which; for ever where none is.
    pub async fn due(&self) -> Parts {
        let of = |retry: Option<Retry>| retry.map(|retry| retry.at);
        let (services, policies) = (of(self.services), of(self.policies));
        let Some(next) = services.into_iter().chain(policies).min() else {
            return std::future::pending().await;
        };
        sleep_until(next).await;
        let now = Instant::now();
        Parts {
            services: services.is_some_and(|at| at <= now),
            policies: policies.is_some_and(|at| at <= now),
        }
    }
}

/// When to put back what somebody else changed: at once, unless it happens again and again.
#[derive(Debug)]
pub(super) struct Healing {
    due: Option<Instant>,
    /// Not before.
    allowed: Instant,
    pause: Duration,
}

impl Default for Healing {
    fn default() -> Self {
        Self {
            due: None,
            allowed: Instant::now(),
            pause: Duration::ZERO,
        }
    }
}

impl Healing {
    /// Somebody changed something, or may have.
    pub fn ask(&mut self) {
        self.due.get_or_insert(self.allowed);
    }

    /// Waits until it is to be done; for ever where nobody asked.
    pub async fn due(&self) {
        match self.due {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    /// Books a comparison, how long it took, and whether somebody else's changes were put back.
    ///
    /// Somebody who keeps changing the tables is answered more and more slowly; a quiet minute
    /// forgives. Where news are lost because others write a lot, comparing for nothing takes a
    /// fifth of the time at most.
    pub fn done(&mut self, changed: bool, took: Duration) {
        let now = Instant::now();
        self.due = None;
        if now.saturating_duration_since(self.allowed) > QUIET {
            self.pause = Duration::ZERO;
        }
        if changed {
            let before = self.pause;
            self.pause = (self.pause * 2).clamp(SHORTEST_PAUSE, LONGEST_RETRY);
            if self.pause > LOUD && self.pause != before {
                tracing::warn!(
                    "something keeps changing nftlet's tables; they are compared again in {:?}",
                    self.pause
                );
            }
        }
        self.allowed = now + self.pause.max(took * 4);
    }
}

/// When to report that network policies are not in force: again and again.
#[derive(Debug, Default)]
pub(super) struct Unenforced {
    next: Option<Instant>,
    /// Whether to say when they are in force again.
    announce: bool,
}

impl Unenforced {
    /// Books whether they are.
    pub fn book(&mut self, in_force: bool) {
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

    /// Waits until it is to be reported; for ever where they are.
    pub async fn due(&self) {
        match self.next {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    /// It was reported.
    pub fn reported(&mut self) {
        self.announce = true;
        self.next = Some(Instant::now() + UNENFORCED_EVERY);
    }

    /// Logs it when they are in force.
    pub fn announce(&mut self) {
        self.announce = true;
    }
}

/// Between three quarters and all of a duration, so that nodes do not retry in step.
pub(super) fn jittered(wait: Duration) -> Duration {
    let nanos = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |now| now.subsec_nanos());
    wait.mul_f64(0.75 + f64::from(nanos % 1000) / 4000.0)
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
    async fn each_part_has_its_own_pauses_which_grow_while_it_fails() {
        let mut retries = Retries::default();
        assert!(retries.is_empty());
        retries.book(SERVICES_FAILED);
        let start = Instant::now();
        let only_services = Parts {
            services: true,
            policies: false,
        };
        assert_eq!(retries.due().await, only_services);
        assert!(start.elapsed() <= SHORTEST_RETRY + Duration::from_millis(2));
        let mut before = start.elapsed();
        for _ in 0..5 {
            retries.book(SERVICES_FAILED);
            let start = Instant::now();
            assert_eq!(retries.due().await, only_services);
            assert!(start.elapsed() > before, "{:?}", start.elapsed());
            before = start.elapsed();
        }
        // The other one begins with a short pause, and is left alone by what becomes of the first.
        retries.book(SERVICES_FAILED);
        retries.book(POLICIES_FAILED);
        assert_eq!(retries.undisturbed(), Parts::default());
        let start = Instant::now();
        let due = retries.due().await;
        assert!(due.policies && !due.services);
        assert!(start.elapsed() <= SHORTEST_RETRY + Duration::from_millis(2));
        retries.book(Outcomes {
            services: Some(Outcome::Synced),
            policies: None,
        });
        let undisturbed = retries.undisturbed();
        assert!(undisturbed.services && !undisturbed.policies && !retries.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn policies_that_are_not_in_force_are_reported_every_five_minutes() {
        let mut unenforced = Unenforced::default();
        let waited = async |unenforced: &Unenforced| {
            let start = Instant::now();
            unenforced.due().await;
            start.elapsed().as_secs()
        };
        unenforced.book(false);
        tokio::time::advance(Duration::from_secs(20)).await;
        unenforced.book(false);
        assert_eq!(waited(&unenforced).await, 10);
        for _ in 0..3 {
            unenforced.reported();
            unenforced.book(false);
            assert_eq!(waited(&unenforced).await, 300);
        }
        unenforced.book(true);
        let day = Duration::from_secs(86_400);
        assert!(tokio::time::timeout(day, unenforced.due()).await.is_err());
        unenforced.book(false);
        assert_eq!(waited(&unenforced).await, 30, "it begins anew");
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_for_lists_is_not_tried_again_by_the_clock() {
        let mut retries = Retries::default();
        retries.book(SERVICES_FAILED);
        retries.book(Outcomes {
            services: Some(Outcome::Waiting),
            policies: None,
        });
        assert!(retries.is_empty());
        let day = Duration::from_secs(86_400);
        assert!(tokio::time::timeout(day, retries.due()).await.is_err());
    }
}
