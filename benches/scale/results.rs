//! What was measured, and what was promised.

use serde::{Deserialize, Serialize};

use crate::budgets::Outcome;
use crate::cluster::Size;
use crate::report::{cluster, with_unit};

/// The size for which most budgets were set, and the larger one.
const BUDGETED: Size = Size {
    services: 10_000,
    endpoints: 10,
};
const LARGE: Size = Size {
    services: 50_000,
    endpoints: 20,
};
/// The growth that has a budget: between these sizes.
pub const GROWTH: [Size; 2] = [
    BUDGETED,
    Size {
        services: 30_000,
        endpoints: 10,
    },
];
/// The policies and pods for which budgets were set.
const BUDGETED_POLICIES: (usize, usize) = (1_000, 100_000);
const MEBIBYTE: f64 = (1 << 20) as f64;

/// A quantity that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// From the end of the lists to the kernel's answer.
    FirstProgram,
    /// Of that the transactions: encoded, sent, answered.
    FirstTransactions,
    /// That time, compared with the smaller size of [`GROWTH`].
    Growth,
    /// From the start of the process to rules in force, lists streamed.
    Start,
    /// Processor time of the process until then.
    StartProcessor,
    /// As [`What::Start`], lists in pages.
    StartPaged,
    /// One endpoint replaced: from the bytes read to the kernel's answer.
    Replaced,
    /// Of that the 99th percentile.
    ReplacedP99,
    /// From the server's sending to the news of the committed transaction.
    ReplacedEndToEnd,
    /// Of that the 99th percentile.
    ReplacedEndToEndP99,
    /// One endpoint more or less, as [`What::Replaced`].
    Count,
    /// From the server's sending to the news of the committed transaction.
    CountEndToEnd,
    /// An endpoint replaced in many services at once, end to end.
    AtOnce,
    /// Resident memory after settling.
    Resident,
    /// The most resident memory until then.
    Peak,
    /// The most resident memory of a start with lists in pages.
    PeakPaged,
    /// Resident memory after all changes.
    ResidentInTheEnd,
    /// From the start of the process, with the rules of the one before in place, until it has
    /// compared them.
    Restart,
    /// Of that the comparison, from the end of the lists on.
    RestartComparison,
    /// The most resident memory of that start.
    PeakRestart,
    /// Processor time while nothing happens, in ticks.
    Idle,
    /// Processor time for a thousand single changes.
    ProcessorOfChanges,
    /// Bytes that the server sent until the rules were in place.
    StartBytes,
    /// Requests until then.
    StartRequests,
    /// Lists that were read more than once until then.
    ListedTwice,
    /// Bytes that the server sent for one change.
    ChangeBytes,
    /// Requests during a thousand changes.
    ChangeRequests,
    /// Lists that were read after a cut connection.
    ListedAfterCut,
    /// Resident memory for policies and pods, beyond that without.
    PolicyMemory,
    /// One pod of another node relabelled: from the bytes read to the kernel's answer.
    PodChange,
    /// Of that the 99th percentile.
    PodChangeP99,
    /// From the server's sending to the news of the committed transaction.
    PodChangeEndToEnd,
}

/// The unit of a quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Seconds,
    Bytes,
    Number,
    Times,
}

impl What {
    /// The quantity in words, and its unit.
    pub fn words(self) -> (&'static str, Unit) {
        use Unit::{Bytes, Number, Seconds, Times};
        match self {
            Self::FirstProgram => ("first program", Seconds),
            Self::FirstTransactions => ("first program, of it transactions", Seconds),
            Self::Growth => ("first program, against 10,000 services", Times),
            Self::Start => ("process start to rules in place", Seconds),
            Self::StartProcessor => ("process start, processor time", Seconds),
            Self::StartPaged => ("process start, lists in pages", Seconds),
            Self::Replaced => ("one endpoint replaced, from the bytes read", Seconds),
            Self::ReplacedP99 => ("one endpoint replaced, from the bytes read, p99", Seconds),
            Self::ReplacedEndToEnd => ("one endpoint replaced, from the server", Seconds),
            Self::ReplacedEndToEndP99 => ("one endpoint replaced, from the server, p99", Seconds),
            Self::Count => ("one endpoint more or less, from the bytes read", Seconds),
            Self::CountEndToEnd => ("one endpoint more or less, from the server", Seconds),
            Self::AtOnce => ("1,000 changes at once, from the server", Seconds),
            Self::Resident => ("memory after settling", Bytes),
            Self::Peak => ("memory, peak", Bytes),
            Self::PeakPaged => ("memory, peak, lists in pages", Bytes),
            Self::ResidentInTheEnd => ("memory after all changes", Bytes),
            Self::Restart => ("process start, rules in place already", Seconds),
            Self::RestartComparison => ("rules in place already, of it the comparison", Seconds),
            Self::PeakRestart => ("memory, peak, rules in place already", Bytes),
            Self::Idle => ("processor ticks in 10 s without change", Number),
            Self::ProcessorOfChanges => ("processor time of 1,000 changes", Seconds),
            Self::StartBytes => ("sent by the server, start", Bytes),
            Self::StartRequests => ("requests, start", Number),
            Self::ListedTwice => ("lists read again, start", Number),
            Self::ChangeBytes => ("sent by the server, one change", Bytes),
            Self::ChangeRequests => ("requests, 1,000 changes", Number),
            Self::ListedAfterCut => ("lists read again, connection cut", Number),
            Self::PolicyMemory => ("memory of policies and pods", Bytes),
            Self::PodChange => ("one remote pod relabelled, from the bytes read", Seconds),
            Self::PodChangeP99 => (
                "one remote pod relabelled, from the bytes read, p99",
                Seconds,
            ),
            Self::PodChangeEndToEnd => ("one remote pod relabelled, from the server", Seconds),
        }
    }

    /// The most it may be at a size.
    pub fn budget(self, size: Size) -> Option<f64> {
        let budgeted = match self {
            Self::FirstProgram => 0.6,
            Self::Start => 3.0,
            Self::Replaced => 0.000_5,
            Self::ReplacedP99 => 0.002,
            Self::Count => 0.003,
            Self::AtOnce => 0.06,
            Self::Resident => 60.0 * MEBIBYTE,
            Self::Peak | Self::PeakRestart => 90.0 * MEBIBYTE,
            Self::ProcessorOfChanges => 1.0,
            // These hold at every size.
            Self::Idle | Self::ListedTwice | Self::ListedAfterCut | Self::ChangeRequests => {
                return Some(0.0);
            }
            Self::Growth => return (size == GROWTH[1]).then_some(3.3),
            _ => return None,
        };
        let large = match self {
            Self::FirstProgram => Some(8.0),
            Self::Replaced => Some(0.001),
            Self::Resident => Some(600.0 * MEBIBYTE),
            _ => None,
        };
        match size {
            BUDGETED => Some(budgeted),
            LARGE => large,
            _ => None,
        }
    }

    /// The most it may be with so many policies and pods.
    pub fn policy_budget(self, policies: usize, pods: usize) -> Option<f64> {
        let budgeted = (policies, pods) == BUDGETED_POLICIES;
        match self {
            Self::PolicyMemory => budgeted.then_some(250.0 * MEBIBYTE),
            Self::PodChange => budgeted.then_some(0.001),
            _ => None,
        }
    }
}

/// A quantity with its value.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Value {
    /// What was measured.
    pub what: What,
    /// Seconds, bytes or a number; of several measurements the median, unless it is a percentile.
    pub value: f64,
    /// The most it may be.
    pub budget: Option<f64>,
}

impl Value {
    /// Whether the budget was kept; `None` without one.
    pub fn met(&self) -> Option<bool> {
        self.budget.map(|budget| self.value <= budget)
    }
}

/// The same services in kube-proxy's shape, loaded with nft.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KubeProxy {
    /// It was not asked for.
    NotTried,
    /// It took longer than so many seconds.
    TooSlow(f64),
    /// It was loaded; times in seconds.
    Loaded {
        /// All services.
        first: f64,
        /// One service with other endpoints.
        change: f64,
    },
}

impl KubeProxy {
    /// The seconds for all services, and for a change of one.
    pub fn loaded(self) -> Option<(f64, f64)> {
        match self {
            KubeProxy::Loaded { first, change } => Some((first, change)),
            KubeProxy::NotTried | KubeProxy::TooSlow(_) => None,
        }
    }
}

/// All measurements of one size.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// The size.
    pub size: Size,
    /// Policies and pods, where they were measured.
    pub policies: Option<(usize, usize)>,
    /// What was measured.
    pub values: Vec<Value>,
    /// What it was compared with.
    pub kube_proxy: KubeProxy,
}

impl Measured {
    /// Notes a value with its budget.
    pub fn note(&mut self, what: What, value: f64) {
        let with_policies = || {
            let (policies, pods) = self.policies?;
            what.policy_budget(policies, pods)
        };
        let budget = what.budget(self.size).or_else(with_policies);
        self.values.push(Value {
            what,
            value,
            budget,
        });
    }

    /// A value.
    pub fn get(&self, what: What) -> Option<f64> {
        let found = self.values.iter().find(|value| value.what == what);
        found.map(|found| found.value)
    }
}

/// Everything that was measured, and where.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The kernel's release.
    pub kernel: String,
    /// Its processors.
    pub processors: usize,
    /// What was measured, smallest first.
    pub sizes: Vec<Measured>,
}

impl Report {
    /// Compares the sizes whose growth has a budget, where both were measured.
    pub fn compare(&mut self) {
        let first = |size: Size| {
            let measured = self.sizes.iter().find(|measured| measured.size == size)?;
            measured.get(What::FirstProgram)
        };
        let (Some(small), Some(large)) = (first(GROWTH[0]), first(GROWTH[1])) else {
            return;
        };
        let of_large = self.sizes.iter_mut().find(|it| it.size == GROWTH[1]);
        if let Some(measured) = of_large {
            measured.note(What::Growth, large / small);
        }
    }

    /// What became of the budgets.
    pub fn outcomes(&self) -> Vec<Outcome> {
        let values = self.sizes.iter().flat_map(|measured| {
            let values = measured.values.iter();
            values.map(|value| (measured.size, value))
        });
        let outcome = |(size, value): (Size, &Value)| {
            let (words, unit) = value.what.words();
            Some(Outcome {
                what: format!("{words}, {}", cluster(size)),
                measured: with_unit(value.value, unit),
                budget: format!("at most {}", with_unit(value.budget?, unit)),
                met: value.met()?,
            })
        };
        values.filter_map(outcome).collect()
    }
}
