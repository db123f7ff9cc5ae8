//! Publishes the health checks of services (`healthCheckNodePort`) after their rules took effect, so
//! that a load balancer sends no traffic before.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use tokio::sync::watch;

use crate::model::{Kind, Notice, ObjectName, ObjectRef, Reason, Subject};
use crate::serve::checks::{Check, CheckError, Checks};
use crate::services::{Replaced, ServiceChanges};

/// Publishes the health checks of all services through a watch channel.
#[derive(Debug)]
pub(crate) struct HealthChecks {
    published: watch::Sender<Checks>,
    /// The port of each service with a health check.
    ports: HashMap<ObjectName, u16>,
}

impl HealthChecks {
    /// Creates a publisher without health checks.
    pub(crate) fn new(published: watch::Sender<Checks>) -> Self {
        Self {
            published,
            ports: HashMap::new(),
        }
    }

    /// Runs until no more changes come.
    pub(crate) fn run(mut self, changes: &Receiver<Arc<ServiceChanges>>) {
        while let Ok(changes) = changes.recv() {
            self.receive(&changes);
        }
    }

    /// Publishes the health checks of the services that changed.
    pub(crate) fn receive(&mut self, changes: &ServiceChanges) {
        let mut seen = HashSet::new();
        // Of several changes of a service only the last is relevant.
        let last = changes.replaced.iter().rev();
        let last: Vec<&Replaced> = last.filter(|it| seen.insert(&it.service)).collect();
        // A port may move from one service to another.
        let given_up = last.iter().filter_map(|it| self.ports.remove(&it.service));
        let given_up: Vec<u16> = given_up.collect();
        let mut wanted = Checks::new();
        for replaced in last {
            let Some(health_check) = replaced.health_check else {
                continue;
            };
            let service = &replaced.service;
            self.ports.insert(service.clone(), health_check.port);
            let check = Check {
                namespace: service.namespace().to_owned(),
                name: service.name().to_owned(),
                local_endpoints: health_check.local_endpoints,
            };
            wanted.insert(health_check.port, check);
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

/// Returns the notice about a port that cannot be listened on.
pub(crate) fn port_notice(error: &CheckError) -> Notice {
    let service = ObjectName::new(&error.check.namespace, &error.check.name);
    Notice {
        subject: Subject::Object(ObjectRef::new(Kind::Service, service)),
        reason: Reason::HealthCheckPort,
        message: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::engine::{BUDGET, Engine as _};
    use crate::model::{
        Endpoint, EndpointSlice, Event, Family, Kind, Node, Notice, Object, ObjectRef, Protocol,
        Service, ServiceKind, ServicePort, SlicePort, TrafficPolicy,
    };
    use crate::services::{Engine, ServiceSettings};

    struct Bench {
        engine: Engine,
        checks: HealthChecks,
        published: watch::Receiver<Checks>,
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
                engine: Engine::new(ServiceSettings::default()),
                checks: HealthChecks::new(sender),
                published,
            };
            for kind in Kind::SERVICES {
                bench.engine.apply(&Event::ListStarted(kind));
                bench.engine.apply(&Event::ListComplete(kind));
            }
            bench.engine.rebuild(true);
            bench.apply(Object::Node(Node {
                name: "node-1".into(),
                internal_ips: vec![],
                external_ips: vec![],
                pod_cidrs: vec![],
                zone: None,
                going_away: false,
                labels: Default::default(),
                addresses: Default::default(),
            }));
            bench
        }

        fn event(&mut self, event: &Event) -> Vec<String> {
            self.engine.apply(event);
            let notices = self.engine.take_notices();
            self.publish();
            let text = |notice: &Notice| format!("{}: {}", notice.subject, notice.message);
            notices.iter().map(text).collect()
        }

        fn publish(&mut self) {
            let update = self.engine.update(BUDGET);
            self.checks.receive(&update.change);
        }

        fn apply(&mut self, object: Object) -> Vec<String> {
            self.event(&Event::Apply(object))
        }

        fn delete(&mut self, name: &str) -> Vec<String> {
            self.event(&Event::Delete(ObjectRef::new(Kind::Service, named(name))))
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
        bench.event(&Event::Delete(ObjectRef::new(
            Kind::Node,
            ObjectName::new("", "node-1"),
        )));
        bench.apply(Object::EndpointSlice(slice("web-5", "http", &[])));
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
        bench.apply(Object::Service(service("web", Some(30100), None)));
        let endpoints = [("10.0.0.1", "node-1", true)];
        bench.apply(Object::EndpointSlice(slice("web-1", "http", &endpoints)));
        assert_eq!(bench.now(), [check(30100, "web", 1)]);
        let web = ObjectRef::new(Kind::Service, named("web"));
        let change = bench.engine.quarantine(&web);
        bench.checks.receive(&change);
        assert_eq!(bench.now(), [check(30100, "web", 0)]);
        bench.engine.retry_quarantined();
        bench.publish();
        assert_eq!(bench.now(), [check(30100, "web", 1)]);
    }
}
