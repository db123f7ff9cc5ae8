//! What acts once rules are in force, each follower on a thread of its own.
//!
//! A follower receives the changes that took effect from [`sync`](crate::sync). It reads the kernel
//! through a socket of its own. What it wants to know of the policies, and what it wants removed from
//! the tables of services, it asks of the loop ([`Query`](crate::sync::Query)), so that the loop knows
//! of each write.

pub mod affinity;
pub mod connections;
pub mod conntrack;
pub mod denied;
pub mod health_checks;

#[cfg(test)]
mod tests;
