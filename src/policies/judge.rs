//! What policies decide about a connection and why, from the objects instead of the rules.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;

use super::Engine;
use super::evaluate::{Connection, peer_matches, port_matches};
use super::layout::Direction;
use super::rules::rules_of;
use crate::model::{ObjectName, Peer, Pod, PolicyPort, PolicyRule, PortMatch, Protocol};

/// What the policies of a pod decide in one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// No policy selects the pod.
    NotIsolated,
    /// A packet of the pod to itself.
    ToItself,
    /// A rule allows it.
    Allowed(RuleOf),
    /// The pod is isolated, and no rule allows it.
    NoRule {
        /// The policies that isolate the pod, sorted by name.
        policies: Vec<ObjectName>,
        /// The first rule that fails in one condition only.
        nearest: Option<NearMiss>,
    },
}

impl Decision {
    /// Returns whether the connection is allowed.
    pub fn is_allowed(&self) -> bool {
        !matches!(self, Decision::NoRule { .. })
    }
}

/// A rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RuleOf {
    pub policy: ObjectName,
    /// The number of the rule in its list, from 1.
    pub rule: usize,
}

/// A rule that would allow a connection but for one condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NearMiss {
    pub of: RuleOf,
    /// The condition that fails, in the words of the API.
    pub failed: String,
    /// The condition that is met, if there is another.
    pub met: Option<String>,
}

impl Engine {
    /// Decides about a connection in one direction, for the pod at that end, on whichever node it
    /// is. If several pods may have the address, all of them must allow the connection.
    pub(crate) fn decide(&self, direction: Direction, connection: &Connection) -> Decision {
        let Connection {
            source,
            destination,
            ..
        } = *connection;
        let (pod, peer) = match direction {
            Direction::Egress => (source, destination),
            Direction::Ingress => (destination, source),
        };
        let mut decided = Decision::NotIsolated;
        for pod in self.subjects(pod) {
            let decision = self.decide_for(pod, direction, peer, connection);
            if !decision.is_allowed() {
                return decision;
            }
            if decided == Decision::NotIsolated {
                decided = decision;
            }
        }
        decided
    }

    /// Returns the address blocks of all policies, exceptions included.
    pub(crate) fn blocks(&self) -> Vec<IpNet> {
        let rules = self.inventory.policies().flat_map(|policy| {
            let directions = Direction::ALL.into_iter();
            directions.flat_map(|direction| rules_of(policy, direction).unwrap_or_default())
        });
        let peers = rules.flat_map(|rule| rule.peers.iter().flatten());
        let blocks = peers.filter_map(|peer| match peer {
            Peer::Block { cidr, except } => Some(except.iter().chain([cidr])),
            Peer::Pods { .. } => None,
        });
        blocks.flatten().copied().collect()
    }

    /// Returns a port of each range that a policy allows: both ends.
    pub(crate) fn ports(&self) -> BTreeSet<(Protocol, u16)> {
        let rules = self.inventory.policies().flat_map(|policy| {
            let directions = Direction::ALL.into_iter();
            directions.flat_map(|direction| rules_of(policy, direction).unwrap_or_default())
        });
        let mut found = BTreeSet::new();
        for port in rules.flat_map(|rule| rule.ports.iter().flatten()) {
            if let PortMatch::Range(from, to) = port.port {
                found.extend([(port.protocol, from), (port.protocol, to)]);
            }
        }
        found
    }

    /// Returns the pods whose policies apply to an address.
    fn subjects(&self, address: IpAddr) -> Vec<&Pod> {
        let mut pods: Vec<&Pod> = self.inventory.isolating(address).collect();
        pods.extend(self.inventory.departed(address));
        if pods.is_empty() {
            pods.extend(self.inventory.holders(address));
        }
        pods.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        pods
    }

    fn decide_for(
        &self,
        pod: &Pod,
        direction: Direction,
        peer: IpAddr,
        connection: &Connection,
    ) -> Decision {
        let policies = self.inventory.policies_for(pod);
        let isolating = policies
            .into_iter()
            .filter(|policy| rules_of(policy, direction).is_some());
        let isolating: Vec<_> = isolating.collect();
        if isolating.is_empty() {
            return Decision::NotIsolated;
        }
        if connection.source == connection.destination {
            return Decision::ToItself;
        }
        let destination = match direction {
            Direction::Ingress => Some(pod),
            Direction::Egress => self.inventory.owner(connection.destination),
        };
        let mut nearest = None;
        for policy in &isolating {
            if self.quarantined.contains(&policy.name) {
                continue;
            }
            let rules = rules_of(policy, direction).unwrap_or_default();
            for (index, rule) in rules.iter().enumerate() {
                let of = || RuleOf {
                    policy: policy.name.clone(),
                    rule: index.saturating_add(1),
                };
                let peer = peer_matches(&self.inventory, policy, rule, peer);
                let port = port_matches(rule, connection, destination);
                match (peer, port) {
                    (true, true) => return Decision::Allowed(of()),
                    (false, false) => {}
                    _ if nearest.is_some() => {}
                    (true, false) => {
                        nearest = Some(NearMiss {
                            of: of(),
                            failed: ports(rule).unwrap_or_default(),
                            met: peers(rule, direction),
                        });
                    }
                    (false, true) => {
                        nearest = Some(NearMiss {
                            of: of(),
                            failed: peers(rule, direction).unwrap_or_default(),
                            met: ports(rule),
                        });
                    }
                }
            }
        }
        Decision::NoRule {
            policies: isolating.iter().map(|policy| policy.name.clone()).collect(),
            nearest,
        }
    }
}

/// Describes the ports of a rule; `None` if it has none and so matches all.
fn ports(rule: &PolicyRule) -> Option<String> {
    let ports = rule.ports.as_ref()?;
    let texts: Vec<String> = ports.iter().map(port).collect();
    Some(texts.join(" or "))
}

fn port(port: &PolicyPort) -> String {
    let port_text = match &port.port {
        PortMatch::Any => return format!("protocol {}", port.protocol),
        PortMatch::Range(from, to) if from == to => format!("port {from}"),
        PortMatch::Range(from, to) => format!("port {from}-{to}"),
        PortMatch::Named(name) => format!("port {name}"),
    };
    match port.protocol {
        Protocol::Tcp => port_text,
        other => format!("{port_text}/{other}"),
    }
}

/// Describes the peers of a rule; `None` if it has none and so matches all. A rule with an empty list
/// matches nothing.
fn peers(rule: &PolicyRule, direction: Direction) -> Option<String> {
    let peers = rule.peers.as_ref()?;
    let texts: Vec<String> = peers.iter().map(peer).collect();
    if texts.is_empty() {
        let field = match direction {
            Direction::Ingress => "from",
            Direction::Egress => "to",
        };
        return Some(format!("{field} without a valid peer"));
    }
    Some(texts.join(" or "))
}

fn peer(peer: &Peer) -> String {
    match peer {
        Peer::Pods {
            namespaces: None,
            pods,
        } => format!("podSelector {pods}"),
        Peer::Pods {
            namespaces: Some(namespaces),
            pods,
        } if pods.is_everything() => format!("namespaceSelector {namespaces}"),
        Peer::Pods {
            namespaces: Some(namespaces),
            pods,
        } => format!("namespaceSelector {namespaces} and podSelector {pods}"),
        Peer::Block { cidr, except } => {
            let mut text = format!("ipBlock {cidr}");
            for (index, net) in except.iter().enumerate() {
                let before = if index == 0 { " except " } else { "," };
                // Writing to a string does not fail.
                let _ = write!(text, "{before}{net}");
            }
            text
        }
    }
}
