//! The metrics of the loop and its drivers.

use std::time::Duration;

use prometheus::{Error, Gauge, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use crate::model::Reason;
use crate::serve::metrics::{PerFamily, Registry, doubling, signed, sync_buckets, unsigned};

/// The metrics of the loop and its drivers. Clones share them.
#[derive(Clone, Debug)]
pub struct SyncMetrics {
    transactions: IntCounter,
    transaction_messages: IntCounter,
    transaction_elements: IntCounter,
    transaction_bytes: IntCounter,
    transaction_duration: Histogram,
    sync_duration: PerFamily<Histogram>,
    full_sync_duration: PerFamily<Histogram>,
    partial_sync_duration: PerFamily<Histogram>,
    last_sync: PerFamily<Gauge>,
    last_queued: PerFamily<Gauge>,
    programming_latency: Histogram,
    network_programming: PerFamily<Histogram>,
    service_changes: IntCounter,
    endpoint_changes: IntCounter,
    service_changes_pending: IntGauge,
    endpoint_changes_pending: IntGauge,
    sync_failures: PerFamily<IntCounter>,
    cleanup_failures: PerFamily<IntCounter>,
    netlink_errors: IntCounter,
    policies_in_force: IntGauge,
    policy_sync_duration: Histogram,
    isolated_pods: IntGauge,
    objects: IntGaugeVec,
    refused: IntGauge,
    notices: IntCounterVec,
    healed: IntCounter,
    audits: IntCounterVec,
    chains: IntGauge,
    compiled: IntCounter,
    /// By the internal and by the external policy.
    no_local_endpoints: PerFamily<[IntGauge; 2]>,
}

impl SyncMetrics {
    /// Creates and registers the metrics.
    ///
    /// # Errors
    ///
    /// When one of their names is taken.
    pub fn register(registry: &Registry) -> Result<Self, Error> {
        let no_local_endpoints = registry.int_gauge_vec(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "Number of services with a Local traffic policy and no endpoints",
            &["ip_family", "traffic_policy"],
        )?;
        let notices = registry.counter_vec(
            "nftlet_notices_total",
            "Faults found in objects; the log names the objects",
            &["reason"],
        )?;
        // A series that exists from the start with 0 shows the first notice as an increase.
        for reason in Reason::ALL {
            let _ = notices.with_label_values(&[reason.as_str()]);
        }
        Ok(Self {
            transactions: registry.counter(
                "nftlet_transactions_total",
                "Transactions that the kernel accepted",
            )?,
            transaction_messages: registry.counter(
                "nftlet_transaction_messages_total",
                "Netlink messages inside the accepted transactions",
            )?,
            transaction_elements: registry.counter(
                "nftlet_transaction_elements_total",
                "Set and map elements added or deleted by the accepted transactions",
            )?,
            transaction_bytes: registry.counter(
                "nftlet_transaction_bytes_total",
                "Size of the accepted transactions in bytes",
            )?,
            transaction_duration: registry.histogram(
                "nftlet_transaction_duration_seconds",
                "Time from sending a transaction to the kernel's answer",
                doubling(0.000_05, 20),
            )?,
            sync_duration: registry.histogram_per_family(
                "kubeproxy_sync_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds",
                sync_buckets(),
            )?,
            full_sync_duration: registry.histogram_per_family(
                "kubeproxy_sync_full_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds for full resyncs",
                sync_buckets(),
            )?,
            partial_sync_duration: registry.histogram_per_family(
                "kubeproxy_sync_partial_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds for partial resyncs",
                sync_buckets(),
            )?,
            last_sync: registry.gauge_per_family(
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "The last time proxy rules were successfully synced",
            )?,
            last_queued: registry.gauge_per_family(
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "The last time a sync of proxy rules was queued",
            )?,
            programming_latency: registry.histogram(
                "nftlet_programming_latency_seconds",
                "Time from receiving a change to the kernel's confirmation of its rules",
                doubling(0.000_05, 20),
            )?,
            network_programming: registry.histogram_per_family(
                "kubeproxy_network_programming_duration_seconds",
                "In Cluster Network Programming Latency in seconds",
                network_programming_buckets(),
            )?,
            service_changes: registry.counter(
                "kubeproxy_sync_proxy_rules_service_changes_total",
                "Cumulative proxy rules Service changes",
            )?,
            endpoint_changes: registry.counter(
                "kubeproxy_sync_proxy_rules_endpoint_changes_total",
                "Cumulative proxy rules Endpoint changes",
            )?,
            service_changes_pending: registry.int_gauge(
                "kubeproxy_sync_proxy_rules_service_changes_pending",
                "Pending proxy rules Service changes",
            )?,
            endpoint_changes_pending: registry.int_gauge(
                "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
                "Pending proxy rules Endpoint changes",
            )?,
            sync_failures: registry.counter_per_family(
                "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
                "Cumulative proxy nftables sync failures",
            )?,
            cleanup_failures: registry.counter_per_family(
                "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
                "Cumulative proxy nftables cleanup failures",
            )?,
            netlink_errors: registry.counter(
                "nftlet_netlink_errors_total",
                "Transactions that failed in the kernel or on the way to it",
            )?,
            policies_in_force: registry.int_gauge(
                "nftlet_network_policies_in_force",
                "Whether the network policies are enforced on this node",
            )?,
            policy_sync_duration: registry.histogram(
                "nftlet_policy_sync_duration_seconds",
                "Time from compiling changed network policies to the kernel's answer",
                doubling(0.000_05, 20),
            )?,
            isolated_pods: registry.int_gauge(
                "nftlet_policy_isolated_pods",
                "Pods of this node that a network policy selects",
            )?,
            objects: registry.int_gauge_vec(
                "nftlet_objects",
                "Kubernetes objects known to nftlet",
                &["kind"],
            )?,
            refused: registry.int_gauge(
                "nftlet_refused_services",
                "Services left out: the kernel refuses their rules, or they are too large",
            )?,
            notices,
            healed: registry.counter(
                "nftlet_foreign_changes_healed_total",
                "Operations that undid changes by other processes in nftlet's tables",
            )?,
            audits: registry.counter_vec(
                "nftlet_audits_total",
                "Comparisons with the kernel after missed notifications",
                &["result"],
            )?,
            compiled: registry.counter(
                "nftlet_services_compiled_total",
                "Services compiled into rules, whether or not their rules changed",
            )?,
            chains: registry.int_gauge(
                "nftlet_shared_chains",
                "Chains shared by services with the same number of endpoints",
            )?,
            no_local_endpoints: PerFamily::new(|family| {
                ["internal", "external"]
                    .map(|policy| no_local_endpoints.with_label_values(&[family, policy]))
            }),
        })
    }

    /// Removes the metric of policies in force from the page, where policies are not enforced.
    ///
    /// # Errors
    ///
    /// When it is called twice.
    pub(crate) fn without_policies(&self, registry: &Registry) -> Result<(), Error> {
        registry.remove(self.policies_in_force.clone())
    }

    /// Counts a transaction that the kernel accepted.
    pub(super) fn transaction(
        &self,
        took: Duration,
        messages: usize,
        elements: usize,
        bytes: usize,
    ) {
        self.transactions.inc();
        self.transaction_messages.inc_by(unsigned(messages));
        self.transaction_elements.inc_by(unsigned(elements));
        self.transaction_bytes.inc_by(unsigned(bytes));
        self.transaction_duration.observe(took.as_secs_f64());
    }

    /// Records a round of work after which the kernel has the wanted rules of services. `full` marks
    /// a round that compared all rules; the others look at changes only.
    pub(super) fn sync(&self, full: bool, took: Duration) {
        let by_kind = if full {
            &self.full_sync_duration
        } else {
            &self.partial_sync_duration
        };
        by_kind.observe(took.as_secs_f64());
        self.sync_duration.observe(took.as_secs_f64());
        self.in_order();
    }

    /// Records that the kernel has the wanted rules now. kube-proxy sets this time at least every
    /// `syncPeriod`, even without work, and alerts rely on it.
    pub(super) fn in_order(&self) {
        self.last_sync.set_to_now();
    }

    /// Records that a change waits for the next round of work.
    pub(super) fn queued(&self) {
        self.last_queued.set_to_now();
    }

    /// Records whether network policies are in force.
    pub(super) fn set_policies_in_force(&self, in_force: bool) {
        self.policies_in_force.set(i64::from(in_force));
    }

    /// Records a round of work after which the kernel has the wanted rules of policies.
    pub(super) fn policy_sync(&self, took: Duration) {
        self.policy_sync_duration.observe(took.as_secs_f64());
    }

    /// Sets the number of isolated pods of this node.
    pub(super) fn isolated_pods(&self, isolated: usize) {
        self.isolated_pods.set(signed(isolated));
    }

    /// Records that the rules of a change are in force, given the time since it was received.
    pub(super) fn programmed(&self, since_received: Duration) {
        self.programming_latency
            .observe(since_received.as_secs_f64());
    }

    /// Records that the rules of a change of endpoints are in force, given the time since the
    /// cluster made it (annotation `endpoints.kubernetes.io/last-change-trigger-time`).
    pub(super) fn network_programming(&self, since_trigger: Duration) {
        self.network_programming
            .observe(since_trigger.as_secs_f64());
    }

    /// Counts received changes of Services and of EndpointSlices.
    pub(super) fn changes(&self, services: usize, endpoints: usize) {
        self.service_changes.inc_by(unsigned(services));
        self.endpoint_changes.inc_by(unsigned(endpoints));
    }

    /// Sets the numbers of changes that are not in force yet.
    pub(super) fn pending(&self, services: usize, endpoints: usize) {
        self.service_changes_pending.set(signed(services));
        self.endpoint_changes_pending.set(signed(endpoints));
    }

    /// Counts a failed transaction.
    pub(super) fn failure(&self) {
        self.sync_failures.iter().for_each(IntCounter::inc);
        self.netlink_errors.inc();
    }

    /// Counts a failure to remove unused chains and sets of an IP family.
    pub(super) fn cleanup_failure(&self, ipv6: bool) {
        self.cleanup_failures.of(ipv6).inc();
    }

    /// Sets the number of known objects of a kind.
    pub fn objects(&self, kind: &str, count: usize) {
        self.objects.with_label_values(&[kind]).set(signed(count));
    }

    /// Sets the number of services left out: the kernel refuses their rules, or they are too large.
    pub(super) fn refused(&self, count: usize) {
        self.refused.set(signed(count));
    }

    /// Counts a notice.
    pub(super) fn notice(&self, reason: Reason) {
        self.notices.with_label_values(&[reason.as_str()]).inc();
    }

    /// Counts operations that undid changes of other programs.
    pub(super) fn healed(&self, operations: usize) {
        self.healed.inc_by(unsigned(operations));
    }

    /// Counts an audit by its result, one of a few words.
    pub(super) fn audit(&self, result: &str) {
        self.audits.with_label_values(&[result]).inc();
    }

    /// Counts compiled services.
    pub(super) fn compiled(&self, services: usize) {
        self.compiled.inc_by(unsigned(services));
    }

    /// Sets the number of chains that services share.
    pub(super) fn chains(&self, count: usize) {
        self.chains.set(signed(count));
    }

    /// Sets the numbers of services whose traffic is dropped because a policy Local finds no
    /// endpoint on this node: for IPv4 and IPv6, by the internal and by the external policy.
    pub(super) fn no_local_endpoints(&self, counts: [[usize; 2]; 2]) {
        let gauges = self.no_local_endpoints.iter().flatten();
        for (gauge, count) in gauges.zip(counts.into_iter().flatten()) {
            gauge.set(signed(count));
        }
    }
}

/// Returns kube-proxy's bounds of buckets: 0, for changes that the cluster's clock dates later than
/// their rules, and those of the service-level objective for network programming, 250 ms to 5
/// minutes. Finer ones below show where in the first of them nftlet ends.
fn network_programming_buckets() -> Vec<f64> {
    let mut buckets = vec![0.0, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5];
    buckets.extend((1..60).map(f64::from));
    buckets.extend((60..120).step_by(5).map(f64::from));
    buckets.extend((120..=300).step_by(30).map(f64::from));
    buckets
}

#[cfg(test)]
mod tests;
