//! The UDP flows that changes of services leave stale.

use crate::followers::conntrack::{Pending, UdpFrontend};
use crate::model::{Family, Kind, Object, Protocol, Service, ServiceKind};
use crate::nft::{Element, Key, Verdict};
use crate::services::{ServiceSet, table_id};
use crate::sync::tests::{Bench, delete, handle, heal, lists, node, put, service, slice};
use crate::sync::{Followers, Outcome};

fn dns(name: &str, cluster_ips: &[&str]) -> Service {
    let mut service = service(name, cluster_ips, &[53]);
    for port in &mut service.ports {
        port.protocol = Protocol::Udp;
    }
    service
}

fn vip(last: u8) -> UdpFrontend {
    UdpFrontend::Address(([10, 96, 0, last], 53).into())
}

/// The frontends whose flows are looked for, in order.
fn suspects(pending: &mut Pending) -> Vec<UdpFrontend> {
    let dirty = pending.take().unwrap_or_default();
    let mut suspects: Vec<UdpFrontend> = dirty.to_sweep().collect();
    suspects.sort_unstable();
    suspects
}

#[test]
fn changes_of_udp_services_are_handed_over_once_the_rules_stand() {
    let bench = Bench::new();
    let mut followers = Followers::default();
    let mut pending = Pending::new(followers.services());
    let mut controller = bench.controller().with_followers(followers);
    let (a, b) = (dns("a", &["10.96.0.1"]), dns("b", &["10.96.0.2"]));
    let web = service("web", &["10.96.0.3"], &[80]);
    let slices = [&a, &b, &web].map(|s| slice(s.name.as_str(), s, Family::V4, &[1, 2]));
    let mut objects: Vec<Object> = vec![node().into(), a.clone().into(), b.clone().into()];
    objects.push(web.clone().into());
    objects.extend(slices.map(Object::from));
    handle(&mut controller, lists(objects));
    assert_eq!(suspects(&mut pending), [vip(1), vip(2)], "all at first");

    let put_slice = |service: &Service, endpoints: &[u8]| {
        put(slice(service.name.as_str(), service, Family::V4, endpoints))
    };
    handle(
        &mut controller,
        vec![put_slice(&a, &[1]), put_slice(&web, &[1])],
    );
    assert_eq!(suspects(&mut pending), [vip(1)], "an endpoint less");
    handle(&mut controller, vec![put_slice(&a, &[1, 2])]);
    assert_eq!(suspects(&mut pending), [], "one more");
    handle(&mut controller, vec![put_slice(&a, &[])]);
    assert_eq!(suspects(&mut pending), [vip(1)], "none left");

    let mut wider = b.clone();
    wider.external_ips = vec!["10.96.0.9".parse().unwrap()];
    handle(&mut controller, vec![put(wider)]);
    assert_eq!(
        suspects(&mut pending),
        [vip(9)],
        "a change of the service alone"
    );
    handle(&mut controller, vec![delete(Kind::Service, "b")]);
    assert_eq!(suspects(&mut pending), [vip(2), vip(9)]);
}

#[test]
fn draining_endpoints_are_no_reason_to_look_until_they_are_removed() {
    let bench = Bench::new();
    let mut followers = Followers::default();
    let mut pending = Pending::new(followers.services());
    let mut controller = bench.controller().with_followers(followers);
    let a = dns("a", &["10.96.0.1"]);
    let full = slice("a", &a, Family::V4, &[1, 2]);
    let objects = vec![node().into(), a.clone().into(), full.clone().into()];
    handle(&mut controller, lists(objects));
    assert_eq!(suspects(&mut pending), [vip(1)]);
    let mut draining = full.clone();
    draining.endpoints[0].ready = false;
    draining.endpoints[0].terminating = true;
    handle(&mut controller, vec![put(draining)]);
    assert_eq!(suspects(&mut pending), []);
    assert!(!bench.applied().is_empty(), "the rules changed");
    handle(&mut controller, vec![put(slice("a", &a, Family::V4, &[2]))]);
    assert_eq!(suspects(&mut pending), [vip(1)]);
}

#[test]
fn what_a_failed_transaction_would_have_changed_is_handed_over_later() {
    let bench = Bench::new();
    let mut followers = Followers::default();
    let mut pending = Pending::new(followers.services());
    let mut controller = bench.controller().with_followers(followers);
    let (a, b) = (dns("a", &["10.96.0.1"]), dns("b", &["10.96.0.2"]));
    let objects = vec![node().into(), a.into(), b.into()];
    handle(&mut controller, lists(objects));
    assert_eq!(suspects(&mut pending).len(), 2);
    bench.kernel.0.borrow_mut().failures = 2;
    let outcome = handle(&mut controller, vec![delete(Kind::Service, "b")]);
    assert_eq!(outcome, Outcome::Failed);
    assert_eq!(suspects(&mut pending), []);
    assert_eq!(controller.resync(), Outcome::Synced);
    assert_eq!(suspects(&mut pending), [vip(1), vip(2)]);
}

#[test]
fn frontends_missing_after_a_restart_are_handed_over() {
    let bench = Bench::new();
    let mut gone = dns("gone", &["10.96.0.1"]);
    gone.kind = ServiceKind::NodePort;
    gone.ports[0].node_port = Some(30053);
    gone.external_ips = vec!["192.168.10.1".parse().unwrap()];
    let (stays, web) = (
        dns("stays", &["10.96.0.2"]),
        service("web", &["10.96.0.3"], &[80]),
    );
    let of = |services: &[&Service]| {
        let mut objects: Vec<Object> = vec![node().into()];
        for service in services {
            objects.push((*service).clone().into());
            let endpoints = slice(service.name.name(), service, Family::V4, &[1]);
            objects.push(endpoints.into());
        }
        lists(objects)
    };
    let mut before = bench.controller();
    handle(&mut before, of(&[&gone, &stays, &web]));
    let mut followers = Followers::default();
    let mut pending = Pending::new(followers.services());
    let mut after = bench.controller().with_followers(followers);
    handle(&mut after, of(&[&stays]));
    let node_ip = UdpFrontend::Address(([192, 168, 10, 1], 53).into());
    let node_port = UdpFrontend::NodePort(Family::V4, 30053);
    assert_eq!(suspects(&mut pending), [vip(1), vip(2), node_ip, node_port]);
    // A table that is made anew has none of the old frontends.
    bench.kernel.meddle(|ruleset| {
        let table = ruleset.tables.get_mut(&table_id(Family::V4)).unwrap();
        table.foreign = true;
        let [frontends, node_ports] = [ServiceSet::Frontends, ServiceSet::NodePorts];
        let key = Key::build().protocol(17).port(30054).finish();
        let other = Element::with_verdict(key, Verdict::Drop);
        table.sets.get_mut(&node_ports.name()).unwrap().elements = vec![other];
        assert_eq!(table.sets[&frontends.name()].elements.len(), 1);
    });
    let mut again = after;
    again.resync();
    assert_eq!(
        suspects(&mut pending),
        [vip(2), UdpFrontend::NodePort(Family::V4, 30054)]
    );
}

#[test]
fn frontends_that_an_attempt_removed_before_it_failed_are_handed_over() {
    let bench = Bench::new();
    let (mut gone, stays) = (dns("gone", &["10.96.0.1"]), dns("stays", &["10.96.0.2"]));
    gone.affinity_seconds = Some(10);
    let mut before = bench.controller();
    // The chain of clients that only the first one uses goes with the last step.
    let objects: Vec<Object> = vec![
        node().into(),
        gone.clone().into(),
        stays.clone().into(),
        slice("gone-1", &gone, Family::V4, &[1, 2, 3]).into(),
        slice("stays-1", &stays, Family::V4, &[1]).into(),
    ];
    handle(&mut before, lists(objects));
    bench.applied();
    let mut followers = Followers::default();
    let mut pending = Pending::new(followers.services());
    let mut after = bench.controller().with_followers(followers);
    let objects: Vec<Object> = vec![
        node().into(),
        stays.clone().into(),
        slice("stays-1", &stays, Family::V4, &[1]).into(),
    ];
    bench.kernel.0.borrow_mut().most = Some(1);
    assert_eq!(handle(&mut after, lists(objects)), Outcome::Failed);
    let frontends = ServiceSet::Frontends.name();
    assert_eq!(
        bench.kernel.0.borrow().ruleset.tables[&table_id(Family::V4)].sets[&frontends]
            .elements
            .len(),
        1,
        "it was removed already"
    );
    assert_eq!(suspects(&mut pending), []);
    bench.kernel.0.borrow_mut().most = None;
    assert_eq!(after.resync(), Outcome::Synced);
    assert_eq!(suspects(&mut pending), [vip(1), vip(2)]);
}

#[test]
fn flows_are_looked_for_after_healing() {
    let bench = Bench::new();
    let mut followers = Followers::default();
    let mut pending = Pending::new(followers.services());
    let mut controller = bench.controller().with_followers(followers);
    let mut dns = service("dns", &["10.96.0.53"], &[53]);
    dns.ports[0].protocol = Protocol::Udp;
    let endpoints = slice("dns-1", &dns, Family::V4, &[1]);
    handle(&mut controller, lists(vec![dns.into(), endpoints.into()]));
    assert!(pending.take().is_some());
    bench.kernel.meddle(|ruleset| ruleset.tables.clear());
    assert_eq!(heal(&mut controller), (Outcome::Synced, true));
    // A flow that began while the rules were gone is not translated for as long as it lasts.
    assert_eq!(
        pending.take().map(|dirty| dirty.to_sweep().count()),
        Some(1)
    );
}
