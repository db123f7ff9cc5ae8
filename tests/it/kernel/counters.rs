//! Sets whose elements count: what they count is read, survives other changes, and does not make
//! the set look changed.

use std::net::UdpSocket;
use std::sync::Arc;

use nftlet::netlink::{Error, Nftables};
use nftlet::nft::{
    BaseChain, Chain, ChainKind, Comparison, Declaration, Element, Hook, Key, Op, Operand, Rule,
    Ruleset, Selector, Set, SetKind, Statement, Table, TableFamily, TableId, Transaction, Verdict,
    diff,
};
use nftlet_lab::netns::{Namespace, require_net_admin};

const TABLE: &str = "nftlet-test";
const SET: &str = "counted";
/// An IPv4 and a UDP header.
const HEADERS: u64 = 28;

fn id() -> TableId {
    TableId::new(TableFamily::Ip, TABLE)
}

fn key(port: u16) -> Key {
    Key::build().port(port).finish()
}

fn declaration() -> Declaration {
    Declaration {
        counter: true,
        ..Declaration::new(SetKind::Set, [Selector::DestinationPort]).comment("ports in use")
    }
}

/// A table that looks up the port of every datagram sent, and drops those with a mark.
fn wanted(declaration: Declaration, elements: Vec<Element>, bits: u32) -> Ruleset {
    let chain = Chain {
        base: Some(BaseChain {
            kind: ChainKind::Filter,
            hook: Hook::Output,
            priority: 0,
        }),
        rules: vec![
            // UDP alone: nothing listens, so ICMP messages come back.
            Rule::new([
                Statement::Match(Selector::L4Protocol, Comparison::Is, Operand::Protocol(17)),
                Statement::InSet(declaration.key.clone(), Comparison::Is, SET.into()),
            ]),
            Rule::new([Statement::MarkBits(bits), Statement::Verdict(Verdict::Drop)]),
        ],
    };
    let set = Set {
        declaration: Arc::new(declaration),
        elements,
    };
    let table = Table {
        sets: [(SET.into(), set)].into(),
        chains: [("output".into(), chain)].into(),
        ..Table::default()
    };
    Ruleset {
        tables: [(id(), table)].into(),
    }
}

fn ports(ports: &[u16]) -> Vec<Element> {
    ports.iter().map(|port| Element::new(key(*port))).collect()
}

fn loopback(name: &str) -> Namespace {
    let ns = Namespace::new(name);
    ns.ip("link set lo up");
    ns
}

fn send(ns: &Namespace, port: u16, payload: &[u8]) {
    ns.run(|| {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(payload, ("127.0.0.1", port)).unwrap();
    });
}

fn read(nftables: &mut Nftables, wanted: &Ruleset) -> Ruleset {
    nftables.read(&[TABLE], wanted).unwrap()
}

/// Makes the ruleset the kernel's and returns how many operations that took.
fn change(nftables: &mut Nftables, wanted: &Ruleset) -> usize {
    let transaction = diff(&read(nftables, wanted), wanted.clone());
    nftables.apply(&transaction).unwrap();
    transaction.ops.len()
}

#[test]
fn elements_count_and_keep_their_counts_over_other_changes() {
    if !require_net_admin() {
        return;
    }
    let ns = loopback("count");
    let mut nftables = ns.run(Nftables::open).unwrap();
    let first = wanted(declaration(), ports(&[7, 9, 11]), 1);
    change(&mut nftables, &first);
    send(&ns, 9, b"abc");
    send(&ns, 9, b"");
    send(&ns, 7, b"abcd");
    let seven = (key(7), 1, HEADERS + 4);
    let nine = (key(9), 2, 2 * HEADERS + 3);
    let counters = nftables.counters(&id(), SET).unwrap();
    assert_eq!(
        counters,
        [seven.clone(), nine.clone(), (key(11), 0, 0)],
        "each element counts for itself"
    );
    assert_eq!(read(&mut nftables, &first), first, "counts are no value");

    let other_elements = wanted(declaration(), ports(&[9, 13]), 1);
    assert_eq!(change(&mut nftables, &other_elements), 2);
    let counters = nftables.counters(&id(), SET).unwrap();
    assert_eq!(counters, [nine.clone(), (key(13), 0, 0)]);

    let other_rules = wanted(declaration(), ports(&[9, 13]), 2);
    assert_eq!(change(&mut nftables, &other_rules), 3);
    let counters = nftables.counters(&id(), SET).unwrap();
    assert_eq!(counters, [nine, (key(13), 0, 0)]);

    // The address changed hands: who comes back begins at zero.
    change(&mut nftables, &first);
    let counters = nftables.counters(&id(), SET).unwrap();
    assert_eq!(counters.first(), Some(&(key(7), 0, 0)));
}

/// A key of a range of ports, and in a set of two fields of the loopback network too.
fn range(two_fields: bool, from: u16, to: u16) -> Element {
    let key = |last: [u8; 4], port| match two_fields {
        true => Key::build().port(port).address(last.into()).finish(),
        false => key(port),
    };
    Element {
        key_end: Some(Box::new(key([127, 255, 255, 255], to))),
        ..Element::new(key([127, 0, 0, 0], from))
    }
}

#[test]
fn intervals_count_by_their_first_key() {
    if !require_net_admin() {
        return;
    }
    for two_fields in [false, true] {
        let ns = loopback("count-ranges");
        let mut nftables = ns.run(Nftables::open).unwrap();
        let mut declaration = Declaration {
            interval: true,
            ..declaration()
        };
        if two_fields {
            declaration.key.push(Selector::SourceAddress);
        }
        let (low, high) = (range(two_fields, 1, 9), range(two_fields, 100, 65_535));
        let ruleset = wanted(declaration.clone(), vec![low.clone(), high.clone()], 1);
        change(&mut nftables, &ruleset);
        for port in [5, 50, 65_000] {
            send(&ns, port, b"");
        }
        let counted = [
            (low.key.clone(), 1, HEADERS),
            (high.key.clone(), 1, HEADERS),
        ];
        assert_eq!(nftables.counters(&id(), SET).unwrap(), counted);
        assert_eq!(read(&mut nftables, &ruleset), ruleset);

        // Other elements come and go.
        let middle = range(two_fields, 20, 30);
        let declaration = Arc::new(declaration);
        let change = |op: fn(_, _, _, _) -> Op, element: &Element| {
            let elements = vec![element.clone()];
            op(id(), SET.into(), declaration.clone(), elements)
        };
        let swap = Transaction {
            ops: vec![
                change(Op::DeleteElements, &low),
                change(Op::AddElements, &middle),
            ],
        };
        nftables.apply(&swap).unwrap();
        let counted = [(middle.key.clone(), 0, 0), (high.key.clone(), 1, HEADERS)];
        assert_eq!(nftables.counters(&id(), SET).unwrap(), counted);
    }
}

#[test]
fn there_is_nothing_to_read_where_nothing_counts() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("count-nothing");
    let mut nftables = ns.run(Nftables::open).unwrap();
    let plain = Declaration::new(SetKind::Set, [Selector::DestinationPort]);
    change(&mut nftables, &wanted(plain, ports(&[7]), 1));
    assert_eq!(nftables.counters(&id(), SET).unwrap(), []);
    assert_eq!(nftables.counters(&id(), "absent").unwrap(), []);
}

#[test]
fn a_set_that_counts_otherwise_or_has_another_comment_is_another_set() -> Result<(), Error> {
    if !require_net_admin() {
        return Ok(());
    }
    let ruleset = wanted(declaration(), vec![], 1);
    let comment = "comment \"ports in use\";";
    let cases = [
        (format!("counter; {comment}"), true),
        (comment.to_owned(), false),
        ("counter;".to_owned(), false),
        ("counter; comment \"other ports\";".to_owned(), false),
        (format!("quota 10 bytes; {comment}"), false),
        (format!("counter quota 10 bytes; {comment}"), false),
    ];
    for (declared, same) in cases {
        let ns = Namespace::new("other-set");
        ns.nft_load(&format!(
            "table ip {TABLE} {{ set {SET} {{ type inet_service; {declared} }}\n}}"
        ));
        let mut nftables = ns.run(Nftables::open)?;
        let found = nftables.read(&[TABLE], &ruleset)?;
        let set = |ruleset: &Ruleset| ruleset.tables[&id()].sets[SET].declaration.clone();
        assert_eq!(set(&found) == set(&ruleset), same, "{declared}");
        nftables.apply(&diff(&found, ruleset.clone()))?;
        assert_eq!(nftables.read(&[TABLE], &ruleset)?, ruleset, "{declared}");
    }
    Ok(())
}
