//! Field by field, as the API defines them.

use serde_json::{Value, json};

use super::*;
use crate::model::{EndpointSlice, Family, Node, Service, ServiceKind, TrafficPolicy};

fn decode(kind: Kind, value: &Value) -> Decoded {
    Converter::default()
        .decode(kind, value)
        .expect("the object fits its schema")
}

fn service(spec: Value) -> (Service, Vec<String>) {
    service_with(json!({"metadata": {"namespace": "shop", "name": "web"}, "spec": spec}))
}

fn service_with(object: Value) -> (Service, Vec<String>) {
    let decoded = decode(Kind::Service, &object);
    let messages = decoded.notices.into_iter().map(|notice| notice.message);
    match decoded.object {
        Some(Object::Service(service)) => (service, messages.collect()),
        other => panic!("not a service: {other:?}"),
    }
}

fn slice(object: Value) -> (Option<EndpointSlice>, Vec<String>) {
    let decoded = decode(Kind::EndpointSlice, &object);
    let messages = decoded.notices.into_iter().map(|notice| notice.message);
    match decoded.object {
        Some(Object::EndpointSlice(slice)) => (Some(slice), messages.collect()),
        None => (None, messages.collect()),
        other => panic!("not a slice: {other:?}"),
    }
}

fn slice_of(endpoints: Value, ports: Value) -> Value {
    json!({
        "metadata": {"namespace": "shop", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": ports
    })
}

fn node(object: Value) -> (Node, Vec<String>) {
    let decoded = decode(Kind::Node, &object);
    let messages = decoded.notices.into_iter().map(|notice| notice.message);
    match decoded.object {
        Some(Object::Node(node)) => (node, messages.collect()),
        other => panic!("not a node: {other:?}"),
    }
}

fn texts<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

#[test]
fn every_used_field_of_a_service_is_read() {
    let (service, notices) = service_with(json!({
        "metadata": {"namespace": "shop", "name": "web", "creationTimestamp": "1970-01-01T00:01:00Z",
            "managedFields": [{"fieldsV1": {"f:spec": {}}}]},
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"],
            "ipFamilies": ["IPv4", "IPv6"],
            "ports": [{"name": "http", "port": 80, "nodePort": 30080, "targetPort": "web"},
                      {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 0},
                      {"name": "sig", "port": 5060, "protocol": "SCTP"}],
            "externalIPs": ["198.51.100.7"],
            "loadBalancerSourceRanges": [" 203.0.113.9/24 ", "2001:db8::/32"],
            "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local",
            "healthCheckNodePort": 32000, "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}
        },
        "status": {"loadBalancer": {"ingress": [
            {"ip": "192.0.2.9", "ipMode": "VIP"}, {"ip": "192.0.2.10"},
            {"ip": "192.0.2.11", "ipMode": "Proxy"}, {"hostname": "lb.example.com"}]}}
    }));
    assert_eq!(notices, Vec::<String>::new());
    assert_eq!(service.name.as_str(), "shop/web");
    assert_eq!(service.created, Some(60));
    assert_eq!(service.kind, ServiceKind::LoadBalancer);
    assert_eq!(texts(&service.cluster_ips), ["10.0.0.1", "fd00::1"]);
    let ports: Vec<_> = service
        .ports
        .iter()
        .map(|port| (&*port.name, port.protocol, port.port, port.node_port))
        .collect();
    assert_eq!(
        ports,
        [
            ("http", Protocol::Tcp, 80, Some(30080)),
            ("dns", Protocol::Udp, 53, None),
            ("sig", Protocol::Sctp, 5060, None)
        ]
    );
    assert_eq!(texts(&service.external_ips), ["198.51.100.7"]);
    assert_eq!(
        texts(&service.load_balancer_ips),
        ["192.0.2.9", "192.0.2.10"]
    );
    assert_eq!(
        texts(&service.source_ranges),
        ["203.0.113.0/24", "2001:db8::/32"]
    );
    assert_eq!(service.external_policy, TrafficPolicy::Local);
    assert_eq!(service.internal_policy, TrafficPolicy::Local);
    assert_eq!(service.affinity_seconds, Some(600));
    assert_eq!(service.health_check_node_port, Some(32000));
}

#[test]
fn headless_and_external_name_services_have_no_frontends() {
    for (spec, kind) in [
        (
            json!({"clusterIP": "None", "clusterIPs": ["None"]}),
            ServiceKind::Headless,
        ),
        (json!({"clusterIPs": ["None"]}), ServiceKind::Headless),
        (json!({"clusterIP": ""}), ServiceKind::Headless),
        (json!({}), ServiceKind::Headless),
        (
            json!({"type": "ExternalName", "externalName": "x"}),
            ServiceKind::ExternalName,
        ),
        (
            json!({"type": "NodePort", "clusterIP": "10.0.0.1"}),
            ServiceKind::NodePort,
        ),
        (json!({"clusterIPs": ["10.0.0.1"]}), ServiceKind::ClusterIp),
    ] {
        let (service, notices) = service(spec.clone());
        assert_eq!((service.kind, notices), (kind, Vec::new()), "{spec}");
        assert_eq!(
            service.has_frontends(),
            !service.cluster_ips.is_empty(),
            "{spec}"
        );
    }
}

#[test]
fn a_malformed_address_is_named_and_the_rest_counts() {
    let (service, notices) = service(json!({
        "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::g"],
        "externalIPs": ["nonsense", "198.51.100.7"]
    }));
    assert_eq!(texts(&service.cluster_ips), ["10.0.0.1"]);
    assert_eq!(texts(&service.external_ips), ["198.51.100.7"]);
    assert_eq!(
        notices,
        [
            "Service shop/web: spec.clusterIPs[1] \"fd00::g\" is not an IP address; write one such as 10.0.0.1 or fd00::1",
            "Service shop/web: spec.externalIPs[0] \"nonsense\" is not an IP address; write one such as 10.0.0.1 or fd00::1",
        ]
    );
}

#[test]
fn families_come_from_the_addresses() {
    let (service, notices) = service(json!({
        "clusterIPs": ["fd00::1", "10.0.0.1", "10.0.0.2"], "ipFamilies": ["IPv4", "IPv4"]
    }));
    assert_eq!(texts(&service.cluster_ips), ["fd00::1", "10.0.0.1"]);
    assert_eq!(notices.len(), 2, "{notices:?}");
    assert!(notices[0].contains("spec.ipFamilies[0]"), "{notices:?}");
    assert!(
        notices[1].contains("spec.clusterIPs[2] \"10.0.0.2\""),
        "{notices:?}"
    );
}

#[test]
fn a_bad_port_does_not_take_the_others_along() {
    let (service, notices) = service(json!({
        "clusterIP": "10.0.0.1",
        "ports": [{"port": 0}, {"port": 65536}, {"port": 1, "protocol": "ICMP"}, {"name": "ok", "port": 2},
                  {"port": -1}, {"name": "np", "port": 3, "nodePort": 99999}]
    }));
    let ports: Vec<_> = service
        .ports
        .iter()
        .map(|port| (&*port.name, port.node_port))
        .collect();
    assert_eq!(ports, [("ok", None), ("np", None)]);
    let fields = [
        "ports[0].port \"0\"",
        "ports[1].port \"65536\"",
        "ports[2].protocol \"ICMP\"",
        "ports[4].port \"-1\"",
        "ports[5].nodePort \"99999\"",
    ];
    assert_eq!(notices.len(), fields.len(), "{notices:?}");
    for (notice, field) in notices.iter().zip(fields) {
        assert!(notice.contains(field), "{notice}");
    }
}

#[test]
fn affinity_has_the_default_of_the_api() {
    for (config, seconds, faults) in [
        (json!(null), Some(10_800), 0),
        (json!({"clientIP": null}), Some(10_800), 0),
        (
            json!({"clientIP": {"timeoutSeconds": 86_400}}),
            Some(86_400),
            0,
        ),
        (json!({"clientIP": {"timeoutSeconds": 0}}), Some(10_800), 1),
        (
            json!({"clientIP": {"timeoutSeconds": 86_401}}),
            Some(10_800),
            1,
        ),
    ] {
        let (service, notices) = service(json!({
            "clusterIP": "10.0.0.1", "sessionAffinity": "ClientIP", "sessionAffinityConfig": config
        }));
        assert_eq!(
            (service.affinity_seconds, notices.len()),
            (seconds, faults),
            "{config}"
        );
    }
    let (service, _) = service(json!({"clusterIP": "10.0.0.1", "sessionAffinity": "None"}));
    assert_eq!(service.affinity_seconds, None);
}

#[test]
fn health_checks_are_for_load_balancers_with_policy_local() {
    for (kind, policy, port) in [
        ("LoadBalancer", "Local", Some(32000)),
        ("LoadBalancer", "Cluster", None),
        ("NodePort", "Local", None),
    ] {
        let (service, _) = service(json!({
            "clusterIP": "10.0.0.1", "type": kind, "externalTrafficPolicy": policy, "healthCheckNodePort": 32000
        }));
        assert_eq!(service.health_check_node_port, port, "{kind} {policy}");
    }
}

#[test]
fn a_list_of_unusable_source_ranges_allows_no_source() {
    let (some, notices) = service(json!({
        "clusterIP": "10.0.0.1", "loadBalancerSourceRanges": ["10.0.0.0/40", " 10.0.0.0/8"]
    }));
    assert_eq!(
        (texts(&some.source_ranges), notices.len()),
        (vec!["10.0.0.0/8".to_owned()], 1)
    );
    let (none, notices) =
        service(json!({"clusterIP": "10.0.0.1", "loadBalancerSourceRanges": ["10.0.0.0/40"]}));
    assert_eq!(texts(&none.source_ranges), ["0.0.0.0/32", "::/128"]);
    assert!(notices[1].contains("addresses are denied"), "{notices:?}");
}

#[test]
fn services_of_another_proxy_have_no_frontends() {
    let (service, notices) = service_with(json!({
        "metadata": {"name": "web", "labels": {"service.kubernetes.io/service-proxy-name": ""}},
        "spec": {"clusterIP": "10.0.0.1", "externalIPs": ["fd00::1"], "ports": [{"port": 80}]}
    }));
    assert_eq!(service.kind, ServiceKind::OtherProxy);
    assert!(!service.has_frontends());
    assert_eq!(texts(&service.cluster_ips), ["10.0.0.1"]);
    assert!(notices.is_empty(), "{notices:?}");
}

#[test]
fn addresses_of_a_family_without_a_cluster_ip_are_left_out_with_one_notice() {
    let spec = |cluster_ips: &[&str]| {
        json!({
            "metadata": {"name": "web"},
            "spec": {"type": "LoadBalancer", "clusterIPs": cluster_ips,
                "externalIPs": ["198.51.100.1", "2001:db8::1", "2001:db8::2"],
                "ports": [{"name": "a", "port": 80}, {"name": "b", "port": 81}]},
            "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.2"}, {"ip": "2001:db8::3"}]}}
        })
    };
    let (service, notices) = service_with(spec(&["10.0.0.1"]));
    assert_eq!(texts(&service.external_ips), ["198.51.100.1"]);
    assert_eq!(texts(&service.load_balancer_ips), ["198.51.100.2"]);
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert!(
        notices[0].contains(
            "the address \"2001:db8::3\" (2 more: 2001:db8::1, 2001:db8::2) is not served, since the service has no IPv6 ClusterIP"
        ),
        "{notices:?}"
    );
    let (service, notices) = service_with(spec(&["fd00::1"]));
    assert_eq!(texts(&service.load_balancer_ips), ["2001:db8::3"]);
    assert!(
        notices[0].contains("the service has no IPv4 ClusterIP"),
        "{notices:?}"
    );
    let (_, notices) = service_with(spec(&["10.0.0.1", "fd00::1"]));
    assert!(notices.is_empty(), "{notices:?}");
    // What has no frontends at all needs no explanation.
    let (_, notices) = service_with(spec(&["None"]));
    assert!(notices.is_empty(), "{notices:?}");
}

#[test]
fn link_local_addresses_of_services_and_endpoints_are_refused() {
    let (service, notices) = service_with(json!({
        "metadata": {"name": "web"},
        "spec": {"type": "LoadBalancer", "clusterIP": "169.254.20.10",
            "externalIPs": ["169.254.169.254"], "ports": [{"port": 80}]},
        "status": {"loadBalancer": {"ingress": [{"ip": "169.254.169.253"}]}}
    }));
    assert_eq!(texts(&service.cluster_ips), ["169.254.20.10"]);
    assert_eq!(
        service.external_ips.len() + service.load_balancer_ips.len(),
        0
    );
    assert_eq!(notices.len(), 2, "{notices:?}");
    let refused = [
        "169.254.169.254",
        "0.0.0.0",
        "0.1.2.3",
        "255.255.255.255",
        "127.0.0.1",
        "224.0.0.1",
    ];
    for address in refused {
        let endpoints = json!([{"addresses": [address]}, {"addresses": ["192.168.10.1"]}]);
        let (slice, notices) = slice(slice_of(endpoints, json!([{"port": 80}])));
        let addresses = slice.expect("a slice").endpoints;
        assert_eq!(addresses.len(), 1, "{address}");
        assert_eq!(notices.len(), 1, "{address}: {notices:?}");
    }
}

#[test]
fn source_ranges_of_one_family_alone_are_reported_where_they_shut_the_other_one_out() {
    let notices_of = |ranges: &[&str], load_balancers: &[&str]| {
        let ingress: Vec<Value> = load_balancers.iter().map(|ip| json!({"ip": ip})).collect();
        let (_, notices) = service_with(json!({
            "metadata": {"name": "web"},
            "spec": {"type": "LoadBalancer", "clusterIPs": ["10.0.0.1", "fd00::1"],
                "loadBalancerSourceRanges": ranges, "ports": [{"port": 80}, {"port": 81}]},
            "status": {"loadBalancer": {"ingress": ingress}}
        }));
        notices
    };
    let (v4, v6) = ("198.51.100.9", "2001:db8::9");
    let notices = notices_of(&["192.168.10.0/24"], &[v4, v6]);
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert!(
        notices[0].contains(
            "has no IPv6 range, so all clients of the load balancer's address 2001:db8::9 are denied"
        ),
        "{notices:?}"
    );
    let notices = notices_of(&["2001:db8:1::/64"], &[v4, v6]);
    assert!(notices[0].contains("has no IPv4 range"), "{notices:?}");
    for (ranges, load_balancers) in [
        (&["192.168.10.0/24"][..], &[v4][..]),
        (&["192.168.10.0/24", "0.0.0.0/0"], &[v4, v6]),
        (&["192.168.10.0/24", "2001:db8:1::/64"], &[v4, v6]),
        (&[], &[v4, v6]),
    ] {
        let notices = notices_of(ranges, load_balancers);
        assert!(notices.is_empty(), "{ranges:?}: {notices:?}");
    }
}

#[test]
fn a_number_that_comes_up_twice_is_named_once() {
    let (service, notices) = service(json!({
        "type": "NodePort", "clusterIP": "10.0.0.1",
        "ports": [
            {"name": "a", "port": 80, "nodePort": 30080},
            {"name": "b", "port": 80, "nodePort": 30080},
            {"name": "c", "port": 80, "protocol": "UDP", "nodePort": 30080},
        ]
    }));
    assert_eq!(service.ports.len(), 3);
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert!(
        notices[0]
            .contains("\"80 TCP of port b\" (1 more: nodePort 30080 TCP of port b) is used twice"),
        "{notices:?}"
    );
}

#[test]
fn conditions_and_hints_have_the_defaults_of_the_api() {
    let (slice, notices) = slice(json!({
        "metadata": {"namespace": "shop", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"},
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "1970-01-01T00:00:01.25Z"}},
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": ["10.1.0.1", "10.1.0.2"]},
            {"addresses": ["010.001.000.003"], "conditions": {"ready": false, "serving": true, "terminating": true},
             "nodeName": "node-1", "hints": {"forZones": [{"name": "a"}, {"name": "b"}], "forNodes": [{"name": "node-1"}]}},
            {"addresses": [], "conditions": null},
            {"addresses": ["10.1.0.4"], "conditions": {"ready": null}, "hints": {"forZones": []}}
        ],
        "ports": [{"port": 8080}, {"name": "all"}, {"name": "zero", "port": 0}, {"name": "dns", "port": 53, "protocol": "UDP"}]
    }));
    let slice = slice.expect("a slice of a service");
    assert_eq!(notices, Vec::<String>::new());
    assert_eq!(
        (slice.service.as_str(), slice.family),
        ("shop/web", Family::V4)
    );
    assert_eq!(slice.triggered_at_ms, Some(1250));
    let ports: Vec<_> = slice
        .ports
        .iter()
        .map(|port| (&*port.name, port.protocol, port.port))
        .collect();
    assert_eq!(
        ports,
        [("", Protocol::Tcp, 8080), ("dns", Protocol::Udp, 53)]
    );
    let states: Vec<_> = slice
        .endpoints
        .iter()
        .map(|e| (e.address.to_string(), e.ready, e.serving, e.terminating))
        .collect();
    assert_eq!(
        states,
        [
            ("10.1.0.1".to_owned(), true, true, false),
            ("10.1.0.3".to_owned(), false, true, true),
            ("10.1.0.4".to_owned(), true, true, false)
        ]
    );
    let hinted = &slice.endpoints[1];
    assert_eq!(hinted.node.as_deref(), Some("node-1"));
    assert_eq!(
        hinted.zone_hints().map(texts),
        Some(vec!["a".to_owned(), "b".to_owned()])
    );
    assert_eq!(
        hinted.node_hints().map(texts),
        Some(vec!["node-1".to_owned()])
    );
    assert_eq!(slice.endpoints[2].hints, None);
}

#[test]
fn an_endpoint_of_the_other_family_is_reported_and_skipped() {
    let (slice, notices) = slice(slice_of(
        json!([{"addresses": ["fd00::1"]}, {"addresses": ["10.0.0.300"]}, {"addresses": ["10.1.0.1"]}]),
        json!([{"port": 99999}, {"port": 80}]),
    ));
    let slice = slice.expect("a slice of a service");
    assert_eq!((slice.endpoints.len(), slice.ports.len()), (1, 1));
    assert_eq!(notices.len(), 3, "{notices:?}");
    assert!(notices.iter().any(|n| {
        n.contains("endpoints[0].addresses[0] \"fd00::1\" is not of the slice's addressType IPv4")
    }));
    assert!(
        notices
            .iter()
            .any(|n| n.contains("endpoints[1].addresses[0] \"10.0.0.300\""))
    );
    assert!(
        notices
            .iter()
            .any(|n| n.contains("ports[0].port \"99999\""))
    );
}

#[test]
fn many_faults_of_one_object_are_counted_instead_of_listed() {
    let endpoints: Vec<_> = (0..100)
        .map(|_| json!({"addresses": ["fd00::1"]}))
        .collect();
    let (_, notices) = slice(slice_of(json!(endpoints), json!([])));
    assert_eq!(notices.len(), 9);
    assert!(
        notices[8].ends_with("92 more invalid fields"),
        "{notices:?}"
    );
}

#[test]
fn slices_without_rules_are_left_out() {
    for object in [
        json!({"metadata": {"name": "a"}, "addressType": "IPv4"}),
        json!({"metadata": {"name": "a", "labels": {}}, "addressType": "IPv4", "endpoints": null, "ports": null}),
        json!({"metadata": {"name": "a", "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "FQDN"}),
        json!({"metadata": {"name": "a", "labels": {"kubernetes.io/service-name": "web",
            "service.kubernetes.io/headless": ""}}, "addressType": "IPv4"}),
    ] {
        assert_eq!(slice(object.clone()), (None, Vec::new()), "{object}");
    }
    let (none, notices) = slice(
        json!({"metadata": {"name": "a", "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "ipv4"}),
    );
    assert_eq!((none, notices.len()), (None, 1));
}

#[test]
fn nodes_tell_their_addresses_ranges_and_zone() {
    let (node_1, notices) = node(json!({
        "metadata": {"name": "node-1", "labels": {"topology.kubernetes.io/zone": "zone-a"}},
        "spec": {"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24", "fd00:10:244::/64"],
            "taints": [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]},
        "status": {"addresses": [{"type": "Hostname", "address": "node-1"}, {"type": "InternalIP", "address": "192.168.0.1"},
            {"type": "ExternalIP", "address": "198.51.100.1"}, {"type": "InternalIP", "address": "bad"}]}
    }));
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert_eq!(texts(&node_1.internal_ips), ["192.168.0.1"]);
    assert_eq!(texts(&node_1.external_ips), ["198.51.100.1"]);
    assert_eq!(
        texts(&node_1.pod_cidrs),
        ["10.244.0.0/24", "fd00:10:244::/64"]
    );
    assert_eq!(
        (node_1.zone.as_deref(), node_1.going_away),
        (Some("zone-a"), false)
    );

    let (old, _) = node(json!({"metadata": {"name": "n"}, "spec": {"podCIDR": "10.244.0.0/24"}}));
    assert_eq!(texts(&old.pod_cidrs), ["10.244.0.0/24"]);
    for object in [
        json!({"metadata": {"name": "n", "deletionTimestamp": "2026-01-01T00:00:00Z"}}),
        json!({"metadata": {"name": "n"}, "spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]}}),
    ] {
        assert!(node(object.clone()).0.going_away, "{object}");
    }
}

#[test]
fn service_cidrs_keep_their_usable_ranges() {
    let decoded = decode(
        Kind::ServiceCidr,
        &json!({
            "metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12", "fd00::"]}
        }),
    );
    match decoded.object {
        Some(Object::ServiceCidr(cidr)) => assert_eq!(texts(&cidr.cidrs), ["10.96.0.0/12"]),
        other => panic!("not a ServiceCIDR: {other:?}"),
    }
    assert_eq!(decoded.notices.len(), 1);
}

#[test]
fn an_object_needs_a_usable_name() {
    for metadata in [
        json!(null),
        json!({}),
        json!({"name": "a/b"}),
        json!({"name": "a b"}),
        json!({"name": "a", "namespace": "x/y"}),
    ] {
        let object = json!({"metadata": metadata});
        let fault = Converter::default().decode(Kind::Service, &object);
        assert!(
            fault.is_err_and(|fault| fault.to_string().contains("metadata.name")),
            "{object}"
        );
    }
}

#[test]
fn a_slice_has_room_for_no_more_endpoints_than_it_has() {
    let endpoints: Vec<_> = (1..=11)
        .map(|last| json!({"addresses": [format!("10.1.0.{last}")]}))
        .collect();
    let (slice, _) = slice(slice_of(json!(endpoints), json!([{"port": 80}])));
    let endpoints = slice.expect("a slice").endpoints;
    assert_eq!((endpoints.len(), endpoints.capacity()), (11, 11));
}
