//! What was measured, and what was promised.

use serde::{Deserialize, Serialize};

use crate::cluster::Size;
use crate::samples::Samples;

const MEBIBYTE: f64 = (1 << 20) as f64;
/// By how much memory may grow from the second quarter to the last: a part and a fixed amount.
const MEMORY: (f64, f64) = (1.05, MEBIBYTE);
/// The same for the time a change takes.
const LATENCY: f64 = 1.25;
/// The backlog may be larger by the changes of this time, one burst: it is counted in bursts.
const BACKLOG: f64 = 0.01;
/// The time after the last change until all are in force.
const SETTLED: f64 = 0.1;
/// The most memory that may ever be resident, an audit included, and for which cluster.
const PEAK: (Size, f64) = (
    Size {
        services: 10_000,
        endpoints: 10,
    },
    90.0 * MEBIBYTE,
);
/// The part of the changes and connections that must have been made, or nothing was measured.
const KEPT: f64 = 0.95;

/// What was seen in a part of the time. Times are in seconds, memory is in bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Window {
    /// Since the changes began.
    pub from: f64,
    /// The same.
    pub to: f64,
    /// Changes that were sent.
    pub changes: u64,
    /// Changes that came into force, by nftlet's count.
    pub programmed: u64,
    /// Changes that were sent and not in force, on average.
    pub backlog: f64,
    /// The most that were seen.
    pub most_backlog: f64,
    /// From the bytes read to the kernel's answer, on average.
    pub latency: f64,
    /// The same, 99th percentile, estimated from buckets.
    pub latency_p99: f64,
    /// Resident memory, on average.
    pub resident: f64,
    /// Processor time of nftlet.
    pub processor: f64,
    /// Connections.
    pub connections: u64,
    /// From the beginning to the end of a connection that was answered, median.
    pub connect: f64,
    /// The same, 99th percentile.
    pub connect_p99: f64,
    /// The same, the longest.
    pub longest_connect: f64,
    /// Connections that failed.
    pub failed: u64,
    /// Connections that took a second or more.
    pub slow: u64,
}

impl Window {
    /// The window in a line, for whoever waits.
    pub fn line(&self) -> String {
        format!(
            "{:.0} s: {} changes, backlog {:.1}, {:.0} µs each, {:.1} MiB; {} connections, p99 {:.0} µs, {} failed",
            self.to,
            self.changes,
            self.backlog,
            self.latency * 1e6,
            self.resident / MEBIBYTE,
            self.connections,
            self.connect_p99 * 1e6,
            self.failed,
        )
    }
}

/// What was seen of the whole time, and when it was over.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct End {
    /// From the last change until all were in force.
    pub settled: f64,
    /// By how much a burst of changes was sent late at most.
    pub late: f64,
    /// Operations that would make the kernel hold what the objects ask for.
    pub difference: u64,
    /// The first of them.
    pub first_difference: Option<String>,
    /// Transactions that failed and changes of others that were undone.
    pub failures: u64,
    /// Lists that were read after the first rules were in force.
    pub lists_again: u64,
    /// Requests for connections that the clients' kernel repeated.
    pub repeated: u64,
    /// Connections that failed before and after the changes.
    pub failed_in_calm: u64,
    /// Connections that took a second or more then.
    #[serde(default)]
    pub slow_in_calm: u64,
    /// Connections then.
    pub connections_in_calm: u64,
    /// The most memory that was ever resident.
    pub peak: f64,
    /// nftlet's audits of its rules, by their results.
    pub audits: Vec<(String, u64)>,
    /// Failed connections in words.
    pub told: Vec<String>,
}

/// Everything that was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// The time in equal parts.
    pub windows: Vec<Window>,
    /// The rest.
    pub end: End,
}

/// The unit of a quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Time.
    Seconds,
    /// Memory.
    Bytes,
    /// A count, or a mean of counts.
    Number,
}

/// A quantity with the most it may be.
#[derive(Clone, Debug, Serialize)]
pub struct Budget {
    /// The quantity in words.
    pub what: &'static str,
    /// Its unit.
    pub unit: Unit,
    /// What it was compared with: the second quarter of the time.
    pub before: Option<f64>,
    /// Its value, in the last quarter if it is compared.
    pub measured: f64,
    /// The most it may be.
    pub most: f64,
}

impl Budget {
    /// Whether it was kept.
    pub fn met(&self) -> bool {
        self.measured <= self.most
    }
}

impl Measured {
    /// A sum over all windows.
    pub fn sum(&self, of: impl Fn(&Window) -> u64) -> u64 {
        self.windows.iter().map(of).sum()
    }

    /// The windows of the second and of the last quarter of the time.
    fn quarters(&self) -> (&[Window], &[Window]) {
        let quarter = self.windows.len() / 4;
        let last = self.windows.len() - quarter;
        (&self.windows[quarter..2 * quarter], &self.windows[last..])
    }

    /// The mean of a quantity in these quarters.
    fn means(&self, of: impl Fn(&Window) -> f64) -> (f64, f64) {
        self.each(&of, Samples::mean)
    }

    /// The median of their windows: other work on the machine holds up a window now and then, and
    /// what grows shows in all of them.
    fn medians(&self, of: impl Fn(&Window) -> f64) -> (f64, f64) {
        self.each(&of, Samples::median)
    }

    fn each(&self, of: &impl Fn(&Window) -> f64, together: impl Fn(&Samples) -> f64) -> (f64, f64) {
        let samples = |windows: &[Window]| {
            let mut samples = Samples::default();
            windows.iter().for_each(|window| samples.push(of(window)));
            together(&samples)
        };
        let (second, last) = self.quarters();
        (samples(second), samples(last))
    }

    /// What was promised, with what was measured.
    fn budgets(&self, rate: u32, connections: u32, size: Size) -> Vec<Budget> {
        let end = &self.end;
        let length = self.windows.last().map_or(0.0, |window| window.to);
        let number = |what, measured: u64, most: f64| Budget {
            what,
            unit: Unit::Number,
            before: None,
            measured: measured as f64,
            most,
        };
        let missing = |wanted: u32, made: u64| {
            let wanted = (f64::from(wanted) * length) as u64;
            wanted.saturating_sub(made)
        };
        let compared = |what, unit, (before, measured): (f64, f64), most: f64| Budget {
            what,
            unit,
            before: Some(before),
            measured,
            most,
        };
        let allowed = |wanted: u32| f64::from(wanted) * length * (1.0 - KEPT);
        let resident = self.means(|window| window.resident);
        let backlog = self.medians(|window| window.backlog);
        let latency = self.medians(|window| window.latency);
        let audited = size == PEAK.0 && end.audits.iter().any(|(_, count)| *count > 0);
        let peak = audited.then_some(Budget {
            what: "memory, peak, an audit included",
            unit: Unit::Bytes,
            before: None,
            measured: end.peak,
            most: PEAK.1,
        });
        let mut budgets = vec![
            number(
                "failed connections",
                self.sum(|it| it.failed) + end.failed_in_calm,
                0.0,
            ),
            number(
                "connections of a second or more",
                self.sum(|it| it.slow) + end.slow_in_calm,
                0.0,
            ),
            compared(
                "memory",
                Unit::Bytes,
                resident,
                resident.0 * MEMORY.0 + MEMORY.1,
            ),
            compared(
                "backlog, changes",
                Unit::Number,
                backlog,
                backlog.0 + f64::from(rate) * BACKLOG,
            ),
            compared(
                "a change, from the bytes read",
                Unit::Seconds,
                latency,
                latency.0 * LATENCY,
            ),
            Budget {
                what: "from the last change to all in force",
                unit: Unit::Seconds,
                before: None,
                measured: end.settled,
                most: SETTLED,
            },
            number("operations that the kernel differs by", end.difference, 0.0),
            number("failed transactions, healed changes", end.failures, 0.0),
            number("lists read again", end.lists_again, 0.0),
            number(
                "changes not made in time",
                missing(rate, self.sum(|it| it.changes)),
                allowed(rate),
            ),
            number(
                "connections not made in time",
                missing(connections, self.sum(|it| it.connections)),
                allowed(connections),
            ),
        ];
        budgets.extend(peak);
        budgets
    }
}

/// Everything that was measured, and where.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The kernel's release.
    pub kernel: String,
    /// Its processors.
    pub processors: usize,
    /// How long endpoints changed.
    pub seconds: u32,
    /// Changes a second.
    pub rate: u32,
    /// Connections a second.
    pub connections: u32,
    /// The size of the cluster.
    pub size: Size,
    /// What was promised; it follows from the rest.
    #[serde(skip_deserializing)]
    pub budgets: Vec<Budget>,
    /// What was measured.
    pub measured: Measured,
}

impl Report {
    /// Sets what was promised beside what was measured.
    pub fn judge(&mut self) {
        self.budgets = self
            .measured
            .budgets(self.rate, self.connections, self.size);
    }
}
