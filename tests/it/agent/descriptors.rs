//! File descriptors: clients that hold connections take none from the work.

use std::io::Write as _;
use std::net::TcpStream;

use crate::support::agent::{NFTLET, Node, PATIENCE, get, metric, wait_for_log};
use crate::support::objects::{cidr, node, service, slice};
use nftlet_lab::fake_api::{CIDRS, NODES, SERVICES, SLICES};
use nftlet_lab::netns::{Daemon, require_net_admin, wait_for};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::json;

const FIRST_CHECK: u16 = 32_100;

/// A node with services that have health checks, and one without.
fn cluster(checks: u16) -> Node {
    let cluster = Node::new();
    cluster.api.put(NODES, node("node-1", "zone-a"));
    cluster.api.put(CIDRS, cidr("kubernetes", "10.96.0.0/16"));
    cluster.api.put(SERVICES, service("web", "10.96.0.10"));
    cluster
        .api
        .put(SLICES, slice("web-1", "web", &["10.1.0.1"]));
    for number in 0..checks {
        let name = format!("checked-{number}");
        let mut checked = service(&name, format!("10.96.1.{number}"));
        checked["spec"]["type"] = json!("LoadBalancer");
        checked["spec"]["externalTrafficPolicy"] = json!("Local");
        checked["spec"]["healthCheckNodePort"] = json!(FIRST_CHECK + number);
        cluster.api.put(SERVICES, checked);
    }
    cluster
}

/// Starts nftlet with a soft and a hard limit of file descriptors.
#[track_caller]
fn start(cluster: &Node, soft: u32, hard: u32) -> Daemon {
    let ports = [
        "--metrics-bind-address=127.0.0.1:10249",
        "--healthz-bind-address=127.0.0.1:10256",
    ];
    let limits = format!("--nofile={soft}:{hard}");
    let arguments = cluster.arguments(&ports);
    let program = [limits, NFTLET.to_owned()].into_iter().chain(arguments);
    let daemon = Daemon::start(&cluster.ns, "prlimit", program);
    wait_for_log(&daemon, "the rules are in place");
    daemon
}

/// Lets this process, and with it all tests, hold more connections than nftlet may have
/// descriptors.
fn raise_own_limit() {
    const ENOUGH: u64 = 4096;
    let limit = rustix::process::getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < ENOUGH) {
        let raised = Rlimit {
            current: Some(ENOUGH),
            ..limit
        };
        rustix::process::setrlimit(Resource::Nofile, raised).expect("below the hard limit");
    }
}

#[test]
fn the_limit_is_raised_as_far_as_it_may_be() {
    if !require_net_admin() {
        return;
    }
    let cluster = cluster(0);
    let _nftlet = start(&cluster, 128, 4096);
    let (_, page) = get(&cluster.ns, "127.0.0.1:10249", "/metrics");
    let limit = metric(&page, "process_max_fds");
    assert!((limit - 4096.0).abs() < 1e-9, "{limit}");
}

#[test]
fn held_connections_hold_up_neither_changes_nor_probes() {
    const CHECKS: u16 = 20;
    const LIMIT: u32 = 1024;
    if !require_net_admin() {
        return;
    }
    raise_own_limit();
    let cluster = cluster(CHECKS);
    let nftlet = start(&cluster, LIMIT, LIMIT);
    let ports: Vec<u16> = (FIRST_CHECK..).take(CHECKS.into()).collect();
    let connect = |port: u16| cluster.ns.run(|| TcpStream::connect(("127.0.0.1", port)));
    for port in &ports {
        wait_for("a health check", PATIENCE, || connect(*port).ok());
    }
    // More than there are descriptors, on these ports and on those of nftlet itself.
    let mut held = Vec::new();
    for port in ports.iter().chain(&[10249, 10256]) {
        for _ in 0..80 {
            let mut stream = connect(*port).expect("the port is open");
            // It may have been driven out already.
            let _ = stream.write_all(b"GET /livez HTT");
            held.push(stream);
        }
    }
    let open = || {
        let descriptors = format!("/proc/{}/fd", nftlet.pid());
        let listed = std::fs::read_dir(descriptors).expect("nftlet runs");
        listed.count()
    };
    assert!(open() < 700, "{} descriptors", open());
    // The connections to the API server are made anew, and what comes on them is written.
    cluster.break_connections();
    cluster
        .api
        .put(SLICES, slice("web-1", "web", &["10.1.0.2", "10.1.0.3"]));
    cluster.leads("10.96.0.10", &["10.1.0.2", "10.1.0.3"]);
    for (port, path, code) in [(10256, "/livez", 200), (10249, "/readyz", 200)] {
        let (answered, body) = get(&cluster.ns, &format!("127.0.0.1:{port}"), path);
        assert_eq!(answered, code, "{body}");
    }
    for port in &ports {
        let (_, body) = get(&cluster.ns, &format!("127.0.0.1:{port}"), "/");
        assert!(body.contains("\"localEndpoints\":0"), "{body}");
    }
    assert!(open() < 700, "{} descriptors", open());
    for text in ["descriptor", "cannot accept"] {
        assert!(!nftlet.log().contains(text), "{}", nftlet.log());
    }
    drop(held);
}

#[test]
fn a_connection_to_the_api_server_is_made_as_soon_as_there_is_a_descriptor_again() {
    if !require_net_admin() {
        return;
    }
    let cluster = cluster(0);
    let nftlet = start(&cluster, 1024, 1024);
    let limit = |descriptors: u64| {
        let pid = i32::try_from(nftlet.pid()).ok().and_then(Pid::from_raw);
        let limit = Rlimit {
            current: Some(descriptors),
            maximum: Some(1024),
        };
        prlimit(pid, Resource::Nofile, limit).expect("its limits may be changed");
    };
    limit(3);
    cluster.break_connections();
    wait_for_log(&nftlet, "no file descriptor is left for a connection");
    limit(1024);
    wait_for_log(&nftlet, "the API server answers again");
    cluster
        .api
        .put(SLICES, slice("web-1", "web", &["10.1.0.2"]));
    cluster.leads("10.96.0.10", &["10.1.0.2"]);
}
