//! Lanes: the same path for packets, with other rules on its node.
//!
//! ```text
//!   client ── node ─────── server
//!   (a pod)   (the rules)  (answers for all pods 10.128.0.0/10)
//! ```
//!
//! One listening socket stands for the endpoints of all services: the server's routing table says
//! that their whole range is local. Where the rules translate nothing, the client connects to
//! these addresses itself.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::path::Path;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use serde_json::json;

use super::traffic::{self, PATIENCE};
use crate::kube_proxy;
use crate::scenes::policies::policies_in_force;
use crate::server::Server;
use nftlet_lab::cluster::{Cluster, NODE_IP, Put, Random, TARGET_PORT, grouped};
use nftlet_lab::fake_api::CLUSTER_POLICIES;
use nftlet_lab::netns::{Lab, LabOptions, Namespace};
use nftlet_lab::pods::{self, Pod, Pods};

/// Where the workload's endpoints are.
const POD_RANGE: &str = "10.128.0.0/10";
/// The least, the usual and the largest size of a socket's buffers.
const BUFFERS: &str = "4096 4194304 4194304";
/// New connections that show, before anything is measured, that a lane leads to the right place.
const PROBES: usize = 50;

/// The policies, and the pods that they are about, which are not those of the services' endpoints.
const POLICIES: usize = 1_000;
const PODS: usize = 10_000;
const PODS_AT: Ipv4Addr = Ipv4Addr::new(172, 20, 0, 0);

/// What a packet meets on the node of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// Nothing at all, and connections are not tracked.
    None,
    /// Nothing once more, and the endpoints of all services are connected to, not those of the
    /// smallest cluster: what two lanes with the same rules differ by.
    NoneAgain,
    /// Nothing, but connections are tracked: the least for any translation.
    Tracked,
    /// One rule that translates one address, and masquerades what the node sends there: the
    /// least that the kernel does for a service.
    OneRule,
    /// kube-proxy's shape of so many services.
    KubeProxy(usize),
    /// nftlet's rules for so many services.
    Nftlet(usize),
    /// Those of an older nftlet.
    Before(usize),
    /// The same without the base chains of type `filter`, which judge new connections to unassigned
    /// service addresses: the difference is what established connections pay for these hooks.
    WithoutFilters(usize),
    /// The same where one in fifty has session affinity: every packet of the node passes the
    /// chains that learn.
    Affinity(usize),
    /// The same with a thousand policies, of which some isolate the client: every packet passes
    /// the chains that judge it.
    Policies(usize),
    /// The same with so many cluster policies of ten rules, of which only the very last one matches
    /// what the client sends.
    ClusterPolicies(usize, usize),
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
    _lab: Lab,
}

impl Rules {
    /// Returns the name of the lane.
    pub fn name(self) -> String {
        let services = |size: usize| grouped(size as f64);
        match self {
            Self::None => "no rules".to_owned(),
            Self::NoneAgain => "no rules (again)".to_owned(),
            Self::Tracked => "tracked, no rules".to_owned(),
            Self::OneRule => "one rule".to_owned(),
            Self::KubeProxy(size) => format!("kube-proxy's, {}", services(size)),
            Self::Nftlet(size) => format!("nftlet, {}", services(size)),
            Self::Before(size) => format!("before, {}", services(size)),
            Self::WithoutFilters(size) => format!("without filters, {}", services(size)),
            Self::Affinity(size) => format!("with affinity, {}", services(size)),
            Self::Policies(size) => format!("with policies, {}", services(size)),
            Self::ClusterPolicies(size, policies) => {
                format!("with {policies} cluster policies, {}", services(size))
            }
        }
    }

    /// Whether clients connect to services; otherwise to endpoints.
    fn translates(self) -> bool {
        !matches!(self, Self::None | Self::NoneAgain | Self::Tracked)
    }

    /// Puts the rules for a cluster in force on a node. False if that takes too long.
    fn load(self, lab: &Lab, cluster: &Cluster, nftlet: &Path) -> bool {
        let node = lab.node().ns();
        let client = lab.node().pods[0].v4;
        match self {
            Self::None | Self::NoneAgain => {}
            Self::OneRule => node.nft_load(&one_rule(cluster)),
            Self::KubeProxy(_) => {
                return kube_proxy::load(node, &kube_proxy::table(cluster)).is_some();
            }
            Self::Tracked => node.nft_load(TRACKED),
            Self::Nftlet(_) | Self::Before(_) => program(node, cluster, None, nftlet),
            Self::WithoutFilters(_) => {
                program(node, cluster, None, nftlet);
                node.nft_load(WITHOUT_FILTERS);
            }
            Self::Affinity(_) => {
                let mut cluster = cluster.clone();
                cluster.affinity = true;
                program(node, &cluster, None, nftlet);
            }
            Self::Policies(_) => program(node, cluster, Some((client, 0)), nftlet),
            Self::ClusterPolicies(_, policies) => {
                program(node, cluster, Some((client, policies)), nftlet);
            }
        }
        true
    }
}

impl Lane {
    /// Builds a lane and checks that it leads where it should. `None` if its rules take too long to
    /// load.
    pub fn new(rules: Rules, cluster: &Cluster, nftlet: &Path) -> Option<Self> {
        let lab = network();
        let [client, server] = [0, 1].map(|place: usize| lab.node().pods[place].ns.clone());
        let node = lab.node().ns().clone();
        if !rules.load(&lab, cluster, nftlet) {
            return None;
        }
        let listener = server.run(|| {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, TARGET_PORT)).expect("the port is free")
        });
        set_socket_timeout(&listener, Timeout::Recv, Some(PATIENCE)).expect("sockets can wait");
        let services = match rules {
            Rules::OneRule => 0..1,
            _ => 0..cluster.endpoints.len(),
        };
        let destinations = if rules.translates() {
            services.map(|service| frontend(cluster, service)).collect()
        } else {
            services
                .flat_map(|service| targets(cluster, service))
                .collect()
        };
        let lane = Self {
            rules,
            client,
            node,
            listener,
            destinations,
            _lab: lab,
        };
        for from in [&lane.client, &lane.node] {
            lane.probe(from, cluster);
        }
        Some(lane)
    }

    /// Connects to some of the destinations, and looks at who answers.
    fn probe(&self, from: &Namespace, cluster: &Cluster) {
        let mut random = Random::default();
        let endpoints = cluster.endpoints.first().map_or(1, Vec::len);
        for _ in 0..PROBES {
            let place = random.below(self.destinations.len());
            let to = self.destinations[place];
            let connection = from.run(|| traffic::connect(&self.listener, to));
            let answers = connection.server.local_addr().expect("it is connected");
            let expected: HashSet<SocketAddrV4> = if self.rules.translates() {
                targets(cluster, place).collect()
            } else {
                targets(cluster, place / endpoints)
                    .filter(|target| *target == to)
                    .collect()
            };
            let right = expected.iter().any(|target| answers == (*target).into());
            assert!(
                right,
                "{}: {to} leads to {answers}, which is none of {expected:?}",
                self.rules.name()
            );
        }
    }
}

fn network() -> Lab {
    let lab = Lab::new(LabOptions {
        pods_per_node: 2,
        ..LabOptions::default()
    });
    let [client, server] = [0, 1].map(|place: usize| lab.node().pods[place].clone());
    let node = lab.node().ns();
    for namespace in [&client.ns, node, &server.ns] {
        namespace.sysctls(&[
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
    // Not from an address of the pod network: what the node itself sends to a service is
    // masqueraded, as on a real one.
    let to_server = format!("via {} src {NODE_IP}", server.v4);
    node.route_add(POD_RANGE, &to_server);
    node.ip(&format!("route replace default {to_server}"));
    // Connections are reset as soon as they are made; their remains must not pile up.
    node.sysctl("net.netfilter.nf_conntrack_tcp_timeout_close", "1");
    server.ns.ip(&format!("route add local {POD_RANGE} dev lo"));
    lab
}

/// Makes the kernel track connections, with a match of their state.
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

/// Has nftlet write the rules of a node, and ends it. With the client's address there are policies:
/// it is a pod of this node, isolated in both directions, that may connect to everything, and so
/// many cluster policies select it.
fn program(node: &Namespace, cluster: &Cluster, client: Option<(Ipv4Addr, usize)>, nftlet: &Path) {
    let server = Server::new(node.clone(), nftlet);
    server.put(cluster.objects());
    if let Some((address, cluster_policies)) = client {
        let mut pods = Pods::new(PODS, POLICIES);
        pods.base = PODS_AT;
        let client = Pod {
            local: true,
            address,
            ..pods.later(0)
        };
        let (namespace, _) = pods.name(&client);
        let spec = json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]});
        let allow = pods::policy(&namespace, "to-everything", spec);
        server.put(pods.objects().chain([pods.object(&client), allow]));
        server.api.add_api(CLUSTER_POLICIES);
        server.put(matching_last(cluster_policies));
    }
    let (process, _) = server.start();
    if let Some((_, cluster_policies)) = client {
        policies_in_force(&process, &server);
        let judged = node.nft(&["list", "chains"]).contains("admin-egress");
        assert_eq!(judged, cluster_policies > 0, "cluster policies");
    }
    process.stop();
}

/// Returns cluster policies for all pods whose last rule alone matches endpoints.
fn matching_last(policies: usize) -> Vec<Put> {
    let mut policies: Vec<Put> = (0..policies).map(pods::cluster_policy).collect();
    for (_, policy) in &mut policies {
        policy["spec"]["subject"] = json!({"namespaces": {}});
    }
    let last = policies.last_mut();
    let rule = last.and_then(|(_, policy)| policy["spec"]["egress"].as_array_mut()?.last_mut());
    if let Some(rule) = rule {
        *rule = json!({"action": "Accept", "to": [{"networks": ["0.0.0.0/0"]}]});
    }
    policies
}

/// Translates the address of the first service to its first endpoint.
fn one_rule(cluster: &Cluster) -> String {
    let frontend = frontend(cluster, 0);
    let target = targets(cluster, 0).next().expect("services have endpoints");
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
                ip saddr {NODE_IP} masquerade fully-random
            }}
        }}"
    )
}

fn frontend(cluster: &Cluster, service: usize) -> SocketAddrV4 {
    SocketAddrV4::new(Cluster::cluster_ip(service), cluster.port(service))
}

fn targets(cluster: &Cluster, service: usize) -> impl Iterator<Item = SocketAddrV4> + '_ {
    let endpoints = cluster.endpoints[service].iter();
    endpoints.map(|endpoint| SocketAddrV4::new(endpoint.address, TARGET_PORT))
}
