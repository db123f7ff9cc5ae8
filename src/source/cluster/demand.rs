//! Watches of Pods and Namespaces, by default while a NetworkPolicy exists.
//!
//! Without policies neither is needed, and Pods are by far the most objects to watch. The events of
//! the NetworkPolicies pass through here:
//!
//! ```text
//! Reflector of NetworkPolicies ─> Demand ─> events
//!                                   │ starts and drops
//!              Reflectors of Pods and Namespaces ─> events
//! ```
//!
//! - While there is no policy, the lists of Pods and Namespaces are complete and empty.
//! - On the first policy, both lists start *before* it is passed on, so that its receiver waits for
//!   the pods it selects; then the watches deliver them.
//! - Where they are always wanted, both are watched from the start to the end.
//! - Some time after the last policy was deleted, the watches are dropped and both lists are empty
//!   again, which frees the memory of their objects.

use std::collections::HashSet;
use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::faults::Faults;
use super::reflect::Reflector;
use crate::model::{Delivery, Event, Kind, ObjectName};
use crate::source::Sender;

/// The kinds that are watched only while a policy exists.
const ON_DEMAND: [Kind; 2] = [Kind::Pod, Kind::Namespace];
/// The kinds that are not watched.
const UNWATCHED: [Kind; 1] = [Kind::ClusterNetworkPolicy];

/// The receiver of the events was dropped.
struct Closed;

/// The watches of NetworkPolicies, Pods and Namespaces.
pub(super) struct Demand<F> {
    /// Creates the reflector of a kind that delivers to a sender.
    reflector: F,
    sender: Sender,
    faults: Arc<Faults>,
    /// How long the watches continue without a policy.
    linger: Duration,
    /// The policies that were passed on and not deleted.
    policies: HashSet<ObjectName>,
    /// Whether the list of policies is incomplete.
    listing: bool,
    /// The watches of Pods and Namespaces, if they run.
    watches: Option<BoxFuture<'static, ()>>,
    /// When to end them.
    end: Option<Instant>,
}

impl<F: Fn(Kind, Sender) -> Reflector> Demand<F> {
    pub(super) fn new(reflector: F, sender: Sender, faults: Arc<Faults>, linger: Duration) -> Self {
        Self {
            reflector,
            sender,
            faults,
            linger,
            policies: HashSet::new(),
            listing: true,
            watches: None,
            end: None,
        }
    }

    /// Runs until the receiver of the events is dropped. `always` says that Pods and Namespaces are
    /// watched without a policy, too.
    pub(super) async fn run(mut self, always: bool) {
        if always && self.begin_watches().await.is_err() {
            return;
        }
        // An event is passed on before the next one is received, so none need be queued here.
        let (sender, mut policies) = mpsc::channel(1);
        let mut reflector = pin!((self.reflector)(Kind::NetworkPolicy, sender).run());
        loop {
            let passed_on = tokio::select! {
                // Both end only if the receiver of their events was dropped.
                () = &mut reflector => return,
                () = or_never(&mut self.watches) => return,
                Some(delivery) = policies.recv() => self.pass_on(delivery).await,
                () = at(self.end), if !always => self.end_watches().await,
            };
            if passed_on.is_err() {
                return;
            }
        }
    }

    /// Passes on an event about policies, and starts or schedules the end of the watches.
    async fn pass_on(&mut self, delivery: Delivery) -> Result<(), Closed> {
        match &delivery.event {
            Event::ListStarted(_) => {
                self.listing = true;
                self.policies.clear();
            }
            Event::ListComplete(_) => {
                self.listing = false;
                self.deliver_empty(&UNWATCHED).await?;
                if self.watches.is_none() {
                    self.deliver_empty(&ON_DEMAND).await?;
                }
            }
            Event::Apply(object) => {
                self.policies.insert(object.reference().name);
                if self.watches.is_none() {
                    tracing::info!("a NetworkPolicy exists; watching Pods and Namespaces");
                    self.begin_watches().await?;
                }
            }
            Event::Delete(object) => {
                self.policies.remove(&object.name);
            }
            Event::Servers(_) | Event::Routes(_) | Event::Notice(_) => {}
        }
        self.send(delivery).await?;
        let needed = self.listing || !self.policies.is_empty();
        if needed || self.watches.is_none() {
            self.end = None;
        } else if self.end.is_none() {
            self.end = Some(Instant::now() + self.linger);
        }
        Ok(())
    }

    async fn begin_watches(&mut self) -> Result<(), Closed> {
        for kind in ON_DEMAND {
            self.send(Delivery::now(Event::ListStarted(kind))).await?;
        }
        let watches = ON_DEMAND.map(|kind| (self.reflector)(kind, self.sender.clone()).run());
        self.watches = Some(join_all(watches).map(drop).boxed());
        Ok(())
    }

    async fn end_watches(&mut self) -> Result<(), Closed> {
        tracing::info!(
            "the last NetworkPolicy was deleted; no longer watching Pods and Namespaces"
        );
        self.end = None;
        self.watches = None;
        for kind in ON_DEMAND {
            self.faults.end(kind);
        }
        self.deliver_empty(&ON_DEMAND).await
    }

    async fn deliver_empty(&mut self, kinds: &[Kind]) -> Result<(), Closed> {
        for kind in kinds {
            self.send(Delivery::now(Event::ListStarted(*kind))).await?;
            self.send(Delivery::now(Event::ListComplete(*kind))).await?;
        }
        Ok(())
    }

    async fn send(&mut self, delivery: Delivery) -> Result<(), Closed> {
        self.sender.send(delivery).await.map_err(|_| Closed)
    }
}

/// Awaits a future, if there is one, else never returns.
async fn or_never(future: &mut Option<BoxFuture<'static, ()>>) {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}

/// Sleeps until an instant, if there is one, else never returns.
async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => pending().await,
    }
}
