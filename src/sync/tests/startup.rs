//! Rules that must be in force before the lists are complete.

use super::queries::{closed, pod, policy_lists};
use super::*;
use crate::model::{
    Action, ClusterNetworkPolicy, LabelSelector, Namespace, Tier, TierPeer, TierRule,
};
use crate::nft::{Chain, Declaration, Selector, Set};
use crate::policies::{self, Engine, PodNetwork};

fn engine(form: PodNetwork) -> Engine {
    Engine::new(policies::PolicySettings {
        node: "here".into(),
        closed: Some(form),
        ..policies::PolicySettings::default()
    })
}

fn bridge() -> Engine {
    engine(PodNetwork::BridgeInterface("cni0".into()))
}

fn own_node(range: &str) -> Event {
    put(Node {
        name: "here".into(),
        pod_cidrs: range.parse().into_iter().collect(),
        ..node()
    })
}

fn table(bench: &Bench) -> Table {
    let state = bench.kernel.0.borrow();
    let table = state.ruleset.tables.get(&policies::table_id(Family::V4));
    table.cloned().unwrap_or_default()
}

fn elements(bench: &Bench, set: &str) -> usize {
    let table = table(bench);
    table.sets[&Name::from(set)].elements.len()
}

/// Returns whether the chain that closes the pod network is there, with its rules.
fn is_closed(bench: &Bench) -> bool {
    let table = table(bench);
    let chain = table.chains.get(&Name::from("startup"));
    chain.is_some_and(|chain| chain.rules.len() == 3)
}

#[test]
fn the_pod_network_is_closed_before_anything_is_known() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_policies(bridge());
    assert_eq!(controller.start().policies, Some(Outcome::Synced));
    assert!(is_closed(&bench));
    assert_eq!(elements(&bench, "known-pods"), 0);
    assert_eq!(bench.applied().len(), 1);
    // It is not written again, and an open pod network needs nothing.
    handle(&mut controller, vec![Event::ListStarted(Kind::Pod)]);
    assert_eq!(bench.applied(), []);
    let open = Bench::new();
    let mut controller = open.controller().with_policies(super::queries::engine());
    assert_eq!(controller.start(), Outcomes::default());
    handle(&mut controller, lists(vec![]));
    assert_eq!(table(&open), Table::default());
    assert_eq!(open.kernel.0.borrow().reads, 1, "that of the services");
}

#[test]
fn a_pod_is_known_with_its_policies_in_one_transaction() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_policies(bridge());
    controller.start();
    handle(&mut controller, lists(vec![]));
    handle(&mut controller, policy_lists(vec![closed()]));
    assert!(controller.policies_in_force().unwrap().is_ok());
    bench.applied();
    handle(&mut controller, vec![pod("web", "10.1.0.5")]);
    let adds = |transaction: &Transaction, set: &str| {
        let mut ops = transaction.ops.iter();
        ops.any(|op| matches!(op, Op::AddElements(_, name, ..) if name.as_str() == set))
    };
    let applied = bench.applied();
    let both: Vec<bool> = applied.iter().map(|it| adds(it, "known-pods")).collect();
    // The new chains first, to which nothing leads yet.
    assert_eq!(both, [false, true]);
    assert!(adds(&applied[1], "ingress-pods"));
    // Without policies it is one transaction of one operation.
    let free = Event::Delete(ObjectRef::new(
        Kind::NetworkPolicy,
        ObjectName::new("shop", "closed"),
    ));
    handle(&mut controller, vec![free]);
    bench.applied();
    handle(&mut controller, vec![pod("db", "10.1.0.6")]);
    let applied = bench.applied();
    assert_eq!(applied.len(), 1);
    assert_eq!(applied[0].ops.len(), 1);
    assert_eq!(elements(&bench, "known-pods"), 2);
}

#[test]
fn the_network_of_the_node_closes_before_the_lists() {
    let bench = Bench::new();
    let form = PodNetwork::NodeCidr;
    let mut controller = bench.controller().with_policies(engine(form));
    controller.start();
    assert!(is_closed(&bench));
    assert_eq!(elements(&bench, "pod-network"), 0);
    handle(&mut controller, vec![own_node("10.1.0.0/24")]);
    assert_eq!(elements(&bench, "pod-network"), 1);
    let why = controller.policies_in_force().unwrap().unwrap_err();
    assert!(why.contains("complete list of Pod"), "{why}");
    handle(&mut controller, lists(vec![]));
    handle(&mut controller, policy_lists(vec![pod("web", "10.1.0.5")]));
    assert_eq!(elements(&bench, "known-pods"), 1);
    assert_eq!(controller.policies_in_force(), Some(Ok(())));
    assert!(bench.heard().is_empty());
    // A pod outside is reported, and the others are closed all the same.
    handle(&mut controller, vec![pod("far", "10.2.0.5")]);
    assert_eq!(bench.heard().len(), 1);
    let why = controller.policies_in_force().unwrap().unwrap_err();
    assert!(why.contains("10.2.0.5 of pod shop/far"), "{why}");
}

#[test]
fn a_restart_keeps_what_was_known_until_the_lists_are_complete() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_policies(bridge());
    handle(&mut controller, lists(vec![]));
    let pods = [pod("web", "10.1.0.5"), pod("db", "10.1.0.6")];
    handle(&mut controller, policy_lists(pods.into()));
    drop(controller);

    let mut controller = bench.controller().with_policies(bridge());
    bench.applied();
    controller.start();
    assert_eq!(bench.applied(), []);
    assert_eq!(elements(&bench, "known-pods"), 2);
    let mut listing: Vec<Event> = policy_lists(vec![pod("web", "10.1.0.5")]);
    let last = listing.pop().unwrap();
    handle(&mut controller, listing);
    assert_eq!(elements(&bench, "known-pods"), 2);
    handle(&mut controller, vec![last]);
    assert_eq!(elements(&bench, "known-pods"), 1);
}

#[test]
fn early_rules_that_another_process_removes_are_restored() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_policies(bridge());
    controller.start();
    handle(&mut controller, lists(vec![]));
    // While the lists of policies are incomplete.
    for restore in [
        |controller: &mut Controller<'_, Fake>| controller.heal().0,
        |controller: &mut Controller<'_, Fake>| controller.restore_before_lists(),
    ] {
        bench.kernel.meddle(|ruleset| ruleset.tables.clear());
        assert!(!is_closed(&bench));
        restore(&mut controller);
        assert!(is_closed(&bench));
    }
    bench.kernel.0.borrow_mut().failures = 1;
    bench.kernel.meddle(|ruleset| ruleset.tables.clear());
    let outcome = controller.restore_before_lists();
    assert_eq!(outcome.policies, Some(Outcome::Failed));
    assert_eq!(controller.start().policies, Some(Outcome::Synced));
    assert!(is_closed(&bench));
}

#[test]
fn other_rules_of_an_earlier_process_stay() {
    let bench = Bench::new();
    bench.kernel.meddle(|ruleset| {
        let table = ruleset.tables.entry(policies::table_id(Family::V4));
        let table = table.or_default();
        table.chains.insert("other".into(), Chain::default());
        let declaration = Declaration::new(SetKind::Set, [Selector::SourceAddress]);
        table.sets.insert("others".into(), Set::from(declaration));
    });
    let mut controller = bench.controller().with_policies(bridge());
    controller.start();
    assert!(is_closed(&bench));
    let found = table(&bench);
    assert!(found.chains.contains_key(&Name::from("other")));
    assert!(found.sets.contains_key(&Name::from("others")));
}

#[tokio::test(start_paused = true)]
async fn a_node_without_a_pod_network_ends_the_start() {
    let bench = Bench::new();
    let health = Health::new(Duration::from_secs(30));
    let signals = || {
        let (stop, stopped) = watch::channel(false);
        let signals = Signals {
            stop: stopped,
            once: false,
            foreign: Arc::default(),
            missed: Arc::default(),
            audits: None,
            ready: Vec::new(),
            queries: None,
        };
        (stop, signals)
    };
    let begin = tokio::time::Instant::now();
    for range in ["", "10.1.0.0/24"] {
        let engine = engine(PodNetwork::NodeCidr);
        let mut controller = bench.controller().with_policies(engine);
        let (events, received) = mpsc::channel(64);
        let (stop, signals) = signals();
        let test = async {
            events.send(Delivery::now(own_node(""))).await.unwrap();
            let listed = Event::ListComplete(Kind::Node);
            events.send(Delivery::now(listed)).await.unwrap();
            tokio::time::sleep(Duration::from_secs(20)).await;
            // A controller adds the ranges, or does not.
            events.send(Delivery::now(own_node(range))).await.unwrap();
            tokio::time::sleep(Duration::from_secs(20)).await;
            stop.send_replace(true);
        };
        let task = run(&mut controller, received, signals, &health);
        let (exit, ()) = tokio::join!(task, test);
        let expected = match range {
            "" => Exit::NoPodNetwork,
            _ => Exit::Stopped,
        };
        assert_eq!(exit, expected, "{range}");
    }
    assert_eq!(begin.elapsed().as_secs(), 80);
}

/// What the source sends when the first cluster policy that selects nodes appears.
fn policy_for_nodes() -> Vec<Event> {
    let policy = ClusterNetworkPolicy {
        name: ObjectName::new("", "nodes"),
        tier: Tier::Admin,
        priority: 1,
        subject_namespaces: LabelSelector::default(),
        subject_pods: LabelSelector::default(),
        ingress: Vec::new(),
        egress: vec![TierRule {
            name: None,
            action: Action::Deny,
            peers: Some(vec![TierPeer::Nodes(LabelSelector::default())]),
            protocols: None,
        }],
    };
    let policy = Event::Apply(Object::ClusterNetworkPolicy(policy));
    vec![Event::ListStarted(Kind::Node), policy]
}

#[test]
fn a_list_of_nodes_that_never_ends_holds_up_no_other_policy() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_policies(bridge());
    controller.start();
    handle(&mut controller, lists(vec![]));
    let shop = Event::Apply(Object::Namespace(Namespace {
        name: ObjectName::new("", "shop"),
        labels: Default::default(),
        mode: None,
    }));
    let objects = policy_lists(vec![shop, closed(), pod("web", "10.1.0.5")]);
    handle(&mut controller, objects);
    assert_eq!(controller.policies_in_force(), Some(Ok(())));
    handle(&mut controller, policy_for_nodes());
    let waits = controller.policies_in_force().unwrap().unwrap_err();
    assert!(waits.contains("the list of all Nodes"), "{waits}");
    handle(&mut controller, vec![pod("db", "10.1.0.6")]);
    assert_eq!(elements(&bench, "known-pods"), 2);
    assert_eq!(elements(&bench, "ingress-pods"), 2);
    bench.kernel.meddle(|ruleset| ruleset.tables.clear());
    controller.heal();
    assert_eq!(elements(&bench, "ingress-pods"), 2);
    handle(&mut controller, vec![Event::ListComplete(Kind::Node)]);
    assert_eq!(controller.policies_in_force(), Some(Ok(())));
}

#[tokio::test(start_paused = true)]
async fn without_an_answer_about_the_node_the_start_goes_on() {
    let bench = Bench::new();
    let health = Health::new(Duration::from_secs(30));
    let engine = engine(PodNetwork::NodeCidr);
    let mut controller = bench.controller().with_policies(engine);
    let (events, received) = mpsc::channel(64);
    let (stop, stopped) = watch::channel(false);
    let signals = Signals {
        stop: stopped,
        once: false,
        foreign: Arc::default(),
        missed: Arc::default(),
        audits: None,
        ready: Vec::new(),
        queries: None,
    };
    let begin = tokio::time::Instant::now();
    let source = async {
        // No server answers; the list is complete without the Node after a while.
        tokio::time::sleep(Duration::from_secs(30)).await;
        for event in [
            Event::ListStarted(Kind::Node),
            Event::ListComplete(Kind::Node),
        ] {
            events.send(Delivery::now(event)).await.unwrap();
        }
        tokio::time::sleep(Duration::from_secs(600)).await;
        stop.send_replace(true);
        std::future::pending::<()>().await;
    };
    let exit = tokio::select! {
        exit = run(&mut controller, received, signals, &health) => exit,
        () = source => unreachable!("it never ends"),
    };
    assert_eq!(exit, Exit::Stopped);
    assert_eq!(begin.elapsed().as_secs(), 630);
}
