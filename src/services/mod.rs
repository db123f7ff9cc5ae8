//! The engine of services: compiles objects ([`model`](crate::model)) into rules
//! ([`nft`](crate::nft)).
//!
//! Each address family has one table. Its skeleton (`skeleton`) does not depend on services: base
//! chains, the chains of roles (`dispatch`), and the declarations of the sets. A service adds set
//! elements only (`ServicePlan`). The chains that draw an endpoint (`balance`), those of a list of
//! source ranges, and those of the clients of a namespace exist while a service needs them
//! (`SharedChain`).
//!
//! The chains that a packet passes. `@x`: set or map x; `──>`: jump or goto; `vmap`: the map holds
//! the verdict.
//!
//! ```text
//!  prerouting, output ──> services
//!    │ priority := role and count in @frontends
//!    ├─ role, vmap @roles ──> cluster    marks clients outside of the pod network ─┐
//!    │                   ──> external   marks everyone ───────────────────────────┤
//!    │                   ──> local      policy Local: pods and the node ──────────┤
//!    │                         └─ priority := count in @local-frontends           v
//!    │                              ──> lb-local (others)   lb: count, vmap @draw ──> draw-3:
//!    │                   ──> firewalled                         priority := random index of 3
//!    │                         └─ vmap @firewalled-frontends    pick: dnat to (frontend, index)
//!    │                              ──> sources-12ab…           map @endpoints
//!    │                                    clients in @sources-12ab… ──> any of these
//!    └─ the same by port: @nodeports ──> nodeport-external, nodeport-local
//!
//!  forward, output: new connections, behind the translation of all proxies ──> unassigned
//!    ├─ vmap @cluster-ips ──> reject-service (a port the service lacks; at the hook input, too)
//!    └─ @service-cidrs: drop (an address that no service has)
//!
//!  with session affinity, in the namespace shop:
//!    lb-sticky: vmap @sticky-frontends ──> sticky/shop
//!                 dnat to (client, frontend) map @affinity/shop, else as lb
//!    behind the translation: learn-prerouting, learn-output ──> learn-new
//!      └─ vmap @affinity-frontends ──> learn-10800/shop
//!           update @affinity/shop; full? count in @not-remembered/shop
//!
//!  postrouting: marked, or a pod that reaches itself (@hairpin) ──> masquerade
//! ```
//!
//! So a change of endpoints, and of services without source ranges and affinity, changes map data
//! only, which the kernel accepts without validating the table again.

mod balance;
mod chains;
mod change;
mod claims;
mod conflicts;
mod dispatch;
mod engine;
mod layout;
mod parts;
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
pub(crate) use dispatch::Role;
pub use engine::{Engine, wanted};
pub(crate) use layout::EndpointScope;
pub use layout::{Clients, MOST_CLIENTS, ServiceSet, TABLE, affinity_declaration, table_id};
pub(crate) use parts::ServiceParts;
pub(crate) use plan::{Frontend, Pool, Route, ServicePlan, Target};
pub(crate) use removed::{address, port, target};
pub(crate) use replaced::{Replaced, ServiceChanges};
pub use service::plan;
pub use settings::{DetectLocal, ServiceSettings};
pub(crate) use settings::{LocalDetector, MasqueradeBit};
pub(crate) use skeleton::is_base_chain;
pub(crate) use store::{EndpointOf, SlicesOf};
pub use store::{Marks, Store};
pub(crate) use tables::Sticky;
#[cfg(test)]
pub(crate) use {balance::Count, sources::SourceList};
