//! NetworkPolicies: every form, and every fault.

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
    // A struct stays as it is, a string empty, everything else absent.
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

/// Faults of a rule: the rule, where the fault is and what is said of it.
fn faulty_rules() -> Vec<(Value, &'static str, &'static str)> {
    let block = |block: Value| json!({"from": [{"podSelector": {}}, {"ipBlock": block}]});
    let port = |port: Value| json!({"ports": [port]});
    let expression =
        |expression: Value| json!({"from": [{"podSelector": {"matchExpressions": [expression]}}]});
    let labels = |labels: Value| json!({"from": [{"namespaceSelector": {"matchLabels": labels}}]});
    vec![
        (json!([]), "", "\"[]\" is not a mapping"),
        (
            json!({"form": [{"podSelector": {}}]}),
            ".form",
            "\"[...]\" is in an unknown field; the known ones are from and ports",
        ),
        (
            json!({"to": [{"podSelector": {}}]}),
            ".to",
            "the known ones are from and ports",
        ),
        (json!({"from": 5}), ".from", "\"5\" is not a list"),
        (
            json!({"ports": {"port": 80}}),
            ".ports",
            "\"{...}\" is not a list",
        ),
        (json!({"from": [{}]}), ".from[0]", "selects no peers"),
        (json!({"from": [null]}), ".from[0]", "selects no peers"),
        (
            json!({"from": [{"podSelector": null}]}),
            ".from[0]",
            "selects no peers",
        ),
        (
            json!({"from": [{"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}}]}),
            ".from[0]",
            "has an ipBlock and a selector",
        ),
        (
            json!({"from": [{"podselector": {}, "namespaceSelector": {}}]}),
            ".from[0].podselector",
            "does not know",
        ),
        (
            json!({"from": [{"podSelector": []}]}),
            ".from[0].podSelector",
            "is not a mapping",
        ),
        (
            block(json!({"cidr": "10.0.0/8"})),
            ".from[1].ipBlock.cidr",
            "\"10.0.0/8\" is not an address range; write one such as",
        ),
        (
            block(json!({})),
            ".from[1].ipBlock.cidr",
            "is not an address range",
        ),
        (
            block(json!({"cidr": "10.0.0.1"})),
            ".from[1].ipBlock.cidr",
            "is not an address range",
        ),
        (
            block(json!({"cidr": "::ffff:10.0.0.0/104"})),
            ".from[1].ipBlock.cidr",
            "is an IPv4 range in IPv6 notation",
        ),
        (
            block(json!({"cidr": "10.0.0.0/8", "expect": ["10.0.0.0/9"]})),
            ".from[1].ipBlock.expect",
            "the known ones are cidr and except",
        ),
        (
            block(json!({"cidr": "10.0.0.0/8", "except": "10.0.0.0/9"})),
            ".from[1].ipBlock.except",
            "is not a list",
        ),
        (
            block(json!({"cidr": "10.0.0.0/8", "except": ["10.0.0.0/9", "x"]})),
            ".from[1].ipBlock.except[1]",
            "is not an address range",
        ),
        (
            block(json!({"cidr": "10.0.0.0/8", "except": ["11.0.0.0/9"]})),
            ".from[1].ipBlock.except[0]",
            "is not a smaller range within 10.0.0.0/8",
        ),
        (
            block(json!({"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]})),
            ".from[1].ipBlock.except[0]",
            "is not a smaller range within 10.0.0.0/8",
        ),
        (
            block(json!({"cidr": "10.0.0.0/8", "except": ["0.0.0.0/0"]})),
            ".from[1].ipBlock.except[0]",
            "is not a smaller range",
        ),
        (
            block(json!({"cidr": "10.0.0.0/8", "except": ["fd00::/64"]})),
            ".from[1].ipBlock.except[0]",
            "is not a smaller range",
        ),
        (
            port(json!({"port": 0})),
            ".ports[0].port",
            "\"0\" is not a port; write a number from 1 to 65535",
        ),
        (
            port(json!({"port": 65536})),
            ".ports[0].port",
            "is not a port",
        ),
        (port(json!({"port": -1})), ".ports[0].port", "is not a port"),
        (
            port(json!({"port": 80.5})),
            ".ports[0].port",
            "is not a port",
        ),
        (
            port(json!({"port": true})),
            ".ports[0].port",
            "is not a port",
        ),
        (
            port(json!({"port": "80"})),
            ".ports[0].port",
            "is not the name of a port",
        ),
        (
            port(json!({"port": ""})),
            ".ports[0].port",
            "is not the name of a port",
        ),
        (
            port(json!({"port": "Web"})),
            ".ports[0].port",
            "is not the name of a port",
        ),
        (
            port(json!({"port": "a--b"})),
            ".ports[0].port",
            "is not the name of a port",
        ),
        (
            port(json!({"port": "-a"})),
            ".ports[0].port",
            "is not the name of a port",
        ),
        (
            port(json!({"port": "more-than-fifteen"})),
            ".ports[0].port",
            "is not the name of a port",
        ),
        (
            port(json!({"port": 80, "endPort": 79})),
            ".ports[0].endPort",
            "\"79\" is below the port 80",
        ),
        (
            port(json!({"port": 80, "endPort": 65536})),
            ".ports[0].endPort",
            "is not a port",
        ),
        (
            port(json!({"port": 80, "endPort": "90"})),
            ".ports[0].endPort",
            "is not a port",
        ),
        (
            port(json!({"port": "web", "endPort": 90})),
            ".ports[0].endPort",
            "needs a number as port",
        ),
        (
            port(json!({"endPort": 90})),
            ".ports[0].endPort",
            "needs a number as port",
        ),
        (
            port(json!({"port": 80, "protocol": "tcp"})),
            ".ports[0].protocol",
            "\"tcp\" is not a protocol",
        ),
        (
            port(json!({"port": 80, "protocol": ""})),
            ".ports[0].protocol",
            "is not a protocol",
        ),
        (
            port(json!({"port": 80, "protocol": 6})),
            ".ports[0].protocol",
            "is not a protocol",
        ),
        (
            port(json!({"ports": 80})),
            ".ports[0].ports",
            "the known ones are protocol, port and endPort",
        ),
        (port(json!(80)), ".ports[0]", "is not a mapping"),
        (
            expression(json!({"key": "a", "operator": "Is", "values": ["b"]})),
            ".from[0].podSelector.matchExpressions[0].operator",
            "\"Is\" is not an operator",
        ),
        (
            expression(json!({"key": "a"})),
            ".from[0].podSelector.matchExpressions[0].operator",
            "is not an operator",
        ),
        (
            expression(json!({"key": "a", "operator": "In"})),
            ".from[0].podSelector.matchExpressions[0].values",
            "\"In\" needs values",
        ),
        (
            expression(json!({"key": "a", "operator": "NotIn", "values": []})),
            ".from[0].podSelector.matchExpressions[0].values",
            "\"NotIn\" needs values",
        ),
        (
            expression(json!({"key": "a", "operator": "Exists", "values": ["b"]})),
            ".from[0].podSelector.matchExpressions[0].values",
            "\"Exists\" takes no values",
        ),
        (
            expression(json!({"key": "a", "operator": "DoesNotExist", "values": ["b"]})),
            ".from[0].podSelector.matchExpressions[0].values",
            "takes no values",
        ),
        (
            expression(json!({"operator": "Exists"})),
            ".from[0].podSelector.matchExpressions[0].key",
            "is not the key of a label",
        ),
        (
            expression(json!({"key": "a b", "operator": "DoesNotExist"})),
            ".from[0].podSelector.matchExpressions[0].key",
            "is not the key of a label",
        ),
        (
            expression(json!({"key": "a", "operator": "NotIn", "values": ["-"]})),
            ".from[0].podSelector.matchExpressions[0].values[0]",
            "is not the value of a label",
        ),
        (
            expression(json!({"key": "a", "operator": "NotIn", "value": ["b"]})),
            ".from[0].podSelector.matchExpressions[0].value",
            "does not know",
        ),
        (
            labels(json!({"a": 5})),
            ".from[0].namespaceSelector.matchLabels.a",
            "\"5\" is not a string; put it in quotes",
        ),
        (
            labels(json!({"a b": "c"})),
            ".from[0].namespaceSelector.matchLabels.a b",
            "\"a b\" is not the key",
        ),
        (
            labels(json!(["a"])),
            ".from[0].namespaceSelector.matchLabels",
            "is not a mapping",
        ),
    ]
}

#[test]
fn a_rule_with_a_fault_is_left_out_and_the_others_stay() {
    for (rule, place, fault) in faulty_rules() {
        let (policy, notices) =
            policy(json!({"podSelector": {}, "ingress": [{}, rule, {"ports": [{"port": 80}]}]}));
        let rules = policy.ingress.expect("ingress is isolated");
        assert_eq!(rules.len(), 2, "{rule}: {rules:?}");
        assert_eq!(rules[0], EVERYTHING, "{rule}");
        assert_eq!(policy.egress, None, "{rule}");
        assert_eq!(notices.len(), 1, "{rule}: {notices:?}");
        let begin = format!("NetworkPolicy shop/web: spec.ingress[1]{place} \"");
        assert!(notices[0].starts_with(&begin), "{rule}: {notices:?}");
        assert!(notices[0].contains(fault), "{rule}: {notices:?}");
        assert!(
            notices[0].ends_with(
                "; the rule is left out; what it would allow stays denied until this is corrected"
            ),
            "{notices:?}"
        );
    }
}

#[test]
fn every_fault_of_a_rule_is_reported() {
    let (policy, notices) = policy(json!({
        "policyTypes": ["Egress"],
        "egress": [{
            "to": [{"ipBlock": {"cidr": "x", "except": []}}, {"podSelector": {"matchLabels": {"a": 1, "b": 2}}}],
            "ports": [{"port": 0, "protocol": "ICMP"}]
        }]
    }));
    assert_eq!(policy.egress, Some(Vec::new()));
    let places: Vec<_> = notices
        .iter()
        .filter_map(|notice| notice.split(' ').nth(2))
        .collect();
    assert_eq!(
        places,
        [
            "spec.egress[0].to[0].ipBlock.cidr",
            "spec.egress[0].to[1].podSelector.matchLabels.a",
            "spec.egress[0].to[1].podSelector.matchLabels.b",
            "spec.egress[0].ports[0].protocol",
            "spec.egress[0].ports[0].port",
        ]
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
