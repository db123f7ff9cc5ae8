//! The amount of work of small changes in large clusters.

use super::queries::{engine, policy_lists};
use super::*;
use crate::model::Hints;

/// The number of services in the cluster.
const SERVICES: u8 = 200;

fn name(number: u8) -> String {
    format!("service-{number}")
}

fn plain(number: u8) -> Service {
    service(&name(number), &[&format!("10.96.0.{number}")], &[80])
}

fn endpoints(service: &Service) -> EndpointSlice {
    slice(
        &format!("{}-1", service.name.name()),
        service,
        Family::V4,
        &[1, 2],
    )
}

fn zone(name: &str) -> Option<Box<[Arc<str>]>> {
    Some([Arc::from(name)].into())
}

/// Services of which the first has hints for zone `a`, the second one for zone `c`, the third one
/// source ranges that contain 192.168.10.1, and the fourth one others. The fifth one has an external
/// IP.
fn cluster() -> Vec<Object> {
    let mut objects = vec![Object::from(node())];
    for number in 1..=SERVICES {
        let mut service = plain(number);
        let mut slice = endpoints(&service);
        let zones = match number {
            1 => zone("a"),
            2 => zone("c"),
            _ => None,
        };
        for endpoint in &mut slice.endpoints {
            let nodes = None;
            let zones = zones.clone();
            endpoint.hints = zones.is_some().then(|| Arc::new(Hints { zones, nodes }));
        }
        let range = match number {
            3 => Some("192.168.10.1/32"),
            4 => Some("192.0.2.0/24"),
            _ => None,
        };
        service.load_balancer_ips = vec![IpAddr::from([203, 0, 113, number])];
        service.source_ranges = range.into_iter().map(|it| it.parse().unwrap()).collect();
        if number == 5 {
            service.external_ips = vec!["198.51.100.5".parse().unwrap()];
        }
        objects.extend([service.into(), slice.into()]);
    }
    objects
}

/// Applies events and returns the number of compiled services.
fn compiled(bench: &Bench, controller: &mut Controller<Fake>, events: Vec<Event>) -> usize {
    let count = || -> usize {
        let text = bench.registry.encode();
        let mut lines = text.lines();
        let line = lines.find_map(|line| line.strip_prefix("nftlet_services_compiled_total "));
        line.unwrap().parse().unwrap()
    };
    let before = count();
    assert_eq!(handle(controller, events), Outcome::Synced);
    if controller.policies().is_none() {
        bench.assert_as_wanted(controller);
    }
    count() - before
}

#[test]
fn a_change_of_the_node_compiles_the_services_that_depend_on_it() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    let all = usize::from(SERVICES);
    assert_eq!(compiled(&bench, &mut controller, lists(cluster())), all);
    let mut now = node();
    let mut after = |change: &dyn Fn(&mut Node)| {
        change(&mut now);
        compiled(&bench, &mut controller, vec![put(now.clone())])
    };
    assert_eq!(after(&|_| ()), 0, "the same");
    assert_eq!(after(&|node| node.going_away = true), 0);
    let range = "10.244.7.0/24".parse().unwrap();
    assert_eq!(after(&|node| node.pod_cidrs = vec![range]), 0);
    assert_eq!(after(&|node| node.zone = Some("a".into())), 1);
    assert_eq!(after(&|node| node.zone = Some("b".into())), 1);
    assert_eq!(after(&|node| node.zone = Some("d".into())), 0);
    let address = |text: &str| vec![text.parse().unwrap()];
    assert_eq!(after(&|node| node.external_ips = address("192.0.2.9")), 0);
    assert_eq!(
        after(&|node| node.internal_ips = address("192.168.10.2")),
        1
    );
    assert_eq!(after(&|node| node.internal_ips = address("192.0.2.7")), 1);
    assert_eq!(after(&|node| node.internal_ips = address("192.0.2.8")), 0);
    assert_eq!(after(&|node| node.name = "node-2".into()), all);
}

#[test]
fn a_service_range_compiles_the_services_that_lose_an_address_in_it() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    compiled(&bench, &mut controller, lists(cluster()));
    let mut after = |cidrs: &[&str]| {
        let cidrs = cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect();
        let name = ObjectName::new("", "kubernetes");
        let range = Object::ServiceCidr(ServiceCidr { name, cidrs });
        compiled(&bench, &mut controller, vec![put(range)])
    };
    assert_eq!(after(&["10.96.0.0/16"]), 0);
    assert_eq!(after(&["10.96.0.0/16", "198.51.100.0/24"]), 1);
    assert_eq!(after(&["10.96.0.0/15", "198.51.100.0/24"]), 0);
    assert_eq!(after(&["10.96.0.0/15"]), 1);
}

#[test]
fn a_copy_of_the_tables_shares_the_plans() {
    let bench = Bench::new();
    let mut controller = bench.controller();
    handle(&mut controller, lists(cluster()));
    let copy = controller.services.engine.tables().clone();
    let before = copy.ruleset();
    let copied = |controller: &Controller<Fake>| controller.services.engine.tables().copied(&copy);
    assert_eq!(copied(&controller), 0);
    let other = slice("service-9-1", &plain(9), Family::V4, &[3]);
    handle(&mut controller, vec![put(other)]);
    let shared = usize::from(SERVICES) * 2;
    let copied = copied(&controller);
    assert!((1..shared / 2).contains(&copied), "{copied} of {shared}");
    assert_eq!(copy.ruleset(), before);
    assert_ne!(controller.services.engine.tables().ruleset(), before);
}

#[test]
fn objects_of_policies_compile_no_service() {
    let bench = Bench::new();
    let mut controller = bench.controller().with_policies(engine());
    compiled(&bench, &mut controller, lists(cluster()));
    let pods = vec![
        super::queries::pod("web", "10.1.0.5"),
        super::queries::closed(),
    ];
    assert_eq!(compiled(&bench, &mut controller, policy_lists(pods)), 0);
}
