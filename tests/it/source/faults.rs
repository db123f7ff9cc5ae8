//! An API server as a source of objects: connections that break, history that is lost, refusals,
//! and objects that cannot be decoded. Nothing of it stops the source or loses anything.

use std::time::{Duration, Instant};

use crate::support::consumer::{Consumer, cidr, hasty, node, service, slice};
use nftlet::model::{Kind, Object, Reason, Subject};
use nftlet::source::cluster::{Cluster, Error, Timing};
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
    api.until_asked_again(SLICES, 3).await;
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
    for kind in [SERVICES, SLICES, NODES, CIDRS] {
        api.until_asked_again(kind, 3).await;
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
async fn a_server_that_falls_silent_is_noticed_and_followed_when_it_is_back() {
    let api = FakeApi::start().await;
    api.put(SERVICES, service("a", "10.96.0.1"));
    api.put(NODES, node("node-1", "a"));
    // As by default, an attempt that fails takes longer than a connection needs to be a success.
    let timing = Timing {
        quiet: Duration::from_millis(50),
        pulse: Duration::from_secs(4),
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
        .until("the silence is told", |it| !it.notices.is_empty())
        .await;
    let told = &consumer.notices[0].message;
    assert!(
        told.contains("cannot be reached: it has fallen silent"),
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
async fn a_server_that_never_answers_is_told() {
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
            pulse: short,
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
            service(&format!("s{number}"), &format!("10.0.0.{number}")),
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
        told.starts_with("the API server cannot answer at present (500:"),
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
            (SERVICES, service(&name, &format!("10.0.0.{outage}"))),
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
    let error = Cluster::connect(Some(path.clone()), None, "node-1".to_owned())
        .await
        .err();
    assert!(
        matches!(&error, Some(Error::Kubeconfig { path: named, .. }) if *named == path),
        "{error:?}"
    );
    std::fs::write(&path, "clusters: [").expect("written");
    let error = Cluster::connect(Some(path), None, "node-1".to_owned())
        .await
        .err();
    let text = error.map(|error| error.to_string()).unwrap_or_default();
    assert!(
        text.contains("nowhere") && text.contains("check the file"),
        "{text}"
    );
}

#[tokio::test]
async fn a_bad_field_is_told_once_and_again_only_when_it_differs() {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-1", "zone-a"));
    let bad = |external: &str, port: u16| {
        let mut service = service("a", "10.0.0.1");
        service["spec"]["externalIPs"] = json!([external]);
        service["spec"]["ports"][0]["port"] = json!(port);
        service
    };
    api.put(SERVICES, bad("first", 80));
    let mut consumer = Consumer::start(&api, hasty()).await;
    consumer.ready().await;
    for port in 81..85 {
        api.put(SERVICES, bad("first", port));
    }
    api.put(SERVICES, bad("second", 90));
    consumer
        .until("the second fault", |it| {
            it.notices
                .iter()
                .any(|notice| notice.message.contains("second"))
        })
        .await;
    assert_eq!(consumer.notices.len(), 2, "{:?}", consumer.notices);
    assert!(
        consumer
            .notices
            .iter()
            .all(|notice| notice.reason == Reason::InvalidField)
    );
    consumer.finish().await;
}

#[tokio::test]
async fn a_server_that_cannot_select_services_by_fields_is_asked_without() {
    for streaming in [Streaming::Yes, Streaming::Rejected] {
        let api = FakeApi::start().await;
        api.set_streaming(streaming);
        api.set_old_fields(true);
        api.put(NODES, node("node-1", "zone-a"));
        api.put(SERVICES, service("a", "10.0.0.1"));
        api.put(SERVICES, service("headless", "None"));
        let mut consumer = Consumer::start(&api, hasty()).await;
        consumer.ready().await;
        assert!(consumer.objects.contains_key("Service shop/a"));
        // Without the selector it comes, and means nothing.
        let Some(Object::Service(headless)) = consumer.objects.get("Service shop/headless") else {
            panic!("{:?}", consumer.log);
        };
        assert!(!headless.has_frontends());
        // Once is enough, also for a new list.
        api.set_down(true).await;
        api.compact(true);
        api.put(SERVICES, service("b", "10.0.0.2"));
        api.set_down(false).await;
        consumer.has("Service shop/b").await;
        assert_eq!(consumer.stats.kind(Kind::Service).lists(), 2);
        let requests = api.requests_for(SERVICES);
        let refused = requests
            .iter()
            .filter(|request| !request.get("fieldSelector").is_empty());
        let refused = refused.count();
        let wanted = match streaming {
            Streaming::Yes => 1,
            // The streamed list is rejected before anybody looks at the selector.
            _ => 2,
        };
        assert_eq!(refused, wanted, "{requests:?}");
        // The own node is found by its name all the same.
        for request in api.requests_for(NODES) {
            assert_eq!(request.get("fieldSelector"), "metadata.name=node-1");
        }
        let about = consumer
            .notices
            .iter()
            .filter(|notice| !notice.message.contains("cannot be reached"));
        assert_eq!(about.count(), 0, "{:?}", consumer.notices);
        consumer.finish().await;
    }
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
        told.starts_with("the API server cannot answer at present (429: Too many requests, please try again later.);"),
        "{told}"
    );
    api.set_busy(SERVICES, None);
    consumer.ready().await;
    assert_eq!(consumer.notices.len(), 1, "{:?}", consumer.notices);
    consumer.finish().await;
}

/// A server with the services `a` and `b`, and a consumer that knows them.
async fn known_services(streaming: Streaming) -> (FakeApi, Consumer) {
    let api = FakeApi::start().await;
    api.set_streaming(streaming);
    api.put(NODES, node("node-1", "zone-a"));
    api.put(SERVICES, service("a", "10.0.0.1"));
    api.put(SERVICES, service("b", "10.0.0.2"));
    let mut consumer = Consumer::start(&api, hasty()).await;
    consumer.ready().await;
    consumer.has("Service shop/b").await;
    (api, consumer)
}

/// Answers with something else than Services, until that was told; then properly again, which
/// must change only what is other on the server.
async fn assert_not_believed(streaming: Streaming, relist: bool, text: &str, told: &str) {
    let (api, mut consumer) = known_services(streaming).await;
    api.answer_instead(SERVICES, Some(text));
    if relist {
        api.compact(false);
    }
    api.end_watches();
    consumer
        .until("a notice", |it| !it.notices.is_empty())
        .await;
    let notice = &consumer.notices[0];
    assert_eq!(notice.reason, Reason::ApiServer, "{text}");
    let message = &notice.message;
    let asked = "the API server was asked for services at /api/v1/services, and the answer is ";
    let rest = message.strip_prefix(asked);
    let rest = rest.unwrap_or_else(|| panic!("{text}: {message}"));
    assert!(rest.starts_with(told), "{text}: {message}");
    assert!(message.contains("a proxy or a load balancer"), "{message}");
    let fault = consumer.stats.fault().expect("a fault that lasts");
    assert_eq!(&fault.message, message);
    api.delete(SERVICES, "shop/b");
    api.put(SERVICES, service("c", "10.0.0.3"));
    api.answer_instead(SERVICES, None);
    consumer.has("Service shop/c").await;
    consumer.lacks("Service shop/b").await;
    // A list that is read again tells once more what is known.
    let deleted = consumer
        .log
        .iter()
        .filter(|line| line.starts_with("delete "));
    assert_eq!(
        deleted.collect::<Vec<_>>(),
        ["delete Service shop/b"],
        "{text}"
    );
    assert_eq!(
        consumer.stats.kind(Kind::Service).undecodable(),
        0,
        "{text}"
    );
    assert!(consumer.objects.contains_key("Service shop/a"), "{text}");
    consumer.finish().await;
}

#[tokio::test]
async fn a_list_of_something_else_changes_nothing() {
    let pods =
        r#"{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"900"},"items":[]}"#;
    for (text, told) in [
        (pods, "a v1 PodList"),
        (
            r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"900"}}"#,
            "a ServiceList without items",
        ),
        (
            r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"900","continue":"x"}}"#,
            "a ServiceList without items",
        ),
        (
            r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"900","continue":"x"},"items":[]}"#,
            "a page of a list that leads to itself",
        ),
        (
            r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"0"},"items":[]}"#,
            "a ServiceList without a resourceVersion",
        ),
        (
            r#"{"kind":"ServiceList","apiVersion":"v2","metadata":{"resourceVersion":"900"},"items":[]}"#,
            "a v2 ServiceList",
        ),
        (
            r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"900"},"items":[{"kind":"Pod","apiVersion":"v1","metadata":{"name":"a","namespace":"shop"}}]}"#,
            "a v1 Pod;",
        ),
        (
            r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"900"},"items":[{"metadata":{"name":"a","namespace":"shop"},"spec":{"ports":7},"kind":"Pod","apiVersion":"v1"}]}"#,
            "a v1 Pod;",
        ),
        (
            r#"{"kind":"Table","apiVersion":"meta.k8s.io/v1","metadata":{"resourceVersion":"900"},"columnDefinitions":[],"rows":[]}"#,
            "a meta.k8s.io/v1 Table",
        ),
        (
            r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Success","code":200}"#,
            "a v1 Status",
        ),
        ("", "no list of objects: EOF"),
        ("null", "no list of objects"),
        (
            "<html>\n<body>Sign in</body></html>",
            "no list of objects: expected value at line 1 column 1: \"<html> <body>Sign in",
        ),
    ] {
        assert_not_believed(Streaming::Rejected, true, text, told).await;
    }
}

#[tokio::test]
async fn an_event_about_something_else_changes_nothing() {
    let line =
        |type_: &str, object: &str| format!(r#"{{"type":"{type_}","object":{object}}}"#) + "\n";
    let pod = r#"{"kind":"Pod","apiVersion":"v1","metadata":{"name":"a","namespace":"shop","resourceVersion":"900"}}"#;
    let older = r#"{"apiVersion":"v1beta3","kind":"Service","metadata":{"name":"a","namespace":"shop","resourceVersion":"900"}}"#;
    let untyped = r#"{"metadata":{"name":"a","namespace":"shop","resourceVersion":"900"}}"#;
    let silent = "an object that does not say what it is";
    let end = |kind: &str, version: &str| {
        line(
            "BOOKMARK",
            &format!(
                r#"{{"kind":"{kind}","apiVersion":"v1","metadata":{{"resourceVersion":"{version}","annotations":{{"k8s.io/initial-events-end":"true"}}}}}}"#
            ),
        )
    };
    for (relist, text, told) in [
        (false, line("ADDED", pod), "a v1 Pod"),
        (false, line("MODIFIED", pod), "a v1 Pod"),
        (false, line("DELETED", pod), "a v1 Pod"),
        (false, line("BOOKMARK", pod), "a v1 Pod"),
        (false, line("DELETED", older), "a v1beta3 Service"),
        (false, line("MODIFIED", older), "a v1beta3 Service"),
        (false, line("DELETED", untyped), silent),
        (false, line("MODIFIED", untyped), silent),
        (
            false,
            line("MODIFIED", "null"),
            "an event without an object",
        ),
        (false, line("ERROR", pod), "an error that is no Status"),
        (true, line("ADDED", pod), "a v1 Pod"),
        (true, end("Pod", "900"), "a v1 Pod"),
        (
            true,
            end("Service", ""),
            "the end of a list without a resourceVersion",
        ),
        (
            false,
            "<html>Sign in</html>\n".to_owned(),
            "a watch of something else than events: expected value",
        ),
    ] {
        assert_not_believed(Streaming::Yes, relist, &text, told).await;
    }
}

#[tokio::test]
async fn a_list_with_an_object_without_a_name_takes_nothing_away() {
    let (api, mut consumer) = known_services(Streaming::Rejected).await;
    api.answer_instead(
        SERVICES,
        Some(
            r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[{"metadata":{"name":"a","namespace":"shop"},"spec":{"clusterIP":"10.0.0.9"}},{"metadata":{"name":"x/y","namespace":"shop"}},{"spec":{}},null]}"#,
        ),
    );
    api.compact(false);
    api.end_watches();
    consumer
        .until("three notices", |it| it.notices.len() >= 3)
        .await;
    for notice in &consumer.notices[..3] {
        assert_eq!(notice.reason, Reason::InvalidObject, "{notice:?}");
    }
    api.answer_instead(SERVICES, None);
    api.put(SERVICES, service("c", "10.0.0.3"));
    consumer.has("Service shop/c").await;
    assert!(
        !consumer.log.iter().any(|line| line.starts_with("delete ")),
        "{:?}",
        consumer.log
    );
    assert!(consumer.objects.contains_key("Service shop/b"));
    consumer.finish().await;
}

#[tokio::test]
async fn another_node_is_not_taken_for_the_own_one() {
    let (api, mut consumer) = known_services(Streaming::Yes).await;
    api.answer_instead(NODES, Some(concat!(
        r#"{"type":"MODIFIED","object":{"kind":"Node","apiVersion":"v1","metadata":{"name":"node-2","resourceVersion":"900"}}}"#,
        "\n"
    )));
    api.end_watches();
    consumer
        .until("a notice", |it| !it.notices.is_empty())
        .await;
    let message = &consumer.notices[0].message;
    assert!(
        message.contains("the answer is another one, node-2;"),
        "{message}"
    );
    assert!(!consumer.objects.contains_key("Node node-2"));
    consumer.finish().await;
}
