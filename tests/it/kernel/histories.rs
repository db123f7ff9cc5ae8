//! Random histories of objects in a real kernel: however changes arrive, the kernel ends where
//! a fresh start with the final objects would bring it.

use std::net::IpAddr;

use nftlet::model::{
    Delivery, Endpoint, EndpointSlice, Event, Family, Kind, Node, Object, ObjectName, ObjectRef,
    Protocol, Service, ServiceKind, ServicePort, SlicePort, TrafficPolicy,
};
use nftlet::netlink::Nftables;
use nftlet::serve::metrics::Registry;
use nftlet::services::{DetectLocal, ServiceSettings, TABLE};
use nftlet::sync::{Controller, Log, Outcome, SyncMetrics};
use nftlet_lab::netns::{Namespace, require_net_admin};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::support::clock;

fn service(index: u8, v6: bool, external: bool, node_port: bool, protocol: Protocol) -> Object {
    let mut cluster_ips = vec![IpAddr::from([10, 96, 0, index])];
    if v6 {
        cluster_ips.push(format!("fd00:10:96::{index:x}").parse().unwrap());
    }
    Object::Service(Service {
        name: ObjectName::new("shop", &format!("s{index}")),
        created: Some(i64::from(index)),
        kind: ServiceKind::NodePort,
        cluster_ips,
        ports: vec![ServicePort {
            name: "main".into(),
            protocol,
            port: 80,
            // Shared by two services each, so that there are conflicts.
            node_port: node_port.then_some(30_000 + u16::from(index / 2)),
        }],
        external_ips: external
            .then(|| IpAddr::from([198, 51, 100, index / 2]))
            .into_iter()
            .collect(),
        load_balancer_ips: vec![],
        source_ranges: vec![],
        external_policy: TrafficPolicy::Cluster,
        internal_policy: TrafficPolicy::Cluster,
        affinity_seconds: None,
        health_check_node_port: None,
    })
}

fn slice(index: u8, v6: bool, protocol: Protocol, endpoints: &[u8]) -> Object {
    let (family, tag) = if v6 {
        (Family::V6, "v6")
    } else {
        (Family::V4, "v4")
    };
    let address = |last: u8| match family {
        Family::V4 => IpAddr::from([10, 244, 1, last]),
        Family::V6 => format!("fd00:10:244:1::{last:x}").parse().unwrap(),
    };
    Object::EndpointSlice(EndpointSlice {
        name: ObjectName::new("shop", &format!("s{index}-{tag}")),
        service: ObjectName::new("shop", &format!("s{index}")),
        created: None,
        family,
        ports: vec![SlicePort {
            name: "main".into(),
            protocol,
            port: 8080,
        }],
        endpoints: endpoints
            .iter()
            .map(|last| Endpoint {
                address: address(*last),
                ready: last % 5 != 0,
                serving: true,
                terminating: false,
                node: Some(if last % 2 == 0 { "node-1" } else { "node-2" }.into()),
                hints: None,
            })
            .collect(),
        triggered_at_ms: None,
    })
}

fn event() -> impl Strategy<Value = Event> {
    let protocol = prop_oneof![
        3 => Just(Protocol::Tcp),
        1 => Just(Protocol::Udp),
        1 => Just(Protocol::Sctp)
    ];
    let put_service = (0u8..6, any::<[bool; 3]>(), protocol.clone())
        .prop_map(|(i, [a, b, c], protocol)| Event::Apply(service(i, a, b, c, protocol)));
    let put_slice = (0u8..6, any::<bool>(), protocol, vec(1u8..12, 0..6))
        .prop_map(|(i, v6, protocol, e)| Event::Apply(slice(i, v6, protocol, &e)));
    let remove = (0u8..6, 0u8..3).prop_map(|(i, what)| {
        let (kind, name) = match what {
            0 => (Kind::Service, format!("s{i}")),
            1 => (Kind::EndpointSlice, format!("s{i}-v4")),
            _ => (Kind::EndpointSlice, format!("s{i}-v6")),
        };
        Event::Delete(ObjectRef::new(kind, ObjectName::new("shop", &name)))
    });
    prop_oneof![3 => put_service, 4 => put_slice, 2 => remove]
}

fn first_lists() -> Vec<Event> {
    let node = Node {
        name: "node-1".into(),
        internal_ips: vec![
            "192.168.10.1".parse().unwrap(),
            "fd00:192:168:10::1".parse().unwrap(),
        ],
        external_ips: vec![],
        pod_cidrs: vec![],
        zone: None,
        going_away: false,
        labels: Default::default(),
        addresses: Default::default(),
    };
    let mut events: Vec<_> = Kind::ALL.map(Event::ListStarted).into();
    events.push(Event::Apply(Object::Node(node)));
    events.extend(Kind::ALL.map(Event::ListComplete));
    events
}

/// `nft list ruleset` without the indexes of endpoints and without chains nothing leads to:
/// what depends on the history and not on the objects.
fn meaning(listing: &str) -> Vec<String> {
    let without_index = |line: &str| -> String {
        let Some((key, data)) = line.split_once(" : ") else {
            return line.to_owned();
        };
        match key.rsplit_once(" . ") {
            Some((frontend, index)) if index.starts_with("0:") && data.contains(" . ") => {
                format!("{frontend} . # : {data}")
            }
            _ => line.to_owned(),
        }
    };
    let mut lines: Vec<String> = listing
        .lines()
        .map(|line| line.trim().trim_start_matches("elements = { "))
        .map(|line| line.trim_end_matches([',', ' ', '}']))
        .map(without_index)
        .collect();
    lines.sort();
    lines
}

#[test]
fn histories_end_in_the_kernel_where_a_fresh_start_would() {
    if !require_net_admin() {
        return;
    }
    let registry = Registry::new().unwrap();
    let metrics = SyncMetrics::register(&registry).unwrap();
    let settings = ServiceSettings {
        detect_local: DetectLocal::ClusterCidr(vec![
            "10.244.0.0/16".parse().unwrap(),
            "fd00:10:244::/48".parse().unwrap(),
        ]),
        ..ServiceSettings::default()
    };
    let mut runner = TestRunner::new(Config {
        cases: 24,
        failure_persistence: None,
        ..Config::default()
    });
    let histories = vec(vec(event(), 1..8), 1..20);
    let runtime = clock::paused();
    let _entered = runtime.enter();
    let result = runner.run(&histories, |history| {
        let (lived, fresh) = (Namespace::new("lived"), Namespace::new("fresh"));
        let open = |ns: &Namespace| ns.run(|| Nftables::open().unwrap());
        let reporter = Log;
        let new = |ns| Controller::new(open(ns), settings.clone(), &metrics, &reporter);
        let mut controller = new(&lived);
        controller.handle(first_lists().into_iter().map(Delivery::now));
        let mut all = first_lists();
        for batch in history {
            all.extend(batch.iter().cloned());
            let outcome = controller.handle(batch.into_iter().map(Delivery::now));
            prop_assert_eq!(outcome, Outcome::Synced);
        }
        let failures = registry.encode();
        prop_assert!(
            failures.contains("nftlet_netlink_errors_total 0"),
            "the kernel refused something"
        );
        clock::remove_unused_chains(&runtime, &mut controller);
        let mut restarted = new(&fresh);
        // Everything arrives before the lists are complete, and is written at once.
        let mut events = all;
        events.retain(|e| !matches!(e, Event::ListStarted(_) | Event::ListComplete(_)));
        events.extend(Kind::ALL.map(Event::ListComplete));
        let outcome = restarted.handle(events.into_iter().map(Delivery::now));
        prop_assert_eq!(outcome, Outcome::Synced);
        let list = |ns: &Namespace| meaning(&ns.nft(&["list", "ruleset"]));
        prop_assert_eq!(list(&lived), list(&fresh));
        // The kernel holds nothing that the controller does not know of.
        let wanted = nftlet::services::wanted(restarted.store(), &settings).0;
        let held = open(&fresh).read(&[TABLE], &wanted).unwrap();
        prop_assert!(held == wanted, "the kernel differs from what was compiled");
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}
