//! The chains that services share.

use std::time::Duration;

use super::balance::{DRAW, draws};
use super::layout::{
    By, Clients, DSTNAT, NODEPORT_ADDRESSES, ServiceSet, affinity_key, original_affinity_key,
    target,
};
use super::sources::SourceList;
use crate::model::Protocol;
use crate::nft::{
    BaseChain, Chain, ChainKind, Comparison, CtState, CtStatus, Element, Hook, Name, Operand, Rule,
    Selector, Set, Statement, Verdict,
};

/// Chains that frontends share. Sets that only they read are created and deleted with them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SharedChain {
    /// The chains that draw the index of an endpoint.
    Draw,
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
    /// Lets clients in a list of source ranges pass, and drops packets of all others. The ranges are in a set of its own.
    Sources(SourceList),
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
    /// Returns the chain's name, such as `learn-10800/shop`; of several, the beginning.
    pub fn name(&self) -> Name {
        match self {
            SharedChain::Draw => DRAW.into(),
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
            SharedChain::Learn { clients, .. } => vec![
                SharedChain::LearnHook(LearnAt::Prerouting),
                SharedChain::LearnHook(LearnAt::Output),
                SharedChain::Follow(clients.clone()),
            ],
            SharedChain::LearnHook(_) => vec![SharedChain::LearnNew],
            SharedChain::Draw
            | SharedChain::Follow(_)
            | SharedChain::LearnNew
            | SharedChain::Sources(_) => vec![],
        }
    }

    /// Returns this chain and all chains that it needs, each after the chains that lead to it.
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
            SharedChain::Draw
            | SharedChain::Learn { .. }
            | SharedChain::LearnNew
            | SharedChain::LearnHook(_) => vec![],
        }
    }

    /// Returns the elements that lead to the chains, in maps that always exist.
    pub fn elements(&self) -> &'static [(Name, Vec<Element>)] {
        match self {
            SharedChain::Draw => &draws().elements,
            SharedChain::Follow(_)
            | SharedChain::Learn { .. }
            | SharedChain::LearnNew
            | SharedChain::LearnHook(_)
            | SharedChain::Sources(_) => &[],
        }
    }

    /// Returns the chains with their rules.
    pub fn chains(&self) -> Vec<(Name, Chain)> {
        let (base, rules) = match self {
            SharedChain::Draw => return draws().chains.clone(),
            SharedChain::Follow(clients) => (None, follow(clients)),
            SharedChain::Learn { clients, seconds } => (None, learn(clients, *seconds)),
            SharedChain::LearnNew => (None, learn_new()),
            SharedChain::LearnHook(at) => (Some(at.base()), learn_hook()),
            SharedChain::Sources(list) => (None, list.rules()),
        };
        vec![(self.name(), Chain { base, rules })]
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
