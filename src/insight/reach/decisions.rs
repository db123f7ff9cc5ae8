//! What the policies of each class decide about each other class.
//!
//! The judge is asked about one pair of addresses where all answers to the conditions of the
//! policies agree, once for each range of ports that the policies tell apart.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::rc::Rc;

use super::classes::{AddressClass, Asked, Classes, ConditionId, DIRECTIONS, Holder};
use super::port_set::{PROTOCOLS, PortSet, PortSets, SetId};
use crate::insight::Facts;
use crate::insight::answer::{Decision, Verdict};
use crate::insight::decision::{decide, is_own_node};
use crate::insight::ports::{Ports, ranges};
use crate::insight::service::{Compiled, source_of};
use crate::model::{Family, NamedPort, Protocol};
use crate::policies::{Connection, Direction};

/// The ends at which the policies ask the same.
#[derive(Debug)]
struct Target {
    family: Family,
    /// None for an uncertain holder, whose policies are not known before the judge is asked.
    asked: Option<(usize, Rc<str>)>,
    examples: Vec<IpAddr>,
    /// What it decides about each class at the other end, as indices; none where it is not asked.
    decided: Vec<Option<u32>>,
}

/// What the judge decided about a pair of addresses, which stand for their classes.
#[derive(Debug)]
struct Judged {
    direction: Direction,
    source: IpAddr,
    destination: IpAddr,
    asked: Option<(usize, Rc<str>)>,
    set: SetId,
}

/// Why one end decides as it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Cause {
    /// By its policies.
    Judged(u32),
    /// No policy of it may deny anything; the address class.
    Open(Direction, usize),
}

/// All decisions about pairs of classes.
pub(super) struct Decisions<'a> {
    facts: &'a Facts<'a>,
    pub classes: Vec<AddressClass>,
    asked: [HashMap<Rc<str>, Asked>; 2],
    /// By direction.
    targets: [Vec<Target>; 2],
    /// The target of each class, if a policy may deny it something.
    target_of: [Vec<Option<usize>>; 2],
    judged: Vec<Judged>,
    sets: RefCell<PortSets>,
    compiled: RefCell<Compiled>,
}

/// What the other end of a connection is to a target.
#[derive(PartialEq, Eq, Hash)]
enum Peer<'c> {
    Alike {
        met: Vec<ConditionId>,
        is_node: bool,
        ports: &'c [NamedPort],
    },
    Single(usize),
}

impl<'a> Decisions<'a> {
    /// Decides about all pairs.
    pub fn new(classes: Classes<'a>, facts: &'a Facts<'a>) -> Self {
        let mut decisions = Self {
            facts,
            classes: classes.all,
            asked: classes.asked,
            targets: Default::default(),
            target_of: Default::default(),
            judged: Vec::new(),
            sets: RefCell::new(PortSets::new()),
            compiled: RefCell::default(),
        };
        let mut judged = Vec::new();
        let [egress, ingress] = [0, 1].map(|at| decisions.decided(at, &mut judged));
        decisions.targets = [egress.0, ingress.0];
        decisions.target_of = [egress.1, ingress.1];
        decisions.judged = judged;
        decisions
    }

    /// Returns the targets of a direction with their decisions, and that of each class.
    fn decided(&self, at: usize, judged: &mut Vec<Judged>) -> (Vec<Target>, Vec<Option<usize>>) {
        let direction = DIRECTIONS.get(at).copied().unwrap_or(Direction::Ingress);
        let (mut targets, of_class) = self.targets(at, direction);
        for target in &mut targets {
            target.decided = self.decide_all(direction, target, judged);
        }
        (targets, of_class)
    }

    /// Returns the targets of a direction, and that of each class.
    fn targets(&self, at: usize, direction: Direction) -> (Vec<Target>, Vec<Option<usize>>) {
        let mut targets: Vec<Target> = Vec::new();
        let mut known = HashMap::new();
        let of_class = self.classes.iter().map(|class| {
            let asked = match class.holder {
                Holder::Uncertain(_) => None,
                Holder::Node | Holder::Outside => return None,
                Holder::Pod => Some(class.policies.get(at)?.clone()?),
            };
            // Only the destination's own names of ports count.
            let has_names = direction == Direction::Ingress
                && asked
                    .as_ref()
                    .and_then(|id| self.asked.get(at)?.get(id))
                    .is_none_or(|asked| asked.named_ports);
            let ports = has_names.then(|| class.ports.clone());
            let key = (class.family, class.holder, asked.clone(), ports);
            let next = targets.len();
            let target = *known.entry(key).or_insert(next);
            if target == next {
                targets.push(Target {
                    family: class.family,
                    asked: asked.map(|id| (at, id)),
                    examples: Vec::new(),
                    decided: Vec::new(),
                });
            }
            if let Some(target) = targets.get_mut(target) {
                target.examples.extend(&class.examples);
            }
            Some(target)
        });
        let of_class = of_class.collect();
        (targets, of_class)
    }

    fn decide_all(
        &self,
        direction: Direction,
        target: &Target,
        judged: &mut Vec<Judged>,
    ) -> Vec<Option<u32>> {
        let asked = self.asked(target.asked.as_ref());
        let mut known: HashMap<Peer, u32> = HashMap::new();
        let decided = self.classes.iter().enumerate().map(|(index, class)| {
            if class.family != target.family {
                return None;
            }
            let peer = match asked {
                Some(asked) if !matches!(class.holder, Holder::Uncertain(_)) => Peer::Alike {
                    met: class
                        .met
                        .iter()
                        .filter(|id| asked.peers.contains(id))
                        .copied()
                        .collect(),
                    is_node: class.holder == Holder::Node,
                    ports: match direction {
                        Direction::Egress if asked.named_ports => &class.ports,
                        Direction::Egress | Direction::Ingress => &[],
                    },
                },
                _ => Peer::Single(index),
            };
            if let Some(known) = known.get(&peer) {
                return Some(*known);
            }
            // A node to its own pods is another question, and so is an address to itself.
            let (source, destination) = self.pair(direction, target, class)?;
            let set = self.judge(direction, source, destination, asked);
            let next = u32::try_from(judged.len()).ok()?;
            judged.push(Judged {
                direction,
                source,
                destination,
                asked: target.asked.clone(),
                set: self.sets.borrow_mut().id(set),
            });
            known.insert(peer, next);
            Some(next)
        });
        decided.collect()
    }

    fn asked(&self, policies: Option<&(usize, Rc<str>)>) -> Option<&Asked> {
        let (at, id) = policies?;
        self.asked.get(*at)?.get(id)
    }

    /// Returns addresses of a target and of a class at the other end, the source first.
    fn pair(
        &self,
        direction: Direction,
        target: &Target,
        class: &AddressClass,
    ) -> Option<(IpAddr, IpAddr)> {
        let ends = target.examples.iter().flat_map(|own| {
            let others = class.examples.iter();
            others.map(|other| match direction {
                Direction::Egress => (*own, *other),
                Direction::Ingress => (*other, *own),
            })
        });
        let mut ends = ends.filter(|(source, destination)| {
            class.holder != Holder::Node
                || direction == Direction::Egress
                || !self.is_own_node(*source, *destination)
        });
        // Several pods may have an uncertain address.
        let is_shared = matches!(class.holder, Holder::Uncertain(_));
        let first = ends.next()?;
        let is_pair = |(source, destination): &(IpAddr, IpAddr)| source != destination;
        let pair = [first].into_iter().chain(ends).find(is_pair);
        pair.or(is_shared.then_some(first))
    }

    /// Returns what the judge allows between two addresses.
    fn judge(
        &self,
        direction: Direction,
        source: IpAddr,
        destination: IpAddr,
        asked: Option<&Asked>,
    ) -> PortSet {
        let mut set = PortSet::default();
        self.each_decision(direction, source, destination, asked, |ports, decision| {
            if decision.verdict == Verdict::Allowed {
                set.add(ports.protocol, ports.range);
            }
        });
        set
    }

    fn each_decision(
        &self,
        direction: Direction,
        source: IpAddr,
        destination: IpAddr,
        asked: Option<&Asked>,
        mut each: impl FnMut(&Ports, Decision),
    ) {
        let facts = self.facts;
        let mut named: BTreeSet<(Protocol, u16, u16)> = match asked {
            Some(asked) => asked.ports.clone(),
            None => facts.policies.ports(),
        };
        if asked.is_none_or(|asked| asked.named_ports) {
            let inventory = facts.policies.inventory();
            let names = inventory.claimants(destination);
            let pods = names.filter_map(|name| inventory.pod(name));
            let pods = pods.chain(inventory.departed(destination));
            let ports = pods.flat_map(|pod| pod.ports.iter());
            named.extend(ports.map(|port| (port.protocol, port.port, port.port)));
        }
        let icmp = Ports {
            range: None,
            protocol: None,
        };
        let all = PROTOCOLS.into_iter().flat_map(|protocol| {
            let of_protocol = named.iter().filter(|(of, ..)| *of == protocol);
            ranges(
                of_protocol.map(|(_, first, last)| (*first, *last)),
                Some(protocol),
            )
        });
        let client = source_of(facts, source);
        for ports in all.chain([icmp]) {
            let connection = Connection {
                source,
                destination,
                protocol: ports.protocol_number(Family::of(destination)),
                port: ports.number(),
            };
            let mut compiled = self.compiled.borrow_mut();
            let decision = decide(facts, direction, &connection, &client, None, &mut compiled);
            drop(compiled);
            each(&ports, decision);
        }
    }

    /// Calls `each` with what is decided about each range of ports, and why.
    pub fn explain(&self, reason: Cause, each: impl FnMut(&Ports, Decision)) {
        match reason {
            Cause::Judged(index) => {
                let index = usize::try_from(index).ok();
                let Some(it) = index.and_then(|index| self.judged.get(index)) else {
                    return;
                };
                let asked = self.asked(it.asked.as_ref());
                self.each_decision(it.direction, it.source, it.destination, asked, each);
            }
            Cause::Open(direction, class) => {
                let class = self.classes.get(class);
                let end = class.and_then(|class| class.examples.first().copied());
                let none = Asked::default();
                if let Some(end) = end {
                    self.each_decision(direction, end, end, Some(&none), each);
                }
            }
        }
    }

    /// Returns whether a source is the node of the pod at a destination.
    pub fn is_own_node(&self, source: IpAddr, destination: IpAddr) -> bool {
        is_own_node(self.facts, &source_of(self.facts, source), destination)
    }

    /// Returns what can be connected to from one class to another of the same family, except by a node
    /// to its own pods.
    pub fn between(&self, from: usize, to: usize) -> SetId {
        let (Some(source), Some(destination)) = (self.classes.get(from), self.classes.get(to))
        else {
            return SetId::NONE;
        };
        let mut bridges = source.bridges.iter();
        if bridges.any(|bridge| destination.bridges.contains(bridge)) {
            return SetId::ALL;
        }
        let [egress, ingress] = self.reasons(from, to).map(|reason| match reason {
            Some(Cause::Judged(index)) => {
                let index = usize::try_from(index).ok();
                let judged = index.and_then(|index| self.judged.get(index));
                judged.map_or(SetId::NONE, |judged| judged.set)
            }
            Some(Cause::Open(..)) => SetId::ALL,
            None => SetId::NONE,
        });
        self.sets.borrow_mut().intersection(egress, ingress)
    }

    /// Returns why the ends of a connection decide as they do: the source first. There is none between
    /// an address and itself.
    pub fn reasons(&self, from: usize, to: usize) -> [Option<Cause>; 2] {
        let ends = [(0, from, to), (1, to, from)];
        ends.map(|(at, end, peer)| {
            let target = self.target_of.get(at)?.get(end)?;
            let Some(target) = target else {
                return Some(Cause::Open(*DIRECTIONS.get(at)?, end));
            };
            let target = self.targets.get(at)?.get(*target)?;
            target.decided.get(peer)?.map(Cause::Judged)
        })
    }

    /// Combines two sets: what both have, and what one of them has.
    pub fn both_and_either(&self, one: SetId, other: SetId) -> (SetId, SetId) {
        let mut sets = self.sets.borrow_mut();
        (sets.intersection(one, other), sets.union(one, other))
    }

    pub fn intersection(&self, one: SetId, other: SetId) -> SetId {
        self.sets.borrow_mut().intersection(one, other)
    }

    pub fn id(&self, set: PortSet) -> SetId {
        self.sets.borrow_mut().id(set)
    }

    pub fn set(&self, id: SetId) -> PortSet {
        self.sets.borrow().get(id)
    }
}
