//! What others do to nftlet's tables is undone at once.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::agent;
use crate::support::agent::{NFTLET, wait_for_log};
use crate::support::manifests::{CLUSTER_CIDR, Manifests};
use crate::support::objects::{self, deny_all, list, namespace, pod, slice_of};
use crate::support::objects::{service, slice};
use nftlet::netlink::{Monitor, Nftables, Notification};
use nftlet::nft::{
    Declaration, Element, Key, Op, Ruleset, Selector, Set, SetKind, Table, TableFamily, TableId,
    Transaction, diff,
};
use nftlet::services::TABLE;
use nftlet_lab::fake_api::{NODES, SERVICES, SLICES};
use nftlet_lab::netns::{
    Ask, Daemon, Lab, LabOptions, Machine, Namespace, Protocol, Server, require_net_admin, wait_for,
};
use nix::sys::signal::Signal;
use serde_json::json;

const CIDR: [&str; 2] = ["--cluster-cidr", CLUSTER_CIDR];
const LONG: Duration = nftlet_lab::netns::PATIENCE;

fn put_service(manifests: &Manifests, index: u16, endpoints: &[IpAddr]) {
    let [high, low] = index.to_be_bytes();
    let name = format!("web-{index}");
    let endpoints = endpoints
        .iter()
        .map(|address| json!({"addresses": [address], "nodeName": "node-1"}));
    manifests.put(&list(
        &name,
        &[
            service(&name, format!("10.96.{high}.{low}")),
            slice_of(&name, &name, endpoints.collect()),
        ],
    ));
}

/// The ruleset as others list it, sorted because the kernel lists tables by age.
fn listing(node: &Namespace) -> Vec<String> {
    let mut lines: Vec<_> = node
        .nft(&["list", "ruleset"])
        .lines()
        .map(str::to_owned)
        .collect();
    lines.sort();
    lines
}

fn lab() -> (Lab, Manifests) {
    let lab = Lab::new(LabOptions::default());
    let manifests = Manifests::new();
    let pods: Vec<IpAddr> = lab.pods().iter().map(|pod| pod.v4.into()).collect();
    put_service(&manifests, 10, &pods);
    (lab, manifests)
}

#[test]
fn every_foreign_change_is_undone() {
    if !require_net_admin() {
        return;
    }
    let (lab, manifests) = lab();
    let node = lab.node().ns();
    let daemon = manifests.run(node, &CIDR);
    let wanted = listing(node);
    let changes = [
        "flush ruleset",
        "delete table ip nftlet",
        "flush table ip nftlet",
        "flush chain ip nftlet services",
        "insert rule ip nftlet services tcp dport 80 drop",
        "add chain ip nftlet intruder",
        "add element ip nftlet frontends { 10.96.0.99 . tcp . 80 : 9:0 }",
        "delete element ip nftlet endpoints { 10.96.0.10 . tcp . 80 . 0:1 }",
        "flush set ip nftlet hairpin",
        "add set ip6 nftlet intruder { type ipv6_addr; }",
        "add counter ip nftlet intruder",
    ];
    for change in changes {
        node.nft_load(change);
        wait_for(change, LONG, || (listing(node) == wanted).then_some(()));
    }
    let log = daemon.log();
    assert!(log.contains("modified by another process"), "{log}");
    // Another process that changes its own tables is ignored. Earlier events were handled
    // once the next service is in force.
    let next_service = |index: u16| {
        put_service(&manifests, index, &[]);
        wait_for("the next service", LONG, || {
            let rules = node.nft(&["list", "map", "ip", "nftlet", "frontends"]);
            rules.contains(&format!("web-{index}")).then_some(())
        });
    };
    next_service(11);
    let notices = daemon.log().matches("modified by another process").count();
    node.nft_load("table ip other { chain c { type filter hook input priority 0; }; }");
    next_service(12);
    assert_eq!(
        daemon.log().matches("modified by another process").count(),
        notices
    );
    assert!(node.nft(&["list", "tables"]).contains("table ip other"));
}

#[test]
fn repeated_foreign_changes_are_repaired_more_and_more_slowly() {
    if !require_net_admin() {
        return;
    }
    let (lab, manifests) = lab();
    let node = lab.node().ns();
    let daemon = manifests.run(node, &CIDR);
    let wanted = listing(node);
    // As long as it takes for the warning, and bounded.
    let started = Instant::now();
    let mut changes = 0;
    while !daemon.log().contains("another process keeps changing") {
        assert!(started.elapsed() < LONG * 2, "{}", daemon.log());
        node.nft_load("flush chain ip nftlet services");
        changes += 1;
    }
    let answers = daemon.log().matches("modified by another process").count();
    assert!(answers < changes, "{answers} answers to {changes} changes");
    wait_for("the last change to be undone", LONG, || {
        (listing(node) == wanted).then_some(())
    });
}

fn serve(pods: &[&Machine]) -> Vec<Server> {
    let serve = |pod: &&Machine| pod.serve(Protocol::Tcp, 8080);
    pods.iter().flat_map(serve).collect()
}

/// A policy for the pods of this node, and the pods that make it one.
fn put_policy(manifests: &Manifests, pods: &[&Machine]) {
    let pods = pods
        .iter()
        .zip(1..)
        .map(|(it, number)| pod(&format!("web-{number}"), "node-1", &[], &[it.v4]));
    let mut items: Vec<_> = pods.collect();
    items.extend([namespace("shop", &[]), deny_all("closed")]);
    manifests.put(&list("policy", &items));
}

#[test]
fn policy_tables_are_restored_and_repeated_changes_lead_to_a_warning() {
    if !require_net_admin() {
        return;
    }
    let (lab, manifests) = lab();
    let node = lab.node().ns();
    put_policy(&manifests, &lab.pods());
    let daemon = manifests.run(node, &CIDR);
    let has_policy = |node: &Namespace| {
        let rules = node.nft(&["list", "tables"]);
        rules.contains("nftlet-policy").then_some(())
    };
    wait_for("the policy", LONG, || has_policy(node));
    let wanted = listing(node);
    for change in [
        "flush ruleset",
        "delete table ip nftlet-policy",
        "flush table ip6 nftlet-policy",
        "flush chain ip nftlet-policy ingress",
        "add rule ip nftlet-policy deny-ingress accept",
    ] {
        node.nft_load(change);
        wait_for(change, LONG, || (listing(node) == wanted).then_some(()));
    }
    let log = daemon.log();
    assert!(
        log.contains("table nftlet-policy: modified by another process"),
        "{log}"
    );
    let started = Instant::now();
    while !daemon.log().contains("another process keeps changing") {
        assert!(started.elapsed() < LONG * 2, "{}", daemon.log());
        node.nft_load("flush chain ip nftlet-policy ingress");
    }
    wait_for("the last change to be undone", LONG, || {
        (listing(node) == wanted).then_some(())
    });
}

/// More news than the queue holds, and only then the change that matters.
#[test]
fn a_change_whose_news_were_lost_is_undone() {
    if !require_net_admin() {
        return;
    }
    let (lab, manifests) = lab();
    let node = lab.node().ns();
    let daemon = manifests.run(node, &CIDR);
    let wanted = listing(node);
    daemon.signal(Signal::SIGSTOP);
    let elements: Vec<String> = (0..20_000).map(|number| number.to_string()).collect();
    node.nft_load(&format!(
        "table ip other {{ set s {{ type mark; elements = {{ {} }}; }}; }}",
        elements.join(", ")
    ));
    node.nft_load("delete table ip other");
    node.nft_load("flush chain ip nftlet services");
    daemon.signal(Signal::SIGCONT);
    wait_for("the change to be undone", LONG, || {
        (listing(node) == wanted).then_some(())
    });
}

/// A queue that overflowed reports this, so that lost notifications do not pass for silence.
#[test]
fn a_monitor_says_what_it_missed() {
    if !require_net_admin() {
        return;
    }
    let namespace = Namespace::new("monitor");
    namespace.run(|| {
        let mut own = Nftables::open().expect("a socket");
        let mut other = Nftables::open().expect("a socket");
        let mut monitor = Monitor::new(&[TABLE], &own);
        own.mute_during_large_writes(monitor.muted());
        let add = |table: &str, elements: u32| {
            let id = TableId::new(TableFamily::Ip, table);
            let elements = (0..elements).map(|number| {
                Element::new(Key::build().address(Ipv4Addr::from(number).into()).finish())
            });
            let set = Set {
                declaration: Declaration::new(SetKind::Set, [Selector::SourceAddress]).into(),
                elements: elements.collect(),
            };
            let table = Table {
                sets: [("s".into(), set)].into(),
                ..Table::default()
            };
            let wanted = Ruleset {
                tables: [(id, table)].into(),
            };
            diff(&Ruleset::default(), wanted)
        };
        let delete = |table: &str| Transaction {
            ops: vec![Op::DeleteTable(TableId::new(TableFamily::Ip, table))],
        };
        // Without a listener there is none to mute.
        let first = own.apply(&add(TABLE, 2_000)).expect("written");
        assert!(!first.missed_notifications);
        own.apply(&delete(TABLE)).expect("written");
        let before = own.generation().expect("a number");
        monitor.listen().expect("a group");
        let large = own.apply(&add(TABLE, 2_000)).expect("written");
        assert!(large.missed_notifications);
        let small = own.apply(&delete(TABLE)).expect("written");
        assert!(!small.missed_notifications);
        assert_eq!(own.generation().expect("a number"), before + 2);
        assert_eq!(other.generation().expect("a number"), before + 2);
        // After a large write the monitor listens again.
        other.apply(&add(TABLE, 1)).expect("written");
        assert_eq!(monitor.wait().expect("news"), Notification::Changed);
        // The queue holds less than this; the other table is of no interest.
        other.apply(&add("other", 20_000)).expect("written");
        // In a thread of its own, so that the test never waits for ever.
        let (sender, news) = channel();
        thread::spawn(
            move || while monitor.wait().is_ok_and(|heard| sender.send(heard).is_ok()) {},
        );
        while news.recv_timeout(LONG).expect("news of the loss") != Notification::Lost {}
        // What fails counts for nothing.
        let now = own.generation().expect("a number");
        other.apply(&delete("missing")).expect_err("refused");
        assert_eq!(own.generation().expect("a number"), now);
    });
}

/// Clients are answered again after each flush, with five hundred services to put back.
#[test]
fn traffic_survives_a_flush_of_the_ruleset() {
    if !require_net_admin() {
        return;
    }
    let (lab, manifests) = lab();
    let node = lab.node().ns();
    for index in 256..756 {
        put_service(&manifests, index, &["10.244.9.1".parse().unwrap()]);
    }
    let _servers = serve(&lab.pods());
    let _daemon = manifests.run(node, &CIDR);
    let (stop, answers) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let client = lab.client().ns.clone();
    let asking = {
        let (stop, answers) = (stop.clone(), answers.clone());
        thread::spawn(move || {
            client.enter();
            // Short, because what is asked between a flush and its repair is lost; longer where
            // the machine does not answer in that time.
            let mut patience = Duration::from_millis(20);
            while !stop.load(Ordering::Relaxed) {
                let ask = Ask::tcp(IpAddr::from([10, 96, 0, 10]), 80).timeout(patience);
                if ask.send().is_ok() {
                    answers.fetch_add(1, Ordering::Relaxed);
                } else {
                    patience = (patience * 2).min(Duration::from_secs(2));
                }
            }
        })
    };
    let wait_for_more = |what: &str| {
        let until = answers.load(Ordering::Relaxed) + 50;
        wait_for(what, LONG, || {
            (answers.load(Ordering::Relaxed) >= until).then_some(())
        });
    };
    for _ in 0..5 {
        wait_for_more("answers before the flush");
        node.nft_load("flush ruleset");
        wait_for_more("answers after the flush");
    }
    stop.store(true, Ordering::Relaxed);
    asking.join().expect("the client ends");
}

/// A base chain that drops everything may be in nftlet's tables before its first list, and keeps it
/// from its server.
#[test]
fn hooks_that_keep_the_server_away_are_removed_and_the_rules_of_an_earlier_run_stay() {
    if !require_net_admin() {
        return;
    }
    let node = agent::Node::new();
    node.api.put(NODES, objects::node("node-1", "zone-a"));
    node.api.put(SERVICES, service("a", "10.96.0.11"));
    node.api.put(SLICES, slice("a-1", "a", &["10.1.0.1"]));
    drop(node.run());
    let wanted = listing(&node.ns);
    let drop_all = "add chain ip nftlet intruder \
        { type filter hook output priority -300; policy drop; }
        add rule ip nftlet intruder drop";
    // Before the start.
    node.ns.nft_load(drop_all);
    let daemon = node.run();
    assert_eq!(listing(&node.ns), wanted);
    let log = daemon.log();
    assert!(
        log.contains("base chain intruder was not created by nftlet"),
        "{log}"
    );
    drop(daemon);
    // A policy of an own chain.
    node.ns
        .nft_load("chain ip nftlet filter-output { policy drop; }");
    let daemon = node.run();
    assert_eq!(listing(&node.ns), wanted);
    drop(daemon);
    // While the server is waited for; nothing of the earlier rules goes.
    node.set_down(true);
    let daemon = node.start();
    wait_for_log(&daemon, "cannot be reached");
    node.ns.nft_load("add table ip6 nftlet-policy");
    node.ns.nft_load(
        "add chain ip6 nftlet-policy intruder { type filter hook output priority -300; policy drop; }",
    );
    node.ns.nft_load(drop_all);
    let tables = |ns: &Namespace| ns.nft(&["list", "ruleset"]).contains("intruder");
    wait_for("the hooks to go", LONG, || {
        (!tables(&node.ns)).then_some(())
    });
    node.ns.nft_load("delete table ip6 nftlet-policy");
    assert_eq!(listing(&node.ns), wanted);
    node.set_down(false);
    wait_for_log(&daemon, "the rules are in place");
}

/// Another process with a table of its own; it goes with this value.
struct TableOwner(Child);

impl TableOwner {
    fn of(ns: &Namespace, table: &str) -> Self {
        let nft = ns.command("nft").arg("-i").stdin(Stdio::piped()).spawn();
        let mut nft = nft.expect("nft starts");
        let input = nft.stdin.as_mut().expect("it is piped");
        writeln!(input, "add table {table} {{ flags owner; }}").expect("nft reads");
        wait_for("the table", LONG, || {
            ns.nft(&["list", "tables"]).contains(table).then_some(())
        });
        Self(nft)
    }
}

impl Drop for TableOwner {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_owner_of_a_table_is_named_and_the_rules_come_when_it_has_ended() {
    if !require_net_admin() {
        return;
    }
    let (lab, manifests) = lab();
    let node = lab.node().ns();
    let owner = TableOwner::of(node, "ip nftlet");
    let quiet = ["--metrics-bind-address=", "--healthz-bind-address="];
    let arguments = manifests.arguments(&[&CIDR[..], &quiet[..]].concat());
    let daemon = Daemon::start(node, NFTLET, arguments);
    let expected = format!(
        "table ip nftlet belongs to another process (netlink port {}, the id of process nft)",
        owner.0.id()
    );
    wait_for_log(&daemon, &expected);
    let log = daemon.log();
    assert!(log.contains("end that process"), "{log}");
    assert!(!log.contains("CAP_NET_ADMIN"), "{log}");
    drop(owner);
    wait_for_log(&daemon, "the rules are in place");
}
