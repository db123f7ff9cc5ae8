//! Watches of the kinds that policies need, by default while policies need them.
//!
//! Without policies neither Pods nor Namespaces are needed, and Pods are by far the most objects to
//! watch; and of the Nodes only the own one is, unless a ClusterNetworkPolicy selects nodes. The
//! events of the policies pass through here:
//!
//! ```text
//! Reflectors of both kinds of policies ─> Demand ─> events
//!                                           │ starts and drops
//!     Reflectors of Pods, Namespaces and Nodes ─> events
//! ```
//!
//! - While there is no policy, the lists of Pods and Namespaces are complete and empty.
//! - On the first policy, both lists start *before* it is passed on, so that its receiver waits for
//!   the pods it selects; then the watches deliver them. So does the list of all Nodes on the first
//!   policy that selects nodes, in place of that of the own Node.
//! - Where Pods and Namespaces are always wanted, both are watched from the start to the end.
//! - Some time after the last policy was deleted, the watches are dropped and both lists are empty
//!   again, which frees the memory of their objects. The own Node is listed alone again.

use std::collections::HashSet;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::faults::Faults;
use super::reflect::Reflector;
use super::selection::{OwnNode, Selection};
use crate::model::{Delivery, Event, Kind, Object, ObjectRef, TierPeer};
use crate::source::Sender;

const POLICIES: [Kind; 2] = [Kind::NetworkPolicy, Kind::ClusterNetworkPolicy];
/// The kinds that are watched only while a policy exists.
const ON_DEMAND: [Kind; 2] = [Kind::Pod, Kind::Namespace];

/// The receiver of the events was dropped.
struct Closed;

/// The watches of policies, Pods, Namespaces and Nodes.
pub(super) struct Demand<F> {
    /// Creates the reflector of a selection that delivers to a sender.
    reflector: F,
    own: OwnNode,
    sender: Sender,
    faults: Arc<Faults>,
    /// How long the watches continue without a policy.
    linger: Duration,
    /// The kinds of policies whose lists are incomplete.
    listing: HashSet<Kind>,
    /// The policies that were passed on and not deleted.
    policies: HashSet<ObjectRef>,
    /// Those of them that select nodes.
    selecting_nodes: HashSet<ObjectRef>,
    /// The watches of Pods and Namespaces, if they run.
    watches: Option<BoxFuture<'static, ()>>,
    /// When to end them.
    end: Option<Instant>,
    /// The watch of the own Node or of all Nodes.
    nodes: BoxFuture<'static, ()>,
    all_nodes: bool,
    /// Whether all Nodes are watched without a policy, too.
    always_all_nodes: bool,
    /// When to watch the own Node alone again.
    nodes_end: Option<Instant>,
}

impl<F: Fn(Selection, Sender) -> Reflector> Demand<F> {
    pub(super) fn new(
        reflector: F,
        own: OwnNode,
        sender: Sender,
        faults: Arc<Faults>,
        linger: Duration,
    ) -> Self {
        let nodes = reflector(Selection::of(Kind::Node, &own), sender.clone());
        Self {
            reflector,
            own,
            sender,
            faults,
            linger,
            listing: POLICIES.into(),
            policies: HashSet::new(),
            selecting_nodes: HashSet::new(),
            watches: None,
            end: None,
            nodes: nodes.run().boxed(),
            all_nodes: false,
            always_all_nodes: false,
            nodes_end: None,
        }
    }

    /// Sets whether all Nodes are watched without a policy, too.
    pub(super) fn with_all_nodes(mut self, all: bool) -> Self {
        self.always_all_nodes = all;
        if all {
            self.watch_nodes(true);
        }
        self
    }

    /// Runs until the receiver of the events is dropped. `always` says that Pods and Namespaces are
    /// watched without a policy, too.
    pub(super) async fn run(mut self, always: bool) {
        if always && self.begin_watches().await.is_err() {
            return;
        }
        // An event is passed on before the next one is received, so none need be queued here.
        let (sender, mut policies) = mpsc::channel(1);
        let reflectors = POLICIES.map(|kind| self.watch(kind, sender.clone()));
        drop(sender);
        let mut reflectors = join_all(reflectors);
        loop {
            let passed_on = tokio::select! {
                // All end only if the receiver of their events was dropped.
                _ = &mut reflectors => return,
                () = or_never(&mut self.watches) => return,
                () = &mut self.nodes => return,
                Some(delivery) = policies.recv() => self.pass_on(delivery).await,
                () = at(self.end), if !always => self.end_watches().await,
                () = at(self.nodes_end) => {
                    self.watch_nodes(false);
                    Ok(())
                }
            };
            if passed_on.is_err() {
                return;
            }
        }
    }

    fn watch(&self, kind: Kind, sender: Sender) -> BoxFuture<'static, ()> {
        let selection = Selection::of(kind, &self.own);
        (self.reflector)(selection, sender).run().boxed()
    }

    /// Passes on an event about policies, and starts or schedules the end of the watches.
    async fn pass_on(&mut self, delivery: Delivery) -> Result<(), Closed> {
        match &delivery.event {
            Event::ListStarted(kind) => {
                self.listing.insert(*kind);
                self.policies.retain(|policy| policy.kind != *kind);
                self.selecting_nodes.retain(|policy| policy.kind != *kind);
            }
            Event::ListComplete(kind) => {
                self.listing.remove(kind);
                if self.listing.is_empty() && self.watches.is_none() {
                    self.deliver_empty().await?;
                }
            }
            Event::Apply(object) => self.need(object).await?,
            Event::Delete(object) => {
                self.policies.remove(object);
                self.selecting_nodes.remove(object);
            }
            Event::Servers(_) | Event::Routes(_) | Event::Notice(_) => {}
        }
        self.send(delivery).await?;
        let listing = !self.listing.is_empty();
        let needed = listing || !self.policies.is_empty();
        self.end = self.end_of(self.end, self.watches.is_some() && !needed);
        let needed = listing || !self.selecting_nodes.is_empty();
        let needed = needed || self.always_all_nodes;
        self.nodes_end = self.end_of(self.nodes_end, self.all_nodes && !needed);
        Ok(())
    }

    /// Returns when superfluous watches end: at `known` if that was set, otherwise after the linger
    /// time. Returns `None` if they are needed.
    fn end_of(&self, known: Option<Instant>, superfluous: bool) -> Option<Instant> {
        superfluous.then(|| known.unwrap_or_else(|| Instant::now() + self.linger))
    }

    async fn begin_watches(&mut self) -> Result<(), Closed> {
        for kind in ON_DEMAND {
            self.send(Delivery::now(Event::ListStarted(kind))).await?;
        }
        let watches = ON_DEMAND.map(|kind| self.watch(kind, self.sender.clone()));
        self.watches = Some(join_all(watches).map(drop).boxed());
        Ok(())
    }

    /// Starts the watches that a policy needs.
    async fn need(&mut self, policy: &Object) -> Result<(), Closed> {
        let name = policy.reference();
        if self.watches.is_none() {
            tracing::info!("a {} exists; watching Pods and Namespaces", name.kind);
            self.begin_watches().await?;
        }
        if selects_nodes(policy) {
            if !self.all_nodes {
                tracing::info!("{name} selects nodes; watching all Nodes");
                self.watch_nodes(true);
                // After the old watch was dropped, so that none of its events can follow.
                let begun = Event::ListStarted(Kind::Node);
                self.send(Delivery::now(begun)).await?;
            }
            self.selecting_nodes.insert(name.clone());
        } else {
            self.selecting_nodes.remove(&name);
        }
        self.policies.insert(name);
        Ok(())
    }

    /// Watches all Nodes, or only the own one, from a new list on.
    fn watch_nodes(&mut self, all: bool) {
        let selection = match all {
            true => Selection::all_nodes(&self.own),
            false => Selection::of(Kind::Node, &self.own),
        };
        self.nodes = (self.reflector)(selection, self.sender.clone())
            .run()
            .boxed();
        self.all_nodes = all;
        self.nodes_end = None;
        self.faults.end(Kind::Node);
    }

    async fn end_watches(&mut self) -> Result<(), Closed> {
        tracing::info!("the last policy was deleted; no longer watching Pods and Namespaces");
        self.end = None;
        self.watches = None;
        for kind in ON_DEMAND {
            self.faults.end(kind);
        }
        self.deliver_empty().await
    }

    async fn deliver_empty(&mut self) -> Result<(), Closed> {
        for kind in ON_DEMAND {
            self.send(Delivery::now(Event::ListStarted(kind))).await?;
            self.send(Delivery::now(Event::ListComplete(kind))).await?;
        }
        Ok(())
    }

    async fn send(&mut self, delivery: Delivery) -> Result<(), Closed> {
        self.sender.send(delivery).await.map_err(|_| Closed)
    }
}

fn selects_nodes(policy: &Object) -> bool {
    let Object::ClusterNetworkPolicy(policy) = policy else {
        return false;
    };
    let peers = policy.egress.iter().filter_map(|rule| rule.peers.as_ref());
    peers
        .flatten()
        .any(|peer| matches!(peer, TierPeer::Nodes(_)))
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
