//! The specifications of sets that policies share, with their names and the elements that follow
//! from them alone.

use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;

use super::index::{Namespaces, PodSelector};
use super::layout::port_key;
use crate::model::{LabelSelector, Protocol};
use crate::nft::{Declaration, Element, Key, Name, Selector, SetKind, digest_of, merge_intervals};

/// The specification of a set: the elements that it contains.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum SetSpec {
    /// The addresses of the pods that a selector selects.
    Pods(PodSelector),
    /// The same, with addresses that such a pod only may have, because another one claims them. For
    /// rules that deny.
    Claimants(PodSelector),
    /// The addresses of the nodes with these labels.
    Nodes(LabelSelector),
    /// The addresses in networks, each without its exceptions.
    Blocks(Vec<(IpNet, Vec<IpNet>)>),
    /// Ports of a protocol, in sorted, disjoint ranges. A set of (protocol, range) for all
    /// protocols would be a concatenation with an interval, which the kernel fills in quadratic
    /// time.
    Ports(Protocol, Vec<PortRange>),
    /// (address, protocol, port) of the named ports of pods.
    NamedPorts {
        /// The names with their protocols.
        ports: Vec<(Arc<str>, Protocol)>,
        /// Whether only pods of this node are in it; ingress needs no others.
        local: bool,
    },
    /// The same, with addresses that such a pod only may have.
    ClaimedPorts {
        /// The names with their protocols.
        ports: Vec<(Arc<str>, Protocol)>,
        /// Whether only pods of this node are in it.
        local: bool,
    },
}

/// Which addresses of a pod are in a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct AddressScope {
    /// Only addresses of pods of this node.
    pub local: bool,
    /// Also addresses that another pod may have.
    pub claimed: bool,
}

impl SetSpec {
    /// Returns the specification of the pods that a selector selects. `claimed` adds addresses that
    /// they only may have.
    pub fn pods(selector: PodSelector, claimed: bool) -> Self {
        if claimed {
            SetSpec::Claimants(selector)
        } else {
            SetSpec::Pods(selector)
        }
    }

    /// Returns the specification of named ports.
    pub fn named_ports(ports: Vec<(Arc<str>, Protocol)>, scope: AddressScope) -> Self {
        let AddressScope { local, claimed } = scope;
        if claimed {
            SetSpec::ClaimedPorts { ports, local }
        } else {
            SetSpec::NamedPorts { ports, local }
        }
    }
}

/// First and last port of a range.
pub(super) type PortRange = (u16, u16);

impl fmt::Display for SetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SetSpec::Pods(PodSelector { namespaces, pods })
            | SetSpec::Claimants(PodSelector { namespaces, pods }) => {
                if let SetSpec::Claimants(_) = self {
                    f.write_str("claimants of ")?;
                }
                match namespaces {
                    Namespaces::Named(name) => write!(f, "pods {pods} in namespace {name}"),
                    Namespaces::Labelled(labels) => write!(f, "pods {pods} in namespaces {labels}"),
                }
            }
            SetSpec::Nodes(labels) => write!(f, "nodes {labels}"),
            SetSpec::Blocks(blocks) => {
                f.write_str("blocks")?;
                for (block, except) in blocks {
                    write!(f, " {block}")?;
                    for (index, except) in except.iter().enumerate() {
                        write!(f, "{}{except}", if index == 0 { " except " } else { "," })?;
                    }
                }
                Ok(())
            }
            SetSpec::Ports(protocol, ranges) => {
                write!(f, "{protocol} ports")?;
                for (from, to) in ranges {
                    write!(f, " {from}")?;
                    if from != to {
                        write!(f, "-{to}")?;
                    }
                }
                Ok(())
            }
            SetSpec::NamedPorts { ports, local } | SetSpec::ClaimedPorts { ports, local } => {
                f.write_str(match self {
                    SetSpec::ClaimedPorts { .. } => "claimed ports",
                    _ => "ports",
                })?;
                for (name, protocol) in ports {
                    write!(f, " {name} ({protocol})")?;
                }
                f.write_str(if *local {
                    " of pods of this node"
                } else {
                    " of all pods"
                })
            }
        }
    }
}

/// Returns the elements that do not depend on pods or nodes.
pub(super) fn fixed_elements(spec: &SetSpec) -> Vec<Element> {
    match spec {
        SetSpec::Blocks(blocks) => merge_intervals(remaining(blocks)),
        SetSpec::Ports(_, ranges) => {
            let key = |port| Key::build().port(port).finish();
            let is_interval = has_ranges(ranges);
            let elements = ranges.iter().map(|(from, to)| Element {
                key_end: is_interval.then(|| Box::new(key(*to))),
                ..Element::new(key(*from))
            });
            elements.collect()
        }
        SetSpec::Pods(_)
        | SetSpec::Claimants(_)
        | SetSpec::Nodes(_)
        | SetSpec::NamedPorts { .. }
        | SetSpec::ClaimedPorts { .. } => Vec::new(),
    }
}

fn has_ranges(ranges: &[PortRange]) -> bool {
    ranges.iter().any(|(from, to)| from != to)
}

/// Returns the networks of the blocks, each without its own exceptions.
fn remaining(blocks: &[(IpNet, Vec<IpNet>)]) -> Vec<IpNet> {
    let mut remaining = Vec::new();
    for (block, except) in blocks {
        // Sorted and disjoint, so that those inside of a network are adjacent.
        let except = IpNet::aggregate(&except.iter().map(IpNet::trunc).collect());
        subtract(block.trunc(), &except, &mut remaining);
    }
    remaining
}

/// Splits a network until each part is completely inside or outside of an exception.
fn subtract(network: IpNet, except: &[IpNet], remaining: &mut Vec<IpNet>) {
    let (first, last) = (network.network(), network.broadcast());
    let from = except.partition_point(|net| net.broadcast() < first);
    let to = except.partition_point(|net| net.network() <= last);
    let Some(inside @ [one, ..]) = except.get(from..to) else {
        remaining.push(network);
        return;
    };
    if one.contains(&network) {
        return;
    }
    if let Ok(halves) = network.subnets(network.prefix_len().saturating_add(1)) {
        for half in halves {
            subtract(half, inside, remaining);
        }
    }
}

pub(super) fn name(spec: &SetSpec) -> Name {
    let prefix = match spec {
        SetSpec::Pods(_) => "pods",
        SetSpec::Claimants(_) => "claimants",
        SetSpec::Nodes(_) => "nodes",
        SetSpec::Blocks(_) => "blocks",
        SetSpec::Ports(..) => "ports",
        SetSpec::NamedPorts { .. } => "named-ports",
        SetSpec::ClaimedPorts { .. } => "claimed-ports",
    };
    // The printed form is ambiguous for names that the API server would refuse, but files can
    // contain.
    Name::from(format!("{prefix}-{}", digest_of(&format!("{spec:?}"))))
}

pub(super) fn declaration(spec: &SetSpec) -> Declaration {
    let declaration = match spec {
        SetSpec::Pods(_) | SetSpec::Claimants(_) | SetSpec::Nodes(_) => {
            Declaration::new(SetKind::Set, [Selector::SourceAddress])
        }
        SetSpec::Blocks(_) => Declaration {
            interval: true,
            ..Declaration::new(SetKind::Set, [Selector::SourceAddress])
        },
        SetSpec::Ports(_, ranges) => Declaration {
            interval: has_ranges(ranges),
            ..Declaration::new(SetKind::Set, [Selector::DestinationPort])
        },
        SetSpec::NamedPorts { .. } | SetSpec::ClaimedPorts { .. } => {
            Declaration::new(SetKind::Set, port_key())
        }
    };
    declaration.comment(&spec.to_string())
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn exceptions_are_cut_out() {
        let block = |net: &str, except: &[&str]| (net.parse().unwrap(), nets(except));
        let blocks = [
            block("10.0.0.0/30", &["10.0.0.1/32"]),
            block("192.168.0.0/24", &["192.168.0.0/24"]),
            block("172.16.0.0/31", &["172.16.0.0/32", "172.0.0.0/8"]),
            block("fd00::/64", &[]),
        ];
        assert_eq!(
            remaining(&blocks),
            nets(&["10.0.0.0/32", "10.0.0.2/31", "fd00::/64"])
        );
        let host = [block("10.0.0.7/32", &["10.0.0.7/32"])];
        assert!(remaining(&host).is_empty());
        let nested = [block(
            "10.0.0.0/29",
            &["10.0.0.0/30", "10.0.0.1/32", "10.0.0.7/32"],
        )];
        assert_eq!(remaining(&nested), nets(&["10.0.0.4/31", "10.0.0.6/32"]));
    }

    #[test]
    fn the_cost_of_exceptions_grows_with_their_number() {
        // Every second address: nothing can be joined. Pair by pair this would be 10^10 steps.
        let hosts = (0..100_000u32).map(|host| 0x0a00_0000 + 2 * host);
        let except: Vec<IpNet> = hosts
            .map(|host| IpNet::from(IpAddr::V4(host.into())))
            .collect();
        let block = ("10.0.0.0/8".parse().unwrap(), except);
        let left = merge_intervals(remaining(&[block]));
        assert_eq!(left.len(), 100_000);
    }
}
