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
        // The policies of each holder must allow it.
        holders.iter().all(|holder| {
            let end = End {
                direction,
                pod,
                peer,
            };
            self.profile_allows(&holder.profile, end, connection)
        })
    }

    fn profile_allows(&self, profile: &Profile, end: End, connection: &Connection) -> bool {
        let asked = |list: &Option<Arc<TierList>>| {
            let list = list.as_ref()?;
            self.tier_allows(list, end, connection)
        };
        if let Some(decided) = asked(&profile.admin) {
            return decided;
        }
        let Some(policies) = &profile.policies else {
            return asked(&profile.baseline).unwrap_or(true);
        };
        let quarantined = |name: &ObjectName| {
            let object = ObjectRef::new(Kind::NetworkPolicy, name.clone());
            self.quarantined.contains(&object)
        };
        let in_force = policies.iter().filter(|name| !quarantined(name));
        let mut in_force = in_force.filter_map(|name| self.inventory.policy(name));
        let destination = self.destination(end, false);
        end.pod == end.peer
            || in_force.any(|policy| {
                let rules = rules_of(policy, end.direction).unwrap_or_default();
                rules.iter().any(|rule| {
                    let ports = rule.ports.as_deref();
                    self.peer_matches(policy, rule, end.peer)
                        && port_matches(ports, connection, &destination)
                })
            })
    }

    /// Returns what the policies of a tier decide; `None` if they leave it to what is asked next.
    fn tier_allows(&self, list: &TierList, end: End, connection: &Connection) -> Option<bool> {
        for name in &list.policies {
            let object = ObjectRef::new(Kind::ClusterNetworkPolicy, name.clone());
            if self.quarantined.contains(&object) {
                return Some(false);
            }
            let policy = self.inventory.cluster().get(name)?;
            let mut rules = rules_in(policy, end.direction).iter();
            let decides = rules.find(|rule| {
                let destination = self.destination(end, counts_claimants(rule));
                let ports = rule.protocols.as_deref();
                self.tier_peer_matches(rule, end.peer)
                    && port_matches(ports, connection, &destination)
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

    /// Returns the pods whose named ports count.
    fn destination(&self, end: End, claimed: bool) -> Vec<&Pod> {
        let (address, local) = match end.direction {
            Direction::Ingress => (end.pod, true),
            Direction::Egress => (end.peer, false),
        };
        self.inventory.having(address, Scope { local, claimed })
    }

    fn tier_peer_matches(&self, rule: &TierRule, address: IpAddr) -> bool {
        let Some(peers) = &rule.peers else {
            return true;
        };
        peers.iter().any(|peer| match peer {
            TierPeer::Pods { namespaces, pods } => {
                let selector = PodSelector::new(namespaces, pods);
                let scope = Scope {
                    local: false,
                    claimed: counts_claimants(rule),
                };
                let pods = self.inventory.having(address, scope);
                pods.iter()
                    .any(|pod| self.inventory.selects(&selector, pod))
            }
            TierPeer::Networks(networks) => networks.iter().any(|net| net.contains(&address)),
            TierPeer::Nodes(labels) => self.inventory.nodes().selected(labels, address),
        })
    }

    fn peer_matches(&self, policy: &NetworkPolicy, rule: &PolicyRule, address: IpAddr) -> bool {
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
                let owner = self.inventory.owner(address);
                owner.is_some_and(|pod| self.inventory.selects(&selector, pod))
            }
            Peer::Block { cidr, except } => {
                cidr.contains(&address) && !except.iter().any(|net| net.contains(&address))
            }
        })
    }
}

fn port_matches(
    ports: Option<&[PolicyPort]>,
    connection: &Connection,
    destination: &[&Pod],
) -> bool {
    let Some(ports) = ports else {
        return true;
    };
    ports.iter().any(|PolicyPort { protocol, port }| {
        protocol.number() == connection.protocol
            && match (port, connection.port) {
                (PortMatch::Any, _) => true,
                (PortMatch::Range(from, to), Some(port)) => (*from..=*to).contains(&port),
                (PortMatch::Named(name), Some(port)) => {
                    has_port(destination, name, *protocol, port)
                }
                (_, None) => false,
            }
    })
}

fn has_port(pods: &[&Pod], name: &str, protocol: Protocol, number: u16) -> bool {
    let mut ports = pods.iter().flat_map(|pod| pod.ports.iter());
    ports.any(|port| &*port.name == name && port.protocol == protocol && port.port == number)
}

/// The end of a connection at which policies are asked, and the other one.
#[derive(Clone, Copy)]
struct End {
    direction: Direction,
    pod: IpAddr,
    peer: IpAddr,
}
