//! Netlink: writes rulesets to the kernel and reads them back.
//!
//! [`Nftables::apply`] encodes a [`Transaction`](crate::nft::Transaction), sends it in one `sendmsg`,
//! and names the operations that the kernel refused. [`Nftables::read`] dumps tables as a
//! [`Ruleset`](crate::nft::Ruleset), which can be compared with the wanted one.
//!
//! ```text
//! Transaction ──encode──> Batch (bytes and the origin of each message) ──socket──> kernel
//!                            │                                                       │
//!                            └────────── path of the object <────────error message───┘
//! ```
//!
//! Each of these types has a socket of its own:
//!
//! - [`Conntrack`] lists and deletes tracked UDP flows and connections.
//! - [`Monitor`] receives notifications about changes that other processes make to nftlet's tables.
//! - [`LogReader`] receives the packets that rules log.
//! - [`RouteMonitor`] receives notifications about changes of the host's routes.
//! - `IpSets` and `Links` list and remove what another proxy left behind outside nftables.
//!
//! libnftnl encodes tables, chains, rules and set declarations, through the crates `nftnl` and
//! `nftnl_sys`. Lists of elements, which may number a million, are written directly (`message`).
//! Expressions that the crate lacks are plain data (`expr`), converted in `ffi`. Only `ffi` and
//! `socket` contain `unsafe` blocks.

mod conntrack;
mod encode;
mod error;
mod expr;
mod features;
mod ffi;
mod inventory;
mod ipset;
mod link;
mod lookup;
mod message;
mod monitor;
mod mute;
mod nflog;
mod nftables;
mod read;
mod routes;
mod socket;
mod uapi;
mod udata;

#[cfg(test)]
pub(crate) use conntrack::ConntrackHandle;
pub use conntrack::{
    Conntrack, ConntrackError, EntryToCut, Flow, FlowFilter, OpenedBy, OpenedConnection, Tracked,
};
pub use encode::{Batch, encode};
pub use error::{Error, ErrorClass, MissingFeature, Owner, Refusal};
pub use features::{Needs, modules};
pub use inventory::FoundBaseChain;
pub(crate) use ipset::IpSets;
pub(crate) use link::Links;
pub use lookup::FoundElement;
pub use monitor::{Monitor, Notification};
pub use mute::MutedMonitor;
pub use nflog::{Denied, LogReader, Logged};
pub use nftables::{Applied, Nftables};
pub use routes::RouteMonitor;
