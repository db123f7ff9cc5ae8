//! Answers as people read them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};
use std::net::{IpAddr, SocketAddr};

use super::answer::{Action, Answer, Code, Decision, LeftOut, PortAnswer, TargetAnswer, Verdict};
use super::evidence::RuleName;
use super::live;
use super::policies::PolicyRow;
use super::rules;
use super::services::{EndpointRow, ServiceRow};
use crate::model::ObjectName;
use crate::policies::NearMiss;

/// The most lines of endpoints, and names in a line.
const MOST: usize = 10;
/// Where the text of a step begins.
const INDENT: usize = 26;

/// How text is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Style {
    /// Whether verdicts have colours.
    pub colour: bool,
}

impl Style {
    /// Returns a word in the colour of a verdict, padded to a width.
    fn verdict(self, word: &str, verdict: Verdict, width: usize) -> String {
        let (before, after) = self.around(verdict);
        format!("{before}{word:width$}{after}")
    }

    /// Returns what surrounds a word in the colour of a verdict.
    pub(super) fn around(self, verdict: Verdict) -> (&'static str, &'static str) {
        if !self.colour {
            return ("", "");
        }
        let before = match verdict {
            Verdict::Allowed => "\x1b[32m",
            Verdict::Partly => "\x1b[33m",
            Verdict::Denied | Verdict::Refused | Verdict::Dropped => "\x1b[31m",
        };
        (before, "\x1b[0m")
    }
}

/// Writes an answer.
pub(crate) fn answer(answer: &Answer, style: Style, out: &mut impl Write) -> fmt::Result {
    let sources: Vec<String> = answer
        .source_addresses
        .iter()
        .map(ToString::to_string)
        .collect();
    let from = &answer.from;
    let sources = sources.join(", ");
    if *from == sources {
        write!(out, "{from} -> ")?;
    } else {
        write!(out, "{from} ({sources}) -> ")?;
    }
    let port = match &answer.service.port {
        Some(name) if !name.is_empty() => format!(":{name}"),
        _ => answer
            .port
            .map_or_else(String::new, |port| format!(":{port}")),
    };
    let to = match &answer.service.name {
        Some(name) if answer.service.frontend.is_some() => name.as_str(),
        _ => answer.to.trim_start_matches("svc/"),
    };
    write!(out, "{to}{port}")?;
    match &answer.service.frontend {
        Some(frontend) => write!(out, " ({frontend})")?,
        None => write!(out, "/{}", answer.protocol)?,
    }
    writeln!(out, ", on {}\n", answer.node)?;
    steps(answer, style, out)?;
    writeln!(out)?;
    let verdict = style.verdict(answer.verdict.word(), answer.verdict, 0);
    let code = serde_json::to_value(answer.code).unwrap_or_default();
    write!(out, "{verdict} ({})", code.as_str().unwrap_or_default())?;
    writeln!(out, "{}", summary(answer))?;
    for port in &answer.ports {
        let code = serde_json::to_value(port.code).unwrap_or_default();
        writeln!(
            out,
            "  {:<16} {} {}",
            port_words(port),
            style.verdict(port.verdict.word(), port.verdict, 8),
            code.as_str().unwrap_or_default()
        )?;
    }
    for warning in &answer.warnings {
        writeln!(out, "warning: {warning}")?;
    }
    for assumption in &answer.assumptions {
        writeln!(out, "assumed: {assumption}")?;
    }
    Ok(())
}

fn port_words(port: &PortAnswer) -> String {
    let mut words = if port.port.is_empty() {
        port.protocol.clone()
    } else {
        format!("{}/{}", port.port, port.protocol)
    };
    if let Some(family) = port.family {
        words.push(' ');
        words.push_str(family);
    }
    words
}

/// Returns the distinct addresses and ports of the targets, and whether all sources reach each.
fn distinct(answer: &Answer) -> BTreeMap<(IpAddr, Option<u16>), bool> {
    let mut distinct = BTreeMap::new();
    for target in &answer.targets {
        let reached = distinct
            .entry((target.address, target.port))
            .or_insert(true);
        *reached &= target.verdict == Verdict::Allowed;
    }
    distinct
}

fn summary(answer: &Answer) -> String {
    let distinct = distinct(answer);
    let all = distinct.len();
    let reached = distinct.values().filter(|reached| **reached).count();
    match answer.service.action {
        Action::Dnat => format!(": {reached} of {all} endpoints can be reached"),
        _ if all > 1 => format!(": {reached} of {all} addresses can be reached"),
        _ => String::new(),
    }
}

fn steps(answer: &Answer, style: Style, out: &mut impl Write) -> fmt::Result {
    let step = &answer.service;
    let mut number = 0;
    let mut line = |what: &str, word: &str, verdict: Verdict, text: &str, out: &mut _| {
        number += 1;
        let word = style.verdict(word, verdict, 11);
        let out: &mut dyn Write = out;
        writeln!(out, "  {number} {what:<9} {word} {text}")
    };
    match step.action {
        Action::Dnat => {
            let distinct = distinct(answer).len();
            let bound = answer.live.as_ref().and_then(|live| live.affinity.as_ref());
            let endpoints = match distinct {
                1 if bound.is_some_and(|it| is_target(answer, it.endpoint)) => {
                    "the endpoint to which the client is bound".to_owned()
                }
                1 => "the only endpoint".to_owned(),
                many => format!("one of {many} endpoints"),
            };
            let client = if step.masquerade {
                "the endpoint sees the node's address"
            } else {
                "client address kept"
            };
            let by = step.node.as_ref();
            let by = by.map_or_else(String::new, |node| format!(" (by the rules of {node})"));
            let text = format!("{endpoints}; {client}{by}");
            line("service", "TRANSLATED", Verdict::Allowed, &text, &mut *out)?;
            let mut shown = BTreeSet::new();
            let mut targets = answer.targets.iter();
            while let Some(target) = targets.next().filter(|_| shown.len() < MOST) {
                if !shown.insert((target.address, target.port)) {
                    continue;
                }
                let at =
                    super::service::shown(target.address, target.port.unwrap_or_default(), None);
                let pod = target.pod.as_ref().map_or("-", ObjectName::as_str);
                let node = target.node.as_deref().unwrap_or("-");
                more(&format!("{at} {pod} {node}"), out)?;
            }
            if distinct > MOST {
                more(&format!("and {} more", distinct - MOST), out)?;
            }
        }
        Action::Reject => line(
            "service",
            "REFUSED",
            Verdict::Refused,
            why(answer.code),
            &mut *out,
        )?,
        Action::Drop => line(
            "service",
            "DROPPED",
            Verdict::Dropped,
            why(answer.code),
            &mut *out,
        )?,
        Action::None => line(
            "service",
            "NONE",
            Verdict::Allowed,
            "the destination is no address of a service",
            &mut *out,
        )?,
    }
    left_out(&step.left_out, out)?;
    rules::write(step.rules.as_deref().unwrap_or_default(), INDENT, out)?;
    let directions = match answer.targets.is_empty() {
        true => &[][..],
        false => &[("egress", true), ("ingress", false)],
    };
    for (what, direction) in directions.iter().copied() {
        let of = |target: &TargetAnswer| {
            if direction {
                target.egress.clone()
            } else {
                target.ingress.clone()
            }
        };
        let mut groups: Vec<(Decision, Vec<String>, Vec<RuleName>)> = Vec::new();
        for target in &answer.targets {
            let mut decision = of(target);
            let of_target = decision.rules.take().unwrap_or_default();
            // Who is asked matters where it is denied.
            if decision.verdict == Verdict::Allowed
                || decision.decided_on.as_deref() == Some(&answer.node)
            {
                decision.decided_on = None;
            }
            let who = if direction {
                target
                    .source
                    .map_or_else(|| answer.from.clone(), |source| source.to_string())
            } else {
                pod_or_address(target.pod.as_ref(), target.address)
            };
            match groups.iter_mut().find(|(known, ..)| *known == decision) {
                Some((_, names, rules)) => {
                    if !names.contains(&who) {
                        names.push(who);
                    }
                    rules::add_new(rules, of_target);
                }
                None => groups.push((decision, vec![who], of_target)),
            }
        }
        for (decision, names, rules) in &groups {
            let mut text = decided(decision, names, what);
            if let Some(node) = &decision.decided_on {
                write!(text, " (by the rules of {node})")?;
            }
            line(
                what,
                decision.verdict.word(),
                decision.verdict,
                &text,
                &mut *out,
            )?;
            if let Some(nearest) = &decision.nearest {
                more(&nearest_rule(nearest), out)?;
            }
            if !decision.audited.is_empty() {
                let names = decision.audited.iter();
                let names: Vec<String> = names.map(|policy| policy.name.to_string()).collect();
                more(&format!("audited: {} would deny this", listed(&names)), out)?;
            }
            rules::write(rules, INDENT, out)?;
        }
    }
    live::write(answer, |what, word, verdict, text| {
        let word = style.verdict(word, verdict, 11);
        writeln!(out, "    {what:<9} {word} {text}")
    })
}

fn is_target(answer: &Answer, endpoint: SocketAddr) -> bool {
    let mut targets = answer.targets.iter();
    targets.any(|target| (target.address, target.port) == (endpoint.ip(), Some(endpoint.port())))
}

fn more(text: &str, out: &mut impl Write) -> fmt::Result {
    writeln!(out, "{:INDENT$}{text}", "")
}

fn left_out(endpoints: &[LeftOut], out: &mut impl Write) -> fmt::Result {
    let reasons: BTreeSet<_> = endpoints.iter().map(|it| it.reason).collect();
    for reason in reasons {
        let of_reason = endpoints.iter().filter(|it| it.reason == reason);
        let names = of_reason.map(|it| pod_or_address(it.pod.as_ref(), it.address));
        let names = listed(&names.collect::<Vec<_>>());
        more(&format!("left out: {names} {}", reason.words()), out)?;
    }
    Ok(())
}

/// Describes the rule that fails in one condition alone.
pub(super) fn nearest_rule(nearest: &NearMiss) -> String {
    let failed = nearest.failed();
    let met = nearest.met().map_or_else(
        || format!("{failed} does not match"),
        |met| format!("{met} matches, {failed} does not"),
    );
    let (policy, rule) = (nearest.policy(), nearest.rule());
    format!("nearest: {policy} rule {rule}: {met}")
}

pub(super) fn decided(decision: &Decision, names: &[String], direction: &str) -> String {
    let who = listed(names);
    let policies: Vec<String> = decision
        .policies
        .iter()
        .map(|policy| policy.name.to_string())
        .collect();
    let policies = listed(&policies);
    let kind = decision
        .policies
        .first()
        .map_or("", |policy| policy.kind.as_str());
    match decision.code {
        Code::NoPolicy if decision.policies.is_empty() => {
            format!("no policy selects {who} for {direction}")
        }
        Code::NoPolicy => {
            format!("no rule of {kind} {policies} decides, and nothing else isolates {who}")
        }
        Code::PolicyRule | Code::PolicyDeny => {
            let does = if decision.code == Code::PolicyRule {
                "allows"
            } else {
                "denies"
            };
            let tier = match decision.tier {
                Some(tier @ ("Admin" | "Baseline")) => format!(" of tier {tier}"),
                _ => String::new(),
            };
            match decision.rule {
                Some(0) => {
                    format!("{kind} {policies}{tier}, which the kernel refused, {does} this")
                }
                rule => {
                    let rule = rule.unwrap_or_default();
                    format!("{kind} {policies}{tier} rule {rule} {does} this")
                }
            }
        }
        Code::PolicyNoRule => match decision.policies.len() {
            1 => format!("{kind} {policies} selects {who} and no rule allows this"),
            _ => format!("{kind} {policies} select {who} and no rule allows this"),
        },
        Code::BridgeUnfiltered => {
            let why = "but the bridge of both pods does not filter: see nftlet status";
            match decision.policies.is_empty() {
                true => format!("denied, {why}"),
                false => format!("{kind} {policies} would deny this, {why}"),
            }
        }
        Code::SamePod => "a pod reaches itself".to_owned(),
        Code::NodeToOwnPod => "a node reaches its own pods".to_owned(),
        Code::HostNetwork => format!("{who} is an address of the node, which no policy selects"),
        code => why(code).to_owned(),
    }
}

fn why(code: Code) -> &'static str {
    match code {
        Code::ServiceNoEndpoints => "the service has no ready endpoint",
        Code::ServiceNoLocalEndpoints => {
            "the traffic policy is Local, and no ready endpoint is on this node"
        }
        Code::ServicePortUnknown => "the service has no such port",
        Code::ServiceAddressUnknown => "no service has this address in the range of ClusterIPs",
        Code::SourceRange => "the client is outside of loadBalancerSourceRanges",
        Code::PodUnknown => "no known pod has this address",
        Code::NoPolicy
        | Code::PolicyRule
        | Code::PolicyNoRule
        | Code::PolicyDeny
        | Code::BridgeUnfiltered
        | Code::SamePod
        | Code::NodeToOwnPod
        | Code::HostNetwork
        | Code::Affinity => "",
    }
}

fn pod_or_address(pod: Option<&ObjectName>, address: IpAddr) -> String {
    pod.map_or_else(|| address.to_string(), ObjectName::to_string)
}

/// Joins names, of which those of the namespace of the first have no namespace.
fn listed(names: &[String]) -> String {
    let namespace = names.first().and_then(|first| first.split_once('/'));
    let mut shown: Vec<&str> = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let short = namespace
            .filter(|_| index > 0)
            .and_then(|(namespace, _)| name.strip_prefix(namespace)?.strip_prefix('/'));
        shown.push(short.unwrap_or(name));
    }
    let more = shown.len().saturating_sub(MOST);
    shown.truncate(MOST);
    let joined = shown.join(", ");
    if more > 0 {
        format!("{joined} and {more} more")
    } else {
        joined
    }
}

/// Writes the table of services, or the details of one.
pub(crate) fn services(rows: &[ServiceRow], style: Style, out: &mut impl Write) -> fmt::Result {
    let header = [
        "SERVICE",
        "TYPE",
        "FRONTENDS",
        "POLICY",
        "ENDPOINTS",
        "LOCAL",
        "AFFINITY",
        "STATE",
    ];
    let mut cells: Vec<Vec<String>> = vec![header.map(str::to_owned).into()];
    for row in rows {
        let used = row.endpoints.iter().filter(|it| it.used).count();
        let local = row
            .endpoints
            .iter()
            .filter(|it| it.used && it.local)
            .count();
        cells.push(vec![
            row.name.clone(),
            row.kind.to_owned(),
            row.frontends.len().to_string(),
            row.policy.to_owned(),
            used.to_string(),
            local.to_string(),
            row.affinity_seconds
                .map_or_else(|| "-".to_owned(), |seconds| format!("{seconds}s")),
            row.state.clone(),
        ]);
    }
    table(
        &cells,
        style,
        |index| {
            let is_sound = rows.get(index).is_some_and(|row| row.state == "in force");
            (!is_sound).then_some(Verdict::Partly)
        },
        out,
    )?;
    if let [row] = rows {
        details(row, out)?;
    }
    Ok(())
}

/// Writes aligned columns: a header, and rows in the colours of verdicts if they have one, by index.
pub(super) fn table(
    cells: &[Vec<String>],
    style: Style,
    verdict_of: impl Fn(usize) -> Option<Verdict>,
    out: &mut impl Write,
) -> fmt::Result {
    let columns = cells.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let lengths = cells.iter().filter_map(|row| row.get(column));
            let lengths = lengths.map(|cell| cell.chars().count());
            lengths.max().unwrap_or_default()
        })
        .collect();
    for (index, row) in cells.iter().enumerate() {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            write!(line, "{cell:<width$}  ")?;
        }
        let verdict = index.checked_sub(1).and_then(&verdict_of);
        let (open, close) = verdict.map_or(("", ""), |verdict| style.around(verdict));
        writeln!(out, "{open}{}{close}", line.trim_end())?;
    }
    Ok(())
}

/// Writes the table of policies, or the pods of one.
pub(crate) fn policies(rows: &[PolicyRow], style: Style, out: &mut impl Write) -> fmt::Result {
    let header = [
        "POLICY",
        "KIND",
        "DIRECTIONS",
        "PODS HERE",
        "IN FORCE SINCE",
        "MODE",
    ];
    let mut cells: Vec<Vec<String>> = vec![header.map(str::to_owned).into()];
    for row in rows {
        let name = if row.namespace.is_empty() {
            row.name.clone()
        } else {
            format!("{}/{}", row.namespace, row.name)
        };
        cells.push(vec![
            name,
            row.kind.to_owned(),
            row.directions.join(","),
            row.pods.len().to_string(),
            row.in_force_since.as_deref().unwrap_or("-").to_owned(),
            row.mode.to_owned(),
        ]);
    }
    table(&cells, style, |_| None, out)?;
    if let [row] = rows {
        writeln!(out, "\nPods of this node that it selects")?;
        for pod in &row.pods {
            writeln!(out, "  {pod}")?;
        }
        if row.pods.is_empty() {
            writeln!(out, "  none")?;
        }
    }
    Ok(())
}

fn details(row: &ServiceRow, out: &mut impl Write) -> fmt::Result {
    writeln!(out, "\nFrontends")?;
    for frontend in &row.frontends {
        let at = frontend
            .address
            .map_or_else(|| "node".to_owned(), |address| address.to_string());
        let name = if frontend.name.is_empty() {
            String::new()
        } else {
            format!(" {}", frontend.name)
        };
        writeln!(
            out,
            "  {at} {}/{}{name}: {}",
            frontend.port, frontend.protocol, frontend.action
        )?;
    }
    writeln!(out, "\nEndpoints")?;
    for endpoint in &row.endpoints {
        writeln!(out, "  {}", endpoint_line(endpoint))?;
    }
    if row.endpoints.is_empty() {
        writeln!(out, "  none")?;
    }
    Ok(())
}

fn endpoint_line(endpoint: &EndpointRow) -> String {
    let at = super::service::shown(endpoint.address, endpoint.port, None);
    let pod = endpoint.pod.as_ref().map_or("-", ObjectName::as_str);
    let node = endpoint.node.as_deref().unwrap_or("-");
    let state = match endpoint.reason {
        None => "used".to_owned(),
        Some(reason) => format!("left out: {}", reason.words()),
    };
    format!("{at} {pod} {node} {state}")
}
