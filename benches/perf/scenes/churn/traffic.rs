//! The network and its clients: connections to ClusterIPs of live services, one after the other.
//!
//! ```text
//!  client-1 ─┐
//!            ├ node-1 ── pod-2: servers 10.200.0.0/16
//!  pod-1 ────┘
//! ```
//!
//! The servers take all addresses of live endpoints for their own, in use or not, and one socket
//! answers on all of them. One client is outside of the pod network, so that its connections are
//! masqueraded, and one is inside. Each leaves its address to the routes: the kernel then chooses
//! the port of a connection by its destination, and takes none again before all were used.
//!
//! Two threads connect by the clock, one from outside and one from inside. A connection is answered
//! with one line and closed. It fails if it is refused, reset or not answered within three seconds,
//! or if the wrong endpoint answers. A service
//! without endpoints is to refuse. The kernel repeats a request for a connection that was lost
//! after one second; a connection that takes that long counts as slow.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::live::{self, Live};
use crate::samples::Samples;
use nftlet_lab::cluster::{Cluster, NODE_IP, Random, SERVICE_CIDRS, TARGET_PORT};
use nftlet_lab::netns::{Ask, Lab, LabOptions, Namespace, Protocol, Server};

/// The addresses of live endpoints.
const LIVE: &str = "10.200.0.0/16";

/// The namespaces with what runs in them all the time.
pub struct Network {
    /// Where connections begin: outside of the pod network, and in a pod.
    pub clients: [Namespace; 2],
    /// What nftlet programs.
    pub node: Namespace,
    _lab: Lab,
    _answering: Server,
}

impl Network {
    pub fn new() -> Self {
        let lab = Lab::new(LabOptions {
            pods_per_node: 2,
            ..LabOptions::default()
        });
        let [pod, servers] = [0, 1].map(|place: usize| lab.node().pods[place].clone());
        let (outside, node) = (lab.client().ns.clone(), lab.node().ns().clone());
        node.route_add(LIVE, &format!("via {}", servers.v4));
        outside.route_add(SERVICE_CIDRS[0], &format!("via {NODE_IP}"));
        servers.ns.ip(&format!("route add local {LIVE} dev lo"));
        for client in [&outside, &pod.ns] {
            // Or the kernel would ask again after 0.2 s, having seen how fast answers come: sooner
            // than a machine with other work may answer.
            client.sysctl("net.ipv4.tcp_no_metrics_save", "1");
        }
        // Connections that are over would otherwise fill the table.
        node.sysctl("net.netfilter.nf_conntrack_tcp_timeout_time_wait", "10");
        let at = SocketAddr::from((Ipv4Addr::UNSPECIFIED, TARGET_PORT));
        Self {
            _answering: Server::start(&servers.ns, Protocol::Tcp, at, "live"),
            clients: [outside, pod.ns],
            node,
            _lab: lab,
        }
    }

    /// How often the clients' kernel repeated a request for a connection, because nothing came
    /// back for a second.
    pub fn repeated(&self) -> u64 {
        self.clients.iter().map(Namespace::repeated_requests).sum()
    }
}

/// The port of every service.
const SERVICE_PORT: u16 = 80;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// When the kernel asks again.
const REPEATED: Duration = Duration::from_secs(1);
/// A client that is late by more goes on from now: it does not make up for connections in a rush.
const MOST_LATE: Duration = Duration::from_millis(100);
/// How many failures are described.
const DESCRIBED: usize = 20;

/// The outcomes of connections.
#[derive(Debug, Default)]
pub struct Tally {
    /// From the beginning to the end of each connection that was answered, in seconds.
    pub took: Samples,
    /// How many failed.
    pub failed: u64,
    /// How many were refused by a service without endpoints.
    pub refused: u64,
    /// How many were answered after a second or more.
    pub slow: u64,
    /// Descriptions of the first failures.
    pub faults: Vec<String>,
}

impl Tally {
    /// Returns the number of all connections, answered or not.
    pub fn count(&self) -> u64 {
        self.took.count() as u64 + self.failed + self.refused
    }
}

/// Clients that connect until they are stopped.
pub struct Traffic {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    live: Arc<Live>,
    began: Instant,
    stop: AtomicBool,
    tally: Mutex<Tally>,
}

impl Shared {
    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().expect("no client panicked with it")
    }

    fn ask(&self, from: &str, service: usize) {
        let asked = Instant::now();
        let ask = Ask::tcp(Cluster::cluster_ip(live::place(service)), SERVICE_PORT);
        let answer = ask.timeout(PATIENCE).send();
        let took = asked.elapsed();
        let fault = match answer.map(|answer| answer.local.ip()) {
            Ok(IpAddr::V4(address)) => self.live.fault(service, address, asked),
            Ok(IpAddr::V6(address)) => Some(format!("{address} answered, of another family")),
            Err(error)
                if error.kind() == ErrorKind::ConnectionRefused
                    && self.live.may_refuse(service, asked) =>
            {
                self.tally().refused += 1;
                return;
            }
            Err(error) => Some(error.to_string()),
        };
        let mut tally = self.tally();
        let Some(fault) = fault else {
            tally.took.push(took.as_secs_f64());
            tally.slow += u64::from(took >= REPEATED);
            return;
        };
        tally.failed += 1;
        if tally.faults.len() < DESCRIBED {
            let at = (asked - self.began).as_secs_f64();
            let to = Cluster::cluster_ip(live::place(service));
            let line = format!("{at:.3} s: from {from} to {to}, after {took:.1?}: {fault}");
            tally.faults.push(line);
        }
    }

    /// Connects by the clock until it is stopped.
    fn ask_on(&self, from: &str, pause: Duration, mut random: Random) {
        let mut due = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            thread::sleep(due.saturating_duration_since(now));
            if now.saturating_duration_since(due) > MOST_LATE {
                due = now;
            }
            due += pause;
            self.ask(from, random.below(self.live.count()));
        }
    }
}

impl Traffic {
    /// Starts clients that make so many connections a second together.
    pub fn start(network: &Network, live: Arc<Live>, rate: u32) -> Self {
        let shared = Arc::new(Shared {
            live,
            began: Instant::now(),
            stop: AtomicBool::new(false),
            tally: Mutex::default(),
        });
        let pause = Duration::from_secs(1) * network.clients.len() as u32 / rate;
        let client = |(number, namespace): (usize, &Namespace)| {
            let (shared, namespace) = (shared.clone(), namespace.clone());
            thread::spawn(move || {
                namespace.enter();
                let mut random = Random::default();
                // Each begins elsewhere in the sequence.
                (0..number * 1_000).for_each(|_| _ = random.below(1));
                shared.ask_on(namespace.name(), pause, random);
            })
        };
        let threads = network.clients.iter().enumerate().map(client).collect();
        Self { shared, threads }
    }

    /// Returns the outcomes since the last call.
    pub fn take(&self) -> Tally {
        std::mem::take(&mut *self.shared.tally())
    }

    /// Ends the clients when their connections are answered; returns the last outcomes.
    pub fn stop(mut self) -> Tally {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("a client does not panic");
        }
        self.take()
    }
}
