//! Packets: what new connections through a ClusterIP cost, and established ones.
//!
//! A lane ([`lanes`]) is a client, a node and a server in network namespaces of their own. Lanes
//! differ in the rules of their node only: nftlet's at several sizes, kube-proxy's shape of the
//! same services, none at all. All of them exist at once, and [`traffic`] goes through each in
//! turn, in small batches of many rounds. Other work on the machine thus affects all alike, and
//! lanes are compared within each round before a median is taken.

mod lanes;
mod traffic;

use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::time::Duration;

use crate::Context;
use crate::report::Value::{BytesPerSecond, Ratio, Seconds, Text};
use crate::report::{Report, Table, Value};
use crate::samples::Samples;
use lanes::{Lane, Rules};
use nftlet_lab::cluster::{Cluster, Random, Size};
use nftlet_lab::netns::Namespace;
use traffic::{Connection, Echo, connect};

/// Busy services: few enough for the processor's caches to hold what their connections read.
const BUSY: usize = 10;
/// Cluster policies that select the client.
const CLUSTER_POLICIES: [usize; 2] = [3, 100];
/// What an established connection carries in a round.
const BYTES: usize = 32 << 20;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Numbers of services, with commas between.
    #[arg(long, value_delimiter = ',', default_value = "100,10000,50000",
        value_parser = clap::value_parser!(u32).range(1..=300_000))]
    sizes: Vec<u32>,
    /// Endpoints of each service.
    #[arg(long, default_value = "10", value_parser = clap::value_parser!(u32).range(1..=99))]
    endpoints: u32,
    /// An older nftlet to compare with.
    #[arg(long, value_name = "FILE")]
    before: Option<PathBuf>,
    /// The most services that are loaded in kube-proxy's shape, too, for five minutes at most.
    #[arg(long, default_value = "50000", value_name = "SERVICES")]
    kube_proxy_up_to: usize,
    /// Rounds, each of which goes through all lanes.
    #[arg(long, default_value = "150", value_parser = clap::value_parser!(u32).range(10..=2_000))]
    rounds: u32,
    /// New connections, and round trips, through each lane in each round.
    #[arg(long, default_value = "200", value_parser = clap::value_parser!(u32).range(10..=1_000))]
    batch: u32,
}

/// A quantity that is measured in each lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quantity {
    /// A new connection of a pod to one of ten services, which the processor's caches remember
    /// however many there are.
    FromPod,
    /// A new connection of a pod to any service, which they do not.
    FromPodToAny,
    /// As [`Quantity::FromPod`], of the node itself.
    FromNode,
    /// A byte goes and comes over an established connection, both ends of which one thread holds:
    /// the work on the packets alone.
    RoundTrip,
    /// The same where the server's end is held by another thread, which is woken by the byte: the
    /// least that an application sees.
    Exchange,
    /// The bytes a second over an established connection.
    Throughput,
}

impl Quantity {
    const ALL: [(Self, &str); 6] = [
        (Self::FromPod, "new connection of a pod, busy service"),
        (Self::FromPodToAny, "new connection of a pod, any service"),
        (Self::FromNode, "new connection of the node, busy service"),
        (Self::RoundTrip, "round trip, established"),
        (Self::Exchange, "exchange of two threads, established"),
        (Self::Throughput, "throughput, established"),
    ];

    fn value(self, number: f64) -> Value {
        match self {
            Self::Throughput => BytesPerSecond(number),
            _ => Seconds(number),
        }
    }
}

/// A lane with its connections, and what was measured in it.
struct Track {
    lane: Lane,
    busy: Vec<SocketAddrV4>,
    established: Connection,
    echo: Echo,
    /// The medians of all rounds, and all samples, of each quantity.
    rounds: [Samples; 6],
    samples: [Samples; 6],
}

impl Arguments {
    pub fn run(&self, context: &Context) -> Report {
        let mut sizes: Vec<usize> = self.sizes.iter().map(|size| *size as usize).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let parameters: [(_, &dyn ToString); 3] = [
            ("endpoints", &self.endpoints),
            ("rounds", &self.rounds),
            ("connections of a lane in a round", &self.batch),
        ];
        let mut report = Report::new("packets", parameters);
        let mut too_slow = Vec::new();
        let lanes = self.build(&sizes, &mut too_slow, context);
        let mut tracks: Vec<Track> = lanes
            .into_iter()
            .map(|lane| self.track(lane, &sizes))
            .collect();
        let mut random = Random::default();
        let rounds = self.rounds as usize;
        for round in 0..rounds {
            if round.is_multiple_of((rounds / 5).max(1)) {
                context.progress(format_args!("round {} of {rounds}", round + 1));
            }
            // Another one begins each time, so that none is always behind the same.
            for turn in 0..tracks.len() {
                let place = (round + turn) % tracks.len();
                self.pass(&mut tracks[place], &mut random);
            }
        }
        report.tables = vec![medians(&tracks), comparisons(&sizes, &tracks, &too_slow)];
        report
    }

    /// Builds the lanes, the cheap ones first.
    fn build(&self, sizes: &[usize], too_slow: &mut Vec<usize>, context: &Context) -> Vec<Lane> {
        let mut lanes = Vec::new();
        for (place, services) in sizes.iter().copied().enumerate() {
            let cluster = Cluster::plain(Size {
                services,
                endpoints: self.endpoints as usize,
            });
            let mut wanted = Vec::new();
            if place == 0 {
                wanted.extend([Rules::None, Rules::Tracked, Rules::OneRule]);
                wanted.push(Rules::WithoutFilters(services));
                wanted.extend([Rules::Affinity(services), Rules::Policies(services)]);
                wanted.extend(CLUSTER_POLICIES.map(|it| Rules::ClusterPolicies(services, it)));
            }
            if place + 1 == sizes.len() {
                wanted.push(Rules::NoneAgain);
            }
            wanted.push(Rules::Nftlet(services));
            wanted.extend(self.before.iter().map(|_| Rules::Before(services)));
            if services <= self.kube_proxy_up_to {
                wanted.push(Rules::KubeProxy(services));
            }
            for rules in wanted {
                context.progress(rules.name());
                let before = self.before.as_ref();
                let nftlet = before.filter(|_| matches!(rules, Rules::Before(_)));
                match Lane::new(rules, &cluster, nftlet.unwrap_or(&context.nftlet)) {
                    Some(lane) => lanes.push(lane),
                    None => {
                        context.progress("too slow");
                        too_slow.push(services);
                    }
                }
            }
        }
        lanes
    }

    fn track(&self, lane: Lane, sizes: &[usize]) -> Track {
        let connection = || {
            lane.client
                .run(|| connect(&lane.listener, lane.destinations[0]))
        };
        let count = BUSY.min(sizes[0]);
        let apart = (lane.destinations.len() / count).max(1);
        let busy = lane.destinations.iter().step_by(apart).take(count).copied();
        Track {
            busy: busy.collect(),
            established: connection().for_data(),
            echo: Echo::new(connection()),
            lane,
            rounds: Default::default(),
            samples: Default::default(),
        }
    }

    /// Sends the traffic of one round through a lane.
    fn pass(&self, track: &mut Track, random: &mut Random) {
        let batch = self.batch as usize;
        for (place, (quantity, _)) in Quantity::ALL.into_iter().enumerate() {
            let lane = &track.lane;
            let mut handshakes = |from: &Namespace, destinations: &[SocketAddrV4]| {
                from.enter();
                // As many before are not counted: they fill caches, which the lane before used.
                repeated(batch, batch, || {
                    let to = destinations[random.below(destinations.len())];
                    connect(&lane.listener, to).handshake
                })
            };
            let samples = match quantity {
                Quantity::FromPod => handshakes(&lane.client, &track.busy),
                Quantity::FromPodToAny => handshakes(&lane.client, &lane.destinations),
                Quantity::FromNode => handshakes(&lane.node, &track.busy),
                Quantity::RoundTrip => {
                    repeated(batch / 10, batch, || track.established.round_trip())
                }
                Quantity::Exchange => repeated(batch / 10, batch, || track.echo.exchange()),
                Quantity::Throughput => {
                    track.established.send(BYTES / 10);
                    let took = track.established.send(BYTES).as_secs_f64();
                    [BYTES as f64 / took].into_iter().collect()
                }
            };
            track.rounds[place].push(samples.median());
            track.samples[place].append(samples);
        }
    }
}

/// Returns the seconds of each of many repetitions, some before them not counted.
fn repeated(warm_up: usize, count: usize, mut once: impl FnMut() -> Duration) -> Samples {
    let all = (0..warm_up + count).map(|_| once().as_secs_f64());
    all.skip(warm_up).collect()
}

fn medians(tracks: &[Track]) -> Table {
    let mut table = Table::new("Packets: medians of all rounds", "lane");
    for (place, (quantity, words)) in Quantity::ALL.into_iter().enumerate() {
        for track in tracks {
            let value = |number| quantity.value(number);
            let median = value(track.rounds[place].median());
            let row = table.row(words, track.lane.rules.name(), "median", median);
            let timed = quantity != Quantity::Throughput;
            row.and(
                "p99",
                track.samples[place].p99().filter(|_| timed).map(value),
            );
        }
    }
    table
}

/// Compares lanes round by round: what was slow for both sides does not count.
fn comparisons(sizes: &[usize], tracks: &[Track], too_slow: &[usize]) -> Table {
    let (smallest, largest) = (sizes[0], sizes[sizes.len() - 1]);
    let large = Rules::Nftlet(largest);
    let mut pairs = Vec::new();
    let growing = sizes.iter().filter(|size| **size > smallest);
    pairs.extend(growing.map(|size| (Rules::Nftlet(*size), Rules::Nftlet(smallest))));
    pairs.extend(
        sizes
            .iter()
            .map(|size| (Rules::Nftlet(*size), Rules::KubeProxy(*size))),
    );
    pairs.extend(
        sizes
            .iter()
            .map(|size| (Rules::Nftlet(*size), Rules::Before(*size))),
    );
    pairs.push((large, Rules::OneRule));
    pairs.push((Rules::Nftlet(smallest), Rules::WithoutFilters(smallest)));
    for lane in [Rules::Affinity(smallest), Rules::Policies(smallest)] {
        pairs.extend([(lane, Rules::OneRule), (lane, Rules::Nftlet(smallest))]);
    }
    pairs.extend(CLUSTER_POLICIES.map(|policies| {
        let lane = Rules::ClusterPolicies(smallest, policies);
        (lane, Rules::Policies(smallest))
    }));
    pairs.extend([(large, Rules::Tracked), (large, Rules::None)]);
    // How far lanes with the same rules are apart.
    pairs.push((Rules::NoneAgain, Rules::None));
    let title = "Ratios, round by round: their median, and the bounds of it with 95 % probability";
    let mut table = Table::new(title, "lane over lane");
    for (place, (_, words)) in Quantity::ALL.into_iter().enumerate() {
        for (lane, with) in &pairs {
            let rounds = |rules: &Rules| {
                let track = tracks.iter().find(|track| track.lane.rules == *rules);
                track.map(|track| &track.rounds[place])
            };
            let of = format!("{} over {}", lane.name(), with.name());
            if let (Some(judged), Some(other)) = (rounds(lane), rounds(with)) {
                let ratios = judged.over(other);
                let [low, high] = ratios.bounds_of_median();
                let row = table.row(words, of, "ratio", Ratio(ratios.median()));
                row.and("from", Ratio(low)).and("to", Ratio(high));
            } else if matches!(with, Rules::KubeProxy(size) if too_slow.contains(size)) {
                let slow = Text("too slow to load".to_owned());
                table.row(words, of, "ratio", slow);
            }
        }
    }
    table
}
