//! Finds the addresses of the ends of a question.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::Facts;
use super::question::End;
use crate::model::{Family, ObjectName, Pod};

/// The most names in a hint.
const MOST_HINTS: usize = 5;

/// An address of an end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub address: IpAddr,
    /// The pod by whose name it was found.
    pub pod: Option<ObjectName>,
}

/// Why an end has no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NameError {
    /// No such pod.
    #[error("there is no pod {name}{hint}")]
    UnknownPod {
        /// The name.
        name: ObjectName,
        /// What has a similar name.
        hint: String,
    },
    /// No such service, or one without an address, which an API server is not asked for.
    #[error("no service {name} is known; if it is headless, ask for its pods{hint}")]
    UnknownService {
        /// The name.
        name: ObjectName,
        /// What has a similar name.
        hint: String,
    },
    /// No such policy.
    #[error("there is no policy {0}; nftlet policies lists all")]
    UnknownPolicy(ObjectName),
    /// No pods of such an owner.
    #[error("no pod belongs to {0}; give the name of a Deployment, StatefulSet, DaemonSet or Job")]
    UnknownWorkload(ObjectName),
    /// The object has no address yet.
    #[error("{0} has no address yet; its status has no podIPs")]
    WithoutAddress(ObjectName),
    /// The service has no addresses: it is headless or an alias.
    #[error(
        "the service {0} has no address: it is headless, an ExternalName, or left to another proxy; ask for its pods"
    )]
    WithoutFrontend(ObjectName),
    /// The service has no usable port of the protocol.
    #[error("the service {0} has no port of this protocol; name one with /TCP, /UDP or /SCTP")]
    WithoutPorts(ObjectName),
    /// More pairs of addresses and ports than may be asked about at once.
    #[error(
        "the question is about {0} pairs of addresses and ports; ask about a single pod or port, or give the objects with --manifests"
    )]
    TooMany(usize),
    /// The service has no such port.
    #[error("the service {service} has no port {port}; it has {ports}")]
    UnknownServicePort {
        /// The service.
        service: ObjectName,
        /// The port that was asked for.
        port: String,
        /// Its ports.
        ports: String,
    },
    /// A name of a port, for an end without names of ports.
    #[error("{to} has no port of the name {port}; give its number")]
    UnknownNamedPort {
        /// The destination.
        to: String,
        /// The name.
        port: String,
    },
    /// The ends have addresses of different families only.
    #[error("{from} and {to} have no address of the same family")]
    OtherFamily {
        /// The source.
        from: String,
        /// The destination.
        to: String,
    },
    /// The own node has no address.
    #[error("the addresses of node {0} are unknown; the facts lack its Node object")]
    UnknownNode(String),
}

/// Returns the addresses of an end, in the order of families.
pub(super) fn places(facts: &Facts, end: &End) -> Result<Vec<Place>, NameError> {
    let mut places = match end {
        End::Address(address) => vec![Place {
            address: *address,
            pod: None,
        }],
        End::Pod(name) => {
            let pod = facts.policies.inventory().pod(name);
            let pod = pod.ok_or_else(|| no_pod(facts, name))?;
            let places = of_pod(pod);
            if places.is_empty() {
                return Err(NameError::WithoutAddress(name.clone()));
            }
            places
        }
        End::Workload(name) => {
            let pods = facts.policies.inventory().pods_of(name.namespace());
            let own = pods.filter(|pod| pod.owner.as_deref() == Some(name.name()));
            let places: Vec<Place> = own.flat_map(of_pod).collect();
            if places.is_empty() {
                return Err(NameError::UnknownWorkload(name.clone()));
            }
            places
        }
        End::Service(name) => {
            facts
                .store
                .service(name)
                .ok_or_else(|| no_service(facts, name))?;
            let slices = facts.store.slices_of(name);
            let endpoints = slices.all().flat_map(|slice| &slice.endpoints);
            let addresses: BTreeSet<IpAddr> = endpoints
                .filter(|endpoint| endpoint.ready)
                .map(|endpoint| endpoint.address)
                .collect();
            let inventory = facts.policies.inventory();
            let place = |address| Place {
                address,
                pod: inventory.owner(address).map(|pod| pod.name.clone()),
            };
            addresses.into_iter().map(place).collect()
        }
        End::Node => {
            let node = facts.store.node();
            let address = |family| node.and_then(|node| node.primary_ip(family));
            let addresses = Family::ALL.into_iter().filter_map(address);
            let places: Vec<Place> = addresses
                .map(|address| Place { address, pod: None })
                .collect();
            if places.is_empty() {
                return Err(NameError::UnknownNode(facts.node.to_owned()));
            }
            places
        }
        End::Internet => outside(facts)
            .into_iter()
            .map(|address| Place { address, pod: None })
            .collect(),
    };
    places.sort_by(|a, b| (a.address, &a.pod).cmp(&(b.address, &b.pod)));
    places.dedup();
    Ok(places)
}

fn of_pod(pod: &Pod) -> Vec<Place> {
    let addresses = pod.addresses.iter().copied();
    addresses
        .map(|address| Place {
            address,
            pod: Some(pod.name.clone()),
        })
        .collect()
}

/// Returns a family's address outside of the cluster for each set of address blocks that contains
/// one: blocks of policies and source ranges of services.
pub(super) fn outside(facts: &Facts) -> Vec<IpAddr> {
    let mut blocks: BTreeSet<IpNet> = facts.policies.blocks().into_iter().collect();
    let ranges = facts.store.services().flat_map(|it| &it.source_ranges);
    blocks.extend(ranges.copied());
    // Documentation addresses stand for everything that no block contains.
    let mut candidates: Vec<IpAddr> = vec![
        IpAddr::from([198, 51, 100, 1]),
        IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]),
    ];
    for block in &blocks {
        candidates.extend(block.hosts().next());
        candidates.extend(after(block.broadcast()));
    }
    let mut seen: BTreeSet<(Family, Vec<IpNet>)> = BTreeSet::new();
    candidates.retain(|address| {
        let within = blocks.iter().filter(|block| block.contains(address));
        !is_inside(facts, *address)
            && seen.insert((Family::of(*address), within.copied().collect()))
    });
    candidates
}

fn after(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => u32::from(v4)
            .checked_add(1)
            .map(|next| IpAddr::V4(next.into())),
        IpAddr::V6(v6) => u128::from(v6)
            .checked_add(1)
            .map(|next| IpAddr::V6(next.into())),
    }
}

/// Returns whether an address is one of the cluster's, or none of a host.
fn is_inside(facts: &Facts, address: IpAddr) -> bool {
    let family = Family::of(address);
    let node = facts.store.node().map(|node| &**node);
    let special = match address {
        IpAddr::V4(v4) => {
            v4.is_loopback() || v4.is_multicast() || v4.is_broadcast() || v4.octets()[0] == 0
        }
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_multicast() || v6.is_unspecified(),
    };
    special
        || facts.is_of_any_node(address)
        || facts
            .policies
            .inventory()
            .claimants(address)
            .next()
            .is_some()
        || facts.store.with_cluster_ip(address).is_some()
        || facts
            .store
            .service_cidrs()
            .any(|range| range.contains(&address))
        || facts
            .settings
            .pod_networks(family, node)
            .iter()
            .any(|range| range.contains(&address))
}

fn no_pod(facts: &Facts, name: &ObjectName) -> NameError {
    let mut alike: Vec<String> = Vec::new();
    if facts.policies.inventory().counts().0 == 0 {
        return NameError::UnknownPod {
            name: name.clone(),
            hint: "; no Pods are known: an agent reads them only while there is a policy. Ask for \
                   its address, or with --live or --manifests"
                .to_owned(),
        };
    }
    if facts.store.service(name).is_some() {
        alike.push(format!("svc/{name}"));
    }
    let pods = facts.policies.inventory().pods_of(name.namespace());
    let mut of_workload = false;
    let mut names: Vec<String> = pods
        .inspect(|pod| of_workload |= pod.owner.as_deref() == Some(name.name()))
        .filter(|pod| pod.name.name().starts_with(name.name()))
        .map(|pod| pod.name.to_string())
        .collect();
    if of_workload {
        alike.push(format!("deploy/{name}"));
    }
    names.sort_unstable();
    alike.extend(names);
    NameError::UnknownPod {
        name: name.clone(),
        hint: hint(&alike),
    }
}

pub(super) fn no_service(facts: &Facts, name: &ObjectName) -> NameError {
    let services = facts.store.services().map(|service| &service.name);
    let mut alike: Vec<String> = services
        .filter(|known| {
            known.name() == name.name()
                || (known.namespace() == name.namespace() && known.name().starts_with(name.name()))
        })
        .map(|known| format!("svc/{known}"))
        .collect();
    alike.sort_unstable();
    NameError::UnknownService {
        name: name.clone(),
        hint: hint(&alike),
    }
}

fn hint(alike: &[String]) -> String {
    match alike {
        [] => String::new(),
        [one] => format!("; did you mean {one}?"),
        some => {
            let more = match some.len().saturating_sub(MOST_HINTS) {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            let first: Vec<&str> = some.iter().take(MOST_HINTS).map(String::as_str).collect();
            format!("; there are {}{more}", first.join(", "))
        }
    }
}
