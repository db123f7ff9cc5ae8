//! nftlet programs Kubernetes services on a node with the Linux kernel's nftables.
//!
//! Data flows one way:
//!
//! ```text
//! source  ->  model  ->  compile  ->  ruleset  ->  netlink
//! objects     facts      pure         values       one atomic
//!                        functions    and diffs    transaction
//! ```
//!
//! [`source`] turns Kubernetes objects (watched, or read from files) into the plain facts of
//! [`model`], whose store tells what changed. [`compile`] turns the facts of one service into
//! the set elements and the shared chains it needs, as the typed values of [`ruleset`], which
//! knows how to compare them and how to print them. [`netlink`] writes the difference to the
//! kernel and reads back what is there. [`policy`] does for NetworkPolicies, in tables of their
//! own, what [`compile`] does for services. [`reconcile`] is the loop that joins these steps,
//! [`events`] tells the cluster what a person should know, and [`app`] is the composition root that
//! the binary calls.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod app;
pub mod cleanup;
pub mod engine;
pub mod events;
pub mod followers;
pub mod host;
pub mod logging;
pub mod model;
pub mod netlink;
pub mod nft;
pub mod policies;
pub mod serve;
pub mod services;
pub mod settings;
pub mod source;
pub mod sync;
