//! Expectations: what must be reachable, and what must not.

use std::collections::HashMap;
use std::io::{self, Write};

use serde::Deserialize;
use serde_saphyr::{Location, Spanned};

use super::asked_ports::asked_ports;
use super::port_set::PortSet;
use super::reasons::{Why, Whys};
use super::rows::{Cell, Reach, ReachError, Row};

/// The most reasons of a failed expectation.
const MOST_REASONS: usize = 6;

/// An entry of the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    from: Spanned<String>,
    to: Spanned<String>,
    #[serde(default)]
    allow: Vec<Spanned<String>>,
    #[serde(default)]
    deny: Vec<Spanned<String>>,
}

/// What is wrong with a file of expectations.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub(crate) struct ExpectError {
    line: u64,
    message: String,
}

/// What must be allowed or denied between two ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expectation {
    from: String,
    to: String,
    is_allowed: bool,
    /// As it is written.
    text: String,
    ports: PortSet,
}

/// Reads the expectations in a file.
///
/// # Errors
///
/// The first thing that is wrong, with its line.
pub(crate) fn expectations(text: &str) -> Result<Vec<Expectation>, ExpectError> {
    let entries: Vec<Entry> = serde_saphyr::from_str(text).map_err(|error| {
        let error = error.without_snippet();
        let message = error.to_string();
        let place = error.location();
        let place_words =
            place.map(|at| format!(" at line {}, column {}", at.line(), at.column()));
        let message = place_words
            .and_then(|words| message.strip_suffix(&words))
            .unwrap_or(&message);
        let message = match message {
            "expected sequence start" => {
                "this must be a list; write `- from: ...` for each expectation, and ports in brackets"
            }
            other => other,
        };
        fault(place.unwrap_or(Location::UNKNOWN), message)
    })?;
    let mut expectations = Vec::new();
    for entry in &entries {
        if entry.allow.is_empty() && entry.deny.is_empty() {
            let message = "nothing is expected; add allow: or deny: with ports, such as [TCP/80]";
            return Err(fault(entry.from.referenced, message));
        }
        for (ports, is_allowed) in [(&entry.allow, true), (&entry.deny, false)] {
            for port in ports {
                let asked = asked_ports(&port.value);
                let asked = asked.map_err(|error| fault(port.referenced, &error.to_string()))?;
                expectations.push(Expectation {
                    from: entry.from.value.clone(),
                    to: entry.to.value.clone(),
                    is_allowed,
                    text: port.value.clone(),
                    ports: asked,
                });
            }
        }
    }
    if expectations.is_empty() {
        return Err(fault(Location::UNKNOWN, "the file holds no expectation"));
    }
    Ok(expectations)
}

fn fault(at: Location, message: &str) -> ExpectError {
    ExpectError {
        line: at.line().max(1),
        message: message.split_whitespace().collect::<Vec<_>>().join(" "),
    }
}

/// Checks expectations, and writes the results in the Test Anything Protocol. Returns whether all are
/// met.
pub(crate) fn check(
    reach: &Reach,
    expectations: &[Expectation],
    out: &mut dyn Write,
) -> io::Result<bool> {
    writeln!(out, "TAP version 14\n1..{}", expectations.len())?;
    for assumption in reach.assumptions() {
        writeln!(out, "# assumed: {assumption}")?;
    }
    let mut rows: HashMap<&str, Result<Row, ReachError>> = HashMap::new();
    let mut are_met = true;
    for (index, expectation) in expectations.iter().enumerate() {
        let Expectation { from, to, .. } = expectation;
        for name in [from, to] {
            rows.entry(name).or_insert_with(|| reach.row(name));
        }
        let failed = match (rows.get(&**from), rows.get(&**to)) {
            (Some(Ok(source)), Some(Ok(destination))) => {
                failure(reach, expectation, source, destination)
            }
            (Some(Err(error)), _) | (_, Some(Err(error))) => Some(vec![error.to_string()]),
            _ => None,
        };
        let word = match expectation.is_allowed {
            true => "allow",
            false => "deny",
        };
        let number = index.saturating_add(1);
        let result = if failed.is_some() { "not ok" } else { "ok" };
        let ports = &expectation.text;
        writeln!(out, "{result} {number} - {from} => {to} : {word} {ports}")?;
        let Some(failed) = failed else {
            continue;
        };
        are_met = false;
        let mut lines = failed.iter();
        let message = lines.next().map_or("", String::as_str);
        // A text of JSON is one of YAML.
        writeln!(out, "  ---\n  message: {}", serde_json::to_string(message)?)?;
        if lines.len() > 0 {
            writeln!(out, "  reasons:")?;
        }
        for line in lines {
            writeln!(out, "  - {}", serde_json::to_string(line)?)?;
        }
        writeln!(out, "  ...")?;
    }
    Ok(are_met)
}

/// Returns how an expectation is not met, if it is not: first what is the case, then why.
fn failure(reach: &Reach, expectation: &Expectation, from: &Row, to: &Row) -> Option<Vec<String>> {
    let Some(cell) = reach.cell(from, to) else {
        let message = "they have no two pods with addresses of the same family";
        return Some(vec![message.to_owned()]);
    };
    let is_wrong = |cell: Cell| match expectation.is_allowed {
        true => !reach.set(cell.all).contains(&expectation.ports),
        false => !reach
            .set(cell.some)
            .intersection(&expectation.ports)
            .is_empty(),
    };
    if !is_wrong(cell) {
        return None;
    }
    let connections = reach.connections(cell);
    let mut lines = vec![format!("{} => {} : {connections}", from.name, to.name)];
    let reasons = reach.reasons(from, to, 1, is_wrong);
    let mut whys = Whys::new(reach);
    let whys = reasons.iter().flat_map(|reasons| whys.of(reasons));
    // Where something must be allowed, what denies it counts.
    let whys = whys.filter_map(|why| {
        let ports = why.ports.intersection(&expectation.ports);
        let counts = !ports.is_empty() && (!expectation.is_allowed || !why.is_allowed);
        counts.then_some(Why { ports, ..why })
    });
    lines.extend(whys.take(MOST_REASONS).map(|why| why.line()));
    Some(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_line() {
        for (text, line, part) in [
            ("", 1, "the file holds no expectation"),
            ("[]", 1, "the file holds no expectation"),
            ("from: a\nto: b\n", 1, "this must be a list"),
            ("- from: a\n", 1, "missing field `to`"),
            ("- from: a\n  to: b\n", 1, "nothing is expected"),
            (
                "- from: a\n  to: b\n  allow: TCP/80\n",
                3,
                "this must be a list",
            ),
            (
                "- from: a\n  to: b\n  allow: [TCP/80,\n    http]\n",
                4,
                "`http` is not a port",
            ),
            (
                "- from: a\n  to: b\n  alow: [TCP/80]\n",
                3,
                "unknown field `alow`",
            ),
            ("- from: a\n  to: [b]\n  deny: [all]\n", 2, ""),
            ("- from: 'a\n", 2, "invalid indentation"),
        ] {
            let error = expectations(text).expect_err(text);
            let said = error.to_string();
            assert!(said.contains(part), "{text}: {said}");
            assert_eq!(error.line, line, "{text}: {said}");
            assert!(!said.contains('\n'), "{text}: {said}");
        }
    }

    #[test]
    fn each_port_is_an_expectation() {
        let text = "- {from: shop, to: shop/db, allow: [TCP/5432, 80], deny: [all]}\n";
        let read = expectations(text).expect("expectations");
        let of: Vec<_> = read
            .iter()
            .map(|it| (it.is_allowed, it.ports.to_string()))
            .collect();
        let of: Vec<_> = of
            .iter()
            .map(|(allowed, ports)| (*allowed, &**ports))
            .collect();
        assert_eq!(
            of,
            [
                (true, "TCP 5432"),
                (true, "TCP 80"),
                (false, "All Connections")
            ]
        );
    }
}
