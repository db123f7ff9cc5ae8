//! The baseline: the same services as kube-proxy 1.36 writes them to nftables, as text for
//! `nft -f -`.
//!
//! A chain for every service port, whose one rule holds an anonymous map of its endpoints; a
//! second chain where the service can be reached from outside; maps that lead to these chains.
//! Only IPv4 is written, without session affinity, and new chains are not flushed first as
//! kube-proxy does: where the shape could be costlier, the cheaper form was taken.
//!
//! Where the environment variable `KUBE_PROXY` names the program kube-proxy, that is measured, too: in
//! nftables mode, against the same API server, in a namespace of its own. It writes whenever something
//! changed, without the pause of a second that it makes by default.

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::process::Process;
use crate::server::{QUIET_AT_ONCE, Server};
use crate::subject::News;
use nftlet_lab::cluster::Put;
use nftlet_lab::cluster::{Cluster, NODE_IP, POD_CIDRS, SERVICE_CIDRS, TARGET_PORT};
use nftlet_lab::netns::Namespace;

const TABLE: &str = "ip kube-proxy";
/// How long all services may take. The time grows with the square of their number.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// A comparison of all rules, of kube-proxy and of nftlet.
pub const FULL: &str = "kubeproxy_sync_full_proxy_rules_duration_seconds";
/// A write of changes, of kube-proxy.
const PARTIAL: &str = "kubeproxy_sync_partial_proxy_rules_duration_seconds";
/// From one look at kube-proxy's metrics to the next.
const SYNCED: Duration = Duration::from_millis(500);

/// The part that does not depend on services.
const SKELETON: &str = "
set cluster-ips { type ipv4_addr; }
set nodeport-ips { type ipv4_addr; }
set hairpin-connections { type ipv4_addr . ipv4_addr . inet_proto . inet_service; }
map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
map no-endpoint-nodeports { type inet_proto . inet_service : verdict; }
map firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
map service-nodeports { type inet_proto . inet_service : verdict; }
chain reject-chain { reject; }
chain firewall-check { ip daddr . meta l4proto . th dport vmap @firewall-ips; }
chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
chain nodeport-endpoints-check {
    ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
}
chain cluster-ips-check { ip daddr @cluster-ips reject; ip daddr { SERVICE_CIDR } drop; }
chain services {
    ip daddr @cluster-ips ip saddr != POD_CIDR meta mark set meta mark or 0x4000
    ip daddr . meta l4proto . th dport vmap @service-ips
    ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
}
chain masquerading {
    meta mark & 0x4000 != 0 meta mark set meta mark xor 0x4000 masquerade fully-random
    ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random
}
chain filter-prerouting-pre-dnat {
    type filter hook prerouting priority -110;
    ct state new jump firewall-check
}
chain filter-output-pre-dnat {
    type filter hook output priority -110;
    ct state new jump firewall-check
}
chain filter-input {
    type filter hook input priority 0;
    ct state new jump nodeport-endpoints-check
    ct state new jump service-endpoints-check
}
chain filter-forward {
    type filter hook forward priority 0;
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
}
chain filter-output {
    type filter hook output priority 0;
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
}
chain nat-prerouting { type nat hook prerouting priority -100; jump services; }
chain nat-output { type nat hook output priority -100; jump services; }
chain nat-postrouting { type nat hook postrouting priority 100; jump masquerading; }
";

/// The program kube-proxy, running.
pub struct Program {
    pub process: Process,
    news: News,
}

impl Program {
    /// Starts the program that the environment names on another node of a server. Returns it with
    /// the seconds from its start to the kernel's news of its last first rules; `None` without it.
    pub fn start(server: &mut Server) -> Option<(Self, f64)> {
        let program = PathBuf::from(std::env::var_os("KUBE_PROXY")?);
        server.another_node();
        let news = News::listen_to(server.namespace(), &["kube-proxy"]);
        let process = server.start_kube_proxy(&program);
        let mut heard = process.started();
        while ["IPv4", "IPv6"]
            .iter()
            .any(|family| !synced(&process, family))
        {
            assert!(
                process.started().elapsed() < 2 * PATIENCE,
                "kube-proxy writes no rules"
            );
            heard = news.last(SYNCED).unwrap_or(heard);
        }
        heard = news.last(SYNCED).unwrap_or(heard);
        let took = (heard - process.started()).as_secs_f64();
        Some((Self { process, news }, took))
    }

    /// Returns the seconds of its writes of changes in IPv4, and their number.
    pub fn partial_syncs(&self) -> (f64, u64) {
        let metrics = self.process.metrics();
        metrics.histogram(PARTIAL, "{ip_family=\"IPv4\"}")
    }

    /// Makes a change; returns the seconds from the server's sending to the kernel's news.
    pub fn change(&self, server: &Server, object: Put) -> f64 {
        self.news.forget();
        let sent = server.put([object]);
        let first = self.news.first(PATIENCE).expect("a change is written");
        let heard = self.news.last(QUIET_AT_ONCE).unwrap_or(first);
        (heard - sent).as_secs_f64()
    }
}

/// Returns whether kube-proxy has written all rules of a family.
fn synced(process: &Process, family: &str) -> bool {
    let metrics = process.try_metrics().ok();
    let family = format!("{{ip_family=\"{family}\"}}");
    metrics.is_some_and(|metrics| metrics.histogram(FULL, &family).1 > 0)
}

/// Loads commands with `nft -f -` and returns the time from the start of the program to its end.
/// `None` if it takes longer than [`PATIENCE`]: the kernel gives a transaction up when the program
/// that sent it is killed.
pub fn load(namespace: &Namespace, commands: &str) -> Option<Duration> {
    /// How `timeout` ends when it killed.
    const KILLED: i32 = 137;
    namespace.run(|| {
        let started = Instant::now();
        let mut child = Command::new("timeout")
            .args(["--signal=KILL", &PATIENCE.as_secs().to_string()])
            .args(["nft", "-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("nft can be started");
        let mut input = child.stdin.take().expect("standard input is piped");
        let written = input.write_all(commands.as_bytes());
        drop(input);
        let status = child.wait().expect("nft ends");
        let killed = status.code() == Some(KILLED) || status.signal() == Some(libc::SIGKILL);
        if killed && started.elapsed() >= PATIENCE {
            return None;
        }
        assert!(status.success(), "nft fails: {status}");
        written.expect("nft reads its input");
        Some(started.elapsed())
    })
}

/// Returns the complete table.
pub fn table(cluster: &Cluster) -> String {
    let skeleton = SKELETON
        .replace("SERVICE_CIDR", SERVICE_CIDRS[0])
        .replace("POD_CIDR", POD_CIDRS[0]);
    let mut text = format!("table {TABLE} {{\n{skeleton}\n}}\n");
    element(&mut text, "nodeport-ips", &NODE_IP.to_string());
    // Elements lead to chains, which nft wants first.
    let mut elements = String::new();
    for service in 0..cluster.endpoints.len() {
        add_service(cluster, service, &mut text, &mut elements);
    }
    text + &elements
}

/// Returns the commands for a service whose endpoints changed. The few that are on this node would
/// also change `hairpin-connections`; that is left out.
pub fn change(cluster: &Cluster, service: usize) -> String {
    let chain = chain_name("service", service);
    let mut text = format!("flush chain {TABLE} {chain}\n");
    dnat_rule(cluster, service, &mut text);
    text
}

fn add_service(cluster: &Cluster, service: usize, chains: &mut String, elements: &mut String) {
    let [inside, outside] = ["service", "external"].map(|kind| chain_name(kind, service));
    command(chains, format_args!("add chain {TABLE} {inside}"));
    dnat_rule(cluster, service, chains);
    let port = cluster.port(service);
    let (address, node_port) = (Cluster::cluster_ip(service), Cluster::node_port(service));
    element(elements, "cluster-ips", &address.to_string());
    element(
        elements,
        "service-ips",
        &format!("{address} . tcp . {port} : goto {inside}"),
    );
    if let Some(number) = node_port {
        command(chains, format_args!("add chain {TABLE} {outside}"));
        command(
            chains,
            format_args!(
                "add rule {TABLE} {outside} meta mark set meta mark or 0x4000 goto {inside}"
            ),
        );
        element(
            elements,
            "service-nodeports",
            &format!("tcp . {number} : goto {outside}"),
        );
    }
    if let Some(address) = Cluster::load_balancer(service) {
        element(
            elements,
            "service-ips",
            &format!("{address} . tcp . {port} : goto {outside}"),
        );
    }
    for endpoint in cluster.endpoints[service].iter().filter(|it| it.node == 0) {
        let address = endpoint.address;
        let key = format!("{address} . {address} . tcp . {TARGET_PORT}");
        element(elements, "hairpin-connections", &key);
    }
}

fn dnat_rule(cluster: &Cluster, service: usize, text: &mut String) {
    let endpoints = &cluster.endpoints[service];
    let target = |(index, endpoint): (usize, &nftlet_lab::cluster::Endpoint)| {
        format!("{index} : {} . {TARGET_PORT}", endpoint.address)
    };
    let targets: Vec<String> = endpoints.iter().enumerate().map(target).collect();
    command(
        text,
        format_args!(
            "add rule {TABLE} {} meta l4proto tcp dnat ip addr . port to \
             numgen random mod {} map {{ {} }}",
            chain_name("service", service),
            targets.len(),
            targets.join(", ")
        ),
    );
}

/// Returns a name of kube-proxy's form and length: kind, eight characters of a hash, and what it
/// is for.
fn chain_name(kind: &str, service: usize) -> String {
    let (namespace, name) = Cluster::name(service);
    // FNV-1a; kube-proxy takes other bits, which makes no difference to the kernel.
    let bytes = namespace.bytes().chain(name.bytes());
    let hash = bytes.fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    format!("{kind}-{hash:08X}-{namespace}/{name}/tcp/http")
}

fn element(text: &mut String, set: &str, element: &str) {
    command(
        text,
        format_args!("add element {TABLE} {set} {{ {element} }}"),
    );
}

fn command(text: &mut String, command: std::fmt::Arguments) {
    writeln!(text, "{command}").expect("writing to a String cannot fail");
}
