//! Measures the time from an event until its rules are in force.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::metrics::SyncMetrics;
use crate::model::{Delivery, Event, Kind, ObjectName};

/// The most events that are timed at once, which bounds memory while writes fail.
const MOST_WAITING: usize = 1 << 16;

/// The times of events whose rules are not in force yet.
#[derive(Debug, Default)]
pub(super) struct Latency {
    /// Arrival times, with the service that the event is about.
    arrived: Vec<(Option<ObjectName>, Instant)>,
    /// Arrival times of events that only policies use.
    for_policies: Vec<Instant>,
    /// Times of changes of endpoints, in milliseconds since 1970.
    triggered: Vec<(ObjectName, i64)>,
    /// The times of services that are written in portions.
    deferred: HashMap<ObjectName, Times>,
    /// The number of changed Services and EndpointSlices.
    pending: (usize, usize),
}

#[derive(Debug, Default)]
struct Times {
    arrived: Vec<Instant>,
    triggered: Vec<i64>,
}

impl Latency {
    /// Records an event.
    pub(crate) fn arrived(&mut self, delivery: &Delivery) {
        match delivery.event.kind() {
            Some(Kind::Service) => self.pending.0 += 1,
            Some(Kind::EndpointSlice) => self.pending.1 += 1,
            _ => {}
        }
        let counts = !matches!(
            delivery.event,
            Event::Servers(_) | Event::Routes(_) | Event::Notice(_)
        );
        if !counts {
            return;
        }
        let kind = delivery.event.kind();
        if kind.is_some_and(|kind| Kind::POLICY.contains(&kind)) {
            push(&mut self.for_policies, delivery.at);
        } else if self.arrived.len() < MOST_WAITING {
            let service = delivery.event.service().cloned();
            self.arrived.push((service, delivery.at));
        }
    }

    /// Records changes of endpoints.
    pub(crate) fn triggered(&mut self, changes: Vec<(ObjectName, i64)>) {
        self.triggered.extend(changes);
        self.triggered.truncate(MOST_WAITING);
    }

    /// Returns the number of Services and EndpointSlices whose changes are not in force. A Service that is
    /// written in portions counts once.
    pub(crate) fn pending(&self) -> (usize, usize) {
        self.pending
    }

    /// Measures the events of services, except those for which `is_waiting` returns true.
    pub(crate) fn in_force(
        &mut self,
        metrics: &SyncMetrics,
        is_waiting: impl Fn(&ObjectName) -> bool,
    ) {
        for (service, at) in self.arrived.drain(..) {
            match service.filter(&is_waiting) {
                Some(service) => {
                    let times = self.deferred.entry(service).or_default();
                    push(&mut times.arrived, at);
                }
                None => metrics.programmed(at.elapsed()),
            }
        }
        for (service, at) in self.triggered.drain(..) {
            if is_waiting(&service) {
                let times = self.deferred.entry(service).or_default();
                push(&mut times.triggered, at);
            } else {
                observe_trigger(metrics, at);
            }
        }
        self.deferred.retain(|service, times| {
            if is_waiting(service) {
                return true;
            }
            for at in &times.arrived {
                metrics.programmed(at.elapsed());
            }
            for at in &times.triggered {
                observe_trigger(metrics, *at);
            }
            false
        });
        // Those of which portions wait.
        self.pending = (self.deferred.len(), 0);
    }

    /// Measures the events that only policies use.
    pub(crate) fn policies_in_force(&mut self, metrics: &SyncMetrics) {
        for at in self.for_policies.drain(..) {
            metrics.programmed(at.elapsed());
        }
    }

    /// Returns whether all events were measured.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.arrived.is_empty()
            && self.for_policies.is_empty()
            && self.triggered.is_empty()
            && self.deferred.is_empty()
    }
}

fn push<T>(times: &mut Vec<T>, time: T) {
    if times.len() < MOST_WAITING {
        times.push(time);
    }
}

fn observe_trigger(metrics: &SyncMetrics, at_ms: i64) {
    if let Some(since) = milliseconds_since(at_ms) {
        metrics.network_programming(since);
    }
}

/// Returns the time since a moment in milliseconds since 1970; `None` if it is in the future.
fn milliseconds_since(moment: i64) -> Option<Duration> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.ok()?
        .checked_sub(Duration::from_millis(u64::try_from(moment).ok()?))
}
