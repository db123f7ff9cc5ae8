//! Counters and faults of the watches, for the metrics and the readiness check.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use crate::model::Kind;
use crate::mutex::lock;
use crate::serve::metrics::{Registry, Sample};

/// Counters of a [`Cluster`](super::Cluster) by kind, and its lasting faults.
#[derive(Debug, Default)]
pub struct SourceStats {
    fault: Mutex<Option<ServerFault>>,
    /// The fault of each kind that has one.
    faults: Mutex<BTreeMap<Kind, String>>,
    /// Why the server refused access for the first time.
    refusal: OnceLock<String>,
    services: KindStats,
    endpoint_slices: KindStats,
    nodes: KindStats,
    service_cidrs: KindStats,
    pods: KindStats,
    namespaces: KindStats,
    network_policies: KindStats,
    cluster_network_policies: KindStats,
}

/// A lasting fault of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFault {
    /// When it was first reported.
    pub since: Instant,
    /// A sentence about it.
    pub message: String,
}

impl SourceStats {
    /// Registers the metrics of the watches, which are read from these counters at each scrape.
    ///
    /// # Errors
    ///
    /// When one of their names is taken.
    pub fn register(self: &Arc<Self>, registry: &Registry) -> Result<(), prometheus::Error> {
        let register = |name, help, count: fn(&KindStats) -> u64| {
            let stats = self.clone();
            let sample = move |kind: &Kind| Sample::new([kind.as_str()], count(stats.kind(*kind)));
            let read = move || Some(Kind::ALL.iter().map(&sample).collect());
            registry.sampled(name, help, ["kind"], read)
        };
        register(
            "nftlet_watch_lists_total",
            "Complete lists read from the API server",
            KindStats::lists,
        )?;
        register(
            "nftlet_watch_restarts_total",
            "Watches that were started again; a server ends each after some minutes",
            |of_kind| of_kind.watches().saturating_sub(1),
        )?;
        register(
            "nftlet_watch_events_total",
            "Events received from the API server",
            KindStats::events,
        )
    }

    /// Returns the fault because of which changes of services are not received.
    pub fn fault(&self) -> Option<ServerFault> {
        lock(&self.fault).clone()
    }

    /// Returns the fault because of which changes of a kind are not received.
    pub fn fault_of(&self, kind: Kind) -> Option<String> {
        lock(&self.faults).get(&kind).cloned()
    }

    /// Returns why the server refused access for the first time, if it did.
    pub(crate) fn refusal(&self) -> Option<&str> {
        self.refusal.get().map(String::as_str)
    }

    pub(super) fn set_refusal(&self, message: &str) {
        self.refusal.get_or_init(|| message.to_owned());
    }

    /// Replaces the faults of all kinds.
    pub(super) fn set_faults(&self, faults: BTreeMap<Kind, String>) {
        *lock(&self.faults) = faults;
    }

    /// Returns the bytes of JSON received of all kinds.
    pub(super) fn bytes(&self) -> u64 {
        Kind::ALL.iter().map(|kind| self.kind(*kind).bytes()).sum()
    }

    /// Sets or clears the fault of services. A fault that replaces another keeps its start.
    pub(super) fn set_fault(&self, message: Option<String>) {
        let mut fault = lock(&self.fault);
        *fault = message.map(|message| ServerFault {
            since: fault
                .as_ref()
                .map_or_else(Instant::now, |known| known.since),
            message,
        });
    }

    /// Returns the counters of a kind.
    pub fn kind(&self, kind: Kind) -> &KindStats {
        match kind {
            Kind::Service => &self.services,
            Kind::EndpointSlice => &self.endpoint_slices,
            Kind::Node => &self.nodes,
            Kind::ServiceCidr => &self.service_cidrs,
            Kind::Pod => &self.pods,
            Kind::Namespace => &self.namespaces,
            Kind::NetworkPolicy => &self.network_policies,
            Kind::ClusterNetworkPolicy => &self.cluster_network_policies,
        }
    }
}

/// Counters of one kind.
#[derive(Debug, Default)]
pub struct KindStats {
    lists: Counter,
    watches: Counter,
    events: Counter,
    bytes: Counter,
    undecodable: Counter,
    last_event: Mutex<Option<Instant>>,
}

impl KindStats {
    /// Returns the lists read completely, streamed or paged. More than one means that the server
    /// could not resume a watch.
    pub fn lists(&self) -> u64 {
        self.lists.get()
    }

    /// Returns the watch connections established, one more than the watches resumed.
    pub fn watches(&self) -> u64 {
        self.watches.get()
    }

    /// Returns the objects received, in lists and as changes.
    pub fn events(&self) -> u64 {
        self.events.get()
    }

    /// Returns the bytes of JSON received.
    pub fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Returns the objects that could not be decoded.
    pub fn undecodable(&self) -> u64 {
        self.undecodable.get()
    }

    pub(super) fn count_list(&self) {
        self.lists.add(1);
    }

    pub(super) fn count_watch(&self) {
        self.watches.add(1);
    }

    /// Returns when the last object was received.
    pub fn last_event(&self) -> Option<Instant> {
        *lock(&self.last_event)
    }

    pub(super) fn count_event(&self) {
        self.events.add(1);
        *lock(&self.last_event) = Some(Instant::now());
    }

    pub(super) fn count_bytes(&self, bytes: usize) {
        self.bytes.add(bytes as u64);
    }

    pub(super) fn count_undecodable(&self) {
        self.undecodable.add(1);
    }
}

#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Counter {
    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::metrics::tests::expect;

    #[test]
    fn the_page_shows_the_counters_of_each_kind() {
        let (registry, stats) = (Registry::new().unwrap(), Arc::new(SourceStats::default()));
        stats.register(&registry).unwrap();
        let services = stats.kind(Kind::Service);
        services.count_list();
        services.count_watch();
        services.count_event();
        let restarts = "nftlet_watch_restarts_total{kind=\"Service\"}";
        expect(&registry, &[(restarts, 0.0)]);
        services.count_watch();
        services.count_event();
        expect(
            &registry,
            &[
                (restarts, 1.0),
                ("nftlet_watch_lists_total{kind=\"Service\"}", 1.0),
                ("nftlet_watch_events_total{kind=\"Service\"}", 2.0),
                ("nftlet_watch_events_total{kind=\"Node\"}", 0.0),
            ],
        );
    }
}
