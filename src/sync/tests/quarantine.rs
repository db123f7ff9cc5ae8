//! Objects that the kernel refuses.

use super::*;

#[test]
fn what_the_kernel_refuses_is_left_out_and_the_rest_is_written() {
    let bench = Bench::new();
    let bad = service("bad", &["10.96.0.66"], &[80]);
    let good = service("good", &["10.96.0.10"], &[80]);
    let unwanted = Key::build()
        .address("10.96.0.66".parse().unwrap())
        .protocol(6)
        .port(80)
        .finish();
    bench.kernel.0.borrow_mut().unwanted = Some(unwanted.clone());
    let mut controller = bench.controller();
    let first = lists(vec![bad.clone().into(), good.clone().into()]);
    assert_eq!(handle(&mut controller, first), Outcome::Synced);
    let frontends = |table: &TableId| {
        let state = bench.kernel.0.borrow();
        state.ruleset.tables[table].sets[&ServiceSet::Frontends.name()]
            .elements
            .len()
    };
    let v4 = table_id(Family::V4);
    assert_eq!(frontends(&v4), 1);
    let heard = bench.heard();
    assert_eq!(heard.len(), 1);
    assert!(
        heard[0]
            .starts_with("Service shop/bad: the kernel refused element { 10.96.0.66 . tcp . 80"),
        "{}",
        heard[0]
    );
    // Changes of others go through; the service comes back when it has changed.
    let more = slice("good-1", &good, Family::V4, &[1, 2]);
    assert_eq!(handle(&mut controller, vec![put(more)]), Outcome::Synced);
    assert_eq!(bench.kernel.0.borrow().reads, 1, "no comparison was needed");
    let mended = service("bad", &["10.96.0.67"], &[80]);
    assert_eq!(handle(&mut controller, vec![put(mended)]), Outcome::Synced);
    assert_eq!(frontends(&v4), 2);
    // A service refused in an incremental write, forgiven when the kernel has changed its mind.
    assert_eq!(handle(&mut controller, vec![put(bad)]), Outcome::Synced);
    assert_eq!(frontends(&v4), 1);
    bench.kernel.0.borrow_mut().unwanted = None;
    controller.retry_quarantined();
    assert_eq!(handle(&mut controller, vec![]), Outcome::Synced);
    assert_eq!(frontends(&v4), 2);
    bench.assert_as_wanted(&controller);
}

#[test]
fn all_services_of_a_batch_that_the_kernel_refuses_are_left_out_after_one_comparison() {
    let bench = Bench::new();
    let frontend = |last| {
        let address = IpAddr::from([10, 96, 0, last]);
        Key::build().address(address).protocol(6).port(80).finish()
    };
    // Several of one operation, and one of the other address family.
    let v6 = "fd00:10:96::9".parse().unwrap();
    let v6 = Key::build().address(v6).protocol(6).port(80).finish();
    bench.kernel.0.borrow_mut().others_unwanted = vec![frontend(1), frontend(2), frontend(3), v6];
    let mut objects: Vec<Object> = (1..=5)
        .map(|n| service(&format!("web-{n}"), &[&format!("10.96.0.{n}")], &[80]).into())
        .collect();
    objects.push(service("web-6", &["fd00:10:96::9"], &[80]).into());
    let mut controller = bench.controller();
    assert_eq!(handle(&mut controller, lists(objects)), Outcome::Synced);
    let heard = bench.heard();
    assert_eq!(heard.len(), 4, "{heard:?}");
    let state = bench.kernel.0.borrow();
    assert_eq!(state.reads, 1);
    let frontends =
        &state.ruleset.tables[&table_id(Family::V4)].sets[&ServiceSet::Frontends.name()];
    assert_eq!(frontends.elements.len(), 2);
}

#[test]
fn conflicts_without_end_are_tried_again_later() {
    let bench = Bench::new();
    bench.kernel.0.borrow_mut().conflicts = Some(0);
    let mut controller = bench.controller();
    let objects = lists(vec![service("web", &["10.96.0.1"], &[80]).into()]);
    assert_eq!(handle(&mut controller, objects), Outcome::Failed);
    let reads = bench.kernel.0.borrow().reads;
    assert!((2..=9).contains(&reads), "{reads}");
    bench.kernel.0.borrow_mut().conflicts = None;
    assert_eq!(handle(&mut controller, vec![]), Outcome::Synced);
    bench.assert_as_wanted(&controller);
}
