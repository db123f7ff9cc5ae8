//! Cuts connections that network policies no longer allow.
//!
//! Rules accept packets of established connections, so that a connection from before a policy
//! continues until one of its ends closes it. In strict mode nftlet deletes its entry from connection
//! tracking after the rules took effect. Later packets are invalid or open a connection that the rules
//! deny.
//!
//! In every mode nftlet does the same with the connections of an address that was reassigned to
//! another pod, since they were allowed for the previous pod.
//!
//! ```text
//!  rules in force ── PolicyChanges ──> Cutter, a thread of its own: lists the connections of
//!      ^                                  │     isolated pods             ^
//!      └── Query::Evaluate ───────────────┘ 1,024 at a time               └── cuts the denied ones
//! ```
//!
//! Listing walks all connections of the node. The main thread evaluates the policies, in batches small
//! enough not to delay it.
//!
//! A UDP reply in flight while its connection is cut creates a connection in the opposite direction, to
//! which the client's next packets would belong as replies. Therefore entries in the opposite direction
//! are deleted repeatedly for a moment.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use crate::backoff::Backoff;
use crate::engine::table_family;
use crate::followers::FollowerMetrics;
use crate::host::addresses;
use crate::model::{Family, Protocol};
use crate::netlink::{Conntrack, ConntrackError, EntryToCut, Tracked};
use crate::policies::{Connection, PolicyChanges};
use crate::sync::Query;

/// The most connections in one query.
const BATCH: usize = 1024;
/// The time for which changes are collected before a sweep. Packets that traversed the previous rules
/// have left by then.
const COLLECT: Duration = Duration::from_millis(50);
/// The most that a sweep of all connections is delayed to limit the time spent on sweeps.
const MOST_DELAY: Duration = Duration::from_secs(1);
/// The interval and the duration of deletions in the opposite direction.
const REVERSED_EVERY: Duration = Duration::from_millis(20);
const REVERSED_FOR: Duration = Duration::from_millis(400);
/// The most connections whose entries in the opposite direction are deleted.
const MOST_REVERSED: usize = 2048;
const SHORTEST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// The connections that a sweep checks.
#[derive(Debug, Default, PartialEq, Eq)]
struct SweepScope {
    /// Those of all isolated pods.
    all: bool,
    /// Those of some addresses.
    addresses: HashSet<IpAddr>,
}

impl SweepScope {
    fn add(&mut self, other: Self) {
        self.all |= other.all;
        self.addresses.extend(other.addresses);
    }

    fn is_empty(&self) -> bool {
        !self.all && self.addresses.is_empty()
    }

    fn concerns(&self, connection: &Connection) -> bool {
        let ends = [connection.source, connection.destination];
        self.all || ends.iter().any(|end| self.addresses.contains(end))
    }
}

/// Lists tracked connections.
pub(crate) trait ConnectionTable {
    /// Calls `each` with the connections of a family.
    ///
    /// # Errors
    ///
    /// When they cannot be listed.
    fn list(&mut self, family: Family, each: &mut dyn FnMut(Tracked))
    -> Result<(), ConntrackError>;

    /// Returns the current addresses of the node.
    fn own_addresses(&mut self) -> Vec<IpAddr>;
}

/// Deletes connections during the listing.
pub(crate) trait ConnectionRemover {
    /// Deletes a connection; see [`Conntrack::cut`].
    ///
    /// # Errors
    ///
    /// When the kernel refuses. Returns false if the connection no longer exists.
    fn remove(&mut self, tracked: &Tracked, which: EntryToCut) -> Result<bool, ConntrackError>;
}

impl ConnectionTable for Conntrack {
    fn list(
        &mut self,
        family: Family,
        each: &mut dyn FnMut(Tracked),
    ) -> Result<(), ConntrackError> {
        self.connections(table_family(family), each)
    }

    fn own_addresses(&mut self) -> Vec<IpAddr> {
        addresses::all()
    }
}

impl ConnectionRemover for Conntrack {
    fn remove(&mut self, tracked: &Tracked, which: EntryToCut) -> Result<bool, ConntrackError> {
        Conntrack::cut(self, tracked, which)
    }
}

/// Opens a table and a remover.
pub(crate) type Open<T, R> = fn() -> Result<(T, R), ConntrackError>;

/// Opens connection tracking in the network namespace of the calling thread.
///
/// # Errors
///
/// See [`Conntrack::open`].
pub(crate) fn open() -> Result<(Conntrack, Conntrack), ConntrackError> {
    Ok((Conntrack::open()?, Conntrack::open()?))
}

/// The reason why a sweep ended early.
enum SweepError {
    /// Connection tracking failed; the sweep is retried.
    Kernel(ConntrackError),
    /// The rules in force are unknown. Changes follow when they are known again.
    Unknown,
    /// The main loop has ended.
    Ended,
}

impl From<ConntrackError> for SweepError {
    fn from(error: ConntrackError) -> Self {
        SweepError::Kernel(error)
    }
}

/// Cuts connections of isolated pods that the policies deny.
pub(crate) struct Cutter<'a, T, R> {
    open: Open<T, R>,
    tables: Option<(T, R)>,
    changes: Receiver<Arc<PolicyChanges>>,
    policies: mpsc::Sender<Query>,
    /// Whether all connections are checked, not only those of reassigned addresses.
    strict: bool,
    metrics: &'a FollowerMetrics,
    /// The isolated addresses.
    isolated: HashSet<IpAddr>,
    /// The scope of the next sweep.
    scope: SweepScope,
    /// The time of the next sweep.
    due: Option<Instant>,
    /// The earliest next sweep for reassigned addresses.
    earliest: Instant,
    backoff: Backoff,
    /// Connections that were cut, each with the end of the time in which entries in the opposite
    /// direction are deleted.
    reversed: Vec<(Instant, Tracked)>,
    reversed_at: Instant,
}

impl<'a, T: ConnectionTable, R: ConnectionRemover> Cutter<'a, T, R> {
    /// Creates a cutter that opens connection tracking for its first task, and again after a failure.
    /// The receiver of `policies` evaluates connections.
    pub(crate) fn new(
        open: Open<T, R>,
        changes: Receiver<Arc<PolicyChanges>>,
        policies: mpsc::Sender<Query>,
        strict: bool,
        metrics: &'a FollowerMetrics,
    ) -> Self {
        Self {
            open,
            tables: None,
            changes,
            policies,
            strict,
            metrics,
            isolated: HashSet::new(),
            scope: SweepScope::default(),
            due: None,
            earliest: Instant::now(),
            backoff: Backoff::new(SHORTEST_RETRY, LONGEST_RETRY),
            reversed: Vec::new(),
            reversed_at: Instant::now(),
        }
    }

    /// Runs until no more changes come.
    pub(crate) fn run(mut self) {
        loop {
            let reversed_at = (!self.reversed.is_empty()).then_some(self.reversed_at);
            let next = self.due.into_iter().chain(reversed_at).min();
            let received = match next {
                None => self.changes.recv().map_err(RecvTimeoutError::from),
                Some(at) => {
                    let wait = at.saturating_duration_since(Instant::now());
                    self.changes.recv_timeout(wait)
                }
            };
            let now = Instant::now();
            match received {
                Ok(changes) => self.receive(&changes, now),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.due.is_some_and(|due| due <= now) {
                self.due = None;
                let scope = std::mem::take(&mut self.scope);
                let swept = self.sweep(&scope);
                // Limits sweeps to a fifth of the time if pods start and stop all the time.
                self.earliest = Instant::now() + now.elapsed() * 4;
                match swept {
                    Ok(()) => self.backoff.reset(),
                    Err(SweepError::Kernel(error)) => {
                        self.scope.add(scope);
                        self.failed(&error);
                    }
                    Err(SweepError::Unknown) => self.scope.add(scope),
                    Err(SweepError::Ended) => return,
                }
            }
            if !self.reversed.is_empty() && self.reversed_at <= now {
                self.delete_reversed();
            }
        }
    }

    fn receive(&mut self, changes: &PolicyChanges, now: Instant) {
        if let Some(isolated) = &changes.isolated {
            self.isolated = isolated.iter().map(|(address, _)| *address).collect();
        }
        let others = changes.rules || changes.rewritten;
        self.scope.add(SweepScope {
            all: self.strict && others,
            addresses: changes.reassigned.iter().copied().collect(),
        });
        if self.scope.is_empty() {
            return;
        }
        let mut collected = now + COLLECT;
        if self.scope.all {
            collected = collected.max(self.earliest.min(now + MOST_DELAY));
        } else {
            collected = collected.max(self.earliest);
        }
        self.due = Some(self.due.map_or(collected, |due| due.min(collected)));
    }

    fn failed(&mut self, error: &ConntrackError) {
        // Messages of an aborted dump may still be queued.
        self.tables = None;
        if self.backoff.is_reset() {
            tracing::warn!(
                "{error}; until this works, connections that network policies no longer allow continue"
            );
        }
        self.due = Some(Instant::now() + self.backoff.next());
    }

    /// Cuts the connections in a scope that the policies deny.
    fn sweep(&mut self, scope: &SweepScope) -> Result<(), SweepError> {
        let isolated = &self.isolated;
        if isolated.is_empty() || scope.is_empty() {
            return Ok(());
        }
        let (table, remover) = match &mut self.tables {
            Some(tables) => tables,
            closed => closed.insert((self.open)()?),
        };
        let own: HashSet<IpAddr> = table.own_addresses().into_iter().collect();
        let mut batch = QueryBatch {
            connections: Vec::new(),
            tracked: Vec::new(),
            policies: &self.policies,
            remover,
            reversed: &mut self.reversed,
            cut: 0,
            failed: None,
            broken: None,
        };
        let listed = Family::ALL
            .into_iter()
            .filter(|family| isolated.iter().any(|ip| Family::of(*ip) == *family))
            .try_for_each(|family| {
                table.list(family, &mut |tracked| {
                    let connection = policed(&tracked, isolated, &own);
                    if let Some(connection) = connection.filter(|it| scope.concerns(it)) {
                        batch.add(tracked, connection);
                    }
                })
            });
        batch.finish();
        self.metrics.connections_cut(batch.cut);
        if batch.cut > 0 {
            let cut = batch.cut;
            tracing::debug!("cut {cut} connections that network policies no longer allow");
        }
        if let Some(broken) = batch.broken {
            return Err(broken);
        }
        listed?;
        batch.failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Deletes entries in the opposite direction.
    fn delete_reversed(&mut self) {
        let now = Instant::now();
        if self.tables.is_none() {
            self.tables = (self.open)().ok();
        }
        if let Some((_, remover)) = &mut self.tables {
            self.reversed.retain(|(until, tracked)| {
                // Errors were reported when the connection itself was cut.
                let _ = remover.remove(tracked, EntryToCut::Reversed);
                *until > now
            });
        } else {
            self.reversed.clear();
        }
        self.reversed_at = Instant::now() + REVERSED_EVERY;
    }
}

/// Connections that are evaluated together.
struct QueryBatch<'a, R> {
    connections: Vec<Connection>,
    /// The same connections in the same order.
    tracked: Vec<Tracked>,
    policies: &'a mpsc::Sender<Query>,
    remover: &'a mut R,
    reversed: &'a mut Vec<(Instant, Tracked)>,
    /// The number of connections cut.
    cut: usize,
    /// The first error of cutting a connection.
    failed: Option<ConntrackError>,
    /// The reason why no further connections are evaluated.
    broken: Option<SweepError>,
}

impl<R: ConnectionRemover> QueryBatch<'_, R> {
    fn add(&mut self, tracked: Tracked, connection: Connection) {
        self.tracked.push(tracked);
        self.connections.push(connection);
        if self.connections.len() >= BATCH {
            self.finish();
        }
    }

    /// Has the added connections evaluated and cuts the denied ones.
    fn finish(&mut self) {
        let connections = std::mem::take(&mut self.connections);
        let tracked = std::mem::take(&mut self.tracked);
        if connections.is_empty() || self.broken.is_some() {
            return;
        }
        let (answer, answered) = oneshot::channel();
        let query = Query::Evaluate {
            connections,
            answer,
        };
        let asked = self.policies.blocking_send(query).ok();
        let denied = match asked.and_then(|()| answered.blocking_recv().ok()) {
            Some(Some(denied)) => denied,
            Some(None) => {
                self.broken = Some(SweepError::Unknown);
                return;
            }
            None => {
                self.broken = Some(SweepError::Ended);
                return;
            }
        };
        for (tracked, denied) in tracked.into_iter().zip(denied) {
            if denied {
                self.cut(tracked);
            }
        }
    }

    fn cut(&mut self, tracked: Tracked) {
        match self.remover.remove(&tracked, EntryToCut::Listed) {
            Ok(was_there) => self.cut += usize::from(was_there),
            Err(error) => self.failed = self.failed.take().or(Some(error)),
        }
        if may_return(tracked.protocol) && self.reversed.len() < MOST_REVERSED {
            self.reversed.push((Instant::now() + REVERSED_FOR, tracked));
        }
    }
}

/// Returns whether a reply can create an entry. Connection tracking requires an opening packet of
/// TCP and SCTP and a request of ICMP.
fn may_return(protocol: u8) -> bool {
    const ICMP: u8 = 1;
    const ICMPV6: u8 = 58;
    let [tcp, sctp] = [Protocol::Tcp, Protocol::Sctp].map(Protocol::number);
    ![tcp, sctp, ICMP, ICMPV6].contains(&protocol)
}

/// Returns a connection in the form that policies evaluate; `None` if no policy applies, because no end
/// is an isolated pod, or because the node itself opened it, so that it was never forwarded.
fn policed(
    tracked: &Tracked,
    isolated: &HashSet<IpAddr>,
    own: &HashSet<IpAddr>,
) -> Option<Connection> {
    let concerned = isolated.contains(&tracked.source) || isolated.contains(&tracked.replier);
    (concerned && !own.contains(&tracked.source)).then_some(Connection {
        source: tracked.source,
        destination: tracked.replier,
        protocol: tracked.protocol,
        port: tracked.port,
    })
}

#[cfg(test)]
mod tests;
