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
//! Both first deliver every [`Kind`] completely (`ListStarted`, `Apply`...,
//! `ListComplete`) and afterwards only what changes. Neither lets one bad object stop the
//! others: it is reported by name, and what was known of it stays in force.

pub mod cluster;
mod convert;
pub mod manifests;
mod wire;

pub use cluster::{Cluster, ServerFault, SourceStats};
pub use manifests::Manifests;

use convert::Converter;

use crate::model::{Delivery, Kind, Notice, Object};

/// The channel into which a source delivers. It is bounded: a source waits while it is full.
pub type Sender = tokio::sync::mpsc::Sender<Delivery>;

/// Reads single objects as the API server sends them, the way both sources do.
///
/// ```
/// use nftlet::{model::Kind, source::Decoder};
///
/// let json = br#"{"metadata": {"name": "shop", "labels": {"team": "web"}}}"#;
/// let (object, notices) = Decoder::default().decode(Kind::Namespace, json)?;
/// assert!(object.is_some() && notices.is_empty());
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Decoder(Converter);

impl Decoder {
    /// What nftlet keeps of an object of a kind, if it is any of its business, and the faults of
    /// the parts that were left out.
    ///
    /// # Errors
    ///
    /// JSON that does not fit the kind, and an object without a usable name.
    pub fn decode(
        &mut self,
        kind: Kind,
        json: &[u8],
    ) -> Result<(Option<Object>, Vec<Notice>), serde_json::Error> {
        let mut json = serde_json::Deserializer::from_slice(json);
        let decoded = self.0.decode(kind, &mut json)?;
        json.end()?;
        Ok((decoded.object, decoded.notices))
    }
}
