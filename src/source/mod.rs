//! Where Kubernetes objects come from.
//!
//! Two sources send the same [`Event`](crate::model::Event)s through a bounded channel and wait
//! when the reconciler is busy, so that memory stays bounded:
//!
//! - [`Manifests`] reads files, directories and standard input, and follows their changes;
//! - [`Cluster`] watches an API server.
//!
//! ```text
//! API server ── HTTP, JSON ──┐
//!                            ├─ wire (used fields) ─ convert (facts, notices) ─> Sender
//! files ── YAML, JSON ───────┘
//! ```
//!
//! Both first deliver every [`Kind`](crate::model::Kind) completely (`ListStarted`, `Apply`...,
//! `ListComplete`) and afterwards only what changes. Neither lets one bad object stop the
//! others: it is reported by name, and what was known of it stays in force.

pub mod cluster;
mod convert;
pub mod manifests;
mod wire;

pub use cluster::{Cluster, SourceStats};
pub use manifests::Manifests;

use crate::model::Delivery;

/// The channel into which a source delivers. It is bounded: a source waits while it is full.
pub type Sender = tokio::sync::mpsc::Sender<Delivery>;
