//! The connection over which all rules are written.

use std::time::Instant;

use super::hooks::remove_foreign_base_chains;
use super::kernel::Kernel;
use super::metrics::SyncMetrics;
use super::reader::{TableReader, WritePoint};
use super::report::Reporter;
use crate::model::Notice;
use crate::netlink::Error;
use crate::nft::{Ruleset, TableFamily, Transaction};

/// The connection over which all rules are written.
///
/// It detects commits by other processes: each commit to any table adds one to the generation of the
/// kernel's ruleset, and the session counts its own commits.
pub(crate) struct KernelSession<'a, K> {
    kernel: K,
    /// The thread that compares tables, if any.
    reader: Option<TableReader>,
    pub(super) metrics: &'a SyncMetrics,
    pub(super) reporter: &'a dyn Reporter,
    /// The generation of the ruleset unless another process has committed something. `None` if it must
    /// be read.
    expected_generation: Option<u32>,
    /// Whether another process committed something while the monitor was muted.
    missed_notifications: bool,
    /// The number of transactions written.
    writes: u64,
}

impl<'a, K: Kernel> KernelSession<'a, K> {
    /// Creates a session over a kernel.
    pub(crate) fn new(kernel: K, metrics: &'a SyncMetrics, reporter: &'a dyn Reporter) -> Self {
        Self {
            kernel,
            reader: None,
            metrics,
            reporter,
            expected_generation: None,
            missed_notifications: false,
            writes: 0,
        }
    }

    /// Writes a transaction, in several steps if it cannot be atomic.
    ///
    /// # Errors
    ///
    /// When a step is refused or cannot be sent. `written` counts the steps before it, which took effect.
    pub(crate) fn write(
        &mut self,
        transaction: Transaction,
        written: &mut usize,
    ) -> Result<(), Error> {
        for step in transaction.into_steps() {
            let started = Instant::now();
            let applied = self.kernel.apply(&step);
            if applied.is_err() && step.is_cleanup() {
                for family in [TableFamily::Ip, TableFamily::Ip6] {
                    if step.ops.iter().any(|op| op.table().family == family) {
                        self.metrics.cleanup_failure(family == TableFamily::Ip6);
                    }
                }
            }
            if applied.is_err() {
                // The monitor is muted during a large step, also during one that fails, so only the
                // generation shows whether others wrote.
                let now = self.kernel.generation().ok();
                self.missed_notifications |=
                    self.expected_generation.is_some() && now != self.expected_generation;
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

    /// Reads the tables with a name; see [`Kernel::read`]. Later commits are detected.
    ///
    /// # Errors
    ///
    /// When the tables cannot be read.
    pub(crate) fn read(&mut self, table: &str, wanted: &Ruleset) -> Result<Ruleset, Error> {
        self.watch_generation();
        self.kernel.read(&[table], wanted)
    }

    /// Lets commits after this call be detected, before tables are read.
    pub(super) fn watch_generation(&mut self) {
        if self.expected_generation.is_none() {
            self.expected_generation = self.kernel.generation().ok();
        }
    }

    /// Sets the thread that compares tables.
    pub(super) fn set_reader(&mut self, reader: TableReader) {
        self.reader = Some(reader);
    }

    /// Returns the thread that compares tables.
    pub(super) fn reader(&self) -> Option<TableReader> {
        self.reader.clone()
    }

    /// Returns the generation of the kernel's ruleset.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub(crate) fn generation(&mut self) -> Result<u32, Error> {
        self.kernel.generation()
    }

    /// Returns whether no other process has committed anything since the tables were compared.
    pub(crate) fn is_as_expected(&mut self) -> bool {
        let now = self.kernel.generation().ok();
        now.is_some() && now == self.expected_generation
    }

    /// Sets the expected generation to the current one, before everything is compared.
    pub(crate) fn set_expected_to_current(&mut self) {
        self.expected_generation = self.kernel.generation().ok();
    }

    /// Sets the expected generation after the tables were found equal at a point.
    pub(super) fn set_expected_from(&mut self, write_point: WritePoint) {
        let own = self.writes.wrapping_sub(write_point.writes);
        self.expected_generation = write_point
            .generation
            .map(|generation| generation.wrapping_add(own as u32));
    }

    /// Resets the expected generation, so that the next comparison reads the tables.
    pub(super) fn forget_expected(&mut self) {
        self.expected_generation = None;
    }

    /// Returns the current point in the sequence of transactions.
    pub(super) fn write_point(&mut self) -> WritePoint {
        WritePoint {
            writes: self.writes,
            generation: self.kernel.generation().ok(),
        }
    }

    /// Returns and resets whether another process committed something while the monitor was muted.
    pub(crate) fn take_missed_notifications(&mut self) -> bool {
        std::mem::take(&mut self.missed_notifications)
    }

    /// Removes foreign base chains from nftlet's tables, and reports failures.
    pub(crate) fn remove_foreign_base_chains(&mut self) {
        let removed = remove_foreign_base_chains(&mut self.kernel, self.metrics, self.reporter);
        if let Err(error) = removed {
            self.failed(&error);
        }
    }

    /// Counts and reports a failure.
    pub(crate) fn failed(&self, error: &Error) {
        self.metrics.failure();
        self.reporter.failed(error);
    }

    pub(crate) fn report(&self, notice: &Notice) {
        self.reporter.notice(notice);
    }
}
