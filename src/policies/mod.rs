//! NetworkPolicies as rules, in tables of their own.
//!
//! ```text
//! events ─> Inventory (pods, namespaces, policies) ── what changed ──┐
//!                │                                                   v
//!                └─> Index: which selectors select a pod ─────> Engine ─> Transaction
//!                                                                │
//!                        plans of this node's addresses, sets that are shared
//! ```
//!
//! Only pods of this node get chains, and only policies that select one of them do. A packet
//! between two pods, or between a pod and the outside, meets
//!
//! ```text
//!  forward  egress ──── source ────> pod-egress-NS/POD ──jump──> policy-egress-NS/POLICY: accept
//!    │                               └──goto──> deny-egress: log, count, drop
//!    └────  ingress ─ destination ─> pod-ingress-NS/POD ─jump──> policy-ingress-NS/POLICY: accept
//!                                    └──goto──> deny-ingress: log, count, drop
//!  input    egress-to-node ─ source ─> as egress
//! ```
//!
//! - A pod that no policy of a direction selects is in no verdict map: its packets pass.
//! - A policy is one chain for all pods that it selects. Its peers are sets of addresses
//!   (`sets`), one for each distinct selector, shared by all policies. What a pod of another
//!   node does is thus a matter of set elements and of no rule.
//! - The forward hook is behind DNAT and before masquerading: services are judged by the pod
//!   that was chosen, and clients by their own address. The node's own traffic to its pods passes
//!   the output hook only, where no policy is asked.
//!
//! The cost of an update follows the pods and policies that events touched.

mod changes;
mod claimants;
mod compile;
mod delta;
mod departed;
mod engine;
mod evaluate;
mod index;
mod inventory;
mod layout;
mod plans;
mod reassigned;
mod rules;
mod sets;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::sync::Arc;

pub(crate) use changes::{Isolated, PolicyChanges};
pub use engine::Engine;
pub use evaluate::Connection;
pub use layout::{Direction, TABLE, table_id};
pub(crate) use rules::is_base_chain;

/// The NFLOG group that denied packets are sent to with `--log-denied`. Other programs mostly
/// have small numbers.
pub const LOG_GROUP: u16 = 1729;

/// Tells the interfaces of this host that lead to addresses of its pods; those that it does not know
/// are left out.
pub type FindLinks = fn(&[IpAddr]) -> Vec<(IpAddr, Arc<str>)>;

/// What the command line says about policies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySettings {
    /// The name of the own node.
    pub node: Arc<str>,
    /// Connections are cut that no policy allows any more.
    pub strict: bool,
    /// The NFLOG group that denied packets are sent to.
    pub log_group: Option<u16>,
}
