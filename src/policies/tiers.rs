//! The chains of cluster network policies: all policies that one list of a tier asks, in one chain,
//! because a rule that passes must leave all of them, and nft cannot return from two chains.

use super::cluster::rules_in;
use super::index::PodSelector;
use super::layout::Direction;
use super::rules::rules_with;
use super::spec::SetSpec;
use crate::model::{Action, ClusterNetworkPolicy, Family, TierPeer, TierRule};
use crate::nft::{Name, Rule, Statement, Verdict};

/// Compiles the rules of a policy in the chain of its list. `accept` is the verdict of the action
/// Accept; `name_of` returns the name of the set of a specification.
pub(super) fn tier_rules(
    policy: &ClusterNetworkPolicy,
    accept: &Verdict,
    direction: Direction,
    family: Family,
    name_of: &mut impl FnMut(SetSpec) -> Name,
) -> Vec<Rule> {
    let rules = rules_in(policy, direction).iter();
    let compiled = rules.flat_map(|rule| {
        let verdict = match rule.action {
            Action::Accept => accept.clone(),
            Action::Deny => Verdict::Goto(direction.deny_cluster()),
            Action::Pass => Verdict::Return,
        };
        let claimed = counts_claimants(rule);
        let peers = rule.peers.as_deref();
        let peers = peers.map(|peers| peers_of(peers, claimed, family));
        let ports = rule.protocols.as_deref();
        rules_with(&verdict, peers, ports, direction, claimed, name_of)
    });
    compiled.collect()
}

/// Returns the rule in place of those of a policy that the kernel refused: it denies everything.
pub(super) fn closed(direction: Direction) -> Rule {
    let deny = Verdict::Goto(direction.deny_cluster());
    Rule::new([Statement::Verdict(deny)])
}

/// Returns whether a rule matches all pods that may have an address, and not only one that has it
/// for certain: in doubt, a rule denies and does not allow.
pub(super) fn counts_claimants(rule: &TierRule) -> bool {
    rule.action == Action::Deny
}

/// Returns the sets of the peers of a rule: one for each selector, and one for all networks of the
/// family.
fn peers_of(peers: &[TierPeer], claimed: bool, family: Family) -> Vec<SetSpec> {
    let mut specs = Vec::new();
    let mut blocks = Vec::new();
    for peer in peers {
        match peer {
            TierPeer::Pods { namespaces, pods } => {
                specs.push(SetSpec::pods(PodSelector::new(namespaces, pods), claimed));
            }
            TierPeer::Nodes(labels) => specs.push(SetSpec::Nodes(labels.clone())),
            TierPeer::Networks(networks) => {
                let of_family = networks.iter();
                let of_family = of_family.filter(|net| Family::of(net.addr()) == family);
                blocks.extend(of_family.map(|network| (*network, Vec::new())));
            }
        }
    }
    if !blocks.is_empty() {
        blocks.sort_unstable();
        blocks.dedup();
        specs.push(SetSpec::Blocks(blocks));
    }
    specs
}
