//! An API server as a source of objects: refusals, and answers that cannot be decoded or are about
//! something else. None of it stops the source or loses an object.

use std::time::Duration;

use crate::support::consumer::{Consumer, hasty};
use crate::support::objects::{cidr, node, service, slice};
use nftlet::model::{Kind, Object, Reason, Subject};
use nftlet::source::cluster::{Cluster, Error, Timing};
use nftlet_lab::fake_api::{CIDRS, FakeApi, NODES, SERVICES, SLICES, Streaming};
use serde_json::json;

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
        panic!("the last known state was lost: {:?}", consumer.log);
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
async fn a_refused_kind_is_reported_once_with_the_missing_rule() {
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
async fn refused_credentials_are_reported_once_for_all_kinds() {
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
async fn a_missing_node_is_reported_and_not_awaited_for_ever() {
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
async fn the_source_ends_when_its_receiver_is_dropped() {
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
async fn an_invalid_field_is_reported_once_and_again_only_when_it_differs() {
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
        // It comes after the end of the list.
        api.put(SERVICES, service("c", "10.0.0.3"));
        consumer.has("Service shop/c").await;
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
    // A list that is read again repeats known objects.
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
            "a page of a list whose continue token is its own",
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
    let silent = "an object without apiVersion and kind";
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
        (false, line("ERROR", pod), "an error event without a Status"),
        (true, line("ADDED", pod), "a v1 Pod"),
        (true, end("Pod", "900"), "a v1 Pod"),
        (
            true,
            end("Service", ""),
            "a bookmark that ends a list without a resourceVersion",
        ),
        (
            false,
            "<html>Sign in</html>\n".to_owned(),
            "a line that is not a watch event: expected value",
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
        message.contains("the answer is another Node, node-2;"),
        "{message}"
    );
    assert!(!consumer.objects.contains_key("Node node-2"));
    consumer.finish().await;
}
