//! The network: clients, the node, and those who answer for the live services.
//!
//! ```text
//!  outside 192.168.10.2 ── 192.168.10.1 ┐
//!                                       ├ node 192.168.30.1 ── 192.168.30.2 servers 10.200.0.0/16
//!  pod     10.201.0.2 ────── 10.201.0.1 ┘
//! ```
//!
//! The servers take all addresses of live endpoints for their own, in use or not, and one socket
//! answers on all of them. One client is outside of the pod network, so that its connections are
//! masqueraded, and one is inside. Each has a namespace of its own and leaves its address to the
//! routes: the kernel then chooses the port of a connection by its destination, and takes none
//! again before all were used.

use std::net::{Ipv4Addr, SocketAddr};

use crate::live::PORT;
use crate::netns::{Namespace, Protocol, Server as Answering};
use crate::workload::{NODE_IP, SERVICE_CIDR};

/// The addresses of live endpoints.
const LIVE: &str = "10.200.0.0/16";
/// The network of the client that is a pod.
const POD: &str = "10.201.0.0/24";

/// The namespaces with what runs in them all the time.
pub struct Lab {
    /// Where connections begin: outside of the pod network, and in a pod.
    pub clients: [Namespace; 2],
    /// What nftlet programs.
    pub node: Namespace,
    _answering: Answering,
}

impl Lab {
    /// Builds the network.
    pub fn new() -> Self {
        let [outside, pod, node, servers] =
            ["outside", "pod", "node", "servers"].map(Namespace::new);
        node.veth("outside", &outside, "eth0");
        node.veth("pod", &pod, "eth0");
        node.veth("servers", &servers, "eth0");
        node.ip_batch([
            &format!("addr add {NODE_IP}/24 dev outside"),
            "addr add 10.201.0.1/24 dev pod",
            "addr add 192.168.30.1/24 dev servers",
            &format!("route add {LIVE} via 192.168.30.2"),
        ]);
        outside.ip_batch([
            "addr add 192.168.10.2/24 dev eth0",
            &format!("route add {SERVICE_CIDR} via {NODE_IP}"),
        ]);
        pod.ip_batch([
            "addr add 10.201.0.2/24 dev eth0",
            &format!("route add {SERVICE_CIDR} via 10.201.0.1"),
        ]);
        servers.ip_batch([
            "addr add 192.168.30.2/24 dev eth0",
            &format!("route add local {LIVE} dev lo"),
            &format!("route add {POD} via 192.168.30.1"),
        ]);
        for client in [&outside, &pod] {
            // Or the kernel would ask again after 0.2 s, having seen how fast answers come: sooner
            // than a machine with other work may answer.
            client.sysctl("net.ipv4.tcp_no_metrics_save", "1");
        }
        node.sysctls(&[
            ("net.ipv4.ip_forward", "1"),
            // Connections that are over would otherwise fill the table.
            ("net.netfilter.nf_conntrack_tcp_timeout_time_wait", "10"),
        ]);
        let at = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
        let answering = Answering::start(&servers, Protocol::Tcp, at, "live");
        Self {
            clients: [outside, pod],
            node,
            _answering: answering,
        }
    }

    /// How often the clients' kernel repeated a request for a connection, because nothing came
    /// back for a second.
    pub fn repeated(&self) -> u64 {
        self.clients.iter().map(repeated).sum()
    }
}

fn repeated(client: &Namespace) -> u64 {
    let text = client
        .run(|| std::fs::read_to_string("/proc/thread-self/net/netstat"))
        .expect("the kernel counts");
    let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("TcpExt:")).collect();
    let [names, values] = lines[..] else {
        panic!("netstat has a line of names and one of values");
    };
    let mut pairs = names.split(' ').zip(values.split(' '));
    let found = pairs.find(|(name, _)| *name == "TCPSynRetrans");
    let value = found.and_then(|(_, value)| value.parse().ok());
    value.expect("the kernel counts repeated requests")
}
