//! Sources of Kubernetes objects.
//!
//! Two sources send the same [`Event`](crate::model::Event)s through a bounded channel, and wait
//! while it is full, so that memory stays bounded:
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
//! Both first deliver a complete list of every [`Kind`] (`ListStarted`, `Apply`...,
//! `ListComplete`), then only changes. An invalid object does not hold up the others: it is
//! reported by name, and its last valid state stays in force.

pub mod cluster;
mod convert;
pub mod manifests;
mod wire;

pub use cluster::{Cluster, ServerFault, SourceStats};
pub use manifests::Manifests;

use convert::Converter;

use crate::model::{Delivery, Kind, Notice, Object};

/// The bounded channel that a source delivers to.
pub type Sender = tokio::sync::mpsc::Sender<Delivery>;

/// Decodes single objects of the API as both sources do.
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
    /// Decodes an object of a kind. Returns what nftlet keeps of it (`None` for an object that has
    /// no rules) and notices about the parts that were left out.
    ///
    /// # Errors
    ///
    /// If the JSON does not fit the kind, or the object has no usable name.
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
