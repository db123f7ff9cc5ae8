//! Why connections are allowed or denied, in words.

use std::collections::HashMap;
use std::fmt::Write as _;

use super::decisions::Cause;
use super::port_set::PortSet;
use super::rows::{Causes, Reach};
use crate::insight::answer::{Decision, Verdict};
use crate::insight::text::{decided, nearest_rule};

/// What one end decides about some ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Why {
    pub direction: &'static str,
    pub ports: PortSet,
    pub is_allowed: bool,
    pub text: String,
}

impl Why {
    /// Returns it as one line.
    pub fn line(&self) -> String {
        let verdict = if self.is_allowed { "allowed" } else { "denied" };
        format!(
            "{} of {}: {verdict}: {}",
            self.direction,
            self.ports.words(),
            self.text
        )
    }
}

/// Finds reasons, those of the same policies about the same peers once.
pub(super) struct Whys<'r> {
    reach: &'r Reach<'r>,
    known: HashMap<Cause, Vec<Why>>,
}

impl<'r> Whys<'r> {
    pub fn new(reach: &'r Reach<'r>) -> Self {
        Self {
            reach,
            known: HashMap::new(),
        }
    }

    /// Returns why a pair can connect or cannot: for each end, and its ports with one reason.
    pub fn of(&mut self, reasons: &Causes) -> Vec<Why> {
        let mut whys = Vec::new();
        for (reason, direction) in reasons.ends.iter().zip(["egress", "ingress"]) {
            let Some(reason) = reason else {
                continue;
            };
            let known = self.known.entry(*reason);
            let of_end = known.or_insert_with(|| of_end(self.reach, *reason, direction));
            whys.extend(of_end.iter().cloned());
        }
        if reasons.of_node {
            whys.push(Why {
                direction: "ingress",
                ports: PortSet::all(),
                is_allowed: true,
                text: "a node reaches its own pods, whatever their policies say".to_owned(),
            });
        }
        whys
    }
}

/// Returns why one end decides as it does.
fn of_end(reach: &Reach, reason: Cause, direction: &'static str) -> Vec<Why> {
    let mut whys: Vec<Why> = Vec::new();
    reach.decisions.explain(reason, |ports, decision| {
        let is_allowed = decision.verdict == Verdict::Allowed;
        let text = words(&decision, direction);
        let mut known = whys.iter_mut();
        let known = known.find(|why| why.is_allowed == is_allowed && why.text == text);
        if let Some(why) = known {
            why.ports.add(ports.protocol, ports.range);
            return;
        }
        let mut set = PortSet::default();
        set.add(ports.protocol, ports.range);
        whys.push(Why {
            direction,
            ports: set,
            is_allowed,
            text,
        });
    });
    whys
}

fn words(decision: &Decision, direction: &str) -> String {
    let end = match direction {
        "egress" => "the source",
        _ => "the destination",
    };
    let mut text = decided(decision, &[end.to_owned()], direction);
    if let Some(nearest) = &decision.nearest {
        // Writing to a string does not fail.
        let _ = write!(text, "; {}", nearest_rule(nearest));
    }
    text
}
