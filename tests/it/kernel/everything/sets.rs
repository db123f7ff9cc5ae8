//! Sets of every form.

use std::collections::BTreeMap;
use std::time::Duration;

use nftlet::nft::{
    Data, Declaration, Element, Key, Name, Selector, Set, SetKind, TableFamily, Verdict,
    merge_intervals,
};

use super::{address, affinity_key, endpoint_data, endpoint_key, network, service_key, set};

/// The sets of the table, by name.
pub fn sets(family: TableFamily) -> BTreeMap<Name, Set> {
    let a = |last| address(family, last);
    let frontend = Key::build().address(a(5)).protocol(6).port(80).finish();
    let mut sets = BTreeMap::new();
    let mut add_set = |name: &str, value: Set| {
        sets.insert(name.into(), value);
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
                network(family, "10.96.0.0/16", "fd00:10:96::/112"),
                network(family, "10.100.0.0/24", "fd00:10:100::/120"),
                network(family, "10.100.1.0/25", "fd00:10:100::100/121"),
                network(family, "192.0.2.7/32", "2001:db8::7/128"),
                network(family, "224.0.0.0/3", "ff00::/8"),
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
                network(family, "10.0.0.0/8", "fd00::/8"),
                network(family, "192.0.2.0/28", "2001:db8::/48"),
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
                let net = network(family, text4, text6);
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
                network(family, "10.96.0.0/16", "fd00:10:96::/112"),
                network(family, "224.0.0.0/3", "ff00::/8"),
            ]),
        ),
    );
    sets
}
