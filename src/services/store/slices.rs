//! The slices of one service, by port.

use std::cmp::Reverse;

use foldhash::{HashMap, HashMapExt};
use smallvec::SmallVec;

use super::EndpointOf;
use crate::model::{Endpoint, EndpointSlice, Family, Protocol, ServicePort};

/// The places of the slices that have a port, with its number.
type Places = SmallVec<[(usize, u16); 2]>;

/// The slices of one service, which are looked through once for all of its ports.
#[derive(Debug)]
pub(crate) struct SlicesOf<'a> {
    slices: Vec<&'a EndpointSlice>,
    /// By the name and protocol of a port.
    by_port: HashMap<(&'a str, Protocol), Places>,
}

impl<'a> SlicesOf<'a> {
    pub(super) fn new(slices: impl Iterator<Item = &'a EndpointSlice>) -> Self {
        let slices: Vec<&EndpointSlice> = slices.collect();
        let mut by_port: HashMap<_, Places> = HashMap::new();
        for (place, slice) in slices.iter().enumerate() {
            for port in &slice.ports {
                let key = (&*port.name, port.protocol);
                by_port.entry(key).or_default().push((place, port.port));
            }
        }
        Self { slices, by_port }
    }

    /// Returns the slices, sorted by name.
    pub fn all(&self) -> impl Iterator<Item = &'a EndpointSlice> + '_ {
        self.slices.iter().copied()
    }

    /// Returns the slices of one family with a service port, with their places in [`SlicesOf::all`]
    /// and the target port.
    pub fn of(&self, port: &ServicePort, family: Family) -> Vec<(usize, &'a EndpointSlice, u16)> {
        let found = self.by_port.get(&(&*port.name, port.protocol));
        let found = found.into_iter().flatten();
        let of_family = found.filter_map(|(place, number)| {
            let slice = *self.slices.get(*place)?;
            (slice.family == family).then_some((*place, slice, *number))
        });
        of_family.collect()
    }

    /// Returns the endpoints of a service port in one family, sorted by address and port, each
    /// once.
    ///
    /// Of several with the same address and port the first of these wins: not terminating, ready,
    /// serving, in the newer slice, later in its slice.
    pub fn endpoints(&self, port: &ServicePort, family: Family) -> Vec<EndpointOf<'a>> {
        let mut slices = self.of(port, family);
        // A slice in a file has no date and counts as newest, as services do.
        slices
            .sort_by_key(|(_, slice, _)| Reverse((slice.created.unwrap_or(i64::MAX), &slice.name)));
        let found = slices.into_iter().flat_map(|(_, slice, port)| {
            let endpoints = slice.endpoints.iter().rev();
            endpoints.map(move |endpoint| EndpointOf { endpoint, port })
        });
        let mut found: Vec<EndpointOf> = found.collect();
        // The sort is stable, so the newest of equal ones stays first.
        found.sort_by_key(|e| {
            let Endpoint {
                terminating,
                ready,
                serving,
                ..
            } = *e.endpoint;
            (e.target(), terminating, !ready, !serving)
        });
        found.dedup_by_key(|e| e.target());
        found
    }
}
