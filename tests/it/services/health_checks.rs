//! `healthCheckNodePort` as a load balancer sees it.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use crate::support::manifests::{Backend, Manifests, Service};
use nftlet_lab::netns::{
    Client, Lab, LabOptions, Namespace, PATIENCE, Protocol, Server, require_net_admin, wait_for,
};
use serde_json::{Value, json};

const NODE_IPS: [&str; 2] = ["192.168.10.1", "fd00:192:168:10::1"];

fn web(port: u16) -> Service {
    let mut web = Service::new("web", 10).port("http", "TCP", 80, Some(30080));
    web.kind = "LoadBalancer".into();
    web.load_balancer_ips = vec!["203.0.113.10".into()];
    web.patch(json!({
        "metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"externalTrafficPolicy": "Local", "healthCheckNodePort": port},
    }))
}

/// Status line and headers in lower case, and the body.
fn get(from: &Client, address: &str, port: u16) -> io::Result<(String, String)> {
    let to = SocketAddr::new(address.parse::<IpAddr>().unwrap(), port);
    from.run(move || {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: lb\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        Ok((head.to_ascii_lowercase(), body.to_owned()))
    })
}

/// Waits until both addresses of the node answer with this status and count.
#[track_caller]
fn expect(from: &Client, port: u16, status: u16, service: &str, count: usize) {
    for address in NODE_IPS {
        let what = format!("{status} with {count} endpoints on {address} port {port}");
        wait_for(&what, PATIENCE, || {
            let (head, body) = get(from, address, port).ok()?;
            let body: Value = serde_json::from_str(&body).ok()?;
            let wanted = json!({
                "service": {"namespace": "shop", "name": service},
                "localEndpoints": count,
                "serviceProxyHealthy": true,
            });
            let fits = head.starts_with(&format!("http/1.1 {status} "))
                && head.contains(&format!("\r\nx-load-balancing-endpoint-weight: {count}"))
                && body == wanted;
            fits.then_some(())
        });
    }
}

#[track_caller]
fn expect_closed(from: &Client, port: u16) {
    wait_for("the port is closed", PATIENCE, || {
        let error = get(from, NODE_IPS[0], port).err()?;
        (error.kind() == io::ErrorKind::ConnectionRefused).then_some(())
    });
}

fn no_pods() -> Lab {
    Lab::new(LabOptions {
        pods_per_node: 0,
        ..LabOptions::default()
    })
}

#[test]
fn a_load_balancer_learns_how_many_endpoints_the_node_has() {
    if !require_net_admin() {
        return;
    }
    let lab = no_pods();
    let manifests = Manifests::new();
    let service = web(32100);
    manifests.service(&service);
    let here = |n: u8| Backend::new(format!("10.244.1.{n}"), "node-1");
    let elsewhere = Backend::new("10.244.2.11", "node-2");
    manifests.backends(&service, 8080, &[here(11), here(12), elsewhere.clone()]);
    let daemon = manifests.run(lab.node().ns(), &[]);
    let client = Client::new(&lab.client().ns);
    expect(&client, 32100, 200, "web", 2);
    // One that terminates may still get traffic, but is no reason to send more.
    manifests.backends(&service, 8080, &[here(11).terminating(), elsewhere.clone()]);
    expect(&client, 32100, 503, "web", 0);
    manifests.backends(&service, 8080, &[here(11), elsewhere]);
    expect(&client, 32100, 200, "web", 1);
    // The port follows the field, and goes with the policy.
    manifests.service(&web(32101));
    expect(&client, 32101, 200, "web", 1);
    expect_closed(&client, 32100);
    manifests.service(&web(32101).patch(json!({"spec": {"externalTrafficPolicy": "Cluster"}})));
    expect_closed(&client, 32101);
    manifests.service(&web(32101));
    expect(&client, 32101, 200, "web", 1);
    manifests.remove("Service", "web");
    expect_closed(&client, 32101);
    assert!(!daemon.log().contains("WARN"), "{}", daemon.log());
}

#[test]
fn the_older_of_two_services_answers() {
    if !require_net_admin() {
        return;
    }
    let lab = no_pods();
    let manifests = Manifests::new();
    let mut young = web(32100).patch(json!({
        "metadata": {"creationTimestamp": "2026-02-01T00:00:00Z"},
        "spec": {"ports": [{"name": "http", "port": 80, "nodePort": 30081}]},
    }));
    young.name = "young".into();
    young.cluster_ips = vec!["10.96.0.11".into()];
    young.load_balancer_ips = vec!["203.0.113.11".into()];
    manifests.service(&young);
    let daemon = manifests.run(lab.node().ns(), &[]);
    let client = Client::new(&lab.client().ns);
    expect(&client, 32100, 503, "young", 0);
    manifests.service(&web(32100));
    expect(&client, 32100, 503, "web", 0);
    let told =
        "Service shop/young: healthCheckNodePort 32100 belongs to the older Service shop/web";
    wait_for(told, PATIENCE, || daemon.log().contains(told).then_some(()));
    manifests.remove("Service", "web");
    expect(&client, 32100, 503, "young", 0);
}

#[test]
fn a_port_in_use_is_reported_once_and_opened_later() {
    if !require_net_admin() {
        return;
    }
    let lab = no_pods();
    let manifests = Manifests::new();
    manifests.service(&web(32100));
    let at = SocketAddr::new(NODE_IPS[0].parse().unwrap(), 32100);
    let holder = Server::start(lab.node().ns(), Protocol::Tcp, at, "holder");
    let metrics = ["--metrics-bind-address", "192.168.10.1:10249"];
    let daemon = manifests.run(lab.node().ns(), &metrics);
    let client = Client::new(&lab.client().ns);
    let told = "Service shop/web: cannot listen on healthCheckNodePort 32100: ";
    wait_for("the second attempt", PATIENCE, || {
        let (_, page) = get_page(&client, "/metrics").ok()?;
        let line = page
            .lines()
            .find_map(|line| line.strip_prefix("nftlet_health_check_port_errors_total "))?;
        (line.parse::<f64>().ok()? >= 2.0).then_some(())
    });
    let log = daemon.log();
    assert_eq!(log.matches(told).count(), 1, "{log}");
    assert!(log.contains("HealthCheckPort"), "{log}");
    drop(holder);
    expect(&client, 32100, 503, "web", 0);
}

fn get_page(from: &Client, path: &'static str) -> io::Result<(String, String)> {
    from.run(move || {
        let mut stream = TcpStream::connect(("192.168.10.1", 10249))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        Ok((head.to_owned(), body.to_owned()))
    })
}

#[test]
fn a_node_without_ipv6_answers_on_ipv4() {
    if !require_net_admin() {
        return;
    }
    let node = Namespace::new("node-1");
    node.sysctls(&[
        ("net.ipv6.conf.all.disable_ipv6", "1"),
        ("net.ipv6.bindv6only", "1"),
    ]);
    let manifests = Manifests::new();
    manifests.service(&web(32100));
    let _daemon = manifests.run(&node, &[]);
    let client = Client::new(&node);
    wait_for("an answer", PATIENCE, || {
        let (head, _) = get(&client, "127.0.0.1", 32100).ok()?;
        head.starts_with("http/1.1 503 ").then_some(())
    });
}

#[test]
fn one_run_opens_no_port() {
    if !require_net_admin() {
        return;
    }
    let node = Namespace::new("node-1");
    let manifests = Manifests::new();
    manifests.service(&web(32100));
    let said = manifests.program(&node, &[]);
    assert!(!said.contains("health check"), "{said}");
}
