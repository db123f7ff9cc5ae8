//! Which health checks services want (`healthCheckNodePort`), with their endpoints counted.
//!
//! Only the services whose rules were compiled anew are looked at, and the result is published
//! once those rules are in force: a load balancer is to send traffic where it can arrive.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use tokio::sync::watch;

use crate::health::{Check, Checks};
use crate::model::{Family, ObjectName, Service, Store};

/// The health checks of all services, published through a watch channel.
#[derive(Debug)]
pub struct HealthChecks {
    published: watch::Sender<Checks>,
    /// Services to look at when their rules are in force.
    changed: BTreeSet<ObjectName>,
    /// The ports of the services that answer at one.
    ports: HashMap<ObjectName, u16>,
}

impl HealthChecks {
    /// Nothing wanted yet.
    pub fn new(published: watch::Sender<Checks>) -> Self {
        Self {
            published,
            changed: BTreeSet::new(),
            ports: HashMap::new(),
        }
    }

    /// The rules of a service are about to change.
    pub fn changed(&mut self, service: &ObjectName) {
        self.changed.insert(service.clone());
    }

    /// The rules of the changed services are in force, except for those that `left_out` picks:
    /// nothing arrives at their endpoints.
    pub fn publish(&mut self, store: &Store, left_out: impl Fn(&ObjectName) -> bool) {
        let changed = std::mem::take(&mut self.changed);
        // A port may go from one of them to another.
        let given_up: Vec<u16> = changed
            .iter()
            .filter_map(|name| self.ports.remove(name))
            .collect();
        let mut wanted = Checks::new();
        for name in changed {
            let Some((port, check)) = wanted_of(store, &name, left_out(&name)) else {
                continue;
            };
            self.ports.insert(name, port);
            wanted.insert(port, check);
        }
        self.published.send_if_modified(|checks| {
            let mut modified = false;
            for port in given_up {
                if !wanted.contains_key(&port) {
                    modified |= checks.remove(&port).is_some();
                }
            }
            for (port, check) in wanted {
                if checks.get(&port) != Some(&check) {
                    checks.insert(port, check);
                    modified = true;
                }
            }
            modified
        });
    }
}

/// The port at which a service is to answer, and what.
fn wanted_of(store: &Store, name: &ObjectName, left_out: bool) -> Option<(u16, Check)> {
    let service = store.service(name)?;
    let port = service.health_check_node_port?;
    if !store.owns_health_check(name, port) {
        return None;
    }
    let check = Check {
        namespace: name.namespace().to_owned(),
        name: name.name().to_owned(),
        local_endpoints: if left_out {
            0
        } else {
            local_ready_endpoints(store, service)
        },
    };
    Some((port, check))
}

/// How many addresses on this node are ready to serve a port of the service. Endpoints that
/// terminate take traffic where there are no others, but do not ask for more of it.
pub fn local_ready_endpoints(store: &Store, service: &Service) -> usize {
    let Some(node) = store.node() else { return 0 };
    let ports = service.ports.iter();
    let slices = store.slices_of(&service.name);
    let pairs = ports.flat_map(|port| Family::ALL.map(|family| (port, family)));
    let addresses: BTreeSet<IpAddr> = pairs
        .flat_map(|(port, family)| slices.endpoints(port, family))
        .map(|of| of.endpoint)
        .filter(|endpoint| endpoint.ready && endpoint.node.as_deref() == Some(&node.name))
        .map(|endpoint| endpoint.address)
        .collect();
    addresses.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        Changes, Endpoint, EndpointSlice, Event, Kind, Node, Notice, Object, ObjectRef, Protocol,
        ServiceKind, ServicePort, SlicePort, TrafficPolicy,
    };

    struct Bench {
        store: Store,
        checks: HealthChecks,
        published: watch::Receiver<Checks>,
        left_out: BTreeSet<ObjectName>,
    }

    fn named(name: &str) -> ObjectName {
        ObjectName::new("shop", name)
    }

    fn service(name: &str, port: Option<u16>, created: Option<i64>) -> Service {
        let port_of = |name: &str, port| ServicePort {
            name: name.into(),
            protocol: Protocol::Tcp,
            port,
            node_port: None,
        };
        Service {
            name: named(name),
            created,
            kind: ServiceKind::LoadBalancer,
            cluster_ips: vec![],
            ports: vec![port_of("http", 80), port_of("https", 443)],
            external_ips: vec![],
            load_balancer_ips: vec![],
            source_ranges: vec![],
            external_policy: TrafficPolicy::Local,
            internal_policy: TrafficPolicy::Cluster,
            affinity_seconds: None,
            health_check_node_port: port,
        }
    }

    /// Endpoints given as address, node and whether they are ready (or terminate).
    fn slice(name: &str, port: &str, endpoints: &[(&str, &str, bool)]) -> EndpointSlice {
        let first: Option<IpAddr> = endpoints.first().map(|(ip, ..)| ip.parse().unwrap());
        let endpoints = endpoints.iter().map(|(address, node, ready)| Endpoint {
            address: address.parse().unwrap(),
            ready: *ready,
            serving: true,
            terminating: !ready,
            node: Some((*node).into()),
            hints: None,
        });
        EndpointSlice {
            name: named(name),
            service: named("web"),
            created: None,
            family: first.map_or(Family::V4, Family::of),
            ports: vec![SlicePort {
                name: port.into(),
                protocol: Protocol::Tcp,
                port: 8080,
            }],
            endpoints: endpoints.collect(),
            triggered_at_ms: None,
        }
    }

    impl Bench {
        fn new() -> Self {
            let (sender, published) = watch::channel(Checks::new());
            let mut bench = Self {
                store: Store::default(),
                checks: HealthChecks::new(sender),
                published,
                left_out: BTreeSet::new(),
            };
            for kind in Kind::SERVICES {
                bench.event(Event::ListStarted(kind));
                bench.event(Event::ListComplete(kind));
            }
            bench.apply(Object::Node(Node {
                name: "node-1".into(),
                internal_ips: vec![],
                external_ips: vec![],
                pod_cidrs: vec![],
                zone: None,
                going_away: false,
            }));
            bench
        }

        fn event(&mut self, event: Event) -> Vec<String> {
            let mut changes = Changes::default();
            self.store.apply(event, &mut changes);
            for name in &changes.services {
                self.checks.changed(name);
            }
            self.publish();
            let text = |notice: &Notice| format!("{}: {}", notice.subject, notice.message);
            changes.notices.iter().map(text).collect()
        }

        fn publish(&mut self) {
            self.checks
                .publish(&self.store, |name| self.left_out.contains(name));
        }

        fn apply(&mut self, object: Object) -> Vec<String> {
            self.event(Event::Apply(object))
        }

        fn delete(&mut self, name: &str) -> Vec<String> {
            self.event(Event::Delete(ObjectRef::new(Kind::Service, named(name))))
        }

        /// What is published: port, service and count.
        fn now(&mut self) -> Vec<(u16, String, usize)> {
            let checks = self.published.borrow_and_update();
            let all = checks.iter();
            all.map(|(port, c)| (*port, c.name.clone(), c.local_endpoints))
                .collect()
        }
    }

    fn check(port: u16, name: &str, count: usize) -> (u16, String, usize) {
        (port, name.to_owned(), count)
    }

    #[test]
    fn local_ready_addresses_count_once_over_ports_and_families() {
        let mut bench = Bench::new();
        bench.apply(Object::Service(service("web", Some(30100), None)));
        assert_eq!(bench.now(), [check(30100, "web", 0)]);
        let here = |ip| (ip, "node-1", true);
        bench.apply(Object::EndpointSlice(slice(
            "web-1",
            "http",
            &[
                here("10.0.0.1"),
                here("10.0.0.2"),
                ("10.0.0.3", "node-1", false),
                ("10.0.0.4", "node-2", true),
            ],
        )));
        assert_eq!(bench.now(), [check(30100, "web", 2)]);
        bench.apply(Object::EndpointSlice(slice(
            "web-2",
            "https",
            &[here("10.0.0.2"), here("10.0.0.5")],
        )));
        assert_eq!(bench.now(), [check(30100, "web", 3)]);
        bench.apply(Object::EndpointSlice(slice(
            "web-3",
            "http",
            &[here("fd00::1")],
        )));
        assert_eq!(bench.now(), [check(30100, "web", 4)]);
        // A port that the service does not have.
        bench.apply(Object::EndpointSlice(slice(
            "web-4",
            "other",
            &[here("10.0.0.9")],
        )));
        assert_eq!(bench.now(), [check(30100, "web", 4)]);
        assert!(!bench.published.has_changed().unwrap());
        bench.event(Event::Delete(ObjectRef::new(
            Kind::Node,
            ObjectName::new("", "node-1"),
        )));
        bench.checks.changed(&named("web"));
        bench.publish();
        assert_eq!(bench.now(), [check(30100, "web", 4)], "its pods are there");
    }

    #[test]
    fn ports_come_change_and_go_with_their_services() {
        let mut bench = Bench::new();
        bench.apply(Object::Service(service("web", None, None)));
        assert!(!bench.published.has_changed().unwrap());
        bench.apply(Object::Service(service("web", Some(30100), None)));
        bench.apply(Object::Service(service("api", Some(30101), None)));
        assert_eq!(
            bench.now(),
            [check(30100, "web", 0), check(30101, "api", 0)]
        );
        bench.apply(Object::Service(service("web", Some(30102), None)));
        assert_eq!(
            bench.now(),
            [check(30101, "api", 0), check(30102, "web", 0)]
        );
        let headless = Service {
            kind: ServiceKind::Headless,
            ..service("web", Some(30102), None)
        };
        bench.apply(Object::Service(headless));
        assert_eq!(bench.now(), [check(30101, "api", 0)]);
        bench.delete("api");
        assert_eq!(bench.now(), []);
    }

    #[test]
    fn the_older_of_two_services_has_the_port() {
        let mut bench = Bench::new();
        let told = "healthCheckNodePort 30100 belongs to the older Service";
        assert!(
            bench
                .apply(Object::Service(service("new", Some(30100), Some(20))))
                .is_empty()
        );
        let notices = bench.apply(Object::Service(service("old", Some(30100), Some(10))));
        assert_eq!(notices.len(), 1);
        assert!(
            notices[0].starts_with(&format!("Service shop/new: {told} shop/old ")),
            "{notices:?}"
        );
        assert_eq!(bench.now(), [check(30100, "old", 0)]);
        let notices = bench.apply(Object::Service(service("undated", Some(30100), None)));
        assert!(
            notices[0].starts_with(&format!("Service shop/undated: {told} shop/old ")),
            "{notices:?}"
        );
        assert_eq!(bench.now(), [check(30100, "old", 0)]);
        bench.delete("old");
        assert_eq!(bench.now(), [check(30100, "new", 0)]);
        bench.apply(Object::Service(service("new", Some(30101), Some(20))));
        assert_eq!(
            bench.now(),
            [check(30100, "undated", 0), check(30101, "new", 0)]
        );
    }

    #[test]
    fn a_service_that_is_left_out_has_no_endpoints() {
        let mut bench = Bench::new();
        bench.left_out.insert(named("web"));
        bench.apply(Object::Service(service("web", Some(30100), None)));
        let endpoints = [("10.0.0.1", "node-1", true)];
        bench.apply(Object::EndpointSlice(slice("web-1", "http", &endpoints)));
        assert_eq!(bench.now(), [check(30100, "web", 0)]);
        bench.left_out.clear();
        bench.checks.changed(&named("web"));
        bench.publish();
        assert_eq!(bench.now(), [check(30100, "web", 1)]);
    }
}
