//! Sets of ranges: how long the kernel takes to fill plain intervals, as nftlet writes them for
//! source ranges and ports, and a concatenation with an interval, which would need neither a set
//! nor a chain for each list.
//!
//! Both are written in turns in fresh network namespaces; the median counts.

use std::time::Instant;

use crate::Context;
use crate::report::Value::{Ratio, Seconds};
use crate::report::{Report, Table};
use crate::samples::Samples;
use crate::subject::{Ranges, Writer};
use nftlet_lab::cluster::grouped;
use nftlet_lab::netns::Namespace;

const CASES: [(Ranges, &str, u32); 3] = [
    (Ranges::Sources, "source ranges", 10_000),
    (Ranges::Sources, "source ranges", 40_000),
    (Ranges::Ports, "port ranges", 30_000),
];

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// How often each set is filled.
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Fill the plain sets only: the others take a minute a round.
    #[arg(long)]
    plain: bool,
}

impl Arguments {
    pub fn run(&self, context: &Context) -> Report {
        let mut report = Report::new("ranges", [("rounds", &self.rounds)]);
        let mut table = Table::new("Sets of ranges, filled", "ranges");
        for (ranges, words, count) in CASES {
            let of = format!("{} {words}", grouped(count.into()));
            context.progress(&of);
            let (mut plain, mut concatenated) = (Samples::default(), Samples::default());
            for _ in 0..self.rounds {
                plain.push(fill(ranges, count, false));
                if !self.plain {
                    concatenated.push(fill(ranges, count, true));
                }
            }
            let row = table.row("plain set", of, "time", Seconds(plain.median()));
            if !self.plain {
                row.and("concatenated", Seconds(concatenated.median()));
                row.and("over plain", Ratio(concatenated.median() / plain.median()));
            }
        }
        report.tables.push(table);
        report
    }
}

/// Fills a set in a fresh namespace as one transaction; returns the seconds.
fn fill(ranges: Ranges, count: u32, concatenated: bool) -> f64 {
    let transaction = ranges.fill(count, concatenated);
    Namespace::new("node").run(|| {
        let mut writer = Writer::open();
        let started = Instant::now();
        writer.write(&transaction);
        started.elapsed().as_secs_f64()
    })
}
