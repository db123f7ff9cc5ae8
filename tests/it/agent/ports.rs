//! Metrics and probes, and the ports they are at.

use std::io::Write as _;

use super::process::shop;
use crate::support::agent::{
    NFTLET, PATIENCE, get, lines_with, metric, nftlet, one_line, rules, small_cluster,
    wait_for_log, wait_for_rules,
};
use crate::support::manifests::{Manifests, Service};
use crate::support::objects::{node, policy, slice, with};
use nftlet_lab::fake_api::{NAMESPACES, NODES, PODS, POLICIES, SLICES};
use nftlet_lab::netns::{Daemon, Namespace, require_net_admin, wait_for};
use serde_json::json;

#[test]
fn a_server_that_is_away_makes_healthz_fail_and_livez_not() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.conf");
    // Two seconds are two periods.
    let text = format!(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
         clientConnection: {{kubeconfig: {}}}\nnftables: {{syncPeriod: 1s}}\n",
        node.kubeconfig()
    );
    std::fs::write(&config, text).unwrap();
    let config = config.to_str().unwrap();
    let arguments = ["--config", config, "--hostname-override", "node-1"];
    let daemon = Daemon::start(&node.ns, NFTLET, arguments);
    wait_for_log(&daemon, "the rules are in place");
    let probe = |path: &str| get(&node.ns, "127.0.0.1:10256", path);
    assert_eq!(probe("/healthz").0, 200);
    node.set_down(true);
    let body = wait_for("/healthz to fail", PATIENCE, || {
        let (code, body) = probe("/healthz");
        (code == 503).then_some(body)
    });
    assert!(body.contains("no changes have come"), "{body}");
    assert!(body.contains("cannot be reached"), "{body}");
    assert_eq!(probe("/livez").0, 200, "a restart mends nothing");
    node.set_down(false);
    // Nothing has to happen in the cluster for it.
    wait_for("/healthz to recover", PATIENCE, || {
        (probe("/healthz").0 == 200).then_some(())
    });
}

#[test]
fn a_port_in_use_that_must_be_had_names_its_flag_and_the_rules_stay() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    manifests.program(&ns, &[]);
    let before = rules(&ns);
    // Manifests that would change everything.
    let other = Manifests::new();
    let _held = ns.run(|| std::net::TcpListener::bind("127.0.0.1:10249").unwrap());
    for flag in ["--metrics-bind-address", "--healthz-bind-address"] {
        let arguments = other.arguments(&[flag, "127.0.0.1:10249", "--bind-address-hard-fail"]);
        let line = one_line(&nftlet(&ns, &arguments, ""));
        assert!(line.contains("127.0.0.1:10249"), "{line}");
        assert!(line.contains(flag), "{line}");
        assert_eq!(rules(&ns), before);
    }
}

#[test]
fn a_port_in_use_holds_up_nothing_and_is_had_later() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let address = "127.0.0.1:10256";
    let held = ns.run(|| std::net::TcpListener::bind(address).unwrap());
    let daemon = manifests.run(&ns, &["--healthz-bind-address", address]);
    assert_ne!(rules(&ns), "");
    let told = lines_with(&daemon.log(), "cannot listen on 127.0.0.1:10256");
    assert_eq!(told.len(), 1, "{told:#?}");
    assert!(told[0].contains("--healthz-bind-address"), "{told:#?}");
    drop(held);
    wait_for_log(&daemon, "listening on 127.0.0.1:10256 now");
    assert_eq!(get(&ns, address, "/healthz").0, 200);
}

#[test]
fn clients_that_hold_or_flood_the_ports_hold_up_nothing() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let address = "127.0.0.1:10256";
    let daemon = manifests.run(&ns, &["--healthz-bind-address", address]);
    let connect = || std::net::TcpStream::connect(address).unwrap();
    // More than there are places, none of which ends its request.
    let held: Vec<_> = ns.run(|| (0..300).map(|_| connect()).collect());
    for mut client in &held {
        // Those that were driven out already cannot write.
        let _ = client.write_all(b"GET /healthz HTTP/1.1\r\nHost: ");
    }
    // One that sends without end, and never reads.
    let mut flood = ns.run(connect);
    let flood = std::thread::spawn(move || {
        let line = b"GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n".repeat(1000);
        while flood.write_all(&line).is_ok() {}
    });
    assert_eq!(get(&ns, address, "/healthz").0, 200);
    let more = Service::new("more", 12).port("http", "TCP", 80, None);
    manifests.service(&more);
    wait_for_rules(&ns, "the new service", |rules| {
        rules.contains("shop/more:http")
    });
    assert_eq!(get(&ns, address, "/livez").0, 200);
    drop((held, daemon));
    flood.join().unwrap();
}

/// client-go's metrics, with its labels.
#[test]
fn requests_to_the_server_are_counted_and_timed() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    let address = "127.0.0.1:10249";
    let arguments = node.arguments(&["--metrics-bind-address", address]);
    let nftlet = Daemon::start(&node.ns, NFTLET, arguments);
    wait_for_log(&nftlet, "the rules are in place");
    let host = node.api.address();
    let count = |page: &str, series: &str| {
        let mut lines = page.lines();
        let value = lines.find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().expect("a number"))
    };
    let requests = |page: &str, code: &str, method: &str| {
        let labels = format!("code=\"{code}\",host=\"{host}\",method=\"{method}\"");
        count(page, &format!("rest_client_requests_total{{{labels}}}"))
    };
    let timed = |page: &str, method: &str| {
        let labels = format!("host=\"{host}\",verb=\"{method}\"");
        let name = "rest_client_request_duration_seconds_count";
        count(page, &format!("{name}{{{labels}}}"))
    };
    // Five watches, discovery, and the Event of the start.
    let page = wait_for("the metrics of requests", PATIENCE, || {
        let (_, page) = get(&node.ns, address, "/metrics");
        let all = requests(&page, "200", "GET") >= 5.0
            && requests(&page, "404", "GET") >= 1.0
            && timed(&page, "POST") >= 1.0;
        all.then_some(page)
    });
    assert_eq!(requests(&page, "201", "POST"), timed(&page, "POST"));
    assert_eq!(
        requests(&page, "404", "GET"),
        timed(&page, "GET"),
        "watches are not timed"
    );
    node.set_down(true);
    wait_for("requests without an answer", PATIENCE, || {
        let (_, page) = get(&node.ns, address, "/metrics");
        (requests(&page, "<error>", "GET") >= 5.0).then_some(())
    });
}

#[test]
fn metrics_and_probes_tell_of_the_rules() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let (metrics, healthz) = ("127.0.0.1:10249", "127.0.0.1:10256");
    let _nftlet = manifests.run(
        &ns,
        &[
            "--metrics-bind-address",
            metrics,
            "--healthz-bind-address",
            healthz,
        ],
    );
    let (code, page) = get(&ns, metrics, "/metrics");
    assert_eq!(code, 200);
    assert_eq!(metric(&page, "nftlet_objects{kind=\"Service\"}"), 3.0);
    assert_eq!(metric(&page, "nftlet_objects{kind=\"EndpointSlice\"}"), 2.0);
    let latency = "nftlet_programming_latency_seconds_count";
    let first = metric(&page, latency);
    assert!(first > 0.0, "{page}");
    assert!(
        page.contains("kubeproxy_sync_proxy_rules_duration_seconds_count"),
        "{page}"
    );

    manifests.service(&Service::new("more", 12).port("http", "TCP", 80, None));
    wait_for("the metrics of a change", PATIENCE, || {
        let (_, page) = get(&ns, metrics, "/metrics");
        let counted = metric(&page, "nftlet_objects{kind=\"Service\"}") == 4.0;
        (counted && metric(&page, latency) > first).then_some(())
    });
    for address in [metrics, healthz] {
        for path in ["/healthz", "/livez"] {
            let (code, body) = get(&ns, address, path);
            assert_eq!(code, 200, "{path}: {body}");
            let body: serde_json::Value = serde_json::from_str(&body).unwrap();
            assert!(body["lastUpdated"].is_string(), "{path}: {body}");
        }
    }
    assert_eq!(
        get(&ns, metrics, "/proxyMode"),
        (200, "nftables".to_owned())
    );
    assert_eq!(get(&ns, healthz, "/metrics").0, 404);
}

#[test]
fn probes_say_no_before_the_first_rules() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    node.api.forbid(SLICES, true);
    // The ports without flags are kube-proxy's.
    let nftlet = Daemon::start(&node.ns, NFTLET, node.arguments(&[]));
    wait_for_log(&nftlet, "endpointslices is forbidden");
    let (code, body) = get(&node.ns, "127.0.0.1:10256", "/healthz");
    assert_eq!(code, 503, "{body}");
    assert_eq!(get(&node.ns, "127.0.0.1:10256", "/livez").0, 200);
    node.api.forbid(SLICES, false);
    wait_for_log(&nftlet, "the rules are in place");
    assert_eq!(get(&node.ns, "127.0.0.1:10256", "/healthz").0, 200);
    let (_, page) = get(&node.ns, "127.0.0.1:10249", "/metrics");
    assert!(metric(&page, "nftlet_watch_lists_total{kind=\"Service\"}") >= 1.0);
}

#[test]
fn readiness_waits_for_network_policies_and_services_do_not() {
    if !require_net_admin() {
        return;
    }
    let (probes, metrics) = ("127.0.0.1:10256", "127.0.0.1:10249");
    let in_force = |node: &Namespace| {
        let (_, page) = get(node, metrics, "/metrics");
        let name = "nftlet_network_policies_in_force ";
        let mut lines = page.lines();
        lines.find_map(|line| line.strip_prefix(name).map(str::to_owned))
    };
    // Pods and Namespaces are asked for as soon as there is a policy.
    for (path, plural) in [
        (POLICIES, "networkpolicies"),
        (PODS, "pods"),
        (NAMESPACES, "namespaces"),
    ] {
        let node = small_cluster();
        node.api
            .put(POLICIES, policy("closed", json!({"podSelector": {}})));
        node.api.forbid(path, true);
        let nftlet = Daemon::start(&node.ns, NFTLET, node.arguments(&[]));
        wait_for_log(&nftlet, "network policies are not in force yet");
        let forbidden = format!("{plural} is forbidden");
        let (code, body) = wait_for("the reason", PATIENCE, || {
            Some(get(&node.ns, probes, "/readyz")).filter(|(_, body)| body.contains(&forbidden))
        });
        assert_eq!(code, 503, "{body}");
        assert!(
            body.contains("network policies are not in force: waiting for"),
            "{body}"
        );
        assert_eq!(get(&node.ns, probes, "/healthz").0, 200);
        assert_eq!(in_force(&node.ns).as_deref(), Some("0"), "{plural}");
        node.api.forbid(path, false);
        wait_for("readiness", PATIENCE, || {
            (get(&node.ns, probes, "/readyz").0 == 200).then_some(())
        });
        wait_for_log(&nftlet, "network policies are in force");
        assert_eq!(in_force(&node.ns).as_deref(), Some("1"), "{plural}");
    }
    let node = small_cluster();
    let off = ["--network-policy=off"];
    let nftlet = Daemon::start(&node.ns, NFTLET, node.arguments(&off));
    wait_for_log(&nftlet, "the rules are in place");
    assert_eq!(get(&node.ns, probes, "/readyz").0, 200);
    assert_eq!(in_force(&node.ns), None);
}

#[test]
fn a_change_with_a_trigger_time_is_measured_from_there() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let metrics = "127.0.0.1:10249";
    let _daemon = manifests.run(&ns, &["--metrics-bind-address", metrics]);
    let measured = || {
        let (_, page) = get(&ns, metrics, "/metrics");
        let name = "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"}";
        metric(&page, name)
    };
    assert!(
        measured() < 0.5,
        "the slices of the shop have no trigger time"
    );
    manifests.put(&with(
        slice("web-triggered", "web", &["10.244.1.99"]),
        json!({"metadata": {"annotations": {
            "endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z",
        }}}),
    ));
    wait_for("the change to be measured", PATIENCE, || {
        (measured() > 0.5).then_some(())
    });
}

#[test]
fn a_deleted_node_gets_no_more_traffic_and_keeps_its_rules() {
    if !require_net_admin() {
        return;
    }
    let node_1 = small_cluster();
    let mut object = node("node-1", "zone-a");
    object["status"]["addresses"] = json!([{"type": "InternalIP", "address": "192.0.2.77"}]);
    object["spec"]["podCIDRs"] = json!(["10.244.7.0/24"]);
    node_1.api.put(NODES, object.clone());
    let arguments = node_1.arguments(&["--detect-local-mode", "NodeCIDR"]);
    let daemon = Daemon::start(&node_1.ns, NFTLET, arguments);
    wait_for_log(&daemon, "the rules are in place");
    let probe = |path: &str| get(&node_1.ns, "127.0.0.1:10256", path);
    assert_eq!(probe("/healthz").0, 200);
    let before = rules(&node_1.ns);
    for fact in ["192.0.2.77", "10.244.7.0/24"] {
        assert!(before.contains(fact), "{fact} in {before}");
    }
    node_1.api.delete(NODES, "node-1");
    let body = wait_for("/healthz to fail", PATIENCE, || {
        let (code, body) = probe("/healthz");
        (code == 503).then_some(body)
    });
    assert!(body.contains("the node is being removed"), "{body}");
    assert!(body.contains("\"nodeEligible\":false"), "{body}");
    assert_eq!(probe("/livez").0, 200);
    // What comes later finds the node as it was.
    node_1.api.put(SLICES, slice("a-1", "a", &["10.1.0.2"]));
    node_1.leads("10.96.0.11", &["10.1.0.2"]);
    assert_eq!(rules(&node_1.ns), before.replace("10.1.0.1", "10.1.0.2"));
    assert_eq!(probe("/healthz").0, 503);
    node_1.api.put(NODES, object);
    wait_for("/healthz to recover", PATIENCE, || {
        (probe("/healthz").0 == 200).then_some(())
    });
}
