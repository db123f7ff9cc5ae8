//! Helpers shared by the integration tests.

pub mod kube_proxy;
pub mod manifests;
pub mod netns;
pub mod skip;
