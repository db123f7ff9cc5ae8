//! The main loop: waits for events, retries, repairs, and stops.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::audit::{AuditOutcome, AuditStep};
use super::queries::{self, Query};
use super::schedule::{Healing, Retries, Unenforced};
use super::{Audits, Controller, Engines, Kernel, Outcome, Outcomes};
use crate::backoff::Backoff;
use crate::model::Delivery;
use crate::serve::health::Health;

/// The most events of one transaction.
const BATCH: usize = 4096;
/// The interval of checks for foreign base chains before the first rules are written.
const HOOK_CHECKS: Duration = Duration::from_secs(5);
/// The first pause before missing lists are logged.
const FIRST_PATIENCE: Duration = Duration::from_secs(5);
/// The longest pause between two such lines.
const LONGEST_PATIENCE: Duration = Duration::from_secs(300);
/// How long the Node object may be without the ranges of its pods, which a controller adds. kube-proxy
/// waits as long before it gives up.
const NETWORK_PATIENCE: Duration = Duration::from_secs(30);
/// The interval at which refused objects are retried.
const RETRY_QUARANTINED_EVERY: Duration = Duration::from_secs(300);

/// Inputs of the main loop other than events.
#[derive(Debug)]
pub struct Signals {
    /// Becomes true to stop the loop.
    pub stop: watch::Receiver<bool>,
    /// Return after the first write.
    pub once: bool,
    /// Notified when another process changed the tables.
    pub foreign: Arc<Notify>,
    /// Notified when notifications about such changes were missed.
    pub missed: Arc<Notify>,
    /// Compares the kernel with what was written after notifications were missed. Without it the loop
    /// compares by itself.
    pub audits: Option<Audits>,
    /// Notified when the first rules are in force.
    pub ready: Vec<oneshot::Sender<()>>,
    /// Queries from other threads.
    pub queries: Option<mpsc::Receiver<Query>>,
}

/// The reason why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It was stopped. The rules remain in force.
    Stopped,
    /// With `once`: the rules were written.
    Programmed,
    /// All sources of events ended.
    SourcesGone,
    /// With `once`: the rules could not be written.
    Failed,
    /// The Node object does not say which network is closed before its pods are known.
    NoPodNetwork,
}

/// Handles events until stopped. Writing to the kernel blocks, so call this on a thread of its own.
pub async fn run<K: Kernel>(
    controller: &mut Controller<'_, K>,
    mut events: mpsc::Receiver<Delivery>,
    mut signals: Signals,
    health: &Health,
) -> Exit {
    let mut retries = Retries::default();
    let mut healing = Healing::default();
    let mut unenforced = Unenforced::default();
    let mut due: Option<Instant> = None;
    let mut retry_quarantined = Instant::now() + RETRY_QUARANTINED_EVERY;
    let (mut pinged, mut answered) = (Instant::now(), Instant::now());
    let mut hook_check = Instant::now() + HOOK_CHECKS;
    let mut log_at = Instant::now() + FIRST_PATIENCE;
    let mut log_pauses = Backoff::new(FIRST_PATIENCE, LONGEST_PATIENCE);
    let compared = controller.kernel.reader().map(|reader| reader.done());
    let mut batch = Vec::new();
    let (mut open, mut ready) = (true, false);
    let mut network_due = None;
    retries.record(controller.start());
    record_policies(controller, &mut unenforced, health);
    loop {
        let outcomes = tokio::select! {
            // Timers come before events, or a steady flow of events would delay them for ever.
            // Queries do too; each sender waits for its answer, so they cannot starve events.
            biased;
            _ = signals.stop.wait_for(|stop| *stop) => return Exit::Stopped,
            Some(query) = queries::next(&mut signals.queries) => {
                controller.answer(query);
                continue;
            }
            engines = retries.due() => controller.work(engines),
            () = notified(compared.as_deref()) => controller.work(retries.without_retry()),
            () = healing.due() => {
                let started = Instant::now();
                let (outcomes, changed) = controller.heal();
                healing.done(changed, started.elapsed());
                outcomes
            }
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                controller.work(retries.without_retry())
            }
            () = unenforced.due() => {
                controller.report_not_in_force();
                unenforced.reported();
                continue;
            }
            () = sleep_until(network_due.unwrap_or_else(Instant::now)), if network_due.is_some() => {
                return Exit::NoPodNetwork;
            }
            () = sleep_until(retry_quarantined) => {
                retry_quarantined = Instant::now() + RETRY_QUARANTINED_EVERY;
                controller.retry_quarantined();
                controller.work(retries.without_retry())
            }
            () = sleep_until(pinged + health.period()) => {
                pinged = Instant::now();
                if let Err(error) = controller.ping_kernel() {
                    health.unanswered(answered.into_std(), error.to_string());
                    continue;
                }
                answered = pinged;
                Outcomes::default()
            }
            step = next_step(&mut signals.audits), if ready => {
                let Some(audits) = &mut signals.audits else { continue };
                match step {
                    AuditStep::Begin => controller.audit(audits),
                    AuditStep::Judge(finding) => match controller.judge(audits, finding) {
                        AuditOutcome::Different | AuditOutcome::Unknown => healing.request(),
                        AuditOutcome::Same => health.audited(),
                        AuditOutcome::Again => {}
                    },
                }
                continue;
            }
            () = sleep_until(hook_check), if !ready => {
                hook_check += HOOK_CHECKS;
                retries.record(controller.restore_before_lists());
                if hook_check < log_at {
                    continue;
                }
                log_at = hook_check + log_pauses.next();
                let missing = controller.missing();
                if !missing.is_empty() {
                    let kinds: Vec<_> = missing.iter().map(|kind| kind.as_str()).collect();
                    tracing::info!("waiting for the complete list of {}", kinds.join(", "));
                }
                continue;
            }
            () = signals.foreign.notified(), if ready => {
                healing.request();
                continue;
            }
            () = signals.missed.notified(), if ready => {
                request_audit(&mut signals.audits, &mut healing);
                continue;
            }
            received = events.recv_many(&mut batch, BATCH), if open => {
                if received == 0 {
                    open = false;
                    if retries.is_empty() && !controller.is_at_work() {
                        return Exit::SourcesGone;
                    }
                    continue;
                }
                health.queued();
                controller.apply(batch.drain(..));
                controller.work(retries.without_retry())
            }
            // After events, which also write a portion. Yields to the runtime, which would not check
            // timers otherwise.
            () = tokio::task::yield_now(), if controller.has_more() => {
                controller.work(Engines::SERVICES)
            }
        };
        retries.record(outcomes);
        let node = controller.store().node();
        health.node_going_away(node.is_some_and(|node| node.going_away));
        due = controller.due().map(Instant::from_std);
        network_due = controller
            .node_lacks_pod_network()
            .then(|| network_due.unwrap_or_else(|| Instant::now() + NETWORK_PATIENCE));
        record_policies(controller, &mut unenforced, health);
        if outcomes.any(Outcome::Failed) {
            if signals.once {
                return Exit::Failed;
            }
            health.failed("the kernel refused the rules; see the log");
        } else if outcomes.any(Outcome::Comparing) {
            // Changes wait for the kernel.
        } else if outcomes.any(Outcome::Waiting) {
            health.incomplete();
        } else if retries.is_empty() && controller.is_synced() {
            health.synced();
            if !std::mem::replace(&mut ready, true) {
                for ready in signals.ready.drain(..) {
                    // The receiver may have ended.
                    let _ = ready.send(());
                }
                match controller.policies_in_force() {
                    Some(Err(_)) => {
                        tracing::info!(
                            "the rules are in place; network policies are not in force yet"
                        );
                        unenforced.announce();
                    }
                    Some(Ok(())) | None => tracing::info!("the rules are in place"),
                }
            }
            if signals.once && controller.policies_ready() && !controller.has_more() {
                return Exit::Programmed;
            }
            if controller.take_missed_notifications() {
                request_audit(&mut signals.audits, &mut healing);
            }
        }
        if !open && retries.is_empty() && !controller.is_at_work() {
            return Exit::SourcesGone;
        }
    }
}

/// Records whether network policies are in force, if there are any.
fn record_policies<K: Kernel>(
    controller: &Controller<'_, K>,
    unenforced: &mut Unenforced,
    health: &Health,
) {
    if let Some(in_force) = controller.policies_in_force() {
        controller
            .kernel
            .metrics
            .set_policies_in_force(in_force.is_ok());
        unenforced.record(in_force.is_ok());
        health.policies(in_force);
    }
}

/// Has the kernel compared after notifications were missed.
fn request_audit(audits: &mut Option<Audits>, healing: &mut Healing) {
    match audits {
        Some(audits) => audits.request(),
        None => healing.request(),
    }
}

/// Waits for a notification; forever without one.
async fn notified(notify: Option<&Notify>) {
    match notify {
        Some(notify) => notify.notified().await,
        None => std::future::pending().await,
    }
}

/// Waits for the next step of an audit; forever without audits.
async fn next_step(audits: &mut Option<Audits>) -> AuditStep {
    match audits {
        Some(audits) => audits.next().await,
        None => std::future::pending().await,
    }
}
