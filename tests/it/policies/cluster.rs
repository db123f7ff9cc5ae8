//! ClusterNetworkPolicies: packets between the tiers, peers, ports, and a pod that reaches itself.

use std::net::IpAddr;

use crate::support::manifests::Service;
use crate::support::objects::{cluster_policy, namespace, policy};
use crate::support::reach::{Case, Probe, check_counted};
use crate::support::shop::{Shop, pod};
use nftlet_lab::netns::{LabOptions, Machine, require_net_admin};
use serde_json::{Value, json};

use super::rules::ip;
use Probe::{Ping, Tcp, Udp};

const EVERY: [Probe; 3] = [Tcp(80), Udp(80), Ping];

/// A policy of a tier about the pods with this label `app`.
fn about(app: &str, tier: &str, priority: u16, direction: &str, rules: Value) -> Value {
    let pods = json!({"podSelector": {"matchLabels": {"app": app}}});
    let spec =
        json!({"tier": tier, "priority": priority, "subject": {"pods": pods}, direction: rules});
    cluster_policy(&format!("{tier}-{priority}").to_lowercase(), spec)
}

fn of_app(app: &str) -> Value {
    json!({"pods": {"podSelector": {"matchLabels": {"app": app}}}})
}

fn of_team(team: &str) -> Value {
    json!({"namespaces": {"matchLabels": {"team": team}}})
}

fn from(action: &str, peer: Value) -> Value {
    json!({"action": action, "from": [peer]})
}

fn to(action: &str, peer: Value) -> Value {
    json!({"action": action, "to": [peer]})
}

/// All probes of both families.
fn every(from: &Machine, to: &Machine, passes: bool) -> Vec<Case> {
    let cases = EVERY.map(|probe| Case::both(from, to, probe, passes));
    cases.concat()
}

#[test]
fn the_admin_tier_denies_and_accepts_before_network_policies() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let client = shop.lab.client();
    let cases = |from_db, from_api, from_client| {
        let mut cases = every(&db, &web, from_db);
        cases.extend(every(&api, &web, from_api));
        cases.extend(every(client, &web, from_client));
        // Replies to what the pod sends pass, and its node reaches it.
        cases.extend(every(&web, &db, true));
        cases.extend(every(&shop.lab.node().machine, &web, true));
        cases
    };
    let web_only = json!({"matchLabels": {"app": "web"}});
    let open = json!({"podSelector": web_only, "ingress": [{}]});
    let closed = json!({"podSelector": web_only, "ingress": []});
    let check = |rules: &[Value], wanted: [bool; 3]| {
        shop.put_and_apply(&about("web", "Admin", 5, "ingress", json!(rules)));
        check_counted(&[shop.node()], &cases(wanted[0], wanted[1], wanted[2]));
    };
    shop.manifests.put(&policy("web", open));
    check(&[from("Deny", of_app("db"))], [false, true, true]);
    // The first rule that matches decides, and the source may be outside of the cluster.
    check(
        &[
            from("Pass", of_app("db")),
            from("Deny", json!({"namespaces": {}})),
        ],
        [true, false, true],
    );
    shop.manifests.put(&policy("web", closed));
    check(&[from("Accept", of_team("b"))], [false, true, false]);
    check(
        &[from("Pass", json!({"namespaces": {}}))],
        [false, false, false],
    );
    // No rule matches.
    check(&[from("Deny", of_app("none"))], [false, false, false]);
    shop.manifests.remove("NetworkPolicy", "web");
    check(
        &[from("Accept", of_team("b")), from("Deny", of_team("a"))],
        [false, true, true],
    );
    // What is not understood denies everything but the node.
    check(
        &[
            from("Accept", of_team("b")),
            from("Pass", json!({"services": {}})),
        ],
        [false, true, false],
    );
}

#[test]
fn the_baseline_is_asked_where_no_network_policy_isolates() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let node = shop.node();
    let cases = |db_to_web, api_to_web, web_to_db| {
        let mut cases = every(&db, &web, db_to_web);
        cases.extend(every(&api, &web, api_to_web));
        cases.extend(every(&web, &db, web_to_db));
        cases
    };
    let rules = json!([
        from("Accept", of_team("b")),
        from("Deny", json!({"namespaces": {}}))
    ]);
    let mut baseline = about("web", "Baseline", 5, "ingress", rules);
    baseline["spec"]["egress"] = json!([to("Deny", of_app("db"))]);
    shop.put_and_apply(&baseline);
    check_counted(&[node], &cases(false, true, false));
    // It decides finally, in its direction.
    let web_only = json!({"matchLabels": {"app": "web"}});
    let db_only = json!([{"from": [{"podSelector": {"matchLabels": {"app": "db"}}}]}]);
    shop.put_and_apply(&policy(
        "web",
        json!({"podSelector": web_only, "ingress": db_only}),
    ));
    check_counted(&[node], &cases(true, false, false));
    // The tier before both passes or decides.
    let rules = json!([from("Accept", of_team("b")), from("Pass", of_team("a"))]);
    shop.put_and_apply(&about("web", "Admin", 0, "ingress", rules));
    check_counted(&[node], &cases(true, true, false));
    shop.manifests.remove("NetworkPolicy", "web");
    shop.apply();
    check_counted(&[node], &cases(false, true, false));
}

#[test]
fn priorities_actions_and_labels_change_in_place() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    let check = |from_db, from_api| {
        let cases = [every(&db, &web, from_db), every(&api, &web, from_api)];
        check_counted(&[shop.node()], &cases.concat());
    };
    let named = |name: &str, priority: u16, rules: Value| {
        let mut policy = about("web", "Admin", priority, "ingress", rules);
        policy["metadata"]["name"] = json!(name);
        policy
    };
    let open = json!([from("Accept", json!({"namespaces": {}}))]);
    let closed = |action: &str| json!([from(action, of_team("b"))]);
    shop.manifests.put(&named("b", 10, open.clone()));
    shop.put_and_apply(&named("a", 20, closed("Deny")));
    check(true, true);
    shop.put_and_apply(&named("a", 9, closed("Deny")));
    check(true, false);
    // Of equal ones the first by name.
    shop.put_and_apply(&named("a", 10, closed("Deny")));
    check(true, false);
    shop.put_and_apply(&named("c", 10, json!([from("Deny", of_app("db"))])));
    check(true, false);
    shop.put_and_apply(&named("a", 10, closed("Accept")));
    check(true, true);
    shop.put_and_apply(&named("b", 30, open));
    check(false, true);
    shop.put_and_apply(&named("a", 10, closed("Deny")));
    check(false, false);
    shop.put_and_apply(&namespace("store", &[("team", "c")]));
    check(false, true);
    shop.manifests.remove("ClusterNetworkPolicy", "c");
    shop.manifests.put(&namespace("store", &[("team", "b")]));
    shop.apply();
    check(true, false);
    // A pod with other labels is no subject any more.
    shop.put_and_apply(&pod("shop", "web", &[("app", "other")], &web));
    check(true, true);
}

#[test]
fn nodes_and_networks_are_peers_of_egress() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::with(LabOptions {
        nodes: 2,
        ..LabOptions::default()
    });
    let [web, db, api] = shop.pods();
    let client = shop.lab.client();
    let [own, other] = [0, 1].map(|node| shop.lab.nodes[node].machine.clone());
    let role = |name: &str, role: &str, machine: &Machine| {
        let types = ["ExternalIP", "Hostname"].into_iter();
        let addresses = types.zip(machine.addresses());
        let addresses: Vec<Value> = addresses
            .map(|(type_, address)| json!({"type": type_, "address": address}))
            .collect();
        json!({"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "labels": {"role": role}}, "status": {"addresses": addresses}})
    };
    let check = |rules: &[Value], wanted: [bool; 5]| {
        shop.put_and_apply(&about("web", "Admin", 5, "egress", json!(rules)));
        let targets = [&db, &api, client, &own, &other];
        let cases = targets.iter().zip(wanted);
        let cases: Vec<Case> = cases
            .flat_map(|(target, passes)| every(&web, target, passes))
            .collect();
        check_counted(&[&own.ns], &cases);
    };
    let everything = json!({"networks": ["0.0.0.0/0", "::/0"]});
    let deny = to("Deny", everything.clone());
    // Pods are in networks, too.
    check(std::slice::from_ref(&deny), [false; 5]);
    let nodes = |role: &str| json!({"nodes": {"matchLabels": {"role": role}}});
    shop.manifests.put(&role("node-1", "worker", &own));
    shop.manifests.put(&role("node-2", "control", &other));
    check(
        &[to("Accept", nodes("control")), deny.clone()],
        [false, false, false, false, true],
    );
    check(
        &[to("Accept", json!({"nodes": {}})), deny.clone()],
        [false, false, false, true, true],
    );
    check(
        &[to("Deny", nodes("worker"))],
        [true, true, true, false, true],
    );
    shop.manifests.put(&role("node-1", "control", &own));
    check(&[to("Deny", nodes("worker"))], [true; 5]);
    let shop_pods = to("Accept", of_team("a"));
    check(
        &[shop_pods, deny.clone()],
        [true, false, false, false, false],
    );
    let networks = client.addresses().map(|address| {
        let length = if address.is_ipv4() { 32 } else { 128 };
        format!("{address}/{length}")
    });
    let accepted = to("Accept", json!({"networks": networks}));
    check(&[accepted, deny], [false, false, true, false, false]);
}

#[test]
fn protocols_are_numbers_ranges_and_names() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, _] = shop.pods();
    let check = |protocols: Value, wanted: [bool; 5]| {
        let mut rule = from("Accept", json!({"namespaces": {}}));
        rule["protocols"] = protocols;
        let rules = json!([rule, from("Deny", json!({"namespaces": {}}))]);
        shop.put_and_apply(&about("web", "Admin", 5, "ingress", rules));
        let probes = [Tcp(80), Tcp(8080), Udp(80), Udp(8080), Ping].into_iter();
        let cases = probes.zip(wanted);
        let cases = cases.flat_map(|(probe, passes)| Case::both(&db, &web, probe, passes));
        check_counted(&[shop.node()], &cases.collect::<Vec<_>>());
    };
    let number = |number: u16| json!({"destinationPort": {"number": number}});
    check(
        json!([{"tcp": number(80)}]),
        [true, false, false, false, false],
    );
    check(
        json!([{"udp": number(8080)}, {"tcp": number(8080)}]),
        [false, true, false, true, false],
    );
    let range = json!({"destinationPort": {"range": {"start": 79, "end": 8079}}});
    check(json!([{"tcp": range}]), [true, false, false, false, false]);
    let named = json!([{"destinationNamedPort": "http"}]);
    check(named.clone(), [false, true, false, false, false]);
    // The port of the name may be of another protocol.
    let mut of_udp = pod("shop", "web", &[("app", "web")], &web);
    let port = json!({"name": "http", "containerPort": 80, "protocol": "UDP"});
    of_udp["spec"]["containers"][0]["ports"] = json!([port]);
    shop.manifests.put(&of_udp);
    check(named, [false, false, true, false, false]);
}

#[test]
fn a_pod_reaches_itself_through_a_service_as_the_tiers_allow() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, _, _] = shop.pods();
    let service = Service::new("self", 10)
        .port("tcp", "TCP", 80, None)
        .port("udp", "UDP", 80, None);
    shop.manifests.service(&service);
    let own = web.addresses().map(|address| (address.to_string(), true));
    shop.manifests.endpoints(&service, 8080, &own);
    let check = |passes| {
        let mut cases = Vec::new();
        for probe in [Tcp(80), Udp(80)] {
            // At its own address no policy sees it.
            cases.extend(Case::both(&web, &web, probe, true));
            let to = ["10.96.0.10", "fd00:10:96::a"].map(ip);
            cases.extend(to.map(|to: IpAddr| Case {
                from: web.clone(),
                to,
                probe,
                passes,
            }));
        }
        check_counted(&[shop.node()], &cases);
    };
    let isolated = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
    shop.put_and_apply(&policy("closed", isolated));
    check(true);
    // The NetworkPolicy decides before the baseline.
    let deny = json!([from("Deny", of_app("web"))]);
    shop.put_and_apply(&about("web", "Baseline", 5, "ingress", deny.clone()));
    check(true);
    shop.manifests.remove("NetworkPolicy", "closed");
    shop.apply();
    check(false);
    shop.manifests.remove("ClusterNetworkPolicy", "baseline-5");
    for (direction, rule) in [
        ("ingress", from("Deny", of_app("web"))),
        ("egress", to("Deny", of_app("web"))),
    ] {
        shop.put_and_apply(&about("web", "Admin", 5, direction, json!([rule])));
        check(false);
    }
    shop.put_and_apply(&about(
        "web",
        "Admin",
        5,
        "ingress",
        json!([from("Accept", of_app("web"))]),
    ));
    check(true);
}

#[test]
fn each_end_has_its_own_tiers_and_replies_pass() {
    if !require_net_admin() {
        return;
    }
    let shop = Shop::open();
    let [web, db, api] = shop.pods();
    // web may not send, db may send to anyone, and api receives nothing.
    let everything = json!({"networks": ["0.0.0.0/0", "::/0"]});
    let pods = json!({"namespaces": {}});
    shop.manifests.put(&about(
        "web",
        "Admin",
        1,
        "egress",
        json!([to("Deny", everything.clone())]),
    ));
    shop.manifests.put(&about(
        "db",
        "Admin",
        2,
        "egress",
        json!([to("Accept", everything)]),
    ));
    shop.manifests.put(&about(
        "api",
        "Admin",
        3,
        "ingress",
        json!([from("Deny", pods)]),
    ));
    shop.apply();
    let cases = [
        every(&web, &db, false),
        every(&db, &web, true),
        every(&db, &api, false),
        every(&api, &web, true),
        every(&shop.lab.node().machine, &web, true),
    ];
    check_counted(&[shop.node()], &cases.concat());
}
