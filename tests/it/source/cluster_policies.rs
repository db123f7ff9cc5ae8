//! An API server as a source of ClusterNetworkPolicies, which it need not have, and of the Nodes
//! that they select.

use std::time::Duration;

use crate::support::consumer::{Consumer, hasty};
use crate::support::objects::{cluster_policy, deny_all, namespace, node, pod, service};
use nftlet::model::{Kind, Object, Reason};
use nftlet::source::cluster::Timing;
use nftlet_lab::fake_api::{
    CLUSTER_POLICIES, DISCOVERY, FakeApi, NAMESPACES, NODES, PODS, POLICIES, SERVICES, Streaming,
};
use serde_json::{Value, json};

/// Discovery is asked often, and watches that are not needed end at once.
fn curious() -> Timing {
    Timing {
        discovery: Duration::from_millis(20),
        linger: Duration::ZERO,
        ..hasty()
    }
}

/// A server with a service, two nodes, a namespace and a pod, and no cluster policies.
async fn shop() -> FakeApi {
    let api = FakeApi::start().await;
    api.put(NODES, node("node-1", "zone-a"));
    api.put(NODES, node("node-2", "zone-b"));
    api.put(SERVICES, service("web", "10.0.0.1"));
    api.put(NAMESPACES, namespace("shop", &[]));
    api.put(PODS, pod("web", "node-2", &[], &["10.1.0.1"]));
    api
}

/// The same with cluster policies.
async fn shop_with_cluster_policies() -> FakeApi {
    let api = shop().await;
    api.add_api(CLUSTER_POLICIES);
    api
}

/// A policy that denies the egress of all pods to these peers.
fn denying(name: &str, peer: Value) -> Value {
    let rule = json!({"action": "Deny", "to": [peer]});
    let spec =
        json!({"tier": "Admin", "priority": 5, "subject": {"namespaces": {}}, "egress": [rule]});
    cluster_policy(name, spec)
}

fn of_pods(name: &str) -> Value {
    denying(name, json!({"namespaces": {}}))
}

fn of_nodes(name: &str) -> Value {
    denying(name, json!({"nodes": {}}))
}

async fn all_lists(consumer: &mut Consumer) {
    consumer
        .until("all lists", |it| it.complete.len() == Kind::ALL.len())
        .await;
}

fn place_of(consumer: &Consumer, line: &str) -> usize {
    let found = consumer.log.iter().position(|logged| logged == line);
    found.unwrap_or_else(|| panic!("no {line:?} in {:#?}", consumer.log))
}

#[tokio::test]
async fn cluster_policies_are_watched_where_the_server_has_them() {
    for streaming in [Streaming::Yes, Streaming::Rejected] {
        let api = shop().await;
        api.set_streaming(streaming);
        let mut consumer = Consumer::with_policies(&api, curious()).await;
        all_lists(&mut consumer).await;
        assert_eq!(consumer.names(), ["Node node-1", "Service shop/web"]);
        api.until_asked_again(DISCOVERY, 3).await;
        for path in [CLUSTER_POLICIES, PODS, NAMESPACES] {
            assert!(api.requests_for(path).is_empty(), "{:?}", api.requests());
        }

        for round in ["first", "second"] {
            api.add_api(CLUSTER_POLICIES);
            api.put(CLUSTER_POLICIES, of_pods(round));
            consumer.has(&format!("ClusterNetworkPolicy {round}")).await;
            consumer.has("Pod shop/web").await;
            consumer.has("Namespace shop").await;
            // While the server has the kind, discovery is not asked.
            api.until_watched(CLUSTER_POLICIES, 1).await;
            let asked = api.requests_for(DISCOVERY).len();
            api.put(CLUSTER_POLICIES, of_pods("later"));
            consumer.has("ClusterNetworkPolicy later").await;
            assert_eq!(api.requests_for(DISCOVERY).len(), asked);

            api.remove_api(CLUSTER_POLICIES);
            api.end_watches();
            consumer
                .lacks(&format!("ClusterNetworkPolicy {round}"))
                .await;
            consumer.lacks("ClusterNetworkPolicy later").await;
            consumer.lacks("Pod shop/web").await;
            assert!(api.requests_for(DISCOVERY).len() >= asked + 2);
        }
        assert_eq!(consumer.notices, Vec::new());
        consumer.finish().await;
    }
}

#[tokio::test]
async fn neither_a_404_of_the_watch_nor_one_of_discovery_changes_anything() {
    let api = shop_with_cluster_policies().await;
    api.put(CLUSTER_POLICIES, of_pods("deny"));
    let mut consumer = Consumer::with_policies(&api, curious()).await;
    all_lists(&mut consumer).await;
    consumer.log.clear();
    for (watches, discoveries) in [(1, 0), (1, 1), (3, 0)] {
        api.until_watched(CLUSTER_POLICIES, 1).await;
        api.miss(CLUSTER_POLICIES, watches);
        api.miss(DISCOVERY, discoveries);
        api.end_watches();
        api.until_asked_again(CLUSTER_POLICIES, watches + 1).await;
        api.until_watched(CLUSTER_POLICIES, 1).await;
    }
    api.put(CLUSTER_POLICIES, of_pods("later"));
    consumer.has("ClusterNetworkPolicy later").await;
    let deleted: Vec<_> = consumer
        .log
        .iter()
        .filter(|line| line.starts_with("delete") || line.starts_with("start"))
        .collect();
    assert!(deleted.is_empty(), "{:#?}", consumer.log);
    // A server that says both for longer is reported, and asked until it knows better.
    api.miss(CLUSTER_POLICIES, 10);
    api.end_watches();
    consumer
        .until("a notice", |it| {
            it.notices.iter().any(|notice| {
                let place = "the API server has no clusternetworkpolicies at";
                notice.message.contains(place)
            })
        })
        .await;
    api.put(CLUSTER_POLICIES, of_pods("last"));
    consumer.has("ClusterNetworkPolicy last").await;
    consumer.finish().await;
}

#[tokio::test]
async fn policies_wait_for_an_answer_of_discovery_and_services_do_not() {
    let api = shop_with_cluster_policies().await;
    api.put(CLUSTER_POLICIES, of_pods("deny"));
    for fault in ["busy", "foreign"] {
        match fault {
            "busy" => api.set_busy(DISCOVERY, Some(0)),
            _ => api.answer_instead(DISCOVERY, Some("<html>Welcome</html>")),
        }
        let mut consumer = Consumer::with_policies(&api, curious()).await;
        consumer.ready().await;
        consumer
            .until("a notice", |it| !it.notices.is_empty())
            .await;
        assert!(!consumer.complete.contains(&Kind::ClusterNetworkPolicy));
        assert!(!consumer.complete.contains(&Kind::Pod), "{fault}");
        let [notice] = consumer.notices.as_slice() else {
            panic!("one notice: {:?}", consumer.notices);
        };
        assert_eq!(notice.reason, Reason::ApiServer);
        let wanted = match fault {
            "busy" => "the API server cannot answer now (429",
            _ => {
                "the answer is not an APIResourceList of /apis/policy.networking.k8s.io/v1alpha2: \"<html>Welcome</html>\""
            }
        };
        assert!(notice.message.contains(wanted), "{notice:?}");
        api.set_busy(DISCOVERY, None);
        api.answer_instead(DISCOVERY, None);
        all_lists(&mut consumer).await;
        assert!(consumer.objects.contains_key("ClusterNetworkPolicy deny"));
        assert_eq!(consumer.stats.fault_of(Kind::ClusterNetworkPolicy), None);
        consumer.finish().await;
    }
}

#[tokio::test]
async fn a_version_without_the_kind_does_not_have_it() {
    let api = shop_with_cluster_policies().await;
    let other = json!({"kind": "APIResourceList", "resources": [
        {"name": "clusternetworkpolicies/status"}, {"name": "othernetworkpolicies"}]});
    api.answer_instead(DISCOVERY, Some(&other.to_string()));
    let mut consumer = Consumer::with_policies(&api, curious()).await;
    all_lists(&mut consumer).await;
    api.until_asked_again(DISCOVERY, 2).await;
    assert!(api.requests_for(CLUSTER_POLICIES).is_empty());
    consumer.finish().await;
}

#[tokio::test]
async fn forbidden_cluster_policies_are_reported_with_the_rules_that_are_missing() {
    for path in [CLUSTER_POLICIES, DISCOVERY] {
        let api = shop_with_cluster_policies().await;
        api.forbid(path, true);
        let mut consumer = Consumer::with_policies(&api, curious()).await;
        consumer.ready().await;
        consumer
            .until("a notice", |it| !it.notices.is_empty())
            .await;
        let rules = "add to nftlet's ClusterRole the rule {apiGroups: [\"policy.networking.k8s.io\"], resources: [\"clusternetworkpolicies\"], verbs: [\"list\", \"watch\"]}, and {nonResourceURLs: [\"/apis/policy.networking.k8s.io/v1alpha2\"], verbs: [\"get\"]}";
        let [notice] = consumer.notices.as_slice() else {
            panic!("one notice: {:?}", consumer.notices);
        };
        assert!(notice.message.contains(rules), "{notice:?}");
        assert!(!consumer.complete.contains(&Kind::ClusterNetworkPolicy));
        api.forbid(path, false);
        all_lists(&mut consumer).await;
        consumer.finish().await;
    }
}

#[tokio::test]
async fn a_policy_of_either_kind_keeps_the_watch_of_pods() {
    let api = shop_with_cluster_policies().await;
    api.put(CLUSTER_POLICIES, of_pods("cluster"));
    api.put(POLICIES, deny_all("deny"));
    let mut consumer = Consumer::with_policies(&api, curious()).await;
    all_lists(&mut consumer).await;
    api.delete(POLICIES, "shop/deny");
    consumer.lacks("NetworkPolicy shop/deny").await;
    api.put(PODS, pod("db", "node-2", &[], &["10.1.0.2"]));
    consumer.has("Pod shop/db").await;
    api.put(POLICIES, deny_all("deny"));
    consumer.has("NetworkPolicy shop/deny").await;
    api.delete(CLUSTER_POLICIES, "cluster");
    consumer.lacks("ClusterNetworkPolicy cluster").await;
    api.put(PODS, pod("api", "node-2", &[], &["10.1.0.3"]));
    consumer.has("Pod shop/api").await;
    assert_eq!(api.requests_for(PODS).len(), 1);
    api.delete(POLICIES, "shop/deny");
    consumer.lacks("Pod shop/web").await;
    consumer.finish().await;
}

#[tokio::test]
async fn all_nodes_are_watched_while_a_policy_selects_nodes() {
    let api = shop_with_cluster_policies().await;
    api.put(CLUSTER_POLICIES, of_pods("pods"));
    let mut consumer = Consumer::with_policies(&api, curious()).await;
    all_lists(&mut consumer).await;
    consumer.has("Pod shop/web").await;
    assert!(!consumer.objects.contains_key("Node node-2"));
    let selected = || {
        let requests = api.requests_for(NODES).into_iter();
        let fields = requests.map(|request| request.get("fieldSelector").to_owned());
        fields.collect::<Vec<_>>()
    };
    let own = "metadata.name=node-1";
    assert_eq!(selected(), [own]);

    consumer.log.clear();
    consumer.complete.remove(&Kind::Node);
    api.put(CLUSTER_POLICIES, of_nodes("nodes"));
    all_lists(&mut consumer).await;
    let applied = place_of(&consumer, "apply ClusterNetworkPolicy nodes");
    let begun = place_of(&consumer, "start Node");
    let complete = place_of(&consumer, "complete Node");
    assert!(begun < applied && applied < complete, "{:#?}", consumer.log);
    assert_eq!(selected(), [own, ""]);
    api.until_watched(NODES, 1).await;
    assert!(consumer.objects.contains_key("Node node-2"));
    api.put(NODES, node("node-3", "zone-b"));
    consumer.has("Node node-3").await;
    api.delete(NODES, "node-3");
    consumer.lacks("Node node-3").await;
    // The own Node is followed as before.
    api.put(NODES, node("node-1", "zone-b"));
    consumer
        .until("another zone", |it| match it.objects.get("Node node-1") {
            Some(Object::Node(node)) => node.zone.as_deref() == Some("zone-b"),
            _ => false,
        })
        .await;

    // A second such policy needs no second list, and either keeps it.
    api.put(CLUSTER_POLICIES, of_nodes("pods"));
    api.delete(CLUSTER_POLICIES, "nodes");
    consumer.lacks("ClusterNetworkPolicy nodes").await;
    assert!(consumer.objects.contains_key("Node node-2"));
    api.put(CLUSTER_POLICIES, of_pods("pods"));
    consumer.lacks("Node node-2").await;
    assert!(consumer.objects.contains_key("Node node-1"));
    assert_eq!(selected(), [own, "", own]);
    assert_eq!(consumer.notices, Vec::new());
    consumer.finish().await;
}

#[tokio::test]
async fn the_list_of_all_nodes_waits_for_the_own_node() {
    let api = shop_with_cluster_policies().await;
    api.delete(NODES, "node-1");
    api.put(CLUSTER_POLICIES, of_nodes("nodes"));
    let mut consumer = Consumer::with_policies(&api, curious()).await;
    consumer.has("Node node-2").await;
    api.put(NODES, node("node-3", "zone-b"));
    consumer.has("Node node-3").await;
    assert!(!consumer.complete.contains(&Kind::Node));
    api.put(NODES, node("node-1", "zone-a"));
    all_lists(&mut consumer).await;
    assert_eq!(consumer.notices, Vec::new());
    consumer.finish().await;
}

#[tokio::test]
async fn without_the_own_node_the_list_of_all_nodes_waits_once() {
    let api = shop_with_cluster_policies().await;
    api.delete(NODES, "node-1");
    let timing = Timing {
        node_wait: Duration::from_millis(50),
        ..curious()
    };
    let mut consumer = Consumer::with_policies(&api, timing).await;
    all_lists(&mut consumer).await;
    assert_eq!(consumer.notices.len(), 1);
    assert_eq!(consumer.notices[0].reason, Reason::NodeMissing);
    consumer.complete.remove(&Kind::Node);
    api.put(CLUSTER_POLICIES, of_nodes("nodes"));
    all_lists(&mut consumer).await;
    assert!(consumer.objects.contains_key("Node node-2"));
    assert_eq!(consumer.notices.len(), 1);
    consumer.finish().await;
}

#[tokio::test]
async fn a_policy_that_cannot_be_used_keeps_its_last_state() {
    let api = shop_with_cluster_policies().await;
    api.put(CLUSTER_POLICIES, of_pods("deny"));
    let mut consumer = Consumer::with_policies(&api, curious()).await;
    all_lists(&mut consumer).await;
    let mut faulty = of_pods("deny");
    faulty["spec"]["tier"] = json!("Developer");
    api.put(CLUSTER_POLICIES, faulty);
    consumer
        .until("a notice", |it| !it.notices.is_empty())
        .await;
    let [notice] = consumer.notices.as_slice() else {
        panic!("one notice: {:?}", consumer.notices);
    };
    assert_eq!(notice.reason, Reason::InvalidObject);
    let wanted = "ClusterNetworkPolicy deny: the object cannot be decoded: spec.tier \"Developer\" is not a tier; write Admin or Baseline;";
    assert!(notice.message.starts_with(wanted), "{notice:?}");
    assert!(consumer.objects.contains_key("ClusterNetworkPolicy deny"));
    consumer.finish().await;
}
