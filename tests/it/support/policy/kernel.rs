//! What the kernel makes of a transaction, and what it refuses.

use nftlet::nft::{
    Chain, Element, Name, Op, Ruleset, Set, Statement, Table, TableId, Transaction, Value,
};

/// Applies a transaction as one batch; panics where the kernel would refuse it.
#[track_caller]
pub fn commit(ruleset: &mut Ruleset, transaction: &Transaction) {
    for op in &transaction.ops {
        step(ruleset, op);
    }
    for (id, table) in &ruleset.tables {
        for target in targets(table) {
            assert!(table.chains.contains_key(target), "{id} leads to {target}");
        }
        for set in sets_read(table) {
            assert!(table.sets.contains_key(set), "{id} reads {set}");
        }
    }
}

#[track_caller]
fn table<'a>(ruleset: &'a mut Ruleset, id: &TableId) -> &'a mut Table {
    let table = ruleset.tables.get_mut(id);
    table.unwrap_or_else(|| panic!("there is no table {id}"))
}

#[track_caller]
fn set<'a>(ruleset: &'a mut Ruleset, id: &TableId, name: &Name) -> &'a mut Set {
    let set = table(ruleset, id).sets.get_mut(name);
    set.unwrap_or_else(|| panic!("{id} has no set {name}"))
}

#[track_caller]
fn chain<'a>(ruleset: &'a mut Ruleset, id: &TableId, name: &Name) -> &'a mut Chain {
    let chain = table(ruleset, id).chains.get_mut(name);
    chain.unwrap_or_else(|| panic!("{id} has no chain {name}"))
}

#[track_caller]
fn step(ruleset: &mut Ruleset, op: &Op) {
    match op {
        Op::AddTable(id) => {
            ruleset.tables.entry(id.clone()).or_default();
        }
        Op::DeleteTable(id) => {
            let gone = ruleset.tables.remove(id);
            assert!(gone.is_some(), "there is no table {id}");
        }
        Op::AddSet(id, name, declaration) => {
            let plain = !declaration.interval || declaration.key.len() == 1;
            assert!(plain, "{id} {name} is slow to fill: {declaration:?}");
            let new = Set {
                declaration: declaration.clone(),
                elements: Vec::new(),
            };
            let old = table(ruleset, id).sets.insert(name.clone(), new);
            assert!(old.is_none(), "{id} has a set {name} already");
        }
        Op::DeleteSet(id, name) => {
            let table = table(ruleset, id);
            let used = sets_read(table).any(|set| set == name);
            assert!(!used, "{id} {name} is read by a rule");
            assert!(table.sets.remove(name).is_some(), "{id} has no {name}");
        }
        Op::AddChain(id, name, base) => {
            let new = Chain {
                base: *base,
                rules: Vec::new(),
            };
            let old = table(ruleset, id).chains.insert(name.clone(), new);
            assert!(old.is_none(), "{id} has a chain {name} already");
        }
        Op::FlushChain(id, name) => chain(ruleset, id, name).rules.clear(),
        Op::DeleteChain(id, name) => {
            assert!(
                chain(ruleset, id, name).rules.is_empty(),
                "{name} has rules"
            );
            let table = table(ruleset, id);
            table.chains.remove(name);
            let used = targets(table).any(|target| target == name);
            assert!(!used, "something leads to {id} {name}");
        }
        Op::AddRule(id, name, rule) => chain(ruleset, id, name).rules.push(rule.clone()),
        Op::DeleteElements(id, name, declaration, elements) => {
            let set = set(ruleset, id, name);
            assert_eq!(set.declaration, *declaration, "{id} {name}");
            for element in elements {
                let same =
                    |known: &Element| known.key == element.key && known.key_end == element.key_end;
                let at = set.elements.iter().position(same);
                let at = at.unwrap_or_else(|| panic!("{id} {name} lacks {element:?}"));
                set.elements.remove(at);
            }
        }
        Op::AddElements(id, name, declaration, elements) => {
            let set = set(ruleset, id, name);
            assert_eq!(set.declaration, *declaration, "{id} {name}");
            for element in elements {
                add(set, element);
            }
        }
        Op::FlushSet(id, name) => set(ruleset, id, name).elements.clear(),
        Op::DeleteStray(id, stray) => {
            assert!(table(ruleset, id).strays.remove(stray), "no {stray}");
        }
    }
}

#[track_caller]
fn add(set: &mut Set, element: &Element) {
    if let Some(known) = set.elements.iter().find(|known| known.key == element.key) {
        assert_eq!(known, element, "there is another element already");
        return;
    }
    // Only intervals of one field are compared: those of more fields need not be sorted.
    if let (1, Some(end)) = (set.declaration.key.len(), element.key_end.as_deref()) {
        for known in &set.elements {
            let last = known.key_end.as_deref().unwrap_or(&known.key);
            let apart = *last < element.key || *end < known.key;
            assert!(apart, "{element:?} overlaps {known:?}");
        }
    }
    set.elements.push(element.clone());
    set.elements.sort_by(|a, b| a.key.cmp(&b.key));
}

fn statements(table: &Table) -> impl Iterator<Item = &Statement> {
    let rules = table.chains.values().flat_map(|chain| &chain.rules);
    rules.flat_map(|rule| &*rule.statements)
}

/// The sets that rules read.
fn sets_read(table: &Table) -> impl Iterator<Item = &Name> {
    statements(table).filter_map(|statement| match statement {
        Statement::InSet(_, _, set)
        | Statement::VerdictMap(_, set)
        | Statement::DnatByMap(_, set)
        | Statement::PriorityByMap(_, set) => Some(set),
        Statement::UpdateMap { map, .. } | Statement::PriorityVerdict { map, .. } => Some(map),
        _ => None,
    })
}

/// The chains that something leads to.
fn targets(table: &Table) -> impl Iterator<Item = &Name> {
    let elements = table.sets.values().flat_map(|set| &set.elements);
    let by_element = elements.filter_map(|element| match &element.value {
        Value::Verdict(verdict) => verdict.target(),
        _ => None,
    });
    let by_rule = statements(table).filter_map(|statement| match statement {
        Statement::Verdict(verdict) => verdict.target(),
        _ => None,
    });
    by_element.chain(by_rule)
}
