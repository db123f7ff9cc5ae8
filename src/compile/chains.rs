//! The chains that services share.

use std::time::Duration;

use super::layout::{
    AFFINITY, By, NODEPORT_ADDRESSES, Scope, ServiceSet, affinity_key, original_affinity_key,
    target,
};
use super::settings::{LocalDetector, Settings};
use super::skeleton::{DSTNAT, MARK_OFF_CLUSTER, MASQUERADE_BIT, REJECT};
use crate::model::Protocol;
use crate::ruleset::{
    BaseChain, Chain, ChainKind, Comparison, CtState, CtStatus, Hook, Name, Operand, Rule,
    Selector, Statement, Verdict,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SharedChain {
    /// Handles the packets of frontends with the same number of endpoints.
    Handle {
        /// How the frontends are found.
        by: By,
        /// What is done.
        role: Role,
        /// Whether clients go to the endpoint they were sent to before.
        sticky: bool,
        /// The number of endpoints, at least 1.
        endpoints: u32,
    },
    /// Remembers which endpoint a client was sent to.
    Learn {
        /// For how long, without another connection.
        seconds: u32,
    },
    /// A base chain that sees translated packets and passes those of frontends with session
    /// affinity on to be remembered. It costs every packet a little, so it exists only while
    /// there is such a frontend.
    LearnHook(LearnAt),
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
    pub fn name(self) -> Name {
        match self {
            SharedChain::Handle {
                by,
                role,
                sticky,
                endpoints,
            } => {
                let by = match by {
                    By::Address => "",
                    By::NodePort => "nodeport-",
                };
                let role = match role {
                    Role::Balance(Scope::Cluster) => "lb",
                    Role::Balance(Scope::Local) => "lb-local",
                    Role::Cluster => "cluster",
                    Role::External => "external",
                    Role::LocalPolicy => "local",
                };
                let sticky = if sticky { "-sticky" } else { "" };
                format!("{by}{role}{sticky}-{endpoints}").into()
            }
            SharedChain::Learn { seconds } => format!("learn-{seconds}").into(),
            SharedChain::LearnHook(LearnAt::Prerouting) => "learn-prerouting".into(),
            SharedChain::LearnHook(LearnAt::Output) => "learn-output".into(),
        }
    }

    /// The chains that this one goes on to, or needs to be reached.
    pub fn onward(self) -> Vec<SharedChain> {
        match self {
            SharedChain::Handle {
                by,
                role,
                sticky,
                endpoints,
            } => {
                let with = |role, sticky| SharedChain::Handle {
                    by,
                    role,
                    sticky,
                    endpoints,
                };
                match role {
                    Role::Balance(scope) if sticky => vec![with(Role::Balance(scope), false)],
                    Role::Balance(_) => vec![],
                    Role::Cluster | Role::External => {
                        vec![with(Role::Balance(Scope::Cluster), sticky)]
                    }
                    Role::LocalPolicy => vec![
                        with(Role::Balance(Scope::Cluster), sticky),
                        with(Role::External, sticky),
                    ],
                }
            }
            SharedChain::Learn { .. } => [LearnAt::Prerouting, LearnAt::Output]
                .map(SharedChain::LearnHook)
                .into(),
            SharedChain::LearnHook(_) => vec![],
        }
    }

    /// This chain and all that it leads to, directly or not.
    pub fn closure(self) -> Vec<SharedChain> {
        let mut found = vec![self];
        let mut next = 0;
        while let Some(chain) = found.get(next) {
            found.extend(chain.onward());
            next += 1;
        }
        found
    }

    /// The rules.
    pub fn chain(self, settings: &Settings, family: crate::model::Family) -> Chain {
        match self {
            SharedChain::Handle {
                by,
                role,
                sticky,
                endpoints,
            } => Chain {
                base: None,
                rules: match role {
                    Role::Balance(_) if sticky => self.remembered(),
                    Role::Balance(scope) => balance(by, scope, endpoints),
                    Role::Cluster => {
                        let jump = Verdict::Jump(MARK_OFF_CLUSTER.into());
                        self.then_onward(Rule::new([Statement::Verdict(jump)]))
                    }
                    Role::External => {
                        self.then_onward(Rule::new([Statement::SetMarkBits(MASQUERADE_BIT)]))
                    }
                    Role::LocalPolicy => self.local_policy(by, &settings.detector(family)),
                },
            },
            SharedChain::Learn { seconds } => Chain {
                base: None,
                rules: learn(Duration::from_secs(seconds.into())),
            },
            SharedChain::LearnHook(at) => Chain {
                base: Some(BaseChain {
                    kind: ChainKind::Filter,
                    hook: match at {
                        LearnAt::Prerouting => Hook::Prerouting,
                        LearnAt::Output => Hook::Output,
                    },
                    priority: DSTNAT + 1,
                }),
                rules: learn_hook(),
            },
        }
    }

    fn then_onward(self, first: Rule) -> Vec<Rule> {
        let onward = self
            .onward()
            .into_iter()
            .map(|chain| Rule::new([goto(chain)]));
        std::iter::once(first).chain(onward).collect()
    }

    /// Clients that are known go to their endpoint, the others on to a random one.
    fn remembered(self) -> Vec<Rule> {
        self.then_onward(Rule::new([Statement::DnatByMap(
            affinity_key(),
            AFFINITY.into(),
        )]))
    }

    /// kube-proxy's short circuits of external policy Local: what comes from this node does not
    /// need to be kept on it.
    fn local_policy(self, by: By, detector: &LocalDetector) -> Vec<Rule> {
        let onward = self.onward();
        let (pods, node) = (onward.first().copied(), onward.get(1).copied());
        let from_pods = detector.from_local_pods(Comparison::Is).zip(pods);
        let mut rules: Vec<Rule> = from_pods
            .map(|(from, chain)| Rule::new([from, goto(chain)]))
            .into_iter()
            .collect();
        rules.extend(node.map(|chain| Rule::new([Statement::SourceIsLocal, goto(chain)])));
        rules.push(Rule::new([Statement::VerdictMap(
            by.key(),
            by.frontends(Scope::Local).name(),
        )]));
        rules.push(Rule::new([Statement::Verdict(Verdict::Drop)]));
        rules
    }
}

fn goto(chain: SharedChain) -> Statement {
    Statement::Verdict(Verdict::Goto(chain.name()))
}

/// Translation to a random endpoint.
///
/// A packet keeps walking the rules it started with, but sees the elements of the newest
/// transaction. If that took endpoints away, the random index may have none; index 0 has one as
/// long as there is any. If none is left the packet ends here: falling through, it would leave
/// the node with the service's address.
fn balance(by: By, scope: Scope, endpoints: u32) -> Vec<Rule> {
    let map = by.endpoints(scope).name();
    let pick = |n| Rule::new([Statement::DnatByMap(by.endpoint_key(n), map.clone())]);
    let mut rules = vec![pick(endpoints)];
    if endpoints > 1 {
        rules.push(pick(1));
    }
    let end = match scope {
        Scope::Cluster => Verdict::Goto(REJECT.into()),
        Scope::Local => Verdict::Drop,
    };
    rules.push(Rule::new([Statement::Verdict(end)]));
    rules
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

fn learn_hook() -> Vec<Rule> {
    let translated = [
        Statement::CtState(CtState::New),
        Statement::CtStatus(CtStatus::Dnat),
    ];
    let look_up = |protocol: Protocol, by: By| {
        let mut statements: Vec<Statement> = translated.clone().into();
        statements.push(is_protocol(protocol));
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
