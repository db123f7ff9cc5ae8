//! The reconciler as a task: waits for events, retries, stops.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::queries::{self, Query};
use super::schedule::{Healing, Retries, Unenforced};
use super::{Audits, Kernel, Outcome, Outcomes, Parts, Reconciler, Step, Verdict};
use crate::model::Delivery;
use crate::serve::health::Health;

/// The most events taken over at once; more wait for the next transaction.
const BATCH: usize = 4096;
/// How often, while the first rules wait, what is missing is logged and the tables are looked at for
/// what may keep it away.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest time between two such lines; each is twice as long as the one before.
const LONGEST_PATIENCE: Duration = Duration::from_secs(300);
/// How often services are tried again that the kernel refused.
const RETRY_QUARANTINED_EVERY: Duration = Duration::from_secs(300);

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
    /// What other threads ask.
    pub questions: Option<mpsc::Receiver<Query>>,
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
    let mut retries = Retries::default();
    let mut healing = Healing::default();
    let mut unenforced = Unenforced::default();
    let mut due: Option<Instant> = None;
    let mut forgive = Instant::now() + RETRY_QUARANTINED_EVERY;
    let (mut asked, mut answered) = (Instant::now(), Instant::now());
    let mut patience = Instant::now() + PATIENCE;
    let (mut waited, mut tell) = (PATIENCE, patience);
    let mut batch = Vec::new();
    let (mut open, mut ready) = (true, false);
    book_policies(reconciler, &mut unenforced, health);
    loop {
        let outcomes = tokio::select! {
            // What the clock asks for is seldom due and comes before the events, or those of a busy
            // cluster would put it off for ever. The same goes for questions: whoever asks waits
            // for the answer, so that events come to their turn.
            biased;
            _ = signals.stop.wait_for(|stop| *stop) => return Exit::Stopped,
            Some(question) = queries::next(&mut signals.questions) => {
                reconciler.answer(question);
                continue;
            }
            parts = retries.due() => reconciler.work(parts),
            () = healing.due() => {
                let started = Instant::now();
                let (outcomes, changed) = reconciler.heal();
                healing.done(changed, started.elapsed());
                outcomes
            }
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                reconciler.work(retries.undisturbed())
            }
            () = unenforced.due() => {
                reconciler.report_not_in_force();
                unenforced.reported();
                continue;
            }
            () = sleep_until(forgive) => {
                forgive = Instant::now() + RETRY_QUARANTINED_EVERY;
                reconciler.retry_quarantined();
                reconciler.work(retries.undisturbed())
            }
            () = sleep_until(asked + health.period()) => {
                asked = Instant::now();
                if let Err(error) = reconciler.ping_kernel() {
                    health.unanswered(answered.into_std(), error.to_string());
                    continue;
                }
                answered = asked;
                Outcomes::default()
            }
            step = next_step(&mut signals.audits), if ready => {
                let Some(audits) = &mut signals.audits else { continue };
                match step {
                    Step::Begin => reconciler.audit(audits),
                    Step::Judge(finding) => {
                        if reconciler.judge(audits, finding) == Verdict::Different {
                            healing.ask();
                        }
                    }
                }
                continue;
            }
            () = sleep_until(patience), if !ready => {
                patience += PATIENCE;
                reconciler.kernel.remove_foreign_hooks();
                if patience < tell {
                    continue;
                }
                tell = patience + waited;
                waited = (waited * 2).min(LONGEST_PATIENCE);
                let missing = reconciler.missing();
                if !missing.is_empty() {
                    let kinds: Vec<_> = missing.iter().map(|kind| kind.as_str()).collect();
                    tracing::info!("waiting for the complete list of {}", kinds.join(", "));
                }
                continue;
            }
            () = signals.foreign.notified(), if ready => {
                healing.ask();
                continue;
            }
            received = events.recv_many(&mut batch, BATCH), if open => {
                if received == 0 {
                    open = false;
                    if retries.is_empty() && !reconciler.has_more() {
                        return Exit::SourcesGone;
                    }
                    continue;
                }
                health.queued();
                reconciler.take_over(batch.drain(..));
                reconciler.work(retries.undisturbed())
            }
            // After the events, with which a portion is written as well. By way of the runtime,
            // which would look at no clock otherwise.
            () = tokio::task::yield_now(), if reconciler.has_more() => {
                reconciler.work(Parts::SERVICES)
            }
        };
        retries.book(outcomes);
        let node = reconciler.store().node();
        health.node_going_away(node.is_some_and(|node| node.going_away));
        due = reconciler.due().map(Instant::from_std);
        book_policies(reconciler, &mut unenforced, health);
        if outcomes.any(Outcome::Failed) {
            if signals.once {
                return Exit::Failed;
            }
            health.failed("the kernel refused the rules; see the log");
        } else if outcomes.any(Outcome::Waiting) {
            health.incomplete();
        } else if retries.is_empty() && reconciler.is_synced() {
            health.synced();
            if !std::mem::replace(&mut ready, true) {
                for told in signals.ready.drain(..) {
                    // Nobody may be waiting for it.
                    let _ = told.send(());
                }
                match reconciler.policies_in_force() {
                    Some(Err(_)) => {
                        tracing::info!(
                            "the rules are in place; network policies are not in force yet"
                        );
                        unenforced.announce();
                    }
                    Some(Ok(())) | None => tracing::info!("the rules are in place"),
                }
            }
            if signals.once && reconciler.policies_ready() && !reconciler.has_more() {
                return Exit::Programmed;
            }
            if reconciler.take_missed_notifications() {
                healing.ask();
            }
        }
        if !open && retries.is_empty() && !reconciler.has_more() {
            return Exit::SourcesGone;
        }
    }
}

/// Notes whether network policies are in force, where they are to be.
fn book_policies<K: Kernel>(
    reconciler: &Reconciler<'_, K>,
    unenforced: &mut Unenforced,
    health: &Health,
) {
    if let Some(in_force) = reconciler.policies_in_force() {
        reconciler
            .kernel
            .metrics
            .policies_in_force(in_force.is_ok());
        unenforced.book(in_force.is_ok());
        health.policies(in_force);
    }
}

/// Waits for the next step of an audit; for ever where there are none.
async fn next_step(audits: &mut Option<Audits>) -> Step {
    match audits {
        Some(audits) => audits.next().await,
        None => std::future::pending().await,
    }
}
