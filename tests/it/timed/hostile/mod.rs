//! What one namespace may create never stops, slows or robs another one.
//!
//! Each module is an attack. Meanwhile a service in the namespace `neighbour` changes, and each
//! change must be in force in time.

mod affinity;
mod answers;
mod cost;
mod logging;
mod neighbour;
mod pods;
mod ranges;
mod theft;
