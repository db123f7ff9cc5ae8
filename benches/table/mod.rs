//! Tables of measurements, as text.

#![allow(dead_code, reason = "each benchmark uses its own part")]

use std::fmt::Write;
use std::io::IsTerminal;

/// A table of texts; the first columns are words, the others numbers.
pub struct Table {
    /// What it is about.
    pub title: &'static str,
    /// The heads of the columns.
    pub head: &'static [&'static str],
    /// The rows, each as long as the head.
    pub rows: Vec<Vec<String>>,
}

/// The form tables are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Columns aligned with spaces.
    Plain,
    /// The same for a terminal, with colours for what was kept and missed.
    Coloured,
    /// Markdown.
    Markdown,
}

impl Form {
    /// The form for standard output: colours are for terminals only, and not where `NO_COLOR` is
    /// set.
    pub fn of_output() -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if std::io::stdout().is_terminal() && !plain {
            Self::Coloured
        } else {
            Self::Plain
        }
    }
}

impl Table {
    /// The rows as objects, for who wants to read them later.
    pub fn json(&self) -> String {
        let row = |row: &Vec<String>| -> serde_json::Map<String, serde_json::Value> {
            let cells = self.head.iter().zip(row);
            cells
                .map(|(head, cell)| ((*head).to_owned(), cell.as_str().into()))
                .collect()
        };
        let rows: Vec<_> = self.rows.iter().map(row).collect();
        serde_json::json!({ "title": self.title, "rows": rows }).to_string()
    }

    /// The table with its title.
    pub fn text(&self, form: Form) -> String {
        let head: Vec<String> = self.head.iter().map(ToString::to_string).collect();
        let width = |column: usize| {
            let cells = self.rows.iter().chain([&head]);
            let lengths = cells.filter_map(|row| row.get(column));
            lengths.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..head.len()).map(width).collect();
        let line = |cells: &[String]| {
            let mut text = String::new();
            for (column, (cell, width)) in cells.iter().zip(&widths).enumerate() {
                let before = match (form, column) {
                    (Form::Markdown, 0) => "| ",
                    (Form::Markdown, _) => " | ",
                    (_, 0) => "",
                    (_, _) => "  ",
                };
                text.push_str(before);
                let colour = match (form, cell.as_str()) {
                    (Form::Coloured, "yes") => "\x1b[32m",
                    (Form::Coloured, "NO") => "\x1b[1;31m",
                    _ => "",
                };
                let end = if colour.is_empty() { "" } else { "\x1b[0m" };
                // Writing to a String cannot fail.
                let _ = match column {
                    0 => write!(text, "{colour}{cell:<width$}{end}"),
                    _ => write!(text, "{colour}{cell:>width$}{end}"),
                };
            }
            text.push_str(if form == Form::Markdown { " |\n" } else { "\n" });
            text
        };
        let mut text = match form {
            Form::Markdown => format!("**{}**\n\n", self.title),
            Form::Plain | Form::Coloured => format!("{}\n\n", self.title),
        };
        text.push_str(&line(&head));
        if form == Form::Markdown {
            let rule = (0..head.len()).map(|column| if column == 0 { "|---" } else { "|--:" });
            text.extend(rule);
            text.push_str("|\n");
        }
        for row in &self.rows {
            text.push_str(&line(row));
        }
        text
    }
}

/// A cell with nothing to say.
pub fn dash() -> String {
    "-".to_owned()
}

/// A duration with three digits and a unit; nothing where there was nothing to time.
pub fn time(seconds: Option<f64>) -> String {
    let Some(seconds) = seconds.filter(|seconds| *seconds > 0.0) else {
        return dash();
    };
    let (value, unit) = match seconds {
        s if s >= 1.0 => (s, "s"),
        s if s >= 1e-3 => (s * 1e3, "ms"),
        s => (s * 1e6, "µs"),
    };
    let digits = match value {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$} {unit}")
}

/// A whole number with its thousands apart.
pub fn count(number: Option<f64>) -> String {
    let Some(number) = number else {
        return dash();
    };
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A size of memory.
pub fn mebibytes(bytes: f64) -> String {
    format!("{:.1} MiB", bytes / f64::from(1 << 20))
}
