//! The result of a scene: tables of values with their budgets, printed and written as JSON.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal as _};
use std::path::Path;

use serde::{Serialize, Serializer};

use crate::budgets::{self, Budget};
use crate::cluster::grouped;

/// A value with its unit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum Value {
    /// A duration.
    #[serde(rename = "s")]
    Seconds(f64),
    /// Memory, or data.
    #[serde(rename = "B")]
    Bytes(f64),
    /// Data in a time.
    #[serde(rename = "B/s")]
    BytesPerSecond(f64),
    /// A count, or a mean of counts.
    #[serde(rename = "n")]
    Number(f64),
    /// One value over another one.
    #[serde(rename = "ratio")]
    Ratio(f64),
    /// Words, where there is no number.
    #[serde(untagged)]
    Text(String),
}

impl Value {
    /// Returns the number.
    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Seconds(number)
            | Self::Bytes(number)
            | Self::BytesPerSecond(number)
            | Self::Number(number)
            | Self::Ratio(number) => Some(*number),
            Self::Text(_) => None,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MEBIBYTE: f64 = (1 << 20) as f64;
        match self {
            Self::Seconds(seconds) => {
                let (value, unit) = match *seconds {
                    s if s >= 1.0 => (s, "s"),
                    s if s >= 1e-3 => (s * 1e3, "ms"),
                    s => (s * 1e6, "µs"),
                };
                let digits = if value >= 100.0 {
                    0
                } else {
                    1 + usize::from(value < 10.0)
                };
                write!(f, "{value:.digits$} {unit}")
            }
            Self::Bytes(bytes) if *bytes < MEBIBYTE => write!(f, "{:.1} KiB", bytes / 1024.0),
            Self::Bytes(bytes) => write!(f, "{:.1} MiB", bytes / MEBIBYTE),
            Self::BytesPerSecond(rate) => write!(f, "{:.2} GiB/s", rate / 1024.0 / MEBIBYTE),
            Self::Number(number) if number.fract() != 0.0 => write!(f, "{number:.1}"),
            Self::Number(number) => f.write_str(&grouped(*number)),
            Self::Ratio(ratio) => write!(f, "{ratio:.3}"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

/// A line of a table. The budget is for the first of its values.
#[derive(Debug, Serialize)]
pub struct Row {
    /// The quantity.
    pub what: String,
    /// The cluster, or whatever else differs between rows of one quantity.
    pub of: String,
    /// Values with the names of their columns.
    #[serde(serialize_with = "as_map")]
    pub values: Vec<(&'static str, Value)>,
    /// The bound, if there is one.
    pub budget: Option<Budget>,
    /// Whether the first value is within it.
    pub met: Option<bool>,
}

fn as_map<S: Serializer>(
    values: &[(&'static str, Value)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(values.iter().map(|(name, value)| (name, value)))
}

impl Row {
    /// Adds another value, if there is one.
    pub fn and(&mut self, name: &'static str, value: impl Into<Option<Value>>) -> &mut Self {
        self.values.extend(value.into().map(|value| (name, value)));
        self
    }
}

/// A table.
#[derive(Debug, Serialize)]
pub struct Table {
    title: &'static str,
    /// The head of the column [`Row::of`].
    of: &'static str,
    rows: Vec<Row>,
}

impl Table {
    /// Returns an empty table.
    pub fn new(title: &'static str, of: &'static str) -> Self {
        let rows = Vec::new();
        Self { title, of, rows }
    }

    /// Adds a row with a value.
    pub fn row(
        &mut self,
        what: impl Into<String>,
        of: impl ToString,
        name: &'static str,
        value: Value,
    ) -> &mut Row {
        self.rows.push(Row {
            what: what.into(),
            of: of.to_string(),
            values: vec![(name, value)],
            budget: None,
            met: None,
        });
        self.rows.last_mut().expect("it was added")
    }

    fn print(&self, out: &mut String, coloured: bool) {
        let mut names: Vec<&str> = Vec::new();
        for (name, _) in self.rows.iter().flat_map(|row| &row.values) {
            if !names.contains(name) {
                names.push(name);
            }
        }
        let judged = self.rows.iter().any(|row| row.budget.is_some());
        let tail: &[&str] = if judged { &["budget", "met"] } else { &[] };
        let mut lines = vec![[&["what", self.of][..], &names, tail].concat()];
        let cells: Vec<Vec<String>> = self.rows.iter().map(|row| row.cells(&names)).collect();
        lines.extend(cells.iter().map(|cells| {
            let cells = cells.iter().take(2 + names.len() + tail.len());
            cells.map(String::as_str).collect()
        }));
        let columns = lines[0].len();
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
        let widths: Vec<usize> = (0..columns).filter_map(width).collect();
        writeln!(out, "{}\n", self.title).expect("writing to a String cannot fail");
        for line in lines {
            for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
                let (colour, end) = match *cell {
                    "yes" if coloured => ("\x1b[32m", "\x1b[0m"),
                    "NO" if coloured => ("\x1b[1;31m", "\x1b[0m"),
                    _ => ("", ""),
                };
                let written = match column {
                    0 => write!(out, "{cell:<width$}"),
                    _ => write!(out, "  {colour}{cell:>width$}{end}"),
                };
                written.expect("writing to a String cannot fail");
            }
            out.push('\n');
        }
        out.push('\n');
    }
}

impl Row {
    fn cells(&self, names: &[&str]) -> Vec<String> {
        let mut cells = vec![self.what.clone(), self.of.clone()];
        cells.extend(names.iter().map(|name| {
            let value = self.values.iter().find(|(of, _)| of == name);
            value.map_or_else(|| "-".to_owned(), |(_, value)| value.to_string())
        }));
        let budget = self
            .budget
            .as_ref()
            .map_or_else(|| "-".to_owned(), ToString::to_string);
        let met = self.met.map_or("-", |met| if met { "yes" } else { "NO" });
        cells.extend([budget, met.to_owned()]);
        cells
    }
}

/// Everything that a scene measured.
#[derive(Debug, Serialize)]
pub struct Report {
    scene: &'static str,
    /// Where and when, and what was measured.
    facts: BTreeMap<&'static str, String>,
    /// What the scene was asked for.
    parameters: BTreeMap<&'static str, String>,
    tables: Vec<Table>,
    notes: Vec<String>,
    /// Budgets whose quantities were not measured.
    not_measured: Vec<String>,
}

impl Report {
    /// Returns an empty report.
    pub fn new(scene: &'static str) -> Self {
        Self {
            scene,
            facts: crate::machine::facts(),
            parameters: BTreeMap::new(),
            tables: Vec::new(),
            notes: Vec::new(),
            not_measured: Vec::new(),
        }
    }

    /// Adds a parameter of the scene.
    pub fn parameter(&mut self, name: &'static str, value: impl ToString) {
        self.parameters.insert(name, value.to_string());
    }

    /// Adds a table.
    pub fn table(&mut self, table: Table) {
        self.tables.push(table);
    }

    /// Adds a remark below the tables.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Sets the budgets beside the values, prints everything and writes it to a directory.
    /// Returns whether every budget is met that was measured.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn conclude(mut self, results: Option<&Path>) -> io::Result<bool> {
        self.judge();
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let coloured = io::stdout().is_terminal() && !no_colour;
        let mut text = String::from("\n");
        self.tables
            .iter()
            .for_each(|table| table.print(&mut text, coloured));
        self.notes.iter().for_each(|note| text.extend([note, "\n"]));
        print!("{text}");
        let (mut budgets, mut missed) = (0, 0);
        for row in self.tables.iter().flat_map(|table| &table.rows) {
            let (Some(budget), Some(met)) = (&row.budget, row.met) else {
                continue;
            };
            budgets += 1;
            if !met {
                missed += 1;
                let value = row.values.first().map(|(_, value)| value.to_string());
                eprintln!("missed: {budget:#}, is {}", value.unwrap_or_default());
            }
        }
        self.not_measured
            .iter()
            .for_each(|budget| eprintln!("not measured: {budget}"));
        eprintln!("{budgets} budgets measured, {missed} missed.");
        if let Some(directory) = results {
            let file = directory.join(self.scene).with_extension("json");
            let text = serde_json::to_string_pretty(&self)? + "\n";
            std::fs::create_dir_all(directory)
                .and_then(|()| std::fs::write(&file, text))
                .map_err(|error| {
                    io::Error::other(format!("cannot write {}: {error}", file.display()))
                })?;
            eprintln!("{}", file.display());
        }
        Ok(missed == 0)
    }

    fn judge(&mut self) {
        let budgets = budgets::of(self.scene);
        for row in self.tables.iter_mut().flat_map(|table| &mut table.rows) {
            row.budget = budgets.find(&row.what, &row.of);
            let value = row.values.first().map(|(_, value)| value);
            row.met = row
                .budget
                .as_ref()
                .zip(value)
                .map(|(budget, value)| budget.admits(value));
        }
        let rows = || self.tables.iter().flat_map(|table| &table.rows);
        let measured =
            |what: &str, of: &str| rows().any(|row| (&*row.what, &*row.of) == (what, of));
        self.not_measured = budgets.unmeasured(measured);
    }
}
