//! What the reconciler tells those around the policies, and what it answers them.

use tokio::sync::oneshot;

use super::*;
use crate::model::{LabelSelector, NetworkPolicy, Pod};
use crate::policy::{self, Connection};
use crate::reconcile::connections::bell;

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
    }))
}

pub(super) fn policy_lists(objects: Vec<Event>) -> Vec<Event> {
    let mut events: Vec<_> = Kind::POLICY.map(Event::ListStarted).into();
    events.extend(objects);
    events.extend(Kind::POLICY.map(Event::ListComplete));
    events
}

pub(super) fn engine() -> Engine {
    Engine::new(policy::Settings {
        node: "here".into(),
        strict: true,
        log_group: None,
    })
}

/// Whether the reconciler denies what goes from one address to another.
pub(super) fn denies(reconciler: &mut Reconciler<Fake>, source: &str, destination: &str) -> bool {
    let (answer, mut answered) = oneshot::channel();
    let connection = Connection {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        protocol: 6,
        port: Some(80),
    };
    let connections = vec![connection];
    reconciler.answer(Question::Judge {
        connections,
        answer,
    });
    let answer = answered.try_recv().unwrap();
    assert_eq!(answer.len(), 1);
    answer[0]
}

#[test]
fn those_around_are_told_when_other_rules_are_in_force() {
    let bench = Bench::new();
    let (cutter, woken) = bell();
    let (isolated, mut watched) = watch::channel(Isolated::default());
    let mut reconciler = bench
        .reconciler()
        .with_policies(engine())
        .with_isolated(isolated)
        .with_cutter(cutter);
    let of = |address: &str, name| {
        (
            address.parse().unwrap(),
            Some(ObjectName::new("shop", name)),
        )
    };
    let (web, db) = (of("10.1.0.5", "web"), of("10.1.0.6", "db"));

    handle(&mut reconciler, policy_lists(vec![pod("web", "10.1.0.5")]));
    assert!(woken.take(), "the first rules, although there are none");
    assert!(!watched.has_changed().unwrap());

    handle(&mut reconciler, vec![closed()]);
    assert!(woken.take());
    assert_eq!(*watched.borrow_and_update(), Isolated::from([web.clone()]));

    // An event that changes no rule.
    handle(&mut reconciler, vec![pod("web", "10.1.0.5")]);
    assert!(!woken.take());
    assert!(!watched.has_changed().unwrap());

    // Nobody is told of rules that are not in force.
    bench.kernel.0.borrow_mut().failures = 2;
    let outcome = handle(&mut reconciler, vec![pod("db", "10.1.0.6")]);
    assert_eq!(outcome, Outcome::Failed);
    assert!(!woken.take());
    assert!(!watched.has_changed().unwrap());
    handle(&mut reconciler, vec![]);
    assert!(woken.take());
    assert_eq!(watched.borrow_and_update()[..], [web, db]);

    // A look at the kernel that finds everything as it should be.
    reconciler.heal();
    assert!(!woken.take());
}

#[test]
fn connections_are_judged_by_what_is_in_force() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler().with_policies(engine());
    let objects = vec![pod("web", "10.1.0.5"), closed()];
    handle(&mut reconciler, policy_lists(objects));
    assert!(denies(&mut reconciler, "10.1.0.9", "10.1.0.5"));
    assert!(!denies(&mut reconciler, "10.1.0.5", "10.1.0.9"), "egress");
    assert!(
        !denies(&mut reconciler, "10.1.0.9", "10.1.0.6"),
        "not isolated"
    );

    bench.kernel.0.borrow_mut().failures = 2;
    handle(&mut reconciler, vec![pod("db", "10.1.0.6")]);
    assert!(
        !denies(&mut reconciler, "10.1.0.9", "10.1.0.5"),
        "it is unknown what is in force"
    );
    handle(&mut reconciler, vec![]);
    assert!(denies(&mut reconciler, "10.1.0.9", "10.1.0.6"));
}

#[test]
fn policies_are_in_force_when_complete_lists_were_written_and_nothing_failed_since() {
    let bench = Bench::new();
    let mut reconciler = bench.reconciler().with_policies(engine());
    let why = |reconciler: &Reconciler<Fake>| {
        let in_force = reconciler.policies_in_force().expect("policies are on");
        in_force.err().unwrap_or_default()
    };
    handle(&mut reconciler, vec![]);
    assert_eq!(
        why(&reconciler),
        "waiting for the complete list of Pod, Namespace, NetworkPolicy"
    );
    handle(&mut reconciler, policy_lists(vec![]));
    assert_eq!(why(&reconciler), "");
    // The first policies of a cluster wait for the first pods.
    let first = vec![Event::ListStarted(Kind::Pod), closed()];
    handle(&mut reconciler, first);
    assert_eq!(why(&reconciler), "waiting for the complete list of Pod");
    let pods = vec![pod("web", "10.1.0.5"), Event::ListComplete(Kind::Pod)];
    handle(&mut reconciler, pods);
    assert_eq!(why(&reconciler), "");
    // What is in force stays so while a list is read again.
    handle(&mut reconciler, vec![Event::ListStarted(Kind::Pod)]);
    assert_eq!(why(&reconciler), "");
    handle(
        &mut reconciler,
        vec![pod("web", "10.1.0.5"), Event::ListComplete(Kind::Pod)],
    );
    bench.kernel.0.borrow_mut().failures = 2;
    handle(&mut reconciler, vec![pod("db", "10.1.0.6")]);
    assert_ne!(why(&reconciler), "");
    handle(&mut reconciler, vec![]);
    assert_eq!(why(&reconciler), "");
}

#[test]
fn without_policies_there_is_nothing_to_be_in_force() {
    let bench = Bench::new();
    let settings = policy::Settings::default();
    let reconciler = bench.reconciler().with_policies(Engine::off(settings));
    assert_eq!(reconciler.policies_in_force(), None);
}
