//! The changes, and their times.
//!
//! Nineteen of twenty changes replace an endpoint by one with another address; the others add or
//! take one, which moves the service's frontend to another shared chain. One change in five is
//! about a live service. Changes are sent in bursts by the clock: a burst is due every ten
//! milliseconds, whether or not the one before is in force.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::live::{self, Live};
use crate::cluster::{Cluster, Endpoint, Put, Random, Size};
use crate::server::Server;

/// The pause from one burst to the next.
pub const PAUSE: Duration = Duration::from_millis(10);
/// One change of so many is about a live service, and one of another number of endpoints.
const LIVE: usize = 5;
const COUNT: usize = 20;
/// By how many the endpoints of a service may be more or less than at first.
const SPREAD: usize = 2;
/// How often the server sends bookmarks and forgets the oldest history, as real ones do.
const HOUSEKEEPING: Duration = Duration::from_secs(60);
/// How long it remembers.
const HISTORY: Duration = Duration::from_secs(100);

/// A cluster whose endpoints change.
pub struct Changes {
    cluster: Cluster,
    endpoints: usize,
    services: usize,
    live: Arc<Live>,
    random: Random,
    /// The last byte of the newest address of each live service.
    newest: Vec<u8>,
}

/// The times of the sender.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// The time of the last change.
    pub last: Instant,
    /// By how much a burst was late at most.
    pub late: Duration,
}

impl Changes {
    /// Returns a cluster whose live services have endpoints that answer.
    pub fn new(size: Size, live: Arc<Live>) -> Self {
        let mut changes = Self {
            cluster: Cluster::new(size),
            endpoints: size.endpoints,
            services: size.services,
            random: Random::new(),
            newest: vec![0; live.count()],
            live,
        };
        for service in 0..changes.live.count() {
            let addresses: Vec<_> = (0..size.endpoints).map(|_| changes.take(service)).collect();
            changes.cluster.edit(live::place(service), |endpoints| {
                for (endpoint, address) in endpoints.iter_mut().zip(addresses) {
                    endpoint.address = address;
                }
            });
        }
        changes
    }

    /// Returns all objects.
    pub fn objects(&self) -> impl Iterator<Item = Put> + '_ {
        self.cluster.objects()
    }

    /// Makes a change.
    fn change(&mut self) -> Put {
        let service = if self.random.below(LIVE) == 0 {
            live::place(self.random.below(self.live.count()))
        } else {
            self.random.below(self.services)
        };
        let now = self.cluster.endpoints[service].len();
        let chosen = self.random.below(now);
        if self.random.below(COUNT) > 0 {
            return self.replace(service, chosen);
        }
        let grow = match now {
            most if most >= self.endpoints + SPREAD => false,
            least if least + SPREAD <= self.endpoints => true,
            _ => self.random.below(2) == 0,
        };
        if grow {
            self.grow(service)
        } else {
            self.shrink(service, chosen)
        }
    }

    fn replace(&mut self, service: usize, endpoint: usize) -> Put {
        let Some(live) = live::at(service) else {
            return self.cluster.replace(service, endpoint);
        };
        let address = self.take(live);
        self.edit_live(service, |endpoints| {
            let before = std::mem::replace(&mut endpoints[endpoint].address, address);
            Some(before)
        })
    }

    fn grow(&mut self, service: usize) -> Put {
        let Some(live) = live::at(service) else {
            return self.cluster.grow(service);
        };
        let address = self.take(live);
        self.edit_live(service, |endpoints| {
            let like = endpoints[0];
            endpoints.push(Endpoint { address, ..like });
            None
        })
    }

    fn shrink(&mut self, service: usize, endpoint: usize) -> Put {
        self.edit_live(service, |endpoints| {
            Some(endpoints.remove(endpoint).address)
        })
    }

    /// Edits the endpoints of a service; the address that leaves is released.
    fn edit_live(
        &mut self,
        service: usize,
        edit: impl FnOnce(&mut Vec<Endpoint>) -> Option<Ipv4Addr>,
    ) -> Put {
        let mut left = None;
        let put = self
            .cluster
            .edit(service, |endpoints| left = edit(endpoints));
        if let (Some(_), Some(address)) = (live::at(service), left) {
            self.live.release(address);
        }
        put
    }

    fn take(&mut self, live: usize) -> Ipv4Addr {
        let address = self.live.take(live, self.newest[live]);
        self.newest[live] = address.octets()[3];
        address
    }

    /// Sends so many changes a second for so long, and counts them. After half of the time the
    /// server ends all watches, as real ones do every few minutes.
    pub fn send(&mut self, server: &Server, rate: u32, length: Duration, sent: &AtomicU64) -> Sent {
        let burst = f64::from(rate) * PAUSE.as_secs_f64();
        let bursts = (length.as_secs_f64() / PAUSE.as_secs_f64()) as u32;
        let kept = (f64::from(rate) * HISTORY.as_secs_f64()) as usize;
        let started = Instant::now();
        let mut done = Sent {
            last: started,
            late: Duration::ZERO,
        };
        let (mut made, mut tidy) = (0, started + HOUSEKEEPING);
        for number in 0..bursts {
            let wanted = (f64::from(number + 1) * burst) as u64;
            let changes: Vec<Put> = (made..wanted).map(|_| self.change()).collect();
            made = wanted;
            let due = started + PAUSE * number;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            // Before they can be in force, so that a backlog is never less than none.
            sent.store(made, Ordering::Relaxed);
            done.last = server.put(changes);
            done.late = done.late.max(done.last.saturating_duration_since(due));
            if number == bursts / 2 {
                server.api.end_watches();
            }
            if done.last > tidy {
                server.api.trim(kept);
                server.api.bookmark();
                tidy += HOUSEKEEPING;
            }
        }
        done
    }
}
