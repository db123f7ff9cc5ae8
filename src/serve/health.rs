//! The health of nftlet, and its answers to probes.
//!
//! The loop and the source set a [`Health`]; probes read it. `/healthz` says whether load balancers
//! should send traffic to this node, `/livez` whether a restart could help, and `/readyz` whether the
//! rules of services and of network policies were written once.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use tokio::sync::Notify;

/// How long a round of work may take before it counts as late, twice over; kube-proxy's
/// `--iptables-sync-period` and the like.
pub const PERIOD: Duration = Duration::from_secs(30);

/// What the health of nftlet depends on. Clones share it.
#[derive(Clone)]
pub struct Health {
    shared: Arc<Shared>,
}

struct Shared {
    period: Duration,
    outage: OnceLock<Box<dyn Fn() -> Option<Outage> + Send + Sync>>,
    clock: Box<dyn Fn() -> Moment + Send + Sync>,
    state: Mutex<State>,
    /// Wakes those that wait for the answer to `/readyz` to change.
    written: Notify,
}

#[derive(Default)]
struct State {
    last_synced: Option<SystemTime>,
    oldest_queued: Option<Instant>,
    failure: Option<String>,
    node_going_away: bool,
    /// Whether there are network policies to wait for.
    policies_expected: bool,
    policies_were_in_force: bool,
    /// What keeps them from being in force.
    policies_missing: Option<String>,
}

/// Something outside of this process that keeps changes from coming.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outage {
    /// When it was noticed.
    pub since: Instant,
    /// What it is.
    pub message: String,
}

/// One instant on both clocks: ages come from the one that nobody can set, what is shown from
/// the one on the wall.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// The clock that only runs forward.
    pub monotonic: Instant,
    /// The date and time.
    pub wall: SystemTime,
}

impl Moment {
    /// This very moment.
    pub fn now() -> Self {
        Self {
            monotonic: Instant::now(),
            wall: SystemTime::now(),
        }
    }
}

/// The questions that are asked about nftlet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// `/healthz`: should this node get traffic?
    Healthz,
    /// `/livez`: does nftlet keep up with the changes? Not answered with no while it waits for
    /// the cluster or while the node goes away, since a restart would mend neither.
    Livez,
    /// `/readyz`: did it write the rules of services and of network policies once?
    Readyz,
}

impl Probe {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Healthz, Self::Livez, Self::Readyz];

    /// The path of the probe.
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
pub struct Status {
    /// Whether the answer is yes.
    pub healthy: bool,
    /// When the rules were last known to be right; the current time while all is well, as with
    /// kube-proxy. Nothing before the first rules stand.
    pub last_updated: Option<SystemTime>,
    /// When the question was asked.
    pub current_time: SystemTime,
    /// Whether the node stays; only `/healthz` tells.
    pub node_eligible: Option<bool>,
    /// Why the answer is no.
    pub message: Option<String>,
}

impl Status {
    /// The HTTP status: 200 or 503.
    pub fn code(&self) -> u16 {
        if self.healthy { 200 } else { 503 }
    }

    /// The body, in JSON: kube-proxy's fields, times as RFC 3339 has them, and `message` where
    /// the answer is no.
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
    /// A new state, in which nothing was written yet. A change may wait for twice the period
    /// ([`PERIOD`]) before it makes nftlet unhealthy.
    pub fn new(period: Duration) -> Self {
        Self::with_clock(period, Moment::now)
    }

    /// As [`Health::new`], with the clock to read.
    pub fn with_clock(
        period: Duration,
        clock: impl Fn() -> Moment + Send + Sync + 'static,
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

    /// A change was received that is not in the kernel yet. Its age counts from now unless an
    /// older one waits already.
    pub fn queued(&self) {
        let now = self.moment().monotonic;
        self.state().oldest_queued.get_or_insert(now);
    }

    /// What was received cannot be written before more comes from the cluster, so that no change
    /// waits for the kernel.
    pub fn incomplete(&self) {
        self.state().oldest_queued = None;
    }

    /// The rules in the kernel are those wanted, with every change that was queued so far. One
    /// that came too late for this round is to be announced again with [`Health::queued`].
    pub fn synced(&self) {
        let now = self.moment().wall;
        let mut state = self.state();
        state.last_synced = Some(now);
        state.oldest_queued = None;
        state.failure = None;
        drop(state);
        self.shared.written.notify_waiters();
    }

    /// Writing the rules failed. What was to be written waits on, and `message` is shown once it
    /// has waited too long.
    pub fn failed(&self, message: impl Into<String>) {
        let now = self.moment().monotonic;
        let mut state = self.state();
        state.oldest_queued.get_or_insert(now);
        state.failure = Some(message.into());
    }

    /// Nobody knows whether the rules are in place: they were when last asked, at `since`, and now
    /// the kernel does not answer.
    pub fn unanswered(&self, since: Instant, message: impl Into<String>) {
        let mut state = self.state();
        state.oldest_queued.get_or_insert(since);
        state.failure = Some(message.into());
    }

    /// The time a round of work may take, twice over, before it counts as late.
    pub fn period(&self) -> Duration {
        self.shared.period
    }

    /// Tells whether the node is being deleted or is about to be (the taint
    /// `ToBeDeletedByClusterAutoscaler`).
    pub fn node_going_away(&self, going: bool) {
        self.state().node_going_away = going;
    }

    /// Has `/readyz` wait for network policies.
    pub fn expect_policies(&self) {
        self.state().policies_expected = true;
    }

    /// Notes that network policies are in force, or what keeps them from being so.
    pub fn policies(&self, in_force: Result<(), String>) {
        let mut state = self.state();
        state.policies_were_in_force |= in_force.is_ok();
        state.policies_missing = in_force.err();
        drop(state);
        self.shared.written.notify_waiters();
    }

    /// Names whom to ask whether changes still come from the cluster. The first one named is asked
    /// with every `/healthz`.
    pub fn depends_on(&self, outage: impl Fn() -> Option<Outage> + Send + Sync + 'static) {
        // A second one would be a mistake of the composition root, and changes nothing.
        let _ = self.shared.outage.set(Box::new(outage));
    }

    /// Whether the rules have been written once.
    pub fn ready(&self) -> bool {
        self.state().last_synced.is_some()
    }

    /// Waits until the answer to `/readyz` is yes.
    pub async fn until_ready(&self) {
        loop {
            let written = self.shared.written.notified();
            if self.readyz().healthy {
                return;
            }
            written.await;
        }
    }

    /// Whether the rules are in place and follow the changes. The fate of the node, which
    /// `/healthz` tells as well, does not count.
    pub fn proxy_healthy(&self) -> bool {
        let now = self.moment();
        let state = self.state();
        state.last_synced.is_some() && self.late(&state, now).is_none()
    }

    /// Answers a probe.
    pub fn status(&self, probe: Probe) -> Status {
        match probe {
            Probe::Healthz => self.healthz(),
            Probe::Livez => self.livez(),
            Probe::Readyz => self.readyz(),
        }
    }

    /// The answer to `/healthz`: no before the rules have been written once, while a change has
    /// waited too long, while changes have not come for a period, and while the node goes away.
    pub fn healthz(&self) -> Status {
        let now = self.moment();
        let state = self.state();
        let mut reasons = Vec::new();
        if state.node_going_away {
            reasons
                .push("the node is being removed, so traffic is to go to other nodes".to_owned());
        }
        match self.late(&state, now) {
            Some(late) => reasons.push(late),
            None => reasons.extend(unwritten(&state)),
        }
        reasons.extend(self.cut_off(now));
        let eligible = !state.node_going_away;
        Status::new(now, &state, Some(eligible), reasons)
    }

    /// The answer to `/livez`: no while a change has waited too long.
    pub fn livez(&self) -> Status {
        let now = self.moment();
        let state = self.state();
        let reasons = self.late(&state, now).into_iter().collect();
        Status::new(now, &state, None, reasons)
    }

    /// The answer to `/readyz`: no before the rules of services were written once, and those of
    /// network policies where they are to be enforced.
    pub fn readyz(&self) -> Status {
        let now = self.moment();
        let state = self.state();
        let mut reasons: Vec<String> = unwritten(&state).into_iter().collect();
        if state.policies_expected && !state.policies_were_in_force {
            let missing = state.policies_missing.as_deref();
            let missing = missing.unwrap_or("the objects have not been read completely");
            reasons.push(format!("network policies are not in force: {missing}"));
        }
        Status::new(now, &state, None, reasons)
    }

    /// Says so where the oldest change has waited too long.
    fn late(&self, state: &State, now: Moment) -> Option<String> {
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

    /// Says so where no changes have come for too long. Noticing that took some time, so that a
    /// period is left of the two that a change may wait.
    fn cut_off(&self, now: Moment) -> Option<String> {
        let outage = self.shared.outage.get()?()?;
        let lasts = now.monotonic.saturating_duration_since(outage.since);
        (lasts >= self.shared.period).then(|| {
            let lasts = lasts.as_secs();
            format!("no changes have come for {lasts} s: {}", outage.message)
        })
    }

    fn moment(&self) -> Moment {
        (self.shared.clock)()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is a plain assignment, so a panic elsewhere leaves it whole.
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says so where the rules of services have never been written.
fn unwritten(state: &State) -> Option<String> {
    let failure = state.failure.as_deref();
    let failure = failure.unwrap_or("the services of the cluster have not been read completely");
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

impl Status {
    fn new(now: Moment, state: &State, eligible: Option<bool>, reasons: Vec<String>) -> Self {
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

/// A time in JSON; null for one so far away that it has no date.
fn rfc3339(time: SystemTime) -> Value {
    jiff::Timestamp::try_from(time).map_or(Value::Null, |time| time.to_string().into())
}

#[cfg(test)]
mod tests;
