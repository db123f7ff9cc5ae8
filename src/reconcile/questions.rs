//! What other threads ask of the thread that knows the policies and writes the rules.

use std::net::IpAddr;

use tokio::sync::{mpsc, oneshot};

use super::driver::State;
use super::{Kernel, Reconciler};
use crate::netlink::{Denied, Error};
use crate::policy::Connection;
use crate::ruleset::Transaction;

/// Something for the loop that changes nothing of what the objects ask for.
#[derive(Debug)]
pub enum Question {
    /// Which of these connections the policies deny.
    Judge {
        /// The connections.
        connections: Vec<Connection>,
        /// Receives an entry for each, in order; nothing while it is unknown what is in force.
        answer: oneshot::Sender<Option<Vec<bool>>>,
    },
    /// Rules denied this packet: to be logged with the names of the pods.
    Denied(Denied),
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
    /// Answers a question.
    pub fn answer(&mut self, question: Question) {
        match question {
            Question::Judge {
                connections,
                answer,
            } => {
                // The other thread may have ended.
                let _ = answer.send(self.denied(&connections));
            }
            Question::Denied(packet) => self.log_denied(&packet),
            Question::Remove(removal) => {
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

    fn log_denied(&self, packet: &Denied) {
        let pod = |address: IpAddr| {
            let policies = self.policies.as_ref()?;
            policies.engine.pod_at(address)
        };
        super::denied::tell(packet, pod, self.log_fields);
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

/// The next question. Pending where nobody asks.
pub(super) async fn next(questions: &mut Option<mpsc::Receiver<Question>>) -> Option<Question> {
    match questions {
        Some(questions) => questions.recv().await,
        None => None,
    }
}
