//! How the process starts, from which sources, and what it says where it cannot.

use std::process::Command;

use crate::support::agent::{
    NFTLET, Node, confined, lines_with, nftlet, of_repository, one_line, printed, rules, said,
    wait_for_log,
};
use crate::support::manifests::{CLUSTER_CIDR, Manifests, Service};
use crate::support::skip::skip;
use nftlet_lab::netns::{Daemon, Namespace, require_net_admin};
use serde_json::json;

/// Manifests with services of several types on both families.
pub fn shop() -> Manifests {
    let manifests = Manifests::new();
    let mut web = Service::new("web", 10)
        .port("http", "TCP", 80, Some(30080))
        .port("dns", "UDP", 53, Some(30053));
    web.kind = "LoadBalancer".into();
    web.external_ips = vec!["198.51.100.7".into(), "2001:db8:2::7".into()];
    web.load_balancer_ips = vec!["203.0.113.10".into(), "2001:db8:1::10".into()];
    let idle = Service::new("idle", 11).port("http", "TCP", 80, None);
    let pods = ["10.244.1.11", "10.244.1.12", "fd00:10:244:1::11"];
    let pods = pods.map(|pod| (pod.to_owned(), true));
    manifests.service(&web);
    manifests.endpoints(&web, 8080, &pods);
    manifests.service(&idle);
    manifests.put(&json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "elsewhere", "namespace": "shop"},
        "spec": {"type": "ExternalName", "externalName": "example.com"},
    }));
    manifests
}

#[test]
fn a_dry_run_prints_the_same_for_a_cluster_and_for_its_manifests() {
    if !require_net_admin() {
        return;
    }
    let manifests = shop();
    let node = Node::new();
    node.put_all(&manifests);
    let more = ["--dry-run", "--cluster-cidr", CLUSTER_CIDR];
    let cluster = nftlet(&node.ns, &node.arguments(&more), "");
    let files = nftlet(&node.ns, &manifests.arguments(&more), "");
    let text = printed(&files);
    assert_eq!(printed(&cluster), text);
    assert!(text.contains("\"shop/web:http\""), "{text}");
    assert!(text.contains("shop/elsewhere: ExternalName"), "{text}");
    assert_eq!(said(&files), "");
    assert_eq!(rules(&node.ns), "", "a dry run changes nothing");
}

#[test]
fn once_writes_the_rules_of_a_dry_run_from_either_source_and_ends() {
    if !require_net_admin() {
        return;
    }
    let manifests = shop();
    let node = Node::new();
    node.put_all(&manifests);
    let cidr = ["--cluster-cidr", CLUSTER_CIDR];
    let dry = manifests.arguments(&[&["--dry-run"], &cidr[..]].concat());
    let by_nft = Namespace::new("by-nft");
    by_nft.nft_load(&printed(&nftlet(&by_nft, &dry, "")));
    let wanted = rules(&by_nft);
    assert!(wanted.contains("table ip6 nftlet"), "{wanted}");

    let once = [&["--once"], &cidr[..]].concat();
    let from_files = Namespace::new("from-files");
    let text = printed(&nftlet(&from_files, &manifests.arguments(&once), ""));
    assert_eq!(text, "");
    assert_eq!(rules(&from_files), wanted);
    assert_eq!(printed(&nftlet(&node.ns, &node.arguments(&once), "")), "");
    assert_eq!(rules(&node.ns), wanted);
    // Nothing to do the second time.
    printed(&nftlet(&node.ns, &node.arguments(&once), ""));
    assert_eq!(rules(&node.ns), wanted);
}

#[test]
fn manifests_come_from_standard_input() {
    if !require_net_admin() {
        return;
    }
    let manifests = shop();
    let mut input = String::new();
    for entry in std::fs::read_dir(manifests.path()).unwrap() {
        input.push_str(&std::fs::read_to_string(entry.unwrap().path()).unwrap());
        input.push('\n');
    }
    let ns = Namespace::new("node");
    let arguments = |mode| ["--manifests", "-", "--hostname-override", "node-1", mode];
    let text = printed(&nftlet(&ns, &arguments("--dry-run"), &input));
    let of_files = nftlet(&ns, &manifests.arguments(&["--dry-run"]), "");
    assert_eq!(text, printed(&of_files));
    assert_eq!(rules(&ns), "");
    printed(&nftlet(&ns, &arguments("--once"), &input));
    let by_nft = Namespace::new("by-nft");
    by_nft.nft_load(&text);
    assert_eq!(rules(&ns), rules(&by_nft));
}

#[test]
fn without_a_source_both_ways_out_are_named() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("node");
    for mode in [&[][..], &["--dry-run"], &["--once"]] {
        let line = one_line(&nftlet(&ns, mode, ""));
        assert!(line.contains("--kubeconfig FILE"), "{line}");
        assert!(line.contains("--manifests PATH"), "{line}");
    }
}

#[test]
fn files_that_cannot_be_used_are_named_in_one_line() {
    if !require_net_admin() {
        return;
    }
    let (directory, ns) = (tempfile::tempdir().unwrap(), Namespace::new("node"));
    let absent = directory.path().join("absent");
    let absent = absent.to_str().unwrap();
    for mode in [&[][..], &["--dry-run"], &["--once"]] {
        for flag in ["--manifests", "--kubeconfig"] {
            let arguments = [&[flag, absent], mode].concat();
            let line = one_line(&nftlet(&ns, &arguments, ""));
            assert!(line.contains(absent), "{line}");
            assert!(line.contains("No such file"), "{line}");
        }
    }
    let config = directory.path().join("config");
    let config_path = config.to_str().unwrap();
    let no_server = "{apiVersion: v1, kind: Config, current-context: x, \
        clusters: [{name: x, cluster: {}}], users: [{name: x, user: {}}], \
        contexts: [{name: x, context: {cluster: x, user: x}}]}";
    let no_certificate = no_server.replace(
        "cluster: {}",
        "cluster: {server: 'https://127.0.0.1:1', certificate-authority: /absent/ca.crt}",
    );
    let contents = [
        "",
        "apiVersion: [\n",
        "users:\n- name: x\n  user: {token: hush\n  more\n",
        "kind: Config\napiVersion: v1\n",
        no_server,
        &no_certificate,
        "- a\n- b\n",
    ];
    for content in contents {
        std::fs::write(&config, content).unwrap();
        for mode in [&[][..], &["--dry-run"]] {
            let arguments = [&["--kubeconfig", config_path], mode].concat();
            let line = one_line(&nftlet(&ns, &arguments, ""));
            assert!(line.contains(config_path), "{line}");
            assert!(!line.contains("hush"), "a secret is printed: {line}");
        }
    }
    assert_eq!(rules(&ns), "");
}

#[test]
fn without_its_capability_it_says_which_one_it_needs() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let nothing = [
        "--bounding-set=-all",
        "--inh-caps=-all",
        "--ambient-caps=-all",
    ];
    for mode in [&[][..], &["--once"]] {
        let output = confined(&ns, &nothing, &manifests.arguments(mode), "");
        let line = one_line(&output);
        assert!(line.contains("CAP_NET_ADMIN"), "{line}");
    }
    // Looking needs no rights.
    let dry = manifests.arguments(&["--dry-run"]);
    assert_ne!(printed(&confined(&ns, &nothing, &dry, "")), "");
}

#[test]
fn inside_a_user_namespace_it_works_too() {
    if !require_net_admin() {
        return;
    }
    let user_namespace = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", "--"]);
        command
    };
    let tried = user_namespace().arg("true").output().unwrap();
    if !tried.status.success() {
        let why = said(&tried);
        skip("user-namespaces", &why);
        return;
    }
    let manifests = shop();
    let output = user_namespace()
        .args(["sh", "-c", "\"$@\" && exec nft list ruleset", "sh", NFTLET])
        .args(manifests.arguments(&["--once"]))
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .output()
        .unwrap();
    let by_nft = Namespace::new("by-nft");
    let dry = manifests.arguments(&["--dry-run"]);
    by_nft.nft_load(&printed(&nftlet(&by_nft, &dry, "")));
    assert_eq!(printed(&output), rules(&by_nft));
}

#[test]
fn manifests_without_objects_remove_nothing_unless_that_is_allowed() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    manifests.program(&ns, &[]);
    let before = rules(&ns);
    let empty = tempfile::tempdir().unwrap();
    let directory = empty.path().to_str().unwrap();
    let arguments = ["--manifests", directory, "--hostname-override", "node-1"];
    // Written once, the rules would be gone.
    let once = nftlet(&ns, &[&arguments[..], &["--once"]].concat(), "");
    assert_eq!(once.status.code(), Some(1));
    let no_objects = format!("no objects found in {directory}");
    let lines = lines_with(&said(&once), &no_objects);
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(lines[0].contains("--allow-empty"), "{lines:#?}");
    assert_eq!(rules(&ns), before);
    // A daemon waits, and follows the first object.
    let quiet = ["--metrics-bind-address=", "--healthz-bind-address="];
    let daemon = Daemon::start(&ns, NFTLET, [&arguments[..], &quiet].concat());
    wait_for_log(&daemon, "waiting for the complete list of");
    assert_eq!(lines_with(&daemon.log(), &no_objects).len(), 1);
    assert_eq!(rules(&ns), before);
    let other = Service::new("other", 99)
        .port("http", "TCP", 80, None)
        .object();
    std::fs::write(empty.path().join("other.json"), other.to_string()).unwrap();
    wait_for_log(&daemon, "the rules are in place");
    assert!(rules(&ns).contains("10.96.0.99"));
    assert!(!rules(&ns).contains("203.0.113.10"));
    drop(daemon);
    std::fs::remove_file(empty.path().join("other.json")).unwrap();
    let allowed = [&arguments[..], &["--once", "--allow-empty"]].concat();
    printed(&nftlet(&ns, &allowed, ""));
    assert!(!rules(&ns).contains("10.96.0.99"));
}

#[test]
fn contradictory_flags_end_with_2() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("node");
    let contradictions = [
        &["--dry-run", "--once", "--manifests", "x"][..],
        &["--kubeconfig", "x", "--manifests", "x"],
        &["--log-format", "loud"],
        &["--cluster-cidr", "10.0.0.0/8,10.1.0.0/16"],
        &["--manifests"],
        &["--unheard-of"],
        &["--manifests", "x", "--master", "http://x"],
        &["--init-only", "--once"],
        &["--write-config-to", "x", "--dry-run"],
        &["--proxy-mode", "userspace"],
        &["--masquerade-bit", "32"],
        &["--oom-score-adj", "-1001"],
        &["--master", "ftp://x"],
        &["--once", "man"],
        &["--detect-local-mode", "BridgeInterface"],
    ];
    for flags in contradictions {
        let output = nftlet(&ns, flags, "");
        let said = said(&output);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {said}");
        assert!(
            said.starts_with("error: ") || said.starts_with("nftlet: "),
            "{said}"
        );
        assert_eq!(said.matches('\n').count(), 1, "{said}");
    }
}

#[test]
fn a_dump_of_kubectl_becomes_rules_that_nft_takes() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("node");
    let dump = of_repository("tests/fixtures/kubectl-get-all.yaml");
    let text = printed(&nftlet(
        &ns,
        &["--dry-run", "--manifests", dump.to_str().unwrap()],
        "",
    ));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &text).unwrap();
    ns.nft(&["-c", "-f", file.path().to_str().unwrap()]);
    assert_eq!(rules(&ns), "", "checking changes nothing");
    ns.nft_load(&text);
    let loaded = rules(&ns);
    for name in [
        "default/kubernetes:https",
        "lab/svc-00002:p0",
        "shop/web:dns",
    ] {
        assert!(loaded.contains(name), "{name} in {loaded}");
    }
}
