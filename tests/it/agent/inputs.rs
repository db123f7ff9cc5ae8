//! What others write: settings, credentials, manifests and names. None of it makes the binary panic,
//! use up the memory, forge a line of the log or show a password.

use std::fs;
use std::process::{Command, Output, Stdio};

use crate::support::agent::{NFTLET, Node, one_line, printed, said, wait_for_log};
use crate::support::objects::{self, with};
use crate::support::objects::{node, service};
use nftlet_lab::fake_api;
use nftlet_lab::fake_api::{NODES, SERVICES};
use nftlet_lab::netns::{Daemon, Namespace, require_net_admin};
use serde_json::json;
use tempfile::TempDir;

const DRY_RUN: [&str; 3] = ["--dry-run", "--hostname-override", "node-1"];

/// A node whose server accepts the token "secret" only.
fn guarded_cluster() -> Node {
    let node_1 = Node::new();
    node_1.api.put(NODES, node("node-1", "zone-a"));
    node_1.api.put(SERVICES, service("a", "10.96.0.11"));
    node_1.api.require_token("secret");
    node_1
}

/// Runs nftlet to its end with at most 512 MiB of memory, and with nothing in the environment that
/// names a cluster.
fn bounded(command: &mut Command, arguments: &[&str]) -> Output {
    command
        .args([
            "timeout",
            "20",
            "prlimit",
            &format!("--as={}", 512 << 20),
            NFTLET,
        ])
        .args(arguments)
        .env_remove("KUBECONFIG")
        .env_remove("KUBERNETES_SERVICE_HOST")
        .env_remove("NODE_NAME")
        .stdin(Stdio::null())
        .output()
        .expect("nftlet can be started")
}

fn dry_run(node: &Node, arguments: &[&str]) -> Output {
    let command = &mut node.ns.command("env");
    bounded(command, &[&DRY_RUN, arguments].concat())
}

/// A file in a directory of its own.
fn file(name: &str, text: &str) -> (TempDir, String) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join(name);
    fs::write(&path, text).expect("written");
    let path = path.into_os_string().into_string().expect("UTF-8");
    (directory, path)
}

/// A kubeconfig with these fields of its cluster and of its user.
fn kubeconfig(cluster: &str, user: &str) -> (TempDir, String) {
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
         clusters: [{{name: c, cluster: {{{cluster}}}}}]\nusers: [{{name: u, user: {{{user}}}}}]\n\
         contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n"
    );
    file("kubeconfig", &text)
}

#[test]
fn a_server_without_a_scheme_is_the_one_that_client_go_takes_it_for() {
    if !require_net_admin() {
        return;
    }
    let node = guarded_cluster();
    let address = node.api.address();
    let (_directory, path) = kubeconfig(&format!("server: '{address}'"), "token: secret");
    let rules = printed(&dry_run(&node, &["--kubeconfig", &path]));
    assert!(rules.contains("10.96.0.11"), "{rules}");
    // The server does not speak TLS.
    let (_directory, path) = kubeconfig(
        &format!("server: '{address}', insecure-skip-tls-verify: true"),
        "token: secret",
    );
    let agent = Daemon::start(&node.ns, NFTLET, ["--kubeconfig", &path]);
    wait_for_log(&agent, "InvalidContentType");
}

#[test]
fn addresses_that_are_none_are_named_without_their_passwords() {
    for (server, told) in [
        ("ftp://me:pass@192.0.2.1", "does not begin with https://"),
        ("https://me:pass@[192.0.2.1", "failed to parse cluster url"),
        ("/", "failed to parse cluster url"),
        ("http://:80", ""),
        ("", ""),
    ] {
        let (_directory, path) = kubeconfig(&format!("server: '{server}'"), "token: t");
        let mut env = Command::new("env");
        let output = bounded(&mut env, &[&DRY_RUN[..], &["--kubeconfig", &path]].concat());
        let line = one_line(&output);
        assert!(
            line.contains(told) && line.contains(&path),
            "{server}: {line}"
        );
        assert!(!line.contains("pass"), "{line}");
    }
    for server in ["me:pass@192.0.2.1 x", "https://me:pass@192.0.2.1:x"] {
        let mut env = Command::new("env");
        let output = bounded(&mut env, &[&DRY_RUN[..], &["--master", server]].concat());
        let line = one_line(&output);
        assert!(
            line.contains("--master: ") && !line.contains("pass"),
            "{line}"
        );
    }
}

#[test]
fn the_password_of_a_server_or_a_proxy_is_in_no_line() {
    if !require_net_admin() {
        return;
    }
    let node = guarded_cluster();
    let address = node.api.address();
    let (_directory, path) = kubeconfig(
        &format!("server: 'http://me:hidden@{address}'"),
        "token: secret",
    );
    let output = dry_run(&node, &["--kubeconfig", &path, "-vvv"]);
    let log = said(&output);
    assert!(printed(&output).contains("10.96.0.11"));
    assert!(!log.contains("hidden") && !log.contains("secret"), "{log}");
    assert!(log.contains("user and password in the address"), "{log}");
    let master = format!("http://me:hidden@{address}");
    let output = dry_run(&node, &["--kubeconfig", &path, "-vvv", "--master", &master]);
    assert!(output.status.success() && !said(&output).contains("hidden"));

    // Nothing answers there.
    for proxy in ["me:hidden@127.0.0.1:9", "socks5://me:hidden@127.0.0.1:9"] {
        let (_directory, path) = kubeconfig(
            &format!("server: 'https://192.0.2.1', proxy-url: '{proxy}'"),
            "token: secret",
        );
        let agent = Daemon::start(&node.ns, NFTLET, ["--kubeconfig", &path, "-vvv"]);
        wait_for_log(&agent, "the API server cannot be reached");
        let log = agent.log();
        assert!(log.contains("through the proxy 127.0.0.1:9"), "{log}");
        assert!(!log.contains("hidden"), "{log}");
    }
}

#[test]
fn space_around_the_token_in_a_file_is_no_part_of_it() {
    if !require_net_admin() {
        return;
    }
    let node = guarded_cluster();
    let address = node.api.address();
    for (text, told) in [
        ("secret\r\n\n", None),
        (" secret", None),
        ("sec\nret\n", Some("it contains a line break")),
        ("\n", Some("it is empty")),
    ] {
        let (_token, token) = file("token", text);
        // The one that stands there is none.
        let (_directory, path) = kubeconfig(
            &format!("server: 'http://{address}'"),
            &format!("token: '', tokenFile: {token}"),
        );
        let output = dry_run(&node, &["--kubeconfig", &path]);
        let Some(told) = told else {
            assert!(printed(&output).contains("10.96.0.11"));
            continue;
        };
        let line = one_line(&output);
        let expected = format!("nftlet: cannot use the token in {token}: {told}");
        assert!(line.starts_with(&expected), "{line}");
        assert!(!line.contains("sec\\nret"), "{line}");
    }
    for (user, field) in [
        (r#"token: "secret\n""#, "token"),
        (
            r#"auth-provider: {name: oidc, config: {id-token: "secret\n"}}"#,
            "id-token",
        ),
    ] {
        let (_directory, path) = kubeconfig("server: 'http://192.0.2.1'", user);
        let line = one_line(&dry_run(&node, &["--kubeconfig", &path]));
        let expected = format!("nftlet: cannot use the token in `{field}` of the user in {path}: ");
        assert!(
            line.starts_with(&expected) && !line.contains("secret"),
            "{line}"
        );
    }
}

#[test]
fn periods_beyond_those_of_go_are_refused_and_the_longest_works() {
    let header = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    let manifest = "apiVersion: v1\nkind: Service\nmetadata: {namespace: a, name: b}\n\
                    spec: {clusterIP: 10.96.0.3, ports: [{port: 80}]}\n";
    let (_manifest, manifest) = file("a.yaml", manifest);
    for (period, code) in [
        ("2562047h47m16s", 0),
        ("2562047h47m17s", 2),
        ("9223372036854775807s", 2),
    ] {
        let text = format!("{header}nftables: {{syncPeriod: {period}}}\n");
        let (_directory, path) = file("config.yaml", &text);
        if !require_net_admin() {
            return;
        }
        let ns = Namespace::new("periods");
        let command = &mut ns.command("env");
        let arguments = ["--once", "--config", &path, "--manifests", &manifest];
        let output = bounded(command, &arguments);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{period}: {}",
            said(&output)
        );
        assert_eq!(said(&output).contains("at most 2562047h"), code == 2);
    }
}

#[test]
fn too_few_descriptors_are_one_line() {
    if !require_net_admin() {
        return;
    }
    let node = guarded_cluster();
    let kubeconfig = node.kubeconfig();
    let enough = 100;
    for most in (4..40).chain([66, enough]) {
        for mode in ["--dry-run", "--once"] {
            let mut command = node.ns.command("prlimit");
            command.arg(format!("--nofile={most}"));
            let arguments = [
                mode,
                "--kubeconfig",
                &kubeconfig,
                "--hostname-override=node-1",
            ];
            let output = bounded(&mut command, &arguments);
            if most == enough {
                assert!(output.status.success(), "{}", said(&output));
                continue;
            }
            let line = one_line(&output);
            assert!(
                line.starts_with("nftlet: cannot open 64 files at once"),
                "{line}"
            );
            assert!(line.contains("ulimit -n"), "{line}");
        }
    }
}

/// Ten lines of a flow mapping, each standing for ten of the line before.
fn laughs() -> String {
    let line = |n: usize| match n {
        0 => "a0: &a0 [x]\n".to_owned(),
        _ => format!(
            "a{n}: &a{n} [{}]\n",
            vec![format!("*a{}", n - 1); 10].join(", ")
        ),
    };
    (0..12).map(line).collect()
}

/// A value twenty thousand aliases deep.
fn chain() -> String {
    let line = |n: usize| match n {
        0 => "a0: &a0 [x]\n".to_owned(),
        _ => format!("a{n}: &a{n} [*a{}]\n", n - 1),
    };
    (0..20_000).map(line).collect()
}

#[test]
fn bombs_of_aliases_are_refused_with_their_place() {
    let service = "apiVersion: v1\nkind: Service\nmetadata: {namespace: a, name: b}\n\
                   spec: {clusterIP: 10.96.0.3, ports: [{port: 80}]}\n";
    let config = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    for bomb in [laughs(), chain()] {
        let text = format!("{service}---\n{service}{bomb}");
        let (_directory, path) = file("bomb.yaml", &text);
        let mut env = Command::new("env");
        let output = bounded(&mut env, &[&DRY_RUN[..], &["--manifests", &path]].concat());
        let log = said(&output);
        assert!(log.contains(&format!("{path}:")), "{log}");
        assert!(log.contains("aliases"), "{log}");
        assert!(printed(&output).contains("10.96.0.3"), "the other document");

        let (_directory, path) = file(
            "config.yaml",
            &format!("{config}winkernel:\n  x: y\n{bomb}"),
        );
        let mut env = Command::new("env");
        let output = bounded(&mut env, &[&DRY_RUN[..], &["--config", &path]].concat());
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(
            said(&output).starts_with(&format!("nftlet: {path}")),
            "{}",
            said(&output)
        );
        assert_eq!(said(&output).matches('\n').count(), 1, "{}", said(&output));

        let (_directory, path) = file(
            "kubeconfig",
            &format!("apiVersion: v1\nkind: Config\n{bomb}"),
        );
        let mut env = Command::new("env");
        let output = bounded(&mut env, &[&DRY_RUN[..], &["--kubeconfig", &path]].concat());
        let line = one_line(&output);
        assert!(line.contains(&path), "{line}");
    }
}

#[test]
fn names_forge_no_line() {
    const FORGED: &str = "x\n2026-01-01T00:00:00Z ERROR forged \u{1b}[2Jy";
    let is_whole = |log: &str| {
        let forged = log.lines().filter(|line| line.starts_with("2026-01-01T00"));
        assert_eq!(forged.count(), 0, "{log}");
        let control = |c: char| c.is_control() && c != '\n';
        assert!(!log.contains(control), "{log:?}");
        assert!(log.contains("ERROR forged"), "{log}");
    };
    // In a manifest, and in the name of its file.
    let object = with(
        service(&format!("a/{FORGED}"), FORGED),
        json!({"spec": {"ports": [{"port": 80, "protocol": FORGED}]}}),
    );
    for format in ["text", "json"] {
        let (_directory, path) = file(&format!("{}.yaml", FORGED), &object.to_string());
        let format = format!("--log-format={format}");
        for flags in [
            &["--manifests", &path, &format][..],
            &["--config", &path],
            &["--kubeconfig", &path],
        ] {
            let mut env = Command::new("env");
            let output = bounded(&mut env, &[&DRY_RUN[..], flags].concat());
            is_whole(&said(&output));
        }
    }
    // In values of flags.
    for flag in [
        "--bind-address",
        "--master",
        "--manifests",
        "--no-such-flag",
    ] {
        let mut env = Command::new("env");
        let output = bounded(&mut env, &["--dry-run", flag, FORGED]);
        assert_eq!(said(&output).lines().count(), 1, "{}", said(&output));
        assert!(
            !said(&output).contains('\u{1b}'),
            "{flag}: {}",
            said(&output)
        );
    }
    if !require_net_admin() {
        return;
    }
    // In objects and in texts of a server.
    let node = Node::new();
    node.api.put(NODES, objects::node("node-1", "zone-a"));
    node.api.put(SERVICES, object);
    let agent = node.run();
    wait_for_log(&agent, "ERROR forged");
    is_whole(&agent.log());
    let page = json!({"kind": FORGED, "apiVersion": "v1"}).to_string();
    node.api.set_streaming(fake_api::Streaming::Rejected);
    node.api.answer_instead(SERVICES, Some(&page));
    node.api.compact(false);
    node.api.end_watches();
    wait_for_log(&agent, "and the answer is a v1 x");
    is_whole(&agent.log());
}
