//! The policies and the pods of the node that they select.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Facts;
use super::names::NameError;
use crate::model::{Kind, NetworkPolicy, ObjectName};

/// A policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PolicyRow {
    pub kind: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    pub name: String,
    /// The directions in which it isolates.
    pub directions: Vec<&'static str>,
    /// The pods of the node that it selects.
    pub pods: Vec<String>,
    /// Whether it is enforced.
    pub mode: &'static str,
}

/// Returns the policies of a namespace and with a name, if these are given, sorted by name.
///
/// # Errors
///
/// If there is no policy with this name.
pub(crate) fn policies(
    facts: &Facts,
    namespace: Option<&str>,
    name: Option<&str>,
) -> Result<Vec<PolicyRow>, NameError> {
    let inventory = facts.policies.inventory();
    let mut selected: BTreeMap<&ObjectName, Vec<String>> = BTreeMap::new();
    for pod in inventory.local().filter_map(|pod| inventory.pod(pod)) {
        for policy in inventory.policies_for(pod) {
            let pods = selected.entry(&policy.name).or_default();
            pods.push(pod.name.to_string());
        }
    }
    let all = inventory.policies();
    let wanted = all.filter(|policy| {
        namespace.is_none_or(|it| it == policy.name.namespace())
            && name.is_none_or(|it| it == policy.name.name())
    });
    let mut row = |policy: &NetworkPolicy| PolicyRow {
        kind: Kind::NetworkPolicy.as_str(),
        namespace: policy.name.namespace().to_owned(),
        name: policy.name.name().to_owned(),
        directions: [
            policy.ingress.is_some().then_some("ingress"),
            policy.egress.is_some().then_some("egress"),
        ]
        .into_iter()
        .flatten()
        .collect(),
        pods: selected.remove(&policy.name).unwrap_or_default(),
        mode: "enforce",
    };
    let rows: Vec<PolicyRow> = wanted.map(|policy| row(policy)).collect();
    match (namespace, name) {
        (Some(namespace), Some(name)) if rows.is_empty() => {
            Err(NameError::UnknownPolicy(ObjectName::new(namespace, name)))
        }
        _ => Ok(rows),
    }
}
