//! Evaluates policies for a connection, from the objects instead of the rules.

use std::cell::OnceCell;
use std::net::IpAddr;

use smallvec::SmallVec;

use super::Engine;
use super::inventory::Inventory;
use super::layout::Direction;
use super::spec::AddressScope;
use super::tiers::counts_claimants;
use crate::model::{
    NetworkPolicy, Peer, Pod, PolicyPort, PolicyRule, PortMatch, Protocol, TierPeer, TierRule,
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

impl Connection {
    /// Returns the address whose policies are asked in a direction.
    pub(crate) fn end(&self, direction: Direction) -> IpAddr {
        match direction {
            Direction::Egress => self.source,
            Direction::Ingress => self.destination,
        }
    }
}

impl Engine {
    /// Returns whether the policies of this node's pods allow a connection.
    pub fn allows(&self, connection: &Connection) -> bool {
        let Connection {
            source,
            destination,
            ..
        } = *connection;
        self.allows_at(Direction::Egress, source, connection)
            && self.allows_at(Direction::Ingress, destination, connection)
    }

    pub(super) fn allows_at(
        &self,
        direction: Direction,
        pod: IpAddr,
        connection: &Connection,
    ) -> bool {
        let plan = self.plans.get(&pod);
        let Some(holders) = plan.and_then(|plan| plan.holders.get(&direction)) else {
            return true;
        };
        let end = self.end(direction, connection, true);
        // The policies of each holder must allow it.
        let mut profiles = holders.iter().map(|holder| &holder.profile);
        profiles.all(|profile| self.judge(profile, &end, false).is_allowed())
    }

    /// Returns a connection as seen from one of its ends. `local` says that the pod at that end is one of
    /// this node, by whose objects alone its named ports are resolved.
    pub(super) fn end<'a>(
        &'a self,
        direction: Direction,
        connection: &'a Connection,
        local: bool,
    ) -> End<'a> {
        let (peer, local) = match direction {
            Direction::Ingress => (connection.source, local),
            Direction::Egress => (connection.destination, false),
        };
        End {
            direction,
            peer,
            peer_pods: Holders::new(&self.inventory, peer, false),
            destination_pods: Holders::new(&self.inventory, connection.destination, local),
            connection,
        }
    }

    pub(super) fn tier_peer_matches(&self, rule: &TierRule, end: &End<'_>) -> bool {
        let Some(peers) = &rule.peers else {
            return true;
        };
        peers.iter().any(|peer| match peer {
            TierPeer::Pods { namespaces, pods } => {
                let mut holders = end.peer_pods.get(counts_claimants(rule)).iter();
                holders.any(|pod| self.inventory.is_peer("", Some(namespaces), pods, pod))
            }
            TierPeer::Networks(networks) => networks.iter().any(|net| net.contains(&end.peer)),
            TierPeer::Nodes(labels) => self.inventory.nodes().selected(labels, end.peer),
        })
    }

    pub(super) fn peer_matches(
        &self,
        policy: &NetworkPolicy,
        rule: &PolicyRule,
        end: &End<'_>,
    ) -> bool {
        let Some(peers) = &rule.peers else {
            return true;
        };
        peers.iter().any(|peer| match peer {
            Peer::Pods { namespaces, pods } => {
                let own = policy.name.namespace();
                let mut holders = end.peer_pods.get(false).iter();
                holders.any(|pod| self.inventory.is_peer(own, namespaces.as_ref(), pods, pod))
            }
            Peer::Block { cidr, except } => {
                cidr.contains(&end.peer) && !except.iter().any(|net| net.contains(&end.peer))
            }
        })
    }
}

/// A connection, seen from the end at which policies are asked.
pub(super) struct End<'a> {
    pub direction: Direction,
    /// The address of the other end.
    peer: IpAddr,
    /// The pods that have it.
    peer_pods: Holders<'a>,
    /// The pods that have the destination.
    destination_pods: Holders<'a>,
    pub connection: &'a Connection,
}

/// The pods with an address. Most connections are decided without some of them.
struct Holders<'a> {
    inventory: &'a Inventory,
    address: IpAddr,
    local: bool,
    certain: OnceCell<SmallVec<[&'a Pod; 1]>>,
    claimants: OnceCell<SmallVec<[&'a Pod; 1]>>,
}

impl<'a> Holders<'a> {
    fn new(inventory: &'a Inventory, address: IpAddr, local: bool) -> Self {
        Self {
            inventory,
            address,
            local,
            certain: OnceCell::new(),
            claimants: OnceCell::new(),
        }
    }

    /// Returns the pods that certainly have the address, or may have it if `claimed`.
    fn get(&self, claimed: bool) -> &[&'a Pod] {
        let scope = AddressScope {
            local: self.local,
            claimed,
        };
        let found = if claimed {
            &self.claimants
        } else {
            &self.certain
        };
        found.get_or_init(|| self.inventory.having(self.address, scope))
    }
}

impl End<'_> {
    /// Returns whether the destination is one of some ports. `claimed` says that named ports of all
    /// pods count that may have the address.
    pub(super) fn port_matches(&self, ports: Option<&[PolicyPort]>, claimed: bool) -> bool {
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
                            let pods = self.destination_pods.get(claimed);
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
