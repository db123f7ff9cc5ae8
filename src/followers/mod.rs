//! Followers: threads that act after rules took effect.
//!
//! A follower receives the changes that took effect from [`sync`](crate::sync) and reads the kernel
//! through a socket of its own. To evaluate policies or to remove elements from the tables of services
//! it sends a [`Query`](crate::sync::Query) to the main loop, which thereby knows about all writes.

pub mod affinity;
pub mod connections;
pub mod conntrack;
pub mod denied;
pub mod health_checks;

#[cfg(test)]
mod tests;
