//! The chains of the policy tables.

use std::collections::BTreeMap;
use std::sync::Arc;

use smallvec::SmallVec;

use super::index::{Namespaces, PodSelector};
use super::layout::{
    Direction, EXEMPT, ISOLATED, STARTUP_BASES, TO_ITSELF, addresses, counted, ends, ends_key,
    icmp6_types, layered, links, pods, port_key,
};
use super::profile::{Profile, RulesOf};
use super::spec::{AddressScope, PortRange, SetSpec};
use super::{DenyWith, PolicySettings};
use crate::model::{
    Family, NetworkPolicy, Peer, PolicyPort, PolicyRule, PortMatch, Protocol, Tier,
};
use crate::nft::{
    BaseChain, Chain, ChainKind, Comparison, CtState, Element, Hook, Key, Name, Operand,
    RejectWith, Rule, Selector, Set, Statement, Table, Verdict,
};
use ipnet::{IpNet, Ipv6Net};
use std::net::Ipv6Addr;

/// `filter`: behind the translation of destinations, before that of sources.
const FILTER: i32 = 0;
/// Behind IPVS, which takes the packets of services in the input hook at the priority 99, and behind
/// the translation of sources there.
const BEHIND_IPVS: i32 = 101;
const ICMPV6: u8 = 58;
/// `fe80::/10`, without its length.
const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0);

/// The average number of logged packets per second, for each direction and family.
const LOGS_PER_SECOND: u32 = 10;
/// The number of packets that may exceed that rate.
const LOG_BURST: u32 = 20;
/// The number of logged bytes of a packet: its headers.
const LOG_BYTES: u32 = 128;

/// The average number of rejected packets per second, for each direction and family, and for TCP and
/// the other protocols. It bounds what a scan or a flood with forged sources makes this node send.
const REJECTS_PER_SECOND: u32 = 100;
/// The number of packets that may exceed that rate.
const REJECT_BURST: u32 = 100;

/// The statements that match ports.
type Statements = SmallVec<[Statement; 2]>;

/// Returns the table of a family without isolated pods.
pub(super) fn skeleton(family: Family, settings: &PolicySettings) -> Table {
    let mut table = Table::default();
    for direction in Direction::ALL {
        let counters = Set {
            declaration: counted(),
            elements: Vec::new(),
        };
        table.sets.insert(direction.denied(), counters);
        table.chains.extend(deny_chains(direction, settings));
    }
    if settings.audit {
        table
            .chains
            .extend(Direction::ALL.map(|it| audit_chain(it, settings)));
    }
    let itself = Set {
        declaration: ends(),
        elements: Vec::new(),
    };
    table.sets.insert(TO_ITSELF.into(), itself);
    if settings.strict {
        let set = Set {
            declaration: addresses(),
            elements: Vec::new(),
        };
        table.sets.insert(ISOLATED.into(), set);
    }
    if family == Family::V6 {
        add_exempt_sets(&mut table);
        for direction in Direction::ALL {
            let set = Set {
                declaration: links(),
                elements: Vec::new(),
            };
            table.sets.insert(direction.links(), set);
        }
    }
    for direction in Direction::ALL {
        add_layer(&mut table, family, direction, 0, settings);
    }
    table
}

/// Adds the types of the messages that no policy applies to.
pub(super) fn add_exempt_sets(table: &mut Table) {
    for exempt in EXEMPT {
        let elements = exempt
            .types
            .iter()
            .map(|number| Element::new(Key::build().icmp6_type(*number).finish()));
        let set = Set {
            declaration: icmp6_types(),
            elements: elements.collect(),
        };
        table.sets.insert(exempt.set.into(), set);
    }
}

/// Returns the rules that accept these messages.
pub(super) fn exempt_rules() -> impl Iterator<Item = Rule> {
    EXEMPT.into_iter().map(|exempt| {
        Rule::new([
            protocol(ICMPV6),
            Statement::InSet(vec![Selector::Icmp6Type], Comparison::Is, exempt.set.into()),
            Statement::HopLimit(exempt.hop_limit),
            Statement::Verdict(Verdict::Accept),
        ])
    })
}

/// Adds the base chains for the first, second or a further holder of an address.
///
/// `accept` ends only the current base chain. So the egress policies of the sender are followed by
/// the ingress policies of the receiver, and those of the first holder of an address by those of
/// the next.
pub(super) fn add_layer(
    table: &mut Table,
    family: Family,
    direction: Direction,
    layer: usize,
    settings: &PolicySettings,
) {
    table.sets.entry(direction.pods(layer)).or_insert(Set {
        declaration: pods(),
        elements: Vec::new(),
    });
    for (name, hook, priority) in bases(direction, settings.beside_proxy) {
        let base = Some(BaseChain {
            kind: ChainKind::Filter,
            hook: *hook,
            priority: *priority,
        });
        let rules = base_rules(family, direction, *hook, layer, settings);
        table
            .chains
            .insert(layered(name, layer), Chain { base, rules });
    }
}

/// Returns name, hook and priority of the base chains of a direction.
///
/// IPVS takes packets of services from the input hook, translates them, and sends them through the
/// output hook in place of the forward hook. So beside a proxy, the input hook is judged behind it.
fn bases(direction: Direction, beside_proxy: bool) -> &'static [(&'static str, Hook, i32)] {
    match (direction, beside_proxy) {
        (Direction::Egress, false) => &[
            ("egress", Hook::Forward, FILTER),
            ("egress-to-node", Hook::Input, FILTER),
        ],
        (Direction::Egress, true) => &[
            ("egress", Hook::Forward, FILTER),
            ("egress-to-node", Hook::Input, BEHIND_IPVS),
            ("egress-by-ipvs", Hook::Output, FILTER),
        ],
        (Direction::Ingress, false) => &[("ingress", Hook::Forward, FILTER + 1)],
        (Direction::Ingress, true) => &[
            ("ingress", Hook::Forward, FILTER + 1),
            ("ingress-by-ipvs", Hook::Output, FILTER + 1),
        ],
    }
}

/// Returns whether this is the name of a base chain in the policy tables of this or an earlier
/// version of nftlet. At start, other base chains are removed before the first lists; a former name
/// must therefore stay in this list.
pub(crate) fn is_base_chain(name: &Name) -> bool {
    let all = |direction| [false, true].map(|beside_proxy| bases(direction, beside_proxy));
    let mut bases = Direction::ALL.into_iter().flat_map(all).flatten();
    bases.any(|(base, ..)| {
        let layer = name.as_str().strip_prefix(base);
        layer.is_some_and(|layer| {
            let number = layer.strip_prefix('-').map(str::parse::<usize>);
            layer.is_empty() || matches!(number, Some(Ok(_)))
        })
    }) || STARTUP_BASES.iter().any(|(base, _)| name.as_str() == *base)
}

fn base_rules(
    family: Family,
    direction: Direction,
    hook: Hook,
    layer: usize,
    settings: &PolicySettings,
) -> Vec<Rule> {
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
    }
    if family == Family::V6 {
        rules.extend(exempt_rules());
        // Every pod has a link-local address, which is not in its status. It does not identify the
        // pod, so the interface is matched instead, and the packet is denied.
        let link_local = IpNet::V6(Ipv6Net::new_assert(LINK_LOCAL, 10));
        rules.push(Rule::new([
            Statement::Match(
                direction.pod(),
                Comparison::Is,
                Operand::Network(link_local),
            ),
            Statement::InSet(vec![direction.link()], Comparison::Is, direction.links()),
            Statement::Verdict(Verdict::Goto(direction.deny())),
        ]));
    }
    if settings.strict {
        // A packet of a connection that was cut must not open a new one. Untracked connections are
        // never cut.
        for end in [Selector::SourceAddress, Selector::DestinationAddress] {
            rules.push(Rule::new([
                Statement::CtState([CtState::Invalid, CtState::New].into()),
                protocol(Protocol::Tcp.number()),
                Statement::TcpNotOpening,
                Statement::InSet(vec![end], Comparison::Is, ISOLATED.into()),
                Statement::Verdict(Verdict::Drop),
            ]));
        }
    }
    rules.push(Rule::new([Statement::VerdictMap(
        vec![direction.pod()],
        direction.pods(layer),
    )]));
    rules
}

/// Returns the chain that denies what no policy allows, and that for what cluster policies deny, which
/// gets no answer.
pub(super) fn deny_chains(direction: Direction, settings: &PolicySettings) -> [(Name, Chain); 2] {
    [
        (direction.deny(), settings.deny_with),
        (direction.deny_cluster(), DenyWith::Drop),
    ]
    .map(|(name, with)| {
        let rules = deny(direction, with, settings);
        (name, Chain { base: None, rules })
    })
}

/// Returns the chain for what audited policies would deny.
fn audit_chain(direction: Direction, settings: &PolicySettings) -> (Name, Chain) {
    let name = direction.audit();
    let log = settings
        .audit_log_group
        .map(|group| log(name.as_str(), group));
    let accept = Rule::new([Statement::Verdict(Verdict::Accept)]);
    let rules = log.into_iter().chain([accept]).collect();
    (name, Chain { base: None, rules })
}

/// Returns the rule that logs packets up to a rate.
fn log(prefix: &str, group: u16) -> Rule {
    Rule::new([
        Statement::Limit {
            per_second: LOGS_PER_SECOND,
            burst: LOG_BURST,
        },
        Statement::Log {
            prefix: prefix.into(),
            group,
            snaplen: LOG_BYTES,
        },
    ])
}

fn deny(direction: Direction, with: DenyWith, settings: &PolicySettings) -> Vec<Rule> {
    let mut rules = Vec::new();
    if let Some(group) = settings.log_group {
        rules.push(log(direction.as_str(), group));
    }
    let count = Statement::InSet(vec![direction.pod()], Comparison::Is, direction.denied());
    let drop = Statement::Verdict(Verdict::Drop);
    match with {
        DenyWith::Drop => rules.push(Rule::new([count, drop.clone()])),
        DenyWith::Reject => {
            rules.push(Rule::new([count]));
            rules.extend(reject());
        }
    }
    rules.push(Rule::new([drop]));
    rules
}

/// Returns the rules that reject packets up to a rate, and continue for the others.
///
/// The reset or ICMP error itself passes: the kernel attaches it to the connection of the rejected
/// packet, which makes it `related` and translates its addresses back.
fn reject() -> [Rule; 2] {
    [
        (Comparison::Is, RejectWith::TcpReset),
        (Comparison::IsNot, RejectWith::AdminProhibited),
    ]
    .map(|(comparison, with)| {
        Rule::new([
            Statement::Match(
                Selector::L4Protocol,
                comparison,
                Operand::Protocol(Protocol::Tcp.number()),
            ),
            Statement::Limit {
                per_second: REJECTS_PER_SECOND,
                burst: REJECT_BURST,
            },
            Statement::Reject(with),
        ])
    })
}

pub(super) fn protocol(number: u8) -> Statement {
    Statement::Match(
        Selector::L4Protocol,
        Comparison::Is,
        Operand::Protocol(number),
    )
}

/// Returns the chain of the isolated pods with a profile.
///
/// It asks the cluster policies of the tier Admin. If policies isolate the pods, it then accepts
/// packets of a pod to itself and packets that a policy allows, and denies all others; otherwise it
/// asks the cluster policies of the tier Baseline. What these accept, audited policies are asked
/// about; what none of them allows is counted and logged. A packet of a pod to itself is on the host
/// only if it was sent to a service; cluster policies apply to it.
pub(super) fn pods_chain(direction: Direction, profile: &Profile) -> Chain {
    let mut rules = Vec::new();
    let mut lead = |verdict| rules.push(Rule::new([Statement::Verdict(verdict)]));
    if let Some(admin) = profile.tier(Tier::Admin) {
        lead(Verdict::Jump(admin.chain(direction)));
    }
    match profile.tier(Tier::Baseline) {
        Some(baseline @ RulesOf::TierBeforeAudit(_)) => {
            lead(Verdict::Jump(baseline.chain(direction)));
        }
        Some(baseline) => lead(Verdict::Goto(baseline.chain(direction))),
        None => {}
    }
    let policies = profile.policies.as_ref();
    let audited = Some(&profile.audited).filter(|audited| !audited.is_empty());
    if let Some(policies) = policies.or(audited) {
        rules.push(Rule::new([
            Statement::InSet(ends_key(), Comparison::Is, TO_ITSELF.into()),
            Statement::Verdict(Verdict::Accept),
        ]));
        rules.extend(policies.iter().map(|policy| {
            let chain = direction.policy_chain(policy);
            Rule::new([Statement::Verdict(Verdict::Jump(chain))])
        }));
        let end = if audited.is_some() {
            let counted = profile.audited_set(direction);
            Rule::new([
                Statement::InSet(vec![direction.pod()], Comparison::Is, counted),
                Statement::Verdict(Verdict::Goto(direction.audit())),
            ])
        } else {
            Rule::new([Statement::Verdict(Verdict::Goto(direction.deny()))])
        };
        rules.push(end);
    }
    Chain { base: None, rules }
}

/// Returns the rules of a policy for one direction; `None` if it does not apply to that direction.
pub(super) fn rules_of(policy: &NetworkPolicy, direction: Direction) -> Option<&[PolicyRule]> {
    match direction {
        Direction::Ingress => policy.ingress.as_deref(),
        Direction::Egress => policy.egress.as_deref(),
    }
}

/// Compiles the rules of a policy in one family, which accept what the policy allows. `name_of`
/// returns the name of the set of a specification.
pub(super) fn policy_rules(
    policy: &NetworkPolicy,
    direction: Direction,
    family: Family,
    name_of: &mut impl FnMut(SetSpec) -> Name,
) -> Vec<Rule> {
    let rules = rules_of(policy, direction).unwrap_or_default().iter();
    let compiled = rules.flat_map(|rule| {
        let peers = rule.peers.as_ref();
        let peers = peers.map(|peers| peers_of(peers, policy.name.namespace(), family));
        let ports = rule.ports.as_deref();
        rules_with(&Verdict::Accept, peers, ports, direction, false, name_of)
    });
    compiled.collect()
}

/// Returns the rules that give a verdict to what comes from or goes to some peers at some ports;
/// `None` is any. `claimed` adds pods that only may have an address.
pub(super) fn rules_with(
    verdict: &Verdict,
    peers: Option<Vec<SetSpec>>,
    ports: Option<&[PolicyPort]>,
    direction: Direction,
    claimed: bool,
    name_of: &mut impl FnMut(SetSpec) -> Name,
) -> Vec<Rule> {
    let peers: Vec<Option<Statement>> = match peers {
        None => vec![None],
        Some(specs) => {
            let statements = specs.into_iter().map(|spec| {
                let set = name_of(spec);
                Statement::InSet(vec![direction.peer()], Comparison::Is, set)
            });
            statements.map(Some).collect()
        }
    };
    let ports: Vec<Statements> = match ports {
        None => vec![Statements::new()],
        Some(ports) => ports_of(ports, direction, claimed, name_of),
    };
    let mut rules = Vec::new();
    for peer in &peers {
        for port in &ports {
            let verdict = Statement::Verdict(verdict.clone());
            let statements = peer.iter().chain(port).cloned().chain([verdict]);
            rules.push(Rule::new(statements.collect::<Vec<_>>()));
        }
    }
    rules
}

/// Returns the sets of the peers of a rule: one for each selector, and one for all blocks of the
/// family.
fn peers_of(peers: &[Peer], namespace: &str, family: Family) -> Vec<SetSpec> {
    let mut specs = Vec::new();
    let mut blocks = Vec::new();
    for peer in peers {
        match peer {
            Peer::Pods { namespaces, pods } => specs.push(SetSpec::Pods(PodSelector {
                namespaces: Namespaces::new(namespaces.as_ref(), namespace),
                pods: pods.clone(),
            })),
            Peer::Block { cidr, except } if Family::of(cidr.addr()) == family => {
                blocks.push((*cidr, except.clone()));
            }
            Peer::Block { .. } => {}
        }
    }
    if !blocks.is_empty() {
        blocks.sort_unstable();
        specs.push(SetSpec::Blocks(blocks));
    }
    specs
}

/// Returns the alternatives that match the ports of a rule: at most one for each protocol and one
/// for named ports, however many ports there are, because each is combined with every peer.
fn ports_of(
    ports: &[PolicyPort],
    direction: Direction,
    claimed: bool,
    name_of: &mut impl FnMut(SetSpec) -> Name,
) -> Vec<Statements> {
    let mut numbers: BTreeMap<Protocol, Vec<PortRange>> = BTreeMap::new();
    let mut named = Vec::new();
    for PolicyPort { protocol, port } in ports {
        match port {
            PortMatch::Any => numbers.entry(*protocol).or_default().push((0, u16::MAX)),
            PortMatch::Range(from, to) => {
                numbers.entry(*protocol).or_default().push((*from, *to));
            }
            PortMatch::Named(name) => named.push((Arc::clone(name), *protocol)),
        }
    }
    let mut alternatives = Vec::new();
    for (of, ranges) in numbers {
        let ranges = joined(ranges);
        let port = match *ranges.as_slice() {
            [(0, u16::MAX)] => None,
            [(from, to)] => {
                let operand = if from == to {
                    Operand::Port(from)
                } else {
                    Operand::Ports(from, to)
                };
                let selector = Selector::DestinationPort;
                Some(Statement::Match(selector, Comparison::Is, operand))
            }
            _ => {
                let set = name_of(SetSpec::Ports(of, ranges));
                let key = vec![Selector::DestinationPort];
                Some(Statement::InSet(key, Comparison::Is, set))
            }
        };
        alternatives.push([protocol(of.number())].into_iter().chain(port).collect());
    }
    if !named.is_empty() {
        named.sort_unstable();
        named.dedup();
        let local = direction == Direction::Ingress;
        let set = name_of(SetSpec::named_ports(named, AddressScope { local, claimed }));
        let statement = Statement::InSet(port_key(), Comparison::Is, set);
        alternatives.push([statement].into_iter().collect());
    }
    alternatives
}

/// Sorts ranges of ports and joins ranges that overlap or touch.
fn joined(mut ranges: Vec<PortRange>) -> Vec<PortRange> {
    ranges.sort_unstable();
    let mut joined: Vec<PortRange> = Vec::new();
    for (from, to) in ranges {
        match joined.last_mut() {
            Some((_, end)) if from <= end.saturating_add(1) => *end = (*end).max(to),
            _ => joined.push((from, to)),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_chains_of_both_modes_and_all_layers_are_own() {
        for beside_proxy in [false, true] {
            let settings = PolicySettings {
                beside_proxy,
                ..PolicySettings::default()
            };
            for family in Family::ALL {
                let mut table = skeleton(family, &settings);
                for direction in Direction::ALL {
                    add_layer(&mut table, family, direction, 2, &settings);
                }
                let (base, others): (Vec<_>, Vec<_>) = table
                    .chains
                    .iter()
                    .partition(|(_, chain)| chain.base.is_some());
                assert_eq!(base.len(), if beside_proxy { 10 } else { 6 });
                assert!(base.iter().all(|(name, _)| is_base_chain(name)));
                assert!(!others.iter().any(|(name, _)| is_base_chain(name)));
            }
        }
        for foreign in ["egress-", "egress-x", "output", "egress-by-ipvs-x"] {
            assert!(!is_base_chain(&foreign.into()), "{foreign}");
        }
    }

    #[test]
    fn ranges_that_overlap_or_touch_are_one() {
        let ranges = [
            (443, 443),
            (80, 90),
            (85, 100),
            (101, 101),
            (65535, 65535),
            (0, 1),
        ];
        assert_eq!(
            joined(ranges.into()),
            [(0, 1), (80, 101), (443, 443), (65535, 65535)]
        );
        assert_eq!(joined(vec![(0, u16::MAX), (80, 80)]), [(0, u16::MAX)]);
    }
}
