//! The numbers as tables.

use std::fmt::Write;

use crate::measure::{Budget, Measured, Row, percentile};

/// Fewer samples have no meaningful 99th percentile.
const ENOUGH_FOR_P99: usize = 100;

/// A table of texts; the first columns are words, the others numbers.
struct Table {
    title: &'static str,
    head: &'static [&'static str],
    rows: Vec<Vec<String>>,
}

/// The form tables are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Columns aligned with spaces.
    Plain,
    /// Markdown.
    Markdown,
}

/// All tables.
pub fn render(measured: &[Measured], form: Form) -> String {
    let tables = [comparison(measured), parts(measured), memory(measured)];
    let texts: Vec<String> = tables.iter().map(|table| table.text(form)).collect();
    texts.join("\n")
}

fn comparison(measured: &[Measured]) -> Table {
    let mut rows = Vec::new();
    for size in measured {
        for row in &size.rows {
            let p99 = (row.nftlet.len() >= ENOUGH_FOR_P99)
                .then(|| percentile(row.nftlet.iter().map(|cost| cost.total), 99));
            rows.push(vec![
                row.what.clone(),
                cluster(size),
                time(row.nftlet_median()),
                time(p99.flatten()),
                time(row.baseline_median()),
                time(row.baseline_kernel()),
                ratio(row),
                row.budget.map_or_else(dash, budget),
                match row.met() {
                    None => dash(),
                    Some(true) => "yes".to_owned(),
                    Some(false) => "NO".to_owned(),
                },
            ]);
        }
    }
    Table {
        title: "nftlet and kube-proxy's shape of the same services, loaded with nft",
        head: &[
            "what",
            "services",
            "nftlet",
            "p99",
            "kube-proxy's shape",
            "of it kernel",
            "ratio",
            "budget",
            "met",
        ],
        rows,
    }
}

/// Where nftlet's time goes and how much it sends: the median of each part by itself.
fn parts(measured: &[Measured]) -> Table {
    let mut rows = Vec::new();
    for size in measured {
        for row in &size.rows {
            let of = |part: fn(&crate::agent::Cost) -> f64| {
                percentile(row.nftlet_split.iter().map(part), 50)
            };
            rows.push(vec![
                row.what.clone(),
                cluster(size),
                time(of(|cost| cost.compile())),
                time(of(|cost| cost.read)),
                time(of(|cost| cost.encode)),
                time(of(|cost| cost.kernel())),
                count(of(|cost| cost.transactions as f64)),
                count(of(|cost| cost.messages as f64)),
                count(of(|cost| cost.elements as f64)),
                count(of(|cost| cost.bytes as f64)),
            ]);
        }
    }
    Table {
        title: "Parts of nftlet's time, and what it sends",
        head: &[
            "what",
            "services",
            "compile, compare",
            "read back",
            "encode",
            "kernel",
            "transactions",
            "messages",
            "elements",
            "bytes",
        ],
        rows,
    }
}

fn memory(measured: &[Measured]) -> Table {
    let mebibytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    Table {
        title: "Memory of a process that holds the objects and has programmed them once",
        head: &["what", "services", "peak", "kept"],
        rows: measured
            .iter()
            .map(|size| {
                vec![
                    "first program".to_owned(),
                    cluster(size),
                    mebibytes(size.memory.peak),
                    mebibytes(size.memory.kept),
                ]
            })
            .collect(),
    }
}

impl Table {
    fn text(&self, form: Form) -> String {
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
                    (Form::Plain, 0) => "",
                    (Form::Plain, _) => "  ",
                };
                text.push_str(before);
                // Writing to a String cannot fail.
                let _ = match column {
                    0 => write!(text, "{cell:<width$}"),
                    _ => write!(text, "{cell:>width$}"),
                };
            }
            text.push_str(if form == Form::Markdown { " |\n" } else { "\n" });
            text
        };
        let mut text = match form {
            Form::Markdown => format!("**{}**\n\n", self.title),
            Form::Plain => format!("{}\n\n", self.title),
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

fn dash() -> String {
    "-".to_owned()
}

fn cluster(size: &Measured) -> String {
    format!("{} x {}", count(Some(size.services as f64)), size.endpoints)
}

fn budget(budget: Budget) -> String {
    match budget {
        Budget::Seconds(bound) => format!("< {}", time(Some(bound))),
        Budget::PartOfBaseline(part) => format!("< 1/{:.0}", 1.0 / part),
    }
}

/// nftlet's part of the time that the other side takes.
fn ratio(row: &Row) -> String {
    let (Some(nftlet), Some(baseline)) = (row.nftlet_median(), row.baseline_median()) else {
        return dash();
    };
    match baseline / nftlet {
        times if times >= 10.0 => format!("1/{times:.0}"),
        times => format!("1/{times:.1}"),
    }
}

/// A duration with three digits and a unit; nothing where there was nothing to time.
fn time(seconds: Option<f64>) -> String {
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
fn count(number: Option<f64>) -> String {
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
