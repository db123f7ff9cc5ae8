//! ClusterNetworkPolicies: every field, and every fault.

use serde_json::{Value, json};

use super::*;
use crate::model::{Object, Reason, Requirement};

fn decode(spec: Value) -> Result<(ClusterNetworkPolicy, Vec<(Reason, String)>), String> {
    let object = json!({"metadata": {"name": "cluster"}, "spec": spec});
    let decoded = Converter::default()
        .decode(Kind::ClusterNetworkPolicy, &object)
        .map_err(|error| error.to_string())?;
    let notices = decoded.notices.into_iter();
    let notices = notices.map(|notice| (notice.reason, notice.message));
    match decoded.object {
        Some(Object::ClusterNetworkPolicy(policy)) => Ok((policy, notices.collect())),
        other => panic!("not a policy: {other:?}"),
    }
}

/// The spec of a policy with these rules.
fn spec(ingress: Value, egress: Value) -> Value {
    json!({"tier": "Admin", "priority": 7, "subject": {"namespaces": {}},
        "ingress": ingress, "egress": egress})
}

/// The rules of a policy without faults.
fn sound(ingress: Value, egress: Value) -> (Vec<TierRule>, Vec<TierRule>) {
    let (policy, notices) = decode(spec(ingress, egress)).expect("a usable policy");
    assert_eq!(notices, []);
    (policy.ingress, policy.egress)
}

fn is(key: &str, value: &str) -> LabelSelector {
    LabelSelector::new([Requirement::In(key.into(), vec![value.into()])])
}

fn labels(key: &str, value: &str) -> Value {
    json!({"matchLabels": {key: value}})
}

fn tcp(first: u16, last: u16) -> PolicyPort {
    PolicyPort {
        protocol: Protocol::Tcp,
        port: PortMatch::Range(first, last),
    }
}

#[test]
fn every_field_of_a_policy_is_read() {
    let (policy, notices) = decode(json!({
        "tier": "Baseline", "priority": 1000,
        "subject": {"pods": {"namespaceSelector": labels("team", "shop"), "podSelector": labels("app", "web")}},
        "ingress": [
            {"name": "from shops", "action": "Accept", "from": [
                {"namespaces": labels("team", "ops")},
                {"pods": {"namespaceSelector": {}, "podSelector": labels("app", "probe")}}
            ], "protocols": [
                {"tcp": {"destinationPort": {"number": 80}}},
                {"tcp": {"destinationPort": {"range": {"start": 9000, "end": 9010}}}},
                {"udp": {"destinationPort": {"number": 53}}},
                {"sctp": {"destinationPort": {"number": 9003}}}
            ]},
            {"action": "Pass", "from": [{"pods": {"podSelector": {}}}], "protocols": [{"destinationNamedPort": "web"}]}
        ],
        "egress": [
            {"action": "Deny", "to": [
                {"networks": ["fd00::/8", "10.1.2.3/8", "192.0.2.0/24", "10.0.0.0/8"]},
                {"nodes": labels("role", "control-plane")}
            ]}
        ]
    }))
    .expect("a usable policy");
    assert_eq!(notices, []);
    let pods = |namespaces, pods| TierPeer::Pods { namespaces, pods };
    let everything = LabelSelector::default;
    let of = |protocol, port| PolicyPort { protocol, port };
    let named = |protocol| of(protocol, PortMatch::Named("web".into()));
    let range = |text: &str| text.parse().expect("a range");
    let wanted = ClusterNetworkPolicy {
        name: ObjectName::new("", "cluster"),
        tier: Tier::Baseline,
        priority: 1000,
        subject_namespaces: is("team", "shop"),
        subject_pods: is("app", "web"),
        ingress: vec![
            TierRule {
                name: Some("from shops".into()),
                action: Action::Accept,
                peers: Some(vec![
                    pods(is("team", "ops"), everything()),
                    pods(everything(), is("app", "probe")),
                ]),
                protocols: Some(vec![
                    tcp(80, 80),
                    tcp(9000, 9010),
                    of(Protocol::Udp, PortMatch::Range(53, 53)),
                    of(Protocol::Sctp, PortMatch::Range(9003, 9003)),
                ]),
            },
            TierRule {
                name: None,
                action: Action::Pass,
                peers: Some(vec![pods(everything(), everything())]),
                protocols: Some(vec![
                    named(Protocol::Tcp),
                    named(Protocol::Udp),
                    named(Protocol::Sctp),
                ]),
            },
        ],
        egress: vec![TierRule {
            name: None,
            action: Action::Deny,
            peers: Some(vec![
                // Sorted, and each network once.
                TierPeer::Networks(vec![
                    range("10.0.0.0/8"),
                    range("192.0.2.0/24"),
                    range("fd00::/8"),
                ]),
                TierPeer::Nodes(is("role", "control-plane")),
            ]),
            protocols: None,
        }],
    };
    assert_eq!(policy, wanted);
}

#[test]
fn a_subject_may_be_whole_namespaces_and_a_direction_may_have_no_rules() {
    let (policy, notices) = decode(json!({
        "tier": "Admin", "priority": 0, "subject": {"namespaces": labels("team", "shop")},
        "ingress": [], "egress": null
    }))
    .expect("a usable policy");
    assert_eq!(notices, []);
    assert_eq!(policy.priority, 0);
    assert_eq!(policy.subject_namespaces, is("team", "shop"));
    assert_eq!(policy.subject_pods, LabelSelector::default());
    assert_eq!((policy.ingress, policy.egress), (vec![], vec![]));
}

#[test]
fn a_policy_without_a_usable_tier_priority_or_subject_is_an_error() {
    let with = |field: &str, value: Value| {
        let mut spec = spec(json!([]), json!([]));
        spec[field] = value;
        spec
    };
    let expression = json!({"matchExpressions": [{"key": "a", "operator": "Is"}]});
    for (spec, wanted) in [
        (
            Value::Null,
            "spec.tier \"null\" is not a tier; write Admin or Baseline; without",
        ),
        (json!([]), "spec \"[]\" is not a mapping"),
        (
            with("tier", json!("admin")),
            "spec.tier \"admin\" is not a tier",
        ),
        (
            with("tier", json!(["Admin"])),
            "spec.tier \"[...]\" is not a tier",
        ),
        (
            with("priority", Value::Null),
            "spec.priority \"null\" is not a priority",
        ),
        (
            with("priority", json!(1001)),
            "spec.priority \"1001\" is not a priority; write a number from 0 to 1000",
        ),
        (with("priority", json!(-1)), "spec.priority \"-1\" is not"),
        (
            with("priority", json!(65537)),
            "spec.priority \"65537\" is not",
        ),
        (with("priority", json!("7")), "spec.priority \"7\" is not"),
        (
            with("subject", Value::Null),
            "spec.subject \"null\" needs one of the fields namespaces and pods",
        ),
        (
            with("subject", json!({})),
            "spec.subject \"{}\" needs one of",
        ),
        (
            with(
                "subject",
                json!({"namespaces": {}, "pods": {"podSelector": {}}}),
            ),
            "spec.subject \"{...}\" needs one of",
        ),
        (
            with("subject", json!({"nodes": {}})),
            "spec.subject.nodes \"{}\" is in an unknown field",
        ),
        (
            with("subject", json!({"namespaces": {}, "nodes": {}})),
            "spec.subject.nodes \"{}\" is in an unknown field",
        ),
        (
            with("subject", json!({"pods": {}})),
            "spec.subject.pods \"{}\" needs a podSelector",
        ),
        (
            with(
                "subject",
                json!({"pods": {"podSelector": {}, "nameSpaceSelector": {}}}),
            ),
            "spec.subject.pods.nameSpaceSelector \"{}\" is in an unknown field",
        ),
        (
            with("subject", json!({"namespaces": expression})),
            "spec.subject.namespaces.matchExpressions[0].operator \"Is\" is not an operator",
        ),
    ] {
        let error = decode(spec).expect_err(wanted);
        assert!(error.starts_with(wanted), "{error}\n{wanted}");
    }
}

#[test]
fn an_unknown_field_of_the_spec_is_reported_and_the_rules_are_used() {
    let mut spec = spec(
        json!([{"action": "Deny", "from": [{"namespaces": {}}]}]),
        Value::Null,
    );
    spec["logging"] = json!(true);
    let (policy, notices) = decode(spec).expect("a usable policy");
    assert_eq!(policy.ingress.len(), 1);
    let [(Reason::InvalidPolicy, message)] = notices.as_slice() else {
        panic!("one notice: {notices:?}");
    };
    let wanted = "ClusterNetworkPolicy cluster: spec.logging \"true\" is in an unknown field; the known ones are tier, priority, subject, ingress and egress; the rest of the policy is used";
    assert_eq!(message, wanted);
}

/// Faults of a rule of egress without its action: the rule, where the fault is and what is said.
fn faulty_rules() -> Vec<(Value, &'static str, &'static str)> {
    let to = |peer: Value| json!({"to": [{"namespaces": {}}, peer]});
    let protocol = |protocol: Value| json!({"to": [{"namespaces": {}}], "protocols": [protocol]});
    let port = |port: Value| protocol(json!({"tcp": {"destinationPort": port}}));
    let many = |entry: Value| Value::Array(vec![entry; 26]);
    vec![
        (json!({}), ".to", "\"null\" is not a list"),
        (json!({"to": []}), ".to", "has no entries"),
        (json!({"to": {}}), ".to", "is not a list"),
        (
            json!({"to": many(json!({"namespaces": {}}))}),
            ".to",
            "has 26 entries; write at most 25",
        ),
        (
            json!({"to": [{"namespaces": {}}], "form": []}),
            ".form",
            "is in an unknown field; the known ones are name, action, to and protocols",
        ),
        (
            to(json!({})),
            ".to[1]",
            "must have exactly one of the fields of a peer",
        ),
        (
            to(Value::Null),
            ".to[1]",
            "must have exactly one of the fields of a peer",
        ),
        (to(json!(5)), ".to[1]", "is not a mapping"),
        (
            to(json!({"services": {}})),
            ".to[1].services",
            "is in an unknown field; the known ones are namespaces, pods, networks, nodes and domainNames",
        ),
        (
            to(json!({"namespaces": {}, "services": {}})),
            ".to[1].services",
            "is in an unknown field",
        ),
        (
            to(json!({"namespaces": {}, "nodes": {}})),
            ".to[1]",
            "must have exactly one of the fields of a peer",
        ),
        (
            to(json!({"namespaces": {"matchlabels": {}}})),
            ".to[1].namespaces.matchlabels",
            "is in an unknown field",
        ),
        (
            to(json!({"pods": {"namespaceSelector": {}}})),
            ".to[1].pods",
            "needs a podSelector",
        ),
        (
            to(
                json!({"pods": {"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}}),
            ),
            ".to[1].pods.podSelector.matchExpressions[0].values",
            "needs values",
        ),
        (
            to(json!({"nodes": {"matchExpressions": [{"key": "a"}]}})),
            ".to[1].nodes.matchExpressions[0].operator",
            "is not an operator",
        ),
        (
            to(json!({"networks": []})),
            ".to[1].networks",
            "has no entries",
        ),
        (
            to(json!({"networks": many(json!("10.0.0.0/8"))})),
            ".to[1].networks",
            "has 26 entries",
        ),
        (
            to(json!({"networks": ["10.0.0.0/8", "10.0.0.0"]})),
            ".to[1].networks[1]",
            "is not an address range",
        ),
        (
            to(json!({"networks": ["::ffff:10.0.0.0/104"]})),
            ".to[1].networks[0]",
            "is an IPv4 range in IPv6 notation",
        ),
        (
            protocol(json!({})),
            ".protocols[0]",
            "must have exactly one of the fields of a protocol",
        ),
        (
            protocol(json!({"icmp": {}})),
            ".protocols[0].icmp",
            "is in an unknown field; the known ones are tcp, udp, sctp and destinationNamedPort",
        ),
        (
            protocol(json!({"destinationNamedPort": ""})),
            ".protocols[0].destinationNamedPort",
            "is not the name of a port",
        ),
        (
            protocol(json!({"destinationNamedPort": 80})),
            ".protocols[0].destinationNamedPort",
            "is not a string",
        ),
        (
            protocol(json!({"tcp": {}})),
            ".protocols[0].tcp",
            "needs a destinationPort",
        ),
        (
            protocol(json!({"tcp": {"sourcePort": {}}})),
            ".protocols[0].tcp.sourcePort",
            "is in an unknown field",
        ),
        (
            protocol(
                json!({"tcp": {"destinationPort": {"number": 1}}, "udp": {"destinationPort": {"number": 1}}}),
            ),
            ".protocols[0]",
            "must have exactly one of the fields of a protocol",
        ),
        (
            json!({"to": [{"namespaces": {}}], "protocols": []}),
            ".protocols",
            "has no entries",
        ),
        (
            json!({"to": [{"namespaces": {}}], "protocols": many(json!({"tcp": {"destinationPort": {"number": 1}}}))}),
            ".protocols",
            "has 26 entries",
        ),
        (
            port(json!({})),
            ".protocols[0].tcp.destinationPort",
            "must have one of the fields number and range",
        ),
        (
            port(json!({"number": 1, "range": {"start": 1, "end": 2}})),
            ".protocols[0].tcp.destinationPort",
            "must have one of",
        ),
        (
            port(json!({"number": 0})),
            ".protocols[0].tcp.destinationPort.number",
            "is not a port",
        ),
        (
            port(json!({"number": "80"})),
            ".protocols[0].tcp.destinationPort.number",
            "is not a port",
        ),
        (
            port(json!({"number": 65536})),
            ".protocols[0].tcp.destinationPort.number",
            "is not a port",
        ),
        (
            port(json!({"range": {"start": 5}})),
            ".protocols[0].tcp.destinationPort.range.end",
            "is not a port",
        ),
        (
            port(json!({"range": {"start": 0, "end": 2}})),
            ".protocols[0].tcp.destinationPort.range.start",
            "is not a port",
        ),
        (
            port(json!({"range": {"start": 5, "end": 5}})),
            ".protocols[0].tcp.destinationPort.range",
            "does not end above its start",
        ),
        (
            port(json!({"range": {"start": 5, "end": 4}})),
            ".protocols[0].tcp.destinationPort.range",
            "does not end above its start",
        ),
        (
            json!({"to": [{"networks": ["10.0.0.0/8"]}], "protocols": [{"destinationNamedPort": "web"}]}),
            "",
            "names a port beside a peer that is not a pod",
        ),
        (
            json!({"to": [{"namespaces": {}}, {"nodes": {}}], "protocols": [{"destinationNamedPort": "web"}]}),
            "",
            "names a port beside a peer that is not a pod",
        ),
    ]
}

#[test]
fn a_rule_with_a_fault_accepts_nothing_or_denies_everything() {
    for (rule, at, wanted) in faulty_rules() {
        for action in ["Accept", "Deny", "Pass"] {
            let mut faulty = rule.clone();
            faulty["action"] = action.into();
            faulty["name"] = "faulty".into();
            let sound = json!({"action": "Pass", "to": [{"namespaces": {}}]});
            let (policy, notices) =
                decode(spec(Value::Null, json!([faulty, sound]))).expect("a usable policy");
            let (first, last) = match (action, policy.egress.as_slice()) {
                ("Accept", [last]) => (None, last),
                ("Deny" | "Pass", [first, last]) => (Some(first), last),
                (_, other) => panic!("{faulty}: {other:?}"),
            };
            assert_eq!(last.action, Action::Pass, "the other rule stays");
            let consequence = match first {
                None => ACCEPTS_NOTHING,
                Some(first) => {
                    assert_eq!(*first, denying_all(Some("faulty".into())), "{faulty}");
                    DENIES_ALL
                }
            };
            let [(reason, message)] = notices.as_slice() else {
                panic!("one notice about {faulty}: {notices:?}");
            };
            assert_eq!(*reason, Reason::InvalidPolicy);
            let begin = format!("ClusterNetworkPolicy cluster: spec.egress[0]{at} \"");
            assert!(message.starts_with(&begin), "{message}\n{begin}");
            assert!(message.contains(wanted), "{message}\n{wanted}");
            assert!(message.ends_with(consequence), "{message}");
        }
    }
}

#[test]
fn a_rule_without_a_known_action_denies_everything() {
    for (rule, at, wanted) in [
        (
            json!({"from": [{"namespaces": {}}]}),
            ".action",
            "\"null\" is not an action; write Accept, Deny or Pass",
        ),
        (
            json!({"action": "Allow", "from": [{"namespaces": {}}]}),
            ".action",
            "\"Allow\" is not an action",
        ),
        (json!("Deny"), "", "\"Deny\" is not a mapping"),
    ] {
        let (policy, notices) = decode(spec(json!([rule]), Value::Null)).expect("usable");
        assert_eq!(policy.ingress, [denying_all(None)], "{rule}");
        let wanted = format!("ClusterNetworkPolicy cluster: spec.ingress[0]{at} {wanted}");
        let message = &notices[0].1;
        assert!(message.starts_with(&wanted), "{message}\n{wanted}");
    }
}

#[test]
fn a_direction_that_is_no_list_of_rules_is_denied() {
    let rule = json!({"action": "Accept", "from": [{"namespaces": {}}]});
    for (rules, wanted) in [
        (json!({"action": "Accept"}), "is not a list"),
        (Value::Array(vec![rule; 26]), "has 26 entries"),
    ] {
        let (policy, notices) = decode(spec(rules, Value::Null)).expect("usable");
        assert_eq!(policy.ingress, [denying_all(None)]);
        assert_eq!(policy.egress, []);
        let message = &notices[0].1;
        assert!(
            message.contains(wanted) && message.ends_with(DIRECTION_DENIED),
            "{message}"
        );
    }
}

#[test]
fn peers_of_egress_are_none_of_ingress() {
    for peer in [
        json!({"networks": ["10.0.0.0/8"]}),
        json!({"nodes": {}}),
        json!({"domainNames": ["example.org"]}),
    ] {
        let rule = |action: &str| json!({"action": action, "from": [peer]});
        let (policy, notices) =
            decode(spec(json!([rule("Accept"), rule("Deny")]), Value::Null)).expect("usable");
        assert_eq!(policy.ingress, [denying_all(None)], "{peer}");
        let hint = "is in an unknown field; the known ones are namespaces and pods";
        assert!(
            notices.iter().all(|(_, message)| message.contains(hint)),
            "{notices:?}"
        );
        assert_eq!(notices.len(), 2);
    }
}

#[test]
fn an_accept_rule_with_domain_names_accepts_nothing_and_is_reported_as_unsupported() {
    let rule = |action: &str| json!({"action": action, "to": [{"namespaces": {}}, {"domainNames": ["*.example.org"]}]});
    let (policy, notices) = decode(spec(Value::Null, json!([rule("Accept")]))).expect("usable");
    assert_eq!(policy.egress, []);
    let wanted = "ClusterNetworkPolicy cluster: spec.egress[0].to[1].domainNames is not supported; the rule accepts nothing";
    assert_eq!(notices, [(Reason::UnsupportedField, wanted.to_owned())]);
    for action in ["Deny", "Pass"] {
        let (policy, notices) = decode(spec(Value::Null, json!([rule(action)]))).expect("usable");
        assert_eq!(policy.egress, [denying_all(None)]);
        let [(Reason::InvalidPolicy, message)] = notices.as_slice() else {
            panic!("one notice: {notices:?}");
        };
        assert!(
            message.contains("can only be in rules with the action Accept"),
            "{message}"
        );
    }
}

#[test]
fn a_name_that_cannot_be_used_does_not_change_the_rule() {
    let rule =
        |name: Value| json!([{"name": name, "action": "Deny", "from": [{"namespaces": {}}]}]);
    let longest = "ä".repeat(100);
    let (ingress, _) = sound(rule(json!(longest)), Value::Null);
    assert_eq!(ingress[0].name.as_deref(), Some(&*longest));
    let (nameless, _) = sound(rule(Value::Null), Value::Null);
    for name in [json!("a".repeat(101)), json!(""), json!(5)] {
        let (policy, notices) = decode(spec(rule(name), Value::Null)).expect("usable");
        assert_eq!(policy.ingress, nameless);
        let message = &notices[0].1;
        assert!(
            message.ends_with("the rule is used without this name"),
            "{message}"
        );
    }
}

#[test]
fn a_named_port_may_have_any_name() {
    let (ingress, _) = sound(
        json!([{"action": "Deny", "from": [{"namespaces": {}}], "protocols": [
            {"destinationNamedPort": "No_Port_Has_This_Name"}, {"tcp": {"destinationPort": {"range": {"start": 1, "end": 65535}}}}]}]),
        Value::Null,
    );
    let protocols = ingress[0].protocols.as_ref().expect("protocols");
    assert_eq!(protocols.len(), 4);
    assert_eq!(
        protocols[0].port,
        PortMatch::Named("No_Port_Has_This_Name".into())
    );
    assert_eq!(protocols[3], tcp(1, 65535));
}
