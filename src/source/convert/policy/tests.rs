//! NetworkPolicies: every form, and every fault.

mod rules;

use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::model::{Kind, Object, Reason, Requirement};

fn policy(spec: Value) -> (NetworkPolicy, Vec<String>) {
    policy_with(json!({"metadata": {"namespace": "shop", "name": "web"}, "spec": spec}))
}

fn policy_with(object: Value) -> (NetworkPolicy, Vec<String>) {
    let decoded = Converter::default()
        .decode(Kind::NetworkPolicy, &object)
        .expect("a policy with a name");
    assert!(
        decoded
            .notices
            .iter()
            .all(|notice| notice.reason == Reason::InvalidPolicy)
    );
    let messages = decoded.notices.into_iter().map(|notice| notice.message);
    match decoded.object {
        Some(Object::NetworkPolicy(policy)) => (policy, messages.collect()),
        other => panic!("not a policy: {other:?}"),
    }
}

/// A policy without faults.
fn sound(spec: Value) -> NetworkPolicy {
    let (policy, notices) = policy(spec);
    assert_eq!(notices, Vec::<String>::new());
    policy
}

fn ingress(rules: Value) -> Vec<PolicyRule> {
    let policy = sound(json!({"podSelector": {}, "ingress": rules}));
    policy.ingress.expect("ingress is isolated")
}

fn block(cidr: &str, except: &[&str]) -> Peer {
    let range = |text: &str| text.parse().expect("a range");
    Peer::Block {
        cidr: range(cidr),
        except: except.iter().map(|text| range(text)).collect(),
    }
}

fn is(key: &str, values: &[&str]) -> Requirement {
    let values = values.iter().map(|value| Arc::from(*value)).collect();
    Requirement::In(key.into(), values)
}

fn pods(requirements: impl IntoIterator<Item = Requirement>) -> Peer {
    Peer::Pods {
        namespaces: None,
        pods: LabelSelector::new(requirements),
    }
}

const EVERYTHING: PolicyRule = PolicyRule {
    peers: None,
    ports: None,
};

#[test]
fn every_field_of_a_policy_is_read() {
    let policy = sound(json!({
        "podSelector": {"matchLabels": {"app": "web"}, "matchExpressions": [
            {"key": "tier", "operator": "NotIn", "values": ["b", "a"]},
            {"key": "example.com/x", "operator": "Exists"},
            {"key": "old", "operator": "DoesNotExist", "values": []}
        ]},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{
            "from": [
                {"podSelector": {"matchLabels": {"tier": "front"}},
                    "namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "In", "values": ["web", "ops"]}]}},
                {"ipBlock": {"cidr": "203.0.113.0/24", "except": ["203.0.113.128/25"]}}
            ],
            "ports": [{"port": "web"}, {"port": 9000, "endPort": 9010, "protocol": "TCP"}]
        }],
        "egress": [{"to": [{"namespaceSelector": {}}], "ports": [{"port": 53, "protocol": "UDP"}, {"protocol": "SCTP"}]}]
    }));
    assert_eq!(policy.name.as_str(), "shop/web");
    assert_eq!(
        policy.pods.to_string(),
        "app=web,tier notin (a,b),example.com/x,!old"
    );
    let port = |protocol, port| PolicyPort { protocol, port };
    assert_eq!(
        policy.ingress,
        Some(vec![PolicyRule {
            peers: Some(vec![
                Peer::Pods {
                    namespaces: Some(LabelSelector::new([is("team", &["ops", "web"])])),
                    pods: LabelSelector::new([is("tier", &["front"])]),
                },
                block("203.0.113.0/24", &["203.0.113.128/25"]),
            ]),
            ports: Some(vec![
                port(Protocol::Tcp, PortMatch::Named("web".into())),
                port(Protocol::Tcp, PortMatch::Range(9000, 9010)),
            ]),
        }])
    );
    assert_eq!(
        policy.egress,
        Some(vec![PolicyRule {
            peers: Some(vec![Peer::Pods {
                namespaces: Some(LabelSelector::default()),
                pods: LabelSelector::default(),
            }]),
            ports: Some(vec![
                port(Protocol::Udp, PortMatch::Range(53, 53)),
                port(Protocol::Sctp, PortMatch::Any),
            ]),
        }])
    );
}

#[test]
fn absent_policy_types_follow_the_rules_there_are() {
    let isolated = |spec: Value| {
        let policy = sound(spec);
        (policy.ingress.is_some(), policy.egress.is_some())
    };
    for types in [json!(null), json!([])] {
        let with = |egress: Value| json!({"policyTypes": types, "egress": egress});
        assert_eq!(isolated(with(json!(null))), (true, false));
        // As the API server has it: an empty list is not set.
        assert_eq!(isolated(with(json!([]))), (true, false));
        assert_eq!(isolated(with(json!([{}]))), (true, true));
    }
    assert_eq!(
        isolated(json!({"policyTypes": ["Egress"], "ingress": [{}]})),
        (false, true)
    );
    assert_eq!(
        isolated(json!({"policyTypes": ["Ingress", "Ingress"], "egress": [{}]})),
        (true, false)
    );
}

#[test]
fn absent_lists_of_a_rule_are_everyone_and_every_port() {
    assert_eq!(ingress(json!([])), []);
    assert_eq!(ingress(json!(null)), []);
    assert_eq!(ingress(json!([{}])), [EVERYTHING]);
    assert_eq!(
        ingress(json!([{"from": null, "ports": null}])),
        [EVERYTHING]
    );
    assert_eq!(ingress(json!([{"from": [], "ports": []}])), [EVERYTHING]);
}

#[test]
fn null_is_what_the_api_server_makes_of_it() {
    // A struct is kept, a string is empty, everything else absent.
    assert_eq!(ingress(json!([null])), [EVERYTHING]);
    let tcp = ingress(json!([{"ports": [null]}]));
    assert_eq!(tcp, ingress(json!([{"ports": [{"protocol": "TCP"}]}])));
    assert_ne!(tcp, [EVERYTHING]);
    let empty = |selector: Value| ingress(json!([{"from": [{"podSelector": selector}]}]));
    assert_eq!(
        empty(json!({"matchLabels": {"a": null}})),
        empty(json!({"matchLabels": {"a": ""}}))
    );
    let of_values = |values: Value| {
        empty(json!({"matchExpressions": [{"key": "a", "operator": "In", "values": values}]}))
    };
    assert_eq!(of_values(json!([null])), of_values(json!([""])));
    assert_eq!(
        empty(json!({"matchLabels": null, "matchExpressions": null})),
        empty(json!({}))
    );
    assert_eq!(
        sound(json!({"podSelector": null, "policyTypes": null, "egress": null})),
        sound(json!({}))
    );
    assert_eq!(sound(json!(null)), sound(json!({})));
    let absent = policy_with(json!({"metadata": {"namespace": "shop", "name": "web"}}));
    assert_eq!(absent, (sound(json!({})), Vec::new()));
    // What the server would refuse for being empty stays a fault.
    for spec in [
        json!({"policyTypes": [null]}),
        json!({"ingress": [{"from": [null]}]}),
        json!({"ingress": [{"from": [{"ipBlock": null}]}]}),
        json!({"ingress": [{"from": [{"ipBlock": {"cidr": null}}]}]}),
        json!({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": [null]}}]}]}),
        json!({"ingress": [{"from": [{"podSelector": {"matchExpressions": [null]}}]}]}),
        json!({"podSelector": {"matchExpressions": [{"key": null, "operator": "Exists"}]}}),
        json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": null}]}}),
    ] {
        let (_, notices) = policy(spec.clone());
        assert_eq!(notices.len(), 1, "{spec}: {notices:?}");
    }
}

#[test]
fn a_peer_of_pods_is_in_its_own_namespace_unless_it_says_otherwise() {
    let rules = ingress(
        json!([{"from": [{"podSelector": {}}, {"podSelector": null, "namespaceSelector": {}}]}]),
    );
    let everything = LabelSelector::default;
    let anywhere = Peer::Pods {
        namespaces: Some(everything()),
        pods: everything(),
    };
    assert_eq!(rules[0].peers, Some(vec![pods([]), anywhere]));
}

#[test]
fn ranges_are_read_as_the_api_reads_them() {
    let rules = ingress(json!([{"from": [
        {"ipBlock": {"cidr": "010.0.0.7/8", "except": ["10.1.0.9/16"]}},
        {"ipBlock": {"cidr": "::/0", "except": []}},
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": null}}
    ]}]));
    assert_eq!(
        rules[0].peers,
        Some(vec![
            block("10.0.0.0/8", &["10.1.0.0/16"]),
            block("::/0", &[]),
            block("0.0.0.0/0", &[])
        ])
    );
}

#[test]
fn rules_that_are_no_list_allow_nothing() {
    let (policy, notices) = policy(json!({"ingress": {"from": []}, "egress": 5}));
    assert_eq!(policy.ingress, Some(Vec::new()));
    assert_eq!(policy.egress, Some(Vec::new()));
    assert_eq!(notices.len(), 2, "{notices:?}");
    assert!(
        notices[0].contains("spec.ingress \"{...}\" is not a list; begin each entry with \"-\"; no rule of this direction is used"),
        "{notices:?}"
    );
}

#[test]
fn a_fault_in_the_pod_selector_widens_and_closes_the_policy() {
    let (policy, notices) = policy(json!({
        "podSelector": {"matchLabels": {"app": "web", "tier": 5}, "matchExpressions": [
            {"key": "zone", "operator": "Exists"}, {"key": "x", "operator": "In"}]},
        "policyTypes": ["Ingress"], "ingress": [{}]
    }));
    assert_eq!(policy.pods.to_string(), "app=web,zone");
    assert_eq!(policy.ingress, Some(Vec::new()));
    assert_eq!(policy.egress, None);
    assert_eq!(notices.len(), 2, "{notices:?}");
    assert!(
        notices.iter().all(|notice| notice
            .contains("this requirement is left out, so the policy applies to more pods")),
        "{notices:?}"
    );
    for selector in [
        json!([]),
        json!("app=web"),
        json!({"matchlabels": {"app": "web"}}),
    ] {
        let (policy, notices) =
            super::tests::policy(json!({"podSelector": selector, "ingress": [{}]}));
        assert!(policy.pods.is_everything(), "{selector}");
        assert_eq!(policy.ingress, Some(Vec::new()), "{selector}");
        assert_eq!(policy.egress, None, "{selector}");
        assert_eq!(notices.len(), 1, "{notices:?}");
    }
}

#[test]
fn an_unknown_policy_type_isolates_both_directions() {
    for types in [
        json!(["Ingres"]),
        json!(["Ingress", "egress"]),
        json!([5]),
        json!("Ingress"),
    ] {
        let (policy, notices) = policy(json!({"policyTypes": types, "ingress": [{}]}));
        assert_eq!(policy.ingress, Some(vec![EVERYTHING]), "{types}");
        assert_eq!(policy.egress, Some(Vec::new()), "{types}");
        assert_eq!(notices.len(), 1, "{notices:?}");
        assert!(
            notices[0].contains("spec.policyTypes")
                && notices[0].contains("isolates its pods in both directions"),
            "{notices:?}"
        );
    }
}

#[test]
fn a_policy_that_is_not_understood_as_a_whole_allows_nothing() {
    let selector = json!({"matchLabels": {"app": "web"}});
    let misspelt = [
        json!({"podSelector": selector, "policyType": ["Egress"], "ingress": [{}]}),
        json!({"podSelector": selector, "Ingress": [{}]}),
    ];
    for spec in misspelt {
        let (policy, notices) = policy(spec);
        assert_eq!(policy.pods.to_string(), "app=web");
        assert_eq!(policy.ingress, Some(Vec::new()));
        assert_eq!(policy.egress, Some(Vec::new()));
        assert_eq!(notices.len(), 1, "{notices:?}");
        assert!(
            notices[0].contains("the known ones are podSelector, policyTypes, ingress and egress"),
            "{notices:?}"
        );
    }
    for spec in [json!("x"), json!([])] {
        let (policy, notices) = policy(spec);
        assert!(policy.pods.is_everything());
        assert_eq!(policy.ingress, Some(Vec::new()));
        assert_eq!(policy.egress, Some(Vec::new()));
        assert_eq!(notices.len(), 1, "{notices:?}");
        assert!(
            notices[0].contains("all pods of the namespace"),
            "{notices:?}"
        );
    }
    // Whatever else is wrong with the object, its identity is enough.
    let (policy, _) = policy_with(
        json!({"metadata": {"name": "web", "labels": 5, "annotations": []}, "spec": {}, "status": 5}),
    );
    assert_eq!(policy.name.as_str(), "default/web");
    assert_eq!(policy.ingress, Some(Vec::new()));
    assert_eq!(policy.egress, None);
}

#[test]
fn only_valid_port_names_are_accepted() {
    for name in ["a", "web", "http-2", "2a", "fifteen-letters"] {
        assert!(is_port_name(name), "{name}");
    }
    for name in [
        "",
        "8080",
        "a--b",
        "-a",
        "a-",
        "Web",
        "a.b",
        "sixteen-letters-",
    ] {
        assert!(!is_port_name(name), "{name}");
    }
}
