//! Followers: threads that act after rules took effect.
//!
//! A follower receives the changes that took effect from [`sync`](crate::sync) and reads the kernel
//! through a socket of its own. To evaluate policies or to remove elements from the tables of services
//! it sends a [`Query`](crate::sync::Query) to the main loop, which thereby knows about all writes.

pub(crate) mod affinity;
pub(crate) mod audited;
pub(crate) mod bridges;
pub(crate) mod connections;
pub(crate) mod conntrack;
pub(crate) mod denied;
pub(crate) mod drops;
pub(crate) mod health_checks;
mod metrics;
pub(crate) mod not_remembered;

pub use metrics::{FollowerMetrics, register_audited, register_drops, register_not_remembered};

#[cfg(test)]
mod tests;
