//! The judge of ClusterNetworkPolicies is judged itself, by hand.

use crate::support::objects::cluster_policy;
use crate::support::policy::oracle::{Cluster, Protocol, allowed};
use serde_json::{Value, json};

use super::oracle::{DB, FAR, NODE, OTHER, OUTSIDE, WEB, ip, rival, world};
use Protocol::{Icmp, Sctp, Tcp, Udp};

const SOURCES: [&str; 4] = [DB, FAR, OTHER, OUTSIDE];

/// The policies of the cluster, each with its name, tier, priority and ingress rules; they are about
/// the pods `web` of the shop.
fn with(policies: &[Value], tiers: &[(&str, &str, u16, Value)]) -> Cluster {
    let cluster_policies = tiers.iter().map(|(name, tier, priority, rules)| {
        let spec = json!({"tier": tier, "priority": priority, "subject": web(), "ingress": rules});
        cluster_policy(name, spec)
    });
    Cluster {
        cluster_policies: cluster_policies.collect(),
        ..world(policies)
    }
}

fn web() -> Value {
    let shop = json!({"matchLabels": {"team": "a"}});
    json!({"pods": {"namespaceSelector": shop, "podSelector": {"matchLabels": {"app": "web"}}}})
}

/// Which of the usual sources reach the web of the shop at TCP 8080.
fn reach(world: &Cluster) -> Vec<&'static str> {
    let reaches = |from: &&str| allowed(world, ip(from), ip(WEB), Tcp, 8080);
    SOURCES.into_iter().filter(reaches).collect()
}

fn all(action: &str) -> Value {
    json!({"action": action, "from": [{"namespaces": {}}]})
}

fn from_db(action: &str) -> Value {
    json!({"action": action, "from": [{"pods": {"podSelector": {"matchLabels": {"app": "db"}}}}]})
}

fn from_store(action: &str) -> Value {
    json!({"action": action, "from": [{"namespaces": {"matchLabels": {"team": "b"}}}]})
}

/// A NetworkPolicy for the pods `web` with these ingress rules.
fn namespaced(rules: Value) -> Value {
    json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": rules})
}

#[test]
fn the_admin_tier_comes_first() {
    let admin = |rule: Value| [("a", "Admin", 1, json!([rule]))];
    // Over a NetworkPolicy that allows all, and one that denies all.
    let open = [namespaced(json!([{}]))];
    let closed = [namespaced(json!([]))];
    assert_eq!(
        reach(&with(&open, &admin(from_db("Deny")))),
        [FAR, OTHER, OUTSIDE]
    );
    assert_eq!(reach(&with(&closed, &admin(from_db("Accept")))), [DB]);
    for action in ["Accept", "Pass"] {
        assert_eq!(reach(&with(&open, &admin(all(action)))), SOURCES);
    }
    for action in ["Deny", "Pass"] {
        assert_eq!(reach(&with(&closed, &admin(all(action)))), [""; 0]);
    }
    // To be selected isolates nothing; no peer of ingress is outside of the cluster.
    assert_eq!(reach(&with(&[], &admin(from_db("Accept")))), SOURCES);
    assert_eq!(reach(&with(&[], &admin(all("Deny")))), [OUTSIDE]);
}

#[test]
fn the_baseline_is_for_pods_that_no_network_policy_isolates() {
    let baseline = |rule: Value| [("b", "Baseline", 1, json!([rule]))];
    assert_eq!(reach(&with(&[], &baseline(all("Deny")))), [OUTSIDE]);
    assert_eq!(
        reach(&with(&[namespaced(json!([{}]))], &baseline(all("Deny")))),
        SOURCES
    );
    assert_eq!(
        reach(&with(&[namespaced(json!([]))], &baseline(all("Accept")))),
        [""; 0]
    );
    let egress = json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]});
    assert_eq!(
        reach(&with(&[egress], &baseline(all("Deny")))),
        [OUTSIDE],
        "of its direction"
    );
    let both = [
        (
            "a",
            "Admin",
            1,
            json!([from_db("Pass"), from_store("Accept"), all("Deny")]),
        ),
        ("b", "Baseline", 1, json!([from_db("Accept"), all("Deny")])),
    ];
    assert_eq!(reach(&with(&[], &both)), [DB, OTHER, OUTSIDE]);
}

#[test]
fn the_first_rule_of_the_lowest_priority_decides() {
    let rules = |first: u16, second: u16| {
        [
            (
                "x",
                "Admin",
                first,
                json!([from_db("Accept"), from_store("Pass"), all("Deny")]),
            ),
            (
                "a",
                "Admin",
                second,
                json!([from_db("Deny"), from_store("Deny"), all("Accept")]),
            ),
        ]
    };
    let closed = [namespaced(json!([{"from": [{"podSelector": {}}]}]))];
    assert_eq!(reach(&with(&closed, &rules(0, 1000))), [DB]);
    assert_eq!(reach(&with(&closed, &rules(1000, 0))), [FAR]);
    assert_eq!(reach(&with(&closed, &rules(5, 5))), [FAR], "by the name");
    // A pass leaves the tier with all its policies.
    assert_eq!(reach(&with(&[], &rules(0, 1000))), [DB, OTHER, OUTSIDE]);
    // What the first one does not match, the second one may.
    let apart = [
        ("x", "Admin", 0, json!([from_db("Accept")])),
        ("a", "Admin", 1, json!([all("Deny")])),
    ];
    assert_eq!(reach(&with(&[], &apart)), [DB, OUTSIDE]);
}

#[test]
fn both_ends_are_asked_and_each_has_its_direction() {
    let egress = |action: &str| {
        let to = json!([{"namespaces": {}}]);
        let subject = json!({"pods": {"podSelector": {"matchLabels": {"app": "db"}}}});
        cluster_policy(
            "out",
            json!({"tier": "Admin", "priority": 1, "subject": subject,
            "egress": [{"action": action, "to": to}]}),
        )
    };
    let mut world = with(&[], &[("in", "Admin", 1, json!([from_db("Accept")]))]);
    assert!(allowed(&world, ip(DB), ip(WEB), Tcp, 80));
    world.cluster_policies.push(egress("Deny"));
    assert!(!allowed(&world, ip(DB), ip(WEB), Tcp, 80));
    assert!(
        allowed(&world, ip(WEB), ip(DB), Tcp, 80),
        "no rules of ingress"
    );
    let mut world = with(&[namespaced(json!([]))], &[]);
    world.cluster_policies.push(egress("Accept"));
    assert!(
        !allowed(&world, ip(DB), ip(WEB), Tcp, 80),
        "the other end has not"
    );
}

#[test]
fn subjects_are_namespaces_or_pods_of_namespaces() {
    let denied = |subject: Value| {
        let spec =
            json!({"tier": "Admin", "priority": 1, "subject": subject, "ingress": [all("Deny")]});
        let mut world = world(&[]);
        world.cluster_policies.push(cluster_policy("a", spec));
        let mut host = rival("host", json!({}));
        host.spec.get_or_insert_default().host_network = Some(true);
        world.pods.push(host);
        let targets = [WEB, DB, FAR, OTHER, NODE].into_iter();
        let denies = |to: &&str| {
            let from = if *to == DB { FAR } else { DB };
            !allowed(&world, ip(from), ip(to), Tcp, 80)
        };
        targets.filter(denies).collect::<Vec<_>>()
    };
    assert_eq!(denied(json!({"namespaces": {}})), [WEB, DB, FAR, OTHER]);
    let store = json!({"matchLabels": {"kubernetes.io/metadata.name": "store"}});
    assert_eq!(denied(json!({"namespaces": store})), [OTHER]);
    assert_eq!(
        denied(json!({"pods": {"podSelector": {"matchLabels": {"app": "web"}}}})),
        [WEB, FAR, OTHER]
    );
    assert_eq!(denied(web()), [WEB, FAR]);
}

/// Which destinations of TCP 80 db of the shop reaches, with this rule of egress.
fn reached(rule: Value) -> Vec<&'static str> {
    let mut world = world(&[]);
    let labels = [("role".to_owned(), "control".to_owned())];
    world.nodes[0].metadata.labels = Some(labels.into());
    let spec = json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
        "egress": [rule, {"action": "Deny", "to": [{"networks": ["0.0.0.0/0"]}]}]});
    world.cluster_policies.push(cluster_policy("a", spec));
    let targets = [WEB, FAR, OTHER, NODE, "192.168.10.2", OUTSIDE].into_iter();
    let reaches = |to: &&str| allowed(&world, ip(DB), ip(to), Tcp, 80);
    targets.filter(reaches).collect()
}

#[test]
fn peers_of_egress() {
    let to = |peers: Value| reached(json!({"action": "Accept", "to": peers}));
    let app = json!({"matchLabels": {"app": "web"}});
    let team = json!({"matchLabels": {"team": "a"}});
    assert_eq!(to(json!([{"namespaces": {}}])), [WEB, FAR, OTHER]);
    assert_eq!(to(json!([{"namespaces": team}])), [WEB, FAR]);
    assert_eq!(
        to(json!([{"pods": {"podSelector": app}}])),
        [WEB, FAR, OTHER]
    );
    assert_eq!(
        to(json!([{"pods": {"namespaceSelector": team, "podSelector": app}}])),
        [WEB, FAR]
    );
    assert_eq!(
        to(json!([{"networks": ["10.244.2.99/24", "203.0.113.9/32"]}])),
        [FAR, OTHER, OUTSIDE]
    );
    assert_eq!(to(json!([{"networks": ["::/0"]}])), [""; 0]);
    assert_eq!(to(json!([{"nodes": {}}])), [NODE, "192.168.10.2"]);
    let control = json!({"matchLabels": {"role": "control"}});
    assert_eq!(
        to(json!([{"nodes": control}, {"namespaces": team}])),
        [WEB, FAR, NODE]
    );
    assert_eq!(
        reached(json!({"action": "Pass", "to": [{"nodes": control}]})),
        [NODE]
    );
}

#[test]
fn protocols() {
    let through = |protocols: Value| {
        let mut rule = all("Accept");
        rule["protocols"] = protocols;
        let world = with(&[], &[("a", "Admin", 1, json!([rule, all("Deny")]))]);
        let mut through = Vec::new();
        for protocol in [Tcp, Udp, Sctp, Icmp] {
            for port in [53, 80, 8080] {
                if allowed(&world, ip(DB), ip(WEB), protocol, port) {
                    through.push((protocol, port));
                }
            }
        }
        through
    };
    assert_eq!(through(Value::Null).len(), 12);
    let number = |number: u16| json!({"destinationPort": {"number": number}});
    let range =
        |start: u16, end: u16| json!({"destinationPort": {"range": {"start": start, "end": end}}});
    assert_eq!(through(json!([{"tcp": number(80)}])), [(Tcp, 80)]);
    assert_eq!(
        through(json!([{"udp": range(80, 8080)}])),
        [(Udp, 80), (Udp, 8080)]
    );
    assert_eq!(
        through(json!([{"sctp": range(53, 80)}, {"tcp": number(53)}])),
        [(Tcp, 53), (Sctp, 53), (Sctp, 80)]
    );
    assert_eq!(
        through(json!([{"destinationNamedPort": "http"}])),
        [(Tcp, 8080)]
    );
    assert_eq!(
        through(json!([{"destinationNamedPort": "dns"}])),
        [(Udp, 53)],
        "of any protocol"
    );
    assert_eq!(through(json!([{"destinationNamedPort": "none"}])), []);
}

#[test]
fn what_is_not_understood_fails_closed() {
    let faults = [
        json!({"from": []}),
        json!({"from": [{}]}),
        json!({"from": [{"namespaces": {}}, {"services": {}}]}),
        json!({"from": [{"namespaces": {}, "nodes": {}}]}),
        json!({"from": [{"networks": ["0.0.0.0/0"]}]}),
        json!({"from": [{"pods": {"namespaceSelector": {}}}]}),
        json!({"from": [{"namespaces": {"matchExpressions": [{"key": "a", "operator": "Like"}]}}]}),
        json!({"from": [{"namespaces": {}}], "when": "always"}),
        json!({"from": [{"namespaces": {}}], "protocols": []}),
        json!({"from": [{"namespaces": {}}], "protocols": [{}]}),
        json!({"from": [{"namespaces": {}}], "protocols": [{"icmp": {}}]}),
        json!({"from": [{"namespaces": {}}], "protocols": [{"tcp": {}}]}),
        json!({"from": [{"namespaces": {}}], "protocols": [{"tcp": {"destinationPort": {"range": {"start": 80, "end": 80}}}}]}),
    ];
    for fault in faults {
        for (action, wanted) in [
            ("Accept", vec![DB, OUTSIDE]),
            ("Deny", vec![]),
            ("Pass", vec![]),
        ] {
            let mut rule = fault.clone();
            rule["action"] = json!(action);
            let rules = json!([rule, from_db("Accept"), all("Deny")]);
            let world = with(&[], &[("a", "Admin", 1, rules)]);
            assert_eq!(reach(&world), wanted, "{action}: {fault}");
        }
    }
    let unknown = json!([{"action": "Allow", "from": [{"namespaces": {}}]}]);
    assert_eq!(reach(&with(&[], &[("a", "Admin", 1, unknown)])), [""; 0]);
    // The node still reaches its pods.
    let world = with(
        &[],
        &[("a", "Admin", 1, json!([{"action": "Deny", "from": []}]))],
    );
    assert!(allowed(&world, ip(NODE), ip(WEB), Tcp, 80));
    for (action, wanted) in [("Accept", 0), ("Deny", 0), ("Pass", 0)] {
        let names = json!({"action": action, "to": [{"domainNames": ["example.org"]}]});
        assert_eq!(reached(names).len(), wanted, "{action}");
        let named = json!({"action": action, "to": [{"networks": ["0.0.0.0/0"]}],
            "protocols": [{"destinationNamedPort": "http"}]});
        assert_eq!(reached(named).len(), wanted, "{action}");
    }
}

#[test]
fn a_pod_that_reaches_itself_through_a_service_is_subject() {
    let itself = |world: &Cluster| allowed(world, ip(WEB), ip(WEB), Tcp, 8080);
    let open = [namespaced(json!([]))];
    for policies in [&open[..], &[]] {
        assert!(itself(&with(policies, &[])));
        assert!(!itself(&with(
            policies,
            &[("a", "Admin", 1, json!([all("Deny")]))]
        )));
        assert!(itself(&with(
            policies,
            &[("a", "Admin", 1, json!([all("Pass"), all("Deny")]))]
        )));
    }
    let baseline = [("b", "Baseline", 1, json!([all("Deny")]))];
    assert!(!itself(&with(&[], &baseline)));
    assert!(
        itself(&with(&open, &baseline)),
        "the NetworkPolicy has decided"
    );
}

#[test]
fn a_doubtful_address_is_nobodys_to_accept_and_everybodys_to_deny() {
    let world = |policies: Value| {
        let subject = json!({"namespaces": {}});
        let spec = json!({"tier": "Admin", "priority": 1, "subject": subject, "ingress": policies});
        let mut world = world(&[]);
        world.cluster_policies.push(cluster_policy("a", spec));
        world.pods.push(rival("other", json!({})));
        world
    };
    let from = |action: &str, app: &str| {
        let pods = json!({"podSelector": {"matchLabels": {"app": app}}});
        json!({"action": action, "from": [{"pods": pods}]})
    };
    let passes = |rules: Value| allowed(&world(rules), ip(WEB), ip(DB), Tcp, 80);
    assert!(passes(json!([])));
    for app in ["web", "other"] {
        assert!(!passes(json!([from("Deny", app)])), "{app}");
        assert!(passes(json!([from("Pass", app)])), "{app}");
        assert!(!passes(json!([from("Accept", app), all("Deny")])), "{app}");
        assert!(!passes(json!([from("Pass", app), all("Deny")])), "{app}");
    }
    // Each pod that may have the address must allow.
    let into = |app: &str| {
        let subject = json!({"pods": {"podSelector": {"matchLabels": {"app": app}}}});
        let spec =
            json!({"tier": "Admin", "priority": 1, "subject": subject, "ingress": [all("Deny")]});
        let mut world = world(json!([]));
        world.cluster_policies.push(cluster_policy("b", spec));
        allowed(&world, ip(DB), ip(WEB), Tcp, 80)
    };
    assert!(!into("web") && !into("other") && into("db"));
}
