//! The parts of the rules that decide about a connection to a service.

use std::net::IpAddr;

use super::chains::SharedChain;
use super::dispatch::{ALLOWED_ROLE, ALLOWED_ROLES, ROLE};
use super::layout::{EndpointScope, REJECT, SERVICE_CIDRS, ServiceSet, table_id};
use super::plan::{Affinity, Frontend, SCOPES, ServicePlan, endpoint_element, shared_key};
use super::settings::ServiceSettings;
use super::skeleton::{UNASSIGNED, skeleton};
use crate::model::{Family, Protocol};
use crate::nft::{Chain, Element, Key, Name, RulesetPart, Set, Table, TableId, Value};
use crate::services::Store;

/// Finds the chains and elements of one family that decide about connections to services.
#[derive(Debug)]
pub(crate) struct ServiceParts {
    id: TableId,
    skeleton: Table,
}

impl ServiceParts {
    /// Compiles the chains that services share; `None` without rules for services.
    pub(crate) fn new(family: Family, store: &Store, settings: &ServiceSettings) -> Option<Self> {
        let cidrs: Vec<_> = store.service_cidrs().collect();
        let node = store.node().map(|node| &**node);
        (!settings.off).then(|| Self {
            id: table_id(family),
            skeleton: skeleton(family, settings, node, &cidrs),
        })
    }

    /// Returns the parts for connections of a client to a frontend, in the order in which a packet
    /// meets them. `scope` says which endpoints the client may reach.
    pub(crate) fn of_frontend(
        &self,
        plan: &ServicePlan,
        frontend: &Frontend,
        scope: EndpointScope,
        client: IpAddr,
    ) -> Vec<RulesetPart> {
        let mut found = Vec::new();
        // A client that is dropped on the way gets no further.
        let _ = self.follow(plan, frontend, scope, client, &mut found);
        found
    }

    fn follow(
        &self,
        plan: &ServicePlan,
        frontend: &Frontend,
        scope: EndpointScope,
        client: IpAddr,
        found: &mut Vec<RulesetPart>,
    ) -> Option<()> {
        let by = frontend.by();
        let mut leads = Vec::new();
        plan.lead_elements(frontend, &mut leads);
        let lead = |set: ServiceSet| {
            let lead = leads.iter().find(|(of, _)| *of == set);
            lead.map(|(_, element)| self.element(set, element.clone()))
        };
        let (_, first) = leads.first()?;
        let number = number(&first.value)?;
        found.extend(lead(by.frontends(EndpointScope::Cluster)));
        found.extend(self.led_to(&by.roles(), number & ROLE));
        if let Some(list) = plan
            .sources(frontend.family)
            .filter(|_| frontend.firewalled)
        {
            found.extend(lead(ServiceSet::FirewalledFrontends));
            self.shared_chain(&SharedChain::Sources(list.clone()), found);
            found.push(self.range(&list.name(), &list.set(), client)?);
            found.extend(self.led_to(&ALLOWED_ROLES.into(), number & ALLOWED_ROLE));
        }
        if scope == EndpointScope::Local {
            found.push(lead(by.frontends(EndpointScope::Local))?);
        }
        if let Some(affinity) = &plan.affinity {
            found.extend(lead(by.sticky()));
            self.shared_chain(&SharedChain::Follow(affinity.clients.clone()), found);
        }
        let scopes = SCOPES.into_iter().zip(plan.targets(frontend));
        for (_, targets) in scopes.filter(|(of, _)| *of == scope) {
            let targets = targets.iter().enumerate();
            found.extend(targets.map(|(index, target)| {
                let (set, element) = endpoint_element(frontend, scope, index, *target);
                self.element(set, element)
            }));
        }
        Some(())
    }

    /// Returns the parts that reject packets to other ports of a ClusterIP.
    pub(crate) fn of_unknown_port(&self, address: IpAddr) -> Vec<RulesetPart> {
        let set = ServiceSet::ClusterIps;
        let element = self.element(set, Element::new(shared_key(set, address)));
        [element]
            .into_iter()
            .chain(self.chain(&REJECT.into()))
            .collect()
    }

    /// Returns the parts that drop packets to an address that no service has.
    pub(crate) fn of_unknown_address(&self, address: IpAddr) -> Vec<RulesetPart> {
        let name = Name::from(SERVICE_CIDRS);
        let set = self.skeleton.sets.get(&name);
        let range = set.and_then(|set| self.range(&name, set, address));
        let chain = self.chain(&UNASSIGNED.into());
        range.into_iter().chain(chain).collect()
    }

    fn element(&self, set: ServiceSet, element: Element) -> RulesetPart {
        RulesetPart::Element(self.id.clone(), set.name(), set.declaration(), element)
    }

    /// Returns the range of a set that contains an address.
    fn range(&self, name: &Name, set: &Set, address: IpAddr) -> Option<RulesetPart> {
        let key = Key::address(address);
        let mut ranges = set.elements.iter();
        let range = ranges.find(|range| {
            let last = range.key_end.as_deref().unwrap_or(&range.key);
            range.key <= key && key <= *last
        })?;
        let (id, declaration) = (self.id.clone(), set.declaration.clone());
        Some(RulesetPart::Element(
            id,
            name.clone(),
            declaration,
            range.clone(),
        ))
    }

    /// Returns the chain to which a map of numbers leads.
    fn led_to(&self, map: &Name, number: u32) -> Option<RulesetPart> {
        let key = Key::build().number(number).finish();
        let mut elements = self.skeleton.sets.get(map)?.elements.iter();
        match &elements.find(|element| element.key == key)?.value {
            Value::Verdict(verdict) => self.chain(verdict.target()?),
            Value::None | Value::Data(_) => None,
        }
    }

    fn chain(&self, name: &Name) -> Option<RulesetPart> {
        let chain = self.skeleton.chains.get(name)?;
        Some(self.with_rules(name.clone(), chain.clone()))
    }

    fn shared_chain(&self, shared: &SharedChain, found: &mut Vec<RulesetPart>) {
        let chains = shared.chains().into_iter();
        found.extend(chains.map(|(name, chain)| self.with_rules(name, chain)));
    }

    fn with_rules(&self, name: Name, chain: Chain) -> RulesetPart {
        RulesetPart::Chain(self.id.clone(), name, chain)
    }
}

impl Affinity {
    /// Returns table, map and key of the element that remembers the endpoint of a client.
    pub(crate) fn entry(
        &self,
        client: IpAddr,
        (address, protocol, port): (IpAddr, Protocol, u16),
    ) -> (TableId, Name, Key) {
        let key = Key::build().address(client).address(address);
        let key = key.protocol(protocol.number()).port(port).finish();
        (table_id(Family::of(address)), self.clients.map(), key)
    }
}

fn number(value: &Value) -> Option<u32> {
    match value {
        Value::Data(data) => Some(u32::from_ne_bytes(data.as_bytes().try_into().ok()?)),
        Value::None | Value::Verdict(_) => None,
    }
}
