//! The services of the cluster as the rules have them.

use std::net::IpAddr;

use serde::Serialize;

use super::Facts;
use super::answer::{Code, Exclusion};
use super::names::{NameError, no_service};
use super::service::{Compiled, left_out, pod_at};
use crate::model::{Family, ObjectName, Service, ServiceKind, TrafficPolicy};
use crate::services::{Claim, Frontend, Route, ServicePlan};

/// Which services are listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ServiceFilter {
    /// The namespace.
    pub namespace: Option<String>,
    /// The name in it.
    pub name: Option<String>,
    /// Only those with a frontend without endpoints.
    pub no_endpoints: bool,
    /// Only those without rules because of a fault.
    pub refused: bool,
}

/// A service.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ServiceRow {
    /// Namespace and name.
    pub name: String,
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The traffic policies, the internal one first.
    pub policy: &'static str,
    pub frontends: Vec<FrontendRow>,
    pub endpoints: Vec<EndpointRow>,
    pub affinity_seconds: Option<u32>,
    pub state: String,
    #[serde(skip)]
    pub refused: bool,
}

/// An address and port of a service.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct FrontendRow {
    /// None for a port of the node.
    pub address: Option<IpAddr>,
    pub port: u16,
    pub protocol: String,
    /// The name of the service port.
    pub name: String,
    /// What happens to its packets, in words.
    pub action: String,
}

/// An endpoint of a service.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct EndpointRow {
    pub address: IpAddr,
    pub port: u16,
    pub pod: Option<ObjectName>,
    pub node: Option<String>,
    /// Whether some frontend uses it.
    pub used: bool,
    /// Why no frontend uses it.
    pub reason: Option<Exclusion>,
    #[serde(skip)]
    pub local: bool,
}

/// Returns the services that match a filter, sorted by name.
///
/// # Errors
///
/// If the filter names a service that does not exist.
pub(crate) fn services(
    facts: &Facts,
    filter: &ServiceFilter,
) -> Result<Vec<ServiceRow>, NameError> {
    if let (Some(namespace), Some(name)) = (&filter.namespace, &filter.name) {
        let name = ObjectName::new(namespace, name);
        if facts.store.service(&name).is_none() {
            return Err(no_service(facts, &name));
        }
    }
    let of_filter = |service: &&std::sync::Arc<Service>| {
        let is = |wanted: &Option<String>, found: &str| {
            wanted.as_ref().is_none_or(|wanted| wanted == found)
        };
        is(&filter.namespace, service.name.namespace()) && is(&filter.name, service.name.name())
    };
    let mut rows: Vec<ServiceRow> = facts
        .store
        .services()
        .filter(of_filter)
        .map(|service| row(facts, service))
        .filter(|row| !filter.no_endpoints || lacks_endpoints(row))
        .filter(|row| !filter.refused || row.refused)
        .collect();
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(rows)
}

/// Returns whether a service with frontends has no endpoint that is used.
pub(crate) fn lacks_endpoints(row: &ServiceRow) -> bool {
    !row.frontends.is_empty() && !row.endpoints.iter().any(|endpoint| endpoint.used)
}

/// Returns a service as the rules have it.
pub(super) fn row(facts: &Facts, service: &Service) -> ServiceRow {
    let mut compiled = Compiled::default();
    let refused = compiled.fault(facts, &service.name);
    let plan = compiled.of(facts, &service.name);
    let frontends = plan.map_or_else(Vec::new, |plan| frontends(service, plan));
    let endpoints = endpoints(facts, service, plan);
    let state = match (&refused, service.kind) {
        (Some(fault), _) => fault.clone(),
        (None, ServiceKind::ExternalName | ServiceKind::Headless) => "answered by DNS".to_owned(),
        (None, ServiceKind::OtherProxy) => "left to another proxy".to_owned(),
        _ if frontends.is_empty() => "no address of its own".to_owned(),
        _ if !endpoints.iter().any(|endpoint| endpoint.used) => "no endpoints".to_owned(),
        _ => "in force".to_owned(),
    };
    ServiceRow {
        name: service.name.to_string(),
        kind: kind(service.kind),
        policy: policy(service),
        frontends,
        endpoints,
        affinity_seconds: service.affinity_seconds,
        state,
        refused: refused.is_some(),
    }
}

fn kind(kind: ServiceKind) -> &'static str {
    match kind {
        ServiceKind::ClusterIp => "ClusterIP",
        ServiceKind::NodePort => "NodePort",
        ServiceKind::LoadBalancer => "LoadBalancer",
        ServiceKind::ExternalName => "ExternalName",
        ServiceKind::Headless => "Headless",
        ServiceKind::OtherProxy => "OtherProxy",
    }
}

fn policy(service: &Service) -> &'static str {
    let external = service.kind != ServiceKind::ClusterIp || !service.external_ips.is_empty();
    match (service.internal_policy, service.external_policy) {
        (TrafficPolicy::Cluster, TrafficPolicy::Cluster) => "Cluster",
        (TrafficPolicy::Local, TrafficPolicy::Local) if external => "Local",
        (TrafficPolicy::Local, _) => "internal Local",
        (TrafficPolicy::Cluster, TrafficPolicy::Local) if external => "external Local",
        (TrafficPolicy::Cluster, TrafficPolicy::Local) => "Cluster",
    }
}

fn frontends(service: &Service, plan: &ServicePlan) -> Vec<FrontendRow> {
    let row = |frontend: &Frontend| {
        let (address, protocol, port) = match frontend.at {
            Claim::Address(address, protocol, port) => (Some(address), protocol, port),
            Claim::NodePort(protocol, port) => (None, protocol, port),
        };
        let mut ports = service.ports.iter();
        let of = ports.find(|it| {
            let number = match frontend.at {
                Claim::Address(..) => Some(it.port),
                Claim::NodePort(..) => it.node_port,
            };
            it.protocol == protocol && number == Some(port)
        });
        FrontendRow {
            address,
            port,
            protocol: protocol.to_string(),
            name: of.map_or_else(String::new, |port| port.name.to_string()),
            action: action(plan, frontend),
        }
    };
    let mut rows: Vec<FrontendRow> = plan.frontends.iter().map(row).collect();
    // A NodePort is a frontend of each family.
    rows.sort_by(|a, b| (a.address, a.port, &a.protocol).cmp(&(b.address, b.port, &b.protocol)));
    rows.dedup();
    rows
}

fn action(plan: &ServicePlan, frontend: &Frontend) -> String {
    let count = |pool: usize| plan.pools.get(pool).map_or(0, |pool| pool.targets.len());
    let without = |code| match code {
        Code::ServiceNoLocalEndpoints => "dropped, no endpoint on this node".to_owned(),
        _ => "refused, no endpoints".to_owned(),
    };
    match frontend.route {
        Route::Balance(_, pool) if count(pool) == 0 => without(Code::ServiceNoEndpoints),
        Route::BalanceOrDrop(_, pool) if count(pool) == 0 => without(Code::ServiceNoLocalEndpoints),
        Route::Balance(_, pool) | Route::BalanceOrDrop(_, pool) => plural(count(pool)),
        Route::LocalPolicy { cluster, .. } if count(cluster) == 0 => {
            without(Code::ServiceNoEndpoints)
        }
        Route::LocalPolicy { cluster, local } => format!(
            "{} from the cluster, {} from outside",
            plural(count(cluster)),
            match count(local) {
                0 => without(Code::ServiceNoLocalEndpoints),
                local => plural(local),
            }
        ),
    }
}

fn plural(count: usize) -> String {
    match count {
        1 => "1 endpoint".to_owned(),
        many => format!("{many} endpoints"),
    }
}

fn endpoints(facts: &Facts, service: &Service, plan: Option<&ServicePlan>) -> Vec<EndpointRow> {
    let slices = facts.store.slices_of(&service.name);
    let mut rows = Vec::new();
    for port in &service.ports {
        for family in Family::ALL {
            let all = slices.endpoints(port, family);
            if all.is_empty() {
                continue;
            }
            let used = plan
                .into_iter()
                .flat_map(|plan| &plan.pools)
                .filter(|pool| {
                    pool.family == family
                        && pool.protocol == port.protocol
                        && is_of(&pool.label, &service.name, &port.name)
                });
            let mut used: Vec<_> = used.flat_map(|pool| pool.targets.iter().copied()).collect();
            used.sort_unstable();
            let only_local = service.internal_policy == TrafficPolicy::Local;
            let left = left_out(facts, service, port, family, &used, only_local);
            rows.extend(all.iter().map(|endpoint| {
                let is_used = used.binary_search(&endpoint.target()).is_ok();
                let address = endpoint.endpoint.address;
                let reason = left.iter().find(|it| it.address == address);
                EndpointRow {
                    address,
                    port: endpoint.port,
                    pod: pod_at(facts, address),
                    node: endpoint.endpoint.node.as_ref().map(ToString::to_string),
                    used: is_used,
                    reason: reason.filter(|_| !is_used).map(|it| it.reason),
                    local: endpoint.endpoint.node.as_deref() == Some(facts.node),
                }
            }));
        }
    }
    rows.sort_by_key(|row| (row.address, row.port, !row.used));
    rows.dedup_by(|a, b| (a.address, a.port) == (b.address, b.port));
    rows
}

/// Returns whether a pool with this label is that of a port.
fn is_of(label: &str, service: &ObjectName, port: &str) -> bool {
    match label.strip_prefix(service.as_str()) {
        Some("") => port.is_empty(),
        Some(rest) => rest.strip_prefix(':') == Some(port),
        None => false,
    }
}
