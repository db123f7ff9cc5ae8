//! The engine of services: compiles objects ([`model`](crate::model)) into rules
//! ([`nft`](crate::nft)).
//!
//! Each address family has one table. Its skeleton (`skeleton`) does not depend on services: base
//! chains, the chain that looks up frontends, and the declarations of the sets. A service adds set
//! elements only (`ServicePlan`). The chains to which its verdict elements lead are shared by all
//! services with the same number of endpoints, or the same list of source ranges (`SharedChain`).
//!
//! ```text
//!  prerouting, output ──> services
//!    │
//!    ├─ vmap @frontends ──> cluster-3    marks clients outside of the pod network ─┐
//!    │                      external-3   marks everyone ───────────────────────────┤
//!    │                      local-3      policy Local: pods and the node ──────────┤
//!    │                        └─ vmap @local-frontends ──> lb-local-1 (others)     v
//!    │                      sources-12ab…  only clients in the set of this name    lb-3: dnat to
//!    │                        └─ firewalled: vmap @firewalled-frontends            (frontend, random
//!    │                             └──> any of these                               of 3) map @endpoints
//!    └─ vmap @nodeports ──> nodeport-external-3, nodeport-local-3 (the same by port)
//!
//!  forward, output: new connections, behind the translation of all proxies ──> unassigned
//!    ├─ @cluster-ips ──> reject-service (a port the service lacks; at the hook input, too)
//!    └─ @service-cidrs ──> drop (an address that no service has)
//!
//!  with session affinity, in the namespace shop:
//!    lb-sticky-3/shop ─> sticky/shop: dnat to (client, frontend) map @affinity/shop, else lb-3
//!    behind the translation: learn-prerouting, learn-output ──> learn-new
//!      └─ vmap @affinity-frontends ──> learn-10800/shop: update @affinity/shop
//!                                        full? count in @not-remembered/shop
//!
//!  postrouting ── marked, or a pod that reaches itself (@hairpin) ──> masquerade
//! ```
//!
//! So a change of an endpoint changes map data only, which the kernel accepts without validating
//! the table again.

mod balance;
mod chains;
mod change;
mod claims;
mod conflicts;
mod dispatch;
mod engine;
mod layout;
mod plan;
mod queue;
mod removed;
mod replaced;
mod service;
mod settings;
mod size;
mod skeleton;
mod sources;
mod store;
mod tables;
mod topology;

pub(crate) use claims::Claim;
pub use engine::{Engine, wanted};
pub(crate) use layout::Scope;
pub use layout::{Clients, MOST_CLIENTS, ServiceSet, TABLE, affinity_declaration, table_id};
pub(crate) use plan::{Pool, Route, ServicePlan, Target};
pub(crate) use removed::{address, number};
pub(crate) use replaced::{Replaced, ServiceChanges};
pub use service::plan;
pub(crate) use settings::MasqueradeBit;
pub use settings::{DetectLocal, ServiceSettings};
pub(crate) use skeleton::is_base_chain;
pub(crate) use store::{EndpointOf, SlicesOf};
pub use store::{Marks, Store};
pub(crate) use tables::{Sticky, Tables};
#[cfg(test)]
pub(crate) use {balance::Count, dispatch::Role, plan::Frontend, sources::SourceList};
