//! Connections that break or fall silent, and servers that are away or busy.

use std::time::{Duration, Instant};

use crate::support::consumer::{Consumer, hasty};
use crate::support::objects::{node, service, slice};
use nftlet::model::{Kind, Object, Reason};
use nftlet::source::cluster::{Cluster, Timing};
use nftlet_lab::fake_api::{CIDRS, FakeApi, NODES, SERVICES, SLICES, Streaming};
use serde_json::json;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

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
        api.put(SERVICES, service(&name, format!("10.0.0.{}", 20 + round)));
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
        // The object still exists, though its content is unknown.
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
async fn an_unreachable_server_is_reported_once_and_no_event_is_lost() {
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
async fn a_server_that_falls_silent_is_noticed_and_followed_when_it_is_back() {
    let api = FakeApi::start().await;
    api.put(SERVICES, service("a", "10.96.0.1"));
    api.put(NODES, node("node-1", "a"));
    // As by default, an attempt that fails takes longer than a connection needs to be a success.
    let timing = Timing {
        quiet: Duration::from_millis(50),
        liveness_timeout: Duration::from_secs(4),
        response: Duration::from_secs(2),
        stable: Duration::from_millis(100),
        ..hasty()
    };
    // A cable that can be cut without closing the connections on it.
    let mut cable = Cable::to(api.address()).await;
    let directory = tempfile::tempdir().expect("a directory");
    let kubeconfig = api.write_kubeconfig(directory.path());
    let text = std::fs::read_to_string(&kubeconfig).expect("a file");
    let text = text.replace(&api.address().to_string(), &cable.address.to_string());
    std::fs::write(&kubeconfig, text).expect("written");
    let mut consumer = Consumer::connect(&kubeconfig, directory, timing).await;
    consumer.ready().await;
    assert_eq!(consumer.stats.fault(), None);
    cable.cut(true);
    consumer
        .until("the silence is reported", |it| !it.notices.is_empty())
        .await;
    let told = &consumer.notices[0].message;
    assert!(
        told.contains("cannot be reached: it no longer answers"),
        "{told}"
    );
    let fault = consumer.stats.fault().expect("a fault");
    assert_eq!(&fault.message, told);
    // All four kinds try again, and then once more, which they do after the first try has failed.
    cable.until_used_again(5).await;
    let lasting = consumer.stats.fault().expect("it lasts");
    assert_eq!(lasting.since, fault.since);
    api.put(SERVICES, service("b", "10.96.0.2"));
    cable.cut(false);
    consumer.has("Service shop/b").await;
    // The other kinds are well when their watches have been open for a while.
    let well = async {
        while consumer.stats.fault().is_some() {
            tokio::task::yield_now().await;
        }
    };
    let well = tokio::time::timeout(Duration::from_secs(60), well).await;
    assert!(well.is_ok(), "{:?}", consumer.stats.fault());
    assert_eq!(consumer.notices.len(), 1, "{:?}", consumer.notices);
}

#[tokio::test]
async fn a_server_that_never_answers_is_reported() {
    let forever = Duration::from_secs(3600);
    let short = Duration::from_millis(50);
    // Requests run out of time, which takes longer than `stable`; or the sign of life does.
    for (response, quiet) in [(3 * short, forever), (forever, short)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let hole = tokio::spawn(async move {
            let mut held = Vec::new();
            while let Ok(connection) = listener.accept().await {
                held.push(connection);
            }
        });
        let timing = Timing {
            stable: short,
            response,
            quiet,
            liveness_timeout: short,
            ..hasty()
        };
        let cluster = Cluster::connect(None, Some(format!("http://{address}")), "node-1".into());
        let cluster = cluster.await.expect("an address is enough");
        let cluster = cluster.with_network_policies(false).with_timing(timing);
        let directory = tempfile::tempdir().expect("a directory");
        let mut consumer = Consumer::of(cluster, directory);
        consumer
            .until("a notice", |it| !it.notices.is_empty())
            .await;
        let told = &consumer.notices[0].message;
        assert!(
            told.starts_with("the API server cannot be reached:"),
            "{told}"
        );
        hole.abort();
    }
}

#[tokio::test]
async fn lists_that_fail_late_are_asked_for_after_growing_pauses() {
    let api = FakeApi::start().await;
    api.set_streaming(Streaming::Rejected);
    api.put(NODES, node("node-1", "zone-a"));
    // As if the second page took until then: a failed list is no success, however long it took.
    for number in 0..3 {
        api.put(
            SERVICES,
            service(&format!("s{number}"), format!("10.0.0.{number}")),
        );
    }
    api.fail_next_pages(SERVICES, true);
    let timing = Timing {
        stable: Duration::ZERO,
        first_pause: Duration::from_secs(3600),
        longest_pause: Duration::from_secs(3600),
        page: 2,
        ..hasty()
    };
    let mut consumer = Consumer::start(&api, timing).await;
    consumer
        .until("a notice", |it| !it.notices.is_empty())
        .await;
    let told = &consumer.notices[0].message;
    assert!(
        told.starts_with("the API server cannot answer now (500:"),
        "{told}"
    );
    assert!(consumer.stats.fault().is_some());
    // The streamed one was rejected; of each of the two others there were two pages.
    let pages = api.requests_for(SERVICES);
    assert_eq!(pages.len(), 5, "{pages:?}");
    consumer.finish().await;
}

#[tokio::test]
async fn an_outage_ends_for_an_api_that_is_absent() {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-1", "zone-a"));
    api.remove_api(CIDRS);
    api.set_down(true).await;
    let timing = Timing {
        absent_recheck: Duration::from_millis(20),
        ..hasty()
    };
    let mut consumer = Consumer::start(&api, timing).await;
    for outage in 1..=2 {
        consumer
            .until("another notice", |it| it.notices.len() == outage)
            .await;
        let told = &consumer.notices[outage - 1].message;
        assert!(
            told.starts_with("the API server cannot be reached:"),
            "{told}"
        );
        // Every kind is to have seen the end of it.
        api.set_down(false).await;
        consumer.ready().await;
        for kind in [SERVICES, SLICES, NODES] {
            api.until_watched(kind, 1).await;
        }
        api.until_asked_again(CIDRS, 2).await;
        let name = format!("after-{outage}");
        for (path, object) in [
            (SERVICES, service(&name, format!("10.0.0.{outage}"))),
            (SLICES, slice(&name, "a", &["10.1.0.1"])),
            (NODES, node("node-1", &name)),
        ] {
            api.put(path, object);
        }
        let slice = format!("EndpointSlice shop/{name}");
        consumer.has(&slice).await;
        consumer.has(&format!("Service shop/{name}")).await;
        consumer
            .until("the node's zone", |it| {
                matches!(it.objects.get("Node node-1"), Some(Object::Node(node))
                    if node.zone.as_deref() == Some(name.as_str()))
            })
            .await;
        api.set_down(true).await;
    }
    consumer.finish().await;
}

/// Passes bytes on between a port of its own and another one.
struct Cable {
    address: std::net::SocketAddr,
    cut: watch::Sender<bool>,
    /// Counts connections.
    used: watch::Receiver<usize>,
}

impl Cable {
    async fn to(far: std::net::SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (cut, state) = watch::channel(false);
        let (counter, used) = watch::channel(0);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                counter.send_modify(|used| *used += 1);
                let state = state.clone();
                tokio::spawn(async move {
                    let far = TcpStream::connect(far).await.expect("the server");
                    let (near_in, near_out) = near.into_split();
                    let (far_in, far_out) = far.into_split();
                    tokio::join!(
                        pass(near_in, far_out, state.clone()),
                        pass(far_in, near_out, state)
                    );
                });
            }
        });
        Self { address, cut, used }
    }

    /// Waits for so many more connections.
    async fn until_used_again(&mut self, times: usize) {
        let wanted = *self.used.borrow() + times;
        let met = self.used.wait_for(|used| *used >= wanted);
        let waited = tokio::time::timeout(Duration::from_secs(60), met).await;
        assert!(waited.is_ok(), "there never were {wanted} connections");
    }

    /// What is under way while it is cut is lost, with its connection.
    fn cut(&self, cut: bool) {
        self.cut.send_replace(cut);
    }
}

/// Passes bytes on until the cable was cut once; then holds the connection in silence.
async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut cut: watch::Receiver<bool>) {
    let all = tokio::io::copy(&mut from, &mut to);
    tokio::select! {
        _ = all => return,
        _ = cut.wait_for(|cut| *cut) => {}
    }
    // The receiver ends with the test.
    while cut.changed().await.is_ok() {}
}

#[tokio::test]
async fn a_busy_server_is_asked_again_when_it_said() {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-1", "zone-a"));
    api.set_busy(SERVICES, Some(1));
    let timing = Timing {
        longest_pause: Duration::from_secs(30),
        ..hasty()
    };
    let began = Instant::now();
    let mut consumer = Consumer::start(&api, timing).await;
    // A second attempt failed too.
    consumer
        .until("a notice", |it| !it.notices.is_empty())
        .await;
    assert!(began.elapsed() >= Duration::from_secs(1), "{began:?}");
    let told = &consumer.notices[0].message;
    assert!(
        told.starts_with(
            "the API server cannot answer now (429: Too many requests, please try again later.);"
        ),
        "{told}"
    );
    api.set_busy(SERVICES, None);
    consumer.ready().await;
    assert_eq!(consumer.notices.len(), 1, "{:?}", consumer.notices);
    consumer.finish().await;
}
