//! A model of the kernel for tests: applies transactions to a ruleset with the kernel's checks.

use super::name::Name;
use super::table::{Chain, Element, Ruleset, Set, Table, TableId};
use super::transaction::{Op, Transaction};
use super::{Statement, Value};

/// Applies a transaction. An error leaves the ruleset as it was, as in the kernel.
pub fn apply(ruleset: &mut Ruleset, transaction: &Transaction) -> Result<(), (usize, String)> {
    let mut next = ruleset.clone();
    for (index, op) in transaction.ops.iter().enumerate() {
        step(&mut next, op).map_err(|error| (index, error))?;
    }
    for table in next.tables.values() {
        check_targets(table).map_err(|error| (transaction.ops.len(), error))?;
    }
    *ruleset = next;
    Ok(())
}

fn table<'a>(ruleset: &'a mut Ruleset, id: &TableId) -> Result<&'a mut Table, String> {
    ruleset.tables.get_mut(id).ok_or(format!("no table {id}"))
}

fn set<'a>(ruleset: &'a mut Ruleset, id: &TableId, name: &Name) -> Result<&'a mut Set, String> {
    let found = table(ruleset, id)?.sets.get_mut(name);
    found.ok_or(format!("no set {name}"))
}

fn chain<'a>(ruleset: &'a mut Ruleset, id: &TableId, name: &Name) -> Result<&'a mut Chain, String> {
    let found = table(ruleset, id)?.chains.get_mut(name);
    found.ok_or(format!("no chain {name}"))
}

fn step(ruleset: &mut Ruleset, op: &Op) -> Result<(), String> {
    match op {
        Op::AddTable(id) => {
            ruleset.tables.entry(id.clone()).or_default();
        }
        Op::DeleteTable(id) => {
            ruleset.tables.remove(id).ok_or(format!("no table {id}"))?;
        }
        Op::AddSet(id, name, declaration) => {
            let new = Set {
                declaration: declaration.clone(),
                elements: Vec::new(),
            };
            let sets = &mut table(ruleset, id)?.sets;
            if sets.insert(name.clone(), new).is_some() {
                return Err(format!("set {name} exists"));
            }
        }
        Op::DeleteSet(id, name) => {
            let table = table(ruleset, id)?;
            let used = table
                .chains
                .values()
                .flat_map(|c| &c.rules)
                .any(|rule| rule.statements.iter().any(|s| reads(s) == Some(name)));
            if used {
                return Err(format!("set {name} is in use"));
            }
            table.sets.remove(name).ok_or(format!("no set {name}"))?;
        }
        Op::AddChain(id, name, base) => {
            let new = Chain {
                base: *base,
                rules: Vec::new(),
            };
            let chains = &mut table(ruleset, id)?.chains;
            if chains.insert(name.clone(), new).is_some() {
                return Err(format!("chain {name} exists"));
            }
        }
        Op::FlushChain(id, name) => chain(ruleset, id, name)?.rules.clear(),
        Op::DeleteChain(id, name) => {
            if !chain(ruleset, id, name)?.rules.is_empty() {
                return Err(format!("chain {name} has rules"));
            }
            table(ruleset, id)?.chains.remove(name);
        }
        Op::AddRule(id, name, rule) => {
            for statement in &*rule.statements {
                if let Some(read) = reads(statement) {
                    set(ruleset, id, read)?;
                }
            }
            chain(ruleset, id, name)?.rules.push(rule.clone());
        }
        Op::DeleteElements(id, name, _, elements) => {
            let set = set(ruleset, id, name)?;
            for element in elements {
                delete(set, element)?;
            }
        }
        Op::AddElements(id, name, _, elements) => {
            let set = set(ruleset, id, name)?;
            for element in elements {
                add(set, element)?;
            }
        }
        Op::FlushSet(id, name) => set(ruleset, id, name)?.elements.clear(),
        Op::DeleteStray(id, stray) => {
            if !table(ruleset, id)?.strays.remove(stray) {
                return Err(format!("no {stray}"));
            }
        }
    }
    Ok(())
}

fn delete(set: &mut Set, element: &Element) -> Result<(), String> {
    let found = set.elements.binary_search_by(|e| e.key.cmp(&element.key));
    let index = found.map_err(|_| format!("no element {:?}", element.key))?;
    set.elements.remove(index);
    Ok(())
}

fn add(set: &mut Set, element: &Element) -> Result<(), String> {
    match set.elements.binary_search_by(|e| e.key.cmp(&element.key)) {
        Ok(index) if set.elements[index].value == element.value => Ok(()),
        Ok(_) => Err(format!("another element {:?} exists", element.key)),
        Err(index) => {
            set.elements.insert(index, element.clone());
            Ok(())
        }
    }
}

fn reads(statement: &Statement) -> Option<&Name> {
    match statement {
        Statement::InSet(_, _, set)
        | Statement::VerdictMap(_, set)
        | Statement::DnatByMap(_, set)
        | Statement::PriorityByMap(_, set) => Some(set),
        Statement::UpdateMap { map, .. } | Statement::PriorityVerdict { map, .. } => Some(map),
        Statement::Match(..)
        | Statement::MarkBits(..)
        | Statement::CtState(_)
        | Statement::CtStatus(_)
        | Statement::TcpNotOpening
        | Statement::HopLimit(_)
        | Statement::Limit { .. }
        | Statement::Log { .. }
        | Statement::DestinationIsLocal
        | Statement::DestinationIsBroadcast
        | Statement::SourceIsLocal
        | Statement::SetMarkBits(_)
        | Statement::FlipMarkBits(_)
        | Statement::SetPriority(_)
        | Statement::RandomPriority(_)
        | Statement::Masquerade
        | Statement::Reject(_)
        | Statement::Counter
        | Statement::Verdict(_)
        | Statement::Foreign(_) => None,
    }
}

/// Checks that each target of a verdict exists at the end of a transaction and is no base chain.
fn check_targets(table: &Table) -> Result<(), String> {
    let from_rules = table
        .chains
        .values()
        .flat_map(|chain| &chain.rules)
        .flat_map(|rule| &*rule.statements)
        .filter_map(|statement| match statement {
            Statement::Verdict(verdict) => verdict.target(),
            _ => None,
        });
    let from_elements = table
        .sets
        .values()
        .flat_map(|set| &set.elements)
        .filter_map(|element| match &element.value {
            Value::Verdict(verdict) => verdict.target(),
            _ => None,
        });
    let mut targets = from_rules.chain(from_elements);
    let plain = |name: &Name| {
        let chain = table.chains.get(name);
        chain.is_some_and(|chain| chain.base.is_none())
    };
    match targets.find(|name| !plain(name)) {
        Some(name) => Err(format!(
            "chain {name} does not exist, is in use, or is a base chain"
        )),
        None => Ok(()),
    }
}
