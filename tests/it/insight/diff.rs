//! `nftlet diff`: each kind of difference, its forms, and faults.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use super::{FIXTURES, UPDATE, answer, fields, nftlet, stdout};

pub(super) const BEFORE: &str = "tests/fixtures/insight/before.yaml";
pub(super) const AFTER: &str = "tests/fixtures/insight/after.yaml";
const MARKDOWN: &str = "tests/fixtures/insight/diff.markdown";
const NODE: &str = "--hostname-override=node-1";

/// Returns what differs between the objects of `before.yaml` and the same with a text replaced.
fn replaced(from: &str, to: &str) -> Value {
    let text = fs::read_to_string(BEFORE).expect("a fixture");
    assert!(text.contains(from), "{from}");
    let file = tempfile::NamedTempFile::with_suffix(".yaml").expect("a file");
    fs::write(file.path(), text.replace(from, to)).expect("it is written");
    let path = file.path().to_str().expect("UTF-8");
    let output = nftlet(&["diff", BEFORE, path, NODE, "-o", "json"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    answer(&output)
}

fn has_operations(diff: &Value) -> bool {
    diff["operations"].as_u64().expect("a number") > 0
}

#[test]
fn what_is_the_same_does_not_differ() {
    for path in [BEFORE, AFTER, super::OBJECTS] {
        let output = nftlet(&["diff", path, path, NODE, "-o", "json"]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let diff = answer(&output);
        for list in ["objects", "services", "reachability", "notCompared"] {
            assert_eq!(diff[list], json!([]), "{diff:#}");
        }
        assert_eq!(diff["operations"], 0);
    }
}

#[test]
fn an_object_that_is_renamed_is_removed_and_added() {
    let diff = replaced(
        "{name: db, namespace: shop}\nspec:\n",
        "{name: dbs, namespace: shop}\nspec:\n",
    );
    let policy = |name, change| json!({ "kind": "NetworkPolicy", "namespace": "shop", "name": name, "change": change });
    let wanted = json!([policy("db", "removed"), policy("dbs", "added")]);
    assert_eq!(diff["objects"], wanted, "{diff:#}");
    assert_eq!(diff["reachability"], json!([]), "{diff:#}");
    assert!(has_operations(&diff), "{diff:#}");
}

#[test]
fn frontends_and_endpoints_come_and_go() {
    let diff = replaced(
        "port: 5432, targetPort: 5432",
        "port: 5433, targetPort: 5432",
    );
    assert_eq!(diff["objects"][0]["fields"], json!(["spec.ports[0].port"]));
    let frontend =
        |at, before: Value, after: Value| json!({ "at": at, "before": before, "after": after });
    let service = &diff["services"][0];
    assert_eq!(
        service["frontends"],
        json!([
            frontend("10.96.0.10:5432/TCP", "2 endpoints".into(), Value::Null),
            frontend("10.96.0.10:5433/TCP", Value::Null, "2 endpoints".into()),
        ])
    );
    assert_eq!(service["endpoints"], json!([]));
    let diff = replaced("- {addresses: [10.244.1.11]", "- {addresses: [10.244.1.12]");
    let service = &diff["services"][0];
    let endpoints = json!([
        frontend("10.244.1.11:5432 shop/db-1", "used".into(), Value::Null),
        frontend("10.244.1.12:5432 shop/web-0", Value::Null, "used".into()),
    ]);
    assert_eq!(service["endpoints"], endpoints, "{diff:#}");
    let diff = replaced(
        "{name: db, namespace: shop}\nspec: {clusterIP",
        "{name: other, namespace: shop}\nspec: {clusterIP",
    );
    let states: Vec<_> = diff["services"]
        .as_array()
        .expect("a list")
        .iter()
        .collect();
    assert_eq!(states[0]["before"], "in force", "{diff:#}");
    assert_eq!(states[0]["after"], Value::Null);
    assert_eq!(states[1]["before"], Value::Null);
    assert_eq!(states[1]["after"], "no endpoints");
}

#[test]
fn workloads_that_come_and_go_connect_to_nothing_before_and_after() {
    let diff = replaced(
        "{name: web-0, namespace: shop",
        "{name: web-0, namespace: monitoring",
    );
    let pairs = diff["reachability"].as_array().expect("a list");
    let pair = |from: &str, to: &str| {
        let found = pairs.iter().find(|it| it["from"] == from && it["to"] == to);
        found.map(|it| (it["before"].clone(), it["after"].clone()))
    };
    let all = json!("All Connections");
    assert_eq!(
        pair("internet", "shop/web"),
        Some((all.clone(), Value::Null)),
        "{diff:#}"
    );
    assert_eq!(
        pair("internet", "monitoring/web"),
        Some((Value::Null, all)),
        "{diff:#}"
    );
    assert_eq!(
        pair("shop/web", "shop/db"),
        Some((json!("TCP 5432"), Value::Null))
    );
    assert_eq!(
        pair("monitoring/web", "shop/db"),
        None,
        "nothing before or after"
    );
}

#[test]
fn operations_are_those_of_a_node() {
    let output = nftlet(&["diff", BEFORE, AFTER, "-o", "json"]);
    let diff = answer(&output);
    assert_eq!(diff["operations"], Value::Null);
    let said = diff["notCompared"][0].as_str().expect("a line");
    assert!(said.contains("--hostname-override"), "{said}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn the_json_has_these_fields() {
    let diff = answer(&nftlet(&["diff", BEFORE, AFTER, NODE, "-o", "json"]));
    for (object, wanted) in [
        (
            &diff,
            "apiVersion assumptions notCompared objects operations reachability services",
        ),
        (&diff["objects"][0], "change fields kind name namespace"),
        (
            &diff["services"][0],
            "after before endpoints frontends name",
        ),
        (&diff["services"][0]["frontends"][0], "after at before"),
        (&diff["services"][0]["endpoints"][0], "after at before"),
        (&diff["reachability"][0], "after before from to"),
    ] {
        assert_eq!(fields(object), wanted, "{object}");
    }
}

#[test]
fn markdown_is_that_of_the_fixture() {
    let output = nftlet(&["diff", BEFORE, AFTER, NODE, "-o", "markdown"]);
    let made = stdout(&output).replace(FIXTURES, "");
    if std::env::var_os(UPDATE).is_some() {
        fs::write(MARKDOWN, &made).expect("the fixture is written");
    }
    let wanted = fs::read_to_string(MARKDOWN).expect("a fixture");
    assert_eq!(made, wanted, "{UPDATE}=1 writes it anew");
}

#[test]
fn long_lists_are_folded_in_markdown() {
    let pods = (0..11).map(|number| {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "namespace": "shop", "name": format!("more-{number}") },
            "spec": { "nodeName": "node-1" },
            "status": { "podIPs": [{ "ip": format!("10.244.1.{}", 100 + number) }] },
        })
    });
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": pods.collect::<Vec<_>>() });
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("more.json"), list.to_string()).expect("written");
    fs::copy(BEFORE, directory.path().join("before.yaml")).expect("copied");
    let path = directory.path().to_str().expect("UTF-8");
    let output = nftlet(&["diff", BEFORE, path, "-o", "markdown"]);
    let text = stdout(&output);
    assert!(text.starts_with("### nftlet: 11 objects, "), "{text}");
    let folded = "\n<details><summary>Objects: 11 objects</summary>\n\n| Change | Kind | Name | Fields |\n|---|---|---|---|\n| added | Pod | shop/more-0 |";
    assert!(text.contains(folded), "{text}");
    assert_eq!(
        text.matches("<details>").count(),
        text.matches("\n\n</details>\n").count()
    );
}

/// Compares standard input with a file.
fn piped(path: &str) -> Output {
    let mut nftlet = Command::new(env!("CARGO_BIN_EXE_nftlet"))
        .args(["diff", "-", path, NODE])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nftlet runs");
    let text = fs::read(BEFORE).expect("a fixture");
    nftlet
        .stdin
        .take()
        .expect("a pipe")
        .write_all(&text)
        .expect("it reads");
    nftlet.wait_with_output().expect("it ends")
}

#[test]
fn standard_input_can_be_one_side() {
    assert_eq!(piped(BEFORE).status.code(), Some(0));
    let different = piped(AFTER);
    assert_eq!(different.status.code(), Some(3));
    assert!(
        !stdout(&different).contains('\u{1b}'),
        "colours only on a terminal"
    );
}

#[test]
fn bad_input_is_one_clear_line() {
    let directory = tempfile::tempdir().expect("a directory");
    let empty = directory.path().to_str().expect("UTF-8");
    let missing = directory.path().join("missing");
    let missing = Path::to_str(&missing).expect("UTF-8");
    for (words, code, part) in [
        (vec!["-", "-"], 2, "standard input cannot be both sides"),
        (
            vec!["kernel", "kernel"],
            2,
            "the kernel cannot be both sides",
        ),
        (vec!["agent", "agent"], 2, "the agent cannot be both sides"),
        (vec![BEFORE], 2, "required arguments"),
        (
            vec![BEFORE, AFTER, "--manifests", AFTER],
            2,
            "leave out --manifests",
        ),
        (vec![BEFORE, AFTER, "-o", "html"], 2, "invalid value 'html'"),
        (vec![BEFORE, missing], 1, "cannot read manifests"),
        (vec![BEFORE, empty], 1, "has no objects that nftlet reads"),
        (
            vec![BEFORE, "agent", "--socket=/nonexistent/s"],
            1,
            "no agent answers",
        ),
        (
            vec![BEFORE, "cluster", "--kubeconfig=/nonexistent"],
            1,
            "/nonexistent",
        ),
    ] {
        let output = nftlet(&[&["diff"], &*words].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {said}");
        assert!(said.contains(part), "{words:?}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{words:?}: {said}");
        assert!(output.stdout.is_empty(), "{words:?}");
    }
}
