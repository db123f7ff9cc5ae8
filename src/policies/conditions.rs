//! What the policies of a pod ask about a connection: where all answers agree, so do decisions.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;

use super::Engine;
use super::cluster::rules_in;
use super::index::{Namespaces, PodSelector};
use super::layout::Direction;
use super::plans::KnownProfiles;
use super::profile::Profile;
use super::rules::rules_of;
use crate::model::{LabelSelector, Peer, Pod, PolicyPort, PortMatch, Protocol, TierPeer};

/// The policies that apply to a pod in one direction.
#[derive(Clone, Debug)]
pub(crate) struct PodPolicies(Arc<Profile>);

impl PodPolicies {
    /// Returns what differs for other policies.
    pub fn id(&self) -> &str {
        self.0.digest()
    }
}

/// A condition about the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum PeerCondition {
    Pods(PodSelector),
    Block { cidr: IpNet, except: Vec<IpNet> },
    Nodes(LabelSelector),
}

/// The conditions in the rules of some policies for one direction.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conditions {
    pub peers: BTreeSet<PeerCondition>,
    pub ports: BTreeSet<(Protocol, u16, u16)>,
    /// Whether a rule has a port that a pod names.
    pub named_ports: bool,
}

impl Engine {
    /// Returns the policies that apply to a pod in a direction, if any do. `known` are those of earlier
    /// questions about the same objects.
    pub(crate) fn policies_of_pod(
        &self,
        pod: &Pod,
        direction: Direction,
        known: &mut KnownProfiles,
    ) -> Option<PodPolicies> {
        let profile = known.of(pod, self).get(&direction)?;
        Some(PodPolicies(profile.clone()))
    }

    /// Returns the conditions in the rules of policies, without those of audited ones, which decide
    /// nothing.
    pub(crate) fn conditions(&self, policies: &PodPolicies, direction: Direction) -> Conditions {
        let profile = &policies.0;
        let mut conditions = Conditions::default();
        for list in profile.admin.iter().chain(&profile.baseline) {
            let policies = list.policies.iter();
            let policies = policies.filter_map(|name| self.inventory.cluster().get(name));
            for rule in policies.flat_map(|policy| rules_in(policy, direction)) {
                for peer in rule.peers.iter().flatten() {
                    conditions.add_tier_peer(peer);
                }
                conditions.add_ports(rule.protocols.as_deref());
            }
        }
        let policies = profile.policies.iter().flatten();
        for policy in policies.filter_map(|name| self.inventory.policy(name)) {
            for rule in rules_of(policy, direction).unwrap_or_default() {
                for peer in rule.peers.iter().flatten() {
                    conditions.add_peer(peer, policy.name.namespace());
                }
                conditions.add_ports(rule.ports.as_deref());
            }
        }
        conditions
    }
}

impl Conditions {
    fn add_peer(&mut self, peer: &Peer, namespace: &str) {
        self.peers.insert(match peer {
            Peer::Pods { namespaces, pods } => PeerCondition::Pods(PodSelector {
                namespaces: Namespaces::new(namespaces.as_ref(), namespace),
                pods: pods.clone(),
            }),
            Peer::Block { cidr, except } => PeerCondition::Block {
                cidr: *cidr,
                except: except.clone(),
            },
        });
    }

    fn add_tier_peer(&mut self, peer: &TierPeer) {
        let block = |cidr: &IpNet| PeerCondition::Block {
            cidr: *cidr,
            except: Vec::new(),
        };
        match peer {
            TierPeer::Pods { namespaces, pods } => {
                let selector = PodSelector::new(namespaces, pods);
                self.peers.insert(PeerCondition::Pods(selector));
            }
            TierPeer::Networks(networks) => self.peers.extend(networks.iter().map(block)),
            TierPeer::Nodes(labels) => {
                self.peers.insert(PeerCondition::Nodes(labels.clone()));
            }
        }
    }

    fn add_ports(&mut self, ports: Option<&[PolicyPort]>) {
        for PolicyPort { protocol, port } in ports.unwrap_or_default() {
            match port {
                PortMatch::Any => {}
                PortMatch::Range(from, to) => {
                    self.ports.insert((*protocol, *from, *to));
                }
                PortMatch::Named(_) => self.named_ports = true,
            }
        }
    }
}
