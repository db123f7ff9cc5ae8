//! Rounds of traffic through all lanes.

use std::net::SocketAddrV4;
use std::time::Duration;

use crate::lanes::{Lane, Rules};
use crate::netns::Namespace;
use crate::results::{Quantity, Results, Series};
use crate::traffic::{Connection, Echo, connect};
use crate::workload::{Random, Workload};

/// What is measured.
#[derive(Debug)]
pub struct Plan {
    /// Numbers of services, rising.
    pub sizes: Vec<usize>,
    /// Endpoints of each.
    pub endpoints: usize,
    /// The largest size in kube-proxy's shape.
    pub baseline_up_to: usize,
    /// Rounds through all lanes.
    pub rounds: usize,
    /// Connections and round trips of a lane in a round.
    pub batch: usize,
}

/// Busy services: few enough for the processor's caches to hold what their connections read.
const BUSY: usize = 10;
/// What an established connection carries in a round.
const BYTES: usize = 32 << 20;

impl Plan {
    /// Some of a lane's destinations, spread over all that there are.
    fn busy(&self, lane: &Lane) -> Vec<SocketAddrV4> {
        let count = BUSY.min(self.sizes.first().copied().unwrap_or(1));
        let apart = (lane.destinations.len() / count).max(1);
        let spread = lane.destinations.iter().step_by(apart);
        spread.take(count).copied().collect()
    }
}

/// Builds all lanes and sends traffic through them.
pub fn measure(plan: &Plan, mut progress: impl FnMut(&str)) -> Results {
    let mut results = Results::new(plan.sizes.clone(), plan.endpoints);
    let lanes = build(plan, &mut results.too_slow, &mut progress);
    for lane in &lanes {
        for quantity in Quantity::ALL {
            results.series.push(Series::new(quantity, lane.rules));
        }
    }
    let mut established: Vec<Connection> = lanes
        .iter()
        .map(|lane| {
            let to = lane.destinations[0];
            let connection = lane.client.run(|| connect(&lane.listener, to));
            connection.for_data()
        })
        .collect();
    let mut echoes: Vec<Echo> = lanes
        .iter()
        .map(|lane| {
            let to = lane.destinations[0];
            Echo::new(lane.client.run(|| connect(&lane.listener, to)))
        })
        .collect();
    let busy: Vec<Vec<SocketAddrV4>> = lanes.iter().map(|lane| plan.busy(lane)).collect();
    let mut random = Random::new();
    for round in 0..plan.rounds {
        if round % (plan.rounds / 5).max(1) == 0 {
            progress(&format!("round {} of {}", round + 1, plan.rounds));
        }
        // Another one begins each time, so that none is always behind the same.
        for turn in 0..lanes.len() {
            let place = (round + turn) % lanes.len();
            let (lane, connection) = (&lanes[place], &mut established[place]);
            let mut note = |quantity: Quantity, samples: Vec<f64>| {
                results.note(quantity, lane.rules, samples);
            };
            for (quantity, from, destinations) in [
                (Quantity::FromPod, &lane.client, &busy[place]),
                (Quantity::FromPodToAny, &lane.client, &lane.destinations),
                (Quantity::FromNode, &lane.node, &busy[place]),
            ] {
                note(
                    quantity,
                    handshakes(plan, lane, from, destinations, &mut random),
                );
            }
            note(
                Quantity::RoundTrip,
                repeated(plan, || connection.round_trip()),
            );
            let echo = &mut echoes[place];
            note(Quantity::Exchange, repeated(plan, || echo.exchange()));
            connection.send(BYTES / 10);
            let took = connection.send(BYTES).as_secs_f64();
            note(Quantity::Throughput, vec![BYTES as f64 / took]);
        }
    }
    results
}

/// Builds the lanes, the cheap ones first.
fn build(plan: &Plan, too_slow: &mut Vec<usize>, progress: &mut impl FnMut(&str)) -> Vec<Lane> {
    let mut lanes = Vec::new();
    for (place, services) in plan.sizes.iter().copied().enumerate() {
        let workload = Workload::new(services, plan.endpoints);
        let mut wanted = Vec::new();
        if place == 0 {
            wanted.extend([Rules::None, Rules::Tracked, Rules::OneRule]);
            wanted.push(Rules::WithoutFilters(services));
            wanted.extend([Rules::Affinity(services), Rules::Policies(services)]);
        }
        if place + 1 == plan.sizes.len() {
            wanted.push(Rules::NoneAgain);
        }
        wanted.push(Rules::Nftlet(services));
        if services <= plan.baseline_up_to {
            wanted.push(Rules::KubeProxy(services));
        }
        for rules in wanted {
            progress(&rules.words());
            match Lane::new(rules, &workload) {
                Some(lane) => lanes.push(lane),
                None => {
                    progress("too slow");
                    too_slow.push(services);
                }
            }
        }
    }
    lanes
}

/// The seconds of new connections to random destinations.
///
/// As many are not counted before: they find code and tables in caches which the lane before has
/// used.
fn handshakes(
    plan: &Plan,
    lane: &Lane,
    from: &Namespace,
    destinations: &[SocketAddrV4],
    random: &mut Random,
) -> Vec<f64> {
    from.enter();
    let all = (0..2 * plan.batch).map(|_| {
        let to = destinations[random.below(destinations.len())];
        connect(&lane.listener, to).handshake.as_secs_f64()
    });
    all.skip(plan.batch).collect()
}

/// The seconds of what is done over an established connection, some of it not counted before.
fn repeated(plan: &Plan, mut once: impl FnMut() -> Duration) -> Vec<f64> {
    let warm_up = plan.batch / 10;
    let all = (0..warm_up + plan.batch).map(|_| once().as_secs_f64());
    all.skip(warm_up).collect()
}
