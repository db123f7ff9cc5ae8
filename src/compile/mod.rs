//! Facts to rules: pure functions from [`model`](crate::model) to [`ruleset`](crate::ruleset).
//!
//! Each address family has one table. What never depends on a service is its skeleton
//! ([`skeleton()`]): base chains, the chain that looks frontends up, and the declarations of the
//! sets. A service adds set elements only ([`ServicePlan`]); the chains its verdict elements
//! lead to are shared by all services with the same number of endpoints ([`SharedChain`]).
//!
//! ```text
//!  prerouting, output ──> services
//!    │
//!    ├─ vmap @frontends ──> cluster-3    marks clients outside of the pod network ─┐
//!    │                      external-3   marks everyone ───────────────────────────┤
//!    │                      local-3      policy Local: pods and the node ──────────┤
//!    │                        └─ vmap @local-frontends ──> lb-local-1 (others)     v
//!    │                      source-ranges  only clients in @allowed-sources     lb-3: dnat to
//!    │                        └─ vmap @firewalled-frontends ──> any of these    (frontend, random
//!    │                                                                          of 3) map @endpoints
//!    ├─ vmap @nodeports ──> nodeport-external-3, nodeport-local-3 (the same by port)
//!    ├─ @cluster-ips ──> reject-service (a port the service lacks)
//!    └─ @service-cidrs ──> drop (an address nobody has)
//!
//!  with session affinity:  lb-sticky-3: dnat to (client, frontend) map @affinity, else lb-3
//!    behind the translation: learn-prerouting, learn-output ──> learn-new ──> learn-10800: update @affinity
//!
//!  postrouting ── marked, or a pod that reaches itself (@hairpin) ──> masquerade
//! ```
//!
//! Changing an endpoint is thus a change of plain map data, which the kernel accepts without
//! validating the table again.

mod chains;
mod change;
mod layout;
mod plan;
mod service;
mod settings;
mod size;
mod skeleton;
mod sources;
mod topology;

pub use chains::{Handle, LearnAt, Role, SharedChain};
pub use change::{Edit, PlanChange};
pub use layout::{
    AFFINITY, By, Scope, ServiceSet, TABLE, affinity_declaration, digest_of, table_family, table_id,
};
pub use plan::{ElementOf, Frontend, Pool, Route, ServicePlan, Target};
pub use service::plan;
pub use settings::{DetectLocal, LocalDetector, MasqueradeBit, NodePortAddresses, Settings};
pub use size::TooLarge;
pub use skeleton::skeleton;
pub use sources::SourceList;
