//! The objects of a kind that nftlet requests.

use crate::model::Kind;

/// Which objects of a kind are asked for.
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
    /// The name of the own Node.
    pub(super) fn node_name(&self) -> &str {
        &self.node_name
    }

    /// Asks without fields from now on, because the server does not know them, as that of Services
    /// before Kubernetes 1.31. Returns false where they do more than to spare what has no rules.
    pub(super) fn spare_fields(&mut self) -> bool {
        self.kind == Kind::Service && self.fields.take().is_some()
    }

    /// What kube-proxy selects of a kind; of the nodes, the own one; all pods, also those that have
    /// ended: to a selection by phase an end looks like a deletion, and a pod whose phase is Failed
    /// may run on.
    pub(super) fn of(kind: Kind, node_name: &str) -> Self {
        let (labels, fields) = match kind {
            Kind::Service => (
                Some("!service.kubernetes.io/service-proxy-name"),
                Some("spec.clusterIP!=None".to_owned()),
            ),
            Kind::EndpointSlice => (Some("!service.kubernetes.io/headless"), None),
            Kind::Node => (None, Some(format!("metadata.name={node_name}"))),
            Kind::ServiceCidr | Kind::Pod | Kind::Namespace | Kind::NetworkPolicy => (None, None),
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
