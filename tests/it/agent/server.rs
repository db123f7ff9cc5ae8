//! The process at an API server: changes, outages, refusals.

use super::process::shop;
use crate::support::agent::{
    Node, PATIENCE, assert_has, get, lines_with, metric, nftlet, printed, rules, small_cluster,
    wait_for_log, wait_for_rules,
};
use crate::support::manifests::Service;
use crate::support::objects::{self, cluster_policy, namespace, pod, service, slice};
use nftlet_lab::fake_api;
use nftlet_lab::fake_api::{
    CIDRS, CLUSTER_POLICIES, NAMESPACES, NODES, PODS, SERVICES, SLICES, Streaming,
};
use nftlet_lab::netns::{Namespace, require_net_admin, wait_for};
use serde_json::json;

/// Checks that the kernel has what a new process would write for the server's objects.
#[track_caller]
fn assert_as_new(node: &Node) {
    let dry = node.arguments(&["--dry-run"]);
    assert_has(&node.ns, &printed(&nftlet(&node.ns, &dry, "")));
}

#[test]
fn lists_and_changes_of_a_cluster_reach_the_kernel() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    let mut nftlet = node.run();
    assert_eq!(lines_with(&nftlet.log(), &node.api.url()).len(), 1);
    node.leads("10.96.0.11", &["10.1.0.1"]);
    node.has("\"shop/a:http\"");

    node.api.put(SERVICES, service("b", "10.96.0.12"));
    node.api.put(SLICES, slice("b-1", "b", &["10.1.0.2"]));
    node.leads("10.96.0.12", &["10.1.0.2"]);
    node.api.put(SLICES, slice("a-1", "a", &["10.1.0.3"]));
    node.leads("10.96.0.11", &["10.1.0.3"]);
    node.api.delete(SLICES, "shop/b-1");
    node.leads("10.96.0.12", &[]);
    node.api.delete(SERVICES, "shop/a");
    node.lacks("10.96.0.11");
    node.has("10.96.0.12");
    assert_as_new(&node);
    assert_eq!(lines_with(&nftlet.log(), "WARN"), Vec::<String>::new());
    assert_eq!(lines_with(&nftlet.log(), "ERROR"), Vec::<String>::new());
    assert!(nftlet.ended().is_none());
}

#[test]
fn cluster_policies_and_the_nodes_they_select_reach_the_kernel() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    let api = &node.api;
    api.add_api(CLUSTER_POLICIES);
    api.put(NAMESPACES, namespace("shop", &[]));
    api.put(PODS, pod("web", "node-1", &[], &["10.1.0.1"]));
    let of_role = |name: &str, role: &str, address: &str| {
        let addresses = json!([{"type": "InternalIP", "address": address}]);
        let other =
            json!({"metadata": {"labels": {"role": role}}, "status": {"addresses": addresses}});
        api.put(NODES, objects::with(objects::node(name, "zone-a"), other));
    };
    of_role("node-2", "control", "192.0.2.2");
    of_role("node-3", "worker", "192.0.2.3");
    let mut nftlet = node.run();
    let to = json!([{"nodes": {"matchLabels": {"role": "control"}}}]);
    let deny = json!({"tier": "Admin", "priority": 5, "subject": {"namespaces": {}},
        "egress": [{"action": "Deny", "to": to}]});
    node.leads("10.96.0.11", &["10.1.0.1"]);
    node.lacks("nftlet-policy");
    for _ in 0..2 {
        api.put(CLUSTER_POLICIES, cluster_policy("deny", deny.clone()));
        node.has("192.0.2.2");
        node.has("admin-egress-");
        assert_as_new(&node);
        of_role("node-3", "control", "192.0.2.3");
        node.has("192.0.2.3");
        of_role("node-3", "worker", "192.0.2.3");
        node.lacks("192.0.2.3");
        // Services follow the own Node alone.
        node.leads("10.96.0.11", &["10.1.0.1"]);
        api.delete(CLUSTER_POLICIES, "deny");
        node.lacks("nftlet-policy");
    }
    assert_eq!(lines_with(&nftlet.log(), "WARN"), Vec::<String>::new());
    assert!(nftlet.ended().is_none());
}

#[test]
fn changes_while_connections_break_and_history_is_lost_are_not_missed() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    let nftlet = node.run();
    for as_event in [false, true] {
        for round in 0..3_u8 {
            let number = 20 + round + 10 * u8::from(as_event);
            let (name, ip) = (format!("s{number}"), format!("10.96.0.{number}"));
            node.api.put(SERVICES, service(&name, &ip));
            node.break_connections();
            let slice_name = format!("{name}-1");
            node.api
                .put(SLICES, slice(&slice_name, &name, &["10.1.0.9"]));
            node.api.end_watches();
            let again = ["10.1.0.5", &format!("10.1.1.{number}")];
            node.api.put(SLICES, slice(&slice_name, &name, &again));
        }
        // What happens while nftlet is cut off is forgotten before it can ask again.
        node.set_down(true);
        let gone = format!("s{}", 20 + 10 * u8::from(as_event));
        node.api.delete(SERVICES, &format!("shop/{gone}"));
        node.api.delete(SLICES, &format!("shop/{gone}-1"));
        let back = if as_event { "10.1.0.77" } else { "10.1.0.78" };
        node.api.put(SLICES, slice("a-1", "a", &[back]));
        node.api.compact(as_event);
        node.set_down(false);
        node.leads("10.96.0.11", &[back]);
    }
    node.lacks("10.96.0.20");
    node.lacks("10.96.0.30");
    for number in [21, 22, 31, 32] {
        let pods = ["10.1.0.5", &format!("10.1.1.{number}")];
        node.leads(&format!("10.96.0.{number}"), &pods);
    }
    assert_as_new(&node);
    assert_ne!(lines_with(&nftlet.log(), "listing again").len(), 0);
}

#[test]
fn without_its_server_the_rules_stay_and_it_recovers_by_itself() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    let nftlet = node.run();
    let before = rules(&node.ns);
    node.set_down(true);
    wait_for_log(&nftlet, "cannot be reached");
    assert_eq!(rules(&node.ns), before);
    node.api.put(SLICES, slice("a-1", "a", &["10.1.0.2"]));
    node.set_down(false);
    node.leads("10.96.0.11", &["10.1.0.2"]);
    // Servers send bookmarks about once a minute; any event shows a watch to be well.
    node.api.bookmark();
    wait_for_log(&nftlet, "the API server answers again");
    assert_eq!(lines_with(&nftlet.log(), "ERROR"), Vec::<String>::new());
    let told = lines_with(&nftlet.log(), "cannot be reached");
    assert_eq!(told.len(), 1, "{told:#?}");
    assert!(told[0].contains(&node.api.url()), "{told:#?}");
}

#[test]
fn a_restart_without_a_server_leaves_the_rules_in_force() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    drop(node.run());
    let before = rules(&node.ns);
    node.set_down(true);
    let nftlet = node.start();
    wait_for_log(&nftlet, "cannot be reached");
    assert_eq!(rules(&node.ns), before);
    node.api.put(SERVICES, service("b", "10.96.0.12"));
    node.set_down(false);
    node.has("10.96.0.12");
    node.leads("10.96.0.11", &["10.1.0.1"]);
}

#[test]
fn an_expired_token_is_reported_once_and_the_rules_stay() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    node.api.require_token("secret");
    let nftlet = node.run();
    let before = rules(&node.ns);
    node.api.require_token("another");
    node.api.end_watches();
    for path in [SERVICES, SLICES, NODES, CIDRS] {
        node.wait_for_requests(path, 2);
    }
    wait_for_log(&nftlet, "does not accept nftlet's credentials");
    assert_eq!(rules(&node.ns), before);
    node.api.require_token("secret");
    node.api.put(SLICES, slice("a-1", "a", &["10.1.0.2"]));
    node.leads("10.96.0.11", &["10.1.0.2"]);
    let told = lines_with(&nftlet.log(), "WARN");
    assert_eq!(told.len(), 1, "{told:#?}");
    assert!(told[0].contains(&node.api.url()), "{told:#?}");
    assert!(told[0].contains("renew the token"), "{told:#?}");
}

#[test]
fn a_missing_permission_is_reported_once_and_the_rules_stay() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    let nftlet = node.run();
    node.api.forbid(SLICES, true);
    node.api.end_watches();
    node.wait_for_requests(SLICES, 3);
    // The other kinds go on.
    node.api.put(SERVICES, service("b", "10.96.0.12"));
    node.has("10.96.0.12");
    node.leads("10.96.0.11", &["10.1.0.1"]);
    node.api.put(SLICES, slice("a-1", "a", &["10.1.0.2"]));
    node.api.forbid(SLICES, false);
    node.leads("10.96.0.11", &["10.1.0.2"]);
    let told = lines_with(&nftlet.log(), "WARN");
    assert_eq!(told.len(), 1, "{told:#?}");
    for part in [
        "endpointslices is forbidden",
        "ClusterRole",
        "discovery.k8s.io",
        "watch",
    ] {
        assert!(told[0].contains(part), "{part}: {told:#?}");
    }
}

#[test]
fn nothing_is_written_before_all_lists_are_complete() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    node.api.forbid(SLICES, true);
    let nftlet = node.start();
    // Said when every other list has come.
    wait_for_log(&nftlet, "waiting for the complete list of EndpointSlice\n");
    assert_eq!(rules(&node.ns), "");
    node.api.forbid(SLICES, false);
    wait_for_log(&nftlet, "the rules are in place");
    node.leads("10.96.0.11", &["10.1.0.1"]);
    assert_as_new(&node);
}

#[test]
fn servers_without_service_ranges_or_streamed_lists_do() {
    if !require_net_admin() {
        return;
    }
    for streaming in [Streaming::Yes, Streaming::Rejected] {
        let node = small_cluster();
        node.api.remove_api(CIDRS);
        node.api.set_streaming(streaming);
        let nftlet = node.run();
        node.leads("10.96.0.11", &["10.1.0.1"]);
        node.api.put(SLICES, slice("a-1", "a", &["10.1.0.2"]));
        node.leads("10.96.0.11", &["10.1.0.2"]);
        assert_eq!(lines_with(&nftlet.log(), "WARN"), Vec::<String>::new());
        let lists = |request: &fake_api::Recorded| !request.is_watch();
        let listed = node.api.requests_for(SERVICES).iter().any(lists);
        assert_eq!(listed, streaming == Streaming::Rejected);
    }
}

#[test]
fn tables_deleted_by_others_come_back() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    ns.nft_load("table inet others { set mine { type ipv4_addr; elements = { 192.0.2.1 }; }; }");
    let metrics = "127.0.0.1:10249";
    let daemon = manifests.run(&ns, &["--metrics-bind-address", metrics]);
    let web = Service::new("web", 10)
        .port("http", "TCP", 80, Some(30080))
        .port("dns", "UDP", 53, Some(30053));
    let healed = || {
        let (_, page) = get(&ns, metrics, "/metrics");
        metric(&page, "nftlet_foreign_changes_healed_total")
    };
    let told = "modified by another process";
    for (last, family) in [(21, "ip"), (22, "ip6")] {
        let (before, lines) = (healed(), lines_with(&daemon.log(), told).len());
        ns.nft(&["delete", "table", family, "nftlet"]);
        // The table, its count and its line in the log come one after the other.
        wait_for("the table to be put back", PATIENCE, || {
            let counted = healed() > before;
            let told = lines_with(&daemon.log(), told).len() > lines;
            (counted && told).then_some(())
        });
        let pods = [format!("10.244.1.{last}"), format!("fd00:10:244:1::{last}")];
        manifests.endpoints(&web, 8080, &pods.clone().map(|pod| (pod, true)));
        wait_for_rules(&ns, "the new endpoints", |rules| {
            pods.iter()
                .all(|pod| rules.contains(&format!(": {pod} . 8080")))
        });
        assert_has(
            &ns,
            &printed(&nftlet(&ns, &manifests.arguments(&["--dry-run"]), "")),
        );
    }
    assert!(rules(&ns).contains("192.0.2.1"), "what is of others stays");
}
