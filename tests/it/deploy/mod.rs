//! Manifests, packages, and the ways to and from other proxies.

mod cleanup;
mod manifests;
mod migration;
mod monitoring;
mod packaging;
