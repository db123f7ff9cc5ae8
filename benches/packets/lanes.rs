//! Lanes: the same path for packets, with other rules on its node.
//!
//! ```text
//!   client 10.192.0.2 ── 10.192.0.1 node 192.168.20.1 ── 192.168.20.2 server
//!   (a pod)                          (the rules)          (answers for all pods 10.128.0.0/10)
//! ```
//!
//! One listening socket stands for the endpoints of all services: the server's routing table says
//! that their whole range is local. Where the rules translate nothing, the client connects to
//! these addresses itself.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, TcpListener};
use std::time::Duration;

use nftlet::engine::{BUDGET, Engine as _};
use nftlet::metrics::Metrics;
use nftlet::model::{Event, LabelSelector, NetworkPolicy, Object, ObjectName, PolicyRule};
use nftlet::netlink::Nftables;
use nftlet::policy::{self, Engine};
use nftlet::ruleset::{Ruleset, diff};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use serde::Serialize;

use crate::agent::Agent;
use crate::baseline;
use crate::netns::Namespace;
use crate::policies::Cluster;
use crate::traffic;
use crate::workload::{NODE, NODE_IP, Random, Workload};

/// The addresses of the client and of its node, both inside of the workload's pod network.
const CLIENT: &str = "10.192.0.2";
const GATEWAY: &str = "10.192.0.1";
/// The node's address towards the server, and the server's. Not of the pod network: what the node
/// itself sends to a service is masqueraded, as on a real one.
const FABRIC: &str = "192.168.20.1";
const SERVER: &str = "192.168.20.2";
/// Where the workload's endpoints are.
const POD_RANGE: &str = "10.128.0.0/10";
const PORT: u16 = 8080;
/// The least, the usual and the largest size of a socket's buffers.
const BUFFERS: &str = "4096 4194304 4194304";
/// New connections that show, before anything is measured, that a lane leads to the right place.
const PROBES: usize = 50;
/// A handshake that takes longer has failed; what is measured takes microseconds.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// One in so many services has session affinity in the mix of `scale`.
const AFFINITY_EVERY: usize = 50;
const AFFINITY_SECONDS: u32 = 10_800;
/// The policies, and the pods that they are about.
const POLICIES: usize = 1_000;
const PODS: usize = 10_000;

/// What a packet meets on the node of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rules {
    /// Nothing at all, and connections are not tracked.
    None,
    /// Nothing once more, and the endpoints of all services are connected to, not those of the
    /// smallest cluster: what two lanes with the same rules differ by.
    NoneAgain,
    /// Nothing, but connections are tracked: the least for whoever translates anything.
    Tracked,
    /// One rule that translates one address, and masquerades what the node sends there: the
    /// least that the kernel does for a service.
    OneRule,
    /// kube-proxy's shape of so many services.
    KubeProxy(usize),
    /// nftlet's rules for so many services.
    Nftlet(usize),
    /// The same without the base chains of type `filter`, which judge new connections to unassigned
    /// service addresses: what established connections pay for these hooks is the difference.
    WithoutFilters(usize),
    /// The same where one in fifty has session affinity: every packet of the node passes the
    /// chains that learn.
    Affinity(usize),
    /// The same with a thousand policies, of which some isolate the client: every packet passes
    /// the chains that tell whether it may.
    Policies(usize),
}

/// Client, node and server.
pub struct Lane {
    /// The rules of the node.
    pub rules: Rules,
    /// Where the client is.
    pub client: Namespace,
    /// Where the rules are.
    pub node: Namespace,
    /// Answers for every endpoint.
    pub listener: TcpListener,
    /// What clients connect to.
    pub destinations: Vec<SocketAddrV4>,
}

impl Rules {
    /// How it is called where it is loaded.
    pub fn words(self) -> String {
        match self {
            Self::None => "no rules".to_owned(),
            Self::NoneAgain => "no rules, once more".to_owned(),
            Self::Tracked => "no rules, connections tracked".to_owned(),
            Self::OneRule => "one rule for one service".to_owned(),
            Self::KubeProxy(services) => format!("kube-proxy's shape of {services} services"),
            Self::Nftlet(services) => format!("nftlet with {services} services"),
            Self::WithoutFilters(services) => {
                format!("nftlet with {services} services, without its filter hooks")
            }
            Self::Affinity(services) => {
                format!("nftlet with {services} services, some with session affinity")
            }
            Self::Policies(services) => format!("nftlet with {services} services and policies"),
        }
    }

    /// Whether clients connect to services; otherwise to endpoints.
    fn translates(self) -> bool {
        !matches!(self, Self::None | Self::NoneAgain | Self::Tracked)
    }

    /// Puts the rules for a workload in force on a node. False if that takes too long.
    fn load(self, node: &Namespace, workload: &Workload) -> bool {
        match self {
            Self::None | Self::NoneAgain => {}
            Self::OneRule => node.nft_load(&one_rule(workload)),
            Self::KubeProxy(_) => {
                let table = baseline::table(workload);
                return baseline::load_within(node, &table, baseline::PATIENCE).is_some();
            }
            Self::Tracked => node.nft_load(TRACKED),
            Self::Nftlet(_) => program(node, workload),
            Self::WithoutFilters(_) => {
                program(node, workload);
                node.nft_load(WITHOUT_FILTERS);
            }
            Self::Affinity(_) => {
                let mut workload = workload.clone();
                for service in workload.services.iter_mut().step_by(AFFINITY_EVERY) {
                    service.affinity_seconds = Some(AFFINITY_SECONDS);
                }
                program(node, &workload);
            }
            Self::Policies(_) => {
                program(node, workload);
                node.run(program_policies);
            }
        }
        true
    }
}

impl Lane {
    /// Builds a lane and checks that it leads where it should. `None` if its rules take too long to
    /// load.
    pub fn new(rules: Rules, workload: &Workload) -> Option<Self> {
        let [client, node, server] = ["client", "node", "server"].map(Namespace::new);
        connect_namespaces(&client, &node, &server);
        if !rules.load(&node, workload) {
            return None;
        }
        let listener = server
            .run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).expect("the port is free"));
        set_socket_timeout(&listener, Timeout::Recv, Some(PATIENCE)).expect("sockets can wait");
        let services = match rules {
            Rules::OneRule => 0..1,
            _ => 0..workload.services.len(),
        };
        let destinations = if rules.translates() {
            services
                .map(|service| frontend(workload, service))
                .collect()
        } else {
            services
                .flat_map(|service| targets(workload, service))
                .collect()
        };
        let lane = Self {
            rules,
            client,
            node,
            listener,
            destinations,
        };
        for from in [&lane.client, &lane.node] {
            lane.probe(from, workload);
        }
        Some(lane)
    }

    /// Connects to some of the destinations, and looks at who answers.
    fn probe(&self, from: &Namespace, workload: &Workload) {
        let mut random = Random::new();
        let endpoints = workload.endpoints.first().map_or(1, Vec::len);
        for _ in 0..PROBES {
            let place = random.below(self.destinations.len());
            let to = self.destinations[place];
            let connection = from.run(|| traffic::connect(&self.listener, to));
            let answers = connection.server.local_addr().expect("it is connected");
            let expected: HashSet<SocketAddrV4> = if self.rules.translates() {
                targets(workload, place).collect()
            } else {
                targets(workload, place / endpoints)
                    .filter(|target| *target == to)
                    .collect()
            };
            let right = expected.iter().any(|target| answers == (*target).into());
            assert!(
                right,
                "{}: {to} leads to {answers}, which is none of {expected:?}",
                self.rules.words()
            );
        }
    }
}

fn connect_namespaces(client: &Namespace, node: &Namespace, server: &Namespace) {
    for namespace in [client, node, server] {
        namespace.sysctls(&[
            ("net.ipv4.conf.all.rp_filter", "0"),
            ("net.ipv4.conf.default.rp_filter", "0"),
            // What was learned of a destination is kept in one table for all of them, whose
            // cost would grow with the number of services.
            ("net.ipv4.tcp_no_metrics_save", "1"),
            // Buffers that do not grow with what a connection happened to do before.
            ("net.ipv4.tcp_moderate_rcvbuf", "0"),
            ("net.ipv4.tcp_rmem", BUFFERS),
            ("net.ipv4.tcp_wmem", BUFFERS),
            // Round trips get longer when bytes follow them. Cubic would take that for congestion
            // in some lanes and not in others.
            ("net.ipv4.tcp_congestion_control", "reno"),
            ("net.ipv4.tcp_slow_start_after_idle", "0"),
        ]);
    }
    client.veth("eth0", node, "pods");
    node.veth("fabric", server, "eth0");
    client.ip_batch([
        format!("addr add {CLIENT}/24 dev eth0"),
        format!("route add default via {GATEWAY}"),
    ]);
    node.ip_batch([
        format!("addr add {GATEWAY}/24 dev pods"),
        format!("addr add {FABRIC}/24 dev fabric"),
        format!("addr add {NODE_IP}/32 dev lo"),
        format!("route add default via {SERVER}"),
    ]);
    node.sysctl("net.ipv4.ip_forward", "1");
    // Connections are reset as soon as they are made; what is left of them is not to pile up.
    node.sysctl("net.netfilter.nf_conntrack_tcp_timeout_close", "1");
    server.ip_batch([
        format!("addr add {SERVER}/24 dev eth0"),
        format!("route add {GATEWAY}/32 via {FABRIC}"),
        format!("route add {CLIENT}/32 via {FABRIC}"),
        format!("route add local {POD_RANGE} dev lo"),
    ]);
}

/// Has the kernel track connections, by asking what is known of them.
const TRACKED: &str = "table ip tracked {
    chain prerouting { type filter hook prerouting priority 0; ct state invalid counter; }
    chain output { type filter hook output priority 0; ct state invalid counter; }
}";

/// Removes the base chains of type `filter` from the table of services.
const WITHOUT_FILTERS: &str = "
    flush chain ip nftlet filter-forward
    flush chain ip nftlet filter-input
    flush chain ip nftlet filter-output
    delete chain ip nftlet filter-forward
    delete chain ip nftlet filter-input
    delete chain ip nftlet filter-output
";

fn program(node: &Namespace, workload: &Workload) {
    node.run(|| {
        let metrics = Metrics::new().expect("metrics have different names");
        Agent::new(&metrics).handle(workload.lists());
    });
}

/// Puts policies in force in the namespace of the calling thread. The client is a pod of this node,
/// isolated in both directions, that may connect to everyone.
fn program_policies() {
    let cluster = Cluster::new(PODS, POLICIES);
    let mut engine = Engine::new(policy::Settings {
        node: NODE.into(),
        ..policy::Settings::default()
    });
    for mut delivery in cluster.lists() {
        if let Event::Apply(Object::Pod(pod)) = &mut delivery.event {
            // Not those of the services' endpoints, which no policy is to isolate.
            for address in &mut pod.addresses {
                if let IpAddr::V4(v4) = address {
                    let [_, _, c, d] = v4.octets();
                    *address = Ipv4Addr::new(172, 20, c, d).into();
                }
            }
        }
        engine.apply(&delivery.event);
    }
    let mut client = cluster.later_pod(0);
    client.node = Some(NODE.into());
    let address: Ipv4Addr = CLIENT.parse().expect("an address");
    client.addresses = [IpAddr::from(address)].into_iter().collect();
    let to_everyone = NetworkPolicy {
        name: ObjectName::new(client.name.namespace(), "to-everyone"),
        pods: LabelSelector::default(),
        ingress: None,
        egress: Some(vec![PolicyRule {
            peers: None,
            ports: None,
        }]),
    };
    engine.apply(&Event::Apply(Object::Pod(client)));
    engine.apply(&Event::Apply(Object::NetworkPolicy(to_everyone)));
    engine.update(BUDGET);
    let mut kernel = Nftables::open().unwrap_or_else(|error| panic!("{error}"));
    for step in diff(&Ruleset::default(), engine.ruleset()).into_steps() {
        kernel
            .apply(&step)
            .unwrap_or_else(|error| panic!("{error}"));
    }
}

/// Translates the address of the first service to its first endpoint.
fn one_rule(workload: &Workload) -> String {
    let frontend = frontend(workload, 0);
    let target = targets(workload, 0)
        .next()
        .expect("services have endpoints");
    let rule = format!(
        "ip daddr {} tcp dport {} dnat to {target}",
        frontend.ip(),
        frontend.port()
    );
    format!(
        "table ip one {{
            chain prerouting {{ type nat hook prerouting priority -100; {rule}; }}
            chain output {{ type nat hook output priority -100; {rule}; }}
            chain postrouting {{
                type nat hook postrouting priority 100;
                ip saddr {FABRIC} masquerade fully-random
            }}
        }}"
    )
}

fn frontend(workload: &Workload, service: usize) -> SocketAddrV4 {
    let object = &workload.services[service];
    SocketAddrV4::new(v4(object.cluster_ips[0]), object.ports[0].port)
}

fn targets(workload: &Workload, service: usize) -> impl Iterator<Item = SocketAddrV4> + '_ {
    let targets = workload.targets(service);
    targets.map(|(address, port)| SocketAddrV4::new(v4(address), port))
}

fn v4(address: IpAddr) -> Ipv4Addr {
    match address {
        IpAddr::V4(address) => address,
        IpAddr::V6(_) => panic!("the workload has IPv4 only"),
    }
}
