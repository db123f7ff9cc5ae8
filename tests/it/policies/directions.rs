//! Both ends of a connection: ingress, egress, services, nodes.

use std::net::IpAddr;

use crate::support::manifests::{Backend, Service};
use crate::support::objects::policy;
use crate::support::reach::{Case, Probe, check, check_counted};
use crate::support::shop::{Shop, pod};
use nftlet_lab::netns::{LabOptions, Machine, require_net_admin};
use serde_json::json;

use super::rules::ip;
use Probe::{Ping, Tcp, Udp};

#[test]
fn egress_is_judged_to_pods_to_the_outside_and_to_the_node() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let (client, node) = (shop.lab.client(), &shop.lab.node().machine);
    let from_web = |to_db, to_api, to_client, to_node| {
        let mut cases = Vec::new();
        for (to, passes) in [
            (&db, to_db),
            (&api, to_api),
            (client, to_client),
            (node, to_node),
        ] {
            for probe in [Tcp(80), Udp(80), Ping] {
                cases.extend(Case::both(&web, to, probe, passes));
                // What comes in is not concerned, and its replies pass.
                cases.extend(Case::both(to, &web, probe, true));
            }
        }
        cases
    };
    let mut spec = json!({
        "podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Egress"],
    });
    shop.put_and_apply(&policy("out", spec.clone()));
    check_counted(&[&node.ns], &from_web(false, false, false, false));
    spec["egress"] = json!([{"to": [{"podSelector": {"matchLabels": {"app": "db"}}}]}]);
    shop.put_and_apply(&policy("out", spec.clone()));
    check_counted(&[&node.ns], &from_web(true, false, false, false));
    spec["egress"] = json!([{"to": [
        {"ipBlock": {"cidr": format!("{}/32", node.v4)}},
        {"ipBlock": {"cidr": format!("{}/128", node.v6)}},
        {"namespaceSelector": {"matchLabels": {"team": "b"}}},
    ]}]);
    shop.put_and_apply(&policy("out", spec.clone()));
    check_counted(&[&node.ns], &from_web(false, true, false, true));
    spec["egress"] = json!([{}]);
    shop.put_and_apply(&policy("out", spec));
    check(&from_web(true, true, true, true));
}

#[test]
fn both_ends_must_allow_a_connection() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    let node = shop.lab.node().ns();
    let out = json!({
        "podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Egress"],
        "egress": [{"ports": [{"port": 80}, {"port": 8080}]}],
    });
    let into = json!({
        "podSelector": {"matchLabels": {"app": "web"}},
        "ingress": [{"ports": [{"port": 80}, {"port": 80, "protocol": "UDP"}]}],
    });
    shop.manifests.put(&policy("out", out));
    shop.put_and_apply(&policy("in", into));
    let cases = [(Tcp(80), true), (Tcp(8080), false), (Udp(80), false)];
    let cases = cases.map(|(probe, passes)| Case::both(&db, &web, probe, passes));
    check_counted(&[node], &cases.concat());
}

#[test]
fn every_pod_reaches_itself_and_its_node_reaches_it() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    let node = &shop.lab.node().machine;
    let service = Service::new("self", 10)
        .port("tcp", "TCP", 80, None)
        .port("udp", "UDP", 80, None);
    shop.manifests.service(&service);
    let own = web.addresses().map(|address| (address.to_string(), true));
    shop.manifests.endpoints(&service, 8080, &own);
    shop.put_and_apply(&policy(
        "closed",
        json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
    ));
    let mut cases = Vec::new();
    for probe in [Tcp(80), Udp(80)] {
        cases.extend(Case::both(&web, &web, probe, true));
        cases.extend(Case::both(node, &web, probe, true));
        for (from, passes) in [(&web, true), (&db, false), (node, true)] {
            for to in ["10.96.0.10", "fd00:10:96::a"] {
                cases.push(Case {
                    from: from.clone(),
                    to: ip(to),
                    probe,
                    passes,
                });
            }
        }
    }
    cases.extend(Case::both(&db, &web, Tcp(8080), false));
    check_counted(&[&node.ns], &cases);
}

#[test]
fn services_are_judged_by_the_pod_behind_them() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let (client, node) = (shop.lab.client(), shop.lab.node().ns());
    let service = Service::new("web", 10).port("http", "TCP", 80, Some(30080));
    shop.manifests.service(&service);
    let backends = web
        .addresses()
        .map(|address| Backend::new(address, "node-1"));
    shop.manifests.backends(&service, 8080, &backends);
    // Ports are those of the pod; the address of the service counts for nothing.
    let out = json!({
        "podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Egress"],
        "egress": [{
            "to": [{"podSelector": {"matchLabels": {"app": "web"}}}],
            "ports": [{"port": 8080}],
        }],
    });
    let vip_only = json!({
        "podSelector": {"matchLabels": {"app": "api"}}, "policyTypes": ["Egress"],
        "egress": [{"to": [
            {"ipBlock": {"cidr": "10.96.0.0/16"}}, {"ipBlock": {"cidr": "fd00:10:96::/112"}},
        ]}],
    });
    shop.manifests.put(&policy("out", out));
    shop.put_and_apply(&policy("store/vip", vip_only));
    let to_service = |from: &Machine, passes| {
        ["10.96.0.10", "fd00:10:96::a"].map(|to| Case {
            from: from.clone(),
            to: ip(to),
            probe: Tcp(80),
            passes,
        })
    };
    let cases = [
        to_service(&db, true),
        to_service(&api, false),
        to_service(client, true),
        Case::both(&db, &web, Tcp(80), false),
    ];
    check_counted(&[node], &cases.concat());
    // A client outside is judged by its own address, before it is masqueraded.
    let blocks = |text: &str| {
        let [a, b] = client.addresses();
        let block = |ip: IpAddr| json!({"ipBlock": {"cidr": format!("{ip}/{text}")}});
        let block = |ip: IpAddr| match ip {
            IpAddr::V4(v4) => json!({"ipBlock": {"cidr": format!("{v4}/32")}}),
            other => block(other),
        };
        json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [
            {"from": [block(a), block(b)]},
        ]})
    };
    shop.put_and_apply(&policy("in", blocks("128")));
    let node_port = |from: &Machine, passes| {
        shop.lab.node().machine.addresses().map(|to| Case {
            from: from.clone(),
            to,
            probe: Tcp(30080),
            passes,
        })
    };
    let cases = [
        to_service(client, true),
        node_port(client, true),
        to_service(&db, false),
    ];
    check_counted(&[node], &cases.concat());
    let other = json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [
        {"from": [{"podSelector": {}}]},
    ]});
    shop.put_and_apply(&policy("in", other));
    let cases = [
        to_service(client, false),
        node_port(client, false),
        to_service(&db, true),
    ];
    check_counted(&[node], &cases.concat());
}

#[test]
fn another_node_is_a_peer_like_any_other_address() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::with(LabOptions {
        nodes: 2,
        ..LabOptions::default()
    });
    let [web, db, _] = shop.pods();
    let [own, other] = [0, 1].map(|node| shop.lab.nodes[node].machine.clone());
    // A pod in the network of the other host carries its address and is no pod to selectors.
    let mut host = pod("shop", "host", &[("app", "host")], &other);
    host["spec"]["hostNetwork"] = json!(true);
    host["spec"]["nodeName"] = json!("node-2");
    shop.manifests.put(&host);
    let mut spec = json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]});
    shop.put_and_apply(&policy("in", spec.clone()));
    let cases = |from_other| {
        let mut cases = Case::both(&other, &web, Tcp(80), from_other).to_vec();
        cases.extend(Case::both(&own, &web, Tcp(80), true));
        cases.extend(Case::both(&db, &web, Tcp(80), true));
        // The host's own ports belong to no pod.
        cases.extend(Case::both(&other, &own, Tcp(80), true));
        cases
    };
    check_counted(&[&own.ns], &cases(false));
    spec["ingress"][0]["from"] = json!([
        {"podSelector": {}},
        {"ipBlock": {"cidr": format!("{}/32", other.v4)}},
        {"ipBlock": {"cidr": format!("{}/128", other.v6)}},
    ]);
    shop.put_and_apply(&policy("in", spec));
    check_counted(&[&own.ns], &cases(true));
}

#[test]
fn an_endpoint_in_the_network_of_the_host_is_judged_where_it_is_reached() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    let node = &shop.lab.node().machine;
    let service = Service::new("host", 10).port("http", "TCP", 80, None);
    shop.manifests.service(&service);
    let backends = node
        .addresses()
        .map(|address| Backend::new(address, "node-1"));
    shop.manifests.backends(&service, 8080, &backends);
    let out = |port: u16| {
        let blocks = [format!("{}/32", node.v4), format!("{}/128", node.v6)];
        let to = blocks.map(|cidr| json!({"ipBlock": {"cidr": cidr}}));
        json!({
            "podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Egress"],
            "egress": [{"to": to, "ports": [{"port": port}]}],
        })
    };
    let to_service = |from: &Machine, passes| {
        ["10.96.0.10", "fd00:10:96::a"].map(|to| Case {
            from: from.clone(),
            to: ip(to),
            probe: Tcp(80),
            passes,
        })
    };
    // The port is that of the endpoint.
    for (port, passes) in [(8080, true), (80, false)] {
        shop.put_and_apply(&policy("out", out(port)));
        let cases = [to_service(&web, passes), to_service(&db, true)];
        check_counted(&[&node.ns], &cases.concat());
    }
}

#[test]
fn a_policy_with_egress_rules_isolates_egress_without_saying_so() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    let to_db = json!([{"to": [{"podSelector": {"matchLabels": {"app": "db"}}}]}]);
    let mut spec = json!({"podSelector": {"matchLabels": {"app": "web"}}, "egress": to_db});
    let cases = |into_web| {
        [
            Case::both(&web, &db, Tcp(80), true),
            Case::both(&web, &api, Tcp(80), false),
            Case::both(&api, &web, Tcp(80), into_web),
        ]
        .concat()
    };
    shop.put_and_apply(&policy("web", spec.clone()));
    check_counted(&[node], &cases(false));
    spec["ingress"] = json!([{}]);
    shop.put_and_apply(&policy("web", spec));
    check_counted(&[node], &cases(true));
}
