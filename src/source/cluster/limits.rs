//! Limits on what is read of an answer of the API server.

/// The maximum length of an object as JSON. etcd accepts 1.5 MB, in some clusters 3 MB, and JSON is
/// longer than its encoding.
pub(super) const MOST_OBJECT: usize = 8 << 20;
/// The maximum length of the text around the objects of a list.
pub(super) const MOST_AROUND: usize = 1 << 20;
/// How much of an unsuccessful answer is read.
pub(super) const MOST_REFUSAL: usize = 64 << 10;
