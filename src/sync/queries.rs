//! Queries from other threads to the main loop, which owns the policies and writes the rules.

use std::fmt;
use std::time::SystemTime;

use tokio::sync::{mpsc, oneshot};

use super::driver::DriverState;
use super::policy_times::PolicyTimes;
use super::{Controller, Kernel};
use crate::model::{ObjectName, ObjectRef};
use crate::netlink::Error;
use crate::nft::Transaction;
use crate::policies::{self, Connection, Direction, KnownProfiles};
use crate::services;

/// A request to the main loop that does not change the wanted rules.
#[derive(Debug)]
pub enum Query {
    /// Evaluates which connections the policies deny.
    Evaluate {
        connections: Vec<Connection>,
        /// Receives a flag for each connection, in order; `None` while the rules in force are unknown.
        answer: oneshot::Sender<Option<Vec<bool>>>,
    },
    /// Names the pods at both ends of a connection, and the policies that deny it, or would.
    Names {
        connection: Connection,
        /// The direction in which it is denied.
        direction: Direction,
        /// Whether audited policies would deny it.
        audited: bool,
        /// Receives the names.
        answer: oneshot::Sender<Names>,
    },
    /// Removes elements that packets added to the tables of services.
    Remove(ElementRemoval),
    /// Looks at the objects and at the state of the rules. Takes a millisecond at most.
    Look(Look),
}

/// The names in a connection that is denied, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// The pod that opened it, if known.
    pub source: Option<ObjectName>,
    /// The pod that would answer, if known.
    pub destination: Option<ObjectName>,
    /// The policies that isolate the pod for the direction, or the one whose rule denies. None if the
    /// policies changed since.
    pub policies: Vec<ObjectName>,
}

/// A function that looks at the objects and at the state of the rules.
pub struct Look(pub Box<dyn FnOnce(&View) + Send>);

impl fmt::Debug for Look {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Look")
    }
}

/// The objects and the state of the rules.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub services: &'a services::Engine,
    pub policies: Option<&'a policies::Engine>,
    /// Whether the rules of services are those of the objects, as far as known.
    pub services_in_step: bool,
    /// The same of policies.
    pub policies_in_step: bool,
    /// Changes of services and of endpoints that wait to be written.
    pub pending: (usize, usize),
    /// When changes of policies took effect.
    pub(super) policy_times: &'a PolicyTimes,
}

impl<'a> View<'a> {
    /// Returns a view of engines whose rules are in force.
    #[cfg(test)]
    pub(crate) fn of(
        services: &'a services::Engine,
        policies: Option<&'a policies::Engine>,
        policy_times: &'a PolicyTimes,
    ) -> Self {
        Self {
            services,
            policies,
            services_in_step: true,
            policies_in_step: true,
            pending: (0, 0),
            policy_times,
        }
    }

    /// Returns since when the rules of a policy are those in force. None if the kernel refused them, a
    /// change waits, or the rules in force are unknown.
    pub(crate) fn in_force_since(&self, policy: &ObjectRef) -> Option<SystemTime> {
        let is_current = self.policies_in_step && !self.policies?.is_touched(policy);
        self.policy_times.get(policy).filter(|_| is_current)
    }
}

/// A removal of elements that packets added to the tables of services.
#[derive(Debug)]
pub struct ElementRemoval {
    /// The operations.
    pub transaction: Transaction,
    /// The number of changes of services with session affinity after which it is valid.
    pub affinity_version: u64,
    /// Receives the outcome.
    pub answer: oneshot::Sender<RemovalOutcome>,
}

/// The outcome of a [`ElementRemoval`].
#[derive(Debug)]
pub enum RemovalOutcome {
    /// The elements were removed.
    Done,
    /// Services changed meanwhile. Followers were given the changes.
    Outdated,
    /// The rules in force are unknown. A change follows when they are known again.
    Unknown,
    /// The kernel refused the removal, and nothing was removed.
    Failed(Error),
}

impl<K: Kernel> Controller<'_, K> {
    pub(crate) fn answer(&mut self, query: Query) {
        match query {
            Query::Evaluate {
                connections,
                answer,
            } => {
                // A follower may have ended.
                let _ = answer.send(self.denied(&connections));
            }
            Query::Names {
                connection,
                direction,
                audited,
                answer,
            } => {
                let _ = answer.send(self.names(&connection, direction, audited));
            }
            Query::Look(Look(look)) => {
                let policies = self.policies.as_ref();
                look(&View {
                    services: &self.services.engine,
                    policies: policies.map(|driver| &driver.engine),
                    services_in_step: self.services.state == DriverState::Synced,
                    policies_in_step: policies
                        .is_none_or(|driver| driver.state == DriverState::Synced),
                    pending: self.latency.pending(),
                    policy_times: &self.policy_times,
                });
            }
            Query::Remove(removal) => {
                let removed = self.remove(removal.transaction, removal.affinity_version);
                let _ = removal.answer.send(removed);
            }
        }
    }

    /// Returns which connections the rules in force deny; `None` while the rules are unknown.
    fn denied(&self, connections: &[Connection]) -> Option<Vec<bool>> {
        let policies = self.policies.as_ref()?;
        let is_denied = |connection| !policies.engine.allows(connection);
        (policies.state == DriverState::Synced).then(|| connections.iter().map(is_denied).collect())
    }

    fn names(&self, connection: &Connection, direction: Direction, audited: bool) -> Names {
        let Some(policies) = &self.policies else {
            return Names::default();
        };
        let engine = &policies.engine;
        Names {
            source: engine.pod_at(connection.source).cloned(),
            destination: engine.pod_at(connection.destination).cloned(),
            policies: if audited {
                engine.auditing(direction, connection, &mut KnownProfiles::default())
            } else {
                engine.denying(direction, connection)
            },
        }
    }

    /// Removes elements that packets added, unless services changed since they were selected.
    pub(crate) fn remove(
        &mut self,
        transaction: Transaction,
        affinity_version: u64,
    ) -> RemovalOutcome {
        if self.services.state != DriverState::Synced {
            return RemovalOutcome::Unknown;
        }
        if self.followers.affinity_version() != affinity_version {
            return RemovalOutcome::Outdated;
        }
        match self.kernel.write(transaction, &mut 0) {
            Ok(()) => RemovalOutcome::Done,
            Err(error) => RemovalOutcome::Failed(error),
        }
    }
}

/// Waits for the next query; forever without a channel.
pub(super) async fn next(queries: &mut Option<mpsc::Receiver<Query>>) -> Option<Query> {
    match queries {
        Some(queries) => queries.recv().await,
        None => None,
    }
}
