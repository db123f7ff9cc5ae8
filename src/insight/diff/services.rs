//! What changes for services: frontends and endpoints.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::objects::ruled_services;
use crate::insight::Facts;
use crate::insight::service::shown;
use crate::insight::services::{EndpointRow, FrontendRow, ServiceRow, row};

/// A service that differs.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct ServiceChange {
    /// Namespace and name.
    pub name: String,
    /// Its state in each side; none without the service.
    pub before: Option<String>,
    pub after: Option<String>,
    pub frontends: Vec<PartChange>,
    pub endpoints: Vec<PartChange>,
}

/// A frontend or an endpoint that differs.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct PartChange {
    /// Address and port.
    pub at: String,
    /// What happens to it in each side; none without it.
    pub before: Option<String>,
    pub after: Option<String>,
}

/// Compares the services of two sides, sorted by name.
pub(super) fn changes(facts: [&Facts; 2]) -> Vec<ServiceChange> {
    let names = facts.into_iter().flat_map(ruled_services);
    let names: BTreeSet<_> = names.map(|service| &service.name).collect();
    let changes = names.into_iter().filter_map(|name| {
        let [before, after] = facts.map(|facts| {
            let service = facts.store.service(name)?;
            service.has_frontends().then(|| row(facts, service))
        });
        let sides = [before.as_ref(), after.as_ref()];
        let [before, after] = sides.map(|row| row.map(|row| row.state.clone()));
        let change = ServiceChange {
            name: name.to_string(),
            frontends: parts(sides, |row| row.frontends.iter().map(frontend).collect()),
            endpoints: parts(sides, |row| row.endpoints.iter().map(endpoint).collect()),
            before,
            after,
        };
        let is_equal = change.before == change.after
            && change.frontends.is_empty()
            && change.endpoints.is_empty();
        (!is_equal).then_some(change)
    });
    changes.collect()
}

fn parts(
    sides: [Option<&ServiceRow>; 2],
    of: impl Fn(&ServiceRow) -> BTreeMap<String, String>,
) -> Vec<PartChange> {
    let [before, after] = sides.map(|row| row.map(&of).unwrap_or_default());
    let all: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let changes = all.into_iter().filter_map(|at| {
        let [before, after] = [&before, &after].map(|side| side.get(at).cloned());
        (before != after).then(|| PartChange {
            at: at.clone(),
            before,
            after,
        })
    });
    changes.collect()
}

fn frontend(row: &FrontendRow) -> (String, String) {
    let at = match row.address {
        Some(address) => shown(address, row.port, None),
        None => format!("node:{}", row.port),
    };
    (format!("{at}/{}", row.protocol), row.action.clone())
}

fn endpoint(row: &EndpointRow) -> (String, String) {
    let at = shown(row.address, row.port, None);
    let at = match &row.pod {
        Some(pod) => format!("{at} {pod}"),
        None => at,
    };
    let state = match (row.used, row.reason) {
        (true, _) => "used".to_owned(),
        (false, None) => "not used".to_owned(),
        (false, Some(reason)) => format!("left out: {}", reason.words()),
    };
    (at, state)
}
