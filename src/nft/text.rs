//! Rulesets as text that `nft -f` accepts.
//!
//! The text describes the same rules as the netlink messages. The order is stable: tables, sets and
//! chains by name, elements by key.

use std::io::{self, Write};

use super::key::{FieldType, Key, class_id, protocol};
use super::name::TableFamily;
use super::rule::{Comparison, CtState, CtStatus, Operand, RejectWith, Rule, Statement, Verdict};
use super::selector::{Selector, concatenation};
use super::table::{
    BaseChain, Chain, ChainKind, Declaration, Element, Hook, Ruleset, Set, SetKind, Table, TableId,
    Value,
};

/// Writes a ruleset for `nft -f`, which replaces the tables in it.
///
/// # Errors
///
/// Those of the writer.
pub fn render(ruleset: &Ruleset, out: &mut impl Write) -> io::Result<()> {
    for (index, (id, table)) in ruleset.tables.iter().enumerate() {
        if index > 0 {
            writeln!(out)?;
        }
        // Without the declaration, deleting a table that does not exist would fail.
        writeln!(out, "table {id}\ndelete table {id}")?;
        render_table(id, table, out)?;
    }
    Ok(())
}

fn render_table(id: &TableId, table: &Table, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "table {id} {{")?;
    let mut first = true;
    for (name, set) in &table.sets {
        separate(&mut first, out)?;
        render_set(name.as_str(), set, id.family, out)?;
    }
    for (name, chain) in &table.chains {
        separate(&mut first, out)?;
        render_chain(name.as_str(), chain, id.family, out)?;
    }
    writeln!(out, "}}")
}

fn separate(first: &mut bool, out: &mut impl Write) -> io::Result<()> {
    if !std::mem::take(first) {
        writeln!(out)?;
    }
    Ok(())
}

fn render_set(name: &str, set: &Set, family: TableFamily, out: &mut impl Write) -> io::Result<()> {
    let declaration = &set.declaration;
    let keyword = match declaration.kind {
        SetKind::Set => "set",
        SetKind::VerdictMap | SetKind::Map(_) => "map",
    };
    writeln!(out, "\t{keyword} {name} {{")?;
    writeln!(out, "\t\t{}", set_type(declaration, family))?;
    if let Some(size) = declaration.size {
        writeln!(out, "\t\tsize {size}")?;
    }
    if declaration.interval {
        writeln!(out, "\t\tflags interval")?;
    }
    if let Some(timeout) = declaration.timeout {
        writeln!(out, "\t\tflags dynamic,timeout")?;
        writeln!(out, "\t\ttimeout {}s", timeout.as_secs())?;
    }
    if declaration.counter {
        writeln!(out, "\t\tcounter")?;
    }
    if let Some(comment) = &declaration.comment {
        writeln!(out, "\t\tcomment \"{comment}\"")?;
    }
    let (key, data) = (
        declaration.key_types(family),
        declaration.data_types(family),
    );
    for (index, element) in set.elements.iter().enumerate() {
        let lead = if index == 0 {
            "\t\telements = { "
        } else {
            ",\n\t\t\t     "
        };
        write!(out, "{lead}")?;
        render_element(element, &key, &data, out)?;
    }
    if !set.elements.is_empty() {
        writeln!(out, " }}")?;
    }
    writeln!(out, "\t}}")
}

/// Returns the line that declares the types.
fn set_type(set: &Declaration, family: TableFamily) -> String {
    let describe = |selectors: &[Selector]| {
        let types = selectors.iter().map(|s| s.field_type(family).name());
        types.collect::<Vec<_>>().join(" . ")
    };
    let key = describe(&set.key);
    match &set.kind {
        SetKind::Set => format!("type {key}"),
        SetKind::VerdictMap => format!("type {key} : verdict"),
        SetKind::Map(data) => format!("type {key} : {}", describe(data)),
    }
}

/// Returns an element in the syntax of nft.
pub fn element(element: &Element, declaration: &Declaration, family: TableFamily) -> String {
    let mut text = Vec::new();
    // Writing to a vector cannot fail.
    let _ = render_element(
        element,
        &declaration.key_types(family),
        &declaration.data_types(family),
        &mut text,
    );
    String::from_utf8_lossy(&text).into_owned()
}

fn render_element(
    element: &Element,
    key: &[FieldType],
    data: &[FieldType],
    out: &mut impl Write,
) -> io::Result<()> {
    match &element.key_end {
        Some(end) => write!(out, "{}", interval(&element.key, end, key))?,
        None => write!(out, "{}", join(&element.key, key))?,
    }
    if let Some(comment) = &element.comment {
        write!(out, " comment \"{comment}\"")?;
    }
    match &element.value {
        Value::None => Ok(()),
        Value::Data(value) => write!(out, " : {}", join(value, data)),
        Value::Verdict(verdict) => write!(out, " : {}", self::verdict(verdict)),
    }
}

fn join(key: &Key, types: &[FieldType]) -> String {
    key.fields(types).collect::<Vec<_>>().join(" . ")
}

/// Returns each field as a value, a prefix or a range.
fn interval(start: &Key, end: &Key, types: &[FieldType]) -> String {
    let fields = start.fields(types).zip(end.fields(types));
    let printed: Vec<_> = fields
        .map(|(from, to)| {
            if from == to {
                from
            } else {
                prefix(&from, &to).unwrap_or_else(|| format!("{from}-{to}"))
            }
        })
        .collect();
    printed.join(" . ")
}

/// Returns the CIDR notation of a range of addresses, if there is one.
fn prefix(from: &str, to: &str) -> Option<String> {
    let (from, to): (std::net::IpAddr, std::net::IpAddr) = (from.parse().ok()?, to.parse().ok()?);
    let mut subnets = match (from, to) {
        (std::net::IpAddr::V4(a), std::net::IpAddr::V4(b)) => {
            ipnet::IpSubnets::from(ipnet::Ipv4Subnets::new(a, b, 0))
        }
        (std::net::IpAddr::V6(a), std::net::IpAddr::V6(b)) => {
            ipnet::IpSubnets::from(ipnet::Ipv6Subnets::new(a, b, 0))
        }
        _ => return None,
    };
    let only = subnets.next()?;
    subnets.next().is_none().then(|| only.to_string())
}

fn render_chain(
    name: &str,
    chain: &Chain,
    family: TableFamily,
    out: &mut impl Write,
) -> io::Result<()> {
    writeln!(out, "\tchain {name} {{")?;
    if let Some(base) = &chain.base {
        writeln!(out, "\t\t{}", base_chain(base))?;
    }
    let crashes = |rule: &Rule| rule.statements.iter().any(|s| crashes_nft(s, family));
    // The rules after it handle packets that it does not match, so they are left out, too.
    let follows_one = chain.rules.iter().position(crashes);
    for (index, rule) in chain.rules.iter().enumerate() {
        let text = self::rule(rule, family);
        if crashes(rule) {
            writeln!(out, "\t\t# left out, nft 1.0.6 crashes on it: {text}")?;
        } else if follows_one.is_some_and(|first| first < index) {
            writeln!(out, "\t\t# left out with it: {text}")?;
        } else {
            writeln!(out, "\t\t{text}")?;
        }
    }
    writeln!(out, "\t}}")
}

fn base_chain(base: &BaseChain) -> String {
    let kind = match base.kind {
        ChainKind::Filter => "filter",
        ChainKind::Nat => "nat",
    };
    let hook = match base.hook {
        Hook::Prerouting => "prerouting",
        Hook::Input => "input",
        Hook::Forward => "forward",
        Hook::Output => "output",
        Hook::Postrouting => "postrouting",
    };
    format!(
        "type {kind} hook {hook} priority {}; policy accept;",
        base.priority
    )
}

/// Returns whether nft 1.0.6 fails an assertion when it reads the statement: it reserves one
/// register of 16 bytes for the key of a map update. It can print such a rule.
fn crashes_nft(statement: &Statement, family: TableFamily) -> bool {
    const REGISTER: usize = 16;
    let length = |selectors: &[Selector]| -> usize {
        let fields = selectors.iter().map(|s| s.field_type(family).padded_len());
        fields.sum()
    };
    match statement {
        Statement::UpdateMap { key, data, .. } => length(key) > REGISTER || length(data) > REGISTER,
        _ => false,
    }
}

/// Returns a rule in the syntax of nft.
pub fn rule(rule: &Rule, family: TableFamily) -> String {
    let mut parts: Vec<String> = rule
        .statements
        .iter()
        .map(|s| statement(s, family))
        .collect();
    if let Some(comment) = &rule.comment {
        parts.push(format!("comment \"{comment}\""));
    }
    parts.join(" ")
}

fn statement(statement: &Statement, family: TableFamily) -> String {
    let ip = family.keyword();
    let not = |comparison: &Comparison| match comparison {
        Comparison::Is => "",
        Comparison::IsNot => "!= ",
    };
    match statement {
        Statement::Match(selector, comparison, value) => format!(
            "{} {}{}",
            selector.text(family),
            not(comparison),
            operand(value)
        ),
        Statement::MarkBits(bits) => format!("meta mark & {bits:#010x} == {bits:#010x}"),
        Statement::CtState(states) => {
            let names: Vec<_> = states.iter().map(ct_state).collect();
            format!("ct state {}", names.join(","))
        }
        Statement::CtStatus(CtStatus::Dnat) => "ct status dnat".into(),
        Statement::TcpNotOpening => "tcp flags & (fin | syn | rst | ack) != syn".into(),
        Statement::HopLimit(hops) => match family {
            TableFamily::Ip => format!("ip ttl {hops}"),
            TableFamily::Ip6 => format!("ip6 hoplimit {hops}"),
        },
        Statement::Limit { per_second, burst } => {
            format!("limit rate {per_second}/second burst {burst} packets")
        }
        Statement::Log {
            prefix,
            group,
            snaplen,
        } => match snaplen {
            0 => format!("log prefix \"{prefix}\" group {group}"),
            _ => format!("log prefix \"{prefix}\" group {group} snaplen {snaplen}"),
        },
        Statement::DestinationIsLocal => "fib daddr type local".into(),
        Statement::DestinationIsBroadcast => "fib daddr type broadcast".into(),
        Statement::SourceIsLocal => "fib saddr type local".into(),
        Statement::InSet(key, comparison, set) => {
            format!("{} {}@{set}", concatenation(key, family), not(comparison))
        }
        Statement::VerdictMap(key, map) => {
            format!("{} vmap @{map}", concatenation(key, family))
        }
        Statement::DnatByMap(key, map) => format!(
            "dnat {ip} addr . port to {} map @{map}",
            concatenation(key, family)
        ),
        Statement::SetMarkBits(bits) => format!("meta mark set meta mark | {bits:#010x}"),
        Statement::FlipMarkBits(bits) => format!("meta mark set meta mark ^ {bits:#010x}"),
        Statement::PriorityByMap(key, map) => format!(
            "meta priority set {} map @{map}",
            concatenation(key, family)
        ),
        Statement::PriorityVerdict { mask, map } => {
            format!("meta priority & {} vmap @{map}", class_id(*mask))
        }
        Statement::SetPriority(value) => format!("meta priority set {}", class_id(*value)),
        Statement::RandomPriority(largest) => {
            format!("meta priority set numgen random mod {largest} offset 1")
        }
        Statement::UpdateMap {
            map,
            key,
            timeout,
            data,
        } => format!(
            "update @{map} {{ {} timeout {}s : {} }}",
            concatenation(key, family),
            timeout.as_secs(),
            concatenation(data, family)
        ),
        Statement::Masquerade => "masquerade fully-random".into(),
        Statement::Reject(RejectWith::TcpReset) => "reject with tcp reset".into(),
        Statement::Reject(RejectWith::PortUnreachable) => "reject".into(),
        Statement::Reject(RejectWith::AdminProhibited) => match family {
            TableFamily::Ip => "reject with icmp admin-prohibited".into(),
            TableFamily::Ip6 => "reject with icmpv6 admin-prohibited".into(),
        },
        Statement::Counter => "counter".into(),
        Statement::Verdict(verdict) => self::verdict(verdict),
        Statement::Foreign(text) => format!("# not written by nftlet: {text}"),
    }
}

fn operand(operand: &Operand) -> String {
    match operand {
        Operand::Network(net) if net.prefix_len() == net.max_prefix_len() => net.addr().to_string(),
        Operand::Network(net) => net.trunc().to_string(),
        Operand::Protocol(number) => protocol(*number),
        Operand::Port(port) => port.to_string(),
        Operand::Ports(from, to) => format!("{from}-{to}"),
        Operand::Interface(name) => format!("\"{name}\""),
        Operand::InterfacePrefix(prefix) => format!("\"{prefix}*\""),
    }
}

fn ct_state(state: CtState) -> &'static str {
    match state {
        CtState::Invalid => "invalid",
        CtState::Established => "established",
        CtState::Related => "related",
        CtState::New => "new",
    }
}

fn verdict(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Accept => "accept".into(),
        Verdict::Drop => "drop".into(),
        Verdict::Return => "return".into(),
        Verdict::Jump(chain) => format!("jump {chain}"),
        Verdict::Goto(chain) => format!("goto {chain}"),
    }
}
