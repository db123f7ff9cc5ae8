//! The manifests, as they are installed: every combination builds into objects that the API knows
//! and that fit together, the binary runs with the command line and the powers of its container,
//! and its rights are exactly the requests that it makes.

#[path = "common/agent.rs"]
mod agent;
mod common;
#[path = "common/consumer.rs"]
mod consumer;
#[path = "common/fake_api.rs"]
mod fake_api;
#[path = "common/kustomize.rs"]
mod kustomize;
#[path = "common/schema.rs"]
mod schema;

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use agent::{
    NFTLET, Node, PATIENCE, get, lines_with, nftlet, of_repository, printed, wait_for_log,
};
use clap::Parser as _;
use common::netns::{Daemon, Namespace, require_net_admin, wait_for};
use common::skip::skip;
use consumer::{cidr, node, service, slice};
use fake_api::{CIDRS, NAMESPACES, NODES, PODS, POLICIES, Recorded, SERVICES, SLICES, Streaming};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Container, PodSpec, Probe};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use kustomize::{build, object};
use nftlet::cli::Args;
use nftlet::events::{Pace, QUEUE, Recorder as EventRecorder};
use nftlet::model::{Notice, Reason, Subject};
use nftlet::source::Cluster;
use schema::{check_kind, typed};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Where nftlet may run as it is; everything else is put on top.
const WHOLE: [&str; 3] = [
    "base",
    "overlays/kubeadm",
    "overlays/without-network-policy",
];
const COMPONENTS: [&str; 5] = [
    "conntrack-settings",
    "labelled-nodes",
    "metrics-address",
    "monitoring",
    "without-network-policy",
];

/// A kustomization in a folder of its own.
struct Folder {
    name: String,
    path: PathBuf,
    _directory: Option<TempDir>,
}

impl Folder {
    /// One of the repository.
    fn of(path: &str) -> Self {
        Self {
            name: path.to_owned(),
            path: of_repository("manifests").join(path),
            _directory: None,
        }
    }

    /// One that begins beside the folder `manifests`, as a user's does.
    fn beside(name: &str, text: &str) -> Self {
        let directory = kustomize::beside(text);
        Self {
            name: name.to_owned(),
            path: directory.path().to_owned(),
            _directory: Some(directory),
        }
    }

    fn over(base: &str, components: &[&str]) -> Self {
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
    let pages = ["docs/install.md", "docs/monitoring.md"];
    folders.extend(pages.into_iter().flat_map(of_the_page));
    folders
}

fn pod_of(objects: &[Value]) -> PodSpec {
    let set = typed::<DaemonSet>("nftlet", object(objects, "DaemonSet", "nftlet"));
    set.spec.template.spec.expect("a pod")
}

fn nftlet_of(pod: &PodSpec) -> &Container {
    let [container] = &pod.containers[..] else {
        panic!("the pod has one container");
    };
    container
}

/// The arguments of a container as the kubelet passes them on the node `node-1`.
fn arguments(objects: &[Value], container: &Container) -> Vec<String> {
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
            let parsed = Args::try_parse_from(line);
            let parsed = parsed.unwrap_or_else(|error| panic!("{name}: {error}"));
            let for_the_node = parsed.hostname_override.is_some();
            assert!(for_the_node != parsed.process.init_only, "{name}");
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
fn nftlet_has_two_powers_and_only_a_lock_to_write_to() {
    for folder in folders() {
        let objects = build(&folder.path).objects;
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
        assert_eq!(of_host, ["/run/xtables.lock"]);
        let container = nftlet_of(&pod);
        let writable = container.volume_mounts.iter().flatten();
        let writable = writable.filter(|mount| mount.read_only != Some(true));
        let writable: Vec<&str> = writable.map(|mount| mount.mount_path.as_str()).collect();
        assert_eq!(writable, ["/run/xtables.lock"]);
        let security = container
            .security_context
            .clone()
            .expect("a security context");
        assert_eq!(security.privileged, None);
        assert_eq!(security.read_only_root_filesystem, Some(true));
        assert_eq!(security.allow_privilege_escalation, Some(false));
        let capabilities = security.capabilities.expect("capabilities");
        assert_eq!(capabilities.drop, Some(vec!["ALL".to_owned()]));
        assert_eq!(
            capabilities.add.unwrap_or_default(),
            ["NET_ADMIN", "NET_RAW"]
        );

        // Whoever is more powerful has ended before nftlet starts.
        for container in pod.init_containers.iter().flatten() {
            assert_eq!(container.name, "conntrack-settings");
            assert_eq!(container.restart_policy, None);
        }
        let set = object(&objects, "DaemonSet", "nftlet");
        let update = &set["spec"]["updateStrategy"]["rollingUpdate"];
        assert_eq!(update, &json!({"maxUnavailable": "10%", "maxSurge": 0}));
    }
}

/// A request in the words of a ClusterRole: `VERB RESOURCE.GROUP`, or `VERB URL`.
fn right(request: &Recorded) -> String {
    let parts: Vec<&str> = request.path.trim_matches('/').split('/').collect();
    let (group, mut rest) = match &parts[..] {
        ["api", _, rest @ ..] => ("", rest),
        ["apis", group, _, rest @ ..] => (*group, rest),
        _ => return format!("{} {}", request.method.to_lowercase(), request.path),
    };
    if let ["namespaces", _, of_namespace @ ..] = rest
        && !of_namespace.is_empty()
    {
        rest = of_namespace;
    }
    let (resource, named) = match rest {
        [resource] => ((*resource).to_owned(), false),
        [resource, _name] => ((*resource).to_owned(), true),
        [resource, _name, sub] => (format!("{resource}/{sub}"), true),
        _ => panic!("no resource: {}", request.path),
    };
    let verb = match (request.method.as_str(), named) {
        ("GET", true) => "get",
        ("GET", false) if request.is_watch() => "watch",
        ("GET", false) => "list",
        ("POST", _) => "create",
        ("PUT", _) => "update",
        ("PATCH", _) => "patch",
        ("DELETE", true) => "delete",
        other => panic!("no verb: {other:?}"),
    };
    format!("{verb} {resource}.{group}")
}

/// What the roles of a build grant, in the same words.
fn granted(objects: &[Value]) -> BTreeSet<String> {
    let mut granted = BTreeSet::new();
    for object in objects
        .iter()
        .filter(|object| object["kind"] == "ClusterRole")
    {
        for rule in typed::<ClusterRole>("role", object)
            .rules
            .unwrap_or_default()
        {
            for verb in &rule.verbs {
                for url in rule.non_resource_urls.iter().flatten() {
                    granted.insert(format!("{verb} {url}"));
                }
                for group in rule.api_groups.iter().flatten() {
                    for resource in rule.resources.iter().flatten() {
                        granted.insert(format!("{verb} {resource}.{group}"));
                    }
                }
            }
        }
    }
    granted
}

/// A server that knows no streamed lists, so that everything is listed and watched, and whose
/// objects give every reason to ask for something.
fn busy_cluster() -> Node {
    let cluster = Node::new();
    let api = &cluster.api;
    api.set_streaming(Streaming::Rejected);
    api.put(NODES, node("node-1", "zone-a"));
    api.put(CIDRS, cidr("kubernetes", "10.96.0.0/16"));
    api.put(SERVICES, service("a", "10.96.0.11"));
    api.put(SERVICES, service("claims-the-same", "10.96.0.11"));
    api.put(SLICES, slice("a-1", "a", &["10.1.0.1"]));
    api.put(
        NAMESPACES,
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}),
    );
    api.put(
        PODS,
        json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "shop", "name": "a"},
            "spec": {"nodeName": "node-1", "containers": []},
            "status": {"phase": "Running", "podIP": "10.1.0.1", "podIPs": [{"ip": "10.1.0.1"}]}}),
    );
    api.put(
        POLICIES,
        json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"namespace": "shop", "name": "deny"},
            "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}}),
    );
    cluster
}

/// nftlet as a build runs it: its arguments, with the powers of its container.
struct Installed {
    folder: &'static str,
    objects: Vec<Value>,
    cluster: Node,
    daemon: Daemon,
    _mounted: TempDir,
}

/// kubeadm's ConfigMap as it is mounted, for a kubeconfig.
fn mounted(kubeconfig: &str) -> TempDir {
    let mounted = tempfile::tempdir().expect("a directory");
    fs::copy(kubeconfig, mounted.path().join("kubeconfig.conf")).expect("copied");
    let fixture = of_repository("tests/fixtures/kube-proxy-config-kubeadm.yaml");
    let settings = fs::read_to_string(fixture).expect("the fixture");
    let settings = below(mounted.path(), &settings);
    fs::write(mounted.path().join("config.conf"), settings).expect("written");
    mounted
}

/// A text with the place of the mounted ConfigMap in place of that in a pod.
fn below(mounted: &Path, text: &str) -> String {
    text.replace(
        "/var/lib/kube-proxy",
        mounted.to_str().expect("a path in UTF-8"),
    )
}

fn install(folder: &'static str) -> Installed {
    install_on(busy_cluster(), folder)
}

fn install_on(cluster: Node, folder: &'static str) -> Installed {
    let objects = build(&Folder::of(folder).path).objects;
    let pod = pod_of(&objects);
    let container = nftlet_of(&pod);
    let kubeconfig = cluster.kubeconfig();
    let mounted = mounted(&kubeconfig);

    let security = container.security_context.clone();
    let added = security
        .and_then(|it| it.capabilities?.add)
        .unwrap_or_default();
    let added = added
        .iter()
        .map(|name| format!(",+{}", name.to_lowercase()));
    let bounds = format!("--bounding-set=-all{}", added.collect::<String>());
    let mut line = vec![bounds, "--no-new-privs".into(), "--".into(), NFTLET.into()];
    let found = arguments(&objects, container);
    line.extend(found.iter().map(|it| below(mounted.path(), it)));
    if container.volume_mounts.iter().flatten().count() == 1 {
        // In place of the pod's service account.
        line.extend(["--kubeconfig".to_owned(), kubeconfig]);
    }
    let daemon = Daemon::start(&cluster.ns, "setpriv", line);
    Installed {
        folder,
        objects,
        cluster,
        daemon,
        _mounted: mounted,
    }
}

/// Where a probe asks, and for what.
#[track_caller]
fn target(container: &Container, probe: Option<&Probe>) -> (String, String) {
    let probe = probe.and_then(|probe| probe.http_get.clone());
    let probe = probe.expect("a probe");
    let mut ports = container.ports.iter().flatten();
    let port = ports.find(|port| json!(port.name) == json!(probe.port));
    let address = format!("127.0.0.1:{}", port.expect("a port").container_port);
    (address, probe.path.expect("a path"))
}

/// The kubelet makes an Event Unhealthy of each probe that fails, and asks the others only after
/// the startup probe.
#[test]
fn no_probe_fails_at_a_start_however_long_the_lists_take() {
    if !require_net_admin() {
        return;
    }
    let cluster = busy_cluster();
    cluster.api.set_busy(SLICES, Some(1));
    let installed = install_on(cluster, "base");
    let Installed {
        cluster, objects, ..
    } = &installed;
    let pod = pod_of(objects);
    let container = nftlet_of(&pod);
    let startup = container.startup_probe.as_ref().expect("a startup probe");
    let (address, path) = target(container, Some(startup));
    let wait = path.strip_prefix("/livez?wait=").expect("it waits");
    let wait: i32 = wait.parse().expect("seconds");
    assert!(startup.timeout_seconds > Some(wait), "{startup:?}");
    assert!(startup.initial_delay_seconds >= Some(1), "{startup:?}");
    // This is what the first seconds are for.
    let at: SocketAddr = address.parse().expect("an address");
    wait_for("the port to be open", PATIENCE, || {
        cluster.ns.run(|| TcpStream::connect(at)).ok()
    });
    std::thread::scope(|scope| {
        let started = scope.spawn(|| get(&cluster.ns, &address, &path));
        let (address, path) = target(container, container.readiness_probe.as_ref());
        let (code, _) = get(&cluster.ns, &address, &path);
        assert_eq!(code, 503, "the lists are not there yet");
        cluster.api.set_busy(SLICES, None);
        let (code, body) = started.join().expect("an answer");
        assert_eq!(code, 200, "{body}");
    });
    for probe in [&container.readiness_probe, &container.liveness_probe] {
        let (address, path) = target(container, probe.as_ref());
        let (code, body) = get(&cluster.ns, &address, &path);
        assert_eq!(code, 200, "{path}: {body}");
    }
}

#[test]
fn it_runs_as_installed_and_asks_for_exactly_what_it_has_the_right_to() {
    if !require_net_admin() {
        return;
    }
    for installed in WHOLE.map(install) {
        let Installed {
            folder,
            objects,
            cluster,
            daemon,
            ..
        } = &installed;
        wait_for_log(daemon, "the rules are in place");
        let pod = pod_of(objects);
        let container = nftlet_of(&pod);
        for probe in [
            &container.startup_probe,
            &container.liveness_probe,
            &container.readiness_probe,
        ] {
            let (address, path) = target(container, probe.as_ref());
            let answer = wait_for(&format!("{path} to be well"), PATIENCE, || {
                Some(get(&cluster.ns, &address, &path)).filter(|(code, _)| *code == 200)
            });
            assert_eq!(answer.0, 200);
        }
        // A watch falls silent after a while, and the server is asked whether it is there.
        let mut wanted = granted(objects);
        // What happens again is counted in its Event, but not before some minutes have passed.
        assert!(wanted.remove("patch events.events.k8s.io"), "{folder}");
        let asked = || -> BTreeSet<String> { cluster.api.requests().iter().map(right).collect() };
        wait_for(&format!("{folder} to ask for everything"), PATIENCE, || {
            asked().is_superset(&wanted).then_some(())
        });
        assert_eq!(asked(), wanted, "{folder}");
        let warnings = lines_with(&daemon.log(), "WARN");
        // A machine that stalls makes the server one that does not answer.
        let foreseen = |line: &&String| {
            line.contains("belongs to the older Service")
                || line.contains("the API server cannot be reached")
        };
        let others: Vec<&String> = warnings.iter().filter(|it| !foreseen(it)).collect();
        assert_eq!(others, Vec::<&String>::new(), "{folder}");
    }
}

/// What kubeadm's ConfigMap asks for is made by a container that may, nulls being kube-proxy's
/// defaults.
#[test]
fn the_settings_of_kubeadm_are_made_with_its_own_file() {
    if !require_net_admin() {
        return;
    }
    let objects = build(&Folder::of("overlays/kubeadm").path).objects;
    let pod = pod_of(&objects);
    let file = |container: &Container| {
        let mut args = container.args.iter().flatten();
        let config = args.find_map(|it| it.strip_prefix("--config="));
        let path = Path::new(config.expect("a file")).to_owned();
        let mounted = container.volume_mounts.iter().flatten();
        let mount = mounted.filter(|it| Some(Path::new(&it.mount_path)) == path.parent());
        let names: Vec<String> = mount.map(|it| it.name.clone()).collect();
        (path, names)
    };
    let first = pod.init_containers.as_deref().unwrap_or_default();
    let [first] = first else {
        panic!("one container goes before: {first:?}");
    };
    assert_eq!(file(first), file(nftlet_of(&pod)));
    assert_eq!(file(first).1, ["kube-proxy"]);
    let security = first.security_context.clone().expect("a security context");
    assert_eq!(security.privileged, Some(true));

    let cluster = Node::new();
    let mounted = mounted(&cluster.kubeconfig());
    let read = |name: &str| {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
        let output = cluster.ns.command("cat").arg(&path).output();
        let output = output.expect("cat runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let arguments = arguments(&objects, first);
    let arguments: Vec<String> = arguments
        .iter()
        .map(|it| below(mounted.path(), it))
        .collect();
    printed(&nftlet(&cluster.ns, &arguments, ""));
    assert_eq!(read("tcp_timeout_close_wait"), "3600");
    assert_eq!(read("tcp_timeout_established"), "86400");
    let left = seconds_left_in_close_wait(&cluster.ns);
    assert!((3540..=3600).contains(&left), "{left}");
}

/// Closes one end of a connection. Returns for how long the kernel goes on knowing it, in seconds,
/// as the e2e test of kube-proxy reads it.
fn seconds_left_in_close_wait(ns: &Namespace) -> u64 {
    ns.nft_load(
        "table ip tracked {
            chain incoming { type filter hook input priority 0; ct state new counter; }
        }",
    );
    let _server = ns.run(|| {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let client = TcpStream::connect(address).expect("it listens");
        let (server, _) = listener.accept().expect("it is connected");
        drop(client);
        server
    });
    wait_for("a connection in CLOSE_WAIT", PATIENCE, || {
        let known = ns.command("cat").arg("/proc/net/nf_conntrack").output();
        let known = String::from_utf8(known.expect("cat runs").stdout).expect("a text");
        let mut lines = known.lines();
        let line = lines.find(|line| line.contains("CLOSE_WAIT"))?;
        line.split_whitespace().nth(4)?.parse().ok()
    })
}

/// A count is written some minutes after an Event, which is longer than the test above waits.
#[tokio::test]
async fn the_counts_of_events_need_no_other_right() {
    let api = fake_api::FakeApi::start().await;
    let directory = tempfile::tempdir().expect("a directory");
    let kubeconfig = api.write_kubeconfig(directory.path());
    let cluster = Cluster::connect(Some(kubeconfig), None, "node-1".into()).await;
    let client = cluster.expect("a client").client();
    let pace = Pace {
        series: Duration::from_millis(50),
        ..Pace::default()
    };
    let (notices, received) = tokio::sync::mpsc::channel(QUEUE);
    tokio::spawn(EventRecorder::with_pace(client, "node-1".into(), pace).run(received));
    for _ in 0..2 {
        let notice = Notice {
            subject: Subject::Other("the kernel".into()),
            reason: Reason::SyncFailed,
            message: "no".into(),
        };
        notices.send(notice).await.expect("it listens");
    }
    let counted = |written: &[fake_api::Written]| written.iter().any(|it| !it.is_new());
    api.until_written("a count", counted).await;
    let asked: BTreeSet<String> = api.requests().iter().map(right).collect();
    assert!(asked.contains("patch events.events.k8s.io"), "{asked:?}");
    let granted = granted(&build(&Folder::of("base").path).objects);
    assert!(asked.is_subset(&granted), "{asked:?}");
}
