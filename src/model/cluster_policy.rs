//! Cluster network policies.

use std::sync::Arc;

use ipnet::IpNet;

use super::policy::PolicyPort;
use super::{LabelSelector, ObjectName};

/// A ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2).
///
/// The source makes it fail closed: an `Accept` rule that it does not understand is left out, and a
/// `Deny` or `Pass` rule that it does not understand denies everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterNetworkPolicy {
    /// `metadata.name`.
    pub name: ObjectName,
    /// `spec.tier`.
    pub tier: Tier,
    /// `spec.priority`: the policy with the lower number is asked first. Among equal ones the order
    /// is that of the names.
    pub priority: u16,
    /// `spec.subject.namespaces`, or `namespaceSelector` of `spec.subject.pods`.
    pub subject_namespaces: LabelSelector,
    /// `podSelector` of `spec.subject.pods`; everything with `spec.subject.namespaces`.
    pub subject_pods: LabelSelector,
    /// `spec.ingress`. Without rules the policy does not concern this direction.
    pub ingress: Vec<TierRule>,
    /// `spec.egress`. Without rules the policy does not concern this direction.
    pub egress: Vec<TierRule>,
}

/// The tier of a cluster network policy: before or after NetworkPolicies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// Before NetworkPolicies.
    Admin,
    /// Where no NetworkPolicy isolates the pod in the direction.
    Baseline,
}

/// One entry of `spec.ingress` or `spec.egress`. The first rule of a tier whose peers and protocols
/// match decides.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TierRule {
    /// `name`, for logs and messages.
    pub name: Option<Arc<str>>,
    /// `action`.
    pub action: Action,
    /// `from` or `to`; `None` (what a rule that is not understood denies) matches all peers.
    pub peers: Option<Vec<TierPeer>>,
    /// `protocols`; `None` (absent in the API) matches all traffic. A `destinationNamedPort` is an
    /// entry for each protocol.
    pub protocols: Option<Vec<PolicyPort>>,
}

/// The action of a rule that matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// Allows the traffic in this direction; nothing else is asked.
    Accept,
    /// Drops the traffic.
    Deny,
    /// Leaves the tier.
    Pass,
}

/// One entry of `from` or `to`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TierPeer {
    /// `namespaces` or `pods`: pods by their labels and those of their namespaces.
    Pods {
        /// `namespaces`, or `namespaceSelector` of `pods`.
        namespaces: LabelSelector,
        /// `podSelector` of `pods`; everything with `namespaces`.
        pods: LabelSelector,
    },
    /// `networks`, of egress only.
    Networks(Vec<IpNet>),
    /// `nodes`, of egress only: the addresses of the Nodes with these labels.
    Nodes(LabelSelector),
}
