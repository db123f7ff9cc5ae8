//! Where objects come from: an API server or files.

mod between;
mod cluster;
mod faults;
mod manifests;
mod policies;
mod recovery;
