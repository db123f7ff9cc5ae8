//! The ports that a question is about.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use super::Facts;
use super::names::{NameError, Place};
use super::question::{End, PortName, Question};
use super::service::Destination;
use crate::model::{Family, ObjectName, Protocol, Service};

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Ports with one protocol that all rules treat alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ports {
    /// The first and the last port; none for ICMP.
    pub range: Option<(u16, u16)>,
    /// None for ICMP.
    pub protocol: Option<Protocol>,
}

impl Ports {
    fn one(number: u16, protocol: Option<Protocol>) -> Self {
        Self {
            range: Some((number, number)),
            protocol,
        }
    }

    /// Returns the number of the protocol in packets of a family.
    pub fn protocol_number(&self, family: Family) -> u8 {
        match (self.protocol, family) {
            (Some(protocol), _) => protocol.number(),
            (None, Family::V4) => ICMP,
            (None, Family::V6) => ICMPV6,
        }
    }

    /// Returns the port that stands for all of them, at an address.
    pub fn at(&self, address: IpAddr) -> Destination {
        Destination {
            address,
            protocol: self.protocol,
            port: self.number(),
        }
    }

    /// Returns the port that stands for all of them.
    pub fn number(&self) -> Option<u16> {
        self.range.map(|(first, _)| first)
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.range {
            None => Ok(()),
            Some((first, last)) if first == last => write!(f, "{first}"),
            Some((first, last)) => write!(f, "{first}-{last}"),
        }
    }
}

/// Returns the ports that a question is about; all of them, in ranges, if it names none.
pub(super) fn ports(
    facts: &Facts,
    question: &Question,
    destinations: &[Place],
) -> Result<Vec<Ports>, NameError> {
    let protocol = question.protocol();
    let inventory = facts.policies.inventory();
    let pods = || {
        let pods = destinations.iter();
        pods.filter_map(|place| inventory.pod(place.pod.as_ref()?))
    };
    match (&question.port, &question.to) {
        (Some(PortName::Number(number)), _) => Ok(vec![Ports::one(*number, protocol)]),
        (Some(PortName::Name(port)), End::Service(name)) => {
            let found = facts.store.service(name).and_then(|service| {
                let mut ports = service.ports.iter();
                ports.find(|it| *it.name == **port && question.asks_for(it.protocol))
            });
            let found = found.ok_or_else(|| no_service_port(facts, name, port))?;
            Ok(vec![Ports::one(found.port, Some(found.protocol))])
        }
        (Some(PortName::Name(port)), to) => {
            let mut named = pods().flat_map(|pod| pod.ports.iter());
            let found = named.find(|it| *it.name == **port && question.asks_for(it.protocol));
            let found = found.ok_or_else(|| NameError::UnknownNamedPort {
                to: to.to_string(),
                port: port.clone(),
            })?;
            Ok(vec![Ports::one(found.port, Some(found.protocol))])
        }
        (None, _) if protocol.is_none() => Ok(vec![Ports {
            range: None,
            protocol,
        }]),
        (None, End::Service(name)) => {
            let service = facts.store.service(name);
            let ports = service.into_iter().flat_map(|service| &service.ports);
            let ports: Vec<Ports> = ports
                .filter(|port| question.asks_for(port.protocol))
                .map(|port| Ports::one(port.port, Some(port.protocol)))
                .collect();
            if ports.is_empty() {
                return Err(NameError::WithoutPorts(name.clone()));
            }
            Ok(ports)
        }
        (None, _) => {
            let of_policies = facts.policies.ports().into_iter();
            let of_pods = pods().flat_map(|pod| pod.ports.iter());
            let of_pods = of_pods.map(|it| (it.protocol, it.port, it.port));
            let services = facts.store.services();
            let here = services.filter(|it| destinations.iter().any(|to| has(it, to.address)));
            let of_services = here.flat_map(|it| &it.ports);
            let of_services = of_services.map(|it| (it.protocol, it.port, it.port));
            let is_node = destinations
                .iter()
                .any(|to| facts.is_of_any_node(to.address));
            let services = facts.store.services().filter(|_| is_node);
            let node_ports = services.flat_map(|service| &service.ports);
            let node_ports = node_ports.filter_map(|port| Some((port.protocol, port.node_port?)));
            let node_ports = node_ports.map(|(protocol, port)| (protocol, port, port));
            let all = of_policies
                .chain(of_pods)
                .chain(of_services)
                .chain(node_ports);
            let of_protocol = all.filter(|(of, ..)| Some(*of) == protocol);
            Ok(ranges(
                of_protocol.map(|(_, first, last)| (first, last)),
                protocol,
            ))
        }
    }
}

/// Returns whether an address is one of a service.
fn has(service: &Service, address: IpAddr) -> bool {
    let lists = [
        &service.cluster_ips,
        &service.external_ips,
        &service.load_balancer_ips,
    ];
    service.has_frontends() && lists.into_iter().flatten().any(|own| *own == address)
}

/// Divides all ports where one of some ranges begins or ends.
pub(super) fn ranges(
    named: impl Iterator<Item = (u16, u16)>,
    protocol: Option<Protocol>,
) -> Vec<Ports> {
    let mut begins = BTreeSet::from([1_u16]);
    for (first, last) in named {
        begins.insert(first.max(1));
        begins.extend(last.checked_add(1));
    }
    let begins: Vec<u16> = begins.into_iter().collect();
    let ends = begins.iter().skip(1).map(|next| next - 1).chain([u16::MAX]);
    let all = begins.iter().zip(ends);
    all.map(|(first, last)| Ports {
        range: Some((*first, last)),
        protocol,
    })
    .collect()
}

fn no_service_port(facts: &Facts, name: &ObjectName, port: &str) -> NameError {
    let service = facts.store.service(name);
    let ports = service.into_iter().flat_map(|service| &service.ports);
    let ports = ports.map(|port| {
        let number = format!("{}/{}", port.port, port.protocol);
        if port.name.is_empty() {
            number
        } else {
            format!("{} ({number})", port.name)
        }
    });
    NameError::UnknownServicePort {
        service: name.clone(),
        port: port.to_owned(),
        ports: ports.collect::<Vec<_>>().join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(named: &[(u16, u16)]) -> Vec<String> {
        let ranges = ranges(named.iter().copied(), Some(Protocol::Tcp));
        ranges.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn all_ports_are_divided_where_ranges_begin_and_end() {
        assert_eq!(texts(&[]), ["1-65535"]);
        assert_eq!(texts(&[(80, 80)]), ["1-79", "80", "81-65535"]);
        assert_eq!(
            texts(&[(8000, 8080), (8050, 65535)]),
            ["1-7999", "8000-8049", "8050-8080", "8081-65535"]
        );
        assert_eq!(texts(&[(0, 65535)]), ["1-65535"]);
    }
}
