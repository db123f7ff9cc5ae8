//! The commands that answer questions: their documentation, and faults.

mod diff;
mod page;

use std::fs;
use std::process::{Command, Output};

const DOCUMENT: &str = "docs/insight.md";
const FIXTURES: &str = "tests/fixtures/insight/";
const OBJECTS: &str = "tests/fixtures/insight/shop.yaml";
const EXPECTATIONS: &str = "tests/fixtures/insight/expect.yaml";
/// With this variable the outputs in the document are written anew.
const UPDATE: &str = "UPDATE_GOLDEN";

fn nftlet(arguments: &[&str]) -> Output {
    let mut nftlet = Command::new(env!("CARGO_BIN_EXE_nftlet"));
    nftlet.args(arguments).env_remove("NODE_NAME");
    nftlet.output().expect("nftlet runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

/// Asks about the objects of the document.
fn asked(arguments: &[&str]) -> Output {
    asked_on("node-1", arguments)
}

fn asked_on(node: &str, arguments: &[&str]) -> Output {
    let name = format!("--hostname-override={node}");
    let facts = [
        "--manifests",
        OBJECTS,
        &name,
        "--cluster-cidr=10.244.0.0/16",
    ];
    nftlet(&[arguments, &facts].concat())
}

fn answer(output: &Output) -> serde_json::Value {
    let answer = serde_json::from_slice(&output.stdout);
    answer.unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[test]
fn a_pod_on_another_node_is_answered_by_its_rules() {
    for (from, to) in [
        ("shop/db-0", "svc/shop/web:80"),
        ("shop/db-0", "svc/shop/db:5432"),
        ("shop/cart-7c9", "svc/shop/db:5432"),
        ("shop/web-1", "198.51.100.7:443"),
        ("monitoring/prometheus-0", "shop/cart-7c9"),
        ("deploy/shop/web", "svc/shop/db:5432"),
        ("192.168.1.1", "shop/web-0:8080"),
        ("192.168.1.2", "shop/web-0:8080"),
        ("shop/db-0", "192.168.1.1:30443"),
        ("shop/db-0", "192.168.1.2:30443"),
        ("198.51.100.99", "192.168.1.2:30443"),
    ] {
        let ask = ["explain", from, to, "-o", "json"];
        let [mut one, mut two] = ["node-1", "node-2"].map(|node| answer(&asked_on(node, &ask)));
        if from.starts_with("deploy") || from.starts_with("198") {
            // Asked of a node, and by others.
            for answer in [&mut one, &mut two] {
                answer["node"].take();
                answer["service"].take();
            }
        }
        assert_eq!(one, two, "{from} {to}");
        assert_eq!(one["warnings"], serde_json::json!([]), "{from} {to}");
    }
    let of_db = answer(&asked(&[
        "explain",
        "shop/db-0",
        "svc/shop/web",
        "-o",
        "json",
    ]));
    assert_eq!(of_db["node"], "node-2");
}

#[test]
fn node_ports_of_another_node_are_translated_by_its_rules() {
    let ask = |from: &str| {
        let ask = ["explain", from, "192.168.1.2:30443", "-o", "json"];
        answer(&asked(&ask))
    };
    let answered = ask("shop/gateway-1");
    let service = &answered["service"];
    assert_eq!(service["action"], "dnat", "{answered:#}");
    assert_eq!(service["name"], "shop/edge");
    assert_eq!(service["node"], "node-2");
    assert_eq!(answered["node"], "node-1");
    let target = &answered["targets"][0];
    assert_eq!(target["egress"]["decidedOn"], "node-1");
    assert_eq!(target["ingress"]["decidedOn"], target["node"]);
    // A node is nothing special to the policies of another one.
    let of_node = ask("node");
    let ingress = &of_node["targets"][0]["ingress"];
    assert_eq!(ingress["code"], "POLICY_NO_RULE", "{of_node:#}");
    // Policies for egress see the address of the node, which the packet does not reach.
    let denied = ask("shop/cart-7c9");
    assert_eq!(denied["service"]["action"], "none", "{denied:#}");
    assert_eq!(denied["targets"][0]["address"], "192.168.1.2");
    assert_eq!(denied["targets"][0]["egress"]["code"], "POLICY_NO_RULE");
    let every = answer(&asked(&["explain", "shop/gateway-1", "node", "-o", "json"]));
    let ports = every["ports"].as_array().expect("ports");
    assert!(ports.iter().any(|it| it["port"] == "30443"), "{every:#}");
}

#[test]
fn the_outputs_in_the_document_are_those_of_the_commands() {
    let text = fs::read_to_string(DOCUMENT).expect("the document");
    let mut parts = text.split("```console\n");
    let mut made = parts.next().expect("the beginning").to_owned();
    for part in parts {
        let (block, rest) = part.split_once("```\n").expect("the end of a block");
        let command = block.lines().next().expect("a command");
        let words = command
            .strip_prefix("$ nftlet ")
            .expect("a command of nftlet");
        let words: Vec<&str> = words
            .split_whitespace()
            .map(|word| match word {
                "shop.yaml" => OBJECTS,
                "expect.yaml" => EXPECTATIONS,
                "before.yaml" => diff::BEFORE,
                "after.yaml" => diff::AFTER,
                word => word,
            })
            .collect();
        let output = nftlet(&words);
        assert!(output.stderr.is_empty(), "{command}: {output:?}");
        made.push_str(&format!(
            "```console\n{command}\n{}```\n{rest}",
            stdout(&output).replace(FIXTURES, "")
        ));
    }
    if std::env::var_os(UPDATE).is_some() {
        fs::write(DOCUMENT, &made).expect("the document is written");
    }
    assert!(
        made == text,
        "{DOCUMENT} differs from what the commands print; {UPDATE}=1 writes it anew"
    );
}

#[test]
fn the_exit_code_tells_allowed_from_denied_and_faults() {
    for (words, code) in [
        (vec!["explain", "shop/gateway-1", "svc/shop/web:http"], 0),
        (vec!["explain", "shop/cart-7c9", "svc/shop/web:80"], 3),
        (vec!["explain", "shop/cart-7c9", "internet:443"], 3),
        (vec!["explain", "shop/cart-7c9"], 2),
        (vec!["explain", "shop/cart-7c9", "web"], 2),
        (vec!["explain", "shop/nobody", "svc/shop/web:80"], 1),
        (vec!["explain", "shop/cart-7c9", "svc/shop/web:https"], 1),
        (vec!["services", "shop/nothing"], 1),
        (vec!["policies", "shop/nothing"], 1),
        (vec!["reach", "--to=shop/web,pod/shop/db-0"], 0),
        (vec!["reach", "--expect", EXPECTATIONS], 3),
        (vec!["reach", "--expect=/nonexistent"], 2),
        (vec!["reach", "--expect", OBJECTS], 2),
        (vec!["reach", "--expect=-", "--manifests=-"], 2),
        (vec!["reach", "--port=http"], 2),
        (vec!["reach", "--by=node"], 2),
        (vec!["reach", "--exposed", "-o=html"], 2),
        (vec!["reach", "--from=shop/nothing"], 1),
    ] {
        let output = asked(&words);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {output:?}");
        if code == 1 || code == 2 {
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(said.trim_end().lines().count(), 1, "{words:?}: {said}");
        }
    }
}

#[test]
fn unknown_names_are_answered_with_those_alike() {
    for (words, part) in [
        (
            ["explain", "shop/web", "svc/shop/db:5432"],
            "there is no pod shop/web; there are svc/shop/web, deploy/shop/web, shop/web-0",
        ),
        (
            ["explain", "shop/web-0", "svc/other/web:80"],
            "no service other/web is known; if it is headless, ask for its pods; did you mean svc/shop/web?",
        ),
        (
            ["explain", "shop/web-0", "svc/shop/web:https"],
            "the service shop/web has no port https; it has http (80/TCP)",
        ),
        (
            ["explain", "shop/db-0", "fd00::1"],
            "shop/db-0 and fd00::1 have no address of the same family",
        ),
    ] {
        let output = asked(&words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(part), "{words:?}: {said}");
    }
}

#[test]
fn a_batch_answers_each_line_by_a_line() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let questions = "shop/cart-7c9 svc/shop/web:80\n\nshop/nobody 10.0.0.1\nnot a question at all\n\
                     shop/gateway-1 svc/shop/web:80\n";
    fs::write(file.path(), questions).expect("questions");
    let output = asked(&["explain", "--batch", file.path().to_str().expect("UTF-8")]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let answers = stdout(&output);
    let answers: Vec<serde_json::Value> = answers
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(answers.len(), 4);
    assert_eq!(answers[0]["verdict"], "denied");
    assert_eq!(answers[1]["error"], "there is no pod shop/nobody");
    assert_eq!(answers[2]["question"], "not a question at all");
    assert_eq!(answers[3]["verdict"], "allowed");
}

/// The names of the fields of an object, sorted.
fn fields(object: &serde_json::Value) -> String {
    let object = object.as_object().expect("an object");
    let mut names: Vec<&str> = object.keys().map(String::as_str).collect();
    names.sort_unstable();
    names.join(" ")
}

#[test]
fn the_json_of_services_and_policies_has_these_fields() {
    let json = |words: &[&str]| -> serde_json::Value {
        serde_json::from_str(&stdout(&asked(words))).expect("JSON")
    };
    let list = json(&["services", "shop/web", "-o", "json"]);
    let service = &list["services"][0];
    for (object, wanted) in [
        (&list, "apiVersion services"),
        (
            service,
            "affinitySeconds endpoints frontends name policy state type",
        ),
        (
            &service["frontends"][0],
            "action address name port protocol",
        ),
        (
            &service["endpoints"][0],
            "address node pod port reason used",
        ),
    ] {
        assert_eq!(fields(object), wanted, "{object}");
    }
    let list = json(&["policies", "shop/deny-web", "-o", "json"]);
    assert_eq!(fields(&list), "apiVersion policies");
    let policy = &list["policies"][0];
    assert_eq!(
        fields(policy),
        "directions inForceSince kind mode name namespace pods"
    );
    assert_eq!(policy["inForceSince"], serde_json::Value::Null);
}

#[test]
fn without_an_agent_one_line_says_what_to_do() {
    for command in ["status", "services", "policies", "reach"] {
        let output = nftlet(&[command, "--socket=/nonexistent/nftlet.sock"]);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            said.contains("no agent answers on /nonexistent/nftlet.sock"),
            "{said}"
        );
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    }
}

#[test]
fn expectations_that_are_not_valid_are_named_with_their_line() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(
        file.path(),
        "- from: shop\n  to: shop/web\n  allow: [TCP/80, web]\n",
    )
    .expect("a file");
    let path = file.path().to_str().expect("UTF-8");
    let output = asked(&["reach", "--expect", path]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains(&format!("{path}: line 3: `web` is not a port")),
        "{said}"
    );
}

#[test]
fn a_row_is_a_pod_if_it_is_asked_for_by_its_name() {
    let ask = |words: &[&str]| stdout(&asked(&[&["reach", "-o=lines"], words].concat()));
    let of_pod = ask(&["--from=shop/web-0", "--to=deploy/shop/gateway"]);
    assert_eq!(of_pod, "shop/web-0 => shop/gateway : All Connections\n");
    let of_namespace = ask(&["--from=monitoring", "--to=shop", "--by=namespace"]);
    assert_eq!(
        of_namespace,
        "monitoring => shop : No Connections (some: All Connections)\n"
    );
    let of_port = ask(&[
        "--from=shop/gateway",
        "--to=shop/web",
        "--port=TCP/8000-8100",
    ]);
    assert_eq!(of_port, "shop/gateway => shop/web : TCP 8080\n");
    assert_eq!(
        ask(&["--from=shop/gateway", "--to=shop/web", "--port=UDP"]),
        ""
    );
}

#[test]
fn an_audited_policy_denies_nothing_if_annotations_count() {
    let pod = |name: &str, last: u8| {
        serde_json::json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop"},
            "status": {"podIPs": [{"ip": format!("10.244.1.{last}")}]},
        })
    };
    let policy = serde_json::json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "deny", "namespace": "shop",
            "annotations": {"nftlet.dev/mode": "audit"}},
        "spec": {"podSelector": {}},
    });
    let items = [pod("a", 1), pod("b", 2), policy];
    let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": items});
    let file = tempfile::NamedTempFile::with_suffix(".json").expect("a file");
    fs::write(file.path(), list.to_string()).expect("a file");
    let path = file.path().to_str().expect("UTF-8");
    let reach = |more: &[&str]| {
        let words = ["reach", "--manifests", path, "-o=lines", "--from=shop/a"];
        stdout(&nftlet(&[&words[..], more].concat()))
    };
    let line = "shop/a => shop/b : All Connections\n";
    assert!(!reach(&[]).contains(line), "{}", reach(&[]));
    let audited = reach(&["--audit-annotations=on"]);
    assert!(audited.contains(line), "{audited}");
    let diff = nftlet(&["diff", path, path, "--audit-annotations=on"]);
    assert_eq!(diff.status.code(), Some(0), "{diff:?}");
}

#[test]
fn what_the_objects_lack_is_said() {
    let pod = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a","namespace":"shop"},
        "spec":{"hostNetwork":true,"nodeName":"node-1"},"status":{"podIPs":[{"ip":"192.0.2.1"}]}}"#;
    let file = tempfile::NamedTempFile::with_suffix(".json").expect("a file");
    let path = file.path().to_str().expect("UTF-8");
    fs::write(file.path(), pod).expect("a file");
    let said = stdout(&nftlet(&["reach", "--manifests", path]));
    for part in [
        "assumed: no Namespaces",
        "assumed: no Node with the addresses of 1 host-network",
    ] {
        assert!(said.contains(part), "{said}");
    }
    fs::write(file.path(), pod.replace("192.0.2.1", "")).expect("a file");
    let output = nftlet(&["reach", "--manifests", path]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said.contains("no Pods with an address are known; give a dump"),
        "{said}"
    );
}
