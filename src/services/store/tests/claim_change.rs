//! Services whose claims are taken over some at a time.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// A service with 40 ports at each of these addresses.
fn large(name: &str, created: i64, addresses: std::ops::Range<u8>) -> Service {
    let mut service = service(name, created, "198.18.0.0");
    let addresses = addresses.map(|last| IpAddr::from([198, 18, 0, last]));
    service.external_ips = addresses.collect();
    service.ports = (1..=40).map(|number| port(number, None)).collect();
    service
}

fn port(number: u16, node_port: Option<u16>) -> ServicePort {
    ServicePort {
        name: format!("p{number}").into(),
        protocol: Protocol::Tcp,
        port: number,
        node_port,
    }
}

fn applied(service: Service) -> Event {
    Event::Apply(Object::Service(service))
}

/// How many claims of [`large`] services a service owns.
fn owned(store: &Store, name: &str) -> usize {
    let addresses = (0..=u8::MAX).map(|last| IpAddr::from([198, 18, 0, last]));
    let claims = addresses
        .flat_map(|address| (1..=40).map(move |port| Claim::Address(address, Protocol::Tcp, port)));
    claims
        .filter(|claim| owner(store, claim) == Some(name))
        .count()
}

/// Begins to take over an event and goes on, so many claims at a time.
fn apply_in_portions(
    store: &mut Store,
    event: Event,
    most: usize,
    mut between: impl FnMut(&Store),
) -> Marks {
    let name = event.service().unwrap().clone();
    let mut marks = Marks::default();
    store.begin_apply(event, &mut marks);
    while store.is_applying(&name) {
        store.continue_apply(&name, most, &mut marks);
        between(store);
    }
    marks
}

#[test]
fn no_turn_changes_more_claims_than_it_may() {
    const MOST: usize = 100;
    let mut store = complete_store();
    put(&mut store, Object::Service(large("young", 2, 0..30)));
    let name = ObjectName::new("shop", "old");
    let delete = Event::Delete(ObjectRef::new(Kind::Service, name.clone()));
    // The first addresses of the second form stay, and others come in their place.
    for (event, exists, owns) in [
        (applied(large("old", 1, 10..50)), false, 1_600),
        (applied(large("old", 1, 20..80)), true, 2_400),
        (delete, true, 0),
    ] {
        let (mut before, mut turns) = (owned(&store, "old"), 0);
        let marks = apply_in_portions(&mut store, event, MOST, |store| {
            let now = owned(store, "old");
            assert!(now.abs_diff(before) <= MOST, "{before} to {now}");
            assert!(!store.is_applying(&name) || store.service(&name).is_some() == exists);
            before = now;
            turns += 1;
        });
        assert!(turns > 15, "{turns}");
        assert_eq!(owned(&store, "old"), owns);
        assert_eq!(names(&marks), ["old", "young"]);
        let losses = usize::from(!exists);
        assert_eq!(marks.notices.len(), losses, "{:?}", marks.notices);
    }
    assert_eq!(owned(&store, "young"), 1_200);
}

#[test]
fn others_change_their_claims_in_between() {
    let mut store = complete_store();
    let mut marks = Marks::default();
    let old = large("old", 1, 0..40);
    let name = old.name.clone();
    store.begin_apply(applied(old), &mut marks);
    store.continue_apply(&name, 100, &mut marks);
    let young = put(&mut store, Object::Service(large("young", 2, 0..40)));
    assert_eq!((owned(&store, "old"), owned(&store, "young")), (100, 1_500));
    assert_eq!(young.notices.len(), 1, "{:?}", young.notices);
    store.finish(&mut marks);
    assert_eq!((owned(&store, "old"), owned(&store, "young")), (1_600, 0));
    assert_eq!(names(&marks), ["old", "young"]);
    assert_eq!(marks.notices.len(), 1, "{:?}", marks.notices);
}

#[test]
fn a_newer_event_or_a_list_ends_what_was_begun() {
    let mut store = complete_store();
    let mut marks = Marks::default();
    let old = large("old", 1, 0..40);
    let name = old.name.clone();
    store.begin_apply(applied(old.clone()), &mut marks);
    store.continue_apply(&name, 100, &mut marks);
    put(&mut store, Object::Service(large("old", 1, 0..2)));
    assert!(!store.is_applying(&name));
    assert_eq!(owned(&store, "old"), 80);
    store.begin_apply(applied(old), &mut marks);
    store.continue_apply(&name, 100, &mut marks);
    for event in [
        Event::ListStarted(Kind::Service),
        Event::ListComplete(Kind::Service),
    ] {
        store.apply(event, &mut marks);
    }
    assert_eq!((store.count(Kind::Service), owned(&store, "old")), (0, 0));
}

/// A service that may be in the way of others; `None` for one that goes.
fn form() -> impl Strategy<Value = (u8, Option<Service>)> {
    let addresses = || {
        vec(
            (0u8..4).prop_map(|last| IpAddr::from([10, 0, 0, last])),
            0..3,
        )
    };
    let ports = vec((1u16..4, proptest::option::of(1u16..4)), 0..3);
    let forms = (addresses(), addresses(), addresses(), ports, 0i64..3);
    let service = forms.prop_map(|(cluster_ips, balancers, external, ports, created)| {
        let mut service = service("", created, "10.0.0.1");
        service.cluster_ips = cluster_ips;
        service.load_balancer_ips = balancers;
        service.external_ips = external;
        let ports = ports.into_iter();
        service.ports = ports
            .map(|(number, node_port)| port(number, node_port))
            .collect();
        service
    });
    (0u8..4, proptest::option::weighted(0.8, service))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn taking_over_in_turns_comes_to_the_same(history in vec(form(), 1..12), most in 1usize..4) {
        // NodePorts answer at an address that services claim.
        let node = Node {
            name: "node-1".into(),
            internal_ips: vec![[10, 0, 0, 3].into()],
            external_ips: vec![],
            pod_cidrs: vec![],
            zone: None,
            going_away: false,
            labels: Default::default(),
            addresses: Default::default(),
        };
        let (mut at_once, mut in_turns) = (complete_store(), complete_store());
        for store in [&mut at_once, &mut in_turns] {
            put(store, Object::Node(node.clone()));
        }
        for (number, form) in history {
            let name = ObjectName::new("shop", &format!("s{number}"));
            let event = match form {
                Some(mut service) => {
                    service.name = name;
                    applied(service)
                }
                None => Event::Delete(ObjectRef::new(Kind::Service, name)),
            };
            let expected = apply(&mut at_once, event.clone());
            let marks = apply_in_portions(&mut in_turns, event, most, |_| ());
            prop_assert_eq!(names(&marks), names(&expected));
            prop_assert_eq!(marks.notices, expected.notices);
            for last in 0..4u8 {
                for port in 1..4 {
                    let claim = Claim::Address([10, 0, 0, last].into(), Protocol::Tcp, port);
                    prop_assert_eq!(owner(&in_turns, &claim), owner(&at_once, &claim));
                    let claim = Claim::NodePort(Protocol::Tcp, port);
                    prop_assert_eq!(owner(&in_turns, &claim), owner(&at_once, &claim));
                }
            }
        }
    }
}
