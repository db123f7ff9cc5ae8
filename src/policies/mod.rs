//! The engine of network policies: compiles them into rules, in tables of their own.
//!
//! ```text
//! events ─> Inventory (pods, namespaces, nodes, policies) ── what changed ──┐
//!                │                                                          v
//!                └─> Index: which selectors select a pod ────────────> Engine ─> Transaction
//!                                                                       │
//!                               plans of this node's addresses, sets that are shared
//! ```
//!
//! Only policies that select a pod of this node get chains. A packet between two pods, or between
//! a pod and another host, evaluates
//!
//! ```text
//!  forward  egress ──── source ────> pods-egress-PROFILE ──jump──> policy-egress-NS/POLICY: accept
//!    │                               └──goto──> deny-egress: log, count, drop or reject
//!    └────  ingress ─ destination ─> pods-ingress-PROFILE ─jump──> policy-ingress-NS/POLICY: accept
//!                                    └──goto──> deny-ingress: log, count, drop or reject
//!  input    egress-to-node ─ source ─> as egress
//!  output   egress-by-ipvs, ingress-by-ipvs ─> as forward, beside another proxy
//! ```
//!
//! - A pod that no policy selects for a direction is in no verdict map, so its packets pass.
//! - Pods with the same list of policies (`profile`) share a chain, which names no address.
//! - That chain asks the cluster policies of the tier Admin before the policies of namespaces, and
//!   those of the tier Baseline if there are none (`tiers`).
//! - A policy is one chain for all pods that it selects. Its peers are sets of addresses (`sets`),
//!   one for each distinct selector, shared by all policies. So a change of a pod on another node
//!   changes set elements but no rule.
//! - The forward hook is behind DNAT and before masquerading: the rules see the endpoint of a
//!   service and the client's own address. Traffic of the node itself to its pods passes the output
//!   hook only, where no policy applies.
//!
//! With `--pod-startup=closed`, base chains before these drop what unknown addresses of the pod
//! network send and receive (`startup`).
//!
//! The cost of an update is proportional to the pods and policies that events touched.

mod changes;
mod claimants;
mod cluster;
mod compile;
mod conditions;
mod delta;
mod departed;
mod engine;
mod evaluate;
mod events;
mod index;
mod inventory;
mod isolation;
mod judge;
mod known;
mod layout;
mod links;
mod nodes;
mod parts;
mod plans;
mod profile;
mod reassigned;
mod rules;
mod sets;
mod spec;
mod startup;
#[cfg(test)]
mod tests;
mod tiers;

use std::sync::Arc;

pub(crate) use changes::{Audited, AuditedAddress, Isolated, PolicyChanges};
pub(crate) use conditions::{Conditions, PeerCondition, PodPolicies};
pub use engine::Engine;
pub use evaluate::Connection;
pub(crate) use index::Index;
pub(crate) use judge::{Decision, NearMiss, RuleOf};
pub use layout::{Direction, TABLE, table_id};
pub(crate) use plans::KnownProfiles;
pub(crate) use rules::is_base_chain;
pub use startup::PodNetwork;

/// The NFLOG group of denied packets with `--log-denied`. Other programs mostly use small numbers.
pub const LOG_GROUP: u16 = 1729;

/// What happens to a packet that NetworkPolicies deny.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DenyWith {
    /// It is dropped.
    #[default]
    Drop,
    /// Its sender gets a TCP reset or an ICMP error, up to a rate.
    Reject,
}

/// The settings of the rules for network policies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySettings {
    /// The name of the own node.
    pub node: Arc<str>,
    /// Whether connections are cut that no policy allows any more.
    pub strict: bool,
    /// The NFLOG group of denied packets, if they are logged.
    pub log_group: Option<u16>,
    /// Whether NetworkPolicies with the annotation `nftlet.dev/mode: audit` deny nothing.
    pub audit: bool,
    /// The NFLOG group of the packets that these would deny, if they are logged.
    pub audit_log_group: Option<u16>,
    /// What happens to denied packets.
    pub deny_with: DenyWith,
    /// Whether another program translates the addresses of services, perhaps with IPVS.
    pub beside_proxy: bool,
    /// The network in which addresses that no known pod has are closed, if any is.
    pub closed: Option<PodNetwork>,
}
