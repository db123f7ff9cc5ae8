//! The unix socket over which commands ask the running agent.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Output;

use serde_json::{Value, json};

use nftlet_lab::fake_api::SERVICES;
use nftlet_lab::netns::{Daemon, Namespace, require_net_admin, wait_for};

use crate::support::agent::{NFTLET, PATIENCE, small_cluster, wait_for_log};
use crate::support::listing::named;
use crate::support::objects::{cidr, node, service, slice};

const OBJECTS: &str = "tests/fixtures/insight/shop.yaml";
/// Objects of another cluster.
const OTHERS: &str = "tests/fixtures/insight/before.yaml";
const FACTS: [&str; 6] = [
    "--manifests",
    OBJECTS,
    "--hostname-override",
    "node-1",
    "--cluster-cidr",
    "10.244.0.0/16",
];

const POLICIES: [&str; 4] = ["policies", "shop", "-o", "json"];

fn start(node: &Namespace, socket: &Path) -> Daemon {
    start_with(node, socket, &FACTS)
}

fn start_with(node: &Namespace, socket: &Path, facts: &[&str]) -> Daemon {
    let socket = format!("--socket={}", socket.display());
    let quiet = [
        "--metrics-bind-address=",
        "--healthz-bind-address=",
        &socket,
    ];
    Daemon::start(node, NFTLET, [facts, &quiet].concat())
}

fn ask(words: &[&str], more: &[&str]) -> Output {
    let mut command = std::process::Command::new(NFTLET);
    command.args(words).args(more).env_remove("NODE_NAME");
    command.output().expect("nftlet runs")
}

#[track_caller]
pub(super) fn answering(words: &[&str], socket: &str) -> Output {
    wait_for("an answer of the agent", PATIENCE, || {
        let output = ask(words, &["--socket", socket]);
        let said = String::from_utf8_lossy(&output.stderr);
        let is_early = ["no agent answers", "has not read all objects yet"];
        (!is_early.iter().any(|it| said.contains(it))).then_some(output)
    })
}

#[test]
fn the_agent_answers_as_its_objects_do() {
    if !require_net_admin() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run/nftlet.sock");
    let socket = path.to_str().unwrap();
    let node = Namespace::new("asked");
    let daemon = start(&node, &path);
    wait_for_log(&daemon, "the rules are in place");
    for words in [
        &["explain", "shop/cart-7c9", "svc/shop/web:80"][..],
        &[
            "explain",
            "shop/gateway-1",
            "svc/shop/web:http",
            "-o",
            "json",
        ],
        &["explain", "internet", "svc/shop/edge"],
        &["services"],
        &["services", "shop/web", "-o", "json"],
        &["reach"],
        &["reach", "--by=pod", "-o=json"],
    ] {
        let live = answering(words, socket);
        let from_files = ask(words, &FACTS);
        assert_eq!(
            live.status.code(),
            from_files.status.code(),
            "{words:?}: {live:?}"
        );
        let texts = [&live, &from_files].map(|it| String::from_utf8_lossy(&it.stdout));
        assert_eq!(texts[0], texts[1], "{words:?}");
        assert!(!live.stdout.is_empty(), "{words:?}");
    }
    let answers = [answering(&POLICIES, socket), ask(&POLICIES, &FACTS)].map(|it| json_of(&it));
    let [mut live, from_files] = answers;
    for policy in live["policies"].as_array_mut().expect("a list") {
        let since = policy["inForceSince"].take();
        assert!(since.is_string(), "{policy}: {since}");
    }
    assert_eq!(live, from_files);
    // The agent's own flags hold for the other side, too.
    for (other, code) in [(OBJECTS, 0), (OTHERS, 3)] {
        let output = answering(&["diff", "agent", other, "-o", "json"], socket);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert_eq!(json_of(&output)["operations"] == 0, code == 0, "{output:?}");
    }
    let unknown = answering(&["explain", "shop/nobody", "node"], socket);
    assert_eq!(unknown.status.code(), Some(1));
    let said = String::from_utf8_lossy(&unknown.stderr);
    assert!(said.contains("there is no pod shop/nobody"), "{said}");
    let status = json_of(&answering(&["status", "-o", "json"], socket));
    assert_eq!(status["healthy"], true, "{status}");
    assert_eq!(status["services"]["total"], 4, "{status}");
    assert_eq!(status["services"]["withoutEndpoints"], 2, "{status}");
    assert_eq!(status["policies"]["isolatedPods"], 2, "{status}");
    assert!(status["rules"]["inSyncSince"].is_string(), "{status}");
}

#[track_caller]
fn json_of(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

/// Sends a request as it is and returns the answer.
fn request(socket: &Path, text: &str) -> String {
    let mut stream = UnixStream::connect(socket).expect("the agent listens");
    stream.write_all(text.as_bytes()).expect("it is sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn the_socket_is_for_root_alone_and_answers_only_get() {
    if !require_net_admin() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run/nftlet.sock");
    let node = Namespace::new("guarded");
    let daemon = start(&node, &path);
    wait_for_log(&daemon, "the rules are in place");
    answering(&["status"], path.to_str().unwrap());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().unwrap()), 0o700);
    for (line, code) in [
        ("POST /status", "405"),
        ("DELETE /objects", "405"),
        ("GET /nothing", "404"),
        ("GET /explain?from=web&to=node", "400"),
        ("GET /status", "200"),
    ] {
        let text = format!("{line} HTTP/1.1\r\nhost: nftlet\r\nconnection: close\r\n\r\n");
        let answer = request(&path, &text);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {code}")),
            "{line}: {answer}"
        );
    }
}

#[test]
fn a_question_about_many_endpoints_is_left_to_the_client() {
    if !require_net_admin() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nftlet.sock");
    let socket = path.to_str().unwrap();
    let large = directory.path().join("large.yaml");
    let endpoints: Vec<String> = (1..=101)
        .map(|number| format!("{{addresses: [10.244.7.{number}]}}"))
        .collect();
    let objects = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: large, namespace: shop}}\n\
         spec: {{type: NodePort, clusterIP: 10.96.7.7, ports: [{{port: 80, nodePort: 30777}}]}}\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata: {{name: large-1, namespace: shop, labels: {{kubernetes.io/service-name: large}}}}\n\
         ports: [{{port: 8080}}]\nendpoints: [{}]\n",
        endpoints.join(", ")
    );
    fs::write(&large, objects).unwrap();
    let facts = [&FACTS[..], &["--manifests", large.to_str().unwrap()]].concat();
    let node = Namespace::new("large");
    let daemon = start_with(&node, &path, &facts);
    wait_for_log(&daemon, "the rules are in place");
    for to in [
        "svc/shop/large:80",
        "10.96.7.7:80",
        "10.96.7.7",
        "192.168.1.1:30777",
    ] {
        let words = ["explain", "shop/cart-7c9", to, "-o", "json"];
        let live = answering(&words, socket);
        assert_eq!(live.stdout, ask(&words, &facts).stdout, "{to}: {live:?}");
        let text = format!(
            "GET /explain?from=shop/cart-7c9&to={to} HTTP/1.1\r\nhost: nftlet\r\n\
             connection: close\r\n\r\n"
        );
        let answer = request(&path, &text);
        assert!(answer.starts_with("HTTP/1.1 413"), "{to}: {answer}");
        let rules = answering(&[&words[..], &["--rules"]].concat(), socket);
        let answer: serde_json::Value = serde_json::from_slice(&rules.stdout).expect("JSON");
        assert!(!named(&answer).is_empty(), "{to}: {answer}");
        let warnings = answer["warnings"].to_string();
        assert!(
            warnings.contains("not compared with the kernel"),
            "{to}: {warnings}"
        );
    }
}

/// Has a batch of one question answered.
#[track_caller]
fn batch(socket: &str, question: &str) -> Value {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), question).unwrap();
    let words = ["explain", "--batch", file.path().to_str().unwrap()];
    json_of(&answering(&words, socket))
}

#[test]
fn the_settings_of_the_agent_decide_in_every_command() {
    if !require_net_admin() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for (name, flag, question, code) in [
        // The address is in the pod network of the node, and of no pod.
        (
            "closed",
            "--pod-startup=closed",
            "192.0.2.1 10.244.1.99:80",
            "POD_UNKNOWN",
        ),
        (
            "without",
            "--services=off",
            "node 10.96.0.12:80",
            "NO_POLICY",
        ),
    ] {
        let path = directory.path().join(name);
        let socket = path.to_str().unwrap();
        let node = Namespace::new(name);
        let daemon = start_with(&node, &path, &[&FACTS[..], &[flag]].concat());
        wait_for_log(&daemon, "the rules are in place");
        let words: Vec<&str> = question.split(' ').collect();
        let words = [&["explain"], &words[..], &["-o", "json"]].concat();
        let single = json_of(&answering(&words, socket));
        assert_eq!(single["code"], code, "{single}");
        assert_eq!(batch(socket, question), single);
        let flags = [&FACTS[..], &[flag]].concat();
        let live = answering(&["services"], socket);
        assert_eq!(live.stdout, ask(&["services"], &flags).stdout, "{live:?}");
    }
}

#[test]
fn a_service_that_the_agent_does_not_read_is_not_said_to_be_missing() {
    if !require_net_admin() {
        return;
    }
    let cluster = small_cluster();
    cluster.api.put(SERVICES, service("headless", "None"));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nftlet.sock");
    let socket = format!("--socket={}", path.display());
    let quiet = [
        "--metrics-bind-address=",
        "--healthz-bind-address=",
        &socket,
    ];
    let daemon = Daemon::start(&cluster.ns, NFTLET, cluster.arguments(&quiet));
    wait_for_log(&daemon, "the rules are in place");
    for words in [
        &["explain", "192.0.2.1", "svc/shop/headless:80"][..],
        &["services", "shop/headless"],
    ] {
        let answer = answering(words, path.to_str().unwrap());
        assert_eq!(answer.status.code(), Some(1), "{answer:?}");
        let said = String::from_utf8_lossy(&answer.stderr);
        let wanted = "no service shop/headless is known; if it is headless, ask for its pods";
        assert!(said.contains(wanted), "{said}");
    }
    let with_headless = directory.path().join("all.json");
    let items = [
        node("node-1", "zone-a"),
        cidr("kubernetes", "10.96.0.0/16"),
        service("a", "10.96.0.11"),
        slice("a-1", "a", &["10.1.0.1"]),
        service("headless", "None"),
        slice("headless-1", "headless", &["10.1.0.2"]),
    ];
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
    fs::write(&with_headless, list.to_string()).unwrap();
    for other in ["cluster", with_headless.to_str().unwrap()] {
        let mut diff = cluster.ns.command(NFTLET);
        diff.args(["diff", "agent", other, &socket]);
        let diff = diff.args(["--kubeconfig", &cluster.kubeconfig()]).output();
        let diff = diff.expect("nftlet runs");
        assert_eq!(diff.status.code(), Some(0), "{diff:?}");
    }
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    if !require_net_admin() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nftlet.sock");
    let socket = path.to_str().unwrap();
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "as after a crash");
    let node = Namespace::new("first");
    let mut first = start(&node, &path);
    answering(&["status"], socket);
    let other = Namespace::new("second");
    let second = start(&other, &path);
    wait_for_log(&second, "another agent answers on the socket");
    answering(&["status"], socket);
    first.stop(PATIENCE).expect("it stops");
    // It takes the socket over without a restart.
    answering(&["status"], socket);
    drop(second);
}
