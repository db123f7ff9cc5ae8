//! Counters of the watches, read by the metrics.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::model::Kind;

/// Counters of a [`Cluster`](super::Cluster), by kind; they only grow.
#[derive(Debug, Default)]
pub struct SourceStats {
    services: KindStats,
    endpoint_slices: KindStats,
    nodes: KindStats,
    service_cidrs: KindStats,
}

impl SourceStats {
    /// The counters of a kind.
    pub fn kind(&self, kind: Kind) -> &KindStats {
        match kind {
            Kind::Service => &self.services,
            Kind::EndpointSlice => &self.endpoint_slices,
            Kind::Node => &self.nodes,
            Kind::ServiceCidr => &self.service_cidrs,
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
}

impl KindStats {
    /// Complete lists begun, streamed or paged; more than one means that the server could not
    /// resume a watch.
    pub fn lists(&self) -> u64 {
        self.lists.get()
    }

    /// Watch connections established; one more than the number of times a watch was resumed.
    pub fn watches(&self) -> u64 {
        self.watches.get()
    }

    /// Objects received, in lists and as changes.
    pub fn events(&self) -> u64 {
        self.events.get()
    }

    /// Bytes of JSON received.
    pub fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Objects that could not be decoded.
    pub fn undecodable(&self) -> u64 {
        self.undecodable.get()
    }

    pub(super) fn count_list(&self) {
        self.lists.add(1);
    }

    pub(super) fn count_watch(&self) {
        self.watches.add(1);
    }

    pub(super) fn count_event(&self) {
        self.events.add(1);
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
