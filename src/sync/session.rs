//! The kernel, for all who write to it.

use std::time::Instant;

use super::{Kernel, Reporter, remove_foreign_hooks};
use crate::model::Notice;
use crate::netlink::Error;
use crate::nft::{Family, Ruleset, Transaction};
use crate::serve::metrics::Metrics;

/// The one connection over which rules are written.
///
/// It knows whether another program has committed anything since the tables were read: each commit
/// to any table adds one to the generation of the kernel's ruleset, and the commits of nftlet itself
/// are counted.
pub struct KernelSession<'a, K> {
    kernel: K,
    pub(super) metrics: &'a Metrics,
    pub(super) reporter: &'a dyn Reporter,
    /// The generation that the kernel is in unless another program has committed something. `None`
    /// before it was read, or if it is to be read again.
    expected_generation: Option<u32>,
    /// Another program committed something while the monitor received no notifications.
    missed_notifications: bool,
    /// The number of transactions written.
    writes: u64,
}

impl<'a, K: Kernel> KernelSession<'a, K> {
    /// Creates a session over a kernel.
    pub fn new(kernel: K, metrics: &'a Metrics, reporter: &'a dyn Reporter) -> Self {
        Self {
            kernel,
            metrics,
            reporter,
            expected_generation: None,
            missed_notifications: false,
            writes: 0,
        }
    }

    /// Writes a transaction, in steps where one atomic transaction would not do.
    ///
    /// # Errors
    ///
    /// When a step is refused or cannot be sent. Those before it are in force: `written` counts them.
    pub fn write(&mut self, transaction: Transaction, written: &mut usize) -> Result<(), Error> {
        for step in transaction.into_steps() {
            let started = Instant::now();
            let applied = self.kernel.apply(&step);
            if applied.is_err() && step.is_cleanup() {
                for family in [Family::Ip, Family::Ip6] {
                    if step.ops.iter().any(|op| op.table().family == family) {
                        self.metrics.cleanup_failure(family == Family::Ip6);
                    }
                }
            }
            let applied = applied?;
            *written += 1;
            self.writes += 1;
            let generation = self.expected_generation;
            self.expected_generation = generation.map(|generation| generation.wrapping_add(1));
            self.missed_notifications |= applied.missed_notifications
                && self.kernel.generation().ok() != self.expected_generation;
            tracing::debug!(
                operations = step.ops.len(),
                elements = applied.elements,
                bytes = applied.bytes,
                took = ?started.elapsed(),
                "transaction"
            );
            self.metrics.transaction(
                started.elapsed(),
                applied.messages,
                applied.elements,
                applied.bytes,
            );
        }
        Ok(())
    }

    /// Reads the tables of a name; see [`Kernel::read`]. Commits from now on are known.
    ///
    /// # Errors
    ///
    /// When the tables cannot be read.
    pub fn read(&mut self, table: &str, wanted: &Ruleset) -> Result<Ruleset, Error> {
        if self.expected_generation.is_none() {
            self.expected_generation = self.kernel.generation().ok();
        }
        self.kernel.read(&[table], wanted)
    }

    /// Returns the generation of the kernel's ruleset.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub fn generation(&mut self) -> Result<u32, Error> {
        self.kernel.generation()
    }

    /// Whether no other program has committed anything since the tables were compared.
    pub fn is_as_expected(&mut self) -> bool {
        let now = self.kernel.generation().ok();
        now.is_some() && now == self.expected_generation
    }

    /// Takes the present generation for the expected one, before everything is compared.
    pub fn expect_present(&mut self) {
        self.expected_generation = self.kernel.generation().ok();
    }

    /// Sets the generation that the kernel was in when the tables agreed after so many transactions.
    pub(super) fn expect(&mut self, moment: Moment) {
        let own = self.writes.wrapping_sub(moment.writes);
        self.expected_generation = moment
            .generation
            .map(|generation| generation.wrapping_add(own as u32));
    }

    /// Forgets the expected generation, so that the next comparison reads.
    pub(super) fn expect_nothing(&mut self) {
        self.expected_generation = None;
    }

    /// Returns the present moment.
    pub(super) fn moment(&mut self) -> Moment {
        Moment {
            writes: self.writes,
            generation: self.kernel.generation().ok(),
        }
    }

    /// Whether another program committed something while the monitor received no notifications;
    /// says so once.
    pub fn take_missed_notifications(&mut self) -> bool {
        std::mem::take(&mut self.missed_notifications)
    }

    /// Returns the number of transactions written.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Removes the base chains of other programs from nftlet's tables; a failure is reported.
    pub fn remove_foreign_hooks(&mut self) {
        let removed = remove_foreign_hooks(&mut self.kernel, self.metrics, self.reporter);
        if let Err(error) = removed {
            self.failed(&error);
        }
    }

    /// Counts and reports a failure.
    pub fn failed(&self, error: &Error) {
        self.metrics.failure();
        self.reporter.failed(error);
    }

    /// Counts and reports a notice.
    pub fn report(&self, notice: &Notice) {
        self.metrics.notice(notice.reason.as_str());
        self.reporter.notice(notice);
    }
}

/// A point in the sequence of transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moment {
    /// How many transactions had been written.
    pub writes: u64,
    /// The generation of the kernel's ruleset, if the kernel answered.
    pub generation: Option<u32>,
}
