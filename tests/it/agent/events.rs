//! What a person should know arrives at an API server as Events, within limits.

use std::time::Duration;

use crate::support::agent::{NFTLET, Node, PATIENCE, get, lines_with, metric, wait_for_log};
use crate::support::objects::{cidr, node, policy, service, slice, with};
use nftlet::events::{EventMetrics, Pace, QUEUE, Recorder};
use nftlet::model::{Kind, Notice, ObjectName, ObjectRef, Reason, Subject};
use nftlet::serve::metrics::Registry;
use nftlet::source::Cluster;
use nftlet_lab::fake_api::{CIDRS, FakeApi, NODES, POLICIES, SERVICES, SLICES, Written};
use nftlet_lab::netns::{Daemon, require_net_admin, wait_for};
use serde_json::json;
use tempfile::TempDir;
use tokio::sync::mpsc;

/// A recorder beside a server, with the sender of its notices.
struct Bench {
    api: FakeApi,
    notices: mpsc::Sender<Notice>,
    _directory: TempDir,
}

/// Nothing that a test waits for takes long; nothing else happens within a test.
const PACE: Pace = Pace {
    series: Duration::from_millis(50),
    answer: Duration::from_secs(10),
    retry: Duration::from_millis(10),
    silence: Duration::from_secs(3600),
};

async fn bench_with(api: FakeApi, pace: Pace) -> Bench {
    bench_counting(api, pace, &Registry::new().expect("a registry")).await
}

/// The same, counting the Events that are given up.
async fn bench_counting(api: FakeApi, pace: Pace, registry: &Registry) -> Bench {
    let directory = tempfile::tempdir().expect("a directory");
    let kubeconfig = api.write_kubeconfig(directory.path());
    let cluster = Cluster::connect(Some(kubeconfig), None, "node-1".into()).await;
    let client = cluster.expect("a client").client();
    let (notices, received) = mpsc::channel(QUEUE);
    let recorder = Recorder::with_pace(client, "node-1".into(), pace);
    let recorder = recorder.with_metrics(EventMetrics::register(registry).expect("metrics"));
    tokio::spawn(recorder.run(received));
    Bench {
        api,
        notices,
        _directory: directory,
    }
}

/// How many Events were given up.
fn given_up(registry: &Registry) -> f64 {
    metric(&registry.encode(), "nftlet_events_given_up_total")
}

async fn bench() -> Bench {
    bench_with(FakeApi::start().await, PACE).await
}

fn about(name: &str, reason: Reason, message: &str) -> Notice {
    Notice {
        subject: Subject::Object(ObjectRef::new(Kind::Service, ObjectName::new("shop", name))),
        reason,
        message: message.into(),
    }
}

fn new_about<'a>(written: &'a [Written], object: &'a str) -> impl Iterator<Item = &'a Written> {
    let of_object = move |it: &&Written| it.is_new() && it.text("/regarding/name") == object;
    written.iter().filter(of_object)
}

#[tokio::test]
async fn an_event_has_what_the_api_asks_for_and_stands_at_its_object() {
    let api = FakeApi::start().await;
    let mut web = service("web", "10.96.0.10");
    web["metadata"]["uid"] = json!("2f7c0c3e");
    api.put(SERVICES, web);
    let bench = bench_with(api, PACE).await;
    let notice = about("web", Reason::InvalidField, "spec.ports[0]: no");
    bench.notices.send(notice).await.expect("it listens");
    let arrived = |written: &[Written]| written.len() == 2;
    bench.api.until_written("two Events", arrived).await;
    let written = bench.api.written();
    assert_eq!(written[0].namespace, "default");
    assert_eq!(written[0].text("/reason"), "Starting");
    assert_eq!(written[0].text("/type"), "Normal");
    assert_eq!(written[0].text("/regarding/kind"), "Node");
    assert_eq!(written[0].text("/regarding/uid"), "node-1");
    let event = &written[1];
    assert_eq!(event.namespace, "shop");
    for (pointer, value) in [
        ("/apiVersion", "events.k8s.io/v1"),
        ("/kind", "Event"),
        ("/metadata/namespace", "shop"),
        ("/type", "Warning"),
        ("/reason", "InvalidField"),
        ("/action", "ReadObject"),
        ("/note", "spec.ports[0]: no"),
        ("/reportingController", "nftlet"),
        ("/reportingInstance", "nftlet-node-1"),
        ("/regarding/apiVersion", "v1"),
        ("/regarding/kind", "Service"),
        ("/regarding/namespace", "shop"),
        ("/regarding/name", "web"),
        ("/regarding/uid", "2f7c0c3e"),
    ] {
        assert_eq!(event.text(pointer), value, "{pointer}");
    }
    // The form of a MicroTime.
    let at = event.text("/eventTime");
    assert_eq!(at.len(), "2026-01-01T00:00:00.000000Z".len(), "{at}");
}

#[tokio::test]
async fn the_same_again_becomes_a_series() {
    let bench = bench().await;
    for round in 1..=20 {
        let words = format!("refused in round {round}");
        let notice = about("web", Reason::KernelRefused, &words);
        bench.notices.send(notice).await.expect("it listens");
    }
    let counted = |written: &[Written]| {
        let mut patches = written.iter().filter(|it| !it.is_new());
        patches.any(|it| it.body["series"]["count"] == 20)
    };
    bench.api.until_written("a count of 20", counted).await;
    let written = bench.api.written();
    assert_eq!(new_about(&written, "web").count(), 1, "{written:?}");
    let patches: Vec<_> = written.iter().filter(|it| !it.is_new()).collect();
    assert!(patches.len() < 5, "{patches:?}");
    let last = patches.last().expect("one");
    assert_eq!(last.namespace, "shop");
    assert!(!last.text("/series/lastObservedTime").is_empty());
    // The server keeps Events for a while only.
    bench.api.forget_events();
    let notice = about("web", Reason::KernelRefused, "again");
    bench.notices.send(notice).await.expect("it listens");
    let anew = |written: &[Written]| new_about(written, "web").count() == 1;
    bench.api.until_written("a new Event", anew).await;
}

#[tokio::test]
async fn nodes_that_find_the_same_make_one_event_of_it() {
    let api = FakeApi::start().await;
    let bench = bench_with(api, PACE).await;
    let fault = about("web", Reason::InvalidField, "spec.ports[0]: no");
    bench.notices.send(fault.clone()).await.expect("it listens");
    let told = |written: &[Written]| new_about(written, "web").count() == 1;
    bench.api.until_written("the Event", told).await;
    let second = bench_with(bench.api, PACE).await;
    second.notices.send(fault).await.expect("it listens");
    let last = about("last", Reason::InvalidField, "the end");
    second.notices.send(last).await.expect("it listens");
    let ended = |written: &[Written]| new_about(written, "last").count() == 1;
    second.api.until_written("the last Event", ended).await;
    assert_eq!(new_about(&second.api.written(), "web").count(), 1);
}

#[tokio::test]
async fn a_flood_of_notices_is_a_burst_of_events() {
    let bench = bench().await;
    for number in 0..1_000 {
        let notice = about("web", Reason::InvalidField, &format!("field {number}"));
        bench.notices.send(notice).await.expect("it listens");
    }
    // There is room for so many when all others were taken out.
    drop(bench.notices.reserve_many(QUEUE).await.expect("it listens"));
    let burst = |written: &[Written]| new_about(written, "web").count() >= 25;
    bench.api.until_written("a burst", burst).await;
    let told = new_about(&bench.api.written(), "web").count();
    // A slow machine may take the five seconds for one more.
    assert!((25..=27).contains(&told), "{told}");
}

#[tokio::test]
async fn a_server_that_refuses_is_asked_once_and_left_alone() {
    let api = FakeApi::start().await;
    api.answer_writes(Some((403, "Forbidden")));
    let bench = bench_with(api, PACE).await;
    for number in 0..50 {
        let notice = about("web", Reason::InvalidField, &format!("field {number}"));
        bench.notices.send(notice).await.expect("it listens");
    }
    drop(bench.notices.reserve_many(QUEUE).await.expect("it listens"));
    bench.api.until_asked_to_write(1).await;
    for number in 0..50 {
        let notice = about("web", Reason::InvalidField, &format!("field {number}"));
        bench.notices.send(notice).await.expect("it listens");
    }
    drop(bench.notices.reserve_many(QUEUE).await.expect("it listens"));
    assert_eq!(bench.api.asked_to_write(), 1);
}

/// Requests for new Events about an object.
fn tries(api: &FakeApi, object: &'static str) -> usize {
    let (asked, of_others) = (api.asked_to_write(), api.written());
    let refused = asked - of_others.len();
    assert_eq!(new_about(&of_others, object).count(), 0);
    refused
}

/// Sends a notice about an object and waits for its Event.
async fn write_one(bench: &Bench, object: &str) {
    let notice = about(object, Reason::InvalidField, "spec.ports[0]: no");
    bench.notices.send(notice).await.expect("it listens");
    let written = |written: &[Written]| new_about(written, object).count() == 1;
    bench.api.until_written(object, written).await;
}

#[tokio::test]
async fn an_event_that_is_refused_is_given_up_at_once_and_the_others_are_written() {
    for refusal in [
        (400, "BadRequest"),
        // An admission policy, or a quota.
        (403, "Forbidden"),
        (413, "RequestEntityTooLarge"),
        (422, "Invalid"),
    ] {
        let api = FakeApi::start().await;
        api.answer_writes_about("bad", refusal);
        let registry = Registry::new().expect("a registry");
        let bench = bench_counting(api, PACE, &registry).await;
        for _ in 0..20 {
            let notice = about("bad", Reason::InvalidField, "spec.ports[0]: no");
            bench.notices.send(notice).await.expect("it listens");
        }
        for object in ["a", "b", "c"] {
            write_one(&bench, object).await;
        }
        assert_eq!(tries(&bench.api, "bad"), 1, "{refusal:?}");
        assert!((given_up(&registry) - 1.0).abs() < 1e-9, "{refusal:?}");
    }
}

#[tokio::test]
async fn an_event_that_fails_again_and_again_lets_others_go_first_and_is_given_up() {
    for failure in [
        (500, "InternalError"),
        (503, "ServiceUnavailable"),
        (409, "Conflict"),
    ] {
        let api = FakeApi::start().await;
        api.answer_writes_about("bad", failure);
        let registry = Registry::new().expect("a registry");
        let bench = bench_counting(api, PACE, &registry).await;
        let notice = about("bad", Reason::InvalidField, "spec.ports[0]: no");
        bench.notices.send(notice).await.expect("it listens");
        let mut written = 0;
        while given_up(&registry) < 0.5 {
            assert!(written < 25, "{failure:?}: it is never given up");
            write_one(&bench, &format!("good-{written}")).await;
            written += 1;
        }
        write_one(&bench, "last").await;
        let tried = tries(&bench.api, "bad");
        assert!((5..=25).contains(&tried), "{failure:?}: {tried} tries");
    }
}

#[tokio::test]
async fn nothing_is_given_up_while_the_server_fails_with_everything() {
    let api = FakeApi::start().await;
    api.answer_writes(Some((500, "InternalError")));
    let registry = Registry::new().expect("a registry");
    let bench = bench_counting(api, PACE, &registry).await;
    let objects = ["a", "b", "c"];
    for object in objects {
        let notice = about(object, Reason::InvalidField, "spec.ports[0]: no");
        bench.notices.send(notice).await.expect("it listens");
    }
    bench.api.until_asked_to_write(40).await;
    bench.api.answer_writes(None);
    let all = |written: &[Written]| {
        objects
            .iter()
            .all(|object| new_about(written, object).count() == 1)
    };
    bench.api.until_written("all Events", all).await;
    assert!(given_up(&registry) < 0.5);
}

#[tokio::test]
async fn a_server_that_is_busy_or_away_gets_the_event_later() {
    let api = FakeApi::start().await;
    api.answer_writes(Some((503, "ServiceUnavailable")));
    let bench = bench_with(api, PACE).await;
    // Nothing waits for the server: notices that do not fit are dropped.
    let mut dropped = 0;
    for number in 0..QUEUE * 2 {
        let notice = about("web", Reason::InvalidField, &format!("field {number}"));
        dropped += usize::from(bench.notices.try_send(notice).is_err());
    }
    assert!(dropped >= QUEUE - 1, "{dropped}");
    bench.api.set_down(true).await;
    bench.api.set_down(false).await;
    bench.api.answer_writes(None);
    let told = |written: &[Written]| new_about(written, "web").next().is_some();
    bench.api.until_written("the Event", told).await;
    let started = |written: &[Written]| {
        let mut new = written.iter().filter(|it| it.is_new());
        new.any(|it| it.text("/reason") == "Starting")
    };
    bench.api.until_written("the start", started).await;
}

#[tokio::test]
async fn a_refusal_after_an_outage_counts_when_it_comes_twice() {
    let api = FakeApi::start().await;
    api.answer_writes(Some((503, "ServiceUnavailable")));
    let pace = Pace {
        retry: Duration::from_millis(300),
        ..PACE
    };
    let bench = bench_with(api, pace).await;
    let asked = |times: usize| {
        let api = &bench.api;
        async move {
            let enough = async {
                while api.asked_to_write() < times {
                    tokio::task::yield_now().await;
                }
            };
            let waited = tokio::time::timeout(PATIENCE, enough).await;
            assert!(waited.is_ok(), "there never were {times} requests");
        }
    };
    asked(1).await;
    bench.api.answer_writes(Some((403, "Forbidden")));
    asked(2).await;
    bench.api.answer_writes(None);
    let written = |written: &[Written]| written.len() == 1;
    bench.api.until_written("the Event", written).await;
    // Without an end it counts.
    bench.api.answer_writes(Some((503, "ServiceUnavailable")));
    let notice = about("web", Reason::InvalidField, "a field");
    bench.notices.send(notice).await.expect("it listens");
    asked(4).await;
    bench.api.answer_writes(Some((403, "Forbidden")));
    asked(6).await;
    for number in 0..50 {
        let notice = about("web", Reason::InvalidField, &format!("field {number}"));
        bench.notices.send(notice).await.expect("it listens");
    }
    drop(bench.notices.reserve_many(QUEUE).await.expect("it listens"));
    assert_eq!(bench.api.asked_to_write(), 6);
}

/// A node whose server has a service with a fault.
fn faulty_cluster() -> Node {
    let cluster = Node::new();
    cluster.api.put(NODES, node("node-1", "zone-a"));
    cluster.api.put(CIDRS, cidr("kubernetes", "10.96.0.0/16"));
    let mut web = service("a", "10.96.0.11");
    web["metadata"]["uid"] = json!("2f7c0c3e");
    web["spec"]["externalIPs"] = json!(["127.0.0.1"]);
    cluster.api.put(SERVICES, web);
    cluster.api.put(SLICES, slice("a-1", "a", &["10.1.0.1"]));
    cluster
}

#[track_caller]
fn wait_for_event(node: &Node, reason: &str) -> Written {
    wait_for(&format!("an Event {reason}"), PATIENCE, || {
        let written = node.api.written().into_iter();
        written
            .filter(Written::is_new)
            .find(|it| it.text("/reason") == reason)
    })
}

#[test]
fn the_agent_writes_events_about_its_start_objects_and_foreign_changes() {
    if !require_net_admin() {
        return;
    }
    let node = faulty_cluster();
    let nftlet = node.run();
    let started = wait_for_event(&node, "Starting");
    assert_eq!(started.text("/regarding/name"), "node-1");
    let fault = wait_for_event(&node, "InvalidField");
    assert_eq!(fault.text("/regarding/name"), "a");
    assert_eq!(fault.text("/regarding/uid"), "2f7c0c3e");
    assert!(fault.text("/note").contains("127.0.0.1"), "{fault:?}");
    node.ns.nft_load("flush chain ip nftlet services");
    let healed = wait_for_event(&node, "ForeignChange");
    assert_eq!(healed.text("/regarding/kind"), "Node");
    drop(nftlet);
}

#[test]
fn services_work_where_events_are_forbidden() {
    if !require_net_admin() {
        return;
    }
    let node = faulty_cluster();
    node.api.answer_writes(Some((403, "Forbidden")));
    let nftlet = node.run();
    wait_for_log(&nftlet, "forbids Events");
    node.leads("10.96.0.11", &["10.1.0.1"]);
    node.ns.nft_load("flush chain ip nftlet services");
    wait_for_log(&nftlet, "modified by another process");
    node.api.put(SLICES, slice("a-1", "a", &["10.1.0.3"]));
    node.leads("10.96.0.11", &["10.1.0.3"]);
    assert_eq!(lines_with(&nftlet.log(), "Events").len(), 1);
    assert_eq!(node.api.asked_to_write(), 1);
}

#[tokio::test]
async fn what_another_run_met_does_not_hide_what_this_one_meets() {
    let bench = bench().await;
    let own = |message: &str| Notice {
        subject: Subject::Other("table nftlet".into()),
        reason: Reason::ForeignChange,
        message: message.into(),
    };
    let with_note = |written: &[Written], note: &str| {
        written
            .iter()
            .any(|it| it.is_new() && it.text("/note") == note)
    };
    bench.notices.send(own("before")).await.expect("it listens");
    let first = |written: &[Written]| with_note(written, "before");
    bench.api.until_written("the first Event", first).await;
    // The same node again, whose server still has the Event.
    let again = bench_with(bench.api, PACE).await;
    again.notices.send(own("after")).await.expect("it listens");
    let second = |written: &[Written]| with_note(written, "after");
    again.api.until_written("another Event", second).await;
}

#[tokio::test]
async fn an_event_that_the_server_forgot_says_what_happened_last() {
    let bench = bench().await;
    let refused = |words: &str| about("web", Reason::KernelRefused, words);
    bench
        .notices
        .send(refused("first"))
        .await
        .expect("it listens");
    let told = |written: &[Written]| new_about(written, "web").count() == 1;
    bench.api.until_written("the Event", told).await;
    bench.api.forget_events();
    bench
        .notices
        .send(refused("last"))
        .await
        .expect("it listens");
    let anew = |written: &[Written]| new_about(written, "web").any(|it| it.text("/note") == "last");
    bench.api.until_written("what happened last", anew).await;
}

/// Only the host may change the size of the table of connections, and no namespace beside it.
#[test]
fn a_kernel_setting_that_cannot_be_made_is_reported_and_counted() {
    if !require_net_admin() {
        return;
    }
    let node = faulty_cluster();
    let arguments = node.arguments(&["--conntrack-max-per-core=1"]);
    let nftlet = Daemon::start(&node.ns, NFTLET, arguments);
    let told = wait_for_event(&node, "KernelSetting");
    assert_eq!(told.text("/regarding/kind"), "Node");
    let note = told.text("/note");
    assert!(note.contains("nf_conntrack_max"), "{note}");
    wait_for_log(&nftlet, "the rules are in place");
    let (_, page) = get(&node.ns, "127.0.0.1:10249", "/metrics");
    let line = |line: &str| page.lines().any(|it| it == line);
    // What has not happened yet is there, so that the first time is an increase.
    assert!(
        line("nftlet_notices_total{reason=\"InvalidPolicy\"} 0"),
        "{page}"
    );
    let counted = "nftlet_notices_total{reason=\"KernelSetting\"}";
    assert!(page.lines().any(|it| it.starts_with(counted)), "{page}");
    assert!(!line(&format!("{counted} 0")), "{page}");
}

#[test]
fn a_policy_with_a_fault_has_an_event_and_is_counted() {
    if !require_net_admin() {
        return;
    }
    let node = faulty_cluster();
    node.api.put(
        POLICIES,
        with(
            policy(
                "faulty",
                json!({"podSelector": {}, "ingress": [
                    {"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]},
                ]}),
            ),
            json!({"metadata": {"uid": "9c1d"}}),
        ),
    );
    let ports = [
        "--metrics-bind-address=127.0.0.1:10249",
        "--healthz-bind-address=",
    ];
    let _nftlet = Daemon::start(&node.ns, NFTLET, node.arguments(&ports));
    let fault = wait_for_event(&node, "InvalidPolicy");
    for (pointer, value) in [
        ("/regarding/kind", "NetworkPolicy"),
        ("/regarding/apiVersion", "networking.k8s.io/v1"),
        ("/regarding/namespace", "shop"),
        ("/regarding/name", "faulty"),
        ("/regarding/uid", "9c1d"),
        ("/type", "Warning"),
    ] {
        assert_eq!(fault.text(pointer), value, "{pointer}");
    }
    assert!(fault.text("/note").contains("10.0.0.0/33"), "{fault:?}");
    let (_, page) = get(&node.ns, "127.0.0.1:10249", "/metrics");
    let counted = metric(&page, "nftlet_notices_total{reason=\"InvalidPolicy\"}");
    assert!((counted - 1.0).abs() < 1e-9, "{counted}");
}
