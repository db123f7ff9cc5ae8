//! What the controller hands to the followers of policies, and its answers to queries.

use tokio::sync::oneshot;

use super::*;
use crate::model::{LabelSelector, NetworkPolicy, Pod};
use crate::policies::{self, Connection, Engine, Isolated};

pub(super) fn pod(name: &str, address: &str) -> Event {
    Event::Apply(Object::Pod(Pod {
        name: ObjectName::new("shop", name),
        node: Some("here".into()),
        host_network: false,
        ended: false,
        running: false,
        evidence: Default::default(),
        addresses: [address.parse().unwrap()].into_iter().collect(),
        labels: Default::default(),
        owner: None,
        ports: [].into(),
    }))
}

/// All pods of the shop are closed for ingress.
pub(super) fn closed() -> Event {
    Event::Apply(Object::NetworkPolicy(NetworkPolicy {
        name: ObjectName::new("shop", "closed"),
        pods: LabelSelector::default(),
        ingress: Some(Vec::new()),
        egress: None,
        mode: None,
    }))
}

pub(super) fn policy_lists(objects: Vec<Event>) -> Vec<Event> {
    let mut events: Vec<_> = Kind::POLICY.map(Event::ListStarted).into();
    events.extend(objects);
    events.extend(Kind::POLICY.map(Event::ListComplete));
    events
}

pub(super) fn engine() -> Engine {
    Engine::new(policies::PolicySettings {
        node: "here".into(),
        strict: true,
        ..policies::PolicySettings::default()
    })
}

/// Returns whether the controller denies what goes from one address to another.
pub(super) fn denies(
    controller: &mut Controller<Fake>,
    source: &str,
    destination: &str,
) -> Option<bool> {
    let (answer, mut answered) = oneshot::channel();
    let connection = Connection {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        protocol: 6,
        port: Some(80),
    };
    let connections = vec![connection];
    controller.answer(Query::Evaluate {
        connections,
        answer,
    });
    let answer = answered.try_recv().unwrap()?;
    assert_eq!(answer.len(), 1);
    Some(answer[0])
}

#[test]
fn changes_are_handed_over_when_they_are_in_force() {
    let bench = Bench::new();
    let mut followers = Followers::default();
    let (changes, mut isolated) = (followers.policies(), followers.isolated());
    let controller = bench.controller().with_policies(engine());
    let mut controller = controller.with_followers(followers);
    let of = |address: &str, name| {
        (
            address.parse().unwrap(),
            Some(ObjectName::new("shop", name)),
        )
    };
    let (web, db) = (of("10.1.0.5", "web"), of("10.1.0.6", "db"));
    let changed = || changes.try_iter().any(|it| it.isolated.is_some());

    handle(&mut controller, policy_lists(vec![pod("web", "10.1.0.5")]));
    assert!(changed(), "the first rules, although there are none");
    assert!(!isolated.has_changed().unwrap());

    handle(&mut controller, vec![closed()]);
    assert!(changed());
    assert_eq!(*isolated.borrow_and_update(), Isolated::from([web.clone()]));

    // An event that changes no rule.
    handle(&mut controller, vec![pod("web", "10.1.0.5")]);
    assert!(changes.try_recv().is_err());
    assert!(!isolated.has_changed().unwrap());

    bench.kernel.0.borrow_mut().failures = 2;
    let outcome = handle(&mut controller, vec![pod("db", "10.1.0.6")]);
    assert_eq!(outcome, Outcome::Failed);
    assert!(changes.try_recv().is_err());
    assert!(!isolated.has_changed().unwrap());
    handle(&mut controller, vec![]);
    assert!(changed());
    assert_eq!(isolated.borrow_and_update()[..], [web, db]);

    // A comparison with the kernel that finds no difference.
    controller.heal();
    assert!(changes.try_recv().is_err());
}

#[test]
fn connections_are_judged_by_what_is_in_force() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_policies(engine());
    let objects = vec![pod("web", "10.1.0.5"), closed()];
    handle(&mut controller, policy_lists(objects));
    let mut denied = |source, destination| denies(&mut controller, source, destination);
    assert_eq!(denied("10.1.0.9", "10.1.0.5"), Some(true));
    assert_eq!(denied("10.1.0.5", "10.1.0.9"), Some(false), "egress");
    assert_eq!(denied("10.1.0.9", "10.1.0.6"), Some(false), "not isolated");

    bench.kernel.0.borrow_mut().failures = 2;
    handle(&mut controller, vec![pod("db", "10.1.0.6")]);
    let unknown = denies(&mut controller, "10.1.0.9", "10.1.0.5");
    assert_eq!(unknown, None, "it is unknown what is in force");
    handle(&mut controller, vec![]);
    let denied = denies(&mut controller, "10.1.0.9", "10.1.0.6");
    assert_eq!(denied, Some(true));
}

#[test]
fn policies_are_in_force_when_complete_lists_were_written_and_nothing_failed_since() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_policies(engine());
    let why = |controller: &Controller<Fake>| {
        let in_force = controller.policies_in_force().expect("policies are on");
        in_force.err().unwrap_or_default()
    };
    handle(&mut controller, vec![]);
    assert_eq!(
        why(&controller),
        "waiting for the complete list of Pod, Namespace, NetworkPolicy, \
         ClusterNetworkPolicy"
    );
    handle(&mut controller, policy_lists(vec![]));
    assert_eq!(why(&controller), "");
    // The first policies of a cluster wait for the first pods.
    let first = vec![Event::ListStarted(Kind::Pod), closed()];
    handle(&mut controller, first);
    assert_eq!(why(&controller), "waiting for the complete list of Pod");
    let pods = vec![pod("web", "10.1.0.5"), Event::ListComplete(Kind::Pod)];
    handle(&mut controller, pods);
    assert_eq!(why(&controller), "");
    // What is in force stays so while a list is read again.
    handle(&mut controller, vec![Event::ListStarted(Kind::Pod)]);
    assert_eq!(why(&controller), "");
    handle(
        &mut controller,
        vec![pod("web", "10.1.0.5"), Event::ListComplete(Kind::Pod)],
    );
    bench.kernel.0.borrow_mut().failures = 2;
    handle(&mut controller, vec![pod("db", "10.1.0.6")]);
    assert_ne!(why(&controller), "");
    handle(&mut controller, vec![]);
    assert_eq!(why(&controller), "");
}

#[test]
fn without_policies_there_is_nothing_to_be_in_force() {
    let bench = Bench::new();
    let settings = policies::PolicySettings::default();
    let controller = bench.controller().with_policies(Engine::off(settings));
    assert_eq!(controller.policies_in_force(), None);
}
