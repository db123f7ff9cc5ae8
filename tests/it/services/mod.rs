//! Services, by their packets and their rules.

mod addresses;
mod affinity;
mod conntrack;
mod explain;
mod health_checks;
mod local_modes;
mod node;
mod packets;
mod portions;
mod priority;
mod restarts;
mod rollout;
mod traffic_policies;
mod transitions;
