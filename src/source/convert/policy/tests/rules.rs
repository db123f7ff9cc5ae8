//! Invalid rules.

use serde_json::{Value, json};

use super::{EVERYTHING, policy};

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
            "is in an unknown field",
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
            "is in an unknown field",
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
