//! Pods that are isolated from their first packet on.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::model::{
    Action, ClusterNetworkPolicy, Family, LabelSelector, Node, Requirement, Tier, TierPeer,
    TierRule,
};
use crate::nft::{
    Declaration, Key, Name, Op, Set, SetKind, Table, TableId, Transaction, add_parts, diff,
};
use crate::policies::{PodNetwork, table_id};

fn node(ranges: &[&str]) -> Event {
    named_node("here", ranges)
}

fn named_node(name: &str, ranges: &[&str]) -> Event {
    Event::Apply(Object::Node(Node {
        name: name.into(),
        internal_ips: vec![],
        external_ips: vec![],
        pod_cidrs: ranges.iter().map(|range| range.parse().unwrap()).collect(),
        zone: None,
        going_away: false,
        labels: Labels::default(),
        addresses: [].into(),
    }))
}

fn engine(form: PodNetwork) -> Engine {
    Engine::new(PolicySettings {
        closed: Some(form),
        ..settings(false)
    })
}

fn list_policies(engine: &mut Engine) {
    for kind in Kind::POLICY {
        engine.apply(&Event::ListStarted(kind));
        engine.apply(&Event::ListComplete(kind));
    }
}

/// The pod network 10.0.0.0/25 is closed.
fn closed() -> Checked {
    let mut engine = engine(PodNetwork::NodeCidr);
    list_policies(&mut engine);
    assert!(!engine.is_ready(), "the network is not known");
    let mut checked = Checked {
        engine,
        kernel: Ruleset::default(),
        events: Vec::new(),
    };
    checked.apply(node(&["10.0.0.0/25"]));
    assert!(checked.engine.is_ready());
    checked.update();
    checked
}

fn set<'a>(ruleset: &'a Ruleset, name: &str) -> &'a Set {
    &ruleset.tables[&table_id(Family::V4)].sets[&Name::from(name)]
}

fn known(ruleset: &Ruleset) -> Vec<String> {
    let set = set(ruleset, "known-pods");
    let types = set.declaration.key_types(table_id(Family::V4).family);
    let elements = set.elements.iter();
    elements
        .flat_map(|element| element.key.fields(&types).collect::<Vec<_>>())
        .collect()
}

fn delete(kind: Kind, name: &str) -> Event {
    let (namespace, name) = name.split_once('/').unwrap();
    Event::Delete(ObjectRef::new(kind, ObjectName::new(namespace, name)))
}

/// A policy that denies everything in these directions.
fn deny(ingress: bool, egress: bool) -> Event {
    apply_policy(NetworkPolicy {
        ingress: ingress.then(Vec::new),
        egress: egress.then(Vec::new),
        ..policy("shop/deny", app("web"))
    })
}

#[test]
fn the_tables_exist_without_policies() {
    let mut checked = closed();
    assert_eq!(checked.kernel.tables.len(), 2);
    checked.apply(deny(true, true));
    checked.update();
    checked.apply(delete(Kind::NetworkPolicy, "shop/deny"));
    checked.update();
    assert_eq!(checked.kernel.tables.len(), 2);
    assert!(!checked.engine.has_first_policies());
}

#[test]
fn what_ipvs_sends_past_the_forward_hook_is_closed_too() {
    let rules = |beside_proxy: bool| {
        let engine = Engine::new(PolicySettings {
            closed: Some(PodNetwork::NodeCidr),
            beside_proxy,
            ..settings(false)
        });
        text(&engine.early_rules().unwrap())
    };
    let chain = "\tchain startup-by-ipvs {
\t\ttype filter hook output priority -10; policy accept;
\t\tct state established,related accept
\t\tfib saddr type local accept
\t\tip daddr @pod-network ip daddr != @known-pods jump unknown-destination
\t}";
    assert!(rules(true).contains(chain), "{}", rules(true));
    assert!(!rules(false).contains("hook output"));
}

#[test]
fn pods_of_this_node_are_known_while_they_have_their_addresses() {
    let mut checked = closed();
    let web = pod("shop/web", 1, "here", "web");
    for pod in [
        web.clone(),
        pod("shop/remote", 2, "there", "web"),
        Pod {
            host_network: true,
            ..pod("shop/host", 3, "here", "web")
        },
        Pod {
            ended: true,
            ..pod("shop/ended", 4, "here", "web")
        },
        Pod {
            addresses: Default::default(),
            ..pod("shop/new", 5, "here", "web")
        },
    ] {
        checked.apply(apply_pod(pod));
    }
    checked.update();
    assert_eq!(known(&checked.kernel), ["10.0.0.1"]);
    let mut gone = web.clone();
    gone.evidence.sandbox = Sandbox::Gone;
    checked.apply(apply_pod(gone));
    checked.update();
    assert_eq!(known(&checked.kernel), [""; 0], "it has no sandbox");
    checked.apply(apply_pod(pod("shop/new", 5, "here", "web")));
    checked.apply(apply_pod(web));
    checked.update();
    assert_eq!(known(&checked.kernel), ["10.0.0.1", "10.0.0.5"]);
    checked.apply(apply_pod(pod("shop/new", 6, "here", "web")));
    checked.apply(delete(Kind::Pod, "shop/web"));
    assert_eq!(checked.update(), (3, 2), "plain elements, one transaction");
    assert_eq!(known(&checked.kernel), ["10.0.0.6"]);
}

#[test]
fn an_address_that_two_pods_claim_is_known_with_the_policies_of_both() {
    let mut checked = closed();
    checked.apply(deny(true, false));
    checked.apply(apply_pod(pod("shop/web", 1, "here", "web")));
    checked.apply(apply_pod(pod("shop/other", 1, "here", "other")));
    checked.update();
    assert_eq!(known(&checked.kernel), ["10.0.0.1"]);
    assert_eq!(set(&checked.kernel, "ingress-pods").elements.len(), 1);
}

#[test]
fn a_departed_pod_is_known_while_it_is_isolated_in_both_directions() {
    for (ingress, egress, stays) in [(true, true, true), (true, false, false)] {
        let mut checked = closed();
        checked.apply(deny(ingress, egress));
        checked.apply(apply_pod(Pod {
            running: true,
            ..pod("shop/web", 1, "here", "web")
        }));
        checked.update();
        assert_eq!(known(&checked.kernel), ["10.0.0.1"]);
        checked.engine.apply(&delete(Kind::Pod, "shop/web"));
        let transaction = checked.engine.update(BUDGET).transaction;
        commit(&mut checked.kernel, transaction);
        assert_eq!(known(&checked.kernel).len(), usize::from(stays));
        let later = Instant::now() + Duration::from_secs(301);
        checked.engine.forget_departed(later);
        let transaction = checked.engine.update(BUDGET).transaction;
        commit(&mut checked.kernel, transaction);
        assert_eq!(known(&checked.kernel), [""; 0]);
        assert_eq!(checked.kernel, checked.engine.ruleset());
    }
}

#[test]
fn an_outdated_pod_that_departs_does_not_replace_a_departed_one() {
    let mut checked = closed();
    checked.apply(deny(true, true));
    let running = |name, app, sandbox| Pod {
        running: true,
        evidence: Evidence {
            sandbox,
            started: None,
        },
        ..pod(name, 1, "here", app)
    };
    checked.apply(apply_pod(running("shop/web", "web", Sandbox::Unknown)));
    checked.update();
    checked.apply(apply_pod(running("shop/old", "db", Sandbox::Gone)));
    checked.update();
    for name in ["shop/web", "shop/old"] {
        checked.apply(delete(Kind::Pod, name));
        checked.update();
        assert_eq!(known(&checked.kernel), ["10.0.0.1"], "{name}");
        let isolated = &set(&checked.kernel, "ingress-pods").elements;
        assert_eq!(isolated.len(), 1, "{name}");
    }
}

/// Commits step by step, and checks that after each of them what is known is isolated.
fn commit(kernel: &mut Ruleset, transaction: Transaction) {
    for step in transaction.into_steps() {
        simulate::apply(kernel, &step).unwrap();
        for address in known(kernel) {
            let table = &kernel.tables[&table_id(Family::V4)];
            let isolates = |base: &str, map: &str| {
                let map = table.sets.get(&Name::from(map));
                let key = Key::address(address.parse().unwrap());
                let mut elements = map.into_iter().flat_map(|map| &map.elements);
                let leads = elements.any(|element| element.key == key);
                leads && table.chains.contains_key(&Name::from(base))
            };
            assert!(isolates("ingress", "ingress-pods"), "{address}: {step:?}");
        }
    }
}

#[test]
fn an_address_is_never_known_before_its_policies_are_in_force() {
    let mut engine = engine(PodNetwork::NodeCidr);
    engine.apply(&node(&["10.0.0.0/25"]));
    // As after a boot: first the early rules, then the difference.
    let mut kernel = Ruleset::default();
    commit(
        &mut kernel,
        add_parts(&Ruleset::default(), engine.early_rules().unwrap()),
    );
    engine.apply(&deny(true, true));
    for number in 1..=100 {
        let name = format!("shop/web-{number}");
        engine.apply(&apply_pod(pod(&name, number, "here", "web")));
    }
    list_policies_kept(&mut engine);
    engine.rebuild(true);
    let difference = diff(&kernel, engine.ruleset());
    commit(&mut kernel, difference);
    assert_eq!(known(&kernel).len(), 100);
    assert_eq!(kernel, engine.ruleset());
    // As a pod that comes.
    engine.apply(&apply_pod(pod("shop/web", 101, "here", "web")));
    let transaction = engine.update(BUDGET).transaction;
    let adds_known = |step: &Transaction| {
        let mut ops = step.ops.iter();
        ops.any(|op| matches!(op, Op::AddElements(_, name, ..) if name.as_str() == "known-pods"))
    };
    let steps: Vec<_> = transaction.clone().into_steps().collect();
    assert_eq!(steps.iter().filter(|step| adds_known(step)).count(), 1);
    commit(&mut kernel, transaction);
    assert_eq!(known(&kernel).len(), 101);
}

/// Completes the lists with the objects that are known.
fn list_policies_kept(engine: &mut Engine) {
    for kind in Kind::POLICY {
        engine.apply(&Event::ListComplete(kind));
    }
}

#[test]
fn early_rules_keep_what_an_earlier_process_knew() {
    let mut earlier = closed();
    earlier.apply(deny(true, true));
    earlier.apply(apply_pod(pod("shop/web", 1, "here", "web")));
    earlier.update();

    let mut engine = engine(PodNetwork::NodeCidr);
    let early = |engine: &Engine| add_parts(&earlier.kernel, engine.early_rules().unwrap());
    assert_eq!(early(&engine).ops, [], "the same rules");
    engine.apply(&node(&["10.0.0.0/25", "fd00:1::/64"]));
    let [Op::AddElements(table, name, ..)] = &early(&engine).ops[..] else {
        panic!("{:?}", early(&engine));
    };
    assert_eq!(
        (table, name.as_str()),
        (&table_id(Family::V6), "pod-network")
    );
    engine.apply(&node(&["10.0.0.0/24"]));
    let mut kernel = earlier.kernel.clone();
    for step in early(&engine).into_steps() {
        simulate::apply(&mut kernel, &step).unwrap();
    }
    assert_eq!(known(&kernel), ["10.0.0.1"]);
    assert_eq!(set(&kernel, "pod-network").elements.len(), 1);
    assert_eq!(set(&kernel, "ingress-pods").elements.len(), 1);
}

#[test]
fn early_rules_close_a_table_that_cannot_be_kept() {
    let mut earlier = closed();
    earlier.apply(apply_pod(pod("shop/web", 1, "here", "web")));
    earlier.update();
    let engine = engine(PodNetwork::BridgeInterface("cni0".into()));
    type Change = fn(&mut Table);
    let changes: [Change; 2] = [
        |table| table.foreign = true,
        |table| {
            let known = table.sets.get_mut(&Name::from("known-pods")).unwrap();
            let verdicts = Declaration::new(SetKind::VerdictMap, known.declaration.key.clone());
            known.declaration = Arc::new(verdicts);
        },
    ];
    for change in changes {
        let mut actual = earlier.kernel.clone();
        let id: TableId = table_id(Family::V4);
        change(actual.tables.get_mut(&id).unwrap());
        let transaction = add_parts(&actual, engine.early_rules().unwrap());
        simulate::apply(&mut actual, &transaction).unwrap();
        let wanted = engine.early_rules().unwrap();
        assert_eq!(actual.tables[&id], wanted.tables[&id]);
    }
}

#[test]
fn the_pod_network_is_that_of_the_node_object() {
    let mut engine = engine(PodNetwork::NodeCidr);
    list_policies(&mut engine);
    assert!(!engine.node_lacks_pod_network(), "the Node may still come");
    engine.apply(&node(&[]));
    engine.apply(&named_node("there", &["10.0.1.0/25"]));
    engine.apply(&Event::ListComplete(Kind::Node));
    assert!(engine.node_lacks_pod_network() && !engine.is_ready());
    let waits = engine.pod_network().unwrap_err();
    assert!(waits.contains("spec.podCIDRs of Node here"), "{waits}");
    engine.apply(&node(&["10.0.0.0/25"]));
    assert!(!engine.node_lacks_pod_network() && engine.is_ready());
    assert_eq!(engine.pod_network(), Ok(()));

    let mut checked = closed();
    let ranges = |checked: &Checked| text(&checked.kernel);
    assert!(ranges(&checked).contains("elements = { 10.0.0.0/25 }"));
    checked.apply(node(&["10.0.0.0/24", "fd00:1::/64"]));
    checked.update();
    for range in ["10.0.0.0/24", "fd00:1::/64"] {
        assert!(ranges(&checked).contains(range), "{}", ranges(&checked));
    }
    // It stays closed when the Node has none any more.
    checked.apply(node(&[]));
    checked.update();
    assert!(ranges(&checked).contains("10.0.0.0/24"));
}

fn text(ruleset: &Ruleset) -> String {
    let mut out = Vec::new();
    text::render(ruleset, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

#[test]
fn a_pod_outside_of_the_network_is_reported_once() {
    let mut checked = closed();
    checked.apply(apply_pod(pod("shop/web", 1, "here", "web")));
    checked.apply(apply_pod(pod("shop/far", 200, "here", "web")));
    checked.apply(apply_pod(pod("shop/remote", 201, "there", "web")));
    checked.update();
    let notices = checked.engine.take_notices();
    let [notice] = &notices[..] else {
        panic!("{notices:?}");
    };
    assert_eq!(notice.subject.to_string(), "Pod shop/far");
    let outside = "its address 10.0.0.200 is outside of spec.podCIDRs of the Node (10.0.0.0/25)";
    assert!(notice.message.starts_with(outside), "{}", notice.message);
    assert!(checked.engine.pod_network().is_err());
    checked.apply(apply_pod(pod("shop/far", 200, "here", "other")));
    checked.update();
    assert!(checked.engine.take_notices().is_empty());
    checked.apply(node(&["10.0.0.0/24"]));
    checked.update();
    assert_eq!(checked.engine.pod_network(), Ok(()));
    checked.apply(node(&["10.0.0.0/26"]));
    checked.update();
    assert_eq!(checked.engine.take_notices().len(), 1);
    checked.apply(delete(Kind::Pod, "shop/far"));
    checked.update();
    assert_eq!(checked.engine.pod_network(), Ok(()));
}

#[test]
fn a_route_that_leads_elsewhere_is_outside_of_the_interfaces() {
    let routes = |interface: &str| {
        let network = "10.0.0.1/32".parse().unwrap();
        let interface = interface.into();
        Event::Routes([HostRoute { network, interface }].into())
    };
    for form in [
        PodNetwork::BridgeInterface("cali0".into()),
        PodNetwork::InterfaceNamePrefix("cali".into()),
    ] {
        let mut engine = engine(form);
        list_policies(&mut engine);
        assert!(engine.is_ready(), "no Node is needed");
        engine.apply(&apply_pod(pod("shop/web", 1, "here", "web")));
        engine.update(BUDGET);
        assert_eq!(engine.pod_network(), Ok(()), "no route, no fault");
        engine.apply(&routes("cali0"));
        engine.update(BUDGET);
        assert_eq!(engine.pod_network(), Ok(()));
        engine.apply(&routes("veth0"));
        engine.update(BUDGET);
        let fault = engine.pod_network().unwrap_err();
        assert!(fault.contains("10.0.0.1 of pod shop/web"), "{fault}");
    }
}

/// Pods with few names and addresses, of both nodes, in all conditions.
fn any_event() -> impl Strategy<Value = Event> {
    let sandbox = prop_oneof![
        Just(Sandbox::Gone),
        Just(Sandbox::Unknown),
        (0..3u32).prop_map(Sandbox::RanAt),
    ];
    let flags = (any::<bool>(), any::<bool>(), prop::bool::weighted(0.1));
    let pod = (0..3u8, 1..3u8, any::<bool>(), sandbox, flags).prop_map(
        |(name, address, local, sandbox, (web, running, other))| {
            let node = if local { "here" } else { "there" };
            let app = if web { "web" } else { "db" };
            apply_pod(Pod {
                running,
                ended: other && !running,
                host_network: other && running,
                evidence: Evidence {
                    sandbox,
                    started: None,
                },
                ..pod(&format!("shop/pod-{name}"), address, node, app)
            })
        },
    );
    prop_oneof![
        6 => pod,
        2 => (0..3u8).prop_map(|name| delete(Kind::Pod, &format!("shop/pod-{name}"))),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(ingress, egress)| deny(ingress, egress)),
        1 => Just(delete(Kind::NetworkPolicy, "shop/deny")),
    ]
}

proptest! {
    /// After every batch the kernel has what a new engine wants, and known is only an address that a
    /// pod of this node may have, with the chain of each such pod that a policy selects.
    #[test]
    fn what_is_known_follows_any_history(
        batches in prop::collection::vec(prop::collection::vec(any_event(), 1..4), 1..12),
    ) {
        let mut checked = closed();
        for batch in batches {
            for event in batch {
                checked.apply(event);
            }
            checked.update();
            let engine = &checked.engine;
            for address in 1..4u8 {
                let ip = IpAddr::from([10, 0, 0, address]);
                let is_known = known(&checked.kernel).contains(&ip.to_string());
                let pods = engine.inventory.local_holders(ip);
                let claimed = pods.filter(|pod| pod.evidence.sandbox != Sandbox::Gone).count() > 0;
                prop_assert!(is_known <= (claimed || engine.inventory.departed(ip).is_some()));
                prop_assert!(is_known || !claimed || engine.inventory.departed(ip).is_some());
            }
        }
    }
}

fn namespace(name: &str, labels: &[(&str, &str)]) -> Event {
    Event::Apply(Object::Namespace(Namespace {
        name: ObjectName::new("", name),
        labels: labels.iter().copied().collect(),
        mode: None,
    }))
}

/// A cluster policy that denies one address to the pods of some namespaces, in both directions.
fn denying_one(namespaces: LabelSelector) -> Event {
    let rule = TierRule {
        name: None,
        action: Action::Deny,
        peers: Some(vec![TierPeer::Networks(vec![
            "192.0.2.1/32".parse().unwrap(),
        ])]),
        protocols: None,
    };
    Event::Apply(Object::ClusterNetworkPolicy(ClusterNetworkPolicy {
        name: ObjectName::new("", "one"),
        tier: Tier::Admin,
        priority: 1,
        subject_namespaces: namespaces,
        subject_pods: LabelSelector::default(),
        ingress: vec![rule.clone()],
        egress: vec![rule],
    }))
}

#[test]
fn a_departed_pod_that_cluster_policies_select_is_not_isolated() {
    let mut checked = closed();
    checked.apply(namespace("shop", &[]));
    checked.apply(denying_one(LabelSelector::default()));
    checked.apply(apply_pod(Pod {
        running: true,
        ..pod("shop/web", 1, "here", "web")
    }));
    checked.update();
    assert_eq!(known(&checked.kernel).len(), 1);
    checked.apply(delete(Kind::Pod, "shop/web"));
    checked.update();
    // Its address may be the next pod's.
    assert_eq!(known(&checked.kernel), [""; 0]);
}

#[test]
fn a_pod_is_known_after_its_namespace_where_cluster_policies_select_by_it() {
    let red = LabelSelector::new([Requirement::In("team".into(), vec!["red".into()])]);
    let mut checked = closed();
    checked.apply(denying_one(red));
    checked.apply(apply_pod(pod("shop/web", 1, "here", "web")));
    checked.update();
    assert_eq!(known(&checked.kernel), [""; 0]);
    checked.apply(namespace("shop", &[("team", "red")]));
    checked.update();
    assert_eq!(known(&checked.kernel).len(), 1);
    let table = &checked.kernel.tables[&table_id(Family::V4)];
    assert_eq!(table.sets[&Direction::Ingress.pods(0)].elements.len(), 1);
}
