//! What policies decide about a connection.

use std::net::IpAddr;
use std::sync::Arc;

use super::Facts;
use super::answer::{Code, Decision, PolicyName, Verdict};
use super::rules;
use super::service::{Compiled, Source};
use crate::model::{Family, Kind, ObjectName, Tier};
use crate::policies::{self, Connection, Direction, RuleOf};

/// The tier of NetworkPolicies, between those of cluster policies.
const NETWORK_POLICY: &str = "NetworkPolicy";

/// Asks the policies of one end, which is on the node `decided_on` if that is known.
pub(super) fn decide(
    facts: &Facts,
    direction: Direction,
    connection: &Connection,
    source: &Source,
    decided_on: Option<&Arc<str>>,
    compiled: &mut Compiled,
) -> Decision {
    let decision = decided(facts, direction, connection, source, compiled);
    let rules = || rules::of_policies(facts, direction, connection, decision.code);
    Decision {
        rules: facts.rules.then(rules),
        decided_on: decided_on.cloned(),
        ..decision
    }
}

fn decided(
    facts: &Facts,
    direction: Direction,
    connection: &Connection,
    source: &Source,
    compiled: &mut Compiled,
) -> Decision {
    let end = connection.end(direction);
    let allowed = |code| Decision {
        verdict: Verdict::Allowed,
        code,
        tier: None,
        audited: Vec::new(),
        policies: Vec::new(),
        rule: None,
        nearest: None,
        decided_on: None,
        rules: None,
    };
    if facts.is_of_any_node(end) {
        return allowed(Code::HostNetwork);
    }
    let node = facts.store.node().map(|node| &**node);
    let inventory = facts.policies.inventory();
    if facts.policies.is_closed_to(end) {
        // Packets of the own node to its pods pass the hook output, which closes nothing to them.
        if direction == Direction::Ingress && source.is_node && inventory.is_own(facts.node) {
            return allowed(Code::NodeToOwnPod);
        }
        return Decision {
            verdict: Verdict::Denied,
            ..allowed(Code::PodUnknown)
        };
    }
    if inventory.claimants(end).next().is_none() && inventory.departed(end).is_none() {
        let networks = facts.settings.pod_networks(Family::of(end), node);
        let is_pod = networks.iter().any(|network| network.contains(&end));
        return allowed(if is_pod {
            Code::PodUnknown
        } else {
            Code::NoPolicy
        });
    }
    let is_node = || source.is_node || facts.is_of_any_node(source.address);
    if direction == Direction::Ingress && is_node() && is_own_node(facts, source, end) {
        return allowed(Code::NodeToOwnPod);
    }
    let by_rule = |of: RuleOf| Decision {
        tier: Some(of.tier.map_or(NETWORK_POLICY, tier_name)),
        rule: Some(of.rule),
        policies: vec![PolicyName {
            kind: match of.tier {
                Some(_) => Kind::ClusterNetworkPolicy,
                None => Kind::NetworkPolicy,
            },
            name: of.policy,
        }],
        ..allowed(Code::PolicyRule)
    };
    let engine = facts.policies;
    let audited = engine.auditing(direction, connection, &mut compiled.profiles);
    let audited = named(Kind::NetworkPolicy, audited);
    let decision = match engine.decide(direction, connection, &mut compiled.profiles) {
        policies::Decision::NotIsolated { asked } => Decision {
            policies: named(Kind::ClusterNetworkPolicy, asked),
            ..allowed(Code::NoPolicy)
        },
        policies::Decision::ToItself => allowed(Code::SamePod),
        policies::Decision::Allowed(of) => Decision {
            code: Code::PolicyRule,
            ..by_rule(of)
        },
        policies::Decision::Denied(of) => Decision {
            verdict: Verdict::Denied,
            code: Code::PolicyDeny,
            ..by_rule(of)
        },
        policies::Decision::NoRule { policies, nearest } => Decision {
            verdict: Verdict::Denied,
            tier: Some(NETWORK_POLICY),
            policies: named(Kind::NetworkPolicy, policies),
            nearest,
            ..allowed(Code::PolicyNoRule)
        },
    };
    Decision {
        audited,
        ..decision
    }
}

/// Returns whether the source is the node of the pod with an address.
pub(super) fn is_own_node(facts: &Facts, source: &Source, pod: IpAddr) -> bool {
    let inventory = facts.policies.inventory();
    let mut nodes = inventory.holders(pod).map(|pod| pod.node.as_deref());
    nodes.any(|node| match node {
        Some(node) if node == facts.node => source.is_node,
        Some(node) => inventory.node_has(node, source.address),
        None => false,
    })
}

fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Admin => "Admin",
        Tier::Baseline => "Baseline",
    }
}

fn named(kind: Kind, names: Vec<ObjectName>) -> Vec<PolicyName> {
    let names = names.into_iter();
    names.map(|name| PolicyName { kind, name }).collect()
}

/// Returns whether a bridge of the node switches the packets of a connection past the rules. Packets
/// to a service are routed, since they are sent to another address.
pub(super) fn is_bridged(facts: &Facts, connection: &Connection) -> bool {
    let mut networks = facts.unfiltered.iter();
    let ends = [&connection.source, &connection.destination];
    !facts.is_of_any_node(connection.source)
        && !facts.is_of_any_node(connection.destination)
        && networks.any(|network| ends.iter().all(|end| network.contains(*end)))
}

/// Turns a denial into what becomes of packets that no rule sees.
pub(super) fn pass(decision: &mut Decision) {
    if let Some(rules) = &mut decision.rules {
        rules.clear();
    }
    if decision.verdict != Verdict::Allowed {
        decision.verdict = Verdict::Allowed;
        decision.code = Code::BridgeUnfiltered;
    }
}
