//! Policies that the kernel refuses, addresses that move, and what is counted.

use std::time::SystemTime;

use tokio::sync::oneshot;

use super::queries::{closed, engine, pod, policy_lists};
use super::*;
use crate::model::{
    Action, ClusterNetworkPolicy, LabelSelector, NetworkPolicy, Peer, PolicyRule, Tier, TierPeer,
    TierRule,
};
use crate::policies::{self, Engine};

/// A policy for all pods of the shop that allows a block.
fn allowing(name: &str, block: &str) -> Event {
    let peer = Peer::Block {
        cidr: block.parse().unwrap(),
        except: Vec::new(),
    };
    Event::Apply(Object::NetworkPolicy(NetworkPolicy {
        name: ObjectName::new("shop", name),
        pods: LabelSelector::default(),
        ingress: Some(vec![PolicyRule {
            peers: Some(vec![peer]),
            ports: None,
        }]),
        egress: None,
        mode: None,
    }))
}

/// The number of rules in the chain of a policy; `None` without one.
fn rules(bench: &Bench, policy: &str) -> Option<usize> {
    let state = bench.kernel.0.borrow();
    let table = state.ruleset.tables.get(&policies::table_id(Family::V4))?;
    let chain = format!("policy-ingress-shop/{policy}");
    table
        .chains
        .get(chain.as_str())
        .map(|chain| chain.rules.len())
}

#[test]
fn a_policy_that_the_kernel_refuses_is_closed_and_the_others_are_in_force() {
    let bench = Bench::new();
    bench.kernel.0.borrow_mut().unwanted = Some(Key::address("203.0.113.0".parse().unwrap()));
    let mut controller = bench.controller().with_policies(engine());
    let bad = allowing("bad", "203.0.113.0/24");
    let objects = vec![
        pod("web", "10.1.0.5"),
        bad.clone(),
        allowing("good", "198.51.100.0/24"),
    ];
    handle(&mut controller, lists(Vec::new()));
    let outcome = handle(&mut controller, policy_lists(objects));
    assert_eq!(outcome, Outcome::Synced);
    assert_eq!(
        (rules(&bench, "bad"), rules(&bench, "good")),
        (Some(0), Some(1))
    );
    let heard = bench.heard();
    assert_eq!(heard.len(), 1, "{heard:?}");
    assert!(
        heard[0].starts_with("NetworkPolicy shop/bad: the kernel refused element { 203.0.113.0/24"),
        "{}",
        heard[0]
    );
    let judged = |controller: &mut Controller<Fake>, source: &str| {
        super::queries::denies(controller, source, "10.1.0.5").unwrap()
    };
    assert!(judged(&mut controller, "203.0.113.1"));
    assert!(!judged(&mut controller, "198.51.100.1"));

    // Changes of others go through, without another comparison.
    let reads = bench.kernel.0.borrow().reads;
    handle(
        &mut controller,
        vec![pod("db", "10.1.0.6"), allowing("more", "192.0.2.0/24")],
    );
    assert_eq!(rules(&bench, "more"), Some(1));
    assert_eq!(bench.kernel.0.borrow().reads, reads);
    // It comes back when it has changed.
    handle(&mut controller, vec![allowing("bad", "203.0.113.128/25")]);
    assert_eq!(rules(&bench, "bad"), Some(1));
    // Refused in an incremental write, and forgiven when the kernel has changed its mind.
    assert_eq!(handle(&mut controller, vec![bad]), Outcome::Synced);
    assert_eq!(rules(&bench, "bad"), Some(0));
    bench.kernel.0.borrow_mut().unwanted = None;
    controller.retry_quarantined();
    assert_eq!(handle(&mut controller, vec![]), Outcome::Synced);
    assert_eq!(rules(&bench, "bad"), Some(1));
    assert!(!judged(&mut controller, "203.0.113.1"));
}

#[test]
fn a_policy_that_waits_for_lists_is_not_measured_as_in_force() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_policies(engine());
    handle(&mut controller, lists(Vec::new()));
    handle(&mut controller, policy_lists(Vec::new()));
    assert!(controller.latency.is_empty());
    let first = vec![
        Event::ListStarted(Kind::Pod),
        allowing("first", "198.51.100.0/24"),
    ];
    handle(&mut controller, first);
    let web = service("web", &["10.96.0.1"], &[80]);
    handle(&mut controller, vec![put(web)]);
    assert!(!controller.latency.is_empty(), "its pods are being listed");
    handle(&mut controller, vec![Event::ListComplete(Kind::Pod)]);
    assert!(controller.latency.is_empty());
}

/// Since when a policy is in force.
fn since(controller: &mut Controller<Fake>, policy: ObjectRef) -> Option<SystemTime> {
    let (answer, mut answered) = oneshot::channel();
    controller.answer(Query::Look(Look(Box::new(move |view: &View| {
        let _ = answer.send(view.in_force_since(&policy));
    }))));
    answered.try_recv().unwrap()
}

#[test]
fn a_policy_is_in_force_since_its_last_change_took_effect() {
    let bench = Bench::new();
    bench.kernel.0.borrow_mut().unwanted = Some(Key::address("203.0.113.0".parse().unwrap()));
    let mut controller = bench.controller().with_policies(engine());
    let of = |name: &str| ObjectRef::new(Kind::NetworkPolicy, ObjectName::new("shop", name));
    let tier = || ObjectRef::new(Kind::ClusterNetworkPolicy, ObjectName::new("", "tier"));
    let start = SystemTime::now();
    handle(&mut controller, lists(Vec::new()));
    let objects = vec![
        pod("web", "10.1.0.5"),
        allowing("bad", "203.0.113.0/24"),
        allowing("good", "198.51.100.0/24"),
        allowing("other", "198.51.100.0/24"),
        accepting("tier", 1, "198.51.100.0/24"),
    ];
    handle(&mut controller, policy_lists(objects));
    let first = since(&mut controller, of("good")).unwrap();
    assert!(first >= start);
    assert_eq!(since(&mut controller, of("other")), Some(first));
    assert_eq!(since(&mut controller, tier()), Some(first));
    assert_eq!(since(&mut controller, of("bad")), None, "it was refused");

    // Changes of pods and of other policies are none of this one.
    handle(
        &mut controller,
        vec![pod("db", "10.1.0.6"), allowing("other", "192.0.2.0/24")],
    );
    assert_eq!(since(&mut controller, of("good")), Some(first));
    assert!(since(&mut controller, of("other")) > Some(first));

    // While a change cannot be written, it is unknown what is in force.
    bench.kernel.0.borrow_mut().failures = 2;
    handle(&mut controller, vec![allowing("good", "192.0.2.0/24")]);
    assert_eq!(since(&mut controller, of("good")), None);
    handle(&mut controller, vec![]);
    assert!(since(&mut controller, of("good")) > Some(first));

    // While a list is read again, changes wait.
    handle(
        &mut controller,
        vec![
            Event::ListStarted(Kind::Pod),
            allowing("other", "198.51.100.0/24"),
        ],
    );
    assert_eq!(since(&mut controller, of("other")), None);
    assert!(since(&mut controller, of("good")).is_some());
    let pods = vec![pod("web", "10.1.0.5"), Event::ListComplete(Kind::Pod)];
    handle(&mut controller, pods);
    assert!(since(&mut controller, of("other")).is_some());

    handle(&mut controller, vec![Event::Delete(of("good"))]);
    assert_eq!(since(&mut controller, of("good")), None);
    bench.kernel.0.borrow_mut().unwanted = None;
    controller.retry_quarantined();
    handle(&mut controller, vec![]);
    assert!(since(&mut controller, of("bad")) > Some(first));
}

/// A cluster policy for the egress of all pods that accepts a network.
fn accepting(name: &str, priority: u16, network: &str) -> Event {
    let networks = TierPeer::Networks(vec![network.parse().unwrap()]);
    let policy = ClusterNetworkPolicy {
        name: ObjectName::new("", name),
        tier: Tier::Admin,
        priority,
        subject_namespaces: LabelSelector::default(),
        subject_pods: LabelSelector::default(),
        ingress: Vec::new(),
        egress: vec![TierRule {
            name: None,
            action: Action::Accept,
            peers: Some(vec![networks]),
            protocols: None,
        }],
    };
    Event::Apply(Object::ClusterNetworkPolicy(policy))
}

#[test]
fn a_cluster_policy_that_the_kernel_refuses_denies_what_those_before_it_do_not_accept() {
    let bench = Bench::new();
    bench.kernel.0.borrow_mut().unwanted = Some(Key::address("203.0.113.0".parse().unwrap()));
    let mut controller = bench.controller().with_policies(engine());
    let objects = vec![
        pod("web", "10.1.0.5"),
        accepting("first", 1, "198.51.100.0/24"),
        accepting("bad", 2, "203.0.113.0/24"),
        accepting("last", 3, "192.0.2.0/24"),
    ];
    handle(&mut controller, lists(Vec::new()));
    let outcome = handle(&mut controller, policy_lists(objects));
    assert_eq!(outcome, Outcome::Synced);
    let heard = bench.heard();
    assert_eq!(heard.len(), 1, "{heard:?}");
    assert!(
        heard[0].starts_with("ClusterNetworkPolicy bad: the kernel refused element"),
        "{}",
        heard[0]
    );
    assert!(heard[0].contains("denies all traffic"), "{}", heard[0]);
    let mut denied = |destination: &str| {
        super::queries::denies(&mut controller, "10.1.0.5", destination).unwrap()
    };
    assert!(!denied("198.51.100.1"));
    assert!(denied("203.0.113.1"));
    assert!(denied("192.0.2.1"));
    bench.kernel.0.borrow_mut().unwanted = None;
    controller.retry_quarantined();
    assert_eq!(handle(&mut controller, vec![]), Outcome::Synced);
    for destination in ["203.0.113.1", "192.0.2.1", "8.8.8.8"] {
        assert!(!super::queries::denies(&mut controller, "10.1.0.5", destination).unwrap());
    }
}

#[test]
fn what_two_policies_share_closes_both() {
    let bench = Bench::new();
    bench.kernel.0.borrow_mut().unwanted = Some(Key::address("203.0.113.0".parse().unwrap()));
    let mut controller = bench.controller().with_policies(engine());
    let objects = vec![
        pod("web", "10.1.0.5"),
        allowing("one", "203.0.113.0/24"),
        allowing("two", "203.0.113.0/24"),
    ];
    handle(&mut controller, lists(Vec::new()));
    let outcome = handle(&mut controller, policy_lists(objects));
    assert_eq!(outcome, Outcome::Synced);
    assert_eq!(
        (rules(&bench, "one"), rules(&bench, "two")),
        (Some(0), Some(0))
    );
    assert_eq!(bench.heard().len(), 2);
}

#[test]
fn addresses_with_another_pod_are_handed_over_once_the_rules_are_in_force() {
    let bench = Bench::new();
    let mut followers = Followers::default();
    let changes = followers.policies();
    let engine = Engine::new(policies::PolicySettings {
        node: "here".into(),
        ..policies::PolicySettings::default()
    });
    let controller = bench.controller().with_policies(engine);
    let mut controller = controller.with_followers(followers);
    let delete = |name| Event::Delete(ObjectRef::new(Kind::Pod, ObjectName::new("shop", name)));
    handle(&mut controller, lists(Vec::new()));
    let objects = vec![pod("web", "10.1.0.5"), closed()];
    handle(&mut controller, policy_lists(objects));
    let moved = || -> Vec<String> {
        let changes = changes.try_iter();
        let moved: BTreeSet<IpAddr> = changes.flat_map(|it| it.reassigned.clone()).collect();
        moved.iter().map(IpAddr::to_string).collect()
    };
    assert!(moved().is_empty(), "it may have been there for long");
    handle(&mut controller, vec![delete("web")]);
    assert!(moved().is_empty(), "no pod has the address");
    bench.kernel.0.borrow_mut().failures = 2;
    handle(&mut controller, vec![pod("other", "10.1.0.5")]);
    assert!(changes.try_recv().is_err(), "the rules are not in force");
    handle(&mut controller, vec![]);
    assert_eq!(moved(), ["10.1.0.5"]);
    bench.kernel.0.borrow_mut().failures = 2;
    handle(&mut controller, vec![pod("new", "10.1.0.7")]);
    handle(&mut controller, vec![]);
    let change = changes.try_recv().unwrap();
    assert!(change.rewritten, "what was asked meanwhile is asked again");
    assert_eq!(change.reassigned, ["10.1.0.7".parse().unwrap()].into());
    // A list that is read again brings nothing new.
    let objects = vec![pod("other", "10.1.0.5"), pod("new", "10.1.0.7"), closed()];
    handle(&mut controller, policy_lists(objects));
    assert!(moved().is_empty());
}

#[test]
fn pods_namespaces_and_policies_are_counted() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_policies(engine());
    handle(&mut controller, lists(Vec::new()));
    let objects = vec![pod("web", "10.1.0.5"), pod("db", "10.1.0.6"), closed()];
    handle(&mut controller, policy_lists(objects));
    let text = bench.registry.encode();
    for line in [
        "nftlet_objects{kind=\"Pod\"} 2\n",
        "nftlet_objects{kind=\"Namespace\"} 0\n",
        "nftlet_objects{kind=\"NetworkPolicy\"} 1\n",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[test]
fn a_pod_is_isolated_before_a_service_leads_to_it() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_policies(engine());
    let web = service("web", &["10.96.0.10"], &[80]);
    handle(&mut controller, lists(vec![web.clone().into()]));
    handle(&mut controller, policy_lists(vec![closed()]));
    let before = bench.kernel.0.borrow().applied.len();
    // The service first, which is of no matter.
    let events = vec![
        put(slice("web-1", &web, Family::V4, &[5])),
        pod("web", "10.244.1.5"),
    ];
    handle(&mut controller, events);
    let state = bench.kernel.0.borrow();
    let adds_to = |transaction: &Transaction, table: &TableId, set: &str| {
        transaction.ops.iter().any(|op| match op {
            Op::AddElements(of, name, ..) => of == table && name.as_str() == set,
            _ => false,
        })
    };
    let place = |table: TableId, set: &str| {
        let mut new = state.applied.iter().skip(before);
        new.position(|transaction| adds_to(transaction, &table, set))
    };
    let isolated = place(policies::table_id(Family::V4), "ingress-pods");
    let leads = place(table_id(Family::V4), "endpoints");
    assert!(
        isolated.is_some() && isolated < leads,
        "{isolated:?} {leads:?}"
    );
}
