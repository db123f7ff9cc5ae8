//! Pods, namespaces and network policies.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use smallvec::SmallVec;

use super::{Labels, ObjectName, Protocol};

/// A Pod, reduced to the fields that network policies depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Namespace and name.
    pub name: ObjectName,
    /// `spec.nodeName`; absent until the pod is scheduled.
    pub node: Option<Arc<str>>,
    /// `spec.hostNetwork`: the addresses are the node's, and no policy selects the pod.
    pub host_network: bool,
    /// Whether all containers have terminated, so that the pod no longer has its addresses.
    pub ended: bool,
    /// Whether a container runs, by the status.
    pub running: bool,
    /// The evidence in the status that the pod has its addresses.
    pub evidence: Evidence,
    /// `status.podIPs` (or `podIP`), one per family at most.
    pub addresses: SmallVec<[IpAddr; 2]>,
    /// `metadata.labels`.
    pub labels: Labels,
    /// The name of the workload that manages the pod, such as its Deployment
    /// (`metadata.ownerReferences`).
    pub owner: Option<Arc<str>>,
    /// The container ports that have a name, sorted; each name once per protocol.
    pub ports: Arc<[NamedPort]>,
}

/// The evidence in a pod's status that the pod has its addresses. A status may be older than a
/// reboot of the node, so that two pods claim one address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Evidence {
    /// The sandbox, to which the addresses belong.
    pub sandbox: Sandbox,
    /// When the latest of the running containers started, in seconds since 1970.
    pub started: Option<u32>,
}

/// The state of a pod's sandbox. Of two pods with one address, the one with the greater value had
/// it last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Sandbox {
    /// It does not exist: the condition `PodReadyToStartContainers` is False and no container runs.
    Gone,
    /// The status does not say.
    #[default]
    Unknown,
    /// It ran at this time, in seconds since 1970: that of the condition, or when a container
    /// started.
    RanAt(u32),
}

impl Evidence {
    /// Returns whether a pod with this evidence took the address over from one with the other. If
    /// the condition and the containers contradict each other, neither pod outranks the other.
    pub(crate) fn outranks(&self, other: &Self) -> bool {
        self.sandbox > other.sandbox && self.started >= other.started
    }
}

/// A container port with a name (`spec.containers[].ports[]`, and of init containers that keep
/// running).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamedPort {
    /// The name.
    pub name: Arc<str>,
    /// The protocol.
    pub protocol: Protocol,
    /// `containerPort`, not 0.
    pub port: u16,
}

/// The label with the name of a namespace, which the API server sets.
pub(crate) const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// A Namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// `metadata.name`.
    pub name: ObjectName,
    /// `metadata.labels`, always with the name of the namespace (`kubernetes.io/metadata.name`).
    pub labels: Labels,
    /// The mode of its policies that have none of their own.
    pub mode: Option<PolicyMode>,
}

/// Whether a policy is enforced (annotation `nftlet.dev/mode` of a NetworkPolicy or Namespace).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PolicyMode {
    /// It denies what it does not allow.
    #[default]
    Enforce,
    /// It denies nothing. What it would deny is counted and logged.
    Audit,
}

/// A NetworkPolicy (networking.k8s.io/v1).
///
/// The source reports a rule that cannot be used and leaves it out, so that the traffic that it
/// should allow stays denied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// Namespace and name.
    pub name: ObjectName,
    /// `spec.podSelector`: the pods of the namespace that the policy applies to.
    pub pods: LabelSelector,
    /// The allowed ingress; `None` if the policy does not isolate the pods for ingress.
    pub ingress: Option<Vec<PolicyRule>>,
    /// The allowed egress; `None` if the policy does not isolate the pods for egress.
    pub egress: Option<Vec<PolicyRule>>,
    /// The mode; `None` is that of the Namespace.
    pub mode: Option<PolicyMode>,
}

/// One entry of `spec.ingress` or `spec.egress`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyRule {
    /// `from` or `to`; `None` (absent or empty in the API) allows all peers.
    pub peers: Option<Vec<Peer>>,
    /// `ports`; `None` (absent or empty in the API) allows all ports and protocols.
    pub ports: Option<Vec<PolicyPort>>,
}

/// One entry of `from` or `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Pods by their labels and those of their namespaces.
    Pods {
        /// `namespaceSelector`; `None` is the policy's own namespace.
        namespaces: Option<LabelSelector>,
        /// `podSelector`; absent beside a `namespaceSelector` it selects every pod.
        pods: LabelSelector,
    },
    /// `ipBlock`.
    Block {
        cidr: IpNet,
        /// `except`, each inside of `cidr`.
        except: Vec<IpNet>,
    },
}

/// One entry of a rule's `ports`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyPort {
    /// `protocol`.
    pub protocol: Protocol,
    /// `port` and `endPort`.
    pub port: PortMatch,
}

/// Which destination ports a [`PolicyPort`] allows.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PortMatch {
    /// All ports of the protocol (no `port`).
    Any,
    /// The first to the last port, inclusive.
    Range(u16, u16),
    /// The port of the destination pod that has this name and protocol.
    Named(Arc<str>),
}

/// A label selector: all requirements must be met. Without requirements it selects everything.
///
/// Selectors with the same requirements in another order are equal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LabelSelector(Arc<[Requirement]>);

/// One requirement of a selector; an entry of `matchLabels` is an `In` with one value.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Requirement {
    /// The label exists and has one of the values, which are sorted.
    In(Arc<str>, Vec<Arc<str>>),
    /// The label does not exist or has none of the values, which are sorted.
    NotIn(Arc<str>, Vec<Arc<str>>),
    /// The label exists.
    Exists(Arc<str>),
    /// The label does not exist.
    DoesNotExist(Arc<str>),
}

impl LabelSelector {
    /// Creates a selector that combines requirements.
    pub fn new(requirements: impl IntoIterator<Item = Requirement>) -> Self {
        let mut requirements: Vec<Requirement> = requirements
            .into_iter()
            .map(Requirement::normalised)
            .collect();
        requirements.sort_unstable();
        requirements.dedup();
        Self(requirements.into())
    }

    /// Returns the requirements, sorted.
    pub fn requirements(&self) -> &[Requirement] {
        &self.0
    }

    /// Returns whether it selects everything.
    pub(crate) fn is_everything(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns whether an object with these labels is selected.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| requirement.met(labels))
    }
}

impl Requirement {
    /// Returns whether labels meet it. As in apimachinery, `NotIn` is met where the label is
    /// absent.
    pub fn met(&self, labels: &Labels) -> bool {
        match self {
            Requirement::In(key, values) => {
                labels.get(key).is_some_and(|value| values.contains(value))
            }
            Requirement::NotIn(key, values) => {
                labels.get(key).is_none_or(|value| !values.contains(value))
            }
            Requirement::Exists(key) => labels.get(key).is_some(),
            Requirement::DoesNotExist(key) => labels.get(key).is_none(),
        }
    }

    fn normalised(mut self) -> Self {
        if let Requirement::In(_, values) | Requirement::NotIn(_, values) = &mut self {
            values.sort_unstable();
            values.dedup();
        }
        self
    }
}

impl fmt::Display for LabelSelector {
    /// Prints the notation of kubectl: `app=web,tier in (a,b),!old`; everything is `*`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_everything() {
            return f.write_str("*");
        }
        for (index, requirement) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            match requirement {
                Requirement::In(key, values) => match values.as_slice() {
                    [value] => write!(f, "{key}={value}")?,
                    values => write!(f, "{key} in ({})", values.join(","))?,
                },
                Requirement::NotIn(key, values) => match values.as_slice() {
                    [value] => write!(f, "{key}!={value}")?,
                    values => write!(f, "{key} notin ({})", values.join(","))?,
                },
                Requirement::Exists(key) => write!(f, "{key}")?,
                Requirement::DoesNotExist(key) => write!(f, "!{key}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().copied().collect()
    }

    fn texts(values: &[&str]) -> Vec<Arc<str>> {
        values.iter().map(|value| Arc::from(*value)).collect()
    }

    #[test]
    fn the_later_sandbox_outranks_unless_the_containers_contradict() {
        let of = |sandbox, started| Evidence { sandbox, started };
        let (gone, unknown) = (of(Sandbox::Gone, None), Evidence::default());
        let before = of(Sandbox::RanAt(10), Some(10));
        let after = of(Sandbox::RanAt(20), Some(20));
        // Its sandbox runs, but no container does yet.
        let ready = of(Sandbox::RanAt(30), None);
        for (stronger, weaker) in [
            (unknown, gone),
            (before, gone),
            (before, unknown),
            (after, before),
            (ready, unknown),
        ] {
            assert!(stronger.outranks(&weaker), "{stronger:?} {weaker:?}");
            assert!(!weaker.outranks(&stronger), "{stronger:?} {weaker:?}");
        }
        for (one, other) in [(after, after), (unknown, unknown), (ready, after)] {
            assert!(
                !one.outranks(&other) && !other.outranks(&one),
                "{one:?} {other:?}"
            );
        }
    }

    #[test]
    fn the_last_of_equal_keys_counts() {
        let labels = labels(&[("b", "1"), ("a", "2"), ("b", "3")]);
        assert_eq!(labels.len(), 2);
        assert_eq!(labels.get("b").map(|value| &**value), Some("3"));
        assert_eq!(labels.get("c"), None);
    }

    #[test]
    fn requirements_follow_the_api() {
        let web = labels(&[("app", "web"), ("tier", "front")]);
        let meets = |requirement| LabelSelector::new([requirement]).matches(&web);
        assert!(meets(Requirement::In("app".into(), texts(&["db", "web"]))));
        assert!(!meets(Requirement::In("app".into(), texts(&["db"]))));
        assert!(!meets(Requirement::In("zone".into(), texts(&["a"]))));
        assert!(!meets(Requirement::NotIn("app".into(), texts(&["web"]))));
        assert!(meets(Requirement::NotIn("zone".into(), texts(&["a"]))));
        assert!(meets(Requirement::Exists("tier".into())));
        assert!(!meets(Requirement::Exists("zone".into())));
        assert!(meets(Requirement::DoesNotExist("zone".into())));
        assert!(!meets(Requirement::DoesNotExist("app".into())));
        assert!(LabelSelector::default().matches(&web));
    }

    #[test]
    fn the_order_of_writing_does_not_matter() {
        let a = Requirement::In("a".into(), texts(&["2", "1"]));
        let sorted = Requirement::In("a".into(), texts(&["1", "2"]));
        let b = Requirement::DoesNotExist("b".into());
        let one = LabelSelector::new([a, b.clone()]);
        let other = LabelSelector::new([b, sorted]);
        assert_eq!(one, other);
        assert_eq!(one.to_string(), "a in (1,2),!b");
        assert_eq!(LabelSelector::default().to_string(), "*");
    }
}
