//! The kernel takes what the netlink layer writes, and it means what the text says.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::everything::{
    TABLE, address, endpoint_data, endpoint_key, everything, goto, plain, set,
};
use nftlet::netlink::{Error, Nftables};
use nftlet::nft::{
    Data, Declaration, Element, Key, ObjectPath, Op, Rule, Ruleset, Selector, SetKind, Statement,
    Table, TableFamily, TableId, Transaction, Value, Verdict, diff, text,
};
use nftlet_lab::netns::{Namespace, require_net_admin};

/// As [`everything`], without what nft 1.0.6 aborts on when it reads it as text: the update of a
/// dynamic map whose key holds an IPv6 address.
fn everything_as_text_can_say(family: TableFamily) -> Ruleset {
    let mut ruleset = everything(family);
    if family == TableFamily::Ip6 {
        for table in ruleset.tables.values_mut() {
            table.chains.remove("learn");
        }
    }
    ruleset
}

fn as_text(ruleset: &Ruleset) -> String {
    let mut out = Vec::new();
    text::render(ruleset, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

fn list(ns: &Namespace, family: TableFamily) -> String {
    ns.nft(&["list", "table", family.keyword(), TABLE])
}

/// Writes the transaction from inside a namespace.
fn apply(ns: &Namespace, transaction: &Transaction) -> Result<(), Error> {
    ns.run(|| Nftables::open()?.apply(transaction).map(drop))
}

/// Compares rulesets and, where they differ, prints the operations between them only.
fn assert_same(actual: &Ruleset, wanted: &Ruleset, context: &str) {
    let difference = diff(actual, wanted.clone());
    assert!(difference.is_empty(), "{context}: {difference:#?}");
    assert!(actual == wanted, "{context}: unequal without a difference");
}

fn read(ns: &Namespace, wanted: &Ruleset) -> Ruleset {
    ns.run(|| Nftables::open().unwrap().read(&[TABLE], wanted).unwrap())
}

#[test]
fn netlink_and_text_mean_the_same() {
    if !require_net_admin() {
        return;
    }
    for family in [TableFamily::Ip, TableFamily::Ip6] {
        let (by_netlink, by_text) = (Namespace::new("netlink"), Namespace::new("text"));
        let wanted = everything_as_text_can_say(family);
        apply(&by_netlink, &diff(&Ruleset::default(), wanted.clone())).unwrap();
        by_text.nft_load(&as_text(&wanted));
        let listing = list(&by_netlink, family);
        assert_eq!(listing, list(&by_text, family));
        assert!(listing.contains("shop/web:http"), "{listing}");
        // Loading the text again replaces the table by an equal one.
        by_text.nft_load(&as_text(&wanted));
        assert_eq!(listing, list(&by_text, family));
    }
}

#[test]
fn what_was_written_is_read_back() {
    if !require_net_admin() {
        return;
    }
    for family in [TableFamily::Ip, TableFamily::Ip6] {
        let ns = Namespace::new("read");
        let wanted = everything(family);
        assert_eq!(read(&ns, &wanted), Ruleset::default());
        apply(&ns, &diff(&Ruleset::default(), wanted.clone())).unwrap();
        assert_same(&read(&ns, &wanted), &wanted, family.keyword());
        // Host tools can print every rule, also those they could not load.
        let listing = list(&ns, family);
        assert!(listing.contains("update @affinity"), "{listing}");
    }
}

/// A table that is too large to be written at once.
fn large(family: TableFamily) -> Ruleset {
    let mut ruleset = everything(family);
    let number = |n: u16| Key::build().protocol(17).port(n);
    let ports: Vec<Element> = (0..20_000)
        .map(|n| Element::new(number(n).finish()))
        .collect();
    let leads: Vec<Element> = (0..10_000)
        .map(|n| Element::with_verdict(number(n).finish(), Verdict::Goto("refuse".into())))
        .collect();
    let key = [Selector::L4Protocol, Selector::DestinationPort];
    for table in ruleset.tables.values_mut() {
        let ports = set(Declaration::new(SetKind::Set, key), ports.clone());
        table.sets.insert("many-ports".into(), ports);
        let leads = set(Declaration::new(SetKind::VerdictMap, key), leads.clone());
        table.sets.insert("many-verdicts".into(), leads);
        let lookup = Statement::VerdictMap(key.into(), "many-verdicts".into());
        if let Some(services) = table.chains.get_mut("services") {
            services.rules.push(Rule::new([lookup]));
        }
    }
    ruleset
}

#[test]
fn large_tables_are_written_in_steps() {
    if !require_net_admin() {
        return;
    }
    for family in [TableFamily::Ip, TableFamily::Ip6] {
        let ns = Namespace::new("steps");
        let wanted = large(family);
        let mut steps = 0;
        for step in diff(&Ruleset::default(), wanted.clone()).into_steps() {
            let listing = ns.nft(&["list", "ruleset"]);
            assert!(!listing.contains("type nat hook"), "after {steps} steps");
            apply(&ns, &step).unwrap();
            steps += 1;
        }
        assert!(steps > 5, "{steps} steps");
        assert_same(&read(&ns, &wanted), &wanted, family.keyword());
    }
}

#[test]
fn what_nft_loaded_from_the_text_needs_no_change() {
    if !require_net_admin() {
        return;
    }
    for family in [TableFamily::Ip, TableFamily::Ip6] {
        let ns = Namespace::new("adopt");
        let wanted = everything_as_text_can_say(family);
        ns.nft_load(&as_text(&wanted));
        let difference = diff(&read(&ns, &wanted), wanted);
        // nft loads a prefix match in other expressions than nftlet writes; such chains are
        // written again. Sets and their elements are taken over unchanged.
        for op in &difference.ops {
            assert!(matches!(op, Op::FlushChain(..) | Op::AddRule(..)), "{op:?}");
        }
    }
}

#[test]
fn foreign_changes_are_seen_and_undone() {
    if !require_net_admin() {
        return;
    }
    let changes = [
        "add rule ip nftlet-test refuse counter",
        "insert rule ip nftlet-test services tcp dport 22 accept",
        "flush chain ip nftlet-test lb-3",
        "delete element ip nftlet-test endpoints { 10.96.0.5 . tcp . 80 . 0:1 }",
        "add element ip nftlet-test addresses { 10.96.0.99 }",
        "delete element ip nftlet-test ranges { 10.96.0.0/16 }",
        "delete element ip nftlet-test frontends { 10.96.0.5 . tcp . 80 }; \
         add element ip nftlet-test frontends { 10.96.0.5 . tcp . 80 : drop }",
        "add chain ip nftlet-test intruder { tcp dport 1 drop; }",
        "add set ip nftlet-test intruder { type ipv4_addr; elements = { 1.2.3.4 }; }",
        "add set ip nftlet-test intruder { type ipv4_addr; flags timeout; timeout 1h; }; \
         add element ip nftlet-test intruder { 1.2.3.4 }",
        "add chain ip nftlet-test intruder; \
         add map ip nftlet-test intruders { type ipv4_addr : verdict; \
         elements = { 1.2.3.4 : jump intruder }; }; \
         insert rule ip nftlet-test services ip saddr vmap @intruders",
        "add chain ip nftlet-test intruder; \
         add map ip nftlet-test intruders { type ipv4_addr : verdict; flags constant; \
         elements = { 1.2.3.4 : jump intruder }; }; \
         insert rule ip nftlet-test services ip saddr vmap @intruders",
        "add chain ip nftlet-test intruder; \
         insert rule ip nftlet-test services ip saddr { 1.2.3.4, 1.2.3.5 } drop; \
         insert rule ip nftlet-test services ip saddr vmap { 1.2.3.4 : goto intruder }",
        "add counter ip nftlet-test intruder; \
         add quota ip nftlet-test intruder { over 1 mbytes }; \
         add limit ip nftlet-test intruder { rate 1/second }; \
         insert rule ip nftlet-test services counter name intruder quota name intruder drop",
        "add counter ip nftlet-test intruder; \
         add map ip nftlet-test intruders { type ipv4_addr : counter; \
         elements = { 1.2.3.4 : \"intruder\" }; }; \
         insert rule ip nftlet-test services counter name ip saddr map @intruders",
        "add ct timeout ip nftlet-test intruder { protocol udp; policy = { unreplied : 9 }; }",
        "add ct expectation ip nftlet-test intruder \
         { protocol udp; dport 9; timeout 1h; size 9; l3proto ip; }",
        "delete chain ip nftlet-test filter-input",
        "add chain ip nftlet-test filter-input { policy drop; }",
        "add element ip nftlet-test frontends { * : drop }",
        "add element ip nftlet-test frontends { 10.96.0.99 . tcp . 80 : continue }",
        "add table ip nftlet-test { flags dormant; }",
        "delete table ip nftlet-test",
        "flush ruleset",
    ];
    let wanted = everything(TableFamily::Ip);
    for change in changes {
        let ns = Namespace::new("foreign");
        apply(&ns, &diff(&Ruleset::default(), wanted.clone())).unwrap();
        ns.nft_load(change);
        let actual = read(&ns, &wanted);
        assert_ne!(actual, wanted, "not noticed: {change}");
        apply(&ns, &diff(&actual, wanted.clone()))
            .unwrap_or_else(|error| panic!("after {change}: {error}"));
        assert_same(&read(&ns, &wanted), &wanted, change);
    }
}

#[test]
fn of_more_refusals_than_fit_the_first_is_reported_and_later_answers_arrive() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("refusals");
    let id = TableId::new(TableFamily::Ip, TABLE);
    // Each message is answered, and the receive buffer holds a few hundred answers.
    let chains = (0..5_000).map(|index| format!("missing-{index}"));
    let ops = chains.map(|name| Op::DeleteChain(id.clone(), name.into()));
    let mut all = vec![Op::AddTable(id.clone())];
    all.extend(ops);
    let transaction = Transaction { ops: all };
    ns.run(|| {
        let mut nftables = Nftables::open().unwrap();
        let error = nftables.apply(&transaction).unwrap_err();
        let first = ObjectPath::Chain(id.clone(), "missing-0".into());
        assert_eq!(error.refused(), Some(&first), "{error}");
        let before = nftables.generation().unwrap();
        let one = Transaction {
            ops: vec![Op::AddTable(id)],
        };
        nftables.apply(&one).unwrap();
        assert_eq!(nftables.generation().unwrap(), before + 1);
    });
}

/// A map of so many endpoints that it is not dumped.
#[test]
fn what_others_change_in_a_very_large_set_is_seen() {
    if !require_net_admin() {
        return;
    }
    let key = |index: u32| {
        let address = Ipv4Addr::from(0x0a60_0000 + index / 10);
        Key::build()
            .address(address.into())
            .protocol(6)
            .port(80)
            .number(index % 10)
            .finish()
    };
    let endpoint = |index: u32| {
        let address = Ipv4Addr::from(0x0a01_0000 + index % 60_000);
        let data = Data::build().address(address.into()).port(8080).finish();
        Element::with_data(key(index), data)
    };
    let declaration = Declaration::new(SetKind::Map(endpoint_data()), endpoint_key());
    let elements = (0..160_000).map(endpoint).collect();
    let table = Table {
        sets: [("endpoints".into(), set(declaration, elements))].into(),
        ..Table::default()
    };
    let id = TableId::new(TableFamily::Ip, TABLE);
    let wanted = Ruleset {
        tables: [(id, table)].into(),
    };
    let ns = Namespace::new("very-large");
    apply(&ns, &diff(&Ruleset::default(), wanted.clone())).unwrap();
    assert_same(&read(&ns, &wanted), &wanted, "as written");
    let changes = [
        (
            "delete element ip nftlet-test endpoints { 10.96.0.5 . tcp . 80 . 0:1 }",
            1,
        ),
        (
            "delete element ip nftlet-test endpoints { 10.96.0.5 . tcp . 80 . 0:1 }; \
             add element ip nftlet-test endpoints { 10.96.0.5 . tcp . 80 . 0:1 : 10.9.9.9 . 80 }",
            2,
        ),
        (
            "add element ip nftlet-test endpoints { 10.99.0.5 . tcp . 80 . 0:1 : 10.9.9.9 . 80 }",
            1,
        ),
        ("flush map ip nftlet-test endpoints", 160_000),
    ];
    for (change, elements) in changes {
        ns.nft_load(change);
        let repair = diff(&read(&ns, &wanted), wanted.clone());
        assert_eq!(repair.elements(), elements, "{change}");
        apply(&ns, &repair).unwrap_or_else(|error| panic!("after {change}: {error}"));
        assert_same(&read(&ns, &wanted), &wanted, change);
    }
}

#[test]
fn a_transaction_of_300_000_elements_is_one_message() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("large");
    let id = TableId::new(TableFamily::Ip, TABLE);
    let mut table = Table::default();
    let elements: Vec<_> = (0..300_000u32)
        .map(|n| Element::new(Key::address(Ipv4Addr::from(0x0a00_0000 + n).into())))
        .collect();
    table.sets.insert(
        "s".into(),
        set(
            Declaration::new(SetKind::Set, [Selector::DestinationAddress]),
            elements,
        ),
    );
    let wanted = Ruleset {
        tables: [(id.clone(), table)].into(),
    };
    // One element that the kernel refuses, at the very end, must undo all the others.
    let declaration = wanted.tables[&id].sets["s"].declaration.clone();
    let mut refused = diff(&Ruleset::default(), wanted.clone());
    let last = Element::new(Key::address([10, 4, 147, 224].into()));
    refused.ops.push(Op::DeleteElements(
        id.clone(),
        "s".into(),
        declaration,
        vec![last.clone()],
    ));
    let error = apply(&ns, &refused).unwrap_err();
    assert_eq!(
        error.refused(),
        Some(&ObjectPath::Element(
            id,
            "s".into(),
            Box::new(last),
            "10.4.147.224".into()
        ))
    );
    assert_eq!(read(&ns, &wanted), Ruleset::default());
    apply(&ns, &diff(&Ruleset::default(), wanted.clone())).unwrap();
    assert_same(&read(&ns, &wanted), &wanted, "written");
}

#[test]
fn an_error_names_the_object_at_fault() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("errors");
    let wanted = everything(TableFamily::Ip);
    let id = TableId::new(TableFamily::Ip, TABLE);
    apply(&ns, &diff(&Ruleset::default(), wanted.clone())).unwrap();
    let frontends = &wanted.tables[&id].sets["frontends"];
    let unknown = |port| {
        Element::with_verdict(
            Key::build()
                .address(address(TableFamily::Ip, 77))
                .protocol(6)
                .port(port)
                .finish(),
            Verdict::Goto(if port == 81 { "nowhere" } else { "lb-3" }.into()),
        )
    };
    let cases: Vec<(Op, &str)> = vec![
        (
            Op::AddElements(
                id.clone(),
                "frontends".into(),
                frontends.declaration.clone(),
                vec![unknown(80), unknown(81), unknown(82)],
            ),
            "the kernel refused element { 10.96.0.77 . tcp . 81 : goto nowhere } of set frontends \
             in table ip nftlet-test: No such file or directory",
        ),
        (
            Op::AddRule(id.clone(), "services".into(), Rule::new([goto("nowhere")])),
            "the kernel refused rule \"goto nowhere\" of chain services in table ip nftlet-test: \
             No such file or directory",
        ),
        (
            Op::DeleteChain(id.clone(), "services".into()),
            "the kernel refused chain services of table ip nftlet-test: Device or resource busy",
        ),
        (
            Op::DeleteSet(id.clone(), "nothing".into()),
            "the kernel refused set nothing of table ip nftlet-test: No such file or directory",
        ),
        (
            Op::AddChain(TableId::new(TableFamily::Ip, "absent"), "c".into(), None),
            "the kernel refused chain c of table ip absent: No such file or directory",
        ),
    ];
    for (op, expected) in cases {
        let error = apply(&ns, &Transaction { ops: vec![op] }).unwrap_err();
        assert!(error.to_string().starts_with(expected), "{error}");
    }
    assert_same(
        &read(&ns, &wanted),
        &wanted,
        "a refused transaction left traces",
    );
}

#[test]
fn what_cannot_be_written_is_named_before_anything_is_sent() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("unwritable");
    let id = TableId::new(TableFamily::Ip, TABLE);
    let foreign = Rule::new([Statement::Foreign("something".into())]);
    let transaction = Transaction {
        ops: vec![
            Op::AddTable(id.clone()),
            Op::AddChain(id.clone(), "c".into(), None),
            Op::AddRule(id.clone(), "c".into(), foreign),
        ],
    };
    let error = apply(&ns, &transaction).unwrap_err();
    assert!(matches!(error, Error::ForeignRule { .. }), "{error}");
    let long = Transaction {
        ops: vec![Op::AddChain(id, "x".repeat(300).as_str().into(), None)],
    };
    let error = apply(&ns, &long).unwrap_err();
    assert!(matches!(error, Error::Name { .. }), "{error}");
    assert_eq!(ns.nft(&["list", "ruleset"]), "");
}

#[test]
fn one_replaced_value_is_one_element_out_and_one_in() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("replace");
    let before = everything(TableFamily::Ip);
    let id = TableId::new(TableFamily::Ip, TABLE);
    apply(&ns, &diff(&Ruleset::default(), before.clone())).unwrap();
    let mut after = before.clone();
    let endpoints = after
        .tables
        .get_mut(&id)
        .and_then(|table| table.sets.get_mut("endpoints"))
        .unwrap();
    endpoints.elements[1].value = Value::Data(
        Data::build()
            .address(address(TableFamily::Ip, 200))
            .port(9090)
            .finish(),
    );
    let transaction = diff(&before, after.clone());
    assert_eq!((transaction.ops.len(), transaction.elements()), (2, 2));
    apply(&ns, &transaction).unwrap();
    assert_same(&read(&ns, &after), &after, "replaced");
}

/// Another process keeps changing the ruleset while it is read: each interrupted dump is
/// started again, so that what was read is what was there at some moment.
#[test]
fn a_table_is_read_whole_while_others_change_it() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("interrupted");
    let id = TableId::new(TableFamily::Ip, TABLE);
    // Enough chains and rules for a dump to take several messages.
    let mut table = Table::default();
    for index in 0..400 {
        let rules = vec![Rule::new([Statement::Counter]); 5];
        let name = format!("chain-{index:03}");
        table.chains.insert(name.as_str().into(), plain(rules));
    }
    let wanted = Ruleset {
        tables: [(id.clone(), table)].into(),
    };
    apply(&ns, &diff(&Ruleset::default(), wanted.clone())).unwrap();
    let mut other = ns.run(|| Nftables::open().unwrap());
    let other_id = TableId::new(TableFamily::Ip, "others");
    let change = |op| Transaction { ops: vec![op] };
    let finished = Arc::new(AtomicUsize::new(0));
    let reading = std::thread::spawn({
        let (ns, wanted, finished) = (ns.clone(), wanted.clone(), finished.clone());
        move || -> Result<Vec<Ruleset>, Error> {
            let mut nftables = ns.run(Nftables::open)?;
            let mut read = || {
                let read = nftables.read(&[TABLE], &wanted)?;
                finished.fetch_add(1, Ordering::Relaxed);
                Ok(read)
            };
            (0..30).map(|_| read()).collect()
        }
    });
    // Readers need a moment without a change, as they get it in real life. How long depends on
    // the machine, so it grows until they get on.
    let (mut pause, mut pauses, mut seen) = (Duration::from_millis(3), 0, 0);
    while !reading.is_finished() {
        other
            .apply(&change(Op::AddTable(other_id.clone())))
            .unwrap();
        other
            .apply(&change(Op::DeleteTable(other_id.clone())))
            .unwrap();
        std::thread::sleep(pause);
        pauses += 1;
        let now = finished.load(Ordering::Relaxed);
        if now > seen {
            (seen, pauses) = (now, 0);
        } else if pauses >= 10 {
            (pause, pauses) = (pause * 2, 0);
        }
    }
    for actual in reading.join().expect("the reader does not panic").unwrap() {
        assert_same(&actual, &wanted, "while others write");
    }
}
