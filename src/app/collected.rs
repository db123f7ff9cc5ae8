//! The objects that a command answers from, as the engines have them.

use std::collections::BTreeSet;
use std::path::Path;

use ipnet::IpNet;
use serde_json::Value;

use super::Error;
use super::ask::{self, AskError};
use super::dry_run::collect;
use super::objects;
use crate::engine::Engine as _;
use crate::insight::{Facts, OtherNodes};
use crate::model::{Kind, ObjectName, ObjectRef};
use crate::policies::Engine;
use crate::services::{ServiceSettings, Store};
use crate::settings::file::File;
use crate::settings::{self, CommandLine, Settings};
use crate::source::Manifests;

/// The objects, and what else answers depend on.
pub(super) struct Collected {
    pub store: Store,
    pub engine: Engine,
    services: ServiceSettings,
    node: String,
    /// None if the agent was asked, which keeps only what its policies need of other Nodes.
    others: Option<OtherNodes>,
    is_refused: Box<dyn Fn(&ObjectName) -> bool>,
    unfiltered: Vec<IpNet>,
}

impl Collected {
    /// Reads manifests, or else those of the API server. `with_nodes` keeps those of other nodes.
    pub async fn read(
        settings: &Settings,
        node: &str,
        services: &ServiceSettings,
        manifests: Option<Manifests>,
        with_nodes: bool,
    ) -> Result<Self, Error> {
        let mut others = OtherNodes::new(services.clone());
        let kept = with_nodes.then_some(&mut others);
        let (store, engine) = collect(settings, node, services, manifests, kept).await?;
        Ok(Self {
            store,
            engine,
            services: services.clone(),
            node: node.to_owned(),
            others: Some(others),
            is_refused: Box::new(|_| false),
            unfiltered: Vec::new(),
        })
    }

    pub fn facts(&self) -> Facts<'_> {
        Facts {
            store: &self.store,
            settings: &self.services,
            policies: &self.engine,
            node: &self.node,
            has_node: self.store.has_node(),
            rules: false,
            most_pairs: None,
            is_refused: &*self.is_refused,
            unfiltered: &self.unfiltered,
            others: self.others.as_ref(),
        }
    }
}

/// What answers of the agent depend on.
pub(super) struct OfAgent {
    pub node: String,
    pub settings: Settings,
    manifests: Manifests,
    /// The objects that the kernel refused.
    refused: BTreeSet<ObjectRef>,
    /// The networks of bridges whose packets no rule sees.
    unfiltered: Vec<IpNet>,
}

impl OfAgent {
    /// Asks the agent for its settings and its objects.
    pub async fn ask(socket: &Path, with_pods: bool) -> Result<Self, Error> {
        let of_agent = ask::get_json(socket, "/settings", &[]).await?;
        let invalid = |what: &str| AskError::Invalid(format!("it lacks {what}"));
        let node = of_agent.get("node").and_then(Value::as_str);
        let node = node.ok_or_else(|| invalid("the node"))?.to_owned();
        let flags = of_agent.get("flags").and_then(Value::as_array);
        let flags = flags.ok_or_else(|| invalid("flags"))?.iter();
        let flags = ["nftlet"]
            .into_iter()
            .chain(flags.filter_map(Value::as_str));
        let mut line = CommandLine::parse(flags)
            .map_err(|error| AskError::Invalid(settings::one_line(&error)))?;
        let configuration = of_agent
            .get("configuration")
            .ok_or_else(|| invalid("settings"))?;
        let file = File::parse(socket, &configuration.to_string())?;
        line.replace(file.settings().clone());
        let pods = if with_pods { "yes" } else { "no" };
        let document = ask::get(socket, "/objects", &[("pods", pods)]).await?;
        let manifests = Manifests::new(Vec::new(), node.clone())
            .with_services(line.settings.services.is_on())
            .with_network_policies(with_pods && line.settings.network_policy.is_on())
            .with_allow_empty(true)
            .with_document(document);
        let unfiltered = of_agent["unfiltered"].as_array().into_iter().flatten();
        Ok(Self {
            node,
            settings: line.settings,
            manifests,
            refused: refused(&of_agent["refused"]),
            unfiltered: unfiltered
                .filter_map(|it| it.as_str()?.parse().ok())
                .collect(),
        })
    }
    /// Has the engines take the objects.
    pub async fn collect(self) -> Result<Collected, Error> {
        let (settings, node) = (&self.settings, &self.node);
        let services = objects::service_settings(settings)?;
        let manifests = Some(self.manifests);
        let (store, mut engine) = collect(settings, node, &services, manifests, None).await?;
        for policy in &self.refused {
            engine.quarantine(policy);
        }
        let refused = self.refused;
        Ok(Collected {
            store,
            engine,
            services,
            node: self.node,
            others: None,
            is_refused: Box::new(move |service| {
                refused.contains(&ObjectRef::new(Kind::Service, service.clone()))
            }),
            unfiltered: self.unfiltered,
        })
    }
}

/// Reads the names of the objects that the kernel refused.
fn refused(lists: &Value) -> BTreeSet<ObjectRef> {
    let kinds = [
        ("services", Kind::Service),
        ("networkPolicies", Kind::NetworkPolicy),
        ("clusterNetworkPolicies", Kind::ClusterNetworkPolicy),
    ];
    let of_kind = |(field, kind): (&str, Kind)| {
        let names = lists[field].as_array().cloned().unwrap_or_default();
        let name = move |name: Value| {
            let name = name.as_str()?;
            let (namespace, name) = name.split_once('/').unwrap_or(("", name));
            Some(ObjectRef::new(kind, ObjectName::new(namespace, name)))
        };
        names.into_iter().filter_map(name)
    };
    kinds.into_iter().flat_map(of_kind).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_kernel_refused_is_read_as_the_agent_writes_it() {
        let lists = json!({
            "services": ["shop/web"],
            "networkPolicies": ["shop/deny"],
            "clusterNetworkPolicies": ["all"],
        });
        let object = |kind, namespace, name| ObjectRef::new(kind, ObjectName::new(namespace, name));
        let wanted = [
            object(Kind::Service, "shop", "web"),
            object(Kind::NetworkPolicy, "shop", "deny"),
            object(Kind::ClusterNetworkPolicy, "", "all"),
        ];
        assert_eq!(refused(&lists), wanted.into());
        assert_eq!(refused(&Value::Null), BTreeSet::new());
    }
}
