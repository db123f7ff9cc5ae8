//! The kinds of API objects that nftlet reads, with their names in the API.

use std::fmt;

/// A kind of API objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// core/v1 Service.
    Service,
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice,
    /// core/v1 Node: this node, and all others while a policy selects nodes.
    Node,
    /// networking.k8s.io/v1 ServiceCIDR.
    ServiceCidr,
    /// core/v1 Pod.
    Pod,
    /// core/v1 Namespace.
    Namespace,
    /// networking.k8s.io/v1 NetworkPolicy.
    NetworkPolicy,
    /// policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy.
    ClusterNetworkPolicy,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 8] = [
        Kind::Service,
        Kind::EndpointSlice,
        Kind::Node,
        Kind::ServiceCidr,
        Kind::Pod,
        Kind::Namespace,
        Kind::NetworkPolicy,
        Kind::ClusterNetworkPolicy,
    ];

    /// The kinds that the rules of services are compiled from.
    pub const SERVICES: [Kind; 4] = [
        Kind::Service,
        Kind::EndpointSlice,
        Kind::Node,
        Kind::ServiceCidr,
    ];

    /// The kinds that the rules of network policies are compiled from.
    pub const POLICY: [Kind; 4] = [
        Kind::Pod,
        Kind::Namespace,
        Kind::NetworkPolicy,
        Kind::ClusterNetworkPolicy,
    ];

    /// Returns the kind whose API objects have this `kind`.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// Returns the `kind` of the API object.
    pub fn as_str(self) -> &'static str {
        self.row().0
    }

    /// Returns the `apiVersion` that nftlet reads.
    pub(crate) fn api_version(self) -> &'static str {
        self.row().1
    }

    /// Returns the API group; empty for the core group.
    pub(crate) fn group(self) -> &'static str {
        group_of(self.api_version())
    }

    /// Returns the plural, as in paths and roles.
    pub(crate) fn plural(self) -> &'static str {
        self.row().2
    }

    /// Returns whether the objects are in namespaces.
    pub(crate) fn is_namespaced(self) -> bool {
        self.row().3
    }

    fn row(self) -> (&'static str, &'static str, &'static str, bool) {
        match self {
            Self::Service => ("Service", "v1", "services", true),
            Self::EndpointSlice => (
                "EndpointSlice",
                "discovery.k8s.io/v1",
                "endpointslices",
                true,
            ),
            Self::Node => ("Node", "v1", "nodes", false),
            Self::ServiceCidr => ("ServiceCIDR", "networking.k8s.io/v1", "servicecidrs", false),
            Self::Pod => ("Pod", "v1", "pods", true),
            Self::Namespace => ("Namespace", "v1", "namespaces", false),
            Self::NetworkPolicy => (
                "NetworkPolicy",
                "networking.k8s.io/v1",
                "networkpolicies",
                true,
            ),
            Self::ClusterNetworkPolicy => (
                "ClusterNetworkPolicy",
                "policy.networking.k8s.io/v1alpha2",
                "clusternetworkpolicies",
                false,
            ),
        }
    }
}

/// Returns the group of an `apiVersion`; empty for the core group.
pub(crate) fn group_of(api_version: &str) -> &str {
    api_version.split_once('/').map_or("", |(group, _)| group)
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
