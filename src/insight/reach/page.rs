//! The matrix as one page, which needs no network.

use std::collections::HashMap;
use std::hash::Hash;
use std::io::{self, Write};

use serde_json::{Value, json};

use super::asked_ports::AskedPorts;
use super::columns::Columns;
use super::port_set::PortSet;
use super::reasons::{Why, Whys};
use super::rows::{Causes, Cell, Reach, ReachError, Row};

/// The page around the data.
const PAGE: &str = include_str!("page.html");
/// Where the data belong in it.
const DATA: &str = "{{data}}";
/// The most rows, and the most columns.
const MOST_ROWS: usize = 5_000;
/// The most pairs of classes whose reasons are shown for a cell.
const MOST_REASONS: usize = 3;

/// Values, each kept once and numbered.
struct Numbered<T> {
    numbers: HashMap<T, usize>,
    all: Vec<T>,
}

impl<T: Clone + Eq + Hash> Numbered<T> {
    fn new() -> Self {
        Self {
            numbers: HashMap::new(),
            all: Vec::new(),
        }
    }

    fn number(&mut self, value: T) -> usize {
        let next = self.all.len();
        let number = *self.numbers.entry(value.clone()).or_insert(next);
        if number == next {
            self.all.push(value);
        }
        number
    }
}

/// What is said of a cell.
type Said = (Option<Cell>, Vec<Causes>);

/// Returns the page.
///
/// # Errors
///
/// If there are too many rows.
pub(crate) fn page(
    reach: &Reach,
    [from, to]: [&[Row]; 2],
    ports: PortSet,
) -> Result<impl Fn(&mut dyn Write) -> io::Result<()>, ReachError> {
    let most = from.len().max(to.len());
    if most > MOST_ROWS {
        return Err(ReachError::TooManyRows(most));
    }
    let asked = AskedPorts::new(reach, ports);
    let columns = Columns::new(reach, to);
    let mut said: Numbered<Said> = Numbered::new();
    let mut lines: Numbered<Vec<usize>> = Numbered::new();
    let rows = from.iter().map(|row| {
        let cells = columns.of(reach, row, |to| {
            let cell = reach.cell(row, to).map(|cell| asked.only(reach, cell));
            said.number((cell, reach.reasons(row, to, MOST_REASONS, |_| true)))
        });
        let line = lines.number(runs(&cells.all));
        json!([row.name, row.pods, line, cells.own.map(|(_, own)| own)])
    });
    let rows: Vec<Value> = rows.collect();
    let columns = to.iter().map(|row| json!([row.name, row.pods]));
    let mut whys = Whys::new(reach);
    let mut reasons: Numbered<Value> = Numbered::new();
    let said = said.all.iter();
    let said: Vec<Value> = said
        .map(|said| sentence(reach, &asked, said, &mut whys, &mut reasons))
        .collect();
    let data = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "ports": asked.set.to_string(),
        "rows": rows,
        "columns": columns.collect::<Vec<_>>(),
        "lines": lines.all,
        "said": said,
        "reasons": reasons.all,
        "assumptions": reach.assumptions(),
    });
    // So that no name in it ends the script.
    let data = data.to_string().replace('<', "\\u003c");
    let (before, after) = PAGE.split_once(DATA).unwrap_or((PAGE, ""));
    Ok(move |out: &mut dyn Write| {
        for part in [before, &data, after] {
            out.write_all(part.as_bytes())?;
        }
        Ok(())
    })
}

/// Returns each value with how often it follows itself.
fn runs(values: &[usize]) -> Vec<usize> {
    let mut runs = Vec::new();
    for chunk in values.chunk_by(|one, other| one == other) {
        runs.extend(chunk.first());
        runs.push(chunk.len());
    }
    runs
}

/// Returns the mark of a cell, its connections, and the numbers of the reasons for each kind of pair.
fn sentence(
    reach: &Reach,
    asked: &AskedPorts,
    (cell, of_pairs): &Said,
    whys: &mut Whys,
    reasons: &mut Numbered<Value>,
) -> Value {
    let mark = asked.mark(reach, *cell);
    let text = match cell {
        Some(cell) => reach.connections(*cell),
        None => "no pair of pods with addresses of the same family".to_owned(),
    };
    let mut shown: Vec<Vec<usize>> = Vec::new();
    for of_pair in of_pairs {
        let of_pair = whys.of(of_pair).into_iter().filter_map(|why| {
            let ports = why.ports.intersection(&asked.set);
            let is_asked = !ports.is_empty();
            is_asked.then(|| reasons.number(line(&Why { ports, ..why })))
        });
        let of_pair: Vec<usize> = of_pair.collect();
        if !shown.contains(&of_pair) {
            shown.push(of_pair);
        }
    }
    json!([mark.to_string(), text, shown])
}

fn line(why: &Why) -> Value {
    let verdict = if why.is_allowed { "allowed" } else { "denied" };
    json!([why.direction, verdict, why.ports.words(), why.text])
}
