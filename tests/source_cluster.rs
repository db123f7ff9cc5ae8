//! An API server as a source of objects.
//!
//! The tests run against a server in memory, which can be made to fail in every way. The ones
//! about ordinary life run against a real kube-apiserver as well where the environment variable
//! KUBEBUILDER_ASSETS names a directory with `etcd` and `kube-apiserver`.

#[path = "common/fake_api.rs"]
mod fake_api;
#[path = "common/real_api.rs"]
mod real_api;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fake_api::{CIDRS, FakeApi, NODES, SERVICES, SLICES, Streaming};
use nftlet::model::{Delivery, Event, Kind, Notice, Object, Reason, Subject};
use nftlet::source::cluster::{Cluster, Error, SourceStats, Timing};
use real_api::RealApi;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, watch};

fn service(name: &str, ip: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": name},
        "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]}})
}

fn slice(name: &str, service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<_> = addresses
        .iter()
        .map(|address| json!({"addresses": [address]}))
        .collect();
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"namespace": "shop", "name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]})
}

fn node(name: &str, zone: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}}})
}

fn cidr(name: &str, range: &str) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": name},
        "spec": {"cidrs": [range]}})
}

fn hasty() -> Timing {
    Timing {
        node_wait: Duration::from_secs(60),
        first_pause: Duration::from_millis(5),
        longest_pause: Duration::from_millis(40),
        list_idle: Duration::from_secs(60),
        ..Timing::default()
    }
}

/// What a receiver of the events has.
struct Consumer {
    events: mpsc::Receiver<Delivery>,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
    stats: Arc<SourceStats>,
    objects: BTreeMap<String, Object>,
    listed: BTreeMap<Kind, BTreeSet<String>>,
    complete: BTreeSet<Kind>,
    notices: Vec<Notice>,
    /// What happened, in words.
    log: Vec<String>,
    _directory: tempfile::TempDir,
}

impl Consumer {
    async fn start(api: &FakeApi, timing: Timing) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let kubeconfig = api.write_kubeconfig(directory.path());
        Self::connect(&kubeconfig, directory, timing).await
    }

    async fn connect(kubeconfig: &Path, directory: tempfile::TempDir, timing: Timing) -> Self {
        let cluster = Cluster::connect(Some(kubeconfig.to_owned()), "node-1".to_owned())
            .await
            .expect("a usable kubeconfig")
            .with_timing(timing);
        let stats = cluster.stats();
        let (sender, events) = mpsc::channel(16);
        let (stop, stopped) = watch::channel(false);
        Self {
            task: tokio::spawn(cluster.run(sender, stopped)),
            events,
            stop,
            stats,
            objects: BTreeMap::new(),
            listed: BTreeMap::new(),
            complete: BTreeSet::new(),
            notices: Vec::new(),
            log: Vec::new(),
            _directory: directory,
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::ListStarted(kind) => {
                self.log.push(format!("start {kind}"));
                self.listed.insert(kind, BTreeSet::new());
            }
            Event::ListComplete(kind) => {
                self.log.push(format!("complete {kind}"));
                let listed = self.listed.remove(&kind).expect("a list was started");
                self.objects.retain(|name, object| {
                    object.reference().kind != kind || listed.contains(name)
                });
                self.complete.insert(kind);
            }
            Event::Apply(object) => {
                let name = object.reference().to_string();
                self.log.push(format!("apply {name}"));
                if let Some(listed) = self.listed.get_mut(&object.reference().kind) {
                    listed.insert(name.clone());
                }
                self.objects.insert(name, object);
            }
            Event::Delete(name) => {
                self.log.push(format!("delete {name}"));
                self.objects.remove(&name.to_string());
            }
            Event::Notice(notice) => {
                self.log.push(format!("notice {}", notice.message));
                self.notices.push(notice);
            }
        }
    }

    /// Takes events until a condition holds.
    async fn until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        let wait = async {
            while !condition(self) {
                let delivery = self.events.recv().await.expect("the source is running");
                self.take(delivery.event);
            }
        };
        if tokio::time::timeout(Duration::from_secs(60), wait)
            .await
            .is_err()
        {
            panic!("{what} never came; log: {:#?}", self.log);
        }
    }

    async fn ready(&mut self) {
        self.until("the end of the lists", |it| {
            it.complete.len() == Kind::ALL.len()
        })
        .await;
    }

    async fn has(&mut self, name: &str) {
        self.until(name, |it| it.objects.contains_key(name)).await;
    }

    async fn lacks(&mut self, name: &str) {
        self.until(&format!("the end of {name}"), |it| {
            !it.objects.contains_key(name)
        })
        .await;
    }

    fn names(&self) -> Vec<&str> {
        self.objects.keys().map(String::as_str).collect()
    }

    fn endpoints(&self, name: &str) -> usize {
        match self.objects.get(name) {
            Some(Object::EndpointSlice(slice)) => slice.endpoints.len(),
            _ => 0,
        }
    }

    async fn finish(self) {
        self.stop.send(true).expect("the source is running");
        self.task.await.expect("no panic");
    }
}

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
    if let Some(api) = RealApi::start("ordinary_life_with_a_real_server").await {
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
                service(&format!("s{number}"), &format!("10.0.0.{}", number + 1)),
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
async fn a_broken_connection_is_resumed_where_it_broke() {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-1", "zone-a"));
    api.put(SERVICES, service("a", "10.0.0.1"));
    let mut consumer = Consumer::start(&api, hasty()).await;
    consumer.ready().await;
    for round in 0..2 {
        // The bookmark alone moves the version on.
        api.bookmark();
        api.put(SLICES, slice("marker", "m", &["10.1.0.1"]));
        if round == 0 {
            api.break_connections().await;
        } else {
            api.end_watches();
        }
        let name = format!("between-{round}");
        api.put(SERVICES, service(&name, &format!("10.0.0.{}", 20 + round)));
        consumer.has(&format!("Service shop/{name}")).await;
    }
    let requests = api.requests_for(SERVICES);
    let lists = requests
        .iter()
        .filter(|request| !request.is_watch() || request.get("sendInitialEvents") == "true");
    assert_eq!(lists.count(), 1, "{requests:?}");
    let versions: Vec<u64> = requests
        .iter()
        .skip(1)
        .map(|it| it.get("resourceVersion").parse().expect("a version"))
        .collect();
    assert!(
        versions.len() >= 2 && versions.is_sorted() && versions[0] > 100,
        "{versions:?}"
    );
    assert_eq!(
        consumer
            .log
            .iter()
            .filter(|line| line.starts_with("start Service"))
            .count(),
        2,
        "{:?}",
        consumer.log
    );
    assert_eq!(consumer.stats.kind(Kind::Service).lists(), 1);
    assert_eq!(consumer.notices, Vec::new());
    consumer.finish().await;
}

#[tokio::test]
async fn a_forgotten_version_leads_to_a_new_list() {
    for (as_event, streaming) in [
        (false, Streaming::Yes),
        (true, Streaming::Yes),
        (true, Streaming::Rejected),
    ] {
        let api = FakeApi::start().await;
        api.set_streaming(streaming);
        api.put(NODES, node("node-1", "zone-a"));
        api.put(SERVICES, service("stays", "10.0.0.1"));
        api.put(SERVICES, service("goes", "10.0.0.2"));
        api.put(SERVICES, service("breaks", "10.0.0.3"));
        let mut consumer = Consumer::start(&api, hasty()).await;
        consumer.ready().await;
        api.set_down(true).await;
        api.delete(SERVICES, "shop/goes");
        api.put(SERVICES, service("comes", "10.0.0.4"));
        // It is still there, though nobody can tell what it is like.
        let mut broken = service("breaks", "10.0.0.3");
        broken["spec"]["ports"] = json!("none");
        api.put(SERVICES, broken);
        api.compact(as_event);
        api.set_down(false).await;
        consumer.has("Service shop/comes").await;
        consumer.lacks("Service shop/goes").await;
        let services: Vec<_> = consumer
            .names()
            .into_iter()
            .filter(|name| name.starts_with("Service "))
            .collect();
        assert_eq!(
            services,
            [
                "Service shop/breaks",
                "Service shop/comes",
                "Service shop/stays"
            ]
        );
        let about: Vec<_> = consumer
            .notices
            .iter()
            .filter(|notice| notice.reason == Reason::InvalidObject)
            .collect();
        assert_eq!(about.len(), 1, "{:?}", consumer.notices);
        assert!(
            about[0]
                .message
                .starts_with("Service shop/breaks: the object cannot be decoded: invalid type"),
            "{about:?}"
        );
        assert_eq!(consumer.stats.kind(Kind::Service).lists(), 2);
        consumer.finish().await;
    }
}

#[tokio::test]
async fn an_undecodable_object_does_not_stop_the_watch() {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-1", "zone-a"));
    api.put(SERVICES, service("a", "10.0.0.1"));
    let mut consumer = Consumer::start(&api, hasty()).await;
    consumer.ready().await;
    let mut broken = service("a", "10.0.0.1");
    broken["spec"]["ports"] = json!([{"port": "eighty"}]);
    api.put(SERVICES, broken);
    api.put(SERVICES, service("b", "10.0.0.2"));
    consumer.has("Service shop/b").await;
    let Some(Object::Service(known)) = consumer.objects.get("Service shop/a") else {
        panic!("the last known state is gone: {:?}", consumer.log);
    };
    assert_eq!(known.ports.len(), 1);
    assert_eq!(consumer.notices.len(), 1, "{:?}", consumer.notices);
    assert!(
        consumer.notices[0].message.starts_with("Service shop/a:"),
        "{:?}",
        consumer.notices
    );
    assert!(matches!(consumer.notices[0].subject, Subject::Object(_)));
    assert_eq!(consumer.stats.kind(Kind::Service).undecodable(), 1);
    // A deletion needs no more than the name.
    api.delete(SERVICES, "shop/a");
    consumer.lacks("Service shop/a").await;
    consumer.finish().await;
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
async fn a_refused_kind_is_told_once_with_the_rule_that_is_missing() {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-1", "zone-a"));
    api.put(SLICES, slice("a-1", "a", &["10.1.0.1"]));
    api.forbid(SLICES, true);
    let mut consumer = Consumer::start(&api, hasty()).await;
    consumer
        .until("a notice", |it| !it.notices.is_empty())
        .await;
    consumer.has("Node node-1").await;
    while api.requests_for(SLICES).len() < 4 {
        tokio::task::yield_now().await;
    }
    api.forbid(SLICES, false);
    consumer.ready().await;
    assert!(consumer.objects.contains_key("EndpointSlice shop/a-1"));
    assert_eq!(consumer.notices.len(), 1, "{:?}", consumer.notices);
    let notice = &consumer.notices[0];
    assert_eq!(
        (notice.reason, notice.subject.to_string()),
        (Reason::ApiServer, format!("{}/", api.url()))
    );
    let rule = "{apiGroups: [\"discovery.k8s.io\"], resources: [\"endpointslices\"], verbs: [\"list\", \"watch\"]}";
    assert!(
        notice
            .message
            .contains("cannot list resource \"endpointslices\"")
            && notice.message.contains(rule),
        "{notice:?}"
    );
    consumer.finish().await;
}

#[tokio::test]
async fn refused_credentials_are_told_once_for_all_kinds() {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-1", "zone-a"));
    api.require_token("renewed");
    let mut consumer = Consumer::start(&api, hasty()).await;
    while api.requests().len() < 12 {
        tokio::task::yield_now().await;
    }
    api.require_token("secret");
    consumer.ready().await;
    assert_eq!(consumer.notices.len(), 1, "{:?}", consumer.notices);
    assert!(
        consumer.notices[0]
            .message
            .contains("does not accept nftlet's credentials"),
        "{:?}",
        consumer.notices
    );
    consumer.finish().await;
}

#[tokio::test]
async fn a_server_that_is_away_is_told_once_and_nothing_is_lost() {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-1", "zone-a"));
    api.put(SERVICES, service("a", "10.0.0.1"));
    api.set_down(true).await;
    let mut consumer = Consumer::start(&api, hasty()).await;
    consumer
        .until("a notice", |it| !it.notices.is_empty())
        .await;
    assert!(
        consumer.notices[0]
            .message
            .starts_with("the API server cannot be reached:"),
        "{:?}",
        consumer.notices
    );
    api.set_down(false).await;
    consumer.ready().await;
    assert_eq!(consumer.notices.len(), 1, "{:?}", consumer.notices);

    // Away again: what is known stays, and what changes meanwhile comes later.
    api.set_down(true).await;
    api.put(SERVICES, service("b", "10.0.0.2"));
    consumer
        .until("a second notice", |it| it.notices.len() == 2)
        .await;
    assert_eq!(consumer.names(), ["Node node-1", "Service shop/a"]);
    api.set_down(false).await;
    consumer.has("Service shop/b").await;
    let begun = consumer.log.iter().filter(|line| *line == "start Service");
    assert_eq!(
        (begun.count(), consumer.stats.kind(Kind::Service).lists()),
        (1, 1)
    );
    consumer.finish().await;
}

#[tokio::test]
async fn a_server_without_service_cidrs_is_no_fault() {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-1", "zone-a"));
    api.remove_api(CIDRS);
    let timing = Timing {
        absent_recheck: Duration::from_millis(20),
        ..hasty()
    };
    let mut consumer = Consumer::start(&api, timing).await;
    consumer.ready().await;
    assert_eq!(consumer.notices, Vec::new());
    api.add_api(CIDRS);
    api.put(CIDRS, cidr("kubernetes", "10.96.0.0/12"));
    consumer.has("ServiceCIDR kubernetes").await;
    consumer.finish().await;
}

#[tokio::test]
async fn forbidden_service_cidrs_do_not_hold_up_the_services() {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-1", "zone-a"));
    api.put(CIDRS, cidr("kubernetes", "10.96.0.0/12"));
    api.forbid(CIDRS, true);
    let mut consumer = Consumer::start(&api, hasty()).await;
    consumer.ready().await;
    consumer.until("a notice", |it| it.notices.len() == 1).await;
    api.forbid(CIDRS, false);
    consumer.has("ServiceCIDR kubernetes").await;
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
async fn a_missing_node_is_told_and_not_waited_for_for_ever() {
    for forbidden in [false, true] {
        let api = FakeApi::start().await;
        api.forbid(NODES, forbidden);
        let timing = Timing {
            node_wait: Duration::from_millis(50),
            ..hasty()
        };
        let mut consumer = Consumer::start(&api, timing).await;
        consumer.ready().await;
        let missing = consumer
            .notices
            .iter()
            .filter(|notice| notice.reason == Reason::NodeMissing);
        assert_eq!(missing.count(), 1, "{:?}", consumer.notices);
        api.forbid(NODES, false);
        api.put(NODES, node("node-1", "zone-a"));
        consumer.has("Node node-1").await;
        consumer.finish().await;
    }
}

#[tokio::test]
async fn the_source_ends_when_nobody_listens() {
    let api = FakeApi::start().await;
    let consumer = Consumer::start(&api, hasty()).await;
    let (task, _stop) = (consumer.task, consumer.stop);
    drop(consumer.events);
    api.put(SERVICES, service("a", "10.0.0.1"));
    api.put(NODES, node("node-1", "zone-a"));
    tokio::time::timeout(Duration::from_secs(60), task)
        .await
        .expect("it ends")
        .expect("no panic");
}

#[tokio::test]
async fn a_kubeconfig_that_cannot_be_used_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("nowhere");
    let error = Cluster::connect(Some(path.clone()), "node-1".to_owned())
        .await
        .err();
    assert!(
        matches!(&error, Some(Error::Kubeconfig { path: named, .. }) if *named == path),
        "{error:?}"
    );
    std::fs::write(&path, "clusters: [").expect("written");
    let error = Cluster::connect(Some(path), "node-1".to_owned())
        .await
        .err();
    let text = error.map(|error| error.to_string()).unwrap_or_default();
    assert!(
        text.contains("nowhere") && text.contains("check the file"),
        "{text}"
    );
}

/// Answers requests with recorded answers of kube-apiserver 1.36.
async fn recorded_server(answers: &'static [(&'static str, &'static str)]) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match socket.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => return,
                    }
                }
                let request = String::from_utf8_lossy(&head).into_owned();
                let matches = |parts: &str| parts.split(' ').all(|part| request.contains(part));
                let Some((_, file)) = answers.iter().find(|(parts, _)| matches(parts)) else {
                    panic!("nothing recorded for {request}");
                };
                let path = Path::new(env!("CARGO_MANIFEST_DIR"))
                    .join("tests/fixtures/apiserver")
                    .join(file);
                let text = std::fs::read_to_string(path)
                    .expect("the fixture")
                    .replace("\r\n", "\n");
                let (head, body) = text.split_once("\n\n").expect("head and body");
                // The recording shows the decoded body: it is neither chunked nor of that length.
                let status = head.lines().next().expect("a status line");
                let answer = format!(
                    "{status}\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{body}"
                );
                let _ = socket.write_all(answer.as_bytes()).await;
                if request.contains("watch=true") && status.contains("200") {
                    std::future::pending::<()>().await;
                }
            });
        }
    });
    format!("http://{address}")
}

#[tokio::test]
async fn recorded_answers_of_a_real_server_are_understood() {
    let server = recorded_server(&[
        (
            "/api/v1/services sendInitialEvents",
            "watchlist-services.http",
        ),
        ("/api/v1/nodes sendInitialEvents", "forbidden-403.http"),
        ("/endpointslices sendInitialEvents", "bad-token-401.http"),
        ("/servicecidrs", "not-found-404.http"),
    ])
    .await;
    let mut consumer = connect_to(&server).await;
    consumer
        .until("services", |it| it.complete.contains(&Kind::Service))
        .await;
    assert_eq!(
        consumer.names(),
        [
            "Service default/kubernetes",
            "Service lab/svc-00000",
            "Service lab/svc-00001",
            "Service lab/svc-00002",
            "Service shop/db",
            "Service shop/ext",
            "Service shop/web"
        ]
    );
    consumer
        .until("two notices", |it| it.notices.len() == 2)
        .await;
    let told = |text: &str| {
        consumer
            .notices
            .iter()
            .any(|notice| notice.message.contains(text))
    };
    assert!(
        told("refuses access") && told("credentials"),
        "{:?}",
        consumer.notices
    );
    consumer.finish().await;
}

#[tokio::test]
async fn recorded_pages_and_changes_of_a_real_server_are_understood() {
    let server = recorded_server(&[
        ("sendInitialEvents /services", "rejected-422.http"),
        ("sendInitialEvents /endpointslices", "rejected-422.http"),
        ("sendInitialEvents /nodes", "rejected-422.http"),
        ("sendInitialEvents /servicecidrs", "rejected-422.http"),
        ("/endpointslices watch=true", "watch-endpointslices.http"),
        ("watch=true", "quiet-watch.http"),
        // The recording stopped after two pages; the last one is empty.
        ("/api/v1/services c3ZjLTAwMDAyXH", "list-services-last.http"),
        ("/api/v1/services continue=", "list-services-page2.http"),
        ("/api/v1/services", "list-services-page1.http"),
        ("/api/v1/nodes", "list-node.http"),
        ("/endpointslices", "list-endpointslices.http"),
        ("/servicecidrs", "list-servicecidrs.http"),
    ])
    .await;
    let mut consumer = connect_to(&server).await;
    consumer.ready().await;
    for name in [
        "Service lab/svc-00000",
        "Service lab/svc-00002",
        "Node node-1",
        "ServiceCIDR kubernetes",
        "EndpointSlice shop/web-abc12",
    ] {
        assert!(
            consumer.objects.contains_key(name),
            "{name} in {:?}",
            consumer.names()
        );
    }
    let second = |it: &Consumer| match it.objects.get("EndpointSlice shop/web-abc12") {
        Some(Object::EndpointSlice(slice)) => slice
            .endpoints
            .last()
            .map(|endpoint| endpoint.address.to_string()),
        _ => None,
    };
    consumer
        .until("the change", |it| {
            second(it).as_deref() == Some("10.244.1.12")
        })
        .await;
    assert_eq!(consumer.notices, Vec::new());
    consumer.finish().await;
}

async fn connect_to(server: &str) -> Consumer {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: \"{server}\"}}}}]\n\
         users: [{{name: u, user: {{token: t}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n"
    );
    std::fs::write(&path, text).expect("written");
    Consumer::connect(&path, directory, hasty()).await
}
