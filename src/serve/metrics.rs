//! The registry of metrics, and their page in Prometheus' text format.
//!
//! Each module has a struct with its own metrics, which its `register` adds to the [`Registry`].
//! A metric that kube-proxy has as well keeps kube-proxy's name, labels and buckets, so that its
//! dashboards and alerts work; the others are called `nftlet_*`. kube-proxy runs one proxy per IP
//! family and labels most values with it. nftlet writes both families in one transaction, so such
//! a value is exported for both.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::core::Collector;
use prometheus::{
    Error, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    IntGauge, IntGaugeVec, Opts, TextEncoder,
};

use crate::logging::LogQueue;

use self::process::ProcessMetrics;
pub use self::sampled::Sample;
use self::sampled::Sampled;

mod process;
mod sampled;

/// The values of the label `ip_family`, spelled as in the Kubernetes API.
pub(crate) const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

/// A registry with the metrics of the process. Clones share it.
#[derive(Clone, Debug)]
pub struct Registry {
    all: prometheus::Registry,
    process: Arc<ProcessMetrics>,
}

impl Registry {
    /// Creates a registry.
    ///
    /// # Errors
    ///
    /// If two metrics of the process have the same name.
    pub fn new() -> Result<Self, Error> {
        let all = prometheus::Registry::new();
        let process = Arc::new(ProcessMetrics::register(&all)?);
        let registry = Self { all, process };
        registry
            .int_gauge_vec(
                "nftlet_build_info",
                "Always 1; the label is the running version of nftlet",
                &["version"],
            )?
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        Ok(registry)
    }

    /// Returns all metrics in Prometheus' text format.
    pub fn encode(&self) -> String {
        self.process.refresh();
        match TextEncoder::new().encode_to_string(&self.all.gather()) {
            Ok(text) => text,
            // A comment in the text format: the scrape succeeds and shows the error.
            Err(error) => format!("# nftlet cannot write its metrics: {error}\n"),
        }
    }

    /// Registers the counter of dropped log lines.
    ///
    /// # Errors
    ///
    /// If it is registered already.
    pub fn add_log(&self, log: LogQueue) -> Result<(), Error> {
        self.sampled(
            "nftlet_log_lines_dropped_total",
            "Log lines dropped because standard error did not take them in time",
            [],
            move || Some(vec![Sample::new([], log.dropped())]),
        )
    }

    /// Registers a metric.
    ///
    /// # Errors
    ///
    /// If the name is taken; the same holds for all methods that register a metric.
    pub(crate) fn add<T: Collector + Clone + 'static>(&self, metric: T) -> Result<T, Error> {
        self.all.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    /// Removes a metric from the page.
    ///
    /// # Errors
    ///
    /// If it is not registered.
    pub(crate) fn remove(&self, metric: impl Collector + 'static) -> Result<(), Error> {
        self.all.unregister(Box::new(metric))
    }

    pub(crate) fn counter(&self, name: &str, help: &str) -> Result<IntCounter, Error> {
        self.add(IntCounter::new(name, help)?)
    }

    pub(crate) fn counter_vec(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, Error> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    pub(crate) fn counter_per_family(
        &self,
        name: &str,
        help: &str,
    ) -> Result<PerFamily<IntCounter>, Error> {
        let all = self.counter_vec(name, help, &["ip_family"])?;
        Ok(PerFamily::new(|family| all.with_label_values(&[family])))
    }

    pub(crate) fn int_gauge(&self, name: &str, help: &str) -> Result<IntGauge, Error> {
        self.add(IntGauge::new(name, help)?)
    }

    pub(crate) fn int_gauge_vec(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntGaugeVec, Error> {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    pub(crate) fn gauge_per_family(
        &self,
        name: &str,
        help: &str,
    ) -> Result<PerFamily<Gauge>, Error> {
        let all = self.add(GaugeVec::new(Opts::new(name, help), &["ip_family"])?)?;
        Ok(PerFamily::new(|family| all.with_label_values(&[family])))
    }

    pub(crate) fn histogram(
        &self,
        name: &str,
        help: &str,
        buckets: Vec<f64>,
    ) -> Result<Histogram, Error> {
        let options = HistogramOpts::new(name, help).buckets(buckets);
        self.add(Histogram::with_opts(options)?)
    }

    pub(crate) fn histogram_per_family(
        &self,
        name: &str,
        help: &str,
        buckets: Vec<f64>,
    ) -> Result<PerFamily<Histogram>, Error> {
        let options = HistogramOpts::new(name, help).buckets(buckets);
        let all = self.add(HistogramVec::new(options, &["ip_family"])?)?;
        Ok(PerFamily::new(|family| all.with_label_values(&[family])))
    }

    /// Registers a counter whose samples `read` returns at each scrape. Samples with the same labels
    /// are added up. If `read` returns `None`, the scrape omits the metric.
    pub(crate) fn sampled<const LABELS: usize>(
        &self,
        name: &'static str,
        help: &'static str,
        labels: [&'static str; LABELS],
        read: impl Fn() -> Option<Vec<Sample<LABELS>>> + Send + Sync + 'static,
    ) -> Result<(), Error> {
        let sampled = Sampled::new(name, help, labels, Box::new(read))?;
        self.all.register(Box::new(sampled))
    }
}

/// The same metric for each IP family. Both exist from the start, so that a rate over them is
/// known from the first scrape.
#[derive(Clone, Debug)]
pub(crate) struct PerFamily<T>([T; 2]);

impl<T> PerFamily<T> {
    /// Creates the metric of each family from the value of its label.
    pub(crate) fn new(create: impl Fn(&'static str) -> T) -> Self {
        Self(FAMILIES.map(create))
    }

    /// Iterates over the families, IPv4 first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter()
    }

    pub(crate) fn of(&self, ipv6: bool) -> &T {
        let [v4, v6] = &self.0;
        if ipv6 { v6 } else { v4 }
    }
}

impl PerFamily<Histogram> {
    /// Observes a value for both families.
    pub(crate) fn observe(&self, value: f64) {
        self.iter().for_each(|histogram| histogram.observe(value));
    }
}

impl PerFamily<Gauge> {
    /// Sets both families to the present time, in seconds since 1970.
    pub(crate) fn set_to_now(&self) {
        let now = unix_seconds(SystemTime::now());
        self.iter().for_each(|gauge| gauge.set(now));
    }
}

/// Returns upper bounds of buckets that double from the first one.
pub(crate) fn doubling(first: f64, count: usize) -> Vec<f64> {
    std::iter::successors(Some(first), |bound| Some(bound * 2.0))
        .take(count)
        .collect()
}

/// Returns kube-proxy's bucket bounds for durations, 1 ms to 16 s, and finer ones below, since most
/// syncs take less than 1 ms.
pub(crate) fn sync_buckets() -> Vec<f64> {
    let mut buckets = vec![0.000_05, 0.000_1, 0.000_25, 0.000_5];
    buckets.extend(doubling(0.001, 15));
    buckets
}

pub(crate) fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

pub(crate) fn unsigned(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

pub(crate) fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
pub(crate) mod tests;
