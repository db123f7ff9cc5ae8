//! Limits on what is read of an answer of the API server.

/// The most bytes of an object as JSON. etcd takes 1.5 MB at once, and 3 MB by the setting of some
/// clusters; as JSON an object is longer than there.
pub(super) const MOST_OBJECT: usize = 8 << 20;
/// The most bytes of what stands around the objects of a list.
pub(super) const MOST_AROUND: usize = 1 << 20;
/// The most bytes of a refusal that are read.
pub(super) const MOST_REFUSAL: usize = 64 << 10;
