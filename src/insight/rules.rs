//! The chains and elements of the rules that decide what an answer says.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Write};
use std::net::IpAddr;

use super::Facts;
use super::answer::{Answer, Code};
use super::evidence::{Counter, Pair, Row, RuleName, Subjects};
use super::ports::Ports;
use super::service::{self, Asked, Compiled, Source, source_of};
use crate::model::Family;
use crate::nft::RulesetPart;
use crate::policies::{Connection, Direction};
use crate::services::{EndpointScope, ServiceParts};

/// The most elements of one set in a step of the text.
const MOST: usize = 10;

/// The ends of the connections of which an answer is shown.
pub(super) struct Ends {
    /// The sources whose connections meet the rules of the own node first.
    from: Vec<IpAddr>,
    to: Vec<IpAddr>,
}

impl Ends {
    /// Takes over the addresses of a family; of both without one.
    pub fn new(
        family: Option<Family>,
        from: impl Iterator<Item = IpAddr>,
        to: impl Iterator<Item = IpAddr>,
    ) -> Self {
        let is_shown =
            |address: &IpAddr| family.is_none_or(|family| family == Family::of(*address));
        Self {
            from: from.filter(is_shown).collect(),
            to: to.filter(is_shown).collect(),
        }
    }
}

/// Adds the rules of services that decide about one port to its answer, and what else the kernel knows
/// of the connections.
pub(super) fn add(
    facts: &Facts,
    answer: &mut Answer,
    ends: &Ends,
    port: &Ports,
    compiled: &mut Compiled,
) {
    let mut finders: HashMap<Family, Option<ServiceParts>> = HashMap::new();
    let mut parts = Vec::new();
    let mut subjects = Subjects::default();
    for from in &ends.from {
        let (source, family) = (source_of(facts, *from), Family::of(*from));
        let finder = finders
            .entry(family)
            .or_insert_with(|| ServiceParts::new(family, facts.store, facts.settings));
        for to in ends.to.iter().filter(|to| Family::of(**to) == family) {
            let to = port.at(*to);
            let asked = service::asked(facts, &to, compiled);
            if let Some(finder) = finder {
                parts.extend(of_service(facts, finder, &source, to.address, &asked));
            }
            let affinity = match (&asked, to.protocol, to.port) {
                (Asked::Frontend { plan, .. }, Some(protocol), Some(port)) => {
                    let affinity = plan.affinity.as_ref();
                    affinity.map(|it| it.entry(source.address, (to.address, protocol, port)))
                }
                _ => None,
            };
            subjects.pairs.push(Pair {
                client: source.address,
                destination: to.address,
                protocol: port.protocol_number(family),
                port: to.port,
                affinity,
            });
        }
    }
    let sources = answer.source_addresses.iter();
    let sources = sources.map(|source| (Direction::Egress, *source));
    let targets = answer.targets.iter();
    let targets = targets.map(|target| (Direction::Ingress, target.address));
    for (direction, end) in sources.chain(targets) {
        if let Some(counter) = counter(facts, direction, end)
            && !subjects.counters.contains(&counter)
        {
            subjects.counters.push(counter);
        }
    }
    answer.service.rules = Some(named(parts));
    answer.subjects = subjects;
}

pub(super) fn of_service(
    facts: &Facts,
    finder: &ServiceParts,
    source: &Source,
    to: IpAddr,
    asked: &Asked<'_>,
) -> Vec<RulesetPart> {
    match asked {
        Asked::Frontend { plan, frontend } => {
            let is_local = service::takes_local(facts, source, plan, frontend);
            let scope = if is_local {
                EndpointScope::Local
            } else {
                EndpointScope::Cluster
            };
            finder.of_frontend(plan, frontend, scope, source.address)
        }
        Asked::OtherPort => finder.of_unknown_port(to),
        Asked::Unassigned => finder.of_unknown_address(to),
        Asked::NoService => Vec::new(),
    }
}

/// Returns the rules of policies that decide about a connection in one direction.
pub(super) fn of_policies(
    facts: &Facts,
    direction: Direction,
    connection: &Connection,
    code: Code,
) -> Vec<RuleName> {
    // Such packets pass hooks without policies.
    if matches!(code, Code::HostNetwork | Code::NodeToOwnPod) {
        return Vec::new();
    }
    named(facts.policies.deciding_parts(direction, connection))
}

fn counter(facts: &Facts, direction: Direction, end: IpAddr) -> Option<Counter> {
    let at = facts.policies.denied_counter(direction, end)?;
    Some(Counter {
        pod: facts.policies.pod_at(end)?.to_string(),
        direction,
        at,
    })
}

/// Returns the names of parts, each once.
fn named(parts: Vec<RulesetPart>) -> Vec<RuleName> {
    let mut found = Vec::new();
    let rules = parts.into_iter().map(|part| RuleName {
        part,
        in_kernel: None,
    });
    add_new(&mut found, rules);
    found
}

/// Adds names that are not among others.
pub(super) fn add_new(to: &mut Vec<RuleName>, rules: impl IntoIterator<Item = RuleName>) {
    for rule in rules {
        if !to.iter().any(|known| known.part == rule.part) {
            to.push(rule);
        }
    }
}

/// Writes names a line each, behind a margin.
pub(super) fn write(rules: &[RuleName], margin: usize, out: &mut impl Write) -> fmt::Result {
    let rows: Vec<Row> = rules.iter().map(RuleName::row).collect();
    let mut shown: Vec<&Row> = Vec::new();
    let mut more: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for row in &rows {
        let same = shown
            .iter()
            .filter(|it| (&it.table, &it.object) == (&row.table, &row.object));
        if same.count() < MOST || row.in_kernel == Some(false) {
            shown.push(row);
        } else {
            *more.entry((&row.table, &row.object)).or_default() += 1;
        }
    }
    let with_elements = shown.iter().filter(|row| row.element.is_some());
    let width = with_elements.map(|row| row.object.chars().count()).max();
    let width = width.unwrap_or_default();
    for row in shown {
        let Row { table, object, .. } = row;
        write!(out, "{:margin$}{table}  ", "")?;
        match &row.element {
            Some(element) => write!(out, "{object:width$}  {{ {element} }}")?,
            None => write!(out, "{object}")?,
        }
        out.write_str(match row.in_kernel {
            Some(false) => "  NOT IN THE KERNEL\n",
            Some(true) | None => "\n",
        })?;
    }
    for ((table, object), count) in more {
        writeln!(out, "{:margin$}{table}  {object}: {count} more", "")?;
    }
    Ok(())
}
