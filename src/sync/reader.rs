//! What passes between the main loop and the thread that reads the kernel.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use tokio::sync::{Notify, oneshot};

use super::kernel::Kernel;
use crate::engine::{Compile, Engine};
use crate::netlink::Error;
use crate::nft::{Ruleset, Transaction, diff};

/// The thread that reads the kernel.
#[derive(Clone, Debug)]
pub struct TableReader {
    pub(super) jobs: Sender<ReaderTask>,
    /// Notified when a comparison is done.
    done: Arc<Notify>,
}

impl TableReader {
    pub(super) fn new(jobs: Sender<ReaderTask>) -> Self {
        Self {
            jobs,
            done: Arc::default(),
        }
    }

    /// Returns what is notified when a comparison is done.
    pub(super) fn done(&self) -> Arc<Notify> {
        self.done.clone()
    }
}

/// The difference between the kernel and the wanted rules.
#[derive(Debug)]
pub(super) struct TableDifference<C> {
    pub transaction: Transaction,
    /// What it changes in rules that this process did not write.
    pub change: C,
}

impl<C> TableDifference<C> {
    /// Compares the rules of an engine.
    pub fn of<E: Engine<Change = C>>(actual: &Ruleset, wanted: Ruleset) -> Self {
        let transaction = diff(actual, wanted);
        Self {
            change: E::changes_of_foreign_rules(actual, &transaction),
            transaction,
        }
    }
}

/// A comparison that another thread makes.
#[derive(Debug)]
pub(super) struct PendingComparison<C> {
    pub started: Instant,
    pub result: oneshot::Receiver<Result<TableDifference<C>, Error>>,
}

/// What was written, for a thread that compares it with the kernel.
pub struct Snapshot {
    pub(super) services: Compile,
    pub(super) policies: Option<Compile>,
    pub(super) write_point: WritePoint,
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot").finish_non_exhaustive()
    }
}

/// A function that compares tables with a kernel.
pub(super) type CompareTables = Box<dyn FnOnce(&mut dyn Kernel) + Send>;

/// A task of the thread that reads the kernel.
pub enum ReaderTask {
    /// Compares what was written, for an audit.
    Audit(Snapshot),
    /// Compares the tables of an engine.
    Compare(CompareTables),
}

impl fmt::Debug for ReaderTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReaderTask::Audit(snapshot) => f.debug_tuple("Audit").field(snapshot).finish(),
            ReaderTask::Compare(_) => f.debug_tuple("Compare").finish_non_exhaustive(),
        }
    }
}

/// A point in the sequence of transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WritePoint {
    /// The number of transactions written.
    pub writes: u64,
    /// The generation of the kernel's ruleset, if the kernel answered.
    pub generation: Option<u32>,
}
