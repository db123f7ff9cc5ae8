//! Follows the first packet of a connection through the rules of the forward hook.

use std::cell::RefCell;

use super::*;
use crate::nft::{
    BaseChain, Comparison, CtState, Hook, Key, Name, Operand, Rule, Selector, Set, Statement,
    Table, Value, Verdict,
};

/// What the rules do with the first packet of a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Walked {
    pub passes: bool,
    /// The directions in which audited policies would deny it.
    pub audited: Vec<Direction>,
}

/// Follows the first packet of a connection.
pub(super) fn walk(ruleset: &Ruleset, connection: &Connection) -> Walked {
    let family = crate::model::Family::of(connection.source);
    let Some(table) = ruleset.tables.get(&table_id(family)) else {
        return Walked {
            passes: true,
            audited: Vec::new(),
        };
    };
    let mut bases: Vec<(&BaseChain, &Name)> = table
        .chains
        .iter()
        .filter_map(|(name, chain)| Some((chain.base.as_ref()?, name)))
        .filter(|(base, _)| base.hook == Hook::Forward)
        .collect();
    bases.sort_by_key(|(base, name)| (base.priority, *name));
    let packet = Packet {
        table,
        connection,
        audited: RefCell::default(),
    };
    let mut bases = bases.iter();
    Walked {
        passes: bases.all(|(_, name)| packet.chain(name) != Some(false)),
        audited: packet.audited.into_inner(),
    }
}

struct Packet<'a> {
    table: &'a Table,
    connection: &'a Connection,
    audited: RefCell<Vec<Direction>>,
}

impl Packet<'_> {
    /// Returns whether a chain accepts or drops it; nothing if the packet comes to its end or
    /// returns.
    fn chain(&self, name: &Name) -> Option<bool> {
        let mut directions = Direction::ALL.into_iter();
        let audited = directions.find(|direction| *name == direction.audit());
        self.audited.borrow_mut().extend(audited);
        for rule in &self.table.chains[name].rules {
            match self.rule(rule) {
                None => {}
                Some(Verdict::Accept) => return Some(true),
                Some(Verdict::Drop) => return Some(false),
                Some(Verdict::Return) => return None,
                Some(Verdict::Goto(chain)) => return self.chain(&chain),
                Some(Verdict::Jump(chain)) => {
                    if let Some(decided) = self.chain(&chain) {
                        return Some(decided);
                    }
                }
            }
        }
        None
    }

    /// The verdict of a rule, if the packet matches.
    fn rule(&self, rule: &Rule) -> Option<Verdict> {
        for statement in rule.statements.iter() {
            let matches = match statement {
                Statement::Verdict(verdict) => return Some(verdict.clone()),
                Statement::VerdictMap(key, map) => match self.element(key, map)? {
                    Value::Verdict(verdict) => return Some(verdict),
                    other => panic!("{other:?} in a verdict map"),
                },
                Statement::InSet(key, Comparison::Is, set) => self.element(key, set).is_some(),
                Statement::Match(selector, Comparison::Is, operand) => self.is(*selector, operand),
                Statement::CtState(states) => states.iter().any(|state| state == CtState::New),
                Statement::TcpNotOpening => false,
                other => panic!("{other:?} in the rules of policies"),
            };
            if !matches {
                return None;
            }
        }
        None
    }

    fn is(&self, selector: Selector, operand: &Operand) -> bool {
        let port = self.connection.port;
        match (selector, operand) {
            (Selector::L4Protocol, Operand::Protocol(number)) => {
                *number == self.connection.protocol
            }
            (Selector::DestinationPort, Operand::Port(number)) => port == Some(*number),
            (Selector::DestinationPort, Operand::Ports(from, to)) => {
                port.is_some_and(|port| (*from..=*to).contains(&port))
            }
            (Selector::SourceAddress, Operand::Network(network)) => {
                network.contains(&self.connection.source)
            }
            (Selector::DestinationAddress, Operand::Network(network)) => {
                network.contains(&self.connection.destination)
            }
            other => panic!("{other:?} in the rules of policies"),
        }
    }

    /// The value of the packet's key in a set or map.
    fn element(&self, selectors: &[Selector], set: &Name) -> Option<Value> {
        let mut key = Key::build();
        for selector in selectors {
            key = match selector {
                Selector::SourceAddress => key.address(self.connection.source),
                Selector::DestinationAddress => key.address(self.connection.destination),
                Selector::L4Protocol => key.protocol(self.connection.protocol),
                Selector::DestinationPort => key.port(self.connection.port.unwrap_or_default()),
                other => panic!("{other:?} in a key of policies"),
            };
        }
        let key = key.finish();
        let Set { elements, .. } = &self.table.sets[set];
        let found = elements.iter().find(|element| match &element.key_end {
            Some(end) => (&element.key..=&**end).contains(&&key),
            None => element.key == key,
        });
        found.map(|element| element.value.clone())
    }
}
