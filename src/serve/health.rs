//! The health of nftlet, and its answers to probes.
//!
//! The main loop and the source set a [`Health`]; probes read it. `/healthz` shows whether load
//! balancers should send traffic to this node, `/livez` whether nftlet should be restarted, and
//! `/readyz` whether the rules of services and of network policies have been written once.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::mutex::lock;

/// Half the time after which an unwritten change makes nftlet unhealthy: the default of
/// kube-proxy's `nftables.syncPeriod`.
pub const PERIOD: Duration = Duration::from_secs(30);

/// The state from which probes are answered. Clones share it.
#[derive(Clone)]
pub struct Health {
    shared: Arc<Shared>,
}

struct Shared {
    period: Duration,
    outage: OnceLock<Box<dyn Fn() -> Option<Outage> + Send + Sync>>,
    clock: Box<dyn Fn() -> ClockReading + Send + Sync>,
    state: Mutex<HealthState>,
    /// Wakes requests that wait for a change of the answer to `/readyz`.
    written: Notify,
}

#[derive(Default)]
struct HealthState {
    last_synced: Option<SystemTime>,
    /// When the last change took effect.
    in_step_since: Option<SystemTime>,
    last_audit: Option<SystemTime>,
    oldest_queued: Option<Instant>,
    failure: Option<String>,
    node_going_away: bool,
    /// Whether `/readyz` waits for network policies.
    policies_expected: bool,
    policies_were_in_force: bool,
    /// Why the policies are not in force.
    policies_missing: Option<String>,
}

/// A condition outside of this process that keeps changes from arriving.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outage {
    /// When it was noticed.
    pub since: Instant,
    /// The cause, as probes show it.
    pub message: String,
}

/// One instant on two clocks: the monotonic one for ages, the wall clock for display.
#[derive(Clone, Copy, Debug)]
pub struct ClockReading {
    /// The time of the monotonic clock.
    pub monotonic: Instant,
    /// The time of the wall clock.
    pub wall: SystemTime,
}

impl ClockReading {
    /// Reads both clocks.
    pub fn now() -> Self {
        Self {
            monotonic: Instant::now(),
            wall: SystemTime::now(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// `/healthz`: whether this node should get traffic.
    Healthz,
    /// `/livez`: whether nftlet writes changes in time. It does not fail while the API server is
    /// unreachable or the node is being removed, since a restart would not help.
    Livez,
    /// `/readyz`: whether the rules of services and of network policies have been written once.
    Readyz,
}

impl Probe {
    pub const ALL: [Self; 3] = [Self::Healthz, Self::Livez, Self::Readyz];

    pub fn path(self) -> &'static str {
        match self {
            Self::Healthz => "/healthz",
            Self::Livez => "/livez",
            Self::Readyz => "/readyz",
        }
    }
}

/// The answer to a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeStatus {
    /// Whether the probe succeeds.
    pub healthy: bool,
    /// When the rules were last known to be correct; now, while healthy. `None` before the first
    /// rules are in force.
    pub last_updated: Option<SystemTime>,
    /// The time of the request.
    pub current_time: SystemTime,
    /// Whether the node stays; only for `/healthz`.
    pub node_eligible: Option<bool>,
    /// Why the probe fails.
    pub message: Option<String>,
}

impl ProbeStatus {
    /// Returns the HTTP status: 200 or 503.
    pub fn code(&self) -> u16 {
        if self.healthy { 200 } else { 503 }
    }

    /// Returns the body in JSON: kube-proxy's fields, with times in the format of RFC 3339, and
    /// `message` if the probe fails.
    pub fn body(&self) -> String {
        let mut body = json!({
            "lastUpdated": self.last_updated.map_or(Value::Null, rfc3339),
            "currentTime": rfc3339(self.current_time),
        });
        if let Some(fields) = body.as_object_mut() {
            if let Some(eligible) = self.node_eligible {
                fields.insert("nodeEligible".to_owned(), eligible.into());
            }
            if let Some(message) = &self.message {
                fields.insert("message".to_owned(), message.as_str().into());
            }
        }
        body.to_string()
    }
}

impl Health {
    /// Creates a state in which no rules are written yet. A change may wait for twice the period
    /// (normally [`PERIOD`]) before it makes nftlet unhealthy.
    pub fn new(period: Duration) -> Self {
        Self::with_clock(period, ClockReading::now)
    }

    /// Creates a state as [`Health::new`] does, with another clock.
    pub fn with_clock(
        period: Duration,
        clock: impl Fn() -> ClockReading + Send + Sync + 'static,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                period,
                outage: OnceLock::new(),
                clock: Box::new(clock),
                state: Mutex::default(),
                written: Notify::new(),
            }),
        }
    }

    /// Records that a change was received and is not in the kernel yet. Its age counts from now
    /// unless an older one waits already.
    pub fn queued(&self) {
        let now = self.read_clock().monotonic;
        self.state().oldest_queued.get_or_insert(now);
    }

    /// Records that the received changes cannot be written before more objects arrive from the
    /// cluster, so that no change waits for the kernel.
    pub fn incomplete(&self) {
        self.state().oldest_queued = None;
    }

    /// Records that the rules in the kernel include every change queued so far. Call
    /// [`Health::queued`] again for a change that arrived too late to be included.
    pub fn synced(&self) {
        let now = self.read_clock().wall;
        let mut state = self.state();
        let had_changes = state.oldest_queued.is_some() || state.failure.is_some();
        if had_changes || state.last_synced.is_none() {
            state.in_step_since = Some(now);
        }
        state.last_synced = Some(now);
        state.oldest_queued = None;
        state.failure = None;
        drop(state);
        self.shared.written.notify_waiters();
    }

    /// Records that writing the rules failed. Their changes keep waiting, and `message` is shown
    /// once they have waited too long.
    pub fn failed(&self, message: impl Into<String>) {
        let now = self.read_clock().monotonic;
        let mut state = self.state();
        state.oldest_queued.get_or_insert(now);
        state.failure = Some(message.into());
    }

    /// Records that the kernel does not answer; it last answered at `since`.
    pub fn unanswered(&self, since: Instant, message: impl Into<String>) {
        let mut state = self.state();
        state.oldest_queued.get_or_insert(since);
        state.failure = Some(message.into());
    }

    /// Returns half the time that a change may wait before it makes nftlet unhealthy.
    pub fn period(&self) -> Duration {
        self.shared.period
    }

    /// Records whether the node is being deleted or is about to be (the taint
    /// `ToBeDeletedByClusterAutoscaler`).
    pub fn node_going_away(&self, going: bool) {
        self.state().node_going_away = going;
    }

    /// Makes `/readyz` wait for network policies.
    pub fn expect_policies(&self) {
        self.state().policies_expected = true;
    }

    /// Records that network policies are in force, or why they are not.
    pub fn policies(&self, in_force: Result<(), String>) {
        let mut state = self.state();
        state.policies_were_in_force |= in_force.is_ok();
        state.policies_missing = in_force.err();
        drop(state);
        self.shared.written.notify_waiters();
    }

    /// Sets the function that reports an outage of the source. Only the first call has an effect.
    pub fn depends_on(&self, outage: impl Fn() -> Option<Outage> + Send + Sync + 'static) {
        // The agent sets it once.
        let _ = self.shared.outage.set(Box::new(outage));
    }

    /// Records that the kernel's tables were compared with the wanted rules.
    pub fn audited(&self) {
        let now = self.read_clock().wall;
        self.state().last_audit = Some(now);
    }

    /// Returns when the last change took effect, and when the tables were compared, in the format of
    /// RFC 3339.
    pub(crate) fn times(&self) -> [Option<String>; 2] {
        let state = self.state();
        [state.in_step_since, state.last_audit].map(|time| in_seconds(time?))
    }

    /// Returns whether the rules of services have been written once.
    pub fn ready(&self) -> bool {
        self.state().last_synced.is_some()
    }

    /// Waits until `/readyz` succeeds.
    pub async fn until_ready(&self) {
        loop {
            let written = self.shared.written.notified();
            if self.readyz().healthy {
                return;
            }
            written.await;
        }
    }

    /// Returns whether the rules are in place and changes are written in time, whether or not the
    /// node is being removed.
    pub fn proxy_healthy(&self) -> bool {
        let now = self.read_clock();
        let state = self.state();
        state.last_synced.is_some() && self.late(&state, now).is_none()
    }

    /// Answers a probe.
    pub fn status(&self, probe: Probe) -> ProbeStatus {
        match probe {
            Probe::Healthz => self.healthz(),
            Probe::Livez => self.livez(),
            Probe::Readyz => self.readyz(),
        }
    }

    /// Answers `/healthz`. It fails before the rules have been written once, while a change has
    /// waited too long, while the source has been cut off for a period, and while the node is being
    /// removed.
    pub fn healthz(&self) -> ProbeStatus {
        let now = self.read_clock();
        let state = self.state();
        let mut reasons = Vec::new();
        if state.node_going_away {
            reasons.push("the node is being removed; send traffic to other nodes".to_owned());
        }
        match self.late(&state, now) {
            Some(late) => reasons.push(late),
            None => reasons.extend(unwritten(&state)),
        }
        reasons.extend(self.cut_off(now));
        let eligible = !state.node_going_away;
        ProbeStatus::new(now, &state, Some(eligible), reasons)
    }

    /// Answers `/livez`. It fails while a change has waited too long.
    pub fn livez(&self) -> ProbeStatus {
        let now = self.read_clock();
        let state = self.state();
        let reasons = self.late(&state, now).into_iter().collect();
        ProbeStatus::new(now, &state, None, reasons)
    }

    /// Answers `/readyz`. It fails before the rules of services and, if they are enforced, of
    /// network policies have been written once.
    pub fn readyz(&self) -> ProbeStatus {
        let now = self.read_clock();
        let state = self.state();
        let mut reasons: Vec<String> = unwritten(&state).into_iter().collect();
        if state.policies_expected && !state.policies_were_in_force {
            let missing = state.policies_missing.as_deref();
            let missing = missing.unwrap_or("the objects have not been read completely");
            reasons.push(format!("network policies are not in force: {missing}"));
        }
        ProbeStatus::new(now, &state, None, reasons)
    }

    /// Returns a message if the oldest change has waited too long.
    fn late(&self, state: &HealthState, now: ClockReading) -> Option<String> {
        let waited = now
            .monotonic
            .saturating_duration_since(state.oldest_queued?);
        (waited >= self.shared.period.saturating_mul(2)).then(|| {
            let waited = waited.as_secs();
            match &state.failure {
                Some(failure) => format!(
                    "changes have waited for {waited} s to be written to the kernel; the last attempt failed: {failure}"
                ),
                None => format!("changes have waited for {waited} s to be written to the kernel"),
            }
        })
    }

    /// Returns a message if no changes have arrived for too long. That is one period instead of
    /// two, since it takes time to notice an outage.
    fn cut_off(&self, now: ClockReading) -> Option<String> {
        let outage = self.shared.outage.get()?()?;
        let lasts = now.monotonic.saturating_duration_since(outage.since);
        (lasts >= self.shared.period).then(|| {
            let lasts = lasts.as_secs();
            format!("no changes have come for {lasts} s: {}", outage.message)
        })
    }

    fn read_clock(&self) -> ClockReading {
        (self.shared.clock)()
    }

    fn state(&self) -> MutexGuard<'_, HealthState> {
        lock(&self.shared.state)
    }
}

/// Returns a message if no rules have ever been written.
fn unwritten(state: &HealthState) -> Option<String> {
    let failure = state.failure.as_deref();
    let failure = failure.unwrap_or("the objects of the cluster have not been read completely");
    let unwritten = state.last_synced.is_none();
    unwritten.then(|| format!("no rules are written yet: {failure}"))
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Health")
            .field("status", &self.healthz())
            .finish_non_exhaustive()
    }
}

impl ProbeStatus {
    fn new(
        now: ClockReading,
        state: &HealthState,
        eligible: Option<bool>,
        reasons: Vec<String>,
    ) -> Self {
        let healthy = reasons.is_empty();
        Self {
            healthy,
            last_updated: if healthy && state.last_synced.is_some() {
                Some(now.wall)
            } else {
                state.last_synced
            },
            current_time: now.wall,
            node_eligible: eligible,
            message: (!healthy).then(|| reasons.join("; ")),
        }
    }
}

/// Returns a time in the format of RFC 3339, in whole seconds.
pub(crate) fn in_seconds(time: SystemTime) -> Option<String> {
    let time = jiff::Timestamp::try_from(time).ok()?;
    Some(time.round(jiff::Unit::Second).unwrap_or(time).to_string())
}

/// Formats a time for JSON; null if it is out of the range of dates.
fn rfc3339(time: SystemTime) -> Value {
    jiff::Timestamp::try_from(time).map_or(Value::Null, |time| time.to_string().into())
}

#[cfg(test)]
mod tests;
