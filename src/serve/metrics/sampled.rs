//! Counters that other modules keep, read at each scrape.

use std::fmt;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Error, IntCounterVec, Opts};

/// A count with the values of its labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample<const LABELS: usize> {
    /// The values of the labels, in the order in which their names were registered.
    pub labels: [String; LABELS],
    /// The count, which must not fall from one scrape to the next.
    pub count: u64,
}

impl<const LABELS: usize> Sample<LABELS> {
    pub fn new(labels: [&str; LABELS], count: u64) -> Self {
        Self {
            labels: labels.map(str::to_owned),
            count,
        }
    }
}

/// Reads the samples; `None` if they cannot be read.
type Read<const LABELS: usize> = dyn Fn() -> Option<Vec<Sample<LABELS>>> + Send + Sync;

/// A counter whose samples are read at each scrape.
pub(super) struct Sampled<const LABELS: usize> {
    name: &'static str,
    help: &'static str,
    labels: [&'static str; LABELS],
    read: Box<Read<LABELS>>,
    /// Describes the series and holds none. Each scrape fills a new vector, so that an object
    /// that no longer exists leaves no series behind.
    description: IntCounterVec,
}

impl<const LABELS: usize> fmt::Debug for Sampled<LABELS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sampled")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl<const LABELS: usize> Sampled<LABELS> {
    pub(super) fn new(
        name: &'static str,
        help: &'static str,
        labels: [&'static str; LABELS],
        read: Box<Read<LABELS>>,
    ) -> Result<Self, Error> {
        let description = IntCounterVec::new(Opts::new(name, help), &labels)?;
        Ok(Self {
            name,
            help,
            labels,
            read,
            description,
        })
    }
}

impl<const LABELS: usize> Collector for Sampled<LABELS> {
    fn desc(&self) -> Vec<&Desc> {
        self.description.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let options = Opts::new(self.name, self.help);
        let counters = IntCounterVec::new(options, &self.labels);
        let (Some(samples), Ok(counters)) = ((self.read)(), counters) else {
            return Vec::new();
        };
        for sample in samples {
            let labels = sample.labels.each_ref().map(String::as_str);
            counters.with_label_values(&labels).inc_by(sample.count);
        }
        counters.collect()
    }
}
