//! Helpers shared by the integration tests.

pub mod agent;
pub mod browser;
pub mod clock;
pub mod consumer;
pub mod kube_proxy;
pub mod kustomize;
pub mod listing;
pub mod manifests;
pub mod objects;
pub mod policy;
pub mod reach;
pub mod real_api;
pub mod schema;
pub mod shop;
pub mod skip;
pub mod stuck;
