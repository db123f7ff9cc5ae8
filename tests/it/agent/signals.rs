//! How the process ends: signals, whatever it waits for.

use std::process::ExitStatus;
use std::time::{Duration, Instant};

use super::process::shop;
use crate::support::agent::{NFTLET, PATIENCE, lines_with, rules, small_cluster, wait_for_log};
use nftlet_lab::netns::{Daemon, Namespace, require_net_admin, wait_for};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

/// How long nftlet may take to end.
const END: Duration = Duration::from_secs(1);

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
            // A client holds a connection.
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
