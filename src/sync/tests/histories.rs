//! Random histories of events and failures.

use tokio::runtime::Builder;

use super::*;
use crate::model::Hints;

fn zone() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just("a"), Just("b")]
}

/// Everything that may happen to a small cluster.
pub(super) fn event() -> impl Strategy<Value = Event> {
    let name = (0usize..4).prop_map(|n| ["a", "b", "c", "d"][n]);
    let a_service = (
        name.clone(),
        vec(0u8..3, 0..3),
        vec(prop_oneof![Just(80u16), Just(443)], 0..3),
        vec(0u8..3, 0..2),
        proptest::option::of(30080u16..30082),
        proptest::option::of(0i64..3),
        0u8..5,
        (
            any::<[bool; 2]>(),
            proptest::option::of(prop_oneof![Just(10u32), Just(10_800)]),
            vec(0u8..4, 0..3),
        ),
    )
        .prop_map(
            |(name, v4, ports, external, node_port, created, kind, more)| {
                let mut service = service(name, &[], &ports);
                service.ports.dedup();
                for port in &mut service.ports {
                    port.node_port = node_port.filter(|_| port.port == 80);
                }
                // Sometimes two services have the same ClusterIP: files can say so.
                service.cluster_ips = v4
                    .first()
                    .map(|n| IpAddr::from([10, 96, 0, 10 + n]))
                    .into_iter()
                    .chain(
                        v4.get(1)
                            .map(|n| format!("fd00:10:96::{n}").parse().unwrap()),
                    )
                    .collect();
                service.external_ips = external
                    .iter()
                    .map(|n| IpAddr::from([198, 51, 100, *n]))
                    .collect();
                let ([external_local, internal_local], affinity, ranges) = more;
                let policy = |local| match local {
                    true => TrafficPolicy::Local,
                    false => TrafficPolicy::Cluster,
                };
                service.external_policy = policy(external_local);
                service.internal_policy = policy(internal_local);
                service.affinity_seconds = affinity;
                service.load_balancer_ips = ranges
                    .iter()
                    .map(|n| IpAddr::from([203, 0, 113, *n]))
                    .collect();
                service.source_ranges = ranges
                    .iter()
                    .map(|n| format!("10.{n}.0.0/{}", 14 + n).parse().unwrap())
                    .collect();
                service.created = created;
                service.kind = match kind {
                    0 => ServiceKind::Headless,
                    1 => ServiceKind::ExternalName,
                    _ => ServiceKind::NodePort,
                };
                put(service)
            },
        );
    let a_slice = (
        name.clone(),
        0usize..2,
        any::<bool>(),
        vec(1u8..8, 0..5),
        vec(0u8..4, 5),
        proptest::option::of(zone()),
    )
        .prop_map(|(owner, number, v6, endpoints, states, zone)| {
            let service = service(owner, &[], &[80, 443]);
            let family = if v6 { Family::V6 } else { Family::V4 };
            let slice_name = format!("{family}-{number}");
            let mut slice = slice(&slice_name, &service, family, &endpoints);
            for (endpoint, state) in slice.endpoints.iter_mut().zip(states) {
                endpoint.ready = state > 1;
                endpoint.terminating = state == 1;
                let zones = zone.map(|zone| [Arc::from(zone)].into());
                endpoint.hints = zones.map(|zones| {
                    let (zones, nodes) = (Some(zones), None);
                    Arc::new(Hints { zones, nodes })
                });
            }
            put(slice)
        });
    let a_slice_goes = (any::<bool>(), 0usize..2).prop_map(|(v6, number)| {
        let family = if v6 { Family::V6 } else { Family::V4 };
        delete(Kind::EndpointSlice, &format!("{family}-{number}"))
    });
    let a_node = (0u8..3, 0u8..4, proptest::option::of(zone()));
    let a_node = a_node.prop_map(|(number, name, zone)| {
        let mut node = node();
        // Some of these are in source ranges of services.
        node.internal_ips = vec![IpAddr::from([10, 2 * number, 0, 1])];
        node.zone = zone.map(Arc::from);
        if name == 0 {
            node.name = "node-2".into();
        }
        put(node)
    });
    let a_range = (0u8..3).prop_map(|n| {
        Event::Apply(Object::ServiceCidr(ServiceCidr {
            name: ObjectName::new("", "kubernetes"),
            cidrs: vec![format!("10.{}.0.0/16", 96 + n).parse().unwrap()],
        }))
    });
    prop_oneof![
        6 => a_service,
        6 => a_slice,
        2 => name.prop_map(|name| delete(Kind::Service, name)),
        2 => a_slice_goes,
        2 => a_node,
        1 => a_range,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// However events are batched and whatever fails in between, the kernel ends where a new
    /// process that sees the final objects would bring it.
    #[test]
    fn histories_end_where_a_fresh_start_would(
        history in vec((vec(event(), 0..5), 0usize..12), 1..12),
    ) {
        let runtime = Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        let _entered = runtime.enter();
        let bench = Bench::new();
        let mut controller = bench.controller();
        handle(&mut controller, lists(vec![]));
        for (events, failures) in history {
            // One batch in four meets a kernel that fails one to three times.
            bench.kernel.0.borrow_mut().failures = failures.saturating_sub(8);
            let mut outcome = handle(&mut controller, events);
            while outcome != Outcome::Synced {
                outcome = controller.resync();
            }
            bench.kernel.0.borrow_mut().failures = 0;
            bench.assert_as_wanted(&controller);
        }
        runtime.block_on(remove_unused_chains(&mut controller));
        let actual = bench.kernel.0.borrow().ruleset.clone();
        prop_assert_eq!(&meaning(&actual), &meaning(&controller.services.engine.tables().ruleset()));
        prop_assert_eq!(actual, controller.services.engine.tables().ruleset());
    }
}
