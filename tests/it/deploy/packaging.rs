//! What is shipped beside the binary is what its consumers understand: examples parse as the API's
//! own types without a field left over, versions agree everywhere, and the tasks that compile show
//! it. `tests/it/deploy/manifests.rs` has the manifests.

use std::fs;
use std::path::PathBuf;

use crate::support::schema::check_kind;
use serde_json::Value;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The documents of all YAML files of a folder, with the names of their files.
fn documents(folder: &str) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root().join(folder)).expect("the folder can be read") {
        let path = entry.expect("the folder can be read").path();
        if path.extension().is_none_or(|e| e != "yaml") {
            continue;
        }
        let text = fs::read_to_string(&path).expect("the file can be read");
        let name = path.strip_prefix(root()).unwrap_or(&path).display();
        let parsed: Vec<Value> =
            serde_saphyr::from_multiple(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        found.extend(parsed.into_iter().map(|value| (name.to_string(), value)));
    }
    assert!(!found.is_empty(), "{folder} has manifests");
    found
}

#[test]
fn examples_are_of_their_kinds() {
    for (name, document) in documents("examples/shop") {
        check_kind(&name, &document);
    }
}

#[test]
fn a_mistyped_field_is_noticed() {
    let wrong = serde_json::json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "x" },
        "spec": { "clusterIp": "10.96.0.1", "ports": [{ "port": 80, "nodeport": 30080 }] },
    });
    let noticed = std::panic::catch_unwind(|| check_kind("x", &wrong)).expect_err("a panic");
    let message = noticed.downcast_ref::<String>().expect("a message");
    assert!(message.contains(".spec.clusterIp"), "{message}");
    assert!(message.contains(".spec.ports[0].nodeport"), "{message}");
}

#[test]
fn versions_agree() {
    let toolchain = read("rust-toolchain.toml");
    let channel = toolchain
        .lines()
        .find_map(|line| line.strip_prefix("channel = "))
        .expect("the toolchain is pinned")
        .trim_matches('"');
    let dockerfile = read("Dockerfile");
    assert!(dockerfile.contains(&format!(" rust:{channel}-slim-bookworm AS builder\n")));
    assert!(dockerfile.contains(&format!("RUSTUP_TOOLCHAIN={channel}\n")));
    assert!(dockerfile.contains("NFTLET_COMMIT=\"$COMMIT\""));
    assert!(root().join("LICENSE").exists());
}

/// The lines of the Makefile's recipe of a task.
fn recipe<'a>(makefile: &'a str, task: &str) -> Vec<&'a str> {
    let head = format!("{task}: ");
    let lines = makefile
        .lines()
        .skip_while(|line| !line.starts_with(&head))
        .skip(1);
    lines.take_while(|line| line.starts_with('\t')).collect()
}

#[test]
fn what_takes_minutes_says_so_and_shows_its_progress() {
    let makefile = read("Makefile");
    for task in ["demo", "build"] {
        let lines = recipe(&makefile, task);
        let compiles = lines.iter().position(|line| line.contains("cargo build"));
        let compiles = compiles.unwrap_or_else(|| panic!("{task} compiles: {lines:?}"));
        let before = lines[compiles - 1];
        assert!(
            before.contains("echo 'Compiling") && before.contains("minutes"),
            "{task} says how long it compiles: {before}"
        );
    }
    let mut texts = vec![("Makefile".to_owned(), makefile)];
    for script in fs::read_dir(root().join("scripts")).expect("the folder can be read") {
        let name = script.expect("the folder can be read").file_name();
        let path = format!("scripts/{}", name.to_string_lossy());
        texts.push((path.clone(), read(&path)));
    }
    for (path, text) in texts {
        let calls = |line: &&str| {
            ["build", "bench", "test", "install", "clippy", "doc"]
                .iter()
                .any(|verb| line.contains(&format!("cargo {verb} ")))
                || line.contains("rustup ") && line.contains(" install ")
        };
        for line in text.lines().filter(calls) {
            for silencer in ["--quiet", " -q ", "/dev/null"] {
                assert!(!line.contains(silencer), "{path} hides progress: {line}");
            }
        }
    }
}
