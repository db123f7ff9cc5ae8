//! The way of work from the reconciler to the cleaner.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Judgement, Work};
use crate::netlink::Flow;

/// Makes a queue. It holds one piece of work at most: what is sent while some waits is merged
/// into it, so that neither side ever waits for the other.
pub fn queue() -> (Queue, Pending) {
    let shared = Arc::new(Shared::default());
    (Queue(shared.clone()), Pending(shared))
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    work: Work,
    closed: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock, and the state is whole at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sending end. The queue is closed when it goes away; what waits is still received.
#[derive(Debug)]
pub struct Queue(Arc<Shared>);

impl Queue {
    /// Adds work.
    pub fn send(&self, work: Work) {
        if !work.is_empty() {
            self.0.state().work.merge(work);
            self.0.changed.notify_one();
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.0.state().closed = true;
        self.0.changed.notify_one();
    }
}

/// The receiving end.
#[derive(Debug)]
pub struct Pending(Arc<Shared>);

/// What receiving gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// Work to do.
    Work(Work),
    /// The time is over.
    Nothing,
    /// There will be no more.
    Closed,
}

impl Pending {
    /// Takes the work that waits, if there is some.
    pub fn take(&self) -> Option<Work> {
        let work = std::mem::take(&mut self.0.state().work);
        (!work.is_empty()).then_some(work)
    }

    /// Waits for work, where a limit is given not longer than that.
    pub fn receive(&self, limit: Option<Duration>) -> Received {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let mut state = self.0.state();
        loop {
            if !state.work.is_empty() {
                return Received::Work(std::mem::take(&mut state.work));
            }
            if state.closed {
                return Received::Closed;
            }
            let waited = match deadline {
                None => self.0.changed.wait(state).map_err(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Received::Nothing;
                    }
                    let waited = self.0.changed.wait_timeout(state, left);
                    let waited = waited.unwrap_or_else(PoisonError::into_inner);
                    Ok(waited.0)
                }
            };
            state = waited.unwrap_or_else(|state| state);
        }
    }

    /// Whether the work that waits keeps a flow: an endpoint may have come since the work at
    /// hand was taken.
    pub fn keeps(&self, flow: &Flow, node_port_addresses: &HashSet<IpAddr>) -> bool {
        let state = self.0.state();
        state.work.judge(flow, node_port_addresses) == Judgement::Kept
    }
}
