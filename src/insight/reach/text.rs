//! The answers as people and simple programs read them.

use std::collections::HashMap;
use std::io::{self, Write};

use super::asked_ports::AskedPorts;
use super::columns::Columns;
use super::exposed::Exposed;
use super::port_set::{PortSet, SetId};
use super::rows::{Cell, Reach, Row};
use crate::insight::answer::Verdict;
use crate::insight::text::{Style, table};

const MARKS: [char; 4] = ['.', 'X', '~', '-'];
const LEGEND: &str = ". allowed  X denied  ~ some ports or pods  - no pair of pods";

fn verdict_of(mark: char) -> Option<Verdict> {
    match mark {
        '.' => Some(Verdict::Allowed),
        'X' => Some(Verdict::Denied),
        '~' => Some(Verdict::Partly),
        _ => None,
    }
}

/// Writes the matrix of rows and columns.
pub(crate) fn matrix(
    reach: &Reach,
    [from, to]: [&[Row]; 2],
    ports: PortSet,
    style: Style,
    out: &mut dyn Write,
) -> io::Result<()> {
    let ports = AskedPorts::new(reach, ports);
    let columns = Columns::new(reach, to);
    // Columns have the numbers of their rows, or else those after the last row.
    let mut numbers: HashMap<&str, usize> = HashMap::new();
    for row in from.iter().chain(to) {
        let next = numbers.len() + 1;
        numbers.entry(&row.name).or_insert(next);
    }
    let number = |row: &Row| numbers.get(&*row.name).copied().unwrap_or_default();
    let digits = numbers.len().to_string().len();
    let width = from.iter().map(|row| row.name.chars().count()).max();
    let width = width.unwrap_or_default().max("FROM \\ TO".len());
    write!(out, "{:digits$}  {:<width$}", "", "FROM \\ TO")?;
    for column in to {
        write!(out, " {:>digits$}", number(column))?;
    }
    writeln!(out)?;
    // A cell as it is written, since there may be many millions.
    let shown = MARKS.map(|mark| {
        let (open, close) = verdict_of(mark).map_or(("", ""), |verdict| style.around(verdict));
        (
            mark,
            format!(" {:padding$}{open}{mark}{close}", "", padding = digits - 1),
        )
    });
    for row in from {
        let mut line = format!("{:>digits$}  {:<width$}", number(row), row.name);
        for cell in columns.each(reach, row, |to| reach.cell(row, to)) {
            let mark = ports.mark(reach, cell);
            let shown = shown.iter().find(|(of, _)| *of == mark);
            line.push_str(shown.map_or("", |(_, text)| text));
        }
        writeln!(out, "{line}")?;
    }
    let others = to.iter().filter(|row| number(row) > from.len());
    for column in others {
        writeln!(out, "{:>digits$}  {}", number(column), column.name)?;
    }
    writeln!(out, "\n{LEGEND}")?;
    assumed(reach, "", out)
}

/// Writes what is assumed, each in a line that begins with `mark`.
fn assumed(reach: &Reach, mark: &str, out: &mut dyn Write) -> io::Result<()> {
    for assumption in reach.assumptions() {
        writeln!(out, "{mark}assumed: {assumption}")?;
    }
    Ok(())
}

/// Writes a line for each pair of rows that can connect.
pub(crate) fn lines(
    reach: &Reach,
    [from, to]: [&[Row]; 2],
    ports: PortSet,
    out: &mut dyn Write,
) -> io::Result<()> {
    let ports = AskedPorts::new(reach, ports);
    let columns = Columns::new(reach, to);
    let mut texts: HashMap<Cell, String> = HashMap::new();
    for row in from {
        let cells = columns.each(reach, row, |to| reach.cell(row, to));
        for (cell, to) in cells.into_iter().zip(to) {
            let Some(cell) = cell.map(|cell| ports.only(reach, cell)) else {
                continue;
            };
            if cell.some == SetId::NONE {
                continue;
            }
            let text = texts.entry(cell);
            let text = text.or_insert_with(|| reach.connections(cell));
            writeln!(out, "{} => {} : {text}", row.name, to.name)?;
        }
    }
    assumed(reach, "# ", out)
}

/// Writes what is exposed.
pub(crate) fn exposed(reach: &Reach, rows: &[Exposed], out: &mut dyn Write) -> io::Result<()> {
    let text = |cell: Option<Cell>| cell.map_or("-".to_owned(), |cell| reach.connections(cell));
    let header = ["NAME", "FROM OUTSIDE", "FROM OTHER NAMESPACES", "SERVICES"];
    let mut cells = vec![header.map(str::to_owned).to_vec()];
    cells.extend(rows.iter().map(|row| {
        let services = match row.services.is_empty() {
            true => "-".to_owned(),
            false => row.services.join(", "),
        };
        let [outside, others] = [row.outside, row.other_namespaces].map(text);
        vec![row.name.clone(), outside, others, services]
    }));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = table(&cells, Style::default(), |_| None, &mut text);
    out.write_all(text.as_bytes())?;
    assumed(reach, "", out)
}
