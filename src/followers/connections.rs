//! Cuts connections that the policies allow no more.
//!
//! Rules let a connection pass once it is established, so that one from before a policy lives on
//! until its ends close it. In strict mode it is removed from the connection tracking when the
//! rules are in force; the rules then drop what follows, because it opens nothing that they allow.
//!
//! In every mode the same is done to the connections of an address that another pod has than
//! before: they were allowed with the former one.
//!
//! ```text
//!  rules in force ── PolicyChanges ──> Cutter, a thread of its own: lists what isolated pods take
//!      ^                                  │     part in                  ^
//!      └── Query::Judge ───────────────┘  1,024 each                  └── the denied are removed
//! ```
//!
//! Listing walks all connections of the node and waits for nobody. The policies are asked where
//! they are kept, on the main thread, in batches that do not hold it up.
//!
//! An answer over UDP that is on its way when its connection is cut passes for a new connection
//! the other way round, in which the client's next packets would be the answers. So for a
//! moment what has the addresses of the answers is removed again and again.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use crate::engine::table_family;
use crate::host::addresses;
use crate::model::{Family, Protocol};
use crate::netlink::{Conntrack, ConntrackError, EntryToCut, Tracked};
use crate::policies::{Connection, PolicyChanges};
use crate::serve::metrics::Metrics;
use crate::sync::Query;

/// The most connections that are judged at once.
const BATCH: usize = 1024;
/// How long changes of the rules are collected before connections are looked for. Packets that
/// met the rules before have passed by then.
const COLLECT: Duration = Duration::from_millis(50);
/// How often, and for how long, what was cut is kept from coming back the other way round.
const FOLLOW_EVERY: Duration = Duration::from_millis(20);
const FOLLOW_FOR: Duration = Duration::from_millis(400);
/// The most connections that are followed.
const MOST_FOLLOWED: usize = 2048;
const SHORTEST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// The connections to look at.
#[derive(Debug, Default, PartialEq, Eq)]
struct Asked {
    /// Those of all isolated pods.
    all: bool,
    /// Those of some addresses.
    addresses: HashSet<IpAddr>,
}

impl Asked {
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

/// The connections that a host tracks, as the cutter sees them.
pub trait Table {
    /// Hands out the connections of a family.
    ///
    /// # Errors
    ///
    /// When they cannot be listed.
    fn list(&mut self, family: Family, each: &mut dyn FnMut(Tracked))
    -> Result<(), ConntrackError>;

    /// The host's own addresses at this moment.
    fn own_addresses(&mut self) -> Vec<IpAddr>;
}

/// What removes connections while they are still being listed.
pub trait Remover {
    /// Removes a connection; see [`Conntrack::cut`].
    ///
    /// # Errors
    ///
    /// When it cannot be removed; that it is gone already is none.
    fn remove(&mut self, tracked: &Tracked, which: EntryToCut) -> Result<bool, ConntrackError>;
}

impl Table for Conntrack {
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

impl Remover for Conntrack {
    fn remove(&mut self, tracked: &Tracked, which: EntryToCut) -> Result<bool, ConntrackError> {
        Conntrack::cut(self, tracked, which)
    }
}

/// Opens the two ends of the kernel's connection tracking.
pub type Open<T, R> = fn() -> Result<(T, R), ConntrackError>;

/// The kernel's connection tracking in the network namespace of the calling thread.
///
/// # Errors
///
/// See [`Conntrack::open`].
pub fn open() -> Result<(Conntrack, Conntrack), ConntrackError> {
    Ok((Conntrack::open()?, Conntrack::open()?))
}

/// Why a sweep ended early.
enum Broken {
    /// The connection tracking failed; it is worth another attempt.
    Kernel(ConntrackError),
    /// It is unknown what is in force. When it is known again, changes come.
    Unknown,
    /// The reconciler is gone.
    Over,
}

impl From<ConntrackError> for Broken {
    fn from(error: ConntrackError) -> Self {
        Broken::Kernel(error)
    }
}

/// Cuts the connections of isolated pods that the policies deny.
pub struct Cutter<'a, T, R> {
    open: Open<T, R>,
    tables: Option<(T, R)>,
    changes: Receiver<Arc<PolicyChanges>>,
    policies: mpsc::Sender<Query>,
    /// All connections are to be allowed, not only those of addresses with another pod.
    strict: bool,
    metrics: &'a Metrics,
    /// The isolated addresses.
    isolated: HashSet<IpAddr>,
    /// What to look at.
    asked: Asked,
    /// When to look for connections.
    due: Option<Instant>,
    /// Not before this time for the sake of some addresses.
    rest: Instant,
    retry: Duration,
    /// Whether the last attempt failed; a fault is told when it begins.
    failing: bool,
    /// What was cut and could come back the other way round, and until when that is watched.
    followed: Vec<(Instant, Tracked)>,
    follow_at: Instant,
}

impl<'a, T: Table, R: Remover> Cutter<'a, T, R> {
    /// Creates a cutter that opens the connection tracking when it has something to do, and again
    /// after a failure. The thread at the other end of `policies` judges connections.
    pub fn new(
        open: Open<T, R>,
        changes: Receiver<Arc<PolicyChanges>>,
        policies: mpsc::Sender<Query>,
        strict: bool,
        metrics: &'a Metrics,
    ) -> Self {
        Self {
            open,
            tables: None,
            changes,
            policies,
            strict,
            metrics,
            isolated: HashSet::new(),
            asked: Asked::default(),
            due: None,
            rest: Instant::now(),
            retry: SHORTEST_RETRY,
            failing: false,
            followed: Vec::new(),
            follow_at: Instant::now(),
        }
    }

    /// Works until the reconciler is gone.
    pub fn run(mut self) {
        loop {
            let follow = (!self.followed.is_empty()).then_some(self.follow_at);
            let next = self.due.into_iter().chain(follow).min();
            let received = match next {
                None => self.changes.recv().map_err(RecvTimeoutError::from),
                Some(at) => {
                    let wait = at.saturating_duration_since(Instant::now());
                    self.changes.recv_timeout(wait)
                }
            };
            let now = Instant::now();
            match received {
                Ok(changes) => self.take_over(&changes, now),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.due.is_some_and(|due| due <= now) {
                self.due = None;
                let asked = std::mem::take(&mut self.asked);
                let swept = self.sweep(&asked);
                // Where pods come and go all the time, a fifth of it is spent on looking.
                self.rest = Instant::now() + now.elapsed() * 4;
                match swept {
                    Ok(()) => {
                        self.failing = false;
                        self.retry = SHORTEST_RETRY;
                    }
                    Err(Broken::Kernel(error)) => {
                        self.asked.add(asked);
                        self.failed(&error);
                    }
                    Err(Broken::Unknown) => self.asked.add(asked),
                    Err(Broken::Over) => return,
                }
            }
            if self.follow_at <= now {
                self.follow();
            }
        }
    }

    fn take_over(&mut self, changes: &PolicyChanges, now: Instant) {
        if let Some(isolated) = &changes.isolated {
            self.isolated = isolated.iter().map(|(address, _)| *address).collect();
        }
        let others = changes.isolated.is_some() || changes.rewritten;
        self.asked.add(Asked {
            all: self.strict && others,
            addresses: changes.reassigned.iter().copied().collect(),
        });
        if self.asked.is_empty() {
            return;
        }
        let mut collected = now + COLLECT;
        if !self.asked.all {
            collected = collected.max(self.rest);
        }
        self.due = Some(self.due.map_or(collected, |due| due.min(collected)));
    }

    fn failed(&mut self, error: &ConntrackError) {
        // Of a dump that broke off, messages may be on their way.
        self.tables = None;
        if !std::mem::replace(&mut self.failing, true) {
            tracing::warn!(
                "{error}; until then connections live on that the network policies allow no more"
            );
        }
        self.due = Some(Instant::now() + self.retry);
        self.retry = (self.retry * 2).min(LONGEST_RETRY);
    }

    /// Looks for connections that the policies deny, and cuts them.
    fn sweep(&mut self, asked: &Asked) -> Result<(), Broken> {
        let isolated = &self.isolated;
        if isolated.is_empty() || asked.is_empty() {
            return Ok(());
        }
        let (table, remover) = match &mut self.tables {
            Some(tables) => tables,
            closed => closed.insert((self.open)()?),
        };
        let own: HashSet<IpAddr> = table.own_addresses().into_iter().collect();
        let mut batch = Batch {
            connections: Vec::new(),
            tracked: Vec::new(),
            policies: &self.policies,
            remover,
            followed: &mut self.followed,
            cut: 0,
            failed: None,
            broken: None,
        };
        let listed = Family::ALL
            .into_iter()
            .filter(|family| isolated.iter().any(|ip| Family::of(*ip) == *family))
            .try_for_each(|family| {
                table.list(family, &mut |tracked| {
                    let judged = judged(&tracked, isolated, &own);
                    if let Some(connection) = judged.filter(|it| asked.concerns(it)) {
                        batch.add(tracked, connection);
                    }
                })
            });
        batch.finish();
        self.metrics.connections_cut(batch.cut);
        if batch.cut > 0 {
            let cut = batch.cut;
            tracing::debug!("cut {cut} connections that the network policies allow no more");
        }
        if let Some(broken) = batch.broken {
            return Err(broken);
        }
        listed?;
        batch.failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Removes what came back the other way round.
    fn follow(&mut self) {
        let now = Instant::now();
        if let Some((_, remover)) = &mut self.tables {
            self.followed.retain(|(until, tracked)| {
                // Whatever speaks against it was said when the connection itself was cut.
                let _ = remover.remove(tracked, EntryToCut::Reversed);
                *until > now
            });
        } else {
            self.followed.clear();
        }
        self.follow_at = Instant::now() + FOLLOW_EVERY;
    }
}

/// Connections to be judged together.
struct Batch<'a, R> {
    connections: Vec<Connection>,
    /// The same, in the same order.
    tracked: Vec<Tracked>,
    policies: &'a mpsc::Sender<Query>,
    remover: &'a mut R,
    followed: &'a mut Vec<(Instant, Tracked)>,
    /// How many were cut.
    cut: usize,
    /// Why the first that could not be cut could not.
    failed: Option<ConntrackError>,
    /// Why no further connections are judged.
    broken: Option<Broken>,
}

impl<R: Remover> Batch<'_, R> {
    fn add(&mut self, tracked: Tracked, connection: Connection) {
        self.tracked.push(tracked);
        self.connections.push(connection);
        if self.connections.len() >= BATCH {
            self.finish();
        }
    }

    /// Has the connections judged that were added, and cuts those denied.
    fn finish(&mut self) {
        let connections = std::mem::take(&mut self.connections);
        let tracked = std::mem::take(&mut self.tracked);
        if connections.is_empty() || self.broken.is_some() {
            return;
        }
        let (answer, answered) = oneshot::channel();
        let question = Query::Judge {
            connections,
            answer,
        };
        let asked = self.policies.blocking_send(question).ok();
        let denied = match asked.and_then(|()| answered.blocking_recv().ok()) {
            Some(Some(denied)) => denied,
            Some(None) => {
                self.broken = Some(Broken::Unknown);
                return;
            }
            None => {
                self.broken = Some(Broken::Over);
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
        if may_return(tracked.protocol) && self.followed.len() < MOST_FOLLOWED {
            self.followed.push((Instant::now() + FOLLOW_FOR, tracked));
        }
    }
}

/// Whether an answer can open a connection. The tracking wants an opening packet of TCP and SCTP,
/// and of ICMP a question.
fn may_return(protocol: u8) -> bool {
    const ICMP: u8 = 1;
    const ICMPV6: u8 = 58;
    let [tcp, sctp] = [Protocol::Tcp, Protocol::Sctp].map(Protocol::number);
    ![tcp, sctp, ICMP, ICMPV6].contains(&protocol)
}

/// What the policies have to be asked about a connection; `None` if the rules would not judge it:
/// no isolated pod takes part in it, or the host itself opened it, so that it was never forwarded.
fn judged(
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
