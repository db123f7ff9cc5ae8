//! Claims that services contest.

use super::*;

fn with_node_port(name: &str, cluster_ip: &str, number: u16) -> Service {
    let mut service = victim(name, cluster_ip);
    service.ports[0].node_port = Some(number);
    service
}

pub(super) fn range(name: &str, cidr: &str) -> Object {
    Object::ServiceCidr(ServiceCidr {
        name: ObjectName::new("", name),
        cidrs: vec![cidr.parse().unwrap()],
    })
}

fn node_at(ip: &str) -> Object {
    Object::Node(Node {
        name: "node-1".into(),
        internal_ips: vec![ip.parse().unwrap()],
        external_ips: vec![],
        pod_cidrs: vec![],
        zone: None,
        going_away: false,
        labels: Default::default(),
        addresses: Default::default(),
    })
}

#[test]
fn a_cluster_ip_is_the_victims_on_every_port_however_old_the_thief_is() {
    let mut store = complete_store();
    let mut thief = service("thief", 1, "10.96.0.1");
    thief.load_balancer_ips = vec!["10.96.0.1".parse().unwrap()];
    thief.ports.push(ServicePort {
        port: 81,
        ..thief.ports[0].clone()
    });
    // No service has the address yet, and no range is known.
    put(&mut store, Object::Service(thief.clone()));
    let claims = [address("10.96.0.1", 80), address("10.96.0.1", 81)];
    assert_eq!(owner(&store, &claims[0]), Some("thief"));

    let marks = put(&mut store, Object::Service(victim("web", "10.96.0.1")));
    assert_eq!(names(&marks), ["thief", "web"]);
    assert_eq!(
        claims.map(|claim| owner(&store, &claim).is_none()),
        [false, true]
    );
    assert_eq!(owner(&store, &claims[0]), Some("web"));
    let notices = messages(&marks);
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert!(
        notices[0].starts_with(
            "Service shop/thief: 10.96.0.1:80 TCP does not lead to this Service: the address is the \
             ClusterIP of Service shop/web (and 1 more: 10.96.0.1:81 TCP)"
        ),
        "{notices:?}"
    );

    // A change of the thief that keeps the claim is not reported again.
    thief.affinity_seconds = Some(5);
    let marks = put(&mut store, Object::Service(thief));
    assert_eq!((names(&marks), messages(&marks)), (vec!["thief"], vec![]));

    let gone = ObjectRef::new(Kind::Service, ObjectName::new("shop", "web"));
    let marks = apply(&mut store, Event::Delete(gone));
    assert_eq!(names(&marks), ["thief", "web"]);
    assert_eq!(
        claims.map(|claim| owner(&store, &claim) == Some("thief")),
        [true, true]
    );
}

#[test]
fn a_range_of_cluster_ips_takes_addresses_away_and_gives_them_back() {
    let mut store = complete_store();
    let claim = address("10.96.7.7", 80);
    put(
        &mut store,
        Object::Service(service("thief", 1, "10.96.7.7")),
    );
    put(
        &mut store,
        Object::Service(service("other", 1, "198.51.100.1")),
    );
    assert_eq!(owner(&store, &claim), Some("thief"));
    let marks = put(&mut store, range("a", "10.96.0.0/16"));
    assert_eq!(names(&marks), ["thief"]);
    assert!(marks.service_cidrs);
    assert_eq!(owner(&store, &claim), None);
    assert!(
        messages(&marks)[0].contains("the address is in the ServiceCIDR 10.96.0.0/16"),
        "{marks:?}"
    );
    // The ClusterIPs in it are not touched.
    put(&mut store, Object::Service(victim("web", "10.96.7.8")));
    assert_eq!(owner(&store, &address("10.96.7.8", 80)), Some("web"));
    put(&mut store, range("b", "10.96.7.0/24"));
    let remove = |store: &mut Store, name| {
        let name = ObjectRef::new(Kind::ServiceCidr, ObjectName::new("", name));
        apply(store, Event::Delete(name))
    };
    assert!(names(&remove(&mut store, "a")).is_empty());
    assert_eq!(owner(&store, &claim), None);
    assert_eq!(names(&remove(&mut store, "b")), ["thief"]);
    assert_eq!(owner(&store, &claim), Some("thief"));
}

#[test]
fn a_better_rank_comes_before_age() {
    let mut store = complete_store();
    let claim = address("198.51.100.1", 80);
    put(
        &mut store,
        Object::Service(service("external", 1, "198.51.100.1")),
    );
    let mut balanced = victim("balanced", "10.96.0.5");
    balanced.load_balancer_ips = vec!["198.51.100.1".parse().unwrap()];
    let marks = put(&mut store, Object::Service(balanced.clone()));
    assert_eq!(owner(&store, &claim), Some("balanced"));
    assert_eq!(names(&marks), ["balanced", "external"]);
    assert!(
        messages(&marks)[0].contains("is a load balancer's address of Service shop/balanced"),
        "{marks:?}"
    );
    // The address of a load balancer is shared where the ports differ.
    let mut beside = victim("beside", "10.96.0.6");
    beside.load_balancer_ips = balanced.load_balancer_ips.clone();
    beside.ports[0].port = 443;
    let marks = put(&mut store, Object::Service(beside));
    assert_eq!((names(&marks), messages(&marks)), (vec!["beside"], vec![]));
    assert_eq!(owner(&store, &address("198.51.100.1", 443)), Some("beside"));
    // A service's own ClusterIP as its load balancer's address.
    let mut tunnel = victim("tunnel", "10.96.0.7");
    tunnel.load_balancer_ips = tunnel.cluster_ips.clone();
    let marks = put(&mut store, Object::Service(tunnel));
    assert_eq!((names(&marks), messages(&marks)), (vec!["tunnel"], vec![]));
    assert_eq!(owner(&store, &address("10.96.0.7", 80)), Some("tunnel"));
}

#[test]
fn a_node_port_comes_before_external_addresses_of_the_node() {
    let mut store = complete_store();
    let mut thief = service("thief", 1, "192.0.2.1");
    thief.external_ips.push("192.0.2.2".parse().unwrap());
    thief.ports[0].port = 30080;
    put(&mut store, Object::Service(thief.clone()));
    put(&mut store, node_at("192.0.2.1"));
    let (here, elsewhere) = (address("192.0.2.1", 30080), address("192.0.2.2", 30080));
    assert_eq!(owner(&store, &here), Some("thief"));
    let web = with_node_port("web", "10.96.0.1", 30080);
    let marks = put(&mut store, Object::Service(web.clone()));
    assert_eq!(names(&marks), ["thief", "web"]);
    assert_eq!(
        (owner(&store, &here), owner(&store, &elsewhere)),
        (None, Some("thief"))
    );
    assert!(
        messages(&marks)[0].contains("the NodePort of Service shop/web answers there"),
        "{marks:?}"
    );
    // Another node address moves the conflict.
    assert_eq!(names(&put(&mut store, node_at("192.0.2.2"))), ["thief"]);
    assert_eq!(
        (owner(&store, &here), owner(&store, &elsewhere)),
        (Some("thief"), None)
    );
    let gone = ObjectRef::new(Kind::Service, web.name.clone());
    assert_eq!(
        names(&apply(&mut store, Event::Delete(gone))),
        ["thief", "web"]
    );
    assert_eq!(owner(&store, &elsewhere), Some("thief"));

    // Where NodePorts do not answer there is nothing to come before.
    let elsewhere_only = NodePortAddresses::Inside(vec!["198.51.100.0/24".parse().unwrap()]);
    let mut store = complete_store().with_node_ports(elsewhere_only, None);
    put(&mut store, node_at("192.0.2.1"));
    put(&mut store, Object::Service(thief));
    put(&mut store, Object::Service(web));
    assert_eq!(owner(&store, &here), Some("thief"));
}

#[test]
fn a_port_of_the_node_is_a_node_port_or_a_health_check() {
    let mut store = complete_store();
    let mut checked = victim("checked", "10.96.0.2");
    checked.created = Some(1);
    checked.health_check_node_port = Some(30080);
    let name = checked.name.clone();
    put(&mut store, Object::Service(checked.clone()));
    assert!(store.owns_health_check(&name, 30080));
    let marks = put(
        &mut store,
        Object::Service(with_node_port("web", "10.96.0.1", 30080)),
    );
    assert_eq!(names(&marks), ["web"]);
    assert!(
        messages(&marks)[0].starts_with(
            "Service shop/web: NodePort 30080 TCP is the healthCheckNodePort of the older \
             Service shop/checked"
        ),
        "{marks:?}"
    );
    assert_eq!(
        owner(&store, &Claim::NodePort(Protocol::Tcp, 30080)),
        Some("checked")
    );
    checked.created = Some(101);
    let marks = put(&mut store, Object::Service(checked));
    assert_eq!(names(&marks), ["checked", "web"]);
    assert!(!store.owns_health_check(&name, 30080));
    assert!(
        messages(&marks)[0].starts_with(
            "Service shop/checked: healthCheckNodePort 30080 is the nodePort of the older"
        ),
        "{marks:?}"
    );
}

#[test]
fn nothing_but_a_cluster_ip_takes_the_way_to_the_api_server() {
    let mut store = complete_store();
    put(&mut store, node_at("192.0.2.1"));
    let mut thief = service("thief", 1, "192.0.2.50");
    thief.load_balancer_ips = vec!["192.0.2.51".parse().unwrap()];
    thief.ports[0].port = 6443;
    put(&mut store, Object::Service(thief));
    put(
        &mut store,
        Object::Service(with_node_port("port", "10.96.0.9", 6443)),
    );
    let mut kubernetes = victim("kubernetes", "10.96.0.1");
    kubernetes.ports[0].port = 443;
    put(&mut store, Object::Service(kubernetes));
    let claims = [
        address("192.0.2.50", 6443),
        address("192.0.2.51", 6443),
        Claim::NodePort(Protocol::Tcp, 6443),
        address("10.96.0.1", 443),
    ];
    let free = |store: &Store| claims.map(|claim| owner(store, &claim).is_none());
    assert_eq!(free(&store), [false; 4]);
    let mut reach = |servers: &[&str]| {
        let servers = servers.iter().map(|text| text.parse().unwrap()).collect();
        let marks = apply(&mut store, Event::Servers(servers));
        let count = messages(&marks).len();
        (names(&marks).join(" "), count, free(&store))
    };
    assert_eq!(
        reach(&["192.0.2.50:6443", "10.96.0.1:443"]),
        ("thief".to_owned(), 1, [true, false, false, false])
    );
    assert_eq!(
        reach(&["192.0.2.51:6443"]),
        ("thief".to_owned(), 1, [false, true, false, false])
    );
    assert_eq!(
        reach(&["192.0.2.1:6443"]),
        ("port thief".to_owned(), 1, [false, false, true, false])
    );
    assert_eq!(
        reach(&["192.0.2.1:443"]),
        ("port".to_owned(), 0, [false; 4])
    );
}
