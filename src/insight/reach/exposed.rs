//! What can be reached from outside of the cluster, and from other namespaces.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use super::asked_ports::AskedPorts;
use super::port_set::{PortSet, SetId};
use super::rows::{Cell, Reach, ReachError, Row};
use super::subjects::INTERNET;
use crate::model::{Service, ServiceKind};

/// A row that can be reached.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Exposed {
    pub name: String,
    /// What addresses outside of the cluster can connect to, if they are not translated.
    pub outside: Option<Cell>,
    /// What pods of other namespaces can connect to.
    pub other_namespaces: Option<Cell>,
    /// The services that clients outside of the cluster can connect to.
    pub services: Vec<String>,
}

/// Returns the rows that can be reached from outside of the cluster or from other namespaces.
///
/// # Errors
///
/// None but what [`Reach::rows`] has.
pub(crate) fn exposed(
    reach: &Reach,
    rows: &[Row],
    ports: PortSet,
) -> Result<Vec<Exposed>, ReachError> {
    let ports = AskedPorts::new(reach, ports);
    let internet = reach.row(INTERNET)?;
    let services = services(reach);
    let mut others: HashMap<&str, Row> = HashMap::new();
    let mut found = Vec::new();
    for row in rows.iter().filter(|row| row.name != INTERNET) {
        let namespace = row.name.split_once('/').map_or(&*row.name, |(it, _)| it);
        let others = others
            .entry(namespace)
            .or_insert_with(|| reach.others(namespace));
        let cell = |from: &Row| {
            let cell = reach.cell(from, row).map(|cell| ports.only(reach, cell));
            cell.filter(|cell| cell.some != SetId::NONE)
        };
        let [outside, other_namespaces] = [&internet, &*others].map(cell);
        if outside.is_none() && other_namespaces.is_none() {
            continue;
        }
        let addresses = reach.addresses(row);
        let names = addresses.iter().filter_map(|it| services.get(it));
        let names: BTreeSet<&String> = names.flatten().collect();
        found.push(Exposed {
            name: row.name.clone(),
            outside,
            other_namespaces,
            services: names.into_iter().cloned().collect(),
        });
    }
    Ok(found)
}

/// Returns the services with frontends outside of the cluster, by the addresses of their endpoints.
fn services(reach: &Reach) -> BTreeMap<IpAddr, Vec<String>> {
    let store = reach.facts().store;
    let mut of_address: BTreeMap<IpAddr, Vec<String>> = BTreeMap::new();
    for service in store.services() {
        let Some(name) = described(service) else {
            continue;
        };
        let slices = store.slices_of(&service.name);
        for endpoint in slices.all().flat_map(|slice| &slice.endpoints) {
            of_address
                .entry(endpoint.address)
                .or_default()
                .push(name.clone());
        }
    }
    of_address
}

fn described(service: &Service) -> Option<String> {
    let kind = match service.kind {
        ServiceKind::LoadBalancer => "LoadBalancer",
        ServiceKind::NodePort => "NodePort",
        ServiceKind::ClusterIp if !service.external_ips.is_empty() => "externalIPs",
        _ => return None,
    };
    let ranges: Vec<String> = service
        .source_ranges
        .iter()
        .map(ToString::to_string)
        .collect();
    Some(match ranges.is_empty() {
        true => format!("{} ({kind})", service.name),
        false => format!("{} ({kind} from {})", service.name, ranges.join(" ")),
    })
}
