//! Network policies with real packets, one property of the API after the other, over the changes
//! that clusters go through. Pods hang on routed links, one each; `network_policy_bridge.rs` has
//! them on a bridge.

use std::io::{ErrorKind, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::support::manifests::{Backend, Service};
use crate::support::reach::{Case, Probe, check, check_counted, denied};
use crate::support::shop;
use crate::support::shop::{Shop, pod, policy, running_since};
use nftlet_lab::netns::{Ask, Client, LabOptions, Machine, Protocol, require_net_admin, wait_for};
use serde_json::{Value, json};

use Probe::{Ping, Tcp, Udp};

const PATIENCE: Duration = nftlet_lab::netns::PATIENCE;

#[test]
fn labels_policies_and_their_changes_decide_who_gets_in() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let (client, node) = (shop.lab.client(), &shop.lab.node().machine);
    let to_web = |from_db, from_api, from_client| {
        let mut cases = Vec::new();
        for probe in [Tcp(80), Udp(80), Ping] {
            cases.extend(Case::both(&db, &web, probe, from_db));
            cases.extend(Case::both(&api, &web, probe, from_api));
            cases.extend(Case::both(client, &web, probe, from_client));
            // The node always, and the way out is not concerned.
            cases.extend(Case::both(node, &web, probe, true));
            cases.extend(Case::both(&web, &db, probe, true));
        }
        cases
    };
    shop.apply();
    check(&to_web(true, true, true));
    assert!(!shop.rules().contains("nftlet-policy"));

    let web_only = json!({"matchLabels": {"app": "web"}});
    let closed = policy("shop", "web", json!({"podSelector": web_only}));
    shop.put_and_apply(&closed);
    check_counted(&[&node.ns], &to_web(false, false, false));

    let from_db = json!({"podSelector": web_only, "ingress": [
        {"from": [{"podSelector": {"matchLabels": {"app": "db"}}}]},
    ]});
    shop.put_and_apply(&policy("shop", "web", from_db));
    check_counted(&[&node.ns], &to_web(true, false, false));

    // A label of the same text in another namespace is another thing.
    shop.manifests
        .put(&pod("shop", "db", &[("app", "old")], &db));
    shop.put_and_apply(&pod("store", "api", &[("app", "db")], &api));
    check_counted(&[&node.ns], &to_web(false, false, false));

    // Policies add up.
    let anywhere = json!({"podSelector": {}, "ingress": [{"from": [
        {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "db"}}},
        {"podSelector": {"matchExpressions": [
            {"key": "app", "operator": "NotIn", "values": ["web"]},
        ]}},
    ]}]});
    shop.put_and_apply(&policy("shop", "more", anywhere));
    let mut cases = to_web(true, true, false);
    cases.retain(|case| case.from.name != web.name);
    check_counted(&[&node.ns], &cases);
    // `more` selects db, too, which web is not allowed to reach any more.
    check_counted(&[&node.ns], &Case::both(&web, &db, Tcp(80), false));

    shop.manifests.remove("NetworkPolicy", "more");
    shop.apply();
    check_counted(&[&node.ns], &to_web(false, false, false));
    shop.manifests.remove("NetworkPolicy", "web");
    shop.apply();
    check(&to_web(true, true, true));
    assert!(!shop.rules().contains("nftlet-policy"), "nothing is left");
}

#[test]
fn labels_of_namespaces_decide_and_change() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    let from_team = json!({"podSelector": {}, "ingress": [
        {"from": [{"namespaceSelector": {"matchLabels": {"team": "b"}}}]},
    ]});
    shop.put_and_apply(&policy("shop", "team", from_team));
    let cases = |from_db, from_api| {
        let db = Case::both(&db, &web, Tcp(80), from_db);
        [db, Case::both(&api, &web, Tcp(80), from_api)].concat()
    };
    check_counted(&[node], &cases(false, true));
    shop.put_and_apply(&shop::namespace("store", &[("team", "a")]));
    check_counted(&[node], &cases(false, false));
    shop.put_and_apply(&shop::namespace("shop", &[("team", "b")]));
    check_counted(&[node], &cases(true, false));
    // By the label that every namespace has, without being written.
    let by_name = json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {
        "matchExpressions": [
            {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["store"]},
        ],
    }}]}]});
    shop.put_and_apply(&policy("shop", "team", by_name));
    check_counted(&[node], &cases(false, true));
}

#[test]
fn ports_are_numbers_ranges_and_names() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    let node = shop.lab.node().ns();
    let through = |ports: Value, passing: &[Probe]| {
        let spec = json!({
            "podSelector": {"matchLabels": {"app": "web"}},
            "ingress": [{"ports": ports, "from": [{"podSelector": {}}]}],
        });
        shop.put_and_apply(&policy("shop", "ports", spec));
        let mut cases = Vec::new();
        for probe in [Tcp(80), Tcp(8080), Udp(80), Udp(8080), Ping] {
            cases.extend(Case::both(&db, &web, probe, passing.contains(&probe)));
        }
        check_counted(&[node], &cases);
    };
    through(json!([{"port": 80}]), &[Tcp(80)]);
    through(json!([{"port": 80, "protocol": "UDP"}]), &[Udp(80)]);
    through(json!([{"protocol": "UDP"}]), &[Udp(80), Udp(8080)]);
    through(json!([{"port": 81, "endPort": 8080}]), &[Tcp(8080)]);
    through(json!([{"port": 80, "endPort": 8079}]), &[Tcp(80)]);
    through(
        json!([{"port": 80, "endPort": 80}, {"port": 8080, "protocol": "UDP"}]),
        &[Tcp(80), Udp(8080)],
    );
    // The name of the port in the pod, for its protocol.
    through(json!([{"port": "http"}]), &[Tcp(8080)]);
    through(json!([{"port": "http", "protocol": "UDP"}]), &[]);
    through(json!([]), &[Tcp(80), Tcp(8080), Udp(80), Udp(8080), Ping]);
}

#[test]
fn a_named_port_moves_with_the_destination() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    let named = |name: &str, machine: &Machine, port: u16| {
        let mut object = pod("shop", name, &[("app", name)], machine);
        object["spec"]["containers"][0]["ports"] = json!([{"name": "http", "containerPort": port}]);
        object
    };
    shop.manifests.put(&named("web", &web, 80));
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "db"}},
        "policyTypes": ["Egress"],
        "egress": [{"ports": [{"port": "http"}]}],
    });
    shop.put_and_apply(&policy("shop", "named", spec));
    let cases = |web_at_80, api_at_80| {
        let mut cases = Vec::new();
        for (to, at_80) in [(&web, web_at_80), (&api, api_at_80)] {
            cases.extend(Case::both(&db, to, Tcp(80), at_80));
            cases.extend(Case::both(&db, to, Tcp(8080), !at_80));
        }
        // Outside nothing has a name.
        cases.extend(Case::both(&db, shop.lab.client(), Tcp(80), false));
        cases
    };
    check_counted(&[node], &cases(true, false));
    shop.put_and_apply(&named("web", &web, 8080));
    check_counted(&[node], &cases(false, false));
}

#[test]
fn blocks_match_addresses_as_they_are_and_each_family_for_itself() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let (client, node) = (shop.lab.client(), shop.lab.node().ns());
    let from = |blocks: Value, passing: &[(&Machine, bool, bool)]| {
        let spec = json!({
            "podSelector": {"matchLabels": {"app": "web"}},
            "ingress": [{"from": blocks}],
        });
        shop.put_and_apply(&policy("shop", "blocks", spec));
        let cases = passing.iter().flat_map(|(from, v4, v6)| {
            let [mut a, mut b] = Case::both(from, &web, Tcp(80), true);
            (a.passes, b.passes) = (*v4, *v6);
            [a, b]
        });
        check_counted(&[node], &cases.collect::<Vec<_>>());
    };
    from(
        json!([{"ipBlock": {"cidr": "0.0.0.0/0"}}]),
        &[
            (client, true, false),
            (&db, true, false),
            (&api, true, false),
        ],
    );
    let except = json!([format!("{}/32", db.v4), "192.168.10.96/29"]);
    from(
        json!([{"ipBlock": {"cidr": "0.0.0.0/0", "except": except}}]),
        &[
            (client, false, false),
            (&db, false, false),
            (&api, true, false),
        ],
    );
    let except = json!([format!("{}/128", client.v6)]);
    from(
        json!([{"ipBlock": {"cidr": "::/0", "except": except}}]),
        &[
            (client, false, false),
            (&db, false, true),
            (&api, false, true),
        ],
    );
    // What one entry excepts another one may allow.
    from(
        json!([
            {"ipBlock": {"cidr": "10.244.0.0/16", "except": ["10.244.1.0/24"]}},
            {"ipBlock": {"cidr": format!("{}/32", db.v4)}},
            {"ipBlock": {"cidr": "fd00:10:244::/48"}},
        ]),
        &[
            (client, false, false),
            (&db, true, true),
            (&api, false, true),
        ],
    );
}

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
    shop.put_and_apply(&policy("shop", "out", spec.clone()));
    check_counted(&[&node.ns], &from_web(false, false, false, false));
    spec["egress"] = json!([{"to": [{"podSelector": {"matchLabels": {"app": "db"}}}]}]);
    shop.put_and_apply(&policy("shop", "out", spec.clone()));
    check_counted(&[&node.ns], &from_web(true, false, false, false));
    spec["egress"] = json!([{"to": [
        {"ipBlock": {"cidr": format!("{}/32", node.v4)}},
        {"ipBlock": {"cidr": format!("{}/128", node.v6)}},
        {"namespaceSelector": {"matchLabels": {"team": "b"}}},
    ]}]);
    shop.put_and_apply(&policy("shop", "out", spec.clone()));
    check_counted(&[&node.ns], &from_web(false, true, false, true));
    spec["egress"] = json!([{}]);
    shop.put_and_apply(&policy("shop", "out", spec));
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
    shop.manifests.put(&policy("shop", "out", out));
    shop.put_and_apply(&policy("shop", "in", into));
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
        "shop",
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
    shop.manifests.put(&policy("shop", "out", out));
    shop.put_and_apply(&policy("store", "vip", vip_only));
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
    shop.put_and_apply(&policy("shop", "in", blocks("128")));
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
    shop.put_and_apply(&policy("shop", "in", other));
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
    shop.put_and_apply(&policy("shop", "in", spec.clone()));
    let cases = |from_other| {
        let mut cases = Case::both(&other, &web, Tcp(80), from_other).to_vec();
        cases.extend(Case::both(&own, &web, Tcp(80), true));
        cases.extend(Case::both(&db, &web, Tcp(80), true));
        // The host's own ports are nobody's pod.
        cases.extend(Case::both(&other, &own, Tcp(80), true));
        cases
    };
    check_counted(&[&own.ns], &cases(false));
    spec["ingress"][0]["from"] = json!([
        {"podSelector": {}},
        {"ipBlock": {"cidr": format!("{}/32", other.v4)}},
        {"ipBlock": {"cidr": format!("{}/128", other.v6)}},
    ]);
    shop.put_and_apply(&policy("shop", "in", spec));
    check_counted(&[&own.ns], &cases(true));
}

#[test]
fn errors_about_allowed_packets_come_back() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::with(LabOptions {
        nodes: 2,
        ..LabOptions::default()
    });
    let [web, _, _] = shop.pods();
    let far = shop.lab.nodes[1].pods[0].clone();
    // Nothing gets in, and out nothing but to the far pod.
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress", "Egress"],
        "egress": [{"to": [
            {"ipBlock": {"cidr": format!("{}/32", far.v4)}},
            {"ipBlock": {"cidr": format!("{}/128", far.v6)}},
        ]}],
    });
    shop.put_and_apply(&policy("shop", "web", spec));
    // Port unreachable, from the pod that was asked.
    let client = Client::new(&web.ns);
    for address in far.addresses() {
        let error = client.ask(Ask::udp(address, 9)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
    }
    // Packet too big, from a router on the way.
    shop.lab.nodes[1].ns().ip("link set veth1 mtu 1300");
    far.ns.ip("link set eth0 mtu 1300");
    let _servers = far.serve(Protocol::Udp, 80);
    for address in far.addresses() {
        let to = SocketAddr::new(address, 80);
        let route = || {
            web.ns.run(|| {
                let any: SocketAddr = if to.is_ipv4() {
                    "0.0.0.0:0".parse().expect("an address")
                } else {
                    "[::]:0".parse().expect("an address")
                };
                let socket = std::net::UdpSocket::bind(any).expect("a socket");
                // The error of an earlier datagram is told by the next call.
                let _ = socket.send_to(&[0; 1400], to);
            });
            let address = address.to_string();
            let output = web
                .ns
                .command("ip")
                .args(["route", "get", &address])
                .output();
            let text = String::from_utf8(output.expect("ip runs").stdout).expect("UTF-8");
            text.contains("mtu 1300").then_some(())
        };
        wait_for("the path's MTU to be learnt", PATIENCE, route);
    }
}

#[test]
fn an_address_belongs_to_the_pod_that_has_it_now() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    let from_db = json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [
        {"from": [{"podSelector": {"matchLabels": {"app": "db"}}}]},
    ]});
    shop.put_and_apply(&policy("shop", "web", from_db));
    let cases = |from_db, from_api| {
        let db = Case::both(&db, &web, Tcp(80), from_db);
        [db, Case::both(&api, &web, Tcp(80), from_api)].concat()
    };
    check_counted(&[node], &cases(true, false));

    // A job ends; its address goes to a newcomer, while the ended pod still names it.
    let mut ended = pod("shop", "db", &[("app", "db")], &db);
    ended["status"]["phase"] = json!("Succeeded");
    shop.put_and_apply(&ended);
    check_counted(&[node], &cases(false, false));
    let newcomer = |app: &str| pod("shop", "newcomer", &[("app", app)], &db);
    shop.put_and_apply(&newcomer("new"));
    check_counted(&[node], &cases(false, false));

    // The news of the old pod's end is late: nobody can say which of them it is.
    shop.put_and_apply(&pod("shop", "db", &[("app", "db")], &db));
    check_counted(&[node], &cases(false, false));
    shop.put_and_apply(&newcomer("db"));
    check_counted(&[node], &cases(false, false));

    // The one whose container runs has it, and of two the one whose container is the younger.
    shop.put_and_apply(&running_since(2, newcomer("db")));
    check_counted(&[node], &cases(true, false));
    let old = pod("shop", "db", &[("app", "other")], &db);
    shop.put_and_apply(&running_since(1, old.clone()));
    check_counted(&[node], &cases(true, false));
    shop.put_and_apply(&running_since(3, old));
    check_counted(&[node], &cases(false, false));

    // One that is being deleted keeps its address.
    shop.manifests.remove("Pod", "db");
    let mut leaving = running_since(2, newcomer("db"));
    leaving["metadata"]["deletionTimestamp"] = json!("2026-02-01T01:00:00Z");
    shop.put_and_apply(&leaving);
    check_counted(&[node], &cases(true, false));

    // Two pods exchange their addresses.
    shop.manifests.remove("Pod", "newcomer");
    shop.manifests
        .put(&pod("store", "api", &[("app", "api")], &db));
    shop.put_and_apply(&pod("shop", "db", &[("app", "db")], &api));
    check_counted(&[node], &cases(false, true));
    // And the isolated one moves, too.
    shop.manifests
        .put(&pod("shop", "web", &[("app", "web")], &db));
    shop.put_and_apply(&pod("store", "api", &[("app", "api")], &web));
    let moved = [
        Case::both(&api, &db, Tcp(80), true),
        Case::both(&web, &db, Tcp(80), false),
        Case::both(shop.lab.client(), &db, Tcp(80), false),
        Case::both(shop.lab.client(), &web, Tcp(80), true),
    ];
    check_counted(&[node], &moved.concat());
}

#[test]
fn while_two_pods_of_a_node_claim_an_address_both_must_allow() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let (client, node) = (shop.lab.client(), shop.lab.node().ns());
    let of = |app: &str, ports: Value| {
        let rules = json!([{"ports": ports}]);
        let spec = json!({
            "podSelector": {"matchLabels": {"app": app}},
            "policyTypes": ["Ingress", "Egress"], "ingress": rules, "egress": rules,
        });
        policy("shop", app, spec)
    };
    let (tcp_80, tcp_8080) = (json!({"port": 80}), json!({"port": 8080}));
    let udp_80 = json!({"port": 80, "protocol": "UDP"});
    shop.manifests.put(&of("web", json!([tcp_80, tcp_8080])));
    shop.manifests.put(&of("rival", json!([tcp_8080, udp_80])));
    let cases = |passing: [bool; 3]| {
        let mut cases = Vec::new();
        for (probe, passes) in [Tcp(80), Tcp(8080), Udp(80)].into_iter().zip(passing) {
            cases.extend(Case::both(client, &web, probe, passes));
            cases.extend(Case::both(&db, &web, probe, passes));
            cases.extend(Case::both(&web, &api, probe, passes));
        }
        cases
    };
    shop.apply();
    check_counted(&[node], &cases([true, true, false]));
    let rival = |app: &str| pod("shop", "rival", &[("app", app)], &web);
    shop.put_and_apply(&rival("rival"));
    check_counted(&[node], &cases([false, true, false]));
    let list = |map: &str| node.nft(&["list", "map", "ip", "nftlet-policy", map]);
    let web_v4 = web.v4.to_string();
    assert!(list("ingress-pods").contains(&web_v4) && list("ingress-pods-2").contains(&web_v4));
    // One that nothing isolates takes nothing away.
    shop.put_and_apply(&rival("free"));
    check_counted(&[node], &cases([true, true, false]));
    // After a reboot the newer one has the address; its policy alone counts.
    let stale = pod("shop", "web", &[("app", "web")], &web);
    shop.manifests.put(&running_since(1, stale));
    shop.put_and_apply(&running_since(2, rival("rival")));
    check_counted(&[node], &cases([false, true, true]));
    assert!(!shop.rules().contains("ingress-pods-2"));
}

#[test]
fn pods_of_the_host_and_pods_of_one_family() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    let (client, node) = (shop.lab.client(), &shop.lab.node().machine);
    let mut host = pod("shop", "host", &[("app", "host")], node);
    host["spec"]["hostNetwork"] = json!(true);
    shop.manifests.put(&host);
    // The IPv6 address of web is not the pod's, as far as anyone knows.
    let mut web_v4 = pod("shop", "web", &[("app", "web")], &web);
    web_v4["status"]["podIPs"] = json!([{"ip": web.v4}]);
    shop.manifests.put(&web_v4);
    let closed = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
    shop.put_and_apply(&policy("shop", "closed", closed));
    let [v4, mut v6] = Case::both(client, &web, Tcp(80), false);
    v6.passes = true;
    let mut cases = vec![v4, v6];
    cases.extend(Case::both(client, node, Tcp(80), true));
    cases.extend(Case::both(node, client, Tcp(80), true));
    cases.extend(Case::both(client, &db, Tcp(80), false));
    check_counted(&[&node.ns], &cases);
}

#[test]
fn neighbours_are_found_whatever_is_denied() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = &shop.lab.node().machine;
    let closed = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
    shop.manifests.put(&policy("shop", "closed", closed));
    shop.put_and_apply(&policy(
        "store",
        "open",
        json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"],
               "egress": [{}], "ingress": [{}]}),
    ));
    for machine in [&web, &db, &api, node, shop.lab.client()] {
        machine.ns.ip_batch(["neigh flush all"]);
    }
    let cases = [
        Case::both(node, &web, Tcp(80), true),
        Case::both(&api, shop.lab.client(), Tcp(80), true),
        Case::both(shop.lab.client(), &api, Ping, true),
        Case::both(&db, &web, Ping, false),
        // Echo requests are no part of neighbour discovery.
        Case::both(&db, node, Ping, false),
    ];
    check_counted(&[&node.ns], &cases.concat());
}

#[test]
fn what_was_denied_is_counted_for_the_pod_and_its_direction() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    let into = json!({"podSelector": {"matchLabels": {"app": "web"}}});
    let out = json!({
        "podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Egress"],
    });
    shop.manifests.put(&policy("shop", "in", into));
    shop.put_and_apply(&policy("shop", "out", out));
    let count = |direction: &str, address: IpAddr| {
        let counted = denied(&[node]);
        counted.get(&(direction.to_owned(), address)).copied()
    };
    // A packet may still be on its way when its sender has given up.
    let reach = |direction: &str, address: IpAddr, wanted: u64| {
        let what = format!("{wanted} packets of {direction} at {address}");
        wait_for(&what, PATIENCE, || {
            (count(direction, address) == Some(wanted)).then_some(())
        });
    };
    for (index, address) in web.addresses().into_iter().enumerate() {
        assert_eq!(count("ingress", address), Some(0));
        assert_eq!(count("egress", address), None);
        // A datagram is one packet, a lost SYN is repeated after a second.
        let case = |from: &Machine, to| Case {
            from: from.clone(),
            to,
            probe: Udp(80),
            passes: false,
        };
        check(&[case(&api, address), case(&api, address)]);
        reach("ingress", address, 2);
        // The source denies first; the destination never sees it.
        check(&[case(&db, address)]);
        reach("egress", db.addresses()[index], 1);
        assert_eq!(count("ingress", address), Some(2));
    }
    // Counters outlive another program run and changes that do not concern the pod.
    shop.put_and_apply(&pod("store", "api", &[("app", "else")], &api));
    assert_eq!(count("ingress", web.v4.into()), Some(2));
}

#[test]
fn a_policy_with_a_fault_closes_and_is_named() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    let spec = json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [
        {"from": [{"ipBlock": {"cidr": "10.244.0.0/40"}}, {"podSelector": {}}]},
        {"from": [{"namespaceSelector": {"matchLabels": {"team": "b"}}}]},
    ]});
    shop.manifests.put(&policy("shop", "faulty", spec));
    let said = shop.apply();
    let lines: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("shop/faulty"))
        .collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(
        lines[0].contains("ingress[0].from[0].ipBlock.cidr"),
        "{said}"
    );
    assert!(lines[0].contains("10.244.0.0/40"), "{said}");
    let cases = [
        Case::both(&db, &web, Tcp(80), false),
        Case::both(&api, &web, Tcp(80), true),
    ];
    check_counted(&[node], &cases.concat());
}

#[test]
fn switched_off_nothing_is_enforced() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    shop.put_and_apply(&policy("shop", "closed", json!({"podSelector": {}})));
    check_counted(
        &[shop.lab.node().ns()],
        &Case::both(&db, &web, Tcp(80), false),
    );
    shop.manifests
        .program(shop.lab.node().ns(), &["--network-policy", "off"]);
    check(&Case::both(&db, &web, Tcp(80), true));
    assert!(!shop.rules().contains("nftlet-policy"));
}

#[test]
fn names_as_long_as_the_api_allows_are_told_apart() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    // A namespace has 63 characters at most, pods and policies have 253.
    let long_namespace = "n".repeat(63);
    let long = |end: char| format!("{}{end}", "x.".repeat(126));
    let namespace = long_namespace.as_str();
    shop.manifests.put(&shop::namespace(namespace, &[]));
    let pods = [('1', "web", &web), ('2', "db", &db), ('3', "api", &api)];
    for (end, app, machine) in pods {
        shop.manifests.remove("Pod", app);
        // The file is named after the object, and no file name is that long.
        let list = |object: Value| {
            json!({
                "apiVersion": "v1", "kind": "List", "metadata": {"name": format!("{app}-{end}")},
                "items": [object],
            })
        };
        let object = pod(namespace, &long(end), &[("app", app)], machine);
        shop.manifests.put(&list(object));
    }
    for (end, app, from) in [('1', "web", "db"), ('2', "db", "api")] {
        let spec = json!({"podSelector": {"matchLabels": {"app": app}}, "ingress": [
            {"from": [{"podSelector": {"matchLabels": {"app": from}}}]},
        ]});
        shop.manifests.put(&json!({
            "apiVersion": "v1", "kind": "List", "metadata": {"name": format!("policy-{end}")},
            "items": [policy(namespace, &long(end), spec)],
        }));
    }
    shop.apply();
    let cases = [
        Case::both(&db, &web, Tcp(80), true),
        Case::both(&api, &web, Tcp(80), false),
        Case::both(&api, &db, Tcp(80), true),
        Case::both(&web, &db, Tcp(80), false),
        Case::both(&web, &api, Tcp(80), true),
    ];
    check_counted(&[node], &cases.concat());
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Sends an ICMPv6 message of a type with the hop limit that stands for "from this link".
fn send_icmp6(from: &Machine, to: IpAddr, kind: u8) {
    use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto, socket, sockopt};
    from.ns.run(|| {
        let socket = socket(AddressFamily::INET6, SocketType::RAW, Some(ipproto::ICMPV6));
        let socket = socket.expect("a raw socket");
        sockopt::set_ipv6_unicast_hops(&socket, Some(255)).expect("a hop limit");
        let mut message = [0; 24];
        message[0] = kind;
        let to = SocketAddr::new(to, 0);
        sendto(&socket, &message, SendFlags::empty(), &to).expect("a message is sent");
    });
}

#[test]
fn neighbour_discovery_carries_nothing_through_a_router() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    let node = shop.lab.node().ns();
    let out = json!({"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Egress"]});
    shop.put_and_apply(&policy("shop", "out", out));
    let key = ("egress".to_owned(), web.v6.into());
    let count = || denied(&[node]).get(&key).copied().unwrap_or_default();
    for kind in [130, 131, 132, 133, 134, 135, 136, 143] {
        let before = count();
        send_icmp6(&web, db.v6.into(), kind);
        wait_for(&format!("type {kind} to be denied"), PATIENCE * 3, || {
            (count() > before).then_some(())
        });
    }
    // On the link itself it works still.
    web.ns.ip("neigh flush all");
    node.ip("neigh flush all");
    check(&Case::both(&shop.lab.node().machine, &web, Tcp(80), true));
}

#[test]
fn strict_mode_lets_untracked_connections_live() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    for family in ["ip", "ip6"] {
        node.nft_load(&format!(
            "table {family} untracked {{ chain early {{
                type filter hook prerouting priority -300; policy accept;
                meta l4proto tcp th dport 80 notrack
                meta l4proto tcp th sport 80 notrack
            }}; }}"
        ));
    }
    let into = json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [
        {"from": [{"podSelector": {"matchLabels": {"app": "db"}}}]},
    ]});
    shop.manifests.put(&policy("shop", "in", into));
    shop.manifests.program(node, &["--network-policy-strict"]);
    let cases = [
        Case::both(&db, &web, Tcp(80), true),
        Case::both(&db, &web, Tcp(8080), true),
        Case::both(&api, &web, Tcp(80), false),
    ];
    check_counted(&[node], &cases.concat());
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
        shop.put_and_apply(&policy("shop", "out", out(port)));
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
    shop.put_and_apply(&policy("shop", "web", spec.clone()));
    check_counted(&[node], &cases(false));
    spec["ingress"] = json!([{}]);
    shop.put_and_apply(&policy("shop", "web", spec));
    check_counted(&[node], &cases(true));
}

#[test]
fn a_pod_that_failed_or_went_to_another_node_is_not_isolated_here() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    let from_db = json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [
        {"from": [{"podSelector": {"matchLabels": {"app": "db"}}}]},
    ]});
    shop.put_and_apply(&policy("shop", "web", from_db));
    let cases = |from_db, from_api| {
        let from_db = Case::both(&db, &web, Tcp(80), from_db);
        [from_db, Case::both(&api, &web, Tcp(80), from_api)].concat()
    };
    check_counted(&[node], &cases(true, false));
    let mut failed = pod("shop", "web", &[("app", "web")], &web);
    failed["status"]["phase"] = json!("Failed");
    shop.put_and_apply(&failed);
    check(&cases(true, true));
    // As a peer it counts no more, either.
    shop.put_and_apply(&pod("shop", "web", &[("app", "web")], &web));
    let mut failed = pod("shop", "db", &[("app", "db")], &db);
    failed["status"]["phase"] = json!("Failed");
    shop.put_and_apply(&failed);
    check_counted(&[node], &cases(false, false));
    shop.put_and_apply(&pod("shop", "db", &[("app", "db")], &db));
    let mut elsewhere = pod("shop", "web", &[("app", "web")], &web);
    elsewhere["spec"]["nodeName"] = json!("node-2");
    shop.put_and_apply(&elsewhere);
    check(&cases(true, true));
    shop.put_and_apply(&pod("shop", "web", &[("app", "web")], &web));
    check_counted(&[node], &cases(true, false));
}

#[test]
fn namespaces_are_selected_by_every_operator() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    // db is in shop (team a, no stage), api in store (team b, stage test).
    shop.manifests.put(&shop::namespace(
        "store",
        &[("team", "b"), ("stage", "test")],
    ));
    for (expression, from_db, from_api) in [
        (
            json!({"key": "team", "operator": "In", "values": ["b", "c"]}),
            false,
            true,
        ),
        (
            json!({"key": "team", "operator": "NotIn", "values": ["b"]}),
            true,
            false,
        ),
        (
            json!({"key": "stage", "operator": "NotIn", "values": ["live"]}),
            true,
            true,
        ),
        (json!({"key": "stage", "operator": "Exists"}), false, true),
        (
            json!({"key": "stage", "operator": "DoesNotExist"}),
            true,
            false,
        ),
    ] {
        let from = json!([{"namespaceSelector": {"matchExpressions": [expression]}}]);
        let spec = json!({
            "podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"from": from}],
        });
        shop.put_and_apply(&policy("shop", "web", spec));
        let from_db = Case::both(&db, &web, Tcp(80), from_db);
        let from_api = Case::both(&api, &web, Tcp(80), from_api);
        check_counted(&[node], &[from_db, from_api].concat());
    }
}

#[test]
fn exceptions_of_a_block_hold_for_egress_too() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let (client, node) = (shop.lab.client(), &shop.lab.node().machine);
    let without = |cidr: &str, addresses: [String; 2]| json!({"ipBlock": {"cidr": cidr, "except": addresses}});
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Egress"],
        "egress": [{"to": [
            without("0.0.0.0/0", [format!("{}/32", db.v4), format!("{}/32", node.v4)]),
            without("::/0", [format!("{}/128", db.v6), format!("{}/128", node.v6)]),
        ]}],
    });
    shop.put_and_apply(&policy("shop", "out", spec));
    let cases = [
        Case::both(&web, &db, Tcp(80), false),
        Case::both(&web, node, Tcp(80), false),
        Case::both(&web, &api, Tcp(80), true),
        Case::both(&web, client, Tcp(80), true),
    ];
    check_counted(&[&node.ns], &cases.concat());
}

#[test]
fn many_ports_and_peers_of_one_rule_are_all_asked_for() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    let through = |ports: Value, passing: &[Probe]| {
        let spec = json!({
            "podSelector": {"matchLabels": {"app": "web"}},
            "ingress": [{"ports": ports, "from": [
                {"podSelector": {"matchLabels": {"app": "nobody"}}},
                {"podSelector": {"matchLabels": {"app": "db"}}},
                {"ipBlock": {"cidr": "192.0.2.0/24"}},
            ]}],
        });
        shop.put_and_apply(&policy("shop", "ports", spec));
        let mut cases = Vec::new();
        for probe in [Tcp(80), Tcp(8080), Udp(80), Udp(8080), Ping] {
            cases.extend(Case::both(&db, &web, probe, passing.contains(&probe)));
            cases.extend(Case::both(&api, &web, probe, false));
        }
        check_counted(&[node], &cases);
    };
    let udp = |port: u16| json!({"port": port, "protocol": "UDP"});
    through(
        json!([{"port": 80}, {"port": 443}, udp(8080)]),
        &[Tcp(80), Udp(8080)],
    );
    through(
        json!([{"port": 79, "endPort": 81}, {"port": 9000}, {"protocol": "UDP"}]),
        &[Tcp(80), Udp(80), Udp(8080)],
    );
    through(
        json!([{"port": "http"}, {"port": "more"}, udp(80), {"port": 443}]),
        &[Tcp(8080), Udp(80)],
    );
}

#[test]
fn sctp_is_judged_by_its_ports() {
    if !require_net_admin() {
        return;
    }
    if !Protocol::Sctp.supported() {
        // Past the capture of tests that pass.
        let _ = writeln!(
            std::io::stderr(),
            "\nSKIPPED policies for SCTP: the kernel lacks it; load the module sctp."
        );
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    let node = shop.lab.node().ns();
    let _servers = [80, 8080].map(|port| web.serve(Protocol::Sctp, port));
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "web"}},
        "ingress": [{"ports": [{"port": 80, "protocol": "SCTP"}, {"port": 8080}]}],
    });
    shop.put_and_apply(&policy("shop", "sctp", spec));
    for address in web.addresses() {
        let ask = |port, timeout| {
            let ask = Ask::sctp(address, port).timeout(Duration::from_millis(timeout));
            db.ns.run(|| ask.send())
        };
        ask(80, 20_000).expect("this port is allowed");
        ask(8080, 300).expect_err("this is the port of TCP");
    }
    check_counted(&[node], &Case::both(&db, &web, Tcp(8080), true));
}
