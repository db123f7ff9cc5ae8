//! What it takes to find and delete stale UDP flows in a large table.
//!
//! ```text
//! cargo bench --bench conntrack -- [--flows 250000] [--json FILE]
//! ```
//!
//! Flows of 1,000 services are made through ctnetlink in a network namespace of its own; the
//! limit on their number (`nf_conntrack_max`) is the host's and is not changed.

use nftlet_lab::netns;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nftlet::compile::{Frontend, Pool, Role, Route, Scope, ServicePlan, Target};
use nftlet::metrics::Metrics;
use nftlet::model::{Claim, Family, Protocol};
use nftlet::netlink::{Conntrack, FlowFilter};
use nftlet::reconcile::Log;
use nftlet::reconcile::conntrack::{Cleaner, KernelFlows, Pending, Work};
use nftlet::ruleset;

const SERVICES: u32 = 1_000;
const ENDPOINTS: u32 = 10;
const RUNS: usize = 9;

fn vip(service: u32) -> SocketAddrV4 {
    let [_, _, high, low] = service.to_be_bytes();
    // A port of its own, so that each service takes a dump of its own.
    SocketAddrV4::new(Ipv4Addr::new(10, 96, high, low), 10_000 + service as u16)
}

fn endpoint(service: u32, index: u32) -> SocketAddrV4 {
    let [_, _, high, low] = service.to_be_bytes();
    SocketAddrV4::new(Ipv4Addr::new(10, 128 + index as u8, high, low), 53)
}

/// The plan of a service with these of its endpoints.
fn plan(service: u32, endpoints: std::ops::Range<u32>) -> ServicePlan {
    let target = |index| -> Target { (endpoint(service, index).ip().to_owned().into(), 53) };
    let at = vip(service);
    ServicePlan {
        frontends: [Frontend {
            at: Claim::Address((*at.ip()).into(), Protocol::Udp, at.port()),
            family: Family::V4,
            route: Route::Balance(Role::External, 0),
            firewalled: false,
        }]
        .into(),
        pools: [Pool {
            label: "bench/dns".into(),
            protocol: Protocol::Udp,
            family: Family::V4,
            scope: Scope::Cluster,
            targets: endpoints.map(target).collect(),
            unchosen: [].into(),
        }]
        .into(),
        cluster_ips: [].into(),
        hairpin: [].into(),
        affinity: None,
        sources: [None, None],
    }
}

/// Writes flows to the kernel, many to a datagram.
struct Maker {
    socket: mnl::Socket,
    bytes: Vec<u8>,
}

fn attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend_from_slice(&(4 + value.len() as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

fn nested(bytes: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let mut value = Vec::new();
    fill(&mut value);
    attribute(bytes, kind | 0x8000, &value);
}

fn tuple(bytes: &mut Vec<u8>, kind: u16, from: SocketAddrV4, to: SocketAddrV4) {
    nested(bytes, kind, |tuple| {
        nested(tuple, 1, |addresses| {
            attribute(addresses, 1, &from.ip().octets());
            attribute(addresses, 2, &to.ip().octets());
        });
        nested(tuple, 2, |protocol| {
            attribute(protocol, 1, &[libc::IPPROTO_UDP as u8]);
            attribute(protocol, 2, &from.port().to_be_bytes());
            attribute(protocol, 3, &to.port().to_be_bytes());
        });
    });
}

impl Maker {
    fn new() -> Self {
        let socket = mnl::Socket::new(mnl::Bus::Netfilter).expect("a netlink socket");
        Self {
            socket,
            bytes: Vec::new(),
        }
    }

    fn make(&mut self, client: SocketAddrV4, to: SocketAddrV4, replier: SocketAddrV4) {
        let start = self.bytes.len();
        let kind = (libc::NFNL_SUBSYS_CTNETLINK as u16) << 8;
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_CREATE) as u16;
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 8]);
        self.bytes
            .extend_from_slice(&[libc::AF_INET as u8, 0, 0, 0]);
        tuple(&mut self.bytes, 1, client, to);
        tuple(&mut self.bytes, 2, replier, client);
        attribute(&mut self.bytes, 7, &3_600_u32.to_be_bytes());
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
        if self.bytes.len() > 32_000 {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if !self.bytes.is_empty() {
            self.socket.send(&self.bytes).expect("flows are sent");
            self.bytes.clear();
        }
    }
}

/// A client whose flow is the `number`th of all.
fn client(number: u32) -> SocketAddrV4 {
    let [_, a, b, c] = (number / 10_000).to_be_bytes();
    SocketAddrV4::new(
        Ipv4Addr::new(172, 16 + a, b, c),
        20_000 + (number % 10_000) as u16,
    )
}

struct Bench {
    metrics: Metrics,
    maker: Maker,
    /// The number of the next client that has not been seen before.
    next: u32,
}

impl Bench {
    /// Makes flows of a service to an endpoint that is to go: the last one.
    fn make_stale(&mut self, service: u32, count: u32) {
        for _ in 0..count {
            let replier = endpoint(service, ENDPOINTS - 1);
            self.maker.make(client(self.next), vip(service), replier);
            self.next += 1;
        }
    }

    fn deleted(&self) -> u64 {
        let page = self.metrics.encode();
        let name = "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv4\"} ";
        let mut lines = page.lines();
        lines
            .find_map(|line| line.strip_prefix(name)?.parse().ok())
            .expect("the metric is there")
    }

    /// Measures the cleaning after the last endpoint of so many services went away.
    fn clean(&mut self, services: u32, stale: u32) {
        let name = format!("clean {services} changed frontends, {stale} stale flows each");
        let mut deleted = 0;
        let took = (0..RUNS).map(|_| {
            for service in 0..services {
                self.make_stale(service, stale);
            }
            self.maker.flush();
            let mut work = Work::default();
            for service in 0..services {
                let (before, after) =
                    (plan(service, 0..ENDPOINTS), plan(service, 0..ENDPOINTS - 1));
                work.change(Some(&before), Some(&after));
            }
            let (_changes, received) = std::sync::mpsc::channel();
            let pending = Pending::new(received);
            let mut cleaner = Cleaner::new(KernelFlows::open, pending, &self.metrics, &Log);
            let before = self.deleted();
            let started = Instant::now();
            assert!(cleaner.clean(work), "flows can be deleted");
            let took = started.elapsed();
            deleted = self.deleted() - before;
            took
        });
        let took = took.collect();
        row(&name, took, &format!("{deleted} deleted"));
    }
}

fn median(mut took: Vec<Duration>) -> Duration {
    took.sort();
    took[took.len() / 2]
}

/// The medians in seconds, by what was measured.
static MEDIANS: Mutex<BTreeMap<String, f64>> = Mutex::new(BTreeMap::new());

fn row(name: &str, took: Vec<Duration>, count: &str) -> Duration {
    let took = median(took);
    let mut medians = MEDIANS.lock().expect("nobody panics with it");
    medians.insert(name.to_owned(), took.as_secs_f64());
    drop(medians);
    println!(
        "{name:<52} {:>10.3} ms  {count:>16}",
        took.as_secs_f64() * 1e3
    );
    took
}

/// Measures a dump of what a filter asks for.
fn list(name: &str, filter: FlowFilter, kernel_filters: bool) -> Duration {
    let mut found = 0;
    let took = (0..RUNS).map(|_| {
        let mut conntrack = Conntrack::open().expect("a netlink socket");
        if !kernel_filters {
            conntrack = conntrack.without_kernel_filters();
        }
        found = 0;
        let started = Instant::now();
        conntrack
            .flows(&filter, |_| found += 1)
            .expect("flows are listed");
        started.elapsed()
    });
    let took = took.collect();
    row(name, took, &format!("{found} flows"))
}

fn measure(flows: u32) {
    let mut bench = Bench {
        metrics: Metrics::new().expect("metrics"),
        maker: Maker::new(),
        next: 0,
    };
    for number in 0..flows {
        // No flow leads to the last endpoint, whose flows are made when they are needed.
        let service = number % SERVICES;
        let replier = endpoint(service, number / SERVICES % (ENDPOINTS - 1));
        bench.maker.make(client(number), vip(service), replier);
    }
    bench.maker.flush();
    bench.next = flows;
    let count = read("/proc/sys/net/netfilter/nf_conntrack_count");
    println!(
        "{count} of {flows} flows fit (nf_conntrack_max {}, {} buckets), medians of {RUNS} runs\n",
        read("/proc/sys/net/netfilter/nf_conntrack_max"),
        read("/proc/sys/net/netfilter/nf_conntrack_buckets"),
    );
    let one = FlowFilter::to(SocketAddr::V4(vip(0)));
    let all = FlowFilter::all(ruleset::Family::Ip);
    let picked = list("list one frontend, picked by the kernel", one, true);
    let whole = list("list one frontend, picked by nftlet", one, false);
    let port = FlowFilter::to_port(ruleset::Family::Ip, vip(0).port());
    list("list one port, picked by the kernel", port, true);
    let every = list("list all UDP flows", all, true);
    bench.clean(1, 0);
    bench.clean(1, 10);
    for services in [3, 4, 100] {
        bench.clean(services, 0);
    }
    bench.clean(SERVICES, 0);
    bench.clean(SERVICES, 10);
    println!(
        "\npicked by the kernel : picked by nftlet = 1 : {:.1}; one dump of all costs as much as \
         {:.1} of single frontends",
        whole.as_secs_f64() / picked.as_secs_f64(),
        every.as_secs_f64() / picked.as_secs_f64(),
    );
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).map_or_else(|e| e.to_string(), |text| text.trim().to_owned())
}

fn main() {
    if !netns::require_net_admin() {
        return;
    }
    let arguments: Vec<String> = std::env::args().collect();
    let value = |flag: &str| {
        let at = arguments.iter().position(|argument| argument == flag)?;
        arguments.get(at + 1)
    };
    let flows = value("--flows").and_then(|flows| flows.parse().ok());
    netns::Namespace::new("bench").run(|| measure(flows.unwrap_or(250_000)));
    if let Some(file) = value("--json") {
        let medians = MEDIANS.lock().expect("nobody panics with it");
        let text = serde_json::to_string_pretty(&*medians).expect("numbers are JSON");
        std::fs::write(file, text + "\n")
            .unwrap_or_else(|error| panic!("cannot write {file}: {error}"));
    }
}
