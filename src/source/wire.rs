//! The fields of API objects that nftlet reads, as serialised.
//!
//! Both sources decode into these types: the cluster from the JSON of the API server, the manifests
//! from YAML or JSON files. The deserialiser skips everything else (`managedFields`, pod templates,
//! unknown fields of newer servers) without allocating. Every field is optional, and `null` is
//! absent, as in the API. Numbers are wide integers, so that a port out of range is reported by
//! [`convert`](super::convert) for that port only. Texts are borrowed from the input if possible:
//! most are only compared or looked up.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde_json::Value;

/// A text, borrowed from the input unless it has escapes.
///
/// (`serde` borrows for a `Cow` only as a field, not inside an `Option` or a `Vec`.)
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Text<'a>(Cow<'a, str>);

impl Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct OfText;

        impl<'de> Visitor<'de> for OfText {
            type Value = Cow<'de, str>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Cow::Borrowed(text))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Cow::Owned(text.to_owned()))
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Self::Value, E> {
                Ok(Cow::Owned(text))
            }
        }

        // As for a `String`, so that YAML numbers are rejected.
        from.deserialize_string(OfText).map(Text)
    }
}

/// The type of an object or of a list.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Type<'a> {
    #[serde(borrow)]
    pub api_version: Option<Text<'a>>,
    pub kind: Option<Text<'a>>,
}

/// An object of any kind, read if the rest of it cannot be decoded.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Head {
    pub metadata: Option<HeadMeta>,
}

/// The part of `metadata` that identifies an object and its version.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct HeadMeta {
    pub name: Option<String>,
    pub namespace: Option<String>,
    pub resource_version: Option<String>,
}

/// `metadata` of an object; `L` has the labels to read.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Meta<'a, L = Labels<'a>> {
    #[serde(borrow)]
    pub name: Option<Text<'a>>,
    pub namespace: Option<Text<'a>>,
    pub resource_version: Option<Text<'a>>,
    pub creation_timestamp: Option<Text<'a>>,
    pub deletion_timestamp: Option<Text<'a>>,
    pub labels: Option<L>,
    pub annotations: Option<Annotations<'a>>,
    pub owner_references: Option<Vec<OwnerReference<'a>>>,
}

/// The object that manages another one.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct OwnerReference<'a> {
    #[serde(borrow)]
    pub kind: Option<Text<'a>>,
    pub name: Option<Text<'a>>,
    pub controller: Option<bool>,
}

/// All labels, for objects that selectors match.
pub(super) type AllLabels<'a> = BTreeMap<Text<'a>, Option<Text<'a>>>;

/// The labels that are read of Services and EndpointSlices.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Labels<'a> {
    #[serde(rename = "kubernetes.io/service-name", borrow)]
    pub service_name: Option<Text<'a>>,
    #[serde(rename = "service.kubernetes.io/service-proxy-name")]
    pub service_proxy_name: Option<Text<'a>>,
    #[serde(rename = "service.kubernetes.io/headless")]
    pub headless: Option<Text<'a>>,
}

/// The annotations that are read.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Annotations<'a> {
    #[serde(rename = "endpoints.kubernetes.io/last-change-trigger-time", borrow)]
    pub trigger_time: Option<Text<'a>>,
    #[serde(rename = "nftlet.dev/mode")]
    pub mode: Option<Value>,
}

/// A list of which only the first entry is kept.
#[derive(Debug, Default)]
pub(super) struct First<T>(Option<T>);

impl<T> Deref for First<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.0.as_slice()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for First<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct OfFirst<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for OfFirst<T> {
            type Value = Option<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a sequence")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Option<T>, A::Error> {
                let first = entries.next_element()?;
                while entries.next_element::<IgnoredAny>()?.is_some() {}
                Ok(first)
            }
        }

        from.deserialize_seq(OfFirst(PhantomData)).map(First)
    }
}

/// core/v1 Service.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Service<'a> {
    #[serde(rename = "apiVersion", borrow)]
    pub api_version: Option<Text<'a>>,
    pub kind: Option<Text<'a>>,
    pub metadata: Option<Meta<'a>>,
    pub spec: Option<ServiceSpec<'a>>,
    pub status: Option<ServiceStatus<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ServiceSpec<'a> {
    #[serde(rename = "type", borrow)]
    pub type_: Option<Text<'a>>,
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<Text<'a>>,
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Option<Vec<Text<'a>>>,
    pub ip_families: Option<Vec<Text<'a>>>,
    pub ports: Option<Vec<ServicePort<'a>>>,
    #[serde(rename = "externalIPs")]
    pub external_ips: Option<Vec<Text<'a>>>,
    pub load_balancer_source_ranges: Option<Vec<Text<'a>>>,
    pub external_traffic_policy: Option<Text<'a>>,
    pub internal_traffic_policy: Option<Text<'a>>,
    pub health_check_node_port: Option<i64>,
    pub session_affinity: Option<Text<'a>>,
    pub session_affinity_config: Option<SessionAffinityConfig>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ServicePort<'a> {
    #[serde(borrow)]
    pub name: Option<Text<'a>>,
    pub protocol: Option<Text<'a>>,
    pub port: Option<i64>,
    pub node_port: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct SessionAffinityConfig {
    #[serde(rename = "clientIP")]
    pub client_ip: Option<ClientIp>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ClientIp {
    pub timeout_seconds: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ServiceStatus<'a> {
    #[serde(borrow)]
    pub load_balancer: Option<LoadBalancer<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct LoadBalancer<'a> {
    #[serde(borrow)]
    pub ingress: Option<Vec<Ingress<'a>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Ingress<'a> {
    #[serde(borrow)]
    pub ip: Option<Text<'a>>,
    pub ip_mode: Option<Text<'a>>,
}

/// discovery.k8s.io/v1 EndpointSlice.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct EndpointSlice<'a> {
    #[serde(rename = "apiVersion", borrow)]
    pub api_version: Option<Text<'a>>,
    pub kind: Option<Text<'a>>,
    pub metadata: Option<Meta<'a>>,
    pub address_type: Option<Text<'a>>,
    pub endpoints: Option<Vec<Endpoint<'a>>>,
    pub ports: Option<Vec<SlicePort<'a>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Endpoint<'a> {
    #[serde(borrow)]
    pub addresses: Option<First<Text<'a>>>,
    pub conditions: Option<Conditions>,
    pub hints: Option<Hints<'a>>,
    pub node_name: Option<Text<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Conditions {
    pub ready: Option<bool>,
    pub serving: Option<bool>,
    pub terminating: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Hints<'a> {
    #[serde(borrow)]
    pub for_zones: Option<Vec<Named<'a>>>,
    pub for_nodes: Option<Vec<Named<'a>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Named<'a> {
    #[serde(borrow)]
    pub name: Option<Text<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct SlicePort<'a> {
    #[serde(borrow)]
    pub name: Option<Text<'a>>,
    pub protocol: Option<Text<'a>>,
    pub port: Option<i64>,
}

/// core/v1 Node.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Node<'a> {
    #[serde(rename = "apiVersion", borrow)]
    pub api_version: Option<Text<'a>>,
    pub kind: Option<Text<'a>>,
    pub metadata: Option<Meta<'a, AllLabels<'a>>>,
    pub spec: Option<NodeSpec<'a>>,
    pub status: Option<NodeStatus<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct NodeSpec<'a> {
    #[serde(rename = "podCIDR", borrow)]
    pub pod_cidr: Option<Text<'a>>,
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Option<Vec<Text<'a>>>,
    pub taints: Option<Vec<Taint<'a>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Taint<'a> {
    #[serde(borrow)]
    pub key: Option<Text<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct NodeStatus<'a> {
    #[serde(borrow)]
    pub addresses: Option<Vec<NodeAddress<'a>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct NodeAddress<'a> {
    #[serde(rename = "type", borrow)]
    pub type_: Option<Text<'a>>,
    pub address: Option<Text<'a>>,
}

/// networking.k8s.io/v1 ServiceCIDR.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ServiceCidr<'a> {
    #[serde(rename = "apiVersion", borrow)]
    pub api_version: Option<Text<'a>>,
    pub kind: Option<Text<'a>>,
    pub metadata: Option<Meta<'a>>,
    pub spec: Option<ServiceCidrSpec<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ServiceCidrSpec<'a> {
    #[serde(borrow)]
    pub cidrs: Option<Vec<Text<'a>>>,
}

/// core/v1 Pod.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Pod<'a> {
    #[serde(rename = "apiVersion", borrow)]
    pub api_version: Option<Text<'a>>,
    pub kind: Option<Text<'a>>,
    pub metadata: Option<Meta<'a, AllLabels<'a>>>,
    pub spec: Option<PodSpec<'a>>,
    pub status: Option<PodStatus<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct PodSpec<'a> {
    #[serde(borrow)]
    pub node_name: Option<Text<'a>>,
    pub host_network: Option<bool>,
    pub containers: Option<Vec<Container<'a>>>,
    pub init_containers: Option<Vec<Container<'a>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Container<'a> {
    #[serde(borrow)]
    pub restart_policy: Option<Text<'a>>,
    pub ports: Option<Vec<ContainerPort<'a>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ContainerPort<'a> {
    #[serde(borrow)]
    pub name: Option<Text<'a>>,
    pub container_port: Option<i64>,
    pub protocol: Option<Text<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PodStatus<'a> {
    #[serde(borrow)]
    pub phase: Option<Text<'a>>,
    #[serde(rename = "podIP")]
    pub pod_ip: Option<Text<'a>>,
    #[serde(rename = "podIPs")]
    pub pod_ips: Option<Vec<PodIp<'a>>>,
    pub conditions: Option<Vec<PodCondition<'a>>>,
    #[serde(rename = "containerStatuses")]
    pub container_statuses: Option<Vec<ContainerStatus<'a>>>,
    #[serde(rename = "initContainerStatuses")]
    pub init_container_statuses: Option<Vec<ContainerStatus<'a>>>,
    #[serde(rename = "ephemeralContainerStatuses")]
    pub ephemeral_container_statuses: Option<Vec<ContainerStatus<'a>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct PodCondition<'a> {
    #[serde(rename = "type", borrow)]
    pub type_: Option<Text<'a>>,
    pub status: Option<Text<'a>>,
    pub last_transition_time: Option<Text<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ContainerStatus<'a> {
    #[serde(borrow)]
    pub state: Option<ContainerState<'a>>,
}

/// The state of a container; `waiting` is not read.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ContainerState<'a> {
    #[serde(borrow)]
    pub running: Option<RunningContainer<'a>>,
    pub terminated: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RunningContainer<'a> {
    #[serde(borrow)]
    pub started_at: Option<Text<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PodIp<'a> {
    #[serde(borrow)]
    pub ip: Option<Text<'a>>,
}

/// core/v1 Namespace.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Namespace<'a> {
    #[serde(rename = "apiVersion", borrow)]
    pub api_version: Option<Text<'a>>,
    pub kind: Option<Text<'a>>,
    pub metadata: Option<Meta<'a, AllLabels<'a>>>,
}

/// networking.k8s.io/v1 NetworkPolicy, or policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy.
///
/// The `spec` is kept as a value, to be read strictly: a field of the wrong type must only disable
/// its rule, and a misspelt one (`form` for `from`) must not count as absent, which would allow
/// everything.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Policy<'a> {
    #[serde(rename = "apiVersion", borrow)]
    pub api_version: Option<Text<'a>>,
    pub kind: Option<Text<'a>>,
    pub metadata: Option<PolicyMeta>,
    pub spec: Option<Value>,
}

/// `metadata` of a policy. Annotations of the wrong type must not make the policy unusable.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct PolicyMeta {
    pub name: Option<String>,
    pub namespace: Option<String>,
    pub resource_version: Option<String>,
    pub annotations: Option<Value>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_borrowed_unless_they_are_written_with_escapes() {
        let json = r#"{"addresses": ["10.1.0.1", "10.1.0.2", 3], "nodeName": "node\u002d1"}"#;
        let endpoint: Endpoint<'_> = serde_json::from_str(json).expect("an endpoint");
        let [Text(address)] = &**endpoint.addresses.as_ref().expect("addresses") else {
            panic!("only the first one is kept");
        };
        assert!(matches!(address, Cow::Borrowed("10.1.0.1")));
        let node = endpoint.node_name.expect("a node").0;
        assert!(matches!(&node, Cow::Owned(node) if node == "node-1"));
        let none: Endpoint<'_> = serde_json::from_str(r#"{"addresses": []}"#).expect("an endpoint");
        assert!(none.addresses.is_some_and(|none| none.is_empty()));
        let error = serde_json::from_str::<Endpoint<'_>>(r#"{"addresses": [1, "10.1.0.1"]}"#);
        assert!(error.is_err());
    }
}
