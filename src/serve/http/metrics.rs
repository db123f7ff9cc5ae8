//! The metrics of probes and of the ports for health checks.

use prometheus::{Error, IntCounter, IntCounterVec};

use crate::serve::health::Probe;
use crate::serve::metrics::Registry;

/// The metrics of probes and of the ports for health checks. Clones share them.
#[derive(Clone, Debug)]
pub struct HttpMetrics {
    healthz: IntCounterVec,
    livez: IntCounterVec,
    health_check_port_errors: IntCounter,
}

impl HttpMetrics {
    /// Creates and registers the metrics.
    ///
    /// # Errors
    ///
    /// If one of their names is taken.
    pub fn register(registry: &Registry) -> Result<Self, Error> {
        Ok(Self {
            healthz: registry.counter_vec(
                "kubeproxy_proxy_healthz_total",
                "Cumulative proxy healthz HTTP status",
                &["code"],
            )?,
            livez: registry.counter_vec(
                "kubeproxy_proxy_livez_total",
                "Cumulative proxy livez HTTP status",
                &["code"],
            )?,
            health_check_port_errors: registry.counter(
                "nftlet_health_check_port_errors_total",
                "Failed attempts to listen on the healthCheckNodePort of a service",
            )?,
        })
    }

    /// Counts an answer to a probe by its HTTP status.
    pub fn answered(&self, probe: Probe, code: u16) {
        let counters = match probe {
            Probe::Healthz => &self.healthz,
            Probe::Livez => &self.livez,
            Probe::Readyz => return,
        };
        counters.with_label_values(&[&code.to_string()]).inc();
    }

    /// Counts a failed attempt to listen on a port for health checks.
    pub(in crate::serve) fn check_port_failed(&self) {
        self.health_check_port_errors.inc();
    }
}
