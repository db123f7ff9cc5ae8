//! The interpreter of rulesets gives the verdicts that the kernel would, and refuses to guess.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::support::policy::walk::{Outcome, Packet, walk};
use nftlet::nft::{
    BaseChain, Chain, ChainKind, Comparison, CtState, Declaration, Element, Hook, Key, Operand,
    RejectWith, Rule, Ruleset, Selector, Set, SetKind, Statement, Table, TableFamily, TableId,
    Verdict,
};

use Comparison::{Is, IsNot};

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// TCP to port 80.
fn packet() -> Packet {
    Packet::first(ip("10.244.1.11"), ip("10.244.1.12"), 6, 80)
}

fn rule(statements: impl Into<Arc<[Statement]>>) -> Rule {
    Rule::new(statements)
}

fn base(hook: Hook, priority: i32, rules: Vec<Rule>) -> Chain {
    Chain {
        base: Some(BaseChain {
            kind: ChainKind::Filter,
            hook,
            priority,
        }),
        rules,
    }
}

fn plain(rules: Vec<Rule>) -> Chain {
    Chain { base: None, rules }
}

fn table(chains: Vec<(&str, Chain)>, sets: Vec<(&str, Set)>) -> Ruleset {
    let table = Table {
        sets: sets
            .into_iter()
            .map(|(name, set)| (name.into(), set))
            .collect(),
        chains: chains
            .into_iter()
            .map(|(name, chain)| (name.into(), chain))
            .collect(),
        ..Table::default()
    };
    Ruleset {
        tables: [(TableId::new(TableFamily::Ip, "t"), table)].into(),
    }
}

fn accept() -> Statement {
    Statement::Verdict(Verdict::Accept)
}

fn drop() -> Statement {
    Statement::Verdict(Verdict::Drop)
}

/// Whether a packet passes a single chain of these rules and a final drop.
fn passes(rules: Vec<Rule>, sets: Vec<(&str, Set)>, packet: &Packet) -> bool {
    let mut rules = rules;
    rules.push(rule([drop()]));
    let ruleset = table(vec![("in", base(Hook::Forward, 0, rules))], sets);
    walk(&ruleset, Hook::Forward, packet).accepted()
}

/// Whether a packet matches the statements.
fn matches(statements: &[Statement], packet: &Packet) -> bool {
    let mut statements = statements.to_vec();
    statements.push(accept());
    passes(vec![rule(statements)], vec![], packet)
}

#[test]
fn accept_ends_its_base_chain_only_and_priorities_order_them() {
    let chains = |late: Statement| {
        vec![
            // By name the later one comes first.
            ("a-late", base(Hook::Forward, 1, vec![rule([late])])),
            (
                "b-early",
                base(Hook::Forward, 0, vec![rule([accept()]), rule([drop()])]),
            ),
            ("other", base(Hook::Input, -5, vec![rule([drop()])])),
        ]
    };
    let walked = walk(&table(chains(accept()), vec![]), Hook::Forward, &packet());
    assert!(walked.accepted());
    assert_eq!(walked.trace, ["b-early: accept", "a-late: accept"]);
    let walked = walk(&table(chains(drop()), vec![]), Hook::Forward, &packet());
    let Outcome::Dropped(place) = walked.outcome else {
        panic!("{walked}");
    };
    assert_eq!((place.chain.as_str(), place.rule), ("a-late", 0));
    // Another family and a hook without chains.
    let v6 = Packet::first(ip("fd00::1"), ip("fd00::2"), 6, 80);
    assert!(walk(&table(chains(drop()), vec![]), Hook::Forward, &v6).accepted());
    assert!(walk(&table(chains(drop()), vec![]), Hook::Output, &packet()).accepted());
}

#[test]
fn jumps_come_back_and_gotos_do_not() {
    let go = |verdict: Verdict, inner: Vec<Rule>| {
        let first = vec![rule([Statement::Verdict(verdict)]), rule([drop()])];
        let chains = vec![
            ("in", base(Hook::Forward, 0, first)),
            ("inner", plain(inner)),
        ];
        walk(&table(chains, vec![]), Hook::Forward, &packet()).accepted()
    };
    let back = || vec![rule([Statement::Verdict(Verdict::Return)]), rule([drop()])];
    assert!(!go(Verdict::Jump("inner".into()), vec![]));
    assert!(!go(Verdict::Jump("inner".into()), back()));
    assert!(go(Verdict::Jump("inner".into()), vec![rule([accept()])]));
    // After a goto the end of the chain is the end of the base chain, whose policy is accept.
    assert!(go(Verdict::Goto("inner".into()), vec![]));
    assert!(go(Verdict::Goto("inner".into()), back()));
    assert!(!go(Verdict::Goto("inner".into()), vec![rule([drop()])]));
}

#[test]
fn a_goto_inside_of_a_jump_returns_to_the_one_who_jumped() {
    let chains = vec![
        (
            "in",
            base(
                Hook::Forward,
                0,
                vec![
                    rule([Statement::Verdict(Verdict::Jump("first".into()))]),
                    rule([drop()]),
                ],
            ),
        ),
        (
            "first",
            plain(vec![
                rule([Statement::Verdict(Verdict::Goto("second".into()))]),
                rule([accept()]),
            ]),
        ),
        ("second", plain(vec![])),
    ];
    let walked = walk(&table(chains, vec![]), Hook::Forward, &packet());
    let Outcome::Dropped(place) = walked.outcome else {
        panic!("{walked}");
    };
    assert_eq!((place.chain.as_str(), place.rule), ("in", 1));
}

#[test]
fn statements_that_match() {
    let packet = packet();
    let is = |selector, operand| matches(&[Statement::Match(selector, Is, operand)], &packet);
    let is_not =
        |selector, operand| matches(&[Statement::Match(selector, IsNot, operand)], &packet);
    let net = |text: &str| Operand::Network(text.parse().expect("a network"));
    assert!(is(Selector::SourceAddress, net("10.244.1.0/24")));
    assert!(!is(Selector::SourceAddress, net("10.244.1.12/32")));
    assert!(is(Selector::DestinationAddress, net("10.244.1.12/32")));
    assert!(is_not(Selector::DestinationAddress, net("10.244.1.11/32")));
    assert!(is(Selector::L4Protocol, Operand::Protocol(6)));
    assert!(!is(Selector::L4Protocol, Operand::Protocol(17)));
    assert!(is(Selector::DestinationPort, Operand::Port(80)));
    assert!(is(Selector::DestinationPort, Operand::Ports(80, 80)));
    assert!(is(Selector::DestinationPort, Operand::Ports(1, 80)));
    assert!(!is(Selector::DestinationPort, Operand::Ports(81, 90)));
    assert!(is(
        Selector::InputInterface,
        Operand::Interface("in0".into())
    ));
    assert!(!is(
        Selector::OutputInterface,
        Operand::Interface("in0".into())
    ));
    assert!(is(
        Selector::OutputInterface,
        Operand::InterfacePrefix("out".into())
    ));
}

#[test]
fn states_of_a_connection() {
    let known = || Statement::CtState([CtState::Established, CtState::Related].into());
    let at = |state| Packet { state, ..packet() };
    assert!(!matches(&[known()], &packet()));
    assert!(matches(&[known()], &at(CtState::Established)));
    assert!(matches(&[known()], &at(CtState::Related)));
    assert!(!matches(&[known()], &at(CtState::Invalid)));
    assert!(!matches(&[Statement::TcpNotOpening], &packet()));
    let middle = Packet {
        opens: false,
        ..packet()
    };
    assert!(matches(&[Statement::TcpNotOpening], &middle));
}

#[test]
fn addresses_of_the_host_and_marks() {
    let here = Packet {
        local: vec![ip("10.244.1.12")],
        ..packet()
    };
    assert!(matches(&[Statement::DestinationIsLocal], &here));
    assert!(!matches(&[Statement::SourceIsLocal], &here));
    assert!(!matches(&[Statement::DestinationIsLocal], &packet()));
    let marked = Statement::MarkBits(0x6);
    assert!(!matches(
        &[Statement::SetMarkBits(0x2), marked.clone()],
        &here
    ));
    assert!(matches(
        &[Statement::SetMarkBits(0x7), marked.clone()],
        &here
    ));
    assert!(matches(
        &[
            Statement::SetMarkBits(0x2),
            Statement::FlipMarkBits(0x6),
            Statement::MarkBits(0x4),
        ],
        &here
    ));
    // Counting and logging change nothing.
    assert!(matches(
        &[
            Statement::Counter,
            Statement::Limit {
                per_second: 1,
                burst: 1
            },
            Statement::log("denied", 1, 0),
        ]
        .as_slice()[..1],
        &here
    ));
}

fn set(key: &[Selector], interval: bool, elements: Vec<Element>) -> Set {
    let mut declaration = Declaration::new(SetKind::Set, key);
    declaration.interval = interval;
    let mut set = Set::from(declaration);
    set.elements = elements;
    set
}

fn range(from: Key, to: Key) -> Element {
    Element {
        key_end: Some(Box::new(to)),
        ..Element::new(from)
    }
}

#[test]
fn sets_of_addresses_and_intervals() {
    let key = [Selector::SourceAddress];
    let within = |set: Set, comparison| {
        let statements = [
            Statement::InSet(key.to_vec(), comparison, "s".into()),
            accept(),
        ];
        passes(vec![rule(statements)], vec![("s", set)], &packet())
    };
    let one = |text: &str| Element::new(Key::address(ip(text)));
    assert!(within(set(&key, false, vec![one("10.244.1.11")]), Is));
    assert!(!within(set(&key, false, vec![one("10.244.1.12")]), Is));
    assert!(within(set(&key, false, vec![]), IsNot));
    let between = |from, to| {
        let element = range(Key::address(ip(from)), Key::address(ip(to)));
        within(set(&key, true, vec![element]), Is)
    };
    assert!(between("10.244.1.0", "10.244.1.11"));
    assert!(between("10.244.1.11", "10.244.1.255"));
    assert!(!between("10.244.1.12", "10.244.1.255"));
    assert!(!between("10.0.0.0", "10.244.1.10"));
}

#[test]
fn each_field_of_a_concatenation_is_an_interval_of_its_own() {
    let key = [
        Selector::SourceAddress,
        Selector::L4Protocol,
        Selector::DestinationPort,
    ];
    let join = |address: &str, protocol, port| {
        let key = Key::build().address(ip(address));
        key.protocol(protocol).port(port).finish()
    };
    let within = |from: Key, to: Key| {
        let statements = [Statement::InSet(key.to_vec(), Is, "s".into()), accept()];
        let set = set(&key, true, vec![range(from, to)]);
        passes(vec![rule(statements)], vec![("s", set)], &packet())
    };
    assert!(within(
        join("10.0.0.0", 6, 80),
        join("10.255.255.255", 6, 80)
    ));
    // As one long number the key would be inside, but its port is not.
    assert!(!within(
        join("10.0.0.0", 6, 90),
        join("10.255.255.255", 6, 99)
    ));
    assert!(!within(
        join("10.0.0.0", 17, 80),
        join("10.255.255.255", 17, 80)
    ));
}

#[test]
fn verdict_maps() {
    let key = vec![Selector::DestinationAddress];
    let go = |address: &str, verdict: Verdict| {
        let mut map = Set::from(Declaration::new(SetKind::VerdictMap, key.clone()));
        map.elements = vec![Element::with_verdict(Key::address(ip(address)), verdict)];
        let look_up = rule([Statement::VerdictMap(key.clone(), "m".into())]);
        passes(vec![look_up], vec![("m", map)], &packet())
    };
    assert!(go("10.244.1.12", Verdict::Accept));
    // Without an element the next rule is tried, which drops.
    assert!(!go("10.244.1.11", Verdict::Accept));
    assert!(!go("10.244.1.12", Verdict::Drop));
}

#[test]
fn refusals_are_distinct_from_drops() {
    let rules = vec![rule([Statement::Reject(RejectWith::TcpReset)])];
    let ruleset = table(vec![("in", base(Hook::Forward, 0, rules))], vec![]);
    let walked = walk(&ruleset, Hook::Forward, &packet());
    assert!(matches!(walked.outcome, Outcome::Rejected(_)), "{walked}");
}

#[test]
#[should_panic(expected = "no statement of a filter")]
fn translation_in_a_filter_is_refused() {
    matches(&[Statement::Masquerade], &packet());
}

#[test]
#[should_panic(expected = "no statement of a filter")]
fn unknown_constructs_are_refused() {
    matches(&[Statement::Foreign("[ osf ]".into())], &packet());
}

#[test]
#[should_panic(expected = "a limit before a verdict")]
fn a_verdict_behind_a_limit_is_refused() {
    let limit = Statement::Limit {
        per_second: 1,
        burst: 5,
    };
    matches(&[limit], &packet());
}

#[test]
#[should_panic(expected = "has no set s")]
fn a_missing_set_is_refused() {
    matches(
        &[Statement::InSet(vec![Selector::L4Protocol], Is, "s".into())],
        &packet(),
    );
}

#[test]
#[should_panic(expected = "has no chain nowhere")]
fn a_missing_chain_is_refused() {
    passes(
        vec![rule([Statement::Verdict(Verdict::Jump("nowhere".into()))])],
        vec![],
        &packet(),
    );
}

#[test]
#[should_panic(expected = "jumps are too deep")]
fn a_circle_is_refused() {
    let around = vec![rule([Statement::Verdict(Verdict::Goto("again".into()))])];
    let chains = vec![
        ("in", base(Hook::Forward, 0, around.clone())),
        ("again", plain(around)),
    ];
    walk(&table(chains, vec![]), Hook::Forward, &packet());
}

#[test]
#[should_panic(expected = "must not depend on")]
fn luck_is_refused() {
    let key = vec![Selector::Priority];
    let set = set(&key, false, vec![]);
    let look_up = rule([Statement::InSet(key, Is, "s".into())]);
    passes(vec![look_up], vec![("s", set)], &packet());
}

#[test]
fn learning_from_packets_decides_nothing() {
    let update = Statement::UpdateMap {
        map: "m".into(),
        key: vec![Selector::SourceAddress],
        timeout: Duration::from_secs(1),
        data: vec![Selector::DestinationAddress],
    };
    assert!(matches(&[update], &packet()));
}
