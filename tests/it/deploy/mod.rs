//! Manifests, packages, and the ways to and from other proxies.

mod cleanup;
mod installed;
mod manifests;
mod migration;
mod monitoring;
mod neighbours;
mod packaging;
mod plugin;
