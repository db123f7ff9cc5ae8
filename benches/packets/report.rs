//! The numbers as tables.

use crate::lanes::Rules;
use crate::results::{Budget, Comparison, Quantity, Results, percentile};
use crate::table::{Form, Table, count, dash, time};

/// All tables.
pub fn render(results: &Results, comparisons: &[Comparison], form: Form) -> String {
    [medians(results), ratios(comparisons)]
        .map(|table| table.text(form))
        .join("\n")
}

fn medians(results: &Results) -> Table {
    let mut rows = Vec::new();
    for quantity in Quantity::ALL {
        let median = |rules: Rules| {
            let series = results.of(quantity, rules);
            value(
                quantity,
                series.and_then(|series| percentile(&series.rounds, 50)),
            )
        };
        for size in results.sizes.iter().copied() {
            let series = results.of(quantity, Rules::Nftlet(size));
            let p99 = series
                .filter(|_| quantity != Quantity::Throughput)
                .and_then(|series| percentile(&series.samples, 99));
            rows.push(vec![
                quantity.words().to_owned(),
                services(size),
                median(Rules::Nftlet(size)),
                value(quantity, p99),
                if results.too_slow.contains(&size) {
                    "too slow".to_owned()
                } else if results.of(quantity, Rules::KubeProxy(size)).is_none() {
                    "not tried".to_owned()
                } else {
                    median(Rules::KubeProxy(size))
                },
                median(Rules::OneRule),
                median(Rules::Tracked),
                median(Rules::None),
            ]);
        }
        let smallest = results.sizes.first().copied().unwrap_or_default();
        for lane in [Rules::Affinity(smallest), Rules::Policies(smallest)] {
            let series = results.of(quantity, lane);
            let p99 = series
                .filter(|_| quantity != Quantity::Throughput)
                .and_then(|series| percentile(&series.samples, 99));
            let words = match lane {
                Rules::Policies(_) => "with policies",
                _ => "with affinity",
            };
            let mut row = vec![
                format!("the same, {words}"),
                services(smallest),
                median(lane),
                value(quantity, p99),
            ];
            row.extend([(); 4].map(|()| dash()));
            rows.push(row);
        }
    }
    Table {
        title: "Packets: medians of all rounds",
        head: &[
            "what",
            "services",
            "nftlet",
            "p99",
            "kube-proxy's shape",
            "one rule",
            "tracked",
            "no rules",
        ],
        rows,
    }
}

fn ratios(comparisons: &[Comparison]) -> Table {
    let row = |comparison: &Comparison| {
        vec![
            comparison.quantity.words().to_owned(),
            comparison.lane.name(),
            comparison.with.name(),
            ratio(comparison.ratio),
            comparison.between.map(ratio).join(" to "),
            match comparison.budget {
                None => dash(),
                Some(Budget::AtMost(bound)) => format!("<= {bound:.2}"),
                Some(Budget::AtLeast(bound)) => format!(">= {bound:.2}"),
            },
            match comparison.met() {
                None => dash(),
                Some(true) => "yes".to_owned(),
                Some(false) => "NO".to_owned(),
            },
        ]
    };
    Table {
        title: "Ratios, round by round: their median, and where it is with a probability of 95 %",
        head: &["what", "lane", "over", "ratio", "95 %", "budget", "met"],
        rows: comparisons.iter().map(row).collect(),
    }
}

fn services(size: usize) -> String {
    count(Some(size as f64))
}

fn ratio(ratio: f64) -> String {
    format!("{ratio:.3}")
}

fn value(quantity: Quantity, value: Option<f64>) -> String {
    match quantity {
        Quantity::Throughput => value.map_or_else(dash, |bytes| {
            format!("{:.2} GiB/s", bytes / f64::from(1 << 30))
        }),
        _ => time(value),
    }
}
