//! The agent's objects as Kubernetes has them, with the fields that nftlet reads.
//!
//! A command that asks a running agent reads them like a dump, so that there is one reader of
//! objects.

use std::net::IpAddr;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::model::{
    Action, ClusterNetworkPolicy, Endpoint, EndpointSlice, Family, Kind, LabelSelector, Labels,
    NetworkPolicy, Node, ObjectName, Peer, Pod, PolicyMode, PolicyPort, PolicyRule, PortMatch,
    Requirement, Sandbox, Service, ServiceCidr, ServiceKind, Tier, TierPeer, TierRule,
    TrafficPolicy,
};

/// Returns an object with its type and name, and further fields.
fn object(kind: Kind, name: &ObjectName, metadata: Value, mut fields: Map<String, Value>) -> Value {
    let mut meta = match metadata {
        Value::Object(meta) => meta,
        _ => Map::new(),
    };
    meta.insert("name".into(), name.name().into());
    if !name.namespace().is_empty() {
        meta.insert("namespace".into(), name.namespace().into());
    }
    fields.insert("apiVersion".into(), kind.api_version().into());
    fields.insert("kind".into(), kind.as_str().into());
    fields.insert("metadata".into(), Value::Object(meta));
    Value::Object(fields)
}

fn fields<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    let fields = fields.into_iter();
    fields
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

fn time(seconds: i64) -> Value {
    Timestamp::from_second(seconds).map_or(Value::Null, |time| time.to_string().into())
}

fn texts(items: impl IntoIterator<Item = impl ToString>) -> Value {
    items
        .into_iter()
        .map(|item| Value::from(item.to_string()))
        .collect()
}

fn labels(labels: &Labels) -> Value {
    let labels = labels.iter();
    labels
        .map(|(key, value)| (key.to_string(), Value::from(&**value)))
        .collect::<Map<String, Value>>()
        .into()
}

/// Returns a Service.
pub(crate) fn service(service: &Service) -> Value {
    let policy = |policy| match policy {
        TrafficPolicy::Cluster => "Cluster",
        TrafficPolicy::Local => "Local",
    };
    let ports = service.ports.iter().map(|port| {
        json!({
            "name": *port.name, "protocol": port.protocol.to_string(), "port": port.port,
            "nodePort": port.node_port,
        })
    });
    let kind = match service.kind {
        ServiceKind::ClusterIp | ServiceKind::Headless | ServiceKind::OtherProxy => "ClusterIP",
        ServiceKind::NodePort => "NodePort",
        ServiceKind::LoadBalancer => "LoadBalancer",
        ServiceKind::ExternalName => "ExternalName",
    };
    let cluster_ip = match service.kind {
        ServiceKind::Headless => Some("None".to_owned()),
        _ => service.cluster_ips.first().map(IpAddr::to_string),
    };
    let mut metadata = json!({ "creationTimestamp": service.created.map(time) });
    if service.kind == ServiceKind::OtherProxy {
        metadata["labels"] = json!({ "service.kubernetes.io/service-proxy-name": "other" });
    }
    let ingress = service.load_balancer_ips.iter();
    let ingress: Vec<Value> = ingress
        .map(|ip| json!({ "ip": ip, "ipMode": "VIP" }))
        .collect();
    let spec = json!({
        "type": kind,
        "clusterIP": cluster_ip,
        "clusterIPs": texts(&service.cluster_ips),
        "ports": ports.collect::<Vec<_>>(),
        "externalIPs": texts(&service.external_ips),
        "loadBalancerSourceRanges": texts(&service.source_ranges),
        "externalTrafficPolicy": policy(service.external_policy),
        "internalTrafficPolicy": policy(service.internal_policy),
        "sessionAffinity": service.affinity_seconds.map_or("None", |_| "ClientIP"),
        "sessionAffinityConfig": service
            .affinity_seconds
            .map(|seconds| json!({ "clientIP": { "timeoutSeconds": seconds } })),
        "healthCheckNodePort": service.health_check_node_port,
    });
    let status = json!({ "loadBalancer": { "ingress": ingress } });
    let of_kind = fields([("spec", spec), ("status", status)]);
    object(Kind::Service, &service.name, metadata, of_kind)
}

/// Returns an EndpointSlice.
pub(crate) fn slice(slice: &EndpointSlice) -> Value {
    let metadata = json!({
        "creationTimestamp": slice.created.map(time),
        "labels": { "kubernetes.io/service-name": slice.service.name() },
    });
    let ports = slice.ports.iter().map(|port| {
        json!({ "name": *port.name, "protocol": port.protocol.to_string(), "port": port.port })
    });
    let address_type = match slice.family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    };
    let of_kind = fields([
        ("addressType", address_type.into()),
        ("ports", ports.collect()),
        ("endpoints", slice.endpoints.iter().map(endpoint).collect()),
    ]);
    object(Kind::EndpointSlice, &slice.name, metadata, of_kind)
}

fn endpoint(endpoint: &Endpoint) -> Value {
    let names = |names: &Option<Box<[std::sync::Arc<str>]>>| {
        let names = names.as_deref()?.iter();
        Some(
            names
                .map(|name| json!({ "name": **name }))
                .collect::<Vec<_>>(),
        )
    };
    let hints = endpoint
        .hints
        .as_ref()
        .map(|hints| json!({ "forZones": names(&hints.zones), "forNodes": names(&hints.nodes) }));
    json!({
        "addresses": [endpoint.address],
        "conditions": {
            "ready": endpoint.ready, "serving": endpoint.serving,
            "terminating": endpoint.terminating,
        },
        "nodeName": endpoint.node.as_deref(),
        "hints": hints,
    })
}

/// Returns a Node.
pub(crate) fn node(node: &Node) -> Value {
    let of_type = |addresses: &[IpAddr], kind: &'static str| -> Vec<Value> {
        let addresses = addresses.iter();
        addresses
            .map(|address| json!({ "type": kind, "address": address }))
            .collect()
    };
    let mut addresses = of_type(&node.internal_ips, "InternalIP");
    addresses.extend(of_type(&node.external_ips, "ExternalIP"));
    let others = node.addresses.iter().copied();
    let others =
        others.filter(|it| !node.internal_ips.contains(it) && !node.external_ips.contains(it));
    addresses.extend(of_type(&others.collect::<Vec<_>>(), "Hostname"));
    let of_kind = fields([
        ("spec", json!({ "podCIDRs": texts(&node.pod_cidrs) })),
        ("status", json!({ "addresses": addresses })),
    ]);
    let metadata = json!({ "labels": labels(&node.labels) });
    object(
        Kind::Node,
        &ObjectName::new("", &node.name),
        metadata,
        of_kind,
    )
}

/// Returns a Node of which only labels and addresses are known.
pub(crate) fn other_node(name: &ObjectName, of_node: &Labels, addresses: &[IpAddr]) -> Value {
    let addresses = addresses.iter();
    let addresses = addresses.map(|address| json!({ "type": "InternalIP", "address": address }));
    let status = json!({ "addresses": addresses.collect::<Vec<_>>() });
    let of_kind = fields([("status", status)]);
    object(
        Kind::Node,
        name,
        json!({ "labels": labels(of_node) }),
        of_kind,
    )
}

/// Returns a ServiceCIDR.
pub(crate) fn service_cidr(cidr: &ServiceCidr) -> Value {
    let of_kind = fields([("spec", json!({ "cidrs": texts(&cidr.cidrs) }))]);
    object(Kind::ServiceCidr, &cidr.name, Value::Null, of_kind)
}

/// Returns a Pod.
pub(crate) fn pod(pod: &Pod) -> Value {
    let ports = pod.ports.iter().map(|port| {
        json!({
            "name": *port.name, "protocol": port.protocol.to_string(),
            "containerPort": port.port,
        })
    });
    let mut metadata = json!({ "labels": labels(&pod.labels) });
    if let Some(owner) = &pod.owner {
        let owner = json!({ "kind": "Workload", "name": **owner, "controller": true });
        metadata["ownerReferences"] = json!([owner]);
    }
    let spec = json!({
        "nodeName": pod.node.as_deref(),
        "hostNetwork": pod.host_network,
        "containers": [{ "ports": ports.collect::<Vec<_>>() }],
    });
    let state = match (pod.evidence.started, pod.running, pod.ended) {
        (Some(seconds), ..) => Some(json!({ "running": { "startedAt": time(seconds.into()) } })),
        // Its containers are not in the status.
        (None, true, _) => None,
        (None, false, true) => Some(json!({ "terminated": {} })),
        (None, false, false) => Some(json!({ "waiting": {} })),
    };
    let containers = state.map(|state| json!({ "state": state }));
    let sandbox = match pod.evidence.sandbox {
        Sandbox::Gone => Some(json!({
            "type": "PodReadyToStartContainers", "status": "False",
        })),
        Sandbox::Unknown => None,
        Sandbox::RanAt(seconds) => Some(json!({
            "type": "PodReadyToStartContainers", "status": "True",
            "lastTransitionTime": time(seconds.into()),
        })),
    };
    let ips = pod.addresses.iter();
    let status = json!({
        "phase": if pod.ended { "Succeeded" } else { "Running" },
        "podIPs": ips.map(|ip| json!({ "ip": ip })).collect::<Vec<_>>(),
        "conditions": sandbox.into_iter().collect::<Vec<_>>(),
        "containerStatuses": containers.into_iter().collect::<Vec<_>>(),
    });
    let of_kind = fields([("spec", spec), ("status", status)]);
    object(Kind::Pod, &pod.name, metadata, of_kind)
}

/// Returns `metadata` with the mode of policies, if they have one.
fn annotations(mode: Option<PolicyMode>) -> Value {
    let word = match mode {
        None => return json!({}),
        Some(PolicyMode::Enforce) => "enforce",
        Some(PolicyMode::Audit) => "audit",
    };
    json!({ "annotations": { "nftlet.dev/mode": word } })
}

/// Returns a Namespace.
pub(crate) fn namespace(name: &str, of_namespace: &Labels, mode: Option<PolicyMode>) -> Value {
    let mut metadata = annotations(mode);
    metadata["labels"] = labels(of_namespace);
    object(
        Kind::Namespace,
        &ObjectName::new("", name),
        metadata,
        Map::new(),
    )
}

/// Returns a NetworkPolicy.
pub(crate) fn network_policy(policy: &NetworkPolicy) -> Value {
    let mut spec = json!({ "podSelector": selector(&policy.pods) });
    let mut types = Vec::new();
    for (kind, field, peers, rules) in [
        ("Ingress", "ingress", "from", &policy.ingress),
        ("Egress", "egress", "to", &policy.egress),
    ] {
        if let Some(rules) = rules {
            types.push(kind);
            let rules = rules.iter().map(|it| rule(it, peers));
            spec[field] = rules.collect();
        }
    }
    spec["policyTypes"] = json!(types);
    let of_kind = fields([("spec", spec)]);
    let metadata = annotations(policy.mode);
    object(Kind::NetworkPolicy, &policy.name, metadata, of_kind)
}

/// Returns a ClusterNetworkPolicy.
pub(crate) fn cluster_policy(policy: &ClusterNetworkPolicy) -> Value {
    let tier = match policy.tier {
        Tier::Admin => "Admin",
        Tier::Baseline => "Baseline",
    };
    let rules = |rules: &[TierRule], peers: &str| -> Vec<Value> {
        rules.iter().map(|rule| tier_rule(rule, peers)).collect()
    };
    let spec = json!({
        "tier": tier,
        "priority": policy.priority,
        "subject": { "pods": pods(&policy.subject_namespaces, &policy.subject_pods) },
        "ingress": rules(&policy.ingress, "from"),
        "egress": rules(&policy.egress, "to"),
    });
    let of_kind = fields([("spec", spec)]);
    object(
        Kind::ClusterNetworkPolicy,
        &policy.name,
        Value::Null,
        of_kind,
    )
}

fn pods(namespaces: &LabelSelector, pods: &LabelSelector) -> Value {
    json!({ "namespaceSelector": selector(namespaces), "podSelector": selector(pods) })
}

/// A rule without peers stands for one that was not understood, and is read as one again.
fn tier_rule(rule: &TierRule, peers: &str) -> Value {
    let action = match rule.action {
        Action::Accept => "Accept",
        Action::Deny => "Deny",
        Action::Pass => "Pass",
    };
    let mut written = json!({ "name": rule.name.as_deref(), "action": action });
    if let Some(of_rule) = &rule.peers {
        let peer = |peer: &TierPeer| match peer {
            TierPeer::Pods {
                namespaces,
                pods: of,
            } => json!({ "pods": pods(namespaces, of) }),
            TierPeer::Networks(networks) => json!({ "networks": texts(networks) }),
            TierPeer::Nodes(labels) => json!({ "nodes": selector(labels) }),
        };
        written[peers] = of_rule.iter().map(peer).collect();
    }
    if let Some(ports) = &rule.protocols {
        let mut protocols: Vec<Value> = ports.iter().map(tier_port).collect();
        // A named port is an entry of each protocol.
        protocols.dedup();
        written["protocols"] = protocols.into();
    }
    written
}

fn tier_port(port: &PolicyPort) -> Value {
    let protocol = port.protocol.to_string().to_lowercase();
    let destination = match &port.port {
        PortMatch::Named(name) => return json!({ "destinationNamedPort": **name }),
        PortMatch::Any => return json!({ protocol: {} }),
        PortMatch::Range(from, to) if from == to => json!({ "number": from }),
        PortMatch::Range(from, to) => json!({ "range": { "start": from, "end": to } }),
    };
    json!({ protocol: { "destinationPort": destination } })
}

fn rule(rule: &PolicyRule, peers: &str) -> Value {
    let mut written = Map::new();
    // An empty list in the API matches everything, and one without a valid entry nothing.
    if let Some(of_rule) = &rule.peers {
        let peers_of_rule: Vec<Value> = match of_rule.as_slice() {
            [] => vec![json!({ "podSelector": nothing() })],
            some => some.iter().map(peer).collect(),
        };
        written.insert(peers.to_owned(), peers_of_rule.into());
    }
    if let Some(ports) = &rule.ports {
        written.insert("ports".to_owned(), ports.iter().map(port).collect());
    }
    Value::Object(written)
}

fn peer(peer: &Peer) -> Value {
    match peer {
        Peer::Pods { namespaces, pods } => {
            let mut written = json!({ "podSelector": selector(pods) });
            if let Some(namespaces) = namespaces {
                written["namespaceSelector"] = selector(namespaces);
            }
            written
        }
        Peer::Block { cidr, except } => {
            json!({ "ipBlock": { "cidr": cidr.to_string(), "except": texts(except) } })
        }
    }
}

fn port(port: &PolicyPort) -> Value {
    let protocol = port.protocol.to_string();
    match &port.port {
        PortMatch::Any => json!({ "protocol": protocol }),
        PortMatch::Range(from, to) if from == to => json!({ "protocol": protocol, "port": from }),
        PortMatch::Range(from, to) => {
            json!({ "protocol": protocol, "port": from, "endPort": to })
        }
        PortMatch::Named(name) => json!({ "protocol": protocol, "port": **name }),
    }
}

/// Returns a selector that selects nothing.
fn nothing() -> Value {
    json!({ "matchExpressions": [
        { "key": "none", "operator": "Exists" }, { "key": "none", "operator": "DoesNotExist" },
    ] })
}

fn selector(selector: &LabelSelector) -> Value {
    let requirements = selector.requirements().iter();
    let expressions = requirements.map(|requirement| match requirement {
        Requirement::In(key, values) => {
            json!({ "key": **key, "operator": "In", "values": texts(values) })
        }
        Requirement::NotIn(key, values) => {
            json!({ "key": **key, "operator": "NotIn", "values": texts(values) })
        }
        Requirement::Exists(key) => json!({ "key": **key, "operator": "Exists" }),
        Requirement::DoesNotExist(key) => json!({ "key": **key, "operator": "DoesNotExist" }),
    });
    json!({ "matchExpressions": expressions.collect::<Vec<_>>() })
}
