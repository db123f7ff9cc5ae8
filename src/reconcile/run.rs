//! The reconciler as a task: waits for events, retries, stops.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::questions::{self, Question};
use super::{Audits, Kernel, Outcome, Reconciler, Step, Verdict};
use crate::health::Health;
use crate::model::Delivery;

/// The most events taken over at once; more wait for the next transaction.
const BATCH: usize = 4096;
const SHORTEST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// How often someone who waits for the first rules is told what is missing.
const PATIENCE: Duration = Duration::from_secs(5);
/// The first pause between two answers to foreign changes.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
/// Pauses longer than this are worth a warning.
const LOUD: Duration = Duration::from_secs(2);
/// Tables left alone for so long are answered for at once again.
const QUIET: Duration = Duration::from_secs(60);
/// How often services are tried again that the kernel refused.
const FORGIVE_EVERY: Duration = Duration::from_secs(300);

/// What tells the task to do something else than handling events.
#[derive(Debug)]
pub struct Signals {
    /// Becomes true when the process shall end.
    pub stop: watch::Receiver<bool>,
    /// Return after the first successful write.
    pub once: bool,
    /// Told when somebody else changed the tables.
    pub foreign: Arc<Notify>,
    /// Compares the kernel with what is wanted every so often.
    pub audits: Option<Audits>,
    /// All told when the first rules are in force.
    pub ready: Vec<oneshot::Sender<()>>,
    /// What others ask the policies.
    pub questions: Option<mpsc::Receiver<Question>>,
}

/// Why the task ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It was asked to; the rules stay.
    Stopped,
    /// The rules were written, once, as asked.
    Programmed,
    /// All sources are gone and no event can come any more.
    SourcesGone,
    /// With `once`: the kernel could not be brought to the wanted state.
    Failed,
}

/// Handles events until asked to stop.
///
/// Writing to the kernel blocks the calling thread, so the task wants a thread of its own.
pub async fn run<K: Kernel>(
    reconciler: &mut Reconciler<'_, K>,
    mut events: mpsc::Receiver<Delivery>,
    mut signals: Signals,
    health: &Health,
) -> Exit {
    let mut retry: Option<(Instant, Duration)> = None;
    let mut sweep: Option<Instant> = None;
    let mut forgive = Instant::now() + FORGIVE_EVERY;
    let mut batch = Vec::new();
    let mut healing = Healing::default();
    let (mut open, mut ready) = (true, false);
    let mut patience = Instant::now() + PATIENCE;
    loop {
        let retry_at = retry.map(|(at, _)| at);
        let outcome = tokio::select! {
            biased;
            _ = signals.stop.wait_for(|stop| *stop) => return Exit::Stopped,
            // Before the events, or those of a busy cluster would let nobody ask. Whoever asks
            // waits for the answer, so that events come to their turn.
            Some(question) = questions::next(&mut signals.questions) => {
                reconciler.answer(question);
                continue;
            }
            received = events.recv_many(&mut batch, BATCH), if open => {
                if received == 0 {
                    open = false;
                    if retry.is_none() {
                        return Exit::SourcesGone;
                    }
                    continue;
                }
                health.queued();
                if retry.is_some() {
                    reconciler.take_over(batch.drain(..));
                    continue;
                }
                reconciler.handle(batch.drain(..))
            }
            () = sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => {
                reconciler.handle([])
            }
            () = sleep_until(sweep.unwrap_or_else(Instant::now)), if sweep.is_some() => {
                sweep = None;
                reconciler.remove_unused_chains()
            }
            () = signals.foreign.notified(), if ready => {
                healing.due.get_or_insert(healing.allowed);
                continue;
            }
            () = sleep_until(healing.due.unwrap_or(healing.allowed)), if healing.due.is_some() => {
                let started = Instant::now();
                let (outcome, changed) = reconciler.heal();
                healing.done(changed, started.elapsed());
                outcome
            }
            step = next_step(&mut signals.audits), if ready => {
                let Some(audits) = &mut signals.audits else { continue };
                match step {
                    Step::Begin => reconciler.audit(audits),
                    Step::Judge(finding) => {
                        if reconciler.judge(audits, finding) == Verdict::Different {
                            healing.due.get_or_insert(healing.allowed);
                        }
                    }
                }
                continue;
            }
            () = sleep_until(patience), if !ready => {
                patience += PATIENCE;
                let missing = reconciler.missing();
                if !missing.is_empty() {
                    let kinds: Vec<_> = missing.iter().map(|kind| kind.as_str()).collect();
                    tracing::info!("waiting for the complete list of {}", kinds.join(", "));
                }
                continue;
            }
            () = sleep_until(forgive) => {
                forgive = Instant::now() + FORGIVE_EVERY;
                reconciler.forgive();
                reconciler.handle([])
            }
        };
        match outcome {
            Outcome::Waiting => health.incomplete(),
            Outcome::Synced => {
                retry = None;
                health.synced();
                let going = reconciler
                    .store()
                    .node()
                    .is_some_and(|node| node.going_away);
                health.node_going_away(going);
                if !std::mem::replace(&mut ready, true) {
                    for told in signals.ready.drain(..) {
                        // Nobody may be waiting for it.
                        let _ = told.send(());
                    }
                    tracing::info!("the rules are in place");
                }
                if signals.once && reconciler.policies_ready() {
                    return Exit::Programmed;
                }
                if reconciler.take_doubt() {
                    healing.due.get_or_insert(healing.allowed);
                }
                sweep = reconciler
                    .unused_chains_due()
                    .map(|wait| Instant::now() + wait);
            }
            Outcome::Failed if signals.once => return Exit::Failed,
            Outcome::Failed => {
                health.failed("the kernel refused the rules; see the log");
                let wait = retry.map_or(SHORTEST_RETRY, |(_, wait)| (wait * 2).min(LONGEST_RETRY));
                retry = Some((Instant::now() + jittered(wait), wait));
            }
        }
        if !open && retry.is_none() {
            return Exit::SourcesGone;
        }
    }
}

/// Waits for the next step of an audit; for ever where there are none.
async fn next_step(audits: &mut Option<Audits>) -> Step {
    match audits {
        Some(audits) => audits.next().await,
        None => std::future::pending().await,
    }
}

/// When to put back what somebody else changed: at once, unless it happens again and again.
struct Healing {
    /// When to do it, once somebody changed something.
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
    /// Books a comparison, how long it took, and whether there was something to put back.
    ///
    /// Somebody who keeps changing the tables is answered more and more slowly; a quiet minute
    /// forgives. Where news are lost because others write a lot, comparing for nothing takes a
    /// fifth of the time at most.
    fn done(&mut self, changed: bool, took: Duration) {
        let now = Instant::now();
        self.due = None;
        if now.saturating_duration_since(self.allowed) > QUIET {
            self.pause = Duration::ZERO;
        }
        if changed {
            self.pause = (self.pause * 2).clamp(SHORTEST_PAUSE, LONGEST_RETRY);
            if self.pause > LOUD {
                tracing::warn!(
                    "something keeps changing nftlet's tables; they are compared again in {:?}",
                    self.pause
                );
            }
        }
        self.allowed = now + self.pause.max(took * 4);
    }
}

/// Between three quarters and all of a duration, so that nodes do not retry in step.
pub(super) fn jittered(wait: Duration) -> Duration {
    let nanos = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |now| now.subsec_nanos());
    wait.mul_f64(0.75 + f64::from(nanos % 1000) / 4000.0)
}
