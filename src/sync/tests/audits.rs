//! Audits, without their thread.

use tokio::sync::mpsc;

use super::*;
use crate::sync::audit::{self, AuditOutcome};

/// The audits of a controller without their thread.
struct Audited {
    audits: Audits,
    received: std::sync::mpsc::Receiver<reader::ReaderTask>,
    _found: mpsc::Sender<audit::Finding>,
}

impl Audited {
    fn new() -> Self {
        let (jobs, received) = std::sync::mpsc::channel();
        let (found, findings) = mpsc::channel(1);
        Self {
            audits: Audits::new(jobs, findings),
            received,
            _found: found,
        }
    }

    /// Begins a round and returns the snapshot to compare, if any.
    fn begin(&mut self, controller: &mut Controller<Fake>) -> Option<reader::Snapshot> {
        controller.audit(&mut self.audits);
        match self.received.try_recv().ok()? {
            reader::ReaderTask::Audit(snapshot) => Some(snapshot),
            reader::ReaderTask::Compare(_) => panic!("not an audit"),
        }
    }

    /// Compares a snapshot with the kernel and judges what is found.
    fn judge(
        &mut self,
        bench: &Bench,
        controller: &mut Controller<Fake>,
        snapshot: reader::Snapshot,
    ) -> AuditOutcome {
        let finding = audit::Finding::new(&mut bench.kernel.clone(), snapshot);
        controller.judge(&mut self.audits, finding)
    }
}

fn audits(bench: &Bench, result: &str) -> u64 {
    let page = bench.registry.encode();
    let series = format!("nftlet_audits_total{{result=\"{result}\"}} ");
    let line = page.lines().find_map(|line| line.strip_prefix(&series));
    line.map_or(0, |count| count.parse().unwrap())
}

#[test]
fn a_difference_that_an_audit_finds_twice_is_healed() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let mut audited = Audited::new();
    bench.kernel.meddle(|_| {});
    assert!(
        audited.begin(&mut controller).is_none(),
        "nothing is in force yet"
    );
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut controller, lists(vec![web.into()]));
    let id = table_id(Family::V4);
    let frontends = ServiceSet::Frontends.name();
    bench.kernel.meddle(|ruleset| {
        let table = ruleset.tables.get_mut(&id).unwrap();
        table.sets.get_mut(&frontends).unwrap().elements.clear();
    });
    let reads = || bench.kernel.0.borrow().reads;
    for outcome in [AuditOutcome::Again, AuditOutcome::Different] {
        let snapshot = audited.begin(&mut controller).expect("it is in force");
        assert_eq!(audited.judge(&bench, &mut controller, snapshot), outcome);
    }
    assert_eq!(audits(&bench, "different"), 1);
    let before = reads();
    assert_eq!(heal(&mut controller), (Outcome::Synced, true));
    assert_eq!(reads(), before + 1);
    bench.assert_as_wanted(&controller);
    assert!(
        audited.begin(&mut controller).is_none(),
        "it is as expected"
    );
    assert_eq!(audits(&bench, "same"), 1);
}

#[test]
fn an_audit_reads_only_after_others_wrote() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut controller, lists(vec![web.clone().into()]));
    let mut audited = Audited::new();
    let change = |last: u8| vec![put(slice("web-1", &web, Family::V4, &[last]))];
    assert!(audited.begin(&mut controller).is_none());
    assert_eq!(audits(&bench, "same"), 1);

    bench.kernel.meddle(|_| {});
    let snapshot = audited
        .begin(&mut controller)
        .expect("another process wrote");
    handle(&mut controller, change(250));
    // What the controller wrote meanwhile must not count as foreign.
    let outcome = audited.judge(&bench, &mut controller, snapshot);
    assert_eq!(outcome, AuditOutcome::Again);
    let snapshot = audited.begin(&mut controller).expect("another round");
    let outcome = audited.judge(&bench, &mut controller, snapshot);
    assert_eq!(outcome, AuditOutcome::Same);
    assert_eq!(audits(&bench, "same"), 2);

    // The next one knows that no other process has written since, whatever the controller wrote.
    handle(&mut controller, change(251));
    assert!(audited.begin(&mut controller).is_none());
    assert_eq!(audits(&bench, "same"), 3);
    bench.kernel.meddle(|_| {});
    assert!(audited.begin(&mut controller).is_some());
}

#[test]
fn an_audit_that_decides_nothing_leaves_it_to_the_controller() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut controller, lists(vec![web.clone().into()]));
    let mut audited = Audited::new();
    bench.kernel.meddle(|_| {});
    let mut outcome = AuditOutcome::Again;
    for last in 1..100 {
        let snapshot = audited.begin(&mut controller).expect("another round");
        let change = vec![put(slice("web-1", &web, Family::V4, &[last]))];
        handle(&mut controller, change);
        outcome = audited.judge(&bench, &mut controller, snapshot);
        if outcome != AuditOutcome::Again {
            break;
        }
    }
    assert_eq!(outcome, AuditOutcome::Unknown);
    assert_eq!(audits(&bench, "unknown"), 1);
    let reads = bench.kernel.0.borrow().reads;
    assert_eq!(heal(&mut controller), (Outcome::Synced, false));
    assert_eq!(bench.kernel.0.borrow().reads, reads + 1);
    assert!(
        audited.begin(&mut controller).is_none(),
        "it is as expected"
    );
}
