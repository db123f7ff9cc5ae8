//! What one service contributes to the tables, and the elements and chains that follow from it.

use std::net::IpAddr;
use std::sync::Arc;

use super::chains::{Handle, Role, SharedChain};
use super::layout::{By, Clients, Scope, ServiceSet};
use super::skeleton::REJECT;
use super::sources::SourceList;
use crate::model::{Claim, Family, Protocol};
use crate::ruleset::{Data, Element, Key, KeyBuilder, Verdict};

/// Address and port of an endpoint.
pub type Target = (IpAddr, u16);

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
    /// What happens to its packets.
    pub route: Route,
    /// Whether the source ranges of the service apply.
    pub firewalled: bool,
}

/// What happens to the packets of a frontend. Pools are given by their index in the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// They go to the endpoints of a pool, through a chain of this role; without an endpoint
    /// they are refused.
    Balance(Role, u16),
    /// They go to the endpoints of a pool; without one they are dropped, because there are
    /// endpoints elsewhere.
    BalanceOrDrop(Role, u16),
    /// External policy Local: the pool for traffic of this node, and the one for all others.
    LocalPolicy {
        /// The endpoints of the cluster.
        cluster: u16,
        /// The endpoints on this node.
        local: u16,
    },
}

/// An element and the set it belongs to.
pub type ElementOf = (ServiceSet, Element);

impl Route {
    /// The pool of the family's endpoints as the policy of the frontend sees them first.
    pub fn first_pool(&self) -> u16 {
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

impl ServicePlan {
    fn pool(&self, index: u16) -> Option<&Pool> {
        self.pools.get(usize::from(index))
    }

    fn of_family(&self, family: Family) -> impl Iterator<Item = (&Frontend, &Pool)> + '_ {
        self.frontends.iter().filter_map(move |frontend| {
            let pool = self.pool(frontend.route.first_pool())?;
            (pool.family == family).then_some((frontend, pool))
        })
    }

    fn handle(&self, by: By, role: Role, pool: &Pool) -> Option<SharedChain> {
        let endpoints = u32::try_from(pool.targets.len()).ok()?;
        (endpoints > 0).then_some(SharedChain::Handle(Handle {
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
    pub fn no_local_endpoints(&self, family: Family) -> [bool; 2] {
        let lacks = |pool: u16| self.pool(pool).is_some_and(|pool| pool.targets.is_empty());
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

    /// The elements that belong to this service alone, for the table of a family.
    pub fn own_elements(&self, family: Family) -> Vec<ElementOf> {
        let mut elements = Vec::new();
        for (frontend, pool) in self.of_family(family) {
            self.frontend_elements(frontend, pool, &mut elements);
        }
        elements
    }

    fn frontend_elements(&self, frontend: &Frontend, pool: &Pool, elements: &mut Vec<ElementOf>) {
        let (by, at) = (frontend.by(), frontend.key());
        let mut lead = |set: ServiceSet, verdict: Verdict| {
            let element = Element::with_verdict(at.clone().finish(), verdict);
            elements.push((set, element.comment(&pool.label)));
        };
        let goal = self.goal(frontend);
        match self.source_chain(frontend, pool.family) {
            Some(chain) => {
                lead(by.frontends(Scope::Cluster), Verdict::Goto(chain.name()));
                lead(ServiceSet::FirewalledFrontends, goal.verdict());
            }
            None => lead(by.frontends(Scope::Cluster), goal.verdict()),
        }
        let local = self.local_chain(frontend);
        if let Some((_, chain)) = &local {
            lead(by.frontends(Scope::Local), Verdict::Goto(chain.name()));
        }
        let leads_on = matches!(goal, Goal::Chain(_));
        if let Some(affinity) = self.affinity.as_ref().filter(|_| leads_on) {
            lead(by.affinity(), Verdict::Goto(affinity.learn().name()));
        }
        // ClusterIPs with internal policy Local find their endpoints where all ClusterIPs do.
        let pools = [(pool, Scope::Cluster)]
            .into_iter()
            .chain(local.map(|(pool, _)| (pool, Scope::Local)));
        for (pool, scope) in pools {
            let map = by.endpoints(scope);
            elements.reserve(pool.targets.len());
            for (index, (address, port)) in (0u32..).zip(&pool.targets) {
                let key = at.clone().number(index).finish();
                let data = Data::build().address(*address).port(*port).finish();
                elements.push((map, Element::with_data(key, data)));
            }
        }
    }

    /// The source ranges that the packets of a frontend in a family have to come from.
    fn source_chain(&self, frontend: &Frontend, family: Family) -> Option<SharedChain> {
        let list = self.sources(family).filter(|_| frontend.firewalled)?;
        Some(SharedChain::Sources(list.clone()))
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
    pub fn shared_elements(&self, family: Family) -> Vec<ElementOf> {
        let of_family = |addresses: &'_ [IpAddr]| {
            let own = addresses.iter().copied();
            own.filter(|address| Family::of(*address) == family)
                .collect::<Vec<_>>()
        };
        let cluster_ips = of_family(&self.cluster_ips)
            .into_iter()
            .map(|address| (ServiceSet::ClusterIps, Element::new(Key::address(address))));
        let pairs = of_family(&self.hairpin).into_iter().map(|address| {
            let pair = Key::build().address(address).address(address).finish();
            (ServiceSet::Hairpin, Element::new(pair))
        });
        cluster_ips.chain(pairs).collect()
    }

    /// The shared chains that the verdicts lead to, with all that those go on to. A chain that
    /// several frontends use comes up as often.
    pub fn chains(&self, family: Family) -> impl Iterator<Item = SharedChain> + '_ {
        self.of_family(family).flat_map(move |(frontend, _)| {
            let goal = match self.goal(frontend) {
                Goal::Chain(chain) => Some(chain),
                Goal::Refuse | Goal::Drop => None,
            };
            let local = self.local_chain(frontend).map(|(_, chain)| chain);
            let affinity = self.affinity.as_ref().filter(|_| goal.is_some());
            let learn = affinity.map(Affinity::learn);
            [goal, local, learn, self.source_chain(frontend, family)]
                .into_iter()
                .flatten()
                .flat_map(SharedChain::closure)
        })
    }
}
