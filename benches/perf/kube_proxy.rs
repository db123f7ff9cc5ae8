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

use std::fmt::Display;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::process::Process;
use crate::server::{QUIET_AT_ONCE, Server};
use crate::subject::News;
use nftlet_lab::cluster::{Cluster, Endpoint, NODE_IP, POD_CIDRS, Put, SERVICE_CIDRS, TARGET_PORT};
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
const SKELETON: &str = include_str!("kube_proxy.nft");

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
        while !(synced(&process, "IPv4") && synced(&process, "IPv6")) {
            let waited = process.started().elapsed();
            assert!(waited < 2 * PATIENCE, "kube-proxy writes no rules");
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
    let mut chains = format!("table {TABLE} {{\n{skeleton}\n}}\n");
    // Elements lead to chains, which nft wants first.
    let mut elements = element("nodeport-ips", NODE_IP);
    for service in 0..cluster.endpoints.len() {
        add_service(cluster, service, &mut chains, &mut elements);
    }
    chains + &elements
}

/// Returns the commands for a service whose endpoints changed. The few that are on this node would
/// also change `hairpin-connections`; that is left out.
pub fn change(cluster: &Cluster, service: usize) -> String {
    let chain = chain_name("service", service);
    format!("flush chain {TABLE} {chain}\n") + &dnat_rule(cluster, service)
}

fn add_service(cluster: &Cluster, service: usize, chains: &mut String, elements: &mut String) {
    let [inside, outside] = ["service", "external"].map(|kind| chain_name(kind, service));
    *chains += &format!("add chain {TABLE} {inside}\n");
    *chains += &dnat_rule(cluster, service);
    let port = cluster.port(service);
    let address = Cluster::cluster_ip(service);
    *elements += &element("cluster-ips", address);
    let frontend = format_args!("{address} . tcp . {port} : goto {inside}");
    *elements += &element("service-ips", frontend);
    if let Some(number) = Cluster::node_port(service) {
        let mark = "meta mark set meta mark or 0x4000";
        *chains += &format!("add chain {TABLE} {outside}\n");
        *chains += &format!("add rule {TABLE} {outside} {mark} goto {inside}\n");
        let frontend = format_args!("tcp . {number} : goto {outside}");
        *elements += &element("service-nodeports", frontend);
    }
    if let Some(address) = Cluster::load_balancer(service) {
        let frontend = format_args!("{address} . tcp . {port} : goto {outside}");
        *elements += &element("service-ips", frontend);
    }
    for endpoint in cluster.endpoints[service].iter().filter(|it| it.node == 0) {
        let address = endpoint.address;
        let connection = format_args!("{address} . {address} . tcp . {TARGET_PORT}");
        *elements += &element("hairpin-connections", connection);
    }
}

fn dnat_rule(cluster: &Cluster, service: usize) -> String {
    let endpoints = cluster.endpoints[service].iter().enumerate();
    let target = |(index, endpoint): (usize, &Endpoint)| {
        format!("{index} : {} . {TARGET_PORT}", endpoint.address)
    };
    let targets: Vec<String> = endpoints.map(target).collect();
    format!(
        "add rule {TABLE} {} meta l4proto tcp dnat ip addr . port to \
         numgen random mod {} map {{ {} }}\n",
        chain_name("service", service),
        targets.len(),
        targets.join(", ")
    )
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

fn element(set: &str, element: impl Display) -> String {
    format!("add element {TABLE} {set} {{ {element} }}\n")
}
