//! Properties of the difference between rulesets.

use std::sync::Arc;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::*;

fn element(kind: &SetKind) -> impl Strategy<Value = Element> + use<> {
    let kind = kind.clone();
    (0u16..12, 0u16..4, 0usize..3, any::<bool>()).prop_map(move |(key, data, chain, commented)| {
        let key = Key::build().port(key).finish();
        let element = match kind {
            SetKind::Set => Element::new(key),
            SetKind::Map(_) => Element::with_data(key, Data::build().port(data).finish()),
            SetKind::VerdictMap => {
                let chain = Name::from(["a", "b", "c"][chain]);
                Element::with_verdict(key, Verdict::Goto(chain))
            }
        };
        if commented {
            element.comment("commented")
        } else {
            element
        }
    })
}

fn set() -> impl Strategy<Value = Set> {
    let kinds = prop_oneof![
        Just(SetKind::Set),
        Just(SetKind::VerdictMap),
        Just(SetKind::Map(vec![Selector::DestinationPort])),
    ];
    kinds.prop_flat_map(|kind| {
        vec(element(&kind), 0..10).prop_map(move |mut elements| {
            elements.sort();
            elements.dedup_by(|a, b| a.key == b.key);
            Set {
                declaration: Arc::new(Declaration::new(kind.clone(), [Selector::DestinationPort])),
                elements,
            }
        })
    })
}

fn chain() -> impl Strategy<Value = Chain> {
    let rule = prop_oneof![
        Just(Statement::Verdict(Verdict::Drop)),
        Just(Statement::Counter),
        Just(Statement::Masquerade),
    ];
    let base = prop_oneof![Just(None), Just(Some(-100)), Just(Some(0))];
    (base, vec(rule, 0..4)).prop_map(|(priority, rules)| Chain {
        base: priority.map(|priority| BaseChain {
            kind: ChainKind::Filter,
            hook: Hook::Forward,
            priority,
        }),
        rules: rules.into_iter().map(|s| Rule::new([s])).collect(),
    })
}

/// Tables in which the chains that elements lead to exist, and not all others.
fn ruleset() -> impl Strategy<Value = Ruleset> {
    let table = (
        btree_map("[pqr]", set(), 0..3),
        btree_map("[xyz]", chain(), 0..3),
    );
    btree_map(any::<bool>(), table, 0..3).prop_map(|tables| {
        let tables = tables.into_iter().map(|(ip, (sets, chains))| {
            let family = if ip {
                TableFamily::Ip
            } else {
                TableFamily::Ip6
            };
            let mut table = Table {
                sets: sets.into_iter().map(|(n, s)| (n.into(), s)).collect(),
                chains: chains.into_iter().map(|(n, c)| (n.into(), c)).collect(),
                ..Table::default()
            };
            let elements = table.sets.values().flat_map(|set| &set.elements);
            let targets: Vec<_> = elements.filter_map(target).cloned().collect();
            for target in targets {
                let rules = vec![Rule::new([Statement::Counter])];
                table.chains.insert(target, Chain { base: None, rules });
            }
            (TableId::new(family, "t"), table)
        });
        Ruleset {
            tables: tables.collect(),
        }
    })
}

/// The chain that an element leads to.
fn target(element: &Element) -> Option<&Name> {
    match &element.value {
        Value::Verdict(verdict) => verdict.target(),
        Value::Data(_) | Value::None => None,
    }
}

/// Returns whether a step brings chains to a table in use together with elements of older maps that
/// lead to them.
fn leads_packets_astray(step: &Transaction) -> bool {
    let ops = || step.ops.iter();
    ops().any(|op| {
        let Op::AddElements(id, map, _, elements) = op else {
            return false;
        };
        let is_new = ops().any(|op| match op {
            Op::AddTable(table) => table == id,
            Op::AddSet(table, name, _) => table == id && name == map,
            _ => false,
        });
        // Tables in which a chain is made again come whole.
        let repaired = ops().any(|op| {
            matches!(op, Op::DeleteChain(table, name)
            if table == id && ops().any(|op| matches!(op, Op::AddChain(..)
                if op.table() == id && op.name() == Some(name))))
        });
        let leads_to = |chain| elements.iter().filter_map(target).any(|to| to == chain);
        !is_new
            && !repaired
            && ops().any(
                |op| matches!(op, Op::AddChain(table, name, _) if table == id && leads_to(name)),
            )
    })
}

/// Returns whether every table that was made has its base chains only when it has everything else.
fn only_whole_tables_meet_packets(before: &Ruleset, now: &Ruleset, wanted: &Ruleset) -> bool {
    let made = now
        .tables
        .iter()
        .filter(|(id, _)| !before.tables.contains_key(id));
    let mut in_force = made.filter(|(_, table)| table.chains.values().any(|c| c.base.is_some()));
    in_force.all(|(id, table)| wanted.tables.get(id) == Some(table))
}

proptest! {
    #[test]
    fn the_difference_of_equals_is_empty(ruleset in ruleset()) {
        prop_assert!(diff(&ruleset, ruleset.clone()).is_empty());
    }

    #[test]
    fn applying_the_difference_gives_the_wanted_state(a in ruleset(), b in ruleset()) {
        let mut state = a.clone();
        let transaction = diff(&a, b.clone());
        simulate::apply(&mut state, &transaction).unwrap();
        prop_assert_eq!(state, b);
    }

    #[test]
    fn the_steps_of_a_transaction_lead_to_the_same_state(
        a in ruleset(),
        b in ruleset(),
        most in 1usize..10,
    ) {
        let mut state = a.clone();
        for step in diff(&a, b.clone()).into_steps_of(most) {
            prop_assert!(!leads_packets_astray(&step), "{step:?}");
            simulate::apply(&mut state, &step).unwrap();
            prop_assert!(only_whole_tables_meet_packets(&a, &state, &b));
        }
        prop_assert_eq!(state, b);
    }
}

#[test]
fn only_what_differs_is_touched() {
    let declaration = || Declaration::new(SetKind::Set, [Selector::DestinationPort]);
    let with = |ports: &[u16]| {
        let mut set = Set::from(declaration());
        set.elements = ports
            .iter()
            .map(|port| Element::new(Key::build().port(*port).finish()))
            .collect();
        let table = Table {
            sets: [("s".into(), set)].into(),
            chains: [("c".into(), Chain::default())].into(),
            ..Table::default()
        };
        Ruleset {
            tables: [(TableId::new(TableFamily::Ip, "t"), table)].into(),
        }
    };
    let transaction = diff(&with(&[1, 2, 3]), with(&[1, 3, 4]));
    let element = |port| vec![Element::new(Key::build().port(port).finish())];
    let id = TableId::new(TableFamily::Ip, "t");
    assert_eq!(
        transaction.ops,
        [
            Op::DeleteElements(id.clone(), "s".into(), Arc::new(declaration()), element(2)),
            Op::AddElements(id, "s".into(), Arc::new(declaration()), element(4)),
        ]
    );
}

#[test]
fn objects_of_kinds_that_are_never_wanted_go_last() {
    let table = |strays: &[(StrayKind, &str)]| {
        let strays = strays.iter().map(|(kind, name)| Stray {
            kind: *kind,
            name: Name::from(*name),
        });
        let table = Table {
            strays: strays.collect(),
            ..Table::default()
        };
        Ruleset {
            tables: [(TableId::new(TableFamily::Ip, "t"), table)].into(),
        }
    };
    let mut before = table(&[(StrayKind::Object(1), "a"), (StrayKind::Flowtable, "a")]);
    let tables = before.tables.values_mut();
    for table in tables {
        table.chains.insert("intruder".into(), Chain::default());
        let set = Set::from(Declaration::new(SetKind::Set, []));
        table.sets.insert("intruder".into(), set);
    }
    let (id, name) = (TableId::new(TableFamily::Ip, "t"), Name::from("intruder"));
    let stray = |kind| {
        let name = Name::from("a");
        Op::DeleteStray(id.clone(), Stray { kind, name })
    };
    let transaction = diff(&before, table(&[]));
    assert_eq!(
        transaction.ops,
        [
            Op::FlushSet(id.clone(), name.clone()),
            Op::DeleteChain(id.clone(), name.clone()),
            Op::DeleteSet(id.clone(), name),
            stray(StrayKind::Object(1)),
            stray(StrayKind::Flowtable),
        ]
    );
    simulate::apply(&mut before, &transaction).unwrap();
    assert_eq!(before, table(&[]));
}
