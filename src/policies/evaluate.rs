//! Evaluates policies for a connection, from the objects instead of the rules.

use std::net::IpAddr;
use std::sync::Arc;

use super::Engine;
use super::cluster::rules_in;
use super::index::{Namespaces, PodSelector};
use super::layout::Direction;
use super::profile::{Profile, TierList};
use super::rules::rules_of;
use super::spec::Scope;
use super::tiers::counts_claimants;
use crate::model::{
    Action, Kind, NetworkPolicy, ObjectName, ObjectRef, Peer, Pod, PolicyPort, PolicyRule,
    PortMatch, Protocol, TierPeer, TierRule,
};

/// A connection after DNAT and before masquerading, as the rules see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Connection {
    /// The address that opened it.
    pub source: IpAddr,
    /// The address that answers.
    pub destination: IpAddr,
    /// The IP protocol number.
    pub protocol: u8,
    /// The destination port, for a protocol that has ports.
    pub port: Option<u16>,
}

impl Engine {
    /// Whether the policies of this node's pods allow a connection.
    pub fn allows(&self, connection: &Connection) -> bool {
        let Connection {
            source,
            destination,
            ..
        } = *connection;
        self.allows_at(Direction::Egress, source, destination, connection)
            && self.allows_at(Direction::Ingress, destination, source, connection)
    }

    fn allows_at(
        &self,
        direction: Direction,
        pod: IpAddr,
        peer: IpAddr,
        connection: &Connection,
    ) -> bool {
        let plan = self.plans.get(&pod);
        let Some(holders) = plan.and_then(|plan| plan.holders.get(&direction)) else {
            return true;
        };
        let (destination, local) = match direction {
            Direction::Ingress => (pod, true),
            Direction::Egress => (peer, false),
        };
        let having = |address, local| {
            [false, true].map(|claimed| self.inventory.having(address, Scope { local, claimed }))
        };
        let end = End {
            direction,
            peer,
            peer_pods: having(peer, false),
            destination_pods: having(destination, local),
            connection,
        };
        // The policies of each holder must allow it.
        let mut profiles = holders.iter().map(|holder| &holder.profile);
        profiles.all(|profile| self.profile_allows(profile, pod == peer, &end))
    }

    fn profile_allows(&self, profile: &Profile, to_itself: bool, end: &End<'_>) -> bool {
        let asked = |list: &Option<Arc<TierList>>| self.tier_allows(list.as_ref()?, end);
        if let Some(decided) = asked(&profile.admin) {
            return decided;
        }
        let Some(policies) = &profile.policies else {
            return asked(&profile.baseline).unwrap_or(true);
        };
        let is_in_force = |name: &&ObjectName| {
            let policy = ObjectRef::new(Kind::NetworkPolicy, (*name).clone());
            !self.quarantined.contains(&policy)
        };
        let in_force = policies.iter().filter(is_in_force);
        let mut in_force = in_force.filter_map(|name| self.inventory.policy(name));
        to_itself
            || in_force.any(|policy| {
                let mut rules = rules_of(policy, end.direction).unwrap_or_default().iter();
                rules.any(|rule| {
                    self.peer_matches(policy, rule, end)
                        && end.port_matches(rule.ports.as_deref(), false)
                })
            })
    }

    /// Returns what the policies of a tier decide; `None` if they leave it to what is asked next.
    fn tier_allows(&self, list: &TierList, end: &End<'_>) -> Option<bool> {
        for name in &list.policies {
            let object = ObjectRef::new(Kind::ClusterNetworkPolicy, name.clone());
            if self.quarantined.contains(&object) {
                return Some(false);
            }
            let policy = self.inventory.cluster().get(name)?;
            let mut rules = rules_in(policy, end.direction).iter();
            let decides = rules.find(|rule| {
                self.tier_peer_matches(rule, end)
                    && end.port_matches(rule.protocols.as_deref(), counts_claimants(rule))
            });
            match decides.map(|rule| rule.action) {
                Some(Action::Accept) => return Some(true),
                Some(Action::Deny) => return Some(false),
                Some(Action::Pass) => return None,
                None => {}
            }
        }
        None
    }

    fn tier_peer_matches(&self, rule: &TierRule, end: &End<'_>) -> bool {
        let Some(peers) = &rule.peers else {
            return true;
        };
        peers.iter().any(|peer| match peer {
            TierPeer::Pods { namespaces, pods } => {
                let selector = PodSelector::new(namespaces, pods);
                let mut pods = holders(&end.peer_pods, counts_claimants(rule)).iter();
                pods.any(|pod| self.inventory.selects(&selector, pod))
            }
            TierPeer::Networks(networks) => networks.iter().any(|net| net.contains(&end.peer)),
            TierPeer::Nodes(labels) => self.inventory.nodes().selected(labels, end.peer),
        })
    }

    fn peer_matches(&self, policy: &NetworkPolicy, rule: &PolicyRule, end: &End<'_>) -> bool {
        let Some(peers) = &rule.peers else {
            return true;
        };
        peers.iter().any(|peer| match peer {
            Peer::Pods { namespaces, pods } => {
                let own = policy.name.namespace();
                let selector = PodSelector {
                    namespaces: Namespaces::new(namespaces.as_ref(), own),
                    pods: pods.clone(),
                };
                let mut pods = holders(&end.peer_pods, false).iter();
                pods.any(|pod| self.inventory.selects(&selector, pod))
            }
            Peer::Block { cidr, except } => {
                cidr.contains(&end.peer) && !except.iter().any(|net| net.contains(&end.peer))
            }
        })
    }
}

/// A connection, seen from the end at which policies are asked.
struct End<'a> {
    direction: Direction,
    /// The address of the other end.
    peer: IpAddr,
    /// The pods that have it.
    peer_pods: Holders<'a>,
    /// The pods that have the destination.
    destination_pods: Holders<'a>,
    connection: &'a Connection,
}

/// The pods that have an address for certain, and those that may have it.
type Holders<'a> = [Vec<&'a Pod>; 2];

fn holders<'a, 'p>([certain, claimants]: &'p Holders<'a>, claimed: bool) -> &'p [&'a Pod] {
    if claimed { claimants } else { certain }
}

impl End<'_> {
    /// Returns whether the destination is one of some ports. `claimed` says that named ports of all
    /// pods count that may have the address.
    fn port_matches(&self, ports: Option<&[PolicyPort]>, claimed: bool) -> bool {
        let Some(ports) = ports else {
            return true;
        };
        let Connection {
            protocol: number,
            port,
            ..
        } = *self.connection;
        ports.iter().any(
            |PolicyPort {
                 protocol,
                 port: wanted,
             }| {
                protocol.number() == number
                    && match (wanted, port) {
                        (PortMatch::Any, _) => true,
                        (PortMatch::Range(from, to), Some(port)) => (*from..=*to).contains(&port),
                        (PortMatch::Named(name), Some(port)) => {
                            let pods = holders(&self.destination_pods, claimed);
                            has_port(pods, name, *protocol, port)
                        }
                        (_, None) => false,
                    }
            },
        )
    }
}

fn has_port(pods: &[&Pod], name: &str, protocol: Protocol, number: u16) -> bool {
    let mut ports = pods.iter().flat_map(|pod| pod.ports.iter());
    ports.any(|port| &*port.name == name && port.protocol == protocol && port.port == number)
}
