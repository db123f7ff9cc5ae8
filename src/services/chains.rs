//! The chains that services share.

use std::time::Duration;

use super::layout::{
    By, Clients, DSTNAT, MARK_OFF_CLUSTER, NODEPORT_ADDRESSES, Scope, ServiceSet, affinity_key,
    original_affinity_key, target,
};
use super::settings::{LocalDetector, ServiceSettings};
use super::sources::SourceList;
use crate::model::{Family, Protocol};
use crate::nft::{
    BaseChain, Chain, ChainKind, Comparison, CtState, CtStatus, Hook, Name, Operand, Rule,
    Selector, Set, Statement, Verdict,
};

/// The task of a shared chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Translates packets to a random endpoint of the scope.
    Balance(Scope),
    /// Marks packets for masquerading if the client is outside of the pod network, then balances.
    Cluster,
    /// Marks packets for masquerading, then balances.
    External,
    /// External policy Local: balances packets of this node's pods over all endpoints, marks and
    /// balances those of the node itself, and looks up local endpoints for all others.
    LocalPolicy,
}

/// A chain that frontends share. Sets that only it reads are created and deleted with it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SharedChain {
    /// Handles packets of frontends with the same number of endpoints.
    Frontend(FrontendChain),
    /// Translates packets of remembered clients to their endpoint, and returns for others.
    Follow(Clients),
    /// Remembers the endpoint of a client.
    Learn {
        /// The sets of the namespace.
        clients: Clients,
        /// The time after the last connection for which a client is remembered.
        seconds: u32,
    },
    /// Looks up whether the frontend of a new, translated connection has session affinity.
    LearnNew,
    /// A base chain behind the translation that leads to [`SharedChain::LearnNew`]. Every packet
    /// evaluates it, so it exists only while a frontend has session affinity.
    LearnHook(LearnAt),
    /// Sends clients in a list of source ranges to the verdicts of firewalled frontends, and drops
    /// packets of all others. The ranges are in a set of its own.
    Sources(SourceList),
}

/// A chain that handles packets of frontends.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendChain {
    /// The key by which its frontends are looked up.
    pub by: By,
    /// Its task.
    pub role: Role,
    /// The remembered clients, for frontends with session affinity.
    pub sticky: Option<Clients>,
    /// The number of endpoints, at least 1.
    pub endpoints: u32,
}

/// The hook at which translated packets are seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LearnAt {
    /// Packets from other hosts and pods.
    Prerouting,
    /// Packets of the node itself.
    Output,
}

impl SharedChain {
    /// Returns the chain's name, such as `lb-10` or `nodeport-external-sticky-3/shop`.
    pub fn name(&self) -> Name {
        match self {
            SharedChain::Frontend(handle) => handle.name(),
            SharedChain::Follow(clients) => clients.name("sticky"),
            SharedChain::Learn { clients, seconds } => clients.name(&format!("learn-{seconds}")),
            SharedChain::LearnNew => "learn-new".into(),
            SharedChain::LearnHook(LearnAt::Prerouting) => "learn-prerouting".into(),
            SharedChain::LearnHook(LearnAt::Output) => "learn-output".into(),
            SharedChain::Sources(list) => list.name(),
        }
    }

    /// Returns the chains that this one leads to, or through which it is reached.
    fn onward(&self) -> Vec<SharedChain> {
        match self {
            SharedChain::Frontend(handle) => {
                let follow = handle.follow().map(SharedChain::Follow);
                let handles = handle.onward().into_iter().map(SharedChain::Frontend);
                handles.chain(follow).collect()
            }
            SharedChain::Learn { clients, .. } => vec![
                SharedChain::LearnHook(LearnAt::Prerouting),
                SharedChain::LearnHook(LearnAt::Output),
                SharedChain::Follow(clients.clone()),
            ],
            SharedChain::LearnHook(_) => vec![SharedChain::LearnNew],
            SharedChain::Follow(_) | SharedChain::LearnNew | SharedChain::Sources(_) => vec![],
        }
    }

    /// Returns this chain and all chains that it needs, each after those that lead to it.
    pub fn closure(self) -> Vec<SharedChain> {
        let mut found = vec![self];
        let mut next = 0;
        while let Some(chain) = found.get(next) {
            let onward = chain.onward();
            found.extend(onward);
            next += 1;
        }
        found
    }

    /// Returns the sets that are created and deleted with this chain.
    pub fn sets(&self) -> Vec<(Name, Set)> {
        match self {
            SharedChain::Follow(clients) => clients.sets().into(),
            SharedChain::Sources(list) => vec![(list.name(), list.set())],
            SharedChain::Frontend(_)
            | SharedChain::Learn { .. }
            | SharedChain::LearnNew
            | SharedChain::LearnHook(_) => vec![],
        }
    }

    /// Returns the chain with its rules.
    pub fn chain(&self, settings: &ServiceSettings, family: Family) -> Chain {
        let (base, rules) = match self {
            SharedChain::Frontend(handle) => (None, handle.rules(settings, family)),
            SharedChain::Follow(clients) => (None, follow(clients)),
            SharedChain::Learn { clients, seconds } => (None, learn(clients, *seconds)),
            SharedChain::LearnNew => (None, learn_new()),
            SharedChain::LearnHook(at) => (Some(at.base()), learn_hook()),
            SharedChain::Sources(list) => (None, list.rules()),
        };
        Chain { base, rules }
    }
}

impl LearnAt {
    /// Returns a base chain just behind the translation of destinations.
    fn base(self) -> BaseChain {
        BaseChain {
            kind: ChainKind::Filter,
            hook: match self {
                LearnAt::Prerouting => Hook::Prerouting,
                LearnAt::Output => Hook::Output,
            },
            priority: DSTNAT + 1,
        }
    }
}

impl FrontendChain {
    fn name(&self) -> Name {
        let by = match self.by {
            By::Address => "",
            By::NodePort => "nodeport-",
        };
        let role = match self.role {
            Role::Balance(Scope::Cluster) => "lb",
            Role::Balance(Scope::Local) => "lb-local",
            Role::Cluster => "cluster",
            Role::External => "external",
            Role::LocalPolicy => "local",
        };
        let endpoints = self.endpoints;
        match &self.sticky {
            None => format!("{by}{role}-{endpoints}").into(),
            Some(clients) => clients.name(&format!("{by}{role}-sticky-{endpoints}")),
        }
    }

    /// Returns the clients to look up before balancing.
    fn follow(&self) -> Option<Clients> {
        let balances = matches!(self.role, Role::Balance(_));
        self.sticky.clone().filter(|_| balances)
    }

    fn onward(&self) -> Vec<FrontendChain> {
        let with = |role| FrontendChain {
            role,
            ..self.clone()
        };
        match self.role {
            Role::Balance(_) if self.sticky.is_some() => vec![FrontendChain {
                sticky: None,
                ..self.clone()
            }],
            Role::Balance(_) => vec![],
            Role::Cluster | Role::External => vec![with(Role::Balance(Scope::Cluster))],
            Role::LocalPolicy => vec![with(Role::Balance(Scope::Cluster)), with(Role::External)],
        }
    }

    fn rules(&self, settings: &ServiceSettings, family: Family) -> Vec<Rule> {
        if let Some(clients) = self.follow() {
            // Remembered clients go to their endpoint, others to a random one. The lookup has a
            // chain of its own: adding a rule validates all elements of the map that it reads, and
            // chains like this one are added often.
            let follow = SharedChain::Follow(clients).name();
            return self.then_onward(Statement::Verdict(Verdict::Jump(follow)));
        }
        match self.role {
            Role::Balance(scope) => self.balance(scope),
            Role::Cluster => {
                self.then_onward(Statement::Verdict(Verdict::Jump(MARK_OFF_CLUSTER.into())))
            }
            Role::External => {
                self.then_onward(Statement::SetMarkBits(settings.masquerade_bit.mark()))
            }
            Role::LocalPolicy => self.local_policy(&settings.detector(family)),
        }
    }

    fn then_onward(&self, first: Statement) -> Vec<Rule> {
        let onward = self
            .onward()
            .into_iter()
            .map(|handle| Rule::new([goto(&handle)]));
        std::iter::once(Rule::new([first])).chain(onward).collect()
    }

    /// Returns the rules of external policy Local. As in kube-proxy, traffic from this node may
    /// leave it.
    fn local_policy(&self, detector: &LocalDetector) -> Vec<Rule> {
        let onward = self.onward();
        let (pods, node) = (onward.first(), onward.get(1));
        let from_pods = detector.match_local_pods(Comparison::Is).zip(pods);
        let mut rules: Vec<Rule> = from_pods
            .map(|(from, handle)| Rule::new([from, goto(handle)]))
            .into_iter()
            .collect();
        rules.extend(node.map(|handle| Rule::new([Statement::SourceIsLocal, goto(handle)])));
        rules.push(Rule::new([Statement::VerdictMap(
            self.by.key(),
            self.by.frontends(Scope::Local).name(),
        )]));
        rules.push(Rule::new([Statement::Verdict(Verdict::Drop)]));
        rules
    }

    /// Returns the rules that translate packets to a random endpoint.
    ///
    /// A packet evaluates the rules of the generation in which it started, but looks up the
    /// elements of the newest one. If endpoints were removed since, the random index may have none;
    /// index 0 has one as long as any endpoint exists. Otherwise, or if the table was deleted, the
    /// packet is dropped and the client retries: without a verdict it would leave the node with the
    /// service's address, and after a rejection the client would give up.
    fn balance(&self, scope: Scope) -> Vec<Rule> {
        let map = self.by.endpoints(scope).name();
        let pick = |n| Rule::new([Statement::DnatByMap(self.by.endpoint_key(n), map.clone())]);
        let mut rules = vec![pick(self.endpoints)];
        if self.endpoints > 1 {
            rules.push(pick(1));
        }
        rules.push(Rule::new([Statement::Verdict(Verdict::Drop)]));
        rules
    }
}

/// Returns whether a chain that frontends lead to is one of external policy Local.
pub(crate) fn is_bound_to_node(chain: &Name) -> bool {
    let name = chain.as_str();
    name.strip_prefix("nodeport-")
        .unwrap_or(name)
        .starts_with("local-")
}

fn goto(handle: &FrontendChain) -> Statement {
    Statement::Verdict(Verdict::Goto(handle.name()))
}

/// Returns the rule that translates packets of remembered clients to their endpoint.
fn follow(clients: &Clients) -> Vec<Rule> {
    vec![Rule::new([Statement::DnatByMap(
        affinity_key(),
        clients.map(),
    )])]
}

/// Returns the rules that remember the endpoint by client and frontend. There is one rule for each
/// protocol, because nft reads the original port only after a match of the protocol. An update of a
/// full map does not match, so that the last rule counts the clients that are not remembered.
fn learn(clients: &Clients, seconds: u32) -> Vec<Rule> {
    let rule = |protocol: Protocol| {
        Rule::new([
            is_protocol(protocol),
            Statement::UpdateMap {
                map: clients.map(),
                key: original_affinity_key(),
                timeout: Duration::from_secs(seconds.into()),
                data: target(),
            },
            Statement::Verdict(Verdict::Return),
        ])
    };
    let count = Rule::new([Statement::InSet(
        vec![Selector::L4Protocol],
        Comparison::Is,
        clients.forgotten(),
    )]);
    let updates = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(rule);
    updates.into_iter().chain([count]).collect()
}

fn is_protocol(protocol: Protocol) -> Statement {
    Statement::Match(
        Selector::L4Protocol,
        Comparison::Is,
        Operand::Protocol(protocol.number()),
    )
}

/// Returns the one rule that every packet evaluates; only new connections continue.
fn learn_hook() -> Vec<Rule> {
    vec![Rule::new([
        Statement::CtState(CtState::New.into()),
        Statement::CtStatus(CtStatus::Dnat),
        Statement::Verdict(Verdict::Jump(SharedChain::LearnNew.name())),
    ])]
}

/// Returns the rules that look up whether a frontend has session affinity, and with which timeout.
/// There is one rule for each protocol, as in [`learn`].
fn learn_new() -> Vec<Rule> {
    let look_up = |protocol: Protocol, by: By| {
        let mut statements = vec![is_protocol(protocol)];
        if by == By::NodePort {
            statements.push(Statement::InSet(
                vec![Selector::OriginalDestinationAddress],
                Comparison::Is,
                NODEPORT_ADDRESSES.into(),
            ));
        }
        let map: ServiceSet = by.affinity();
        statements.push(Statement::VerdictMap(by.original_key(), map.name()));
        Rule::new(statements)
    };
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
        .into_iter()
        .flat_map(|protocol| [By::Address, By::NodePort].map(|by| look_up(protocol, by)))
        .collect()
}
