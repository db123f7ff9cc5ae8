//! The answers as JSON, whose fields are an interface.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};

use serde::Serialize;
use serde_json::json;

use super::asked_ports::AskedPorts;
use super::exposed::Exposed;
use super::port_set::PortSet;
use super::rows::{Cell, Reach, Row};
use crate::insight::API_VERSION;

/// Rows that nothing distinguishes.
#[derive(Serialize)]
struct Class<'r> {
    name: &'r str,
    /// The number of pods.
    pods: usize,
    members: &'r [&'r str],
}

/// What one class can connect to in another, of which the rows are different ones.
#[derive(Serialize)]
struct Pair<'r> {
    from: &'r str,
    to: &'r str,
    /// What all pods of the one can connect to in all pods of the other.
    connections: &'r str,
    /// What only some can connect to, if this is more.
    #[serde(skip_serializing_if = "Option::is_none")]
    some: Option<&'r str>,
}

/// Rows that nothing distinguishes, as sources, destinations or both.
pub(super) struct Joined<'r> {
    pub row: Row,
    pub members: Vec<&'r str>,
    pub is_source: bool,
    pub is_destination: bool,
}

/// Returns the classes of rows.
pub(super) fn classes<'r>(reach: &Reach, from: &'r [Row], to: &'r [Row]) -> Vec<Joined<'r>> {
    let mut roles: BTreeMap<&str, (&Row, bool, bool)> = BTreeMap::new();
    for row in from {
        roles.insert(&row.name, (row, true, false));
    }
    for row in to {
        let role = roles.entry(&row.name).or_insert((row, false, false));
        role.2 = true;
    }
    let mut classes = Vec::new();
    for (is_source, is_destination) in [(true, true), (true, false), (false, true)] {
        let rows = roles.values().filter(|(_, source, destination)| {
            (*source, *destination) == (is_source, is_destination)
        });
        let joined = reach.joined(rows.map(|(row, ..)| *row));
        classes.extend(joined.into_iter().map(|(row, members)| Joined {
            row,
            members,
            is_source,
            is_destination,
        }));
    }
    classes
}

/// Writes classes of rows, and what they can connect to.
pub(crate) fn json(
    reach: &Reach,
    [from, to]: [&[Row]; 2],
    ports: PortSet,
    out: &mut dyn Write,
) -> io::Result<()> {
    let ports = AskedPorts::new(reach, ports);
    let classes = classes(reach, from, to);
    write!(
        out,
        "{{\n  \"apiVersion\": \"{API_VERSION}\",\n  \"classes\": ["
    )?;
    let mut comma = "\n    ";
    for class in &classes {
        out.write_all(comma.as_bytes())?;
        let class = Class {
            name: &class.row.name,
            pods: class.row.pods,
            members: &class.members,
        };
        serde_json::to_writer(&mut *out, &class)?;
        comma = ",\n    ";
    }
    write!(out, "\n  ],\n  \"pairs\": [")?;
    let mut texts: HashMap<Cell, (String, Option<String>)> = HashMap::new();
    comma = "\n    ";
    for source in classes.iter().filter(|class| class.is_source) {
        for destination in classes.iter().filter(|class| class.is_destination) {
            let Some(cell) = reach.cell(&source.row, &destination.row) else {
                continue;
            };
            let cell = ports.only(reach, cell);
            let (all, some) = texts.entry(cell).or_insert_with(|| words(reach, cell));
            out.write_all(comma.as_bytes())?;
            let pair = Pair {
                from: &source.row.name,
                to: &destination.row.name,
                connections: all,
                some: some.as_deref(),
            };
            serde_json::to_writer(&mut *out, &pair)?;
            comma = ",\n    ";
        }
    }
    let assumptions = serde_json::to_string(&reach.assumptions())?;
    writeln!(out, "\n  ],\n  \"assumptions\": {assumptions}\n}}")
}

fn words(reach: &Reach, cell: Cell) -> (String, Option<String>) {
    let all = reach.set(cell.all).to_string();
    let some = (cell.all != cell.some).then(|| reach.set(cell.some).to_string());
    (all, some)
}

/// Writes what is exposed.
pub(crate) fn exposed_json(reach: &Reach, rows: &[Exposed], out: &mut dyn Write) -> io::Result<()> {
    let of = |cell: Option<Cell>| {
        let (all, some) = cell.map_or(("No Connections".to_owned(), None), |it| words(reach, it));
        json!({ "connections": all, "some": some })
    };
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            json!({
                "name": row.name,
                "outside": of(row.outside),
                "otherNamespaces": of(row.other_namespaces),
                "services": row.services,
            })
        })
        .collect();
    let list = json!({
        "apiVersion": API_VERSION,
        "exposed": rows,
        "assumptions": reach.assumptions(),
    });
    serde_json::to_writer_pretty(&mut *out, &list)?;
    writeln!(out)
}
