//! What policies decide about a connection and why, from the objects instead of the rules.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use smallvec::SmallVec;

use super::Engine;
use super::cluster::rules_in;
use super::evaluate::{Connection, End};
use super::layout::Direction;
use super::plans::KnownProfiles;
use super::profile::{Profile, TierList};
use super::rules::rules_of;
use super::tiers::counts_claimants;
use crate::model::{
    Action, Kind, NetworkPolicy, ObjectName, ObjectRef, Peer, Pod, PolicyPort, PolicyRule,
    PortMatch, Protocol, Tier, TierPeer,
};

/// What the policies of a pod decide in one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// No policy decides.
    NotIsolated {
        /// The cluster policies that were asked, of which no rule decides.
        asked: Vec<ObjectName>,
    },
    /// A packet of the pod to itself.
    ToItself,
    /// A rule allows it.
    Allowed(RuleOf),
    /// A rule of a cluster policy denies it.
    Denied(RuleOf),
    /// NetworkPolicies isolate the pod, and no rule of them allows it.
    NoRule {
        /// The policies, sorted by name.
        policies: Vec<ObjectName>,
        /// The first rule that fails in one condition only.
        nearest: Option<NearMiss>,
    },
}

impl Decision {
    /// Returns whether the connection is allowed.
    pub fn is_allowed(&self) -> bool {
        !matches!(self, Decision::Denied(_) | Decision::NoRule { .. })
    }
}

/// A rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RuleOf {
    pub policy: ObjectName,
    /// The tier; `None` for a NetworkPolicy.
    pub tier: Option<Tier>,
    /// The number of the rule in its list, from 1; 0 for a policy that the kernel refused, which
    /// denies everything.
    pub rule: usize,
    /// The name of the rule.
    pub name: Option<Arc<str>>,
}

/// A rule that would allow a connection but for one condition: its peers or its ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NearMiss {
    policy: Arc<NetworkPolicy>,
    index: usize,
    direction: Direction,
    ports_match: bool,
}

impl NearMiss {
    /// Returns the policy.
    pub fn policy(&self) -> &ObjectName {
        &self.policy.name
    }

    /// Returns the number of the rule in its list, from 1.
    pub fn rule(&self) -> usize {
        self.index.saturating_add(1)
    }

    /// Returns the condition that fails, in the words of the API.
    pub fn failed(&self) -> String {
        let failed = self.described(!self.ports_match);
        failed.unwrap_or_default()
    }

    /// Returns the condition that is met, if there is another.
    pub fn met(&self) -> Option<String> {
        self.described(self.ports_match)
    }

    /// Describes the ports of the rule, or its peers.
    fn described(&self, its_ports: bool) -> Option<String> {
        let rule = rules_of(&self.policy, self.direction)?.get(self.index)?;
        if its_ports {
            ports(rule)
        } else {
            peers(rule, self.direction)
        }
    }
}

/// The profiles of the pods that may have an address.
type Profiles = SmallVec<[Arc<Profile>; 1]>;

impl Engine {
    /// Decides about a connection in one direction, for the pod at that end, on whichever node it
    /// is. If several pods may have the address, all of them must allow the connection. `known` are
    /// the profiles of earlier questions about the same objects.
    pub(crate) fn decide(
        &self,
        direction: Direction,
        connection: &Connection,
        known: &mut KnownProfiles,
    ) -> Decision {
        let address = connection.end(direction);
        let (profiles, is_local) = self.profiles_at(address, direction, known);
        let end = self.end(direction, connection, is_local);
        let mut decided: Option<Decision> = None;
        for profile in profiles {
            let decision = self.judge(&profile, &end, true);
            if !decision.is_allowed() {
                return decision;
            }
            if !matches!(decision, Decision::NotIsolated { .. }) || decided.is_none() {
                decided.get_or_insert(decision);
            }
        }
        decided.unwrap_or_else(|| Decision::NotIsolated { asked: Vec::new() })
    }

    /// Returns the policies that deny a connection in one direction.
    pub(crate) fn denying(&self, direction: Direction, connection: &Connection) -> Vec<ObjectName> {
        match self.decide(direction, connection, &mut KnownProfiles::default()) {
            Decision::Denied(rule) => vec![rule.policy],
            Decision::NoRule { policies, .. } => policies,
            Decision::NotIsolated { .. } | Decision::ToItself | Decision::Allowed(_) => Vec::new(),
        }
    }

    /// Returns the profiles of the pods that may have an address, and whether they are of this node.
    fn profiles_at(
        &self,
        address: IpAddr,
        direction: Direction,
        known: &mut KnownProfiles,
    ) -> (Profiles, bool) {
        if let Some(plan) = self.plans.get(&address) {
            let holders = plan.holders.get(&direction).into_iter().flatten();
            return (holders.map(|holder| holder.profile.clone()).collect(), true);
        }
        // The rules of this node ask only pods of this node.
        let mut isolating = self.inventory.isolating(address);
        if isolating.next().is_some() || self.inventory.departed(address).is_some() {
            return (Profiles::new(), true);
        }
        let mut pods: SmallVec<[&Pod; 2]> = self.inventory.holders(address).collect();
        pods.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let is_local = pods.iter().any(|pod| self.inventory.is_local(pod));
        let profiles = pods.into_iter();
        let profiles = profiles.filter_map(|pod| known.of(pod, self).get(&direction).cloned());
        (profiles.collect(), is_local)
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
        let cluster = self.inventory.cluster().all();
        let rules = cluster.flat_map(|policy| policy.ingress.iter().chain(&policy.egress));
        let peers = rules.flat_map(|rule| rule.peers.iter().flatten());
        let networks = peers.filter_map(|peer| match peer {
            TierPeer::Networks(networks) => Some(networks),
            TierPeer::Pods { .. } | TierPeer::Nodes(_) => None,
        });
        blocks
            .flatten()
            .chain(networks.flatten())
            .copied()
            .collect()
    }

    /// Returns the ranges of ports in policies.
    pub(crate) fn ports(&self) -> BTreeSet<(Protocol, u16, u16)> {
        let rules = self.inventory.policies().flat_map(|policy| {
            let directions = Direction::ALL.into_iter();
            directions.flat_map(|direction| rules_of(policy, direction).unwrap_or_default())
        });
        let cluster = self.inventory.cluster().all();
        let tiers = cluster.flat_map(|policy| policy.ingress.iter().chain(&policy.egress));
        let ports = rules
            .flat_map(|rule| rule.ports.iter().flatten())
            .chain(tiers.flat_map(|rule| rule.protocols.iter().flatten()));
        let mut found = BTreeSet::new();
        for port in ports {
            if let PortMatch::Range(from, to) = port.port {
                found.insert((port.protocol, from, to));
            }
        }
        found
    }

    /// Decides by the policies of a pod, in the order of the tiers. `explain` says that a denial has
    /// its reasons.
    pub(super) fn judge(&self, profile: &Profile, end: &End<'_>, explain: bool) -> Decision {
        let asked = |list: &Option<Arc<TierList>>| self.judge_tier(list.as_ref()?, end);
        if let Some(decided) = asked(&profile.admin) {
            return decided;
        }
        let Some(policies) = &profile.policies else {
            return asked(&profile.baseline).unwrap_or_else(|| {
                let lists = profile.admin.iter().chain(&profile.baseline);
                let names = lists.flat_map(|list| &list.policies).filter(|_| explain);
                Decision::NotIsolated {
                    asked: names.cloned().collect(),
                }
            });
        };
        if end.connection.source == end.connection.destination {
            return Decision::ToItself;
        }
        let (allowing, nearest) = self.asked(policies, end, explain);
        match allowing {
            Some(rule) => Decision::Allowed(rule),
            None => Decision::NoRule {
                policies: if explain {
                    policies.clone()
                } else {
                    Vec::new()
                },
                nearest,
            },
        }
    }

    /// Returns the audited policies that would deny a connection in one direction, were they
    /// enforced; none if it is denied already.
    pub(crate) fn auditing(
        &self,
        direction: Direction,
        connection: &Connection,
        known: &mut KnownProfiles,
    ) -> Vec<ObjectName> {
        if !self.settings.audit {
            return Vec::new();
        }
        let address = connection.end(direction);
        let (profiles, is_local) = self.profiles_at(address, direction, known);
        let end = self.end(direction, connection, is_local);
        let mut found = Vec::new();
        for profile in profiles {
            let decision = self.judge(&profile, &end, false);
            if !decision.is_allowed() {
                return Vec::new();
            }
            // The cluster policies of tier Admin are asked first, and those of Baseline in place of
            // policies that isolate.
            let is_before = matches!(&decision,
                Decision::Allowed(of) if of.tier == Some(Tier::Admin));
            let to_itself = connection.source == connection.destination;
            if !is_before && !to_itself && self.asked(&profile.audited, &end, false).0.is_none() {
                found.extend(profile.audited.iter().cloned());
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Returns the first rule of some policies that allows a connection, or the first that fails in one
    /// condition only if `explain`.
    fn asked(
        &self,
        policies: &[ObjectName],
        end: &End<'_>,
        explain: bool,
    ) -> (Option<RuleOf>, Option<NearMiss>) {
        let is_in_force = |name: &&ObjectName| {
            let policy = || ObjectRef::new(Kind::NetworkPolicy, (*name).clone());
            self.quarantined.is_empty() || !self.quarantined.contains(&policy())
        };
        let mut nearest = None;
        let in_force = policies.iter().filter(is_in_force);
        for policy in in_force.filter_map(|name| self.inventory.policy(name)) {
            let rules = rules_of(policy, end.direction).unwrap_or_default();
            for (index, rule) in rules.iter().enumerate() {
                let peer = self.peer_matches(policy, rule, end);
                if !explain && !peer {
                    continue;
                }
                let port = end.port_matches(rule.ports.as_deref(), false);
                if peer && port {
                    return (Some(of_policy(policy, index)), None);
                }
                if explain && nearest.is_none() && (peer || port) {
                    nearest = Some(NearMiss {
                        policy: policy.clone(),
                        index,
                        direction: end.direction,
                        ports_match: port,
                    });
                }
            }
        }
        (None, nearest)
    }

    /// Returns what the policies of a tier decide; `None` if they leave it to what is asked next.
    fn judge_tier(&self, list: &TierList, end: &End<'_>) -> Option<Decision> {
        for name in &list.policies {
            let of = |rule, rule_name| RuleOf {
                policy: name.clone(),
                tier: Some(list.tier),
                rule,
                name: rule_name,
            };
            let object = ObjectRef::new(Kind::ClusterNetworkPolicy, name.clone());
            if self.quarantined.contains(&object) {
                return Some(Decision::Denied(of(0, None)));
            }
            let Some(policy) = self.inventory.cluster().get(name) else {
                continue;
            };
            let mut rules = rules_in(policy, end.direction).iter().enumerate();
            let decides = rules.find(|(_, rule)| {
                self.tier_peer_matches(rule, end)
                    && end.port_matches(rule.protocols.as_deref(), counts_claimants(rule))
            });
            let Some((index, rule)) = decides else {
                continue;
            };
            let of = of(index.saturating_add(1), rule.name.clone());
            return match rule.action {
                Action::Accept => Some(Decision::Allowed(of)),
                Action::Deny => Some(Decision::Denied(of)),
                Action::Pass => None,
            };
        }
        None
    }
}

fn of_policy(policy: &NetworkPolicy, index: usize) -> RuleOf {
    RuleOf {
        policy: policy.name.clone(),
        tier: None,
        rule: index.saturating_add(1),
        name: None,
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
