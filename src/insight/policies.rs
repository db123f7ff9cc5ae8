//! The policies and the pods of the node that they select.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::Facts;
use super::names::NameError;
use crate::model::{Kind, ObjectName, ObjectRef};

/// A policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PolicyRow {
    pub kind: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    pub name: String,
    /// Since when its rules are in force, as in RFC 3339. None if that is unknown, as without the agent.
    pub in_force_since: Option<String>,
    /// The directions that it concerns.
    pub directions: Vec<&'static str>,
    /// The pods of the node that it selects.
    pub pods: Vec<String>,
    /// `enforce`, `audit`, or `refused` by the kernel.
    pub mode: &'static str,
}

/// The state of a policy in the agent.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PolicyState {
    pub kind: String,
    pub namespace: String,
    pub name: String,
    pub in_force_since: Option<String>,
    pub refused: bool,
}

/// Adds the states of the agent to policies.
pub(crate) fn add_states(rows: &mut [PolicyRow], states: Vec<PolicyState>) {
    let states = states.into_iter().map(|state| {
        (
            (
                state.kind.clone(),
                state.namespace.clone(),
                state.name.clone(),
            ),
            state,
        )
    });
    let mut states: HashMap<_, _> = states.collect();
    for row in rows {
        let key = (row.kind.to_owned(), row.namespace.clone(), row.name.clone());
        if let Some(state) = states.remove(&key) {
            row.in_force_since = state.in_force_since;
            if state.refused {
                row.mode = "refused";
            }
        }
    }
}

/// Returns the policies of a namespace and with a name, if these are given: those of the cluster
/// first, which belong to no namespace, then by name.
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
    let mut selected: BTreeMap<ObjectRef, Vec<String>> = BTreeMap::new();
    for pod in inventory.local().filter_map(|pod| inventory.pod(pod)) {
        let of_namespace = inventory.policies_for(pod).into_iter();
        let of_cluster = inventory.cluster_policies_for(pod).into_iter();
        let references = of_namespace
            .map(|policy| ObjectRef::new(Kind::NetworkPolicy, policy.name.clone()))
            .chain(
                of_cluster.map(|it| ObjectRef::new(Kind::ClusterNetworkPolicy, it.name.clone())),
            );
        for policy in references {
            selected
                .entry(policy)
                .or_default()
                .push(pod.name.to_string());
        }
    }
    let mut row = |kind: Kind, name: &ObjectName, directions: [bool; 2], mode| {
        let policy = ObjectRef::new(kind, name.clone());
        let [ingress, egress] = directions;
        PolicyRow {
            kind: kind.as_str(),
            namespace: name.namespace().to_owned(),
            name: name.name().to_owned(),
            in_force_since: None,
            directions: [ingress.then_some("ingress"), egress.then_some("egress")]
                .into_iter()
                .flatten()
                .collect(),
            pods: selected.remove(&policy).unwrap_or_default(),
            mode,
        }
    };
    let is_wanted = |policy: &ObjectName| {
        namespace.is_none_or(|it| it == policy.namespace())
            && name.is_none_or(|it| it == policy.name())
    };
    let cluster = inventory.cluster().all().filter(|it| is_wanted(&it.name));
    let mut rows: Vec<PolicyRow> = cluster
        .map(|policy| {
            let directions = [!policy.ingress.is_empty(), !policy.egress.is_empty()];
            row(
                Kind::ClusterNetworkPolicy,
                &policy.name,
                directions,
                "enforce",
            )
        })
        .collect();
    let of_namespaces = inventory.policies().filter(|it| is_wanted(&it.name));
    rows.extend(of_namespaces.map(|policy| {
        let directions = [policy.ingress.is_some(), policy.egress.is_some()];
        let is_audited = facts.policies.is_audited(policy);
        let mode = if is_audited { "audit" } else { "enforce" };
        row(Kind::NetworkPolicy, &policy.name, directions, mode)
    }));
    match (namespace, name) {
        (Some(namespace), Some(name)) if rows.is_empty() => {
            Err(NameError::UnknownPolicy(ObjectName::new(namespace, name)))
        }
        _ => Ok(rows),
    }
}
