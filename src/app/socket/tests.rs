//! Objects that are written and read again.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::*;
use crate::insight::objects::{
    cluster_policy, namespace, network_policy, node, pod, service, service_cidr, slice,
};
use crate::model::{EndpointSlice, Event, Object, ObjectRef};
use crate::source::Manifests;

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
        Object::Namespace(it) => namespace(it.name.name(), &it.labels),
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
