//! Which pods a policy selects, and whose an address is.

use crate::support::objects::{list, namespace, policy};
use crate::support::reach::{Case, Probe, check, check_counted};
use crate::support::shop::{Shop, pod, running_since};
use nftlet_lab::netns::require_net_admin;
use serde_json::{Value, json};

use Probe::{Ping, Tcp, Udp};

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
    let closed = policy("web", json!({"podSelector": web_only}));
    shop.put_and_apply(&closed);
    check_counted(&[&node.ns], &to_web(false, false, false));

    let from_db = json!({"podSelector": web_only, "ingress": [
        {"from": [{"podSelector": {"matchLabels": {"app": "db"}}}]},
    ]});
    shop.put_and_apply(&policy("web", from_db));
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
    shop.put_and_apply(&policy("more", anywhere));
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
    shop.put_and_apply(&policy("team", from_team));
    let cases = |from_db, from_api| {
        let db = Case::both(&db, &web, Tcp(80), from_db);
        [db, Case::both(&api, &web, Tcp(80), from_api)].concat()
    };
    check_counted(&[node], &cases(false, true));
    shop.put_and_apply(&namespace("store", &[("team", "a")]));
    check_counted(&[node], &cases(false, false));
    shop.put_and_apply(&namespace("shop", &[("team", "b")]));
    check_counted(&[node], &cases(true, false));
    // By the label that every namespace has, without being written.
    let by_name = json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {
        "matchExpressions": [
            {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["store"]},
        ],
    }}]}]});
    shop.put_and_apply(&policy("team", by_name));
    check_counted(&[node], &cases(false, true));
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
    shop.put_and_apply(&policy("web", from_db));
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

    // The end of the old pod is not known yet, so it is unknown which of them has the address.
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
        policy(app, spec)
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
    shop.put_and_apply(&policy("closed", closed));
    let [v4, mut v6] = Case::both(client, &web, Tcp(80), false);
    v6.passes = true;
    let mut cases = vec![v4, v6];
    cases.extend(Case::both(client, node, Tcp(80), true));
    cases.extend(Case::both(node, client, Tcp(80), true));
    cases.extend(Case::both(client, &db, Tcp(80), false));
    check_counted(&[&node.ns], &cases);
}

#[test]
fn names_of_the_greatest_length_are_distinct() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.lab.node().ns();
    // A namespace has 63 characters at most, pods and policies have 253.
    let long_namespace = "n".repeat(63);
    let long = |end: char| format!("{}{end}", "x.".repeat(126));
    shop.manifests.put(&namespace(&long_namespace, &[]));
    let pods = [('1', "web", &web), ('2', "db", &db), ('3', "api", &api)];
    for (end, app, machine) in pods {
        shop.manifests.remove("Pod", app);
        // The file is named after the object, and no file name is that long.
        let object = pod(&long_namespace, &long(end), &[("app", app)], machine);
        shop.manifests.put(&list(&format!("pod-{end}"), &[object]));
    }
    for (end, app, from) in [('1', "web", "db"), ('2', "db", "api")] {
        let spec = json!({"podSelector": {"matchLabels": {"app": app}}, "ingress": [
            {"from": [{"podSelector": {"matchLabels": {"app": from}}}]},
        ]});
        let object = policy(&format!("{long_namespace}/{}", long(end)), spec);
        shop.manifests
            .put(&list(&format!("policy-{end}"), &[object]));
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
    shop.put_and_apply(&policy("web", from_db));
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
    shop.manifests
        .put(&namespace("store", &[("team", "b"), ("stage", "test")]));
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
        shop.put_and_apply(&policy("web", spec));
        let from_db = Case::both(&db, &web, Tcp(80), from_db);
        let from_api = Case::both(&api, &web, Tcp(80), from_api);
        check_counted(&[node], &[from_db, from_api].concat());
    }
}
