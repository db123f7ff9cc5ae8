//! The judges of network policies are judged themselves, by hand.

use std::net::IpAddr;

use crate::support::policy::oracle::{self, Cluster, Protocol, allowed};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use Protocol::{Icmp, Sctp, Tcp, Udp};

pub const WEB: &str = "10.244.1.11";
pub const DB: &str = "10.244.1.12";
pub const FAR: &str = "10.244.2.11";
pub const OTHER: &str = "10.244.2.12";
pub const NODE: &str = "192.168.10.1";
pub const OUTSIDE: &str = "203.0.113.9";

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn pod(namespace: &str, name: &str, app: &str, node: &str, addresses: &[&str]) -> Value {
    let all: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "metadata": {
            "namespace": namespace, "name": name, "labels": {"app": app},
        },
        "spec": {"nodeName": node, "containers": [{"name": "one", "ports": [
            {"name": "http", "containerPort": 8080},
            {"name": "dns", "containerPort": 53, "protocol": "UDP"},
        ]}]},
        "status": {"phase": "Running", "podIPs": all},
    })
}

/// Web and db of the shop on node-1, another web of the shop and one of the store on node-2.
pub fn world(policies: &[Value]) -> Cluster {
    let pods = [
        pod("shop", "web", "web", "node-1", &[WEB, "fd00:10:244:1::11"]),
        pod("shop", "db", "db", "node-1", &[DB, "fd00:10:244:1::12"]),
        pod("shop", "far", "web", "node-2", &[FAR, "fd00:10:244:2::11"]),
        pod("store", "web", "web", "node-2", &[OTHER]),
    ];
    let namespaces = [
        json!({"metadata": {"name": "shop", "labels": {"team": "a"}}}),
        json!({"metadata": {"name": "store", "labels": {"team": "b"}}}),
    ];
    let nodes = ["1", "2"].map(|n| {
        json!({
            "metadata": {"name": format!("node-{n}")},
            "status": {"addresses": [
                {"type": "Hostname", "address": format!("node-{n}")},
                {"type": "InternalIP", "address": format!("192.168.10.{n}")},
            ]},
        })
    });
    fn all<T: serde::de::DeserializeOwned>(values: impl IntoIterator<Item = Value>) -> Vec<T> {
        let typed = |value| serde_json::from_value(value).expect("an object of the API");
        values.into_iter().map(typed).collect()
    }
    let policies = policies.iter().enumerate().map(|(index, spec)| {
        json!({"metadata": {"namespace": "shop", "name": format!("n{index}")}, "spec": spec})
    });
    Cluster {
        nodes: all(nodes),
        namespaces: all(namespaces),
        pods: all(pods),
        policies: all(policies),
        ..Cluster::default()
    }
}

/// Which of the usual sources reach the web of the shop at TCP 8080.
fn reach_web(rule: Value) -> Vec<&'static str> {
    let policy = json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [rule]});
    let world = world(&[policy]);
    [DB, FAR, OTHER, OUTSIDE]
        .into_iter()
        .filter(|from| allowed(&world, ip(from), ip(WEB), Tcp, 8080))
        .collect()
}

/// Which packets from db reach the web of the shop, with these `ports` in a rule.
fn ports(ports: Value) -> Vec<(Protocol, u16)> {
    let policy = json!({"podSelector": {}, "ingress": [{"ports": ports}]});
    let world = world(&[policy]);
    let mut through = Vec::new();
    for protocol in [Tcp, Udp, Sctp, Icmp] {
        for port in [53, 80, 8080] {
            if allowed(&world, ip(DB), ip(WEB), protocol, port) {
                through.push((protocol, port));
            }
        }
    }
    through
}

#[test]
fn without_a_policy_everything_passes() {
    let world = world(&[]);
    for to in [WEB, FAR, OUTSIDE, NODE] {
        assert!(allowed(&world, ip(DB), ip(to), Tcp, 80));
    }
    assert!(allowed(&world, ip(OUTSIDE), ip(DB), Icmp, 0));
}

#[test]
fn who_is_isolated_and_for_which_direction() {
    let apart = |spec: Value| {
        let world = world(&[spec]);
        let pass = |from, to| allowed(&world, ip(from), ip(to), Tcp, 80);
        (pass(OTHER, WEB), pass(WEB, OTHER))
    };
    let types = |types: Value, rest: Value| {
        let mut spec = json!({"podSelector": {}, "policyTypes": types});
        for (key, value) in rest.as_object().into_iter().flatten() {
            spec[key] = value.clone();
        }
        apart(spec)
    };
    assert_eq!(apart(json!({})), (false, true));
    assert_eq!(apart(json!({"podSelector": {}})), (false, true));
    assert_eq!(apart(json!({"ingress": []})), (false, true));
    assert_eq!(apart(json!({"ingress": [{}]})), (true, true));
    // Egress counts if there are rules; an empty list is as good as none.
    assert_eq!(apart(json!({"egress": []})), (false, true));
    assert_eq!(
        apart(json!({"egress": [{"ports": [{"port": 1}]}]})),
        (false, false)
    );
    assert_eq!(types(json!([]), json!({"egress": [{}]})), (false, true));
    assert_eq!(types(json!(["Egress"]), json!({})), (true, false));
    assert_eq!(
        types(json!(["Egress"]), json!({"ingress": []})),
        (true, false)
    );
    assert_eq!(
        types(json!(["Egress", "Ingress"]), json!({})),
        (false, false)
    );
    // Rules of a direction that is not among the types say nothing.
    assert_eq!(
        types(json!(["Ingress"]), json!({"ingress": [{}], "egress": []})),
        (true, true)
    );
    // Pods of other namespaces and others than the selected ones are not isolated.
    let db_only = world(&[json!({"podSelector": {"matchLabels": {"app": "db"}}})]);
    assert!(!allowed(&db_only, ip(WEB), ip(DB), Tcp, 80));
    assert!(allowed(&db_only, ip(DB), ip(WEB), Tcp, 80));
    assert!(allowed(&db_only, ip(DB), ip(OTHER), Tcp, 80));
}

#[test]
fn policies_add_up_and_both_ends_must_agree() {
    let from_db = json!({"podSelector": {}, "ingress": [
        {"from": [{"podSelector": {"matchLabels": {"app": "db"}}}]},
    ]});
    let to_8080 = json!({"podSelector": {}, "ingress": [{"ports": [{"port": 8080}]}]});
    let both = world(&[from_db.clone(), to_8080]);
    assert!(allowed(&both, ip(DB), ip(WEB), Tcp, 80));
    assert!(allowed(&both, ip(OTHER), ip(WEB), Tcp, 8080));
    assert!(!allowed(&both, ip(OTHER), ip(WEB), Tcp, 80));
    let no_egress =
        json!({"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Egress"]});
    let denied = world(&[from_db, no_egress]);
    assert!(!allowed(&denied, ip(DB), ip(WEB), Tcp, 80));
    assert!(oracle::ingress_allowed(&denied, ip(DB), ip(WEB), Tcp, 80));
}

#[test]
fn peers() {
    let all = [DB, FAR, OTHER, OUTSIDE];
    assert_eq!(reach_web(json!({})), all);
    assert_eq!(reach_web(json!({"from": []})), all);
    let from = |peers: Value| reach_web(json!({"from": peers}));
    assert_eq!(from(json!([{"podSelector": {}}])), [DB, FAR]);
    assert_eq!(
        from(json!([{"podSelector": {"matchLabels": {"app": "web"}}}])),
        [FAR]
    );
    assert_eq!(from(json!([{"namespaceSelector": {}}])), [DB, FAR, OTHER]);
    assert_eq!(
        from(json!([{"namespaceSelector": {"matchLabels": {"team": "b"}}}])),
        [OTHER]
    );
    let store = json!({"matchLabels": {"kubernetes.io/metadata.name": "store"}});
    assert_eq!(from(json!([{"namespaceSelector": store}])), [OTHER]);
    let web = json!({"matchLabels": {"app": "web"}});
    assert_eq!(
        from(json!([{"namespaceSelector": {}, "podSelector": web}])),
        [FAR, OTHER]
    );
    assert_eq!(
        from(json!([{"namespaceSelector": store}, {"podSelector": web}])),
        [FAR, OTHER]
    );
    assert_eq!(from(json!([{"ipBlock": {"cidr": "0.0.0.0/0"}}])), all);
    assert_eq!(
        from(json!([{"ipBlock": {"cidr": "10.244.0.0/16", "except": ["10.244.2.12/32"]}}])),
        [DB, FAR]
    );
    assert_eq!(from(json!([{"ipBlock": {"cidr": "::/0"}}])), [""; 0]);
    assert_eq!(
        from(json!([{"ipBlock": {"cidr": "10.244.2.99/24"}}])),
        [FAR, OTHER]
    );
}

#[test]
fn selectors() {
    let matching = |selector: Value| {
        let selector = serde_json::from_value(selector).expect("a selector");
        let labels: [Value; 3] = [
            json!({"app": "web"}),
            json!({"app": "db", "tier": ""}),
            json!({}),
        ];
        labels.map(|labels| {
            let labels = serde_json::from_value(labels).expect("labels");
            oracle::selector_matches(&selector, Some(&labels))
        })
    };
    let expression = |key: &str, operator: &str, values: Value| {
        matching(json!({"matchExpressions": [
            {"key": key, "operator": operator, "values": values},
        ]}))
    };
    assert_eq!(matching(json!({})), [true, true, true]);
    assert_eq!(
        matching(json!({"matchLabels": {"app": "web"}})),
        [true, false, false]
    );
    assert_eq!(
        matching(json!({"matchLabels": {"tier": ""}})),
        [false, true, false]
    );
    assert_eq!(
        expression("app", "In", json!(["web", "x"])),
        [true, false, false]
    );
    assert_eq!(
        expression("app", "NotIn", json!(["web", "x"])),
        [false, true, true]
    );
    assert_eq!(expression("app", "Exists", json!([])), [true, true, false]);
    assert_eq!(
        expression("tier", "DoesNotExist", json!(null)),
        [true, false, true]
    );
    let both = json!({
        "matchLabels": {"app": "db"},
        "matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}],
    });
    assert_eq!(matching(both), [false, false, false]);
}

#[test]
fn port_forms() {
    let every: Vec<_> = [Tcp, Udp, Sctp, Icmp]
        .into_iter()
        .flat_map(|protocol| [53, 80, 8080].map(|port| (protocol, port)))
        .collect();
    assert_eq!(ports(json!(null)), every);
    assert_eq!(ports(json!([])), every);
    assert_eq!(ports(json!([{"port": 80}])), [(Tcp, 80)]);
    assert_eq!(
        ports(json!([{"protocol": "SCTP"}])),
        [(Sctp, 53), (Sctp, 80), (Sctp, 8080)]
    );
    assert_eq!(ports(json!([{}])), [(Tcp, 53), (Tcp, 80), (Tcp, 8080)]);
    assert_eq!(
        ports(json!([{"protocol": "UDP", "port": 80, "endPort": 8080}])),
        [(Udp, 80), (Udp, 8080)]
    );
    assert_eq!(
        ports(json!([{"port": 80}, {"protocol": "UDP", "port": 53}])),
        [(Tcp, 80), (Udp, 53)]
    );
    assert_eq!(ports(json!([{"port": "http"}])), [(Tcp, 8080)]);
    assert_eq!(
        ports(json!([{"protocol": "UDP", "port": "dns"}])),
        [(Udp, 53)]
    );
    // A name belongs to a protocol.
    assert_eq!(ports(json!([{"port": "dns"}])), []);
}

#[test]
fn a_named_port_is_the_destinations() {
    let mut world = world(&[json!({
        "podSelector": {"matchLabels": {"app": "db"}},
        "policyTypes": ["Egress"],
        "egress": [{"ports": [{"port": "http"}]}],
    })]);
    let port = |pod: &mut Pod, number| {
        let spec = pod.spec.as_mut().expect("a spec");
        spec.containers[0].ports.as_mut().expect("ports")[0].container_port = number;
    };
    port(&mut world.pods[0], 80);
    assert!(allowed(&world, ip(DB), ip(WEB), Tcp, 80));
    assert!(!allowed(&world, ip(DB), ip(WEB), Tcp, 8080));
    assert!(allowed(&world, ip(DB), ip(OTHER), Tcp, 8080));
    assert!(!allowed(&world, ip(DB), ip(OTHER), Tcp, 80));
    // No address outside has named ports.
    assert!(!allowed(&world, ip(DB), ip(OUTSIDE), Tcp, 8080));
}

#[test]
fn nodes_and_host_pods() {
    let mut world = world(&[json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})]);
    // The own node, and no other; to the node it is an egress like any other.
    assert!(allowed(&world, ip(NODE), ip(WEB), Tcp, 80));
    assert!(!allowed(&world, ip(NODE), ip(FAR), Tcp, 80));
    assert!(!allowed(&world, ip(WEB), ip(NODE), Tcp, 80));
    // A pod in the network of the host is not isolated, and no pod to a selector.
    let mut host = pod("shop", "host", "web", "node-1", &[NODE]);
    host["spec"]["hostNetwork"] = json!(true);
    world
        .pods
        .push(serde_json::from_value(host).expect("a pod"));
    assert!(allowed(&world, ip(OUTSIDE), ip(NODE), Tcp, 80));
    let open = json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]});
    let open = serde_json::from_value(json!({
        "metadata": {"namespace": "shop", "name": "open"}, "spec": open,
    }));
    world.policies = vec![open.expect("a policy")];
    assert!(allowed(&world, ip(WEB), ip(FAR), Tcp, 80));
    assert!(!allowed(&world, ip(NODE), ip(FAR), Tcp, 80));
}

#[test]
fn a_pod_reaches_itself_at_the_same_address() {
    let world = world(&[json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})]);
    for address in [WEB, "fd00:10:244:1::11"] {
        assert!(allowed(&world, ip(address), ip(address), Tcp, 80));
    }
    // Isolation counts for all addresses of a pod.
    let v6 = ["fd00:10:244:1::12", "fd00:10:244:1::11"].map(ip);
    assert!(!allowed(&world, v6[0], v6[1], Tcp, 80));
}

/// A pod at the address of `web` with a status.
pub fn rival(name: &str, status: Value) -> Pod {
    let mut object = pod("shop", name, name, "node-1", &[WEB]);
    let fields = status.as_object().expect("fields").clone();
    object["status"]
        .as_object_mut()
        .expect("fields")
        .extend(fields);
    serde_json::from_value(object).expect("a pod")
}

fn container(state: Value) -> Value {
    json!([{"name": "one", "image": "x", "imageID": "", "ready": false, "restartCount": 0, "state": state}])
}

fn since(second: u8) -> Value {
    let at = format!("2026-01-01T00:00:0{second}Z");
    json!({"containerStatuses": container(json!({"running": {"startedAt": at}}))})
}

fn ready(status: &str, second: u8) -> Value {
    let at = format!("2026-01-01T00:00:0{second}Z");
    json!({
        "conditions": [{"type": "PodReadyToStartContainers", "status": status, "lastTransitionTime": at}],
        "containerStatuses": container(json!({"waiting": {}})),
    })
}

/// Who may have the address of `web`, and who certainly has it.
fn of_web(rivals: &[Pod]) -> (Vec<String>, Option<String>) {
    let mut world = world(&[]);
    world.pods.extend_from_slice(rivals);
    let name = |pod: &Pod| pod.metadata.name.clone().expect("a name");
    let holders = oracle::holders(&world, ip(WEB));
    let mut holders: Vec<String> = holders.into_iter().map(name).collect();
    holders.sort();
    (holders, oracle::owner(&world, ip(WEB)).map(name))
}

#[test]
fn an_address_has_the_pod_whose_sandbox_was_the_last() {
    let only = |name: &str| (vec![name.to_owned()], Some(name.to_owned()));
    let either = |names: &[&str]| (names.iter().map(|name| (*name).to_owned()).collect(), None);
    assert_eq!(of_web(&[]), only("web"));
    // `web` itself says nothing of its containers.
    assert_eq!(
        of_web(&[rival("other", json!({}))]),
        either(&["other", "web"])
    );
    assert_eq!(of_web(&[rival("a", since(1))]), only("a"));
    assert_eq!(
        of_web(&[rival("a", since(2)), rival("b", since(1))]),
        only("a")
    );
    assert_eq!(
        of_web(&[rival("a", since(2)), rival("b", since(2))]),
        either(&["a", "b"])
    );
    assert_eq!(of_web(&[rival("a", ready("False", 5))]), only("web"));
    assert_eq!(of_web(&[rival("a", ready("True", 5))]), only("a"));
    // A sandbox that is newer than a container that runs.
    assert_eq!(
        of_web(&[rival("a", ready("True", 5)), rival("b", since(2))]),
        either(&["a", "b"])
    );
    for (name, patch) in [
        (
            "host",
            json!({"spec": {"hostNetwork": true, "containers": []}}),
        ),
        (
            "done",
            json!({"status": {"phase": "Succeeded", "podIPs": [{"ip": WEB}]}}),
        ),
        (
            "failed",
            json!({"status": {"phase": "Failed", "podIPs": [{"ip": WEB}]}}),
        ),
        (
            "deleted",
            json!({
                "metadata": {"namespace": "shop", "name": "deleted", "deletionTimestamp": "2026-01-01T00:00:00Z"},
                "status": {
                    "phase": "Running", "podIPs": [{"ip": WEB}],
                    "containerStatuses": container(json!({"terminated": {"exitCode": 0}})),
                },
            }),
        ),
    ] {
        let mut object = pod("shop", name, "x", "node-1", &[WEB]);
        let fields = patch.as_object().expect("fields").clone();
        object.as_object_mut().expect("fields").extend(fields);
        let gone = serde_json::from_value(object).expect("a pod");
        assert_eq!(of_web(&[gone]), only("web"), "{name}");
    }
    let mut failed = rival("failed", since(1));
    failed.status.get_or_insert_default().phase = Some("Failed".into());
    assert_eq!(of_web(&[failed]), only("failed"), "its container runs");
    let mut world = world(&[]);
    world.pods.push(rival("gone", ready("False", 1)));
    world
        .pods
        .retain(|pod| pod.metadata.name.as_deref() != Some("web"));
    assert_eq!(oracle::holders(&world, ip(WEB)).len(), 1);
    assert_eq!(oracle::owner(&world, ip(WEB)), None);
    assert_eq!(oracle::owner(&world, ip(OUTSIDE)), None);
}

#[test]
fn while_the_pod_of_an_address_is_unknown_each_candidate_must_allow() {
    let lets_in = |app: &str, from: &[&str]| {
        let blocks = from
            .iter()
            .map(|ip| json!({"ipBlock": {"cidr": format!("{ip}/32")}}));
        let peers: Vec<Value> = blocks.collect();
        json!({"podSelector": {"matchLabels": {"app": app}}, "ingress": [{"from": peers}]})
    };
    let mut world = world(&[
        lets_in("web", &[DB, OTHER]),
        lets_in("other", &[OTHER, OUTSIDE]),
        json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [
            {"from": [{"podSelector": {"matchLabels": {"app": "web"}}}]},
        ]}),
    ]);
    let passing = |world: &Cluster| {
        let from = [DB, OTHER, OUTSIDE].into_iter();
        from.filter(|from| allowed(world, ip(from), ip(WEB), Tcp, 80))
            .collect::<Vec<_>>()
    };
    assert_eq!(passing(&world), [DB, OTHER]);
    assert!(allowed(&world, ip(WEB), ip(DB), Tcp, 80));
    world.pods.push(rival("other", json!({})));
    assert_eq!(passing(&world), [OTHER]);
    assert!(
        !allowed(&world, ip(WEB), ip(DB), Tcp, 80),
        "it may be the other one"
    );
    // A pod that was deleted while it ran.
    let other = world.pods.pop().expect("a pod");
    world.departed.push((ip(WEB), other));
    world
        .pods
        .retain(|pod| pod.metadata.name.as_deref() != Some("web"));
    assert_eq!(passing(&world), [OTHER, OUTSIDE]);
}

#[test]
fn a_fault_in_a_rule_closes_it() {
    let faulty_peers = [
        json!({}),
        json!({"ipBlock": {"cidr": "10.244.0.0"}}),
        json!({"ipBlock": {"cidr": "0.0.0.0/0", "except": ["0.0.0.0/0"]}}),
        json!({"ipBlock": {"cidr": "10.244.0.0/16", "except": ["10.245.0.0/24"]}}),
        json!({"ipBlock": {"cidr": "0.0.0.0/0"}, "namespaceSelector": {}}),
        json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Like"}]}}),
        json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "NotIn"}]}}),
    ];
    for peer in faulty_peers {
        let rule = json!({"from": [{"podSelector": {}}, peer]});
        assert_eq!(reach_web(rule), [""; 0], "{peer}");
    }
    let faulty_ports = [
        json!({"port": 0}),
        json!({"port": 65536}),
        json!({"port": 80, "endPort": 79}),
        json!({"port": 80, "endPort": 65536}),
        json!({"endPort": 80}),
        json!({"port": "http", "endPort": 8080}),
        json!({"protocol": "tcp"}),
    ];
    for port in faulty_ports {
        assert_eq!(ports(json!([{"port": 8080}, port])), [], "{port}");
    }
    // The other rules stay in force.
    let policy = json!({"podSelector": {}, "ingress": [{"from": [{}]}, {"ports": [{"port": 80}]}]});
    assert!(allowed(&world(&[policy]), ip(DB), ip(WEB), Tcp, 80));
}

#[test]
fn a_fault_in_the_pod_selector_isolates_more_and_allows_nothing() {
    let world = world(&[json!({
        "podSelector": {
            "matchLabels": {"app": "web"},
            "matchExpressions": [{"key": "app", "operator": "In"}],
        },
        "ingress": [{}],
    })]);
    assert!(!allowed(&world, ip(DB), ip(WEB), Tcp, 80));
    assert!(allowed(&world, ip(WEB), ip(DB), Tcp, 80));
}
