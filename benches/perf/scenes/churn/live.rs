//! The live services: those with endpoints that answer.
//!
//! The service in place 50 of every hundred is live: a plain one with a ClusterIP alone. The third
//! byte of its endpoints' addresses is the number of the live service, so that an answer shows
//! whose endpoint gave it. The time at which an endpoint leaves its service is noted, so that an
//! answer of an endpoint that left long before is a failure. So is a refusal, unless the service had
//! no endpoints just before.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nftlet_lab::cluster::Size;

/// One service of so many is live, in this place.
const EVERY: usize = 100;
const PLACE: usize = 50;
/// Addresses of a live service, in use or not.
const ADDRESSES: u8 = 250;
/// How much later a replaced endpoint may still answer: far beyond what a change takes, so that
/// only lost changes show.
const GRACE: Duration = Duration::from_secs(1);
/// As the time of leaving, or of the end of a state: it has not left, and the state lasts.
const IN_USE: u64 = u64::MAX;
/// Between how many endpoints those of [`Pattern::Around64`] go up and down.
pub const FEWEST: usize = 60;
pub const MOST: usize = 70;

/// How the endpoints of a live service change.
#[derive(Clone, Copy, Debug)]
pub enum Pattern {
    /// As those of other services.
    Usual,
    /// From one to none and back.
    NoneOrOne,
    /// More and less, around the number of 64.
    Around64,
    /// A rollout after the other: some more, then as many drain and leave.
    Rollout,
}

impl Pattern {
    /// Returns how many endpoints a service has at first.
    pub fn endpoints(self, size: Size) -> usize {
        match self {
            Self::Usual | Self::Rollout => size.endpoints,
            Self::NoneOrOne => 1,
            Self::Around64 => FEWEST,
        }
    }
}

/// Returns the pattern of a live service by its number.
pub fn pattern(number: usize) -> Pattern {
    match number % 8 {
        1 => Pattern::NoneOrOne,
        2 => Pattern::Around64,
        3 => Pattern::Rollout,
        _ => Pattern::Usual,
    }
}

/// The addresses of all live services, with the times at which they left, in milliseconds since
/// the beginning.
pub struct Live {
    began: Instant,
    left: Vec<Vec<AtomicU64>>,
    /// When each service got its first endpoint after it had none.
    empty: Vec<AtomicU64>,
}

/// Parses the size of a cluster that has live services, and room for their endpoints.
pub fn size(text: &str) -> Result<Size, String> {
    let size: Size = text.parse()?;
    if !(1..=256).contains(&count(size)) || size.endpoints < 4 {
        return Err("churn needs 100 to 25,600 services with 4 endpoints or more".to_owned());
    }
    Ok(size)
}

fn count(size: Size) -> usize {
    (size.services + EVERY - PLACE - 1) / EVERY
}

/// Returns the place of a live service among all.
pub fn place(live: usize) -> usize {
    live * EVERY + PLACE
}

/// Returns which live service is in a place among all.
pub fn at(place: usize) -> Option<usize> {
    (place % EVERY == PLACE).then_some(place / EVERY)
}

impl Live {
    /// Returns the live services of a cluster; none of their addresses is in use.
    pub fn new(size: Size) -> Self {
        let addresses = || (0..=ADDRESSES).map(|_| AtomicU64::new(0)).collect();
        Self {
            began: Instant::now(),
            left: (0..count(size)).map(|_| addresses()).collect(),
            empty: (0..count(size)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Returns how many services are live.
    pub fn count(&self) -> usize {
        self.left.len()
    }

    /// Takes an unused address of a service into use: the next one behind a number.
    pub fn take(&self, service: usize, behind: u8) -> Ipv4Addr {
        let most = u16::from(ADDRESSES);
        let next = |step| ((u16::from(behind) + step - 1) % most + 1) as u8;
        let unused = |last: &u8| self.left(service, *last).load(Ordering::Relaxed) != IN_USE;
        let last = (1..=most).map(next).find(unused);
        let last = last.expect("more addresses than endpoints");
        self.left(service, last).store(IN_USE, Ordering::Relaxed);
        Ipv4Addr::new(10, 200, service as u8, last)
    }

    /// Notes that an address is no longer in use.
    pub fn release(&self, address: Ipv4Addr) {
        let [_, _, service, last] = address.octets();
        self.left(service.into(), last)
            .store(self.now(), Ordering::Relaxed);
    }

    /// Notes whether a service has no endpoints.
    pub fn set_empty(&self, service: usize, empty: bool) {
        let noted = &self.empty[service];
        if empty {
            noted.store(IN_USE, Ordering::Relaxed);
        } else if noted.load(Ordering::Relaxed) == IN_USE {
            noted.store(self.now(), Ordering::Relaxed);
        }
    }

    /// Returns whether a service had no endpoints a short time before a client began to connect, or
    /// later.
    pub fn may_refuse(&self, service: usize, began: Instant) -> bool {
        let empty = self.empty[service].load(Ordering::Relaxed);
        empty > 0 && (empty == IN_USE || self.since(empty, began) < GRACE)
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    fn since(&self, noted: u64, now: Instant) -> Duration {
        now.saturating_duration_since(self.began + Duration::from_millis(noted))
    }

    fn left(&self, service: usize, last: u8) -> &AtomicU64 {
        &self.left[service][usize::from(last)]
    }

    /// Returns what is wrong with the address that answered for a service to a client that began
    /// to connect at a time.
    pub fn fault(&self, service: usize, address: Ipv4Addr, began: Instant) -> Option<String> {
        let [first, second, third, last] = address.octets();
        if (first, second, usize::from(third)) != (10, 200, service) || last > ADDRESSES {
            return Some(format!("{address} answered, of another service"));
        }
        let left = self.left(service, last).load(Ordering::Relaxed);
        if left == IN_USE {
            return None;
        }
        let late = self.since(left, began);
        (late > GRACE).then(|| format!("{address} answered, no endpoint since {late:.1?}"))
    }
}
