//! Random histories: of pods, namespaces, nodes and policies.

use proptest::prelude::*;

use super::cluster::node;
use super::walk::walk;
use super::*;

/// One step of a history.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Pod(Pod),
    DeletePod(ObjectName),
    Namespace(Namespace),
    DeleteNamespace(ObjectName),
    Policy(NetworkPolicy),
    DeletePolicy(ObjectName),
    ClusterPolicy(ClusterNetworkPolicy),
    DeleteClusterPolicy(ObjectName),
    Node(Node),
    DeleteNode(ObjectName),
}

impl From<Step> for Event {
    fn from(step: Step) -> Self {
        let delete = |kind, name| Event::Delete(ObjectRef::new(kind, name));
        match step {
            Step::Pod(pod) => apply_pod(pod),
            Step::DeletePod(name) => delete(Kind::Pod, name),
            Step::Namespace(namespace) => Event::Apply(Object::Namespace(namespace)),
            Step::DeleteNamespace(name) => delete(Kind::Namespace, name),
            Step::Policy(policy) => apply_policy(policy),
            Step::DeletePolicy(name) => delete(Kind::NetworkPolicy, name),
            Step::ClusterPolicy(policy) => Event::Apply(Object::ClusterNetworkPolicy(policy)),
            Step::DeleteClusterPolicy(name) => delete(Kind::ClusterNetworkPolicy, name),
            Step::Node(node) => Event::Apply(Object::Node(node)),
            Step::DeleteNode(name) => delete(Kind::Node, name),
        }
    }
}

fn any_labels() -> impl Strategy<Value = Labels> {
    prop::collection::vec(("[ab]", "[xy]"), 0..3)
        .prop_map(|labels| labels.into_iter().collect::<Labels>())
}

fn any_selector() -> impl Strategy<Value = LabelSelector> {
    let requirement = (0..4, "[ab]", "[xy]").prop_map(|(sort, key, value)| {
        let (key, values) = (Arc::from(key), vec![Arc::from(value)]);
        match sort {
            0 => Requirement::In(key, values),
            1 => Requirement::NotIn(key, values),
            2 => Requirement::Exists(key),
            _ => Requirement::DoesNotExist(key),
        }
    });
    prop::collection::vec(requirement, 0..2).prop_map(LabelSelector::new)
}

fn any_name() -> impl Strategy<Value = ObjectName> {
    ("[mn]", "[pqrst]").prop_map(|(namespace, name)| ObjectName::new(&namespace, &name))
}

fn any_evidence() -> impl Strategy<Value = Evidence> {
    let sandbox = prop_oneof![
        Just(Sandbox::Gone),
        Just(Sandbox::Unknown),
        (0..3u32).prop_map(Sandbox::RanAt),
    ];
    let started = prop::option::of(0..3u32);
    (sandbox, started).prop_map(|(sandbox, started)| Evidence { sandbox, started })
}

prop_compose! {
    fn any_pod()(
        name in any_name(),
        (here, host_network, ended, running) in (any::<bool>(), prop::bool::weighted(0.1), prop::bool::weighted(0.1), any::<bool>()),
        evidence in any_evidence(),
        v4 in prop::option::weighted(0.9, 0..6u8),
        v6 in prop::option::of(0..6u8),
        labels in any_labels(),
        port in prop::option::of(("[hg]", 80..83u16)),
    ) -> Pod {
        let v4 = v4.map(|host| IpAddr::from([10, 0, 0, host]));
        let v6 = v6.map(|host| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(host)]));
        Pod {
            name,
            node: Some(if here { "here" } else { "there" }.into()),
            host_network,
            ended,
            running,
            evidence,
            addresses: v4.into_iter().chain(v6).collect(),
            labels,
            owner: None,
            ports: port
                .into_iter()
                .map(|(name, port)| NamedPort { name: name.into(), protocol: Protocol::Tcp, port })
                .collect(),
        }
    }
}

fn any_peer() -> impl Strategy<Value = Peer> {
    let pods = (prop::option::of(any_selector()), any_selector())
        .prop_map(|(namespaces, pods)| Peer::Pods { namespaces, pods });
    let except = prop::collection::vec(0..8u8, 0..3);
    let block = (0..2u8, except).prop_map(|(half, except)| Peer::Block {
        cidr: format!("10.0.0.{}/29", half * 8).parse().unwrap(),
        except: except
            .into_iter()
            .map(|host| format!("10.0.0.{}/32", half * 8 + host).parse().unwrap())
            .collect(),
    });
    prop_oneof![3 => pods, 1 => block]
}

fn any_port() -> impl Strategy<Value = PolicyPort> {
    let port = prop_oneof![
        Just(PortMatch::Any),
        (80..83u16).prop_map(|port| PortMatch::Range(port, 82)),
        "[hg]".prop_map(|name| PortMatch::Named(name.into())),
    ];
    port.prop_map(|port| PolicyPort {
        protocol: Protocol::Tcp,
        port,
    })
}

fn any_rules() -> impl Strategy<Value = Option<Vec<PolicyRule>>> {
    let port = any_port();
    let peers = prop::option::of(prop::collection::vec(any_peer(), 1..3));
    let ports = prop::option::of(prop::collection::vec(port, 1..3));
    let rule = (peers, ports).prop_map(|(peers, ports)| PolicyRule { peers, ports });
    prop::option::of(prop::collection::vec(rule, 0..3))
}

fn any_tier_rules() -> impl Strategy<Value = Vec<TierRule>> {
    let action = prop_oneof![Just(Action::Accept), Just(Action::Deny), Just(Action::Pass)];
    let pods = (any_selector(), any_selector())
        .prop_map(|(namespaces, pods)| TierPeer::Pods { namespaces, pods });
    let network = prop_oneof![
        (0..4u8).prop_map(|part| format!("10.0.0.{}/31", part * 2)),
        Just("fd00::/126".to_owned()),
    ];
    let network = network.prop_map(|network| network.parse().unwrap());
    let networks = prop::collection::vec(network, 1..3).prop_map(TierPeer::Networks);
    let nodes = any_selector().prop_map(TierPeer::Nodes);
    let peer = prop_oneof![4 => pods, 1 => networks, 1 => nodes];
    let peers = prop::option::weighted(0.9, prop::collection::vec(peer, 1..3));
    let protocols = prop::option::of(prop::collection::vec(any_port(), 1..3));
    let rule = (action, peers, protocols).prop_map(|(action, peers, protocols)| TierRule {
        name: None,
        action,
        peers,
        protocols,
    });
    prop::collection::vec(rule, 0..4)
}

prop_compose! {
    fn any_cluster_policy()(
        name in "[pqrs]",
        admin: bool,
        priority in 0..3u16,
        subject_namespaces in any_selector(),
        subject_pods in any_selector(),
        ingress in any_tier_rules(),
        egress in any_tier_rules(),
    ) -> ClusterNetworkPolicy {
        ClusterNetworkPolicy {
            name: ObjectName::new("", &name),
            tier: if admin { Tier::Admin } else { Tier::Baseline },
            priority,
            subject_namespaces,
            subject_pods,
            ingress,
            egress,
        }
    }
}

prop_compose! {
    fn any_node()(
        name in "[uvw]",
        labels in any_labels(),
        hosts in prop::collection::btree_set(4..9u8, 0..3),
    ) -> Node {
        let addresses = hosts.into_iter().map(|host| IpAddr::from([10, 0, 0, host]));
        Node { labels, addresses: addresses.collect(), ..node(&name) }
    }
}

fn any_mode() -> impl Strategy<Value = Option<PolicyMode>> {
    let mode = prop_oneof![1 => Just(PolicyMode::Enforce), 2 => Just(PolicyMode::Audit)];
    prop::option::of(mode)
}

pub(super) fn any_step() -> impl Strategy<Value = Step> {
    let rules = (any_rules(), any_rules());
    let policy = (any_name(), any_selector(), rules, any_mode());
    let policy = policy.prop_map(|(name, pods, (ingress, egress), mode)| {
        Step::Policy(NetworkPolicy {
            name,
            pods,
            ingress,
            egress,
            mode,
        })
    });
    let namespace = "[mn]".prop_map(|name| ObjectName::new("", &name));
    let relabel = (namespace.clone(), any_labels(), any_mode())
        .prop_map(|(name, labels, mode)| Step::Namespace(Namespace { name, labels, mode }));
    prop_oneof![
        8 => any_pod().prop_map(Step::Pod),
        2 => any_name().prop_map(Step::DeletePod),
        2 => relabel,
        1 => namespace.prop_map(Step::DeleteNamespace),
        5 => policy,
        2 => any_name().prop_map(Step::DeletePolicy),
        5 => any_cluster_policy().prop_map(Step::ClusterPolicy),
        2 => "[pqrs]".prop_map(|name| Step::DeleteClusterPolicy(ObjectName::new("", &name))),
        2 => any_node().prop_map(Step::Node),
        1 => "[uvw]".prop_map(|name| Step::DeleteNode(ObjectName::new("", &name))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_history_ends_where_a_new_engine_would_and_its_rules_do_what_the_objects_say(
        strict: bool,
        audit: bool,
        batches in prop::collection::vec(prop::collection::vec(any_step(), 1..6), 1..10),
    ) {
        let mut checked = Checked::with(PolicySettings { audit, ..settings(strict) });
        for batch in batches {
            for step in batch {
                checked.apply(step.into());
            }
            checked.update();
            agree(&checked);
        }
    }
}

/// Returns whether the pod at the end of a direction is one of this node, whose rules decide.
fn here(direction: Direction, connection: &Connection, checked: &Checked) -> bool {
    let address = connection.end(direction);
    let inventory = checked.engine.inventory();
    inventory.isolating(address).next().is_some() || inventory.departed(address).is_some()
}

/// Checks that the rules and the objects allow the same connections.
fn agree(checked: &Checked) {
    let v4 = (0..9u8).map(|host| IpAddr::from([10, 0, 0, host]));
    let v6 = (0..6u16).map(|host| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, host]));
    let [v4, v6]: [Vec<IpAddr>; 2] = [v4.collect(), v6.collect()];
    let asked = [(6, Some(80)), (6, Some(82)), (17, Some(80)), (1, None)];
    for (family, asked) in [(&v4, &asked[..]), (&v6, &asked[..3])] {
        for source in family {
            for destination in family {
                for (protocol, port) in asked {
                    let connection = Connection {
                        source: *source,
                        destination: *destination,
                        protocol: *protocol,
                        port: *port,
                    };
                    let allows = checked.engine.allows(&connection);
                    assert_eq!(
                        walk(&checked.kernel, &connection).passes,
                        allows,
                        "{connection:?}"
                    );
                    let decided = Direction::ALL.map(|direction| {
                        let decision = checked.engine.decide(
                            direction,
                            &connection,
                            &mut KnownProfiles::default(),
                        );
                        decision.is_allowed() || !here(direction, &connection, checked)
                    });
                    assert_eq!(decided == [true, true], allows, "{connection:?}");
                }
            }
        }
    }
}
