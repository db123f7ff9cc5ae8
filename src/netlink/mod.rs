//! nftables rulesets to and from the kernel.
//!
//! [`Nftables`] holds a netlink socket. [`Nftables::apply`] encodes a
//! [`Transaction`](crate::nft::Transaction), hands it to the kernel in one `sendmsg`, and
//! tells exactly which operation the kernel refused if it did. [`Nftables::read`] dumps tables
//! back as a [`Ruleset`](crate::nft::Ruleset), so that what is in force can be compared with
//! what is wanted.
//!
//! ```text
//! Transaction ──encode──> Batch (bytes + what each message is) ──socket──> kernel
//!                            │                                               │
//!                            └────────── place of the error <──error message─┘
//! ```
//!
//! [`Conntrack`] holds another socket: it lists the UDP flows and the connections that the kernel
//! tracks, and removes one.
//!
//! [`Monitor`] listens on a third one for changes that others make to nftlet's tables.
//!
//! [`IpSets`] and [`Links`] name and remove what another proxy left behind outside of nftables.
//!
//! [`LogReader`] reads on a fourth one the packets that rules log.
//!
//! Tables, chains, rules and set declarations are put together by libnftnl through the crates
//! `nftnl` and `nftnl_sys`. Element lists, of which there can be a million, are written
//! directly (`attr`); expressions that the crate lacks are described as plain data (`expr`) and built in one
//! place (`ffi`), which together with `socket` is the only code with `unsafe` blocks.

mod attr;
mod conntrack;
mod encode;
mod error;
mod expr;
mod ffi;
mod inventory;
mod ipset;
mod link;
mod lookup;
mod monitor;
mod nflog;
mod nftables;
mod read;
mod socket;
mod sums;
mod uapi;
mod udata;

pub use conntrack::{Conntrack, Flow, FlowFilter, Handle, Removal, Tracked};
pub use encode::{Batch, encode};
pub use error::{Error, ErrorClass, Owner, Refusal};
pub use inventory::FoundBaseChain;
pub use ipset::IpSets;
pub use link::Links;
pub use monitor::{Absence, Heard, Monitor};
pub use nflog::{Denied, LogReader, Logged};
pub use nftables::{Applied, Nftables};
