//! Network policies, by their packets and their rules, and the judges of both. Pods hang on routed
//! links, one each, except in `bridge`.

mod alone;
mod audit;
mod bridge;
mod cluster;
mod cut;
mod diff;
mod directions;
mod explain;
mod live;
mod observe;
mod oracle;
mod ports_and_blocks;
mod random;
mod random_packets;
mod reach;
mod reject;
mod rules;
mod selection;
mod startup;
mod tiers;
mod walk;
mod worlds;
