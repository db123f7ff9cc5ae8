//! Making metrics, some of them for each IP family, and the bounds of histograms.

use prometheus::{
    Error, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    IntGauge, IntGaugeVec, Opts, Registry,
};

/// The values of the label `ip_family`, spelled as in the Kubernetes API.
pub(super) const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

/// The same metric for each IP family. Both exist from the start, so that a rate over them is
/// known from the first scrape on.
#[derive(Debug)]
pub(super) struct PerFamily<T>(pub(super) [T; 2]);

impl<T> PerFamily<T> {
    pub(super) fn each(&self, act: impl Fn(&T)) {
        self.0.iter().for_each(act);
    }

    pub(super) fn of(&self, ipv6: bool) -> &T {
        let [v4, v6] = &self.0;
        if ipv6 { v6 } else { v4 }
    }
}

/// Creates metrics and adds them to the registry.
pub(super) struct Registrar<'a>(pub(super) &'a Registry);

impl Registrar<'_> {
    pub(super) fn add<T: prometheus::core::Collector + Clone + 'static>(
        &self,
        metric: T,
    ) -> Result<T, Error> {
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    pub(super) fn counter(&self, name: &str, help: &str) -> Result<IntCounter, Error> {
        self.add(IntCounter::new(name, help)?)
    }

    pub(super) fn counter_vec(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, Error> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn counter_per_family(
        &self,
        name: &str,
        help: &str,
    ) -> Result<PerFamily<IntCounter>, Error> {
        let all = self.counter_vec(name, help, &["ip_family"])?;
        Ok(PerFamily(FAMILIES.map(|f| all.with_label_values(&[f]))))
    }

    pub(super) fn int_gauge(&self, name: &str, help: &str) -> Result<IntGauge, Error> {
        self.add(IntGauge::new(name, help)?)
    }

    pub(super) fn int_gauge_vec(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntGaugeVec, Error> {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn no_local_endpoints(&self) -> Result<PerFamily<[IntGauge; 2]>, Error> {
        let all = self.int_gauge_vec(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "Number of services with a Local traffic policy and no endpoints",
            &["ip_family", "traffic_policy"],
        )?;
        let of_family = |family| {
            let policies = ["internal", "external"];
            policies.map(|policy| all.with_label_values(&[family, policy]))
        };
        Ok(PerFamily(FAMILIES.map(of_family)))
    }

    pub(super) fn gauge_per_family(
        &self,
        name: &str,
        help: &str,
    ) -> Result<PerFamily<Gauge>, Error> {
        let all = self.add(GaugeVec::new(Opts::new(name, help), &["ip_family"])?)?;
        Ok(PerFamily(FAMILIES.map(|f| all.with_label_values(&[f]))))
    }

    pub(super) fn histogram(
        &self,
        name: &str,
        help: &str,
        buckets: Vec<f64>,
    ) -> Result<Histogram, Error> {
        let options = HistogramOpts::new(name, help).buckets(buckets);
        self.add(Histogram::with_opts(options)?)
    }

    pub(super) fn histogram_per_family(
        &self,
        name: &str,
        help: &str,
        buckets: Vec<f64>,
    ) -> Result<PerFamily<Histogram>, Error> {
        let options = HistogramOpts::new(name, help).buckets(buckets);
        let all = self.add(HistogramVec::new(options, &["ip_family"])?)?;
        Ok(PerFamily(FAMILIES.map(|f| all.with_label_values(&[f]))))
    }
}

/// Upper bounds that double from the first one on.
pub(super) fn doubling(first: f64, count: usize) -> Vec<f64> {
    std::iter::successors(Some(first), |bound| Some(bound * 2.0))
        .take(count)
        .collect()
}

/// kube-proxy's bounds, 1 ms to 16 s, with finer ones below: most rounds take less than its first.
pub(super) fn sync_buckets() -> Vec<f64> {
    let mut buckets = vec![0.000_05, 0.000_1, 0.000_25, 0.000_5];
    buckets.extend(doubling(0.001, 15));
    buckets
}

/// kube-proxy's bounds: one of 0, in which the changes are that the clocks of two machines date
/// later than their rules, and those of the service-level objective for network programming,
/// 250 ms to 5 minutes. Finer ones below tell where in the first of these the work of nftlet ends up.
pub(super) fn network_programming_buckets() -> Vec<f64> {
    let mut buckets = vec![0.0, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5];
    buckets.extend((1..60).map(f64::from));
    buckets.extend((60..120).step_by(5).map(f64::from));
    buckets.extend((120..=300).step_by(30).map(f64::from));
    buckets
}
