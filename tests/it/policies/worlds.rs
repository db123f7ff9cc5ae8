//! The random clusters and policies hold every form of every field, and both answers.

use std::collections::BTreeSet;

use crate::support::policy::generate::{self, Random, Shape};
use crate::support::policy::oracle::{self, Cluster, allowed};
use serde_json::Value;

#[test]
fn worlds_follow_from_their_seed() {
    let text = |seed| {
        let mut random = Random::new(seed);
        let mut cluster = generate::cluster(&mut random, &Shape::SMALL);
        let said: Vec<_> = (0..10)
            .map(|_| generate::mutate(&mut random, &Shape::SMALL, &mut cluster))
            .collect();
        format!("{said:?} {:?}", generate::manifests(&cluster))
    };
    assert_eq!(text(7), text(7));
    let different: BTreeSet<String> = (0..100).map(text).collect();
    assert_eq!(different.len(), 100);
}

/// The paths of all fields that have a value, with the values of some.
fn forms(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            let shown = if fields.is_empty() { "{}" } else { "" };
            found.insert(format!("{path}{shown}"));
            for (key, value) in fields {
                forms(value, &format!("{path}.{key}"), found);
            }
        }
        Value::Array(values) => {
            found.insert(format!("{path}[{}]", values.len().min(2)));
            values.iter().for_each(|value| forms(value, path, found));
        }
        Value::String(text) => {
            found.insert(format!("{path}={text}"));
        }
        Value::Number(_) => {
            found.insert(format!("{path}=#"));
        }
        other => {
            found.insert(format!("{path}={other}"));
        }
    }
}

#[test]
fn every_form_of_every_field_comes_up() {
    let mut found = BTreeSet::new();
    let mut changes = BTreeSet::new();
    for seed in 0..400 {
        let mut random = Random::new(seed);
        let shape = Shape::SMALL;
        let mut cluster = generate::cluster(&mut random, &shape);
        for object in generate::manifests(&cluster) {
            let kind = object["kind"].as_str().expect("a kind").to_owned();
            forms(&object, &kind, &mut found);
        }
        for _ in 0..4 {
            let change = generate::mutate(&mut random, &shape, &mut cluster);
            let kind = change
                .split(|c: char| c.is_ascii_digit() || c == '/')
                .next();
            changes.insert(kind.unwrap_or_default().to_owned());
        }
    }
    let mut wanted: Vec<String> = Vec::new();
    for (rules, peers) in [("ingress", "from"), ("egress", "to")] {
        let rule = format!("NetworkPolicy.spec.{rules}");
        wanted.extend(["[0]", "[1]", "[2]", "{}"].map(|form| format!("{rule}{form}")));
        for peer in [
            "[0]",
            "[1]",
            "[2]",
            ".ipBlock.except[0]",
            ".ipBlock.except[2]",
        ] {
            wanted.push(format!("{rule}.{peers}{peer}"));
        }
        for selector in ["podSelector", "namespaceSelector"] {
            for form in ["{}", ".matchLabels", ".matchExpressions"] {
                wanted.push(format!("{rule}.{peers}.{selector}{form}"));
            }
            for operator in ["In", "NotIn", "Exists", "DoesNotExist"] {
                let at = format!("{rule}.{peers}.{selector}.matchExpressions");
                wanted.push(format!("{at}.operator={operator}"));
            }
        }
        for port in [
            "{}",
            "[0]",
            "[2]",
            ".endPort=#",
            ".port=#",
            ".port=web",
            ".port=peer",
        ] {
            wanted.push(format!("{rule}.ports{port}"));
        }
        for protocol in ["TCP", "UDP", "SCTP", "ICMP"] {
            wanted.push(format!("{rule}.ports.protocol={protocol}"));
        }
    }
    for (rules, peers, fields) in [
        ("ingress", "from", &["namespaces", "pods"][..]),
        (
            "egress",
            "to",
            &["namespaces", "pods", "nodes", "networks[1]", "networks[2]"],
        ),
    ] {
        let rule = format!("ClusterNetworkPolicy.spec.{rules}");
        wanted.extend(["[0]", "[1]", "[2]", ".name=a rule"].map(|form| format!("{rule}{form}")));
        for action in ["Accept", "Deny", "Pass", "Allow"] {
            wanted.push(format!("{rule}.action={action}"));
        }
        wanted.extend(fields.iter().map(|field| format!("{rule}.{peers}.{field}")));
        for fault in ["{}", ".services{}", ".domainNames[1]"] {
            wanted.push(format!("{rule}.{peers}{fault}"));
        }
        for protocol in ["tcp", "udp", "sctp"] {
            for port in ["number=#", "range.start=#"] {
                wanted.push(format!(
                    "{rule}.protocols.{protocol}.destinationPort.{port}"
                ));
            }
        }
        for name in ["web", "dns", "peer", ""] {
            wanted.push(format!("{rule}.protocols.destinationNamedPort={name}"));
        }
    }
    wanted.extend(
        [
            "ClusterNetworkPolicy.spec.tier=Admin",
            "ClusterNetworkPolicy.spec.tier=Baseline",
            "ClusterNetworkPolicy.spec.subject.namespaces{}",
            "ClusterNetworkPolicy.spec.subject.namespaces.matchLabels",
            "ClusterNetworkPolicy.spec.subject.pods.podSelector{}",
            "ClusterNetworkPolicy.spec.subject.pods.namespaceSelector.matchExpressions",
            "Node.metadata.labels.role=control",
            "Node.status.addresses.type=Hostname",
            "NetworkPolicy.spec.podSelector{}",
            "NetworkPolicy.spec.podSelector.matchExpressions.operator=Like",
            "NetworkPolicy.spec.policyTypes[0]",
            "NetworkPolicy.spec.policyTypes[2]",
            "Pod.metadata.deletionTimestamp=2026-01-01T01:00:00Z",
            "Pod.spec.hostNetwork=true",
            "Pod.status.conditions.status=True",
            "Pod.status.conditions.status=False",
            "Pod.status.containerStatuses.state.running.startedAt=2026-01-01T00:00:01Z",
            "Pod.status.initContainerStatuses.state.running.startedAt=2026-01-01T00:00:01Z",
            "Pod.status.phase=Succeeded",
            "Pod.status.podIPs[1]",
            "Pod.status.podIPs[2]",
        ]
        .map(str::to_owned),
    );
    wanted.retain(|form| !found.contains(form));
    assert!(wanted.is_empty(), "never made: {wanted:#?}");
    for change in [
        "deleted ",
        "added ",
        "replaced ",
        "terminating ",
        "Failed ",
        "Running ",
        "news ",
    ] {
        let seen = changes.iter().any(|seen| seen.starts_with(change));
        assert!(seen, "never {change}: {changes:?}");
    }
    for change in [
        "edited policy",
        "deleted policy",
        "added policy",
        "relabelled namespace",
        "relabelled node",
        "moved node",
        "edited cluster policy",
        "deleted cluster policy",
        "added cluster policy",
        "moved cluster policy",
        "changed an action",
        "changed the subject",
    ] {
        let seen = changes.iter().any(|seen| seen.starts_with(change));
        assert!(seen, "never {change}: {changes:?}");
    }
}

#[test]
fn both_answers_are_frequent() {
    let shape = Shape::SMALL;
    let (mut asked, mut passed, mut pods_asked, mut pods_passed) = (0, 0, 0, 0);
    let (mut by_rule, mut by_tier) = (0, [0, 0]);
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let cluster = generate::cluster(&mut random, &shape);
        let open = Cluster {
            policies: Vec::new(),
            cluster_policies: Vec::new(),
            ..cluster.clone()
        };
        let untiered = Cluster {
            cluster_policies: Vec::new(),
            ..cluster.clone()
        };
        for _ in 0..30 {
            let (from, to, protocol, port) = generate::connection(&mut random, &shape, &cluster);
            let pass = allowed(&cluster, from, to, protocol, port);
            assert!(allowed(&open, from, to, protocol, port));
            asked += 1;
            passed += usize::from(pass);
            let untiered_pass = allowed(&untiered, from, to, protocol, port);
            if pass != untiered_pass {
                by_tier[usize::from(pass)] += 1;
            }
            // What a policy decides: with every rule gone it would be another answer.
            let mut bare = untiered.clone();
            for policy in &mut bare.policies {
                let spec = policy.spec.get_or_insert_default();
                if spec.policy_types.as_ref().is_none_or(Vec::is_empty) && spec.egress.is_some() {
                    spec.policy_types = Some(vec!["Ingress".into(), "Egress".into()]);
                }
                (spec.ingress, spec.egress) = (None, None);
            }
            by_rule += usize::from(untiered_pass && !allowed(&bare, from, to, protocol, port));
            let both = [from, to].map(|it| oracle::owner(&cluster, it).is_some());
            if both == [true, true] && from != to {
                pods_asked += 1;
                pods_passed += usize::from(pass);
            }
        }
    }
    let share = |part: usize, of: usize| part * 100 / of;
    println!(
        "{}% of {asked} pass, {}% by a rule, {}% and {}% are denied and allowed by a tier, {}% of {pods_asked} pass between pods",
        share(passed, asked),
        share(by_rule, asked),
        share(by_tier[0], asked),
        share(by_tier[1], asked),
        share(pods_passed, pods_asked),
    );
    assert!((35..=75).contains(&share(passed, asked)));
    assert!((30..=70).contains(&share(pods_passed, pods_asked)));
    assert!(share(by_rule, asked) >= 15, "rules must matter");
    let [denied, accepted] = by_tier.map(|count| share(count, asked));
    assert!(denied >= 8 && accepted >= 2, "tiers must matter");
}
