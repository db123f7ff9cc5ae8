//! Large services that change while they wait for their turn.

use super::histories::event;
use super::portions::{PORTION, elements, finish, once, started, vast};
use super::*;

/// A service of 40 ports with 100 endpoints each, all such at one address.
fn at_one_address(name: &str, created: i64, first_endpoint: u8) -> (Service, EndpointSlice) {
    let ports: Vec<u16> = (1..=40).collect();
    let mut service = service(name, &["10.96.9.9"], &ports);
    service.created = Some(created);
    let endpoints: Vec<u8> = (first_endpoint..first_endpoint + 100).collect();
    let slice = slice(&format!("{name}-1"), &service, Family::V4, &endpoints);
    (service, slice)
}

/// An older service comes with the frontends of one whose last portion is written next.
#[test]
fn frontends_stay_taken_until_the_service_that_lost_them_is_compiled_again() {
    for first_endpoint in [1, 101] {
        let bench = Bench::new();
        let mut controller = started(&bench);
        let (young, pods) = at_one_address("young", 2, 1);
        let name = young.name.clone();
        once(&mut controller, vec![put(young), put(pods)]);
        while controller.services.engine.tables().left(&name) == 0
            || controller.services.engine.tables().left(&name) > PORTION
        {
            once(&mut controller, vec![]);
        }
        assert!(controller.has_more());
        let (old, pods) = at_one_address("old", 1, first_endpoint);
        once(&mut controller, vec![put(old), put(pods)]);
        finish(&mut controller);
        bench.assert_as_wanted(&controller);
        let heard = bench.heard();
        let of_objects = heard.iter().all(|line| line.starts_with("Service shop/"));
        assert!(of_objects, "{heard:#?}");
        assert_eq!(bench.kernel.0.borrow().reads, 1, "a write failed");
    }
}

#[test]
fn a_service_that_keeps_changing_is_written() {
    let bench = Bench::new();
    let mut controller = started(&bench);
    for round in 0..60 {
        let mut other = vast(1);
        other.external_ips.truncate(28 + round % 2);
        once(&mut controller, vec![put(other)]);
    }
    assert!(elements(&bench, ServiceSet::Frontends) > 0);
}

#[test]
fn a_service_that_keeps_changing_does_not_hold_up_its_namespace() {
    let bench = Bench::new();
    let mut controller = started(&bench);
    let changing = vast(1).name;
    once(&mut controller, vec![put(vast(1)), put(vast(2))]);
    let mut changes = 0;
    for _ in 0..100 {
        let mut events = vec![];
        // Another change each time that one is being written.
        if controller.services.engine.is_being_written(&changing) {
            changes += 1;
            let mut other = vast(1);
            other.external_ips.truncate(1 + 29 * ((changes + 1) % 2));
            events.push(put(other));
        }
        once(&mut controller, events);
    }
    assert!(changes > 10, "{changes}");
    assert!(controller.store().service(&vast(2).name).is_some());
}

#[test]
fn a_slice_of_a_service_that_does_not_come_is_an_orphan() {
    let unchanged = vec![
        vec![put(vast(1))],
        vec![put(vast(1))],
        vec![delete(Kind::Service, "vast-1")],
    ];
    let gone_before = vec![vec![put(vast(1)), delete(Kind::Service, "vast-1")]];
    let not_listed = vec![vec![
        put(vast(1)),
        Event::ListStarted(Kind::Service),
        Event::ListComplete(Kind::Service),
    ]];
    for history in [unchanged, gone_before, not_listed] {
        let bench = Bench::new();
        let mut controller = started(&bench);
        for events in history {
            handle(&mut controller, events);
        }
        let orphan = slice("vast-1-1", &vast(1), Family::V4, &[1]);
        handle(&mut controller, vec![put(orphan)]);
        assert_eq!(bench.heard().len(), 1);
    }
}

#[test]
fn the_heir_of_a_service_whose_end_waits_is_no_conflict() {
    let bench = Bench::new();
    let mut controller = started(&bench);
    let mut gone = vast(1);
    gone.created = Some(1);
    handle(&mut controller, vec![put(gone)]);
    let heir = service("heir", &["10.96.8.1"], &[1]);
    handle(
        &mut controller,
        vec![delete(Kind::Service, "vast-1"), put(heir)],
    );
    assert_eq!(bench.heard(), Vec::<String>::new());
    bench.assert_as_wanted(&controller);
}

#[test]
fn a_service_of_which_portions_wait_is_pending() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_portions_of(100);
    handle(&mut controller, lists(vec![node().into()]));
    assert_eq!(controller.latency.pending(), (0, 0));
    once(&mut controller, vec![put(vast(1))]);
    while controller.has_more() {
        assert_eq!(controller.latency.pending(), (1, 0));
        once(&mut controller, vec![]);
    }
    assert_eq!(controller.latency.pending(), (0, 0));
}

/// The frontends of a vast service that are compiled belong to it, though none is written yet.
#[test]
fn a_failure_while_a_service_is_compiled_leaves_nothing_out() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_portions_of(100);
    handle(&mut controller, lists(vec![node().into()]));
    let name = vast(1).name;
    once(&mut controller, vec![put(vast(1))]);
    while controller.store().service(&name).is_none() {
        once(&mut controller, vec![]);
    }
    for _ in 0..3 {
        once(&mut controller, vec![]);
        assert!(!controller.services.engine.is_being_written(&name));
    }
    bench.kernel.0.borrow_mut().failures = 1;
    let small = service("small", &["10.96.0.1"], &[80]);
    let events = [put(small)].into_iter().map(Delivery::now);
    controller.apply(events);
    let mut outcome = controller.work(Engines::ALL).together();
    while outcome != Outcome::Synced {
        outcome = controller.resync();
    }
    finish(&mut controller);
    bench.assert_as_wanted(&controller);
    assert_eq!(elements(&bench, ServiceSet::Frontends), 31 * 40 + 1);
}

/// What claims nothing since it has too many frontends is said to be too large.
#[test]
fn a_service_at_the_bound_of_frontends_is_written_or_named() {
    let bench = Bench::new();
    let mut controller = started(&bench);
    let ports: Vec<u16> = (1..=990).collect();
    let mut large = service("large", &["10.96.0.1"], &ports);
    let first = u32::from(std::net::Ipv4Addr::new(198, 18, 0, 0));
    let addresses = (0..504).map(|number| IpAddr::V4((first + number).into()));
    large.external_ips = addresses.collect();
    handle(&mut controller, vec![put(large)]);
    assert!(elements(&bench, ServiceSet::Frontends) > 0 || bench.heard().len() == 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// A refused write would be mended by a comparison of everything, and hide its cause.
    #[test]
    fn no_write_is_refused(
        history in vec((vec(event(), 0..5), 0usize..4), 1..16),
        portion in 1usize..12,
    ) {
        let bench = Bench::new();
        let mut controller = bench.controller().with_portions_of(portion);
        handle(&mut controller, lists(vec![]));
        for (events, calls) in history {
            controller.apply(events.into_iter().map(Delivery::now));
            for _ in 0..=calls {
                prop_assert_eq!(controller.work(Engines::ALL).together(), Outcome::Synced);
                prop_assert_eq!(bench.kernel.0.borrow().reads, 1, "{:?}", bench.heard());
            }
        }
        let mut calls = 0;
        while controller.has_more() {
            prop_assert_eq!(controller.work(Engines::SERVICES).together(), Outcome::Synced);
            prop_assert_eq!(bench.kernel.0.borrow().reads, 1, "{:?}", bench.heard());
            calls += 1;
            prop_assert!(calls < 2_000, "there is no end to the portions");
        }
        bench.assert_as_wanted(&controller);
        prop_assert!(controller.services.engine.is_idle());
        prop_assert!(controller.latency.is_empty(), "some events are timed for ever");
    }
}
