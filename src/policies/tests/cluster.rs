//! Cluster network policies.

use super::walk::walk;
use super::*;
use crate::nft::ObjectPath;

const WEB: u8 = 1;
const CLIENT: u8 = 2;
const OUTSIDE: u8 = 99;

pub(super) fn node(name: &str) -> Node {
    Node {
        name: name.into(),
        internal_ips: Vec::new(),
        external_ips: Vec::new(),
        pod_cidrs: Vec::new(),
        zone: None,
        going_away: false,
        labels: Labels::default(),
        addresses: Arc::default(),
    }
}

/// A policy of a tier for the pods `app=web` of all namespaces, with these rules for ingress.
fn cluster_policy(
    name: &str,
    tier: Tier,
    priority: u16,
    ingress: impl IntoIterator<Item = TierRule>,
) -> ClusterNetworkPolicy {
    ClusterNetworkPolicy {
        name: ObjectName::new("", name),
        tier,
        priority,
        subject_namespaces: LabelSelector::default(),
        subject_pods: app("web"),
        ingress: ingress.into_iter().collect(),
        egress: Vec::new(),
    }
}

fn rule(action: Action, peers: Option<TierPeer>) -> TierRule {
    TierRule {
        name: None,
        action,
        peers: peers.map(|peer| vec![peer]),
        protocols: None,
    }
}

fn pods(value: &str) -> TierPeer {
    TierPeer::Pods {
        namespaces: LabelSelector::default(),
        pods: app(value),
    }
}

fn apply_cluster(policy: ClusterNetworkPolicy) -> Event {
    Event::Apply(Object::ClusterNetworkPolicy(policy))
}

fn delete_cluster(name: &str) -> Event {
    let name = ObjectName::new("", name);
    Event::Delete(ObjectRef::new(Kind::ClusterNetworkPolicy, name))
}

/// `web` of this node and `client` of another, without policies.
fn pair() -> Checked {
    let mut checked = Checked::new(false);
    checked.apply(apply_pod(pod("shop/web", WEB, "here", "web")));
    checked.apply(apply_pod(pod("shop/client", CLIENT, "there", "client")));
    checked.update();
    checked
}

/// Returns whether rules and objects allow TCP to a port; they must agree.
fn at_port(checked: &Checked, source: u8, destination: u8, port: u16) -> bool {
    let connection = Connection {
        source: [10, 0, 0, source].into(),
        destination: [10, 0, 0, destination].into(),
        protocol: 6,
        port: Some(port),
    };
    let allows = checked.engine.allows(&connection);
    assert_eq!(
        walk(&checked.kernel, &connection).passes,
        allows,
        "{connection:?}"
    );
    allows
}

fn reaches(checked: &Checked, source: u8, destination: u8) -> bool {
    at_port(checked, source, destination, 80)
}

#[test]
fn the_first_rule_that_matches_decides() {
    let mut checked = pair();
    let deny = rule(Action::Deny, Some(pods("client")));
    let accept = rule(Action::Accept, Some(pods("client")));
    checked.apply(apply_cluster(cluster_policy("b", Tier::Admin, 5, [deny])));
    checked.update();
    assert!(!reaches(&checked, CLIENT, WEB));
    assert!(
        reaches(&checked, OUTSIDE, WEB),
        "being selected isolates nobody"
    );
    let with = |name, priority| cluster_policy(name, Tier::Admin, priority, [accept.clone()]);
    for (name, priority, open) in [("c", 5, false), ("a", 5, true), ("c", 4, true)] {
        checked.apply(apply_cluster(with(name, priority)));
        checked.update();
        assert_eq!(reaches(&checked, CLIENT, WEB), open, "{name} at {priority}");
        checked.apply(delete_cluster(name));
        checked.update();
    }
    assert!(!reaches(&checked, CLIENT, WEB));
}

#[test]
fn policies_of_namespaces_are_between_the_tiers() {
    let mut checked = pair();
    let set = |checked: &mut Checked, tier, action| {
        let policy = cluster_policy("one", tier, 1, [rule(action, None)]);
        checked.apply(apply_cluster(policy));
        checked.update();
        reaches(checked, CLIENT, WEB)
    };
    assert!(!set(&mut checked, Tier::Baseline, Action::Deny));
    assert!(set(&mut checked, Tier::Baseline, Action::Pass));
    let closed = NetworkPolicy {
        ingress: Some(Vec::new()),
        ..policy("shop/closed", app("web"))
    };
    checked.apply(apply_policy(closed.clone()));
    assert!(!set(&mut checked, Tier::Baseline, Action::Accept));
    assert!(set(&mut checked, Tier::Admin, Action::Accept));
    assert!(!set(&mut checked, Tier::Admin, Action::Pass));
    let open = vec![PolicyRule {
        peers: None,
        ports: None,
    }];
    checked.apply(apply_policy(NetworkPolicy {
        ingress: Some(open),
        ..closed
    }));
    assert!(set(&mut checked, Tier::Admin, Action::Pass));
    assert!(!set(&mut checked, Tier::Admin, Action::Deny));
    assert!(set(&mut checked, Tier::Baseline, Action::Deny), "not asked");
}

#[test]
fn a_pass_leaves_all_policies_of_the_tier() {
    let mut checked = pair();
    let pass = rule(Action::Pass, Some(pods("client")));
    let deny = rule(Action::Deny, None);
    checked.apply(apply_cluster(cluster_policy("a", Tier::Admin, 1, [pass])));
    checked.apply(apply_cluster(cluster_policy("b", Tier::Admin, 2, [deny])));
    checked.update();
    assert!(reaches(&checked, CLIENT, WEB));
    assert!(!reaches(&checked, OUTSIDE, WEB));
    let baseline = cluster_policy("c", Tier::Baseline, 1, [rule(Action::Deny, None)]);
    checked.apply(apply_cluster(baseline));
    checked.update();
    assert!(!reaches(&checked, CLIENT, WEB));
}

#[test]
fn a_pod_that_reaches_itself_through_a_service_is_judged_by_both_tiers_only() {
    for (tier, with_policy, open) in [
        (Tier::Admin, false, false),
        (Tier::Admin, true, false),
        (Tier::Baseline, false, false),
        (Tier::Baseline, true, true),
    ] {
        let mut checked = pair();
        let deny = rule(Action::Deny, Some(pods("web")));
        checked.apply(apply_cluster(cluster_policy("a", tier, 1, [deny])));
        if with_policy {
            checked.apply(apply_policy(NetworkPolicy {
                ingress: Some(Vec::new()),
                ..policy("shop/closed", app("web"))
            }));
        }
        checked.update();
        assert_eq!(reaches(&checked, WEB, WEB), open, "{tier:?} {with_policy}");
    }
}

#[test]
fn a_direction_without_rules_is_untouched() {
    let mut checked = pair();
    let empty = cluster_policy("a", Tier::Admin, 1, []);
    checked.apply(apply_cluster(empty.clone()));
    checked.update();
    assert!(checked.engine.isolated().next().is_none());
    let deny = rule(Action::Deny, None);
    checked.apply(apply_cluster(ClusterNetworkPolicy {
        egress: vec![deny],
        ..empty
    }));
    checked.update();
    assert!(reaches(&checked, CLIENT, WEB));
    assert!(!reaches(&checked, WEB, CLIENT));
    checked.apply(delete_cluster("a"));
    checked.update();
    assert!(checked.kernel.tables.is_empty());
}

#[test]
fn who_is_in_doubt_is_denied_and_never_accepted() {
    let other = || apply_pod(pod("shop/other", CLIENT, "there", "other"));
    for (action, in_doubt) in [
        (Action::Accept, false),
        (Action::Pass, false),
        (Action::Deny, true),
    ] {
        // What the rule does shows in what comes after it.
        let last = match action {
            Action::Deny => Action::Accept,
            Action::Accept | Action::Pass => Action::Deny,
        };
        let rules = [rule(action, Some(pods("client"))), rule(last, None)];
        let mut checked = pair();
        checked.apply(apply_cluster(cluster_policy("a", Tier::Admin, 1, rules)));
        checked.update();
        let matched = reaches(&checked, CLIENT, WEB);
        assert_eq!(matched, action != Action::Deny);
        checked.apply(other());
        checked.update();
        let still = reaches(&checked, CLIENT, WEB) == matched;
        assert_eq!(still, in_doubt, "{action:?}");
        // Another that matches as well, in another namespace that is relabelled.
        checked.apply(apply_pod(pod("far/client", CLIENT, "there", "client")));
        checked.update();
        let relabelled = Namespace {
            name: ObjectName::new("", "shop"),
            labels: [("x", "y")].into_iter().collect(),
            mode: None,
        };
        checked.apply(Event::Apply(Object::Namespace(relabelled)));
        checked.update();
        assert_eq!(reaches(&checked, CLIENT, WEB) == matched, in_doubt);
    }
}

#[test]
fn named_ports_are_those_of_each_claimant_only_where_they_are_denied() {
    for (action, in_doubt) in [(Action::Accept, false), (Action::Deny, true)] {
        let last = if in_doubt {
            Action::Accept
        } else {
            Action::Deny
        };
        let mut of_port = rule(action, None);
        of_port.protocols = Some(vec![PolicyPort {
            protocol: Protocol::Tcp,
            port: PortMatch::Named("http".into()),
        }]);
        let mut checked = pair();
        let rules = [of_port, rule(last, None)];
        checked.apply(apply_cluster(cluster_policy("a", Tier::Admin, 1, rules)));
        checked.update();
        let matched = at_port(&checked, CLIENT, WEB, 8001);
        assert_ne!(matched, at_port(&checked, CLIENT, WEB, 80));
        let double = Pod {
            ports: Arc::default(),
            ..pod("shop/double", WEB, "here", "web")
        };
        checked.apply(apply_pod(double));
        checked.update();
        assert_eq!(at_port(&checked, CLIENT, WEB, 8001) == matched, in_doubt);
    }
}

#[test]
fn nodes_are_peers_with_all_their_addresses() {
    let mut checked = pair();
    let zone = |zone: &str| LabelSelector::new([Requirement::In("zone".into(), vec![zone.into()])]);
    let deny = rule(Action::Deny, Some(TierPeer::Nodes(zone("a"))));
    checked.apply(apply_cluster(ClusterNetworkPolicy {
        egress: vec![deny],
        ..cluster_policy("a", Tier::Admin, 1, [])
    }));
    let of = |name: &str, zone: &str, hosts: &[u8]| {
        Event::Apply(Object::Node(Node {
            labels: [("zone", zone)].into_iter().collect(),
            addresses: hosts.iter().map(|it| [10, 0, 0, *it].into()).collect(),
            ..node(name)
        }))
    };
    let closed = |checked: &Checked| -> Vec<u8> {
        let hosts = 20..24;
        hosts.filter(|host| !reaches(checked, WEB, *host)).collect()
    };
    checked.apply(of("one", "a", &[20, 21]));
    checked.apply(of("two", "b", &[21, 22]));
    checked.update();
    assert_eq!(closed(&checked), [20, 21]);
    checked.apply(of("two", "a", &[21, 22]));
    assert_eq!(checked.update(), (1, 1), "22, and nothing else");
    assert_eq!(closed(&checked), [20, 21, 22]);
    checked.apply(of("one", "b", &[20, 21]));
    checked.update();
    assert_eq!(closed(&checked), [21, 22], "two has 21 as well");
    let two = ObjectName::new("", "two");
    checked.apply(Event::Delete(ObjectRef::new(Kind::Node, two)));
    checked.update();
    assert!(closed(&checked).is_empty());
}

#[test]
fn nothing_is_compiled_while_the_nodes_are_listed_that_a_policy_names() {
    let mut checked = pair();
    checked.engine.apply(&Event::ListStarted(Kind::Node));
    assert!(checked.engine.is_ready(), "nobody names nodes");
    let deny = rule(
        Action::Deny,
        Some(TierPeer::Nodes(LabelSelector::default())),
    );
    checked.engine.apply(&apply_cluster(ClusterNetworkPolicy {
        egress: vec![deny],
        ..cluster_policy("a", Tier::Admin, 1, [])
    }));
    assert_eq!(checked.engine.missing(), [Kind::Node]);
    checked.engine.apply(&Event::ListComplete(Kind::Node));
    assert!(checked.engine.is_ready());
}

#[test]
fn a_refused_policy_denies_everything_in_its_place() {
    let mut checked = pair();
    let accept = |peer: &str| rule(Action::Accept, Some(pods(peer)));
    let with_deny = [accept("client"), rule(Action::Deny, Some(pods("other")))];
    let refused = cluster_policy("b", Tier::Admin, 2, with_deny);
    let first = cluster_policy("a", Tier::Admin, 1, [accept("vip")]);
    checked.apply(apply_pod(pod("shop/vip", 3, "there", "vip")));
    for policy in [&first, &refused] {
        checked.apply(apply_cluster(policy.clone()));
    }
    checked.update();
    let id = table_id(crate::model::Family::V4);
    let chains = checked.kernel.tables[&id].chains.iter();
    let (name, chain) = chains
        .clone()
        .find(|(name, _)| name.as_str().starts_with("admin-ingress-"))
        .unwrap();
    let blamed = |path: ObjectPath| -> Vec<String> {
        let blamed = checked.engine.blame(&[&path]);
        blamed.iter().map(|(_, it)| it.name.to_string()).collect()
    };
    let text = |rule| text::rule(rule, id.family);
    assert_eq!(chain.rules.len(), 3);
    for (rule, owner) in chain.rules.iter().zip(["a", "b", "b"]) {
        let path = ObjectPath::Rule(id.clone(), name.clone(), text(rule));
        assert_eq!(blamed(path), [owner]);
    }
    assert_eq!(
        blamed(ObjectPath::Chain(id.clone(), name.clone())),
        ["a", "b"]
    );
    let object = ObjectRef::new(Kind::ClusterNetworkPolicy, refused.name.clone());
    let mut kernel = checked.kernel.clone();
    let _ = checked.engine.quarantine(&object);
    kernel.clone_from(&checked.engine.ruleset());
    checked.kernel = kernel;
    assert!(reaches(&checked, 3, WEB), "a is before it");
    for source in [CLIENT, OUTSIDE] {
        assert!(!reaches(&checked, source, WEB));
    }
    assert!(reaches(&checked, WEB, CLIENT), "it has no rules for egress");
    checked.engine.retry_quarantined();
    checked.update();
    assert!(reaches(&checked, CLIENT, WEB));
}

#[test]
fn lists_and_chains_are_shared() {
    let mut checked = pair();
    for number in 10..30 {
        let name = format!("shop/web-{number}");
        checked.apply(apply_pod(pod(&name, number, "here", "web")));
    }
    for (name, tier) in [
        ("a", Tier::Admin),
        ("b", Tier::Admin),
        ("c", Tier::Baseline),
    ] {
        let deny = rule(Action::Deny, Some(pods("client")));
        checked.apply(apply_cluster(cluster_policy(name, tier, 1, [deny])));
    }
    checked.apply(apply_policy(NetworkPolicy {
        ingress: Some(Vec::new()),
        ..policy("far/closed", app("web"))
    }));
    checked.apply(apply_pod(pod("far/web", 3, "here", "web")));
    checked.update();
    let table = &checked.kernel.tables[&table_id(crate::model::Family::V4)];
    let count = |start: &str| {
        let names = table.chains.keys();
        names
            .filter(|name| name.as_str().starts_with(start))
            .count()
    };
    assert_eq!(count("pods-ingress-"), 2, "with and without a policy");
    assert_eq!(count("admin-ingress-"), 1);
    assert_eq!(count("baseline-ingress-"), 1);
    checked.apply(apply_pod(pod("shop/client", CLIENT, "there", "other")));
    assert_eq!(checked.update(), (1, 1), "a remote pod is an element");
    let deny = rule(Action::Deny, Some(pods("other")));
    checked.apply(apply_cluster(cluster_policy("a", Tier::Admin, 0, [deny])));
    let (_, operations) = checked.update();
    assert!(
        operations <= 8,
        "{operations} for other rules of one policy"
    );
}

#[test]
fn a_departed_pod_stays_a_subject_when_its_namespace_is_deleted() {
    let mut checked = pair();
    let namespace = |labels: &[(&str, &str)]| Namespace {
        name: ObjectName::new("", "shop"),
        labels: labels.iter().copied().collect(),
        mode: None,
    };
    checked.apply(Event::Apply(Object::Namespace(namespace(&[("a", "b")]))));
    checked.apply(apply_pod(Pod {
        running: true,
        ..pod("shop/web", WEB, "here", "web")
    }));
    let everybody = ClusterNetworkPolicy {
        subject_pods: LabelSelector::default(),
        ..cluster_policy("a", Tier::Admin, 1, [rule(Action::Deny, None)])
    };
    checked.apply(apply_cluster(everybody));
    checked.update();
    for name in ["web", "client"] {
        let name = ObjectName::new("shop", name);
        checked.apply(Event::Delete(ObjectRef::new(Kind::Pod, name)));
        checked.update();
        assert!(!reaches(&checked, OUTSIDE, WEB));
    }
    let shop = ObjectName::new("", "shop");
    checked.apply(Event::Delete(ObjectRef::new(Kind::Namespace, shop)));
    checked.update();
    assert!(!reaches(&checked, OUTSIDE, WEB));
}

#[test]
fn link_local_traffic_is_denied_where_something_is() {
    let mut checked = pair();
    let links = |checked: &mut Checked, action| {
        let policy = cluster_policy("a", Tier::Admin, 1, [rule(action, None)]);
        checked.apply(apply_cluster(policy));
        checked.update();
        let table = &checked.kernel.tables[&table_id(crate::model::Family::V6)];
        table.sets["ingress-links"].elements.len()
    };
    checked.apply(routes(&[("10.0.0.1/32", "br0")]));
    assert_eq!(links(&mut checked, Action::Accept), 0);
    assert_eq!(links(&mut checked, Action::Deny), 1);
    assert_eq!(links(&mut checked, Action::Pass), 0);
}
