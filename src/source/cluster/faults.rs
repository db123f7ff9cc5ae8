//! Ongoing faults of the API server, each reported once for all kinds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::stats::SourceStats;
use crate::logging::Throttle;
use crate::model::{Kind, Notice, Reason, Subject};
use crate::mutex::lock;

/// The ongoing faults that were reported. The watches of all kinds share them, so that an
/// unreachable server is reported once, not per kind and attempt.
#[derive(Debug)]
pub(super) struct Faults {
    server: String,
    lasting: Mutex<BTreeMap<String, LastingFault>>,
    stats: Arc<SourceStats>,
    ends: Mutex<Throttle>,
}

#[derive(Debug, Default)]
struct LastingFault {
    kinds: BTreeSet<Kind>,
    message: String,
}

/// The shortest time between log lines about a server that answers again.
const LOG_END_EVERY: Duration = Duration::from_secs(60);

/// The kinds without which the rules of services are out of date.
const NEEDED: [Kind; 3] = [Kind::Service, Kind::EndpointSlice, Kind::Node];

impl Faults {
    pub(super) fn new(server: String, stats: Arc<SourceStats>) -> Self {
        Self {
            server,
            lasting: Mutex::default(),
            stats,
            ends: Mutex::new(Throttle::new(LOG_END_EVERY)),
        }
    }

    /// Logs that a fault has ended, at most once a minute.
    pub(super) fn log_end(&self) {
        let mut ends = lock(&self.ends);
        if let Some(unlogged) = ends.add(Instant::now()) {
            let server = &self.server;
            tracing::info!(server, unlogged, "the API server answers again");
        }
    }

    /// Records a fault of a kind, in place of its last one. Returns a notice if no kind had it.
    pub(super) fn begin(&self, kind: Kind, sort: String, message: String) -> Option<Notice> {
        let mut lasting = lock(&self.lasting);
        for (known, fault) in lasting.iter_mut() {
            if *known != sort {
                fault.kinds.remove(&kind);
            }
        }
        lasting.retain(|known, fault| *known == sort || !fault.kinds.is_empty());
        let fault = lasting.entry(sort).or_default();
        let is_new = fault.kinds.is_empty();
        fault.kinds.insert(kind);
        fault.message.clone_from(&message);
        self.publish(&lasting);
        is_new.then(|| Notice {
            subject: Subject::Other(self.server.as_str().into()),
            reason: Reason::ApiServer,
            message,
        })
    }

    /// Clears the fault of a kind. Returns whether no kind has that fault any more.
    pub(super) fn end(&self, kind: Kind) -> bool {
        let mut lasting = lock(&self.lasting);
        let before = lasting.len();
        lasting.retain(|_, fault| {
            fault.kinds.remove(&kind);
            !fault.kinds.is_empty()
        });
        self.publish(&lasting);
        lasting.len() < before
    }

    /// Copies the faults to the statistics.
    fn publish(&self, lasting: &BTreeMap<String, LastingFault>) {
        let of_kinds = lasting.values().flat_map(|fault| {
            let kinds = fault.kinds.iter();
            kinds.map(|kind| (*kind, fault.message.clone()))
        });
        self.stats.set_faults(of_kinds.collect());
        let needed = |fault: &&LastingFault| NEEDED.iter().any(|kind| fault.kinds.contains(kind));
        let fault = lasting.values().find(needed);
        self.stats
            .set_fault(fault.map(|fault| fault.message.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_of_all_kinds_is_reported_once_and_ends_once() {
        let stats = Arc::new(SourceStats::default());
        let faults = Faults::new("https://server".to_owned(), stats.clone());
        let begin = |kind, sort: &str| faults.begin(kind, sort.to_owned(), "away".to_owned());
        assert!(begin(Kind::Service, "unreachable").is_some());
        assert!(begin(Kind::Service, "unreachable").is_none());
        assert!(begin(Kind::Node, "unreachable").is_none());
        // Another fault replaces the kind's first one; the other kind still has it.
        assert!(begin(Kind::Service, "401").is_some());
        assert!(begin(Kind::Service, "unreachable").is_none());
        let since = stats.fault().expect("a fault").since;
        assert!(!faults.end(Kind::Service));
        assert_eq!(stats.fault().map(|fault| fault.since), Some(since));
        assert!(faults.end(Kind::Node));
        assert_eq!(stats.fault(), None);
        assert!(begin(Kind::ServiceCidr, "403").is_some());
        assert_eq!(stats.fault(), None, "services work without");
        assert_eq!(stats.fault_of(Kind::ServiceCidr).as_deref(), Some("away"));
        assert_eq!(stats.fault_of(Kind::Service), None);
        assert!(faults.end(Kind::ServiceCidr));
        assert!(begin(Kind::Node, "unreachable").is_some());
    }
}
