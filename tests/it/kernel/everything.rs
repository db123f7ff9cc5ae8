//! A ruleset with every construct there is.

mod sets;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use nftlet::nft::{
    BaseChain, Chain, ChainKind, Comparison, CtState, CtStatus, Declaration, Element, Hook, Name,
    Operand, RejectWith, Rule, Ruleset, Selector, Set, Statement, Table, TableFamily, TableId,
    Verdict,
};

pub const TABLE: &str = "nftlet-test";

pub fn address(family: TableFamily, last: u8) -> IpAddr {
    match family {
        TableFamily::Ip => IpAddr::from([10, 96, 0, last]),
        TableFamily::Ip6 => format!("fd00:10:96::{last:x}").parse().unwrap(),
    }
}

pub fn set(declaration: Declaration, mut elements: Vec<Element>) -> Set {
    elements.sort();
    Set {
        declaration: Arc::new(declaration),
        elements,
    }
}

pub fn network(family: TableFamily, text4: &str, text6: &str) -> IpNet {
    match family {
        TableFamily::Ip => text4.parse().unwrap(),
        TableFamily::Ip6 => text6.parse().unwrap(),
    }
}

fn base(kind: ChainKind, hook: Hook, priority: i32, rules: Vec<Rule>) -> Chain {
    Chain {
        base: Some(BaseChain {
            kind,
            hook,
            priority,
        }),
        rules,
    }
}

pub fn plain(rules: Vec<Rule>) -> Chain {
    Chain { base: None, rules }
}

pub fn goto(chain: &str) -> Statement {
    Statement::Verdict(Verdict::Goto(chain.into()))
}

pub fn service_key() -> Vec<Selector> {
    vec![
        Selector::DestinationAddress,
        Selector::L4Protocol,
        Selector::DestinationPort,
    ]
}

pub fn endpoint_key() -> Vec<Selector> {
    let mut key = service_key();
    key.push(Selector::Priority);
    key
}

pub fn endpoint_data() -> Vec<Selector> {
    vec![Selector::DestinationAddress, Selector::DestinationPort]
}

pub fn affinity_key() -> Vec<Selector> {
    let mut key = vec![Selector::SourceAddress];
    key.extend(service_key());
    key
}

/// A table in which every construct of `ruleset` occurs.
pub fn everything(family: TableFamily) -> Ruleset {
    use Comparison::{Is, IsNot};
    use Statement as S;
    let local = network(family, "10.244.0.0/16", "fd00:10:244::/48");
    let odd = network(family, "10.244.128.0/18", "fd00:10:244:8000::/50");
    let host = network(family, "10.1.2.3/32", "fd00::3/128");
    let bit = 0x4000;
    let chains = [
        (
            "nat-prerouting",
            base(
                ChainKind::Nat,
                Hook::Prerouting,
                -100,
                vec![Rule::new([S::Verdict(Verdict::Jump("services".into()))])],
            ),
        ),
        (
            "nat-output",
            base(
                ChainKind::Nat,
                Hook::Output,
                -100,
                vec![Rule::new([S::Verdict(Verdict::Jump("services".into()))])],
            ),
        ),
        (
            "nat-postrouting",
            base(
                ChainKind::Nat,
                Hook::Postrouting,
                100,
                vec![
                    Rule::new([S::MarkBits(bit), goto("masquerade-marked")]),
                    Rule::new([
                        S::InSet(
                            vec![Selector::SourceAddress, Selector::DestinationAddress],
                            Is,
                            "pairs".into(),
                        ),
                        S::Masquerade,
                    ]),
                ],
            ),
        ),
        (
            "learn",
            base(
                ChainKind::Filter,
                Hook::Prerouting,
                -99,
                vec![Rule::new([
                    S::CtState(CtState::New.into()),
                    S::CtStatus(CtStatus::Dnat),
                    S::Match(Selector::L4Protocol, Is, Operand::Protocol(6)),
                    S::UpdateMap {
                        map: "affinity".into(),
                        key: vec![
                            Selector::SourceAddress,
                            Selector::OriginalDestinationAddress,
                            Selector::L4Protocol,
                            Selector::OriginalDestinationPort,
                        ],
                        timeout: Duration::from_secs(10),
                        data: endpoint_data(),
                    },
                ])],
            ),
        ),
        (
            "filter-input",
            base(
                ChainKind::Filter,
                Hook::Input,
                0,
                vec![Rule::new([
                    S::CtState(CtState::Established.into()),
                    S::Verdict(Verdict::Accept),
                ])],
            ),
        ),
        (
            "filter-forward",
            base(
                ChainKind::Filter,
                Hook::Forward,
                10,
                vec![
                    Rule::new([
                        S::CtState(CtState::Related.into()),
                        S::CtStatus(CtStatus::Dnat),
                        S::Verdict(Verdict::Return),
                    ]),
                    Rule::new([
                        S::CtState(CtState::Invalid.into()),
                        S::Counter,
                        S::Verdict(Verdict::Drop),
                    ])
                    .comment("belongs to \"nothing\""),
                ],
            ),
        ),
        (
            "masquerade-marked",
            plain(vec![
                Rule::new([S::FlipMarkBits(bit)]),
                Rule::new([S::Masquerade]),
            ]),
        ),
        (
            "services",
            plain(vec![
                Rule::new([S::VerdictMap(service_key(), "frontends".into())]),
                Rule::new([
                    S::DestinationIsLocal,
                    S::InSet(vec![Selector::DestinationAddress], Is, "ranges".into()),
                    S::VerdictMap(
                        vec![Selector::L4Protocol, Selector::DestinationPort],
                        "nodeports".into(),
                    ),
                ]),
                Rule::new([S::DestinationIsBroadcast, S::Verdict(Verdict::Accept)]),
                Rule::new([
                    S::SourceIsLocal,
                    S::InSet(
                        vec![Selector::DestinationAddress],
                        IsNot,
                        "addresses".into(),
                    ),
                    goto("refuse"),
                ]),
                Rule::new([
                    S::InSet(
                        vec![
                            Selector::DestinationAddress,
                            Selector::L4Protocol,
                            Selector::DestinationPort,
                            Selector::SourceAddress,
                        ],
                        Is,
                        "sources".into(),
                    ),
                    S::Verdict(Verdict::Accept),
                ]),
                Rule::new([
                    S::InSet(vec![Selector::InputInterface], IsNot, "interfaces".into()),
                    S::Verdict(Verdict::Drop),
                ]),
                Rule::new([
                    S::InSet(vec![Selector::DestinationPort], Is, "ports".into()),
                    S::Verdict(Verdict::Drop),
                ]),
            ]),
        ),
        (
            "refuse",
            plain(vec![
                Rule::new([
                    S::Match(Selector::L4Protocol, Is, Operand::Protocol(6)),
                    S::Reject(RejectWith::TcpReset),
                ]),
                Rule::new([
                    S::Match(Selector::L4Protocol, Is, Operand::Protocol(17)),
                    S::Reject(RejectWith::AdminProhibited),
                ]),
                Rule::new([S::Reject(RejectWith::PortUnreachable)]),
            ]),
        ),
        (
            "lb-3",
            plain(vec![
                Rule::new([
                    S::PriorityByMap(service_key(), "numbers".into()),
                    S::PriorityVerdict {
                        mask: 0x001f_0000,
                        map: "roles".into(),
                    },
                ]),
                Rule::new([S::RandomPriority(3)]),
                Rule::new([S::SetPriority(0x0001_000a)]),
                Rule::new([
                    S::SetPriority(0),
                    S::DnatByMap(endpoint_key(), "endpoints".into()),
                ]),
                Rule::new([S::DnatByMap(affinity_key(), "affinity".into())]),
                Rule::new([S::SetMarkBits(bit)]),
            ]),
        ),
        (
            "matches",
            plain(vec![
                Rule::new([
                    S::Match(Selector::SourceAddress, IsNot, Operand::Network(local)),
                    S::Match(Selector::DestinationAddress, Is, Operand::Network(odd)),
                    S::Match(Selector::SourceAddress, Is, Operand::Network(host)),
                    S::Verdict(Verdict::Return),
                ]),
                Rule::new([
                    S::Match(
                        Selector::InputInterface,
                        IsNot,
                        Operand::Interface("br0".into()),
                    ),
                    S::Match(
                        Selector::OutputInterface,
                        Is,
                        Operand::InterfacePrefix("veth".into()),
                    ),
                    S::Verdict(Verdict::Return),
                ]),
                Rule::new([
                    S::Match(Selector::L4Protocol, IsNot, Operand::Protocol(58)),
                    S::Match(Selector::L4Protocol, Is, Operand::Protocol(6)),
                    S::Match(Selector::DestinationPort, IsNot, Operand::Port(22)),
                    S::Match(Selector::DestinationPort, Is, Operand::Port(443)),
                    S::Verdict(Verdict::Return),
                ]),
            ]),
        ),
        (
            "ingress-shop/web-0.a",
            plain(vec![
                Rule::new([
                    S::CtState([CtState::Related, CtState::Established].into()),
                    S::Verdict(Verdict::Accept),
                ]),
                Rule::new([
                    S::CtState([CtState::Invalid, CtState::New].into()),
                    S::Match(Selector::L4Protocol, Is, Operand::Protocol(6)),
                    S::TcpNotOpening,
                    S::Match(Selector::DestinationPort, Is, Operand::Ports(8000, 9000)),
                    S::Match(Selector::DestinationPort, IsNot, Operand::Ports(0, 1023)),
                    S::Verdict(Verdict::Accept),
                ]),
                Rule::new([
                    S::Match(Selector::L4Protocol, Is, Operand::Protocol(58)),
                    S::InSet(vec![Selector::Icmp6Type], Is, "icmpv6-types".into()),
                    S::HopLimit(255),
                    S::InSet(
                        vec![Selector::DestinationAddress, Selector::Icmp6Type],
                        IsNot,
                        "counted".into(),
                    ),
                    S::Verdict(Verdict::Accept),
                ]),
                Rule::new([
                    S::Match(Selector::L4Protocol, Is, Operand::Protocol(17)),
                    S::VerdictMap(
                        vec![Selector::SourceAddress, Selector::DestinationPort],
                        "ingress-shop/web-0.a".into(),
                    ),
                ]),
                Rule::new([
                    S::InSet(vec![Selector::SourceAddress], Is, "counted-ranges".into()),
                    S::Limit {
                        per_second: 10,
                        burst: 20,
                    },
                    S::log("ingress \"shop/web\" $0 ", 5, 128),
                ]),
                Rule::new([
                    S::Limit {
                        per_second: 1,
                        burst: 1,
                    },
                    S::log("whole", 6, 0),
                    S::Verdict(Verdict::Drop),
                ]),
            ]),
        ),
    ];
    let table = Table {
        sets: sets::sets(family),
        chains: chains.map(|(name, chain)| (Name::from(name), chain)).into(),
        ..Table::default()
    };
    Ruleset {
        tables: [(TableId::new(family, TABLE), table)].into(),
    }
}
