//! Comparing the kernel with what is wanted every so often, whether or not somebody was heard
//! changing it.
//!
//! ```text
//! run ── Snapshot ──> thread "audit": reads, compares ── Finding ──> run: heal, if it is certain
//! ```
//!
//! Reading large tables takes half a second, during which no change may wait. So another thread
//! reads them, through a socket of its own, and compares with a copy of what was written. The
//! reconciler goes on writing meanwhile, and then a difference may be its own work. Such a
//! difference counts only when it is there in two rounds one after the other: what the reconciler
//! wrote during the first one is in the copy for the second.
//!
//! The kernel interrupts the reading of a table that is written, so an audit that is due waits for
//! a moment without transactions. Where none comes, the generation of the kernel's ruleset tells
//! whether anybody else wrote; if so, the tables are read nevertheless.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::sync::mpsc as blocking;
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::programmed::Programmed;
use super::schedule::jittered;
use super::{Kernel, State};
use crate::compile::TABLE;
use crate::netlink::Error;
use crate::policy;
use crate::ruleset::{Op, Ruleset, Transaction, diff};

/// How often the kernel is compared.
pub const EVERY: Duration = Duration::from_secs(600);
/// How many rounds in a row the reconciler may disturb before the next audit is waited for.
const MOST_ROUNDS: u32 = 8;
/// How many times in the period of the audits one that is due may look for calm. Between two looks
/// nothing may be written: a second with the usual period.
const LOOKS_IN_PERIOD: u32 = 600;
/// How many looks there are at most.
const MOST_LOOKS: u32 = 60;

/// What was written, for a thread that compares it with the kernel.
#[derive(Debug)]
pub struct Snapshot {
    services: Programmed,
    policies: Option<Ruleset>,
    /// How many transactions were written before.
    writes: u64,
}

/// In what the kernel differs: operations and elements, as hashes.
pub(super) type Difference = HashSet<u64>;

/// What came out of a comparison.
#[derive(Debug)]
pub struct Finding {
    difference: Result<Difference, Error>,
    /// As in the snapshot.
    writes: u64,
}

/// What is to be done next.
#[derive(Debug)]
pub enum Step {
    /// The comparer waits for a snapshot.
    Begin,
    /// It has compared one.
    Judge(Finding),
}

/// Whether now is the time for an audit that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calm {
    /// Nothing is being written.
    Yes,
    /// The reconciler is writing; the audit is due again in a while.
    NotYet,
    /// The reconciler writes all the time.
    Never,
}

/// How an audit ended, or that it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The kernel has what was written.
    Same,
    /// It has something else, whatever the reconciler wrote meanwhile.
    Different,
    /// Another round will tell.
    Again,
    /// Nobody can tell; the next audit may.
    Unknown,
}

impl Verdict {
    /// The verdict as a label of metrics; `None` while the audit goes on.
    pub fn as_str(self) -> Option<&'static str> {
        match self {
            Verdict::Same => Some("same"),
            Verdict::Different => Some("different"),
            Verdict::Unknown => Some("unknown"),
            Verdict::Again => None,
        }
    }
}

/// The audits of a process: when the next one is due, and what the last round found.
#[derive(Debug)]
pub struct Audits {
    every: Duration,
    due: Instant,
    /// A snapshot is being compared.
    busy: bool,
    snapshots: blocking::SyncSender<Snapshot>,
    findings: mpsc::Receiver<Finding>,
    /// What the last round found if it was disturbed.
    before: Option<Difference>,
    rounds: u32,
    /// How many transactions had been written at the last look for calm.
    seen: Option<u64>,
    looks: u32,
}

impl Audits {
    /// Starts the thread that compares, every so often, reading from a kernel of its own. It
    /// ends when this value is dropped.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started.
    pub fn start<K: Kernel + Send + 'static>(kernel: K, every: Duration) -> io::Result<Self> {
        let (snapshots, received) = blocking::sync_channel(1);
        let (found, findings) = mpsc::channel(1);
        thread::Builder::new()
            .name("audit".into())
            .spawn(move || compare_all(kernel, &received, &found))?;
        Ok(Self::new(every, snapshots, findings))
    }

    pub(super) fn new(
        every: Duration,
        snapshots: blocking::SyncSender<Snapshot>,
        findings: mpsc::Receiver<Finding>,
    ) -> Self {
        Self {
            every,
            due: Instant::now() + jittered(every),
            busy: false,
            snapshots,
            findings,
            before: None,
            rounds: 0,
            seen: None,
            looks: 0,
        }
    }

    /// Waits until there is something to do. May be dropped and called again.
    pub async fn next(&mut self) -> Step {
        if self.busy
            && let Some(finding) = self.findings.recv().await
        {
            return Step::Judge(finding);
        }
        sleep_until(self.due).await;
        Step::Begin
    }

    /// Looks for calm before an audit that is due, where so many transactions have been written
    /// until now. A further round of an audit waits for nothing.
    pub fn calm(&mut self, writes: u64) -> Calm {
        if self.before.is_some() || self.seen == Some(writes) {
            return Calm::Yes;
        }
        self.seen = Some(writes);
        self.looks += 1;
        if self.looks > MOST_LOOKS {
            return Calm::Never;
        }
        self.due = Instant::now() + self.every / LOOKS_IN_PERIOD;
        Calm::NotYet
    }

    /// Hands over what is to be compared; nothing puts the audit off.
    pub fn begin(&mut self, snapshot: Option<Snapshot>) {
        // A thread that is gone has panicked; it leaves the process without audits.
        self.busy = snapshot.is_some_and(|snapshot| self.snapshots.try_send(snapshot).is_ok());
        if !self.busy {
            self.put_off();
        }
    }

    /// Judges a finding, where so many transactions have been written until now.
    pub fn judge(&mut self, finding: Finding, writes: u64) -> Verdict {
        self.busy = false;
        let verdict = match finding.difference {
            Ok(difference) if difference.is_empty() => Verdict::Same,
            Ok(difference) => self.judge_difference(difference, finding.writes == writes),
            Err(error) => {
                tracing::debug!("the audit of the rules ended early: {error}");
                Verdict::Unknown
            }
        };
        if verdict == Verdict::Again {
            self.due = Instant::now();
        } else {
            self.put_off();
        }
        verdict
    }

    fn judge_difference(&mut self, difference: Difference, undisturbed: bool) -> Verdict {
        let before = self.before.as_ref();
        let stays = before.is_some_and(|before| !before.is_disjoint(&difference));
        if undisturbed || stays {
            return Verdict::Different;
        }
        self.rounds += 1;
        if self.rounds >= MOST_ROUNDS {
            return Verdict::Unknown;
        }
        self.before = Some(difference);
        Verdict::Again
    }

    fn put_off(&mut self) {
        self.before = None;
        self.rounds = 0;
        self.seen = None;
        self.looks = 0;
        self.due = Instant::now() + jittered(self.every);
    }
}

fn compare_all(
    mut kernel: impl Kernel,
    snapshots: &blocking::Receiver<Snapshot>,
    found: &mpsc::Sender<Finding>,
) {
    while let Ok(snapshot) = snapshots.recv() {
        let started = std::time::Instant::now();
        let writes = snapshot.writes;
        let difference = compare(&mut kernel, snapshot);
        tracing::debug!(took = ?started.elapsed(), "audit");
        let finding = Finding { difference, writes };
        if found.blocking_send(finding).is_err() {
            return;
        }
    }
}

/// Reads what the kernel holds and compares it.
pub(super) fn compare(kernel: &mut impl Kernel, snapshot: Snapshot) -> Result<Difference, Error> {
    let mut difference = Difference::new();
    let mut add = |table: &str, wanted: Ruleset| {
        let actual = kernel.read(&[table], &wanted)?;
        note(&diff(&actual, wanted), &mut difference);
        Ok(())
    };
    add(TABLE, snapshot.services.ruleset())?;
    if let Some(policies) = snapshot.policies {
        add(policy::TABLE, policies)?;
    }
    Ok(difference)
}

/// Adds the operations of a transaction, those on elements one by one.
fn note(transaction: &Transaction, difference: &mut Difference) {
    for op in &transaction.ops {
        let mut note = |what: &dyn Fn(&mut DefaultHasher)| {
            let mut hasher = DefaultHasher::new();
            std::mem::discriminant(op).hash(&mut hasher);
            what(&mut hasher);
            difference.insert(hasher.finish());
        };
        match op {
            Op::AddElements(table, set, _, elements)
            | Op::DeleteElements(table, set, _, elements) => {
                for element in elements {
                    note(&|hasher| (table, set, element).hash(hasher));
                }
            }
            other => note(&|hasher| format!("{other:?}").hash(hasher)),
        }
    }
}

impl<K: Kernel> super::Reconciler<'_, K> {
    /// A copy of what was written; `None` while it is not known to be in force.
    pub fn snapshot(&self) -> Option<Snapshot> {
        let policies = self.policies.as_ref();
        // While lists are read the engine knows of more than was written.
        let policies = policies.filter(|it| it.state == State::Synced && it.engine.is_ready());
        self.is_synced().then(|| Snapshot {
            services: self.programmed.clone(),
            policies: policies.map(|policies| policies.engine.ruleset()),
            writes: self.writes,
        })
    }

    /// Begins an audit that is due, unless it is to wait, or need not read anything.
    pub fn audit(&mut self, audits: &mut Audits) {
        match audits.calm(self.writes) {
            Calm::NotYet => {}
            Calm::Never if self.is_synced() && self.is_vouched_for() => {
                if let Some(result) = Verdict::Same.as_str() {
                    self.metrics.audit(result);
                }
                audits.put_off();
            }
            Calm::Yes | Calm::Never => audits.begin(self.snapshot()),
        }
    }

    /// Judges what an audit found. If the kernel differs, the next [`heal`] reads it, although
    /// nobody else may be known to have written.
    ///
    /// [`heal`]: super::Reconciler::heal
    pub fn judge(&mut self, audits: &mut Audits, finding: Finding) -> Verdict {
        let verdict = audits.judge(finding, self.writes);
        if let Some(result) = verdict.as_str() {
            self.metrics.audit(result);
        }
        if verdict == Verdict::Different {
            self.vouched = None;
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        audits: Audits,
        /// The thread's ends of the channels.
        ends: (blocking::Receiver<Snapshot>, mpsc::Sender<Finding>),
    }

    fn bench() -> Bench {
        let (snapshots, received) = blocking::sync_channel(1);
        let (found, findings) = mpsc::channel(1);
        Bench {
            audits: Audits::new(EVERY, snapshots, findings),
            ends: (received, found),
        }
    }

    fn finding(difference: &[u64]) -> Finding {
        Finding {
            difference: Ok(difference.iter().copied().collect()),
            writes: 7,
        }
    }

    #[test]
    fn a_difference_without_writes_of_ones_own_is_certain() {
        let mut audits = bench().audits;
        assert_eq!(audits.judge(finding(&[]), 7), Verdict::Same);
        assert_eq!(audits.judge(finding(&[1]), 7), Verdict::Different);
        assert!(audits.due > Instant::now() + EVERY / 2);
    }

    #[test]
    fn a_difference_between_writes_must_stay_to_count() {
        let mut audits = bench().audits;
        assert_eq!(audits.judge(finding(&[1, 2]), 8), Verdict::Again);
        assert!(audits.due <= Instant::now());
        assert_eq!(audits.judge(finding(&[3]), 9), Verdict::Again);
        assert_eq!(audits.judge(finding(&[4]), 9), Verdict::Again);
        assert_eq!(audits.judge(finding(&[5, 4]), 9), Verdict::Different);
        // What one audit found means nothing for the next one.
        assert_eq!(audits.judge(finding(&[5]), 8), Verdict::Again);
        assert_eq!(audits.judge(finding(&[]), 8), Verdict::Same);
        assert_eq!(audits.judge(finding(&[5]), 8), Verdict::Again);
    }

    #[test]
    fn an_audit_that_is_disturbed_again_and_again_is_given_up() {
        let mut audits = bench().audits;
        for round in 1..u64::from(MOST_ROUNDS) {
            assert_eq!(audits.judge(finding(&[round]), 8), Verdict::Again);
        }
        assert_eq!(audits.judge(finding(&[99]), 8), Verdict::Unknown);
        assert!(audits.due > Instant::now() + EVERY / 2);
    }

    #[test]
    fn an_audit_waits_for_a_moment_without_writes() {
        let mut audits = bench().audits;
        assert_eq!(audits.calm(7), Calm::NotYet);
        assert!(audits.due <= Instant::now() + EVERY / LOOKS_IN_PERIOD);
        assert_eq!(audits.calm(8), Calm::NotYet);
        assert_eq!(audits.calm(8), Calm::Yes);
        // A round that was disturbed is followed by another one, come what may.
        assert_eq!(audits.judge(finding(&[1]), 9), Verdict::Again);
        assert_eq!(audits.calm(10), Calm::Yes);
        assert_eq!(audits.judge(finding(&[]), 10), Verdict::Same);
        for write in 11..11 + u64::from(MOST_LOOKS) {
            assert_eq!(audits.calm(write), Calm::NotYet);
        }
        assert_eq!(audits.calm(99), Calm::Never);
        audits.begin(None);
        assert_eq!(audits.calm(100), Calm::NotYet, "the next audit looks anew");
    }

    #[tokio::test]
    async fn what_is_compared_is_judged_before_the_next_is_asked_for() {
        let mut bench = bench();
        let far = || Instant::now() + EVERY / 2;
        assert!(bench.audits.due > far(), "not at once");
        bench.audits.due = Instant::now();
        assert!(matches!(bench.audits.next().await, Step::Begin));
        // Not now: there is nothing to compare.
        bench.audits.begin(None);
        assert!(bench.audits.due > far());
        bench.audits.due = Instant::now();
        let snapshot = || {
            Some(Snapshot {
                services: Programmed::default(),
                policies: None,
                writes: 7,
            })
        };
        bench.audits.begin(snapshot());
        bench.ends.1.send(finding(&[])).await.expect("it listens");
        assert!(matches!(bench.audits.next().await, Step::Judge(_)));
    }
}
