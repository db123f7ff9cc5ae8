//! What other threads ask of the reconciler's thread, which alone has the policies and the plans.

use std::net::IpAddr;

use tokio::sync::{mpsc, oneshot};

use super::affinity::Forget;
use super::{Kernel, Reconciler, State};
use crate::netlink::Denied;
use crate::policy::Connection;

/// Something for the reconciler's loop that changes nothing of what the objects ask for.
#[derive(Debug)]
pub enum Question {
    /// Which of these connections the policies deny. The answer has an entry for each, in order.
    Judge {
        /// The connections.
        connections: Vec<Connection>,
        /// Who waits for the answer.
        answer: oneshot::Sender<Vec<bool>>,
    },
    /// Rules denied this packet: to be told with the names of the pods.
    Denied(Denied),
    /// Clients that may be left without their endpoint: to be forgotten where they are.
    Forget(Forget),
}

impl<K: Kernel> Reconciler<'_, K> {
    /// Answers a question.
    pub fn answer(&mut self, question: Question) {
        match question {
            Question::Judge {
                connections,
                answer,
            } => {
                let denied = connections.iter().map(|connection| self.denies(connection));
                // Whoever asked may be gone.
                let _ = answer.send(denied.collect());
            }
            Question::Denied(packet) => self.tell_denied(&packet),
            Question::Forget(forget) => {
                let done = self.forget_some(&forget.map, forget.suspects);
                let _ = forget.answer.send(done);
            }
        }
    }

    /// Whether the rules in force deny a connection. While it is unknown what is in force nothing
    /// is denied: when it is known again, everything is asked anew.
    fn denies(&self, connection: &Connection) -> bool {
        let policies = self.policies.as_ref();
        policies.is_some_and(|policies| {
            policies.state == State::Synced && !policies.engine.allows(connection)
        })
    }

    fn tell_denied(&self, packet: &Denied) {
        let pod = |address: IpAddr| {
            let policies = self.policies.as_ref()?;
            policies.engine.pod_at(address)
        };
        super::denied::tell(packet, pod, self.log_fields);
    }
}

/// The next question. Pending where nobody asks.
pub(super) async fn next(questions: &mut Option<mpsc::Receiver<Question>>) -> Option<Question> {
    match questions {
        Some(questions) => questions.recv().await,
        None => None,
    }
}
