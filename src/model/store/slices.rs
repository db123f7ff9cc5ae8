//! The slices of one service, by port.

use std::collections::HashMap;

use smallvec::SmallVec;

use super::EndpointOf;
use crate::model::{EndpointSlice, Family, Protocol, ServicePort};

/// The slices of one service, which are looked through once for all of its ports.
#[derive(Debug)]
pub struct SlicesOf<'a> {
    slices: Vec<&'a EndpointSlice>,
    /// By the name and protocol of a port: the places of the slices that have it, with its number.
    by_port: HashMap<(&'a str, Protocol), SmallVec<[(usize, u16); 2]>>,
}

impl<'a> SlicesOf<'a> {
    pub(super) fn new(slices: impl Iterator<Item = &'a EndpointSlice>) -> Self {
        let slices: Vec<&EndpointSlice> = slices.collect();
        let mut by_port: HashMap<_, SmallVec<[(usize, u16); 2]>> = HashMap::new();
        for (place, slice) in slices.iter().enumerate() {
            for port in &slice.ports {
                let key = (&*port.name, port.protocol);
                by_port.entry(key).or_default().push((place, port.port));
            }
        }
        Self { slices, by_port }
    }

    /// The slices, sorted by name.
    pub fn all(&self) -> impl Iterator<Item = &'a EndpointSlice> + '_ {
        self.slices.iter().copied()
    }

    /// The slices that have a service port in one family, with their places in [`SlicesOf::all`]
    /// and the port that the pods listen on.
    pub fn of(&self, port: &ServicePort, family: Family) -> Vec<(usize, &'a EndpointSlice, u16)> {
        let found = self.by_port.get(&(&*port.name, port.protocol));
        let found = found.into_iter().flatten();
        let of_family = found.filter_map(|(place, number)| {
            let slice = *self.slices.get(*place)?;
            (slice.family == family).then_some((*place, slice, *number))
        });
        of_family.collect()
    }

    /// The endpoints of a service port in one family, sorted by address and port, each once.
    ///
    /// The same address and port in several slices, or twice in one, counts once; of a
    /// terminating and another entry the other one counts (kube-proxy's `endpointslicecache.go`).
    pub fn endpoints(&self, port: &ServicePort, family: Family) -> Vec<EndpointOf<'a>> {
        let mut found: Vec<EndpointOf> = self
            .of(port, family)
            .into_iter()
            .flat_map(|(_, slice, port)| {
                let endpoints = slice.endpoints.iter();
                endpoints.map(move |endpoint| EndpointOf { endpoint, port })
            })
            .collect();
        found.sort_by_key(|e| (e.target(), e.endpoint.terminating));
        found.dedup_by_key(|e| e.target());
        found
    }
}
