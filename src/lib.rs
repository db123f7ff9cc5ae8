//! nftlet programs Kubernetes services and network policies on a node with nftables.
//!
//! ```text
//! source ──Event──> services::Engine, policies::Engine ──Transaction──> sync ──> netlink ──> kernel
//!                                                                        │
//!                                                            followers <─┘ what changed
//! ```
//!
//! [`source`] reads objects from the API server or from files, and converts them to the events of
//! [`model`]. Two engines, [`services`] and [`policies`], compile them to the tables, chains, sets
//! and rules of [`nft`]; they implement [`engine::Engine`] and do no I/O. [`sync`] has a driver for
//! each engine, which writes what changed through [`netlink`], compares the kernel with the wanted
//! rules, and repairs differences. [`followers`] act once rules are in force: they delete conntrack
//! entries and affinity, cut connections, publish health checks and log denied packets.
//!
//! [`serve`] has the HTTP ports and metrics, [`events`] the Events of the API server, `cleanup`
//! removes nftlet's and kube-proxy's rules, [`settings`] parses flags and the configuration file,
//! `host` reads the node's addresses, routes, bridges and sysctls, and [`logging`] writes the log.
//! [`app`] connects all of them.
//!
//! ARCHITECTURE.md has the reasons, and the table of which module may import which.

#![deny(unsafe_code)]

pub mod app;
mod backoff;
mod cleanup;
mod clock;
pub mod engine;
pub mod events;
pub mod followers;
mod host;
mod insight;
pub mod logging;
pub mod model;
mod mutex;
pub mod netlink;
pub mod nft;
pub mod policies;
pub mod serve;
pub mod services;
pub mod settings;
pub mod source;
pub mod sync;
