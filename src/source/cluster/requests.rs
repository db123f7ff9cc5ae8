//! Metrics of requests to the API server, with the names, labels and buckets of client-go.

use std::time::Instant;

use hyper::{Method, StatusCode, Uri};
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts};

use crate::serve::metrics::Registry;

/// The label `code` of a request without an answer.
const NO_ANSWER: &str = "<error>";

/// Counts and times the requests of one client.
#[derive(Clone, Debug)]
pub(super) struct RequestMetrics {
    host: String,
    requests: IntCounterVec,
    durations: HistogramVec,
}

impl RequestMetrics {
    /// Creates the metrics without registering them. As with client-go, the label `host` of a server
    /// found in the pod's environment always has a port.
    pub(super) fn new(server: &Uri, in_cluster: bool) -> Result<Self, prometheus::Error> {
        let authority = server.authority().map_or("none", |host| host.as_str());
        let host = match server.port() {
            None if in_cluster => format!("{authority}:443"),
            _ => authority.to_owned(),
        };
        let requests = Opts::new(
            "rest_client_requests_total",
            "Number of HTTP requests, partitioned by status code, method, and host.",
        );
        let durations = HistogramOpts::new(
            "rest_client_request_duration_seconds",
            "Request latency in seconds. Broken down by verb, and host.",
        );
        let durations = durations.buckets(vec![
            0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0,
        ]);
        Ok(Self {
            host,
            requests: IntCounterVec::new(requests, &["code", "method", "host"])?,
            durations: HistogramVec::new(durations, &["verb", "host"])?,
        })
    }

    pub(super) fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.add(self.requests.clone())?;
        registry.add(self.durations.clone())?;
        Ok(())
    }

    /// Starts to time a request.
    pub(super) fn begin<B>(&self, request: &hyper::Request<B>) -> InFlight {
        let query = request.uri().query().unwrap_or_default();
        InFlight {
            metrics: self.clone(),
            method: request.method().clone(),
            is_watch: query.split('&').any(|parameter| parameter == "watch=true"),
            is_counted: false,
            began: Instant::now(),
        }
    }
}

/// A request whose answer was not read to its end. Dropping it records the time, except for
/// watches, as with client-go.
#[derive(Debug)]
pub(super) struct InFlight {
    metrics: RequestMetrics,
    method: Method,
    is_watch: bool,
    is_counted: bool,
    began: Instant,
}

impl InFlight {
    /// Counts the request by the status of its answer.
    pub(super) fn answered(&mut self, status: StatusCode) {
        self.count(status.as_str());
    }

    fn count(&mut self, code: &str) {
        self.is_counted = true;
        let labels = [code, self.method.as_str(), &self.metrics.host];
        self.metrics.requests.with_label_values(&labels).inc();
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.is_counted {
            self.count(NO_ANSWER);
        }
        if !self.is_watch {
            let labels = [self.method.as_str(), &self.metrics.host];
            let durations = self.metrics.durations.with_label_values(&labels);
            durations.observe(self.began.elapsed().as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_that_of_client_go() {
        for (server, in_cluster, host) in [
            ("https://10.96.0.1", true, "10.96.0.1:443"),
            ("https://[fd00::1]", true, "[fd00::1]:443"),
            ("https://10.96.0.1:6443/", true, "10.96.0.1:6443"),
            ("https://api.example", false, "api.example"),
            ("https://api.example:6443/prefix", false, "api.example:6443"),
        ] {
            let server = server.parse().expect("an address");
            let metrics = RequestMetrics::new(&server, in_cluster).expect("metrics");
            assert_eq!(metrics.host, host);
        }
    }
}
