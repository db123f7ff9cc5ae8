//! Where objects come from: an API server or files.

mod between;
mod cluster;
mod cluster_policies;
mod faults;
mod follow;
mod manifests;
mod outages;
mod policies;
mod proxy;
mod recorded;
mod recovery;
