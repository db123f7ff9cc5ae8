//! Forgetting clients whose endpoint went away.
//!
//! Packets fill the affinity maps: (client, frontend) to the endpoint the client was sent to. It
//! is nftlet's task to remove the elements whose endpoint no longer serves the frontend; until
//! then their clients would go on to be sent there.
//!
//! ```text
//!  Reconciler ── Suspects ──> queue() ──> Forgetter, a thread of its own: reads the maps
//!      ^   (after the rules stand)             │ 1,024 clients each
//!      └──────── Question::Forget ─────────────┘ judged by the plans in force, and deleted
//! ```
//!
//! [`Suspects`] collects, from the plans that change, which endpoints frontends lost. A map that is
//! full takes seconds to read, for which no change may wait. The clients found are judged where the
//! plans are kept: meanwhile an endpoint may have come back, or a client may have been sent to one
//! that is new.
//!
//! A client stays as long as its endpoint serves the frontend in any scope: which scope applies
//! depends on where the client is, and that only the rules can tell. Where the external policy
//! became Local, clients stay at the endpoints of this node only.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SendError, Sender, channel};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::questions::Question;
use super::{Kernel, Reconciler, State};
use crate::compile::{self, Clients, Route, Scope, ServicePlan, Target};
use crate::model::{Claim, Family, ObjectName, Protocol};
use crate::netlink;
use crate::ruleset::{Element, Op, Transaction, Value};

/// How often it is attempted in a row to forget clients.
const ATTEMPTS: usize = 8;
/// The most clients that are judged and forgotten at once.
const BATCH: usize = 1024;

/// A map of remembered clients.
type Map = (Family, Clients);

/// The clients that may be left without their endpoint.
#[derive(Debug, Default)]
pub struct Suspects(HashMap<Map, OfMap>);

/// Those in one map.
#[derive(Debug, Default)]
struct OfMap {
    /// All that are in it.
    all: bool,
    of_frontend: HashMap<Claim, OfFrontend>,
}

/// Those of one frontend.
#[derive(Debug, Default)]
struct OfFrontend {
    /// Those at these endpoints.
    lost: BTreeSet<Target>,
    /// All of them, because only the endpoints of this node count from now on.
    bound: bool,
}

impl Suspects {
    /// Notes that all clients of a plan are to be looked at.
    pub fn all_of(&mut self, plan: &ServicePlan) {
        let Some(affinity) = &plan.affinity else {
            return;
        };
        for (_, pool) in plan.reach() {
            self.of_map(pool.family, &affinity.clients).all = true;
        }
    }

    /// Notes that clients of these frontends are bound to this node from now on, as far as the
    /// frontends are of a plan.
    pub fn bind(&mut self, plan: &ServicePlan, bound: &HashSet<(Family, Claim)>) {
        let Some(affinity) = &plan.affinity else {
            return;
        };
        for (frontend, pool) in plan.reach() {
            if bound.contains(&(pool.family, frontend.at)) {
                let of_map = self.of_map(pool.family, &affinity.clients);
                of_map.of_frontend.entry(frontend.at).or_default().bound = true;
            }
        }
    }

    /// Notes that a plan replaces another.
    pub fn replace(&mut self, old: Option<&ServicePlan>, new: Option<&ServicePlan>) {
        let [old, new] = [old, new].map(|plan| plan.filter(|plan| plan.affinity.is_some()));
        let (before, mut after) = (targets(old), targets(new));
        let clients = |plan: Option<&ServicePlan>| Some(plan?.affinity.as_ref()?.clients.clone());
        let (clients_before, clients_after) = (clients(old), clients(new));
        for (clients, ((family, at), before)) in clients_before.iter().cycle().zip(before) {
            let now = after.remove(&(family, at)).unwrap_or_default();
            let lost: Vec<Target> = before.targets.difference(&now.targets).copied().collect();
            let bound = now.bound && !before.bound;
            if lost.is_empty() && !bound {
                continue;
            }
            let of_map = self.of_map(family, clients);
            let of_frontend = of_map.of_frontend.entry(at).or_default();
            of_frontend.lost.extend(lost);
            of_frontend.bound |= bound;
        }
        // Another service of the namespace may have had these, and bound nobody.
        let fresh = after.into_iter().filter(|(_, endpoints)| endpoints.bound);
        for (clients, ((family, at), _)) in clients_after.iter().cycle().zip(fresh) {
            let of_map = self.of_map(family, clients);
            of_map.of_frontend.entry(at).or_default().bound = true;
        }
    }

    /// Notes that clients that are to be bound to this node are not yet.
    fn put_back(&mut self, (family, clients): &Map, suspects: &[Suspect]) {
        for at in suspects.iter().filter_map(|suspect| suspect.bound) {
            let of_map = self.of_map(*family, clients);
            of_map.of_frontend.entry(at).or_default().bound = true;
        }
    }

    fn of_map(&mut self, family: Family, clients: &Clients) -> &mut OfMap {
        self.0.entry((family, clients.clone())).or_default()
    }

    /// Adds what other changes did.
    pub fn merge(&mut self, others: Self) {
        for (map, of_map) in others.0 {
            self.add(map, of_map);
        }
    }

    fn add(&mut self, map: Map, of_map: OfMap) {
        let into = self.0.entry(map).or_default();
        into.all |= of_map.all;
        for (at, of_frontend) in of_map.of_frontend {
            let into = into.of_frontend.entry(at).or_default();
            into.lost.extend(of_frontend.lost);
            into.bound |= of_frontend.bound;
        }
    }
}

impl OfMap {
    /// An element as a suspect, if it is one.
    fn suspect(&self, family: Family, element: Element) -> Option<Suspect> {
        let entry = Entry::read(family, &element)?;
        let of_frontend: Vec<_> = [entry.at_address(), entry.at_node_port()]
            .into_iter()
            .filter_map(|at| Some((at, self.of_frontend.get(&at)?)))
            .collect();
        let mut bound = of_frontend.iter().filter(|(_, it)| it.bound);
        let bound = bound.next().map(|(at, _)| *at);
        let lost = |(_, it): &(Claim, &OfFrontend)| it.lost.contains(&entry.target);
        let lost = of_frontend.iter().any(lost);
        (self.all || bound.is_some() || lost).then_some(Suspect {
            element,
            entry,
            bound,
        })
    }
}

/// The endpoints of a frontend.
#[derive(Default)]
struct Endpoints {
    targets: HashSet<Target>,
    /// The external policy is Local.
    bound: bool,
}

/// The endpoints of each frontend, in any scope.
fn targets(plan: Option<&ServicePlan>) -> HashMap<(Family, Claim), Endpoints> {
    let mut found: HashMap<(Family, Claim), Endpoints> = HashMap::new();
    for (frontend, pool) in plan.into_iter().flat_map(ServicePlan::reach) {
        let endpoints = found.entry((pool.family, frontend.at)).or_default();
        endpoints.targets.extend(&pool.targets);
        endpoints.bound = matches!(frontend.route, Route::LocalPolicy { .. });
    }
    found
}

/// A client that may be left without its endpoint.
#[derive(Clone, Debug)]
pub struct Suspect {
    element: Element,
    entry: Entry,
    /// The frontend for which only endpoints of this node count, if it has such.
    bound: Option<Claim>,
}

impl<K: Kernel> Reconciler<'_, K> {
    /// Forgets the clients noted that are remembered for an endpoint that went away, or has it done
    /// by the thread for that.
    ///
    /// This follows the transaction that took the endpoint away: the other way round a client
    /// could be sent there, and be remembered for it, once more.
    pub(super) fn forget(&mut self) {
        let suspects = std::mem::take(&mut self.clients);
        if suspects.0.is_empty() {
            return;
        }
        let suspects = match &self.forgetter {
            // A thread that is gone has panicked.
            Some(queue) => match queue.send(suspects) {
                Ok(()) => return,
                Err(unsent) => unsent.0,
            },
            None => suspects,
        };
        for (map, of_map) in suspects.0 {
            let done = attempts(&map, false, || {
                let found = read(&mut self.kernel, &map, &of_map)?;
                in_batches(found, |batch| self.forget_some(&map, batch))
            });
            if !done {
                self.clients.add(map, of_map);
            }
        }
    }

    /// Forgets those of some clients whose endpoint does not serve their frontend, by the plans in
    /// force. While it is unknown what is in force nobody is forgotten: when it is known again, all
    /// are looked at. Who is to be bound to this node is noted until then.
    pub(super) fn forget_some(
        &mut self,
        map: &Map,
        suspects: Vec<Suspect>,
    ) -> Result<(), netlink::Error> {
        if self.state != State::Synced {
            self.clients.put_back(map, &suspects);
            return Ok(());
        }
        let kept = self.kept(map, &suspects);
        let stale = suspects.into_iter().enumerate();
        let stale: Vec<Element> = stale
            .filter(|(index, _)| !kept.contains(index))
            .map(|(_, suspect)| suspect.element)
            .collect();
        if stale.is_empty() {
            return Ok(());
        }
        let (family, clients) = map;
        let delete = Op::DeleteElements(
            compile::table_id(*family),
            clients.map(),
            compile::affinity_declaration(),
            stale,
        );
        self.write(Transaction { ops: vec![delete] })
    }

    /// Which of these clients, by their index, are at an endpoint of their frontend.
    fn kept(&self, map: &Map, suspects: &[Suspect]) -> HashSet<usize> {
        let mut services: BTreeMap<&ObjectName, HashMap<Claim, Vec<usize>>> = BTreeMap::new();
        for (index, Suspect { entry, .. }) in suspects.iter().enumerate() {
            // Where a service has the address, a port of the same number that another one has on
            // the nodes is not meant.
            let [address, node_port] = [entry.at_address(), entry.at_node_port()];
            let owner = self.store.owner(&address).map(|owner| (owner, address));
            let owner = owner.or_else(|| Some((self.store.owner(&node_port)?, node_port)));
            if let Some((owner, at)) = owner {
                let of_service = services.entry(owner).or_default();
                of_service.entry(at).or_default().push(index);
            }
        }
        let (family, clients) = map;
        let mut kept = HashSet::new();
        for (service, clients_of) in services {
            let Some(plan) = self.programmed.plan(service) else {
                continue;
            };
            if plan.affinity.as_ref().map(|it| &it.clients) != Some(clients) {
                continue;
            }
            for (frontend, pool) in plan.reach().filter(|(_, pool)| pool.family == *family) {
                let Some(of_frontend) = clients_of.get(&frontend.at) else {
                    continue;
                };
                let bound = matches!(frontend.route, Route::LocalPolicy { .. });
                let elsewhere = bound && pool.scope == Scope::Cluster;
                let judged = of_frontend.iter().filter_map(|index| {
                    let suspect = suspects.get(*index)?;
                    (!(suspect.bound.is_some() && elsewhere))
                        .then_some((suspect.entry.target, *index))
                });
                let mut at: HashMap<Target, Vec<usize>> = HashMap::new();
                judged.for_each(|(target, index)| at.entry(target).or_default().push(index));
                let serving = pool.targets.iter().filter_map(|target| at.get(target));
                kept.extend(serving.flatten());
            }
        }
        kept
    }
}

/// The suspects in a map.
fn read(
    kernel: &mut impl Kernel,
    map: &Map,
    of_map: &OfMap,
) -> Result<Vec<Suspect>, netlink::Error> {
    let (family, clients) = map;
    let elements = match kernel.elements(&compile::table_id(*family), clients.map().as_str()) {
        // The map went with the last service that used it.
        Err(error) if error.errno() == Some(libc::ENOENT) => Vec::new(),
        elements => elements?,
    };
    let suspects = elements.into_iter();
    Ok(suspects
        .filter_map(|element| of_map.suspect(*family, element))
        .collect())
}

/// Forgets clients, not too many at once. One that timed out between reading and deleting fails the
/// whole transaction: then each half is forgotten for itself, and what is gone is left.
fn in_batches(
    mut suspects: Vec<Suspect>,
    mut forget: impl FnMut(Vec<Suspect>) -> Result<(), netlink::Error>,
) -> Result<(), netlink::Error> {
    let mut batches = Vec::new();
    loop {
        let mut batch: Vec<Suspect> = match batches.pop() {
            Some(half) => half,
            None => suspects.split_off(suspects.len().saturating_sub(BATCH)),
        };
        if batch.is_empty() {
            return Ok(());
        }
        match forget(batch.clone()) {
            Ok(()) => {}
            Err(error) if error.errno() == Some(libc::ENOENT) => {
                if batch.len() > 1 {
                    let half = batch.split_off(batch.len() / 2);
                    batches.extend([batch, half]);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// Tries again what fails. Returns whether it succeeded in the end. `again` says that the map failed
/// before, and that this was logged.
fn attempts(
    map: &Map,
    again: bool,
    mut forget: impl FnMut() -> Result<(), netlink::Error>,
) -> bool {
    for attempt in 1..=ATTEMPTS {
        match forget() {
            Ok(()) => return true,
            Err(error) if attempt < ATTEMPTS || again => {
                tracing::debug!("session affinity: {error}")
            }
            Err(error) => tracing::warn!(
                "{error}; clients with session affinity of services in namespace {} may stay with \
                 {} endpoints that are gone until another attempt succeeds",
                map.1.namespace(),
                map.0
            ),
        }
    }
    false
}

/// Some clients of a map that may have to be forgotten.
#[derive(Debug)]
pub struct Forget {
    pub(super) map: Map,
    pub(super) suspects: Vec<Suspect>,
    /// Who waits for it to be done.
    pub(super) answer: oneshot::Sender<Result<(), netlink::Error>>,
}

/// Makes the queue from the reconciler to a [`Forgetter`].
pub fn queue() -> (Queue, Received) {
    let (sender, receiver) = channel();
    (Queue(sender), Received(receiver))
}

/// The reconciler's end of the queue. The [`Forgetter`] ends when it goes away.
#[derive(Debug)]
pub struct Queue(Sender<Suspects>);

impl Queue {
    fn send(&self, suspects: Suspects) -> Result<(), SendError<Suspects>> {
        self.0.send(suspects)
    }
}

/// The other end of a [`Queue`].
#[derive(Debug)]
pub struct Received(Receiver<Suspects>);

impl Received {
    /// All that waits, as soon as there is something; nothing after so long, and `None` at the end.
    fn next(&self, within: Duration) -> Option<Suspects> {
        let mut suspects = match self.0.recv_timeout(within) {
            Ok(suspects) => suspects,
            Err(RecvTimeoutError::Timeout) => Suspects::default(),
            Err(RecvTimeoutError::Disconnected) => return None,
        };
        self.0.try_iter().for_each(|more| suspects.merge(more));
        Some(suspects)
    }
}

/// Reads who is remembered, on a thread of its own, and asks the reconciler to forget those whose
/// endpoint is gone.
#[derive(Debug)]
pub struct Forgetter<K> {
    open: fn() -> Result<K, netlink::Error>,
    received: Received,
    ask: mpsc::Sender<Question>,
}

impl<K: Kernel> Forgetter<K> {
    /// A forgetter that opens its kernel when it has something to do.
    pub fn new(
        open: fn() -> Result<K, netlink::Error>,
        received: Received,
        ask: mpsc::Sender<Question>,
    ) -> Self {
        Self {
            open,
            received,
            ask,
        }
    }

    /// Works until the reconciler is gone. Meanwhile it calls `look` every so often.
    pub fn run(self, every: Duration, mut look: impl FnMut()) {
        let mut looked = Instant::now();
        // What failed is tried again with what comes next.
        let mut failed = Suspects::default();
        while let Some(mut suspects) = self.received.next(every.saturating_sub(looked.elapsed())) {
            if looked.elapsed() >= every {
                looked = Instant::now();
                look();
            }
            let before = std::mem::take(&mut failed);
            let failed_before: HashSet<Map> = before.0.keys().cloned().collect();
            suspects.merge(before);
            for (map, of_map) in suspects.0 {
                let done = attempts(&map, failed_before.contains(&map), || {
                    let found = read(&mut (self.open)()?, &map, &of_map)?;
                    in_batches(found, |batch| self.forget(&map, batch))
                });
                if !done {
                    failed.add(map, of_map);
                }
            }
        }
    }

    fn forget(&self, map: &Map, suspects: Vec<Suspect>) -> Result<(), netlink::Error> {
        let (answer, answered) = oneshot::channel();
        let question = Question::Forget(Forget {
            map: map.clone(),
            suspects,
            answer,
        });
        match self.ask.blocking_send(question) {
            Ok(()) => answered.blocking_recv().unwrap_or(Ok(())),
            // The reconciler is gone, and its rules stay.
            Err(_) => Ok(()),
        }
    }
}

/// An element of an affinity map.
#[derive(Clone, Debug)]
struct Entry {
    address: IpAddr,
    protocol: Protocol,
    port: u16,
    target: Target,
}

impl Entry {
    fn read(family: Family, element: &Element) -> Option<Self> {
        let Value::Data(data) = &element.value else {
            return None;
        };
        let length = match family {
            Family::V4 => 4,
            Family::V6 => 16,
        };
        let (_, frontend) = element.key.as_bytes().split_at_checked(length)?;
        let (at, rest) = frontend.split_at_checked(length)?;
        let protocol = match rest.first()? {
            6 => Protocol::Tcp,
            17 => Protocol::Udp,
            132 => Protocol::Sctp,
            _ => return None,
        };
        let (endpoint, endpoint_port) = data.as_bytes().split_at_checked(length)?;
        Some(Self {
            address: address(at)?,
            protocol,
            port: number(rest.get(4..)?)?,
            target: (address(endpoint)?, number(endpoint_port)?),
        })
    }

    fn at_address(&self) -> Claim {
        Claim::Address(self.address, self.protocol, self.port)
    }

    fn at_node_port(&self) -> Claim {
        Claim::NodePort(self.protocol, self.port)
    }
}

pub(super) fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}

pub(super) fn number(bytes: &[u8]) -> Option<u16> {
    let (port, _) = bytes.split_first_chunk::<2>()?;
    Some(u16::from_be_bytes(*port))
}
