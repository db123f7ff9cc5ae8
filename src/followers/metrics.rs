//! The metrics of the followers.

use std::time::Duration;

use prometheus::{Error, Gauge, Histogram, IntCounter};

use crate::serve::metrics::{PerFamily, Registry, Sample, sync_buckets, unsigned};

/// The metrics of the followers. Clones share them.
#[derive(Clone, Debug)]
pub struct FollowerMetrics {
    conntrack_duration: PerFamily<Histogram>,
    conntrack_deleted: PerFamily<IntCounter>,
    connections_cut: IntCounter,
    bridge_unfiltered: PerFamily<Gauge>,
}

impl FollowerMetrics {
    /// Creates and registers the metrics.
    ///
    /// # Errors
    ///
    /// When one of their names is taken.
    pub fn register(registry: &Registry) -> Result<Self, Error> {
        Ok(Self {
            conntrack_duration: registry.histogram_per_family(
                "kubeproxy_conntrack_reconciler_sync_duration_seconds",
                "ReconcileConntrackFlowsLatency in seconds",
                sync_buckets(),
            )?,
            conntrack_deleted: registry.counter_per_family(
                "kubeproxy_conntrack_reconciler_deleted_entries_total",
                "Cumulative conntrack flows deleted by conntrack reconciler",
            )?,
            connections_cut: registry.counter(
                "nftlet_policy_connections_cut_total",
                "Connections cut because no network policy allows them any more",
            )?,
            bridge_unfiltered: registry.gauge_per_family(
                "nftlet_policy_bridge_unfiltered",
                "Whether isolated pods are behind a bridge whose traffic bypasses the policies",
            )?,
        })
    }

    /// Records a search for stale UDP flows of an IP family.
    pub(super) fn flows_cleaned(&self, ipv6: bool, took: Duration, deleted: usize) {
        self.conntrack_duration.of(ipv6).observe(took.as_secs_f64());
        self.conntrack_deleted.of(ipv6).inc_by(unsigned(deleted));
    }

    /// Counts connections that were cut because no policy allows them.
    pub(super) fn connections_cut(&self, count: usize) {
        self.connections_cut.inc_by(unsigned(count));
    }

    /// Records whether traffic of isolated pods of an IP family bypasses the policies on a bridge.
    pub(super) fn bridge_unfiltered(&self, ipv6: bool, unfiltered: bool) {
        let gauge = self.bridge_unfiltered.of(ipv6);
        gauge.set(if unfiltered { 1.0 } else { 0.0 });
    }
}

/// Registers the counter of packets that policies dropped, with the namespace and the name of the
/// isolated pod and the direction as labels; see [`Registry`] for `read`.
///
/// # Errors
///
/// When it is registered already.
pub fn register_drops(
    registry: &Registry,
    read: impl Fn() -> Option<Vec<Sample<3>>> + Send + Sync + 'static,
) -> Result<(), Error> {
    registry.sampled(
        "nftlet_policy_drops_total",
        "Packets of this node's pods that no network policy allowed",
        ["namespace", "pod", "direction"],
        read,
    )
}

/// Registers the counter of packets that audited policies would deny, with the namespace and the name
/// of the policy, the pod and the direction as labels; see [`Registry`] for `read`.
///
/// # Errors
///
/// When it is registered already.
pub fn register_audited(
    registry: &Registry,
    read: impl Fn() -> Option<Vec<Sample<4>>> + Send + Sync + 'static,
) -> Result<(), Error> {
    registry.sampled(
        "nftlet_policy_audited_total",
        "Packets of this node's pods that an audited network policy would deny",
        ["namespace", "policy", "pod", "direction"],
        read,
    )
}

/// Registers the counter of packets of clients that are not remembered for session affinity, with
/// the namespace of their services as label.
///
/// # Errors
///
/// When it is registered already.
pub fn register_not_remembered(
    registry: &Registry,
    read: impl Fn() -> Option<Vec<Sample<1>>> + Send + Sync + 'static,
) -> Result<(), Error> {
    registry.sampled(
        "nftlet_affinity_clients_not_remembered_total",
        "Packets of new connections whose client is not remembered for session affinity, because \
         the services of the namespace remember as many as they may",
        ["namespace"],
        read,
    )
}

#[cfg(test)]
mod tests;
