//! The measurements as a table.

use crate::cluster::Size;
use crate::results::{KubeProxy, Report, Unit, What};
use crate::table::{Form, Table, count, dash, mebibytes, time};

/// Every quantity with its budget.
pub fn render(report: &Report, form: Form) -> String {
    let mut rows = Vec::new();
    for measured in &report.sizes {
        for value in &measured.values {
            let (words, unit) = value.what.words();
            let other = match (value.what, measured.kube_proxy) {
                (What::FirstProgram, KubeProxy::Loaded { first, .. }) => time(Some(first)),
                (What::ReplacedEndToEnd, KubeProxy::Loaded { change, .. }) => time(Some(change)),
                (What::FirstProgram, KubeProxy::TooSlow(limit)) => format!("> {limit:.0} s"),
                (What::FirstProgram, KubeProxy::NotTried) => "not tried".to_owned(),
                _ => dash(),
            };
            rows.push(vec![
                words.to_owned(),
                cluster(measured.size),
                with_unit(value.value, unit),
                value
                    .budget
                    .map_or_else(dash, |budget| with_unit(budget, unit)),
                match value.budget {
                    Some(budget) if budget > 0.0 => format!("{:.2}", value.value / budget),
                    _ => dash(),
                },
                match value.met() {
                    None => dash(),
                    Some(true) => "yes".to_owned(),
                    Some(false) => "NO".to_owned(),
                },
                other,
            ]);
        }
    }
    let table = Table {
        title: "The whole process against its budgets",
        head: &[
            "what",
            "services",
            "measured",
            "budget",
            "of it",
            "met",
            "kube-proxy's shape",
        ],
        rows,
    };
    table.text(form)
}

/// The size in the tables.
pub fn cluster(size: Size) -> String {
    format!("{} x {}", count(Some(size.services as f64)), size.endpoints)
}

/// A value in the tables.
pub fn with_unit(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Seconds => time(Some(value)),
        Unit::Bytes if value < f64::from(1 << 20) => format!("{:.1} KiB", value / 1024.0),
        Unit::Bytes => mebibytes(value),
        Unit::Number => count(Some(value)),
        Unit::Times => format!("{value:.2} x"),
    }
}
