//! Comparing the kernel with what is wanted every so often, whether or not somebody was heard
//! changing it.
//!
//! ```text
//! run ── Snapshot ──> thread "audit": reads, compares ── Finding ──> run: heal, if it is certain
//! ```
//!
//! Where the generation of the kernel's ruleset tells that nobody else committed anything since the
//! last time, nothing is read.
//!
//! Reading large tables takes half a second, during which no change may wait. So another thread
//! reads them, through a socket of its own, and compares with a copy of what was written. Neither
//! side is ever in memory as a whole: elements are compared by sums ([`Sums`]). The controller goes
//! on writing meanwhile, and then a difference may be its own work. Such a difference counts only
//! when it is there in two rounds one after the other: what the controller wrote during the first one
//! is in the copy for the second.
//!
//! The kernel interrupts the reading of a table that is written, so an audit that is due waits for
//! a moment without transactions. Where none comes, the tables are read nevertheless.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::sync::mpsc as blocking;
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::schedule::jittered;
use super::session::WritePoint;
use super::{DriverState, Kernel};
use crate::engine::Engine as _;
use crate::netlink::Error;
use crate::nft::{Ruleset, SumKeys, Sums, Transaction, diff};
use crate::policies;
use crate::services::{TABLE, Tables};

/// How often the kernel is compared.
pub const EVERY: Duration = Duration::from_secs(600);
/// How many rounds in a row the controller may disturb before the next audit is waited for.
const MOST_ROUNDS: u32 = 8;
/// How many times in the period of the audits one that is due may look for calm. Between two looks
/// nothing may be written: a second with the usual period.
const LOOKS_IN_PERIOD: u32 = 600;
/// How many looks there are at most.
const MOST_LOOKS: u32 = 60;

/// What was written, for a thread that compares it with the kernel.
#[derive(Clone, Debug)]
pub struct Snapshot {
    services: Tables,
    policies: Option<Ruleset>,
    moment: WritePoint,
}

/// In what the kernel differs: operations, and places of elements, as hashes.
pub(super) type Difference = HashSet<u64>;

/// What came out of a comparison.
#[derive(Debug)]
pub struct Finding {
    difference: Result<Difference, Error>,
    /// That of the snapshot.
    moment: WritePoint,
}

impl Finding {
    /// What the comparison of a snapshot found.
    #[cfg(test)]
    pub(super) fn new(snapshot: &Snapshot, difference: Result<Difference, Error>) -> Self {
        Self {
            difference,
            moment: snapshot.moment,
        }
    }
}

/// What is to be done next.
#[derive(Debug)]
pub enum Step {
    /// The comparer waits for a snapshot.
    Begin,
    /// It has compared one.
    Judge(Finding),
}

/// How an audit ended, or that it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The kernel has what was written.
    Same,
    /// It has something else, whatever the controller wrote meanwhile.
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

    /// Whether now is the time for an audit that is due, where so many transactions have been written
    /// until now: when none was since the last look, or after so many looks that none may ever be
    /// without. Otherwise it is due again in a while. A further round of an audit waits for nothing.
    pub fn is_time(&mut self, writes: u64) -> bool {
        if self.before.is_some() || self.seen == Some(writes) {
            return true;
        }
        self.seen = Some(writes);
        self.looks += 1;
        if self.looks > MOST_LOOKS {
            return true;
        }
        self.due = Instant::now() + self.every / LOOKS_IN_PERIOD;
        false
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
            Ok(difference) => self.judge_difference(difference, finding.moment.writes == writes),
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
    let keys = SumKeys::default();
    while let Ok(snapshot) = snapshots.recv() {
        let started = std::time::Instant::now();
        let moment = snapshot.moment;
        let difference = compare(&mut kernel, &keys, snapshot);
        tracing::debug!(took = ?started.elapsed(), "audit");
        let finding = Finding { difference, moment };
        if found.blocking_send(finding).is_err() {
            return;
        }
    }
}

/// What tables should hold: their elements are in the sums only.
struct Wanted {
    table: &'static str,
    frame: Ruleset,
    sums: Sums,
}

/// Reads what the kernel holds and compares it.
pub(super) fn compare(
    kernel: &mut impl Kernel,
    keys: &SumKeys,
    snapshot: Snapshot,
) -> Result<Difference, Error> {
    let mut sums = Sums::new(keys.clone());
    let mut all = vec![Wanted {
        table: TABLE,
        frame: snapshot.services.summed(&mut sums),
        sums,
    }];
    if let Some(mut policies) = snapshot.policies {
        let mut sums = Sums::new(keys.clone());
        sums.take(&mut policies);
        all.push(Wanted {
            table: policies::TABLE,
            frame: policies,
            sums,
        });
    }
    let first = read(kernel, keys, &all)?;
    if first.is_empty() {
        return Ok(first);
    }
    // The kernel moves a large set to another table without telling who reads it meanwhile.
    let second = read(kernel, keys, &all)?;
    Ok(first.intersection(&second).copied().collect())
}

fn read(kernel: &mut impl Kernel, keys: &SumKeys, all: &[Wanted]) -> Result<Difference, Error> {
    let mut difference = Difference::new();
    for wanted in all {
        let (actual, sums) = kernel.read_sums(&[wanted.table], &wanted.frame, keys)?;
        note(&diff(&actual, wanted.frame.clone()), &mut difference);
        difference.extend(wanted.sums.differences(&sums));
    }
    Ok(difference)
}

/// Adds the operations of a transaction, none of which is on elements.
fn note(transaction: &Transaction, difference: &mut Difference) {
    for op in &transaction.ops {
        let mut hasher = DefaultHasher::new();
        format!("{op:?}").hash(&mut hasher);
        difference.insert(hasher.finish());
    }
}

impl<K: Kernel> super::Controller<'_, K> {
    /// A copy of what was written; `None` while it is not known to be in force.
    pub fn snapshot(&mut self) -> Option<Snapshot> {
        if !self.is_synced() {
            return None;
        }
        let policies = self.policies.as_ref();
        // While lists are read the engine knows of more than was written.
        let policies =
            policies.filter(|it| it.state == DriverState::Synced && it.engine.is_ready());
        Some(Snapshot {
            services: self.services.engine.tables().clone(),
            policies: policies.map(|policies| policies.engine.ruleset()),
            moment: self.kernel.write_point(),
        })
    }

    /// Begins an audit that is due, unless it is to wait, or need not read anything.
    pub fn audit(&mut self, audits: &mut Audits) {
        if self.is_synced() && self.kernel.is_as_expected() {
            if let Some(result) = Verdict::Same.as_str() {
                self.kernel.metrics.audit(result);
            }
            audits.put_off();
        } else if audits.is_time(self.kernel.writes()) {
            audits.begin(self.snapshot());
        }
    }

    /// Judges what an audit found. If the kernel differs, the next [`heal`] reads it, although
    /// no other program may be known to have written.
    ///
    /// [`heal`]: super::Controller::heal
    pub fn judge(&mut self, audits: &mut Audits, finding: Finding) -> Verdict {
        let moment = finding.moment;
        let verdict = audits.judge(finding, self.kernel.writes());
        if let Some(result) = verdict.as_str() {
            self.kernel.metrics.audit(result);
        }
        match verdict {
            Verdict::Different => self.kernel.expect_nothing(),
            // Others have committed something else, such as a table of their own.
            Verdict::Same => self.kernel.expect(moment),
            Verdict::Again | Verdict::Unknown => {}
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOMENT: WritePoint = WritePoint {
        writes: 7,
        generation: None,
    };

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
            moment: MOMENT,
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
        assert!(!audits.is_time(7));
        assert!(audits.due <= Instant::now() + EVERY / LOOKS_IN_PERIOD);
        assert!(!audits.is_time(8));
        assert!(audits.is_time(8));
        // A round that was disturbed is followed by another one, come what may.
        assert_eq!(audits.judge(finding(&[1]), 9), Verdict::Again);
        assert!(audits.is_time(10));
        assert_eq!(audits.judge(finding(&[]), 10), Verdict::Same);
        for write in 11..11 + u64::from(MOST_LOOKS) {
            assert!(!audits.is_time(write));
        }
        assert!(audits.is_time(99), "it has looked often enough");
        audits.begin(None);
        assert!(!audits.is_time(100), "the next audit looks anew");
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
                services: Tables::default(),
                policies: None,
                moment: MOMENT,
            })
        };
        bench.audits.begin(snapshot());
        bench.ends.1.send(finding(&[])).await.expect("it listens");
        assert!(matches!(bench.audits.next().await, Step::Judge(_)));
    }
}
