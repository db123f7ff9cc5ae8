//! The part of a service table that does not depend on services.

use ipnet::IpNet;

use super::balance::{DRAW, DRAW_FILLED};
use super::chains::{LearnAt, SharedChain};
use super::dispatch::{self, dispatch};
use super::layout::{
    By, DSTNAT, MARK_OFF_CLUSTER, NODEPORT_ADDRESSES, POD_NETWORKS, REJECT, SERVICE_CIDRS,
    ServiceSet, priority_map,
};
use super::settings::{LocalDetector, ServiceSettings};
use crate::engine::table_family;
use crate::model::{Family, Node};
use crate::nft::{
    BaseChain, Chain, ChainKind, Comparison, CtState, CtStatus, Declaration, Hook, Name, Operand,
    RejectWith, Rule, Selector, Set, SetKind, Statement, Table, Verdict, merge_intervals,
};

const SERVICES: &str = "services";
/// Clears the priority of translated packets, then as [`UNASSIGNED`].
const TRANSLATED: &str = "translated";
const MASQUERADE: &str = "masquerade-marked";
/// Rejects or drops packets to unassigned service addresses and ports.
pub(super) const UNASSIGNED: &str = "unassigned";
/// Rejects packets to unassigned ports of a ClusterIP.
const UNKNOWN_PORTS: &str = "unknown-ports";

/// Netfilter's priority of source translation.
const SRCNAT: i32 = 100;
/// Before the chains of network policies, so that an isolated pod gets the same answer as any
/// other, and behind the translation of every proxy on the node.
const AFTER_DSTNAT: i32 = -1;

/// Returns the table of a family without the elements and chains of services.
///
/// `service_cidrs` may hold ranges of both families.
pub fn skeleton(
    family: Family,
    settings: &ServiceSettings,
    node: Option<&Node>,
    service_cidrs: &[IpNet],
) -> Table {
    let mut table = Table::default();
    for set in ServiceSet::ALL.iter().copied() {
        table.sets.insert(
            set.name(),
            Set {
                declaration: set.declaration(),
                elements: Vec::new(),
            },
        );
    }
    let own = service_cidrs
        .iter()
        .filter(|net| Family::of(net.addr()) == family);
    let nodeport_ranges = settings.nodeport_ranges(family, node);
    for (name, ranges) in [
        (NODEPORT_ADDRESSES, nodeport_ranges),
        (SERVICE_CIDRS, own.copied().collect()),
    ] {
        let set = address_ranges(Selector::DestinationAddress, ranges);
        table.sets.insert(name.into(), set);
    }
    let pods = address_ranges(Selector::SourceAddress, settings.pod_networks(family, node));
    table.sets.insert(POD_NETWORKS.into(), pods);
    let mut chain = |name: &str, base: Option<BaseChain>, rules: Vec<Rule>| {
        table.chains.insert(Name::from(name), Chain { base, rules });
    };
    for (name, base, rules) in base_chains(settings, family) {
        chain(name, Some(base), rules);
    }
    chain(SERVICES, None, services());
    chain(UNASSIGNED, None, unassigned());
    chain(TRANSLATED, None, translated());
    chain(UNKNOWN_PORTS, None, vec![unknown_port()]);
    chain(REJECT, None, reject());
    chain(
        MASQUERADE,
        None,
        vec![
            Rule::new([Statement::FlipMarkBits(settings.masquerade_bit.mark())]),
            Rule::new([Statement::Masquerade]),
        ],
    );
    chain(
        MARK_OFF_CLUSTER,
        None,
        mark_off_cluster(settings.detector(family), family, settings, node),
    );
    for by in [By::Address, By::NodePort] {
        table.chains.extend(dispatch::chains(by, settings, family));
        table.sets.extend(dispatch::roles(by));
    }
    for map in [DRAW, DRAW_FILLED] {
        table.sets.insert(map.into(), priority_map(vec![]));
    }
    debug_assert!(consistent(&table), "{:?}", table_family(family));
    table
}

/// Returns whether this is the name of a base chain in the service tables of this or an earlier
/// version of nftlet. At start, other base chains are removed before the first lists; a former name
/// must therefore stay in this list.
pub(crate) fn is_base_chain(name: &Name) -> bool {
    let fixed = base_chains(&ServiceSettings::default(), Family::V4);
    let mut learning = [LearnAt::Prerouting, LearnAt::Output].into_iter();
    fixed.iter().any(|(fixed, ..)| *fixed == name.as_str())
        || learning.any(|at| SharedChain::LearnHook(at).name() == *name)
}

/// Returns whether every target of a verdict exists.
fn consistent(table: &Table) -> bool {
    let targets = table.chains.values().flat_map(|chain| &chain.rules);
    targets.flat_map(|rule| &*rule.statements).all(|statement| {
        let Statement::Verdict(verdict) = statement else {
            return true;
        };
        verdict
            .target()
            .is_none_or(|chain| table.chains.contains_key(chain))
    })
}

/// Returns the base chains with their rules.
fn base_chains(
    settings: &ServiceSettings,
    family: Family,
) -> Vec<(&'static str, BaseChain, Vec<Rule>)> {
    let nat = |hook, priority| BaseChain {
        kind: ChainKind::Nat,
        hook,
        priority,
    };
    let filter = |hook| BaseChain {
        kind: ChainKind::Filter,
        hook,
        priority: AFTER_DSTNAT,
    };
    let (prerouting, output) = (Hook::Prerouting, Hook::Output);
    let forwarded = match family {
        // The kernel has derived the priority of a forwarded packet from its TOS field.
        Family::V4 => UNASSIGNED,
        Family::V6 => TRANSLATED,
    };
    vec![
        (
            "nat-prerouting",
            nat(prerouting, DSTNAT),
            vec![jump(SERVICES)],
        ),
        ("nat-output", nat(output, DSTNAT), vec![jump(SERVICES)]),
        (
            "nat-postrouting",
            nat(Hook::Postrouting, SRCNAT),
            postrouting(settings),
        ),
        (
            "filter-forward",
            filter(Hook::Forward),
            new_connections(forwarded),
        ),
        ("filter-output", filter(output), new_connections(TRANSLATED)),
        (
            "filter-input",
            filter(Hook::Input),
            new_connections(UNKNOWN_PORTS),
        ),
    ]
}

fn jump(chain: &str) -> Rule {
    Rule::new([Statement::Verdict(Verdict::Jump(chain.into()))])
}

fn goto(chain: &str) -> Statement {
    Statement::Verdict(Verdict::Goto(chain.into()))
}

fn address_ranges(key: Selector, ranges: Vec<IpNet>) -> Set {
    let mut set = Set::from(Declaration {
        interval: true,
        ..Declaration::new(SetKind::Set, [key])
    });
    set.elements = merge_intervals(ranges);
    set
}

/// Returns the rules that look up the frontend, the most specific first.
fn services() -> Vec<Rule> {
    let to_node = [
        to(NODEPORT_ADDRESSES.into()),
        // The kernel looks up the host's addresses, so that the set needs no update when they change.
        Statement::DestinationIsLocal,
    ];
    vec![
        Rule::new(dispatch(By::Address)),
        Rule::new([to_node.as_slice(), &dispatch(By::NodePort)].concat()),
    ]
}

fn to(set: Name) -> Statement {
    Statement::InSet(vec![Selector::DestinationAddress], Comparison::Is, set)
}

/// Returns the one rule that every packet evaluates; only new connections continue. Untracked
/// packets pass: a DNS cache on the node that answers at a ClusterIP exempts it from tracking.
fn new_connections(target: &str) -> Vec<Rule> {
    vec![Rule::new([
        Statement::CtState(CtState::New.into()),
        Statement::Verdict(Verdict::Jump(target.into())),
    ])]
}

/// Returns the rules for destinations after all translation, so that ClusterIPs of another proxy's
/// services do not match (kube-proxy's `cluster-ips-check`). An endpoint that is itself a ClusterIP
/// is not translated again, and rejected here.
fn unassigned() -> Vec<Rule> {
    vec![
        unknown_port(),
        Rule::new([to(SERVICE_CIDRS.into()), Statement::Verdict(Verdict::Drop)]),
    ]
}

/// Returns the rules that take the index of the endpoint out of the priority. A chain that translates
/// ends with the translation and cannot do that.
fn translated() -> Vec<Rule> {
    vec![
        Rule::new([
            Statement::CtStatus(CtStatus::Dnat),
            Statement::SetPriority(0),
        ]),
        Rule::new([goto(UNASSIGNED)]),
    ]
}

/// Returns the rule that rejects packets to unassigned ports of a ClusterIP. It is the only one at
/// the input hook: a ClusterIP on an interface of the node, as IPVS leaves them, must not lead to
/// processes that listen on all addresses. Unassigned addresses pass there, because another proxy
/// that uses IPVS may have them.
fn unknown_port() -> Rule {
    Rule::new([to(ServiceSet::ClusterIps.name()), goto(REJECT)])
}

fn postrouting(settings: &ServiceSettings) -> Vec<Rule> {
    let mark = settings.masquerade_bit.mark();
    vec![
        Rule::new([Statement::MarkBits(mark), goto(MASQUERADE)]),
        Rule::new([
            Statement::InSet(
                vec![Selector::SourceAddress, Selector::DestinationAddress],
                Comparison::Is,
                ServiceSet::Hairpin.name(),
            ),
            Statement::Masquerade,
        ]),
    ]
}

/// Returns the rules that reject packets. TCP clients get a reset, because the kernel limits the
/// rate of ICMP errors and a client could wait for a timeout.
fn reject() -> Vec<Rule> {
    const TCP: u8 = 6;
    vec![
        Rule::new([
            Statement::Match(Selector::L4Protocol, Comparison::Is, Operand::Protocol(TCP)),
            Statement::Reject(RejectWith::TcpReset),
        ]),
        Rule::new([Statement::Reject(RejectWith::PortUnreachable)]),
    ]
}

/// Returns the rule that marks packets from outside of the pod network; none if that is not known.
fn mark_off_cluster(
    detector: LocalDetector,
    family: Family,
    settings: &ServiceSettings,
    node: Option<&Node>,
) -> Vec<Rule> {
    if detector == LocalDetector::PodNetworks && settings.pod_networks(family, node).is_empty() {
        return Vec::new();
    }
    let outside = detector.match_local_pods(Comparison::IsNot);
    let mark = Statement::SetMarkBits(settings.masquerade_bit.mark());
    outside
        .map(|outside| Rule::new([outside, mark]))
        .into_iter()
        .collect()
}
