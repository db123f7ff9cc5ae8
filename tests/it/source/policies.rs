//! An API server as a source of NetworkPolicies, and of the Pods and Namespaces they need: what
//! is asked for and when, what comes, and what a server can do wrong.

use std::path::Path;
use std::time::Duration;

use crate::support::consumer::{Consumer, cluster, hasty};
use crate::support::objects::{self, deny_all, node, service};
use nftlet::model::{Kind, Object, Reason};
use nftlet::source::cluster::Timing;
use nftlet_lab::fake_api::{FakeApi, NAMESPACES, NODES, PODS, POLICIES, SERVICES, Streaming};
use serde_json::{Value, json};

fn pod(name: &str, ip: &str) -> Value {
    objects::pod(name, "node-2", &[("app", name)], &[ip])
}

fn namespace(name: &str, team: &str) -> Value {
    objects::namespace(name, &[("team", team)])
}

/// Pods and Namespaces are given up at once.
fn impatient() -> Timing {
    Timing {
        linger: Duration::ZERO,
        ..hasty()
    }
}

/// A server with a node, a service, a namespace and a pod of another node.
async fn shop() -> FakeApi {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-1", "zone-a"));
    api.put(SERVICES, service("web", "10.0.0.1"));
    api.put(NAMESPACES, namespace("shop", "web"));
    api.put(PODS, pod("web", "10.1.0.1"));
    api
}

/// What was logged about policies, pods and namespaces.
fn about_policies(consumer: &Consumer) -> Vec<&str> {
    let ours = ["Pod", "Namespace", "NetworkPolicy"];
    let about = |line: &&str| {
        let kind = line.split(' ').nth(1);
        kind.is_some_and(|kind| ours.contains(&kind))
    };
    consumer
        .log
        .iter()
        .map(String::as_str)
        .filter(about)
        .collect()
}

fn place_of(consumer: &Consumer, line: &str) -> usize {
    let found = consumer.log.iter().position(|logged| logged == line);
    found.unwrap_or_else(|| panic!("no {line:?} in {:#?}", consumer.log))
}

async fn all_lists(consumer: &mut Consumer) {
    consumer
        .until("all lists", |it| it.complete.len() == Kind::ALL.len())
        .await;
}

#[tokio::test]
async fn ordinary_life_of_policies() {
    for streaming in [
        Streaming::Yes,
        Streaming::Rejected,
        Streaming::Ignored,
        Streaming::CutOff,
    ] {
        let api = shop().await;
        api.set_streaming(streaming);
        api.put(POLICIES, deny_all("deny"));
        let mut ended = pod("ended", "10.1.0.9");
        ended["status"]["phase"] = json!("Succeeded");
        api.put(PODS, ended);
        let timing = Timing {
            page: 1,
            list_idle: Duration::from_millis(50),
            ..hasty()
        };
        let mut consumer = Consumer::with_policies(&api, timing).await;
        all_lists(&mut consumer).await;
        assert_eq!(
            consumer.names(),
            [
                "Namespace shop",
                "NetworkPolicy shop/deny",
                "Node node-1",
                "Pod shop/ended",
                "Pod shop/web",
                "Service shop/web"
            ],
            "{streaming:?}"
        );

        api.put(NAMESPACES, namespace("shop", "ops"));
        let team = |it: &Consumer| match it.objects.get("Namespace shop") {
            Some(Object::Namespace(namespace)) => namespace.labels.get("team").cloned(),
            _ => None,
        };
        consumer
            .until("another team", |it| team(it).as_deref() == Some("ops"))
            .await;
        api.put(PODS, pod("db", "10.1.0.2"));
        consumer.has("Pod shop/db").await;
        // A pod that ends is seen to do so: it was not deleted while it ran.
        let mut ends = pod("db", "10.1.0.2");
        ends["status"]["phase"] = json!("Failed");
        api.put(PODS, ends);
        let has_ended = |it: &Consumer| match it.objects.get("Pod shop/db") {
            Some(Object::Pod(pod)) => pod.ended,
            _ => false,
        };
        consumer.until("the end of the pod", has_ended).await;
        api.delete(PODS, "shop/db");
        consumer.lacks("Pod shop/db").await;
        api.delete(NAMESPACES, "shop");
        consumer.lacks("Namespace shop").await;
        let mut faulty = deny_all("deny");
        faulty["spec"]["ingress"] = json!([{"from": [{"ipBlock": {"cidr": "10.0.0/8"}}]}]);
        api.put(POLICIES, faulty);
        consumer
            .until("a notice", |it| !it.notices.is_empty())
            .await;
        assert_eq!(consumer.notices.len(), 1, "{:?}", consumer.notices);
        assert_eq!(consumer.notices[0].reason, Reason::InvalidPolicy);
        consumer.finish().await;
    }
}

#[tokio::test]
async fn pods_are_watched_while_there_is_a_policy() {
    let api = shop().await;
    let mut consumer = Consumer::with_policies(&api, impatient()).await;
    all_lists(&mut consumer).await;
    assert_eq!(consumer.names(), ["Node node-1", "Service shop/web"]);
    for path in [PODS, NAMESPACES] {
        assert!(api.requests_for(path).is_empty(), "{:?}", api.requests());
    }

    for round in 1..=2 {
        consumer.log.clear();
        consumer.complete.remove(&Kind::Pod);
        consumer.complete.remove(&Kind::Namespace);
        api.put(POLICIES, deny_all("deny"));
        all_lists(&mut consumer).await;
        assert!(
            consumer.objects.contains_key("Pod shop/web")
                && consumer.objects.contains_key("Namespace shop")
        );
        let policy = place_of(&consumer, "apply NetworkPolicy shop/deny");
        for kind in ["Pod", "Namespace"] {
            let begun = place_of(&consumer, &format!("start {kind}"));
            let complete = place_of(&consumer, &format!("complete {kind}"));
            assert!(
                begun < policy && policy < complete,
                "{kind}: {:#?}",
                consumer.log
            );
        }
        let requests = api.requests_for(PODS);
        assert_eq!(requests.len(), round, "{requests:?}");
        let asked = requests.last().expect("a request");
        assert_eq!(
            (asked.get("labelSelector"), asked.get("fieldSelector")),
            ("", "")
        );
        assert_eq!(api.requests_for(NAMESPACES).len(), round);

        consumer.log.clear();
        api.delete(POLICIES, "shop/deny");
        consumer.lacks("Pod shop/web").await;
        consumer.lacks("Namespace shop").await;
        assert_eq!(
            about_policies(&consumer),
            [
                "delete NetworkPolicy shop/deny",
                "start Pod",
                "complete Pod",
                "start Namespace",
                "complete Namespace"
            ]
        );
        for path in [PODS, NAMESPACES] {
            api.until_watched(path, 0).await;
        }
        api.until_watched(POLICIES, 1).await;
    }
    assert_eq!(consumer.notices, Vec::new());
    consumer.finish().await;
}

#[tokio::test]
async fn pods_are_watched_without_a_policy_if_wanted() {
    let api = shop().await;
    let directory = tempfile::tempdir().expect("a directory");
    let cluster = cluster(&api.write_kubeconfig(directory.path()), impatient()).await;
    let mut consumer = Consumer::of(cluster.with_pods(true), directory);
    all_lists(&mut consumer).await;
    assert!(
        consumer.objects.contains_key("Pod shop/web")
            && consumer.objects.contains_key("Namespace shop")
    );
    api.put(POLICIES, deny_all("deny"));
    consumer.has("NetworkPolicy shop/deny").await;
    api.delete(POLICIES, "shop/deny");
    consumer.lacks("NetworkPolicy shop/deny").await;
    api.put(PODS, pod("db", "10.1.0.2"));
    consumer.has("Pod shop/db").await;
    assert_eq!(api.requests_for(PODS).len(), 1);
    consumer.finish().await;
}

#[tokio::test]
async fn a_policy_that_is_replaced_does_not_end_the_watch_of_pods() {
    let api = shop().await;
    api.put(POLICIES, deny_all("first"));
    let timing = Timing {
        linger: Duration::from_secs(3600),
        ..hasty()
    };
    let mut consumer = Consumer::with_policies(&api, timing).await;
    all_lists(&mut consumer).await;
    api.delete(POLICIES, "shop/first");
    consumer.lacks("NetworkPolicy shop/first").await;
    // What happens meanwhile is not missed.
    api.put(PODS, pod("db", "10.1.0.2"));
    consumer.has("Pod shop/db").await;
    consumer.log.clear();
    api.put(POLICIES, deny_all("second"));
    consumer.has("NetworkPolicy shop/second").await;
    assert_eq!(
        about_policies(&consumer),
        ["apply NetworkPolicy shop/second"]
    );
    assert_eq!(api.requests_for(PODS).len(), 1);
    consumer.finish().await;
}

#[tokio::test]
async fn one_of_two_policies_keeps_the_watch_of_pods() {
    let api = shop().await;
    api.put(POLICIES, deny_all("one"));
    api.put(POLICIES, deny_all("other"));
    let mut consumer = Consumer::with_policies(&api, impatient()).await;
    all_lists(&mut consumer).await;
    api.delete(POLICIES, "shop/one");
    consumer.lacks("NetworkPolicy shop/one").await;
    api.put(PODS, pod("db", "10.1.0.2"));
    consumer.has("Pod shop/db").await;
    assert_eq!(api.requests_for(PODS).len(), 1);
    consumer.finish().await;
}

#[tokio::test]
async fn switched_off_nothing_of_policies_is_asked_for() {
    let api = shop().await;
    api.put(POLICIES, deny_all("deny"));
    let mut consumer = Consumer::start(&api, impatient()).await;
    consumer.ready().await;
    // The server has answered everything that was asked.
    api.put(SERVICES, service("later", "10.0.0.2"));
    consumer.has("Service shop/later").await;
    for path in [PODS, NAMESPACES, POLICIES] {
        assert!(api.requests_for(path).is_empty(), "{:?}", api.requests());
    }
    assert_eq!(about_policies(&consumer), Vec::<&str>::new());
    consumer.finish().await;
}

#[tokio::test]
async fn forbidden_pods_hold_up_the_policies_and_not_the_services() {
    let api = shop().await;
    api.put(POLICIES, deny_all("deny"));
    api.forbid(PODS, true);
    let mut consumer = Consumer::with_policies(&api, impatient()).await;
    consumer.ready().await;
    consumer
        .until("the other lists", |it| {
            it.complete.len() == Kind::ALL.len() - 1
        })
        .await;
    consumer
        .until("a notice", |it| !it.notices.is_empty())
        .await;
    api.until_asked_again(PODS, 3).await;
    // A new watch reports it again.
    api.delete(POLICIES, "shop/deny");
    consumer
        .until("the end of the watch", |it| {
            it.complete.contains(&Kind::Pod)
        })
        .await;
    api.put(POLICIES, deny_all("deny"));
    consumer
        .until("a second notice", |it| it.notices.len() == 2)
        .await;
    for notice in &consumer.notices {
        assert_eq!(notice.reason, Reason::ApiServer);
        assert!(
            notice.message.contains(
                "{apiGroups: [\"\"], resources: [\"pods\"], verbs: [\"list\", \"watch\"]}"
            ),
            "{notice:?}"
        );
    }
    api.forbid(PODS, false);
    consumer.has("Pod shop/web").await;
    consumer.finish().await;
}

#[tokio::test]
async fn a_server_without_policies_holds_up_nothing_else() {
    for forbidden in [false, true] {
        let api = shop().await;
        if forbidden {
            api.forbid(POLICIES, true);
        } else {
            api.remove_api(POLICIES);
        }
        let mut consumer = Consumer::with_policies(&api, impatient()).await;
        consumer.ready().await;
        consumer
            .until("a notice", |it| !it.notices.is_empty())
            .await;
        api.until_asked_again(POLICIES, 3).await;
        api.put(SERVICES, service("later", "10.0.0.2"));
        consumer.has("Service shop/later").await;
        assert_eq!(consumer.notices.len(), 1, "{:?}", consumer.notices);
        for kind in [Kind::Pod, Kind::Namespace, Kind::NetworkPolicy] {
            assert!(!consumer.complete.contains(&kind), "{:?}", consumer.log);
        }
        api.forbid(POLICIES, false);
        api.add_api(POLICIES);
        api.put(POLICIES, deny_all("deny"));
        consumer.has("Pod shop/web").await;
        consumer.finish().await;
    }
}

#[tokio::test]
async fn a_policy_that_went_while_the_server_was_away_ends_the_watch_of_pods() {
    let api = shop().await;
    api.put(POLICIES, deny_all("deny"));
    let mut consumer = Consumer::with_policies(&api, impatient()).await;
    all_lists(&mut consumer).await;
    api.set_down(true).await;
    api.delete(POLICIES, "shop/deny");
    api.compact(true);
    api.set_down(false).await;
    consumer.lacks("NetworkPolicy shop/deny").await;
    consumer.lacks("Pod shop/web").await;
    api.until_watched(PODS, 0).await;
    consumer.finish().await;
}

/// The body of an answer that was recorded of kube-apiserver 1.36.
fn recorded(file: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/apiserver")
        .join(file);
    let text = std::fs::read_to_string(path)
        .expect("the fixture")
        .replace("\r\n", "\n");
    let (_, body) = text.split_once("\n\n").expect("head and body");
    serde_json::from_str(body).expect("JSON")
}

#[tokio::test]
async fn recorded_objects_of_a_real_server_are_understood() {
    let api = FakeApi::start().await;
    for (path, file) in [
        (PODS, "list-pods.http"),
        (NAMESPACES, "list-namespaces.http"),
        (POLICIES, "list-networkpolicies.http"),
    ] {
        let list = recorded(file);
        for item in list["items"].as_array().expect("a list") {
            api.put(path, item.clone());
        }
    }
    let mut consumer = Consumer::with_policies(&api, hasty()).await;
    consumer
        .until("the lists", |it| {
            Kind::POLICY.iter().all(|kind| it.complete.contains(kind))
        })
        .await;
    assert_eq!(consumer.notices, Vec::new());
    assert_eq!(consumer.objects.len(), 8, "{:?}", consumer.names());
    let Some(Object::Pod(web)) = consumer.objects.get("Pod shop/web-0") else {
        panic!("no pod in {:?}", consumer.names());
    };
    assert_eq!(web.node.as_deref(), Some("node-1"));
    assert_eq!(
        web.addresses.to_vec(),
        [
            "10.244.0.10".parse::<std::net::IpAddr>(),
            "fd00:10:244::a".parse()
        ]
        .map(|address| address.expect("an address"))
    );
    assert_eq!((web.labels.len(), web.ports.len()), (3, 1));
    let Some(Object::Namespace(shop)) = consumer.objects.get("Namespace shop") else {
        panic!("no namespace in {:?}", consumer.names());
    };
    let Some(Object::NetworkPolicy(policy)) =
        consumer.objects.get("NetworkPolicy shop/web-from-front")
    else {
        panic!("no policy in {:?}", consumer.names());
    };
    assert!(policy.pods.matches(&web.labels) && !policy.pods.matches(&shop.labels));
    let ingress = policy.ingress.as_deref().expect("ingress");
    let peers = ingress[0].peers.as_deref().expect("peers");
    assert_eq!((ingress.len(), peers.len()), (1, 2));
    let egress = policy.egress.as_deref().expect("egress");
    assert_eq!((egress.len(), egress[0].peers.is_none()), (1, true));
    consumer.finish().await;
}
