//! The scenes: each is a subcommand with its arguments, which returns a report.

pub mod changes;
pub mod churn;
pub mod conntrack;
pub mod first;
pub mod neighbours;
pub mod packets;
pub mod policies;
pub mod ranges;

/// The clusters that most scenes measure.
const SIZES: &str = "1000x10,10000x10,30000x10,50000x20";
