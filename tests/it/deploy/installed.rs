//! nftlet as the manifests install it: command line, powers, rights and probes.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use super::manifests::{Folder, WHOLE, arguments, nftlet_of, pod_of};
use crate::support::agent::{
    NFTLET, Node, PATIENCE, get, lines_with, nftlet, of_repository, printed, wait_for_log,
};
use crate::support::kustomize::build;
use crate::support::objects::{cidr, deny_all, namespace, node, pod, service, slice};
use crate::support::schema::typed;
use k8s_openapi::api::core::v1::{Container, Probe};
use k8s_openapi::api::rbac::v1::ClusterRole;
use nftlet::events::{Pace, QUEUE, Recorder as EventRecorder};
use nftlet::model::{Notice, Reason, Subject};
use nftlet::source::Cluster;
use nftlet_lab::fake_api;
use nftlet_lab::fake_api::{
    CIDRS, CLUSTER_POLICIES, NAMESPACES, NODES, PODS, POLICIES, Recorded, SERVICES, SLICES,
    Streaming,
};
use nftlet_lab::netns::{Daemon, Namespace, require_net_admin, wait_for};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A request in the words of a ClusterRole: `VERB RESOURCE.GROUP`, or `VERB URL`.
fn right(request: &Recorded) -> String {
    let parts: Vec<&str> = request.path.trim_matches('/').split('/').collect();
    let (group, mut rest) = match &parts[..] {
        ["api", _, rest @ ..] => ("", rest),
        ["apis", group, _, rest @ ..] if !rest.is_empty() => (*group, rest),
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
    api.put(NAMESPACES, namespace("shop", &[]));
    api.put(PODS, pod("a", "node-1", &[], &["10.1.0.1"]));
    api.put(POLICIES, deny_all("deny"));
    api.add_api(CLUSTER_POLICIES);
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

/// kubeadm's ConfigMap in the form of mounted files, for a kubeconfig.
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
    if !found.iter().any(|it| it.starts_with("--config=")) {
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
