//! Objects of the API as JSON.
//!
//! A name is `namespace/name`; an object of a namespace whose name has none is in `shop`. What
//! these builders do not set, [`with`] merges in.

use serde::Serialize;
use serde_json::{Map, Value, json};

/// A Service with a ClusterIP and the port 80, `http`.
pub fn service(name: &str, ip: impl Serialize) -> Value {
    let ip = json!(ip);
    let spec = json!({"clusterIP": ip, "clusterIPs": [ip],
        "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]});
    with(object("v1", "Service", name), json!({"spec": spec}))
}

/// An EndpointSlice of a service in the same namespace, with the port 8080, `http`, and endpoints
/// at these addresses.
pub fn slice<A: Serialize>(name: &str, service: &str, addresses: &[A]) -> Value {
    let endpoints = addresses.iter().map(|it| json!({"addresses": [it]}));
    slice_of(name, service, endpoints.collect())
}

/// As [`slice`], with endpoints that say more than their address.
pub fn slice_of(name: &str, service: &str, endpoints: Value) -> Value {
    let slice = object("discovery.k8s.io/v1", "EndpointSlice", name);
    with(
        slice,
        json!({
            "metadata": {"labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        }),
    )
}

/// A Node in a zone.
pub fn node(name: &str, zone: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}}})
}

/// A ServiceCIDR.
pub fn cidr(name: &str, range: &str) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": {"name": name}, "spec": {"cidrs": [range]}})
}

/// A Namespace.
pub fn namespace(name: &str, labels: &[(&str, &str)]) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": name, "labels": map(labels)}})
}

/// A running Pod of a node, with these addresses.
pub fn pod<A: Serialize>(
    name: &str,
    node: &str,
    labels: &[(&str, &str)],
    addresses: &[A],
) -> Value {
    let ips = addresses.iter().map(|ip| json!({"ip": ip}));
    with(
        object("v1", "Pod", name),
        json!({
            "metadata": {"labels": map(labels)},
            "spec": {"nodeName": node, "containers": [{"name": "main"}]},
            "status": {
                "phase": "Running",
                "podIP": addresses.first(), "podIPs": ips.collect::<Value>(),
            },
        }),
    )
}

/// A ClusterNetworkPolicy.
pub fn cluster_policy(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name}, "spec": spec})
}

/// A NetworkPolicy.
pub fn policy(name: &str, spec: Value) -> Value {
    let mut policy = object("networking.k8s.io/v1", "NetworkPolicy", name);
    policy["spec"] = spec;
    policy
}

/// A NetworkPolicy that lets nothing into any pod of its namespace.
pub fn deny_all(name: &str) -> Value {
    policy(name, json!({"podSelector": {}, "policyTypes": ["Ingress"]}))
}

/// A List, which is one file of manifests.
pub fn list(name: &str, items: &[Value]) -> Value {
    json!({"apiVersion": "v1", "kind": "List", "metadata": {"name": name}, "items": items})
}

/// An object changed by a merge patch (RFC 7396).
#[must_use]
pub fn with(mut object: Value, patch: Value) -> Value {
    merge(&mut object, &patch);
    object
}

/// Applies a JSON merge patch (RFC 7396), except that a patch of null changes nothing.
pub fn merge(object: &mut Value, patch: &Value) {
    match patch {
        Value::Null => {}
        Value::Object(fields) => {
            if !object.is_object() {
                *object = json!({});
            }
            for (name, patch) in fields {
                if patch.is_null() {
                    object.as_object_mut().map(|fields| fields.remove(name));
                } else {
                    merge(&mut object[name], patch);
                }
            }
        }
        other => *object = other.clone(),
    }
}

fn object(api_version: &str, kind: &str, name: &str) -> Value {
    let (namespace, name) = name.split_once('/').unwrap_or(("shop", name));
    json!({"apiVersion": api_version, "kind": kind,
        "metadata": {"namespace": namespace, "name": name}})
}

fn map(pairs: &[(&str, &str)]) -> Map<String, Value> {
    let pairs = pairs.iter();
    pairs
        .map(|(key, value)| ((*key).into(), json!(value)))
        .collect()
}
