//! Which operations count as putting back what others changed.

use super::queries::{closed, engine, pod, policy_lists};
use super::*;
use crate::policies;

/// The operations that are counted, and the reports of them.
fn healed(bench: &Bench) -> (u64, usize) {
    let text = bench.registry.encode();
    let name = "\nnftlet_foreign_changes_healed_total ";
    let (_, rest) = text.split_once(name).unwrap();
    let count = rest.lines().next().unwrap().parse().unwrap();
    let heard = bench.heard();
    let reports = heard
        .iter()
        .filter(|line| line.contains("modified by another process"));
    (count, reports.count())
}

fn web(last: u8) -> Event {
    put(service(
        &format!("web-{last}"),
        &[&format!("10.96.0.{last}")],
        &[80],
    ))
}

fn delete_tables(kernel: &Fake, name: &str) {
    kernel.meddle(|ruleset| ruleset.tables.retain(|id, _| id.name.as_str() != name));
}

#[test]
fn what_waits_after_a_failed_write_is_no_change_of_others() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_policies(engine());
    let fail = |times| bench.kernel.0.borrow_mut().failures = times;
    // The first rules of both parts.
    fail(3);
    let first = [lists(vec![]), policy_lists(vec![closed()])].concat();
    assert_eq!(handle(&mut controller, first), Outcome::Failed);
    while handle(&mut controller, vec![]) != Outcome::Synced {}
    // A change of each, while another process changes its own tables.
    fail(4);
    bench.kernel.meddle(|_| ());
    let both = vec![web(1), pod("web", "10.1.0.5")];
    assert_eq!(handle(&mut controller, both), Outcome::Failed);
    assert_eq!(handle(&mut controller, vec![web(2)]), Outcome::Synced);
    // A change of policies that is not written yet.
    controller.apply([Delivery::now(pod("other", "10.1.0.6"))]);
    bench.kernel.meddle(|_| ());
    assert_eq!(heal(&mut controller), (Outcome::Synced, false));
    assert_eq!(healed(&bench), (0, 0));
}

#[test]
fn a_change_of_others_counts_although_a_write_meets_it_first_or_fails() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_policies(engine());
    let first = [
        lists(vec![]),
        policy_lists(vec![pod("web", "10.1.0.5"), closed()]),
    ];
    handle(&mut controller, first.concat());
    // An own write meets it.
    delete_tables(&bench.kernel, services::TABLE);
    assert_eq!(handle(&mut controller, vec![web(1)]), Outcome::Synced);
    let (services, reports) = healed(&bench);
    assert_eq!((services > 0, reports), (true, 1));
    delete_tables(&bench.kernel, policies::TABLE);
    let outcome = handle(&mut controller, vec![pod("other", "10.1.0.6")]);
    assert_eq!(outcome, Outcome::Synced);
    let (policies, reports) = healed(&bench);
    assert_eq!((policies > services, reports), (true, 1));
    // The first repair fails. Changes that wait to be written by then are not counted.
    bench.kernel.meddle(|ruleset| {
        let table = ruleset.tables.get_mut(&table_id(Family::V4)).unwrap();
        table
            .chains
            .insert(Name::from("intruder"), Default::default());
    });
    bench.kernel.0.borrow_mut().failures = 2;
    assert_eq!(heal(&mut controller), (Outcome::Failed, true));
    assert_eq!(healed(&bench), (policies, 0));
    assert_eq!(handle(&mut controller, vec![web(2)]), Outcome::Synced);
    assert_eq!(healed(&bench), (policies + 1, 1));
}
