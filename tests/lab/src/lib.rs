//! What tests, benchmarks and examples run nftlet in: network namespaces with traffic, an API server
//! in memory, and clusters of any size for it.

pub mod cluster;
pub mod fake_api;
pub mod netns;
pub mod pods;
