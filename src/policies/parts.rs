//! The parts of the rules that decide about a connection.

use std::net::IpAddr;

use super::Engine;
use super::evaluate::Connection;
use super::judge::{Decision, RuleOf};
use super::layout::{self, Direction, STARTUP, TO_ITSELF, table_id};
use super::profile::{Profile, RulesOf};
use super::rules::{deny_chains, pods_chain};
use crate::model::Family;
use crate::nft::{Chain, Element, Key, Name, RulesetPart, Table, TableId, Verdict};

impl Engine {
    /// Returns the chains and elements that decide about a connection in one direction, in the order
    /// in which its first packet meets them. None if the rules of this node do not ask about it.
    pub(crate) fn deciding_parts(
        &self,
        direction: Direction,
        connection: &Connection,
    ) -> Vec<RulesetPart> {
        let address = connection.end(direction);
        let mut parts = Parts {
            engine: self,
            direction,
            family: Family::of(address),
            found: Vec::new(),
        };
        if self.is_closed_to(address) {
            let mut table = Table::default();
            if let Some(closed) = &self.closed {
                closed.add_to(&mut table, parts.family);
            }
            let name = Name::from(STARTUP);
            if let Some(chain) = table.chains.remove(&name) {
                parts.chain(name, chain);
            }
            return parts.found;
        }
        let plan = self.plans.get(&address);
        let holders = plan.and_then(|plan| plan.holders.get(&direction));
        let end = self.end(direction, connection, true);
        for (layer, holder) in holders.into_iter().flatten().enumerate() {
            let decision = self.judge(&holder.profile, &end, false);
            parts.add(address, layer, &holder.profile, &decision);
            if !decision.is_allowed() {
                break;
            }
        }
        parts.found
    }

    /// Returns table, set and key of the element that counts what an isolated address is denied in a
    /// direction.
    pub(crate) fn denied_counter(
        &self,
        direction: Direction,
        address: IpAddr,
    ) -> Option<(TableId, Name, Key)> {
        let plan = self.plans.get(&address)?;
        let holders = plan.holders.get(&direction)?;
        if !holders.iter().any(|holder| holder.profile.is_enforced()) {
            return None;
        }
        let table = table_id(Family::of(address));
        Some((table, direction.denied(), Key::address(address)))
    }
}

/// Collects the parts about one end of a connection.
struct Parts<'a> {
    engine: &'a Engine,
    direction: Direction,
    family: Family,
    found: Vec<RulesetPart>,
}

impl Parts<'_> {
    /// Adds the parts that a holder of the address has.
    fn add(&mut self, address: IpAddr, layer: usize, profile: &Profile, decision: &Decision) {
        let direction = self.direction;
        let (key, chain) = (Key::address(address), profile.chain(direction));
        let leads = Element::with_verdict(key.clone(), Verdict::Goto(chain.clone()));
        let table = table_id(self.family);
        self.found.push(RulesetPart::Element(
            table.clone(),
            direction.pods(layer),
            layout::pods(),
            leads,
        ));
        self.chain(chain, pods_chain(direction, profile));
        let [namespaces, cluster] = deny_chains(direction, &self.engine.settings);
        let denies = match decision {
            Decision::NotIsolated { .. } => None,
            Decision::ToItself => {
                let itself = Key::build().address(address).address(address).finish();
                self.found.push(RulesetPart::Element(
                    table.clone(),
                    TO_ITSELF.into(),
                    layout::ends(),
                    Element::new(itself),
                ));
                None
            }
            Decision::Allowed(of) => {
                self.chain_of_rule(profile, of);
                None
            }
            Decision::Denied(of) => {
                self.chain_of_rule(profile, of);
                Some(cluster)
            }
            Decision::NoRule { .. } => Some(namespaces),
        };
        if let Some((name, chain)) = denies {
            self.chain(name, chain);
            self.found.push(RulesetPart::Element(
                table,
                direction.denied(),
                layout::counted(),
                Element::new(key),
            ));
        }
    }

    /// Adds the chain with a rule of a policy.
    fn chain_of_rule(&mut self, profile: &Profile, of: &RuleOf) {
        let rules = match of.tier {
            None => Some(RulesOf::Policy(of.policy.clone())),
            Some(tier) => profile.tier(tier),
        };
        let Some(rules) = rules else {
            return;
        };
        let name = rules.chain(self.direction);
        let used = self
            .engine
            .rule_chains
            .get(&(self.family, self.direction, rules));
        if let Some(chain) = used.and_then(|used| used.chain.as_deref()) {
            self.chain(name, chain.clone());
        }
    }

    fn chain(&mut self, name: Name, chain: Chain) {
        let table = table_id(self.family);
        self.found.push(RulesetPart::Chain(table, name, chain));
    }
}
