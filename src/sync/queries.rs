//! What other threads ask of the thread that knows the policies and writes the rules.

use std::net::IpAddr;

use tokio::sync::{mpsc, oneshot};

use super::driver::State;
use super::{Kernel, Reconciler};
use crate::model::ObjectName;
use crate::netlink::Error;
use crate::nft::Transaction;
use crate::policies::Connection;

/// Something for the loop that changes nothing of what the objects ask for.
#[derive(Debug)]
pub enum Query {
    /// Which of these connections the policies deny.
    Judge {
        /// The connections.
        connections: Vec<Connection>,
        /// Receives an entry for each, in order; nothing while it is unknown what is in force.
        answer: oneshot::Sender<Option<Vec<bool>>>,
    },
    /// Which pods have these addresses.
    Pods {
        /// The addresses.
        addresses: [IpAddr; 2],
        /// Receives the pod of each, as far as it is known.
        answer: oneshot::Sender<[Option<ObjectName>; 2]>,
    },
    /// Elements that packets added to the services' tables are to be removed.
    Remove(Removal),
}

/// A removal of elements that packets added to the services' tables.
#[derive(Debug)]
pub struct Removal {
    /// The operations.
    pub transaction: Transaction,
    /// The changes of services with session affinity that it takes into account.
    pub affinity_version: u64,
    /// Receives the outcome.
    pub answer: oneshot::Sender<Removed>,
}

/// The outcome of a [`Removal`].
#[derive(Debug)]
pub enum Removed {
    /// The elements were removed.
    Done,
    /// Services changed meanwhile; the changes were handed over.
    Outdated,
    /// It is unknown what is in force. When it is known again, a change is handed over.
    Unknown,
    /// The kernel refused it; nothing was removed.
    Failed(Error),
}

impl<K: Kernel> Reconciler<'_, K> {
    /// Answers a query.
    pub fn answer(&mut self, query: Query) {
        match query {
            Query::Judge {
                connections,
                answer,
            } => {
                // The other thread may have ended.
                let _ = answer.send(self.denied(&connections));
            }
            Query::Pods { addresses, answer } => {
                let _ = answer.send(addresses.map(|address| self.pod_at(address)));
            }
            Query::Remove(removal) => {
                let removed = self.remove(removal.transaction, removal.affinity_version);
                let _ = removal.answer.send(removed);
            }
        }
    }

    /// Returns which connections the rules in force deny; `None` while these are unknown.
    fn denied(&self, connections: &[Connection]) -> Option<Vec<bool>> {
        let policies = self.policies.as_ref()?;
        let is_denied = |connection| !policies.engine.allows(connection);
        (policies.state == State::Synced).then(|| connections.iter().map(is_denied).collect())
    }

    fn pod_at(&self, address: IpAddr) -> Option<ObjectName> {
        let policies = self.policies.as_ref()?;
        policies.engine.pod_at(address).cloned()
    }

    /// Removes elements that packets added, if the plans in force are those by which they were chosen.
    pub fn remove(&mut self, transaction: Transaction, affinity_version: u64) -> Removed {
        if self.services.state != State::Synced {
            return Removed::Unknown;
        }
        if self.followers.affinity_version() != affinity_version {
            return Removed::Outdated;
        }
        match self.kernel.write(transaction, &mut 0) {
            Ok(()) => Removed::Done,
            Err(error) => Removed::Failed(error),
        }
    }
}

/// Waits for the next query; for ever without other threads.
pub(super) async fn next(queries: &mut Option<mpsc::Receiver<Query>>) -> Option<Query> {
    match queries {
        Some(queries) => queries.recv().await,
        None => None,
    }
}
