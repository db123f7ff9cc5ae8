//! What nftlet tells Prometheus about its work.
//!
//! Whatever kube-proxy measures as well has kube-proxy's name, labels and buckets, so that its
//! dashboards and alerts keep working; the rest is called `nftlet_*`. kube-proxy runs one proxy
//! per IP family and labels most values with it. nftlet has both families in one transaction,
//! so such a value is given for both of them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::{
    Error, Gauge, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry,
    TextEncoder,
};

use self::counted::Counted;
pub use self::counted::{NotRemembered, PolicyDrops};
use self::process::Process;
use self::register::{PerFamily, Registrar, doubling, network_programming_buckets, sync_buckets};

mod counted;
mod process;
mod register;

/// All metrics, in a registry of their own.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    process: Process,
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
    conntrack_duration: PerFamily<Histogram>,
    conntrack_deleted: PerFamily<IntCounter>,
    netlink_errors: IntCounter,
    policies_in_force: IntGauge,
    policy_sync_duration: Histogram,
    isolated_pods: IntGauge,
    connections_cut: IntCounter,
    bridge_unfiltered: PerFamily<Gauge>,
    objects: IntGaugeVec,
    refused: IntGauge,
    notices: IntCounterVec,
    healed: IntCounter,
    audits: IntCounterVec,
    chains: IntGauge,
    no_local_endpoints: PerFamily<[IntGauge; 2]>,
    watch_lists: IntCounterVec,
    watch_restarts: IntCounterVec,
    watch_events: IntCounterVec,
    healthz: IntCounterVec,
    livez: IntCounterVec,
    health_check_port_errors: IntCounter,
    log_lines_dropped: IntCounter,
    events_given_up: IntCounter,
}

impl Metrics {
    /// Creates and registers all metrics. It fails only where two of them have the same name.
    pub fn new() -> Result<Self, Error> {
        let registry = Registry::new();
        let new = Registrar(&registry);
        new.int_gauge_vec(
            "nftlet_build_info",
            "Always 1; the label tells the running version of nftlet",
            &["version"],
        )?
        .with_label_values(&[env!("CARGO_PKG_VERSION")])
        .set(1);
        Ok(Self {
            process: Process::register(&registry)?,
            transactions: new.counter(
                "nftlet_transactions_total",
                "Transactions that the kernel accepted",
            )?,
            transaction_messages: new.counter(
                "nftlet_transaction_messages_total",
                "Netlink messages inside the accepted transactions",
            )?,
            transaction_elements: new.counter(
                "nftlet_transaction_elements_total",
                "Set and map elements added or deleted by the accepted transactions",
            )?,
            transaction_bytes: new.counter(
                "nftlet_transaction_bytes_total",
                "Size of the accepted transactions in bytes",
            )?,
            transaction_duration: new.histogram(
                "nftlet_transaction_duration_seconds",
                "Time from sending a transaction to the kernel's answer",
                doubling(0.000_05, 20),
            )?,
            sync_duration: new.histogram_per_family(
                "kubeproxy_sync_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds",
                sync_buckets(),
            )?,
            full_sync_duration: new.histogram_per_family(
                "kubeproxy_sync_full_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds for full resyncs",
                sync_buckets(),
            )?,
            partial_sync_duration: new.histogram_per_family(
                "kubeproxy_sync_partial_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds for partial resyncs",
                sync_buckets(),
            )?,
            last_sync: new.gauge_per_family(
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "The last time proxy rules were successfully synced",
            )?,
            last_queued: new.gauge_per_family(
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "The last time a sync of proxy rules was queued",
            )?,
            programming_latency: new.histogram(
                "nftlet_programming_latency_seconds",
                "Time from receiving a change to the kernel's confirmation of its rules",
                doubling(0.000_05, 20),
            )?,
            network_programming: new.histogram_per_family(
                "kubeproxy_network_programming_duration_seconds",
                "In Cluster Network Programming Latency in seconds",
                network_programming_buckets(),
            )?,
            service_changes: new.counter(
                "kubeproxy_sync_proxy_rules_service_changes_total",
                "Cumulative proxy rules Service changes",
            )?,
            endpoint_changes: new.counter(
                "kubeproxy_sync_proxy_rules_endpoint_changes_total",
                "Cumulative proxy rules Endpoint changes",
            )?,
            service_changes_pending: new.int_gauge(
                "kubeproxy_sync_proxy_rules_service_changes_pending",
                "Pending proxy rules Service changes",
            )?,
            endpoint_changes_pending: new.int_gauge(
                "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
                "Pending proxy rules Endpoint changes",
            )?,
            sync_failures: new.counter_per_family(
                "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
                "Cumulative proxy nftables sync failures",
            )?,
            cleanup_failures: new.counter_per_family(
                "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
                "Cumulative proxy nftables cleanup failures",
            )?,
            conntrack_duration: new.histogram_per_family(
                "kubeproxy_conntrack_reconciler_sync_duration_seconds",
                "ReconcileConntrackFlowsLatency in seconds",
                sync_buckets(),
            )?,
            conntrack_deleted: new.counter_per_family(
                "kubeproxy_conntrack_reconciler_deleted_entries_total",
                "Cumulative conntrack flows deleted by conntrack reconciler",
            )?,
            netlink_errors: new.counter(
                "nftlet_netlink_errors_total",
                "Transactions that failed in the kernel or on the way to it",
            )?,
            policies_in_force: new.int_gauge(
                "nftlet_network_policies_in_force",
                "Whether the network policies are enforced on this node",
            )?,
            policy_sync_duration: new.histogram(
                "nftlet_policy_sync_duration_seconds",
                "Time from compiling changed network policies to the kernel's answer",
                doubling(0.000_05, 20),
            )?,
            isolated_pods: new.int_gauge(
                "nftlet_policy_isolated_pods",
                "Pods of this node that a network policy selects",
            )?,
            connections_cut: new.counter(
                "nftlet_policy_connections_cut_total",
                "Connections cut because no network policy allows them any more",
            )?,
            bridge_unfiltered: new.gauge_per_family(
                "nftlet_policy_bridge_unfiltered",
                "Whether isolated pods are behind a bridge whose traffic passes the policies by",
            )?,
            objects: new.int_gauge_vec(
                "nftlet_objects",
                "Kubernetes objects known to nftlet",
                &["kind"],
            )?,
            refused: new.int_gauge(
                "nftlet_refused_services",
                "Services whose rules the kernel refuses, so that they are left out",
            )?,
            notices: new.counter_vec(
                "nftlet_notices_total",
                "Faults found in objects; the log names the objects",
                &["reason"],
            )?,
            healed: new.counter(
                "nftlet_foreign_changes_healed_total",
                "Operations that undid what others had changed in nftlet's rules",
            )?,
            audits: new.counter_vec(
                "nftlet_audits_total",
                "Comparisons of the kernel with what is wanted after notifications were missed",
                &["result"],
            )?,
            chains: new.int_gauge(
                "nftlet_shared_chains",
                "Chains shared by services with the same number of endpoints",
            )?,
            no_local_endpoints: new.no_local_endpoints()?,
            watch_lists: new.counter_vec(
                "nftlet_watch_lists_total",
                "Complete lists read from the API server",
                &["kind"],
            )?,
            watch_restarts: new.counter_vec(
                "nftlet_watch_restarts_total",
                "Watches that were started again; a server ends each after some minutes",
                &["kind"],
            )?,
            watch_events: new.counter_vec(
                "nftlet_watch_events_total",
                "Events received from the API server",
                &["kind"],
            )?,
            healthz: new.counter_vec(
                "kubeproxy_proxy_healthz_total",
                "Cumulative proxy healthz HTTP status",
                &["code"],
            )?,
            livez: new.counter_vec(
                "kubeproxy_proxy_livez_total",
                "Cumulative proxy livez HTTP status",
                &["code"],
            )?,
            health_check_port_errors: new.counter(
                "nftlet_health_check_port_errors_total",
                "Failed attempts to listen on the healthCheckNodePort of a service",
            )?,
            log_lines_dropped: new.counter(
                "nftlet_log_lines_dropped_total",
                "Lines of the log that standard error did not take in time",
            )?,
            events_given_up: new.counter(
                "nftlet_events_given_up_total",
                "Events that the API server refused, or failed to take again and again",
            )?,
            registry,
        })
    }

    /// All metrics in Prometheus' text format.
    pub fn encode(&self) -> String {
        self.process.refresh();
        match TextEncoder::new().encode_to_string(&self.registry.gather()) {
            Ok(text) => text,
            // A comment of the text format: the scrape succeeds and shows what is wrong.
            Err(error) => format!("# nftlet cannot write its metrics: {error}\n"),
        }
    }

    /// The kernel accepted a transaction.
    pub fn transaction(&self, took: Duration, messages: usize, elements: usize, bytes: usize) {
        self.transactions.inc();
        self.transaction_messages.inc_by(unsigned(messages));
        self.transaction_elements.inc_by(unsigned(elements));
        self.transaction_bytes.inc_by(unsigned(bytes));
        self.transaction_duration.observe(took.as_secs_f64());
    }

    /// A round of work ended well: the rules in the kernel are those wanted. `full` tells the
    /// rounds that compared everything from those that looked at changes alone.
    pub fn sync(&self, full: bool, took: Duration) {
        let by_kind = if full {
            &self.full_sync_duration
        } else {
            &self.partial_sync_duration
        };
        by_kind.each(|histogram| histogram.observe(took.as_secs_f64()));
        self.sync_duration
            .each(|histogram| histogram.observe(took.as_secs_f64()));
        self.in_order();
    }

    /// The rules are as wanted at this moment. kube-proxy sets this time at least every
    /// `syncPeriod`, whether there was something to do or not, and alerts rely on it.
    pub fn in_order(&self) {
        let now = unix_seconds(SystemTime::now());
        self.last_sync.each(|gauge| gauge.set(now));
    }

    /// Leaves out whether network policies are in force, where none are to be.
    ///
    /// # Errors
    ///
    /// When it is called twice.
    pub fn without_policies(&self) -> Result<(), prometheus::Error> {
        let gauge = self.policies_in_force.clone();
        self.registry.unregister(Box::new(gauge))
    }

    /// Adds the metrics of another module.
    ///
    /// # Errors
    ///
    /// When one of them has a name that is taken.
    pub fn include(
        &self,
        collectors: impl IntoIterator<Item = Box<dyn prometheus::core::Collector>>,
    ) -> Result<(), Error> {
        let mut collectors = collectors.into_iter();
        collectors.try_for_each(|collector| self.registry.register(collector))
    }

    /// Whether network policies are in force.
    pub fn policies_in_force(&self, in_force: bool) {
        self.policies_in_force.set(i64::from(in_force));
    }

    /// The policy tables are as wanted again after so long, and isolate so many pods.
    pub fn policy_sync(&self, took: Duration, isolated: usize) {
        self.policy_sync_duration.observe(took.as_secs_f64());
        self.isolated_pods.set(signed(isolated));
    }

    /// Asks `read` at each scrape what the policies dropped. Where it answers `None`, that metric
    /// is missing from the scrape.
    ///
    /// # Errors
    ///
    /// When somebody was registered before.
    pub fn policy_drops(
        &self,
        read: impl Fn() -> Option<Vec<PolicyDrops>> + Send + Sync + 'static,
    ) -> Result<(), Error> {
        let drops = Counted::new(Box::new(read))?;
        self.registry.register(Box::new(drops))
    }

    /// Asks `read` at each scrape for the clients that were not remembered for session affinity.
    /// Where it answers `None`, that metric is missing from the scrape.
    ///
    /// # Errors
    ///
    /// When somebody was registered before.
    pub fn clients_not_remembered(
        &self,
        read: impl Fn() -> Option<Vec<NotRemembered>> + Send + Sync + 'static,
    ) -> Result<(), Error> {
        let counted = Counted::new(Box::new(read))?;
        self.registry.register(Box::new(counted))
    }

    /// So many connections were cut because no policy allows them any more.
    pub fn connections_cut(&self, count: usize) {
        self.connections_cut.inc_by(unsigned(count));
    }

    /// Whether traffic of isolated pods of an IP family passes the policies by on a bridge.
    pub fn bridge_unfiltered(&self, ipv6: bool, unfiltered: bool) {
        let gauge = self.bridge_unfiltered.of(ipv6);
        gauge.set(if unfiltered { 1.0 } else { 0.0 });
    }

    /// A change waits for the next round of work.
    pub fn queued(&self) {
        let now = unix_seconds(SystemTime::now());
        self.last_queued.each(|gauge| gauge.set(now));
    }

    /// The kernel confirmed the rules of a change that was received this long ago.
    pub fn programmed(&self, since_received: Duration) {
        self.programming_latency
            .observe(since_received.as_secs_f64());
    }

    /// The kernel confirmed the rules of a change that the cluster dates this long ago
    /// (annotation `endpoints.kubernetes.io/last-change-trigger-time`).
    pub fn network_programming(&self, since_trigger: Duration) {
        self.network_programming
            .each(|histogram| histogram.observe(since_trigger.as_secs_f64()));
    }

    /// So many changes of Services and of their endpoints were received.
    pub fn changes(&self, services: usize, endpoints: usize) {
        self.service_changes.inc_by(unsigned(services));
        self.endpoint_changes.inc_by(unsigned(endpoints));
    }

    /// So many changes wait to be written to the kernel.
    pub fn pending(&self, services: usize, endpoints: usize) {
        self.service_changes_pending.set(signed(services));
        self.endpoint_changes_pending.set(signed(endpoints));
    }

    /// A transaction failed.
    pub fn failure(&self) {
        self.sync_failures.each(IntCounter::inc);
        self.netlink_errors.inc();
    }

    /// What nothing leads to any more could not be removed from the tables of an IP family.
    pub fn cleanup_failure(&self, ipv6: bool) {
        self.cleanup_failures.of(ipv6).inc();
    }

    /// The UDP flows of an IP family were searched for stale ones, and so many were deleted.
    pub fn flows_cleaned(&self, ipv6: bool, took: Duration, deleted: usize) {
        self.conntrack_duration.of(ipv6).observe(took.as_secs_f64());
        self.conntrack_deleted.of(ipv6).inc_by(unsigned(deleted));
    }

    /// So many objects of a kind are known.
    pub fn objects(&self, kind: &str, count: usize) {
        self.objects.with_label_values(&[kind]).set(signed(count));
    }

    /// So many services are left out because the kernel refuses their rules.
    pub fn refused(&self, count: usize) {
        self.refused.set(signed(count));
    }

    /// A fault was found in an object. `reason` names the kind of fault and never the object:
    /// each new value is another series for Prometheus to keep.
    pub fn notice(&self, reason: &str) {
        self.notices.with_label_values(&[reason]).inc();
    }

    /// Faults of these kinds may be found. A series that is there from the start with 0 shows the
    /// first one as an increase.
    pub fn expect_notices<'a>(&self, reasons: impl IntoIterator<Item = &'a str>) {
        for reason in reasons {
            let _ = self.notices.with_label_values(&[reason]);
        }
    }

    /// Changes that others made to nftlet's rules were undone with so many operations.
    pub fn healed(&self, operations: usize) {
        self.healed.inc_by(unsigned(operations));
    }

    /// The kernel was compared with what is wanted, because it was time. `result` is one of a few
    /// words.
    pub fn audit(&self, result: &str) {
        self.audits.with_label_values(&[result]).inc();
    }

    /// So many chains are shared by the services.
    pub fn chains(&self, count: usize) {
        self.chains.set(signed(count));
    }

    /// So many services drop traffic of a family because they have endpoints, but none on this
    /// node, where a policy Local wants them: for IPv4 and IPv6, by the internal and by the
    /// external policy.
    pub fn no_local_endpoints(&self, counts: [[usize; 2]; 2]) {
        let gauges = self.no_local_endpoints.0.iter().flatten();
        for (gauge, count) in gauges.zip(counts.into_iter().flatten()) {
            gauge.set(signed(count));
        }
    }

    /// What the watch of a kind has counted since it began. The totals replace those given
    /// before; one that fell, which no counter may, is ignored.
    pub fn watch(&self, kind: &str, lists: u64, restarts: u64, events: u64) {
        raise(&self.watch_lists.with_label_values(&[kind]), lists);
        raise(&self.watch_restarts.with_label_values(&[kind]), restarts);
        raise(&self.watch_events.with_label_values(&[kind]), events);
    }

    /// So many lines of the log were dropped since the start.
    pub fn log_lines_dropped(&self, total: u64) {
        raise(&self.log_lines_dropped, total);
    }

    /// An Event was not written and is not tried again.
    pub fn event_given_up(&self) {
        self.events_given_up.inc();
    }

    /// `/healthz` was answered with this HTTP status.
    pub fn healthz(&self, code: u16) {
        self.healthz.with_label_values(&[&code.to_string()]).inc();
    }

    /// `/livez` was answered with this HTTP status.
    pub fn livez(&self, code: u16) {
        self.livez.with_label_values(&[&code.to_string()]).inc();
    }

    /// The health check port of a service could not be listened on.
    pub fn health_check_port_error(&self) {
        self.health_check_port_errors.inc();
    }
}

/// Lifts a counter to a total counted elsewhere.
fn raise(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

fn unsigned(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
