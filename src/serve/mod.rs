//! What nftlet answers over HTTP: probes, metrics, its settings, and the health checks of services.
//!
//! It knows nothing of services and rules: the other modules set the [`Health`](health::Health),
//! register their metrics, and publish the health checks that are to be answered.

pub mod checks;
pub mod health;
pub mod http;
mod listen;
pub mod metrics;
pub(crate) mod pages;
mod share;
