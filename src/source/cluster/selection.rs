//! The objects of a kind that nftlet requests.

use tokio::time::Instant;

use crate::model::Kind;

/// The objects of a kind to request.
#[derive(Clone, Debug)]
pub(super) struct Selection {
    pub kind: Kind,
    /// The path of the collection.
    pub path: String,
    pub labels: Option<&'static str>,
    pub fields: Option<String>,
    /// The path that lists the kinds of the API version, for a kind that servers need not have.
    pub discovery: Option<String>,
    own: OwnNode,
}

/// The node that nftlet runs on.
#[derive(Clone, Debug)]
pub(super) struct OwnNode {
    pub name: String,
    /// Until when the first list of Nodes waits for the Node object.
    pub deadline: Instant,
}

impl Selection {
    pub(super) fn own_node(&self) -> &OwnNode {
        &self.own
    }

    /// Returns whether a Node with this name was requested.
    pub(super) fn has_node(&self, name: &str) -> bool {
        self.fields.is_none() || name == self.own.name
    }

    /// Removes the field selector, which servers before Kubernetes 1.31 do not know for Services.
    /// Returns false if it is needed, or was removed before. For Services it only filters out
    /// objects without rules.
    pub(super) fn drop_fields(&mut self) -> bool {
        self.kind == Kind::Service && self.fields.take().is_some()
    }

    /// Selects what kube-proxy does, the own Node, and all Pods. Ended pods are included, since in
    /// a selection by phase the end of a pod would look like its deletion, and the containers of a
    /// pod in phase Failed may still run.
    pub(super) fn of(kind: Kind, own: &OwnNode) -> Self {
        let (labels, fields) = match kind {
            Kind::Service => (
                Some("!service.kubernetes.io/service-proxy-name"),
                Some("spec.clusterIP!=None".to_owned()),
            ),
            Kind::EndpointSlice => (Some("!service.kubernetes.io/headless"), None),
            Kind::Node => (None, Some(format!("metadata.name={}", own.name))),
            Kind::ServiceCidr
            | Kind::Pod
            | Kind::Namespace
            | Kind::NetworkPolicy
            | Kind::ClusterNetworkPolicy => (None, None),
        };
        let prefix = if kind.group().is_empty() {
            "api"
        } else {
            "apis"
        };
        let version = format!("/{prefix}/{}", kind.api_version());
        Self {
            kind,
            path: format!("{version}/{}", kind.plural()),
            labels,
            fields,
            discovery: (kind == Kind::ClusterNetworkPolicy).then_some(version),
            own: own.clone(),
        }
    }

    /// Selects all Nodes.
    pub(super) fn all_nodes(own: &OwnNode) -> Self {
        Self {
            fields: None,
            ..Self::of(Kind::Node, own)
        }
    }
}
