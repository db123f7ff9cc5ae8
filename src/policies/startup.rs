//! Isolates pods from their first packet on (`--pod-startup=closed`).
//!
//! Policies apply to an address once a pod's status has it, which is seconds after the pod can send.
//! Until then nothing passes:
//!
//! ```text
//!  forward  startup ─── in the pod network, not in known-pods ──> unknown-source, unknown-destination
//!  input    startup-to-node ─ the same ─────────────────────────> unknown-source
//!                                                                   │ goto
//!                                          unknown-pod: exempt, or counted and dropped
//! ```
//!
//! - An address enters `known-pods` in the transaction that puts the policies of its pod in force,
//!   so that no packet meets one without the other.
//! - The chains exist before the lists are complete ([`Engine::early_rules`]). Addresses that an
//!   earlier process knew stay known, with the policies that it wrote.
//! - Traffic of the node to its pods passes the output hook, where it is accepted.
//!
//! [`Engine::early_rules`]: crate::engine::Engine::early_rules

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::delta::{self, TableDelta};
use super::layout::{self, Direction, STARTUP_BASES, table_id};
use super::{PolicySettings, links, rules};
use crate::model::{
    Family, HostRoute, Kind, Node, Notice, ObjectName, ObjectRef, Protocol, Reason, Subject,
};
use crate::nft::{
    BaseChain, Chain, ChainKind, Comparison, CtState, Element, Hook, Key, Name, Operand, Rule,
    Ruleset, Selector, Set, Statement, Table, Verdict, merge_intervals,
};

/// The ranges of the pod network, if it is recognised by address.
const POD_NETWORK: &str = "pod-network";
/// The addresses whose policies are in force.
const KNOWN_PODS: &str = "known-pods";
/// The chains for packets with an unknown address, by its place in the packet.
const UNKNOWN_SOURCE: &str = "unknown-source";
const UNKNOWN_DESTINATION: &str = "unknown-destination";
/// The chain that drops them.
const UNKNOWN_POD: &str = "unknown-pod";

/// Before all chains of policies and of unassigned service addresses, behind the translation of
/// every proxy on the node.
const PRIORITY: i32 = -10;

const MULTICAST_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4);
const MULTICAST_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8);

/// How the network of this node's pods is recognised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodNetwork {
    /// By address: `spec.podCIDRs` of the Node object.
    NodeCidr,
    /// By the bridge to which the pods are attached.
    BridgeInterface(Arc<str>),
    /// By the prefix of the pods' interface names.
    InterfaceNamePrefix(Arc<str>),
}

impl PodNetwork {
    /// Returns the name or prefix that interfaces of pods have; `None` if addresses are matched.
    fn interface(&self) -> Option<Operand> {
        match self {
            PodNetwork::NodeCidr => None,
            PodNetwork::BridgeInterface(name) => Some(Operand::Interface(name.clone())),
            PodNetwork::InterfaceNamePrefix(prefix) => {
                Some(Operand::InterfacePrefix(prefix.clone()))
            }
        }
    }
}

/// The pod network while it is closed to unknown addresses.
#[derive(Clone, Debug)]
pub(super) struct ClosedNetwork {
    pub(super) form: PodNetwork,
    beside_proxy: bool,
    /// The ranges of the Node object.
    pub(super) ranges: Vec<IpNet>,
    /// The ranges in the last transaction.
    pub(super) written: Vec<IpNet>,
    /// Whether the Node object was read.
    pub(super) node_read: bool,
    /// Whether the Node object was read, or is missing.
    pub(super) node_listed: bool,
    pub(super) known: BTreeSet<IpAddr>,
    /// Known addresses outside of the network, with their pods.
    pub(super) outside: BTreeMap<IpAddr, ObjectName>,
    pub(super) notices: Vec<Notice>,
}

impl ClosedNetwork {
    /// Creates a network without known addresses, if the settings close one.
    pub(super) fn new(settings: &PolicySettings) -> Option<Self> {
        let form = settings.closed.clone()?;
        Some(Self {
            form,
            beside_proxy: settings.beside_proxy,
            ranges: Vec::new(),
            written: Vec::new(),
            node_read: false,
            node_listed: false,
            known: BTreeSet::new(),
            outside: BTreeMap::new(),
            notices: Vec::new(),
        })
    }

    /// Takes over the ranges of the Node object. One without ranges does not open the network.
    pub(super) fn set_node(&mut self, node: &Node) {
        self.node_read = true;
        if !node.pod_cidrs.is_empty() {
            self.ranges.clone_from(&node.pod_cidrs);
        }
    }

    /// Records that the Node object was read, or is missing.
    pub(super) fn set_node_listed(&mut self) {
        self.node_listed = true;
    }

    /// Returns whether packets of the network can be recognised.
    pub(super) fn is_defined(&self) -> bool {
        self.form != PodNetwork::NodeCidr || !self.ranges.is_empty()
    }

    /// Returns whether an address entered `known-pods` and did not leave it.
    pub(super) fn knows(&self, address: IpAddr) -> bool {
        self.known.contains(&address)
    }

    /// Returns whether an address is outside of the network. By interface, it is if the host's route
    /// to it leads elsewhere.
    pub(super) fn is_outside(&self, address: IpAddr, routes: &[HostRoute]) -> bool {
        let link = links::interface(routes, address);
        match &self.form {
            PodNetwork::NodeCidr => !self.ranges.iter().any(|range| range.contains(&address)),
            PodNetwork::BridgeInterface(name) => link.is_some_and(|link| link != name),
            PodNetwork::InterfaceNamePrefix(prefix) => {
                link.is_some_and(|link| !link.starts_with(&**prefix))
            }
        }
    }

    pub(super) fn describe(&self) -> String {
        match &self.form {
            PodNetwork::NodeCidr => {
                let ranges: Vec<String> = self.ranges.iter().map(ToString::to_string).collect();
                format!("spec.podCIDRs of the Node ({})", ranges.join(", "))
            }
            PodNetwork::BridgeInterface(name) => format!("the bridge {name}"),
            PodNetwork::InterfaceNamePrefix(prefix) => format!("the interfaces {prefix}*"),
        }
    }

    /// Adds the chains and sets to a table of a family, with the known addresses.
    pub(super) fn add_to(&self, table: &mut Table, family: Family) {
        self.add_rules(table, family, &self.written);
        let own = self.known.iter().filter(|ip| Family::of(**ip) == family);
        let elements = own.map(|ip| Element::new(Key::address(*ip))).collect();
        if let Some(set) = table.sets.get_mut(&Name::from(KNOWN_PODS)) {
            set.elements = elements;
        }
    }

    /// Returns the rules that are needed before anything is known of pods and policies.
    pub(super) fn early_rules(&self) -> Ruleset {
        let tables = Family::ALL.map(|family| {
            let mut table = Table::default();
            self.add_rules(&mut table, family, &self.ranges);
            (table_id(family), table)
        });
        Ruleset {
            tables: tables.into(),
        }
    }

    fn add_rules(&self, table: &mut Table, family: Family, ranges: &[IpNet]) {
        if self.form == PodNetwork::NodeCidr {
            table
                .sets
                .insert(POD_NETWORK.into(), ranges_set(family, ranges));
        }
        table.sets.insert(KNOWN_PODS.into(), known_set());
        if family == Family::V6 {
            rules::add_exempt_sets(table);
        }
        let mut add = |name: &str, base: Option<BaseChain>, rules: Vec<Rule>| {
            table.chains.insert(name.into(), Chain { base, rules });
        };
        for (name, hook) in STARTUP_BASES {
            if hook == Hook::Output && !self.beside_proxy {
                continue;
            }
            let base = BaseChain {
                kind: ChainKind::Filter,
                hook,
                priority: PRIORITY,
            };
            let mut rules = vec![Rule::new([
                Statement::CtState([CtState::Established, CtState::Related].into()),
                Statement::Verdict(Verdict::Accept),
            ])];
            if hook == Hook::Output {
                // The node itself sends these.
                rules.push(Rule::new([
                    Statement::SourceIsLocal,
                    Statement::Verdict(Verdict::Accept),
                ]));
            } else {
                rules.push(self.unknown(Direction::Egress, UNKNOWN_SOURCE));
            }
            if hook != Hook::Input {
                rules.push(self.unknown(Direction::Ingress, UNKNOWN_DESTINATION));
            }
            add(name, Some(base), rules);
        }
        // Network plugins give the node addresses in the pod network, as gateways and for tunnels.
        for (name, is_local) in [
            (UNKNOWN_SOURCE, Statement::SourceIsLocal),
            (UNKNOWN_DESTINATION, Statement::DestinationIsLocal),
        ] {
            let rules = [
                Rule::new([is_local, Statement::Verdict(Verdict::Return)]),
                Rule::new([Statement::Verdict(Verdict::Goto(UNKNOWN_POD.into()))]),
            ];
            add(name, None, rules.into());
        }
        add(UNKNOWN_POD, None, unknown_pod(family));
    }

    /// Returns the rule that leads packets with an unknown address to a chain.
    fn unknown(&self, direction: Direction, chain: &str) -> Rule {
        let address = direction.pod();
        let in_network = match self.form.interface() {
            None => Statement::InSet(vec![address], Comparison::Is, POD_NETWORK.into()),
            Some(operand) => Statement::Match(direction.link(), Comparison::Is, operand),
        };
        Rule::new([
            in_network,
            Statement::InSet(vec![address], Comparison::IsNot, KNOWN_PODS.into()),
            Statement::Verdict(Verdict::Jump(chain.into())),
        ])
    }

    /// Adds the changes of the network's ranges to the deltas.
    pub(super) fn draft_ranges(&mut self, deltas: &mut [TableDelta; 2]) {
        if self.form != PodNetwork::NodeCidr || self.written == self.ranges {
            return;
        }
        for family in Family::ALL {
            let delta = delta::of(deltas, family);
            for (table, ranges) in [
                (&mut delta.before, &self.written),
                (&mut delta.after, &self.ranges),
            ] {
                let set = ranges_set(family, ranges);
                table.sets.insert(POD_NETWORK.into(), set);
            }
        }
        self.written.clone_from(&self.ranges);
    }

    /// Records whether an address is known, and adds the change to the deltas.
    pub(super) fn set_known(
        &mut self,
        address: IpAddr,
        is_known: bool,
        deltas: &mut [TableDelta; 2],
    ) {
        let changes = if is_known {
            self.known.insert(address)
        } else {
            self.known.remove(&address)
        };
        if !changes {
            return;
        }
        let delta = delta::of(deltas, Family::of(address));
        // A set on one side only would be created or deleted.
        for table in [&mut delta.before, &mut delta.after] {
            let set = table.sets.entry(KNOWN_PODS.into());
            set.or_insert_with(known_set);
        }
        let table = if is_known {
            &mut delta.after
        } else {
            &mut delta.before
        };
        if let Some(set) = table.sets.get_mut(&Name::from(KNOWN_PODS)) {
            set.elements.push(Element::new(Key::address(address)));
        }
    }

    /// Records and reports an address of a pod if it is outside of the network.
    pub(super) fn check_place(
        &mut self,
        address: IpAddr,
        pod: Option<&ObjectName>,
        routes: &[HostRoute],
    ) {
        let pod = pod.filter(|_| self.knows(address) && self.is_outside(address, routes));
        let Some(pod) = pod else {
            self.outside.remove(&address);
            return;
        };
        if self.outside.insert(address, pod.clone()).as_ref() != Some(pod) {
            self.notices.push(Notice {
                subject: Subject::Object(ObjectRef::new(Kind::Pod, pod.clone())),
                reason: Reason::OutsidePodNetwork,
                message: format!(
                    "its address {address} is outside of {}, so that it was open before it was \
                     known; choose another --detect-local-mode or --pod-startup=open",
                    self.describe()
                ),
            });
        }
    }
}

fn ranges_set(family: Family, ranges: &[IpNet]) -> Set {
    let own = ranges.iter().copied();
    let own = own.filter(|range| Family::of(range.addr()) == family);
    Set {
        declaration: layout::networks(),
        elements: merge_intervals(own),
    }
}

fn known_set() -> Set {
    Set {
        declaration: layout::addresses(),
        elements: Vec::new(),
    }
}

/// Returns the rules for packets with an unknown address: those without which a pod cannot get an
/// address or reach its link pass, all others are dropped.
fn unknown_pod(family: Family) -> Vec<Rule> {
    let to = |network: IpNet| {
        let operand = Operand::Network(network);
        Statement::Match(Selector::DestinationAddress, Comparison::Is, operand)
    };
    let dhcp = |from, to| {
        [
            rules::protocol(Protocol::Udp.number()),
            Statement::Match(
                Selector::DestinationPort,
                Comparison::Is,
                Operand::Ports(from, to),
            ),
        ]
    };
    let exempt: Vec<Vec<Statement>> = match family {
        Family::V4 => vec![
            vec![to(MULTICAST_V4.into())],
            vec![Statement::DestinationIsBroadcast],
            dhcp(67, 68).into(),
        ],
        Family::V6 => vec![vec![to(MULTICAST_V6.into())], dhcp(546, 547).into()],
    };
    let mut rules: Vec<Rule> = exempt
        .into_iter()
        .map(|mut statements| {
            statements.push(Statement::Verdict(Verdict::Accept));
            Rule::new(statements)
        })
        .collect();
    if family == Family::V6 {
        rules.extend(rules::exempt_rules());
    }
    rules.push(Rule::new([
        Statement::Counter,
        Statement::Verdict(Verdict::Drop),
    ]));
    rules
}
