//! The profile of a pod: the policies that apply to its traffic in one direction.
//!
//! Pods with the same profile share a chain, so that a policy that selects all pods of the node
//! adds one chain and moves their addresses there.

use std::sync::Arc;

use super::cluster::tier_word;
use super::layout::Direction;
use crate::model::{ObjectName, Tier};
use crate::nft::{Name, digest_of};

/// The policies that apply to a pod in one direction.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Profile {
    /// Equal profiles have the same digest in every run.
    digest: String,
    /// The cluster policies that are asked first.
    pub admin: Option<Arc<TierList>>,
    /// The policies that select the pod for the direction, sorted; `None` if none isolates it.
    /// An empty list denies everything.
    pub policies: Option<Vec<ObjectName>>,
    /// The cluster policies that are asked if no policy isolates the pod.
    pub baseline: Option<Arc<TierList>>,
    /// The audited policies that select the pod for the direction, sorted. Where others isolate it,
    /// there are none: with these enforced, too, not less would be allowed.
    pub audited: Vec<ObjectName>,
}

impl Profile {
    /// Creates a profile; `None` if it allows everything.
    pub fn new(
        admin: Vec<ObjectName>,
        policies: Option<Vec<ObjectName>>,
        baseline: Vec<ObjectName>,
        mut audited: Vec<ObjectName>,
    ) -> Option<Self> {
        if policies.is_some() {
            audited.clear();
        }
        let admin = TierList::new(Tier::Admin, admin);
        let baseline = TierList::new(Tier::Baseline, baseline).filter(|_| policies.is_none());
        let digest = match (&admin, &policies, &baseline) {
            all if !audited.is_empty() => digest_of(&format!("{all:?} {audited:?}")),
            (None, None, None) => return None,
            (None, Some(policies), _) => digest_of(&format!("{policies:?}")),
            all => digest_of(&format!("{all:?}")),
        };
        Some(Self {
            digest,
            admin: admin.map(Arc::new),
            policies,
            baseline: baseline.map(Arc::new),
            audited,
        })
    }

    /// Creates the profile that denies everything.
    pub fn closed() -> Self {
        let policies: Vec<ObjectName> = Vec::new();
        Self {
            digest: digest_of(&format!("{policies:?}")),
            admin: None,
            policies: Some(policies),
            baseline: None,
            audited: Vec::new(),
        }
    }

    /// Returns what differs for other profiles.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Returns the name of the chain of all pods with this profile.
    pub fn chain(&self, direction: Direction) -> Name {
        direction.pods_chain(&self.digest)
    }

    /// Returns whether a policy is enforced.
    pub fn is_enforced(&self) -> bool {
        self.admin.is_some() || self.policies.is_some() || self.baseline.is_some()
    }

    /// Returns the name of the set that counts what the audited policies would deny.
    pub fn audited_set(&self, direction: Direction) -> Name {
        direction.audited(&self.digest)
    }

    /// Returns what the rules of a tier's cluster policies are those of.
    pub fn tier(&self, tier: Tier) -> Option<RulesOf> {
        match tier {
            Tier::Admin => self.admin.clone().map(RulesOf::Tier),
            Tier::Baseline if self.audited.is_empty() => self.baseline.clone().map(RulesOf::Tier),
            Tier::Baseline => self.baseline.clone().map(RulesOf::TierBeforeAudit),
        }
    }

    /// Returns what the chain of the pods leads to.
    pub fn parts(&self) -> impl Iterator<Item = RulesOf> {
        let tiers = [Tier::Admin, Tier::Baseline].into_iter();
        let policies = self.policies.iter().flatten().chain(&self.audited);
        let policies = policies.map(|name| RulesOf::Policy(name.clone()));
        tiers.filter_map(|tier| self.tier(tier)).chain(policies)
    }
}

/// The cluster policies of a tier that apply to a pod in one direction, in the order in which they
/// are asked. Their rules are one chain, which all profiles with this list share.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TierList {
    /// Equal lists have the same digest in every run.
    digest: String,
    pub tier: Tier,
    pub policies: Vec<ObjectName>,
}

impl TierList {
    fn new(tier: Tier, policies: Vec<ObjectName>) -> Option<Self> {
        (!policies.is_empty()).then(|| Self {
            digest: digest_of(&format!("{policies:?}")),
            tier,
            policies,
        })
    }

    /// Returns the name of the chain with the rules of these policies.
    fn chain(&self, direction: Direction, word: &str) -> Name {
        direction.tier_chain(word, &self.digest)
    }
}

/// The word in names of chains of [`RulesOf::TierBeforeAudit`].
const BEFORE_AUDIT: &str = "baseline-before-audit";

/// What the rules of a chain are those of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum RulesOf {
    /// A NetworkPolicy.
    Policy(ObjectName),
    /// Cluster policies.
    Tier(Arc<TierList>),
    /// Cluster policies after which audited policies are asked: what they accept continues.
    TierBeforeAudit(Arc<TierList>),
}

impl RulesOf {
    pub fn chain(&self, direction: Direction) -> Name {
        match self {
            RulesOf::Policy(name) => direction.policy_chain(name),
            RulesOf::Tier(list) => list.chain(direction, tier_word(list.tier)),
            RulesOf::TierBeforeAudit(list) => list.chain(direction, BEFORE_AUDIT),
        }
    }
}
