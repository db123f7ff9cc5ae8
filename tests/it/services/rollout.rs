//! Rollouts under load, and how evenly endpoints share.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::manifests::{CLUSTER_CIDR, Manifests};
use crate::support::objects::{service, slice_of};
use nftlet_lab::netns::{
    Ask, Client, Lab, LabOptions, Machine, Namespace, PATIENCE, Protocol, Server, loses_nothing,
    require_net_admin, wait_for,
};
use serde_json::{Value, json};

const CIDR: [&str; 2] = ["--cluster-cidr", CLUSTER_CIDR];
/// Between two requests of a client that goes on asking. Without it all ports of an address are
/// used within seconds, while the server keeps each for a minute after it closed the connection:
/// one that is used again too soon is asked for again later, when its pod may have stopped.
const PACE: Duration = Duration::from_millis(1);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn put_service(manifests: &Manifests, name: &str, address: &str) {
    manifests.put(&service(name, address));
}

fn put_slice(manifests: &Manifests, service: &str, endpoints: &[Value]) {
    manifests.put(&slice(service, endpoints));
}

/// As [`put_slice`], from another thread that writes no other objects.
fn put_slice_in(directory: &Path, service: &str, endpoints: &[Value]) {
    let (draft, file) = (
        directory.join("other.draft"),
        directory.join(format!("slice-{service}.json")),
    );
    std::fs::write(&draft, slice(service, endpoints).to_string()).expect("a manifest is written");
    std::fs::rename(&draft, file).expect("a manifest is renamed");
}

fn slice(service: &str, endpoints: &[Value]) -> Value {
    slice_of(&format!("{service}-1"), service, endpoints.into())
}

/// The life of a pod according to its endpoint conditions.
#[derive(Clone, Copy, PartialEq)]
enum Life {
    Starting,
    Ready,
    Terminating,
}

fn endpoint(address: IpAddr, life: Life) -> Value {
    json!({
        "addresses": [address], "nodeName": "node-1",
        "conditions": {
            "ready": life == Life::Ready,
            "serving": life != Life::Starting,
            "terminating": life == Life::Terminating,
        },
    })
}

/// Clients on new connections, and clients that keep theirs for as long as the server does.
struct Load {
    from: Namespace,
    /// How many connection requests had been repeated before.
    repeated: u64,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<thread::JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(from: &Namespace, ask: Ask) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let repeated = from.repeated_requests();
        let threads = [false, false, true, true].map(|keep| {
            let (ns, stop, answered) = (from.clone(), stop.clone(), answered.clone());
            thread::spawn(move || {
                ns.enter();
                let mut failed = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let result = if keep {
                        kept(ask, &stop, &answered)
                    } else {
                        ask.send().map(|_| 1)
                    };
                    match result {
                        Ok(requests) => {
                            answered.fetch_add(requests, Ordering::Relaxed);
                        }
                        Err(error) => failed.push(error.to_string()),
                    }
                    thread::sleep(PACE);
                }
                failed
            })
        });
        Self {
            from: from.clone(),
            repeated,
            stop,
            answered,
            threads: threads.into(),
        }
    }

    fn more(&self, requests: u64) {
        let until = self.answered.load(Ordering::Relaxed) + requests;
        wait_for("requests to be answered", PATIENCE, || {
            (self.answered.load(Ordering::Relaxed) >= until).then_some(())
        });
    }

    /// The number of answered requests, and of those that were lost and repeated; panics if one
    /// failed.
    #[track_caller]
    fn finish(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            let failed = thread.join().expect("a client thread ends");
            assert!(failed.is_empty(), "{} failed: {}", failed.len(), failed[0]);
        }
        let lost = self.from.repeated_requests() - self.repeated;
        (self.answered.load(Ordering::Relaxed), lost)
    }
}

/// Requests on one connection until the server closes it between two of them, which a server
/// that ends may do at any time.
fn kept(ask: Ask, stop: &AtomicBool, answered: &AtomicU64) -> std::io::Result<u64> {
    let mut connection = ask.open()?;
    while !stop.load(Ordering::Relaxed) {
        match connection.ask() {
            Ok(_) => {
                answered.fetch_add(1, Ordering::Relaxed);
                thread::sleep(PACE);
            }
            Err(error) => {
                return match error.kind() {
                    ErrorKind::UnexpectedEof
                    | ErrorKind::ConnectionReset
                    | ErrorKind::BrokenPipe => Ok(0),
                    _ => Err(error),
                };
            }
        }
    }
    Ok(0)
}

fn serve(pod: &Machine) -> Server {
    Server::start(
        &pod.ns,
        Protocol::Http,
        SocketAddr::new(pod.v4.into(), 8080),
        &pod.name,
    )
}

/// Whether the rules send anything to a pod.
fn is_served(node: &Namespace, pod: &Machine) -> bool {
    let rules = node.nft(&["list", "map", "ip", "nftlet", "endpoints"]);
    rules.contains(&format!(": {} . 8080", pod.v4))
}

/// A node with three pods that serve, and three that will take their place.
struct Rollout {
    lab: Lab,
    manifests: Manifests,
    servers: Vec<Server>,
}

impl Rollout {
    fn new() -> Self {
        let lab = Lab::new(LabOptions {
            nodes: 1,
            pods_per_node: 6,
            clients: 1,
        });
        let manifests = Manifests::new();
        put_service(&manifests, "web", "10.96.0.10");
        let servers = lab.pods()[..3].iter().map(|pod| serve(pod)).collect();
        let rollout = Self {
            lab,
            manifests,
            servers,
        };
        let first = rollout.lab.pods()[..3].to_vec();
        rollout.publish(
            &first
                .into_iter()
                .map(|pod| (pod, Life::Ready))
                .collect::<Vec<_>>(),
        );
        rollout
    }

    fn publish(&self, lives: &[(&Machine, Life)]) {
        let endpoints: Vec<_> = lives
            .iter()
            .map(|(pod, life)| endpoint(pod.v4.into(), *life))
            .collect();
        put_slice(&self.manifests, "web", &endpoints);
    }

    /// Replaces the pods one by one, as a Deployment does: the new one becomes ready, then the
    /// old one terminates, is left alone, answers what it has got, and stops.
    fn run(&mut self, load: &Load) {
        let lab = self.lab.clone();
        let (node, pods) = (lab.node().ns(), lab.pods());
        let mut lives: Vec<_> = pods[..3].iter().map(|pod| (*pod, Life::Ready)).collect();
        for come in &pods[3..] {
            lives.push((come, Life::Starting));
            self.publish(&lives);
            self.servers.push(serve(come));
            lives.last_mut().unwrap().1 = Life::Ready;
            self.publish(&lives);
            wait_for("the new pod", PATIENCE, || {
                is_served(node, come).then_some(())
            });
            load.more(100);
            lives[0].1 = Life::Terminating;
            self.publish(&lives);
            wait_for("the old pod to be left alone", PATIENCE, || {
                (!is_served(node, lives[0].0)).then_some(())
            });
            load.more(100);
            drop(self.servers.remove(0));
            lives.remove(0);
            self.publish(&lives);
            load.more(100);
        }
    }
}

#[test]
fn no_request_fails_while_all_pods_are_replaced() {
    if require_net_admin() {
        loses_nothing(replace);
    }
}

/// How many requests were lost.
fn replace() -> u64 {
    let mut rollout = Rollout::new();
    let _daemon = rollout.manifests.run(rollout.lab.node().ns(), &CIDR);
    let load = Load::start(&rollout.lab.client().ns, Ask::http(ip("10.96.0.10"), 80));
    rollout.run(&load);
    let (answered, lost) = load.finish();
    assert!(answered >= 900, "{answered}");
    lost
}

/// Changes endpoints of other services, 200 times a second, until it is stopped, and counts.
fn disturb(manifests: &Path, stop: &AtomicBool, made: &AtomicU32) {
    let (start, mut changes) = (Instant::now(), 0u32);
    while !stop.load(Ordering::Relaxed) {
        let service = changes % 50;
        let round = changes / 50;
        let last = 1 + (round % 100) as u8;
        let count = [0u8, 1, 2, 63, 64, 65, 92][((round + service) % 7) as usize];
        let endpoints: Vec<_> = (0..count)
            .map(|n| {
                endpoint(
                    IpAddr::from([10, 244, 9, last.wrapping_add(n)]),
                    Life::Ready,
                )
            })
            .collect();
        put_slice_in(manifests, &format!("other-{service}"), &endpoints);
        changes += 1;
        made.store(changes, Ordering::Relaxed);
        // A steady pace, whatever one change takes.
        let due = start + Duration::from_millis(5) * changes;
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

/// Ends a thread also where a wait is in vain.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn no_request_fails_while_other_services_change_200_times_a_second() {
    if require_net_admin() {
        loses_nothing(replace_beside_others);
    }
}

/// How many requests were lost.
fn replace_beside_others() -> u64 {
    let mut rollout = Rollout::new();
    for n in 0..50u8 {
        let address = format!("10.96.1.{n}");
        put_service(&rollout.manifests, &format!("other-{n}"), &address);
    }
    let daemon = rollout.manifests.run(rollout.lab.node().ns(), &CIDR);
    let (stop, changes) = (AtomicBool::new(false), AtomicU32::new(0));
    let path = rollout.manifests.path().to_owned();
    let load = Load::start(&rollout.lab.client().ns, Ask::http(ip("10.96.0.10"), 80));
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| disturb(&path, &stop, &changes));
        rollout.run(&load);
        load.more(2000);
        wait_for("other services to change", PATIENCE, || {
            (changes.load(Ordering::Relaxed) >= 100).then_some(())
        });
    });
    let (answered, lost) = load.finish();
    assert!(answered >= 2900, "{answered}");
    let log = daemon.log();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    lost
}

#[test]
fn no_request_fails_while_a_service_grows_and_shrinks() {
    if require_net_admin() {
        loses_nothing(resize);
    }
}

/// Surges and drains across the numbers at which the chains change. Returns how many requests were lost.
fn resize() -> u64 {
    let lab = Lab::new(LabOptions {
        nodes: 1,
        pods_per_node: 1,
        clients: 1,
    });
    let _server = serve_range(&lab);
    let (node, manifests) = (lab.node().ns(), Manifests::new());
    put_service(&manifests, "web", "10.96.0.10");
    // Endpoints from one number up to another; the first ones terminate.
    let publish = |terminating: u16, ready: std::ops::Range<u16>| {
        let of = |number: u16, life| endpoint(in_range(number), life);
        let first = ready.start - terminating;
        let endpoints: Vec<_> = (first..ready.start)
            .map(|number| of(number, Life::Terminating))
            .chain(ready.map(|number| of(number, Life::Ready)))
            .collect();
        put_slice(&manifests, "web", &endpoints);
    };
    let serves = |numbers: std::ops::Range<u16>| {
        let wanted: Vec<String> = numbers
            .map(|number| format!(": {} . 8080", in_range(number)))
            .collect();
        wait_for("the endpoints", PATIENCE, || {
            let rules = node.nft(&["list", "map", "ip", "nftlet", "endpoints"]);
            let all = wanted.iter().all(|target| rules.contains(target));
            (all && rules.matches(" . 8080").count() == wanted.len()).then_some(())
        });
    };
    publish(0, 0..1);
    let _daemon = manifests.run(node, &CIDR);
    let load = Load::start(&lab.client().ns, Ask::http(ip("10.96.0.10"), 80));
    let (mut first, mut number) = (0, 1u16);
    for next in [2, 1, 3, 63, 64, 65, 64, 66, 91, 92, 64, 130, 65, 5, 1] {
        // The new ones come before the old ones go, which are marked first.
        publish(0, first..first + number + next);
        serves(first..first + number + next);
        load.more(50);
        publish(number, first + number..first + number + next);
        serves(first + number..first + number + next);
        load.more(50);
        first += number;
        number = next;
        publish(0, first..first + number);
        serves(first..first + number);
    }
    // All at once, in one transaction.
    for next in [130u16, 1, 65, 64, 1] {
        publish(0, first..first + next);
        serves(first..first + next);
        load.more(50);
    }
    let (answered, lost) = load.finish();
    assert!(answered >= 1_500, "{answered}");
    lost
}

/// The address of an endpoint that [`serve_range`] serves.
fn in_range(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    IpAddr::from([10, 245, high, low])
}

/// Lets the first pod of a laboratory answer HTTP at a range of addresses.
fn serve_range(lab: &Lab) -> Server {
    let (node, pod) = (lab.node().ns(), lab.pods()[0]);
    pod.ns.ip("route add local 10.245.0.0/16 dev lo");
    node.route_add("10.245.0.0/16", &format!("via {} dev veth1 onlink", pod.v4));
    let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 8080);
    Server::start(&pod.ns, Protocol::Http, any, "pod")
}

/// The value that chi-square exceeds with probability one in a million, by Wilson and Hilferty.
fn chi_square_limit(degrees: f64) -> f64 {
    let z = 4.753;
    let spread = 2.0 / (9.0 * degrees);
    degrees * (1.0 - spread + z * spread.sqrt()).powi(3)
}

#[test]
fn each_of_n_endpoints_gets_its_share() {
    if !require_net_admin() {
        return;
    }
    let lab = Lab::new(LabOptions {
        nodes: 1,
        pods_per_node: 1,
        clients: 1,
    });
    let (node, pod) = (lab.node().ns(), lab.pods()[0]);
    // One pod has all addresses of a range: the server answers which one a client reached.
    pod.ns.ip("route add local 10.245.0.0/16 dev lo");
    node.route_add("10.245.0.0/16", &format!("via {} dev veth1 onlink", pod.v4));
    let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 8080);
    let _server = Server::start(&pod.ns, Protocol::Tcp, any, "pod");
    let manifests = Manifests::new();
    let client = Client::new(&lab.client().ns);
    for (index, n) in (0u8..).zip([1u16, 2, 3, 7, 10, 64, 65, 300]) {
        let address = format!("10.96.2.{index}");
        put_service(&manifests, &format!("even-{n}"), &address);
        let endpoints: Vec<_> = (0..n)
            .map(|i| {
                let [high, low] = i.to_be_bytes();
                endpoint(IpAddr::from([10, 245, high, low]), Life::Ready)
            })
            .collect();
        put_slice(&manifests, &format!("even-{n}"), &endpoints);
        manifests.program(node, &CIDR);
        // So many that each endpoint is expected to be met 20 times and more.
        let connections = if n > 64 { 10_000 } else { 3_000 };
        // The server keeps the ports of closed connections for a minute, and so many connections come
        // round to some of them: these take a second or three with any proxy.
        let ask = Ask::tcp(ip(&address), 80);
        let counts = client.run(move || {
            let mut counts: BTreeMap<IpAddr, u32> = BTreeMap::new();
            for _ in 0..connections {
                *counts.entry(ask.send().unwrap().local.ip()).or_default() += 1;
            }
            counts
        });
        assert_eq!(
            counts.len(),
            usize::from(n),
            "endpoints without any connection"
        );
        if n > 1 {
            let expected = f64::from(connections) / f64::from(n);
            let deviations = counts.values().map(|c| (f64::from(*c) - expected).powi(2));
            let chi_square: f64 = deviations.sum::<f64>() / expected;
            let limit = chi_square_limit(f64::from(n - 1));
            assert!(
                chi_square < limit,
                "{n} endpoints: {chi_square} >= {limit}: {counts:?}"
            );
        }
    }
}

/// Five slices of a thousand endpoints each, as the API splits them.
#[test]
fn five_thousand_endpoints_fit_in_one_service() {
    if !require_net_admin() {
        return;
    }
    let (manifests, node) = (Manifests::new(), Namespace::new("node"));
    put_service(&manifests, "large", "10.96.0.10");
    let put_part = |part: u8, replaced: Option<IpAddr>| {
        let mut endpoints: Vec<Value> = (0..1000u16)
            .map(|index| {
                let [high, low] = index.to_be_bytes();
                endpoint(IpAddr::from([10, 200 + part, high, low]), Life::Ready)
            })
            .collect();
        if let Some(address) = replaced {
            endpoints[500] = endpoint(address, Life::Ready);
        }
        let mut object = slice("large", &endpoints);
        object["metadata"]["name"] = json!(format!("large-{part}"));
        manifests.put(&object);
    };
    (0..5).for_each(|part| put_part(part, None));
    let _daemon = manifests.run(&node, &CIDR);
    let list = |name: &str| node.nft(&["list", "map", "ip", "nftlet", name]);
    assert!(list("frontends").contains(" : 2:5793"), "4,097 to 5,793");
    let endpoints = list("endpoints");
    assert_eq!(endpoints.matches(" . 8080").count(), 5000);
    assert!(endpoints.contains("10.96.0.10 . tcp . 80 . 0:1388 : "));
    put_part(3, Some(ip("10.210.0.1")));
    wait_for("the replaced endpoint", PATIENCE, || {
        list("endpoints")
            .contains(": 10.210.0.1 . 8080")
            .then_some(())
    });
    assert_eq!(list("endpoints").matches(" . 8080").count(), 5000);
}
