//! Comparing whole tables with the kernel without blocking the main loop.
//!
//! ```text
//! Driver: rebuild ── copy of what is wanted ──> thread "audit": compiles, reads, compares
//!    │ events are applied, nothing is written               │
//!    └── writes the difference, then the events <───────────┘
//! ```
//!
//! With 10,000 services in place, to compile the elements, to dump those of the kernel and to compare
//! both takes half a second and more. At the start, and when a failed write is retried, another thread
//! does it ([`TableReader`]). The main loop takes events meanwhile, answers queries and pings the kernel; it
//! writes nothing to the tables. The copy shares the objects with the engine, and compiling is left to
//! the thread, so that the main loop does nothing for each of the elements. The difference leads to
//! what was wanted when the copy was taken. That is what the engine regards as written, so the next
//! update adds the events since.
//!
//! The main loop compares by itself
//!
//! - after a failed write, some steps of which may be in force;
//! - to repair foreign changes, which affect packets until it is done;
//! - if the thread failed;
//! - with `--once`.
//!
//! Where only notifications were missed, an audit looks first ([`audit`](super::audit)).

use std::time::Instant;

use tokio::sync::oneshot;

use super::driver::Driver;
use super::kernel::Kernel;
use super::outcome::Outcome;
use super::reader::{PendingComparison, ReaderTask, TableDifference};
use super::session::KernelSession;
use crate::engine::Engine;

impl<E: Engine> Driver<E>
where
    E::Change: Send + 'static,
{
    /// Returns whether a comparison is going on in another thread.
    pub(super) fn is_comparing(&self) -> bool {
        self.pending.is_some()
    }

    /// Continues a comparison in another thread, or starts one if the engine is ready. Compares at once
    /// if there is no other thread.
    pub(super) fn compare_elsewhere<K: Kernel>(
        &mut self,
        kernel: &mut KernelSession<'_, K>,
    ) -> Outcome {
        let Some(mut pending) = self.pending.take() else {
            return self.begin(kernel);
        };
        match pending.result.try_recv() {
            Ok(Ok(difference)) => self.write_difference(kernel, difference, pending.started),
            Err(oneshot::error::TryRecvError::Empty) => {
                self.pending = Some(pending);
                Outcome::Comparing
            }
            // Each commit of the other engine interrupts a dump. The main loop is not interrupted by
            // its own.
            Ok(Err(error)) => {
                tracing::debug!("the comparison ended early: {error}");
                self.compare(kernel)
            }
            // The thread has ended.
            Err(oneshot::error::TryRecvError::Closed) => self.compare(kernel),
        }
    }

    /// Starts a comparison again, because another process may have written since the tables were read.
    /// Returns the outcome; `None` if none was going on.
    pub(super) fn restart_comparison<K: Kernel>(
        &mut self,
        kernel: &mut KernelSession<'_, K>,
    ) -> Option<Outcome> {
        self.pending.take().map(|_| self.begin(kernel))
    }

    fn begin<K: Kernel>(&mut self, kernel: &mut KernelSession<'_, K>) -> Outcome {
        let Some(reader) = kernel.reader().filter(|_| self.engine.is_ready()) else {
            return self.compare(kernel);
        };
        let started = Instant::now();
        self.rebuild(kernel);
        kernel.watch_generation();
        let wanted = self.engine.snapshot();
        let (sender, result) = oneshot::channel();
        let done = reader.done();
        let compare = move |kernel: &mut dyn Kernel| {
            // The driver has started another comparison.
            if sender.is_closed() {
                return;
            }
            let wanted = wanted();
            let actual = kernel.read(&[E::TABLE], &wanted);
            // The driver may have started another one meanwhile.
            let _ = sender.send(actual.map(|actual| TableDifference::of::<E>(&actual, wanted)));
            done.notify_one();
        };
        if reader
            .jobs
            .send(ReaderTask::Compare(Box::new(compare)))
            .is_err()
        {
            return self.compare(kernel);
        }
        self.pending = Some(PendingComparison { started, result });
        Outcome::Comparing
    }

    fn write_difference<K: Kernel>(
        &mut self,
        kernel: &mut KernelSession<'_, K>,
        difference: TableDifference<E::Change>,
        started: Instant,
    ) -> Outcome {
        if self.write(kernel, difference, &mut 0).is_ok() {
            self.comparison_written(kernel, started);
            return Outcome::Synced;
        }
        kernel.metrics.failure();
        // Steps of the write may be in force. What was refused may have changed since the tables were
        // read, so that it must not lead to a quarantine.
        self.compare(kernel)
    }
}
