//! Walks the compiled rules of services with the first packet of a connection.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::model::Family;
use crate::nft::{
    Comparison, CtState, CtStatus, Element, Hook, Key, KeyBuilder, Name, Operand, Rule, Ruleset,
    Selector, Statement, Table, Value, Verdict,
};
use crate::services::table_id;

/// The first packet of a connection.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub port: u16,
    /// The interface by which it came; none for a packet of the node itself.
    pub input: Option<&'static str>,
    /// The addresses of the node.
    pub local: Vec<IpAddr>,
}

/// What may become of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum End {
    /// It goes on, to this address and port.
    On {
        to: (IpAddr, u16),
        translated: bool,
        masqueraded: bool,
    },
    Rejected,
    Dropped,
}

/// What rules change of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct State {
    priority: u32,
    mark: u32,
    to: (IpAddr, u16),
    translated: bool,
}

/// The packets that go on behind a rule or a chain, whatever is drawn at random.
type States = BTreeSet<State>;

struct Walk<'a> {
    packet: &'a Packet,
    table: &'a Table,
    family: Family,
    /// The packets that ended, and those that the base chain is over for.
    ends: BTreeSet<End>,
    accepted: States,
}

/// Returns everything that can become of a packet. `bit` is that of packets to masquerade.
pub(super) fn walk(ruleset: &Ruleset, packet: &Packet, bit: u32) -> BTreeSet<End> {
    let family = Family::of(packet.destination);
    let to = (packet.destination, packet.port);
    let untouched = End::On {
        to,
        translated: false,
        masqueraded: false,
    };
    let Some(table) = ruleset.tables.get(&table_id(family)) else {
        return [untouched].into();
    };
    let mut walk = Walk {
        packet,
        table,
        family,
        ends: BTreeSet::new(),
        accepted: States::new(),
    };
    let first = match packet.input {
        Some(_) => Hook::Prerouting,
        None => Hook::Output,
    };
    let start = State {
        // One of its own, which no rule may look at.
        priority: 0x0001_0001,
        mark: 0,
        to,
        translated: false,
    };
    let mut states = walk.hook(first, [start].into());
    if packet.input.is_some() {
        let (here, beyond): (States, States) = states
            .into_iter()
            .partition(|state| packet.local.contains(&state.to.0));
        states = walk.hook(Hook::Input, here);
        states.append(&mut walk.hook(Hook::Forward, beyond));
    }
    let on = states.into_iter().map(|state| End::On {
        to: state.to,
        translated: state.translated,
        masqueraded: state.mark & bit != 0,
    });
    walk.ends.extend(on);
    walk.ends
}

impl Walk<'_> {
    /// Returns the packets that pass all base chains of a hook.
    fn hook(&mut self, hook: Hook, mut states: States) -> States {
        let mut bases: Vec<(i32, &Name)> = Vec::new();
        for (name, chain) in &self.table.chains {
            if let Some(base) = chain.base.as_ref().filter(|base| base.hook == hook) {
                bases.push((base.priority, name));
            }
        }
        bases.sort_unstable();
        for (_, name) in bases {
            let mut passed = self.chain(&name.clone(), states);
            passed.append(&mut self.accepted);
            states = passed;
        }
        states
    }

    /// Returns the packets that come back from a chain.
    fn chain(&mut self, name: &Name, mut states: States) -> States {
        let table = self.table;
        let mut returned = States::new();
        for rule in &table.chains[name].rules {
            let mut next = States::new();
            for state in states {
                self.rule(rule, state, &mut next, &mut returned);
            }
            states = next;
        }
        states.append(&mut returned);
        states
    }

    /// Adds the packets that go on behind a rule to `next`, and those that return from its chain.
    fn rule(&mut self, rule: &Rule, mut state: State, next: &mut States, returned: &mut States) {
        for (place, statement) in rule.statements.iter().enumerate() {
            let verdict = match statement {
                Statement::PriorityByMap(key, map) => {
                    let Some(Value::Data(data)) = self.value(map, key, &state) else {
                        break;
                    };
                    let bytes = data.as_bytes().try_into().expect("four bytes");
                    state.priority = u32::from_ne_bytes(bytes);
                    continue;
                }
                Statement::PriorityVerdict { mask, map } => {
                    let key = Key::build().number(state.priority & mask).finish();
                    self.element(map, &key).map(|it| verdict_of(&it.value))
                }
                Statement::SetPriority(value) => {
                    state.priority = *value;
                    continue;
                }
                Statement::RandomPriority(largest) => {
                    assert_eq!(place + 1, rule.statements.len(), "{rule:?}");
                    next.extend((1..=*largest).map(|priority| State { priority, ..state }));
                    return;
                }
                Statement::VerdictMap(key, map) => self.value(map, key, &state).map(verdict_of),
                Statement::DnatByMap(key, map) => {
                    let Some(Value::Data(data)) = self.value(map, key, &state) else {
                        break;
                    };
                    state.to = endpoint(data.as_bytes());
                    state.translated = true;
                    Some(Verdict::Accept)
                }
                Statement::SetMarkBits(bits) => {
                    state.mark |= bits;
                    continue;
                }
                Statement::Reject(_) => {
                    self.ends.insert(End::Rejected);
                    return;
                }
                Statement::Verdict(verdict) => Some(verdict.clone()),
                Statement::UpdateMap { .. } | Statement::Counter => continue,
                condition if self.holds(condition, &state) => continue,
                _ => break,
            };
            match verdict {
                None => break,
                Some(Verdict::Accept) => {
                    self.accepted.insert(state);
                }
                Some(Verdict::Drop) => {
                    self.ends.insert(End::Dropped);
                }
                Some(Verdict::Return) => {
                    returned.insert(state);
                }
                Some(Verdict::Jump(chain)) => {
                    next.append(&mut self.chain(&chain, [state].into()));
                }
                Some(Verdict::Goto(chain)) => {
                    returned.append(&mut self.chain(&chain, [state].into()));
                }
            }
            return;
        }
        next.insert(state);
    }

    fn holds(&self, condition: &Statement, state: &State) -> bool {
        let is = |comparison: &Comparison, equal: bool| equal == (*comparison == Comparison::Is);
        match condition {
            Statement::CtState(states) => states.iter().any(|it| it == CtState::New),
            Statement::CtStatus(CtStatus::Dnat) => state.translated,
            Statement::DestinationIsLocal => self.packet.local.contains(&state.to.0),
            Statement::SourceIsLocal => self.packet.local.contains(&self.packet.source),
            Statement::InSet(key, comparison, set) => {
                is(comparison, self.value(set, key, state).is_some())
            }
            Statement::Match(selector, comparison, operand) => {
                let equal = match (selector, operand) {
                    (Selector::SourceAddress, Operand::Network(net)) => {
                        net.contains(&self.packet.source)
                    }
                    (Selector::L4Protocol, Operand::Protocol(number)) => {
                        self.packet.protocol == *number
                    }
                    (Selector::InputInterface, Operand::Interface(name)) => {
                        self.packet.input == Some(name)
                    }
                    (Selector::InputInterface, Operand::InterfacePrefix(prefix)) => {
                        let input = self.packet.input;
                        input.is_some_and(|name| name.starts_with(&**prefix))
                    }
                    other => panic!("{other:?} is not expected"),
                };
                is(comparison, equal)
            }
            other => panic!("{other:?} is not expected"),
        }
    }

    fn value(&self, set: &Name, selectors: &[Selector], state: &State) -> Option<&Value> {
        let keys = selectors.iter();
        let key = keys.fold(Key::build(), |key, it| self.field(key, *it, state));
        self.element(set, &key.finish()).map(|it| &it.value)
    }

    fn field(&self, key: KeyBuilder, selector: Selector, state: &State) -> KeyBuilder {
        match selector {
            Selector::SourceAddress => key.address(self.packet.source),
            Selector::DestinationAddress => key.address(state.to.0),
            Selector::L4Protocol => key.protocol(self.packet.protocol),
            Selector::DestinationPort => key.port(state.to.1),
            Selector::Priority => key.number(state.priority),
            Selector::OriginalDestinationAddress => key.address(self.packet.destination),
            Selector::OriginalDestinationPort => key.port(self.packet.port),
            other => panic!("{other:?} is not expected"),
        }
    }

    /// Returns the element with a key; that of an interval has a single field.
    fn element(&self, set: &Name, key: &Key) -> Option<&Element> {
        let set = &self.table.sets[set];
        let types = set.declaration.key_types(table_id(self.family).family);
        let mut elements = set.elements.iter();
        elements.find(|element| match &element.key_end {
            None => element.key == *key,
            Some(end) => {
                assert_eq!(types.len(), 1, "{set:?}");
                (element.key.as_bytes()..=end.as_bytes()).contains(&key.as_bytes())
            }
        })
    }
}

fn verdict_of(value: &Value) -> Verdict {
    match value {
        Value::Verdict(verdict) => verdict.clone(),
        other => panic!("{other:?} is no verdict"),
    }
}

/// Returns the address and the port in a value; each field begins at four bytes.
fn endpoint(data: &[u8]) -> (IpAddr, u16) {
    let (address, port) = data.split_at(data.len() - 4);
    let port = u16::from_be_bytes([port[0], port[1]]);
    let address = match <[u8; 4]>::try_from(address) {
        Ok(v4) => IpAddr::from(v4),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(address).expect("an address")),
    };
    (address, port)
}
