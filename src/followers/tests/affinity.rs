//! Which clients with session affinity are forgotten.

use crate::followers::affinity::Forgetter;
use crate::model::{
    EndpointSlice, Event, Family, Object, ObjectName, Service, ServiceKind, TrafficPolicy,
};
use crate::netlink::{Applied, Error};
use crate::nft::{Element, Key, Ruleset, TableId, Transaction};
use crate::services::{Sticky, table_id};
use crate::sync::tests::{Bench, Fake, heal, lists, node, put, service, slice};
use crate::sync::{Controller, Followers, Kernel, Outcome, RemovalOutcome, tests as sync};
use std::cell::Cell;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::mpsc;

mod moves;

/// The namespace of the services is `shop`.
const MAP: &str = "affinity/shop";

/// A controller with a follower that forgets clients after each call.
struct Forgetting<'a> {
    controller: Controller<'a, Fake>,
    forgetter: Forgetter<Fake, Box<dyn Fn() -> Result<Fake, Error>>>,
    opened: Rc<Cell<u32>>,
}

fn forgetting(bench: &Bench) -> Forgetting<'_> {
    forgetting_in(bench, bench.controller())
}

fn forgetting_in<'a>(bench: &Bench, controller: Controller<'a, Fake>) -> Forgetting<'a> {
    let mut followers = Followers::default();
    let kernel = bench.kernel.clone();
    let opened = Rc::new(Cell::new(0));
    let count = opened.clone();
    let open = move || {
        count.set(count.get() + 1);
        Ok(kernel.clone())
    };
    let forgetter = Forgetter::new(Box::new(open) as Box<dyn Fn() -> _>, followers.services());
    Forgetting {
        controller: controller.with_followers(followers),
        forgetter,
        opened,
    }
}

impl Forgetting<'_> {
    fn forget(&mut self) {
        let Self {
            controller,
            forgetter,
            ..
        } = self;
        forgetter.work(|transaction, version| controller.remove(transaction, version));
    }

    fn resync(&mut self) {
        self.controller.resync();
        self.forget();
    }
}

fn handle(forgetting: &mut Forgetting, events: Vec<Event>) -> Outcome {
    let outcome = sync::handle(&mut forgetting.controller, events);
    forgetting.forget();
    outcome
}

/// Has the kernel remember these clients and no others.
fn learn(bench: &Bench, elements: &[Element]) {
    let mut state = bench.kernel.0.borrow_mut();
    let table = state.ruleset.tables.get_mut(&table_id(Family::V4)).unwrap();
    let set = table.sets.get_mut(MAP).unwrap();
    set.elements = sorted(elements);
}

/// The clients that the kernel remembers.
fn left(bench: &Bench) -> Vec<Element> {
    let state = bench.kernel.0.borrow();
    let table = &state.ruleset.tables[&table_id(Family::V4)];
    table.sets[MAP].elements.clone()
}

fn sorted(elements: &[Element]) -> Vec<Element> {
    let mut elements = elements.to_vec();
    elements.sort();
    elements
}

/// A client that is remembered at an endpoint. Those with even numbers are on this node.
fn client(client: [u8; 4], frontend: [u8; 4], port: u16, endpoint: u8) -> Element {
    let key = Key::build()
        .address(client.into())
        .address(frontend.into())
        .protocol(6)
        .port(port)
        .finish();
    let target = Key::build()
        .address(IpAddr::from([10, 244, 1, endpoint]))
        .port(8080)
        .finish();
    Element::with_data(key, target)
}

/// A service with session affinity, whose pods listen on port 8080.
fn sticky(name: &str, cluster_ip: &str, node_port: Option<u16>) -> Service {
    let mut service = service(name, &[cluster_ip], &[80]);
    service.affinity_seconds = Some(10_800);
    if node_port.is_some() {
        service.kind = ServiceKind::NodePort;
        service.ports[0].node_port = node_port;
    }
    service
}

#[test]
fn clients_are_forgotten_with_their_endpoint() {
    let bench = Bench::new();
    let mut controller = forgetting(&bench);
    let mut web = sticky("web", "10.96.0.10", Some(30080));
    let other = sticky("other", "10.96.0.11", None);
    handle(
        &mut controller,
        lists(vec![
            node().into(),
            web.clone().into(),
            other.clone().into(),
            slice("web-1", &web, Family::V4, &[1, 2]).into(),
            slice("other-1", &other, Family::V4, &[1, 2]).into(),
        ]),
    );
    let (cluster_ip, other_ip, node_ip) = ([10, 96, 0, 10], [10, 96, 0, 11], [192, 168, 10, 1]);
    let [a, b] = [[192, 168, 10, 100], [192, 168, 10, 101]];
    let known = vec![
        client(a, cluster_ip, 80, 1),
        client(b, cluster_ip, 80, 2),
        client(a, other_ip, 80, 2),
        client(a, node_ip, 30080, 2),
        client(b, node_ip, 30080, 1),
    ];
    learn(&bench, &known);
    // A new endpoint makes no client forgotten.
    let grown = slice("web-1", &web, Family::V4, &[1, 2, 3]);
    handle(&mut controller, vec![put(grown)]);
    assert_eq!(left(&bench), sorted(&known));
    // Endpoint 2 of one service goes; the other service keeps its clients there.
    let shrunk = slice("web-1", &web, Family::V4, &[1, 3]);
    handle(&mut controller, vec![put(shrunk.clone())]);
    let rest = [&known[0], &known[2], &known[4]].map(Clone::clone).to_vec();
    assert_eq!(left(&bench), sorted(&rest));
    // A new process checks all clients.
    learn(&bench, &known);
    let mut restarted = forgetting(&bench);
    handle(
        &mut restarted,
        lists(vec![
            node().into(),
            web.clone().into(),
            other.into(),
            shrunk.into(),
            slice("other-1", &web, Family::V4, &[1]).into(),
        ]),
    );
    assert_eq!(left(&bench), sorted(&[rest[0].clone(), rest[2].clone()]));
    // Without affinity no client is remembered.
    web.affinity_seconds = None;
    handle(&mut restarted, vec![put(web)]);
    assert_eq!(left(&bench), []);
}

#[test]
fn policy_local_forgets_those_whose_endpoint_is_in_no_scope() {
    let bench = Bench::new();
    let mut controller = forgetting(&bench);
    let mut web = sticky("web", "10.96.0.10", None);
    web.external_ips = vec!["198.51.100.7".parse().unwrap()];
    web.external_policy = TrafficPolicy::Local;
    let with = |endpoints: &[u8]| slice("web-1", &web, Family::V4, endpoints);
    handle(
        &mut controller,
        lists(vec![
            node().into(),
            web.clone().into(),
            with(&[1, 2, 3, 4]).into(),
        ]),
    );
    // Where a client is makes no difference: one from inside may have any address.
    let external = [198, 51, 100, 7];
    let known = [
        client([203, 0, 113, 9], external, 80, 2),
        client([10, 244, 1, 77], external, 80, 1),
        client([192, 168, 30, 1], external, 80, 3),
    ];
    learn(&bench, &known);
    handle(&mut controller, vec![put(with(&[1, 2, 4]))]);
    assert_eq!(left(&bench), sorted(&known[..2]), "a remote endpoint goes");
    handle(&mut controller, vec![put(with(&[1, 4]))]);
    assert_eq!(left(&bench), [known[1].clone()], "one of this node goes");
    controller.resync();
    assert_eq!(left(&bench), [known[1].clone()]);
}

#[test]
fn clients_move_to_this_node_when_the_policy_becomes_local() {
    let bench = Bench::new();
    let mut web = sticky("web", "10.96.0.10", None);
    web.external_ips = vec!["198.51.100.7".parse().unwrap()];
    let objects = |web: &Service| {
        let endpoints = slice("web-1", web, Family::V4, &[1, 2]);
        lists(vec![node().into(), web.clone().into(), endpoints.into()])
    };
    let (cluster_ip, external) = ([10, 96, 0, 10], [198, 51, 100, 7]);
    let known = [
        client([203, 0, 113, 9], external, 80, 1),
        client([203, 0, 113, 10], external, 80, 2),
        client([203, 0, 113, 9], cluster_ip, 80, 1),
    ];
    let here = sorted(&known[1..]);
    let mut local = web.clone();
    local.external_policy = TrafficPolicy::Local;
    let mut controller = forgetting(&bench);
    handle(&mut controller, objects(&web));
    learn(&bench, &known);
    handle(&mut controller, vec![put(local.clone())]);
    assert_eq!(left(&bench), here);
    // After the change back no client moves, nor while the policy is unchanged.
    handle(&mut controller, vec![put(web)]);
    assert_eq!(left(&bench), here);
    learn(&bench, &known);
    controller.resync();
    assert_eq!(left(&bench), sorted(&known));
    // The policy changed while no process ran.
    let mut restarted = forgetting(&bench);
    handle(&mut restarted, objects(&local));
    assert_eq!(left(&bench), here);
}

#[test]
fn the_clients_of_an_address_are_not_those_of_a_node_port() {
    let bench = Bench::new();
    let mut controller = forgetting(&bench);
    // One has at its address the number that the other one has on the nodes.
    let mut at_address = service("a", &["10.96.0.10"], &[30080]);
    at_address.affinity_seconds = Some(10_800);
    let on_nodes = sticky("b", "10.96.0.11", Some(30080));
    let mut endpoints = slice("a-1", &at_address, Family::V4, &[1]);
    endpoints.ports[0].port = 8080;
    handle(
        &mut controller,
        lists(vec![
            node().into(),
            at_address.clone().into(),
            on_nodes.clone().into(),
            endpoints.into(),
            slice("b-1", &on_nodes, Family::V4, &[1, 3]).into(),
        ]),
    );
    let known = client([192, 168, 10, 100], [10, 96, 0, 10], 30080, 1);
    learn(&bench, std::slice::from_ref(&known));
    let fewer = slice("b-1", &on_nodes, Family::V4, &[3]);
    handle(&mut controller, vec![put(fewer)]);
    assert_eq!(left(&bench), [known]);
}

#[tokio::test(start_paused = true)]
async fn a_namespace_has_its_map_while_a_service_of_it_is_sticky() {
    let bench = Bench::new();
    let mut followers = Followers::default();
    let sticky_now = followers.sticky();
    let mut controller = bench.controller().with_followers(followers);
    let mut shop = sticky("web", "10.96.0.10", None);
    let mut bank = sticky("web", "10.96.0.11", None);
    bank.name = ObjectName::new("bank", "web");
    let endpoints = [&shop, &bank].map(|service| {
        let mut slice = slice("web-1", service, Family::V4, &[1]);
        slice.name = ObjectName::new(service.name.namespace(), "web-1");
        slice
    });
    let mut objects: Vec<Object> = vec![node().into(), shop.clone().into(), bank.into()];
    objects.extend(endpoints.map(Object::from));
    sync::handle(&mut controller, lists(objects));
    let namespaces = || -> Vec<String> {
        let sticky: Sticky = sticky_now.borrow().clone();
        sticky.iter().map(|it| it.namespace().to_owned()).collect()
    };
    let maps = || -> Vec<String> {
        let state = bench.kernel.0.borrow();
        let table = &state.ruleset.tables[&table_id(Family::V4)];
        let maps = table.sets.iter();
        let maps = maps.filter(|(_, set)| set.declaration.timeout.is_some());
        maps.map(|(name, _)| name.to_string()).collect()
    };
    assert_eq!(maps(), ["affinity/bank", "affinity/shop"]);
    assert_eq!(namespaces(), ["bank", "shop"]);
    shop.affinity_seconds = None;
    sync::handle(&mut controller, vec![put(shop.clone())]);
    assert_eq!(maps().len(), 2, "it may be needed again soon");
    sync::remove_unused_chains(&mut controller).await;
    assert_eq!(maps(), ["affinity/bank"]);
    assert_eq!(namespaces(), ["bank"]);
    bench.assert_as_wanted(&controller);
    shop.affinity_seconds = Some(5);
    sync::handle(&mut controller, vec![put(shop)]);
    assert_eq!(namespaces(), ["bank", "shop"]);
    bench.assert_as_wanted(&controller);
}

const OUTSIDE: [[u8; 4]; 2] = [[203, 0, 113, 9], [203, 0, 113, 10]];
const EXTERNAL: [u8; 4] = [198, 51, 100, 7];

/// Clients at an external address: one at an endpoint elsewhere, one at an endpoint of this node.
fn outside() -> [Element; 2] {
    [
        client(OUTSIDE[0], EXTERNAL, 80, 1),
        client(OUTSIDE[1], EXTERNAL, 80, 2),
    ]
}

/// A service with that address, under both policies, and its endpoints.
fn external() -> (Service, Service, EndpointSlice) {
    let mut cluster = sticky("web", "10.96.0.10", None);
    cluster.external_ips = vec![EXTERNAL.into()];
    let mut local = cluster.clone();
    local.external_policy = TrafficPolicy::Local;
    let endpoints = slice("web-1", &cluster, Family::V4, &[1, 2]);
    (cluster, local, endpoints)
}

/// A kernel that remembers the clients outside for ever.
struct Remembers;

impl Kernel for Remembers {
    fn apply(&mut self, _: &Transaction) -> Result<Applied, Error> {
        Ok(Applied::default())
    }

    fn read(&mut self, _: &[&str], _: &Ruleset) -> Result<Ruleset, Error> {
        Ok(Ruleset::default())
    }

    fn elements(&mut self, _: &TableId, _: &str) -> Result<Vec<Element>, Error> {
        Ok(outside().into())
    }

    fn generation(&mut self) -> Result<u32, Error> {
        Ok(0)
    }
}

#[test]
fn clients_move_to_this_node_although_the_rules_were_unknown_meanwhile() {
    let (cluster, local, endpoints) = external();
    let bench = Bench::new();
    let mut followers = Followers::default();
    let forgetter = Forgetter::new(|| Ok(Remembers), followers.services());
    let (ask, mut questions) = mpsc::channel(1);
    let every = Duration::from_secs(3_600);
    let thread = std::thread::spawn(move || forgetter.run(&ask, every, || {}));
    let mut controller = bench.controller().with_followers(followers);
    let mut next = || questions.blocking_recv().unwrap();
    let objects = vec![node().into(), cluster.into(), endpoints.into()];
    sync::handle(&mut controller, lists(objects));
    learn(&bench, &outside());
    sync::handle(&mut controller, vec![put(local)]);
    let question = next();
    bench.kernel.0.borrow_mut().failures = 2;
    let other = put(service("other", &["10.96.0.20"], &[80]));
    let outcome = sync::handle(&mut controller, vec![other]);
    assert_eq!(outcome, Outcome::Failed);
    controller.answer(question);
    assert_eq!(left(&bench), outside());
    assert_eq!(controller.resync(), Outcome::Synced);
    controller.answer(next());
    assert_eq!(left(&bench), outside()[1..]);
    drop(controller);
    thread.join().unwrap();
}

#[test]
fn a_removal_by_older_plans_is_refused_and_judged_again() {
    let (cluster, local, endpoints) = external();
    let bench = Bench::new();
    let mut controller = forgetting(&bench);
    let objects = vec![node().into(), cluster.clone().into(), endpoints.into()];
    handle(&mut controller, lists(objects));
    learn(&bench, &outside());
    sync::handle(&mut controller.controller, vec![put(local)]);
    // The policy is Cluster again before the clients are removed.
    let Forgetting {
        controller,
        forgetter,
        ..
    } = &mut controller;
    let mut back = Some(put(cluster));
    let mut outcomes = Vec::new();
    forgetter.work(|transaction, version| {
        if let Some(back) = back.take() {
            sync::handle(controller, vec![back]);
        }
        let removed = controller.remove(transaction, version);
        outcomes.push(matches!(removed, RemovalOutcome::Outdated));
        removed
    });
    assert_eq!(outcomes.first(), Some(&true));
    assert_eq!(left(&bench), outside(), "no client has to move any more");
}

#[test]
fn clients_that_time_out_meanwhile_keep_no_others_and_end() {
    let bench = Bench::new();
    let mut controller = forgetting(&bench);
    let web = sticky("web", "10.96.0.10", None);
    let endpoints = slice("web-1", &web, Family::V4, &[1, 2]);
    let objects = vec![node().into(), web.clone().into(), endpoints.into()];
    handle(&mut controller, lists(objects));
    let known = |n: u16| {
        let [high, low] = n.to_be_bytes();
        client([203, 0, high, low], [10, 96, 0, 10], 80, 2)
    };
    let all: Vec<Element> = (0..3_000).map(known).collect();
    let (timed_out, there): (Vec<_>, Vec<_>) =
        all.into_iter().enumerate().partition(|(n, _)| n % 300 == 7);
    let elements = |of: Vec<(usize, Element)>| of.into_iter().map(|(_, element)| element);
    learn(&bench, &elements(there).collect::<Vec<_>>());
    let reads = {
        let mut state = bench.kernel.0.borrow_mut();
        state.timed_out = elements(timed_out).collect();
        state.reads_of_sets
    };
    handle(
        &mut controller,
        vec![put(slice("web-1", &web, Family::V4, &[1]))],
    );
    assert_eq!(left(&bench), []);
    assert_eq!(bench.kernel.0.borrow().reads_of_sets, reads + 1);
}

#[test]
fn a_deleted_map_remembers_no_client() {
    let bench = Bench::new();
    let mut controller = forgetting(&bench);
    let (cluster, _, endpoints) = external();
    let mut objects: Vec<Object> = vec![node().into(), cluster.into()];
    objects.push(endpoints.clone().into());
    handle(&mut controller, lists(objects));
    let reads = || bench.kernel.0.borrow().reads_of_sets;
    let before = reads();
    bench.kernel.meddle(|ruleset| {
        let table = ruleset.tables.get_mut(&table_id(Family::V4)).unwrap();
        table.sets.remove(MAP);
    });
    let mut fewer = endpoints;
    fewer.endpoints.pop();
    handle(&mut controller, vec![put(fewer)]);
    assert_eq!(reads(), before + 1, "it is not tried again");
}

#[test]
fn what_failed_is_not_read_again_for_changes_that_concern_no_client() {
    let (cluster, _, endpoints) = external();
    let bench = Bench::new();
    let mut followers = Followers::default();
    let opened = Cell::new(0);
    let open = || -> Result<Fake, Error> {
        opened.set(opened.get() + 1);
        Err(Error::Receive {
            what: "a set",
            source: std::io::Error::from_raw_os_error(libc::ENOBUFS),
        })
    };
    let mut forgetter = Forgetter::new(open, followers.services());
    let mut controller = bench.controller().with_followers(followers);
    let mut handle = |events| {
        sync::handle(&mut controller, events);
        forgetter.work(|_, _| RemovalOutcome::Unknown);
        opened.take()
    };
    let objects = vec![node().into(), cluster.into(), endpoints.clone().into()];
    assert!(handle(lists(objects)) > 0);
    let other = put(service("other", &["10.96.0.20"], &[80]));
    assert_eq!(handle(vec![other]), 0);
    let mut fewer = endpoints;
    fewer.endpoints.pop();
    assert!(handle(vec![put(fewer)]) > 0);
}

#[test]
fn one_connection_to_the_kernel_serves_all_changes() {
    let bench = Bench::new();
    let mut controller = forgetting(&bench);
    let (cluster, _, mut endpoints) = external();
    let mut objects: Vec<Object> = vec![node().into(), cluster.into()];
    objects.push(endpoints.clone().into());
    handle(&mut controller, lists(objects));
    let reads = bench.kernel.0.borrow().reads_of_sets;
    while endpoints.endpoints.pop().is_some() {
        handle(&mut controller, vec![put(endpoints.clone())]);
    }
    assert_eq!(bench.kernel.0.borrow().reads_of_sets, reads + 2);
    assert_eq!(controller.opened.get(), 1);
}
