//! What nftlet answers over HTTP: probes, health checks of services, metrics.

pub mod health;
pub mod metrics;
