//! The chains that services share.

use super::layout::{ServiceSet, frontend_key, indexed, nodeport_key};
use super::skeleton::{MARK_OFF_CLUSTER, MASQUERADE_BIT, REJECT};
use crate::ruleset::{Chain, Name, Rule, Statement, Verdict};

/// What a shared chain does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SharedKind {
    /// Translates it to a random endpoint of its frontend.
    LoadBalance,
    /// Marks it for masquerading if the client is outside of the pod network, then balances.
    Cluster,
    /// Marks it for masquerading, then balances.
    External,
    /// Marks it for masquerading and translates it to a random endpoint of its NodePort.
    NodePort,
}

/// A chain shared by all frontends of one kind with the same number of endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SharedChain {
    /// What it does.
    pub kind: SharedKind,
    /// The number of endpoints, at least 1.
    pub endpoints: u32,
}

impl SharedChain {
    /// The chain's name, such as `lb-10`.
    pub fn name(self) -> Name {
        let kind = match self.kind {
            SharedKind::LoadBalance => "lb",
            SharedKind::Cluster => "cluster",
            SharedKind::External => "external",
            SharedKind::NodePort => "nodeport",
        };
        Name::from(format!("{kind}-{}", self.endpoints))
    }

    /// The chain that this one goes on to.
    pub fn next(self) -> Option<SharedChain> {
        match self.kind {
            SharedKind::Cluster | SharedKind::External => Some(SharedChain {
                kind: SharedKind::LoadBalance,
                ..self
            }),
            SharedKind::LoadBalance | SharedKind::NodePort => None,
        }
    }

    /// The rules.
    pub fn chain(self) -> Chain {
        let mark = || Rule::new([Statement::SetMarkBits(MASQUERADE_BIT)]);
        let rules = match self.kind {
            SharedKind::LoadBalance => self.balance(frontend_key(), ServiceSet::Endpoints),
            SharedKind::NodePort => {
                let mut rules = vec![mark()];
                rules.extend(self.balance(nodeport_key(), ServiceSet::NodePortEndpoints));
                rules
            }
            SharedKind::External => {
                let mut rules = vec![mark()];
                rules.extend(self.next().map(go_to));
                rules
            }
            SharedKind::Cluster => {
                let jump = Verdict::Jump(MARK_OFF_CLUSTER.into());
                let mut rules = vec![Rule::new([Statement::Verdict(jump)])];
                rules.extend(self.next().map(go_to));
                rules
            }
        };
        Chain { base: None, rules }
    }

    /// Translation to a random endpoint.
    ///
    /// A packet keeps walking the rules it started with, but sees the elements of the newest
    /// transaction. If that took endpoints away, the random index may have none; index 0 has one
    /// as long as there is any. If none is left the packet is refused: falling through, it would
    /// leave the node with the service's address.
    fn balance(self, key: Vec<crate::ruleset::Selector>, map: ServiceSet) -> Vec<Rule> {
        let pick = |endpoints| {
            Rule::new([Statement::DnatByMap(
                indexed(key.clone(), endpoints),
                map.name(),
            )])
        };
        let mut rules = vec![pick(self.endpoints)];
        if self.endpoints > 1 {
            rules.push(pick(1));
        }
        rules.push(Rule::new([Statement::Verdict(Verdict::Goto(
            REJECT.into(),
        ))]));
        rules
    }
}

fn go_to(chain: SharedChain) -> Rule {
    Rule::new([Statement::Verdict(Verdict::Goto(chain.name()))])
}
