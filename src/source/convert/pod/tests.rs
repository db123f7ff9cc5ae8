//! Pods and Namespaces, field by field.

use serde_json::{Value, json};

use super::super::Decoded;
use super::*;
use crate::model::{Kind, Object, Protocol, Reason};

fn decode(converter: &mut Converter, kind: Kind, object: &Value) -> Decoded {
    converter
        .decode(kind, object)
        .expect("the object fits its schema")
}

fn pod(object: Value) -> (Pod, Vec<String>) {
    let decoded = decode(&mut Converter::default(), Kind::Pod, &object);
    assert!(
        decoded
            .notices
            .iter()
            .all(|notice| notice.reason == Reason::InvalidField)
    );
    let messages = decoded.notices.into_iter().map(|notice| notice.message);
    match decoded.object {
        Some(Object::Pod(pod)) => (pod, messages.collect()),
        other => panic!("not a pod: {other:?}"),
    }
}

fn pod_with(spec: Value, status: Value) -> (Pod, Vec<String>) {
    pod(json!({"metadata": {"namespace": "shop", "name": "web-0"}, "spec": spec, "status": status}))
}

fn texts<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

fn pairs(labels: &Labels) -> Vec<(&str, &str)> {
    labels
        .iter()
        .map(|(key, value)| (&**key, &**value))
        .collect()
}

#[test]
fn every_used_field_of_a_pod_is_read() {
    let (pod, notices) = pod(json!({
        "metadata": {
            "namespace": "shop", "name": "web-0", "creationTimestamp": "1970-01-01T00:01:00Z",
            "deletionTimestamp": "1970-01-01T00:02:00Z", "labels": {"tier": "front", "app": "web"}
        },
        "spec": {
            "nodeName": "node-1", "hostNetwork": true,
            "containers": [
                {"name": "a", "ports": [{"name": "web", "containerPort": 8080},
                    {"containerPort": 9}, {"name": "dns", "containerPort": 53, "protocol": "UDP"}]},
                {"name": "b"}
            ],
            "initContainers": [
                {"name": "c", "ports": [{"name": "gone", "containerPort": 1}]},
                {"name": "d", "restartPolicy": "Always", "ports": [{"name": "mesh", "containerPort": 15000}]}
            ]
        },
        "status": {"phase": "Running", "podIP": "10.1.0.1", "podIPs": [{"ip": "10.1.0.1"}, {"ip": "fd00::1"}]}
    }));
    assert_eq!(notices, Vec::<String>::new());
    assert_eq!(pod.name.as_str(), "shop/web-0");
    assert_eq!(pod.created, Some(60));
    assert_eq!(pod.node.as_deref(), Some("node-1"));
    assert_eq!(
        (pod.host_network, pod.ended, pod.terminating),
        (true, false, true)
    );
    assert_eq!(texts(&pod.addresses), ["10.1.0.1", "fd00::1"]);
    assert_eq!(pairs(&pod.labels), [("app", "web"), ("tier", "front")]);
    let ports: Vec<_> = pod
        .ports
        .iter()
        .map(|port| (&*port.name, port.protocol, port.port))
        .collect();
    assert_eq!(
        ports,
        [
            ("dns", Protocol::Udp, 53),
            ("mesh", Protocol::Tcp, 15000),
            ("web", Protocol::Tcp, 8080)
        ]
    );
}

#[test]
fn a_pod_that_is_not_scheduled_has_nothing_yet() {
    let (pod, notices) = pod(json!({"metadata": {"name": "web-0"}}));
    assert_eq!(notices, Vec::<String>::new());
    assert_eq!(pod.name.as_str(), "default/web-0");
    assert_eq!((pod.node, pod.created), (None, None));
    assert_eq!(
        (pod.host_network, pod.ended, pod.terminating),
        (false, false, false)
    );
    assert!(pod.addresses.is_empty() && pod.labels.is_empty() && pod.ports.is_empty());
}

#[test]
fn a_pod_has_ended_when_its_phase_says_so() {
    for (phase, ended) in [
        ("Pending", false),
        ("Running", false),
        ("Unknown", false),
        ("Succeeded", true),
        ("Failed", true),
    ] {
        let (pod, _) = pod_with(json!({}), json!({"phase": phase}));
        assert_eq!(pod.ended, ended, "{phase}");
    }
}

#[test]
fn bad_addresses_of_a_pod_are_left_out() {
    let (pod, notices) = pod_with(
        json!({}),
        json!({"podIPs": [{"ip": "10.1.0"}, {"ip": "10.1.0.1"}, {"ip": "10.1.0.2"}, {"ip": "127.0.0.1"}]}),
    );
    assert_eq!(texts(&pod.addresses), ["10.1.0.1"]);
    assert_eq!(notices.len(), 3, "{notices:?}");
    assert!(
        notices[0].starts_with("Pod shop/web-0: status.podIPs[0].ip \"10.1.0\" is not an IP"),
        "{notices:?}"
    );
    assert!(
        notices[1].contains("\"10.1.0.2\" is a second IPv4 address"),
        "{notices:?}"
    );
    // An old server gives only the one; an empty one is none.
    let (pod, notices) = pod_with(json!({}), json!({"podIP": "10.1.0.7"}));
    assert_eq!(
        (texts(&pod.addresses), notices.len()),
        (vec!["10.1.0.7".into()], 0)
    );
    let (pod, notices) = pod_with(json!({}), json!({"podIP": "", "podIPs": []}));
    assert!(pod.addresses.is_empty() && notices.is_empty());
}

#[test]
fn bad_ports_of_a_pod_are_left_out() {
    let (pod, notices) = pod_with(
        json!({"containers": [{"ports": [
            {"name": "a", "containerPort": 0},
            {"name": "b", "containerPort": 70000},
            {"name": "c", "containerPort": 80, "protocol": "ICMP"},
            {"name": "d", "containerPort": 80}
        ]}]}),
        json!({}),
    );
    assert_eq!(pod.ports.len(), 1);
    assert_eq!(notices.len(), 3, "{notices:?}");
    assert!(
        notices[1].contains("spec.containers[0].ports[1].containerPort \"70000\""),
        "{notices:?}"
    );
    assert!(
        notices[2].contains("spec.containers[0].ports[2].protocol \"ICMP\""),
        "{notices:?}"
    );
}

#[test]
fn a_namespace_always_has_the_label_with_its_name() {
    let labels = |object: Value| {
        let decoded = decode(&mut Converter::default(), Kind::Namespace, &object);
        assert_eq!(decoded.notices, []);
        match decoded.object {
            Some(Object::Namespace(namespace)) => {
                assert_eq!(namespace.name.as_str(), "shop");
                namespace.labels
            }
            other => panic!("not a namespace: {other:?}"),
        }
    };
    let name = ("kubernetes.io/metadata.name", "shop");
    let bare = labels(json!({"metadata": {"name": "shop", "namespace": "ignored"}}));
    assert_eq!(pairs(&bare), [name]);
    let written = labels(json!({"metadata": {"name": "shop", "labels":
        {"team": "web", "empty": null, "kubernetes.io/metadata.name": "other"}}}));
    assert_eq!(pairs(&written), [("empty", ""), name, ("team", "web")]);
}

#[test]
fn pods_of_one_workload_share_what_they_have_in_common() {
    let mut converter = Converter::default();
    let mut pod = |name: &str| {
        let object = json!({
            "metadata": {"namespace": "shop", "name": name, "labels": {"app": "web", "pod-template-hash": "5d4f"}},
            "spec": {"nodeName": "node-1", "containers": [{"ports": [{"name": "web", "containerPort": 8080}]}]}
        });
        match decode(&mut converter, Kind::Pod, &object).object {
            Some(Object::Pod(pod)) => pod,
            other => panic!("not a pod: {other:?}"),
        }
    };
    let (one, other) = (pod("web-0"), pod("web-1"));
    assert!(Arc::ptr_eq(&one.ports, &other.ports));
    let node = |pod: &Pod| pod.node.clone().expect("a node");
    assert!(Arc::ptr_eq(&node(&one), &node(&other)));
    let first = |pod: &Pod| {
        let (key, _) = pod.labels.iter().next().expect("a label");
        std::ptr::from_ref(key)
    };
    assert_eq!(first(&one), first(&other), "the lists are one");
}
