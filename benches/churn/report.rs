//! The measurements as tables.

use crate::budgets::Outcome;
use crate::results::{Budget, Report, Unit, Window};
use crate::table::{Form, Table, count, dash, mebibytes, time};

/// The windows, and what was promised.
pub fn render(report: &Report, form: Form) -> String {
    let windows = Table {
        title: "Endpoints change, clients connect",
        head: &[
            "time",
            "changes",
            "in force",
            "backlog",
            "most",
            "a change",
            "p99",
            "memory",
            "processor",
            "connections",
            "one",
            "p99",
            "longest",
            "failed",
        ],
        rows: report.measured.windows.iter().map(window).collect(),
    };
    let budgets = Table {
        title: "Budgets",
        head: &["what", "second quarter", "measured", "budget", "met"],
        rows: report.budgets.iter().map(budget).collect(),
    };
    let end = &report.measured.end;
    let audits: Vec<String> = end
        .audits
        .iter()
        .map(|(result, count)| format!("{count} {result}"))
        .collect();
    format!(
        "{}\n{}\nPeak of memory {}; a burst of changes was sent {} late at most; {} requests \
         for connections were repeated; audits: {}.\n",
        windows.text(form),
        budgets.text(form),
        mebibytes(end.peak),
        time(Some(end.late)),
        end.repeated,
        if audits.is_empty() {
            "none".to_owned()
        } else {
            audits.join(", ")
        },
    )
}

/// Says on standard error what went wrong, one by one.
pub fn tell_failures(report: &Report) {
    let end = &report.measured.end;
    for line in &end.told {
        eprintln!("failed: {line}");
    }
    if let Some(first) = &end.first_difference {
        eprintln!("the kernel differs, first by: {first}");
    }
}

fn window(window: &Window) -> Vec<String> {
    let number = |number: u64| count(Some(number as f64));
    vec![
        format!("{:.0}-{:.0} s", window.from, window.to),
        number(window.changes),
        number(window.programmed),
        format!("{:.1}", window.backlog),
        count(Some(window.most_backlog)),
        time(Some(window.latency)),
        time(Some(window.latency_p99)),
        mebibytes(window.resident),
        time(Some(window.processor)),
        number(window.connections),
        time(Some(window.connect)),
        time(Some(window.connect_p99)),
        time(Some(window.longest_connect)),
        number(window.failed),
    ]
}

/// What became of the budgets. They are for a cluster, rates and a time.
pub fn outcomes(report: &Report) -> Vec<Outcome> {
    let run = format!(
        "{} changes and {} connections a second at {} for {} s",
        report.rate, report.connections, report.size, report.seconds
    );
    let outcome = |budget: &Budget| Outcome {
        what: format!("{}, {run}", budget.what),
        measured: with_unit(budget, budget.measured),
        budget: format!("at most {}", with_unit(budget, budget.most)),
        met: budget.met(),
    };
    report.budgets.iter().map(outcome).collect()
}

fn budget(budget: &Budget) -> Vec<String> {
    let with_unit = |value: f64| with_unit(budget, value);
    vec![
        budget.what.to_owned(),
        budget.before.map_or_else(dash, with_unit),
        with_unit(budget.measured),
        with_unit(budget.most),
        if budget.met() { "yes" } else { "NO" }.to_owned(),
    ]
}

fn with_unit(budget: &Budget, value: f64) -> String {
    match budget.unit {
        Unit::Seconds => time(Some(value)),
        Unit::Bytes => mebibytes(value),
        Unit::Number if budget.before.is_some() => format!("{value:.1}"),
        Unit::Number => count(Some(value)),
    }
}
