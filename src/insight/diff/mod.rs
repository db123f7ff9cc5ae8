//! What differs between two sides, such as a dump and the running agent.
//!
//! ```text
//!  facts of A ──┐   ┌─> objects        the fields that nftlet reads
//!               ├───┼─> services       frontends, endpoints
//!  facts of B ──┘   ├─> reachability   who can connect to whom
//!                   └─> operations     between the compiled rulesets
//!                          └─> Diff ──> sections ──> text, Markdown
//!                                └────> JSON
//! ```

mod markdown;
mod objects;
mod reachability;
mod sections;
mod services;
mod text;

pub(crate) use markdown::markdown;
pub(crate) use text::text;

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde::Serialize;

use self::objects::ObjectChange;
use self::reachability::PairChange;
use self::services::ServiceChange;
use super::{API_VERSION, Facts};
use crate::engine::Engine as _;
use crate::nft::{self, Ruleset};

/// What differs between two sides.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Diff {
    api_version: &'static str,
    /// The names of the sides.
    #[serde(skip)]
    sides: [String; 2],
    /// The node whose rules were compared; empty without one.
    #[serde(skip)]
    node: String,
    objects: Vec<ObjectChange>,
    services: Vec<ServiceChange>,
    reachability: Vec<PairChange>,
    /// The number of operations that turn the rules of the one into those of the other; none if they
    /// were not compared.
    operations: Option<usize>,
    /// The operations of each table.
    #[serde(skip)]
    tables: BTreeMap<String, usize>,
    not_compared: Vec<String>,
    assumptions: Vec<String>,
}

impl Diff {
    /// Compares the facts of two sides with these names.
    pub fn new(sides: [&str; 2], facts: [&Facts; 2]) -> Self {
        let mut not_compared = Vec::new();
        let objects = objects::changes(facts, &mut not_compared);
        let services = services::changes(facts);
        let (reachability, assumptions) = reachability::of(sides, facts, &mut not_compared);
        let mut diff = Self {
            api_version: API_VERSION,
            sides: sides.map(str::to_owned),
            node: String::new(),
            objects,
            services,
            reachability,
            operations: None,
            tables: BTreeMap::new(),
            not_compared,
            assumptions,
        };
        let [a, b] = facts;
        if b.node.is_empty() {
            let why = "operations: rules are those of a node; name one with --hostname-override";
            diff.not_compared.push(why.to_owned());
        } else {
            diff.set_rules(b.node, &compiled(a), compiled(b));
        }
        diff
    }

    /// Compares rulesets alone.
    pub fn of_rules(sides: [&str; 2], node: &str, before: &Ruleset, after: Ruleset) -> Self {
        let mut diff = Self {
            api_version: API_VERSION,
            sides: sides.map(str::to_owned),
            node: String::new(),
            objects: Vec::new(),
            services: Vec::new(),
            reachability: Vec::new(),
            operations: None,
            tables: BTreeMap::new(),
            not_compared: vec![
                "objects, services and reachability: the kernel has only rules".to_owned(),
            ],
            assumptions: Vec::new(),
        };
        diff.set_rules(node, before, after);
        diff
    }

    fn set_rules(&mut self, node: &str, before: &Ruleset, after: Ruleset) {
        let operations = nft::diff(before, after).ops;
        node.clone_into(&mut self.node);
        self.operations = Some(operations.len());
        for operation in &operations {
            let of_table = self.tables.entry(operation.table().to_string());
            let count = of_table.or_default();
            *count = count.saturating_add(1);
        }
    }

    /// Returns whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
            && self.services.is_empty()
            && self.reachability.is_empty()
            && self.operations.unwrap_or_default() == 0
    }
}

/// Compiles the rules of services and policies.
pub(crate) fn compiled(facts: &Facts) -> Ruleset {
    let (mut rules, _) = crate::services::wanted(facts.store, facts.settings);
    rules.tables.extend(facts.policies.ruleset().tables);
    rules
}

/// Writes the differences as JSON, whose fields are an interface.
pub(crate) fn json(diff: &Diff, out: &mut dyn Write) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, diff)?;
    writeln!(out)
}
