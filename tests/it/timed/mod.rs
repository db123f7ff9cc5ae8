//! Tests that measure time, and need the machine for themselves: run them apart from the others.

mod hostile;
mod outage;
