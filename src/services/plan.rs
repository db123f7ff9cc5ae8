//! The rules of one service in a compact form, and the elements and chains that result from it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::balance::Count;
use super::chains::SharedChain;
use super::dispatch::{Dispatch, FrontendAction, Role, local_data};
use super::layout::{By, Clients, EndpointScope, ServiceSet};
use super::sources::SourceList;
use crate::model::{Family, Protocol};
use crate::nft::{Data, Element, Key, KeyBuilder, Value, Verdict};
use crate::services::Claim;

/// Address and port of an endpoint.
pub(crate) type Target = (IpAddr, u16);

/// The rules of one service in a compact form.
///
/// It is kept while its rules are in force: the elements to delete later result from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    pub frontends: Box<[Frontend]>,
    /// The endpoints of each service port and family.
    pub pools: Box<[Pool]>,
    /// The ClusterIPs. Other ports of them are rejected.
    pub cluster_ips: Box<[IpAddr]>,
    /// Addresses of endpoints that may be on this node and so can reach themselves.
    pub hairpin: Box<[IpAddr]>,
    /// `sessionAffinity: ClientIP`.
    pub affinity: Option<Affinity>,
    /// `loadBalancerSourceRanges`, in each family with restricted load balancer addresses.
    pub sources: [Option<SourceList>; 2],
}

/// Session affinity of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Affinity {
    /// The sets that remember the clients.
    pub clients: Clients,
    /// The time after the last connection for which a client is remembered.
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

/// The endpoints of a service port in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// `namespace/name` or `namespace/name:port`, the comment in the ruleset.
    pub label: Arc<str>,
    /// The protocol of the port. Label, protocol, family and scope identify the pool.
    pub protocol: Protocol,
    /// The family of the endpoints.
    pub family: Family,
    /// Whether these are the endpoints of the cluster or those on this node.
    pub scope: EndpointScope,
    /// The endpoints by index.
    pub targets: Box<[Target]>,
    /// Serving endpoints that get no new flows, because of policy or topology or because they
    /// terminate. Existing UDP flows to them stay; flows to all other former endpoints are deleted.
    /// Empty for TCP and SCTP.
    pub unchosen: Box<[Target]>,
}

/// A destination that the rules translate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Address, protocol and port.
    pub at: Claim,
    /// The family of its packets, which the claim of a NodePort does not contain.
    pub family: Family,
    /// The handling of its packets.
    pub route: Route,
    /// Whether the source ranges of the service apply.
    pub firewalled: bool,
}

/// The handling of a frontend's packets. Pools are given by their index in the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Packets go to the endpoints of a pool, in this role; without an endpoint they are
    /// rejected.
    Balance(Role, usize),
    /// Packets go to the endpoints of a pool; without one they are dropped, because other nodes
    /// have endpoints.
    BalanceOrDrop(Role, usize),
    /// External policy Local: a pool for traffic of this node, and one for all other traffic.
    LocalPolicy {
        /// The endpoints of the cluster.
        cluster: usize,
        /// The endpoints on this node.
        local: usize,
    },
}

/// An element with its set.
pub(crate) type ElementOf = (ServiceSet, Element);

impl Route {
    /// Returns the pool that determines the verdict of the frontend.
    pub(crate) fn first_pool(&self) -> usize {
        match self {
            Route::Balance(_, pool) | Route::BalanceOrDrop(_, pool) => *pool,
            Route::LocalPolicy { cluster, .. } => *cluster,
        }
    }
}

impl Frontend {
    /// Returns the key by which it is looked up.
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

/// The content of the elements that lead packets of a frontend to its endpoints.
#[derive(PartialEq, Eq)]
pub(super) struct Leads<'a> {
    dispatch: Dispatch,
    /// The source ranges, if they apply.
    sources: Option<&'a SourceList>,
    /// The number of endpoints on this node, with external policy Local.
    local: Option<Count>,
    affinity: Option<&'a Affinity>,
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

    /// Returns the number of endpoints of a pool, if it has any.
    fn count(&self, pool: usize) -> Option<Count> {
        let endpoints = self.pool(pool)?.targets.len();
        (endpoints > 0).then(|| Count::of(endpoints))
    }

    fn action(&self, frontend: &Frontend) -> FrontendAction {
        let (role, pool, without) = match frontend.route {
            Route::Balance(role, pool) => (role, pool, FrontendAction::Reject),
            Route::BalanceOrDrop(role, pool) => (role, pool, FrontendAction::Drop),
            Route::LocalPolicy { cluster, .. } => {
                (Role::LocalPolicy, cluster, FrontendAction::Reject)
            }
        };
        self.count(pool)
            .map_or(without, |count| FrontendAction::Balance {
                role,
                sticky: self.affinity.is_some(),
                count,
            })
    }

    /// Returns each frontend with each pool that its packets can reach.
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

    /// Returns whether traffic of a family is dropped because a policy Local finds endpoints on
    /// other nodes only: by the internal policy, and by the external one.
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

    /// Returns the approximate number of elements that belong to this service alone.
    pub fn elements(&self) -> usize {
        let each = self.frontends.iter().map(|frontend| {
            let endpoints: usize = self.targets(frontend).into_iter().map(<[_]>::len).sum();
            1 + endpoints
        });
        each.sum()
    }

    /// Returns the elements in the table of a family that belong to this service alone.
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

    /// Returns the content of the elements that lead to the endpoints of a frontend.
    pub(super) fn leads(&self, frontend: &Frontend) -> Option<Leads<'_>> {
        let sources = self
            .sources(frontend.family)
            .filter(|_| frontend.firewalled);
        let local = match frontend.route {
            Route::LocalPolicy { local, .. } => self.count(local),
            Route::Balance(..) | Route::BalanceOrDrop(..) => None,
        };
        Some(Leads {
            dispatch: Dispatch {
                action: self.action(frontend),
                firewalled: sources.is_some(),
            },
            sources,
            local,
            affinity: self.affinity.as_ref(),
            label: &self.pool(frontend.route.first_pool())?.label,
        })
    }

    /// Appends the elements that lead to the endpoints of a frontend.
    pub(super) fn lead_elements(&self, frontend: &Frontend, elements: &mut Vec<ElementOf>) {
        let Some(leads) = self.leads(frontend) else {
            return;
        };
        let (by, at) = (frontend.by(), frontend.key());
        let mut add = |set: ServiceSet, value: Value| {
            let element = Element {
                value,
                ..Element::new(at.clone().finish())
            };
            elements.push((set, element.comment(leads.label)));
        };
        let data = leads.dispatch.data();
        add(by.frontends(EndpointScope::Cluster), Value::Data(data));
        if let Some(count) = leads.local {
            let data = local_data(count);
            add(by.frontends(EndpointScope::Local), Value::Data(data));
        }
        let mut lead = |set, verdict| add(set, Value::Verdict(verdict));
        if let Some(list) = leads.sources {
            lead(ServiceSet::FirewalledFrontends, Verdict::Goto(list.name()));
        }
        if let Some(affinity) = leads.affinity {
            let follow = SharedChain::Follow(affinity.clients.clone()).name();
            lead(by.sticky(), Verdict::Jump(follow));
            lead(by.affinity(), Verdict::Goto(affinity.learn().name()));
        }
    }

    /// Returns the endpoints of a frontend by index, in the map of each of [`SCOPES`].
    pub(super) fn targets(&self, frontend: &Frontend) -> [&[Target]; 2] {
        let first = self.pool(frontend.route.first_pool());
        // The local endpoints of internal policy Local are in the same map as those of the cluster.
        let local = match frontend.route {
            Route::LocalPolicy { local, .. } => self.pool(local),
            Route::Balance(..) | Route::BalanceOrDrop(..) => None,
        };
        [first, local].map(|pool| pool.map_or(&[][..], |pool| &*pool.targets))
    }

    /// Returns the source ranges in a family, if they exclude any client.
    pub fn sources(&self, family: Family) -> Option<&SourceList> {
        let [v4, v6] = &self.sources;
        match family {
            Family::V4 => v4.as_ref(),
            Family::V6 => v6.as_ref(),
        }
    }

    /// Returns the elements in the table of a family that other services can need, too.
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

    /// Returns the shared chains that the verdicts lead to, directly or not, each once.
    pub fn chains(&self, family: Family) -> BTreeSet<SharedChain> {
        let mut direct = BTreeSet::new();
        let (mut any, mut firewalled) = (false, false);
        for (frontend, _) in self.of_family(family) {
            any = true;
            firewalled |= frontend.firewalled;
        }
        if any {
            // With any number of endpoints, so that the first one brings no chains.
            direct.insert(SharedChain::Draw);
            direct.extend(self.affinity.as_ref().map(Affinity::learn));
        }
        if firewalled {
            let sources = self.sources(family).cloned();
            direct.extend(sources.map(SharedChain::Sources));
        }
        direct.into_iter().flat_map(SharedChain::closure).collect()
    }
}

/// The scopes in the order of [`ServicePlan::targets`].
pub(super) const SCOPES: [EndpointScope; 2] = [EndpointScope::Cluster, EndpointScope::Local];

/// Returns the element that maps an index of a frontend to an endpoint.
pub(super) fn endpoint_element(
    frontend: &Frontend,
    scope: EndpointScope,
    index: usize,
    (address, port): Target,
) -> ElementOf {
    // In the tables, indexes begin with 1. The largest number is never exceeded: a service with so
    // many endpoints is left out.
    let index = u32::try_from(index + 1).unwrap_or(u32::MAX);
    let key = frontend.key().number(index).finish();
    let data = Data::build().address(address).port(port).finish();
    let map = frontend.by().endpoints(scope);
    (map, Element::with_data(key, data))
}

/// Returns the key of an element that several services can need.
pub(super) fn shared_key(set: ServiceSet, address: IpAddr) -> Key {
    match set {
        ServiceSet::Hairpin => Key::build().address(address).address(address).finish(),
        _ => Key::address(address),
    }
}
