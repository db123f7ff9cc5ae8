//! The rules of services on other nodes than the own one.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use super::Facts;
use super::service::is_of_node;
use crate::model::{Event, Kind, Object, ObjectName};
use crate::services::{Marks, ServiceSettings, Store};

/// The most objects in the copies for other nodes, unless a few nodes need more: about half a gigabyte.
const MOST_OBJECTS: usize = 500_000;
/// The number of other nodes whose objects are kept in any case.
const FEW: usize = 8;

/// The objects that the rules of services on other nodes are compiled from. Those of one node are
/// joined when a question is first about it.
#[derive(Debug)]
pub(crate) struct OtherNodes {
    events: Vec<Event>,
    settings: Rc<ServiceSettings>,
    /// By node, each with a copy of all; `None` without a Node object.
    stores: RefCell<HashMap<String, Option<Rc<Store>>>>,
}

impl OtherNodes {
    /// Creates it without objects. Other nodes are taken to have the same settings, except for the
    /// address of the own node.
    pub fn new(settings: ServiceSettings) -> Self {
        Self {
            events: Vec::new(),
            settings: Rc::new(ServiceSettings {
                bind_address: None,
                ..settings
            }),
            stores: RefCell::default(),
        }
    }

    /// Adds an event, if it is about objects that services are compiled from.
    pub fn add(&mut self, event: &Event) {
        if event
            .kind()
            .is_some_and(|kind| Kind::SERVICES.contains(&kind))
        {
            self.events.push(event.clone());
        }
    }

    /// Returns the objects as the rules of a node have them; `None` if its Node object is unknown, or if
    /// too many others are in use.
    fn store(&self, node: &str) -> Option<Rc<Store>> {
        if let Some(known) = self.stores.borrow().get(node) {
            return known.clone();
        }
        let mut stores = self.stores.borrow_mut();
        if stores.values().flatten().count() >= self.most() {
            let is_unused = |store: &Rc<Store>| Rc::strong_count(store) == 1;
            let mut unused = stores
                .iter()
                .filter(|(_, store)| store.as_ref().is_some_and(is_unused));
            let unused = unused.next().map(|(node, _)| node.clone())?;
            stores.remove(&unused);
        }
        let store = self.join(node).map(Rc::new);
        stores.insert(node.to_owned(), store.clone());
        store
    }

    /// Returns the most nodes whose objects are kept.
    fn most(&self) -> usize {
        (MOST_OBJECTS / self.events.len().max(1)).max(FEW)
    }

    fn join(&self, node: &str) -> Option<Store> {
        let own = self.events.iter().find_map(|event| match event {
            Event::Apply(Object::Node(it)) if *it.name == *node => Some(it),
            _ => None,
        })?;
        let store = Store::with_fallback_node(own.clone());
        let mut store = self.settings.store(store);
        for event in &self.events {
            store.apply(event.clone(), &mut Marks::default());
        }
        Some(store)
    }
}

/// A node whose rules of services are asked, if it is not the own one.
#[derive(Clone, Debug)]
pub(super) struct OtherNode {
    pub name: Arc<str>,
    store: Rc<Store>,
    settings: Rc<ServiceSettings>,
}

impl OtherNode {
    /// Returns the facts as the rules of this node have them.
    pub fn facts<'a>(&'a self, own: &Facts<'a>) -> Facts<'a> {
        Facts {
            store: &self.store,
            settings: &self.settings,
            node: &self.name,
            has_node: true,
            ..*own
        }
    }
}

impl Facts<'_> {
    /// Returns another node, if what its rules are compiled from is known.
    pub(super) fn other_node(&self, name: &str) -> Option<OtherNode> {
        let others = self.others?;
        let store = others.store(name)?;
        Some(OtherNode {
            name: store.node()?.name.clone(),
            store,
            settings: others.settings.clone(),
        })
    }

    /// Returns the name of another node with an address.
    pub(super) fn other_with(&self, address: IpAddr) -> Option<&ObjectName> {
        let nodes = self.policies.inventory().nodes();
        let mut names = nodes.having(std::slice::from_ref(&address));
        names.find(|name| name.name() != self.node)
    }

    /// Returns whether an address is one of a node's.
    pub(super) fn is_of_any_node(&self, address: IpAddr) -> bool {
        let own = self.store.node().map(|node| &**node);
        is_of_node(own, address) || self.other_with(address).is_some()
    }
}
