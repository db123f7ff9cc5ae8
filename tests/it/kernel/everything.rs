//! A ruleset with every construct there is.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use nftlet::nft::{
    BaseChain, Chain, ChainKind, Comparison, CtState, CtStatus, Data, Declaration, Element, Hook,
    Key, Name, Operand, RejectWith, Rule, Ruleset, Selector, Set, SetKind, Statement, Table,
    TableFamily, TableId, Verdict, merge_intervals,
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

fn service_key() -> Vec<Selector> {
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

fn affinity_key() -> Vec<Selector> {
    let mut key = vec![Selector::SourceAddress];
    key.extend(service_key());
    key
}

/// A table in which every construct of `ruleset` occurs.
pub fn everything(family: TableFamily) -> Ruleset {
    let a = |last| address(family, last);
    let frontend = Key::build().address(a(5)).protocol(6).port(80).finish();
    let network = |text4: &str, text6: &str| -> ipnet::IpNet {
        match family {
            TableFamily::Ip => text4.parse().unwrap(),
            TableFamily::Ip6 => text6.parse().unwrap(),
        }
    };
    let mut table = Table::default();
    let mut add_set = |name: &str, value: Set| {
        table.sets.insert(name.into(), value);
    };
    add_set(
        "endpoints",
        set(
            Declaration::new(SetKind::Map(endpoint_data()), endpoint_key()),
            (0..3)
                .map(|index| {
                    Element::with_data(
                        Key::build()
                            .address(a(5))
                            .protocol(6)
                            .port(80)
                            .number(index)
                            .finish(),
                        Data::build()
                            .address(a(100 + index as u8))
                            .port(8080)
                            .finish(),
                    )
                })
                .collect(),
        ),
    );
    add_set(
        "numbers",
        set(
            Declaration::new(SetKind::Map(vec![Selector::Priority]), service_key()),
            vec![Element::with_data(
                frontend.clone(),
                Data::build().number(0x0002_0010).finish(),
            )],
        ),
    );
    add_set(
        "roles",
        set(
            Declaration::new(SetKind::VerdictMap, [Selector::Priority]),
            vec![Element::with_verdict(
                Key::build().number(0x0002_0000).finish(),
                Verdict::Goto("refuse".into()),
            )],
        ),
    );
    add_set(
        "frontends",
        set(
            Declaration::new(SetKind::VerdictMap, service_key()),
            vec![
                Element::with_verdict(frontend.clone(), Verdict::Goto("lb-3".into()))
                    .comment("shop/web:http"),
                Element::with_verdict(
                    Key::build().address(a(6)).protocol(17).port(53).finish(),
                    Verdict::Drop,
                ),
                Element::with_verdict(
                    Key::build().address(a(7)).protocol(132).port(9).finish(),
                    Verdict::Accept,
                ),
                Element::with_verdict(
                    Key::build().address(a(8)).protocol(6).port(9).finish(),
                    Verdict::Return,
                ),
                Element::with_verdict(
                    Key::build().address(a(9)).protocol(6).port(9).finish(),
                    Verdict::Jump("refuse".into()),
                ),
            ],
        ),
    );
    add_set(
        "nodeports",
        set(
            Declaration::new(
                SetKind::VerdictMap,
                [Selector::L4Protocol, Selector::DestinationPort],
            ),
            vec![Element::with_verdict(
                Key::build().protocol(6).port(30080).finish(),
                Verdict::Goto("lb-3".into()),
            )],
        ),
    );
    add_set(
        "addresses",
        set(
            Declaration::new(SetKind::Set, [Selector::DestinationAddress]),
            vec![
                Element::new(Key::address(a(5))).comment("a \"quoted\" comment"),
                Element::new(Key::address(a(6))),
            ],
        ),
    );
    add_set(
        "ranges",
        set(
            Declaration {
                interval: true,
                ..Declaration::new(SetKind::Set, [Selector::DestinationAddress])
            },
            merge_intervals([
                network("10.96.0.0/16", "fd00:10:96::/112"),
                network("10.100.0.0/24", "fd00:10:100::/120"),
                network("10.100.1.0/25", "fd00:10:100::100/121"),
                network("192.0.2.7/32", "2001:db8::7/128"),
                network("224.0.0.0/3", "ff00::/8"),
            ]),
        ),
    );
    add_set(
        "sources",
        set(
            Declaration {
                interval: true,
                ..Declaration::new(
                    SetKind::Set,
                    [
                        Selector::DestinationAddress,
                        Selector::L4Protocol,
                        Selector::DestinationPort,
                        Selector::SourceAddress,
                    ],
                )
            },
            [
                network("10.0.0.0/8", "fd00::/8"),
                network("192.0.2.0/28", "2001:db8::/48"),
            ]
            .map(|net| Element {
                key_end: Some(Box::new(
                    Key::build()
                        .address(a(5))
                        .protocol(6)
                        .port(80)
                        .address(net.broadcast())
                        .finish(),
                )),
                ..Element::new(
                    Key::build()
                        .address(a(5))
                        .protocol(6)
                        .port(80)
                        .address(net.network())
                        .finish(),
                )
            })
            .into(),
        ),
    );
    add_set(
        "affinity",
        set(
            Declaration {
                timeout: Some(Duration::from_secs(10_800)),
                size: Some(65_536),
                ..Declaration::new(SetKind::Map(endpoint_data()), affinity_key())
            },
            vec![],
        ),
    );
    add_set(
        "interfaces",
        set(
            Declaration::new(SetKind::Set, [Selector::InputInterface]),
            vec![Element::new(Key::build().interface("eth0").finish())],
        ),
    );
    add_set(
        "ports",
        set(
            Declaration::new(SetKind::Set, [Selector::DestinationPort]),
            vec![Element::new(Key::build().port(80).finish())],
        ),
    );
    add_set(
        "pairs",
        set(
            Declaration::new(
                SetKind::Set,
                [Selector::SourceAddress, Selector::DestinationAddress],
            ),
            vec![Element::new(
                Key::build().address(a(100)).address(a(100)).finish(),
            )],
        ),
    );
    add_set(
        "icmpv6-types",
        set(
            Declaration::new(SetKind::Set, [Selector::Icmp6Type]),
            [133, 135, 128, 200]
                .map(|number| Element::new(Key::build().icmp6_type(number).finish()))
                .into(),
        ),
    );
    let counted = |declaration: Declaration| Declaration {
        counter: true,
        ..declaration.comment("what \"pods\" may reach")
    };
    add_set(
        "ingress-shop/web-0.a",
        set(
            counted(Declaration {
                interval: true,
                ..Declaration::new(
                    SetKind::VerdictMap,
                    [Selector::SourceAddress, Selector::DestinationPort],
                )
            }),
            [
                ("10.0.0.0/8", "fd00::/8", 80, 90, Verdict::Accept),
                (
                    "192.0.2.0/28",
                    "2001:db8::/48",
                    0,
                    65_535,
                    Verdict::Jump("refuse".into()),
                ),
            ]
            .map(|(text4, text6, from, to, verdict)| {
                let net = network(text4, text6);
                let key = |address, port| Key::build().address(address).port(port).finish();
                Element {
                    key_end: Some(Box::new(key(net.broadcast(), to))),
                    ..Element::with_verdict(key(net.network(), from), verdict)
                }
            })
            .into(),
        ),
    );
    add_set(
        "counted",
        set(
            counted(Declaration::new(
                SetKind::Set,
                [Selector::DestinationAddress, Selector::Icmp6Type],
            )),
            vec![Element::new(
                Key::build().address(a(5)).icmp6_type(200).finish(),
            )],
        ),
    );
    add_set(
        "counted-ranges",
        set(
            counted(Declaration {
                interval: true,
                ..Declaration::new(SetKind::Set, [Selector::SourceAddress])
            }),
            merge_intervals([
                network("10.96.0.0/16", "fd00:10:96::/112"),
                network("224.0.0.0/3", "ff00::/8"),
            ]),
        ),
    );

    use Comparison::{Is, IsNot};
    use Statement as S;
    let local = network("10.244.0.0/16", "fd00:10:244::/48");
    let odd = network("10.244.128.0/18", "fd00:10:244:8000::/50");
    let host = network("10.1.2.3/32", "fd00::3/128");
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
    table
        .chains
        .extend(chains.map(|(name, chain)| (Name::from(name), chain)));
    Ruleset {
        tables: [(TableId::new(family, TABLE), table)].into(),
    }
}
