//! The changes.
//!
//! Nineteen of twenty changes replace an endpoint by one with another address; the others add or
//! take one. One change in five is about a live service; what changes there depends on the service
//! ([`Pattern`]).

use std::net::Ipv4Addr;
use std::sync::Arc;

use super::live::{self, Live, Pattern};
use nftlet_lab::cluster::{Cluster, Condition, Endpoint, Put, Random, Size};

/// One change of so many is about a live service, and one of another number of endpoints.
const LIVE: usize = 5;
const COUNT: usize = 20;
/// By how many the endpoints of a service may be more or less than at first.
const SPREAD: usize = 2;
/// How many endpoints of a rollout come at once.
const SURGE: usize = 3;

/// A cluster whose endpoints change.
pub struct Changes {
    cluster: Cluster,
    size: Size,
    live: Arc<Live>,
    random: Random,
    /// The last byte of the newest address of each live service.
    newest: Vec<u8>,
}

impl Changes {
    /// Returns a cluster whose live services have endpoints that answer.
    pub fn new(size: Size, live: Arc<Live>) -> Self {
        let mut changes = Self {
            cluster: Cluster::new(size),
            size,
            random: Random::default(),
            newest: vec![0; live.count()],
            live,
        };
        for number in 0..changes.live.count() {
            let service = live::place(number);
            let count = live::pattern(number).endpoints(size);
            let endpoints: Vec<_> = (0..count).map(|_| changes.endpoint(service)).collect();
            changes.cluster.endpoints[service] = endpoints;
        }
        changes
    }

    pub fn objects(&self) -> impl Iterator<Item = Put> + '_ {
        self.cluster.objects()
    }

    /// Makes a change.
    pub fn change(&mut self) -> Put {
        if self.random.below(LIVE) > 0 {
            let service = self.random.below(self.size.services);
            if live::at(service).is_none() {
                return self.replace_or_resize(service);
            }
        }
        let number = self.random.below(self.live.count());
        let service = live::place(number);
        let endpoints = &self.cluster.endpoints[service];
        let now = endpoints.len();
        match live::pattern(number) {
            Pattern::Usual => self.replace_or_resize(service),
            Pattern::NoneOrOne => self.resize(service, now == 0),
            Pattern::Around64 => {
                let more = self.random.below(2) == 0;
                self.resize(service, now == live::FEWEST || more && now < live::MOST)
            }
            Pattern::Rollout => {
                let draining = |it: &Endpoint| it.condition == Condition::Draining;
                if let Some(place) = endpoints.iter().position(draining) {
                    self.edit(service, |endpoints| _ = endpoints.remove(place))
                } else if now < self.size.endpoints + SURGE {
                    self.resize(service, true)
                } else {
                    self.edit(service, |endpoints| {
                        let oldest = endpoints.iter_mut().take(SURGE);
                        oldest.for_each(|it| it.condition = Condition::Draining);
                    })
                }
            }
        }
    }

    fn replace_or_resize(&mut self, service: usize) -> Put {
        let now = self.cluster.endpoints[service].len();
        if self.random.below(COUNT) > 0 {
            let (chosen, other) = (self.random.below(now), self.endpoint(service));
            return self.edit(service, |endpoints| endpoints[chosen] = other);
        }
        let more = match now {
            most if most >= self.size.endpoints + SPREAD => false,
            least if least + SPREAD <= self.size.endpoints => true,
            _ => self.random.below(2) == 0,
        };
        self.resize(service, more)
    }

    /// Adds an endpoint, or removes one.
    fn resize(&mut self, service: usize, more: bool) -> Put {
        if more {
            let other = self.endpoint(service);
            return self.edit(service, |endpoints| endpoints.push(other));
        }
        let chosen = self.random.below(self.cluster.endpoints[service].len());
        self.edit(service, |endpoints| _ = endpoints.remove(chosen))
    }

    /// Edits the endpoints of a service. Addresses of a live one that get no new connections any
    /// more are released.
    fn edit(&mut self, service: usize, edit: impl FnOnce(&mut Vec<Endpoint>)) -> Put {
        let before = self.ready(service);
        let put = self.cluster.edit(service, edit);
        if let Some(number) = live::at(service) {
            let after = self.ready(service);
            let released = before.iter().filter(|it| !after.contains(it));
            released.for_each(|address| self.live.release(*address));
            self.live.set_empty(number, after.is_empty());
        }
        put
    }

    fn ready(&self, service: usize) -> Vec<Ipv4Addr> {
        let endpoints = self.cluster.endpoints[service].iter();
        let ready = endpoints.filter(|it| it.condition == Condition::Ready);
        ready.map(|it| it.address).collect()
    }

    /// Returns another endpoint for a service.
    fn endpoint(&mut self, service: usize) -> Endpoint {
        let mut endpoint = self.cluster.endpoint();
        if let Some(number) = live::at(service) {
            endpoint.address = self.live.take(number, self.newest[number]);
            self.newest[number] = endpoint.address.octets()[3];
        }
        endpoint
    }
}
