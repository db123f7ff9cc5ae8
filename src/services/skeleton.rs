//! The part of a table that exists without any service.

use ipnet::IpNet;

use super::chains::{LearnAt, SharedChain};
use super::layout::{By, NODEPORT_ADDRESSES, POD_NETWORKS, SERVICE_CIDRS, ServiceSet};
use super::settings::{LocalDetector, ServiceSettings};
use crate::engine::table_family;
use crate::model::{Family, Node};
use crate::nft::{
    BaseChain, Chain, ChainKind, Comparison, CtState, Declaration, Hook, Name, Operand, RejectWith,
    Rule, Selector, Set, SetKind, Statement, Table, Verdict, merge_intervals,
};

/// Refuses packets.
pub const REJECT: &str = "reject-service";
/// Marks packets from outside of the pod network.
pub(crate) const MARK_OFF_CLUSTER: &str = "mark-off-cluster";
const SERVICES: &str = "services";
const MASQUERADE: &str = "masquerade-marked";
/// Looks up where frontends lead that only clients in source ranges may use.
pub(super) const FIREWALL: &str = "firewalled";
/// Refuses or drops what no service has.
const UNASSIGNED: &str = "unassigned";
/// Refuses what no service has at an address that one has.
const UNKNOWN_PORTS: &str = "unknown-ports";

/// Netfilter's priorities of address translation.
pub(super) const DSTNAT: i32 = -100;
const SRCNAT: i32 = 100;
/// Just before the chains of network policies, so that an isolated pod gets the same answer as any
/// other, and behind the translation of every proxy on the node.
const AFTER_DSTNAT: i32 = -1;

/// The table of a family without the elements and chains that services bring.
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
    for (name, hook) in [
        ("nat-prerouting", Hook::Prerouting),
        ("nat-output", Hook::Output),
    ] {
        chain(name, nat(hook, DSTNAT), vec![jump(SERVICES)]);
    }
    chain(
        "nat-postrouting",
        nat(Hook::Postrouting, SRCNAT),
        postrouting(settings),
    );
    for (name, hook, target) in [
        ("filter-forward", Hook::Forward, UNASSIGNED),
        ("filter-output", Hook::Output, UNASSIGNED),
        ("filter-input", Hook::Input, UNKNOWN_PORTS),
    ] {
        let base = BaseChain {
            kind: ChainKind::Filter,
            hook,
            priority: AFTER_DSTNAT,
        };
        chain(name, Some(base), new_connections(target));
    }
    chain(SERVICES, None, services());
    chain(UNASSIGNED, None, unassigned());
    chain(UNKNOWN_PORTS, None, vec![unknown_port()]);
    chain(REJECT, None, reject());
    chain(FIREWALL, None, firewall());
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
    debug_assert!(consistent(&table), "{:?}", table_family(family));
    table
}

/// Whether nftlet gives this name to a base chain of its service tables. A name that is given up must
/// stay known here, or the rules of an earlier version would not last until the first lists.
pub(crate) fn is_base_chain(name: &Name) -> bool {
    let skeleton = skeleton(Family::V4, &ServiceSettings::default(), None, &[]);
    let fixed = skeleton.chains.get(name);
    let mut learning = [LearnAt::Prerouting, LearnAt::Output].into_iter();
    fixed.is_some_and(|chain| chain.base.is_some())
        || learning.any(|at| SharedChain::LearnHook(at).name() == *name)
}

/// Whether every chain that is led to exists.
fn consistent(table: &Table) -> bool {
    let targets = table.chains.values().flat_map(|chain| &chain.rules);
    targets.flat_map(|rule| &rule.statements).all(|statement| {
        let Statement::Verdict(verdict) = statement else {
            return true;
        };
        verdict
            .target()
            .is_none_or(|chain| table.chains.contains_key(chain))
    })
}

fn nat(hook: Hook, priority: i32) -> Option<BaseChain> {
    Some(BaseChain {
        kind: ChainKind::Nat,
        hook,
        priority,
    })
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

/// Looks up what the packet asks for, from the most specific to the least.
fn services() -> Vec<Rule> {
    vec![
        Rule::new([Statement::VerdictMap(
            By::Address.key(),
            ServiceSet::Frontends.name(),
        )]),
        Rule::new([
            to(NODEPORT_ADDRESSES.into()),
            // The kernel knows the host's addresses best: ranges need no update when they change.
            Statement::DestinationIsLocal,
            Statement::VerdictMap(By::NodePort.key(), ServiceSet::NodePorts.name()),
        ]),
    ]
}

fn to(set: Name) -> Statement {
    Statement::InSet(vec![Selector::DestinationAddress], Comparison::Is, set)
}

/// Every packet evaluates this rule, those of known connections no other. What is not tracked
/// passes: a cache on the node that answers at a ClusterIP of its own exempts it from tracking.
fn new_connections(target: &str) -> Vec<Rule> {
    vec![Rule::new([
        Statement::CtState(CtState::New.into()),
        Statement::Verdict(Verdict::Jump(target.into())),
    ])]
}

/// Judges destinations as all translation left them, so that services of another proxy, which has
/// ClusterIPs of the same ranges, are none of its business (kube-proxy's `cluster-ips-check`). An
/// endpoint that is a ClusterIP itself is not translated again, and refused here.
fn unassigned() -> Vec<Rule> {
    vec![
        unknown_port(),
        Rule::new([to(SERVICE_CIDRS.into()), Statement::Verdict(Verdict::Drop)]),
    ]
}

/// At the hook for the node's own processes this is all: a ClusterIP on an interface of the node,
/// as IPVS leaves them, must not lead to whatever listens on all addresses. A free address there
/// belongs to who put it there, such as another proxy that uses IPVS.
fn unknown_port() -> Rule {
    Rule::new([to(ServiceSet::ClusterIps.name()), goto(REJECT)])
}

fn postrouting(settings: &ServiceSettings) -> Vec<Rule> {
    let mark = settings.masquerade_bit.mark();
    vec![
        Rule::new([Statement::MarkBits(Comparison::Is, mark), goto(MASQUERADE)]),
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

/// TCP clients get a reset: the kernel limits the rate of ICMP errors, so that a client might
/// wait for a timeout otherwise.
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

/// Leads clients that are in the source ranges of a frontend to its chain. The lookup has a chain of
/// its own, because the kernel walks a verdict map for each chain that is new and reads it.
fn firewall() -> Vec<Rule> {
    vec![
        Rule::new([Statement::VerdictMap(
            By::Address.key(),
            ServiceSet::FirewalledFrontends.name(),
        )]),
        Rule::new([Statement::Verdict(Verdict::Drop)]),
    ]
}

/// Without a known pod network nothing can be told to come from outside of it.
fn mark_off_cluster(
    detector: LocalDetector,
    family: Family,
    settings: &ServiceSettings,
    node: Option<&Node>,
) -> Vec<Rule> {
    if detector == LocalDetector::PodNetworks && settings.pod_networks(family, node).is_empty() {
        return Vec::new();
    }
    let outside = detector.from_local_pods(Comparison::IsNot);
    let mark = Statement::SetMarkBits(settings.masquerade_bit.mark());
    outside
        .map(|outside| Rule::new([outside, mark]))
        .into_iter()
        .collect()
}
