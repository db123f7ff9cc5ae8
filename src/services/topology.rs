//! Selects the endpoints of a service port that receive traffic (kube-proxy's `topology.go`).

use std::collections::BTreeSet;

use super::plan::Target;
use crate::model::{Endpoint, Node};
use crate::services::EndpointOf;

/// Returns the endpoints for the policy Cluster: the ready ones that match the topology hints; if
/// none is ready, the terminating ones that still serve.
pub fn cluster<'a>(endpoints: &[EndpointOf<'a>], node: Option<&Node>) -> Vec<EndpointOf<'a>> {
    let ready = select(endpoints, |e| e.ready);
    if ready.is_empty() {
        return select(endpoints, serving_terminating);
    }
    by_topology(&ready, node).unwrap_or(ready)
}

/// Returns the endpoints for the policy Local: the ready ones of this node; if none is ready, those
/// of this node that still serve while they terminate.
pub fn local<'a>(endpoints: &[EndpointOf<'a>], node: Option<&Node>) -> Vec<EndpointOf<'a>> {
    let Some(node) = node else {
        return Vec::new();
    };
    let here = select(endpoints, |e| e.node.as_deref() == Some(&node.name));
    let ready = select(&here, |e| e.ready);
    if ready.is_empty() {
        select(&here, serving_terminating)
    } else {
        ready
    }
}

/// Returns the endpoints that serve, ready or terminating, but were not chosen.
pub(crate) fn unchosen(endpoints: &[EndpointOf], chosen: &[EndpointOf]) -> Box<[Target]> {
    let chosen: BTreeSet<Target> = chosen.iter().map(EndpointOf::target).collect();
    let serving = select(endpoints, |e| e.ready || serving_terminating(e));
    let targets = serving.iter().map(EndpointOf::target);
    targets.filter(|target| !chosen.contains(target)).collect()
}

/// Returns whether an endpoint may be on a node. Slices written by hand often name no node.
pub(crate) fn may_be_on(endpoint: &EndpointOf, node: Option<&str>) -> bool {
    match (endpoint.endpoint.node.as_deref(), node) {
        (Some(theirs), Some(ours)) => theirs == ours,
        _ => true,
    }
}

fn select<'a>(
    endpoints: &[EndpointOf<'a>],
    condition: impl Fn(&Endpoint) -> bool,
) -> Vec<EndpointOf<'a>> {
    let chosen = endpoints.iter().filter(|e| condition(e.endpoint));
    chosen.copied().collect()
}

fn serving_terminating(endpoint: &Endpoint) -> bool {
    endpoint.serving && endpoint.terminating
}

/// Returns the endpoints with a hint for this node, else those with a hint for its zone. Hints are
/// used only if every ready endpoint has them and at least one matches; otherwise `None`.
fn by_topology<'a>(ready: &[EndpointOf<'a>], node: Option<&Node>) -> Option<Vec<EndpointOf<'a>>> {
    let node = node?;
    let hinted = |place: &str, hints: fn(&Endpoint) -> Option<&[std::sync::Arc<str>]>| {
        if !ready.iter().all(|e| hints(e.endpoint).is_some()) {
            return None;
        }
        let names_it = |e: &Endpoint| {
            let names = hints(e).unwrap_or_default();
            names.iter().any(|name| **name == *place)
        };
        Some(select(ready, names_it)).filter(|chosen| !chosen.is_empty())
    };
    hinted(&node.name, Endpoint::node_hints).or_else(|| {
        let zone = node.zone.as_deref()?;
        hinted(zone, Endpoint::zone_hints)
    })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::sync::Arc;

    use super::*;
    use crate::model::Hints;

    fn endpoint(last: u8, state: &str) -> Endpoint {
        Endpoint {
            address: IpAddr::from([10, 0, 0, last]),
            ready: state == "ready",
            serving: state == "ready" || state == "terminating",
            terminating: state == "terminating" || state == "dying",
            node: Some(if last < 10 { "node-1" } else { "node-2" }.into()),
            hints: None,
        }
    }

    fn names(names: &[&str]) -> Option<Box<[Arc<str>]>> {
        Some(names.iter().map(|name| Arc::from(*name)).collect())
    }

    fn hints(zones: &[&str], nodes: Option<&str>) -> Option<Arc<Hints>> {
        Some(Arc::new(Hints {
            zones: names(zones),
            nodes: nodes.and_then(|node| names(&[node])),
        }))
    }

    fn node(zone: Option<&str>) -> Node {
        Node {
            name: "node-1".into(),
            internal_ips: vec![],
            external_ips: vec![],
            pod_cidrs: vec![],
            zone: zone.map(Arc::from),
            going_away: false,
            labels: Default::default(),
            addresses: Default::default(),
        }
    }

    type Policy = for<'a> fn(&[EndpointOf<'a>], Option<&Node>) -> Vec<EndpointOf<'a>>;

    fn chosen(policy: Policy, endpoints: &[Endpoint], node: Option<&Node>) -> Vec<u8> {
        let all: Vec<_> = endpoints
            .iter()
            .map(|endpoint| EndpointOf { endpoint, port: 80 })
            .collect();
        let last = |e: &EndpointOf| match e.endpoint.address {
            IpAddr::V4(v4) => v4.octets()[3],
            IpAddr::V6(_) => unreachable!("the test uses IPv4"),
        };
        policy(&all, node).iter().map(last).collect()
    }

    #[test]
    fn terminating_endpoints_are_the_last_resort_of_each_policy() {
        let here = node(None);
        let some = |policy: Policy, states: &[(u8, &str)]| {
            let endpoints: Vec<_> = states.iter().map(|(n, s)| endpoint(*n, s)).collect();
            chosen(policy, &endpoints, Some(&here))
        };
        let mixed = [
            (1, "terminating"),
            (2, "ready"),
            (11, "ready"),
            (12, "dying"),
        ];
        assert_eq!(some(cluster, &mixed), [2, 11]);
        assert_eq!(some(local, &mixed), [2]);
        let leaving = [
            (1, "terminating"),
            (2, "dying"),
            (11, "terminating"),
            (12, "no"),
        ];
        assert_eq!(some(cluster, &leaving), [1, 11]);
        assert_eq!(some(local, &leaving), [1]);
        // Each policy decides for itself.
        let split = [(1, "terminating"), (11, "ready")];
        assert_eq!(some(cluster, &split), [11]);
        assert_eq!(some(local, &split), [1]);
        assert!(some(cluster, &[(1, "dying"), (2, "no")]).is_empty());
    }

    #[test]
    fn without_a_node_nothing_is_local() {
        assert!(chosen(local, &[endpoint(1, "ready")], None).is_empty());
    }

    #[test]
    fn hints_count_if_all_have_them_and_one_names_the_place() {
        let zoned = |last: u8, names: &[&str]| Endpoint {
            hints: hints(names, None),
            ..endpoint(last, "ready")
        };
        let in_a = node(Some("a"));
        let zones = [zoned(1, &["a"]), zoned(2, &["b"]), zoned(3, &["b", "a"])];
        assert_eq!(chosen(cluster, &zones, Some(&in_a)), [1, 3]);
        assert_eq!(chosen(cluster, &zones, Some(&node(Some("c")))), [1, 2, 3]);
        assert_eq!(chosen(cluster, &zones, Some(&node(None))), [1, 2, 3]);
        assert_eq!(chosen(cluster, &zones, None), [1, 2, 3]);
        let partly = [zoned(1, &["a"]), endpoint(2, "ready")];
        assert_eq!(chosen(cluster, &partly, Some(&in_a)), [1, 2]);
        // An endpoint that takes no traffic has no say.
        let unready = [zoned(1, &["a"]), zoned(2, &["b"]), endpoint(3, "no")];
        assert_eq!(chosen(cluster, &unready, Some(&in_a)), [1]);
        assert_eq!(
            chosen(local, &zones, Some(&in_a)),
            [1, 2, 3],
            "policy Local has no zones"
        );
    }

    #[test]
    fn hints_for_the_node_come_before_those_for_its_zone() {
        let hinted = |last: u8, node: &str, zone: &str| Endpoint {
            hints: hints(&[zone], Some(node)),
            ..endpoint(last, "ready")
        };
        let here = node(Some("a"));
        let endpoints = [
            hinted(1, "node-1", "a"),
            hinted(2, "node-2", "a"),
            hinted(3, "node-2", "b"),
        ];
        assert_eq!(chosen(cluster, &endpoints, Some(&here)), [1]);
        assert_eq!(chosen(cluster, &endpoints[1..], Some(&here)), [2]);
    }
}
