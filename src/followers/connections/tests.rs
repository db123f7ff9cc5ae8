use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use super::*;
use crate::model::ObjectName;
use crate::netlink::ConntrackHandle;
use crate::serve::metrics::Registry;

/// Reached by a test that fails, and by no other.
const LONG: Duration = Duration::from_secs(120);
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
/// Connections to this port are denied.
const DENIED: u16 = 666;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn tracked(source: &str, replier: &str, protocol: u8, port: Option<u16>) -> Tracked {
    Tracked {
        source: ip(source),
        replier: ip(replier),
        protocol,
        port,
        handle: ConntrackHandle::default(),
    }
}

#[test]
fn what_the_rules_do_not_judge_is_not_judged() {
    let isolated = HashSet::from([ip("10.1.0.5"), ip("fd00::5")]);
    let own = HashSet::from([ip("10.1.0.1"), ip("192.168.10.1")]);
    let asked = |source, replier| {
        let tracked = tracked(source, replier, TCP, Some(80));
        policed(&tracked, &isolated, &own)
    };
    let connection = |source, destination| {
        Some(Connection {
            source: ip(source),
            destination: ip(destination),
            protocol: TCP,
            port: Some(80),
        })
    };
    for (source, replier) in [
        ("10.1.0.6", "10.1.0.5"),
        ("10.1.0.5", "10.1.0.6"),
        ("fd00::6", "fd00::5"),
        // A pod to its own node is asked of its egress.
        ("10.1.0.5", "192.168.10.1"),
    ] {
        assert_eq!(asked(source, replier), connection(source, replier));
    }
    assert_eq!(asked("10.1.0.6", "10.1.0.7"), None, "no pod is isolated");
    for own in ["10.1.0.1", "192.168.10.1"] {
        assert_eq!(asked(own, "10.1.0.5"), None, "the node to its pod");
    }
}

#[test]
fn only_protocols_without_an_opening_come_back() {
    for (protocol, expected) in [(TCP, false), (132, false), (ICMP, false), (58, false)] {
        assert_eq!(may_return(protocol), expected, "{protocol}");
    }
    assert!(may_return(UDP));
    assert!(may_return(47));
}

/// What a fake connection tracking holds, and what was asked of it.
#[derive(Default)]
struct State {
    connections: Vec<Tracked>,
    removed: Vec<(Tracked, EntryToCut)>,
    lists: usize,
    opened: usize,
    /// Lists to fail before the next one succeeds.
    failures: usize,
}

/// A connection tracking in memory. Its clones share it; `open` hands out those of a thread.
#[derive(Clone, Default)]
struct Fake(Arc<Mutex<State>>);

impl Fake {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Waits until the state is as a test wants it.
    #[track_caller]
    fn wait(&self, wanted: impl Fn(&State) -> bool) {
        let begin = Instant::now();
        while !wanted(&self.state()) {
            assert!(begin.elapsed() < LONG, "waited in vain");
            thread::yield_now();
        }
    }
}

impl ConnectionTable for Fake {
    fn list(
        &mut self,
        family: Family,
        each: &mut dyn FnMut(Tracked),
    ) -> Result<(), ConntrackError> {
        let connections = {
            let mut state = self.state();
            state.lists += 1;
            if state.failures > 0 {
                state.failures -= 1;
                return Err(ConntrackError::List {
                    what: "the tracked connections",
                    source: io::Error::from_raw_os_error(libc::EOPNOTSUPP),
                });
            }
            state.connections.clone()
        };
        let connections = connections.into_iter();
        connections
            .filter(|tracked| Family::of(tracked.source) == family)
            .for_each(each);
        Ok(())
    }

    fn own_addresses(&mut self) -> Vec<IpAddr> {
        vec![ip("10.1.0.1")]
    }
}

impl ConnectionRemover for Fake {
    fn remove(&mut self, tracked: &Tracked, which: EntryToCut) -> Result<bool, ConntrackError> {
        let mut state = self.state();
        state.removed.push((tracked.clone(), which));
        let before = state.connections.len();
        if which == EntryToCut::Listed {
            state.connections.retain(|known| known != tracked);
        }
        Ok(state.connections.len() < before)
    }
}

thread_local! {
    /// What `open` gives to the thread that it is called on.
    static HERE: std::cell::RefCell<Fake> = std::cell::RefCell::default();
}

fn open_here() -> Result<(Fake, Fake), ConntrackError> {
    Ok(HERE.with_borrow(|fake| {
        fake.state().opened += 1;
        (fake.clone(), fake.clone())
    }))
}

/// The change that isolates a pod.
fn isolated() -> PolicyChanges {
    let pod = Some(ObjectName::new("shop", "web-0"));
    let addresses = [(ip("10.1.0.5"), pod.clone()), (ip("fd00::5"), pod)];
    PolicyChanges {
        rules: true,
        isolated: Some(addresses.into()),
        ..PolicyChanges::default()
    }
}

/// A running cutter, and a thread that denies connections to port 666.
struct Bench {
    fake: Fake,
    changes: Sender<Arc<PolicyChanges>>,
    /// It is unknown what is in force for so many questions.
    unknown: Arc<AtomicUsize>,
    registry: Registry,
    metrics: FollowerMetrics,
    largest_batch: Arc<AtomicUsize>,
    cutter: thread::JoinHandle<()>,
    judge: thread::JoinHandle<()>,
}

/// Denies what goes to one port, until the cutter ends.
fn judge(mut questions: mpsc::Receiver<Query>, largest: &AtomicUsize, unknown: &AtomicUsize) {
    while let Some(question) = questions.blocking_recv() {
        let Query::Evaluate {
            connections,
            answer,
        } = question
        else {
            panic!("{question:?}");
        };
        largest.fetch_max(connections.len(), Ordering::Relaxed);
        let left = unknown.load(Ordering::Relaxed);
        unknown.store(left.saturating_sub(1), Ordering::Relaxed);
        let denied = connections.iter().map(|c| c.port == Some(DENIED));
        answer.send((left == 0).then(|| denied.collect())).unwrap();
    }
}

impl Bench {
    fn new(connections: Vec<Tracked>) -> Self {
        let fake = Fake::default();
        fake.state().connections = connections;
        let (changes, received) = channel();
        let (ask, questions) = mpsc::channel(4);
        let registry = Registry::new().unwrap();
        let metrics = FollowerMetrics::register(&registry).unwrap();
        let cutter = {
            let (fake, metrics) = (fake.clone(), metrics.clone());
            thread::spawn(move || {
                HERE.set(fake);
                Cutter::new(open_here, received, ask, true, &metrics).run();
            })
        };
        let largest_batch = Arc::new(AtomicUsize::new(0));
        let largest = largest_batch.clone();
        let unknown = Arc::new(AtomicUsize::new(0));
        let unknown_now = unknown.clone();
        let judge = thread::spawn(move || judge(questions, &largest, &unknown_now));
        Self {
            fake,
            changes,
            unknown,
            registry,
            metrics,
            largest_batch,
            cutter,
            judge,
        }
    }

    fn isolate(&self) {
        self.hand(isolated());
    }

    fn hand(&self, changes: PolicyChanges) {
        self.changes.send(Arc::new(changes)).unwrap();
    }

    /// Ends the two threads.
    fn end(self) -> Fake {
        drop(self.changes);
        self.cutter.join().unwrap();
        self.judge.join().unwrap();
        self.fake
    }
}

#[test]
fn what_is_denied_is_cut_and_the_rest_stays() {
    let stays = [
        tracked("10.1.0.6", "10.1.0.5", TCP, Some(80)),
        tracked("10.1.0.6", "10.1.0.7", TCP, Some(DENIED)),
        tracked("10.1.0.1", "10.1.0.5", TCP, Some(DENIED)),
        tracked("10.1.0.6", "10.1.0.5", ICMP, None),
    ];
    let denied = [
        tracked("10.1.0.6", "10.1.0.5", TCP, Some(DENIED)),
        tracked("fd00::5", "2001:db8::1", UDP, Some(DENIED)),
    ];
    let bench = Bench::new([&stays[..], &denied].concat());
    bench.isolate();
    bench.fake.wait(|state| state.connections == stays);
    let [tcp, udp] = denied;
    // The datagrams alone are kept from coming back.
    let reversed = (udp.clone(), EntryToCut::Reversed);
    bench.fake.wait(|state| state.removed.contains(&reversed));
    let registry = bench.registry.clone();
    let fake = bench.end();
    let removed = &fake.state().removed;
    assert_eq!(
        removed[..2],
        [(tcp, EntryToCut::Listed), (udp, EntryToCut::Listed)]
    );
    assert!(removed[2..].iter().all(|other| *other == reversed));
    let text = registry.encode();
    assert!(
        text.contains("nftlet_policy_connections_cut_total 2\n"),
        "{text}"
    );
}

#[test]
fn connections_are_judged_in_batches() {
    let many = BATCH * 2 + 7;
    let source = |number: usize| IpAddr::from([10, 2, (number >> 8) as u8, number as u8]);
    let connection = |number| Tracked {
        source: source(number),
        ..tracked("10.2.0.0", "10.1.0.5", TCP, Some(DENIED))
    };
    let bench = Bench::new((0..many).map(connection).collect());
    bench.isolate();
    bench.fake.wait(|state| state.connections.is_empty());
    assert_eq!(bench.largest_batch.load(Ordering::Relaxed), BATCH);
    let fake = bench.end();
    assert_eq!(fake.state().removed.len(), many);
}

#[test]
fn a_failure_is_tried_again() {
    let denied = tracked("10.1.0.6", "10.1.0.5", TCP, Some(DENIED));
    let bench = Bench::new(vec![denied]);
    bench.fake.state().failures = 1;
    bench.isolate();
    bench.fake.wait(|state| state.connections.is_empty());
    let fake = bench.end();
    // One list that failed, and one a family after it.
    assert_eq!(fake.state().lists, 3);
}

#[test]
fn without_isolated_pods_nothing_is_listed() {
    let bench = Bench::new(vec![tracked("10.1.0.6", "10.1.0.5", TCP, Some(DENIED))]);
    let (_, received) = channel();
    let (ask, _) = mpsc::channel(1);
    HERE.set(bench.fake.clone());
    let mut cutter = Cutter::new(open_here, received, ask, true, &bench.metrics);
    let all = SweepScope {
        all: true,
        ..SweepScope::default()
    };
    assert!(cutter.sweep(&all).is_ok());
    assert_eq!(bench.fake.state().lists, 0);
    // With an isolated pod but no answer to queries, it ends.
    cutter.receive(&isolated(), Instant::now());
    assert!(matches!(cutter.sweep(&all), Err(SweepError::Ended)));
    assert_eq!(bench.fake.state().connections.len(), 1);
    drop(cutter);
    bench.end();
}

#[test]
fn no_socket_is_opened_while_there_is_nothing_to_delete() {
    let fake = Fake::default();
    HERE.set(fake.clone());
    let (changes, received) = channel();
    let (ask, _) = mpsc::channel(1);
    let metrics = FollowerMetrics::register(&Registry::new().unwrap()).unwrap();
    for _ in 0..2 {
        changes.send(Arc::new(isolated())).unwrap();
    }
    drop(changes);
    Cutter::new(open_here, received, ask, false, &metrics).run();
    assert_eq!(fake.state().opened, 0);
}

#[test]
fn of_some_addresses_only_theirs_are_looked_at() {
    let stays = [
        tracked("10.1.0.9", "10.1.0.5", TCP, Some(DENIED)),
        tracked("10.1.0.6", "10.1.0.5", TCP, Some(80)),
    ];
    let denied = [
        tracked("10.1.0.6", "10.1.0.5", TCP, Some(DENIED)),
        tracked("10.1.0.5", "10.1.0.6", UDP, Some(DENIED)),
        tracked("fd00::9", "fd00::5", UDP, Some(DENIED)),
    ];
    let fake = Fake::default();
    fake.state().connections = [&stays[..], &denied].concat();
    HERE.set(fake.clone());
    let (changes, received) = channel();
    let (ask, questions) = mpsc::channel(4);
    let metrics = FollowerMetrics::register(&Registry::new().unwrap()).unwrap();
    let cutter = Cutter::new(open_here, received, ask, false, &metrics);
    let judge = thread::spawn(move || judge(questions, &AtomicUsize::new(0), &AtomicUsize::new(0)));
    // What was asked for is kept over a failure, and all is judged although nothing comes any more.
    fake.state().failures = 1;
    let moved = |address| PolicyChanges {
        reassigned: [ip(address)].into(),
        ..PolicyChanges::default()
    };
    for change in [isolated(), moved("10.1.0.6"), moved("fd00::5")] {
        changes.send(Arc::new(change)).unwrap();
    }
    let watched = fake.clone();
    let ended = thread::spawn(move || {
        watched.wait(|state| state.connections == stays);
        drop(changes);
    });
    cutter.run();
    ended.join().unwrap();
    judge.join().unwrap();
}

#[test]
fn what_cannot_be_judged_yet_is_judged_when_it_is_known_what_is_in_force() {
    let bench = Bench::new(vec![tracked("10.1.0.6", "10.1.0.5", TCP, Some(DENIED))]);
    bench.unknown.store(1, Ordering::Relaxed);
    bench.isolate();
    while bench.unknown.load(Ordering::Relaxed) > 0 {
        thread::yield_now();
    }
    bench.hand(PolicyChanges {
        rewritten: true,
        ..PolicyChanges::default()
    });
    bench.fake.wait(|state| state.connections.is_empty());
    bench.end();
}

#[test]
fn changes_of_policies_delay_a_sweep_by_a_second_at_most() {
    let metrics = FollowerMetrics::register(&Registry::new().unwrap()).unwrap();
    let now = Instant::now();
    let delay = |strict, after_slow_sweep: Duration, changes: &[(Duration, PolicyChanges)]| {
        let (_, received) = channel();
        let (ask, _) = mpsc::channel(1);
        let mut cutter = Cutter::new(open_here, received, ask, strict, &metrics);
        cutter.earliest = now + after_slow_sweep;
        for (at, changes) in changes {
            cutter.receive(changes, now + *at);
        }
        cutter.due.map(|due| due - now)
    };
    let ms = Duration::from_millis;
    let reassigned = || PolicyChanges {
        reassigned: [ip("10.1.0.6")].into(),
        ..PolicyChanges::default()
    };
    let at_once = |changes| [(Duration::ZERO, changes)];
    for (strict, earliest, change, expected) in [
        (true, ms(0), isolated(), Some(COLLECT)),
        (true, ms(400), isolated(), Some(ms(400))),
        (true, ms(9000), isolated(), Some(MOST_DELAY)),
        (true, ms(9000), reassigned(), Some(ms(9000))),
        (false, ms(9000), reassigned(), Some(ms(9000))),
        (false, ms(9000), isolated(), None),
    ] {
        let found = delay(strict, earliest, &at_once(change));
        assert_eq!(found, expected, "{strict} {earliest:?}");
    }
    // Further changes join the sweep that waits, in place of one sweep each or of a later one.
    let steady: Vec<_> = (0..20).map(|n| (ms(45 * n), isolated())).collect();
    assert_eq!(delay(true, ms(9000), &steady), Some(MOST_DELAY));
}
