//! Whether a document is what its kind says: read as the API's own type, and nothing left over.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{NetworkPolicy, ServiceCIDR};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Reads a document as a type of the API; panics where the type does not know a field of it.
#[track_caller]
pub fn typed<T: Serialize + DeserializeOwned>(name: &str, document: &Value) -> T {
    let value: T = serde_json::from_value(document.clone())
        .unwrap_or_else(|error| panic!("{name} is not what its kind says: {error}"));
    let understood = serde_json::to_value(&value).expect("API types can be written");
    let mut lost = Vec::new();
    left_over(document, &understood, String::new(), &mut lost);
    assert!(
        lost.is_empty(),
        "{name} has fields that its kind lacks: {lost:?}"
    );
    value
}

/// Collects the paths of what is written but was not understood.
fn left_over(written: &Value, understood: &Value, path: String, lost: &mut Vec<String>) {
    match (written, understood) {
        (Value::Object(fields), Value::Object(known)) => {
            for (key, value) in fields {
                let path = format!("{path}.{key}");
                match known.get(key) {
                    Some(known) => left_over(value, known, path, lost),
                    // An empty list means the same as none.
                    None if value.as_array().is_some_and(Vec::is_empty) => {}
                    None => lost.push(path),
                }
            }
        }
        (Value::Array(items), Value::Array(known)) if items.len() == known.len() => {
            for (index, (value, known)) in items.iter().zip(known).enumerate() {
                left_over(value, known, format!("{path}[{index}]"), lost);
            }
        }
        _ if written == understood => {}
        _ => lost.push(path),
    }
}

/// Checks a document by its kind.
#[track_caller]
pub fn check_kind(name: &str, document: &Value) {
    let kind = document["kind"].as_str().unwrap_or_default();
    match kind {
        "Service" => drop(typed::<Service>(name, document)),
        "EndpointSlice" => drop(typed::<EndpointSlice>(name, document)),
        "Node" => drop(typed::<Node>(name, document)),
        "ServiceCIDR" => drop(typed::<ServiceCIDR>(name, document)),
        "Pod" => drop(typed::<Pod>(name, document)),
        "Namespace" => drop(typed::<Namespace>(name, document)),
        "NetworkPolicy" => drop(typed::<NetworkPolicy>(name, document)),
        "ServiceAccount" => drop(typed::<ServiceAccount>(name, document)),
        "ClusterRole" => drop(typed::<ClusterRole>(name, document)),
        "ClusterRoleBinding" => drop(typed::<ClusterRoleBinding>(name, document)),
        "DaemonSet" => drop(typed::<DaemonSet>(name, document)),
        "ConfigMap" => drop(typed::<ConfigMap>(name, document)),
        "PodMonitor" => drop(typed::<Custom<PodMonitorSpec>>(name, document)),
        "PrometheusRule" => drop(typed::<Custom<RuleSpec>>(name, document)),
        other => panic!("{name} has an unexpected kind {other:?}"),
    }
}

/// An object of the Prometheus operator: the fields in use, as its custom resource definitions have
/// them.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Custom<Spec> {
    api_version: OperatorVersion,
    kind: String,
    metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
    pub spec: Spec,
}

#[derive(Deserialize, Serialize)]
enum OperatorVersion {
    #[serde(rename = "monitoring.coreos.com/v1")]
    V1,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodMonitorSpec {
    pub job_label: String,
    pub selector: k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector,
    pub pod_metrics_endpoints: Vec<PodEndpoint>,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodEndpoint {
    pub port: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    honor_labels: Option<bool>,
    pub relabelings: Vec<Relabeling>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    metric_relabelings: Vec<Relabeling>,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Relabeling {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    source_labels: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    regex: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    action: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replacement: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_label: Option<String>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RuleSpec {
    pub groups: Vec<RuleGroup>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RuleGroup {
    name: String,
    pub rules: Vec<Alert>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Alert {
    pub alert: String,
    pub expr: String,
    #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<String>,
    pub labels: AlertLabels,
    pub annotations: AlertTexts,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AlertLabels {
    severity: Severity,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum Severity {
    Critical,
    Warning,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AlertTexts {
    pub summary: String,
    pub description: String,
}
