//! Deletes stale flows, on a thread of its own.

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::queue::{Pending, Received};
use super::{Front, Judgement, Work};
use crate::engine::table_family;
use crate::host::addresses;
use crate::model::Family;
use crate::netlink::{Conntrack, ConntrackError, Flow, FlowFilter};
use crate::serve::metrics::Metrics;
use crate::sync::Reporter;

/// The most dumps of single frontends before one of all UDP flows is the better way. Every dump
/// walks the whole table. `benches/conntrack.rs` measures that one of all costs as much as 1.2 of
/// single frontends among 1,000 flows, 2.7 among 10,000, 6.5 among 50,000 and 9.2 among 250,000.
const MOST_FILTERED: usize = 3;
const SHORTEST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);
/// The most frontends that are remembered while flows cannot be deleted. Flows without packets
/// end by themselves after minutes.
const MOST_UNFINISHED: usize = 1 << 16;

/// The connection tracking of a host, as the cleaner sees it.
pub trait Tracker {
    /// Deletes those flows of a filter that are stale, and returns how many it deleted.
    ///
    /// # Errors
    ///
    /// When flows cannot be listed, or one could not be deleted; the others are.
    fn sweep(
        &mut self,
        filter: &FlowFilter,
        stale: &mut dyn FnMut(&Flow) -> bool,
    ) -> Result<usize, ConntrackError>;

    /// The host's own addresses at this moment.
    fn own_addresses(&mut self) -> Vec<IpAddr>;
}

/// The kernel's connection tracking in the network namespace it was opened in.
pub struct KernelFlows {
    list: Conntrack,
    /// Flows are deleted while the list is still being read, so that it need not be kept.
    delete: Conntrack,
}

impl KernelFlows {
    /// Opens the sockets.
    ///
    /// # Errors
    ///
    /// See [`Conntrack::open`].
    pub fn open() -> Result<Self, ConntrackError> {
        Ok(Self {
            list: Conntrack::open()?,
            delete: Conntrack::open()?,
        })
    }
}

impl Tracker for KernelFlows {
    fn sweep(
        &mut self,
        filter: &FlowFilter,
        stale: &mut dyn FnMut(&Flow) -> bool,
    ) -> Result<usize, ConntrackError> {
        let Self { list, delete } = self;
        let mut deleted = 0;
        let mut failed = None;
        list.flows(filter, |flow| {
            if stale(flow) {
                match delete.delete(flow) {
                    Ok(was_there) => deleted += usize::from(was_there),
                    Err(error) => failed = failed.take().or(Some(error)),
                }
            }
        })?;
        failed.map_or(Ok(deleted), Err)
    }

    fn own_addresses(&mut self) -> Vec<IpAddr> {
        addresses::all()
    }
}

/// Deletes the stale flows of the frontends it is told about.
pub struct Cleaner<'a, T> {
    open: fn() -> Result<T, ConntrackError>,
    tracker: Option<T>,
    pending: Pending,
    metrics: &'a Metrics,
    reporter: &'a dyn Reporter,
    /// Whether the last attempt failed; a fault is reported when it begins.
    failing: bool,
    /// Work that failed, to be tried again.
    unfinished: Work,
}

impl<'a, T: Tracker> Cleaner<'a, T> {
    /// A cleaner that opens its tracker when it has something to do, and again after a failure.
    pub fn new(
        open: fn() -> Result<T, ConntrackError>,
        pending: Pending,
        metrics: &'a Metrics,
        reporter: &'a dyn Reporter,
    ) -> Self {
        Self {
            open,
            tracker: None,
            pending,
            metrics,
            reporter,
            failing: false,
            unfinished: Work::default(),
        }
    }

    /// Works until the queue is closed and empty.
    pub fn run(mut self) {
        let mut retry = SHORTEST_RETRY;
        loop {
            let limit = (!self.unfinished.is_empty()).then_some(retry);
            let mut work = std::mem::take(&mut self.unfinished);
            match self.pending.receive(limit) {
                Received::Work(new) => work.merge(new),
                Received::Nothing => {}
                Received::Closed => return,
            }
            retry = if self.clean(work) {
                SHORTEST_RETRY
            } else {
                (retry * 2).min(LONGEST_RETRY)
            };
        }
    }

    /// Deletes the stale flows of some frontends. False if that failed; the rules are not
    /// concerned, and the work is kept.
    pub fn clean(&mut self, work: Work) -> bool {
        match self.attempt(&work) {
            Ok(()) => {
                self.failing = false;
                true
            }
            Err(error) => {
                // Of a dump that broke off, messages may be on their way.
                self.tracker = None;
                if !std::mem::replace(&mut self.failing, true) {
                    self.reporter.flows_stay(&error);
                }
                if work.len() <= MOST_UNFINISHED {
                    self.unfinished = work;
                }
                false
            }
        }
    }

    fn attempt(&mut self, work: &Work) -> Result<(), ConntrackError> {
        let mut fronts: Vec<Front> = work.suspects().collect();
        if fronts.is_empty() {
            return Ok(());
        }
        fronts.sort_unstable();
        let tracker = match &mut self.tracker {
            Some(tracker) => tracker,
            closed => closed.insert((self.open)()?),
        };
        let own = if fronts.iter().any(|f| matches!(f, Front::NodePort(..))) {
            work.node_port_addresses(tracker.own_addresses())
        } else {
            HashSet::new()
        };
        let pending = &mut self.pending;
        let mut stale =
            |flow: &Flow| work.judge(flow, &own) == Judgement::Stale && !pending.keeps(flow, &own);
        for family in Family::ALL {
            let of_family = fronts.iter().filter(|front| front.family() == family);
            let filters = filters(family, of_family);
            if filters.is_empty() {
                continue;
            }
            let started = Instant::now();
            let mut deleted = 0;
            for filter in filters {
                deleted += tracker.sweep(&filter, &mut stale)?;
            }
            let took = started.elapsed();
            self.metrics
                .flows_cleaned(family == Family::V6, took, deleted);
            if deleted > 0 {
                tracing::debug!("deleted {deleted} stale UDP flows of {family}");
            }
        }
        Ok(())
    }
}

/// What to list in order to see all flows of some frontends of a family.
pub(super) fn filters<'f>(
    family: Family,
    fronts: impl Iterator<Item = &'f Front>,
) -> Vec<FlowFilter> {
    let mut by_port: BTreeMap<u16, Option<SocketAddr>> = BTreeMap::new();
    for front in fronts {
        let only = match front {
            Front::Address(at) => Some(*at),
            Front::NodePort(..) => None,
        };
        // The addresses of a service mostly have a port in common, and share a dump.
        by_port
            .entry(front.port())
            .and_modify(|at| *at = None)
            .or_insert(only);
    }
    let family = table_family(family);
    if by_port.len() > MOST_FILTERED {
        return vec![FlowFilter::all(family)];
    }
    let filters = by_port.into_iter().map(|(port, only)| match only {
        Some(at) => FlowFilter::to(at),
        None => FlowFilter::to_port(family, port),
    });
    filters.collect()
}
