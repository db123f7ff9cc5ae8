//! What is answered about services is what the compiled rules do, for random services.

use std::collections::BTreeSet;
use std::net::IpAddr;

use proptest::prelude::*;

use super::answer::{Action, Code};
use super::service::{Compiled, Destination, Source, judge};
use super::*;
use crate::engine::{BUDGET, Engine as _};
use crate::model::{
    Endpoint, EndpointSlice, Event, Family, Hints, Kind, LabelSelector, Labels, NetworkPolicy,
    Node, NodePortAddresses, Object, ObjectRef, Pod, Protocol, Service, ServiceCidr, ServiceKind,
    ServicePort, SlicePort, TrafficPolicy,
};
use crate::nft::Ruleset;
use crate::policies::{PodNetwork, PolicySettings};
use crate::services::{self, DetectLocal, Marks};

mod walk;

use walk::{End, Packet, walk};

const NODE: &str = "node-1";
/// The interfaces of the pods of this node, and of the network.
const INTERFACES: [&str; 2] = ["cni0", "eth0"];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Returns an address of a family with this last byte.
fn of(family: Family, [v4, v6]: [&str; 2], last: u8) -> IpAddr {
    match family {
        Family::V4 => ip(&format!("{v4}.{last}")),
        Family::V6 => ip(&format!("{v6}::{last:x}")),
    }
}

const CLUSTER: [&str; 2] = ["10.96.0", "fd00:10:96"];
const OUTSIDE: [&str; 2] = ["203.0.113", "2001:db8:1"];
/// The pods of this node, and of the other one.
const PODS: [[&str; 2]; 2] = [["10.244.1", "fd00:10:244:1"], ["10.244.2", "fd00:10:244:2"]];
const NODES: [&str; 2] = ["192.168.10", "fd00:192"];

fn any_policy() -> impl Strategy<Value = TrafficPolicy> {
    prop_oneof![
        2 => Just(TrafficPolicy::Cluster),
        1 => Just(TrafficPolicy::Local),
    ]
}

/// An endpoint: its last byte, conditions, node, and hints.
fn any_endpoint() -> impl Strategy<Value = (u8, Endpoint)> {
    let conditions = prop_oneof![
        4 => Just((true, true, false)),
        1 => Just((false, false, false)),
        1 => Just((false, true, true)),
        1 => Just((false, false, true)),
    ];
    let node = prop_oneof![Just(Some("node-1")), Just(Some("node-2")), Just(None),];
    let hints = prop_oneof![
        3 => Just(None),
        1 => prop::sample::select(vec!["a", "b"]).prop_map(Some),
    ];
    (1..6u8, conditions, node, hints).prop_map(
        |(last, (ready, serving, terminating), node, zone)| {
            let address = ip("192.0.2.1");
            let hints = zone.map(|zone| {
                Hints {
                    zones: Some([zone.into()].into()),
                    nodes: None,
                }
                .into()
            });
            let endpoint = Endpoint {
                address,
                ready,
                serving,
                terminating,
                node: node.map(Into::into),
                hints,
            };
            (last, endpoint)
        },
    )
}

/// A service with its slices. Some addresses and ports are also those of another one.
fn any_service(number: u8) -> impl Strategy<Value = Vec<Event>> {
    let kind = prop::sample::select(vec![
        ServiceKind::ClusterIp,
        ServiceKind::NodePort,
        ServiceKind::LoadBalancer,
    ]);
    let flags = prop::collection::vec(any::<bool>(), 5);
    let policies = (any_policy(), any_policy());
    let ranges = prop::sample::subsequence(
        vec![
            "203.0.113.0/25",
            "10.244.1.0/24",
            "192.168.10.1/32",
            "2001:db8:1::/64",
        ],
        0..3,
    );
    let endpoints = prop::collection::vec(any_endpoint(), 0..6);
    (kind, flags, policies, ranges, endpoints, 0..3u8).prop_map(
        move |(kind, flags, (internal, external), ranges, endpoints, shared)| {
            let families = if flags[0] {
                &Family::ALL[..]
            } else {
                &Family::ALL[..1]
            };
            let name = ObjectName::new("shop", &format!("service-{number}"));
            let port = |protocol, port: u16, node_port: u16| ServicePort {
                name: format!("p{port}").into(),
                protocol,
                port,
                node_port: (kind != ServiceKind::ClusterIp).then_some(node_port),
            };
            let external_kind = kind == ServiceKind::LoadBalancer;
            let addresses = |parts, last| {
                let all = families.iter().map(move |family| of(*family, parts, last));
                all.collect::<Vec<IpAddr>>()
            };
            let service = Service {
                name: name.clone(),
                created: Some(number.into()),
                kind,
                cluster_ips: addresses(CLUSTER, number),
                ports: vec![
                    port(Protocol::Tcp, 80, 30_080 + u16::from(number)),
                    port(Protocol::Udp, 53, 30_080 + u16::from(shared)),
                ],
                external_ips: if flags[1] {
                    addresses(OUTSIDE, 100 + shared)
                } else {
                    vec![]
                },
                load_balancer_ips: match external_kind {
                    true => addresses(OUTSIDE, 150 + number),
                    false => vec![],
                },
                source_ranges: match external_kind {
                    true => ranges.iter().map(|range| range.parse().unwrap()).collect(),
                    false => vec![],
                },
                external_policy: external,
                internal_policy: internal,
                affinity_seconds: flags[2].then_some(60),
                health_check_node_port: None,
            };
            let mut events = Vec::new();
            for family in families {
                let endpoints = endpoints.iter().map(|(last, endpoint)| {
                    let place = PODS[usize::from(endpoint.node.as_deref() != Some(NODE))];
                    Endpoint {
                        address: of(*family, place, *last),
                        ..endpoint.clone()
                    }
                });
                let ports = service.ports.iter().map(|port| SlicePort {
                    name: port.name.clone(),
                    protocol: port.protocol,
                    port: 8000 + port.port,
                });
                events.push(Event::Apply(Object::EndpointSlice(EndpointSlice {
                    name: ObjectName::new("shop", &format!("slice-{number}-{family:?}")),
                    service: name.clone(),
                    created: None,
                    family: *family,
                    ports: ports.collect(),
                    endpoints: endpoints.collect(),
                    triggered_at_ms: None,
                })));
            }
            events.push(Event::Apply(Object::Service(service)));
            events
        },
    )
}

fn any_settings() -> impl Strategy<Value = ServiceSettings> {
    let networks = |texts: &[&str]| texts.iter().map(|it| it.parse().unwrap()).collect();
    let detect = prop::sample::select(vec![
        DetectLocal::ClusterCidr(networks(&["10.244.0.0/16", "fd00:10:244::/48"])),
        DetectLocal::ClusterCidr(networks(&["10.244.0.0/16"])),
        DetectLocal::ClusterCidr(vec![]),
        DetectLocal::NodeCidr,
        DetectLocal::BridgeInterface("cni0".into()),
        DetectLocal::InterfaceNamePrefix("cni".into()),
    ]);
    let node_ports = prop::sample::select(vec![
        NodePortAddresses::Primary,
        NodePortAddresses::Inside(networks(&["192.168.10.2/32"])),
        NodePortAddresses::Inside(networks(&["0.0.0.0/0", "::/0"])),
    ]);
    (detect, any::<bool>(), node_ports).prop_map(|(detect_local, masquerade_all, node_ports)| {
        ServiceSettings {
            detect_local,
            masquerade_all,
            nodeport_addresses: node_ports,
            ..ServiceSettings::default()
        }
    })
}

/// The own node has two addresses of each family.
fn node() -> Node {
    let addresses: Vec<IpAddr> = Family::ALL
        .into_iter()
        .flat_map(|family| [1, 2].map(|last| of(family, NODES, last)))
        .collect();
    Node {
        name: NODE.into(),
        internal_ips: addresses.clone(),
        external_ips: vec![],
        pod_cidrs: vec![
            "10.244.1.0/24".parse().unwrap(),
            "fd00:10:244:1::/64".parse().unwrap(),
        ],
        zone: Some("a".into()),
        going_away: false,
        labels: Labels::default(),
        addresses: addresses.into(),
    }
}

fn pod(node: &str, addresses: [IpAddr; 2]) -> Pod {
    Pod {
        name: ObjectName::new("shop", &format!("pod-{}", addresses[0])),
        node: Some(node.into()),
        host_network: false,
        ended: false,
        running: true,
        evidence: Default::default(),
        addresses: addresses.into_iter().collect(),
        labels: Labels::default(),
        owner: None,
        ports: Default::default(),
    }
}

/// A source with the interface by which its packets come.
fn sources(family: Family) -> Vec<(IpAddr, Option<&'static str>)> {
    vec![
        (of(family, PODS[0], 1), Some(INTERFACES[0])),
        (of(family, PODS[0], 9), Some(INTERFACES[0])),
        (of(family, PODS[1], 1), Some(INTERFACES[1])),
        (of(family, OUTSIDE, 9), Some(INTERFACES[1])),
        (of(family, OUTSIDE, 200), Some(INTERFACES[1])),
        (of(family, NODES, 1), None),
        (of(family, NODES, 2), None),
        (of(family, NODES, 7), Some(INTERFACES[1])),
    ]
}

fn destinations(family: Family, services: u8) -> Vec<(IpAddr, u16)> {
    let mut addresses: Vec<IpAddr> = vec![
        of(family, CLUSTER, 99),
        of(family, OUTSIDE, 250),
        of(family, PODS[1], 3),
    ];
    for number in 0..=services {
        addresses.push(of(family, CLUSTER, number));
        addresses.push(of(family, OUTSIDE, 100 + number));
        addresses.push(of(family, OUTSIDE, 150 + number));
    }
    let ports = |address: IpAddr| [80, 53, 81].map(|port| (address, port));
    let mut all: Vec<(IpAddr, u16)> = addresses.into_iter().flat_map(ports).collect();
    for last in [1, 2] {
        let node = of(family, NODES, last);
        all.extend((30_080..=30_080 + u16::from(services)).map(|port| (node, port)));
        all.push((node, 80));
    }
    all
}

/// What an answer says, in the words of the walk.
fn answered(
    facts: &Facts,
    source: &Source,
    to: &Destination,
    compiled: &mut Compiled,
) -> BTreeSet<End> {
    let judged = judge(facts, source, to, compiled);
    let on = |translated| {
        let targets = judged.targets.iter();
        targets.map(move |(address, port)| End::On {
            to: (*address, port.unwrap()),
            translated,
            masqueraded: judged.step.masquerade,
        })
    };
    match judged.step.action {
        Action::Dnat => on(true).collect(),
        Action::None => on(false).collect(),
        Action::Reject => [End::Rejected].into(),
        Action::Drop => [End::Dropped].into(),
    }
}

/// The cluster as the rules and the answers have it.
fn world(settings: &ServiceSettings, services: Vec<Vec<Event>>) -> (Store, Engine, Ruleset) {
    let mut store = settings.store(Store::with_fallback_node(node()));
    let mut policies = Engine::new(PolicySettings {
        node: NODE.into(),
        ..PolicySettings::default()
    });
    let cidrs = ["10.96.0.0/16", "fd00:10:96::/108"];
    let range = ServiceCidr {
        name: ObjectName::new("", "kubernetes"),
        cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
    };
    let mut events = vec![
        Event::Apply(Object::Node(node())),
        Event::Apply(Object::ServiceCidr(range)),
    ];
    for (place, node) in [(PODS[0], NODE), (PODS[1], "node-2")] {
        for last in [1, 9] {
            let addresses = Family::ALL.map(|family| of(family, place, last));
            events.push(Event::Apply(Object::Pod(pod(node, addresses))));
        }
    }
    events.extend(services.into_iter().flatten());
    for event in events {
        policies.apply(&event);
        store.apply(event, &mut Marks::default());
    }
    let (ruleset, notices) = services::wanted(&store, settings);
    assert!(notices.is_empty(), "{notices:?}");
    (store, policies, ruleset)
}

fn facts_of<'a>(
    store: &'a Store,
    settings: &'a ServiceSettings,
    policies: &'a Engine,
) -> Facts<'a> {
    Facts {
        store,
        settings,
        policies,
        node: NODE,
        has_node: true,
        rules: true,
        most_pairs: None,
        is_refused: &|_| false,
        unfiltered: &[],
        others: None,
    }
}

proptest! {
    // Each case is about 1,800 questions.
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn answers_about_services_are_what_their_rules_do(
        settings in any_settings(),
        services in [any_service(0), any_service(1), any_service(2)],
    ) {
        let services: Vec<Vec<Event>> = services.into();
        let most = services.len() as u8;
        let (store, policies, ruleset) = world(&settings, services);
        let facts = facts_of(&store, &settings, &policies);
        let mut compiled = Compiled::default();
        for family in Family::ALL {
            let finder = services::ServiceParts::new(family, &store, &settings).unwrap();
            for (address, input) in sources(family) {
                let source = service::source_of(&facts, address);
                for (to, port) in destinations(family, most) {
                    for protocol in [Protocol::Tcp, Protocol::Udp] {
                        let packet = Packet {
                            source: address,
                            destination: to,
                            protocol: protocol.number(),
                            port,
                            input,
                            local: node().internal_ips,
                        };
                        let walked = walk(&ruleset, &packet, settings.masquerade_bit.mark());
                        let destination = Destination {
                            address: to,
                            protocol: Some(protocol),
                            port: Some(port),
                        };
                        let answered = answered(&facts, &source, &destination, &mut compiled);
                        prop_assert_eq!(answered, walked, "{:?}", packet);
                        let asked = service::asked(&facts, &destination, &mut compiled);
                        let is_service = !matches!(asked, service::Asked::NoService);
                        let parts = rules::of_service(&facts, &finder, &source, to, &asked);
                        prop_assert_eq!(is_service, !parts.is_empty(), "{:?}", packet);
                        for part in parts {
                            prop_assert!(part.is_in(&ruleset), "{:?}: {:?}", packet, part);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn what_a_bridge_switches_past_the_rules_is_allowed() {
    let settings = ServiceSettings::default();
    let (store, mut policies, _) = world(&settings, Vec::new());
    policies.apply(&Event::Apply(Object::NetworkPolicy(NetworkPolicy {
        name: ObjectName::new("shop", "deny"),
        pods: LabelSelector::default(),
        ingress: Some(Vec::new()),
        egress: None,
        mode: None,
    })));
    policies.update(BUDGET);
    let networks: [IpNet; 1] = ["10.244.1.0/24".parse().unwrap()];
    let code = |unfiltered: &[IpNet], from: &str, to: &str| {
        let facts = Facts {
            unfiltered,
            ..facts_of(&store, &settings, &policies)
        };
        let question = Question::new(from, to).unwrap();
        let answer = explain(&facts, &question, &mut Compiled::default()).unwrap();
        // What no rule sees, none decides.
        let rules = answer.targets[0].ingress.rules.as_ref().unwrap();
        assert_eq!(rules.is_empty(), answer.code == Code::BridgeUnfiltered);
        (answer.verdict, answer.code)
    };
    let denied = (Verdict::Denied, Code::PolicyNoRule);
    assert_eq!(code(&[], "10.244.1.1", "10.244.1.9:80"), denied);
    assert_eq!(
        code(&networks, "10.244.1.1", "10.244.1.9:80"),
        (Verdict::Allowed, Code::BridgeUnfiltered)
    );
    assert_eq!(code(&networks, "10.244.2.1", "10.244.1.9:80"), denied);
}

#[test]
fn a_service_that_the_kernel_refused_has_no_rules() {
    let settings = ServiceSettings::default();
    let mut web = Service {
        name: ObjectName::new("shop", "web"),
        created: None,
        kind: ServiceKind::ClusterIp,
        cluster_ips: vec![ip("10.96.0.10")],
        ports: vec![ServicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }],
        external_ips: vec![],
        load_balancer_ips: vec![],
        source_ranges: vec![],
        external_policy: TrafficPolicy::Cluster,
        internal_policy: TrafficPolicy::Cluster,
        affinity_seconds: None,
        health_check_node_port: None,
    };
    let apply = |service: &Service| vec![Event::Apply(Object::Service(service.clone()))];
    let refused = web.name.clone();
    let (store, policies, _) = world(&settings, vec![apply(&web)]);
    let code = |is_refused: &dyn Fn(&ObjectName) -> bool, to: &str| {
        let facts = Facts {
            is_refused,
            ..facts_of(&store, &settings, &policies)
        };
        let question = Question::new("10.244.1.1", to).unwrap();
        let answer = explain(&facts, &question, &mut Compiled::default()).unwrap();
        (answer.code, answer.warnings.len())
    };
    let none: &dyn Fn(&ObjectName) -> bool = &|_| false;
    let this: &dyn Fn(&ObjectName) -> bool = &|name| *name == refused;
    for to in ["svc/shop/web:80", "10.96.0.10:80"] {
        assert_eq!(code(none, to), (Code::ServiceNoEndpoints, 0), "{to}");
        assert_eq!(code(this, to), (Code::ServiceAddressUnknown, 1), "{to}");
    }
    // What the rules do with the address of a service without rules.
    web.kind = ServiceKind::Headless;
    let (.., ruleset) = world(&settings, vec![apply(&web)]);
    let packet = Packet {
        source: ip("10.244.1.1"),
        destination: ip("10.96.0.10"),
        protocol: Protocol::Tcp.number(),
        port: 80,
        input: Some(INTERFACES[0]),
        local: node().internal_ips,
    };
    assert_eq!(walk(&ruleset, &packet, 1), [End::Dropped].into());
}

#[test]
fn the_own_node_reaches_addresses_of_pods_that_are_not_known() {
    let settings = ServiceSettings::default();
    let (store, ..) = world(&settings, Vec::new());
    let mut policies = Engine::new(PolicySettings {
        node: NODE.into(),
        closed: Some(PodNetwork::NodeCidr),
        ..PolicySettings::default()
    });
    policies.apply(&Event::Apply(Object::Node(node())));
    policies.update(BUDGET);
    let facts = facts_of(&store, &settings, &policies);
    let code = |from: &str| {
        let question = Question::new(from, "10.244.1.77:80").unwrap();
        let answer = explain(&facts, &question, &mut Compiled::default()).unwrap();
        (answer.verdict, answer.code)
    };
    assert_eq!(code("node"), (Verdict::Allowed, Code::NodeToOwnPod));
    assert_eq!(code("203.0.113.9"), (Verdict::Denied, Code::PodUnknown));
}

#[test]
fn other_nodes_are_kept_as_far_as_there_is_room() {
    let mut others = OtherNodes::new(ServiceSettings::default());
    // So many objects that only a few copies of them are kept.
    let gone = ObjectRef::new(Kind::Node, ObjectName::new("", "gone"));
    for _ in 0..70_000 {
        others.add(&Event::Delete(gone.clone()));
    }
    let name = |number: usize| format!("other-{number}");
    for number in 0..20 {
        others.add(&Event::Apply(Object::Node(Node {
            name: name(number).into(),
            ..node()
        })));
    }
    let settings = ServiceSettings::default();
    let (store, policies, _) = world(&settings, Vec::new());
    let facts = Facts {
        others: Some(&others),
        ..facts_of(&store, &settings, &policies)
    };
    // One after the other, all can be asked about; at once, only some.
    assert!((0..20).all(|number| facts.other_node(&name(number)).is_some()));
    let nodes = (0..20).map(|number| facts.other_node(&name(number)));
    let nodes: Vec<_> = nodes.collect();
    assert_eq!(nodes.iter().flatten().count(), 8);
    assert!(facts.other_node("missing").is_none());
}
