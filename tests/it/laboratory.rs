//! The network harness tests itself: what other tests conclude from it must be right.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::support::skip::skip;
use nftlet_lab::netns::{
    Ask, Client, Daemon, Lab, LabOptions, Namespace, PATIENCE, Protocol, Server, require_net_admin,
    wait_for,
};

const PROTOCOLS: [Protocol; 4] = [Protocol::Tcp, Protocol::Udp, Protocol::Http, Protocol::Sctp];

#[test]
fn all_machines_reach_pods_with_their_own_address() {
    if !require_net_admin() {
        return;
    }
    let lab = Lab::new(LabOptions {
        nodes: 2,
        pods_per_node: 2,
        clients: 2,
    });
    let (mut askers, pods) = (lab.clients.clone(), lab.pods());
    askers.extend(lab.nodes.iter().map(|node| node.machine.clone()));
    askers.extend(pods.iter().map(|&pod| pod.clone()));
    for protocol in PROTOCOLS {
        if !protocol.supported() {
            let name = format!("{protocol:?}").to_lowercase();
            skip(&name, "the kernel has it not");
            continue;
        }
        for pod in &pods {
            let servers = pod.serve(protocol, 8080);
            for asker in &askers {
                let client = Client::new(&asker.ns);
                for server in &servers {
                    let to = server.address();
                    let context = format!("{protocol:?} from {} to {to}", asker.name);
                    let answer = client
                        .ask(Ask::new(protocol, to))
                        .unwrap_or_else(|error| panic!("{context}: {error}"));
                    assert_eq!(answer.name, pod.name, "{context}");
                    assert_eq!(answer.local, to, "{context}");
                    let seen = answer.seen_client.ip();
                    // A node speaks to its own pods from the gateway address of their links.
                    if !asker.name.starts_with("node") {
                        assert_eq!(seen, asker.address_like(to.ip()), "{context}");
                    }
                }
            }
            let asked = askers.len() as u64;
            assert!(servers.iter().all(|server| server.served() == asked));
        }
    }
}

#[test]
fn refused_and_dropped_differ() {
    if !require_net_admin() {
        return;
    }
    let lab = Lab::new(LabOptions::default());
    lab.node().ns().nft_load(
        "table inet test {
            chain forward {
                type filter hook forward priority 0
                meta l4proto { tcp, udp } th dport 7001 reject
                meta l4proto { tcp, udp } th dport 7002 drop
            }
        }",
    );
    let client = Client::new(&lab.client().ns);
    let pod = lab.pods()[0];
    let _servers: Vec<_> = [7001, 7002]
        .into_iter()
        .flat_map(|port| [Protocol::Tcp, Protocol::Udp].map(|protocol| pod.serve(protocol, port)))
        .collect();
    // Only where nothing may come: whatever is refused is refused at last.
    let short = Duration::from_millis(200);
    for address in pod.addresses() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let ask = |port| Ask::new(protocol, SocketAddr::new(address, port));
            let kind = |ask| client.ask(ask).expect_err("nothing answers").kind();
            // More than the kernel's usual limit of ICMP errors allows in so short a time.
            for _ in 0..30 {
                let context = format!("{protocol:?} {address}");
                assert_eq!(
                    kind(ask(7001)),
                    ErrorKind::ConnectionRefused,
                    "rejected, {context}"
                );
                assert_eq!(
                    kind(ask(7003)),
                    ErrorKind::ConnectionRefused,
                    "closed, {context}"
                );
            }
            let dropped = kind(ask(7002).timeout(short));
            assert_eq!(dropped, ErrorKind::TimedOut, "{protocol:?} {address}");
        }
    }
}

#[test]
fn service_addresses_lead_to_the_node() {
    if !require_net_admin() {
        return;
    }
    let lab = Lab::new(LabOptions::default());
    let node = lab.node();
    node.ns().nft_load(
        "table ip test {
            chain services {
                ip daddr 10.96.0.10 tcp dport 80 \
                    dnat to numgen random mod 3 map { \
                        0 : 10.244.1.11, 1 : 10.244.1.12, 2 : 10.244.1.13 }
                ip daddr 203.0.113.10 tcp dport 80 dnat to 10.244.1.12
            }
            chain prerouting {
                type nat hook prerouting priority dstnat
                jump services
            }
            chain output {
                type nat hook output priority -100
                jump services
            }
        }
        table ip6 test {
            chain services {
                ip6 daddr { fd00:10:96::a, 2001:db8:1::10 } tcp dport 80 dnat to fd00:10:244:1::13
            }
            chain prerouting {
                type nat hook prerouting priority dstnat
                jump services
            }
            chain output {
                type nat hook output priority -100
                jump services
            }
        }",
    );
    let _servers: Vec<_> = lab
        .pods()
        .iter()
        .map(|pod| pod.serve(Protocol::Tcp, 80))
        .collect();
    for from in [&lab.client().ns, node.ns(), &lab.pods()[0].ns] {
        let client = Client::new(from);
        let ask = |to: &str| {
            let to = SocketAddr::new(to.parse().expect("an address"), 80);
            client
                .ask(Ask::new(Protocol::Tcp, to))
                .unwrap_or_else(|error| panic!("from {} to {to}: {error}", from.name()))
                .name
        };
        assert_eq!(ask("203.0.113.10"), "pod-2");
        assert_eq!(ask("2001:db8:1::10"), "pod-3");
        assert_eq!(ask("fd00:10:96::a"), "pod-3");
    }
    // Hairpin connections need masquerading, which is not here, so only the others ask at random.
    let client = Client::new(&lab.client().ns);
    let mut spread = BTreeMap::<String, u32>::new();
    let started = Instant::now();
    for _ in 0..2000 {
        let answer = client
            .ask(Ask::tcp([10, 96, 0, 10], 80))
            .expect("an answer");
        *spread.entry(answer.name).or_default() += 1;
    }
    eprintln!("2000 requests in {:?}: {spread:?}", started.elapsed());
    assert_eq!(spread.len(), 3, "{spread:?}");
    assert!(spread.values().all(|&count| count > 500), "{spread:?}");
}

#[test]
fn http_connections_stay_open() {
    if !require_net_admin() {
        return;
    }
    let lab = Lab::new(LabOptions::default());
    let servers = lab.pods()[1].serve(Protocol::Http, 80);
    let mut connection = lab.client().ns.run(|| {
        let to = servers[0].address();
        Ask::new(Protocol::Http, to).open().expect("a connection")
    });
    let first = connection.ask().expect("an answer");
    let second = connection.ask().expect("a second answer");
    assert_eq!(first, second, "the same connection, so the same port");
    drop(servers);
    connection.ask().expect_err("the server has ended");
}

#[test]
fn a_new_pod_joins() {
    if !require_net_admin() {
        return;
    }
    let mut lab = Lab::new(LabOptions::default());
    let pod = lab.add_pod(0);
    assert_eq!((pod.name.as_str(), pod.v4.octets()[3]), ("pod-4", 14));
    let [v4, v6] = pod.serve(Protocol::Tcp, 80);
    for server in [v4, v6] {
        let to = server.address();
        let own = lab.client().address_like(to.ip());
        let ask = Ask::new(Protocol::Tcp, to).source_port(own, 4444);
        let answer = lab.client().ns.run(|| ask.send()).expect("an answer");
        assert_eq!(answer.name, "pod-4");
        assert_eq!(answer.seen_client, SocketAddr::new(own, 4444));
    }
}

#[test]
fn a_namespace_is_a_world_of_its_own_and_goes_away() {
    if !require_net_admin() {
        return;
    }
    let links = || {
        let table = std::fs::read_to_string("/proc/thread-self/net/dev").expect("the link list");
        let rows = table.lines().filter_map(|line| line.split_once(':'));
        rows.map(|(name, _)| name.trim().to_owned())
            .collect::<Vec<_>>()
    };
    let outside = links();
    let (left, right) = (Namespace::new("left"), Namespace::new("right"));
    left.veth("eth0", &right, "eth9");
    left.addr_add("eth0", "10.0.0.1/24");
    right.addr_add("eth9", "10.0.0.2/24");
    assert!(left.run(links).contains(&"eth0".to_owned()));
    assert!(right.run(links).contains(&"eth9".to_owned()));
    assert_eq!(links(), outside, "nothing appears outside");
    let to = SocketAddr::from(([10, 0, 0, 2], 0));
    let server = Server::start(&right, Protocol::Tcp, to, "right");
    let ask = Ask::new(Protocol::Tcp, server.address());
    assert_eq!(left.run(|| ask.send()).expect("an answer").name, "right");

    // The name with which other programs find it, here the namespace's own number.
    let inode = |path: &std::path::Path| std::fs::read_link(path).expect("a link");
    let inside = left.run(|| inode("/proc/thread-self/ns/net".as_ref()));
    let output = left
        .command("readlink")
        .arg("/proc/self/ns/net")
        .output()
        .expect("readlink runs");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        inside.display().to_string()
    );

    // With the last handle of the one, the pair of links goes, and so the other's end of it.
    drop(left);
    wait_for("the link to go", PATIENCE, || {
        (!right.run(links).contains(&"eth9".to_owned())).then_some(())
    });
}

#[test]
fn daemons_are_heard_and_stopped() {
    if !require_net_admin() {
        return;
    }
    let ns = Namespace::new("daemon");
    let script = "trap 'echo bye; exit 3' TERM; ip -o link show; echo ready >&2; \
                  while :; do sleep 0.05; done";
    let mut daemon = Daemon::start(&ns, "sh", ["-c", script]);
    wait_for("the daemon", PATIENCE, || {
        daemon.log().contains("ready").then_some(())
    });
    assert!(daemon.log().contains("lo:"), "{}", daemon.log());
    let status = daemon.stop(PATIENCE).expect("it ends");
    assert_eq!(status.code(), Some(3));
    assert!(daemon.log().contains("bye"), "{}", daemon.log());
}
