//! Changes that are written in portions, and services that ask for too much.

use super::histories::event;
use super::*;
use crate::nft::Value;
use crate::services;
use crate::services::{Count, Marks};

/// The maps of frontends with the maps from which the chains draw that they lead to.
const DRAWN: [(ServiceSet, ServiceSet); 4] = [
    (ServiceSet::Frontends, ServiceSet::Endpoints),
    (ServiceSet::LocalFrontends, ServiceSet::LocalEndpoints),
    (ServiceSet::NodePorts, ServiceSet::NodePortEndpoints),
    (
        ServiceSet::NodePortsLocal,
        ServiceSet::NodePortLocalEndpoints,
    ),
];

/// The maps of frontends to chains.
const LEADING: [ServiceSet; 5] = [
    ServiceSet::FirewalledFrontends,
    ServiceSet::StickyFrontends,
    ServiceSet::StickyNodePorts,
    ServiceSet::AffinityFrontends,
    ServiceSet::AffinityNodePorts,
];

/// Checks that every verdict leads to a chain that exists, and that there is an endpoint for each
/// index of which the chains for a frontend rely on. Returns the number of indexes.
fn assert_packets_are_safe(ruleset: &Ruleset) -> usize {
    let mut drawn = 0;
    for table in ruleset.tables.values() {
        for element in LEADING
            .iter()
            .flat_map(|set| &table.sets[&set.name()].elements)
        {
            let Value::Verdict(verdict) = &element.value else {
                panic!("{element:?} is no verdict");
            };
            let chain = verdict.target().unwrap();
            assert!(table.chains.contains_key(chain), "{element:?}: {chain:?}");
        }
        for (frontends, endpoints) in DRAWN {
            let filled: BTreeSet<&[u8]> = table.sets[&endpoints.name()]
                .elements
                .iter()
                .map(|element| element.key.as_bytes())
                .collect();
            for element in &table.sets[&frontends.name()].elements {
                let Value::Data(data) = &element.value else {
                    panic!("{element:?} has no number");
                };
                let number = u32::from_ne_bytes(data.as_bytes().try_into().unwrap());
                let code = number & 0xffff;
                if code == 0 {
                    continue;
                }
                let count = Count::all().find(|count| u32::from(count.code()) == code);
                for index in 1..=count.unwrap().filled() {
                    let key = [element.key.as_bytes(), &index.to_ne_bytes()].concat();
                    assert!(
                        filled.contains(&*key),
                        "{element:?} has no endpoint {index}"
                    );
                    drawn += 1;
                }
            }
        }
    }
    drawn
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// However small the portions and whatever comes in between them, packets are safe after each,
    /// and the kernel ends where a new process would bring it.
    #[test]
    fn after_every_portion_packets_are_safe(
        history in vec((vec(event(), 0..5), 0usize..12), 1..16),
        portion in 1usize..6,
    ) {
        let bench = Bench::new();
        let mut controller = bench.controller().with_portions_of(portion);
        handle(&mut controller, lists(vec![]));
        let mut ruleset = bench.kernel.0.borrow().ruleset.clone();
        bench.applied();
        for (events, failures) in history {
            bench.kernel.0.borrow_mut().failures = failures.saturating_sub(9);
            controller.apply(events.into_iter().map(Delivery::now));
            let mut outcome = controller.work(Engines::ALL).together();
            while outcome != Outcome::Synced {
                outcome = controller.resync();
            }
            bench.kernel.0.borrow_mut().failures = 0;
            // What is in force is known between two portions, too.
            prop_assert_eq!(heal(&mut controller), (Outcome::Synced, false));
            for transaction in bench.applied() {
                simulate::apply(&mut ruleset, &transaction).unwrap();
                assert_packets_are_safe(&ruleset);
            }
        }
        let mut calls = 0;
        while controller.has_more() {
            prop_assert_eq!(controller.work(Engines::SERVICES).together(), Outcome::Synced);
            calls += 1;
            prop_assert!(calls < 2_000, "there is no end to the portions");
        }
        for transaction in bench.applied() {
            simulate::apply(&mut ruleset, &transaction).unwrap();
            assert_packets_are_safe(&ruleset);
        }
        bench.assert_as_wanted(&controller);
        prop_assert!(controller.latency.is_empty(), "some events are timed for ever");
    }
}

pub(super) const PORTION: usize = 1_000;

/// A service of 40 ports with 100 endpoints each: more than four portions.
fn huge() -> (Service, EndpointSlice) {
    let ports: Vec<u16> = (1..=40).collect();
    let service = service("huge", &["10.96.9.9"], &ports);
    let endpoints: Vec<u8> = (1..=100).collect();
    let slice = slice("huge-1", &service, Family::V4, &endpoints);
    (service, slice)
}

pub(super) fn started(bench: &Bench) -> Controller<'_, Fake> {
    let mut controller = bench.controller().with_portions_of(PORTION);
    handle(&mut controller, lists(vec![node().into()]));
    bench.applied();
    controller
}

/// Takes over events and writes a portion.
pub(super) fn once(controller: &mut Controller<Fake>, events: Vec<Event>) {
    controller.apply(events.into_iter().map(Delivery::now));
    assert_eq!(controller.work(Engines::ALL).together(), Outcome::Synced);
}

pub(super) fn finish(controller: &mut Controller<Fake>) {
    assert_eq!(handle(controller, vec![]), Outcome::Synced);
    assert!(!controller.has_more());
}

pub(super) fn elements(bench: &Bench, set: ServiceSet) -> usize {
    let state = bench.kernel.0.borrow();
    let table = &state.ruleset.tables[&table_id(Family::V4)];
    table.sets[&set.name()].elements.len()
}

#[test]
fn others_are_written_between_the_portions_of_a_huge_service() {
    let bench = Bench::new();
    let mut controller = started(&bench);
    let (huge, endpoints) = huge();
    once(&mut controller, vec![put(huge), put(endpoints)]);
    assert!(controller.has_more());
    assert_eq!(
        elements(&bench, ServiceSet::Frontends),
        0,
        "endpoints first"
    );
    let small = service("small", &["10.96.0.1"], &[80]);
    let pods = slice("small-1", &small, Family::V4, &[1, 2]);
    once(&mut controller, vec![put(small), put(pods)]);
    assert!(controller.has_more());
    assert_eq!(elements(&bench, ServiceSet::Frontends), 1);
    finish(&mut controller);
    bench.assert_as_wanted(&controller);
    let applied = bench.applied();
    let sizes: Vec<usize> = applied.iter().map(Transaction::elements).collect();
    assert!(sizes.iter().all(|size| *size <= PORTION + 10), "{sizes:?}");
    // For each port a verdict and its endpoints, pairs of those on this node, and the ClusterIP.
    let (huge, small) = (40 * 101 + 50 + 1, 1 + 2 + 1);
    let draws = 2 * Count::all().count();
    assert_eq!(
        sizes.iter().sum::<usize>(),
        huge + small + draws,
        "{sizes:?}"
    );
}

/// A service of 40 ports at 30 addresses: more frontends than a portion has elements.
pub(super) fn vast(number: u8) -> Service {
    let ports: Vec<u16> = (1..=40).collect();
    let name = format!("vast-{number}");
    let mut service = service(&name, &[&format!("10.96.8.{number}")], &ports);
    let addresses = (1..=30).map(|host| IpAddr::from([198, 18, number, host]));
    service.external_ips = addresses.collect();
    service
}

#[test]
fn many_vast_services_of_one_batch_wait_for_one_portion_of_work_each() {
    let bench = Bench::new();
    let mut controller = started(&bench);
    let small = service("small", &["10.96.0.1"], &[80]);
    let mut events: Vec<Event> = (1..=5).map(|number| put(vast(number))).collect();
    events.push(put(slice("vast-1-1", &vast(1), Family::V4, &[])));
    events.push(put(small));
    once(&mut controller, events);
    assert_eq!(elements(&bench, ServiceSet::Frontends), 1);
    assert_eq!(
        controller.store().count(Kind::Service),
        2,
        "the small one, and the vast one that has had its turn"
    );
    finish(&mut controller);
    bench.assert_as_wanted(&controller);
    assert_eq!(
        elements(&bench, ServiceSet::Frontends),
        1 + 5 * 31 * 40,
        "all of them"
    );
    assert_eq!(bench.heard(), Vec::<String>::new(), "no slice is an orphan");
}

#[test]
fn the_newest_event_of_a_vast_service_counts() {
    let bench = Bench::new();
    let mut controller = started(&bench);
    let mut other = vast(1);
    other.external_ips.truncate(3);
    once(&mut controller, vec![put(vast(1)), put(other)]);
    finish(&mut controller);
    assert_eq!(elements(&bench, ServiceSet::Frontends), 4 * 40);
    once(
        &mut controller,
        vec![put(vast(1)), delete(Kind::Service, "vast-1")],
    );
    finish(&mut controller);
    assert_eq!(elements(&bench, ServiceSet::Frontends), 0);
    bench.assert_as_wanted(&controller);
}

#[test]
fn a_list_replaces_the_events_that_wait() {
    let bench = Bench::new();
    let mut controller = started(&bench);
    let list = |objects: Vec<Event>| {
        let mut events = vec![Event::ListStarted(Kind::Service)];
        events.extend(objects);
        events.push(Event::ListComplete(Kind::Service));
        events
    };
    once(&mut controller, vec![put(vast(1)), put(vast(2))]);
    once(&mut controller, list(vec![put(vast(2)), put(vast(3))]));
    finish(&mut controller);
    bench.assert_as_wanted(&controller);
    assert_eq!(elements(&bench, ServiceSet::Frontends), 2 * 31 * 40);
    assert!(controller.store().service(&vast(1).name).is_none());
}

#[test]
fn one_endpoint_of_a_huge_service_is_two_elements_for_each_port() {
    let bench = Bench::new();
    let mut controller = started(&bench);
    let (huge, endpoints) = huge();
    handle(&mut controller, vec![put(huge), put(endpoints.clone())]);
    bench.applied();
    let mut other = endpoints;
    other.endpoints[0].address = [10, 244, 9, 9].into();
    assert_eq!(handle(&mut controller, vec![put(other)]), Outcome::Synced);
    let applied = bench.applied();
    assert_eq!(applied.len(), 1);
    // The first endpoint is on the other node.
    assert_eq!(applied[0].elements(), 2 * 40);
}

#[test]
fn a_service_that_goes_half_way_leaves_nothing() {
    let bench = Bench::new();
    let mut controller = started(&bench);
    let (huge, endpoints) = huge();
    once(&mut controller, vec![put(huge), put(endpoints)]);
    once(&mut controller, vec![delete(Kind::Service, "huge")]);
    finish(&mut controller);
    bench.assert_as_wanted(&controller);
    assert_eq!(elements(&bench, ServiceSet::Endpoints), 0);
    assert_eq!(elements(&bench, ServiceSet::Hairpin), 0);
}

#[test]
fn the_frontend_of_a_change_that_waits_moves_when_it_is_written() {
    let bench = Bench::new();
    let mut controller = started(&bench);
    let (mut huge, endpoints) = huge();
    huge.created = Some(1);
    handle(&mut controller, vec![put(huge.clone()), put(endpoints)]);
    // It begins to go, and another service gets its address at once.
    let heir = service("heir", &["10.96.9.9"], &[1]);
    let pods = slice("heir-1", &heir, Family::V4, &[7]);
    once(
        &mut controller,
        vec![delete(Kind::Service, "huge"), put(heir), put(pods)],
    );
    assert!(controller.has_more());
    finish(&mut controller);
    assert_eq!(bench.heard(), Vec::<String>::new());
    bench.assert_as_wanted(&controller);
    assert_eq!(elements(&bench, ServiceSet::Frontends), 1);
}

#[test]
fn a_refusal_between_portions_leaves_the_service_out() {
    let bench = Bench::new();
    let mut controller = started(&bench);
    let unwanted = Key::build()
        .address("10.96.9.9".parse().unwrap())
        .protocol(6)
        .port(30);
    bench.kernel.0.borrow_mut().unwanted = Some(unwanted.number(50).finish());
    let (huge, endpoints) = huge();
    let small = service("small", &["10.96.0.1"], &[80]);
    let pods = slice("small-1", &small, Family::V4, &[1, 2]);
    let events = vec![put(huge), put(endpoints), put(small), put(pods)];
    assert_eq!(handle(&mut controller, events), Outcome::Synced);
    let heard = bench.heard();
    assert!(
        heard
            .iter()
            .any(|line| line.starts_with("Service shop/huge: the kernel refused"))
    );
    assert_eq!(elements(&bench, ServiceSet::Frontends), 1);
    assert_eq!(elements(&bench, ServiceSet::Endpoints), 2);
}

#[test]
fn a_service_that_asks_for_too_much_is_left_out_until_it_asks_for_less() {
    let bench = Bench::new();
    let mut controller = started(&bench);
    let ports: Vec<u16> = (1..=100).collect();
    let mut large = service("large", &["10.96.0.1"], &ports);
    let pods = slice("large-1", &large, Family::V4, &[1, 2, 3]);
    handle(&mut controller, vec![put(large.clone()), put(pods.clone())]);
    assert_eq!(elements(&bench, ServiceSet::Frontends), 100);
    let addresses = |count: u32| -> Vec<IpAddr> {
        let first = u32::from(std::net::Ipv4Addr::new(198, 18, 0, 0));
        (0..count).map(|n| IpAddr::V4((first + n).into())).collect()
    };
    // 100 ports of 1,300 addresses with three endpoints, or of 5,100 with none.
    for (count, with) in [(1_300, true), (5_100, false)] {
        large.external_ips = addresses(count);
        let mut events = vec![put(large.clone())];
        if !with {
            events.push(delete(Kind::EndpointSlice, "large-1"));
        }
        assert_eq!(handle(&mut controller, events), Outcome::Synced);
        assert_eq!(elements(&bench, ServiceSet::Frontends), 0);
        assert_eq!(elements(&bench, ServiceSet::Endpoints), 0);
        assert!(
            bench
                .registry
                .encode()
                .contains("nftlet_refused_services 1")
        );
    }
    let heard = bench.heard();
    assert_eq!(heard.len(), 1, "{heard:?}");
    assert!(
        heard[0].starts_with("Service shop/large: needs "),
        "{heard:?}"
    );
    // One that cannot even be counted claims nothing.
    let other = service("other", &["198.18.0.7"], &[7]);
    handle(&mut controller, vec![put(other)]);
    assert_eq!(elements(&bench, ServiceSet::Frontends), 1);
    large.external_ips = addresses(2);
    handle(&mut controller, vec![put(large), put(pods)]);
    assert_eq!(elements(&bench, ServiceSet::Frontends), 301);
    assert!(
        bench
            .registry
            .encode()
            .contains("nftlet_refused_services 0")
    );
}

#[test]
fn many_ports_and_many_endpoints_are_within_the_bound() {
    let large_slice = |service: &Service, count: u32| {
        let mut slice = slice("large-1", service, Family::V4, &[]);
        slice.endpoints = (0..count)
            .map(|n| Endpoint {
                address: IpAddr::V4((u32::from(std::net::Ipv4Addr::new(10, 128, 0, 0)) + n).into()),
                ready: true,
                serving: true,
                terminating: false,
                node: None,
                hints: None,
            })
            .collect();
        slice
    };
    for (ports, endpoints) in [(10_000u16, 10u32), (1, 100_000)] {
        let mut service = service("large", &["10.96.0.1"], &[]);
        service.ports = (1..=ports)
            .map(|port| ServicePort {
                name: format!("p{port}").into(),
                protocol: Protocol::Tcp,
                port,
                node_port: None,
            })
            .collect();
        let mut slice = large_slice(&service, endpoints);
        for port in &mut slice.ports {
            port.port = 80;
        }
        let (mut store, mut marks) = (Store::default(), Marks::default());
        let name = service.name.clone();
        for event in [put(service), put(slice)] {
            store.apply(event, &mut marks);
        }
        let plan = services::plan(&store, &name, &ServiceSettings::default(), None);
        let plan = plan.unwrap().unwrap();
        assert_eq!(plan.frontends.len(), usize::from(ports));
        let reached = plan.reach().map(|(_, pool)| pool.targets.len());
        assert_eq!(reached.sum::<usize>(), 100_000);
    }
}

#[test]
fn a_chain_that_expired_starts_no_timer_while_portions_wait() {
    let bench = Bench::new();
    let mut controller = started(&bench);
    once(&mut controller, vec![put(restricted(8))]);
    once(&mut controller, vec![put(restricted(16))]);
    assert!(controller.services.due().is_some());
    let (huge, endpoints) = huge();
    once(&mut controller, vec![put(huge), put(endpoints)]);
    assert!(controller.has_more());
    assert_eq!(controller.services.due(), None);
    finish(&mut controller);
    assert!(controller.services.due().is_some());
}
