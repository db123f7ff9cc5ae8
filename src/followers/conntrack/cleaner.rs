//! The thread that deletes stale flows.

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::queue::{Pending, Received};
use super::{DirtyFrontends, FlowState, UdpFrontend};
use crate::backoff::Backoff;
use crate::engine::table_family;
use crate::followers::FollowerMetrics;
use crate::host::addresses;
use crate::model::Family;
use crate::netlink::{Conntrack, ConntrackError, Flow, FlowFilter};
use crate::sync::Reporter;

/// The most dumps of single frontends; for more, one dump of all UDP flows is faster. Every dump walks
/// the whole table. A dump of all flows takes as long as 1.2 dumps of single frontends with 1,000
/// flows, 2.7 with 10,000, 6.5 with 50,000 and 9.2 with 250,000.
const MOST_FILTERED: usize = 3;
const SHORTEST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);
/// The most frontends that are kept for a retry. Flows without packets expire after minutes.
const MOST_FAILED: usize = 1 << 16;

/// Lists and deletes flows.
pub(crate) trait Tracker {
    /// Deletes the stale flows that match a filter and returns their number.
    ///
    /// # Errors
    ///
    /// When flows cannot be listed, or one cannot be deleted. The others are deleted all the same.
    fn sweep(
        &mut self,
        filter: &FlowFilter,
        stale: &mut dyn FnMut(&Flow) -> bool,
    ) -> Result<usize, ConntrackError>;

    /// Returns the current addresses of the node.
    fn own_addresses(&mut self) -> Vec<IpAddr>;
}

/// The connection tracking of the network namespace in which it was opened.
pub(crate) struct KernelFlows {
    list: Conntrack,
    /// Deletes flows during the dump, so that the list need not be kept.
    delete: Conntrack,
}

impl KernelFlows {
    /// Opens the sockets.
    ///
    /// # Errors
    ///
    /// See [`Conntrack::open`].
    pub(crate) fn open() -> Result<Self, ConntrackError> {
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

/// Deletes the stale flows of dirty frontends.
pub(crate) struct Cleaner<'a, T> {
    open: fn() -> Result<T, ConntrackError>,
    tracker: Option<T>,
    pending: Pending,
    metrics: &'a FollowerMetrics,
    reporter: &'a dyn Reporter,
    backoff: Backoff,
    /// Frontends to retry.
    failed: DirtyFrontends,
}

impl<'a, T: Tracker> Cleaner<'a, T> {
    /// Creates a cleaner that opens its tracker for its first task, and again after a failure.
    pub(crate) fn new(
        open: fn() -> Result<T, ConntrackError>,
        pending: Pending,
        metrics: &'a FollowerMetrics,
        reporter: &'a dyn Reporter,
    ) -> Self {
        Self {
            open,
            tracker: None,
            pending,
            metrics,
            reporter,
            backoff: Backoff::new(SHORTEST_RETRY, LONGEST_RETRY),
            failed: DirtyFrontends::default(),
        }
    }

    /// Runs until the queue is closed and empty.
    pub(crate) fn run(mut self) {
        loop {
            let limit = (!self.failed.is_empty()).then(|| self.backoff.current());
            let mut dirty = std::mem::take(&mut self.failed);
            match self.pending.receive(limit) {
                Received::Dirty(new) => dirty.merge(new),
                Received::Timeout => {}
                Received::Closed => return,
            }
            self.clean(dirty);
        }
    }

    /// Deletes the stale flows of some frontends. If this fails, the frontends are kept for a retry.
    pub(crate) fn clean(&mut self, dirty: DirtyFrontends) {
        match self.attempt(&dirty) {
            Ok(()) => self.backoff.reset(),
            Err(error) => {
                // Messages of an aborted dump may still be queued.
                self.tracker = None;
                if self.backoff.is_reset() {
                    self.reporter.stale_flows_remain(&error);
                }
                self.backoff.next();
                if dirty.len() <= MOST_FAILED {
                    self.failed = dirty;
                }
            }
        }
    }

    fn attempt(&mut self, dirty: &DirtyFrontends) -> Result<(), ConntrackError> {
        let mut fronts: Vec<UdpFrontend> = dirty.to_sweep().collect();
        if fronts.is_empty() {
            return Ok(());
        }
        fronts.sort_unstable();
        let tracker = match &mut self.tracker {
            Some(tracker) => tracker,
            closed => closed.insert((self.open)()?),
        };
        let own = if fronts
            .iter()
            .any(|f| matches!(f, UdpFrontend::NodePort(..)))
        {
            dirty.node_port_addresses(tracker.own_addresses())
        } else {
            HashSet::new()
        };
        let pending = &mut self.pending;
        let mut stale = |flow: &Flow| {
            dirty.evaluate(flow, &own) == FlowState::Stale && !pending.keeps(flow, &own)
        };
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

/// Returns filters that cover all flows of some frontends of a family.
pub(super) fn filters<'f>(
    family: Family,
    fronts: impl Iterator<Item = &'f UdpFrontend>,
) -> Vec<FlowFilter> {
    let mut by_port: BTreeMap<u16, Option<SocketAddr>> = BTreeMap::new();
    for front in fronts {
        let only = match front {
            UdpFrontend::Address(at) => Some(*at),
            UdpFrontend::NodePort(..) => None,
        };
        // The addresses of a service mostly have the same port and can share a dump.
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
