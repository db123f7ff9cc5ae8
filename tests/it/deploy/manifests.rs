//! Every combination of the manifests builds into objects that the API knows and that fit together.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::agent::of_repository;
use crate::support::kustomize;
use crate::support::kustomize::{build, object};
use crate::support::schema::{check_kind, typed};
use crate::support::skip::skip;
use clap::Parser as _;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Container, PodSpec};
use k8s_openapi::api::rbac::v1::ClusterRoleBinding;
use nftlet::settings::Settings;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The directories that are complete installations; the others are added to these.
pub const WHOLE: [&str; 4] = [
    "base",
    "overlays/kubeadm",
    "overlays/policies-only",
    "overlays/without-network-policy",
];

const COMPONENTS: [&str; 6] = [
    "closed-pod-startup",
    "conntrack-settings",
    "labelled-nodes",
    "metrics-address",
    "monitoring",
    "without-network-policy",
];

/// A kustomization in a folder of its own.
pub struct Folder {
    pub name: String,
    pub path: PathBuf,
    _directory: Option<TempDir>,
}

impl Folder {
    /// One of the repository.
    pub fn of(path: &str) -> Self {
        Self {
            name: path.to_owned(),
            path: of_repository("manifests").join(path),
            _directory: None,
        }
    }

    /// One that begins beside the folder `manifests`, as a user's does.
    pub fn beside(name: &str, text: &str) -> Self {
        let directory = kustomize::beside(text);
        Self {
            name: name.to_owned(),
            path: directory.path().to_owned(),
            _directory: Some(directory),
        }
    }

    pub fn over(base: &str, components: &[&str]) -> Self {
        let name = format!("{base} with {components:?}");
        let paths = components
            .iter()
            .map(|it| format!("../manifests/components/{it}"));
        let kustomization = json!({"apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization", "resources": [format!("../manifests/{base}")],
            "components": paths.collect::<Vec<_>>()});
        Self::beside(&name, &kustomization.to_string())
    }
}

/// The kustomizations that a page of the documents shows.
fn of_the_page(page: &str) -> Vec<Folder> {
    let text = fs::read_to_string(of_repository(page)).expect("a page");
    let blocks = text.split("```yaml\n").skip(1);
    let texts = blocks.filter_map(|block| block.split("```").next());
    let texts = texts.filter(|text| text.starts_with("apiVersion: kustomize.config.k8s.io/"));
    let folders: Vec<Folder> = texts
        .enumerate()
        .map(|(index, text)| Folder::beside(&format!("{page} {index}"), text))
        .collect();
    assert!(!folders.is_empty(), "{page} shows how to install");
    folders
}

fn folders() -> Vec<Folder> {
    let mut folders: Vec<Folder> = WHOLE.map(Folder::of).into();
    for base in ["base", "overlays/kubeadm"] {
        folders.extend(COMPONENTS.map(|component| Folder::over(base, &[component])));
        folders.push(Folder::over(base, &COMPONENTS));
    }
    folders.push(Folder::over("overlays/policies-only", &["labelled-nodes"]));
    let pages = ["docs/install.md", "docs/monitoring.md"];
    folders.extend(pages.into_iter().flat_map(of_the_page));
    folders
}

pub fn pod_of(objects: &[Value]) -> PodSpec {
    let set = typed::<DaemonSet>("nftlet", object(objects, "DaemonSet", "nftlet"));
    set.spec.template.spec.expect("a pod")
}

pub fn nftlet_of(pod: &PodSpec) -> &Container {
    let [container] = &pod.containers[..] else {
        panic!("the pod has one container");
    };
    container
}

/// The arguments of a container as the kubelet passes them on the node `node-1`.
pub fn arguments(objects: &[Value], container: &Container) -> Vec<String> {
    let mut arguments = container.args.clone().expect("arguments");
    for variable in container.env.iter().flatten() {
        let source = variable.value_from.as_ref().expect("from somewhere");
        let value = match &source.config_map_key_ref {
            Some(from) => {
                let map = object(objects, "ConfigMap", &from.name);
                let value = map["data"][&from.key].as_str();
                value
                    .unwrap_or_else(|| panic!("no {} in {}", from.key, from.name))
                    .to_owned()
            }
            None => {
                let field = source.field_ref.as_ref().expect("from a field");
                assert_eq!(field.field_path, "spec.nodeName");
                "node-1".to_owned()
            }
        };
        for argument in &mut arguments {
            *argument = argument.replace(&format!("$({})", variable.name), &value);
        }
    }
    assert!(
        !arguments.iter().any(|it| it.contains("$(")),
        "{arguments:?}"
    );
    arguments
}

#[test]
fn every_combination_builds_into_objects_of_their_kinds() {
    let mut used = BTreeSet::new();
    for folder in folders() {
        let built = build(&folder.path);
        for object in &built.objects {
            check_kind(&folder.name, object);
        }
        let names: BTreeSet<String> = built.objects.iter().map(place).collect();
        assert_eq!(
            names.len(),
            built.objects.len(),
            "{}: {names:?}",
            folder.name
        );
        used.extend(built.files);
    }
    let unused: Vec<PathBuf> = files_below(&of_repository("manifests"))
        .into_iter()
        .filter(|file| !used.contains(file))
        .collect();
    assert_eq!(unused, Vec::<PathBuf>::new());
}

fn place(object: &Value) -> String {
    let metadata = &object["metadata"];
    format!(
        "{} {} {}",
        object["kind"], metadata["namespace"], metadata["name"]
    )
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).expect("a directory") {
        let path = entry
            .expect("an entry")
            .path()
            .canonicalize()
            .expect("it exists");
        if path.is_dir() {
            files.extend(files_below(&path));
        } else {
            files.push(path);
        }
    }
    files
}

#[test]
fn the_real_tool_builds_the_same() {
    let tools = [("kustomize", "build"), ("kubectl", "kustomize")];
    let works = |(tool, _): &(&str, &str)| {
        let asked = Command::new(tool).args(["--help"]).output();
        asked.is_ok_and(|output| output.status.success())
    };
    let Some((tool, verb)) = tools.into_iter().find(works) else {
        skip("kustomize", "neither kustomize nor kubectl is installed");
        return;
    };
    for folder in folders() {
        let output = Command::new(tool).arg(verb).arg(&folder.path).output();
        let output = output.expect("it can be started");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}", folder.name);
        assert_eq!(said, "", "{}", folder.name);
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let real: Vec<Value> = serde_saphyr::from_multiple(&text).expect("YAML");
        assert_eq!(
            sorted(without_hashes(&real)),
            sorted(build(&folder.path).objects),
            "{}",
            folder.name
        );
    }
}

fn sorted(mut objects: Vec<Value>) -> Vec<Value> {
    objects.sort_by_key(place);
    objects
}

/// Takes the hashes off the names of generated ConfigMaps, wherever they are mentioned.
fn without_hashes(objects: &[Value]) -> Vec<Value> {
    let mut text = serde_json::to_string(objects).expect("JSON");
    for object in objects
        .iter()
        .filter(|object| object["kind"] == "ConfigMap")
    {
        let name = object["metadata"]["name"].as_str().expect("a name");
        if let Some((plain, hash)) = name.rsplit_once('-')
            && hash.len() == 10
        {
            text = text.replace(&format!("\"{name}\""), &format!("\"{plain}\""));
        }
    }
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn what_is_referred_to_is_there() {
    for folder in folders() {
        let objects = build(&folder.path).objects;
        let name = &folder.name;
        let pod = pod_of(&objects);
        let account = pod.service_account_name.as_deref().expect("an account");
        let account = object(&objects, "ServiceAccount", account);
        for object in &objects {
            let namespace = object["metadata"]["namespace"].as_str();
            let cluster = ["ClusterRole", "ClusterRoleBinding"].map(Value::from);
            let wanted = (!cluster.contains(&object["kind"])).then_some("kube-system");
            assert_eq!(namespace, wanted, "{name}: {}", place(object));
            if object["kind"] == "ClusterRoleBinding" {
                let binding = typed::<ClusterRoleBinding>(name, object);
                let _role = kustomize::object(&objects, "ClusterRole", &binding.role_ref.name);
                for subject in binding.subjects.unwrap_or_default() {
                    assert_eq!(account["metadata"]["name"], subject.name, "{name}");
                    assert_eq!(account["metadata"]["namespace"], json!(subject.namespace));
                }
            }
        }

        let volumes: BTreeSet<_> = pod.volumes.iter().flatten().map(|it| &it.name).collect();
        let mut mounted = BTreeSet::new();
        let tag = format!(":{}", env!("CARGO_PKG_VERSION"));
        let init = pod.init_containers.iter().flatten();
        for container in pod.containers.iter().chain(init) {
            let image = container.image.as_deref().unwrap_or_default();
            assert!(image.ends_with(&tag), "{name}: {image}");
            assert_eq!(container.image, nftlet_of(&pod).image, "{name}");
            mounted.extend(container.volume_mounts.iter().flatten().map(|it| &it.name));
            let line = arguments(&objects, container);
            let line = std::iter::once("nftlet".to_owned()).chain(line);
            let parsed = Settings::try_parse_from(line);
            let parsed = parsed.unwrap_or_else(|error| panic!("{name}: {error}"));
            let for_the_node = parsed.hostname_override.is_some();
            assert!(for_the_node != parsed.init_only, "{name}");
        }
        assert_eq!(volumes, mounted, "{name}");

        let set = object(&objects, "DaemonSet", "nftlet");
        let labels = &set["spec"]["template"]["metadata"]["labels"];
        assert_eq!(&set["spec"]["selector"]["matchLabels"], labels, "{name}");
        let ports = nftlet_of(&pod).ports.iter().flatten();
        let ports: BTreeSet<_> = ports.filter_map(|port| port.name.as_deref()).collect();
        for (kind, ports_at) in [
            ("Service", "/spec/ports"),
            ("PodMonitor", "/spec/podMetricsEndpoints"),
        ] {
            let of_kind = objects.iter().filter(|object| object["kind"] == kind);
            for object in of_kind {
                let selector = &object["spec"]["selector"];
                let chosen = selector.get("matchLabels").unwrap_or(selector);
                assert_eq!(chosen, labels, "{name}");
                for port in object
                    .pointer(ports_at)
                    .and_then(Value::as_array)
                    .expect("ports")
                {
                    let wanted = port.get("targetPort").unwrap_or(&port["port"]);
                    assert!(ports.contains(wanted.as_str().expect("a name")), "{name}");
                }
            }
        }
    }
}

#[test]
fn nftlet_has_two_powers_and_writes_to_a_lock_and_its_socket_alone() {
    for folder in folders() {
        let objects = build(&folder.path).objects;
        // Without services there are no rules of kube-proxy to remove.
        let arguments = nftlet_of(&pod_of(&objects)).args.clone();
        let arguments = arguments.unwrap_or_default();
        let (of_host_wanted, powers): (&[&str], &[&str]) =
            match arguments.iter().any(|it| it == "--services=off") {
                true => (&["/run/nftlet"], &["NET_ADMIN"]),
                false => (
                    &["/run/xtables.lock", "/run/nftlet"],
                    &["NET_ADMIN", "NET_RAW"],
                ),
            };
        let pod = pod_of(&objects);
        assert_eq!(pod.host_network, Some(true));
        assert_eq!(
            pod.priority_class_name.as_deref(),
            Some("system-node-critical")
        );
        assert_eq!(pod.tolerations.as_ref().map(Vec::len), Some(1));
        let seccomp = pod
            .security_context
            .clone()
            .and_then(|it| it.seccomp_profile);
        assert_eq!(
            seccomp.map(|it| it.type_).as_deref(),
            Some("RuntimeDefault")
        );
        let of_host = pod
            .volumes
            .iter()
            .flatten()
            .filter_map(|it| it.host_path.as_ref());
        let of_host: Vec<&str> = of_host.map(|host| host.path.as_str()).collect();
        assert_eq!(of_host, of_host_wanted);
        let container = nftlet_of(&pod);
        let writable = container.volume_mounts.iter().flatten();
        let writable = writable.filter(|mount| mount.read_only != Some(true));
        let writable: Vec<&str> = writable.map(|mount| mount.mount_path.as_str()).collect();
        assert_eq!(writable, of_host_wanted);
        let security = container
            .security_context
            .clone()
            .expect("a security context");
        assert_eq!(security.privileged, None);
        assert_eq!(security.read_only_root_filesystem, Some(true));
        assert_eq!(security.allow_privilege_escalation, Some(false));
        let capabilities = security.capabilities.expect("capabilities");
        assert_eq!(capabilities.drop, Some(vec!["ALL".to_owned()]));
        assert_eq!(capabilities.add.unwrap_or_default(), powers);

        // Containers with more rights have ended before nftlet starts.
        for container in pod.init_containers.iter().flatten() {
            assert_eq!(container.name, "conntrack-settings");
            assert_eq!(container.restart_policy, None);
        }
        let set = object(&objects, "DaemonSet", "nftlet");
        let update = &set["spec"]["updateStrategy"]["rollingUpdate"];
        assert_eq!(update, &json!({"maxUnavailable": "10%", "maxSurge": 0}));
    }
}
