//! Facts to rules: pure functions from [`model`](crate::model) to [`ruleset`](crate::ruleset).
//!
//! Each address family has one table. What never depends on a service is its skeleton
//! ([`skeleton()`]): base chains, the chain that looks frontends up, and the declarations of the
//! sets. A service adds set elements only ([`ServicePlan`]); the chains its verdict elements
//! lead to are shared by all services with the same number of endpoints ([`SharedChain`]).
//!
//! ```text
//!  prerouting, output ──> services ── vmap @frontends ──> cluster-3 ─┐ marks clients outside
//!                            │                            external-3 ┤ marks everyone
//!                            │                                       └─> lb-3: dnat to (frontend,
//!                            ├─ vmap @nodeports ──> nodeport-3           random of 3) map @endpoints
//!                            ├─ @cluster-ips ──> reject-service (a port the service lacks)
//!                            └─ @service-cidrs ──> drop (an address nobody has)
//!
//!  postrouting ── marked, or a pod that reaches itself (@hairpin) ──> masquerade
//! ```
//!
//! Changing an endpoint is thus a change of plain map data, which the kernel accepts without
//! validating the table again.

mod chains;
mod layout;
mod service;
mod settings;
mod skeleton;
mod topology;

pub use chains::{Handle, LearnAt, Role, SharedChain};
pub use layout::{
    AFFINITY, By, Scope, ServiceSet, TABLE, affinity_declaration, table_family, table_id,
};
pub use service::{ElementOf, Frontend, Pool, Route, ServicePlan, Target, plan};
pub use settings::{DetectLocal, LocalDetector, NodePortAddresses, Settings};
pub use skeleton::skeleton;
