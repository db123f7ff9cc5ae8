//! An API server as a source of objects: what is asked for, and what comes.
//!
//! The tests of ordinary life run against a server in memory, and against a real kube-apiserver
//! as well where the environment variable KUBEBUILDER_ASSETS names a directory with `etcd` and
//! `kube-apiserver`. Others replay what a kube-apiserver 1.36 was recorded to answer.

use std::time::Duration;

use crate::support::consumer::{Consumer, hasty};
use crate::support::objects::{cidr, node, service, slice};
use crate::support::real_api::RealApi;
use nftlet::model::{Kind, Object};
use nftlet::source::cluster::Timing;
use nftlet_lab::fake_api::{CIDRS, FakeApi, NODES, SERVICES, SLICES, Streaming};
use serde_json::{Value, json};

/// Either server.
enum Api {
    Fake(FakeApi),
    Real(RealApi),
}

impl Api {
    async fn put(&self, path: &str, object: Value) {
        match self {
            Api::Fake(api) => api.put(path, object),
            Api::Real(api) => api.put(path, object).await,
        }
    }

    async fn delete(&self, path: &str, key: &str) {
        match self {
            Api::Fake(api) => api.delete(path, key),
            Api::Real(api) => api.delete(path, key).await,
        }
    }

    async fn consumer(&self) -> Consumer {
        let directory = tempfile::tempdir().expect("a directory");
        let kubeconfig = match self {
            Api::Fake(api) => api.write_kubeconfig(directory.path()),
            Api::Real(api) => api.write_kubeconfig(directory.path()),
        };
        Consumer::connect(&kubeconfig, directory, hasty()).await
    }
}

/// What must hold with any server.
async fn ordinary_life(api: Api) {
    api.put(SERVICES, service("a", "10.0.0.11")).await;
    api.put(SERVICES, service("none", "None")).await;
    api.put(SLICES, slice("a-1", "a", &["10.1.0.1"])).await;
    let mut headless = slice("none-1", "none", &["10.1.0.9"]);
    headless["metadata"]["labels"]["service.kubernetes.io/headless"] = json!("");
    api.put(SLICES, headless).await;
    api.put(NODES, node("node-1", "zone-a")).await;
    api.put(NODES, node("node-2", "zone-b")).await;
    api.put(CIDRS, cidr("extra", "10.9.0.0/24")).await;
    let mut consumer = api.consumer().await;
    consumer.ready().await;
    for name in [
        "Service shop/a",
        "EndpointSlice shop/a-1",
        "Node node-1",
        "ServiceCIDR extra",
    ] {
        assert!(
            consumer.objects.contains_key(name),
            "{name} in {:?}",
            consumer.names()
        );
    }
    for name in [
        "Service shop/none",
        "EndpointSlice shop/none-1",
        "Node node-2",
    ] {
        assert!(
            !consumer.objects.contains_key(name),
            "{name} in {:?}",
            consumer.names()
        );
    }

    api.put(SERVICES, service("b", "10.0.0.12")).await;
    consumer.has("Service shop/b").await;
    api.put(SLICES, slice("a-1", "a", &["10.1.0.1", "10.1.0.2"]))
        .await;
    consumer
        .until("two endpoints", |it| {
            it.endpoints("EndpointSlice shop/a-1") == 2
        })
        .await;
    let mut other_proxy = service("b", "10.0.0.12");
    other_proxy["metadata"]["labels"] =
        json!({"service.kubernetes.io/service-proxy-name": "other"});
    api.put(SERVICES, other_proxy).await;
    consumer.lacks("Service shop/b").await;
    api.delete(SERVICES, "shop/a").await;
    consumer.lacks("Service shop/a").await;
    api.put(NODES, node("node-1", "zone-c")).await;
    let zone = |it: &Consumer| match it.objects.get("Node node-1") {
        Some(Object::Node(node)) => node.zone.as_deref().map(str::to_owned),
        _ => None,
    };
    consumer
        .until("another zone", |it| zone(it).as_deref() == Some("zone-c"))
        .await;
    assert_eq!(consumer.notices, Vec::new());
    consumer.finish().await;
}

#[tokio::test]
async fn ordinary_life_with_the_server_in_memory() {
    ordinary_life(Api::Fake(FakeApi::start().await)).await;
}

#[tokio::test]
async fn ordinary_life_with_a_server_that_pages() {
    let api = FakeApi::start().await;
    api.set_streaming(Streaming::Rejected);
    ordinary_life(Api::Fake(api)).await;
}

#[tokio::test]
async fn ordinary_life_with_a_real_server() {
    if let Some(api) = RealApi::start().await {
        ordinary_life(Api::Real(api)).await;
    }
}

#[tokio::test]
async fn only_what_a_proxy_needs_is_asked_for() {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-1", "zone-a"));
    let mut consumer = Consumer::start(&api, hasty()).await;
    consumer.ready().await;
    for (path, labels, fields) in [
        (
            SERVICES,
            "!service.kubernetes.io/service-proxy-name",
            "spec.clusterIP!=None",
        ),
        (SLICES, "!service.kubernetes.io/headless", ""),
        (NODES, "", "metadata.name=node-1"),
        (CIDRS, "", ""),
    ] {
        let requests = api.requests_for(path);
        assert_eq!(requests.len(), 1, "{requests:?}");
        let request = &requests[0];
        assert_eq!(
            (request.get("labelSelector"), request.get("fieldSelector")),
            (labels, fields)
        );
        assert_eq!(request.get("resourceVersionMatch"), "NotOlderThan");
        let seconds: u32 = request.get("timeoutSeconds").parse().expect("a number");
        assert!((270..=290).contains(&seconds), "{seconds}");
        for (name, value) in [
            ("watch", "true"),
            ("sendInitialEvents", "true"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", ""),
        ] {
            assert_eq!(request.get(name), value, "{name}");
        }
    }
    let stats = consumer.stats.kind(Kind::Node);
    assert_eq!((stats.lists(), stats.watches(), stats.events()), (1, 1, 1));
    assert!(stats.bytes() > 0);
    consumer.finish().await;
}

#[tokio::test]
async fn lists_are_paged_where_they_are_not_streamed() {
    for streaming in [Streaming::Rejected, Streaming::Ignored, Streaming::CutOff] {
        let api = FakeApi::start().await;
        api.set_streaming(streaming);
        api.put(NODES, node("node-1", "zone-a"));
        for number in 0..5 {
            api.put(
                SERVICES,
                service(&format!("s{number}"), format!("10.0.0.{}", number + 1)),
            );
        }
        let timing = Timing {
            page: 2,
            list_idle: Duration::from_millis(50),
            ..hasty()
        };
        let mut consumer = Consumer::start(&api, timing).await;
        consumer.ready().await;
        assert_eq!(
            consumer.names().len(),
            6,
            "{streaming:?}: {:?}",
            consumer.names()
        );
        let lists = consumer.stats.kind(Kind::Service).lists();
        assert_eq!(
            lists, 1,
            "{streaming:?}: streams that break off are no lists"
        );
        let requests = api.requests_for(SERVICES);
        let pages: Vec<_> = requests
            .iter()
            .filter(|request| !request.is_watch())
            .collect();
        assert_eq!(pages.len(), 3, "{streaming:?}: {requests:?}");
        assert!(
            pages.iter().all(|page| page.get("limit") == "2"),
            "{requests:?}"
        );
        assert!(pages[1].get("continue").ends_with("s1"), "{requests:?}");
        // The watch goes on from the list.
        api.put(SERVICES, service("later", "10.0.0.9"));
        consumer.has("Service shop/later").await;
        let requests = api.requests_for(SERVICES);
        let last = requests.last().expect("requests");
        assert!(
            last.is_watch() && !last.get("resourceVersion").is_empty(),
            "{requests:?}"
        );
        assert_eq!(last.get("sendInitialEvents"), "");
        assert_eq!(consumer.notices, Vec::new());
        consumer.finish().await;
    }
}

#[tokio::test]
async fn what_leaves_the_selection_is_deleted() {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-1", "zone-a"));
    api.put(SERVICES, service("a", "10.0.0.1"));
    api.put(SLICES, slice("a-1", "a", &["10.1.0.1"]));
    let mut consumer = Consumer::start(&api, hasty()).await;
    consumer.ready().await;
    api.put(SERVICES, service("a", "None"));
    consumer.lacks("Service shop/a").await;
    // Selected, but of no service any more.
    let mut orphan = slice("a-1", "a", &["10.1.0.1"]);
    orphan["metadata"]["labels"] = json!({});
    api.put(SLICES, orphan);
    consumer.lacks("EndpointSlice shop/a-1").await;
    consumer.finish().await;
}

#[tokio::test]
async fn the_own_node_is_waited_for() {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-2", "zone-b"));
    let mut consumer = Consumer::start(&api, hasty()).await;
    consumer
        .until("three lists", |it| it.complete.len() == 3)
        .await;
    assert!(!consumer.complete.contains(&Kind::Node));
    api.put(NODES, node("node-1", "zone-a"));
    consumer.ready().await;
    let about: Vec<_> = consumer
        .log
        .iter()
        .filter(|line| line.contains("Node"))
        .collect();
    assert_eq!(about, ["start Node", "apply Node node-1", "complete Node"]);
    consumer.finish().await;
}

#[tokio::test]
async fn a_list_whose_pages_expire_is_read_in_one() {
    let api = FakeApi::start().await;
    api.set_streaming(Streaming::Rejected);
    api.put(NODES, node("node-1", "zone-a"));
    for number in 0..5 {
        let address = format!("10.0.0.{}", number + 1);
        api.put(SERVICES, service(&format!("s{number}"), &address));
    }
    api.expire_next_page(SERVICES);
    let timing = Timing { page: 2, ..hasty() };
    let mut consumer = Consumer::start(&api, timing).await;
    consumer.ready().await;
    assert_eq!(consumer.names().len(), 6, "{:?}", consumer.names());
    let requests = api.requests_for(SERVICES);
    let lists: Vec<_> = requests
        .iter()
        .filter(|request| !request.is_watch())
        .map(|request| (request.get("limit"), request.get("continue").is_empty()))
        .collect();
    assert_eq!(lists, [("2", true), ("2", false), ("", true)]);
    // What the first page brought counts no more.
    let begun = consumer.log.iter().filter(|line| *line == "start Service");
    assert_eq!(begun.count(), 2, "{:?}", consumer.log);
    assert_eq!(consumer.notices, Vec::new());
    consumer.finish().await;
}
