//! The end of an outage of the API server: all kinds follow it again at once, without the pauses
//! that grew meanwhile, and what a server that has just started refuses is not yet certain.

use std::time::{Duration, Instant};

use crate::support::consumer::{Consumer, hasty};
use crate::support::objects::{cidr, node, service, slice};
use nftlet::model::{Kind, Object};
use nftlet::source::cluster::{Cluster, Timing};
use nftlet_lab::fake_api::{
    CIDRS, FakeApi, NAMESPACES, NODES, PODS, POLICIES, Recorded, SERVICES, SLICES, Streaming,
};
use serde_json::{Value, json};

const ALL: [&str; 7] = [SERVICES, SLICES, NODES, CIDRS, PODS, NAMESPACES, POLICIES];
const MANY: usize = 1000;

/// With pauses that no test outlasts: what comes has been woken.
fn patient() -> Timing {
    Timing {
        first_pause: Duration::from_secs(3600),
        longest_pause: Duration::from_secs(3600),
        probe: Duration::from_millis(20),
        wake: Duration::from_millis(20),
        ..hasty()
    }
}

/// One more object of each kind; of the node there is but the one, in another zone.
fn put_each(api: &FakeApi, name: &str, octet: u8) {
    let of_kind = |api_version: &str, kind: &str, spec: Value| {
        json!({"apiVersion": api_version, "kind": kind,
            "metadata": {"namespace": "shop", "name": name}, "spec": spec})
    };
    let policy = json!({"podSelector": {}, "policyTypes": ["Ingress"]});
    api.put_all([
        (SERVICES, service(name, format!("10.0.1.{octet}"))),
        (SLICES, slice(name, name, &["10.1.0.1"])),
        (NODES, node("node-1", name)),
        (CIDRS, cidr(name, "10.96.0.0/12")),
        (PODS, of_kind("v1", "Pod", json!({"containers": []}))),
        (NAMESPACES, json!({"metadata": {"name": name}})),
        (
            POLICIES,
            of_kind("networking.k8s.io/v1", "NetworkPolicy", policy),
        ),
    ]);
}

/// Waits for the objects of all kinds that have a name.
async fn has_each(consumer: &mut Consumer, name: &str) {
    for kind in [
        "Service shop",
        "EndpointSlice shop",
        "Pod shop",
        "NetworkPolicy shop",
    ] {
        consumer.has(&format!("{kind}/{name}")).await;
    }
    consumer.has(&format!("ServiceCIDR {name}")).await;
    consumer.has(&format!("Namespace {name}")).await;
    consumer
        .until("the node's zone", |it| {
            matches!(it.objects.get("Node node-1"), Some(Object::Node(node))
                if node.zone.as_deref() == Some(name))
        })
        .await;
}

/// Takes the server away until nftlet has said so and all kinds pause.
async fn outage(api: &FakeApi, consumer: &mut Consumer) {
    let told = consumer.notices.len();
    api.set_down(true).await;
    consumer
        .until("a notice", |it| it.notices.len() > told)
        .await;
    assert!(consumer.notices[told].message.contains("cannot be reached"));
    // Each kind connects twice at once; after that come looks whether the server is back.
    api.until_refused_again(2 * ALL.len()).await;
}

fn is_list(request: &&Recorded) -> bool {
    !request.is_watch() || request.get("sendInitialEvents") == "true"
}

#[tokio::test]
async fn all_kinds_follow_at_once_when_the_server_is_back() {
    for (streaming, as_event) in [
        (Streaming::Yes, false),
        (Streaming::Yes, true),
        (Streaming::Rejected, true),
    ] {
        let api = FakeApi::start().await;
        api.set_streaming(streaming);
        put_each(&api, "before", 1);
        let many = |last: usize| {
            (0..MANY).map(move |index| {
                let address = format!("10.{last}.{}.{}", index / 250, index % 250);
                (SERVICES, service(&format!("s{index}"), &address))
            })
        };
        api.put_all(many(2));
        let mut consumer = Consumer::with_policies(&api, patient()).await;
        has_each(&mut consumer, "before").await;
        // The last one in the order of names.
        let last = format!("Service shop/s{}", MANY - 1);
        consumer.has(&last).await;
        for path in ALL {
            api.until_watched(path, 1).await;
        }
        outage(&api, &mut consumer).await;
        api.put_all(many(3));
        put_each(&api, "after", 2);
        api.compact(as_event);
        let before = api.requests().len();
        api.set_down(false).await;
        has_each(&mut consumer, "after").await;
        let addressed = |it: &Consumer| {
            matches!(it.objects.get(&last), Some(Object::Service(service))
                if service.cluster_ips.iter().any(|ip| ip.to_string().starts_with("10.3.")))
        };
        consumer.until("the last of many", addressed).await;
        for path in ALL {
            // The version to resume from is refused; a list follows, and a watch.
            api.until_watched(path, 1).await;
            let requests: Vec<_> = api.requests().split_off(before);
            let of_path: Vec<_> = requests.iter().filter(|it| it.path == path).collect();
            let wanted = if streaming == Streaming::Yes { 2 } else { 3 };
            assert_eq!(of_path.len(), wanted, "{of_path:?}");
            let lists = of_path.iter().copied().filter(is_list);
            let versions: Vec<_> = lists.map(|list| list.get("resourceVersion")).collect();
            let known = of_path[0].get("resourceVersion");
            assert!(known.parse::<u64>().is_ok_and(|known| known > 0), "{known}");
            assert_eq!(versions, [known], "of the watch cache: {of_path:?}");
            let list = of_path.iter().find(|it| is_list(it)).expect("a list");
            assert_eq!(list.get("resourceVersionMatch"), "NotOlderThan");
        }
        assert_eq!(consumer.notices.len(), 1, "{:?}", consumer.notices);
        consumer.finish().await;
    }
}

#[tokio::test]
async fn a_forgotten_version_does_not_add_to_the_pauses() {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-1", "zone-a"));
    let mut consumer = Consumer::start(&api, patient()).await;
    consumer.ready().await;
    api.until_watched(SERVICES, 1).await;
    api.compact(false);
    api.put(SERVICES, service("a", "10.0.0.1"));
    // The first attempt after a watch has ended is made at once, and only that.
    api.end_watches();
    consumer.has("Service shop/a").await;
    // It comes after the end of the list.
    api.put(SERVICES, service("b", "10.0.0.2"));
    consumer.has("Service shop/b").await;
    assert_eq!(consumer.stats.kind(Kind::Service).lists(), 2);
    consumer.finish().await;
}

#[tokio::test]
async fn a_refusal_soon_after_an_outage_is_not_reported() {
    let api = FakeApi::start().await;
    put_each(&api, "before", 1);
    let mut consumer = Consumer::with_policies(&api, patient()).await;
    has_each(&mut consumer, "before").await;
    outage(&api, &mut consumer).await;
    for path in ALL {
        api.forbid(path, true);
    }
    put_each(&api, "after", 2);
    api.set_down(false).await;
    for path in ALL {
        api.until_asked_again(path, 4).await;
    }
    for path in ALL {
        api.forbid(path, false);
    }
    has_each(&mut consumer, "after").await;
    assert_eq!(consumer.notices.len(), 1, "{:?}", consumer.notices);
    assert!(!consumer.log.iter().any(|line| line.starts_with("delete ")));
    consumer.finish().await;
}

#[tokio::test]
async fn a_refusal_that_lasts_after_an_outage_is_reported_and_changes_no_rules() {
    let api = FakeApi::start().await;
    put_each(&api, "before", 1);
    let timing = Timing {
        settle: Duration::from_millis(300),
        ..patient()
    };
    let mut consumer = Consumer::with_policies(&api, timing).await;
    has_each(&mut consumer, "before").await;
    outage(&api, &mut consumer).await;
    api.forbid(POLICIES, true);
    api.delete(POLICIES, "shop/before");
    let before = api.requests().len();
    api.set_down(false).await;
    consumer
        .until("the refusal", |it| {
            it.notices
                .iter()
                .any(|notice| notice.message.contains("refuses access"))
        })
        .await;
    let told = &consumer.notices.last().expect("a notice").message;
    assert!(
        told.contains("cannot list resource \"networkpolicies\"")
            && told.contains("resources: [\"networkpolicies\"], verbs: [\"list\", \"watch\"]"),
        "{told}"
    );
    let fault = consumer.stats.fault_of(Kind::NetworkPolicy);
    assert_eq!(fault.as_ref(), Some(told));
    let requests = api.requests().split_off(before);
    let refused = requests.iter().filter(|it| it.path == POLICIES).count();
    assert!(refused > 3, "it was asked for {refused} times before");
    assert!(consumer.objects.contains_key("NetworkPolicy shop/before"));
    consumer.finish().await;
}

#[tokio::test]
async fn a_server_that_is_back_sets_the_pace() {
    let api = FakeApi::start().await;
    put_each(&api, "before", 1);
    let mut consumer = Consumer::with_policies(&api, patient()).await;
    has_each(&mut consumer, "before").await;
    outage(&api, &mut consumer).await;
    put_each(&api, "after", 2);
    api.set_busy(SERVICES, Some(1));
    api.set_down(false).await;
    api.until_asked_again(SERVICES, 1).await;
    // The pauses that grew during the outage do not count any more, and what it asks for does.
    api.set_busy(SERVICES, None);
    let first = Instant::now();
    api.until_asked_again(SERVICES, 1).await;
    assert!(first.elapsed() >= Duration::from_millis(900), "{first:?}");
    has_each(&mut consumer, "after").await;
    consumer.finish().await;
}

#[tokio::test]
async fn what_fails_on_the_way_to_the_server_is_said_in_sentences() {
    let port = || std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let unused = port().local_addr().expect("an address");
    let closing = port();
    let closed = closing.local_addr().expect("an address");
    closing.set_nonblocking(true).expect("a socket");
    let closing = tokio::net::TcpListener::from_std(closing).expect("a socket");
    tokio::spawn(async move { while closing.accept().await.is_ok() {} });
    let plain = FakeApi::start().await;
    for (server, sentence) in [
        (
            format!("http://{unused}"),
            format!(
                "connecting to http://{unused} failed: connection refused (no process listens there);"
            ),
        ),
        (
            format!("http://{closed}"),
            format!("the connection to http://{closed} ended before the answer"),
        ),
        (
            "http://api.invalid:6443".to_owned(),
            "the name in http://api.invalid:6443 cannot be resolved: ".to_owned(),
        ),
        (
            format!("https://{}", plain.address()),
            format!(
                "connecting to https://{} failed: TLS handshake: ",
                plain.address()
            ),
        ),
    ] {
        let cluster = Cluster::connect(None, Some(server), "node-1".into()).await;
        let cluster = cluster.expect("an address is enough");
        let cluster = cluster.with_timing(hasty()).with_network_policies(false);
        let directory = tempfile::tempdir().expect("a directory");
        let mut consumer = Consumer::of(cluster, directory);
        consumer
            .until("a notice", |it| !it.notices.is_empty())
            .await;
        let told = &consumer.notices[0].message;
        let wanted = format!("the API server cannot be reached: {sentence}");
        assert!(told.starts_with(&wanted), "{told}");
        for jargon in ["client error", "ServiceError", "HyperError", "deadline"] {
            assert!(!told.contains(jargon), "{told}");
        }
        consumer.finish().await;
    }
}
