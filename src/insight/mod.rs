//! Answers people's questions: what the rules do with a packet, and why.
//!
//! Pure functions over the objects of the engines, which also name the rules that decide. What the
//! kernel has is asked for through a trait ([`KernelView`]).
//!
//! ```text
//!  question ──> names ──> ends (addresses of a family)
//!                            │
//!                            ├─> service:  frontend, endpoints, masquerading
//!                            └─> policies: egress of the source, ingress of each endpoint
//!                                    └─> Answer ──> text, JSON
//! ```

mod answer;
pub(crate) mod audit;
mod decision;
pub(crate) mod diff;
mod evidence;
mod explain;
mod live;
mod names;
mod nodes;
pub(crate) mod objects;
mod policies;
mod ports;
mod question;
pub(crate) mod reach;
mod rules;
mod service;
mod services;
pub(crate) mod status;
mod text;

pub(crate) use answer::{Answer, Verdict};
pub(crate) use evidence::{ElementKey, Pair, TrackedConnection};
pub(crate) use explain::explain;
pub(crate) use live::{KernelView, add as add_live, not_read};
pub(crate) use names::NameError;
pub(crate) use nodes::OtherNodes;
pub(crate) use policies::{PolicyState, add_states, policies};
pub(crate) use question::{Question, QuestionError};
pub(crate) use service::Compiled;
pub(crate) use services::{ServiceFilter, services};
pub(crate) use text::{
    Style, answer as answer_text, policies as policies_text, services as services_text,
};

use ipnet::IpNet;

use crate::model::ObjectName;
use crate::policies::Engine;
use crate::services::{ServiceSettings, Store};

/// What the questions are answered from.
#[derive(Clone, Copy)]
pub(crate) struct Facts<'a> {
    /// The objects of services.
    pub store: &'a Store,
    /// The settings of the rules for services.
    pub settings: &'a ServiceSettings,
    /// The objects of policies.
    pub policies: &'a Engine,
    /// The name of the own node.
    pub node: &'a str,
    /// Whether the Node object of the own node is known.
    pub has_node: bool,
    /// Whether an answer names the rules that decide.
    pub rules: bool,
    /// The most pairs of addresses and ports that one question may be about.
    pub most_pairs: Option<usize>,
    /// Returns whether the kernel refused the rules of a service.
    pub is_refused: &'a dyn Fn(&ObjectName) -> bool,
    /// The networks of the bridges of this host whose packets no rule sees; none if the host is not
    /// the node.
    pub unfiltered: &'a [IpNet],
    /// The rules of services on other nodes, if their objects are known.
    pub others: Option<&'a OtherNodes>,
}

/// The version of the JSON.
pub(crate) const API_VERSION: &str = "nftlet/v1";

#[cfg(test)]
mod tests;
