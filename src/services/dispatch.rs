//! The value of a frontend, a number that leads a packet to the chains that handle it.
//!
//! Frontends are a map to data, not to verdicts: whenever an element with a verdict changes, the
//! kernel validates the whole table, in a time that grows with the number of services. A number
//! has two halves, the [`Role`] and the [`Count`] of endpoints. One rule stores it in the packet's
//! priority, the only field that text for nft can store and look up in one rule, and looks up the
//! chain of the role. Then the chain of the count replaces it by the index of an endpoint, and one
//! rule translates the packet to that endpoint. Chains behind the translation clear the priority.
//!
//! What a packet loses by that is documented in docs/ruleset.md.

use super::balance::{Count, DRAW, DRAW_FILLED, DRAWS};
use super::layout::{
    ALLOWED_CLIENT, By, EndpointScope, FIREWALLED, MARK_OFF_CLUSTER, REJECT, ServiceSet,
    priority_map,
};
use super::settings::ServiceSettings;
use crate::model::Family;
use crate::nft::{
    Chain, Comparison, Data, Element, Key, Name, Rule, Set, Statement, Value, Verdict,
};

/// How packets are treated before they are balanced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Marks no packets.
    Balance,
    /// Marks packets from outside of the pod network for masquerading.
    Cluster,
    /// Marks all packets for masquerading.
    External,
    /// Applies external policy Local: packets of this node's pods go to all endpoints, packets of
    /// the node itself too, but marked, and all others to the endpoints on this node.
    LocalPolicy,
}

/// The value of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Dispatch {
    /// What happens to its packets.
    pub action: FrontendAction,
    /// Whether only clients in the source ranges of the service reach it.
    pub firewalled: bool,
}

/// What happens to the packets of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FrontendAction {
    /// They go to an endpoint.
    Balance {
        /// What happens before.
        role: Role,
        /// Whether clients are remembered.
        sticky: bool,
        /// The number of endpoints.
        count: Count,
    },
    /// They are rejected.
    Reject,
    /// They are dropped.
    Drop,
}

/// The verdict map of roles for clients in the source ranges.
pub(super) const ALLOWED_ROLES: &str = "allowed-roles";

const STICKY: u16 = 0x10;
const FIREWALLED_BIT: u16 = 0x20;
/// The bits of a number that hold the role.
pub(super) const ROLE: u32 = 0xffff_0000;
/// The same without the bit of source ranges.
pub(super) const ALLOWED_ROLE: u32 = ROLE & !((FIREWALLED_BIT as u32) << 16);
/// The bits of a number that hold the count.
const COUNT: u32 = 0x0000_ffff;

impl Role {
    fn number(self) -> u16 {
        match self {
            Role::Balance => 1,
            Role::Cluster => 2,
            Role::External => 3,
            Role::LocalPolicy => 4,
        }
    }

    /// Returns the roles of frontends that are looked up by a key.
    fn all(by: By) -> &'static [Role] {
        match by {
            By::Address => &[
                Role::Balance,
                Role::Cluster,
                Role::External,
                Role::LocalPolicy,
            ],
            By::NodePort => &[Role::Balance, Role::External, Role::LocalPolicy],
        }
    }

    fn chain(self, by: By, sticky: bool) -> Name {
        let name = match self {
            Role::Balance => "lb",
            Role::Cluster => "cluster",
            Role::External => "external",
            Role::LocalPolicy => "local",
        };
        by.chain(name, sticky)
    }

    fn rules(self, by: By, sticky: bool, settings: &ServiceSettings, family: Family) -> Vec<Rule> {
        let goto = |role: Role| Statement::Verdict(Verdict::Goto(role.chain(by, sticky)));
        let (balance, drop) = (goto(Role::Balance), Statement::Verdict(Verdict::Drop));
        match self {
            Role::Balance if sticky => follow_or(by, EndpointScope::Cluster),
            Role::Balance => balance_among(by, EndpointScope::Cluster),
            Role::Cluster => {
                let mark = Verdict::Jump(MARK_OFF_CLUSTER.into());
                vec![Rule::new([Statement::Verdict(mark)]), Rule::new([balance])]
            }
            Role::External => {
                let mark = Statement::SetMarkBits(settings.masquerade_bit.mark());
                vec![Rule::new([mark]), Rule::new([balance])]
            }
            Role::LocalPolicy => {
                let detector = settings.detector(family);
                let from_pods = detector.match_local_pods(Comparison::Is);
                let mut rules: Vec<Rule> = from_pods
                    .map(|from_pods| Rule::new([from_pods, balance]))
                    .into_iter()
                    .collect();
                // As in kube-proxy, traffic from this node may leave it.
                rules.push(Rule::new([Statement::SourceIsLocal, goto(Role::External)]));
                let local = Verdict::Goto(balancer(by, EndpointScope::Local, sticky));
                rules.push(Rule::new([
                    store_number(by, EndpointScope::Local),
                    Statement::Verdict(local),
                ]));
                rules.push(Rule::new([drop]));
                rules
            }
        }
    }
}

/// Stores the number of a frontend in the packet's priority.
fn store_number(by: By, scope: EndpointScope) -> Statement {
    Statement::PriorityByMap(by.key(), by.frontends(scope).name())
}

/// Returns the name of the chain that balances packets over the endpoints of a scope.
fn balancer(by: By, scope: EndpointScope, sticky: bool) -> Name {
    let name = match scope {
        EndpointScope::Cluster => "lb",
        EndpointScope::Local => "lb-local",
    };
    by.chain(name, sticky)
}

/// Returns the name of the chain that translates packets to the endpoint with an index.
fn pick(by: By, scope: EndpointScope) -> Name {
    let name = match scope {
        EndpointScope::Cluster => "pick",
        EndpointScope::Local => "pick-local",
    };
    by.chain(name, false)
}

/// Returns the rules that translate a packet with the number of its frontend to a random endpoint.
///
/// A packet evaluates the rules of the generation in which it started, but looks up the elements of
/// the newest one. If endpoints were removed since, the index may have none; index 1 has one as long
/// as any endpoint exists. Otherwise, or if the table was deleted, the packet is dropped and the
/// client retries: without a verdict it would leave the node with the service's address, and after a
/// rejection the client would give up.
fn balance_among(by: By, scope: EndpointScope) -> Vec<Rule> {
    let draw = |map: &str| Statement::PriorityVerdict {
        mask: COUNT,
        map: map.into(),
    };
    let pick = || Statement::Verdict(Verdict::Jump(pick(by, scope)));
    let mut rules = vec![Rule::new([draw(DRAW)]), Rule::new([pick()])];
    let again = std::iter::repeat_n(DRAW, DRAWS - 1).chain([DRAW_FILLED]);
    for map in again {
        // The index has replaced the number.
        rules.push(Rule::new([store_number(by, scope), draw(map)]));
        rules.push(Rule::new([pick()]));
    }
    rules.push(Rule::new([Statement::SetPriority(1), pick()]));
    rules.push(Rule::new([Statement::Verdict(Verdict::Drop)]));
    rules
}

/// Returns the rules that look for the endpoint of a remembered client, and balance the packets of
/// others.
fn follow_or(by: By, scope: EndpointScope) -> Vec<Rule> {
    let follow = Statement::VerdictMap(by.key(), by.sticky().name());
    let balance = Verdict::Goto(balancer(by, scope, false));
    vec![
        Rule::new([follow]),
        Rule::new([Statement::Verdict(balance)]),
    ]
}

/// Returns the rule that looks up the frontend of a packet and leads to the chain of its role.
///
/// A packet without a frontend leaves the rule before its priority is looked up, which may be one of
/// its own.
pub(super) fn dispatch(by: By) -> [Statement; 2] {
    let verdict = Statement::PriorityVerdict {
        mask: ROLE,
        map: by.roles(),
    };
    [store_number(by, EndpointScope::Cluster), verdict]
}

/// Returns the verdict maps from a role to its chain.
pub(super) fn roles(by: By) -> Vec<(Name, Set)> {
    let element = |action: FrontendAction, firewalled, verdict: Verdict| {
        let role = Dispatch { action, firewalled }.role();
        let key = Key::build().number(u32::from(role) << 16).finish();
        Element::with_verdict(key, verdict)
    };
    let mut plain = vec![
        (FrontendAction::Reject, Verdict::Goto(REJECT.into())),
        (FrontendAction::Drop, Verdict::Drop),
    ];
    for sticky in [false, true] {
        plain.extend(Role::all(by).iter().map(|role| {
            let action = FrontendAction::Balance {
                role: *role,
                sticky,
                count: Count::of(1),
            };
            (action, Verdict::Goto(role.chain(by, sticky)))
        }));
    }
    let firewalled = plain
        .iter()
        .map(|(action, _)| element(*action, true, Verdict::Goto(FIREWALLED.into())));
    let firewalled: Vec<Element> = firewalled.collect();
    let plain = plain.into_iter();
    let plain: Vec<Element> = plain
        .map(|(action, verdict)| element(action, false, verdict))
        .collect();
    match by {
        By::NodePort => vec![(by.roles(), priority_map(plain))],
        // The chains for clients in the source ranges must not lead back to those ranges.
        By::Address => vec![
            (ALLOWED_ROLES.into(), priority_map(plain.clone())),
            (by.roles(), priority_map([plain, firewalled].concat())),
        ],
    }
}

pub(super) fn chains(by: By, settings: &ServiceSettings, family: Family) -> Vec<(Name, Chain)> {
    let mut chains = Vec::new();
    let mut add = |name: Name, rules: Vec<Rule>| {
        chains.push((name, Chain { base: None, rules }));
    };
    for sticky in [false, true] {
        for role in Role::all(by) {
            let rules = role.rules(by, sticky, settings, family);
            add(role.chain(by, sticky), rules);
        }
    }
    let local = |sticky| balancer(by, EndpointScope::Local, sticky);
    add(local(false), balance_among(by, EndpointScope::Local));
    add(local(true), follow_or(by, EndpointScope::Local));
    for scope in [EndpointScope::Cluster, EndpointScope::Local] {
        let endpoints = by.endpoints(scope).name();
        let translate = Statement::DnatByMap(by.endpoint_key(), endpoints);
        add(pick(by, scope), vec![Rule::new([translate])]);
    }
    let drop = || Rule::new([Statement::Verdict(Verdict::Drop)]);
    if by == By::Address {
        let lists = Statement::VerdictMap(by.key(), ServiceSet::FirewalledFrontends.name());
        add(FIREWALLED.into(), vec![Rule::new([lists]), drop()]);
        let verdict = Statement::PriorityVerdict {
            mask: ALLOWED_ROLE,
            map: ALLOWED_ROLES.into(),
        };
        add(ALLOWED_CLIENT.into(), vec![Rule::new([verdict]), drop()]);
    }
    chains
}

impl Dispatch {
    fn role(self) -> u16 {
        let role = match self.action {
            FrontendAction::Balance { role, sticky, .. } if sticky => role.number() | STICKY,
            FrontendAction::Balance { role, .. } => role.number(),
            FrontendAction::Reject => 8,
            FrontendAction::Drop => 9,
        };
        if self.firewalled {
            role | FIREWALLED_BIT
        } else {
            role
        }
    }

    /// Returns the value of the map element.
    pub fn data(self) -> Data {
        let count = match self.action {
            FrontendAction::Balance { count, .. } => count.code(),
            FrontendAction::Reject | FrontendAction::Drop => 0,
        };
        let number = u32::from(self.role()) << 16 | u32::from(count);
        Data::build().number(number).finish()
    }
}

/// Returns the value of a frontend in the map of local frontends.
pub(super) fn local_data(count: Count) -> Data {
    count.key()
}

/// Returns whether an element is that of a frontend with external policy Local.
pub(super) fn has_local_policy(element: &Element) -> bool {
    let Value::Data(data) = &element.value else {
        return false;
    };
    let number = <[u8; 4]>::try_from(data.as_bytes()).map(u32::from_ne_bytes);
    // The last digit of the role.
    number.is_ok_and(|number| number >> 16 & 0xf == u32::from(Role::LocalPolicy.number()))
}
