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
    let mut controller = bench.controller();
    assert_eq!(handle(&mut controller, lists(cluster())), Outcome::Synced);
    bench.assert_as_wanted(&controller);
    let applied = bench.applied();
    assert!(applied.len() > 2, "{} transactions", applied.len());
    let (last, others) = applied.split_last().unwrap();
    assert!(adds_base_chain(last));
    assert!(!others.iter().any(adds_base_chain));
    // Emptied by another process it is restored in the same way.
    bench.kernel.meddle(|ruleset| ruleset.tables.clear());
    assert_eq!(heal(&mut controller), (Outcome::Synced, true));
    bench.assert_as_wanted(&controller);
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
    let mut controller = bench.controller();
    assert_eq!(handle(&mut controller, lists(cluster())), Outcome::Synced);
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
    let mut controller = bench.controller();
    bench.kernel.0.borrow_mut().most = Some(3);
    assert_eq!(handle(&mut controller, lists(cluster())), Outcome::Failed);
    let half = bench.kernel.0.borrow().ruleset.clone();
    assert!(!half.tables.is_empty());
    let mut chains = half.tables.values().flat_map(|table| table.chains.values());
    assert!(chains.all(|chain| chain.base.is_none()));
    bench.kernel.0.borrow_mut().most = None;
    assert_eq!(controller.resync(), Outcome::Synced);
    bench.assert_as_wanted(&controller);
}

/// The endpoints of each frontend of the IPv4 table, without their indexes.
fn endpoints_by_frontend(ruleset: &Ruleset) -> BTreeMap<Vec<u8>, BTreeSet<Key>> {
    let table = &ruleset.tables[&table_id(Family::V4)];
    let mut found: BTreeMap<Vec<u8>, BTreeSet<Key>> = BTreeMap::new();
    for element in &table.sets[&ServiceSet::Endpoints.name()].elements {
        let crate::nft::Value::Data(endpoint) = &element.value else {
            panic!("{element:?} leads to no endpoint");
        };
        let key = element.key.as_bytes();
        let frontend = key[..key.len() - 4].to_vec();
        found.entry(frontend).or_default().insert(endpoint.clone());
    }
    found
}

/// Other endpoints for every service of [`cluster`]: as many, or one in three fewer.
fn others() -> Vec<EndpointSlice> {
    (1..=36)
        .map(|number| {
            let name = format!("service-{number}");
            let service = service(&name, &[&format!("10.96.0.{number}")], &[80]);
            let last = if number % 3 == 0 { 200 } else { 250 };
            let endpoints: Vec<u8> = (1..=last).collect();
            let mut slice = slice(&format!("{name}-1"), &service, Family::V4, &endpoints);
            for endpoint in &mut slice.endpoints {
                let IpAddr::V4(address) = endpoint.address else {
                    panic!("an address of the other family");
                };
                let [_, _, c, d] = address.octets();
                endpoint.address = [10, 250, c, d].into();
            }
            slice
        })
        .collect()
}

#[test]
fn a_large_change_of_endpoints_is_written_service_by_service() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    handle(&mut controller, lists(cluster()));
    bench.applied();
    let mut ruleset = bench.kernel.0.borrow().ruleset.clone();
    let before = endpoints_by_frontend(&ruleset);
    let changes = others().into_iter().map(put).collect();
    assert_eq!(handle(&mut controller, changes), Outcome::Synced);
    bench.assert_as_wanted(&controller);
    let after = endpoints_by_frontend(&bench.kernel.0.borrow().ruleset);
    let applied = bench.applied();
    assert!(applied.len() > 2, "{} transactions", applied.len());
    for transaction in &applied {
        assert!(transaction.elements() < 10_000);
        simulate::apply(&mut ruleset, transaction).unwrap();
        for (frontend, endpoints) in endpoints_by_frontend(&ruleset) {
            let whole = [&before, &after].map(|state| state.get(&frontend) == Some(&endpoints));
            assert!(whole.contains(&true), "{frontend:02x?} is half way");
        }
    }
}

#[test]
fn frontends_that_move_are_not_cut() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    handle(&mut controller, lists(cluster()));
    bench.applied();
    // The first service takes over the last one's address, which is compiled after it.
    let mut changes: Vec<Event> = others().into_iter().map(put).collect();
    let mut last = service("service-9", &["10.96.0.9"], &[80]);
    last.cluster_ips = vec!["10.96.1.9".parse().unwrap()];
    let mut first = service("service-1", &["10.96.0.9"], &[80]);
    first.created = last.created;
    changes.extend([put(last), put(first)]);
    assert_eq!(handle(&mut controller, changes), Outcome::Synced);
    assert_eq!(bench.heard(), Vec::<String>::new());
    bench.assert_as_wanted(&controller);
}

#[test]
fn what_is_left_of_a_large_change_is_not_forgotten_when_a_part_fails() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    handle(&mut controller, lists(cluster()));
    let already = bench.kernel.0.borrow().applied.len();
    bench.kernel.0.borrow_mut().most = Some(already + 1);
    let changes = others().into_iter().map(put).collect();
    assert_eq!(handle(&mut controller, changes), Outcome::Failed);
    bench.kernel.0.borrow_mut().most = None;
    assert_eq!(controller.resync(), Outcome::Synced);
    bench.assert_as_wanted(&controller);
}
