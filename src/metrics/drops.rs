//! What the network policies dropped, read from the kernel when somebody looks.

use std::fmt;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Error, IntCounterVec, Opts};

const NAME: &str = "nftlet_policy_drops_total";
const HELP: &str = "Packets of this node's pods that no network policy allowed";
const LABELS: [&str; 3] = ["namespace", "pod", "direction"];

/// How many packets were dropped for want of a policy that allows them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyDrops {
    /// The namespace of the isolated pod.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// `ingress` or `egress`.
    pub direction: &'static str,
    /// The packets, since the pod is isolated.
    pub packets: u64,
}

/// Reads the drops; `None` where they cannot be read.
type Read = dyn Fn() -> Option<Vec<PolicyDrops>> + Send + Sync;

/// Asks for the drops at each scrape. Entries of one pod and direction add up.
pub(super) struct Drops {
    read: Box<Read>,
    /// Describes the series; those of a scrape are in one of their own, so that pods that are gone
    /// leave nothing behind.
    empty: IntCounterVec,
}

impl fmt::Debug for Drops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drops").finish_non_exhaustive()
    }
}

impl Drops {
    pub(super) fn new(read: Box<Read>) -> Result<Self, Error> {
        Ok(Self {
            read,
            empty: counters()?,
        })
    }
}

fn counters() -> Result<IntCounterVec, Error> {
    IntCounterVec::new(Opts::new(NAME, HELP), &LABELS)
}

impl Collector for Drops {
    fn desc(&self) -> Vec<&Desc> {
        self.empty.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let (Some(drops), Ok(counters)) = ((self.read)(), counters()) else {
            return Vec::new();
        };
        for drops in drops {
            let labels = [&*drops.namespace, &*drops.pod, drops.direction];
            counters.with_label_values(&labels).inc_by(drops.packets);
        }
        counters.collect()
    }
}
