//! Turns pods, namespaces and policies into rules.
//!
//! The engine keeps, beside the objects, the plan of each isolated address of this node and the
//! sets that each policy's chain uses. A batch of events leaves marks: pods with the set elements
//! that they had before, addresses to plan again, policies to compile again. `update` compiles the
//! touched parts of the tables, before and after; the difference of the two is the transaction.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use super::inventory::Inventory;
use super::isolation::{Holder, Isolation};
use super::layout::{Direction, TABLE, table_id};
use super::profile::{Profile, RulesOf};
use super::reassigned::ReassignedAddresses;
use super::sets::{Member, SetId, Sets};
use super::startup::ClosedNetwork;
use super::{AuditedAddress, PolicyChanges, PolicySettings};
use crate::engine::{self, Update};
use crate::model::{Event, Family, HostRoute, Kind, Notice, ObjectName, ObjectRef, RelistTracker};
use crate::nft::{Chain, Name, ObjectPath, Rule, Ruleset, TableId, text};

/// A chain of pods: its family, direction and name.
pub(super) type PodsChain = (Family, Direction, Name);

/// A profile with a chain.
#[derive(Clone, Debug)]
pub(super) struct ProfileUse {
    pub profile: Arc<Profile>,
    /// The number of elements that lead to the chain.
    pub addresses: u32,
}

/// A chain with rules of policies: its family, direction and policies.
pub(super) type RulesKey = (Family, Direction, RulesOf);

/// A chain with rules of policies in one family's table.
#[derive(Clone, Debug, Default)]
pub(super) struct RulesUse {
    /// The number of pod chains that jump to it.
    pub users: u32,
    pub chain: Option<Arc<Chain>>,
    /// The policies, in the order of their rules.
    pub parts: Vec<Part>,
}

/// The rules of one policy in a chain.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub policy: ObjectRef,
    /// The number of rules.
    pub rules: usize,
    /// The sets in these rules.
    pub sets: Vec<SetId>,
}

impl RulesUse {
    /// Returns the sets in the rules, each once.
    pub fn sets(&self) -> BTreeSet<SetId> {
        let sets = self.parts.iter().flat_map(|part| &part.sets);
        sets.copied().collect()
    }
}

/// The marks of events since the last update.
#[derive(Debug, Default)]
pub(super) struct Touched {
    /// Pods and nodes, with their set elements before.
    pub members: HashMap<ObjectRef, Vec<Member>>,
    /// Addresses of this node whose isolation may have changed.
    pub addresses: BTreeSet<IpAddr>,
    /// Policies that changed.
    pub policies: BTreeSet<ObjectRef>,
    /// Whether the host's routes changed.
    pub routes: bool,
}

/// Turns pods, namespaces and policies into rules.
#[derive(Debug)]
pub struct Engine {
    pub(super) settings: PolicySettings,
    pub(super) inventory: Inventory,
    pub(super) lists: RelistTracker,
    /// Whether rules were compiled before.
    started: bool,
    pub(super) sets: Sets,
    pub(super) plans: BTreeMap<IpAddr, Isolation>,
    /// Whether plans changed since the last change for followers.
    pub(super) replanned: bool,
    /// For each layer from 1 on, the number of addresses that have a holder in it, by family and
    /// direction. Layer 0 is the first holder of an address.
    pub(super) layers: BTreeMap<(Family, Direction, usize), u32>,
    pub(super) profiles: BTreeMap<PodsChain, ProfileUse>,
    pub(super) rule_chains: BTreeMap<RulesKey, RulesUse>,
    /// Policies that the kernel refused. Until they change or are retried, NetworkPolicies allow
    /// nothing, and cluster policies deny everything.
    pub(super) quarantined: BTreeSet<ObjectRef>,
    /// The direct routes of the host.
    pub(super) routes: Arc<[HostRoute]>,
    /// The interfaces that lead to isolated pods.
    pub(super) links: BTreeSet<(Direction, Arc<str>)>,
    pub(super) reassigned: ReassignedAddresses,
    /// The pod network, if it is closed to unknown addresses.
    pub(super) closed: Option<ClosedNetwork>,
    /// Whether the tables exist, as they do while there is a policy or the pod network is closed.
    pub(super) exists: bool,
    /// Whether policies are enforced.
    on: bool,
    pub(super) touched: Touched,
    /// The changed policies that were compiled since the last change for followers.
    pub(super) compiled: BTreeSet<ObjectRef>,
}

impl Engine {
    /// Creates an engine without objects.
    pub fn new(settings: PolicySettings) -> Self {
        Self {
            inventory: Inventory::new(settings.node.clone()),
            closed: ClosedNetwork::new(&settings),
            settings,
            lists: RelistTracker::default(),
            started: false,
            sets: Sets::default(),
            plans: BTreeMap::new(),
            replanned: false,
            layers: BTreeMap::new(),
            profiles: BTreeMap::new(),
            rule_chains: BTreeMap::new(),
            quarantined: BTreeSet::new(),
            routes: Arc::default(),
            links: BTreeSet::new(),
            reassigned: ReassignedAddresses::default(),
            exists: false,
            on: true,
            touched: Touched::default(),
            compiled: BTreeSet::new(),
        }
    }

    /// Creates an engine that removes the tables: it needs no lists and has no policies.
    pub fn off(settings: PolicySettings) -> Self {
        let mut engine = Self {
            on: false,
            ..Self::new(settings)
        };
        for kind in Kind::POLICY {
            engine.lists.complete(kind);
        }
        engine
    }

    /// Returns the objects.
    pub(crate) fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// Returns the policies that the kernel refused.
    pub(crate) fn refused_policies(&self) -> impl Iterator<Item = &ObjectRef> {
        self.quarantined.iter()
    }

    /// Returns the number of policies that the kernel refused.
    pub(crate) fn refused(&self) -> usize {
        self.quarantined.len()
    }

    /// Returns whether the kernel refused a policy.
    pub(crate) fn is_refused(&self, policy: &ObjectRef) -> bool {
        self.quarantined.contains(policy)
    }

    /// Returns whether a policy changed since the last update.
    pub(crate) fn is_touched(&self, policy: &ObjectRef) -> bool {
        self.touched.policies.contains(policy)
    }

    /// Returns whether a policy exists and the kernel accepts it.
    pub(crate) fn is_accepted(&self, policy: &ObjectRef) -> bool {
        let exists = match policy.kind {
            Kind::ClusterNetworkPolicy => self.inventory.cluster().get(&policy.name).is_some(),
            _ => self.inventory.policy(&policy.name).is_some(),
        };
        exists && !self.is_refused(policy)
    }

    /// Returns whether policies are enforced.
    pub(crate) fn is_on(&self) -> bool {
        self.on
    }

    /// Returns whether the first policies were added since the last update.
    pub(crate) fn has_first_policies(&self) -> bool {
        !self.exists && self.inventory.has_policies()
    }

    /// Returns the kinds that the rules are compiled from.
    fn needed(&self) -> impl Iterator<Item = Kind> {
        let nodes = self.inventory.cluster().need_nodes();
        Kind::POLICY.into_iter().chain(nodes.then_some(Kind::Node))
    }

    fn is_listed(&self, kind: Kind) -> bool {
        self.lists.is_complete(kind) && !self.lists.is_open(kind)
    }

    /// Returns whether cluster policies select nodes that may not be known yet, so that they are in
    /// force in part only.
    pub(crate) fn waits_for_nodes(&self) -> bool {
        self.inventory.cluster().need_nodes() && !self.is_listed(Kind::Node)
    }

    /// Returns a pod that may have an address, for logs.
    pub(crate) fn pod_at(&self, address: IpAddr) -> Option<&ObjectName> {
        let mut local = self.inventory.isolating(address);
        let departed = || self.inventory.departed(address);
        let pod = local.next().or_else(departed);
        let pod = pod.or_else(|| self.inventory.holders(address).next());
        pod.map(|pod| &pod.name)
    }

    /// Returns the policies to which a refused object belongs.
    fn policies_of(&self, path: &ObjectPath) -> BTreeSet<ObjectRef> {
        match path {
            ObjectPath::Chain(table, chain) => self.parts(table, |it, _, _| *it == *chain),
            ObjectPath::Rule(table, chain, text) => {
                let is_it = |rule: &Rule| text::rule(rule, table.family) == *text;
                let found = self.parts(table, |it, _, rules| {
                    *it == *chain && rules.iter().any(is_it)
                });
                if found.is_empty() {
                    return self.parts(table, |it, _, _| *it == *chain);
                }
                found
            }
            ObjectPath::Set(table, set) | ObjectPath::Element(table, set, ..) => {
                let id = self.sets.named(set);
                self.parts(table, |_, part, _| {
                    id.is_some_and(|id| part.sets.contains(&id))
                })
            }
            ObjectPath::Table(_) | ObjectPath::Stray(..) | ObjectPath::Transaction => {
                BTreeSet::new()
            }
        }
    }

    /// Returns the policies in a table, except those in quarantine, for which `is_user` returns
    /// true, given the chain and the policy's part of it.
    fn parts(
        &self,
        table: &TableId,
        is_user: impl Fn(&Name, &Part, &[Rule]) -> bool,
    ) -> BTreeSet<ObjectRef> {
        let mut found = BTreeSet::new();
        for ((family, direction, of), used) in &self.rule_chains {
            if table_id(*family) != *table {
                continue;
            }
            let name = of.chain(*direction);
            let chain = used.chain.as_deref();
            let mut rules = chain.map_or(&[][..], |chain| &chain.rules);
            for part in &used.parts {
                let (own, rest) = rules.split_at_checked(part.rules).unwrap_or((rules, &[]));
                rules = rest;
                if !self.quarantined.contains(&part.policy) && is_user(&name, part, own) {
                    found.insert(part.policy.clone());
                }
            }
        }
        found
    }

    /// Returns a copy for another thread, which compiles the same ruleset. Its cost grows with what
    /// this node enforces, but not with the pods of the cluster.
    pub(super) fn copy(&self) -> Self {
        Self {
            inventory: self.inventory.without_policies(),
            sets: self.sets.without_indexes(),
            plans: self.plans.clone(),
            layers: self.layers.clone(),
            profiles: self.profiles.clone(),
            rule_chains: self.rule_chains.clone(),
            links: self.links.clone(),
            closed: self.closed.clone(),
            exists: self.exists,
            ..Self::new(self.settings.clone())
        }
    }

    /// Returns the change for followers.
    fn change(&mut self, rules: bool) -> PolicyChanges {
        let replanned = std::mem::take(&mut self.replanned);
        let isolated = replanned.then(|| {
            let isolated = self.isolated();
            let isolated = isolated.map(|(address, pod)| (address, pod.cloned()));
            isolated.collect()
        });
        PolicyChanges {
            rules,
            isolated,
            audited: replanned.then(|| self.audited().collect()),
            reassigned: self.reassigned.take(),
            policies: std::mem::take(&mut self.compiled),
            rewritten: false,
        }
    }

    /// Returns the addresses of this node with audited policies.
    pub(crate) fn audited(&self) -> impl Iterator<Item = AuditedAddress> {
        let holders = self.plans.iter().flat_map(|(address, plan)| {
            let all = plan.holders.iter();
            let all = all.flat_map(|(direction, all)| all.iter().map(|it| (*direction, it)));
            all.map(|(direction, holder)| (*address, direction, holder))
        });
        let audited = holders.filter(|(.., holder)| !holder.profile.audited.is_empty());
        audited.map(
            |(address, direction, Holder { pod, profile, .. })| AuditedAddress {
                address,
                direction,
                pod: pod.clone(),
                set: profile.audited_set(direction),
                policies: profile.audited.clone(),
            },
        )
    }

    /// Returns the isolated addresses of this node, each with its pod; `None` if the Pod object was
    /// deleted.
    pub fn isolated(&self) -> impl Iterator<Item = (IpAddr, Option<&ObjectName>)> {
        let plans = self.plans.iter().filter(|(_, plan)| plan.is_enforced());
        plans.map(|(address, plan)| {
            let mut holders = plan.holders.values().flatten();
            let present = holders.find(|holder| !holder.departed);
            (*address, present.map(|holder| &holder.pod))
        })
    }
}

impl engine::Engine for Engine {
    type Change = PolicyChanges;

    const TABLE: &'static str = TABLE;

    fn in_quarantine(kind: Kind) -> &'static str {
        match kind {
            Kind::ClusterNetworkPolicy => {
                "the policy denies all traffic of its subjects, in the directions in which it has \
                 rules, until it changes"
            }
            _ => "the policy allows nothing until it changes",
        }
    }

    fn apply(&mut self, event: &Event) {
        self.apply_event(event);
    }

    /// Before all kinds are listed, and while one is listed again, the rules would deny traffic
    /// that missing objects allow. Nodes are listed again when the first policy selects nodes; that
    /// list may be long or never come, and must not hold up all other policies.
    fn is_ready(&self) -> bool {
        let defined = self.closed.as_ref().is_none_or(ClosedNetwork::is_defined);
        let is_enough = |kind| {
            self.is_listed(kind)
                || (kind == Kind::Node && self.started && self.lists.is_complete(kind))
        };
        defined && self.needed().all(is_enough)
    }

    fn missing(&self) -> Vec<Kind> {
        let needed = self.needed();
        needed.filter(|kind| !self.is_listed(*kind)).collect()
    }

    fn count(&self, kind: Kind) -> usize {
        let (pods, namespaces, policies) = self.inventory.counts();
        match kind {
            Kind::Pod => pods,
            Kind::Namespace => namespaces,
            Kind::NetworkPolicy => policies,
            Kind::ClusterNetworkPolicy => self.inventory.cluster().len(),
            Kind::Service | Kind::EndpointSlice | Kind::Node | Kind::ServiceCidr => 0,
        }
    }

    /// Ignores the budget: changes of policies are never large.
    fn update(&mut self, _budget: usize) -> Update<PolicyChanges> {
        self.started = true;
        let transaction = self.compile();
        let changed = !transaction.is_empty();
        Update {
            transaction,
            change: self.change(changed),
            more: false,
        }
    }

    fn rebuild(&mut self, first: bool) -> PolicyChanges {
        self.started = true;
        self.compile();
        if first {
            self.replanned = true;
            // The earlier pods of the addresses are unknown, and most pods have had them for long.
            self.reassigned.take();
        }
        self.change(true)
    }

    fn early_rules(&self) -> Option<Ruleset> {
        self.closed.as_ref().map(ClosedNetwork::early_rules)
    }

    fn ruleset(&self) -> Ruleset {
        self.tables()
    }

    fn snapshot(&self) -> engine::Compile {
        let copy = self.copy();
        Box::new(move || copy.tables())
    }

    fn blame(&self, refused: &[&ObjectPath]) -> Vec<(usize, ObjectRef)> {
        let mut found = Vec::new();
        for (index, path) in refused.iter().enumerate() {
            let policies = self.policies_of(path).into_iter();
            found.extend(policies.map(|policy| (index, policy)));
        }
        found
    }

    /// Compiles a policy that still isolates its pods but allows nothing, or a cluster policy that
    /// denies everything.
    fn quarantine(&mut self, object: &ObjectRef) -> PolicyChanges {
        self.touched.policies.insert(object.clone());
        self.quarantined.insert(object.clone());
        self.compile();
        self.change(true)
    }

    fn retry_quarantined(&mut self) {
        self.touched.policies.append(&mut self.quarantined);
    }

    /// Addresses of departed pods expire.
    fn due(&self) -> Option<Instant> {
        self.inventory.departed_due().filter(|_| self.is_ready())
    }

    fn take_notices(&mut self) -> Vec<Notice> {
        self.take_place_notices()
    }
}
