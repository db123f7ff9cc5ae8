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
            "labels": {"tier": "front", "app": "web"}
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
    assert_eq!(pod.node.as_deref(), Some("node-1"));
    assert_eq!(
        (pod.host_network, pod.ended, pod.running),
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
    assert_eq!((pod.node, pod.evidence), (None, Evidence::default()));
    assert_eq!(
        (pod.host_network, pod.ended, pod.running),
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
        assert_eq!(pod.running, phase == "Running", "{phase}");
    }
}

/// The state of a container that started so many seconds after 1970-01-01T00:01:00Z.
fn running(seconds: u32) -> Value {
    json!({"state": {"running": {"startedAt": format!("1970-01-01T00:01:{seconds:02}Z")}}})
}

fn terminated() -> Value {
    json!({"state": {"terminated": {"exitCode": 0, "startedAt": "1970-01-01T00:02:00Z"}}})
}

fn waiting() -> Value {
    json!({"state": {"waiting": {"reason": "ContainerCreating"}}})
}

#[test]
fn a_pod_has_not_ended_while_a_container_of_any_sort_runs() {
    for phase in ["Succeeded", "Failed"] {
        for field in [
            "containerStatuses",
            "initContainerStatuses",
            "ephemeralContainerStatuses",
        ] {
            let (pod, _) = pod_with(json!({}), json!({"phase": phase, field: [running(1)]}));
            assert_eq!((pod.ended, pod.running), (false, true), "{phase} {field}");
            for other in [terminated(), waiting(), json!({}), json!({"state": null})] {
                let (pod, _) = pod_with(json!({}), json!({"phase": phase, field: [other]}));
                assert_eq!((pod.ended, pod.running), (true, false), "{phase} {field}");
            }
        }
    }
}

#[test]
fn a_deleted_pod_has_ended_when_all_its_containers_have() {
    let of = |deleted: bool, containers: Value, init: Value| {
        let mut metadata = json!({"namespace": "shop", "name": "web-0"});
        if deleted {
            metadata["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        let (pod, _) = pod(json!({
            "metadata": metadata,
            "status": {"phase": "Running", "containerStatuses": containers, "initContainerStatuses": init}
        }));
        pod.ended
    };
    assert!(of(
        true,
        json!([terminated(), terminated()]),
        json!([terminated()])
    ));
    // Without a deletion they are started again.
    assert!(!of(false, json!([terminated()]), json!([])));
    assert!(!of(true, json!([terminated(), running(1)]), json!([])));
    assert!(!of(true, json!([terminated(), waiting()]), json!([])));
    assert!(!of(true, json!([terminated()]), json!([running(1)])));
    assert!(!of(true, json!([]), json!([])));
}

#[test]
fn the_status_says_since_when_a_sandbox_runs() {
    let of = |conditions: Value, containers: Value| {
        let status = json!({"conditions": conditions, "containerStatuses": containers});
        let (pod, notices) = pod_with(json!({}), status);
        assert_eq!(notices, Vec::<String>::new());
        (pod.evidence.sandbox, pod.evidence.started)
    };
    let ready = |status: &str, seconds: u32| {
        let time = format!("1970-01-01T00:01:{seconds:02}Z");
        json!({"type": "PodReadyToStartContainers", "status": status, "lastTransitionTime": time})
    };
    let other =
        json!({"type": "Ready", "status": "True", "lastTransitionTime": "1970-01-01T00:01:40Z"});
    assert_eq!(of(json!(null), json!(null)), (Sandbox::Unknown, None));
    assert_eq!(
        of(json!([other]), json!([waiting()])),
        (Sandbox::Unknown, None)
    );
    assert_eq!(
        of(
            json!([]),
            json!([running(3), terminated(), running(9), waiting()])
        ),
        (Sandbox::RanAt(69), Some(69))
    );
    assert_eq!(
        of(json!([other, ready("True", 5)]), json!([])),
        (Sandbox::RanAt(65), None)
    );
    assert_eq!(
        of(json!([ready("True", 5)]), json!([running(3)])),
        (Sandbox::RanAt(65), Some(63))
    );
    assert_eq!(
        of(json!([ready("False", 5)]), json!([waiting()])),
        (Sandbox::Gone, None)
    );
    assert_eq!(
        of(json!([ready("False", 5)]), json!([running(3)])),
        (Sandbox::RanAt(63), Some(63)),
        "a container that runs has a sandbox"
    );
    assert_eq!(
        of(json!([ready("Unknown", 5)]), json!([])),
        (Sandbox::Unknown, None)
    );
    let mut old_name = ready("False", 1);
    old_name["type"] = json!("PodHasNetwork");
    assert_eq!(of(json!([old_name]), json!([])), (Sandbox::Gone, None));
    // Times that are missing, or fit nowhere.
    let (pod, _) = pod_with(
        json!({}),
        json!({"containerStatuses": [{"state": {"running": {}}}]}),
    );
    assert_eq!(pod.evidence.started, Some(0));
    let far = json!([{"state": {"running": {"startedAt": "9999-01-01T00:00:00Z"}}}]);
    assert_eq!(of(json!([]), far).1, Some(u32::MAX));
}

#[test]
fn of_two_ports_with_one_name_the_first_counts_by_protocol() {
    let (pod, notices) = pod_with(
        json!({
            "containers": [
                {"ports": [{"name": "web", "containerPort": 8080}]},
                {"ports": [{"name": "web", "containerPort": 80}, {"name": "web", "containerPort": 53, "protocol": "UDP"},
                    {"name": "mesh", "containerPort": 9}]}
            ],
            "initContainers": [{"restartPolicy": "Always", "ports": [{"name": "mesh", "containerPort": 1}]}]
        }),
        json!({}),
    );
    assert_eq!(notices, Vec::<String>::new());
    let ports = pod
        .ports
        .iter()
        .map(|port| (&*port.name, port.protocol, port.port));
    assert_eq!(
        ports.collect::<Vec<_>>(),
        [
            ("mesh", Protocol::Tcp, 9),
            ("web", Protocol::Tcp, 8080),
            ("web", Protocol::Udp, 53)
        ]
    );
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
