//! The chains that services share.

use std::time::Duration;

use super::layout::{
    AFFINITY, By, NODEPORT_ADDRESSES, Scope, ServiceSet, affinity_key, original_affinity_key,
    target,
};
use super::settings::{LocalDetector, Settings};
use super::skeleton::{DSTNAT, MARK_OFF_CLUSTER};
use super::sources::SourceList;
use crate::model::{Family, Protocol};
use crate::ruleset::{
    BaseChain, Chain, ChainKind, Comparison, CtState, CtStatus, Hook, Name, Operand, Rule,
    Selector, Set, Statement, Verdict,
};

/// What a shared chain does with the packets of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Translates them to a random endpoint of the scope.
    Balance(Scope),
    /// Marks them for masquerading if the client is outside of the pod network, then balances.
    Cluster,
    /// Marks them for masquerading, then balances.
    External,
    /// External policy Local: balances those of this node's pods, marks and balances those of
    /// the node itself, and looks up local endpoints for all others.
    LocalPolicy,
}

/// A chain shared by all frontends it fits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SharedChain {
    /// Handles the packets of frontends with the same number of endpoints.
    Handle(Handle),
    /// Remembers which endpoint a client was sent to.
    Learn {
        /// For how long, without another connection.
        seconds: u32,
    },
    /// Passes new connections that were translated on to be remembered if their frontend has
    /// session affinity.
    LearnNew,
    /// A base chain that sees translated packets and leads to [`SharedChain::LearnNew`]. It costs
    /// every packet a little, so it exists only while there is a frontend with session affinity.
    LearnHook(LearnAt),
    /// Lets the clients in a list of ranges on to the verdicts of firewalled frontends, and drops
    /// all others. The ranges are in a set of its own.
    Sources(SourceList),
}

/// A chain that handles the packets of frontends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Handle {
    /// How the frontends are found.
    pub by: By,
    /// What is done.
    pub role: Role,
    /// Whether clients go to the endpoint they were sent to before.
    pub sticky: bool,
    /// The number of endpoints, at least 1.
    pub endpoints: u32,
}

/// Where packets are seen after their destination was translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LearnAt {
    /// Those that came from elsewhere.
    Prerouting,
    /// Those of the node itself.
    Output,
}

impl SharedChain {
    /// The chain's name, such as `lb-10` or `nodeport-external-sticky-3`.
    pub fn name(&self) -> Name {
        match self {
            SharedChain::Handle(handle) => handle.name(),
            SharedChain::Learn { seconds } => format!("learn-{seconds}").into(),
            SharedChain::LearnNew => "learn-new".into(),
            SharedChain::LearnHook(LearnAt::Prerouting) => "learn-prerouting".into(),
            SharedChain::LearnHook(LearnAt::Output) => "learn-output".into(),
            SharedChain::Sources(list) => list.name(),
        }
    }

    /// The set that exists as long as the chain does, for its rules alone.
    pub fn set(&self) -> Option<(Name, Set)> {
        match self {
            SharedChain::Sources(list) => Some((list.name(), list.set())),
            SharedChain::Handle(_)
            | SharedChain::Learn { .. }
            | SharedChain::LearnNew
            | SharedChain::LearnHook(_) => None,
        }
    }

    /// The chains that this one goes on to, or needs to be reached.
    fn onward(&self) -> Vec<SharedChain> {
        match self {
            SharedChain::Handle(handle) => handle
                .onward()
                .into_iter()
                .map(SharedChain::Handle)
                .collect(),
            SharedChain::Learn { .. } => [LearnAt::Prerouting, LearnAt::Output]
                .map(SharedChain::LearnHook)
                .into(),
            SharedChain::LearnHook(_) => vec![SharedChain::LearnNew],
            SharedChain::LearnNew | SharedChain::Sources(_) => vec![],
        }
    }

    /// This chain and all that it leads to, directly or not.
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

    /// The rules.
    pub fn chain(&self, settings: &Settings, family: Family) -> Chain {
        let (base, rules) = match self {
            SharedChain::Handle(handle) => (None, handle.rules(settings, family)),
            SharedChain::Learn { seconds } => (None, learn(Duration::from_secs((*seconds).into()))),
            SharedChain::LearnNew => (None, learn_new()),
            SharedChain::LearnHook(at) => (Some(at.base()), learn_hook()),
            SharedChain::Sources(list) => (None, list.rules()),
        };
        Chain { base, rules }
    }
}

impl LearnAt {
    /// Just behind the translation of destinations.
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

impl Handle {
    fn name(self) -> Name {
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
        let sticky = if self.sticky { "-sticky" } else { "" };
        format!("{by}{role}{sticky}-{}", self.endpoints).into()
    }

    fn onward(self) -> Vec<Handle> {
        let with = |role| Handle { role, ..self };
        match self.role {
            Role::Balance(_) if self.sticky => vec![Handle {
                sticky: false,
                ..self
            }],
            Role::Balance(_) => vec![],
            Role::Cluster | Role::External => vec![with(Role::Balance(Scope::Cluster))],
            Role::LocalPolicy => vec![with(Role::Balance(Scope::Cluster)), with(Role::External)],
        }
    }

    fn rules(self, settings: &Settings, family: Family) -> Vec<Rule> {
        match self.role {
            // Clients that are known go to their endpoint, the others on to a random one.
            Role::Balance(_) if self.sticky => {
                self.then_onward(Statement::DnatByMap(affinity_key(), AFFINITY.into()))
            }
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

    fn then_onward(self, first: Statement) -> Vec<Rule> {
        let onward = self
            .onward()
            .into_iter()
            .map(|handle| Rule::new([goto(handle)]));
        std::iter::once(Rule::new([first])).chain(onward).collect()
    }

    /// kube-proxy's short circuits of external policy Local: what comes from this node does not
    /// need to be kept on it.
    fn local_policy(self, detector: &LocalDetector) -> Vec<Rule> {
        let onward = self.onward();
        let (pods, node) = (onward.first().copied(), onward.get(1).copied());
        let from_pods = detector.from_local_pods(Comparison::Is).zip(pods);
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

    /// Translation to a random endpoint.
    ///
    /// A packet keeps walking the rules it started with, but sees the elements of the newest
    /// transaction. If that took endpoints away, the random index may have none; index 0 has one
    /// as long as there is any. If none is left, or the whole table has gone, the packet is dropped:
    /// falling through, it would leave the node with the service's address, and refused, a client
    /// would give up that only has to ask again.
    fn balance(self, scope: Scope) -> Vec<Rule> {
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

fn goto(handle: Handle) -> Statement {
    Statement::Verdict(Verdict::Goto(handle.name()))
}

/// Remembers the translated destination for the client and the destination before. One rule a
/// protocol, because nft reads the original port only where it knows the protocol.
fn learn(timeout: Duration) -> Vec<Rule> {
    let rule = |protocol: Protocol| {
        Rule::new([
            is_protocol(protocol),
            Statement::UpdateMap {
                map: AFFINITY.into(),
                key: original_affinity_key(),
                timeout,
                data: target(),
            },
        ])
    };
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
        .map(rule)
        .into()
}

fn is_protocol(protocol: Protocol) -> Statement {
    Statement::Match(
        Selector::L4Protocol,
        Comparison::Is,
        Operand::Protocol(protocol.number()),
    )
}

/// Every packet of the node evaluates this rule, those of known connections no other.
fn learn_hook() -> Vec<Rule> {
    vec![Rule::new([
        Statement::CtState(CtState::New.into()),
        Statement::CtStatus(CtStatus::Dnat),
        Statement::Verdict(Verdict::Jump(SharedChain::LearnNew.name())),
    ])]
}

/// Looks up who is remembered, and for how long. One rule a protocol, as for [`learn`].
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
