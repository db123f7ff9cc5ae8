//! Stale UDP flows: how long nftlet takes to find and delete them in a large table.
//!
//! The flows of 1,000 services, each with a port of its own, are made through ctnetlink on the node
//! on which nftlet runs; the limit on their number (`nf_conntrack_max`) is the host's and is not
//! changed. Then services lose their last endpoint, to which flows lead or do not. The time is
//! nftlet's metric of the cleaning, on a thread of its own; a change of rules does not wait for it.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use crate::Context;
use crate::report::Value::{Number, Seconds};
use crate::report::{Report, Table};
use crate::samples::Samples;
use crate::server::{Server, Watched};
use nftlet_lab::cluster::{Cluster, Size, TARGET_PORT, above, grouped};
use nftlet_lab::netns::Namespace;

const SIZE: Size = Size {
    services: 1_000,
    endpoints: 10,
};
const CLEANED: &str = "kubeproxy_conntrack_reconciler_sync_duration_seconds";
const DELETED: &str = "kubeproxy_conntrack_reconciler_deleted_entries_total";
const FAMILY: &str = "{ip_family=\"IPv4\"}";
/// Services that lose an endpoint, and stale flows of each. Up to three frontends are dumped one by
/// one, more of them together.
const CASES: [(usize, usize); 7] = [
    (1, 0),
    (1, 10),
    (3, 0),
    (4, 0),
    (100, 0),
    (1_000, 0),
    (1_000, 10),
];
/// How often to read the metrics, how many equal readings in a row mean that all is cleaned, and how
/// many readings to wait for the flows to be deleted.
const ASK: Duration = Duration::from_millis(50);
const CALM: u32 = 10;
const MOST: u32 = 1_200;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Flows in the table. The requests for metrics are tracked, too, and need some thousand places
    /// below `nf_conntrack_max`, by default 262,144.
    #[arg(long, default_value = "240000")]
    flows: usize,
    /// How often each case is measured.
    #[arg(long, default_value = "9", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

/// A node with nftlet and flows.
struct Node<'a> {
    watched: Watched<'a>,
    cluster: Cluster,
    maker: Maker,
    /// The number of the next client.
    next: usize,
}

impl Arguments {
    pub fn run(&self, context: &Context) -> Report {
        let parameters: [(_, &dyn ToString); 2] =
            [("flows", &self.flows), ("rounds", &self.rounds)];
        let mut report = Report::new("conntrack", parameters);
        let mut cluster = Cluster::plain(SIZE);
        cluster.udp = true;
        let server = Server::new(Namespace::new("node"), &context.nftlet);
        server.put(cluster.objects());
        context.progress("start");
        let (process, _) = server.start();
        // The socket of the maker is one of this namespace.
        server.namespace().enter();
        let mut node = Node {
            watched: Watched::new(process, &server),
            cluster,
            maker: Maker::new(),
            next: 0,
        };
        context.progress("making flows");
        for number in 0..self.flows {
            // No flow leads to the last endpoint, whose flows are made for each case.
            let endpoint = number / SIZE.services % (SIZE.endpoints - 1);
            node.make(number % SIZE.services, endpoint);
        }
        node.maker.flush();
        let count = read(&server, "nf_conntrack_count");
        let most = read(&server, "nf_conntrack_max");
        report.notes.push(format!(
            "{count} flows in the table, nf_conntrack_max {most}"
        ));
        let mut table = Table::new("Stale UDP flows, found and deleted", "stale flows of each");
        for (services, stale) in CASES {
            let what = format!("{} changed frontends", grouped(services as f64));
            context.progress(format_args!("{what}, {stale} stale flows of each"));
            let (mut times, mut deleted) = (Samples::default(), 0.0);
            for _ in 0..self.rounds {
                let (took, flows) = node.clean(services, stale);
                times.push(took);
                deleted = flows;
            }
            let row = table.row(what, stale, "time", Seconds(times.median()));
            row.and("deleted", Number(deleted));
        }
        report.tables.push(table);
        node.watched.process.stop();
        report
    }
}

impl Node<'_> {
    /// Makes a flow of a service.
    fn make(&mut self, service: usize, endpoint: usize) {
        let client = above(Ipv4Addr::new(172, 16, 0, 0), self.next / 10_000);
        let client = SocketAddrV4::new(client, 20_000 + (self.next % 10_000) as u16);
        let frontend = SocketAddrV4::new(Cluster::cluster_ip(service), self.cluster.port(service));
        let address = self.cluster.endpoints[service][endpoint].address;
        let replier = SocketAddrV4::new(address, TARGET_PORT);
        self.maker.make(client, frontend, replier);
        self.next += 1;
    }

    /// Removes the last endpoint of services after it got stale flows, and adds another one.
    /// Returns the seconds of the cleaning and the flows that were deleted.
    fn clean(&mut self, services: usize, stale: usize) -> (f64, f64) {
        for service in 0..services {
            (0..stale).for_each(|_| self.make(service, SIZE.endpoints - 1));
        }
        self.maker.flush();
        let (before, deleted) = self.cleaned();
        let changes = (0..services)
            .map(|service| self.cluster.shrink(service, 1))
            .collect();
        self.watched.put_many(changes);
        let expected = (services * stale) as f64;
        let (after, deleted_after) = self.until_cleaned(before.1, deleted + expected);
        let changes = (0..services)
            .map(|service| self.cluster.grow(service, 1))
            .collect();
        self.watched.put_many(changes);
        self.until_cleaned(after.1, deleted_after);
        let found = deleted_after - deleted;
        assert_eq!(
            found, expected,
            "all stale flows are deleted, and no others"
        );
        (after.0 - before.0, found)
    }

    /// Returns the sum and the count of the cleanings so far, and the flows deleted.
    fn cleaned(&self) -> ((f64, u64), f64) {
        let metrics = self.watched.process.metrics();
        (
            metrics.histogram(CLEANED, FAMILY),
            metrics.get(&format!("{DELETED}{FAMILY}")),
        )
    }

    /// Waits until there was another cleaning and so many flows are deleted in all, and then nothing
    /// is cleaned for a while. A change of services that no flow leads to may need no cleaning.
    fn until_cleaned(&self, count: u64, deleted: f64) -> ((f64, u64), f64) {
        let (mut last, mut calm) = (self.cleaned(), 0);
        for _ in 0..MOST {
            let enough = if last.1 < deleted {
                MOST
            } else if last.0.1 == count {
                4 * CALM
            } else {
                CALM
            };
            if calm >= enough {
                break;
            }
            std::thread::sleep(ASK);
            let now = self.cleaned();
            calm = if now == last { calm + 1 } else { 0 };
            last = now;
        }
        last
    }
}

fn read(server: &Server, name: &str) -> String {
    let path = format!("/proc/sys/net/netfilter/{name}");
    let text = server.namespace().run(|| std::fs::read_to_string(path));
    text.map_or_else(|error| error.to_string(), |text| text.trim().to_owned())
}

/// Writes flows to the kernel, many to a datagram.
struct Maker {
    socket: mnl::Socket,
    bytes: Vec<u8>,
}

/// Returns a netlink attribute.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (4 + value.len() as u16).to_ne_bytes();
    let mut bytes = [&length, &kind.to_ne_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Returns an attribute that consists of others.
fn nested(kind: u16, attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let attributes = attributes.iter();
    let value = attributes.flat_map(|(kind, value)| attribute(*kind, value));
    attribute(kind | 0x8000, &value.collect::<Vec<u8>>())
}

fn tuple(kind: u16, from: SocketAddrV4, to: SocketAddrV4) -> Vec<u8> {
    let (source, destination) = (from.ip().octets(), to.ip().octets());
    let addresses = nested(1, &[(1, &source), (2, &destination)]);
    let (source, destination) = (from.port().to_be_bytes(), to.port().to_be_bytes());
    let protocol = [libc::IPPROTO_UDP as u8];
    let ports = nested(2, &[(1, &protocol), (2, &source), (3, &destination)]);
    attribute(kind | 0x8000, &[addresses, ports].concat())
}

impl Maker {
    fn new() -> Self {
        Self {
            socket: mnl::Socket::new(mnl::Bus::Netfilter).expect("a netlink socket"),
            bytes: Vec::new(),
        }
    }

    fn make(&mut self, client: SocketAddrV4, to: SocketAddrV4, replier: SocketAddrV4) {
        let message = [
            // Family, version and resource.
            vec![libc::AF_INET as u8, 0, 0, 0],
            tuple(1, client, to),
            tuple(2, replier, client),
            attribute(7, &3_600_u32.to_be_bytes()),
        ]
        .concat();
        let kind = (libc::NFNL_SUBSYS_CTNETLINK as u16) << 8;
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_CREATE) as u16;
        self.bytes.extend((16 + message.len() as u32).to_ne_bytes());
        self.bytes
            .extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
        self.bytes.extend([0; 8]);
        self.bytes.extend(message);
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
