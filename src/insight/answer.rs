//! The answer to a question about a connection, as the JSON has it.

use std::net::IpAddr;
use std::sync::Arc;

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::evidence::{Live, RuleName, Subjects};
use crate::model::{Kind, ObjectName};
use crate::policies::NearMiss;

/// The answer to one question. Its JSON is an interface; fields may be added.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Answer {
    pub api_version: &'static str,
    /// The source, as asked for.
    pub from: String,
    /// The addresses of the source.
    pub source_addresses: Vec<IpAddr>,
    /// The destination, as asked for, without its port.
    pub to: String,
    /// The family of all targets: `IPv4`, `IPv6` or `both`.
    pub family: &'static str,
    /// The destination port; none for every port, and for ICMP.
    pub port: Option<u16>,
    pub protocol: String,
    /// The node whose rules are explained.
    pub node: String,
    pub verdict: Verdict,
    /// Why, if all targets agree, else the code of the first one that is not allowed.
    pub code: Code,
    pub service: ServiceStep,
    pub targets: Vec<TargetAnswer>,
    /// The ports that were asked for, if no port was given and they differ.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortAnswer>,
    /// Objects at fault.
    pub warnings: Vec<String>,
    /// What was assumed because the facts lack it.
    pub assumptions: Vec<String>,
    /// What the kernel says of the connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub live: Option<Live>,
    #[serde(skip)]
    pub subjects: Subjects,
}

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// Every target can be reached.
    Allowed,
    /// Some targets can be reached.
    Partly,
    /// A policy drops it.
    Denied,
    /// The service answers with a reset or an ICMP error.
    Refused,
    /// The rules of services drop it.
    Dropped,
}

impl Verdict {
    /// Returns the word in capitals, as the text has it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Verdict::Allowed => "ALLOWED",
            Verdict::Partly => "PARTLY",
            Verdict::Denied => "DENIED",
            Verdict::Refused => "REFUSED",
            Verdict::Dropped => "DROPPED",
        }
    }

    /// Combines the verdicts of several targets.
    pub(super) fn of_all(verdicts: impl IntoIterator<Item = Self>) -> Self {
        let mut verdicts = verdicts.into_iter();
        let first = verdicts.next().unwrap_or(Verdict::Allowed);
        let mut combined = first;
        for verdict in verdicts {
            if verdict != first {
                let any_allowed = [combined, verdict]
                    .iter()
                    .any(|it| matches!(it, Verdict::Allowed | Verdict::Partly));
                combined = if any_allowed {
                    Verdict::Partly
                } else {
                    combined
                };
            }
        }
        combined
    }
}

/// Why. The names are an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum Code {
    /// No policy selects the pod for the direction.
    NoPolicy,
    /// A rule of a policy allows it.
    PolicyRule,
    /// Policies isolate the pod, and none of their rules allows it.
    PolicyNoRule,
    /// A rule of a cluster network policy denies it.
    PolicyDeny,
    /// The frontend has no endpoints.
    ServiceNoEndpoints,
    /// The frontend has no endpoints on this node, which its traffic policy asks for.
    ServiceNoLocalEndpoints,
    /// The address is a ClusterIP, but no port of it.
    ServicePortUnknown,
    /// The address is in the range of ClusterIPs, but of no service.
    ServiceAddressUnknown,
    /// The client is outside of `loadBalancerSourceRanges`.
    SourceRange,
    /// The pod connects to itself.
    SamePod,
    /// The node connects to a pod on it.
    NodeToOwnPod,
    /// The pod has the addresses of its node, and no policy selects it.
    HostNetwork,
    /// The bridge of both pods passes packets on without filtering them, so that policies that deny
    /// the connection do not apply.
    BridgeUnfiltered,
    /// No pod with this address is known.
    PodUnknown,
    /// Session affinity binds the client to one endpoint.
    Affinity,
}

/// What the rules of services do.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ServiceStep {
    pub action: Action,
    /// Address, port and protocol of the first frontend.
    pub frontend: Option<String>,
    pub name: Option<ObjectName>,
    /// The name of the service port; empty if it has none.
    pub port: Option<Arc<str>>,
    /// Whether the client's address is replaced by the node's.
    pub masquerade: bool,
    /// The node whose rules translate the connection, if its source is not on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The endpoints that get no traffic.
    pub left_out: Vec<LeftOut>,
    /// The chains and elements that decide, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rules: Option<Vec<RuleName>>,
}

/// What happens to packets of a frontend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Action {
    /// They are translated to an endpoint.
    Dnat,
    /// They are rejected.
    Reject,
    /// They are dropped.
    Drop,
    /// The destination is no service.
    #[default]
    None,
}

/// An endpoint that gets no traffic of a frontend.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct LeftOut {
    pub address: IpAddr,
    pub pod: Option<ObjectName>,
    pub reason: Exclusion,
}

/// Why an endpoint gets no traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum Exclusion {
    /// The condition `ready` is false.
    NotReady,
    /// It terminates, and others are ready.
    Terminating,
    /// It is on another node, and the traffic policy is Local.
    OtherNode,
    /// Its topology hints name other nodes or zones.
    OtherZone,
}

impl Exclusion {
    /// Returns it in words.
    pub(super) fn words(self) -> &'static str {
        match self {
            Exclusion::NotReady => "not ready",
            Exclusion::Terminating => "terminating",
            Exclusion::OtherNode => "on another node",
            Exclusion::OtherZone => "its hints name other zones or nodes",
        }
    }
}

/// What happens to connections to one endpoint, or to a destination that is no service.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TargetAnswer {
    /// The address of the source, if there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<IpAddr>,
    pub family: &'static str,
    pub address: IpAddr,
    pub port: Option<u16>,
    pub pod: Option<ObjectName>,
    /// The node of the pod.
    pub node: Option<Arc<str>>,
    pub verdict: Verdict,
    pub code: Code,
    pub egress: Decision,
    pub ingress: Decision,
}

/// What the policies of one pod decide in one direction.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Decision {
    pub verdict: Verdict,
    pub code: Code,
    /// The tier that decided.
    pub tier: Option<&'static str>,
    /// The audited policies that would deny it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub audited: Vec<PolicyName>,
    /// The policy whose rule decided, or the isolating ones.
    pub policies: Vec<PolicyName>,
    /// The number of the rule that decided, from 1.
    pub rule: Option<usize>,
    /// The rule that would allow the connection but for one condition.
    #[serde(serialize_with = "near_miss")]
    pub nearest: Option<NearMiss>,
    /// The node whose rules decide.
    pub decided_on: Option<Arc<str>>,
    /// The chains and elements that decide, if asked for and in the rules of the own node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rules: Option<Vec<RuleName>>,
}

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PolicyName {
    pub kind: Kind,
    pub name: ObjectName,
}

impl Serialize for PolicyName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let namespace = Some(self.name.namespace()).filter(|it| !it.is_empty());
        let fields = if namespace.is_some() { 3 } else { 2 };
        let mut policy = serializer.serialize_struct("PolicyName", fields)?;
        policy.serialize_field("kind", self.kind.as_str())?;
        if let Some(namespace) = namespace {
            policy.serialize_field("namespace", namespace)?;
        }
        policy.serialize_field("name", self.name.name())?;
        policy.end()
    }
}

/// Serializes a rule that fails in one condition.
fn near_miss<S: Serializer>(miss: &Option<NearMiss>, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Nearest {
        policy: PolicyName,
        /// The number of the rule, from 1.
        rule: usize,
        /// What the connection does not meet.
        failed: String,
    }
    let nearest = miss.as_ref().map(|miss| Nearest {
        policy: PolicyName {
            kind: Kind::NetworkPolicy,
            name: miss.policy().clone(),
        },
        rule: miss.rule(),
        failed: miss.failed(),
    });
    nearest.serialize(serializer)
}

/// One of several ports, where none was given.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct PortAnswer {
    /// A port or a range.
    pub port: String,
    pub protocol: String,
    /// None if both families have this answer.
    pub family: Option<&'static str>,
    pub verdict: Verdict,
    pub code: Code,
}
