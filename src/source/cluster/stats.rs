//! Counters of the watches, read by the metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::model::Kind;

/// Counters of a [`Cluster`](super::Cluster), by kind; they only grow.
#[derive(Debug, Default)]
pub struct SourceStats {
    fault: Mutex<Option<ServerFault>>,
    /// What keeps changes of each kind from coming.
    faults: Mutex<BTreeMap<Kind, String>>,
    services: KindStats,
    endpoint_slices: KindStats,
    nodes: KindStats,
    service_cidrs: KindStats,
    pods: KindStats,
    namespaces: KindStats,
    network_policies: KindStats,
}

/// A fault of the server that lasts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFault {
    /// When it was told.
    pub since: Instant,
    /// What it is, for a person.
    pub message: String,
}

impl SourceStats {
    /// What keeps changes of services from coming, if anything does.
    pub fn fault(&self) -> Option<ServerFault> {
        let fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        fault.clone()
    }

    /// What keeps changes of a kind from coming, if anything does.
    pub fn fault_of(&self, kind: Kind) -> Option<String> {
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.get(&kind).cloned()
    }

    /// Replaces what keeps changes from coming.
    pub(super) fn set_faults(&self, faults: BTreeMap<Kind, String>) {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner) = faults;
    }

    /// The bytes of JSON received of all kinds.
    pub(super) fn bytes(&self) -> u64 {
        Kind::ALL.iter().map(|kind| self.kind(*kind).bytes()).sum()
    }

    /// Notes that changes do not come, and why; or that they do. A fault that turns into another
    /// one has lasted since the first.
    pub(super) fn set_fault(&self, message: Option<String>) {
        let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        *fault = message.map(|message| ServerFault {
            since: fault
                .as_ref()
                .map_or_else(Instant::now, |known| known.since),
            message,
        });
    }

    /// The counters of a kind.
    pub fn kind(&self, kind: Kind) -> &KindStats {
        match kind {
            Kind::Service => &self.services,
            Kind::EndpointSlice => &self.endpoint_slices,
            Kind::Node => &self.nodes,
            Kind::ServiceCidr => &self.service_cidrs,
            Kind::Pod => &self.pods,
            Kind::Namespace => &self.namespaces,
            Kind::NetworkPolicy => &self.network_policies,
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
