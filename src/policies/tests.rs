use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::plans::KnownProfiles;
use super::*;
use crate::engine::{BUDGET, Engine as _};
use crate::model::{
    Action, ClusterNetworkPolicy, Event, Evidence, Family, HostRoute, Kind, LabelSelector, Labels,
    NamedPort, Namespace, NetworkPolicy, Node, Object, ObjectName, ObjectRef, Peer, Pod,
    PolicyMode, PolicyPort, PolicyRule, PortMatch, Protocol, Requirement, Sandbox, Tier, TierPeer,
    TierRule,
};
use crate::nft::{Ruleset, simulate, text};

fn settings(strict: bool) -> PolicySettings {
    PolicySettings {
        node: "here".into(),
        strict,
        ..PolicySettings::default()
    }
}

fn pod(name: &str, address: u8, node: &str, app: &str) -> Pod {
    let (namespace, name) = name.split_once('/').unwrap();
    Pod {
        name: ObjectName::new(namespace, name),
        node: Some(node.into()),
        host_network: false,
        ended: false,
        running: false,
        evidence: Evidence::default(),
        addresses: [IpAddr::from([10, 0, 0, address])].into_iter().collect(),
        labels: [("app", app)].into_iter().collect(),
        owner: None,
        ports: Arc::new([NamedPort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 8000 + u16::from(address % 2),
        }]),
    }
}

fn app(value: &str) -> LabelSelector {
    LabelSelector::new([Requirement::In("app".into(), vec![value.into()])])
}

fn policy(name: &str, pods: LabelSelector) -> NetworkPolicy {
    let (namespace, name) = name.split_once('/').unwrap();
    NetworkPolicy {
        name: ObjectName::new(namespace, name),
        pods,
        ingress: None,
        egress: None,
        mode: None,
    }
}

/// An engine and a model of the kernel that takes its transactions.
struct Checked {
    engine: Engine,
    kernel: Ruleset,
    events: Vec<Event>,
}

impl Checked {
    fn new(strict: bool) -> Self {
        Self::with(settings(strict))
    }

    fn with(settings: PolicySettings) -> Self {
        let mut checked = Self {
            engine: Engine::new(settings),
            kernel: Ruleset::default(),
            events: Vec::new(),
        };
        for kind in Kind::POLICY.into_iter().chain([Kind::Node]) {
            checked.engine.apply(&Event::ListStarted(kind));
            checked.engine.apply(&Event::ListComplete(kind));
        }
        assert!(checked.engine.is_ready());
        checked
    }

    fn apply(&mut self, event: Event) {
        self.engine.apply(&event);
        self.events.push(event);
    }

    /// Writes what changed, and checks that the kernel is then as a new engine wants it.
    /// Returns how many elements and how many operations it took.
    fn update(&mut self) -> (usize, usize) {
        let transaction = self.engine.update(BUDGET).transaction;
        let work = (transaction.elements(), transaction.ops.len());
        for step in transaction.into_steps() {
            simulate::apply(&mut self.kernel, &step).unwrap();
        }
        let is_as = |wanted: Ruleset, of: &str| {
            let difference = crate::nft::diff(&self.kernel, wanted);
            assert!(difference.is_empty(), "{of}: {:#?}", difference.ops);
        };
        is_as(self.engine.ruleset(), "the engine itself");
        is_as(self.engine.snapshot()(), "a copy");
        for (name, chain) in self.kernel.tables.values().flat_map(|table| &table.chains) {
            assert_eq!(is_base_chain(name), chain.base.is_some(), "{name}");
        }
        let mut fresh = Engine::new(self.engine.settings.clone());
        for event in &self.events {
            fresh.apply(event);
        }
        fresh.update(BUDGET);
        is_as(fresh.ruleset(), "a new engine");
        self.check_deciding_parts();
        work
    }

    /// Checks that what decides about connections of the isolated addresses is in the kernel, and that
    /// it denies what the policies deny.
    fn check_deciding_parts(&self) {
        let isolated: Vec<IpAddr> = self.engine.isolated().map(|(address, _)| address).collect();
        for (address, port) in isolated.iter().rev().zip(80..83) {
            let family = Family::of(*address);
            let peers = isolated.iter().take(3);
            let peers = peers.filter(|it| Family::of(**it) == family);
            for (peer, direction) in peers.flat_map(|peer| Direction::ALL.map(|it| (*peer, it))) {
                let (source, destination) = match direction {
                    Direction::Egress => (*address, peer),
                    Direction::Ingress => (peer, *address),
                };
                let connection = Connection {
                    source,
                    destination,
                    protocol: 6,
                    port: Some(port),
                };
                let parts = self.engine.deciding_parts(direction, &connection);
                for part in &parts {
                    assert!(part.is_in(&self.kernel), "{connection:?}: {part:?}");
                }
                let decision =
                    self.engine
                        .decide(direction, &connection, &mut KnownProfiles::default());
                let counts = parts
                    .last()
                    .is_some_and(|last| last.object().starts_with("set denied"));
                let closed = self.engine.is_closed_to(*address);
                assert!(
                    closed || counts != decision.is_allowed(),
                    "{connection:?}: {parts:?}"
                );
            }
        }
    }
}

fn apply_pod(pod: Pod) -> Event {
    Event::Apply(Object::Pod(pod))
}

fn apply_policy(policy: NetworkPolicy) -> Event {
    Event::Apply(Object::NetworkPolicy(policy))
}

/// `web` of this node may be reached by `client`s of the namespace.
fn shop() -> Checked {
    let mut checked = Checked::new(false);
    checked.apply(apply_pod(pod("shop/web", 1, "here", "web")));
    checked.apply(apply_pod(pod("shop/client", 2, "there", "client")));
    let from = Peer::Pods {
        namespaces: None,
        pods: app("client"),
    };
    let rule = PolicyRule {
        peers: Some(vec![from]),
        ports: Some(vec![PolicyPort {
            protocol: Protocol::Tcp,
            port: PortMatch::Range(80, 80),
        }]),
    };
    checked.apply(apply_policy(NetworkPolicy {
        ingress: Some(vec![rule]),
        ..policy("shop/web", app("web"))
    }));
    checked.update();
    checked
}

#[test]
fn a_remote_pod_is_one_element() {
    let mut checked = shop();
    checked.apply(apply_pod(pod("shop/another", 3, "there", "client")));
    assert_eq!(checked.update(), (1, 1), "added");
    checked.apply(apply_pod(pod("shop/another", 3, "there", "other")));
    assert_eq!(checked.update(), (1, 1), "relabelled");
    checked.apply(apply_pod(pod("shop/another", 3, "there", "client")));
    checked.update();
    let name = ObjectName::new("shop", "another");
    checked.apply(Event::Delete(ObjectRef::new(Kind::Pod, name)));
    assert_eq!(checked.update(), (1, 1), "removed");
    checked.apply(apply_pod(pod("other/another", 3, "there", "client")));
    assert_eq!(checked.update(), (0, 0), "of another namespace");
}

#[test]
fn without_policies_there_is_no_table() {
    let mut checked = shop();
    assert_eq!(checked.kernel.tables.len(), 2);
    let name = ObjectName::new("shop", "web");
    checked.apply(Event::Delete(ObjectRef::new(Kind::NetworkPolicy, name)));
    checked.update();
    assert!(checked.kernel.tables.is_empty());
}

#[test]
fn a_pod_without_policies_has_no_chain() {
    let mut checked = shop();
    let before = checked.kernel.clone();
    checked.apply(apply_pod(pod("shop/free", 4, "here", "free")));
    checked.update();
    assert_eq!(checked.kernel, before);
    let policy = policy("far/away", app("web"));
    checked.apply(apply_policy(NetworkPolicy {
        egress: Some(Vec::new()),
        ..policy
    }));
    checked.update();
    assert_eq!(
        checked.kernel, before,
        "a policy that selects no pod of this node"
    );
}

#[test]
fn nothing_is_compiled_while_a_list_is_read() {
    let mut engine = Engine::new(settings(false));
    assert!(!engine.is_ready());
    for kind in Kind::POLICY {
        engine.apply(&Event::ListStarted(kind));
        assert!(!engine.is_ready());
        engine.apply(&Event::ListComplete(kind));
    }
    assert!(engine.is_ready());
    engine.apply(&Event::ListStarted(Kind::Pod));
    assert!(!engine.is_ready());
}

#[test]
fn the_rules_read_like_the_policy() {
    let checked = shop();
    let mut printed = Vec::new();
    text::render(&checked.kernel, &mut printed).unwrap();
    let printed = String::from_utf8(printed).unwrap();
    for line in [
        "comment \"pods app=client in namespace shop\"",
        "10.0.0.1 : goto pods-ingress-",
        "elements = { 10.0.0.1 . 10.0.0.1 }",
        "ip saddr . ip daddr @to-itself accept",
        "jump policy-ingress-shop/web",
        "goto deny-ingress",
        "meta l4proto tcp th dport 80 accept",
    ] {
        assert!(printed.contains(line), "{line} is not in\n{printed}");
    }
}

#[test]
fn names_of_sets_do_not_depend_on_the_order_of_events() {
    let sets = |ruleset: &Ruleset| -> BTreeMap<_, Vec<_>> {
        let tables = ruleset.tables.iter();
        tables
            .map(|(id, table)| (id.clone(), table.sets.keys().cloned().collect()))
            .collect()
    };
    let one = shop();
    let mut other = Checked::new(false);
    for event in one.events.iter().rev() {
        other.apply(event.clone());
    }
    other.update();
    assert_eq!(sets(&one.kernel), sets(&other.kernel));
}

/// The rules of a chain, as text.
fn chain(ruleset: &Ruleset, name: &str) -> Vec<String> {
    let table = &ruleset.tables[&table_id(crate::model::Family::V4)];
    let rules = table.chains[name].rules.iter();
    rules
        .map(|rule| text::rule(rule, crate::nft::TableFamily::Ip))
        .collect()
}

#[test]
fn the_rules_of_a_policy_grow_with_its_peers_and_its_ports_and_not_with_their_product() {
    let mut checked = shop();
    let peers = (0..100).map(|number| Peer::Pods {
        namespaces: None,
        pods: app(&format!("client-{number}")),
    });
    let ports = (0..100u16).map(|number| PolicyPort {
        protocol: Protocol::Tcp,
        port: match number % 2 {
            0 => PortMatch::Range(1000 + 10 * number, 1000 + 10 * number),
            _ => PortMatch::Named(format!("port-{number}").into()),
        },
    });
    let rule = PolicyRule {
        peers: Some(peers.collect()),
        ports: Some(ports.collect()),
    };
    checked.apply(apply_policy(NetworkPolicy {
        ingress: Some(vec![rule]),
        ..policy("shop/web", app("web"))
    }));
    checked.update();
    let rules = chain(&checked.kernel, "policy-ingress-shop/web");
    assert_eq!(rules.len(), 200);
    let table = &checked.kernel.tables[&table_id(crate::model::Family::V4)];
    let ports = table
        .sets
        .iter()
        .find(|(name, _)| name.as_str().starts_with("ports-"));
    assert_eq!(ports.map(|(_, set)| set.elements.len()), Some(50));
}

#[test]
fn ports_that_are_one_range_need_no_set() {
    let mut checked = shop();
    let of = |ports: &[PortMatch]| {
        let ports = ports.iter().map(|port| PolicyPort {
            protocol: Protocol::Tcp,
            port: port.clone(),
        });
        let rule = PolicyRule {
            peers: None,
            ports: Some(ports.collect()),
        };
        checked.apply(apply_policy(NetworkPolicy {
            ingress: Some(vec![rule]),
            ..policy("shop/web", app("web"))
        }));
        checked.update();
        chain(&checked.kernel, "policy-ingress-shop/web").join("; ")
    };
    let mut of = of;
    use PortMatch::{Any, Range};
    assert_eq!(
        of(&[Range(80, 81), Range(82, 90)]),
        "meta l4proto tcp th dport 80-90 accept"
    );
    assert_eq!(of(&[Range(80, 80), Any]), "meta l4proto tcp accept");
    let set = of(&[Range(80, 80), Range(82, 82)]);
    assert!(
        set.starts_with("meta l4proto tcp th dport @ports-"),
        "{set}"
    );
}

#[test]
fn the_interfaces_of_isolated_pods_are_known_by_direction() {
    let mut engine = Engine::new(settings(false));
    engine.apply(&routes(&[("10.0.0.1/32", "br0"), ("10.0.0.2/32", "br0")]));
    for kind in Kind::POLICY {
        engine.apply(&Event::ListStarted(kind));
        engine.apply(&Event::ListComplete(kind));
    }
    let mut kernel = Ruleset::default();
    let mut update = |events: Vec<Event>| {
        for event in events {
            engine.apply(&event);
        }
        for step in engine.update(BUDGET).transaction.into_steps() {
            simulate::apply(&mut kernel, &step).unwrap();
        }
        assert_eq!(kernel, engine.ruleset());
        let table = &kernel.tables[&table_id(crate::model::Family::V6)];
        ["ingress-links", "egress-links"].map(|name| table.sets[name].elements.len())
    };
    let closed = NetworkPolicy {
        ingress: Some(Vec::new()),
        ..policy("shop/closed", app("web"))
    };
    let events = vec![
        apply_pod(pod("shop/web", 1, "here", "web")),
        apply_pod(pod("shop/more", 2, "here", "web")),
        apply_pod(pod("shop/far", 3, "here", "web")),
        apply_policy(closed.clone()),
    ];
    assert_eq!(update(events), [1, 0], "one bridge has them all");
    let both = NetworkPolicy {
        egress: Some(Vec::new()),
        ..closed
    };
    assert_eq!(update(vec![apply_policy(both)]), [1, 1]);
    let relabelled = |name, address| apply_pod(pod(name, address, "here", "free"));
    assert_eq!(update(vec![relabelled("shop/web", 1)]), [1, 1]);
    assert_eq!(update(vec![relabelled("shop/more", 2)]), [0, 0]);
}

#[test]
fn the_interfaces_follow_the_routes() {
    let mut engine = Engine::new(settings(false));
    for kind in Kind::POLICY {
        engine.apply(&Event::ListStarted(kind));
        engine.apply(&Event::ListComplete(kind));
    }
    let mut kernel = Ruleset::default();
    let mut update = |event: &Event| {
        engine.apply(event);
        let transaction = engine.update(BUDGET).transaction;
        let changed = transaction.elements();
        for step in transaction.into_steps() {
            simulate::apply(&mut kernel, &step).unwrap();
        }
        assert_eq!(kernel, engine.ruleset());
        changed
    };
    let bridge = routes(&[("10.0.0.0/24", "br0")]);
    update(&apply_pod(pod("shop/web", 1, "here", "web")));
    assert_eq!(update(&bridge), 0, "no pod is isolated");
    update(&routes(&[]));
    update(&apply_policy(NetworkPolicy {
        ingress: Some(Vec::new()),
        ..policy("shop/closed", app("web"))
    }));
    assert_eq!(update(&bridge), 1);
    assert_eq!(update(&bridge), 0, "nothing is different");
    let others = routes(&[("10.0.0.0/24", "br0"), ("10.9.0.0/16", "br1")]);
    assert_eq!(update(&others), 0, "no pod is there");
    let own = routes(&[("10.0.0.0/24", "br0"), ("10.0.0.1/32", "cali1")]);
    assert_eq!(update(&own), 2, "one goes, one comes");
    assert_eq!(update(&routes(&[])), 1);
}

fn routes(routes: &[(&str, &str)]) -> Event {
    let routes = routes.iter().map(|(network, interface)| HostRoute {
        network: network.parse().unwrap(),
        interface: (*interface).into(),
    });
    Event::Routes(routes.collect())
}

mod addresses;
mod audit;
mod cluster;
mod histories;
mod startup;
mod walk;
mod work;
