//! The kubectl plugin, with a kubectl that answers for a cluster of two nodes.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A kubectl with one agent on each of two nodes, of which that on node-2 is degraded.
const KUBECTL: &str = r#"#!/bin/sh
case "$*" in
"get pods -n kube-system -l app.kubernetes.io/name=nftlet"*) printf 'node-1 nftlet-a\nnode-2 nftlet-b\n' ;;
"get pods -n "*) ;;
"get pod -n shop cart-7c9"*) printf node-2 ;;
"get pod -n"*) echo "not found" >&2; exit 1 ;;
"get servicecidrs"*) ;;
"get clusternetworkpolicies"*) exit 1 ;;
"get services,endpointslices,nodes,pods,namespaces,networkpolicies,servicecidrs.networking.k8s.io -A"*) cat "$OBJECTS" ;;
"exec -n kube-system nftlet-b -- nftlet status"*) printf 'node-2 DEGRADED\n  ! the kernel refused the rules\n'; exit 3 ;;
"exec -n kube-system nftlet-a -- nftlet status"*) printf 'node-1 HEALTHY\n\n' ;;
"exec -i -n kube-system "*) shift 4; printf 'input|%s|' "$*" ;;
"exec -n kube-system "*) shift 3; printf '%s|' "$@" ;;
*) echo "unexpected: $*" >&2; exit 9 ;;
esac
"#;

struct Plugin {
    directory: tempfile::TempDir,
}

impl Plugin {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kubectl = directory.path().join("kubectl");
        fs::write(&kubectl, KUBECTL).unwrap();
        fs::set_permissions(&kubectl, fs::Permissions::from_mode(0o755)).unwrap();
        let nftlet = directory.path().join("nftlet");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_nftlet"), nftlet).unwrap();
        Self { directory }
    }

    fn run(&self, words: &[&str], variables: &[(&str, &str)]) -> Output {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let path = std::env::var("PATH").unwrap_or_default();
        let objects: PathBuf = root.join("tests/fixtures/insight/shop.yaml");
        Command::new(root.join("kubectl/kubectl-nftlet"))
            .args(words)
            .env(
                "PATH",
                format!("{}:{path}", self.directory.path().display()),
            )
            .env("OBJECTS", objects)
            .env_remove("NODE_NAME")
            .envs(variables.iter().copied())
            .output()
            .expect("the plugin runs")
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_status_of_all_nodes_is_a_row_each() {
    let output = Plugin::new().run(&["status"], &[]);
    let text = stdout(&output);
    let rows: Vec<Vec<&str>> = text
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(rows[1], ["node-1", "healthy"]);
    assert_eq!(rows[2][..2], ["node-2", "DEGRADED"]);
    assert!(
        text.contains("DEGRADED   the kernel refused the rules"),
        "{text}"
    );
    assert_eq!(output.status.code(), Some(3));
    let one = Plugin::new().run(&["status", "-o", "text", "node-2"], &[]);
    assert_eq!(one.status.code(), Some(3), "{one:?}");
    assert!(stdout(&one).contains("! the kernel refused the rules"));
}

#[test]
fn the_agent_of_the_right_node_is_asked() {
    let plugin = Plugin::new();
    for (words, asked) in [
        (
            &["explain", "shop/cart-7c9", "svc/shop/web:80", "-o", "json"][..],
            "nftlet-b|--|nftlet|explain|shop/cart-7c9|svc/shop/web:80|-o|json|",
        ),
        (
            &["explain", "internet", "svc/shop/web", "--node=node-2"],
            "nftlet-b|--|nftlet|explain|internet|svc/shop/web|",
        ),
        (
            &["services", "shop", "--node", "node-2"],
            "nftlet-b|--|nftlet|services|shop|",
        ),
        (
            &["explain", "-o", "json", "shop/cart-7c9", "node"],
            "nftlet-b|--|nftlet|explain|-o|json|shop/cart-7c9|node|",
        ),
        (
            &["explain", "--batch", "-"],
            "input|nftlet-a -- nftlet explain --batch -|",
        ),
        (&["policies"], "nftlet-a|--|nftlet|policies|"),
        (
            &["reach", "--exposed", "--by", "pod"],
            "nftlet-a|--|nftlet|reach|--exposed|--by|pod|",
        ),
        (
            &["reach", "--expect=-"],
            "input|nftlet-a -- nftlet reach --expect=-|",
        ),
        (
            &["explain", "it's", "a b"],
            "nftlet-a|--|nftlet|explain|it's|a b|",
        ),
    ] {
        let output = plugin.run(words, &[]);
        assert_eq!(stdout(&output), asked, "{words:?}: {output:?}");
    }
}

#[test]
fn offline_it_answers_from_the_objects_of_kubectl() {
    let words = [
        "explain",
        "shop/gateway-1",
        "svc/shop/web",
        "--offline",
        "--node=node-1",
        "--cluster-cidr=10.244.0.0/16",
    ];
    let output = Plugin::new().run(&words, &[]);
    assert!(
        stdout(&output).contains("ALLOWED (POLICY_RULE)"),
        "{output:?}"
    );
    assert_eq!(output.status.code(), Some(0));
    // About no node.
    let words = ["reach", "--offline", "--from=shop/gateway", "-o", "lines"];
    let output = Plugin::new().run(&words, &[]);
    let line = "shop/gateway => shop/web : TCP 8080\n";
    assert!(stdout(&output).contains(line), "{output:?}");
}

#[test]
fn faults_are_one_line() {
    let plugin = Plugin::new();
    for (words, variables, code, part) in [
        (&["nothing"][..], &[][..], 2, "there is no command nothing"),
        (&["status", "node-9"], &[], 1, "no agent on node node-9"),
        (
            &["services"],
            &[("NFTLET_NAMESPACE", "other")],
            1,
            "no agents in namespace other",
        ),
        (
            &["explain", "a/b", "c/d", "--offline"],
            &[],
            2,
            "--offline needs --node",
        ),
    ] {
        let output = plugin.run(words, variables);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {output:?}");
        assert!(said.contains(part), "{words:?}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    }
}
