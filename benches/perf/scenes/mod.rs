//! The scenes: each is a subcommand with its arguments, which returns a report.

pub mod changes;
pub mod churn;
pub mod conntrack;
pub mod first;
pub mod insight;
pub mod neighbours;
pub mod packets;
pub mod policies;
pub mod ranges;
pub mod reach;

/// The clusters that scenes measure; the last two are of users.
const SIZES: &str = "1000x10,10000x10,30000x10,50000x20,5006x50,44125x1";
