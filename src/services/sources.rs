//! Lists of source ranges (`loadBalancerSourceRanges`), which services share.
//!
//! Each distinct list of a family is one interval set and one chain, however many frontends it
//! restricts. A set of (frontend, client range) would be a concatenation with an interval, which
//! the kernel fills in quadratic time (`nft_set_pipapo`).

use std::cmp::Ordering;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use ipnet::IpNet;

use super::layout::ALLOWED_CLIENT;
use crate::nft::{
    Comparison, Declaration, Name, Rule, Selector, Set, SetKind, Statement, Verdict, digest_of,
    merge_intervals,
};

/// The ranges of one family that contain the allowed clients of a frontend. Lists with the same
/// ranges have the same name; only names are compared, in constant time.
#[derive(Clone, Debug)]
pub struct SourceList {
    name: Name,
    ranges: Arc<[IpNet]>,
}

impl SourceList {
    /// Creates a list of ranges of one family, which may overlap. Returns a clone of `previous` if
    /// it has the same ranges.
    pub fn new(ranges: &[IpNet], previous: Option<&Self>) -> Self {
        let ranges = IpNet::aggregate(&ranges.iter().map(IpNet::trunc).collect());
        if let Some(previous) = previous.filter(|list| *list.ranges == *ranges) {
            return previous.clone();
        }
        let texts: Vec<String> = ranges.iter().map(ToString::to_string).collect();
        Self {
            name: Name::from(format!("sources-{}", digest_of(&texts.join(" ")))),
            ranges: ranges.into(),
        }
    }

    /// Returns the ranges, sorted and disjoint.
    pub fn ranges(&self) -> &[IpNet] {
        &self.ranges
    }

    /// Returns the name of both the chain and the set.
    pub fn name(&self) -> Name {
        self.name.clone()
    }

    /// Returns the set of the ranges.
    pub(super) fn set(&self) -> Set {
        let mut set = Set::from(Declaration {
            interval: true,
            ..Declaration::new(SetKind::Set, [Selector::SourceAddress])
        });
        set.elements = merge_intervals(self.ranges.iter().copied());
        set
    }

    /// Returns the rules of the chain.
    pub(super) fn rules(&self) -> Vec<Rule> {
        vec![
            Rule::new([
                Statement::InSet(
                    vec![Selector::SourceAddress],
                    Comparison::Is,
                    self.name.clone(),
                ),
                Statement::Verdict(Verdict::Goto(ALLOWED_CLIENT.into())),
            ]),
            Rule::new([Statement::Verdict(Verdict::Drop)]),
        ]
    }
}

impl PartialEq for SourceList {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for SourceList {}

impl PartialOrd for SourceList {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SourceList {
    fn cmp(&self, other: &Self) -> Ordering {
        self.name.cmp(&other.name)
    }
}

impl Hash for SourceList {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}
