//! How long services are away after a flush of the ruleset, and how long changes wait after an
//! outage of the API server.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::alone;
use crate::support::agent::{Node, wait_for_log};
use crate::support::manifests::{CLUSTER_CIDR, Manifests, Service};
use crate::support::objects::{self, service, slice};
use nftlet_lab::fake_api::{NODES, SERVICES, SLICES};
use nftlet_lab::netns::{
    Ask, Daemon, Lab, LabOptions, Namespace, PATIENCE, Protocol, require_net_admin, wait_for,
};

const CIDR: [&str; 2] = ["--cluster-cidr", CLUSTER_CIDR];
const MANY: u16 = 1000;
const ENDPOINTS: u16 = 10;
/// How often the ruleset is flushed for one median.
const FLUSHES: usize = 5;
/// What is promised. Without optimisation nftlet itself takes several times as long.
const PROMISED: Duration = if cfg!(debug_assertions) {
    Duration::from_millis(500)
} else {
    Duration::from_millis(100)
};
/// How many medians are taken before the promise counts as broken: other work on the
/// machine makes them longer, and never shorter.
const ATTEMPTS: usize = 5;
const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10));

/// A client that asks again and again, and when it was answered.
struct Answers<'a> {
    answered: &'a AtomicU64,
    stop: &'a AtomicBool,
}

impl Answers<'_> {
    /// Asks until stopped. A request between a flush and its repair is lost, so none is waited for
    /// much longer than usual.
    fn collect(&self, client: &Namespace) -> Vec<Instant> {
        client.enter();
        let ask = Ask::tcp(ADDRESS, 80);
        let mut usual: Vec<Duration> = (0..100)
            .map(|_| {
                let asked = Instant::now();
                ask.send().expect("an answer before the first flush");
                asked.elapsed()
            })
            .collect();
        usual.sort();
        let ask = ask.timeout((usual[50] * 10).max(Duration::from_millis(5)));
        let mut answers = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            if ask.send().is_ok() {
                answers.push(Instant::now());
                self.answered.fetch_add(1, Ordering::Relaxed);
            }
        }
        answers
    }

    #[track_caller]
    fn more(&self, what: &str) {
        let until = self.answered.load(Ordering::Relaxed) + 100;
        wait_for(what, PATIENCE, || {
            (self.answered.load(Ordering::Relaxed) >= until).then_some(())
        });
    }
}

impl Drop for Answers<'_> {
    /// Ends the client also where a wait is in vain.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The longest time without an answer, of what lies between two moments at least in part.
fn longest_gap(answers: &[Instant], from: Instant, to: Instant) -> Duration {
    let pairs = answers.windows(2);
    let gaps = pairs
        .filter(|pair| pair[1] > from && pair[0] < to)
        .map(|pair| pair[1].duration_since(pair[0]));
    gaps.max().expect("answers before and after")
}

/// How long the threads of a program have waited for a processor that others had.
fn waited(daemon: &Daemon) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("it runs");
    let waited = tasks.filter_map(|task| {
        // A thread may end meanwhile, and a kernel may not count.
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        let nanoseconds = text.split_whitespace().nth(1)?;
        Some(Duration::from_nanos(nanoseconds.parse().ok()?))
    });
    waited.sum()
}

/// How long services were away, for each of several flushes: the longest time without an answer,
/// less what it is on this machine in an undisturbed time as long, and less what nftlet had to wait
/// for the processor.
fn outages(lab: &Lab, manifests: &Manifests) -> Vec<Duration> {
    let (node, client) = (lab.node().ns(), &lab.client().ns);
    manifests.program(node, &CIDR);
    let (stop, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let (stop, answered) = (&stop, &answered);
    let (answers, flushes) = thread::scope(|scope| {
        let asking = Answers { answered, stop };
        let collecting = scope.spawn(|| Answers { answered, stop }.collect(client));
        asking.more("answers before the first flush");
        let mut flushes = Vec::new();
        for _ in 0..FLUSHES {
            // One that was asked to repair the rules shortly before takes its time.
            let daemon = manifests.run(node, &CIDR);
            asking.more("answers before the flush");
            let (flushed, waited_before) = (Instant::now(), waited(&daemon));
            node.nft_load("flush ruleset");
            wait_for("the rules to be back", PATIENCE, || {
                let found = node.nft(&["list", "tables"]);
                found.contains("table ip nftlet\n").then_some(())
            });
            asking.more("answers after the flush");
            let (over, waited) = (
                Instant::now(),
                waited(&daemon).saturating_sub(waited_before),
            );
            // The same once more, without a flush: the commands that look, and as long a time.
            while over.elapsed() < over.duration_since(flushed) {
                node.nft(&["list", "tables"]);
                thread::sleep(Duration::from_millis(5));
            }
            asking.more("answers of an undisturbed time");
            flushes.push((flushed, over, Instant::now(), waited));
        }
        drop(asking);
        (collecting.join().expect("the client ends"), flushes)
    });
    let outages = flushes.into_iter().map(|(flushed, over, end, waited)| {
        let undisturbed = longest_gap(&answers, over, end);
        longest_gap(&answers, flushed, over).saturating_sub(undisturbed + waited)
    });
    outages.collect()
}

/// A firewall that is loaded anew takes all rules with it.
#[test]
fn a_flush_of_the_ruleset_is_a_short_outage() {
    if !require_net_admin() {
        return;
    }
    let _alone = alone();
    let lab = Lab::new(LabOptions::default());
    let manifests = Manifests::new();
    let service = |name: &str, address: String, endpoints: &[(String, bool)]| {
        let mut service = Service::new(name, 0).port("tcp", "TCP", 80, None);
        service.cluster_ips = vec![address];
        manifests.service(&service);
        manifests.endpoints(&service, 8080, endpoints);
    };
    let pods = lab.pods();
    let addresses: Vec<_> = pods.iter().map(|pod| (pod.v4.to_string(), true)).collect();
    service("web", ADDRESS.to_string(), &addresses);
    for index in 0..MANY - 1 {
        let address = format!("10.96.{}.{}", 1 + index / 250, 1 + index % 250);
        let endpoint = |last: u16| (format!("10.244.{}.{}", 2 + index % 250, 1 + last), true);
        let endpoints: Vec<_> = (0..ENDPOINTS).map(endpoint).collect();
        service(&format!("other-{index}"), address, &endpoints);
    }
    let serve = |pod: &&nftlet_lab::netns::Pod| pod.serve(Protocol::Tcp, 8080);
    let _servers: Vec<_> = pods.iter().flat_map(serve).collect();
    let mut seen = Vec::new();
    for _ in 0..ATTEMPTS {
        let mut outages = outages(&lab, &manifests);
        outages.sort();
        let median = outages[FLUSHES / 2];
        println!("longest time without an answer, for each flush: {outages:.1?}");
        if median < PROMISED {
            return;
        }
        seen.push(outages);
    }
    panic!("the median is {PROMISED:?} or more each time: {seen:.1?}");
}

/// How long it may take until all changes of an outage are in force: much longer than it does, and
/// much shorter than the pauses that have grown by then.
const RECOVERED: Duration = Duration::from_secs(if cfg!(debug_assertions) { 12 } else { 5 });
/// How many connections are refused before the server is back.
const REFUSED: usize = 60;

/// The server comes back without the history that the watches would resume from.
#[test]
fn all_changes_of_an_outage_are_in_force_soon_after_it() {
    if !require_net_admin() {
        return;
    }
    let _alone = alone();
    let node = Node::new();
    node.api.put(NODES, objects::node("node-1", "zone-a"));
    let slices = |range: u16| {
        (0..MANY).map(move |index| {
            let address = |last| format!("10.{range}.{}.{}", index / 20, index % 20 * 10 + last);
            let addresses: Vec<_> = (0..ENDPOINTS).map(address).collect();
            let name = format!("s{index}");
            (SLICES, slice(&name, &name, &addresses))
        })
    };
    let services = (0..MANY).map(|index| {
        let address = format!("10.96.{}.{}", 1 + index / 250, 1 + index % 250);
        (SERVICES, service(&format!("s{index}"), address))
    });
    node.api.put_all(services);
    node.api.put_all(slices(1));
    let nftlet = node.run();
    let in_force = |range: u16| {
        let listed = node.ns.nft(&["list", "map", "ip", "nftlet", "endpoints"]);
        let leads = format!(": 10.{range}.");
        listed.matches(&leads).count() == usize::from(MANY * ENDPOINTS)
    };
    assert!(in_force(1));
    node.set_down(true);
    wait_for_log(&nftlet, "cannot be reached");
    let down = Instant::now();
    node.wait_for_refusals(REFUSED);
    node.api.put_all(slices(2));
    node.api.compact(false);
    let (lasted, back) = (down.elapsed(), Instant::now());
    node.set_down(false);
    wait_for("all changes to be in force", PATIENCE, || {
        in_force(2).then_some(())
    });
    let recovered = back.elapsed();
    println!("in force {recovered:.2?} after an outage of {lasted:.1?}");
    assert!(recovered < RECOVERED, "{recovered:?}");
}
