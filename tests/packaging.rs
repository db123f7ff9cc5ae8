//! What is shipped beside the binary is what its consumers understand: manifests parse as the
//! API's own types without a field left over, and versions agree everywhere.

use std::fs;
use std::path::PathBuf;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use serde::Serialize;
use serde::de::DeserializeOwned;
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

/// Reads a document as a type of the API; panics where the type does not know a field of it.
fn typed<T: Serialize + DeserializeOwned>(name: &str, document: &Value) -> T {
    let value: T = serde_json::from_value(document.clone())
        .unwrap_or_else(|error| panic!("{name} is not what its kind says: {error}"));
    let understood = serde_json::to_value(&value).expect("API types can be written");
    let mut lost = Vec::new();
    left_over(document, &understood, String::new(), &mut lost);
    assert!(
        lost.is_empty(),
        "{name} has fields that its kind lacks: {lost:?}"
    );
    value
}

/// Collects the paths of what is written but was not understood.
fn left_over(written: &Value, understood: &Value, path: String, lost: &mut Vec<String>) {
    match (written, understood) {
        (Value::Object(fields), Value::Object(known)) => {
            for (key, value) in fields {
                let path = format!("{path}.{key}");
                match known.get(key) {
                    Some(known) => left_over(value, known, path, lost),
                    // An empty list means the same as none.
                    None if value.as_array().is_some_and(Vec::is_empty) => {}
                    None => lost.push(path),
                }
            }
        }
        (Value::Array(items), Value::Array(known)) if items.len() == known.len() => {
            for (index, (value, known)) in items.iter().zip(known).enumerate() {
                left_over(value, known, format!("{path}[{index}]"), lost);
            }
        }
        _ if written == understood => {}
        _ => lost.push(path),
    }
}

fn check_kind(name: &str, document: &Value) {
    let kind = document["kind"].as_str().unwrap_or_default();
    match kind {
        "Service" => drop(typed::<Service>(name, document)),
        "EndpointSlice" => drop(typed::<EndpointSlice>(name, document)),
        "Node" => drop(typed::<Node>(name, document)),
        "ServiceCIDR" => drop(typed::<ServiceCIDR>(name, document)),
        "ServiceAccount" => drop(typed::<ServiceAccount>(name, document)),
        "ClusterRole" => drop(typed::<ClusterRole>(name, document)),
        "ClusterRoleBinding" => drop(typed::<ClusterRoleBinding>(name, document)),
        "DaemonSet" => drop(typed::<DaemonSet>(name, document)),
        // No type of the API; `kubectl kustomize` reads it.
        "Kustomization" => {}
        other => panic!("{name} has an unexpected kind {other:?}"),
    }
}

#[test]
fn manifests_are_of_their_kinds() {
    for folder in ["manifests", "examples/shop"] {
        for (name, document) in documents(folder) {
            check_kind(&name, &document);
        }
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
fn the_role_reads_what_is_watched_and_writes_nothing() {
    let roles = documents("manifests");
    let (name, role) = roles
        .iter()
        .find(|(_, document)| document["kind"] == "ClusterRole")
        .expect("there is a role");
    let mut granted = Vec::new();
    for rule in typed::<ClusterRole>(name, role).rules.unwrap_or_default() {
        for resource in rule.resources.unwrap_or_default() {
            granted.push(format!("{resource}: {}", rule.verbs.join(" ")));
        }
    }
    granted.sort();
    let wanted = [
        "endpointslices: list watch",
        "nodes: list watch",
        "servicecidrs: list watch",
        "services: list watch",
    ];
    assert_eq!(granted, wanted);
}

#[test]
fn the_daemon_set_has_one_power_and_nothing_to_write_to() {
    let all = documents("manifests");
    let (name, document) = all
        .iter()
        .find(|(_, document)| document["kind"] == "DaemonSet")
        .expect("there is a daemon set");
    let pod = typed::<DaemonSet>(name, document)
        .spec
        .template
        .spec
        .expect("a pod");
    assert_eq!(pod.host_network, Some(true));
    assert!(pod.volumes.is_none(), "nothing of the host is mounted");
    let security = pod.containers[0].security_context.clone();
    let security = security.expect("a security context");
    assert_eq!(security.privileged, None);
    assert_eq!(security.read_only_root_filesystem, Some(true));
    assert_eq!(security.allow_privilege_escalation, Some(false));
    let capabilities = security.capabilities.expect("capabilities");
    assert_eq!(capabilities.drop, Some(vec!["ALL".to_owned()]));
    assert_eq!(capabilities.add, Some(vec!["NET_ADMIN".to_owned()]));
}

#[test]
fn versions_agree() {
    let tag = format!("newTag: {}\n", env!("CARGO_PKG_VERSION"));
    assert!(read("manifests/kustomization.yaml").contains(&tag), "{tag}");

    let toolchain = read("rust-toolchain.toml");
    let channel = toolchain
        .lines()
        .find_map(|line| line.strip_prefix("channel = "))
        .expect("the toolchain is pinned")
        .trim_matches('"');
    let dockerfile = read("Dockerfile");
    assert!(dockerfile.contains(&format!("FROM rust:{channel}-")));
    assert!(dockerfile.contains(&format!("RUSTUP_TOOLCHAIN={channel}\n")));
    assert!(root().join("LICENSE").exists());
}
