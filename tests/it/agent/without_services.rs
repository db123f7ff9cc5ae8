//! The whole process with `--services=off`: what it asks for, serves, sets and leaves alone.

use std::fs;

use super::socket::answering;
use crate::support::agent::{
    NFTLET, PATIENCE, get, lines_with, metric, nftlet, printed, rules, said, small_cluster,
    wait_for_log,
};
use crate::support::objects::{deny_all, namespace, pod, service, with};
use nftlet_lab::fake_api::{CIDRS, NAMESPACES, PODS, POLICIES, SERVICES, SLICES};
use nftlet_lab::netns::{Daemon, Namespace, require_net_admin, wait_for};
use serde_json::{Value, json};

const OFF: &str = "--services=off";
const PROBES: &str = "127.0.0.1:10256";
const METRICS: &str = "127.0.0.1:10249";
const CLOSE_WAIT: &str = "net.netfilter.nf_conntrack_tcp_timeout_close_wait";

/// The names of a process's threads.
fn threads(daemon: &Daemon) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("it runs");
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.map(|name| name.trim().to_owned()).collect()
}

fn read_sysctl(ns: &Namespace, name: &str) -> String {
    let path = format!("/proc/sys/{}", name.replace('.', "/"));
    let output = ns.command("cat").arg(path).output().expect("cat runs");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[test]
fn without_services_nothing_is_read_served_set_or_cleaned_for_them() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    let checked = with(
        service("checked", "10.96.0.12"),
        json!({"spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 32123}}),
    );
    node.api.put(SERVICES, checked);
    node.api.put(NAMESPACES, namespace("shop", &[]));
    node.api.put(PODS, pod("a", "node-1", &[], &["10.1.0.1"]));
    node.api.put(POLICIES, deny_all("deny"));
    let mut with_services = Daemon::start(&node.ns, NFTLET, node.arguments(&[]));
    wait_for_log(&with_services, "the rules are in place");
    wait_for("the threads for services", PATIENCE, || {
        let all = threads(&with_services);
        let wanted = ["flows", "clients", "health-checks", "kube-proxy"];
        wanted
            .iter()
            .all(|it| all.iter().any(|name| name == it))
            .then_some(())
    });
    with_services.stop(PATIENCE);
    drop(with_services);
    assert!(rules(&node.ns).contains("table ip nftlet {"));

    node.ns.nft_load("add table ip kube-proxy");
    node.ns.sysctl(CLOSE_WAIT, "77");
    let of_services = [SERVICES, SLICES, CIDRS];
    let requests = || of_services.map(|path| node.api.requests_for(path).len());
    let before = requests();
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("nftlet.sock");
    let at = format!("--socket={}", socket.display());
    let daemon = Daemon::start(&node.ns, NFTLET, node.arguments(&[OFF, &at]));
    wait_for_log(&daemon, "the rules are in place");
    for path in ["/healthz", "/livez", "/readyz"] {
        let (code, body) = get(&node.ns, PROBES, path);
        assert_eq!(code, 200, "{path}: {body}");
    }
    assert_eq!(get(&node.ns, METRICS, "/proxyMode").0, 404);
    let (_, page) = get(&node.ns, METRICS, "/metrics");
    assert!(metric(&page, "nftlet_network_policies_in_force") > 0.5);
    assert!(metric(&page, "nftlet_objects{kind=\"Pod\"}") > 0.5);
    assert!(metric(&page, "nftlet_objects{kind=\"Service\"}") < 0.5);
    let table = rules(&node.ns);
    assert!(!table.contains("table ip nftlet {"), "{table}");
    assert!(table.contains("10.1.0.1 : goto pods-ingress-"), "{table}");
    assert!(table.contains("table ip kube-proxy"), "{table}");
    let status = answering(&["status", "-o", "json"], socket.to_str().expect("UTF-8"));
    let status: Value = serde_json::from_slice(&status.stdout).expect("JSON");
    assert_eq!(status["policies"]["isolatedPods"], 1, "{status:#}");
    let all = threads(&daemon);
    for name in [
        "flows",
        "clients",
        "health-checks",
        "kube-proxy",
        "settings",
    ] {
        assert!(!all.iter().any(|it| it == name), "{all:?}");
    }
    assert_eq!(read_sysctl(&node.ns, CLOSE_WAIT), "77");
    assert_eq!(requests(), before);
    assert_eq!(lines_with(&daemon.log(), "WARN"), Vec::<String>::new());
    // A change of the policies is all that is left to do.
    node.api.delete(POLICIES, "shop/deny");
    wait_for("the rules to go", PATIENCE, || {
        (!rules(&node.ns).contains("nftlet-policy")).then_some(())
    });
}

#[test]
fn without_services_all_probes_but_livez_wait_for_policies() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    node.api.forbid(POLICIES, true);
    let daemon = Daemon::start(&node.ns, NFTLET, node.arguments(&[OFF]));
    wait_for_log(&daemon, "networkpolicies is forbidden");
    for (path, wanted) in [("/healthz", 503), ("/livez", 200), ("/readyz", 503)] {
        let (code, body) = get(&node.ns, PROBES, path);
        assert_eq!(code, wanted, "{path}: {body}");
    }
    assert!(!daemon.log().contains("the rules are in place"));
    node.api.forbid(POLICIES, false);
    wait_for_log(&daemon, "the rules are in place");
    for path in ["/healthz", "/livez", "/readyz"] {
        let (code, body) = get(&node.ns, PROBES, path);
        assert_eq!(code, 200, "{path}: {body}");
    }
}

#[test]
fn a_process_without_a_task_is_refused() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("node");
    for (flags, text) in [
        (
            &[OFF, "--network-policy=off", "--dry-run"][..],
            "leave nothing to do",
        ),
        (&[OFF, "--init-only"], "--init-only"),
    ] {
        let output = nftlet(&ns, flags, "");
        let line = said(&output);
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(
            line.starts_with("nftlet: ") && line.contains(text),
            "{line}"
        );
        assert_eq!(line.matches('\n').count(), 1, "{line}");
    }
    let empty = tempfile::tempdir().expect("a directory");
    let path = empty.path().to_str().expect("UTF-8");
    let text = printed(&nftlet(&ns, &["--dry-run", OFF, "--manifests", path], ""));
    assert!(!text.contains("table"), "{text}");
}
