//! Forgets clients with session affinity whose endpoint went away.
//!
//! Packets fill the affinity maps: (client, frontend) to the endpoint the client was sent to. It
//! is nftlet's task to remove the elements whose endpoint no longer serves the frontend; until
//! then their clients would go on to be sent there.
//!
//! ```text
//!  rules in force ── ServiceChanges ──> Forgetter, a thread of its own: reads the maps
//!      ^                                    │ 1,024 clients each
//!      └──────── Query::Remove ──────────┘ by the plans that it knows to be in force
//! ```
//!
//! [`Suspects`] collects, from the plans that change, which endpoints frontends lost. A map that is
//! full takes seconds to read. The clients found are judged by the newest plans: an endpoint may have
//! come back, or a client may have been sent to one that is new. A removal is refused if the plans in
//! force have changed since ([`Removed::Outdated`]), and then the clients are judged again.
//!
//! A client stays as long as its endpoint serves the frontend in any scope: which scope applies
//! depends on where the client is, and that only the rules can tell. Where the external policy
//! became Local, clients stay at the endpoints of this node only.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use crate::model::{Family, ObjectName, Protocol};
use crate::netlink;
use crate::nft::{Element, Op, Transaction, Value};
use crate::services::Claim;
use crate::services::{
    self, Clients, Route, Scope, ServiceChanges, ServicePlan, Target, address, number,
};
use crate::sync::{Kernel, Query, Removal, Removed};

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

/// The plans with session affinity in force, and the clients to look at.
#[derive(Debug, Default)]
struct View {
    plans: HashMap<ObjectName, Arc<ServicePlan>>,
    /// The services that have the frontends.
    owners: HashMap<Claim, ObjectName>,
    version: u64,
    suspects: Suspects,
}

impl View {
    fn take_over(&mut self, changes: &ServiceChanges) {
        for replaced in changes.replaced.iter().filter(|it| it.is_other_plan()) {
            let [old, new] = [&replaced.old, &replaced.new]
                .map(|plan| plan.as_ref().filter(|plan| plan.affinity.is_some()));
            if old.is_none() && new.is_none() {
                continue;
            }
            // Which policies become Local at the start shows in the kernel.
            if !replaced.adopted {
                self.suspects
                    .replace(old.map(|plan| &**plan), new.map(|plan| &**plan));
            }
            let service = &replaced.service;
            for frontend in old.iter().flat_map(|plan| &plan.frontends) {
                if self.owners.get(&frontend.at) == Some(service) {
                    self.owners.remove(&frontend.at);
                }
            }
            for frontend in new.iter().flat_map(|plan| &plan.frontends) {
                self.owners.insert(frontend.at, service.clone());
            }
            match new {
                Some(new) => self.plans.insert(service.clone(), new.clone()),
                None => self.plans.remove(service),
            };
        }
        let bound = &changes.removed.bound;
        for plan in self.plans.values().filter(|_| !bound.is_empty()) {
            self.suspects.bind(plan, bound);
        }
        for plan in self.plans.values().filter(|_| changes.rewritten) {
            self.suspects.all_of(plan);
        }
        self.version = changes.affinity_version;
    }

    /// The operations that forget those of some clients whose endpoint does not serve their frontend.
    fn removal(&self, map: &Map, suspects: &[Suspect]) -> Transaction {
        let kept = self.kept(map, suspects);
        let stale = suspects.iter().enumerate();
        let stale: Vec<Element> = stale
            .filter(|(index, _)| !kept.contains(index))
            .map(|(_, suspect)| suspect.element.clone())
            .collect();
        let (family, clients) = map;
        let delete = (!stale.is_empty()).then(|| {
            Op::DeleteElements(
                services::table_id(*family),
                clients.map(),
                services::affinity_declaration(),
                stale,
            )
        });
        Transaction {
            ops: delete.into_iter().collect(),
        }
    }

    /// Which of these clients, by their index, are at an endpoint of their frontend.
    fn kept(&self, map: &Map, suspects: &[Suspect]) -> HashSet<usize> {
        let mut services: BTreeMap<&ObjectName, HashMap<Claim, Vec<usize>>> = BTreeMap::new();
        for (index, Suspect { entry, .. }) in suspects.iter().enumerate() {
            // Where a service has the address, a port of the same number that another one has on
            // the nodes is not meant.
            let [address, node_port] = [entry.at_address(), entry.at_node_port()];
            let owner = self.owners.get(&address).map(|owner| (owner, address));
            let owner = owner.or_else(|| Some((self.owners.get(&node_port)?, node_port)));
            if let Some((owner, at)) = owner {
                let of_service = services.entry(owner).or_default();
                of_service.entry(at).or_default().push(index);
            }
        }
        let (family, clients) = map;
        let mut kept = HashSet::new();
        for (service, clients_of) in services {
            let Some(plan) = self.plans.get(service) else {
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
    let elements = match kernel.elements(&services::table_id(*family), clients.map().as_str()) {
        // The map went with the last service that used it.
        Err(error) if error.errno() == Some(libc::ENOENT) => Vec::new(),
        elements => elements?,
    };
    let suspects = elements.into_iter();
    Ok(suspects
        .filter_map(|element| of_map.suspect(*family, element))
        .collect())
}

/// Why clients could not be forgotten.
enum Failure {
    Kernel(netlink::Error),
    /// It is unknown what is in force.
    Unknown,
}

impl From<netlink::Error> for Failure {
    fn from(error: netlink::Error) -> Self {
        Failure::Kernel(error)
    }
}

/// Forgets clients, not too many at once. One that timed out between reading and deleting fails the
/// whole transaction: then each half is forgotten for itself, and what is gone is left.
fn in_batches(
    mut suspects: Vec<Suspect>,
    mut forget: impl FnMut(&[Suspect]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut batches = Vec::new();
    loop {
        let mut batch: Vec<Suspect> = match batches.pop() {
            Some(half) => half,
            None => suspects.split_off(suspects.len().saturating_sub(BATCH)),
        };
        if batch.is_empty() {
            return Ok(());
        }
        match forget(&batch) {
            Ok(()) => {}
            Err(Failure::Kernel(error)) if error.errno() == Some(libc::ENOENT) => {
                if batch.len() > 1 {
                    let half = batch.split_off(batch.len() / 2);
                    batches.extend([batch, half]);
                }
            }
            Err(failure) => return Err(failure),
        }
    }
}

/// Reads which clients are remembered, and has those removed whose endpoint is gone.
#[derive(Debug)]
pub struct Forgetter<O> {
    open: O,
    changes: Receiver<Arc<ServiceChanges>>,
    view: View,
    /// What failed, to be tried again with what comes next.
    failed: Suspects,
}

impl<K: Kernel, O: FnMut() -> Result<K, netlink::Error>> Forgetter<O> {
    /// Creates a forgetter that opens its kernel when it has something to do.
    pub fn new(open: O, changes: Receiver<Arc<ServiceChanges>>) -> Self {
        Self {
            open,
            changes,
            view: View::default(),
            failed: Suspects::default(),
        }
    }

    /// Works until no more changes come, asking the loop to remove clients. Meanwhile it calls `look`
    /// every so often.
    pub fn run(mut self, ask: &mpsc::Sender<Query>, every: Duration, mut look: impl FnMut()) {
        let mut looked = Instant::now();
        loop {
            let wait = every.saturating_sub(looked.elapsed());
            match self.changes.recv_timeout(wait) {
                Ok(changes) => self.view.take_over(&changes),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if looked.elapsed() >= every {
                looked = Instant::now();
                look();
            }
            self.work(|transaction, affinity_version| {
                let (answer, answered) = oneshot::channel();
                let question = Query::Remove(Removal {
                    transaction,
                    affinity_version,
                    answer,
                });
                let asked = ask.blocking_send(question).ok();
                // When the loop has ended its rules stay, and so do the clients.
                let answer = asked.and_then(|()| answered.blocking_recv().ok());
                answer.unwrap_or(Removed::Unknown)
            });
        }
    }

    /// Forgets the clients that the changes so far concern. `remove` writes a transaction for which so
    /// many changes of services with session affinity were taken into account.
    pub fn work(&mut self, mut remove: impl FnMut(Transaction, u64) -> Removed) {
        self.take_over_all();
        loop {
            let failed = std::mem::take(&mut self.failed);
            let failed_before: HashSet<Map> = failed.0.keys().cloned().collect();
            let mut suspects = std::mem::take(&mut self.view.suspects);
            suspects.merge(failed);
            for (map, of_map) in suspects.0 {
                let again = failed_before.contains(&map);
                if !self.attempts(&map, &of_map, again, &mut remove) {
                    self.failed.add(map, of_map);
                }
            }
            if self.view.suspects.0.is_empty() {
                return;
            }
        }
    }

    fn take_over_all(&mut self) {
        while let Ok(changes) = self.changes.try_recv() {
            self.view.take_over(&changes);
        }
    }

    /// Forgets clients of a map, and tries again what fails. Returns whether it succeeded in the end.
    /// `again` says that the map failed before, and that this was logged.
    fn attempts(
        &mut self,
        map: &Map,
        of_map: &OfMap,
        again: bool,
        remove: &mut impl FnMut(Transaction, u64) -> Removed,
    ) -> bool {
        for attempt in 1..=ATTEMPTS {
            let error = match self.forget(map, of_map, remove) {
                Ok(()) => return true,
                Err(Failure::Unknown) => return false,
                Err(Failure::Kernel(error)) => error,
            };
            if attempt < ATTEMPTS || again {
                tracing::debug!("session affinity: {error}");
            } else {
                tracing::warn!(
                    "{error}; clients with session affinity of services in namespace {} may stay \
                     with {} endpoints that are gone until another attempt succeeds",
                    map.1.namespace(),
                    map.0
                );
            }
        }
        false
    }

    fn forget(
        &mut self,
        map: &Map,
        of_map: &OfMap,
        remove: &mut impl FnMut(Transaction, u64) -> Removed,
    ) -> Result<(), Failure> {
        let found = read(&mut (self.open)()?, map, of_map)?;
        in_batches(found, |batch| {
            loop {
                let transaction = self.view.removal(map, batch);
                if transaction.is_empty() {
                    return Ok(());
                }
                match remove(transaction, self.view.version) {
                    Removed::Done => return Ok(()),
                    Removed::Outdated => self.take_over_all(),
                    Removed::Unknown => return Err(Failure::Unknown),
                    Removed::Failed(error) => return Err(error.into()),
                }
            }
        })
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
