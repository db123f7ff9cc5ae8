//! Repair of what other processes changed.

use super::*;

#[test]
fn healing_reads_nothing_unless_another_process_wrote() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut controller, lists(vec![web.clone().into()]));
    let reads = || bench.kernel.0.borrow().reads;
    let before = reads();
    assert_eq!(heal(&mut controller), (Outcome::Synced, false));
    // The controller's own writes are not foreign.
    let endpoints = slice("web-1", &web, Family::V4, &[1, 2]);
    handle(&mut controller, vec![put(endpoints)]);
    assert_eq!(heal(&mut controller), (Outcome::Synced, false));
    assert_eq!(reads(), before);
    bench.kernel.meddle(|ruleset| ruleset.tables.clear());
    assert_eq!(heal(&mut controller), (Outcome::Synced, true));
    assert_eq!(reads(), before + 1);
    bench.assert_as_wanted(&controller);
    assert_eq!(heal(&mut controller), (Outcome::Synced, false));
    // Another process changes its own tables.
    bench.kernel.meddle(|_| {});
    assert_eq!(heal(&mut controller), (Outcome::Synced, false));
    assert_eq!(reads(), before + 2);
    assert_eq!(heal(&mut controller), (Outcome::Synced, false));
    assert_eq!(reads(), before + 2);
}

#[test]
fn an_unnoticed_change_during_a_write_is_looked_for() {
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
fn a_change_during_a_write_that_failed_is_looked_for() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    handle(&mut controller, lists(vec![]));
    assert!(!controller.take_missed_notifications());
    bench.kernel.0.borrow_mut().failures = 1;
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut controller, vec![put(web)]);
    assert!(!controller.take_missed_notifications());
    bench.kernel.meddle(|_| {});
    bench.kernel.0.borrow_mut().failures = 1;
    let other = service("other", &["10.96.0.11"], &[80]);
    handle(&mut controller, vec![put(other)]);
    assert!(controller.take_missed_notifications());
}
