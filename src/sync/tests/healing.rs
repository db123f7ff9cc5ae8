//! Repair of what other processes changed, and audits.

use super::*;

#[test]
fn healing_reads_nothing_unless_somebody_else_wrote() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut controller, lists(vec![web.clone().into()]));
    let reads = || bench.kernel.0.borrow().reads;
    let before = reads();
    assert_eq!(heal(&mut controller), (Outcome::Synced, false));
    // Writes of one's own are nobody else's.
    let endpoints = slice("web-1", &web, Family::V4, &[1, 2]);
    handle(&mut controller, vec![put(endpoints)]);
    assert_eq!(heal(&mut controller), (Outcome::Synced, false));
    assert_eq!(reads(), before);
    bench.kernel.meddle(|ruleset| ruleset.tables.clear());
    assert_eq!(heal(&mut controller), (Outcome::Synced, true));
    assert_eq!(reads(), before + 1);
    bench.assert_as_wanted(&controller);
    assert_eq!(heal(&mut controller), (Outcome::Synced, false));
    // Somebody who minds their own tables.
    bench.kernel.meddle(|_| {});
    assert_eq!(heal(&mut controller), (Outcome::Synced, false));
    assert_eq!(reads(), before + 2);
    assert_eq!(heal(&mut controller), (Outcome::Synced, false));
    assert_eq!(reads(), before + 2);
}

#[test]
fn a_change_during_a_write_that_nobody_heard_is_looked_for() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut controller, lists(vec![web.clone().into()]));
    assert!(!controller.take_missed_notifications());
    bench.kernel.0.borrow_mut().missed_notifications = true;
    let endpoints = slice("web-1", &web, Family::V4, &[1, 2]);
    handle(&mut controller, vec![put(endpoints)]);
    assert!(controller.take_missed_notifications());
    assert!(!controller.take_missed_notifications());
    let reads = bench.kernel.0.borrow().reads;
    controller.heal();
    assert_eq!(bench.kernel.0.borrow().reads, reads + 1);
}

#[test]
fn a_difference_that_an_audit_finds_is_read_although_nobody_wrote() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    assert!(controller.snapshot().is_none(), "nothing is in force yet");
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut controller, lists(vec![web.into()]));
    let snapshot = controller.snapshot().expect("it is in force");
    let keys = SumKeys::default();
    let compare = |snapshot| audit::compare(&mut bench.kernel.clone(), &keys, snapshot).unwrap();
    assert!(compare(snapshot).is_empty());
    // What changes without a trace in the generation.
    let id = table_id(Family::V4);
    let frontends = ServiceSet::Frontends.name();
    let forget = |ruleset: &mut Ruleset| {
        let table = ruleset.tables.get_mut(&id).unwrap();
        table.sets.get_mut(&frontends).unwrap().elements.clear();
    };
    forget(&mut bench.kernel.0.borrow_mut().ruleset);
    let difference = compare(controller.snapshot().unwrap());
    assert_eq!(difference.len(), 1);
    assert_eq!(heal(&mut controller), (Outcome::Synced, false));
    controller.kernel.expect_nothing();
    assert_eq!(heal(&mut controller), (Outcome::Synced, true));
    bench.assert_as_wanted(&controller);
}

#[test]
fn an_audit_reads_only_after_others_wrote() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut controller, lists(vec![web.clone().into()]));
    let (snapshots, received) = std::sync::mpsc::sync_channel(1);
    let (_found, findings) = mpsc::channel(1);
    let mut audits = Audits::new(AUDIT_EVERY, snapshots, findings);
    let same = || {
        let told = bench.registry.encode();
        let series = "nftlet_audits_total{result=\"same\"} ";
        let line = told.lines().find_map(|line| line.strip_prefix(series));
        line.map_or(0, |count| count.parse::<u64>().unwrap())
    };
    controller.audit(&mut audits);
    assert!(received.try_recv().is_err());
    assert_eq!(same(), 1);

    bench.kernel.meddle(|_| {});
    // It waits for calm, for a while.
    let mut looks = 0;
    let snapshot = loop {
        let change = slice("web-1", &web, Family::V4, &[1 + looks % 200]);
        handle(&mut controller, vec![put(change)]);
        controller.audit(&mut audits);
        match received.try_recv() {
            Ok(snapshot) => break snapshot,
            Err(_) => looks += 1,
        }
    };
    assert!(looks > 10, "{looks}");
    let keys = SumKeys::default();
    handle(
        &mut controller,
        vec![put(slice("web-1", &web, Family::V4, &[250]))],
    );
    let compare = |snapshot| audit::compare(&mut bench.kernel.clone(), &keys, snapshot);
    // What the controller wrote meanwhile must not be taken for somebody else's.
    let finding = audit::Finding::new(&snapshot, compare(snapshot.clone()));
    assert_eq!(controller.judge(&mut audits, finding), Verdict::Again);
    controller.audit(&mut audits);
    let snapshot = received.try_recv().expect("another round");
    handle(&mut controller, vec![]);
    let finding = audit::Finding::new(&snapshot, compare(snapshot.clone()));
    assert_eq!(controller.judge(&mut audits, finding), Verdict::Same);
    assert_eq!(same(), 2);

    // The next one knows that nobody has written since, whatever the controller wrote.
    handle(
        &mut controller,
        vec![put(slice("web-1", &web, Family::V4, &[251]))],
    );
    controller.audit(&mut audits);
    assert!(received.try_recv().is_err());
    assert_eq!(same(), 3);
    bench.kernel.meddle(|_| {});
    controller.audit(&mut audits);
    controller.audit(&mut audits);
    assert!(received.try_recv().is_ok());
}
