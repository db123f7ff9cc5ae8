//! Tests of the store.

use super::*;
use crate::model::{
    Family, Labels, Namespace, Protocol, ServiceKind, ServicePort, SlicePort, TrafficPolicy,
};

mod claim_change;
mod claims;

fn service(name: &str, created: i64, external: &str) -> Service {
    Service {
        name: ObjectName::new("shop", name),
        created: Some(created),
        kind: ServiceKind::ClusterIp,
        cluster_ips: vec![],
        ports: vec![ServicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }],
        external_ips: vec![external.parse().unwrap()],
        load_balancer_ips: vec![],
        source_ranges: vec![],
        external_policy: TrafficPolicy::Cluster,
        internal_policy: TrafficPolicy::Cluster,
        affinity_seconds: None,
        health_check_node_port: None,
    }
}

fn slice(name: &str, service: &str, addresses: &[(&str, bool)]) -> EndpointSlice {
    EndpointSlice {
        name: ObjectName::new("shop", name),
        service: ObjectName::new("shop", service),
        created: None,
        family: Family::V4,
        ports: vec![SlicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 8080,
        }],
        endpoints: addresses
            .iter()
            .map(|(address, terminating)| Endpoint {
                address: address.parse().unwrap(),
                ready: !terminating,
                serving: true,
                terminating: *terminating,
                node: None,
                hints: None,
            })
            .collect(),
        triggered_at_ms: None,
    }
}

fn apply(store: &mut Store, event: Event) -> Marks {
    let mut marks = Marks::default();
    store.apply(event, &mut marks);
    marks
}

fn put(store: &mut Store, object: Object) -> Marks {
    apply(store, Event::Apply(object))
}

fn names(marks: &Marks) -> Vec<&str> {
    marks.services.iter().map(|name| name.name()).collect()
}

fn complete_store() -> Store {
    let mut store = Store::default();
    for kind in Kind::SERVICES {
        assert!(!store.is_complete());
        apply(&mut store, Event::ListStarted(kind));
        apply(&mut store, Event::ListComplete(kind));
    }
    assert!(store.is_complete());
    store
}

#[test]
fn the_same_object_again_changes_nothing() {
    let mut store = complete_store();
    let web = service("web", 1, "198.51.100.1");
    assert_eq!(
        names(&put(&mut store, Object::Service(web.clone()))),
        ["web"]
    );
    assert!(put(&mut store, Object::Service(web)).is_empty());
    let web_1 = slice("web-1", "web", &[("10.0.0.1", false)]);
    let marks = put(&mut store, Object::EndpointSlice(web_1.clone()));
    assert_eq!(names(&marks), ["web"]);
    assert!(put(&mut store, Object::EndpointSlice(web_1)).is_empty());
}

#[test]
fn the_older_service_owns_a_contested_frontend() {
    let mut store = complete_store();
    let address = "198.51.100.1";
    let claim = Claim::Address(address.parse().unwrap(), Protocol::Tcp, 80);
    let owner = |store: &Store| store.owner(&claim).map(|name| name.name().to_owned());

    put(&mut store, Object::Service(service("young", 9, address)));
    assert_eq!(owner(&store).as_deref(), Some("young"));
    let marks = put(&mut store, Object::Service(service("old", 1, address)));
    assert_eq!(owner(&store).as_deref(), Some("old"));
    assert_eq!(names(&marks), ["old", "young"]);
    let notice = &marks.notices[0];
    assert_eq!(notice.subject.to_string(), "Service shop/young");
    assert!(
        notice
            .message
            .starts_with("198.51.100.1:80 TCP belongs to the older Service shop/old"),
        "{}",
        notice.message
    );

    let marks = put(&mut store, Object::Service(service("middle", 5, address)));
    assert_eq!(names(&marks), ["middle"]);
    assert_eq!(marks.notices[0].subject.to_string(), "Service shop/middle");

    let gone = ObjectRef::new(Kind::Service, ObjectName::new("shop", "old"));
    let marks = apply(&mut store, Event::Delete(gone));
    assert_eq!(names(&marks), ["middle", "old"]);
    assert_eq!(owner(&store).as_deref(), Some("middle"));

    let marks = put(
        &mut store,
        Object::Service(service("middle", 5, "198.51.100.2")),
    );
    assert_eq!(names(&marks), ["middle", "young"]);
    assert_eq!(owner(&store).as_deref(), Some("young"));
    assert!(marks.notices.is_empty());
}

#[test]
fn the_entry_that_is_not_terminating_wins() {
    let mut store = complete_store();
    let web = service("web", 1, "198.51.100.1");
    let port = web.ports[0].clone();
    let name = web.name.clone();
    put(&mut store, Object::Service(web));
    for part in [
        slice("web-1", "web", &[("10.0.0.2", true), ("10.0.0.1", false)]),
        slice("web-2", "web", &[("10.0.0.2", false), ("10.0.0.2", true)]),
    ] {
        put(&mut store, Object::EndpointSlice(part));
    }
    let found = store.slices_of(&name).endpoints(&port, Family::V4);
    let described: Vec<_> = found
        .iter()
        .map(|e| {
            (
                e.endpoint.address.to_string(),
                e.port,
                e.endpoint.terminating,
            )
        })
        .collect();
    assert_eq!(
        described,
        [
            ("10.0.0.1".to_owned(), 8080, false),
            ("10.0.0.2".to_owned(), 8080, false)
        ]
    );
    assert!(
        store
            .slices_of(&name)
            .endpoints(&port, Family::V6)
            .is_empty()
    );
}

#[test]
fn a_slice_that_moves_changes_both_services() {
    let mut store = complete_store();
    put(&mut store, Object::Service(service("a", 1, "198.51.100.1")));
    put(&mut store, Object::Service(service("b", 1, "198.51.100.2")));
    put(
        &mut store,
        Object::EndpointSlice(slice("s", "a", &[("10.0.0.1", false)])),
    );
    let marks = put(
        &mut store,
        Object::EndpointSlice(slice("s", "b", &[("10.0.0.1", false)])),
    );
    assert_eq!(names(&marks), ["a", "b"]);
    let port = service("a", 1, "198.51.100.1").ports[0].clone();
    let count = |store: &Store, name: &str| {
        let name = ObjectName::new("shop", name);
        store.slices_of(&name).endpoints(&port, Family::V4).len()
    };
    assert_eq!((count(&store, "a"), count(&store, "b")), (0, 1));
}

#[test]
fn objects_missing_from_a_new_list_are_deleted() {
    let mut store = complete_store();
    for name in ["a", "b", "c"] {
        put(
            &mut store,
            Object::Service(service(name, 1, "198.51.100.1")),
        );
    }
    apply(&mut store, Event::ListStarted(Kind::Service));
    put(&mut store, Object::Service(service("b", 1, "198.51.100.1")));
    let gone = ObjectRef::new(Kind::Service, ObjectName::new("shop", "c"));
    assert_eq!(names(&apply(&mut store, Event::Delete(gone))), ["c"]);
    let marks = apply(&mut store, Event::ListComplete(Kind::Service));
    assert_eq!(
        names(&marks),
        ["a", "b"],
        "a is deleted, b inherits its claim"
    );
    assert_eq!(store.count(Kind::Service), 1);
}

#[test]
fn orphans_are_reported_when_the_lists_are_complete() {
    let mut store = Store::default();
    for kind in Kind::ALL {
        apply(&mut store, Event::ListStarted(kind));
    }
    let early = put(&mut store, Object::EndpointSlice(slice("s", "web", &[])));
    assert!(early.notices.is_empty());
    put(
        &mut store,
        Object::Service(service("web", 1, "198.51.100.1")),
    );
    put(&mut store, Object::EndpointSlice(slice("t", "gone", &[])));
    let notices: Vec<_> = Kind::ALL
        .into_iter()
        .flat_map(|kind| apply(&mut store, Event::ListComplete(kind)).notices)
        .collect();
    assert_eq!(notices.len(), 1);
    assert_eq!(notices[0].subject.to_string(), "EndpointSlice shop/t");
    assert_eq!(notices[0].reason, Reason::OrphanSlice);
    let late = put(&mut store, Object::EndpointSlice(slice("u", "never", &[])));
    assert_eq!(late.notices.len(), 1);
}

#[test]
fn an_endpoint_that_is_a_service_address_is_reported_once() {
    let mut store = Store::default();
    for kind in Kind::ALL {
        apply(&mut store, Event::ListStarted(kind));
    }
    let range = ServiceCidr {
        name: ObjectName::new("", "kubernetes"),
        cidrs: vec!["10.96.0.0/16".parse().unwrap()],
    };
    for name in ["alias", "plain"] {
        let service = service(name, 1, "198.51.100.1");
        put(&mut store, Object::Service(service));
    }
    let alias = |addresses: &[_]| Object::EndpointSlice(slice("alias-1", "alias", addresses));
    let (pod, stray) = (("10.0.0.1", false), ("10.96.0.35", false));
    // The ranges may come after the slices.
    assert!(put(&mut store, alias(&[pod, stray])).notices.is_empty());
    put(&mut store, Object::ServiceCidr(range));
    let mut notices: Vec<_> = Kind::ALL
        .into_iter()
        .flat_map(|kind| apply(&mut store, Event::ListComplete(kind)).notices)
        .filter(|notice| notice.reason == Reason::InvalidField)
        .collect();
    let notice = notices.pop().unwrap();
    assert!(notices.is_empty());
    assert_eq!(notice.subject.to_string(), "EndpointSlice shop/alias-1");
    let named = "the endpoint 10.96.0.35 of Service shop/alias is";
    assert!(notice.message.starts_with(named), "{}", notice.message);
    assert!(put(&mut store, alias(&[stray])).notices.is_empty());
    assert!(put(&mut store, alias(&[pod])).notices.is_empty());
    assert_eq!(put(&mut store, alias(&[stray])).notices.len(), 1);
}

#[test]
fn what_policies_are_made_of_is_not_kept_here() {
    let mut store = complete_store();
    let namespace = Object::Namespace(Namespace {
        name: ObjectName::new("", "shop"),
        labels: Labels::default(),
        mode: None,
    });
    let events = [
        Event::ListStarted(Kind::Namespace),
        Event::Apply(namespace.clone()),
        Event::ListComplete(Kind::Namespace),
        Event::Delete(namespace.reference()),
    ];
    for event in events {
        assert!(apply(&mut store, event).is_empty());
        assert_eq!(store.count(Kind::Namespace), 0);
    }
    assert_eq!(store.missing(), []);
}

#[test]
fn of_a_node_only_what_rules_are_made_of_is_a_change() {
    let node = Node {
        name: "node-1".into(),
        internal_ips: vec!["192.0.2.1".parse().unwrap()],
        external_ips: vec![],
        pod_cidrs: vec![],
        zone: None,
        going_away: false,
        labels: Default::default(),
        addresses: Default::default(),
    };
    let mut store = complete_store();
    assert!(put(&mut store, Object::Node(node.clone())).node);
    // A heartbeat changes nothing that is read.
    assert!(put(&mut store, Object::Node(node.clone())).is_empty());
    let cordoned = Node {
        going_away: true,
        labels: Default::default(),
        addresses: Default::default(),
        ..node.clone()
    };
    assert!(put(&mut store, Object::Node(cordoned)).is_empty());
    assert!(store.node().is_some_and(|node| node.going_away));
    let zoned = Node {
        zone: Some("zone-a".into()),
        ..node.clone()
    };
    let marked = put(&mut store, Object::Node(zoned));
    assert!(marked.is_empty(), "no endpoint has hints");
    let marks: [fn(&mut Node); 3] = [
        |node| node.internal_ips.push("192.0.2.2".parse().unwrap()),
        |node| node.external_ips.push("198.51.100.1".parse().unwrap()),
        |node| node.pod_cidrs.push("10.244.1.0/24".parse().unwrap()),
    ];
    for change in marks {
        put(&mut store, Object::Node(node.clone()));
        let mut other = node.clone();
        change(&mut other);
        assert!(put(&mut store, Object::Node(other)).node);
    }
}

#[test]
fn a_deleted_node_is_going_away_and_stays_as_it_last_was() {
    let fallback_node = Node {
        name: "node-1".into(),
        internal_ips: vec!["192.0.2.9".parse().unwrap()],
        external_ips: vec![],
        pod_cidrs: vec![],
        zone: None,
        going_away: false,
        labels: Default::default(),
        addresses: Default::default(),
    };
    let node = Node {
        internal_ips: vec!["192.0.2.1".parse().unwrap()],
        pod_cidrs: vec!["10.244.1.0/24".parse().unwrap()],
        zone: Some("zone-a".into()),
        ..fallback_node.clone()
    };
    let mut store = Store::with_fallback_node(fallback_node.clone());
    let name = Object::Node(node.clone()).reference();
    // One that was never there cannot go.
    assert!(apply(&mut store, Event::Delete(name.clone())).is_empty());
    assert_eq!(store.node().map(|node| &**node), Some(&fallback_node));
    assert!(put(&mut store, Object::Node(node.clone())).node);
    let gone = Node {
        going_away: true,
        labels: Default::default(),
        addresses: Default::default(),
        ..node.clone()
    };
    for again in [false, true] {
        // A new list without it says the same as a deletion.
        let deleted = if again {
            apply(&mut store, Event::ListStarted(Kind::Node));
            apply(&mut store, Event::ListComplete(Kind::Node))
        } else {
            apply(&mut store, Event::Delete(name.clone()))
        };
        assert!(deleted.is_empty(), "the rules are the same");
        assert_eq!(store.node().map(|node| &**node), Some(&gone));
        assert_eq!(store.count(Kind::Node), 0);
        assert!(put(&mut store, Object::Node(node.clone())).is_empty());
        assert_eq!(store.node().map(|node| &**node), Some(&node));
    }
    apply(&mut store, Event::Delete(name));
    let moved = Node {
        pod_cidrs: vec![],
        ..node
    };
    assert!(put(&mut store, Object::Node(moved)).node);
}

#[test]
fn other_nodes_are_ignored() {
    let node = |name: &str, ip: &str| Node {
        name: name.into(),
        internal_ips: vec![ip.parse().unwrap()],
        external_ips: vec![],
        pod_cidrs: vec![],
        zone: None,
        going_away: false,
        labels: Default::default(),
        addresses: Default::default(),
    };
    let own = node("node-1", "192.0.2.1");
    let other = Object::Node(node("node-2", "192.0.2.2"));
    let mut store = Store::with_fallback_node(node("node-1", "192.0.2.9"));
    assert!(put(&mut store, other.clone()).is_empty());
    assert_eq!(store.count(Kind::Node), 0);
    assert!(put(&mut store, Object::Node(own.clone())).node);
    assert!(put(&mut store, other.clone()).is_empty());
    assert!(apply(&mut store, Event::Delete(other.reference())).is_empty());
    assert_eq!(store.node().map(|node| &**node), Some(&own));
}

fn address(text: &str, port: u16) -> Claim {
    Claim::Address(text.parse().unwrap(), Protocol::Tcp, port)
}

fn owner<'a>(store: &'a Store, claim: &Claim) -> Option<&'a str> {
    store.owner(claim).map(ObjectName::name)
}

fn victim(name: &str, cluster_ip: &str) -> Service {
    Service {
        cluster_ips: vec![cluster_ip.parse().unwrap()],
        external_ips: vec![],
        ..service(name, 100, "0.0.0.0")
    }
}

fn messages(marks: &Marks) -> Vec<String> {
    let notices = marks.notices.iter();
    let text = |notice: &Notice| format!("{}: {}", notice.subject, notice.message);
    notices.map(text).collect()
}

#[test]
fn of_the_same_address_twice_the_one_that_answers_counts_then_the_newest() {
    let web = service("web", 1, "198.51.100.1");
    let (port, name) = (web.ports[0].clone(), web.name.clone());
    let entry = |node: &str, ready, serving, terminating| Endpoint {
        address: "10.0.0.1".parse().unwrap(),
        ready,
        serving,
        terminating,
        node: Some(node.into()),
        hints: None,
    };
    let part = |name: &str, created, endpoints: &[Endpoint]| EndpointSlice {
        created,
        endpoints: endpoints.to_vec(),
        ..slice(name, "web", &[])
    };
    let winner = |parts: &[EndpointSlice]| {
        let mut store = complete_store();
        for part in parts {
            put(&mut store, Object::EndpointSlice(part.clone()));
        }
        let found = store.slices_of(&name).endpoints(&port, Family::V4);
        assert_eq!(found.len(), 1);
        found[0].endpoint.node.clone().unwrap().to_string()
    };
    let best_first = [
        entry("ready", true, true, false),
        entry("serving", false, true, false),
        entry("neither", false, false, false),
        entry("terminating", false, true, true),
        entry("ended", false, false, true),
    ];
    for (index, better) in best_first.iter().enumerate() {
        for worse in &best_first[index + 1..] {
            let wanted = better.node.as_deref().unwrap();
            for order in [[better, worse], [worse, better]] {
                let order = order.map(Clone::clone);
                assert_eq!(winner(&[part("a", Some(1), &order)]), wanted);
                // Nor does the age of slices matter.
                let [first, second] = order.map(|entry| vec![entry]);
                let parts = [part("a", Some(1), &first), part("b", Some(2), &second)];
                assert_eq!(winner(&parts), wanted);
            }
        }
    }
    let on = |node: &str| vec![entry(node, true, true, false)];
    let two = [on("1"), on("2")].concat();
    assert_eq!(winner(&[part("a", Some(1), &two)]), "2", "the later entry");
    let aged = |a, b| winner(&[part("a", a, &on("a")), part("b", b, &on("b"))]);
    assert_eq!(aged(Some(2), Some(1)), "a", "the newer slice");
    assert_eq!(aged(Some(1), Some(2)), "b", "the newer slice");
    assert_eq!(aged(Some(1), Some(1)), "b", "the later name");
    assert_eq!(aged(None, Some(1)), "a", "no date is new");
}

#[test]
fn slices_of_another_proxys_service_are_no_orphans_and_orphans_are_reported_once() {
    let mut store = complete_store();
    let mut foreign = victim("foreign", "10.96.0.1");
    foreign.kind = ServiceKind::OtherProxy;
    let marks = put(&mut store, Object::Service(foreign.clone()));
    assert_eq!(marks.notices.len(), 1);
    assert_eq!(marks.notices[0].reason, Reason::OtherProxy);
    foreign.affinity_seconds = Some(1);
    assert!(put(&mut store, Object::Service(foreign)).notices.is_empty());
    let some = [("10.0.0.1", false)];
    let put_slice = |store: &mut Store, name: &str, service: &str, addresses: &[_]| {
        let slice = slice(name, service, addresses);
        put(store, Object::EndpointSlice(slice)).notices.len()
    };
    assert_eq!(put_slice(&mut store, "f-1", "foreign", &some), 0);
    assert_eq!(put_slice(&mut store, "o-1", "orphan", &some), 1);
    assert_eq!(put_slice(&mut store, "o-1", "orphan", &[]), 0);
    assert_eq!(put_slice(&mut store, "o-2", "orphan", &some), 0);
    for name in ["o-1", "o-2"] {
        let gone = ObjectRef::new(Kind::EndpointSlice, ObjectName::new("shop", name));
        apply(&mut store, Event::Delete(gone));
    }
    assert_eq!(
        put_slice(&mut store, "o-1", "orphan", &some),
        1,
        "another one"
    );
    // A ClusterIP that another proxy serves is no more to be had.
    put(
        &mut store,
        Object::Service(service("thief", 1, "10.96.0.1")),
    );
    assert_eq!(owner(&store, &address("10.96.0.1", 80)), None);
}

#[test]
fn what_services_lack_is_reported_when_all_is_listed_and_once() {
    let mut store = Store::default();
    for kind in Kind::SERVICES {
        apply(&mut store, Event::ListStarted(kind));
    }
    for index in 0..20 {
        let mut young = service(&format!("young-{index:02}"), 9, "198.51.100.1");
        let ports = (80..180).map(|port| ServicePort {
            port,
            ..young.ports[0].clone()
        });
        young.ports = ports.collect();
        let marks = put(&mut store, Object::Service(young));
        assert!(marks.notices.is_empty());
    }
    put(&mut store, claims::range("a", "198.51.100.0/24"));
    let mut notices = Vec::new();
    for kind in Kind::SERVICES {
        let marks = apply(&mut store, Event::ListComplete(kind));
        notices.extend(messages(&marks));
    }
    assert_eq!(notices.len(), 20);
    for (index, notice) in notices.iter().enumerate() {
        let start = format!("Service shop/young-{index:02}: 198.51.100.1:80 TCP does not lead");
        assert!(notice.starts_with(&start), "{notice}");
        assert!(
            notice.contains("(and 99 more: ") && notice.len() < 400,
            "{notice}"
        );
    }
}
