//! Evaluates policies for a connection, from the objects instead of the rules.

use std::net::IpAddr;

use super::Engine;
use super::index::{Namespaces, PodSelector};
use super::layout::Direction;
use super::rules::rules_of;
use crate::model::{
    NetworkPolicy, ObjectName, Peer, Pod, PolicyPort, PolicyRule, PortMatch, Protocol,
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
        source == destination
            || (self.allows_at(Direction::Egress, source, destination, connection)
                && self.allows_at(Direction::Ingress, destination, source, connection))
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
        let destination = match direction {
            Direction::Ingress => self.inventory.local_owner(pod),
            Direction::Egress => self.inventory.owner(connection.destination),
        };
        // The policies of each holder must allow it.
        holders.iter().all(|holder| {
            let policies = holder.profile.policies.iter();
            let in_force = policies.filter(|name| !self.quarantined.contains(*name));
            let mut policies = in_force.filter_map(|name: &ObjectName| self.inventory.policy(name));
            policies.any(|policy| {
                let rules = rules_of(policy, direction).unwrap_or_default();
                rules.iter().any(|rule| {
                    self.peer_matches(policy, rule, peer)
                        && port_matches(rule, connection, destination)
                })
            })
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

fn port_matches(rule: &PolicyRule, connection: &Connection, destination: Option<&Pod>) -> bool {
    let Some(ports) = &rule.ports else {
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

fn has_port(pod: Option<&Pod>, name: &str, protocol: Protocol, number: u16) -> bool {
    let mut ports = pod.into_iter().flat_map(|pod| pod.ports.iter());
    ports.any(|port| &*port.name == name && port.protocol == protocol && port.port == number)
}
