//! The HTTP servers: probes, metrics, settings, and the health checks of services.
//!
//! They are independent of services and rules: other modules set the [`Health`](health::Health),
//! register their metrics, and publish the health checks to answer.

pub(crate) mod checks;
pub mod health;
pub mod http;
mod listen;
pub mod metrics;
pub(crate) mod pages;
mod share;
pub(crate) mod socket;
