//! An API server as a source of objects: what is asked for, and what comes.
//!
//! The tests of ordinary life run against a server in memory, and against a real kube-apiserver
//! as well where the environment variable KUBEBUILDER_ASSETS names a directory with `etcd` and
//! `kube-apiserver`. Others replay what a kube-apiserver 1.36 was recorded to answer.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use crate::support::consumer::{Consumer, cidr, hasty, node, service, slice};
use crate::support::real_api::RealApi;
use nftlet::model::{Kind, Object, Reason};
use nftlet::source::cluster::{Cluster, Timing};
use nftlet_lab::fake_api::{CIDRS, FakeApi, NODES, SERVICES, SLICES, Streaming};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

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

/// Answers requests with recorded answers of kube-apiserver 1.36; those named `made-` are written by
/// hand, for what was not recorded.
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
        ("sendInitialEvents /services", "made-rejected-422.http"),
        (
            "sendInitialEvents /endpointslices",
            "made-rejected-422.http",
        ),
        ("sendInitialEvents /nodes", "made-rejected-422.http"),
        ("sendInitialEvents /servicecidrs", "made-rejected-422.http"),
        ("/endpointslices watch=true", "watch-endpointslices.http"),
        ("watch=true", "made-quiet-watch.http"),
        // The recording stopped after two pages; the last one is empty.
        (
            "/api/v1/services c3ZjLTAwMDAyXH",
            "made-list-services-last.http",
        ),
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

#[tokio::test]
async fn an_answer_that_is_no_list_is_not_taken_for_an_empty_one() {
    let server = recorded_server(&[
        ("sendInitialEvents", "made-rejected-422.http"),
        ("watch=true", "made-quiet-watch.http"),
        ("", "version.http"),
    ])
    .await;
    let mut consumer = connect_to(&server).await;
    consumer
        .until("a notice", |it| !it.notices.is_empty())
        .await;
    assert!(
        consumer.notices[0]
            .message
            .contains("the answer is an object that does not say what it is"),
        "{:?}",
        consumer.notices
    );
    assert!(consumer.complete.is_empty(), "{:?}", consumer.log);
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

/// Answers one client as a proxy does, and returns the way to what it asked for.
async fn meet(mut near: TcpStream, socks: bool, far: SocketAddr) {
    if socks {
        let mut greeting = [0; 3];
        near.read_exact(&mut greeting).await.expect("a greeting");
        assert_eq!(greeting, [5, 1, 0]);
        near.write_all(&[5, 0]).await.expect("an open connection");
        let mut wish = [0; 5];
        near.read_exact(&mut wish).await.expect("a wish");
        assert_eq!(wish[..4], [5, 1, 0, 3], "to connect by name");
        let mut name = vec![0; usize::from(wish[4]) + 2];
        near.read_exact(&mut name).await.expect("a name");
        assert_eq!(&name[..name.len() - 2], b"api.invalid");
        let reply = [5, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        near.write_all(&reply).await.expect("an open connection");
    } else {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(near.read_u8().await.expect("a request"));
        }
        let head = String::from_utf8(head).expect("text");
        assert!(
            head.starts_with("CONNECT api.invalid:6443 HTTP/1.1\r\n"),
            "{head}"
        );
        // "me:pass word", as it is written in an address.
        assert!(
            head.contains("\r\nProxy-Authorization: Basic bWU6cGFzcyB3b3Jk\r\n"),
            "{head}"
        );
        let reply = b"HTTP/1.1 200 OK\r\n\r\n";
        near.write_all(reply).await.expect("an open connection");
    }
    let mut far = TcpStream::connect(far).await.expect("the server");
    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
}

#[tokio::test]
async fn the_way_leads_through_the_proxy_of_the_kubeconfig() {
    for (socks, scheme) in [(false, "http://me:pass%20word@"), (true, "socks5://")] {
        let api = FakeApi::start().await;
        api.put(NODES, node("node-1", "zone-a"));
        api.put(SERVICES, service("a", "10.0.0.1"));
        let proxy = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = proxy.local_addr().expect("an address");
        let far = api.address();
        let proxy = tokio::spawn(async move {
            while let Ok((near, _)) = proxy.accept().await {
                tokio::spawn(meet(near, socks, far));
            }
        });
        let directory = tempfile::tempdir().expect("a directory");
        let kubeconfig = api.write_kubeconfig(directory.path());
        let text = std::fs::read_to_string(&kubeconfig).expect("a file");
        let server = format!("http://{far}");
        assert!(text.contains(&server), "{text}");
        // Only the proxy knows where that is.
        let text = text.replace(
            &server,
            &format!("http://api.invalid:6443\n    proxy-url: '{scheme}{address}'"),
        );
        std::fs::write(&kubeconfig, text).expect("written");
        let mut consumer = Consumer::connect(&kubeconfig, directory, hasty()).await;
        consumer.ready().await;
        assert!(consumer.objects.contains_key("Service shop/a"));
        assert_eq!(consumer.notices, Vec::new());
        consumer.finish().await;
        proxy.abort();
    }
}

#[tokio::test]
async fn a_proxy_that_cannot_be_used_is_named() {
    let api = FakeApi::start().await;
    let directory = tempfile::tempdir().expect("a directory");
    let kubeconfig = api.write_kubeconfig(directory.path());
    let text = std::fs::read_to_string(&kubeconfig).expect("a file");
    let server = format!("http://{}", api.address());
    for proxy in ["ftp://me:secret@192.0.2.20", "http://me:secret@[192.0.2.20"] {
        let text = text.replace(&server, &format!("{server}\n    proxy-url: '{proxy}'"));
        std::fs::write(&kubeconfig, text).expect("written");
        let error = Cluster::connect(Some(kubeconfig.clone()), None, "node-1".to_owned()).await;
        let error = error.err().expect("a fault").to_string();
        assert!(
            error.contains("cannot use the proxy") && error.contains("192.0.2.20"),
            "{error}"
        );
        assert!(
            error.contains("proxy-url of the kubeconfig") && !error.contains("secret"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn lines_in_other_forms_than_servers_write_are_understood() {
    let server = recorded_server(&[
        (
            "/api/v1/services sendInitialEvents",
            "made-watchlist-services-in-other-forms.http",
        ),
        ("", "not-found-404.http"),
    ])
    .await;
    let mut consumer = connect_to(&server).await;
    consumer
        .until("services", |it| it.complete.contains(&Kind::Service))
        .await;
    let services: Vec<_> = ["escaped", "more", "spaced", "turned"]
        .map(|name| format!("Service shop/{name}"))
        .into();
    assert_eq!(consumer.names(), services);
    for (name, address) in [("escaped", "10.96.0.4"), ("more", "10.96.0.3")] {
        let name = format!("Service shop/{name}");
        let Some(Object::Service(service)) = consumer.objects.get(&name) else {
            panic!("{:?}", consumer.log);
        };
        assert_eq!(service.cluster_ips.len(), 1);
        assert_eq!(service.cluster_ips[0].to_string(), address);
    }
    let told: Vec<_> = consumer
        .notices
        .iter()
        .filter(|notice| notice.reason == Reason::InvalidObject)
        .map(|notice| notice.message.as_str())
        .collect();
    assert_eq!(told.len(), 2, "{told:?}");
    for (told, name) in told.iter().zip(["wrong", "half"]) {
        let begin = format!("Service shop/{name}: the object cannot be decoded: ");
        assert!(told.starts_with(&begin), "{told}");
    }
    let stats = consumer.stats.kind(Kind::Service);
    assert_eq!((stats.events(), stats.undecodable()), (6, 2));
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
