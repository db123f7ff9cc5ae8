//! Helpers shared by the integration tests.

pub mod manifests;
pub mod netns;
