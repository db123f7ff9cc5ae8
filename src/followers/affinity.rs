//! Removes session affinity to endpoints that no longer serve.
//!
//! Packets fill the affinity maps, from client and frontend to the endpoint. Elements whose endpoint
//! no longer serves the frontend must be removed, since otherwise the client's packets are still sent
//! there.
//!
//! ```text
//!  rules in force ── ServiceChanges ──> Forgetter, a thread of its own: reads the maps,
//!      ^                                    │ evaluates 1,024 clients at a time
//!      └─────────── Query::Remove ──────────┘ by the newest plans in force
//! ```
//!
//! [`StaleAffinity`] collects the endpoints that frontends lost. Reading a full map takes seconds, and
//! meanwhile an endpoint may have been added again. Therefore the clients found are evaluated by the
//! newest plans. If the plans in force changed since ([`RemovalOutcome::Outdated`]), the removal is
//! refused and the clients are evaluated again.
//!
//! The affinity of a client is valid if its endpoint serves the frontend in any scope, since only the
//! rules know the client's scope. If the external traffic policy became Local, only endpoints of this
//! node are valid.

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
    self, Clients, EndpointScope, Route, ServiceChanges, ServicePlan, Target, address, port, target,
};
use crate::sync::{ElementRemoval, Kernel, Query, RemovalOutcome};

/// The number of successive attempts for a map.
const ATTEMPTS: usize = 8;
/// The most clients that are evaluated and removed at once.
const BATCH: usize = 1024;

type AffinityMap = (Family, Clients);

/// Clients whose affinity may be stale.
#[derive(Debug, Default)]
pub(crate) struct StaleAffinity(HashMap<AffinityMap, MapCandidates>);

/// The clients in one map.
#[derive(Debug, Default)]
struct MapCandidates {
    /// All clients in the map.
    all: bool,
    of_frontend: HashMap<Claim, FrontendCandidates>,
}

/// The clients of one frontend.
#[derive(Debug, Default)]
struct FrontendCandidates {
    /// Those with affinity to these endpoints.
    lost: BTreeSet<Target>,
    /// All of them, because only endpoints of this node are valid from now on.
    became_local: bool,
}

impl StaleAffinity {
    /// Adds all clients of a plan.
    pub(crate) fn add_all(&mut self, plan: &ServicePlan) {
        let Some(affinity) = &plan.affinity else {
            return;
        };
        for (_, pool) in plan.reach() {
            self.of_map(pool.family, &affinity.clients).all = true;
        }
    }

    /// Adds the clients of a plan's frontends in `became_local`, for which only endpoints of this
    /// node are valid from now on.
    pub(crate) fn add_became_local(
        &mut self,
        plan: &ServicePlan,
        became_local: &HashSet<(Family, Claim)>,
    ) {
        let Some(affinity) = &plan.affinity else {
            return;
        };
        for (frontend, pool) in plan.reach() {
            if became_local.contains(&(pool.family, frontend.at)) {
                let of_map = self.of_map(pool.family, &affinity.clients);
                of_map
                    .of_frontend
                    .entry(frontend.at)
                    .or_default()
                    .became_local = true;
            }
        }
    }

    /// Adds the clients that may be stale after a plan replaced another.
    pub(crate) fn replace(&mut self, old: Option<&ServicePlan>, new: Option<&ServicePlan>) {
        let [old, new] = [old, new].map(|plan| plan.filter(|plan| plan.affinity.is_some()));
        let (before, mut after) = (targets(old), targets(new));
        let clients = |plan: Option<&ServicePlan>| Some(plan?.affinity.as_ref()?.clients.clone());
        if let Some(clients) = clients(old) {
            for ((family, at), before) in before {
                let now = after.remove(&(family, at)).unwrap_or_default();
                let lost: Vec<Target> = before.targets.difference(&now.targets).copied().collect();
                let became_local = now.local_policy && !before.local_policy;
                if lost.is_empty() && !became_local {
                    continue;
                }
                let of_map = self.of_map(family, &clients);
                let of_frontend = of_map.of_frontend.entry(at).or_default();
                of_frontend.lost.extend(lost);
                of_frontend.became_local |= became_local;
            }
        }
        // Another service of the namespace may have had these frontends with the policy Cluster.
        if let Some(clients) = clients(new) {
            let fresh = after
                .into_iter()
                .filter(|(_, endpoints)| endpoints.local_policy);
            for ((family, at), _) in fresh {
                let of_map = self.of_map(family, &clients);
                of_map.of_frontend.entry(at).or_default().became_local = true;
            }
        }
    }

    fn of_map(&mut self, family: Family, clients: &Clients) -> &mut MapCandidates {
        self.0.entry((family, clients.clone())).or_default()
    }

    /// Merges other changes.
    pub(crate) fn merge(&mut self, others: Self) {
        for (map, of_map) in others.0 {
            self.add(map, of_map);
        }
    }

    fn add(&mut self, map: AffinityMap, of_map: MapCandidates) {
        let into = self.0.entry(map).or_default();
        into.all |= of_map.all;
        for (at, of_frontend) in of_map.of_frontend {
            let into = into.of_frontend.entry(at).or_default();
            into.lost.extend(of_frontend.lost);
            into.became_local |= of_frontend.became_local;
        }
    }
}

impl MapCandidates {
    /// Parses an element; `None` unless its affinity may be stale.
    fn candidate(&self, family: Family, element: Element) -> Option<Candidate> {
        let entry = AffinityEntry::read(family, &element)?;
        let of_frontend: Vec<_> = [entry.at_address(), entry.at_node_port()]
            .into_iter()
            .filter_map(|at| Some((at, self.of_frontend.get(&at)?)))
            .collect();
        let mut became_local = of_frontend.iter().filter(|(_, it)| it.became_local);
        let became_local = became_local.next().map(|(at, _)| *at);
        let lost = |(_, it): &(Claim, &FrontendCandidates)| it.lost.contains(&entry.target);
        let lost = of_frontend.iter().any(lost);
        (self.all || became_local.is_some() || lost).then_some(Candidate {
            element,
            entry,
            became_local,
        })
    }
}

/// The endpoints of a frontend.
#[derive(Default)]
struct Endpoints {
    targets: HashSet<Target>,
    /// Whether the external traffic policy is Local.
    local_policy: bool,
}

/// Returns the endpoints of each frontend in all scopes.
fn targets(plan: Option<&ServicePlan>) -> HashMap<(Family, Claim), Endpoints> {
    let mut found: HashMap<(Family, Claim), Endpoints> = HashMap::new();
    for (frontend, pool) in plan.into_iter().flat_map(ServicePlan::reach) {
        let endpoints = found.entry((pool.family, frontend.at)).or_default();
        endpoints.targets.extend(&pool.targets);
        endpoints.local_policy = matches!(frontend.route, Route::LocalPolicy { .. });
    }
    found
}

/// A client whose affinity may be stale.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    element: Element,
    entry: AffinityEntry,
    /// The frontend, if only endpoints of this node are valid for it.
    became_local: Option<Claim>,
}

/// The plans in force that have session affinity, and the clients to check.
#[derive(Debug, Default)]
struct PlansInForce {
    plans: HashMap<ObjectName, Arc<ServicePlan>>,
    /// The service of each frontend.
    owners: HashMap<Claim, ObjectName>,
    version: u64,
    candidates: StaleAffinity,
    /// Whether to retry failed removals although no further client needs a check.
    retry: bool,
}

impl PlansInForce {
    fn receive(&mut self, changes: &ServiceChanges) {
        for replaced in changes.replaced.iter().filter(|it| it.is_other_plan()) {
            let [old, new] = [&replaced.old, &replaced.new]
                .map(|plan| plan.as_ref().filter(|plan| plan.affinity.is_some()));
            if old.is_none() && new.is_none() {
                continue;
            }
            // After a start, comparison with the kernel shows which policies became Local.
            if !replaced.adopted {
                self.candidates
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
        let became_local = &changes.removed.became_local;
        for plan in self.plans.values().filter(|_| !became_local.is_empty()) {
            self.candidates.add_became_local(plan, became_local);
        }
        for plan in self.plans.values().filter(|_| changes.rewritten) {
            self.candidates.add_all(plan);
        }
        self.retry |= changes.rewritten;
        self.version = changes.affinity_version;
    }

    /// Returns the operations that remove those clients whose endpoint does not serve the frontend.
    fn removal(&self, map: &AffinityMap, candidates: &[Candidate]) -> Transaction {
        let valid = self.valid(map, candidates);
        let stale = candidates.iter().enumerate();
        let stale: Vec<Element> = stale
            .filter(|(index, _)| !valid.contains(index))
            .map(|(_, candidate)| candidate.element.clone())
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

    /// Returns the indices of the clients whose endpoint serves the frontend.
    fn valid(&self, map: &AffinityMap, candidates: &[Candidate]) -> HashSet<usize> {
        let mut services: BTreeMap<&ObjectName, HashMap<Claim, Vec<usize>>> = BTreeMap::new();
        for (index, Candidate { entry, .. }) in candidates.iter().enumerate() {
            // The address of a service takes precedence over another service's NodePort with the same
            // number.
            let [address, node_port] = [entry.at_address(), entry.at_node_port()];
            let owner = self.owners.get(&address).map(|owner| (owner, address));
            let owner = owner.or_else(|| Some((self.owners.get(&node_port)?, node_port)));
            if let Some((owner, at)) = owner {
                let of_service = services.entry(owner).or_default();
                of_service.entry(at).or_default().push(index);
            }
        }
        let (family, clients) = map;
        let mut valid = HashSet::new();
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
                let local_policy = matches!(frontend.route, Route::LocalPolicy { .. });
                let elsewhere = local_policy && pool.scope == EndpointScope::Cluster;
                let checked = of_frontend.iter().filter_map(|index| {
                    let candidate = candidates.get(*index)?;
                    (!(candidate.became_local.is_some() && elsewhere))
                        .then_some((candidate.entry.target, *index))
                });
                let mut at: HashMap<Target, Vec<usize>> = HashMap::new();
                checked.for_each(|(target, index)| at.entry(target).or_default().push(index));
                let serving = pool.targets.iter().filter_map(|target| at.get(target));
                valid.extend(serving.flatten());
            }
        }
        valid
    }
}

/// Reads the clients of a map whose affinity may be stale.
fn read(
    kernel: &mut impl Kernel,
    map: &AffinityMap,
    of_map: &MapCandidates,
) -> Result<Vec<Candidate>, netlink::Error> {
    let (family, clients) = map;
    let elements = match kernel.elements(&services::table_id(*family), clients.map().as_str()) {
        // The map was removed with the last service that used it.
        Err(error) if error.errno() == Some(libc::ENOENT) => Vec::new(),
        elements => elements?,
    };
    let candidates = elements.into_iter();
    Ok(candidates
        .filter_map(|element| of_map.candidate(*family, element))
        .collect())
}

/// The reason why clients could not be removed.
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

/// Removes clients in batches. An element that timed out after it was read fails its whole transaction;
/// the batch is then bisected, and elements that no longer exist are skipped.
fn in_batches(
    mut candidates: Vec<Candidate>,
    mut forget: impl FnMut(&[Candidate]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut batches = Vec::new();
    loop {
        let mut batch: Vec<Candidate> = match batches.pop() {
            Some(half) => half,
            None => candidates.split_off(candidates.len().saturating_sub(BATCH)),
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

/// Reads affinity maps, and has stale elements removed.
#[derive(Debug)]
pub(crate) struct Forgetter<K, O> {
    open: O,
    /// Kept between tasks: where a netfilter socket is closed after a transaction, the kernel holds
    /// up the next one for a grace period of RCU, about 20 ms.
    kernel: Option<K>,
    changes: Receiver<Arc<ServiceChanges>>,
    view: PlansInForce,
    /// Clients to retry with the next ones, or after a while.
    failed: StaleAffinity,
}

impl<K: Kernel, O: FnMut() -> Result<K, netlink::Error>> Forgetter<K, O> {
    /// Creates a forgetter that opens its kernel connection for its first task, and again after a
    /// failure.
    pub(crate) fn new(open: O, changes: Receiver<Arc<ServiceChanges>>) -> Self {
        Self {
            open,
            kernel: None,
            changes,
            view: PlansInForce::default(),
            failed: StaleAffinity::default(),
        }
    }

    /// Runs until no more changes come, and sends removals to the main loop. Calls `look` at intervals of
    /// `every`.
    pub(crate) fn run(
        mut self,
        ask: &mpsc::Sender<Query>,
        every: Duration,
        mut look: impl FnMut(),
    ) {
        let mut looked = Instant::now();
        loop {
            let wait = every.saturating_sub(looked.elapsed());
            match self.changes.recv_timeout(wait) {
                Ok(changes) => self.view.receive(&changes),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if looked.elapsed() >= every {
                looked = Instant::now();
                look();
                self.view.retry = true;
            }
            self.work(|transaction, affinity_version| {
                let (answer, answered) = oneshot::channel();
                let query = Query::Remove(ElementRemoval {
                    transaction,
                    affinity_version,
                    answer,
                });
                let asked = ask.blocking_send(query).ok();
                // The main loop has ended; its rules and affinity stay in force.
                let answer = asked.and_then(|()| answered.blocking_recv().ok());
                answer.unwrap_or(RemovalOutcome::Unknown)
            });
        }
    }

    /// Removes stale clients after the changes so far. `remove` writes a transaction that is valid after
    /// a number of changes of services with session affinity.
    pub(crate) fn work(&mut self, mut remove: impl FnMut(Transaction, u64) -> RemovalOutcome) {
        self.receive_all();
        loop {
            // Changes that concern no client may be frequent, and reading a large map takes seconds.
            let retry = std::mem::take(&mut self.view.retry);
            if self.view.candidates.0.is_empty() && !retry {
                return;
            }
            let failed = std::mem::take(&mut self.failed);
            let failed_before: HashSet<AffinityMap> = failed.0.keys().cloned().collect();
            let mut candidates = std::mem::take(&mut self.view.candidates);
            candidates.merge(failed);
            for (map, of_map) in candidates.0 {
                let again = failed_before.contains(&map);
                if !self.attempts(&map, &of_map, again, &mut remove) {
                    self.failed.add(map, of_map);
                }
            }
        }
    }

    fn receive_all(&mut self) {
        while let Ok(changes) = self.changes.try_recv() {
            self.view.receive(&changes);
        }
    }

    /// Removes stale clients of a map, with several attempts. Returns whether it succeeded. `again` says
    /// that a failure for this map was logged before.
    fn attempts(
        &mut self,
        map: &AffinityMap,
        of_map: &MapCandidates,
        again: bool,
        remove: &mut impl FnMut(Transaction, u64) -> RemovalOutcome,
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
                    "{error}; clients with session affinity to services in namespace {} may be sent to \
                     removed {} endpoints until a retry succeeds",
                    map.1.namespace(),
                    map.0
                );
            }
        }
        false
    }

    fn forget(
        &mut self,
        map: &AffinityMap,
        of_map: &MapCandidates,
        remove: &mut impl FnMut(Transaction, u64) -> RemovalOutcome,
    ) -> Result<(), Failure> {
        let mut kernel = match self.kernel.take() {
            Some(kernel) => kernel,
            None => (self.open)()?,
        };
        let found = read(&mut kernel, map, of_map)?;
        self.kernel = Some(kernel);
        in_batches(found, |batch| {
            loop {
                let transaction = self.view.removal(map, batch);
                if transaction.is_empty() {
                    return Ok(());
                }
                match remove(transaction, self.view.version) {
                    RemovalOutcome::Done => return Ok(()),
                    RemovalOutcome::Outdated => self.receive_all(),
                    RemovalOutcome::Unknown => return Err(Failure::Unknown),
                    RemovalOutcome::Failed(error) => return Err(error.into()),
                }
            }
        })
    }
}

/// A parsed element of an affinity map.
#[derive(Clone, Debug)]
struct AffinityEntry {
    address: IpAddr,
    protocol: Protocol,
    port: u16,
    target: Target,
}

impl AffinityEntry {
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
        Some(Self {
            address: address(at)?,
            protocol,
            port: port(rest.get(4..)?)?,
            target: target(data)?,
        })
    }

    fn at_address(&self) -> Claim {
        Claim::Address(self.address, self.protocol, self.port)
    }

    fn at_node_port(&self) -> Claim {
        Claim::NodePort(self.protocol, self.port)
    }
}
