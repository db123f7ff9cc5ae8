//! Objects that differ in what nftlet reads of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use crate::insight::{Facts, objects};
use crate::model::{
    ClusterNetworkPolicy, EndpointSlice, Kind, Labels, NetworkPolicy, Node, ObjectName, Pod,
    PolicyMode, Service, ServiceCidr,
};

/// What happens to something from one side to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Change {
    Added,
    Removed,
    Changed,
}

impl Change {
    /// Returns the change between what the sides have, if one has something.
    pub fn of<T>(before: Option<&T>, after: Option<&T>) -> Self {
        match (before, after) {
            (None, Some(_)) => Self::Added,
            (Some(_), None) => Self::Removed,
            _ => Self::Changed,
        }
    }

    pub fn word(self) -> &'static str {
        match self {
            Self::Added => "added",
            Self::Removed => "removed",
            Self::Changed => "changed",
        }
    }
}

/// An object that differs.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct ObjectChange {
    pub kind: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    pub name: String,
    pub change: Change,
    /// The paths of the fields that differ, of a changed object.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<String>,
}

/// What is known of an object.
#[derive(Debug, PartialEq)]
enum Known<'a> {
    Service(&'a Service),
    Slice(&'a EndpointSlice),
    Cidr(&'a ServiceCidr),
    OwnNode(&'a Node),
    OtherNode(&'a Labels, &'a [IpAddr]),
    Pod(&'a Pod),
    Namespace(Labels, Option<PolicyMode>),
    Policy(&'a NetworkPolicy),
    ClusterPolicy(&'a ClusterNetworkPolicy),
}

impl Known<'_> {
    fn json(&self, name: &ObjectName) -> Value {
        match self {
            Known::Service(it) => objects::service(it),
            Known::Slice(it) => objects::slice(it),
            Known::Cidr(it) => objects::service_cidr(it),
            Known::OwnNode(it) => objects::node(it),
            Known::OtherNode(labels, addresses) => objects::other_node(name, labels, addresses),
            Known::Pod(it) => objects::pod(it),
            Known::Namespace(labels, mode) => objects::namespace(name.name(), labels, *mode),
            Known::Policy(it) => objects::network_policy(it),
            Known::ClusterPolicy(it) => objects::cluster_policy(it),
        }
    }
}

/// Returns the services that have rules; the API server is not asked for others.
pub(super) fn ruled_services<'a>(facts: &Facts<'a>) -> impl Iterator<Item = &'a Arc<Service>> {
    let services = facts.store.services();
    services.filter(|service| service.has_frontends())
}

type AllKnown<'a> = BTreeMap<(&'static str, ObjectName), Known<'a>>;

fn known<'a>(facts: &Facts<'a>) -> AllKnown<'a> {
    let mut all = AllKnown::new();
    let mut add = |kind: Kind, name: &ObjectName, known| {
        all.insert((kind.as_str(), name.clone()), known);
    };
    let (store, inventory) = (facts.store, facts.policies.inventory());
    for service in ruled_services(facts) {
        add(Kind::Service, &service.name, Known::Service(service));
        for slice in store.slices_of(&service.name).all() {
            add(Kind::EndpointSlice, &slice.name, Known::Slice(slice));
        }
    }
    for range in store.service_cidr_objects() {
        add(Kind::ServiceCidr, &range.name, Known::Cidr(range));
    }
    for name in inventory.nodes().names() {
        if let Some(node) = inventory.nodes().get(name) {
            let known = Known::OtherNode(&node.labels, &node.addresses);
            add(Kind::Node, name, known);
        }
    }
    if let Some(node) = store.node().filter(|_| facts.has_node) {
        let name = ObjectName::new("", &node.name);
        add(Kind::Node, &name, Known::OwnNode(node));
    }
    for pod in inventory.pods() {
        add(Kind::Pod, &pod.name, Known::Pod(pod));
    }
    for (name, labels) in inventory.namespaces() {
        let known = Known::Namespace(labels, inventory.mode_of(name));
        add(Kind::Namespace, &ObjectName::new("", name), known);
    }
    for policy in inventory.policies() {
        add(Kind::NetworkPolicy, &policy.name, Known::Policy(policy));
    }
    for policy in inventory.cluster().all() {
        let known = Known::ClusterPolicy(policy);
        add(Kind::ClusterNetworkPolicy, &policy.name, known);
    }
    all
}

/// Compares the objects of two sides, sorted by kind and name.
pub(super) fn changes(facts: [&Facts; 2], not_compared: &mut Vec<String>) -> Vec<ObjectChange> {
    let [mut before, mut after] = facts.map(known);
    if facts.iter().any(|facts| facts.others.is_none()) {
        leave_out_of_agent(facts, [&mut before, &mut after], not_compared);
    }
    let mut changes = Vec::new();
    for (kind, name) in before.keys().chain(after.keys()).collect::<BTreeSet<_>>() {
        let key = (*kind, name.clone());
        let [before, after] = [before.get(&key), after.get(&key)];
        let mut fields = Vec::new();
        if let (Some(before), Some(after)) = (before, after) {
            if before == after {
                continue;
            }
            let [before, after] = [before, after].map(|known| known.json(name));
            differences(&before, &after, "", &mut fields);
            if fields.is_empty() {
                continue;
            }
        }
        changes.push(ObjectChange {
            kind,
            namespace: name.namespace().to_owned(),
            name: name.name().to_owned(),
            change: Change::of(before, after),
            fields,
        });
    }
    changes
}

/// Leaves out what an agent does not read, so that it is not taken for removed.
fn leave_out_of_agent(
    facts: [&Facts; 2],
    [before, after]: [&mut AllKnown; 2],
    not_compared: &mut Vec<String>,
) {
    let is_other_node = |known: &Known| matches!(known, Known::OtherNode(..));
    before.retain(|_, known| !is_other_node(known));
    after.retain(|_, known| !is_other_node(known));
    not_compared.push("other Nodes: the agent keeps only what its policies need".to_owned());
    let has_no_pods =
        |facts: &&Facts| facts.others.is_none() && !facts.policies.inventory().has_policies();
    if facts.iter().any(has_no_pods) {
        let is_of_policies = |known: &Known| matches!(known, Known::Pod(_) | Known::Namespace(..));
        before.retain(|_, known| !is_of_policies(known));
        after.retain(|_, known| !is_of_policies(known));
        let why = "Pods and Namespaces: the agent reads them only while there is a policy";
        not_compared.push(why.to_owned());
    }
}

/// Adds the paths of the fields that differ. A list whose length differs is one field.
fn differences(before: &Value, after: &Value, path: &str, found: &mut Vec<String>) {
    match (before, after) {
        (Value::Object(a), Value::Object(b)) => {
            for name in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
                let [before, after] = [a, b].map(|it| it.get(name).unwrap_or(&Value::Null));
                differences(before, after, &field(path, name), found);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (index, (before, after)) in a.iter().zip(b).enumerate() {
                differences(before, after, &format!("{path}[{index}]"), found);
            }
        }
        _ if before != after => found.push(path.to_owned()),
        _ => {}
    }
}

/// Returns the path of a field. The key of a label is quoted.
fn field(path: &str, name: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    match (name.chars().all(is_plain), path.is_empty()) {
        (false, _) => format!("{path}[{name:?}]"),
        (true, true) => name.to_owned(),
        (true, false) => format!("{path}.{name}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_that_differ_are_named_by_their_paths() {
        let before = json!({
            "metadata": { "labels": { "app": "web", "a.io/b": "1", "bad\u{1b}": "x" } },
            "spec": { "ports": [{ "port": 80 }, { "port": 81 }], "ips": ["10.0.0.1"], "none": null },
        });
        let after = json!({
            "metadata": { "labels": { "app": "web", "a.io/b": "2" } },
            "spec": { "ports": [{ "port": 80 }, { "port": 82, "name": "b" }], "ips": [] },
        });
        let mut found = Vec::new();
        differences(&before, &after, "", &mut found);
        let wanted = [
            "metadata.labels[\"a.io/b\"]",
            "metadata.labels[\"bad\\u{1b}\"]",
            "spec.ips",
            "spec.ports[1].name",
            "spec.ports[1].port",
        ];
        assert_eq!(found, wanted);
        found.clear();
        differences(&after, &after, "", &mut found);
        assert!(found.is_empty());
    }
}
