//! Lists that are sent while they are read: the objects that the rules are compiled from, and the
//! state of the policies.

use std::sync::Arc;

use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::PORTION;
use super::main_loop::{Ended, MainLoop};
use crate::insight::objects;
use crate::model::{Kind, ObjectName, ObjectRef};
use crate::policies;
use crate::serve::health::in_seconds;
use crate::sync::View;

/// What is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Listed {
    /// All objects, as a list of the API.
    Objects,
    /// Those that services are compiled from.
    Services,
    /// The state of each policy.
    Policies,
}

/// A list that is being sent.
pub(super) struct List {
    main_loop: Arc<MainLoop>,
    parts: mpsc::Sender<Bytes>,
    first: bool,
}

impl List {
    pub(super) fn new(main_loop: Arc<MainLoop>, parts: mpsc::Sender<Bytes>) -> Self {
        Self {
            main_loop,
            parts,
            first: true,
        }
    }

    /// Sends a list: the names of each kind first, then its objects in portions.
    pub(super) async fn send(mut self, of: Listed) -> Result<(), Ended> {
        match of {
            Listed::Objects | Listed::Services => {
                self.part("{\"apiVersion\":\"v1\",\"kind\":\"List\",\"items\":[")
                    .await?;
                self.services().await?;
                if of == Listed::Objects {
                    self.of_policies().await?;
                }
            }
            Listed::Policies => {
                self.part("{\"policies\":[").await?;
                self.each(cluster_policy_names, |view, names| {
                    states(view, Kind::ClusterNetworkPolicy, names)
                })
                .await?;
                self.each(policy_names, |view, names| {
                    states(view, Kind::NetworkPolicy, names)
                })
                .await?;
            }
        }
        self.part("]}\n").await
    }

    /// Sends the objects that policies are compiled from.
    async fn of_policies(&mut self) -> Result<(), Ended> {
        self.each(other_node_names, |view, names| {
            let inventory = view.policies.map(policies::Engine::inventory);
            let nodes = names.iter().filter_map(|name| {
                let node = inventory?.nodes().get(name)?;
                Some(objects::other_node(name, &node.labels, &node.addresses))
            });
            nodes.collect()
        })
        .await?;
        self.each(cluster_policy_names, |view, names| {
            let inventory = view.policies.map(policies::Engine::inventory);
            let policies = names.iter();
            let policies = policies.filter_map(|name| inventory?.cluster().get(name));
            policies.map(|it| objects::cluster_policy(it)).collect()
        })
        .await?;
        self.each(namespace_names, |view, names| {
            let inventory = view.policies.map(policies::Engine::inventory);
            let namespaces = names.iter().filter_map(|name| {
                let labels = inventory?.namespace(name.name());
                let mode = inventory?.mode_of(name.name());
                Some(objects::namespace(name.name(), &labels, mode))
            });
            namespaces.collect()
        })
        .await?;
        self.each(pod_names, |view, names| {
            let inventory = view.policies.map(policies::Engine::inventory);
            let pods = names.iter().filter_map(|name| inventory?.pod(name));
            pods.map(objects::pod).collect()
        })
        .await?;
        self.each(policy_names, |view, names| {
            let inventory = view.policies.map(policies::Engine::inventory);
            let policies = names.iter().filter_map(|name| inventory?.policy(name));
            policies.map(|it| objects::network_policy(it)).collect()
        })
        .await
    }

    /// Sends the objects that services are compiled from, each portion of services followed by its
    /// slices.
    async fn services(&mut self) -> Result<(), Ended> {
        let few = self.main_loop.look(|view| {
            let store = view.services.store();
            let node = store.node().map(|node| objects::node(node));
            let ranges = store.service_cidr_objects().map(objects::service_cidr);
            node.into_iter().chain(ranges).collect()
        });
        let few = few.await?;
        self.items(few).await?;
        let names = self.main_loop.look(service_names).await?;
        for portion in names.chunks(PORTION) {
            let portion = portion.to_vec();
            let found = self.main_loop.look(move |view| {
                let store = view.services.store();
                let mut found = (Vec::new(), Vec::new());
                for name in &portion {
                    found
                        .0
                        .extend(store.service(name).map(|it| objects::service(it)));
                    let slices = store.slices_of(name);
                    found
                        .1
                        .extend(slices.all().map(|it| (name.clone(), it.name.clone())));
                }
                found
            });
            let (services, slices) = found.await?;
            self.items(services).await?;
            for portion in slices.chunks(PORTION) {
                let portion = portion.to_vec();
                let found = self.main_loop.look(move |view| {
                    let mut found = Vec::new();
                    for of_service in portion.chunk_by(|(a, _), (b, _)| a == b) {
                        let Some((service, _)) = of_service.first() else {
                            continue;
                        };
                        let slices = view.services.store().slices_of(service);
                        let wanted = slices.all();
                        let wanted = wanted
                            .filter(|slice| of_service.iter().any(|(_, name)| *name == slice.name));
                        found.extend(wanted.map(objects::slice));
                    }
                    found
                });
                let found = found.await?;
                self.items(found).await?;
            }
        }
        Ok(())
    }

    /// Sends the objects with some names.
    async fn each(
        &mut self,
        names: fn(&View) -> Vec<ObjectName>,
        of: fn(&View, &[ObjectName]) -> Vec<Value>,
    ) -> Result<(), Ended> {
        let names = self.main_loop.look(names).await?;
        for portion in names.chunks(PORTION) {
            let portion = portion.to_vec();
            let found = self.main_loop.look(move |view| of(view, &portion)).await?;
            self.items(found).await?;
        }
        Ok(())
    }

    async fn items(&mut self, items: Vec<Value>) -> Result<(), Ended> {
        let mut text = String::new();
        for item in items {
            if !std::mem::take(&mut self.first) {
                text.push_str(",\n");
            }
            text.push_str(&item.to_string());
        }
        self.part(text).await
    }

    async fn part(&mut self, text: impl Into<Bytes>) -> Result<(), Ended> {
        self.parts.send(text.into()).await.map_err(|_| Ended)
    }
}

fn service_names(view: &View) -> Vec<ObjectName> {
    let services = view.services.store().services();
    services.map(|service| service.name.clone()).collect()
}

fn other_node_names(view: &View) -> Vec<ObjectName> {
    let own = view.services.store().node().map(|node| node.name.clone());
    let own = own.unwrap_or_default();
    let inventory = view.policies.map(policies::Engine::inventory);
    let names = inventory.into_iter().flat_map(|it| it.nodes().names());
    names.filter(|name| name.name() != &*own).cloned().collect()
}

fn namespace_names(view: &View) -> Vec<ObjectName> {
    let inventory = view.policies.map(policies::Engine::inventory);
    let names = inventory.into_iter().flat_map(|it| it.namespaces());
    names.map(|(name, _)| ObjectName::new("", name)).collect()
}

fn pod_names(view: &View) -> Vec<ObjectName> {
    let names = view.policies.map(|it| it.inventory().pod_names());
    names.into_iter().flatten().collect()
}

fn policy_names(view: &View) -> Vec<ObjectName> {
    let names = view.policies.map(|it| it.inventory().policy_names());
    names.into_iter().flatten().collect()
}

fn cluster_policy_names(view: &View) -> Vec<ObjectName> {
    let names = view.policies.map(|it| it.inventory().cluster().names());
    names.into_iter().flatten().collect()
}

/// Returns the state of some policies.
fn states(view: &View, kind: Kind, names: &[ObjectName]) -> Vec<Value> {
    let state = |name: &ObjectName| {
        let policy = ObjectRef::new(kind, name.clone());
        json!({
            "kind": kind.as_str(), "namespace": name.namespace(), "name": name.name(),
            "inForceSince": view.in_force_since(&policy).and_then(in_seconds),
            "refused": view.policies.is_some_and(|it| it.is_refused(&policy)),
        })
    };
    names.iter().map(state).collect()
}

#[cfg(test)]
mod tests;
