//! What tests, benchmarks and examples run nftlet in: network namespaces with traffic, and an API
//! server in memory.

pub mod fake_api;
pub mod netns;
