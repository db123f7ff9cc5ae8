//! What one service contributes to the tables, and the elements and chains that follow from it.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::chains::{FrontendChain, Role, SharedChain};
use super::layout::{By, Clients, Scope, ServiceSet};
use super::skeleton::REJECT;
use super::sources::SourceList;
use crate::model::{Family, Protocol};
use crate::nft::{Data, Element, Key, KeyBuilder, Verdict};
use crate::services::Claim;

/// Address and port of an endpoint.
pub(crate) type Target = (IpAddr, u16);

/// Everything a service contributes to the tables, in a compact form.
///
/// It is kept for as long as its rules stand: the elements to delete later are those of the plan
/// that was in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// What packets can be addressed to.
    pub frontends: Box<[Frontend]>,
    /// The endpoints of each service port and family.
    pub pools: Box<[Pool]>,
    /// The ClusterIPs: other ports on them are refused.
    pub cluster_ips: Box<[IpAddr]>,
    /// Addresses of endpoints that may be on this node.
    pub hairpin: Box<[IpAddr]>,
    /// `sessionAffinity` ClientIP with its timeout.
    pub affinity: Option<Affinity>,
    /// `loadBalancerSourceRanges` that restrict the load balancer's addresses, of each family that
    /// has such addresses.
    pub sources: [Option<SourceList>; 2],
}

/// Where the clients of a service are remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Affinity {
    /// What remembers them.
    pub clients: Clients,
    /// For how long, without another connection.
    pub seconds: u32,
}

impl Affinity {
    fn learn(&self) -> SharedChain {
        SharedChain::Learn {
            clients: self.clients.clone(),
            seconds: self.seconds,
        }
    }
}

/// The endpoints that a service port leads to in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// `namespace/name` or `namespace/name:port`, for the person who reads the ruleset.
    pub label: Arc<str>,
    /// The protocol of the port; with label, family and scope it identifies the pool.
    pub protocol: Protocol,
    /// The family of the endpoints.
    pub family: Family,
    /// Whether these are the endpoints of the cluster or those on this node.
    pub scope: Scope,
    /// The endpoints by index.
    pub targets: Box<[Target]>,
    /// Endpoints that serve although they were not chosen, by policy or topology or because they
    /// terminate: no new flow leads to them, but those that do go on. Known for UDP only, where
    /// flows to all others have to be ended.
    pub unchosen: Box<[Target]>,
}

/// Something packets can be addressed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Address, protocol and port.
    pub at: Claim,
    /// The family of its packets, which the claim of a NodePort does not say.
    pub family: Family,
    /// What happens to its packets.
    pub route: Route,
    /// Whether the source ranges of the service apply.
    pub firewalled: bool,
}

/// What happens to the packets of a frontend. Pools are given by their index in the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// They go to the endpoints of a pool, through a chain of this role; without an endpoint
    /// they are refused.
    Balance(Role, usize),
    /// They go to the endpoints of a pool; without one they are dropped, because there are
    /// endpoints elsewhere.
    BalanceOrDrop(Role, usize),
    /// External policy Local: the pool for traffic of this node, and the one for all others.
    LocalPolicy {
        /// The endpoints of the cluster.
        cluster: usize,
        /// The endpoints on this node.
        local: usize,
    },
}

/// An element and the set it belongs to.
pub(crate) type ElementOf = (ServiceSet, Element);

impl Route {
    /// The pool of the family's endpoints as the policy of the frontend sees them first.
    pub(crate) fn first_pool(&self) -> usize {
        match self {
            Route::Balance(_, pool) | Route::BalanceOrDrop(_, pool) => *pool,
            Route::LocalPolicy { cluster, .. } => *cluster,
        }
    }
}

impl Frontend {
    /// How packets to it are recognised.
    pub fn by(&self) -> By {
        match self.at {
            Claim::Address(..) => By::Address,
            Claim::NodePort(..) => By::NodePort,
        }
    }

    fn key(&self) -> KeyBuilder {
        match &self.at {
            Claim::Address(address, protocol, port) => Key::build()
                .address(*address)
                .protocol(protocol.number())
                .port(*port),
            Claim::NodePort(protocol, port) => Key::build().protocol(protocol.number()).port(*port),
        }
    }
}

/// Where a verdict element leads.
#[derive(PartialEq, Eq)]
enum Goal {
    Chain(SharedChain),
    Refuse,
    Drop,
}

impl Goal {
    fn verdict(&self) -> Verdict {
        match self {
            Goal::Chain(chain) => Verdict::Goto(chain.name()),
            Goal::Refuse => Verdict::Goto(REJECT.into()),
            Goal::Drop => Verdict::Drop,
        }
    }
}

/// All that the verdict elements of a frontend say.
#[derive(PartialEq, Eq)]
pub(super) struct Leads<'a> {
    goal: Goal,
    /// The source ranges that packets have to come from.
    sources: Option<&'a SourceList>,
    /// Where clients outside of this node go, with external policy Local.
    local: Option<SharedChain>,
    learn: Option<SharedChain>,
    label: &'a Arc<str>,
}

impl ServicePlan {
    fn pool(&self, index: usize) -> Option<&Pool> {
        self.pools.get(index)
    }

    fn of_family(&self, family: Family) -> impl Iterator<Item = (&Frontend, &Pool)> + '_ {
        self.frontends.iter().filter_map(move |frontend| {
            let pool = self.pool(frontend.route.first_pool())?;
            (frontend.family == family).then_some((frontend, pool))
        })
    }

    fn handle(&self, by: By, role: Role, pool: &Pool) -> Option<SharedChain> {
        let endpoints = u32::try_from(pool.targets.len()).ok()?;
        (endpoints > 0).then_some(SharedChain::Frontend(FrontendChain {
            by,
            role,
            sticky: self.affinity.as_ref().map(|it| it.clients.clone()),
            endpoints,
        }))
    }

    /// Where a frontend's packets go at first.
    fn goal(&self, frontend: &Frontend) -> Goal {
        let chain = |role, pool| {
            self.pool(pool)
                .and_then(|pool| self.handle(frontend.by(), role, pool))
        };
        match frontend.route {
            Route::Balance(role, pool) => chain(role, pool).map_or(Goal::Refuse, Goal::Chain),
            Route::BalanceOrDrop(role, pool) => chain(role, pool).map_or(Goal::Drop, Goal::Chain),
            Route::LocalPolicy { cluster, .. } => {
                chain(Role::LocalPolicy, cluster).map_or(Goal::Refuse, Goal::Chain)
            }
        }
    }

    /// Where packets of a frontend with external policy Local go that do not come from this node.
    fn local_chain(&self, frontend: &Frontend) -> Option<(&Pool, SharedChain)> {
        let Route::LocalPolicy { local, .. } = frontend.route else {
            return None;
        };
        let pool = self.pool(local)?;
        let chain = self.handle(frontend.by(), Role::Balance(Scope::Local), pool)?;
        Some((pool, chain))
    }

    /// Every frontend with each pool that its packets may go to.
    pub fn reach(&self) -> impl Iterator<Item = (&Frontend, &Pool)> + '_ {
        self.frontends.iter().flat_map(move |frontend| {
            let pools = match frontend.route {
                Route::Balance(_, pool) | Route::BalanceOrDrop(_, pool) => [Some(pool), None],
                Route::LocalPolicy { cluster, local } => [Some(cluster), Some(local)],
            };
            let pools = pools.into_iter().flatten();
            pools.filter_map(move |pool| Some((frontend, self.pool(pool)?)))
        })
    }

    /// Whether a family's traffic is dropped because a policy Local finds endpoints elsewhere and
    /// none on this node: by the internal policy, and by the external one.
    pub(crate) fn no_local_endpoints(&self, family: Family) -> [bool; 2] {
        let lacks = |pool: usize| self.pool(pool).is_some_and(|pool| pool.targets.is_empty());
        let (mut internal, mut external) = (false, false);
        for (frontend, _) in self.of_family(family) {
            match frontend.route {
                Route::Balance(..) => {}
                Route::BalanceOrDrop(_, pool) => internal |= lacks(pool),
                Route::LocalPolicy { cluster, local } => {
                    external |= lacks(local) && !lacks(cluster);
                }
            }
        }
        [internal, external]
    }

    /// About how many elements belong to this service alone.
    pub fn elements(&self) -> usize {
        let each = self.frontends.iter().map(|frontend| {
            let endpoints: usize = self.targets(frontend).into_iter().map(<[_]>::len).sum();
            1 + endpoints
        });
        each.sum()
    }

    /// The elements that belong to this service alone, for the table of a family.
    pub(crate) fn own_elements(&self, family: Family) -> Vec<ElementOf> {
        let mut elements = Vec::new();
        for (frontend, _) in self.of_family(family) {
            self.lead_elements(frontend, &mut elements);
            for (scope, targets) in SCOPES.into_iter().zip(self.targets(frontend)) {
                elements.reserve(targets.len());
                for (index, target) in targets.iter().enumerate() {
                    elements.push(endpoint_element(frontend, scope, index, *target));
                }
            }
        }
        elements
    }

    /// What the verdict elements of a frontend say.
    pub(super) fn leads(&self, frontend: &Frontend) -> Option<Leads<'_>> {
        let goal = self.goal(frontend);
        let leads_on = matches!(goal, Goal::Chain(_));
        let affinity = self.affinity.as_ref().filter(|_| leads_on);
        Some(Leads {
            goal,
            sources: self
                .sources(frontend.family)
                .filter(|_| frontend.firewalled),
            local: self.local_chain(frontend).map(|(_, chain)| chain),
            learn: affinity.map(Affinity::learn),
            label: &self.pool(frontend.route.first_pool())?.label,
        })
    }

    /// The elements that say where a frontend's packets go, and who may send any.
    pub(super) fn lead_elements(&self, frontend: &Frontend, elements: &mut Vec<ElementOf>) {
        let Some(leads) = self.leads(frontend) else {
            return;
        };
        let (by, at) = (frontend.by(), frontend.key());
        let mut lead = |set: ServiceSet, verdict: Verdict| {
            let element = Element::with_verdict(at.clone().finish(), verdict);
            elements.push((set, element.comment(leads.label)));
        };
        match leads.sources {
            Some(list) => {
                lead(by.frontends(Scope::Cluster), Verdict::Goto(list.name()));
                lead(ServiceSet::FirewalledFrontends, leads.goal.verdict());
            }
            None => lead(by.frontends(Scope::Cluster), leads.goal.verdict()),
        }
        if let Some(chain) = leads.local {
            lead(by.frontends(Scope::Local), Verdict::Goto(chain.name()));
        }
        if let Some(learn) = leads.learn {
            lead(by.affinity(), Verdict::Goto(learn.name()));
        }
    }

    /// The endpoints of a frontend by index, in the map of each of [`SCOPES`]. As many as the
    /// chains draw from that its verdict elements lead to.
    pub(super) fn targets(&self, frontend: &Frontend) -> [&[Target]; 2] {
        let first = self.pool(frontend.route.first_pool());
        // ClusterIPs with internal policy Local find their endpoints where all ClusterIPs do.
        let local = match frontend.route {
            Route::LocalPolicy { local, .. } => self.pool(local),
            Route::Balance(..) | Route::BalanceOrDrop(..) => None,
        };
        [first, local].map(|pool| pool.map_or(&[][..], |pool| &*pool.targets))
    }

    /// The source ranges in a family, if they keep any client of it out.
    pub fn sources(&self, family: Family) -> Option<&SourceList> {
        let [v4, v6] = &self.sources;
        match family {
            Family::V4 => v4.as_ref(),
            Family::V6 => v6.as_ref(),
        }
    }

    /// The elements that other services may ask for too, for the table of a family.
    pub(crate) fn shared_elements(&self, family: Family) -> Vec<ElementOf> {
        let lists = [
            (ServiceSet::ClusterIps, &self.cluster_ips),
            (ServiceSet::Hairpin, &self.hairpin),
        ];
        let of_family = lists.into_iter().flat_map(|(set, addresses)| {
            let own = addresses.iter().copied();
            let own = own.filter(|address| Family::of(*address) == family);
            own.map(move |address| (set, Element::new(shared_key(set, address))))
        });
        of_family.collect()
    }

    /// The shared chains that the verdicts lead to, with all that those go on to, each once.
    pub fn chains(&self, family: Family) -> BTreeSet<SharedChain> {
        // Frontends of one port, side by side, mostly lead to the same.
        let mut last = None;
        let mut direct = HashSet::new();
        for (frontend, _) in self.of_family(family) {
            let led_by = (frontend.by(), &frontend.route, frontend.firewalled);
            if last == Some(led_by) {
                continue;
            }
            last = Some(led_by);
            let Some(leads) = self.leads(frontend) else {
                continue;
            };
            let goal = match leads.goal {
                Goal::Chain(chain) => Some(chain),
                Goal::Refuse | Goal::Drop => None,
            };
            let sources = leads.sources.cloned().map(SharedChain::Sources);
            let all = [goal, leads.local, leads.learn, sources];
            direct.extend(all.into_iter().flatten());
        }
        direct.into_iter().flat_map(SharedChain::closure).collect()
    }
}

/// The scopes in the order of [`ServicePlan::targets`].
pub(super) const SCOPES: [Scope; 2] = [Scope::Cluster, Scope::Local];

/// The element that leads from an index of a frontend to an endpoint.
pub(super) fn endpoint_element(
    frontend: &Frontend,
    scope: Scope,
    index: usize,
    (address, port): Target,
) -> ElementOf {
    // The kernel draws numbers of 32 bits; a service is left out long before it has so many.
    let index = u32::try_from(index).unwrap_or(u32::MAX);
    let key = frontend.key().number(index).finish();
    let data = Data::build().address(address).port(port).finish();
    let map = frontend.by().endpoints(scope);
    (map, Element::with_data(key, data))
}

/// The key of an element that several services may ask for.
pub(super) fn shared_key(set: ServiceSet, address: IpAddr) -> Key {
    match set {
        ServiceSet::Hairpin => Key::build().address(address).address(address).finish(),
        _ => Key::address(address),
    }
}
