//! Tests that measure time, one at a time. `make test` runs them after all others.

mod hostile;
mod outage;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Waits until no other test of this module runs, and keeps them waiting.
fn alone() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}
