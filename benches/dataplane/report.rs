//! The numbers as tables.

use crate::budgets::Outcome;
use crate::measure::{Budget, Measured, Row, percentile};
use crate::table::{Form, Table, count, dash, mebibytes, time};

/// Fewer samples have no meaningful 99th percentile.
const ENOUGH_FOR_P99: usize = 100;

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
    Table {
        title: "Memory of a process that holds the objects and has programmed them once",
        head: &["what", "services", "peak", "kept"],
        rows: measured
            .iter()
            .map(|size| {
                vec![
                    "first program".to_owned(),
                    cluster(size),
                    mebibytes(size.memory.peak as f64),
                    mebibytes(size.memory.kept as f64),
                ]
            })
            .collect(),
    }
}

/// What became of the budgets.
pub fn outcomes(measured: &[Measured]) -> Vec<Outcome> {
    let rows = measured.iter().flat_map(|size| {
        let rows = size.rows.iter();
        rows.map(move |row| (size, row))
    });
    let outcome = |(size, row): (&Measured, &Row)| {
        let promised = row.budget?;
        Some(Outcome {
            what: format!("{}, {}", row.what, cluster(size)),
            measured: match promised {
                Budget::Seconds(_) => time(row.nftlet_median()),
                Budget::PartOfBaseline(_) => ratio(row),
            },
            budget: budget(promised),
            met: row.met()?,
        })
    };
    rows.filter_map(outcome).collect()
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
