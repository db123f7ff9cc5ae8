//! What rules count, read from the kernel when somebody looks.

use std::fmt;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Error, IntCounterVec, Opts};

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

/// How many packets came of clients that could not be remembered for session affinity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotRemembered {
    /// The namespace of their services.
    pub namespace: String,
    /// The packets, since a service of the namespace has session affinity.
    pub packets: u64,
}

/// Something that is counted, with labels that tell it from others of its kind.
pub(super) trait Sample {
    const NAME: &'static str;
    const HELP: &'static str;
    const LABELS: &'static [&'static str];

    fn labels(&self) -> Vec<&str>;
    fn count(&self) -> u64;
}

impl Sample for PolicyDrops {
    const NAME: &'static str = "nftlet_policy_drops_total";
    const HELP: &'static str = "Packets of this node's pods that no network policy allowed";
    const LABELS: &'static [&'static str] = &["namespace", "pod", "direction"];

    fn labels(&self) -> Vec<&str> {
        vec![&self.namespace, &self.pod, self.direction]
    }

    fn count(&self) -> u64 {
        self.packets
    }
}

impl Sample for NotRemembered {
    const NAME: &'static str = "nftlet_affinity_clients_not_remembered_total";
    const HELP: &'static str = "Packets of new connections whose client is not remembered for session affinity, because \
         the services of the namespace remember as many as they may";
    const LABELS: &'static [&'static str] = &["namespace"];

    fn labels(&self) -> Vec<&str> {
        vec![&self.namespace]
    }

    fn count(&self) -> u64 {
        self.packets
    }
}

/// Reads the samples; `None` where they cannot be read.
type Read<S> = dyn Fn() -> Option<Vec<S>> + Send + Sync;

/// Asks for the samples at each scrape. Those with the same labels add up.
pub(super) struct Counted<S> {
    read: Box<Read<S>>,
    /// Describes the series; those of a scrape are in one of their own, so that what is gone leaves
    /// nothing behind.
    empty: IntCounterVec,
}

impl<S> fmt::Debug for Counted<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counted").finish_non_exhaustive()
    }
}

impl<S: Sample> Counted<S> {
    pub(super) fn new(read: Box<Read<S>>) -> Result<Self, Error> {
        Ok(Self {
            read,
            empty: counters::<S>()?,
        })
    }
}

fn counters<S: Sample>() -> Result<IntCounterVec, Error> {
    IntCounterVec::new(Opts::new(S::NAME, S::HELP), S::LABELS)
}

impl<S: Sample> Collector for Counted<S> {
    fn desc(&self) -> Vec<&Desc> {
        self.empty.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let (Some(samples), Ok(counters)) = ((self.read)(), counters::<S>()) else {
            return Vec::new();
        };
        for sample in samples {
            counters
                .with_label_values(&sample.labels())
                .inc_by(sample.count());
        }
        counters.collect()
    }
}
