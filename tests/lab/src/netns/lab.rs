//! The usual network: clients, nodes, and pods behind the nodes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{Namespace, Protocol, Server, addr_line, host_prefix, route_line};

/// Ranges that clients reach through the first node: service addresses and external ones.
const SERVICE_RANGES: [&str; 6] = [
    "10.96.0.0/16",
    "fd00:10:96::/112",
    "203.0.113.0/24",
    "198.51.100.0/24",
    "2001:db8:1::/64",
    "2001:db8:2::/64",
];

/// How large a [`Lab`] is.
#[derive(Clone, Copy, Debug)]
pub struct LabOptions {
    /// Nodes, called `node-1` and on.
    pub nodes: u8,
    /// Pods on each node; they are counted through: node-2 goes on where node-1 ends.
    pub pods_per_node: u8,
    /// Clients outside of the cluster, called `client-1` and on.
    pub clients: u8,
}

impl Default for LabOptions {
    /// One node with three pods, one client.
    fn default() -> Self {
        Self {
            nodes: 1,
            pods_per_node: 3,
            clients: 1,
        }
    }
}

/// A namespace with an address of each family.
#[derive(Clone, Debug)]
pub struct Machine {
    /// `client-1`, `node-1`, `pod-1`.
    pub name: String,
    /// Where it lives.
    pub ns: Namespace,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

/// A pod is a machine behind a node.
pub type Pod = Machine;

impl Machine {
    /// Its addresses, IPv4 first.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// Its address of the family of another address.
    pub fn address_like(&self, other: IpAddr) -> IpAddr {
        if other.is_ipv4() {
            self.v4.into()
        } else {
            self.v6.into()
        }
    }

    /// Serves a port on both addresses under the name of the machine.
    #[track_caller]
    pub fn serve(&self, protocol: Protocol, port: u16) -> [Server; 2] {
        self.addresses().map(|address| {
            let at = SocketAddr::new(address, port);
            Server::start(&self.ns, protocol, at, &self.name)
        })
    }
}

/// A node: forwards for its pods, each on a link of its own, with a route per pod.
#[derive(Clone, Debug)]
pub struct Node {
    /// The node itself.
    pub machine: Machine,
    /// Its pods.
    pub pods: Vec<Pod>,
    number: u8,
}

impl Node {
    /// The namespace of the node.
    pub fn ns(&self) -> &Namespace {
        &self.machine.ns
    }

    /// The pod ranges of the node: `10.244.1.0/24` and `fd00:10:244:1::/64` for the first.
    pub fn pod_ranges(&self) -> [String; 2] {
        let n = self.number;
        [format!("10.244.{n}.0/24"), format!("fd00:10:244:{n}::/64")]
    }

    /// Adds a pod: `10.244.1.11` is the first of node-1, `10.244.1.12` the next.
    #[track_caller]
    fn add_pod(&mut self, name: &str) {
        let index = self.pods.len() + 1;
        let host = 10 + index;
        assert!(host < 255, "a node has room for 244 pods");
        let (n, link) = (self.number, format!("veth{index}"));
        let v4 = Ipv4Addr::new(10, 244, n, host as u8);
        // The decimal digits read as hexadecimal: fd00:10:244:1::11 goes with 10.244.1.11.
        let v6: Ipv6Addr = format!("fd00:10:244:{n}::{host}")
            .parse()
            .expect("digits make an address");
        let gateways = [
            IpAddr::V4(Ipv4Addr::new(10, 244, n, 1)),
            format!("fd00:10:244:{n}::1")
                .parse()
                .expect("digits make an address"),
        ];

        let pod = Machine {
            name: name.to_owned(),
            ns: Namespace::new(name),
            v4,
            v6,
        };
        let node = &self.machine.ns;
        node.veth(&link, &pod.ns, "eth0");
        let (mut at_node, mut at_pod) = (Vec::new(), Vec::new());
        for (address, gateway) in pod.addresses().into_iter().zip(gateways) {
            let one = host_prefix(address);
            at_node.push(addr_line(&link, &format!("{gateway}/{one}")));
            at_node.push(route_line(
                &format!("{address}/{one}"),
                &format!("dev {link}"),
            ));
            at_pod.push(addr_line("eth0", &format!("{address}/{one}")));
            at_pod.push(route_line(&format!("{gateway}/{one}"), "dev eth0"));
            at_pod.push(route_line("default", &format!("via {gateway} dev eth0")));
        }
        node.ip_batch(at_node);
        pod.ns.ip_batch(at_pod);
        self.pods.push(pod);
    }
}

/// Clients, nodes and pods, joined and routed, IPv4 and IPv6.
///
/// | who | IPv4 | IPv6 |
/// |---|---|---|
/// | node N | `192.168.10.N` | `fd00:192:168:10::N` |
/// | pod P of node N | `10.244.N.(10+P)` | `fd00:10:244:N::(10+P)` |
/// | client C | `192.168.10.(99+C)` | `fd00:192:168:10::(99+C)` |
///
/// The digits are the same in both families. Clients reach the service range `10.96.0.0/16`
/// (`fd00:10:96::/112`) and the external ranges `203.0.113.0/24`, `198.51.100.0/24`,
/// `2001:db8:1::/64` and `2001:db8:2::/64` through node-1, and pods through their nodes. The
/// default route of a node leads to client-1, which does not forward.
#[derive(Clone, Debug)]
pub struct Lab {
    /// Clients outside of the cluster.
    pub clients: Vec<Machine>,
    /// The nodes with their pods.
    pub nodes: Vec<Node>,
    /// The bridge that joins clients and nodes.
    _fabric: Namespace,
}

impl Lab {
    /// Builds the network.
    #[track_caller]
    pub fn new(options: LabOptions) -> Self {
        let fabric = Namespace::new("fabric");
        // Snooping would hold back neighbour solicitations from ports it has not learnt of yet.
        fabric.ip_batch([
            "link add br0 type bridge stp_state 0 mcast_snooping 0 forward_delay 0",
            "link set br0 up",
        ]);
        let attached = |name: String, host: u8| attach(&fabric, name, host);
        let clients: Vec<Machine> = (1..=options.clients)
            .map(|c| attached(format!("client-{c}"), 99 + c))
            .collect();
        let mut nodes: Vec<Node> = (1..=options.nodes)
            .map(|n| Node {
                machine: attached(format!("node-{n}"), n),
                pods: Vec::new(),
                number: n,
            })
            .collect();
        for node in &nodes {
            node.ns().sysctls(&[
                ("net.ipv4.ip_forward", "1"),
                ("net.ipv6.conf.all.forwarding", "1"),
            ]);
            let others = nodes.iter().filter(|n| n.number != node.number);
            let mut lines: Vec<String> = others.flat_map(pod_routes).collect();
            for address in clients.iter().take(1).flat_map(Machine::addresses) {
                lines.push(route_line("default", &format!("via {address}")));
            }
            node.ns().ip_batch(lines);
        }
        for client in &clients {
            let mut lines: Vec<String> = nodes.iter().flat_map(pod_routes).collect();
            for range in SERVICE_RANGES {
                for gateway in nodes.iter().take(1).flat_map(|n| n.machine.addresses()) {
                    if gateway.is_ipv6() == range.contains(':') {
                        lines.push(route_line(range, &format!("via {gateway}")));
                    }
                }
            }
            client.ns.ip_batch(lines);
        }
        let mut number = 0;
        for node in &mut nodes {
            for _ in 0..options.pods_per_node {
                number += 1;
                node.add_pod(&format!("pod-{number}"));
            }
        }
        Self {
            clients,
            nodes,
            _fabric: fabric,
        }
    }

    /// The first node.
    pub fn node(&self) -> &Node {
        &self.nodes[0]
    }

    /// The first client.
    pub fn client(&self) -> &Machine {
        &self.clients[0]
    }

    /// All pods of all nodes: `pods()[0]` is pod-1.
    pub fn pods(&self) -> Vec<&Pod> {
        self.nodes.iter().flat_map(|node| &node.pods).collect()
    }

    /// Adds one more pod to a node, counted on from the last, and returns it.
    #[track_caller]
    pub fn add_pod(&mut self, node: usize) -> Pod {
        let name = format!("pod-{}", self.pods().len() + 1);
        self.nodes[node].add_pod(&name);
        self.nodes[node].pods[self.nodes[node].pods.len() - 1].clone()
    }
}

/// Creates a machine on the fabric.
#[track_caller]
fn attach(fabric: &Namespace, name: String, host: u8) -> Machine {
    let machine = Machine {
        ns: Namespace::new(&name),
        v4: Ipv4Addr::new(192, 168, 10, host),
        v6: format!("fd00:192:168:10::{host}")
            .parse()
            .expect("digits make an address"),
        name,
    };
    machine.ns.veth("eth0", fabric, &machine.name);
    fabric.ip(&format!("link set {} master br0", machine.name));
    machine.ns.ip_batch([
        addr_line("eth0", &format!("{}/24", machine.v4)),
        addr_line("eth0", &format!("{}/64", machine.v6)),
    ]);
    machine
}

/// The routes by which others reach the pods of a node.
fn pod_routes(node: &Node) -> Vec<String> {
    let ranges = node.pod_ranges();
    let gateways = node.machine.addresses();
    let pairs = ranges.iter().zip(gateways);
    pairs
        .map(|(range, gateway)| route_line(range, &format!("via {gateway}")))
        .collect()
}
