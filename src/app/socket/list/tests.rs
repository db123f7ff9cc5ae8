use std::collections::BTreeMap;
use std::path::PathBuf;

use super::*;
use crate::engine::Engine as _;
use crate::insight::objects::{
    cluster_policy, namespace, network_policy, node, pod, service, service_cidr, slice,
};
use crate::model::{EndpointSlice, Event, Object, ObjectRef};
use crate::policies::PolicySettings;
use crate::services::{self, ServiceSettings};
use crate::source::Manifests;
use crate::sync::{Look, PolicyTimes, Query};

/// Reads a document as a command does.
fn read(manifests: Manifests) -> BTreeMap<ObjectRef, Object> {
    let events = manifests.with_allow_empty(true).load().expect("it is read");
    let objects = events.into_iter().filter_map(|event| match event {
        // The time of a change, which latencies are measured from.
        Event::Apply(Object::EndpointSlice(slice)) => Some(Object::EndpointSlice(EndpointSlice {
            triggered_at_ms: None,
            ..slice
        })),
        Event::Apply(object) => Some(object),
        _ => None,
    });
    objects.map(|object| (object.reference(), object)).collect()
}

fn written(object: &Object) -> Value {
    match object {
        Object::Service(it) => service(it),
        Object::EndpointSlice(it) => slice(it),
        Object::Node(it) => node(it),
        Object::ServiceCidr(it) => service_cidr(it),
        Object::Pod(it) => pod(it),
        Object::Namespace(it) => namespace(it.name.name(), &it.labels, it.mode),
        Object::NetworkPolicy(it) => network_policy(it),
        Object::ClusterNetworkPolicy(it) => cluster_policy(it),
    }
}

#[test]
fn what_is_written_is_read_as_the_same_objects() {
    let tiers = "../golden/cluster-network-policies";
    for file in ["insight/shop.yaml", "kubectl-get-all.yaml", tiers] {
        let path = PathBuf::from("tests/fixtures").join(file);
        let node = "node-1".to_owned();
        let objects = read(Manifests::new(vec![path], node.clone()));
        assert!(objects.len() > 10, "{file}");
        let items: Vec<Value> = objects.values().map(written).collect();
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
        let document = list.to_string().into_bytes();
        let again = read(Manifests::new(Vec::new(), node).with_document(document));
        for (name, object) in &objects {
            assert_eq!(again.get(name), Some(object), "{file}");
        }
        assert_eq!(again.len(), objects.len(), "{file}");
    }
}

/// Lists what engines hold, with this number of objects of each kind. Returns the lines of each part;
/// a part is read in one turn of the main loop, and each object is a line.
async fn parts(of: Listed, many: usize) -> Vec<Vec<String>> {
    let mut services = services::Engine::new(ServiceSettings::default());
    let mut policies = policies::Engine::new(PolicySettings::default());
    let items = (0..many).flat_map(|number| {
        let name = |kind| format!("{kind}-{number}");
        let pods = json!({ "pods": { "namespaceSelector": {}, "podSelector": {} } });
        [
            json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name("ns") } }),
            json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name("node") } }),
            json!({ "apiVersion": "v1", "kind": "Service",
                "metadata": { "name": name("service"), "namespace": "shop" },
                "spec": { "clusterIP": format!("10.96.{}.{}", number / 250, number % 250 + 1),
                    "ports": [{ "port": 80 }] } }),
            // All of one service.
            json!({ "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": { "name": name("slice"), "namespace": "shop",
                    "labels": { "kubernetes.io/service-name": "service-0" } },
                "addressType": "IPv4", "ports": [{ "port": 80 }],
                "endpoints": [{ "addresses": ["10.244.0.1"] }] }),
            json!({ "apiVersion": "v1", "kind": "Pod",
                "metadata": { "name": name("pod"), "namespace": "shop" },
                "spec": { "nodeName": "node-0" },
                "status": { "podIPs": [{ "ip": format!("10.244.{}.{}", number / 250, number % 250 + 1) }] } }),
            json!({ "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                "metadata": { "name": name("policy"), "namespace": "shop" },
                "spec": { "podSelector": {} } }),
            json!({ "apiVersion": "policy.networking.k8s.io/v1alpha2",
                "kind": "ClusterNetworkPolicy", "metadata": { "name": name("tier") },
                "spec": { "tier": "Admin", "priority": number, "subject": pods } }),
        ]
    });
    let items: Vec<Value> = items.collect();
    let document = json!({ "apiVersion": "v1", "kind": "List", "items": items });
    let manifests = Manifests::new(Vec::new(), "node-0".to_owned());
    let mut manifests = manifests.with_document(document.to_string().into_bytes());
    for event in manifests.load().expect("it is read") {
        services.apply(&event);
        policies.apply(&event);
    }
    let (ask, mut queries) = mpsc::channel(1);
    let (sender, mut received) = mpsc::channel(1);
    let list = List::new(Arc::new(MainLoop::new(ask)), sender);
    let main_loop = async {
        let times = PolicyTimes::default();
        while let Some(Query::Look(Look(look))) = queries.recv().await {
            look(&View::of(&services, Some(&policies), &times));
        }
    };
    let client = async {
        let mut parts = Vec::new();
        while let Some(part) = received.recv().await {
            parts.push(String::from_utf8(part.into()).expect("UTF-8"));
        }
        parts
    };
    let (sent, (), parts) = tokio::join!(list.send(of), main_loop, client);
    assert!(sent.is_ok());
    let whole: Value = serde_json::from_str(&parts.concat()).expect("JSON");
    let (name, kinds) = match of {
        Listed::Objects => ("items", 7),
        Listed::Services => ("items", 2),
        Listed::Policies => ("policies", 2),
    };
    let listed = whole[name].as_array().expect("a list");
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for object in listed {
        *counts
            .entry(object["kind"].as_str().expect("a kind"))
            .or_default() += 1;
    }
    let complete = counts
        .values()
        .filter(|count| (many..=many + 1).contains(count));
    assert_eq!(complete.count(), kinds, "{counts:?}");
    let lines = parts.iter().map(|part| {
        let lines = part.lines().filter(|line| line.contains("\"kind\":"));
        lines.map(str::to_owned).collect()
    });
    lines.collect()
}

#[tokio::test]
async fn no_turn_of_the_main_loop_copies_more_than_a_portion() {
    let many = 2 * PORTION + 1;
    for (of, kinds) in [
        (Listed::Objects, 7),
        (Listed::Services, 2),
        (Listed::Policies, 2),
    ] {
        let parts = parts(of, many).await;
        let largest = parts.iter().map(Vec::len).max();
        assert_eq!(largest, Some(PORTION), "{of:?}");
        let full = parts.iter().filter(|part| part.len() == PORTION).count();
        assert_eq!(full, 2 * kinds, "{of:?}: each kind in portions");
    }
}
