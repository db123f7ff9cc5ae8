//! The binary from outside: its sources, its signals, what it says and how it ends.

use std::io::Write as _;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use crate::support::agent::{
    NFTLET, Node, PATIENCE, assert_has, confined, get, lines_with, metric, nftlet, of_repository,
    one_line, printed, rules, said, wait_for_log, wait_for_rules,
};
use crate::support::consumer::{cidr, node, service, slice};
use crate::support::manifests::{CLUSTER_CIDR, Manifests, Service};
use crate::support::skip::skip;
use nftlet_lab::fake_api;
use nftlet_lab::fake_api::{CIDRS, NAMESPACES, NODES, PODS, POLICIES, SERVICES, SLICES, Streaming};
use nftlet_lab::netns::{Daemon, Namespace, require_net_admin, wait_for};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::json;

/// How long nftlet may take to end.
const END: Duration = Duration::from_secs(1);

/// A node whose server has the service `a`, 10.96.0.11, with one endpoint, 10.1.0.1.
fn small_cluster() -> Node {
    let node_1 = Node::new();
    node_1.api.put(NODES, node("node-1", "zone-a"));
    node_1.api.put(CIDRS, cidr("kubernetes", "10.96.0.0/16"));
    node_1.api.put(SERVICES, service("a", "10.96.0.11"));
    node_1.api.put(SLICES, slice("a-1", "a", &["10.1.0.1"]));
    node_1
}

/// Manifests with services of several types on both families.
fn shop() -> Manifests {
    let manifests = Manifests::new();
    let mut web = Service::new("web", 10)
        .port("http", "TCP", 80, Some(30080))
        .port("dns", "UDP", 53, Some(30053));
    web.kind = "LoadBalancer".into();
    web.external_ips = vec!["198.51.100.7".into(), "2001:db8:2::7".into()];
    web.load_balancer_ips = vec!["203.0.113.10".into(), "2001:db8:1::10".into()];
    let idle = Service::new("idle", 11).port("http", "TCP", 80, None);
    let pods = ["10.244.1.11", "10.244.1.12", "fd00:10:244:1::11"];
    let pods = pods.map(|pod| (pod.to_owned(), true));
    manifests.service(&web);
    manifests.endpoints(&web, 8080, &pods);
    manifests.service(&idle);
    manifests.put(&json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "elsewhere", "namespace": "shop"},
        "spec": {"type": "ExternalName", "externalName": "example.com"},
    }));
    manifests
}

/// Checks that the kernel has what a new process would write for the server's objects.
#[track_caller]
fn assert_as_new(node: &Node) {
    let dry = node.arguments(&["--dry-run"]);
    assert_has(&node.ns, &printed(&nftlet(&node.ns, &dry, "")));
}

#[test]
fn lists_and_changes_of_a_cluster_reach_the_kernel() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    let mut nftlet = node.run();
    assert_eq!(lines_with(&nftlet.log(), &node.api.url()).len(), 1);
    node.leads("10.96.0.11", &["10.1.0.1"]);
    node.has("\"shop/a:http\"");

    node.api.put(SERVICES, service("b", "10.96.0.12"));
    node.api.put(SLICES, slice("b-1", "b", &["10.1.0.2"]));
    node.leads("10.96.0.12", &["10.1.0.2"]);
    node.api.put(SLICES, slice("a-1", "a", &["10.1.0.3"]));
    node.leads("10.96.0.11", &["10.1.0.3"]);
    node.api.delete(SLICES, "shop/b-1");
    node.leads("10.96.0.12", &[]);
    node.api.delete(SERVICES, "shop/a");
    node.lacks("10.96.0.11");
    node.has("10.96.0.12");
    assert_as_new(&node);
    assert_eq!(lines_with(&nftlet.log(), "WARN"), Vec::<String>::new());
    assert_eq!(lines_with(&nftlet.log(), "ERROR"), Vec::<String>::new());
    assert!(nftlet.ended().is_none());
}

#[test]
fn changes_while_connections_break_and_history_is_lost_are_not_missed() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    let nftlet = node.run();
    for as_event in [false, true] {
        for round in 0..3_u8 {
            let number = 20 + round + 10 * u8::from(as_event);
            let (name, ip) = (format!("s{number}"), format!("10.96.0.{number}"));
            node.api.put(SERVICES, service(&name, &ip));
            node.break_connections();
            let slice_name = format!("{name}-1");
            node.api
                .put(SLICES, slice(&slice_name, &name, &["10.1.0.9"]));
            node.api.end_watches();
            let again = ["10.1.0.5", &format!("10.1.1.{number}")];
            node.api.put(SLICES, slice(&slice_name, &name, &again));
        }
        // What happens while nftlet is cut off is forgotten before it can ask again.
        node.set_down(true);
        let gone = format!("s{}", 20 + 10 * u8::from(as_event));
        node.api.delete(SERVICES, &format!("shop/{gone}"));
        node.api.delete(SLICES, &format!("shop/{gone}-1"));
        let back = if as_event { "10.1.0.77" } else { "10.1.0.78" };
        node.api.put(SLICES, slice("a-1", "a", &[back]));
        node.api.compact(as_event);
        node.set_down(false);
        node.leads("10.96.0.11", &[back]);
    }
    node.lacks("10.96.0.20");
    node.lacks("10.96.0.30");
    for number in [21, 22, 31, 32] {
        let pods = ["10.1.0.5", &format!("10.1.1.{number}")];
        node.leads(&format!("10.96.0.{number}"), &pods);
    }
    assert_as_new(&node);
    assert_ne!(lines_with(&nftlet.log(), "listing again").len(), 0);
}

#[test]
fn without_its_server_the_rules_stay_and_it_recovers_by_itself() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    let nftlet = node.run();
    let before = rules(&node.ns);
    node.set_down(true);
    wait_for_log(&nftlet, "cannot be reached");
    assert_eq!(rules(&node.ns), before);
    node.api.put(SLICES, slice("a-1", "a", &["10.1.0.2"]));
    node.set_down(false);
    node.leads("10.96.0.11", &["10.1.0.2"]);
    // Servers send bookmarks about once a minute; any event shows a watch to be well.
    node.api.bookmark();
    wait_for_log(&nftlet, "the API server answers again");
    assert_eq!(lines_with(&nftlet.log(), "ERROR"), Vec::<String>::new());
    let told = lines_with(&nftlet.log(), "cannot be reached");
    assert_eq!(told.len(), 1, "{told:#?}");
    assert!(told[0].contains(&node.api.url()), "{told:#?}");
}

#[test]
fn a_restart_without_a_server_leaves_the_rules_in_force() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    drop(node.run());
    let before = rules(&node.ns);
    node.set_down(true);
    let nftlet = node.start();
    wait_for_log(&nftlet, "cannot be reached");
    assert_eq!(rules(&node.ns), before);
    node.api.put(SERVICES, service("b", "10.96.0.12"));
    node.set_down(false);
    node.has("10.96.0.12");
    node.leads("10.96.0.11", &["10.1.0.1"]);
}

#[test]
fn a_token_that_expired_is_told_once_and_the_rules_stay() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    node.api.require_token("secret");
    let nftlet = node.run();
    let before = rules(&node.ns);
    node.api.require_token("another");
    node.api.end_watches();
    for path in [SERVICES, SLICES, NODES, CIDRS] {
        node.wait_for_requests(path, 2);
    }
    wait_for_log(&nftlet, "does not accept nftlet's credentials");
    assert_eq!(rules(&node.ns), before);
    node.api.require_token("secret");
    node.api.put(SLICES, slice("a-1", "a", &["10.1.0.2"]));
    node.leads("10.96.0.11", &["10.1.0.2"]);
    let told = lines_with(&nftlet.log(), "WARN");
    assert_eq!(told.len(), 1, "{told:#?}");
    assert!(told[0].contains(&node.api.url()), "{told:#?}");
    assert!(told[0].contains("renew the token"), "{told:#?}");
}

#[test]
fn a_missing_permission_is_told_once_and_the_rules_stay() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    let nftlet = node.run();
    node.api.forbid(SLICES, true);
    node.api.end_watches();
    node.wait_for_requests(SLICES, 3);
    // The other kinds go on.
    node.api.put(SERVICES, service("b", "10.96.0.12"));
    node.has("10.96.0.12");
    node.leads("10.96.0.11", &["10.1.0.1"]);
    node.api.put(SLICES, slice("a-1", "a", &["10.1.0.2"]));
    node.api.forbid(SLICES, false);
    node.leads("10.96.0.11", &["10.1.0.2"]);
    let told = lines_with(&nftlet.log(), "WARN");
    assert_eq!(told.len(), 1, "{told:#?}");
    for part in [
        "endpointslices is forbidden",
        "ClusterRole",
        "discovery.k8s.io",
        "watch",
    ] {
        assert!(told[0].contains(part), "{part}: {told:#?}");
    }
}

#[test]
fn nothing_is_written_before_all_lists_are_complete() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    node.api.forbid(SLICES, true);
    let nftlet = node.start();
    // Said when every other list has come.
    wait_for_log(&nftlet, "waiting for the complete list of EndpointSlice\n");
    assert_eq!(rules(&node.ns), "");
    node.api.forbid(SLICES, false);
    wait_for_log(&nftlet, "the rules are in place");
    node.leads("10.96.0.11", &["10.1.0.1"]);
    assert_as_new(&node);
}

#[test]
fn servers_without_service_ranges_or_streamed_lists_do() {
    if !require_net_admin() {
        return;
    }
    for streaming in [Streaming::Yes, Streaming::Rejected] {
        let node = small_cluster();
        node.api.remove_api(CIDRS);
        node.api.set_streaming(streaming);
        let nftlet = node.run();
        node.leads("10.96.0.11", &["10.1.0.1"]);
        node.api.put(SLICES, slice("a-1", "a", &["10.1.0.2"]));
        node.leads("10.96.0.11", &["10.1.0.2"]);
        assert_eq!(lines_with(&nftlet.log(), "WARN"), Vec::<String>::new());
        let lists = |request: &fake_api::Recorded| !request.is_watch();
        let listed = node.api.requests_for(SERVICES).iter().any(lists);
        assert_eq!(listed, streaming == Streaming::Rejected);
    }
}

#[test]
fn a_dry_run_prints_the_same_for_a_cluster_and_for_its_manifests() {
    if !require_net_admin() {
        return;
    }
    let manifests = shop();
    let node = Node::new();
    node.put_all(&manifests);
    let more = ["--dry-run", "--cluster-cidr", CLUSTER_CIDR];
    let cluster = nftlet(&node.ns, &node.arguments(&more), "");
    let files = nftlet(&node.ns, &manifests.arguments(&more), "");
    let text = printed(&files);
    assert_eq!(printed(&cluster), text);
    assert!(text.contains("\"shop/web:http\""), "{text}");
    assert!(text.contains("shop/elsewhere: ExternalName"), "{text}");
    assert_eq!(said(&files), "");
    assert_eq!(rules(&node.ns), "", "a dry run changes nothing");
}

#[test]
fn once_writes_the_rules_of_a_dry_run_from_either_source_and_ends() {
    if !require_net_admin() {
        return;
    }
    let manifests = shop();
    let node = Node::new();
    node.put_all(&manifests);
    let cidr = ["--cluster-cidr", CLUSTER_CIDR];
    let dry = manifests.arguments(&[&["--dry-run"], &cidr[..]].concat());
    let by_nft = Namespace::new("by-nft");
    by_nft.nft_load(&printed(&nftlet(&by_nft, &dry, "")));
    let wanted = rules(&by_nft);
    assert!(wanted.contains("table ip6 nftlet"), "{wanted}");

    let once = [&["--once"], &cidr[..]].concat();
    let from_files = Namespace::new("from-files");
    let text = printed(&nftlet(&from_files, &manifests.arguments(&once), ""));
    assert_eq!(text, "");
    assert_eq!(rules(&from_files), wanted);
    assert_eq!(printed(&nftlet(&node.ns, &node.arguments(&once), "")), "");
    assert_eq!(rules(&node.ns), wanted);
    // Nothing to do the second time.
    printed(&nftlet(&node.ns, &node.arguments(&once), ""));
    assert_eq!(rules(&node.ns), wanted);
}

#[test]
fn manifests_come_from_standard_input() {
    if !require_net_admin() {
        return;
    }
    let manifests = shop();
    let mut input = String::new();
    for entry in std::fs::read_dir(manifests.path()).unwrap() {
        input.push_str(&std::fs::read_to_string(entry.unwrap().path()).unwrap());
        input.push('\n');
    }
    let ns = Namespace::new("node");
    let arguments = |mode| ["--manifests", "-", "--hostname-override", "node-1", mode];
    let text = printed(&nftlet(&ns, &arguments("--dry-run"), &input));
    let of_files = nftlet(&ns, &manifests.arguments(&["--dry-run"]), "");
    assert_eq!(text, printed(&of_files));
    assert_eq!(rules(&ns), "");
    printed(&nftlet(&ns, &arguments("--once"), &input));
    let by_nft = Namespace::new("by-nft");
    by_nft.nft_load(&text);
    assert_eq!(rules(&ns), rules(&by_nft));
}

/// Sends a signal and waits for the end; how it was, and how long it took.
#[track_caller]
fn end(daemon: &mut Daemon, signal: Signal) -> (ExitStatus, Duration) {
    let sent = Instant::now();
    daemon.signal(signal);
    let status = wait_for("the end", PATIENCE, || daemon.ended());
    (status, sent.elapsed())
}

/// Has nftlet end up to five times, one of which must be as fast as promised: a machine that
/// stalls makes the end slower, and never faster.
#[track_caller]
fn ends_fast(mut once: impl FnMut() -> Duration) {
    let mut took = Vec::new();
    while took.iter().all(|took| *took >= END) {
        assert!(took.len() < 5, "{took:?}");
        took.push(once());
    }
}

/// Waits until a program handles a signal, which until then does what it does to any program.
#[track_caller]
fn wait_for_handler(daemon: &Daemon, signal: Signal) {
    wait_for(&format!("{signal} to be handled"), PATIENCE, || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).ok()?;
        let mask = status
            .lines()
            .find_map(|line| line.strip_prefix("SigCgt:"))?;
        let mask = u64::from_str_radix(mask.trim(), 16).ok()?;
        (mask & (1 << (signal as i32 - 1)) != 0).then_some(())
    });
}

/// Ends a program with a signal, which it does with success.
#[track_caller]
fn end_well(daemon: &mut Daemon, signal: Signal) -> Duration {
    wait_for_handler(daemon, signal);
    let (status, took) = end(daemon, signal);
    assert_eq!(status.code(), Some(0), "{signal}: {}", daemon.log());
    took
}

#[test]
fn signals_end_it_within_a_second_and_the_rules_stay() {
    if !require_net_admin() {
        return;
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let node = small_cluster();
        ends_fast(|| {
            let mut nftlet = node.run();
            let before = rules(&node.ns);
            let took = end_well(&mut nftlet, signal);
            assert_eq!(rules(&node.ns), before);
            took
        });

        // Without a server, while it waits to try again.
        node.set_down(true);
        let before = rules(&node.ns);
        ends_fast(|| {
            let mut nftlet = node.start();
            wait_for_log(&nftlet, "cannot be reached");
            let took = end_well(&mut nftlet, signal);
            assert_eq!(rules(&node.ns), before);
            took
        });

        let (manifests, ns) = (shop(), Namespace::new("node"));
        ends_fast(|| {
            let mut nftlet = manifests.run(&ns, &["--metrics-bind-address", "127.0.0.1:10249"]);
            let before = rules(&ns);
            // Somebody holds a connection.
            let _stream = ns.run(|| std::net::TcpStream::connect("127.0.0.1:10249").unwrap());
            let took = end_well(&mut nftlet, signal);
            assert_eq!(rules(&ns), before);
            assert!(nftlet.log().contains("the rules stay in force"));
            took
        });
    }
}

/// Waits until the threads of a program with this name sleep.
#[track_caller]
fn wait_for_sleep(daemon: &Daemon, thread: &str) {
    wait_for(&format!("the thread {thread} to sleep"), PATIENCE, || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).ok()?;
        let mut states = tasks.filter_map(|task| {
            let stat = std::fs::read_to_string(task.ok()?.path().join("stat")).ok()?;
            let (name, rest) = stat.split_once('(')?.1.rsplit_once(") ")?;
            (name == thread).then(|| rest.starts_with('S'))
        });
        states.next()?.then_some(())
    });
}

#[test]
fn signals_end_it_while_it_waits_for_standard_input() {
    if !require_net_admin() {
        return;
    }
    let (directory, ns) = (tempfile::tempdir().unwrap(), Namespace::new("node"));
    let fifo = directory.path().join("input");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let fifo = fifo.to_str().unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        // Opened for writing, too, so that nothing comes and it never ends. What a shell starts in
        // the background ignores SIGINT, and so does what it starts in turn.
        let script = "exec env --default-signal \"$0\" --manifests - <>\"$1\"";
        ends_fast(|| {
            let mut nftlet = Daemon::start(&ns, "sh", ["-c", script, NFTLET, fifo]);
            wait_for_sleep(&nftlet, "io");
            let (_, took) = end(&mut nftlet, signal);
            assert_eq!(rules(&ns), "");
            took
        });
    }
}

#[test]
fn a_server_that_is_away_makes_healthz_fail_and_livez_not() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.conf");
    // Two seconds are two periods.
    let text = format!(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
         clientConnection: {{kubeconfig: {}}}\nnftables: {{syncPeriod: 1s}}\n",
        node.kubeconfig()
    );
    std::fs::write(&config, text).unwrap();
    let config = config.to_str().unwrap();
    let arguments = ["--config", config, "--hostname-override", "node-1"];
    let daemon = Daemon::start(&node.ns, NFTLET, arguments);
    wait_for_log(&daemon, "the rules are in place");
    let probe = |path: &str| get(&node.ns, "127.0.0.1:10256", path);
    assert_eq!(probe("/healthz").0, 200);
    node.set_down(true);
    let body = wait_for("/healthz to fail", PATIENCE, || {
        let (code, body) = probe("/healthz");
        (code == 503).then_some(body)
    });
    assert!(body.contains("no changes have come"), "{body}");
    assert!(body.contains("cannot be reached"), "{body}");
    assert_eq!(probe("/livez").0, 200, "a restart mends nothing");
    node.set_down(false);
    // Nothing has to happen in the cluster for it.
    wait_for("/healthz to recover", PATIENCE, || {
        (probe("/healthz").0 == 200).then_some(())
    });
}

#[test]
fn signals_end_it_while_it_waits_for_dns() {
    if !require_net_admin() {
        return;
    }
    let (directory, ns) = (tempfile::tempdir().unwrap(), Namespace::new("node"));
    // Questions leave and vanish, wherever the name server is.
    let nowhere = Namespace::new("nowhere");
    ns.veth("eth0", &nowhere, "eth0");
    for (last, end) in [(1, &nowhere), (9, &ns)] {
        end.addr_add("eth0", &format!("10.9.9.{last}/24"));
        end.addr_add("eth0", &format!("fd00:9::{last}/64"));
    }
    ns.route_add("default", "via 10.9.9.1");
    ns.route_add("default", "via fd00:9::1");
    ns.nft_load(
        "table inet quiet { chain input { type filter hook input priority 0; \
         meta l4proto { tcp, udp } th dport 53 counter drop; }; }",
    );
    let kubeconfig = directory.path().join("kubeconfig");
    let text = "{apiVersion: v1, kind: Config, current-context: x, \
        clusters: [{name: x, cluster: {server: 'http://api.invalid.example:6443'}}], \
        users: [{name: x, user: {}}], \
        contexts: [{name: x, context: {cluster: x, user: x}}]}";
    std::fs::write(&kubeconfig, text).unwrap();
    let arguments = [
        "--kubeconfig",
        kubeconfig.to_str().unwrap(),
        "--metrics-bind-address=",
        "--healthz-bind-address=",
    ];
    ends_fast(|| {
        let mut nftlet = Daemon::start(&ns, NFTLET, arguments);
        wait_for_log(&nftlet, "watching http://api.invalid.example:6443");
        wait_for_sleep(&nftlet, "io");
        end_well(&mut nftlet, Signal::SIGTERM)
    });
}

#[test]
fn once_that_is_interrupted_has_not_succeeded() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    node.set_down(true);
    ends_fast(|| {
        let mut nftlet = Daemon::start(&node.ns, NFTLET, node.arguments(&["--once"]));
        wait_for_log(&nftlet, "cannot be reached");
        wait_for_handler(&nftlet, Signal::SIGTERM);
        let (status, took) = end(&mut nftlet, Signal::SIGTERM);
        assert_eq!(status.code(), Some(1));
        assert_eq!(lines_with(&nftlet.log(), "nftlet: ").len(), 1);
        assert_eq!(rules(&node.ns), "");
        took
    });
}

#[test]
fn without_a_source_both_ways_out_are_named() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("node");
    for mode in [&[][..], &["--dry-run"], &["--once"]] {
        let line = one_line(&nftlet(&ns, mode, ""));
        assert!(line.contains("--kubeconfig FILE"), "{line}");
        assert!(line.contains("--manifests PATH"), "{line}");
    }
}

#[test]
fn files_that_cannot_be_used_are_named_in_one_line() {
    if !require_net_admin() {
        return;
    }
    let (directory, ns) = (tempfile::tempdir().unwrap(), Namespace::new("node"));
    let absent = directory.path().join("absent");
    let absent = absent.to_str().unwrap();
    for mode in [&[][..], &["--dry-run"], &["--once"]] {
        for flag in ["--manifests", "--kubeconfig"] {
            let arguments = [&[flag, absent], mode].concat();
            let line = one_line(&nftlet(&ns, &arguments, ""));
            assert!(line.contains(absent), "{line}");
            assert!(line.contains("No such file"), "{line}");
        }
    }
    let config = directory.path().join("config");
    let config_path = config.to_str().unwrap();
    let no_server = "{apiVersion: v1, kind: Config, current-context: x, \
        clusters: [{name: x, cluster: {}}], users: [{name: x, user: {}}], \
        contexts: [{name: x, context: {cluster: x, user: x}}]}";
    let no_certificate = no_server.replace(
        "cluster: {}",
        "cluster: {server: 'https://127.0.0.1:1', certificate-authority: /absent/ca.crt}",
    );
    let contents = [
        "",
        "apiVersion: [\n",
        "users:\n- name: x\n  user: {token: hush\n  more\n",
        "kind: Config\napiVersion: v1\n",
        no_server,
        &no_certificate,
        "- a\n- b\n",
    ];
    for content in contents {
        std::fs::write(&config, content).unwrap();
        for mode in [&[][..], &["--dry-run"]] {
            let arguments = [&["--kubeconfig", config_path], mode].concat();
            let line = one_line(&nftlet(&ns, &arguments, ""));
            assert!(line.contains(config_path), "{line}");
            assert!(!line.contains("hush"), "a secret is printed: {line}");
        }
    }
    assert_eq!(rules(&ns), "");
}

#[test]
fn without_its_capability_it_says_which_one_it_needs() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let nothing = [
        "--bounding-set=-all",
        "--inh-caps=-all",
        "--ambient-caps=-all",
    ];
    for mode in [&[][..], &["--once"]] {
        let output = confined(&ns, &nothing, &manifests.arguments(mode), "");
        let line = one_line(&output);
        assert!(line.contains("CAP_NET_ADMIN"), "{line}");
    }
    // Looking needs no rights.
    let dry = manifests.arguments(&["--dry-run"]);
    assert_ne!(printed(&confined(&ns, &nothing, &dry, "")), "");
}

#[test]
fn inside_a_user_namespace_it_works_too() {
    if !require_net_admin() {
        return;
    }
    let user_namespace = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", "--"]);
        command
    };
    let tried = user_namespace().arg("true").output().unwrap();
    if !tried.status.success() {
        let why = said(&tried);
        skip("user-namespaces", &why);
        return;
    }
    let manifests = shop();
    let output = user_namespace()
        .args(["sh", "-c", "\"$@\" && exec nft list ruleset", "sh", NFTLET])
        .args(manifests.arguments(&["--once"]))
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .output()
        .unwrap();
    let by_nft = Namespace::new("by-nft");
    let dry = manifests.arguments(&["--dry-run"]);
    by_nft.nft_load(&printed(&nftlet(&by_nft, &dry, "")));
    assert_eq!(printed(&output), rules(&by_nft));
}

#[test]
fn manifests_without_objects_remove_nothing_unless_that_is_allowed() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    manifests.program(&ns, &[]);
    let before = rules(&ns);
    let empty = tempfile::tempdir().unwrap();
    let directory = empty.path().to_str().unwrap();
    let arguments = ["--manifests", directory, "--hostname-override", "node-1"];
    // Written once, the rules would be gone.
    let once = nftlet(&ns, &[&arguments[..], &["--once"]].concat(), "");
    assert_eq!(once.status.code(), Some(1));
    let no_objects = format!("there are no objects in {directory}");
    let lines = lines_with(&said(&once), &no_objects);
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(lines[0].contains("--allow-empty"), "{lines:#?}");
    assert_eq!(rules(&ns), before);
    // A daemon waits, and follows the first object.
    let quiet = ["--metrics-bind-address=", "--healthz-bind-address="];
    let daemon = Daemon::start(&ns, NFTLET, [&arguments[..], &quiet].concat());
    wait_for_log(&daemon, "waiting for the complete list of");
    assert_eq!(lines_with(&daemon.log(), &no_objects).len(), 1);
    assert_eq!(rules(&ns), before);
    let other = Service::new("other", 99)
        .port("http", "TCP", 80, None)
        .object();
    std::fs::write(empty.path().join("other.json"), other.to_string()).unwrap();
    wait_for_log(&daemon, "the rules are in place");
    assert!(rules(&ns).contains("10.96.0.99"));
    assert!(!rules(&ns).contains("203.0.113.10"));
    drop(daemon);
    std::fs::remove_file(empty.path().join("other.json")).unwrap();
    let allowed = [&arguments[..], &["--once", "--allow-empty"]].concat();
    printed(&nftlet(&ns, &allowed, ""));
    assert!(!rules(&ns).contains("10.96.0.99"));
}

#[test]
fn a_port_in_use_that_must_be_had_names_its_flag_and_the_rules_stay() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    manifests.program(&ns, &[]);
    let before = rules(&ns);
    // Manifests that would change everything.
    let other = Manifests::new();
    let _held = ns.run(|| std::net::TcpListener::bind("127.0.0.1:10249").unwrap());
    for flag in ["--metrics-bind-address", "--healthz-bind-address"] {
        let arguments = other.arguments(&[flag, "127.0.0.1:10249", "--bind-address-hard-fail"]);
        let line = one_line(&nftlet(&ns, &arguments, ""));
        assert!(line.contains("127.0.0.1:10249"), "{line}");
        assert!(line.contains(flag), "{line}");
        assert_eq!(rules(&ns), before);
    }
}

#[test]
fn a_port_in_use_holds_up_nothing_and_is_had_later() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let address = "127.0.0.1:10256";
    let held = ns.run(|| std::net::TcpListener::bind(address).unwrap());
    let daemon = manifests.run(&ns, &["--healthz-bind-address", address]);
    assert_ne!(rules(&ns), "");
    let told = lines_with(&daemon.log(), "cannot listen on 127.0.0.1:10256");
    assert_eq!(told.len(), 1, "{told:#?}");
    assert!(told[0].contains("--healthz-bind-address"), "{told:#?}");
    drop(held);
    wait_for_log(&daemon, "listening on 127.0.0.1:10256 now");
    assert_eq!(get(&ns, address, "/healthz").0, 200);
}

#[test]
fn clients_that_hold_or_flood_the_ports_hold_up_nothing() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let address = "127.0.0.1:10256";
    let daemon = manifests.run(&ns, &["--healthz-bind-address", address]);
    let connect = || std::net::TcpStream::connect(address).unwrap();
    // More than there are places, none of which ends its request.
    let held: Vec<_> = ns.run(|| (0..300).map(|_| connect()).collect());
    for mut client in &held {
        // Those that were driven out already cannot write.
        let _ = client.write_all(b"GET /healthz HTTP/1.1\r\nHost: ");
    }
    // One that sends without end, and never reads.
    let mut flood = ns.run(connect);
    let flood = std::thread::spawn(move || {
        let line = b"GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n".repeat(1000);
        while flood.write_all(&line).is_ok() {}
    });
    assert_eq!(get(&ns, address, "/healthz").0, 200);
    let more = Service::new("more", 12).port("http", "TCP", 80, None);
    manifests.service(&more);
    wait_for_rules(&ns, "the new service", |rules| {
        rules.contains("shop/more:http")
    });
    assert_eq!(get(&ns, address, "/livez").0, 200);
    drop((held, daemon));
    flood.join().unwrap();
}

#[test]
fn contradictory_flags_end_with_2() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("node");
    let contradictions = [
        &["--dry-run", "--once", "--manifests", "x"][..],
        &["--kubeconfig", "x", "--manifests", "x"],
        &["--log-format", "loud"],
        &["--cluster-cidr", "10.0.0.0/8,10.1.0.0/16"],
        &["--manifests"],
        &["--unheard-of"],
        &["--manifests", "x", "--master", "http://x"],
        &["--init-only", "--once"],
        &["--write-config-to", "x", "--dry-run"],
        &["--proxy-mode", "userspace"],
        &["--masquerade-bit", "32"],
        &["--oom-score-adj", "-1001"],
        &["--master", "ftp://x"],
        &["--once", "man"],
        &["--detect-local-mode", "BridgeInterface"],
    ];
    for flags in contradictions {
        let output = nftlet(&ns, flags, "");
        let said = said(&output);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {said}");
        assert!(
            said.starts_with("error: ") || said.starts_with("nftlet: "),
            "{said}"
        );
        assert_eq!(said.matches('\n').count(), 1, "{said}");
    }
}

/// client-go's metrics, with its labels.
#[test]
fn requests_to_the_server_are_counted_and_timed() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    let address = "127.0.0.1:10249";
    let arguments = node.arguments(&["--metrics-bind-address", address]);
    let nftlet = Daemon::start(&node.ns, NFTLET, arguments);
    wait_for_log(&nftlet, "the rules are in place");
    let host = node.api.address();
    let count = |page: &str, series: &str| {
        let mut lines = page.lines();
        let value = lines.find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().expect("a number"))
    };
    let requests = |page: &str, code: &str, method: &str| {
        let labels = format!("code=\"{code}\",host=\"{host}\",method=\"{method}\"");
        count(page, &format!("rest_client_requests_total{{{labels}}}"))
    };
    let timed = |page: &str, method: &str| {
        let labels = format!("host=\"{host}\",verb=\"{method}\"");
        let name = "rest_client_request_duration_seconds_count";
        count(page, &format!("{name}{{{labels}}}"))
    };
    // Five watches, and the Event of the start.
    let page = wait_for("the metrics of requests", PATIENCE, || {
        let (_, page) = get(&node.ns, address, "/metrics");
        let all = requests(&page, "200", "GET") >= 5.0 && timed(&page, "POST") >= 1.0;
        all.then_some(page)
    });
    assert_eq!(requests(&page, "201", "POST"), timed(&page, "POST"));
    assert_eq!(timed(&page, "GET"), 0.0, "watches are not timed");
    node.set_down(true);
    wait_for("requests without an answer", PATIENCE, || {
        let (_, page) = get(&node.ns, address, "/metrics");
        (requests(&page, "<error>", "GET") >= 5.0).then_some(())
    });
}

#[test]
fn metrics_and_probes_tell_of_the_rules() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let (metrics, healthz) = ("127.0.0.1:10249", "127.0.0.1:10256");
    let _nftlet = manifests.run(
        &ns,
        &[
            "--metrics-bind-address",
            metrics,
            "--healthz-bind-address",
            healthz,
        ],
    );
    let (code, page) = get(&ns, metrics, "/metrics");
    assert_eq!(code, 200);
    assert_eq!(metric(&page, "nftlet_objects{kind=\"Service\"}"), 3.0);
    assert_eq!(metric(&page, "nftlet_objects{kind=\"EndpointSlice\"}"), 2.0);
    let latency = "nftlet_programming_latency_seconds_count";
    let first = metric(&page, latency);
    assert!(first > 0.0, "{page}");
    assert!(
        page.contains("kubeproxy_sync_proxy_rules_duration_seconds_count"),
        "{page}"
    );

    manifests.service(&Service::new("more", 12).port("http", "TCP", 80, None));
    wait_for("the metrics of a change", PATIENCE, || {
        let (_, page) = get(&ns, metrics, "/metrics");
        let counted = metric(&page, "nftlet_objects{kind=\"Service\"}") == 4.0;
        (counted && metric(&page, latency) > first).then_some(())
    });
    for address in [metrics, healthz] {
        for path in ["/healthz", "/livez"] {
            let (code, body) = get(&ns, address, path);
            assert_eq!(code, 200, "{path}: {body}");
            let body: serde_json::Value = serde_json::from_str(&body).unwrap();
            assert!(body["lastUpdated"].is_string(), "{path}: {body}");
        }
    }
    assert_eq!(
        get(&ns, metrics, "/proxyMode"),
        (200, "nftables".to_owned())
    );
    assert_eq!(get(&ns, healthz, "/metrics").0, 404);
}

#[test]
fn probes_say_no_before_the_first_rules() {
    if !require_net_admin() {
        return;
    }
    let node = small_cluster();
    node.api.forbid(SLICES, true);
    // The ports without flags are kube-proxy's.
    let nftlet = Daemon::start(&node.ns, NFTLET, node.arguments(&[]));
    wait_for_log(&nftlet, "endpointslices is forbidden");
    let (code, body) = get(&node.ns, "127.0.0.1:10256", "/healthz");
    assert_eq!(code, 503, "{body}");
    assert_eq!(get(&node.ns, "127.0.0.1:10256", "/livez").0, 200);
    node.api.forbid(SLICES, false);
    wait_for_log(&nftlet, "the rules are in place");
    assert_eq!(get(&node.ns, "127.0.0.1:10256", "/healthz").0, 200);
    let (_, page) = get(&node.ns, "127.0.0.1:10249", "/metrics");
    assert!(metric(&page, "nftlet_watch_lists_total{kind=\"Service\"}") >= 1.0);
}

#[test]
fn readiness_waits_for_network_policies_and_services_do_not() {
    if !require_net_admin() {
        return;
    }
    let (probes, metrics) = ("127.0.0.1:10256", "127.0.0.1:10249");
    let in_force = |node: &Namespace| {
        let (_, page) = get(node, metrics, "/metrics");
        let name = "nftlet_network_policies_in_force ";
        let mut lines = page.lines();
        lines.find_map(|line| line.strip_prefix(name).map(str::to_owned))
    };
    // Pods and Namespaces are asked for as soon as there is a policy.
    for (path, plural) in [
        (POLICIES, "networkpolicies"),
        (PODS, "pods"),
        (NAMESPACES, "namespaces"),
    ] {
        let node = small_cluster();
        let closed = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": "closed", "namespace": "shop"}, "spec": {"podSelector": {}},
        });
        node.api.put(POLICIES, closed);
        node.api.forbid(path, true);
        let nftlet = Daemon::start(&node.ns, NFTLET, node.arguments(&[]));
        wait_for_log(&nftlet, "network policies are not in force yet");
        let forbidden = format!("{plural} is forbidden");
        let (code, body) = wait_for("the reason", PATIENCE, || {
            Some(get(&node.ns, probes, "/readyz")).filter(|(_, body)| body.contains(&forbidden))
        });
        assert_eq!(code, 503, "{body}");
        assert!(
            body.contains("network policies are not in force: waiting for"),
            "{body}"
        );
        assert_eq!(get(&node.ns, probes, "/healthz").0, 200);
        assert_eq!(in_force(&node.ns).as_deref(), Some("0"), "{plural}");
        node.api.forbid(path, false);
        wait_for("readiness", PATIENCE, || {
            (get(&node.ns, probes, "/readyz").0 == 200).then_some(())
        });
        wait_for_log(&nftlet, "network policies are in force");
        assert_eq!(in_force(&node.ns).as_deref(), Some("1"), "{plural}");
    }
    let node = small_cluster();
    let off = ["--network-policy=off"];
    let nftlet = Daemon::start(&node.ns, NFTLET, node.arguments(&off));
    wait_for_log(&nftlet, "the rules are in place");
    assert_eq!(get(&node.ns, probes, "/readyz").0, 200);
    assert_eq!(in_force(&node.ns), None);
}

#[test]
fn tables_deleted_by_others_come_back() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    ns.nft_load("table inet others { set mine { type ipv4_addr; elements = { 192.0.2.1 }; }; }");
    let metrics = "127.0.0.1:10249";
    let daemon = manifests.run(&ns, &["--metrics-bind-address", metrics]);
    let web = Service::new("web", 10)
        .port("http", "TCP", 80, Some(30080))
        .port("dns", "UDP", 53, Some(30053));
    let healed = || {
        let (_, page) = get(&ns, metrics, "/metrics");
        metric(&page, "nftlet_foreign_changes_healed_total")
    };
    let told = "modified by another process";
    for (last, family) in [(21, "ip"), (22, "ip6")] {
        let (before, lines) = (healed(), lines_with(&daemon.log(), told).len());
        ns.nft(&["delete", "table", family, "nftlet"]);
        // The table, its count and its line in the log come one after the other.
        wait_for("the table to be put back", PATIENCE, || {
            let counted = healed() > before;
            let told = lines_with(&daemon.log(), told).len() > lines;
            (counted && told).then_some(())
        });
        let pods = [format!("10.244.1.{last}"), format!("fd00:10:244:1::{last}")];
        manifests.endpoints(&web, 8080, &pods.clone().map(|pod| (pod, true)));
        wait_for_rules(&ns, "the new endpoints", |rules| {
            pods.iter()
                .all(|pod| rules.contains(&format!(": {pod} . 8080")))
        });
        assert_has(
            &ns,
            &printed(&nftlet(&ns, &manifests.arguments(&["--dry-run"]), "")),
        );
    }
    assert!(rules(&ns).contains("192.0.2.1"), "what is of others stays");
}

#[test]
fn a_change_with_a_trigger_time_is_measured_from_there() {
    if !require_net_admin() {
        return;
    }
    let (manifests, ns) = (shop(), Namespace::new("node"));
    let metrics = "127.0.0.1:10249";
    let _daemon = manifests.run(&ns, &["--metrics-bind-address", metrics]);
    let measured = || {
        let (_, page) = get(&ns, metrics, "/metrics");
        let name = "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"}";
        metric(&page, name)
    };
    assert!(
        measured() < 0.5,
        "the slices of the shop have no trigger time"
    );
    manifests.put(&serde_json::json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": "web-triggered", "namespace": "shop",
            "labels": {"kubernetes.io/service-name": "web"},
            "annotations": {
                "endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z",
            },
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["10.244.1.99"]}],
    }));
    wait_for("the change to be measured", PATIENCE, || {
        (measured() > 0.5).then_some(())
    });
}

#[test]
fn a_dump_of_kubectl_becomes_rules_that_nft_takes() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("node");
    let dump = of_repository("tests/fixtures/kubectl-get-all.yaml");
    let text = printed(&nftlet(
        &ns,
        &["--dry-run", "--manifests", dump.to_str().unwrap()],
        "",
    ));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &text).unwrap();
    ns.nft(&["-c", "-f", file.path().to_str().unwrap()]);
    assert_eq!(rules(&ns), "", "checking changes nothing");
    ns.nft_load(&text);
    let loaded = rules(&ns);
    for name in [
        "default/kubernetes:https",
        "lab/svc-00002:p0",
        "shop/web:dns",
    ] {
        assert!(loaded.contains(name), "{name} in {loaded}");
    }
}

#[test]
fn a_deleted_node_gets_no_more_traffic_and_keeps_its_rules() {
    if !require_net_admin() {
        return;
    }
    let node_1 = small_cluster();
    let mut object = node("node-1", "zone-a");
    object["status"]["addresses"] = json!([{"type": "InternalIP", "address": "192.0.2.77"}]);
    object["spec"]["podCIDRs"] = json!(["10.244.7.0/24"]);
    node_1.api.put(NODES, object.clone());
    let arguments = node_1.arguments(&["--detect-local-mode", "NodeCIDR"]);
    let daemon = Daemon::start(&node_1.ns, NFTLET, arguments);
    wait_for_log(&daemon, "the rules are in place");
    let probe = |path: &str| get(&node_1.ns, "127.0.0.1:10256", path);
    assert_eq!(probe("/healthz").0, 200);
    let before = rules(&node_1.ns);
    for fact in ["192.0.2.77", "10.244.7.0/24"] {
        assert!(before.contains(fact), "{fact} in {before}");
    }
    node_1.api.delete(NODES, "node-1");
    let body = wait_for("/healthz to fail", PATIENCE, || {
        let (code, body) = probe("/healthz");
        (code == 503).then_some(body)
    });
    assert!(body.contains("the node is being removed"), "{body}");
    assert!(body.contains("\"nodeEligible\":false"), "{body}");
    assert_eq!(probe("/livez").0, 200);
    // What comes later finds the node as it was.
    node_1.api.put(SLICES, slice("a-1", "a", &["10.1.0.2"]));
    node_1.leads("10.96.0.11", &["10.1.0.2"]);
    assert_eq!(rules(&node_1.ns), before.replace("10.1.0.1", "10.1.0.2"));
    assert_eq!(probe("/healthz").0, 503);
    node_1.api.put(NODES, object);
    wait_for("/healthz to recover", PATIENCE, || {
        (probe("/healthz").0 == 200).then_some(())
    });
}
