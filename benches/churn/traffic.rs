//! The clients: connections to ClusterIPs of live services, one after the other.
//!
//! Two threads connect by the clock, one from outside of the pod network and one from inside. A
//! connection is answered with one line and closed. It fails if it is refused, reset or not
//! answered within three seconds, or if the wrong endpoint answers. The kernel repeats a request
//! for a connection that was lost after one second; what took that long is counted as slow.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::lab::Lab;
use crate::live::{self, Live};
use crate::netns::{Ask, Namespace};
use crate::samples::Samples;
use crate::workload::Random;

/// The port of every service.
const SERVICE_PORT: u16 = 80;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// When the kernel asks again.
const REPEATED: Duration = Duration::from_secs(1);
/// Who is late by more goes on from now: connections are not made up for in a rush.
const MOST_LATE: Duration = Duration::from_millis(100);
/// How many failures are told in words.
const TOLD: usize = 20;

/// What became of connections.
#[derive(Debug, Default)]
pub struct Tally {
    /// From the beginning to the end of each connection that was answered, in seconds.
    pub took: Samples,
    /// How many failed.
    pub failed: u64,
    /// How many were answered after a second or more.
    pub slow: u64,
    /// The first failures in words.
    pub told: Vec<String>,
}

impl Tally {
    /// All connections, whatever became of them.
    pub fn count(&self) -> u64 {
        self.took.count() as u64 + self.failed
    }

    /// How long so many percent of those that were answered took at most.
    pub fn quantile(&self, percent: usize) -> f64 {
        if self.took.count() == 0 {
            return 0.0;
        }
        self.took.percentile(percent)
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
        let ask = Ask::tcp(live::cluster_ip(service), SERVICE_PORT);
        let answer = ask.timeout(PATIENCE).send();
        let took = asked.elapsed();
        let fault = match answer.map(|answer| answer.local.ip()) {
            Ok(IpAddr::V4(address)) => self.live.fault(service, address, asked),
            Ok(IpAddr::V6(address)) => Some(format!("{address} answered, of another family")),
            Err(error) => Some(error.to_string()),
        };
        let mut tally = self.tally();
        let Some(fault) = fault else {
            tally.took.push(took.as_secs_f64());
            tally.slow += u64::from(took >= REPEATED);
            return;
        };
        tally.failed += 1;
        if tally.told.len() < TOLD {
            let at = (asked - self.began).as_secs_f64();
            let to = live::cluster_ip(service);
            let line = format!("{at:.3} s: from {from} to {to}, after {took:.1?}: {fault}");
            tally.told.push(line);
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
    pub fn start(lab: &Lab, live: Arc<Live>, rate: u32) -> Self {
        let shared = Arc::new(Shared {
            live,
            began: Instant::now(),
            stop: AtomicBool::new(false),
            tally: Mutex::default(),
        });
        let pause = Duration::from_secs(1) * lab.clients.len() as u32 / rate;
        let client = |(number, namespace): (usize, &Namespace)| {
            let (shared, namespace) = (shared.clone(), namespace.clone());
            thread::spawn(move || {
                namespace.enter();
                let mut random = Random::new();
                // Each begins elsewhere in the sequence.
                (0..number * 1_000).for_each(|_| _ = random.below(1));
                shared.ask_on(namespace.name(), pause, random);
            })
        };
        let threads = lab.clients.iter().enumerate().map(client).collect();
        Self { shared, threads }
    }

    /// What became of the connections since this was asked last.
    pub fn take(&self) -> Tally {
        std::mem::take(&mut *self.shared.tally())
    }

    /// Ends the clients when their connections are answered; returns what is left to tell.
    pub fn stop(mut self) -> Tally {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("a client does not panic");
        }
        self.take()
    }
}
