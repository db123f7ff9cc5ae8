//! Judges of network policies that share nothing with the code they judge.
//!
//! ```text
//!  seed ── generate ──> Cluster ──────────────────────────── oracle ──> allowed or not
//!                          │ YAML                                            ║ must agree
//!                          └──> source, engine ──> Ruleset ── walk ──> accepted or dropped
//! ```
//!
//! - [`oracle`] reads the API objects as the API's text says, slowly and plainly, and [`tiers`]
//!   those of the cluster;
//! - [`generate`] makes random clusters and random changes of them;
//! - [`walk`] sends a packet through a typed ruleset;
//! - [`kernel`] applies transactions to one, and refuses what the kernel refuses.

pub mod generate;
pub mod kernel;
pub mod oracle;
pub mod tiers;
pub mod walk;
