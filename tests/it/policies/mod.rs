//! Network policies, by their packets and their rules, and the judges of both.

mod bridge;
mod live;
mod observe;
mod oracle;
mod random;
mod random_packets;
mod rules;
mod walk;
