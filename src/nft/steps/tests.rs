//! Which operation comes in which step.

use super::*;
use crate::nft::Verdict;
use crate::nft::{BaseChain, ChainKind, Hook, Key, Rule, Selector, Statement, TableFamily};

fn id() -> TableId {
    TableId::new(TableFamily::Ip, "t")
}

fn rule() -> Rule {
    Rule::new([Statement::Verdict(Verdict::Drop)])
}

fn declaration() -> Arc<Declaration> {
    let declaration = Declaration::new(SetKind::VerdictMap, [Selector::L4Protocol]);
    Arc::new(declaration)
}

fn add_set(name: &str) -> Op {
    Op::AddSet(id(), name.into(), declaration())
}

fn add_chain(name: &str) -> Op {
    Op::AddChain(id(), name.into(), None)
}

fn add_rule(chain: &str) -> Op {
    Op::AddRule(id(), chain.into(), rule())
}

/// Adds an element that leads to a chain.
fn lead(set: &str, chain: &str) -> Op {
    let key = Key::build().protocol(6).finish();
    let element = Element::with_verdict(key, Verdict::Goto(chain.into()));
    Op::AddElements(id(), set.into(), declaration(), vec![element])
}

fn steps(ops: &[Op]) -> Vec<Vec<Op>> {
    let whole = Transaction { ops: ops.to_vec() };
    whole.into_steps().map(|step| step.ops).collect()
}

#[test]
fn new_chains_of_a_table_in_use_come_first() {
    let flush = Op::FlushChain(id(), "old".into());
    let ops = [
        flush.clone(),
        add_chain("new"),
        add_rule("new"),
        add_rule("old"),
        lead("m", "new"),
    ];
    assert_eq!(
        steps(&ops),
        [
            vec![add_chain("new"), add_rule("new")],
            vec![flush, add_rule("old"), lead("m", "new")],
        ]
    );
}

#[test]
fn new_sets_come_filled_with_the_new_chains_that_read_them() {
    let ops = [
        add_set("new-map"),
        add_chain("new"),
        add_rule("new"),
        lead("m", "new"),
        lead("new-map", "new"),
    ];
    assert_eq!(
        steps(&ops),
        [
            vec![
                add_set("new-map"),
                add_chain("new"),
                add_rule("new"),
                lead("new-map", "new"),
            ],
            vec![lead("m", "new")],
        ]
    );
}

#[test]
fn new_sets_alone_are_no_reason_for_a_step() {
    let ops = [add_set("new-map"), add_rule("old"), lead("new-map", "old")];
    assert_eq!(steps(&ops), [ops.to_vec()]);
}

#[test]
fn chains_of_one_table_do_not_split_another() {
    let other = TableId::new(TableFamily::Ip6, "t");
    let ops = [
        add_chain("new"),
        Op::AddSet(other.clone(), "s".into(), declaration()),
        Op::AddRule(other, "old".into(), rule()),
    ];
    let [first, second] = &steps(&ops)[..] else {
        panic!("not two steps");
    };
    assert_eq!(first, &[add_chain("new")]);
    assert_eq!(second.len(), 2);
}

#[test]
fn chains_that_elements_led_to_go_last() {
    let key = Key::build().protocol(6).finish();
    let unlead = Op::DeleteElements(
        id(),
        "m".into(),
        declaration(),
        vec![Element::with_verdict(key, Verdict::Goto("old".into()))],
    );
    let flush = Op::FlushChain(id(), "old".into());
    let delete = Op::DeleteChain(id(), "old".into());
    assert_eq!(
        steps(&[flush.clone(), unlead.clone(), delete.clone()]),
        [vec![flush.clone(), unlead.clone()], vec![delete.clone()]]
    );
    assert_eq!(steps(&[flush.clone(), delete.clone()]).len(), 1);
    let again = [flush, unlead, delete, add_chain("old")];
    assert_eq!(steps(&again).len(), 1);
}

/// The old chain is in the way of the verdicts that lead to the new one.
#[test]
fn a_table_with_a_chain_that_is_made_again_comes_in_one_step() {
    let ops = [
        Op::DeleteChain(id(), "remade".into()),
        add_set("new-map"),
        add_chain("new"),
        add_chain("remade"),
        lead("new-map", "remade"),
    ];
    assert_eq!(steps(&ops), [ops.to_vec()]);
}

#[test]
fn a_table_with_a_set_that_is_made_again_comes_in_one_step() {
    let ops = [
        Op::DeleteSet(id(), "remade".into()),
        add_set("remade"),
        add_chain("new"),
    ];
    assert_eq!(steps(&ops), [ops.to_vec()]);
}

fn add_base_chain(name: &str) -> Op {
    let base = BaseChain {
        kind: ChainKind::Filter,
        hook: Hook::Forward,
        priority: 0,
    };
    Op::AddChain(id(), name.into(), Some(base))
}

#[test]
fn new_base_chains_do_not_come_first() {
    let ops = [add_base_chain("base"), add_rule("base")];
    assert_eq!(steps(&ops), [ops.to_vec()]);
}

/// Adds elements without verdicts to a set of ports.
fn fill(set: &str, interval: bool, ports: &[u16]) -> Op {
    let mut declaration = Declaration::new(SetKind::Set, [Selector::DestinationPort]);
    declaration.interval = interval;
    let keys = ports.iter().map(|port| Key::build().port(*port).finish());
    let elements = keys.map(Element::new).collect();
    Op::AddElements(id(), set.into(), Arc::new(declaration), elements)
}

fn steps_of(most: usize, ops: &[Op]) -> Vec<Vec<Op>> {
    let steps = Transaction { ops: ops.to_vec() }.into_steps_of(most);
    steps.map(|step| step.ops).collect()
}

#[test]
fn a_large_table_is_filled_before_packets_come_in() {
    let ops = [
        Op::AddTable(id()),
        add_set("m"),
        add_base_chain("base"),
        add_chain("new"),
        add_rule("base"),
        add_rule("new"),
        fill("ports", false, &[1, 2, 3, 4, 5]),
        lead("m", "new"),
        fill("more", false, &[6, 7]),
    ];
    assert_eq!(
        steps_of(3, &ops),
        [
            vec![
                Op::AddTable(id()),
                add_set("m"),
                add_chain("new"),
                add_rule("new"),
            ],
            vec![fill("ports", false, &[1, 2, 3])],
            vec![fill("ports", false, &[4, 5]), fill("more", false, &[6])],
            vec![fill("more", false, &[7])],
            vec![lead("m", "new")],
            vec![add_base_chain("base"), add_rule("base")],
        ]
    );
    assert_eq!(steps_of(8, &ops), [ops.to_vec()]);
}

#[test]
fn intervals_of_a_large_table_stay_together() {
    let ops = [
        Op::AddTable(id()),
        fill("ranges", true, &[1, 2, 3]),
        fill("ports", false, &[1]),
    ];
    let [table, ranges, ports] = ops.clone();
    assert_eq!(steps_of(1, &ops), [vec![table], vec![ranges], vec![ports]]);
}

/// Its rules must not be missed for a moment.
#[test]
fn a_large_table_that_is_replaced_comes_in_one_step() {
    let ops = [
        Op::DeleteTable(id()),
        Op::AddTable(id()),
        fill("ports", false, &[1, 2, 3]),
        add_base_chain("base"),
    ];
    assert_eq!(steps_of(1, &ops), [ops.to_vec()]);
}

#[test]
fn tables_in_use_change_when_a_large_one_comes_into_force() {
    let other = TableId::new(TableFamily::Ip6, "t");
    let change = Op::AddRule(other, "old".into(), rule());
    let ops = [
        Op::AddTable(id()),
        fill("ports", false, &[1, 2]),
        add_base_chain("base"),
        change.clone(),
    ];
    let steps = steps_of(1, &ops);
    assert_eq!(steps.last(), Some(&vec![add_base_chain("base"), change]));
}

#[test]
fn a_new_table_comes_in_one_step() {
    let ops = [
        Op::AddTable(id()),
        add_set("m"),
        add_chain("new"),
        add_rule("new"),
        lead("m", "new"),
    ];
    assert_eq!(steps(&ops), [ops.to_vec()]);
    assert!(steps(&[]).is_empty());
}
