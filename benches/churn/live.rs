//! The live services: those with endpoints that answer.
//!
//! The service in place 50 of every hundred is live: a plain one with a ClusterIP alone. The third
//! byte of its endpoints' addresses is the number of the live service, so an answer tells whose
//! endpoint gave it. When an endpoint leaves its service is noted, so it can also be told whether
//! it should have been asked.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::cluster::Size;

/// The port that endpoints answer on.
pub const PORT: u16 = 8080;
/// One service of so many is live, in this place.
const EVERY: usize = 100;
const PLACE: usize = 50;
/// Addresses of a live service, in use or not.
const ADDRESSES: u8 = 250;
/// How much later a replaced endpoint may still be asked. It is far beyond what a change takes, so
/// that only what is lost shows.
const GRACE: Duration = Duration::from_secs(1);
/// As the time of leaving: it has not left.
const IN_USE: u64 = u64::MAX;

/// What is known of all live endpoints. Times are milliseconds since the beginning.
pub struct Live {
    began: Instant,
    services: Vec<Vec<AtomicU64>>,
}

/// Whether a cluster has live services, and room for their endpoints.
pub fn check(size: Size) -> Result<(), String> {
    let live = count(size);
    if !(1..=256).contains(&live) || !(4..=100).contains(&size.endpoints) {
        return Err(
            "churn needs a cluster of 100 to 25,600 services with 4 to 100 endpoints".to_owned(),
        );
    }
    Ok(())
}

fn count(size: Size) -> usize {
    (size.services + EVERY - PLACE - 1) / EVERY
}

/// The place of a live service among all.
pub fn place(live: usize) -> usize {
    live * EVERY + PLACE
}

/// Which live service is in a place among all.
pub fn at(place: usize) -> Option<usize> {
    (place % EVERY == PLACE).then_some(place / EVERY)
}

/// The ClusterIP of a live service.
pub fn cluster_ip(live: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 64, 0, 0)) + 1 + place(live) as u32)
}

impl Live {
    /// The live services of a cluster; none of their addresses is in use.
    pub fn new(size: Size) -> Self {
        let addresses = || (0..=ADDRESSES).map(|_| AtomicU64::new(0)).collect();
        Self {
            began: Instant::now(),
            services: (0..count(size)).map(|_| addresses()).collect(),
        }
    }

    /// How many services are live.
    pub fn count(&self) -> usize {
        self.services.len()
    }

    /// Takes an address of a service into use that is not: the next one behind a number.
    pub fn take(&self, service: usize, behind: u8) -> Ipv4Addr {
        let free = (1..=ADDRESSES)
            .map(|step| {
                ((u16::from(behind) + u16::from(step) - 1) % u16::from(ADDRESSES) + 1) as u8
            })
            .find(|last| self.left(service, *last).load(Ordering::Relaxed) != IN_USE);
        let last = free.expect("more addresses than endpoints");
        self.left(service, last).store(IN_USE, Ordering::Relaxed);
        Ipv4Addr::new(10, 200, service as u8, last)
    }

    /// An address of a live service is no longer in use.
    pub fn release(&self, address: Ipv4Addr) {
        let [_, _, service, last] = address.octets();
        let now = self.began.elapsed().as_millis() as u64;
        self.left(service.into(), last)
            .store(now, Ordering::Relaxed);
    }

    fn left(&self, service: usize, last: u8) -> &AtomicU64 {
        &self.services[service][usize::from(last)]
    }

    /// What is wrong with an address that answered for a service to a client who began to ask at
    /// this moment.
    pub fn fault(&self, service: usize, address: Ipv4Addr, asked: Instant) -> Option<String> {
        let [first, second, third, last] = address.octets();
        if (first, second, usize::from(third)) != (10, 200, service) || last > ADDRESSES {
            return Some(format!("{address} answered, of another service"));
        }
        let left = self.left(service, last).load(Ordering::Relaxed);
        if left == IN_USE {
            return None;
        }
        let left = self.began + Duration::from_millis(left);
        let late = asked.saturating_duration_since(left);
        (late > GRACE).then(|| format!("{address} answered, no endpoint since {late:.1?}"))
    }
}
