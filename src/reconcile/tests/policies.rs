//! Policies that the kernel refuses, addresses that move, and what is counted.

use super::questions::{engine, pod, policy_lists};
use super::*;
use crate::model::{LabelSelector, NetworkPolicy, Peer, PolicyRule};
use crate::policy;

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
    }))
}

/// The number of rules in the chain of a policy; `None` without one.
fn rules(bench: &Bench, policy: &str) -> Option<usize> {
    let state = bench.kernel.0.borrow();
    let table = state.ruleset.tables.get(&policy::table_id(Family::V4))?;
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
    let mut reconciler = bench.reconciler().with_policies(engine());
    let bad = allowing("bad", "203.0.113.0/24");
    let objects = vec![
        pod("web", "10.1.0.5"),
        bad.clone(),
        allowing("good", "198.51.100.0/24"),
    ];
    handle(&mut reconciler, lists(Vec::new()));
    let outcome = handle(&mut reconciler, policy_lists(objects));
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
    let judged = |reconciler: &Reconciler<Fake>, source: &str| {
        super::questions::denies(reconciler, source, "10.1.0.5")
    };
    assert!(judged(&reconciler, "203.0.113.1"));
    assert!(!judged(&reconciler, "198.51.100.1"));

    // Changes of others go through, without another comparison.
    let reads = bench.kernel.0.borrow().reads;
    handle(
        &mut reconciler,
        vec![pod("db", "10.1.0.6"), allowing("more", "192.0.2.0/24")],
    );
    assert_eq!(rules(&bench, "more"), Some(1));
    assert_eq!(bench.kernel.0.borrow().reads, reads);
    // It comes back when it has changed.
    handle(&mut reconciler, vec![allowing("bad", "203.0.113.128/25")]);
    assert_eq!(rules(&bench, "bad"), Some(1));
    // Refused in an incremental write, and forgiven when the kernel has changed its mind.
    assert_eq!(handle(&mut reconciler, vec![bad]), Outcome::Synced);
    assert_eq!(rules(&bench, "bad"), Some(0));
    bench.kernel.0.borrow_mut().unwanted = None;
    reconciler.forgive();
    assert_eq!(handle(&mut reconciler, vec![]), Outcome::Synced);
    assert_eq!(rules(&bench, "bad"), Some(1));
    assert!(!judged(&reconciler, "203.0.113.1"));
}

#[test]
fn what_two_policies_share_closes_both() {
    let bench = Bench::new();
    bench.kernel.0.borrow_mut().unwanted = Some(Key::address("203.0.113.0".parse().unwrap()));
    let mut reconciler = bench.reconciler().with_policies(engine());
    let objects = vec![
        pod("web", "10.1.0.5"),
        allowing("one", "203.0.113.0/24"),
        allowing("two", "203.0.113.0/24"),
    ];
    handle(&mut reconciler, lists(Vec::new()));
    let outcome = handle(&mut reconciler, policy_lists(objects));
    assert_eq!(outcome, Outcome::Synced);
    assert_eq!(
        (rules(&bench, "one"), rules(&bench, "two")),
        (Some(0), Some(0))
    );
    assert_eq!(bench.heard().len(), 2);
}
