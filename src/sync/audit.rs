//! Comparing the kernel with what was written, after notifications were missed.
//!
//! ```text
//! run ── Snapshot ──> thread "audit": reads, compares ── Finding ──> run: heal, if it is certain
//! ```
//!
//! The kernel drops notifications where others write a lot; the monitor receives none during nftlet's own
//! large writes, nor before it listens again after an error. Where the generation of the kernel's ruleset
//! shows that no other program committed anything meanwhile, nothing is read.
//!
//! Reading large tables takes half a second and more, during which no change may wait. So another thread
//! reads them, through a socket of its own, and compares them with a copy of what was written, which
//! shares the objects with the engines and is compiled on that thread.
//!
//! A difference in one round may come from a write of the controller during the dump, or from a
//! dump that missed elements while the kernel resized a hash table. So a difference counts only if
//! two rounds in a row find it: the copy of the second round contains what was written during the
//! first. After eight rounds without a decision the controller compares by itself.
//!
//! Both sides are in memory as a whole during a comparison. With 50,000 services of 20 endpoints the
//! peak of the process is 508.9 MiB with an audit and 380.3 MiB without one, 1.34 times as much: sums in
//! place of elements would not be worth their code.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::sync::mpsc as blocking;
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::driver::DriverState;
use super::kernel::Kernel;
use super::reader::{ReaderTask, Snapshot, TableReader, WritePoint};
use crate::engine::Engine as _;
use crate::netlink::Error;
use crate::nft::{Op, Transaction, diff};
use crate::policies;
use crate::services::TABLE;

/// How many rounds in a row the controller may disturb.
const MOST_ROUNDS: u32 = 8;
/// The pause before an audit that had no copy to compare with is tried again.
const PUT_OFF: Duration = Duration::from_secs(1);

/// The operations and elements in which the kernel differs, as hashes.
pub(super) type Difference = HashSet<u64>;

/// What came out of a comparison.
#[derive(Debug)]
pub struct Finding {
    difference: Result<Difference, Error>,
    /// The write point of the snapshot.
    write_point: WritePoint,
}

impl Finding {
    /// Compares a snapshot with what a kernel holds.
    pub(super) fn new(kernel: &mut dyn Kernel, snapshot: Snapshot) -> Self {
        Self {
            write_point: snapshot.write_point,
            difference: compare(kernel, snapshot),
        }
    }
}

/// The next step of an audit.
#[derive(Debug)]
pub enum AuditStep {
    /// A snapshot can be compared.
    Begin,
    /// One was compared.
    Judge(Finding),
}

/// How an audit ended, or that it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuditOutcome {
    /// The kernel has what was written.
    Same,
    /// It has something else, whatever the controller wrote meanwhile.
    Different,
    /// Another round is needed.
    Again,
    /// It was not possible to read or to decide.
    Unknown,
}

impl AuditOutcome {
    /// Returns the outcome as a label of metrics; `None` while the audit goes on.
    pub fn as_str(self) -> Option<&'static str> {
        match self {
            AuditOutcome::Same => Some("same"),
            AuditOutcome::Different => Some("different"),
            AuditOutcome::Unknown => Some("unknown"),
            AuditOutcome::Again => None,
        }
    }
}

/// The audits of a process: whether one is wanted, and what the last round found.
#[derive(Debug)]
pub struct Audits {
    /// When the next one, or the next round, begins.
    due: Option<Instant>,
    /// A snapshot is being compared.
    busy: bool,
    jobs: blocking::Sender<ReaderTask>,
    findings: mpsc::Receiver<Finding>,
    /// What the last round found.
    before: Option<Difference>,
    rounds: u32,
}

impl Audits {
    /// Starts the thread that compares, reading from a kernel of its own. It ends when this value is
    /// dropped.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started.
    pub fn start<K: Kernel + Send + 'static>(kernel: K) -> io::Result<Self> {
        let (jobs, received) = blocking::channel();
        let (found, findings) = mpsc::channel(1);
        thread::Builder::new()
            .name("audit".into())
            .spawn(move || work(kernel, &received, &found))?;
        Ok(Self::new(jobs, findings))
    }

    pub(super) fn new(
        jobs: blocking::Sender<ReaderTask>,
        findings: mpsc::Receiver<Finding>,
    ) -> Self {
        Self {
            due: None,
            busy: false,
            jobs,
            findings,
            before: None,
            rounds: 0,
        }
    }

    /// Returns the thread, which makes other comparisons, too.
    pub fn reader(&self) -> TableReader {
        TableReader::new(self.jobs.clone())
    }

    /// Requests an audit: notifications were missed.
    pub fn request(&mut self) {
        self.due.get_or_insert_with(Instant::now);
    }

    /// Waits until there is something to do. May be dropped and called again.
    pub async fn next(&mut self) -> AuditStep {
        if self.busy
            && let Some(finding) = self.findings.recv().await
        {
            return AuditStep::Judge(finding);
        }
        match self.due {
            Some(due) => sleep_until(due).await,
            None => std::future::pending().await,
        }
        AuditStep::Begin
    }

    /// Hands over a snapshot to be compared; without one the audit is put off.
    fn begin(&mut self, snapshot: Option<Snapshot>) {
        self.busy = snapshot.is_some_and(|it| self.jobs.send(ReaderTask::Audit(it)).is_ok());
        self.due = (!self.busy).then(|| Instant::now() + PUT_OFF);
    }

    /// Judges a finding.
    fn judge(&mut self, difference: Result<Difference, Error>) -> AuditOutcome {
        self.busy = false;
        let outcome = match difference {
            Ok(difference) if difference.is_empty() => AuditOutcome::Same,
            Ok(difference) => self.judge_difference(difference),
            Err(error) => {
                tracing::debug!("the audit of the rules ended early: {error}");
                AuditOutcome::Unknown
            }
        };
        if outcome == AuditOutcome::Again {
            self.request();
        } else {
            self.ended();
        }
        outcome
    }

    fn judge_difference(&mut self, difference: Difference) -> AuditOutcome {
        let before = self.before.replace(difference);
        if before.is_some_and(|before| self.before.iter().any(|now| !now.is_disjoint(&before))) {
            return AuditOutcome::Different;
        }
        self.rounds += 1;
        if self.rounds >= MOST_ROUNDS {
            return AuditOutcome::Unknown;
        }
        AuditOutcome::Again
    }

    /// Forgets the rounds of an audit.
    fn ended(&mut self) {
        self.before = None;
        self.rounds = 0;
    }
}

/// Works off tasks until nothing can request any.
fn work(
    mut kernel: impl Kernel,
    jobs: &blocking::Receiver<ReaderTask>,
    found: &mpsc::Sender<Finding>,
) {
    while let Ok(job) = jobs.recv() {
        let started = std::time::Instant::now();
        match job {
            ReaderTask::Compare(compare) => compare(&mut kernel),
            ReaderTask::Audit(snapshot) => {
                let finding = Finding::new(&mut kernel, snapshot);
                if found.blocking_send(finding).is_err() {
                    return;
                }
            }
        }
        tracing::debug!(took = ?started.elapsed(), "compared with the kernel");
    }
}

/// Reads what the kernel holds and compares it.
fn compare(kernel: &mut dyn Kernel, snapshot: Snapshot) -> Result<Difference, Error> {
    let mut difference = Difference::new();
    // Both first, since the copies share what the controller changes.
    let services = (snapshot.services)();
    let policies = snapshot.policies.map(|policies| policies());
    for (table, wanted) in [(TABLE, Some(services)), (policies::TABLE, policies)] {
        if let Some(wanted) = wanted {
            let actual = kernel.read(&[table], &wanted)?;
            note(diff(&actual, wanted), &mut difference);
        }
    }
    Ok(difference)
}

/// Adds the operations of a transaction, those on elements one by one.
fn note(transaction: Transaction, difference: &mut Difference) {
    let mut add = |what: &dyn std::fmt::Debug| {
        let mut hasher = DefaultHasher::new();
        format!("{what:?}").hash(&mut hasher);
        difference.insert(hasher.finish());
    };
    for op in transaction.ops {
        match op {
            Op::AddElements(table, set, _, elements) => {
                elements
                    .iter()
                    .for_each(|it| add(&("add", &table, &set, it)));
            }
            Op::DeleteElements(table, set, _, elements) => {
                elements
                    .iter()
                    .for_each(|it| add(&("delete", &table, &set, it)));
            }
            other => add(&other),
        }
    }
}

impl<K: Kernel> super::Controller<'_, K> {
    /// Returns a copy of what was written; `None` while it is not known to be in force.
    pub(super) fn snapshot(&mut self) -> Option<Snapshot> {
        if !self.is_synced() {
            return None;
        }
        let policies = self.policies.as_mut().and_then(|policies| {
            policies.compare_when_listed();
            // Otherwise they are compared when they are listed.
            (policies.state == DriverState::Synced).then(|| policies.engine.snapshot())
        });
        Some(Snapshot {
            services: self.services.engine.snapshot(),
            policies,
            write_point: self.kernel.write_point(),
        })
    }

    /// Begins an audit, or its next round, unless no other program has committed anything.
    pub(super) fn audit(&mut self, audits: &mut Audits) {
        if self.is_synced() && self.kernel.is_as_expected() {
            if let Some(result) = AuditOutcome::Same.as_str() {
                self.kernel.metrics.audit(result);
            }
            audits.due = None;
            audits.ended();
        } else {
            audits.begin(self.snapshot());
        }
    }

    /// Judges what an audit found. If the kernel differs, the next [`heal`] reads it, although
    /// no other program may be known to have written.
    ///
    /// [`heal`]: super::Controller::heal
    pub(super) fn judge(&mut self, audits: &mut Audits, finding: Finding) -> AuditOutcome {
        let outcome = audits.judge(finding.difference);
        if let Some(result) = outcome.as_str() {
            self.kernel.metrics.audit(result);
        }
        match outcome {
            AuditOutcome::Different | AuditOutcome::Unknown => self.kernel.forget_expected(),
            // Others have committed something else, such as a table of their own.
            AuditOutcome::Same => self.kernel.set_expected_from(finding.write_point),
            AuditOutcome::Again => {}
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn audits() -> (
        Audits,
        mpsc::Sender<Finding>,
        blocking::Receiver<ReaderTask>,
    ) {
        let (jobs, received) = blocking::channel();
        let (found, findings) = mpsc::channel(1);
        (Audits::new(jobs, findings), found, received)
    }

    fn judge(audits: &mut Audits, difference: &[u64]) -> AuditOutcome {
        audits.judge(Ok(difference.iter().copied().collect()))
    }

    #[test]
    fn a_difference_must_be_found_twice_in_a_row_to_count() {
        let (mut audits, ..) = audits();
        assert_eq!(judge(&mut audits, &[]), AuditOutcome::Same);
        assert_eq!(audits.due, None);
        assert_eq!(judge(&mut audits, &[1, 2]), AuditOutcome::Again);
        assert!(audits.due.is_some_and(|due| due <= Instant::now()));
        assert_eq!(judge(&mut audits, &[3]), AuditOutcome::Again);
        assert_eq!(judge(&mut audits, &[4]), AuditOutcome::Again);
        assert_eq!(judge(&mut audits, &[5, 4]), AuditOutcome::Different);
        // What one audit found means nothing for the next one.
        assert_eq!(judge(&mut audits, &[5]), AuditOutcome::Again);
        assert_eq!(judge(&mut audits, &[]), AuditOutcome::Same);
        assert_eq!(judge(&mut audits, &[5]), AuditOutcome::Again);
    }

    #[test]
    fn an_audit_that_is_disturbed_again_and_again_is_given_up() {
        let (mut audits, ..) = audits();
        for round in 1..u64::from(MOST_ROUNDS) {
            assert_eq!(judge(&mut audits, &[round]), AuditOutcome::Again);
        }
        assert_eq!(judge(&mut audits, &[99]), AuditOutcome::Unknown);
        assert_eq!(judge(&mut audits, &[99]), AuditOutcome::Again, "a new one");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_compared_is_judged_before_the_next_is_asked_for() {
        let (mut audits, found, _received) = audits();
        let day = Duration::from_secs(86_400);
        let idle = tokio::time::timeout(day, audits.next()).await;
        assert!(idle.is_err(), "none was requested");
        audits.request();
        assert!(matches!(audits.next().await, AuditStep::Begin));
        let started = Instant::now();
        audits.begin(None);
        assert!(matches!(audits.next().await, AuditStep::Begin));
        assert_eq!(started.elapsed(), PUT_OFF);
        let write_point = WritePoint {
            writes: 7,
            generation: None,
        };
        audits.begin(Some(Snapshot {
            services: Box::new(crate::nft::Ruleset::default),
            policies: None,
            write_point,
        }));
        audits.request();
        let finding = Finding {
            difference: Ok(Difference::new()),
            write_point,
        };
        found.send(finding).await.expect("it listens");
        let AuditStep::Judge(finding) = audits.next().await else {
            panic!("another one is not begun yet");
        };
        assert_eq!(audits.judge(finding.difference), AuditOutcome::Same);
        // Notifications were missed meanwhile.
        assert!(matches!(audits.next().await, AuditStep::Begin));
    }
}
