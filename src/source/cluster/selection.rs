//! The objects of a kind that nftlet requests.

use crate::model::Kind;

/// The objects of a kind to request.
#[derive(Clone, Debug)]
pub(super) struct Selection {
    pub kind: Kind,
    /// The path of the collection.
    pub path: String,
    pub labels: Option<&'static str>,
    pub fields: Option<String>,
    node_name: String,
}

impl Selection {
    /// Returns the name of the own Node.
    pub(super) fn node_name(&self) -> &str {
        &self.node_name
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
    pub(super) fn of(kind: Kind, node_name: &str) -> Self {
        let (labels, fields) = match kind {
            Kind::Service => (
                Some("!service.kubernetes.io/service-proxy-name"),
                Some("spec.clusterIP!=None".to_owned()),
            ),
            Kind::EndpointSlice => (Some("!service.kubernetes.io/headless"), None),
            Kind::Node => (None, Some(format!("metadata.name={node_name}"))),
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
        Self {
            kind,
            path: format!("/{prefix}/{}/{}", kind.api_version(), kind.plural()),
            labels,
            fields,
            node_name: node_name.to_owned(),
        }
    }
}
