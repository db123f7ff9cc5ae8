//! What was measured, how the lanes compare, and what was promised.

use serde::Serialize;

use crate::budgets::Outcome;
use crate::lanes::Rules;
use crate::table::count;

/// How much slower a larger size may be than the smallest.
const GROWTH: f64 = 1.10;
/// How much slower than kube-proxy's shape nftlet may seem. It means "not slower": lanes with the
/// same rules differ by up to 2 % from each other, for reasons that no median takes out, such as
/// where in memory their tables are.
const NOT_SLOWER: f64 = 1.03;
/// What of the throughput, and how much longer than the round trip, through one rule for one
/// service. nftlet's rules are not there for established connections: the kernel translates them
/// by what it remembers.
const THROUGHPUT: f64 = 0.95;
const ROUND_TRIP: f64 = 1.05;
/// What the filter hooks may cost established connections: 1 % of an exchange between two threads,
/// and of the throughput.
const FILTERS: f64 = 0.01;

/// A quantity that is measured in each lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantity {
    /// The seconds of a new connection of a pod to one of ten services, which the processor's
    /// caches remember however many there are.
    FromPod,
    /// The seconds of a new connection of a pod to any service, which they do not.
    FromPodToAny,
    /// As [`Quantity::FromPod`], of the node itself.
    FromNode,
    /// The seconds in which a byte goes and comes over an established connection, both ends of
    /// which one thread holds: the work on the packets alone.
    RoundTrip,
    /// The same where the server's end is held by another thread, which is woken by the byte: the
    /// least that an application sees.
    Exchange,
    /// The bytes a second over an established connection.
    Throughput,
}

/// The medians of a lane.
#[derive(Debug, Serialize)]
pub struct Series {
    /// What they are of.
    pub quantity: Quantity,
    /// The lane.
    pub rules: Rules,
    /// One of each round.
    pub rounds: Vec<f64>,
    /// All samples.
    #[serde(skip)]
    pub samples: Vec<f64>,
}

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Results {
    /// Numbers of services, rising.
    pub sizes: Vec<usize>,
    /// Endpoints of each.
    pub endpoints: usize,
    /// One for each quantity of each lane.
    pub series: Vec<Series>,
    /// Sizes that took longer in kube-proxy's shape than they may.
    pub too_slow: Vec<usize>,
}

/// What was promised of a comparison.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// The ratio may not be larger.
    AtMost(f64),
    /// The ratio may not be smaller.
    AtLeast(f64),
}

/// One lane over another one.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// The quantity.
    pub quantity: Quantity,
    /// The lane that is judged.
    pub lane: Rules,
    /// The lane it is compared with.
    pub with: Rules,
    /// The median of the ratios of all rounds.
    pub ratio: f64,
    /// Where that median is with a probability of 95 %.
    pub between: [f64; 2],
    /// What was promised.
    pub budget: Option<Budget>,
}

impl Quantity {
    /// All of them, in the order of the tables.
    pub const ALL: [Self; 6] = [
        Self::FromPod,
        Self::FromPodToAny,
        Self::FromNode,
        Self::RoundTrip,
        Self::Exchange,
        Self::Throughput,
    ];

    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::FromPod => "new connection of a pod, busy service",
            Self::FromPodToAny => "new connection of a pod, any service",
            Self::FromNode => "new connection of the node, busy service",
            Self::RoundTrip => "round trip, established",
            Self::Exchange => "exchange of two threads, established",
            Self::Throughput => "throughput, established",
        }
    }
}

impl Quantity {
    /// How much of it more services may bring.
    fn growth(self) -> Option<Budget> {
        match self {
            Self::FromPod | Self::FromPodToAny | Self::FromNode => Some(Budget::AtMost(GROWTH)),
            Self::RoundTrip | Self::Exchange | Self::Throughput => None,
        }
    }
}

impl Series {
    /// An empty one.
    pub fn new(quantity: Quantity, rules: Rules) -> Self {
        Self {
            quantity,
            rules,
            rounds: Vec::new(),
            samples: Vec::new(),
        }
    }
}

impl Results {
    /// Nothing yet.
    pub fn new(sizes: Vec<usize>, endpoints: usize) -> Self {
        Self {
            sizes,
            endpoints,
            series: Vec::new(),
            too_slow: Vec::new(),
        }
    }

    /// Adds what one round brought.
    pub fn note(&mut self, quantity: Quantity, rules: Rules, samples: Vec<f64>) {
        let mut all = self.series.iter_mut();
        let found = all.find(|series| series.quantity == quantity && series.rules == rules);
        let series = found.expect("every lane has a series of each quantity");
        series.rounds.extend(percentile(&samples, 50));
        series.samples.extend(samples);
    }

    /// The medians of a lane, if there is such a lane.
    pub fn of(&self, quantity: Quantity, rules: Rules) -> Option<&Series> {
        let mut all = self.series.iter();
        all.find(|series| series.quantity == quantity && series.rules == rules)
    }

    /// The budgets that are kept since kube-proxy's shape took too long to load at all.
    pub fn without_rival(&self) -> Vec<Outcome> {
        let of = |size: usize| {
            let budgeted = Quantity::ALL.into_iter().filter(|it| it.growth().is_some());
            budgeted.map(move |quantity| Outcome {
                what: compared(quantity, Rules::Nftlet(size), Rules::KubeProxy(size)),
                measured: "kube-proxy's shape too slow to load".to_owned(),
                budget: format!("at most {NOT_SLOWER:.2}"),
                met: true,
            })
        };
        self.too_slow.iter().copied().flat_map(of).collect()
    }

    /// All comparisons, those with a budget among them.
    pub fn comparisons(&self) -> Vec<Comparison> {
        let mut found = Vec::new();
        let smallest = self.sizes.first().copied().unwrap_or_default();
        let largest = self.sizes.last().copied().unwrap_or_default();
        for quantity in Quantity::ALL {
            let mut compare = |lane: Rules, with: Rules, budget: Option<Budget>| {
                found.extend(self.compare(quantity, lane, with, budget));
            };
            for size in self.sizes.iter().copied().filter(|size| *size > smallest) {
                let growth = quantity.growth();
                compare(Rules::Nftlet(size), Rules::Nftlet(smallest), growth);
            }
            for size in self.sizes.iter().copied() {
                let not_slower = quantity.growth().map(|_| Budget::AtMost(NOT_SLOWER));
                compare(Rules::Nftlet(size), Rules::KubeProxy(size), not_slower);
            }
            let least = match quantity {
                Quantity::RoundTrip => Some(Budget::AtMost(ROUND_TRIP)),
                Quantity::Throughput => Some(Budget::AtLeast(THROUGHPUT)),
                _ => None,
            };
            compare(Rules::Nftlet(largest), Rules::OneRule, least);
            let filters = match quantity {
                Quantity::Exchange => Some(Budget::AtMost(1.0 + FILTERS)),
                Quantity::Throughput => Some(Budget::AtLeast(1.0 - FILTERS)),
                _ => None,
            };
            let without = Rules::WithoutFilters(smallest);
            compare(Rules::Nftlet(smallest), without, filters);
            for lane in [Rules::Affinity(smallest), Rules::Policies(smallest)] {
                compare(lane, Rules::OneRule, least);
                compare(lane, Rules::Nftlet(smallest), None);
            }
            compare(Rules::Nftlet(largest), Rules::Tracked, None);
            compare(Rules::Nftlet(largest), Rules::None, None);
            compare(Rules::OneRule, Rules::Tracked, None);
            compare(Rules::OneRule, Rules::None, None);
            compare(Rules::Tracked, Rules::None, None);
            compare(Rules::NoneAgain, Rules::None, None);
        }
        found
    }

    /// Compares round by round: what was slow for both sides does not count.
    fn compare(
        &self,
        quantity: Quantity,
        lane: Rules,
        with: Rules,
        budget: Option<Budget>,
    ) -> Option<Comparison> {
        let (judged, other) = (self.of(quantity, lane)?, self.of(quantity, with)?);
        let pairs = judged.rounds.iter().zip(&other.rounds);
        let ratios: Vec<f64> = pairs.map(|(judged, other)| judged / other).collect();
        let (ratio, between) = median_with_bounds(ratios)?;
        Some(Comparison {
            quantity,
            lane,
            with,
            ratio,
            between,
            budget,
        })
    }
}

impl Comparison {
    /// Whether the budget was kept; `None` without one.
    pub fn met(&self) -> Option<bool> {
        Some(match self.budget? {
            Budget::AtMost(bound) => self.ratio <= bound,
            Budget::AtLeast(bound) => self.ratio >= bound,
        })
    }

    /// What became of its budget, if it has one.
    pub fn outcome(&self) -> Option<Outcome> {
        let budget = match self.budget? {
            Budget::AtMost(bound) => format!("at most {bound:.2}"),
            Budget::AtLeast(bound) => format!("at least {bound:.2}"),
        };
        Some(Outcome {
            what: compared(self.quantity, self.lane, self.with),
            measured: format!("{:.3}", self.ratio),
            budget,
            met: self.met()?,
        })
    }
}

/// The words of a comparison in the list of budgets.
fn compared(quantity: Quantity, lane: Rules, with: Rules) -> String {
    format!("{}: {} over {}", quantity.words(), lane.name(), with.name())
}

impl Rules {
    /// The lane in the tables.
    pub fn name(self) -> String {
        let services = |size: usize| count(Some(size as f64));
        match self {
            Rules::None => "no rules".to_owned(),
            Rules::NoneAgain => "no rules (again)".to_owned(),
            Rules::Tracked => "tracked, no rules".to_owned(),
            Rules::OneRule => "one rule".to_owned(),
            Rules::KubeProxy(size) => format!("kube-proxy's, {}", services(size)),
            Rules::Nftlet(size) => format!("nftlet, {}", services(size)),
            Rules::WithoutFilters(size) => format!("without filters, {}", services(size)),
            Rules::Affinity(size) => format!("with affinity, {}", services(size)),
            Rules::Policies(size) => format!("with policies, {}", services(size)),
        }
    }
}

/// The smallest sample that so many percent of all do not exceed.
pub fn percentile(samples: &[f64], percent: usize) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

/// The median, and the samples between which the true one is with a probability of 95 %: those as
/// many ranks away as twice the standard deviation of a fair coin's heads.
fn median_with_bounds(mut samples: Vec<f64>) -> Option<(f64, [f64; 2])> {
    samples.sort_by(f64::total_cmp);
    let count = samples.len();
    let away = (count as f64).sqrt().ceil() as usize;
    let middle = count / 2;
    let low = samples.get(middle.saturating_sub(away))?;
    let high = samples.get((middle + away).min(count.saturating_sub(1)))?;
    Some((*samples.get(middle)?, [*low, *high]))
}
