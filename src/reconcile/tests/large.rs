//! Clusters whose first program is written in steps.

use super::*;

/// Services with 250 endpoints each; nine thousand elements do not fit into one step.
fn cluster() -> Vec<Object> {
    let endpoints: Vec<u8> = (1..=250).collect();
    (1..=36)
        .flat_map(|number| {
            let name = format!("service-{number}");
            let service = service(&name, &[&format!("10.96.0.{number}")], &[80]);
            let slice = slice(&format!("{name}-1"), &service, Family::V4, &endpoints);
            [Object::from(service), slice.into()]
        })
        .collect()
}

fn adds_base_chain(transaction: &Transaction) -> bool {
    let mut ops = transaction.ops.iter();
    ops.any(|op| matches!(op, Op::AddChain(_, _, Some(_))))
}

#[test]
fn packets_meet_a_large_table_when_it_is_whole() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler();
    assert_eq!(handle(&mut reconciler, lists(cluster())), Outcome::Synced);
    bench.assert_as_wanted(&reconciler);
    let applied = bench.applied();
    assert!(applied.len() > 2, "{} transactions", applied.len());
    let (last, others) = applied.split_last().unwrap();
    assert!(adds_base_chain(last));
    assert!(!others.iter().any(adds_base_chain));
    // Emptied by somebody else it comes back in the same way.
    bench.kernel.meddle(|ruleset| ruleset.tables.clear());
    assert_eq!(heal(&mut reconciler), (Outcome::Synced, true));
    bench.assert_as_wanted(&reconciler);
    assert_eq!(bench.applied().len(), applied.len());
}

/// What steps before have written is found and completed.
#[test]
fn a_refusal_between_steps_leaves_one_service_out() {
    let bench = Bench::new();
    let unwanted = Key::build()
        .address("10.96.0.7".parse().unwrap())
        .protocol(6)
        .port(80)
        .finish();
    bench.kernel.0.borrow_mut().unwanted = Some(unwanted);
    let mut reconciler = bench.reconciler();
    assert_eq!(handle(&mut reconciler, lists(cluster())), Outcome::Synced);
    let heard = bench.heard();
    assert_eq!(heard.len(), 1, "{heard:?}");
    assert!(heard[0].starts_with("Service shop/service-7: the kernel refused"));
    let state = bench.kernel.0.borrow();
    let table = &state.ruleset.tables[&table_id(Family::V4)];
    assert_eq!(table.sets[&ServiceSet::Frontends.name()].elements.len(), 35);
    assert_eq!(
        table.sets[&ServiceSet::Endpoints.name()].elements.len(),
        35 * 250
    );
    assert!(table.chains.values().any(|chain| chain.base.is_some()));
}

#[test]
fn a_failure_between_steps_is_made_good_later() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler();
    bench.kernel.0.borrow_mut().most = Some(3);
    assert_eq!(handle(&mut reconciler, lists(cluster())), Outcome::Failed);
    let half = bench.kernel.0.borrow().ruleset.clone();
    assert!(!half.tables.is_empty());
    let mut chains = half.tables.values().flat_map(|table| table.chains.values());
    assert!(chains.all(|chain| chain.base.is_none()));
    bench.kernel.0.borrow_mut().most = None;
    assert_eq!(reconciler.resync(), Outcome::Synced);
    bench.assert_as_wanted(&reconciler);
}
