//! Sends a packet through a typed ruleset, as the kernel would.
//!
//! [`walk`] takes the base chains of one hook in the order of their priorities. Each is walked
//! rule by rule and statement by statement; sets and maps are looked up in the ruleset, intervals
//! too. The first drop ends everything, an accept ends its base chain only.
//!
//! What the walk cannot decide is a failed test and never a guess: a statement that makes no
//! sense in a filter chain, a set or a chain that is missing, a limit in front of a verdict.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use nftlet::nft::{
    ChainKind, Comparison, CtState, Declaration, Element, Hook, Key, KeyBuilder, Name, Operand,
    Rule, Ruleset, Selector, Statement, Table, TableFamily, TableId, Value, Verdict, text,
};

/// A packet at a hook.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// The two bytes where TCP, UDP and SCTP have the source port. Others have something else
    /// there, which a rule reads as a port if it does not ask for the protocol.
    /// The same for the destination port.
    pub destination_port: u16,
    /// The type of an ICMPv6 message.
    pub icmp6_type: u8,
    /// How many more routers it may pass.
    pub hop_limit: u8,
    /// The state of the connection.
    pub state: CtState,
    /// Whether a TCP segment is a SYN alone.
    pub opens: bool,
    /// The device it came in by.
    pub input: String,
    /// The device it leaves by.
    pub output: String,
    /// The addresses of the host.
    pub local: Vec<IpAddr>,
}

impl Packet {
    /// The first packet of a connection; ICMPv6 is an echo request.
    pub fn first(source: IpAddr, destination: IpAddr, protocol: u8, port: u16) -> Self {
        Self {
            source,
            destination,
            protocol,
            destination_port: port,
            icmp6_type: 128,
            hop_limit: 64,
            state: CtState::New,
            opens: protocol == 6,
            input: "in0".into(),
            output: "out0".into(),
            local: Vec::new(),
        }
    }

    fn family(&self) -> TableFamily {
        if self.source.is_ipv4() {
            TableFamily::Ip
        } else {
            TableFamily::Ip6
        }
    }
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The table.
    pub table: TableId,
    /// The chain the rule is in.
    pub chain: Name,
    /// The rule, counted from 0.
    pub rule: usize,
}

/// What became of the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on.
    Accepted,
    /// It was discarded.
    Dropped(Place),
    /// It was refused with an answer.
    Rejected(Place),
}

/// An outcome with the rules that matched on the way to it.
#[derive(Clone, Debug)]
pub struct Walked {
    /// The outcome.
    pub outcome: Outcome,
    /// `chain: rule` for every rule that matched to its end.
    pub trace: Vec<String>,
}

impl Walked {
    /// Whether the packet goes on.
    pub fn accepted(&self) -> bool {
        self.outcome == Outcome::Accepted
    }
}

impl fmt::Display for Walked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?}, by", self.outcome)?;
        let mut lines = self.trace.iter();
        lines.try_for_each(|line| writeln!(f, "  {line}"))
    }
}

/// The verdict of all base chains at a hook.
pub fn walk(ruleset: &Ruleset, hook: Hook, packet: &Packet) -> Walked {
    let family = packet.family();
    let mut bases: Vec<(i32, &TableId, &Name, &Table)> = Vec::new();
    for (id, table) in &ruleset.tables {
        for (name, chain) in &table.chains {
            if let Some(base) = &chain.base
                && id.family == family
                && base.hook == hook
            {
                assert_eq!(base.kind, ChainKind::Filter, "{id} {name} is not a filter");
                bases.push((base.priority, id, name, table));
            }
        }
    }
    // Of two chains of one priority the kernel takes the older one first, which a ruleset does
    // not show: no verdict may depend on it.
    bases.sort_by_key(|(priority, ..)| *priority);
    let mut walker = Walker {
        packet,
        family,
        mark: 0,
        trace: Vec::new(),
    };
    let mut outcome = Outcome::Accepted;
    for (_, id, name, table) in bases {
        match walker.chain(id, table, name, 0) {
            End::Accepted | End::Over => {}
            End::Dropped(place) => outcome = Outcome::Dropped(place),
            End::Rejected(place) => outcome = Outcome::Rejected(place),
        }
        if outcome != Outcome::Accepted {
            break;
        }
    }
    Walked {
        outcome,
        trace: walker.trace,
    }
}

/// How the walk through a chain ended.
enum End {
    Accepted,
    Dropped(Place),
    Rejected(Place),
    /// At its end, or with `return`.
    Over,
}

/// What a rule says.
enum Said {
    NoMatch,
    Nothing,
    Verdict(Verdict),
    Reject,
}

struct Walker<'a> {
    packet: &'a Packet,
    family: TableFamily,
    mark: u32,
    trace: Vec<String>,
}

impl Walker<'_> {
    fn chain(&mut self, id: &TableId, table: &Table, name: &Name, depth: usize) -> End {
        // As many as the kernel allows.
        assert!(depth < 16, "{id} {name}: jumps are too deep");
        let chain = table
            .chains
            .get(name)
            .unwrap_or_else(|| panic!("{id} has no chain {name}"));
        for (index, rule) in chain.rules.iter().enumerate() {
            let said = self.rule(id, table, rule);
            if !matches!(said, Said::NoMatch) {
                let rule = text::rule(rule, self.family);
                self.trace.push(format!("{name}: {rule}"));
            }
            let place = || Place {
                table: id.clone(),
                chain: name.clone(),
                rule: index,
            };
            match said {
                Said::NoMatch | Said::Nothing => {}
                Said::Reject => return End::Rejected(place()),
                Said::Verdict(Verdict::Accept) => return End::Accepted,
                Said::Verdict(Verdict::Drop) => return End::Dropped(place()),
                Said::Verdict(Verdict::Return) => return End::Over,
                Said::Verdict(Verdict::Goto(target)) => {
                    return self.chain(id, table, &target, depth + 1);
                }
                Said::Verdict(Verdict::Jump(target)) => {
                    let end = self.chain(id, table, &target, depth + 1);
                    if !matches!(end, End::Over) {
                        return end;
                    }
                }
            }
        }
        End::Over
    }

    fn rule(&mut self, id: &TableId, table: &Table, rule: &Rule) -> Said {
        let mut limited = false;
        let decides = |said: Said, limited: bool| {
            assert!(!limited, "{id}: a limit before a verdict: {rule:?}");
            said
        };
        for statement in &*rule.statements {
            let goes_on = match statement {
                Statement::Match(selector, comparison, operand) => {
                    holds(*comparison, self.compares(*selector, operand))
                }
                Statement::MarkBits(bits) => self.mark & bits == *bits,
                Statement::CtState(states) => states.iter().any(|it| it == self.packet.state),
                // Nothing is translated: policies see the addresses of pods.
                Statement::CtStatus(_) => false,
                Statement::TcpNotOpening => {
                    assert_eq!(self.packet.protocol, 6, "TCP is not asked for: {rule:?}");
                    !self.packet.opens
                }
                Statement::HopLimit(hops) => self.packet.hop_limit == *hops,
                Statement::DestinationIsLocal => {
                    self.packet.local.contains(&self.packet.destination)
                }
                Statement::DestinationIsBroadcast => {
                    self.packet.destination == IpAddr::V4(Ipv4Addr::BROADCAST)
                }
                Statement::SourceIsLocal => self.packet.local.contains(&self.packet.source),
                Statement::InSet(key, comparison, set) => {
                    let found = self.look_up(id, table, set, key).is_some();
                    holds(*comparison, found)
                }
                Statement::VerdictMap(key, map) => match self.look_up(id, table, map, key) {
                    None => false,
                    Some(element) => match &element.value {
                        Value::Verdict(verdict) => {
                            return decides(Said::Verdict(verdict.clone()), limited);
                        }
                        other => panic!("{id} {map} holds {other:?} and no verdict"),
                    },
                },
                Statement::SetMarkBits(bits) => {
                    self.mark |= bits;
                    true
                }
                Statement::FlipMarkBits(bits) => {
                    self.mark ^= bits;
                    true
                }
                Statement::Limit { .. } => {
                    limited = true;
                    true
                }
                Statement::Log { .. } | Statement::Counter | Statement::UpdateMap { .. } => true,
                Statement::Reject(_) => return decides(Said::Reject, limited),
                Statement::Verdict(verdict) => {
                    return decides(Said::Verdict(verdict.clone()), limited);
                }
                Statement::DnatByMap(..)
                | Statement::PriorityByMap(..)
                | Statement::PriorityVerdict { .. }
                | Statement::SetPriority(_)
                | Statement::RandomPriority(_)
                | Statement::Masquerade
                | Statement::Foreign(_) => {
                    panic!("{id}: no statement of a filter: {statement:?}")
                }
            };
            if !goes_on {
                return Said::NoMatch;
            }
        }
        Said::Nothing
    }

    fn compares(&self, selector: Selector, operand: &Operand) -> bool {
        let port = || match selector {
            Selector::DestinationPort => self.packet.destination_port,
            other => panic!("{other:?} is no port"),
        };
        let device = || match selector {
            Selector::InputInterface => self.packet.input.as_str(),
            Selector::OutputInterface => self.packet.output.as_str(),
            other => panic!("{other:?} is no interface"),
        };
        match operand {
            Operand::Network(net) => match selector {
                Selector::SourceAddress => net.contains(&self.packet.source),
                Selector::DestinationAddress => net.contains(&self.packet.destination),
                other => panic!("{other:?} is no address of a packet"),
            },
            Operand::Protocol(number) => {
                assert_eq!(selector, Selector::L4Protocol);
                self.packet.protocol == *number
            }
            Operand::Port(number) => port() == *number,
            Operand::Ports(from, to) => (*from..=*to).contains(&port()),
            Operand::Interface(name) => device() == &**name,
            Operand::InterfacePrefix(prefix) => device().starts_with(&**prefix),
        }
    }

    fn field(&self, key: KeyBuilder, selector: Selector) -> KeyBuilder {
        match selector {
            Selector::SourceAddress => key.address(self.packet.source),
            Selector::DestinationAddress => key.address(self.packet.destination),
            Selector::L4Protocol => key.protocol(self.packet.protocol),
            Selector::DestinationPort => key.port(self.packet.destination_port),
            Selector::Icmp6Type => {
                assert_eq!(self.packet.protocol, 58, "ICMPv6 is not asked for");
                key.icmp6_type(self.packet.icmp6_type)
            }
            Selector::InputInterface => key.interface(&self.packet.input),
            Selector::OutputInterface => key.interface(&self.packet.output),
            Selector::Priority
            | Selector::OriginalDestinationAddress
            | Selector::OriginalDestinationPort => {
                panic!("a policy must not depend on {selector:?}")
            }
        }
    }

    fn look_up<'t>(
        &self,
        id: &TableId,
        table: &'t Table,
        name: &Name,
        selectors: &[Selector],
    ) -> Option<&'t Element> {
        let set = table
            .sets
            .get(name)
            .unwrap_or_else(|| panic!("{id} has no set {name}"));
        let types = selectors.iter().map(|it| it.field_type(self.family));
        assert_eq!(
            types.collect::<Vec<_>>(),
            set.declaration.key_types(self.family),
            "{id} {name} has other fields than are asked for"
        );
        let key = selectors
            .iter()
            .fold(Key::build(), |key, selector| self.field(key, *selector))
            .finish();
        let mut found = set
            .elements
            .iter()
            .filter(|element| covers(element, &key, &set.declaration, self.family));
        let first = found.next();
        assert!(found.next().is_none(), "{id} {name}: elements overlap");
        first
    }
}

fn holds(comparison: Comparison, equal: bool) -> bool {
    match comparison {
        Comparison::Is => equal,
        Comparison::IsNot => !equal,
    }
}

/// Whether an element has the key: an interval has it if each of its fields does.
fn covers(element: &Element, key: &Key, declaration: &Declaration, family: TableFamily) -> bool {
    let Some(end) = &element.key_end else {
        return element.key == *key;
    };
    assert!(declaration.interval, "an interval in a set without them");
    let mut at = 0;
    declaration.key_types(family).into_iter().all(|field| {
        let place = at..at + field.bytes();
        at += field.padded_len();
        let part = |key: &Key| key.as_bytes()[place.clone()].to_vec();
        (part(&element.key)..=part(end)).contains(&part(key))
    })
}
